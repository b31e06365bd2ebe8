"""Every method in a world whose truth is known: is a difference bias, chance, or over-optimisation?

    jaxpo study experiments/exact/exact.py          trains all methods on finite data
    python experiments/exact/exact.py --optima      with all data there could be: each method's own optimum

The policy is a table over all completions of four prompts (`environment`), labels are Bradley and Terry's of a known
reward, a part of which is length, and losses are the registered ones. There is no estimate in the split `report`: it is
the exact reward and KL of each policy. The split `selection`, by which settings are chosen, is what a practitioner
has: the reward of samples. Prompts are the same in both, as a table learns nothing of one prompt from another; the
pairs of each split are drawn apart from each other and from the training pairs.
"""

import argparse
import pathlib
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxpo import losses
from jaxpo import objective as objectives
from jaxpo.config import Scalar
from jaxpo.errors import InputError
from jaxpo.experiment import import_module
from jaxpo.study.design import Cell, Method, Study
from jaxpo.study.records import Outcome

HERE = pathlib.Path(__file__).parent
environment, optimum, training = (
    import_module(str(HERE / f'{name}.py')) for name in ('environment', 'optimum', 'training')
)

LEARNING_RATES = (0.03, 0.1)
PRICES = (0.03, 0.1, 0.3)
"""Of a nat of KL, in units of reward: what `beta` is to most methods, whatever default they have elsewhere."""
STRENGTHS: dict[str, tuple[str, tuple[float, ...]]] = {
    'alpha_dpo': ('beta', (0.8, 2.5, 7.5)),
    'alpha_po': ('beta', (0.8, 2.5, 7.5)),
    'ipo': ('tau', (0.03, 0.1, 0.3)),
    'ln_dpo': ('beta', (0.5, 1.5, 5.0)),
    'mi': ('alpha', PRICES),
    'orpo': ('odds_ratio_weight', (0.1, 1.0, 10.0)),
    'rainbow_po': ('beta', (1.0, 3.0, 10.0)),
    'simpo': ('beta', (0.7, 2.0, 6.0)),
    'slic': ('delta', (0.3, 1.0, 3.0)),
}
"""The hyperparameter that is scanned, where it is not `beta` over PRICES: around the default where rewards are means
over tokens, which do not depend on how long completions are."""
WORDS = {
    'f_dpo divergence=forward_kl': ('f_dpo', {'divergence': 'forward_kl'}),
    'f_dpo divergence=jensen_shannon': ('f_dpo', {'divergence': 'jensen_shannon'}),
    'ipo reduction=sum': ('ipo', {'reduction': 'sum'}),
    'mi prior=uniform': ('mi', {'prior': 'uniform'}),
}
"""Further choices of words that change what is optimal. (The other priors of `mi` are methods of their own.)"""


def trials() -> tuple[dict[str, Method], dict[str, str]]:
    """All methods on trial by name; and the registered losses that are not, with why.

    Each is tried at six settings: three strengths and two learning rates, or six of these where nothing else is free.
    """
    words = {name: (name, {}) for name in sorted(losses.LOSSES)} | WORDS
    why = {name: training.excluded(losses.find(loss), given) for name, (loss, given) in words.items()}
    found = {name: _method(loss, given) for name, (loss, given) in words.items() if not why[name]}
    found['multi_dpo'] = _of_two('multi_dpo', {})
    found |= {f'dpo mix={mix}': _of_two('dpo', {'mix': mix}) for mix in ('geometric', 'arithmetic')}
    found['mrpo'] = _of_two('dpo', objectives.mrpo()['mixture'])
    found['dpo from another'] = _method('dpo', {}, {'references': environment.REFERENCES[1:]})
    return found, {name: reason for name, reason in why.items() if reason}


def _method(loss: str, given: dict[str, Scalar], settings: dict | None = None, mixture: dict | None = None) -> Method:
    numbers = losses.find(loss).hyperparameters(given)
    field, values = STRENGTHS.get(loss, ('beta', PRICES))
    if field in numbers:
        grid = {f'objective.{loss}.{field}': values, 'learning_rate': LEARNING_RATES}
    else:
        grid = {'learning_rate': (0.01, 0.02, 0.03, 0.06, 0.1, 0.2)}
    return Method({**(mixture or {}), loss: given}, grid, settings or {})


def _of_two(loss: str, mixture: dict[str, Scalar]) -> Method:
    """A loss that is given both references."""
    return _method(loss, {}, {'references': environment.REFERENCES}, {'mixture': mixture})


def get_study() -> Study:
    return Study(
        base=training.Exact(output='runs/exact'),
        methods=trials()[0],
        seeds=tuple(range(16)),  # cells are cheap, and rewards of one method differ from seed to seed by 0.14
        metric='reward',
        question='Where the truth is known: which methods earn more true reward than DPO from 64 pairs, at what KL?',
    )


def run_cells(cells: Sequence[Cell]) -> Iterator[tuple[Cell, Outcome]]:
    """All cells, those of a method in one program."""
    return training.run_cells(cells)


def optima(only: Sequence[str], settings) -> Iterator[tuple[str, float | None, dict[str, float] | str]]:
    """Method, strength, and what is exactly true of the policy it ends up with; or why it has no such policy.

    `optimum_kl` is from the best policy at the method's own price of a nat, where its strength is a `beta` or `alpha`.
    """
    world = environment.make_world(settings)
    for name, method in trials()[0].items():
        if only and name not in only:
            continue
        references = method.settings.get('references', environment.REFERENCES[:1])
        try:
            objective = objectives.make(method.objective, references)
            optimum.check(objective)
        except InputError as error:
            yield name, None, str(error)
            continue
        field, values = next((field, values) for field, values in method.grid.items())
        yield from _optima_of(world, name, objective, field, values)


def _optima_of(world, name: str, objective: objectives.Objective, field: str, values: Sequence[float]):
    _, *place = field.split('.')
    values = values if place else (None,)
    with jax.enable_x64(True):
        all_pairs = optimum.population(world)
        for value in values:
            numbers = {loss: dict(given) for loss, given in objective.hyperparameters.items()}
            if place:
                numbers[place[0]][place[1]] = value
            found = optimum.solve(objective, world, all_pairs, jax.tree.map(np.float64, numbers))
            price = value if place and place[1] in ('beta', 'alpha') else training.Exact('').beta
            measured = environment.measure(world, environment.log_policy(world, found.logits), jnp.float64(price))
            measured = {key: float(number) for key, number in measured.items()}
            yield name, value, measured | {'gradient': float(found.gradient)}


COLUMNS = ('reward', 'kl', 'gap', 'share', 'length', 'optimum_kl', 'gradient')


def optima_table(only: Sequence[str], settings) -> Iterator[str]:
    """Lines of a Markdown table: a row for each method and strength."""
    yield f'| method | strength | {" | ".join(COLUMNS)} |'
    yield '|---' * (len(COLUMNS) + 2) + '|'
    for name, value, found in optima(only, settings):
        if isinstance(found, str):
            yield f'| {name} | | {found} |' + ' |' * (len(COLUMNS) - 1)
            continue
        at_rest = found['gradient'] <= optimum.SMALL
        found['share'] = found['reward'] / (found['reward'] + found['gap'])
        # Rounded first, so that what is 0 but for rounding has no sign.
        shown = [f'{round(found[column], 4) + 0.0:.4f}' for column in COLUMNS[:-1]] + [f'{found["gradient"]:.0e}']
        strength = '' if value is None else f'{value:g}'
        yield f'| {name}{"" if at_rest else " (no rest)"} | {strength} | {" | ".join(shown)} |'


def main() -> int:
    parser = argparse.ArgumentParser(description='The exact optimum of every method, with all data there could be.')
    parser.add_argument('--optima', action='store_true', required=True, help='print the table')
    parser.add_argument('--only', default='', help='methods by name, separated by commas')
    given = parser.parse_args()
    only = [name for name in given.only.split(',') if name]
    for line in optima_table(only, environment.Environment()):
        print(line, flush=True)
    return 0


if __name__ == '__main__':
    raise SystemExit(main())
