"""How often a study's programs were compiled, as the compiler says."""

import collections
import contextlib
import dataclasses
from collections.abc import Iterator

import jax

from jaxpo.study.programs import NAMES

_EVENT = '/jax/core/compile/backend_compile_duration'


@dataclasses.dataclass
class Compilations:
    """Programs by name, how often each was compiled or read from the cache of compiled programs, and how long."""

    counts: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    seconds: float = 0.0

    def text(self) -> str:
        """One line for people."""
        own = {name: self.counts[name] for name in NAMES if self.counts[name]}
        others = sum(self.counts.values()) - sum(own.values())
        parts = [f'{name} {count}' for name, count in own.items()]
        listed = ', '.join([*parts, f'{others} small ones'])
        return f'Compiled or read from the cache: {listed}; {self.seconds:.0f} s.'


@contextlib.contextmanager
def counting() -> Iterator[Compilations]:
    """Counts while the block runs."""
    found = Compilations()

    def heard(event: str, seconds: float, **about) -> None:
        if event == _EVENT:
            name = str(about.get('fun_name', ''))
            found.counts[name.removeprefix('jit(').removesuffix(')')] += 1
            found.seconds += seconds

    jax.monitoring.register_event_duration_secs_listener(heard)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_duration_listener(heard)
