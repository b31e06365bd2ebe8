"""Numbers and lists in the report's sentences."""

from collections.abc import Sequence

NAMED = 6  # that a sentence lists


def figure(value: float | None, digits: int = 3) -> str:
    """A number at a readable precision; a dash where there is none."""
    if value is None:
        return '–'
    return f'{value:,.0f}' if 1000 <= abs(value) < 1e7 else f'{value:.{digits}g}'


def signed(value: float | None, digits: int = 3) -> str:
    """A difference: its sign always shown."""
    return ('+' if value is not None and value > 0 else '') + figure(value, digits)


def share(value: float) -> str:
    """A share, 0 to 1, in percent."""
    return f'{100 * value:.3g} %'


def listed(names: Sequence[str], between: str = ', ') -> str:
    """Names in a row; of many the first, and how many more there are."""
    shown, more = names[:NAMED], len(names) - NAMED
    return between.join(shown) + (f' and {more} more' if more > 0 else '')


def counted(count: int, one: str, many: str = '') -> str:
    """`1 cell`, `2 cells`."""
    return f'{count:,} {one if count == 1 else many or one + "s"}'
