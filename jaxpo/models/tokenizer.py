"""The tokenizer of a model, and the tokens that end its turns."""

import pathlib
from collections.abc import Mapping
from typing import Any

import transformers

from jaxpo.errors import InputError
from jaxpo.models.safetensors_files import check_links, read_json


def load_tokenizer(directory: pathlib.Path) -> transformers.PreTrainedTokenizerFast:
    """The tokenizer that the directory's tokenizer.json defines.

    transformers' AutoTokenizer may rebuild the pre-tokenizer from a class name instead; the file is read as it is.
    """
    check_links(directory)
    if not (directory / 'tokenizer.json').is_file():
        raise InputError(
            f'{directory} has no tokenizer.json. Set model.tokenizer to a directory or hub id that has one, or write '
            'one with transformers: AutoTokenizer.from_pretrained(...).save_pretrained(directory).'
        )
    read_json(directory / 'tokenizer.json')
    try:
        return transformers.PreTrainedTokenizerFast.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f'The tokenizer in {directory} cannot be read: {error}') from None


def end_ids(
    tokenizer: transformers.PreTrainedTokenizerFast,
    hugging_face_config: Mapping[str, Any],
    generation_config: Mapping[str, Any] | None,
) -> tuple[int, ...]:
    """The ids that end a turn when generating, sorted.

    Those of generation_config.json, else of config.json, and the tokenizer's own: chat models may have several, and
    where the files differ each of them is right for some prompts.
    """
    found = (generation_config or {}).get('eos_token_id')
    if found is None:
        found = hugging_face_config.get('eos_token_id')
    ids = {found} if isinstance(found, int) else set(found or ())
    if tokenizer.eos_token_id is not None:
        ids.add(tokenizer.eos_token_id)
    if not ids:
        raise InputError('Neither the configs nor the tokenizer name a token that ends a turn (eos_token_id).')
    wrong = [place for place in ids if not isinstance(place, int) or not 0 <= place < len(tokenizer)]
    if wrong:
        raise InputError(f'eos_token_id {wrong[0]!r} is not an id of the tokenizer ({len(tokenizer)} tokens).')
    return tuple(sorted(ids))
