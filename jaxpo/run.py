"""What every command sets up first: an experiment checked, its models opened, its pairs audited."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
import transformers
from jax.sharding import Mesh, NamedSharding

from jaxpo import config, opening, sharding, state, storage
from jaxpo import objective as objectives
from jaxpo.data import audit, rows, sampler, sources
from jaxpo.data.columns import Wanted
from jaxpo.errors import InputError
from jaxpo.experiment import Experiment
from jaxpo.models import attention_choice, lora
from jaxpo.models.decoder import Decoder
from jaxpo.models.lora import Lora
from jaxpo.models.peft import open_adapter
from jaxpo.models.source import Pretrained
from jaxpo.objective import Objective
from jaxpo.scoring import FrozenModel, Models
from jaxpo.settings import check_objective_settings, check_settings
from jaxpo.step import Average
from jaxpo.types import Batch, Pair


@dataclasses.dataclass(frozen=True)
class Run:
    """A checked experiment with its model opened; no weights are in memory yet."""

    experiment: Experiment
    objective: Objective
    mesh: Mesh
    pretrained: Pretrained
    references: dict[str, Pretrained]  # those with sources of their own, not `policy`
    tokenizer: transformers.PreTrainedTokenizerFast | None  # None where the run is planned
    reference_tokenizers: dict[str, transformers.PreTrainedTokenizerFast]  # those that differ from the policy's
    lora: Lora | None
    optimizer: optax.GradientTransformation

    @property
    def config(self) -> config.Config:
        return self.experiment.config

    @property
    def directory(self) -> storage.Path:
        return storage.path(self.config.output)

    @property
    def dtype(self) -> jnp.dtype:
        """The compute dtype."""
        return jnp.dtype(self.config.model.dtype)

    @property
    def decoder(self) -> Decoder:
        """The policy's."""
        return self._decoder(self.pretrained, self.lora)

    @property
    def models(self) -> Models:
        frozen = {name: self._frozen_model(name) for name in self.config.references}
        return Models(self.decoder, frozen, self.mesh)

    @property
    def averages(self) -> dict[str, Average]:
        """The references that follow the policy."""
        references = self.config.references.items()
        return {name: Average(r.update_every, r.update_rate) for name, r in references if r.update_every}

    def held(self, weights: str) -> tuple[str, ...]:
        """Names of the frozen models with `weights` of this kind (`scoring.FrozenModel`), averages left out."""
        frozen = self.models.frozen.items()
        return tuple(name for name, model in frozen if model.weights == weights and name not in self.averages)

    def pretrained_of(self, name: str) -> Pretrained:
        """The source of a frozen model."""
        return self.references.get(name, self.pretrained)

    def adapter_of(self, name: str | None) -> str | None:
        """Directory of the PEFT adapter that is merged into a frozen model, or into the policy (None)."""
        if name is None or self.copies_policy(name):
            return self.config.model.adapter
        return self.config.references[name].adapter

    def copies_policy(self, name: str) -> bool:
        """Whether a frozen model is the policy as it starts."""
        return self.config.references[name].source == 'policy' and self.config.references[name].adapter is None

    def dtype_of(self, name: str) -> jnp.dtype:
        """The dtype that the matrices of a frozen model are held in."""
        held = self.config.references[name].dtype
        return self.dtype if held == 'model' else jnp.dtype(held)

    def in_host(self, name: str) -> bool:
        return self.config.references[name].memory == 'pinned_host'

    @property
    def traced(self) -> dict:
        """Settings of a step that are traced, learning rates aside."""
        return {'objective': self.objective.hyperparameters, 'seed': np.uint32(self.config.train.seed)}

    @property
    def row_multiple(self) -> int:
        """Shares that rows are split into."""
        return sharding.row_multiple(self.mesh)

    @property
    def branches(self) -> int:
        """Most completions that share a prompt's segment of a row."""
        return 2 if self.config.rows.layout == 'shared' else 1

    def attention_of(self, pretrained: Pretrained) -> attention_choice.Choice:
        """The attention kernel of a model. InputError where the one that was named cannot do what is asked of it."""
        return attention_choice.choose(
            self.config.model.attention,
            pretrained.architecture,
            platform=self.mesh.devices.flat[0].platform,
            dtype=self.dtype,
            lengths=self.config.rows.lengths,
            branches=self.branches,
        )

    def _frozen_model(self, name: str) -> FrozenModel:
        reference, follows = self.config.references[name], name in self.averages
        under_adapter = self.lora is not None and self.copies_policy(name)
        if reference.table:
            weights = 'table'
        elif under_adapter and follows:
            weights = 'adapter'
        elif under_adapter and reference.memory == 'device' and self.dtype_of(name) == self.dtype:
            weights = 'base'
        else:
            weights = 'own'
        lora = self.lora if weights == 'adapter' else None
        return FrozenModel(self._decoder(self.pretrained_of(name), lora), weights, reference.memory)

    def _decoder(self, pretrained: Pretrained, lora: Lora | None) -> Decoder:
        rows_sharding = NamedSharding(self.mesh, sharding.ROWS) if self.mesh.size > 1 else None
        return Decoder(
            pretrained.architecture,
            dtype=self.dtype,
            remat=self.config.model.remat,
            rows=rows_sharding,
            lora=lora,
            attention=self.attention_of(pretrained).kernel,
            branches=self.branches,
        )


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Audited pairs, and by split the audit's reports and, where a table of a reference may want their texts, rows."""

    train: list[Pair]
    evaluation: list[Pair]
    reports: dict[str, dict]
    validation: list[Pair] = dataclasses.field(default_factory=list)
    rows: dict[str, list[sources.Row]] = dataclasses.field(default_factory=dict)  # `Pair.row` counts these


def prepare(experiment: Experiment, devices: Sequence[jax.Device] | None = None, *, planned: bool = False) -> Run:
    """Checks settings, objective, mesh and models, in that order. InputError before anything expensive.

    Args:
      devices: those to run on; None takes all there are.
      planned: whether only sizes are of interest. Tokenizers are then not read, nor weights fetched.
    """
    settings = experiment.config
    check_settings(settings)
    objective = objectives.make(settings.objective, tuple(settings.references))
    check_objective_settings(settings, objective)
    if settings.model.dtype == 'float32':
        # Accelerators would otherwise round the factors of float32 products to fewer bits.
        jax.config.update('jax_default_matmul_precision', 'highest')
    mesh = sharding.make_mesh(settings.mesh, devices)
    rows.check_rows(settings.rows, sharding.row_multiple(mesh))
    adapter = lora.of(settings.lora)
    pretrained = opening.open_for_mesh(settings, mesh, 'model', settings.model, sizes=planned)
    tokenizer = None if planned else pretrained.load_tokenizer()
    references, tokenizers = {}, {}
    for name, reference in settings.references.items():
        if reference.source != 'policy':
            references[name] = opening.open_for_mesh(settings, mesh, f'references.{name}', reference, sizes=planned)
            opening.check_reference(name, reference, references[name], pretrained)
            own = None if planned else references[name].load_tokenizer()
            if not planned and own.get_vocab() != tokenizer.get_vocab():
                tokenizers[name] = own
    opening.check_tokenizers(settings, objective, tokenizers)
    opening.check_vocabularies(objective, pretrained, references)
    optimizer = state.make_optimizer(settings.optimizer)
    run = Run(experiment, objective, mesh, pretrained, references, tokenizer, tokenizers, adapter, optimizer)
    for opened in (pretrained, *references.values()):
        run.attention_of(opened)
    for name in (None, *settings.references):
        directory = run.adapter_of(name)
        if directory is not None:
            open_adapter(directory, pretrained.architecture if name is None else run.pretrained_of(name).architecture)
    return run


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
