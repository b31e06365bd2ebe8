"""Colours of a report, on a light and on a dark ground, and how each method looks in all of its charts.

Charts name colours by class alone; `style_sheet` gives the classes their colours for both grounds, so that one drawing
serves both. `c0` is the baseline's. The nine after it were searched for: the least distance in OKLab between any two
of them, as seen with full colour vision and with protanopia, deuteranopia and tritanopia (Machado et al. 2009), is
large, and each stands out from its ground by at least 3:1. Beyond ten methods, dashes tell equal colours apart.
"""

import dataclasses
from collections.abc import Sequence

LIGHT = {
    'paper': '#ffffff',
    'panel': '#f5f6f8',
    'ink': '#1c1f24',
    'soft': '#5a626d',
    'rule': '#dfe3e8',
    'muted': '#9aa1ab',
    'accent': '#1f5fae',
    'c0': '#1c1f24',
    'c1': '#155ac1',
    'c2': '#c08513',
    'c3': '#85454a',
    'c4': '#660760',
    'c5': '#cd536e',
    'c6': '#058a98',
    'c7': '#264d05',
    'c8': '#906dd4',
    'c9': '#547917',
    'h0': '#f3f6fa',
    'h1': '#e0e9f4',
    'h2': '#cbdcee',
    'h3': '#b4cde8',
    'h4': '#9bbde1',
    'h5': '#82acd9',
    'h6': '#699bd0',
}
DARK = {
    'paper': '#14171c',
    'panel': '#1c2027',
    'ink': '#eceff3',
    'soft': '#a4adb9',
    'rule': '#2d333c',
    'muted': '#6b737e',
    'accent': '#7db4f5',
    'c0': '#eceff3',
    'c1': '#4682e3',
    'c2': '#b8811e',
    'c3': '#bc4453',
    'c4': '#ffb1f3',
    'c5': '#f17990',
    'c6': '#24b4c4',
    'c7': '#aff488',
    'c8': '#b48ffe',
    'c9': '#89bb41',
    'h0': '#1b212a',
    'h1': '#1f2b3a',
    'h2': '#24364b',
    'h3': '#29415d',
    'h4': '#2e4d70',
    'h5': '#345983',
    'h6': '#3a6597',
}
COLOURS = 10
LEVELS = 7
DASHES = ('', '7 3', '2 3', '9 3 2 3')
MARKERS = ('circle', 'square', 'triangle', 'diamond', 'inverted', 'cross')

RULES = """
.chart{font:12px/1.3 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",sans-serif;\
font-variant-numeric:tabular-nums}
.chart text{fill:var(--ink)}
.chart .tick,.chart .note{fill:var(--soft)}
.chart .strong{font-weight:600}
.chart .label-small{font-size:11px}
.chart .grid{stroke:var(--rule);stroke-width:1}
.chart .zero{stroke:var(--soft);stroke-width:1}
.chart .guide{stroke:var(--accent);stroke-width:1.5;stroke-dasharray:5 4}
.chart .diagonal{stroke:var(--soft);stroke-width:1;stroke-dasharray:3 3}
.chart .leader{stroke:var(--rule);stroke-width:1}
.chart .line{fill:none;stroke:currentColor;stroke-width:2;stroke-linejoin:round}
.chart .extent{stroke:currentColor;stroke-width:2}
.chart .no-claim .extent{stroke-width:1}
.chart .band{fill:currentColor;fill-opacity:.12}
.chart .raw{fill:currentColor;fill-opacity:.4}
.chart .filled{fill:currentColor;stroke:currentColor;stroke-width:1.5}
.chart .hollow{fill:var(--paper);stroke:currentColor;stroke-width:1.5}
.chart .muted .line{stroke-width:1}
.chart .muted .raw{fill-opacity:.3}
.chart .series:hover .line{stroke-width:3.5}
.chart .empty-cell{fill:none;stroke:var(--rule)}
.chart .chosen{fill:none;stroke:var(--ink);stroke-width:2}
.chart .muted{color:var(--muted)}
.chart .accent{color:var(--accent)}
"""


@dataclasses.dataclass(frozen=True)
class Style:
    """How a method looks: a class for its colour, and what tells equal colours apart."""

    colour: str
    dash: str = ''
    marker: str = 'circle'

    @property
    def muted(self) -> bool:
        return self.colour == 'muted'


MUTED = Style('muted')


def styles_of(ranked: Sequence[str], baseline: str, most: int = COLOURS) -> dict[str, Style]:
    """A style for each method, the baseline included; beyond `most`, only the first of `ranked` have colours.

    Args:
      ranked: methods, the best first.
      baseline: gets the colour of text, wherever it ranks.
      most: methods that stand out, the baseline among them.
    """
    others = [name for name in ranked if name != baseline]
    shown = others if len(others) < most else others[: most - 1]
    styles = {name: _style(place) for place, name in enumerate(shown, start=1)}
    return {baseline: _style(0), **styles, **dict.fromkeys(others[len(shown) :], MUTED)}


def _style(place: int) -> Style:
    return Style(f'c{place % COLOURS}', DASHES[place // COLOURS % len(DASHES)], MARKERS[place % len(MARKERS)])


def style_sheet() -> str:
    """Custom properties for both grounds and the rules of charts; paper is always light."""
    classes = ''.join(f'.chart .c{place}{{color:var(--c{place})}}\n' for place in range(COLOURS))
    levels = ''.join(f'.chart .h{level}{{fill:var(--h{level})}}\n' for level in range(LEVELS))
    return (
        f':root{{color-scheme:light dark;{_properties(LIGHT)}}}\n'
        f'@media (prefers-color-scheme:dark){{:root{{{_properties(DARK)}}}}}\n'
        f'@media print{{:root{{color-scheme:light;{_properties(LIGHT)}}}}}'
        f'{RULES}{classes}{levels}'
    )


def _properties(colours: dict[str, str]) -> str:
    return ''.join(f'--{name}:{colour};' for name, colour in colours.items())
