"""What a researcher asks of mixtures: how references become one, what weighs them, and by which formula."""

import argparse
import inspect
from collections.abc import Callable, Sequence

from rich.markup import escape
from rich.padding import Padding

from jaxpo.console import console
from jaxpo.errors import unknown
from jaxpo.references.mixing import MIXES
from jaxpo.references.weighting import WEIGHTINGS, Weighting

LEARNS_FROM = {
    'nothing': 'nothing',
    'validation': 'validation pairs, before training',
    'step': 'the pairs of the steps before',
    'reward': 'a reward for each step, by validation pairs',
}
"""What a weighting observes, in words."""


def show_mixtures(arguments: Sequence[str]) -> int:
    """`jaxpo mixtures`: all weightings and mixes; `jaxpo mixtures NAME`: all that is said of one."""
    parser = argparse.ArgumentParser(
        prog='jaxpo mixtures',
        description='List how several references are weighed and mixed into one, or show one weighting or mix with '
        'its formula.',
        allow_abbrev=False,
    )
    parser.add_argument('name', nargs='?', metavar='NAME', help='a weighting or a mix')
    parser.add_argument('--markdown', action='store_true', help='all weightings and mixes as Markdown tables')
    known = parser.parse_args(arguments)
    if known.markdown:
        console().print(markdown_tables(), markup=False)
    elif known.name is None:
        _print_all()
    elif known.name in WEIGHTINGS:
        _print_weighting(WEIGHTINGS[known.name])
    elif known.name in MIXES:
        _print_mix(known.name)
    else:
        raise unknown('weighting or mix', known.name, [*WEIGHTINGS, *MIXES])
    return 0


def markdown_tables() -> str:
    """All weightings, and all mixes, as Markdown tables."""
    lines = ['| `weights` | what it is | learns from | defaults | source |', '|---|---|---|---|---|']
    for name, entry in sorted(WEIGHTINGS.items()):
        cells = (f'`{name}`', entry.summary, LEARNS_FROM[entry.observes], _settings(entry), entry.source)
        lines.append(f'| {" | ".join(cells)} |')
    lines += ['', '| `mix` | what it is | log-probability |', '|---|---|---|']
    lines += [f'| `{name}` | {_paragraph(mix, 0)} | `{_paragraph(mix, 1)}` |' for name, mix in MIXES.items()]
    return '\n'.join(lines)


def _print_all() -> None:
    out = console()
    out.print('[bold]weights[/bold], which say how much each reference counts:')
    for name, entry in sorted(WEIGHTINGS.items()):
        facts = (entry.formula, entry.source, f'{_settings(entry) or "no hyperparameters"}; learns {_learning(entry)}')
        _print_entry(name, entry.summary, facts)
    out.print('\n[bold]mix[/bold], which makes one reference of them:')
    for name, mix in MIXES.items():
        _print_entry(name, _paragraph(mix, 0), (_paragraph(mix, 1),))
    out.print(f'\n{len(WEIGHTINGS)} weightings, {len(MIXES)} mixes. `jaxpo mixtures NAME` shows one.')


def _print_entry(name: str, summary: str, facts: Sequence[str]) -> None:
    out = console()
    out.print(f'\n[bold cyan]{name}[/bold cyan]  {escape(summary)}')
    for fact in facts:
        out.print(Padding(escape(fact), (0, 0, 0, 4)), soft_wrap=False)


def _print_weighting(entry: Weighting) -> None:
    out = console()
    out.print(f'[bold cyan]{entry.name}[/bold cyan]  {escape(entry.source)}\n')
    out.print(escape(inspect.getdoc(entry.weights)))
    out.print(f'\nlearns    {_learning(entry)}')
    out.print(f'settings  {escape(_settings(entry) or "none")}')
    out.print(_in_use('weights', entry.name), markup=False)


def _print_mix(name: str) -> None:
    out = console()
    out.print(f'[bold cyan]{name}[/bold cyan]\n')
    out.print(escape(inspect.getdoc(MIXES[name])))
    out.print(f'\n{_in_use("mix", name)}', markup=False)


def _in_use(word: str, name: str) -> str:
    return f'in use    objective={ {"mixture": {word: name}, "dpo": {}} }'


def _learning(entry: Weighting) -> str:
    primary = '; reads which reference is the primary one' if entry.reads_primary else ''
    return f'from {LEARNS_FROM[entry.observes]}{primary}'


def _settings(entry: Weighting) -> str:
    return ', '.join(f'{name} {value}' for name, value in entry.defaults.items())


def _paragraph(function: Callable, place: int) -> str:
    return ' '.join(inspect.getdoc(function).split('\n\n')[place].split())
