"""Which cells share a program: same shapes and words, so that only numbers, seeds and the choice of losses differ."""

import collections
import dataclasses
import hashlib
import json
from collections.abc import Sequence

from jaxpo import objective as objectives
from jaxpo.config import Config, Mesh
from jaxpo.errors import InputError
from jaxpo.objective import Objective
from jaxpo.settings import check_settings
from jaxpo.study.design import Cell, Study
from jaxpo.study.union import joins, union


@dataclasses.dataclass(frozen=True)
class Bundle:
    """Cells that are trained together, `at_once` in one program: some may have ended already."""

    name: str
    cells: tuple[Cell, ...]
    at_once: int
    """Cells of the program: more than there are here where the last bundle of a kind is filled up."""
    kind: str
    """Equal for bundles that share compiled programs."""
    peers: tuple[Cell, ...] = dataclasses.field(repr=False)
    """All cells of the kind."""
    whole: Objective | None = None
    """The losses of all cells of the kind; None where the experiment trains in a way of its own."""
    mixed: bool = False
    """Whether the cells of the kind have several objectives: numbers then say which losses of `whole` are in use."""


def bundles(study: Study, cells: Sequence[Cell], devices: int) -> list[Bundle]:
    """All cells of a study of language models, in bundles; a function of the design alone.

    InputError for an objective that cannot be, or a model that is split over devices beside `cells_per_program`.
    """
    found = []
    for kind, found_there, members in _kinds(cells):
        whole, mixed = union(found_there), len(found_there) > 1
        most = study.cells_per_program if _stacks(whole) else 1
        if most > 1:
            _check_whole_models(members[0].config)
        chunks = -(-len(members) // most)
        at_once = -(-len(members) // chunks)
        if at_once > 1:
            at_once = -(-at_once // devices) * devices
        for start in range(0, len(members), at_once):
            part = tuple(members[start : start + at_once])
            found.append(Bundle(name_of(part), part, at_once, f'{kind}-{at_once}', tuple(members), whole, mixed))
    return found


def single(bundle: Bundle) -> list[Bundle]:
    """Its cells one by one."""
    return [
        dataclasses.replace(bundle, name=name_of((cell,)), cells=(cell,), at_once=1, kind=f'{bundle.kind}-1')
        for cell in bundle.cells
    ]


def plain_bundles(cells: Sequence[Cell]) -> list[Bundle]:
    """Bundles of an experiment that trains in a way of its own: a method each."""
    members = collections.defaultdict(list)
    for cell in cells:
        members[cell.method].append(cell)
    return [Bundle(name_of(part), tuple(part), len(part), method, tuple(part)) for method, part in members.items()]


def name_of(cells: Sequence[Cell]) -> str:
    """Of these cells together: of their lease, and of what is kept of them in training."""
    return hashlib.sha256(' '.join(cell.id for cell in cells).encode()).hexdigest()[:12]


def _check_whole_models(config: Config) -> None:
    usual = Mesh()
    for axis in ('replica', 'data', 'fsdp', 'tensor'):
        if getattr(config.mesh, axis) not in (1, getattr(usual, axis)):
            raise InputError(
                f'study: cells_per_program trains whole cells side by side, each on one device, but mesh.{axis} is '
                f'{getattr(config.mesh, axis)}: set it to {getattr(usual, axis)}, or cells_per_program to 1.'
            )
    for name, reference in config.references.items():
        if reference.memory != 'device':
            raise InputError(f'study: references.{name}.memory must be device where cells_per_program is above 1.')


def _stacks(whole: Objective) -> bool:
    """Whether cells can share a program: not where validation pairs choose or judge each one's mixing weights."""
    return whole.mixture is None or whole.mixture.observes in ('nothing', 'step')


def _kinds(cells: Sequence[Cell]) -> list[tuple[str, list[Objective], list[Cell]]]:
    """Name, objectives and cells of each kind. InputError for a cell's config that cannot be."""
    kinds: list[tuple[str, list[Objective], list[Cell]]] = []
    for cell in cells:
        check_settings(cell.config)
        objective = objectives.make(cell.config.objective, tuple(cell.config.references))
        shape = _shape(cell)
        home = next((kind for kind in kinds if kind[0] == shape and joins(objective, kind[1])), None)
        if home is None:
            home = (shape, [], [])
            kinds.append(home)
        if objective not in home[1]:
            home[1].append(objective)
        home[2].append(cell)
    return [(f'{place}', found, members) for place, (_, found, members) in enumerate(kinds)]


def _shape(cell: Cell) -> str:
    """What of a config is not traced, as text."""
    held = dataclasses.asdict(cell.config)
    for name in ('output', 'objective', 'tables'):
        del held[name]
    rates = ('learning_rate', 'method_learning_rate', 'schedule', 'final_learning_rate_ratio', 'warmup_steps')
    held['optimizer'] = {name: value for name, value in held['optimizer'].items() if name not in rates}
    sources = [held['model']['source'], *(reference['source'] for reference in held['references'].values())]
    if not any(source.startswith('random:') for source in sources):
        del held['train']['seed']  # else it makes the weights
    return json.dumps(held, sort_keys=True)
