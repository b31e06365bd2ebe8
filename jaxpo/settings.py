"""What must hold of a config before anything is opened."""

import dataclasses
import typing

from jaxpo import config
from jaxpo.errors import InputError, unknown
from jaxpo.objective import Objective


def check_settings(settings: config.Config) -> None:
    """InputError for a number out of its range, an empty or unknown name, or settings that contradict one another."""
    _check_choices(settings, '')
    for name, reference in settings.references.items():
        _check_choices(reference, f'references.{name}.')
    positive = {
        'train.batch_pairs': settings.train.batch_pairs,
        'train.steps': settings.train.steps,
        'train.log_every': settings.train.log_every,
        'train.evaluate_every': settings.train.evaluate_every,
        'train.checkpoint_every': settings.train.checkpoint_every,
        'train.keep_checkpoints': settings.train.keep_checkpoints,
        'evaluate.pairs': settings.evaluate.pairs,
        'evaluate.validation_pairs': settings.evaluate.validation_pairs,
        'sample.completions': settings.sample.completions,
        'sample.max_new_tokens': settings.sample.max_new_tokens,
        'sample.batch': settings.sample.batch,
        'model.vocabulary_multiple': settings.model.vocabulary_multiple,
        'optimizer.learning_rate': settings.optimizer.learning_rate,
        'optimizer.clip_norm': settings.optimizer.clip_norm,
        'optimizer.epsilon': settings.optimizer.epsilon,
        **{f'references.{name}.update_every': r.update_every for name, r in settings.references.items()},
    }
    for name, value in positive.items():
        if value is not None and not value > 0:
            raise InputError(f'{name} must be positive, not {value!r}.')
    at_least_zero = {
        'train.epochs': settings.train.epochs,
        'optimizer.weight_decay': settings.optimizer.weight_decay,
        'optimizer.warmup_steps': settings.optimizer.warmup_steps,
        'sample.temperature': settings.sample.temperature,
        'evaluate.sample_prompts': settings.evaluate.sample_prompts,
        'evaluate.show': settings.evaluate.show,
    }
    for name, value in at_least_zero.items():
        if not value >= 0:
            raise InputError(f'{name} must be 0 or more, not {value!r}.')
    if not 0 < settings.sample.top_p <= 1:
        raise InputError(f'sample.top_p must be above 0 and at most 1, not {settings.sample.top_p!r}.')
    for name, reference in settings.references.items():
        _check_reference(name, reference, settings.model)
    _check_adapter(settings)
    if not settings.output:
        raise InputError('output is empty: name the directory of the run.')
    if not settings.model.source:
        raise InputError('model.source is empty: name a model.')
    if settings.evaluate.sample_prompts and not settings.data.evaluation:
        raise InputError('evaluate.sample_prompts samples held-out prompts, but data.evaluation names none.')
    _check_optimizer(settings.optimizer)


def _check_choices(section, where: str) -> None:
    """InputError for a name that is not among those its field lists: a module may set what no command line would."""
    kinds = typing.get_type_hints(type(section))
    for field in dataclasses.fields(section):
        value, kind = getattr(section, field.name), kinds[field.name]
        if dataclasses.is_dataclass(value):
            _check_choices(value, f'{where}{field.name}.')
        elif typing.get_origin(kind) is typing.Literal and value not in typing.get_args(kind):
            raise unknown(where + field.name, str(value), typing.get_args(kind))


def _check_optimizer(settings: config.Optimizer) -> None:
    """InputError for moments that cannot be, and settings that the kind or the schedule does not read."""
    for name in ('beta1', 'beta2'):
        if not 0 <= getattr(settings, name) < 1:
            raise InputError(f'optimizer.{name} must be 0 or more and below 1, not {getattr(settings, name)!r}.')
    if settings.kind == 'adafactor':
        for name in ('moment_dtype', 'beta1', 'beta2', 'epsilon'):
            if getattr(settings, name) != getattr(config.Optimizer, name):
                raise InputError(f"optimizer.{name} has no effect: it is AdamW's, and optimizer.kind is adafactor.")
    if settings.schedule == 'constant' and settings.final_learning_rate_ratio:
        raise InputError('optimizer.final_learning_rate_ratio has no effect with the schedule constant.')


def _check_reference(name: str, reference: config.Reference, model: config.Model) -> None:
    where, default = f'references.{name}', config.Reference()
    if reference.update_every and not 0 < reference.update_rate <= 1:
        raise InputError(f'{where}.update_rate must be above 0 and at most 1, not {reference.update_rate!r}.')
    if not reference.update_every and reference.update_rate != default.update_rate:
        raise InputError(f'{where}.update_rate has no effect: {where}.update_every is not set.')
    moving = ('update_every',) if reference.update_every else ()
    for other in moving:
        for setting in ('table', 'dtype', 'memory'):
            if getattr(reference, setting) != getattr(default, setting):
                raise InputError(f'{where}.{setting} cannot be set with {where}.{other}: the reference moves.')
    if reference.table:
        for setting in ('dtype', 'memory'):
            if getattr(reference, setting) != getattr(default, setting):
                raise InputError(f'{where}.{setting} has no effect: with {where}.table no weights are held.')
    if reference.source == 'policy':
        for setting in ('revision', 'tokenizer'):
            if getattr(reference, setting) is not None:
                raise InputError(f"{where}.{setting} has no effect: its source is the policy's.")
        if reference.adapter is not None and model.adapter is not None:
            raise InputError(f'{where}.adapter cannot be merged into a policy that has model.adapter: name its source.')


def _check_adapter(settings: config.Config) -> None:
    """InputError where an adapter is described that is not trained, or exported that is not there."""
    default = config.Lora()
    if settings.lora.rank == 0:
        for field in dataclasses.fields(default):
            if getattr(settings.lora, field.name) != getattr(default, field.name):
                raise InputError(f'lora.{field.name} has no effect: lora.rank is 0, so the weights are trained.')
        if settings.export.form == 'adapter':
            raise InputError('export.form adapter: lora.rank is 0, so there is no adapter to export.')
    if settings.export.form == 'adapter' and settings.model.adapter is not None:
        raise InputError(
            'export.form adapter: the trained adapter stands on weights with model.adapter merged in, which no single '
            'adapter says. Export the model (export.form model).'
        )
    if settings.lora.rank:
        for name, reference in settings.references.items():
            if reference.update_every and (reference.source != 'policy' or reference.adapter is not None):
                raise InputError(f'references.{name}: where an adapter is trained, only a copy of it can follow it.')


def check_objective_settings(settings: config.Config, objective: Objective) -> None:
    """InputError where the objective and the other settings do not fit together."""
    _check_method_settings(settings.optimizer, objective)
    _check_tables(settings, objective)
    observes = objective.mixture.observes if objective.mixture else 'nothing'
    if observes in ('validation', 'reward') and not settings.data.validation:
        raise InputError(
            f'objective.mixture.weights {objective.mixture.weights} chooses references by validation pairs: name some '
            'in data.validation, other than those trained on or evaluated.'
        )
    if observes not in ('validation', 'reward') and settings.data.validation:
        raise InputError('data.validation is set, but no mixture in the objective chooses references by it.')


def _check_tables(settings: config.Config, objective: Objective) -> None:
    """InputError where the objective asks of a reference what a table does not hold, or nothing at all."""
    read = {*objective.models, *(objective.references if objective.runs_references else ())}
    for name, reference in settings.references.items():
        if reference.table and name not in read:
            losses = ', '.join(term.loss.name for term in objective.terms)
            raise InputError(f'references.{name}.table has no effect: {losses} reads no log-probabilities of {name}.')
    asked = set(objective.needs.statistics)
    live = [name for name in ('forward_kl', 'reverse_kl', 'activations') if name in asked]
    live += ['hidden states'] * bool(objective.token_masks)
    for name in objective.references:
        if settings.references[name].table and live:
            readers = [term.loss.name for term in objective.terms if {*term.needs.statistics} & {*live}]
            readers += list(objective.token_masks)
            raise InputError(
                f'references.{name}.table: {", ".join(dict.fromkeys(readers))} needs {", ".join(live)} of the model '
                f'itself, and a table holds numbers of single tokens. Set references.{name}.table to False.'
            )


def _check_method_settings(settings: config.Optimizer, objective: Objective) -> None:
    """InputError where the learning rate or decay of a method's parts is set, and no loss has parts to train."""
    if any(term.loss.init_params for term in objective.terms):
        return
    for field in dataclasses.fields(settings):
        if field.name.startswith('method_') and getattr(settings, field.name) != field.default:
            names = ', '.join(term.loss.name for term in objective.terms)
            raise InputError(f'optimizer.{field.name} is set, but {names} trains no parts beside the policy.')
