"""What a study planned, how far it has come, what it took, and what every number is from."""

import hashlib
import json
import shlex
from collections.abc import Sequence

from jaxpo import storage
from jaxpo.metrics import flatten
from jaxpo.study import findings
from jaxpo.study.evidence import MISSING, REPORT, SELECTION, Evidence, Found
from jaxpo.study.findings import Counts, MethodDesign
from jaxpo.study.records import DIVERGED, ERROR
from jaxpo.study.selection import RULE
from jaxpo.study.wording import counted, listed, share

FILES = ('run.json', 'metrics.jsonl', 'pairs.jsonl')
ASIDE = ('objective', 'output', 'train.seed')  # of the base: cells have their own


def design(evidence: Evidence) -> findings.Design:
    """The design, and what it was extended by."""
    held = evidence.design
    return findings.Design(
        name=held['base']['output'],
        question=held['question'],
        methods=tuple(_method(evidence, name) for name in held['methods']),
        seeds=tuple(held['seeds']),
        seeds_again=tuple(cell.seed for cell in evidence.second.trials[0].cells),
        trials=len(evidence.baseline.trials),
        cells=len(held['cells']),
        baseline=held['baseline'],
        again=evidence.second.name,
        metric=held['metric'],
        higher_is_better=held['higher_is_better'],
        selection_share=held['selection_share'],
        confidence=held['confidence'],
        rules=_rules(evidence),
        base=tuple(
            (field, str(value)) for field, value in flatten(held['base']).items() if not field.startswith(ASIDE)
        ),
        extensions=tuple(_extension(evidence, extension) for extension in evidence.extensions),
    )


def _method(evidence: Evidence, name: str) -> MethodDesign:
    held = evidence.design['methods'][name]
    grid = {**held['grid'], **evidence.design['grid']}
    return MethodDesign(
        method=name,
        objective=json.dumps(held['objective'], ensure_ascii=False),
        grid=tuple(findings.GridField(field, tuple(map(str, values))) for field, values in grid.items()),
        otherwise=tuple((field, str(value)) for field, value in flatten(held['settings']).items()),
        trials=len(held['trials']),
    )


def _rules(evidence: Evidence) -> tuple[tuple[str, str], ...]:
    held = evidence.design
    alpha = share(1 - held['confidence'])
    return (
        ('budget', f'Every method gets {counted(len(evidence.baseline.trials), "setting")} and the same seeds.'),
        (
            'splits',
            'Settings are chosen on the selection split and reported on the report split: '
            f'{share(held["selection_share"])} of held-out prompts and the others, where the experiment has no other.',
        ),
        ('selection', RULE),
        (
            'comparison',
            'Differences from the baseline between cells of equal seed (same data order, same prompts), paired t '
            f'interval at {share(held["confidence"])}, two-sided.',
        ),
        (
            'claims',
            'Better or worse only where the interval excludes zero and the p-value, adjusted by Holm over all planned '
            f'methods, is below {alpha}; else no claim. Methods without a p-value yet count in the correction.',
        ),
        ('exclusions', 'None. Cells that diverged or stopped with an error are counted, and are in no mean.'),
        (
            'A/A',
            'The baseline is tried again, with other seeds, through the same choice and comparison, uncorrected.',
        ),
    )


def _extension(evidence: Evidence, extension: dict) -> findings.Extension:
    added = {*extension['cells_added']}
    methods = {cell.method: None for cell in evidence.cells if cell.id in added}
    return findings.Extension(len(added), tuple(methods), extension['cells_done_before'])


def progress(evidence: Evidence) -> findings.Progress:
    """Cells by what became of them."""
    everything = _counts(evidence, '', evidence.cells)
    methods = tuple(_counts(evidence, arm.name, arm.cells) for arm in evidence.arms)
    return findings.Progress(everything, methods, everything.missing == 0, _progress_caption(everything, methods))


def _counts(evidence: Evidence, method: str, cells: Sequence[Found]) -> Counts:
    states = [cell.state for cell in cells]
    measured = [
        cell
        for cell in cells
        if evidence.metric(cell, SELECTION) is not None and evidence.metric(cell, REPORT) is not None
    ]
    finished = sum(cell.finished for cell in cells)
    return Counts(
        method=method,
        planned=len(cells),
        finished=finished,
        diverged=states.count(DIVERGED),
        error=states.count(ERROR),
        missing=states.count(MISSING),
        unmeasured=finished - len(measured),
    )


def _progress_caption(everything: Counts, methods: Sequence[Counts]) -> str:
    parts = [f'{counted(everything.planned, "cell")} planned, {everything.finished:,} finished']
    for word in ('diverged', 'error', 'missing', 'unmeasured'):
        if getattr(everything, word):
            by_method = [f'{one.method} {getattr(one, word)}' for one in methods if getattr(one, word)]
            parts.append(f'{getattr(everything, word):,} {_STATES[word]} ({listed(by_method)})')
    return '; '.join(parts) + '.'


_STATES = {
    'diverged': 'diverged',
    'error': 'stopped with an error',
    'missing': 'not ended yet',
    'unmeasured': 'finished without a finite value of the metric',
}


def compute(evidence: Evidence) -> findings.Compute:
    """By arm, and together."""
    rows = tuple(_compute_row(arm.name, arm.cells) for arm in evidence.arms)
    total = _compute_row('', evidence.cells)
    at_once = total.cells_at_once
    caption = (
        f'{counted(total.cells, "cell")} took {counted(total.tokens, "token")} of training and '
        f'{total.device_seconds / 3600:.3g} device-hours, compilation and evaluation included, '
        f'{"one after the other" if at_once <= 1 else f"up to {at_once} at once in one program"}. Failed cells are in '
        'these sums. Seconds of a shared program are divided evenly over its cells.'
    )
    return findings.Compute(rows, total, caption)


def _compute_row(method: str, cells: Sequence[Found]) -> findings.ComputeRow:
    took = [cell.record.compute for cell in cells if cell.record is not None]
    seconds, tokens = sum(one.seconds for one in took), sum(one.tokens for one in took)
    return findings.ComputeRow(
        method=method,
        cells=len(took),
        steps=sum(one.steps for one in took),
        tokens=tokens,
        seconds=seconds,
        device_seconds=sum(one.seconds * one.devices for one in took),
        tokens_per_second=tokens / seconds if seconds > 0 else None,
        cells_at_once=max((one.cells_at_once for one in took), default=0),
    )


def provenance(evidence: Evidence) -> findings.Provenance:
    """Versions, cells and hashes of what was read."""
    versions = _versions(evidence.cells)
    names = [version.name for version in versions]
    mixed = tuple(sorted({name for name in names if names.count(name) > 1}))
    files, digest = _digest(evidence)
    return findings.Provenance(
        versions=versions,
        mixed=mixed,
        cells=tuple(_cell_line(evidence, cell) for cell in evidence.cells),
        files=files,
        design_sha256=hashlib.sha256((evidence.root / 'study.json').read_bytes()).hexdigest(),
        cells_sha256=digest,
        command=f'jaxpo report {shlex.quote(evidence.design["base"]["output"])}',
        caption=_provenance_caption(versions, mixed),
    )


def _versions(cells: Sequence[Found]) -> tuple[findings.Version, ...]:
    seen: dict[tuple[str, str], int] = {}
    for cell in cells:
        for name, value in ({} if cell.record is None else cell.record.versions).items():
            seen[name, str(value)] = seen.get((name, str(value)), 0) + 1
    return tuple(findings.Version(name, value, count) for (name, value), count in sorted(seen.items()))


def _cell_line(evidence: Evidence, cell: Found) -> findings.CellLine:
    return findings.CellLine(
        id=cell.id,
        method=cell.method,
        setting=cell.words,
        repeat=cell.repeat,
        seed=cell.seed,
        state=cell.state,
        error='' if cell.record is None else cell.record.error,
        selection=evidence.metric(cell, SELECTION),
        report=evidence.metric(cell, REPORT),
    )


def _digest(evidence: Evidence) -> tuple[int, str]:
    """How many files of cells there are, and the SHA-256 over their names and own SHA-256s, by name."""
    total, count = hashlib.sha256(), 0
    for cell in sorted((cell for cell in evidence.cells if cell.record is not None), key=lambda cell: cell.id):
        for name in FILES:
            file: storage.Path = cell.record.directory / name
            if file.exists():
                count += 1
                total.update(f'{cell.id}/{name} {hashlib.sha256(file.read_bytes()).hexdigest()}\n'.encode())
    return count, total.hexdigest()


def _provenance_caption(versions: Sequence[findings.Version], mixed: Sequence[str]) -> str:
    if not versions:
        return 'No cell has said what it was made with.'
    modified = sum(v.cells for v in versions if v.name == 'commit' and v.value.endswith('(modified)'))
    same = f'Cells differ in {listed(mixed)}.' if mixed else 'All cells were made with the same versions and devices.'
    changed = f' {counted(modified, "cell")} ran code that differed from its commit.' if modified else ''
    return same + changed
