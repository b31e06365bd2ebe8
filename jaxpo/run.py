"""What every command sets up first: an experiment checked, its model opened, its pairs audited, its state loaded."""

import dataclasses
import functools
import pathlib
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
import transformers
from jax.sharding import Mesh, NamedSharding

from jaxpo import config, sharding, state
from jaxpo import objective as objectives
from jaxpo.data import audit, rows, sampler, sources
from jaxpo.data.columns import Wanted
from jaxpo.errors import InputError
from jaxpo.experiment import Experiment
from jaxpo.models.checkpoint import load_params
from jaxpo.models.decoder import Decoder, abstract_params
from jaxpo.models.source import Pretrained, open_model
from jaxpo.objective import Objective
from jaxpo.scoring import Models
from jaxpo.settings import check_method_settings, check_settings
from jaxpo.state import TrainState
from jaxpo.types import Batch, Pair


@dataclasses.dataclass(frozen=True)
class Run:
    """A checked experiment with its model opened; no weights are in memory yet."""

    experiment: Experiment
    objective: Objective
    mesh: Mesh
    pretrained: Pretrained
    references: dict[str, Pretrained]  # those with sources of their own, not `policy`
    tokenizer: transformers.PreTrainedTokenizerFast
    optimizer: optax.GradientTransformation

    @property
    def config(self) -> config.Config:
        return self.experiment.config

    @property
    def directory(self) -> pathlib.Path:
        return pathlib.Path(self.config.output)

    @property
    def decoder(self) -> Decoder:
        return self._decoder(self.pretrained)

    @property
    def reference_decoders(self) -> dict[str, Decoder]:
        return {name: self._decoder(self.references.get(name, self.pretrained)) for name in self.config.references}

    @property
    def models(self) -> Models:
        return Models(self.decoder, self.reference_decoders, self.mesh)

    @property
    def traced(self) -> dict:
        """Settings of a step that are traced, learning rates aside."""
        return {'objective': self.objective.hyperparameters, 'seed': np.uint32(self.config.train.seed)}

    @property
    def row_multiple(self) -> int:
        """Devices that rows are split over."""
        return self.mesh.size

    def _decoder(self, pretrained: Pretrained) -> Decoder:
        dtype, remat = jnp.dtype(self.config.model.dtype), self.config.model.remat
        rows_sharding = NamedSharding(self.mesh, sharding.ROWS) if self.mesh.size > 1 else None
        return Decoder(pretrained.architecture, dtype=dtype, remat=remat, rows=rows_sharding)


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Audited pairs, and by split the audit's reports and, where a table of a reference may want their texts, rows."""

    train: list[Pair]
    evaluation: list[Pair]
    reports: dict[str, dict]
    validation: list[Pair] = dataclasses.field(default_factory=list)
    rows: dict[str, list[sources.Row]] = dataclasses.field(default_factory=dict)  # `Pair.row` counts these


def prepare(experiment: Experiment) -> Run:
    """Checks settings, objective, mesh and models, in that order. InputError before anything expensive."""
    settings = experiment.config
    check_settings(settings)
    objective = objectives.make(settings.objective, tuple(settings.references))
    check_method_settings(settings.optimizer, objective)
    if settings.model.dtype == 'float32':
        # Accelerators would otherwise round the factors of float32 products to fewer bits.
        jax.config.update('jax_default_matmul_precision', 'highest')
    mesh = sharding.make_mesh(settings.mesh)
    rows.check_rows(settings.rows, mesh.size)
    pretrained = open_model(settings.model.source, settings.model.revision, settings.model.tokenizer)
    tokenizer = pretrained.load_tokenizer()
    references = {
        name: _open_reference(name, reference, tokenizer)
        for name, reference in settings.references.items()
        if reference.source != 'policy'
    }
    _check_vocabularies(objective, pretrained, references)
    optimizer = state.make_optimizer(settings.optimizer)
    return Run(experiment, objective, mesh, pretrained, references, tokenizer, optimizer)


def _check_vocabularies(objective: Objective, policy: Pretrained, references: Mapping[str, Pretrained]) -> None:
    """InputError where a KL divergence is asked for between heads of different sizes (padded differently, say)."""
    if not {'forward_kl', 'reverse_kl'} & {*objective.needs.statistics}:
        return
    ours = policy.architecture.vocabulary
    for name in objective.references:
        theirs = references.get(name, policy).architecture.vocabulary
        if theirs != ours:
            names = ', '.join(term.loss.name for term in objective.terms)
            raise InputError(
                f'references.{name}: its head has {theirs} entries and the policy {ours}, so that no KL divergence '
                f'between them is defined, which {names} needs.'
            )


def _open_reference(name: str, reference: config.Reference, tokenizer) -> Pretrained:
    pretrained = open_model(reference.source, reference.revision)
    if pretrained.load_tokenizer().get_vocab() != tokenizer.get_vocab():
        raise InputError(
            f'references.{name}: its tokenizer differs from the policy, so their tokens cannot be compared.'
        )
    return pretrained


def read_pairs(run: Run, *, train: bool = True) -> Pairs:
    """Reads and audits the training, validation and evaluation pairs. InputError where the audit refuses them."""
    data, wanted, reports, kept = run.config.data, wanted_of(run.objective), {}, {}
    tables = any(reference.table for reference in run.config.references.values())

    def audited(name: str, source: str, split: str, **others: Sequence[Pair]) -> list[Pair]:
        raw = sources.read_rows(source, split, data.revision)
        if tables:
            kept[name] = raw
        pairs, reports[name] = audit.audit(raw, run.tokenizer, data, run.config.rows, wanted=wanted, **others)
        return pairs

    training = audited('train', data.train, data.train_split) if train else []
    validation, evaluation = [], []
    if data.validation:
        validation = audited('validation', data.validation, data.validation_split, training=training)
    if data.evaluation:
        others = {'training': training, 'validation': validation}
        evaluation = audited('evaluation', data.evaluation, data.evaluation_split, **others)
        evaluation = evaluation[: run.config.evaluate.pairs]
    _check_positions(run, [*training, *validation, *evaluation])
    return Pairs(training, evaluation, reports, validation, kept)


def wanted_of(objective: Objective) -> Wanted:
    """What the objective's losses read of the data beside prompts and completions."""
    needs = objective.needs

    def of_sides(names):
        return tuple(f'{side}_{name}' for name in names for side in ('chosen', 'rejected'))

    return Wanted(
        numbers=(*needs.pair_columns, *of_sides(needs.completion_columns)),
        tokens=of_sides(needs.token_columns),
        companions=needs.companions,
        unpaired=objective.takes_unpaired,
    )


def _check_positions(run: Run, pairs: Sequence[Pair]) -> None:
    sequences = [p.prompt.size + max(p.chosen.size, p.rejected.size) for p in pairs]
    sequences += [other.prompt.size + other.completion.size for p in pairs for other in p.companions.values()]
    longest = max(sequences, default=0)
    room = run.pretrained.architecture.max_positions
    if longest > room:
        raise InputError(
            f'A prompt with its completion takes {longest} tokens, but {run.pretrained.name} has {room} positions. '
            'Lower data.max_prompt_tokens or data.max_completion_tokens.'
        )


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How many steps a run takes, and which pairs each of them."""

    settings: config.Train
    count: int  # training pairs

    @property
    def steps(self) -> int:
        epochs, batch = self.settings.epochs, self.settings.batch_pairs
        return self.settings.steps or sampler.steps_of(epochs, self.count, batch)

    def pairs_of(self, step: int) -> np.ndarray:
        """Indices of the pairs of `step`, from 0: a pure function of the seed and the step."""
        batch = self.settings.batch_pairs
        total = batch * self.steps if self.settings.steps else sampler.items_of(self.settings.epochs, self.count)
        return sampler.pair_indices(self.settings.seed, step, batch, self.count, total)


def make_batch(run: Run, pairs: Sequence[Pair]) -> Batch:
    """Pairs laid out as microbatches `[A, R, ...]` of rows, on the mesh. Each process makes all, places its own."""
    batch = rows.fill_rows(pairs, run.config.rows, row_multiple=run.row_multiple)
    return sharding.put(batch, run.mesh, sharding.MICROBATCHES)


def abstract_state(run: Run) -> tuple[TrainState, TrainState]:
    """Shapes and shardings of the TrainState, without making it. InputError where the mesh does not divide it."""
    dtype = jnp.dtype(run.config.model.dtype)

    def reference(name):
        shapes = abstract_params(run.reference_decoders[name].architecture)
        return jax.eval_shape(functools.partial(_frozen, dtype=dtype), shapes)

    references = {name: reference(name) for name in run.config.references}
    params = abstract_params(run.pretrained.architecture)

    def create(params, references):
        return state.create(params, references, run.optimizer, *init_method(run))

    shapes = jax.eval_shape(create, params, references)
    shardings = sharding.parameter_shardings(shapes, run.mesh)
    placed = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)
    return placed, shardings


def init_method(run: Run) -> tuple[dict, dict]:
    """What the objective's losses keep beside the policy, at step 0: running state and trained parts."""
    measured = run.objective.references
    read = run.reference_decoders[measured[0]] if measured and run.objective.token_masks else run.decoder
    key = jax.random.key(run.config.train.seed)
    architecture = read.architecture
    params = objectives.init_params(run.objective, key, architecture.layers, architecture.width)
    return objectives.init_state(run.objective), params


def _frozen(params, dtype):
    """A copy with matrices in the compute dtype. Vectors stay float32, as they are used: the copy computes the same."""

    def copy(leaf, matrix):
        return jnp.array(leaf, dtype if matrix else leaf.dtype, copy=True)

    return jax.tree.map(copy, params, state.matrices(params))


def load_references(run: Run, shardings: TrainState, policy=None) -> dict[str, Mapping]:
    """Reference parameters, matrices in the compute dtype: copies, so that a donated policy takes none of them along.

    `policy`: its parameters at step 0, where they are in memory already.
    """
    seed, dtype = run.config.train.seed, jnp.dtype(run.config.model.dtype)
    freeze = jax.jit(functools.partial(_frozen, dtype=dtype))

    def source(name):
        if name in run.references:
            return load_params(run.references[name], shardings.reference_params[name], seed)
        return load_params(run.pretrained, shardings.params, seed) if policy is None else policy

    return {name: freeze(source(name)) for name in run.config.references}


def load_state(run: Run) -> TrainState:
    """The state at step 0, read from the models' sources into its shardings."""
    start, (_, shardings) = load_start(run), abstract_state(run)
    return start.replace(opt_state=jax.jit(run.optimizer.init, out_shardings=shardings.opt_state)(start.trained))


def load_start(run: Run) -> TrainState:
    """The state at step 0 without its optimizer, as evaluation reads it."""
    _, shardings = abstract_state(run)
    params = load_params(run.pretrained, shardings.params, run.config.train.seed)
    references = load_references(run, shardings, params)
    method_shardings = (shardings.method_state, shardings.method_params)
    method_state, method_params = jax.jit(functools.partial(init_method, run), out_shardings=method_shardings)()
    step = jax.device_put(np.zeros((), np.int32), shardings.step)
    return TrainState(step, params, references, (), method_state, method_params)
