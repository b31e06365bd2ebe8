"""What can be concluded from a study and what cannot, in sentences made from its numbers."""

from collections.abc import Sequence

from jaxpo.study.evidence import Evidence, Found, same_pairs, there
from jaxpo.study.findings import AgainstItself, Conclusions, Leaderboard, LeaderboardRow, Progress, Provenance
from jaxpo.study.leaderboard import claimed
from jaxpo.study.statistics import BETTER, NO_CLAIM, WORSE
from jaxpo.study.wording import counted, figure, listed, share, signed

# What a metric is measured by, where it is of pairs that are given: by the beginning of its name.
OF_GIVEN_PAIRS = {
    'rewards/': "by each method's own implicit reward",
    'loss': "by each method's own loss, which is on another scale for each",
    'logps/': 'by log-probabilities of given completions',
    'log_ratios/': 'by log-probabilities of given completions against those before training',
}
ENOUGH_SEEDS = 5


def conclusions(
    evidence: Evidence,
    progress: Progress,
    leaderboard: Leaderboard,
    again: AgainstItself,
    provenance: Provenance,
) -> Conclusions:
    """Sentences of both kinds; there is always something that cannot be concluded."""
    return Conclusions(
        tuple(_can(evidence, leaderboard, again)),
        (*_of_design(evidence), *_of_state(evidence, progress, again, provenance)),
    )


def _can(evidence: Evidence, leaderboard: Leaderboard, again: AgainstItself) -> list[str]:
    design, said = evidence.design, []
    for verdict in (BETTER, WORSE):
        if rows := claimed(leaderboard.rows, verdict):
            said.append(_claims(evidence, rows, verdict))
    smallest = there(row.against_baseline.detectable for row in leaderboard.rows if row.against_baseline is not None)
    if smallest:
        said.append(
            f'Had a method differed from {design["baseline"]} by {figure(min(smallest))} (where seeds differ least) to '
            f'{figure(max(smallest))} (where they differ most), its own test, before correction, would have found it '
            'with probability 0.8. Smaller differences may be there unseen.'
        )
    if again.row.against_baseline.p is not None and again.row.against_baseline.verdict == NO_CLAIM:
        said.append(f'The same procedure finds no difference between {design["baseline"]} and itself.')
    return said


def _claims(evidence: Evidence, rows: Sequence[LeaderboardRow], verdict: str) -> str:
    design = evidence.design
    named = listed([f'{row.method} {_difference(row)}' for row in rows], between='; ')
    return (
        f'{counted(len(rows), "method")} {"is" if len(rows) == 1 else "are"} {verdict} than {design["baseline"]} in '
        f'{design["metric"]}, for this model, these data, this budget and these grids: {named}.'
    )


def _difference(row: LeaderboardRow) -> str:
    found = row.against_baseline
    return f'{signed(found.difference)} [{signed(found.low)}, {signed(found.high)}]'


def _of_design(evidence: Evidence) -> list[str]:
    """What no study of this design says, however it ends."""
    design = evidence.design
    said = [
        'A method for which no claim is made is not shown to equal the baseline.',
        'Seeds vary what each run draws, not the model, the prompts held out or where the pairs come from: what is '
        'found may not carry over to others.',
        f'Each method was tuned over {counted(len(evidence.baseline.trials), "setting")}; another grid may rank '
        'methods otherwise.',
    ]
    measured = next((how for start, how in OF_GIVEN_PAIRS.items() if design['metric'].startswith(start)), None)
    if measured is not None:
        said.append(
            f'{design["metric"]} is measured {measured}: it compares how methods judge pairs that are given, not how '
            'good the texts are that they write.'
        )
    if len(design['seeds']) < ENOUGH_SEEDS:
        said.append(f'{counted(len(design["seeds"]), "seed")} make wide intervals: all but large effects stay unseen.')
    return said


def _of_state(evidence: Evidence, progress: Progress, again: AgainstItself, provenance: Provenance) -> list[str]:
    """What this study does not say as it stands."""
    said = []
    metric, cells = evidence.design['metric'], [cell for cell in evidence.baseline.cells if cell.pairs is not None]
    if any(cell.last(f'{metric}_standard_error') is not None for cell in evidence.baseline.cells):
        said.append(
            f'{metric} is of samples of held-out prompts, the same prompts for all seeds: intervals over seeds say '
            'nothing of others.'
        )
    elif cells:
        said.append(_of_pairs(cells))
    if not progress.complete:
        said.append(
            f'{counted(progress.all.missing, "cell")} of {progress.all.planned:,} have not ended: choices and verdicts '
            'may change, and to stop where they please would void them.'
        )
    failed = progress.all.diverged + progress.all.error
    if failed:
        said.append(
            f'{counted(failed, "cell")} failed ({share(failed / progress.all.planned)} of those planned): where seeds '
            'of a chosen setting are among them, its row speaks of the others alone.'
        )
    if again.row.against_baseline.verdict != NO_CLAIM:
        said.append(
            f'{evidence.design["baseline"]} differs from itself under the same procedure: claims about as large as '
            f'{figure(abs(again.row.against_baseline.difference))} may be chance.'
        )
    if evidence.extensions:
        before = max(extension['cells_done_before'] for extension in evidence.extensions)
        said.append(
            f'The design was added to {counted(len(evidence.extensions), "time")}, the last time after '
            f'{counted(before, "cell")} had ended: what was added was chosen by people who could have seen results.'
        )
    if provenance.mixed:
        said.append(
            f'Cells were not all made alike ({", ".join(provenance.mixed)} differ): part of a difference may be that.'
        )
    return said


def _of_pairs(cells: Sequence[Found]) -> str:
    numbers = cells[0].pairs
    pairs, prompts = (
        counted(len(numbers.pair), 'held-out pair'),
        counted(len({*numbers.prompt.tolist()}), 'prompt'),
    )
    if same_pairs(cells):
        return (
            f'The report rests on {pairs} of {prompts}, the same for all seeds: intervals over seeds say nothing of '
            'other prompts; those by seeds and prompts do.'
        )
    return f'Each seed has {pairs} of its own: intervals over seeds are of other pairs too, drawn in the same way.'
