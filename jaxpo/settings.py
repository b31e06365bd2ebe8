"""What must hold of a config before anything is opened."""

import dataclasses

from jaxpo import config
from jaxpo.errors import InputError
from jaxpo.objective import Objective


def check_settings(settings: config.Config) -> None:
    """InputError for a number out of its range, an empty name, or settings that contradict one another."""
    positive = {
        'train.batch_pairs': settings.train.batch_pairs,
        'train.steps': settings.train.steps,
        'train.log_every': settings.train.log_every,
        'train.evaluate_every': settings.train.evaluate_every,
        'train.checkpoint_every': settings.train.checkpoint_every,
        'train.keep_checkpoints': settings.train.keep_checkpoints,
        'evaluate.pairs': settings.evaluate.pairs,
        'sample.completions': settings.sample.completions,
        'sample.max_new_tokens': settings.sample.max_new_tokens,
        'sample.batch': settings.sample.batch,
        'optimizer.learning_rate': settings.optimizer.learning_rate,
        'optimizer.clip_norm': settings.optimizer.clip_norm,
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
    if not settings.output:
        raise InputError('output is empty: name the directory of the run.')
    if not settings.model.source:
        raise InputError('model.source is empty: name a model.')
    if settings.evaluate.sample_prompts and not settings.data.evaluation:
        raise InputError('evaluate.sample_prompts samples held-out prompts, but data.evaluation names none.')
    if settings.optimizer.schedule == 'constant' and settings.optimizer.final_learning_rate_ratio:
        raise InputError('optimizer.final_learning_rate_ratio has no effect with the schedule constant.')


def check_method_settings(settings: config.Optimizer, objective: Objective) -> None:
    """InputError where the learning rate or decay of a method's parts is set, and no loss has parts to train."""
    if any(term.loss.init_params for term in objective.terms):
        return
    for field in dataclasses.fields(settings):
        if field.name.startswith('method_') and getattr(settings, field.name) != field.default:
            names = ', '.join(term.loss.name for term in objective.terms)
            raise InputError(f'optimizer.{field.name} is set, but {names} trains no parts beside the policy.')
