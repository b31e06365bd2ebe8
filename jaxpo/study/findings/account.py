"""What a study planned, how far it has come, what it took and what its numbers are from."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class GridField:
    """One field of a method's grid."""

    field: str  # dotted name
    values: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class MethodDesign:
    """One method as it was planned."""

    method: str
    objective: str  # JSON
    grid: tuple[GridField, ...]
    otherwise: tuple[tuple[str, str], ...]  # fields that are otherwise than in the base: name, value
    trials: int  # settings


@dataclasses.dataclass(frozen=True)
class Extension:
    """Cells that were added to the design after it was first written."""

    cells_added: int
    methods: tuple[str, ...]  # whose cells were added
    cells_done_before: int  # that had ended by then


@dataclasses.dataclass(frozen=True)
class Design:
    """What was said before anything was run."""

    name: str  # the directory that the design names
    question: str
    methods: tuple[MethodDesign, ...]
    seeds: tuple[int, ...]
    seeds_again: tuple[int, ...]  # of the baseline's second arm
    trials: int  # settings of each method: the equal budget
    cells: int
    baseline: str
    again: str  # name of the baseline's second arm
    metric: str
    higher_is_better: bool
    selection_share: float
    confidence: float
    rules: tuple[tuple[str, str], ...]  # name, rule in words: selection, comparison, family, failures, exclusions
    base: tuple[tuple[str, str], ...]  # the config that all cells share, flattened: field, value
    extensions: tuple[Extension, ...]


@dataclasses.dataclass(frozen=True)
class Counts:
    """How far the cells of one arm, or of all, have come."""

    method: str  # '' for all
    planned: int
    finished: int
    diverged: int
    error: int
    missing: int
    unmeasured: int  # finished, but without a finite value of the metric: counted among the finished too


@dataclasses.dataclass(frozen=True)
class Progress:
    """How much of the design the report rests on."""

    all: Counts
    methods: tuple[Counts, ...]  # the A/A arm last
    complete: bool  # every planned cell has ended
    caption: str


@dataclasses.dataclass(frozen=True)
class ComputeRow:
    """What the cells of one arm took, failed ones included."""

    method: str
    cells: int
    steps: int
    tokens: int  # trained on, padding left out
    seconds: float  # a cell's share of its program, summed; compilation and evaluation included
    device_seconds: float
    tokens_per_second: float | None
    cells_at_once: int  # most


@dataclasses.dataclass(frozen=True)
class Compute:
    rows: tuple[ComputeRow, ...]  # the A/A arm last
    total: ComputeRow
    caption: str


@dataclasses.dataclass(frozen=True)
class Version:
    """One value of what a cell was made with."""

    name: str
    value: str
    cells: int


@dataclasses.dataclass(frozen=True)
class CellLine:
    """One planned cell."""

    id: str
    method: str
    setting: str
    repeat: int
    seed: int
    state: str  # 'finished', 'diverged', 'error' or 'missing'
    error: str
    selection: float | None  # the metric after the last step
    report: float | None


@dataclasses.dataclass(frozen=True)
class Provenance:
    """What every number is from."""

    versions: tuple[Version, ...]
    mixed: tuple[str, ...]  # names of which cells have seen more than one value
    cells: tuple[CellLine, ...]
    files: int  # read
    design_sha256: str
    cells_sha256: str  # over the names and contents of all files read, sorted by name
    command: str
    caption: str


@dataclasses.dataclass(frozen=True)
class Conclusions:
    """What follows from the study and what does not, in sentences."""

    can: tuple[str, ...]
    cannot: tuple[str, ...]
