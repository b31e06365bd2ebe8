"""What a researcher asks of losses: which there are, what one looks like, and whether it keeps its promises."""

import argparse
import dataclasses
import importlib.metadata
import inspect
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import plotille
from rich.markup import escape
from rich.padding import Padding

from jaxpo import losses
from jaxpo.console import console, number
from jaxpo.errors import InputError, unknown
from jaxpo.experiment import import_module
from jaxpo.losses import checks, scores
from jaxpo.losses.contract import Example, example, losses_of
from jaxpo.losses.registry import Loss, Needs
from jaxpo.types import Completion

POINTS = 161  # of a plot; odd, so that one is at the reference
REACH = 15.0  # nats to either side of it


def show_losses(arguments: Sequence[str]) -> int:
    """`jaxpo losses`: all of them; `jaxpo losses NAME`: one, with its loss and gradient against the margin."""
    parser = argparse.ArgumentParser(
        prog='jaxpo losses',
        description='List all losses, or show one with a plot of its loss and gradient against the margin.',
        allow_abbrev=False,
    )
    parser.add_argument('name', nargs='?', metavar='NAME', help='a loss, or FILE.py:LOSS for one of your own')
    parser.add_argument('--markdown', action='store_true', help='all losses and all priors as Markdown tables')
    known, words = parser.parse_known_args(arguments)
    if known.markdown:
        console().print(f'{markdown_table()}\n\n{losses.priors.unification_table()}', markup=False)
        return 0
    if known.name is None:
        if words:
            raise InputError(f'jaxpo losses: {" ".join(words)} is for one loss: name it first.')
        for entry in sorted(losses.LOSSES.values(), key=lambda entry: entry.name):
            _print_entry(entry)
        console().print(f'\n{len(losses.LOSSES)} losses. `jaxpo losses NAME` shows one, `jaxpo check NAME` checks it.')
        return 0
    entry = find(known.name)
    given = hyperparameters(entry, words)
    _print_whole(entry, given)
    return 0


def check(arguments: Sequence[str]) -> int:
    """`jaxpo check NAME`: runs every check of a loss on the CPU, in float64. Exit code 1 where one does not hold."""
    parser = argparse.ArgumentParser(
        prog='jaxpo check',
        description='Check a loss on the CPU, in float64: gradients by finite differences, padding, empty slots, '
        'coupling, references, needs, extremes, tracing, documentation. Exit code 1 where something does not hold.',
        allow_abbrev=False,
    )
    parser.add_argument('name', metavar='NAME', help='a loss, or FILE.py:LOSS for one of your own')
    entry = find(parser.parse_args(arguments).name)
    out, verdicts = console(), []
    out.print(f'[bold]{entry.name}[/bold]  {escape(entry.source)}')
    with jax.default_device(jax.devices('cpu')[0]):
        for verdict in checks.run(entry):
            verdicts.append(verdict)
            mark = '[green]holds[/green]' if verdict.held else '[bold red]BROKEN[/bold red]'
            out.print(f'{mark}  {escape(verdict.statement)}')
            out.print(Padding(f'[dim]{escape(verdict.found)}[/dim]', (0, 0, 0, 7)))
    held = sum(verdict.held for verdict in verdicts)
    out.print(f'\n{_sentence(entry, held, len(verdicts))}')
    return 0 if held == len(verdicts) else 1


def _sentence(entry: Loss, held: int, count: int) -> str:
    """The verdict as an appendix of a paper may quote it."""
    how = (
        f'jaxpo {importlib.metadata.version("jaxpo")}, jax {jax.__version__}, float64 on the CPU, '
        f'central differences of {checks.STEP:g} nats'
    )
    if held == count:
        return f'The loss {entry.name} passes all {count} checks ({how}).'
    return f'The loss {entry.name} fails {count - held} of {count} checks ({how}).'


def find(name: str) -> Loss:
    """A registered loss, or `FILE.py:LOSS`: one that a file registers. InputError names the nearest."""
    path, colon, own = name.rpartition(':')
    if not colon:
        return losses.find(name)
    module = import_module(path)
    registered = {entry.name: entry for entry in losses.LOSSES.values() if entry.function.__module__ == module.__name__}
    if own not in registered:
        raise unknown(f'loss in {path}', own, registered)
    return registered[own]


def hyperparameters(entry: Loss, words: Sequence[str]) -> dict[str, Any]:
    """`--beta 0.3 --reduction sum` as hyperparameters of the loss, checked."""
    if len(words) % 2 or not all(word.startswith('--') for word in words[::2]):
        raise InputError(f'{entry.name}: hyperparameters are given as --NAME VALUE, not {" ".join(words)!r}.')
    given = {word[2:].replace('-', '_'): value for word, value in zip(words[::2], words[1::2])}
    choices = entry.choices({})
    given = {name: value if name in choices else _number(value) for name, value in given.items()}
    entry.check(given)
    return given


def _number(word: str) -> float | str:
    try:
        return float(word)
    except ValueError:
        return word


def _print_entry(entry: Loss) -> None:
    out = console()
    out.print(f'\n[bold cyan]{entry.name}[/bold cyan]  {escape(entry.summary)}')
    lines = [f'[dim]{escape(entry.formula)}[/dim]', escape(entry.source), f'{_settings(entry)}; {_needs(entry)}']
    for line in lines:
        out.print(Padding(line, (0, 0, 0, 4)), soft_wrap=False)


def markdown_table() -> str:
    """All losses as a Markdown table: what each is, what it reads and does, its source and defaults."""
    lines = ['| loss | what it is | needs | defaults | source |', '|---|---|---|---|---|']
    for name, entry in sorted(losses.LOSSES.items()):
        defaults = ', '.join(f'{key} {value}' for key, value in entry.defaults.items())
        lines.append(f'| `{name}` | {entry.summary} | {", ".join(facts(entry))} | {defaults} | {entry.source} |')
    return '\n'.join(lines)


def _settings(entry: Loss) -> str:
    values = ', '.join(f'{name} {value}' for name, value in entry.defaults.items())
    return escape(values or 'no hyperparameters')


def _needs(entry: Loss) -> str:
    """What the loss reads and does beyond the policy's log-probabilities, in words."""
    return escape(', '.join(facts(entry)) or "reads the policy's log-probabilities only")


def facts(entry: Loss) -> list[str]:
    """What the loss needs with its defaults, and what is true of it, in a few words each."""
    needs: Needs = entry.needs_of({})
    groups = {
        'column': (*needs.pair_columns, *needs.completion_columns),
        'token column': needs.token_columns,
        'model': needs.models,
        'companion': needs.companions,
    }
    reference = 'several references' if entry.many_references else 'reference'
    found = [reference] * entry.reads_reference_with({}) + [name.replace('_', ' ') for name in needs.statistics]
    found += [f'{kind} {name}' for kind, names in groups.items() for name in names]
    flags = {
        'all pairs of a step': entry.couples_batch,
        'running state': entry.init_state is not None,
        'trained parts': entry.init_params is not None,
        'takes unpaired rows': entry.takes_unpaired,
    }
    return found + [name for name, holds in flags.items() if holds]


def _print_whole(entry: Loss, given: Mapping[str, Any]) -> None:
    out = console()
    out.print(f'[bold cyan]{entry.name}[/bold cyan]  {escape(entry.source)}\n')
    out.print(escape(inspect.getdoc(entry.function)))
    out.print(f'\nneeds       {_needs(entry)}')
    out.print(f'divided by  {entry.normaliser} of the step')
    out.print(
        f'settings    {escape(", ".join(f"{k} {v}" for k, v in entry.hyperparameters(given).items()) or "none")}\n'
    )
    for line in _parts(entry):
        out.print(escape(line))
    margins, values, slopes = curve(entry, given)
    for label, heights in (('loss', values), ('slope', slopes)):
        out.print(_plot(label, margins, heights), markup=False)
    middle = len(margins) // 2
    out.print(f'At the reference the loss is {number(values[middle])} and its slope {number(slopes[middle])} a nat.')


def _parts(entry: Loss) -> list[str]:
    """Every choice of the loss's words that select a part, in a line: its name, hyperparameters of its own, summary."""
    lines = []
    for word, table in entry.parts.items():
        common = set.intersection(*(set(entry.hyperparameters({word: name})) for name in table))
        for name, function in table.items():
            own = {key: value for key, value in entry.hyperparameters({word: name}).items() if key not in common}
            settings = ''.join(f', {key} {value}' for key, value in own.items())
            summary = ''.join((inspect.getdoc(function) or '').splitlines()[:1])
            lines.append(f'{word} {name}{settings}: {summary}')
    return [*lines, ''] if lines else []


def curve(entry: Loss, given: Mapping[str, Any]) -> tuple[list[float], list[float], list[float]]:
    """Margins of log-ratios, nats, and the mean loss of `contract.example` and its slope there, in float64.

    Half of each margin is the chosen completion's, evenly over its tokens; all pairs of the example have the same.
    """
    with jax.enable_x64(True):
        sample = example(entry, dict(given))

        def loss(margin):
            return losses_of(entry, _at_margin(sample, margin), dict(given))[0].mean()

        margins = jnp.linspace(-REACH, REACH, POINTS)
        values, slopes = jax.lax.map(jax.value_and_grad(loss), margins)
    return margins.tolist(), values.tolist(), slopes.tolist()


def _at_margin(sample: Example, margin: jax.Array) -> Example:
    def moved(side: Completion, share):
        length = scores.length(side)[:, None]
        # Far enough below 0 that no log-probability becomes positive on the way.
        reference = -2 * REACH / length * side.weights
        references = jnp.broadcast_to(reference[None], side.reference_logps.shape)
        return side.replace(policy_logps=reference + share / length * side.weights, reference_logps=references)

    return dataclasses.replace(
        sample, chosen=moved(sample.chosen, margin / 2), rejected=moved(sample.rejected, -margin / 2)
    )


def _plot(label: str, margins: Sequence[float], heights: Sequence[float]) -> str:
    figure = plotille.Figure()
    figure.width, figure.height = max(20, min(60, shutil.get_terminal_size().columns - 18)), 9
    figure.with_colors, figure.origin = False, False
    figure.x_label, figure.y_label = 'margin of log-ratios, nats', label
    figure.set_x_limits(-REACH, REACH)
    for kind in (float, int):
        figure.register_label_formatter(kind, lambda value, chars, delta, left: _tick(value, chars, left))
    figure.plot(margins, heights)
    return figure.show()


def _tick(value: float, characters: int, left: bool) -> str:
    text = f'{value:.3g}'
    return text.ljust(characters) if left else text.rjust(characters)
