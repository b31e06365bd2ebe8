"""Which setting of each arm is compared: the best by the selection split. The report split has no say in it."""

import dataclasses

from jaxpo.study.evidence import SELECTION, Arm, Evidence, Trial, mean, there

RULE = (
    'Of each method, the setting with the best mean of the metric over seeds, after the last step, on the selection '
    'split; of equal ones the first in the grid. A setting with a cell that diverged, stopped with an error or has not '
    'ended is taken only where every setting of the method has one, and then of those with the fewest.'
)


@dataclasses.dataclass(frozen=True)
class Choice:
    """The setting that stands for an arm."""

    arm: Arm
    trial: Trial | None  # None where no setting has a number on the selection split
    selection_mean: float | None
    forced: bool  # every setting has a failed or missing cell


def choose(evidence: Evidence, arm: Arm) -> Choice:
    """The arm's setting by `RULE`."""
    scores = [there(evidence.values(trial, SELECTION)) for trial in arm.trials]
    lost = [len(trial.cells) - len(score) for trial, score in zip(arm.trials, scores)]
    places = [place for place, score in enumerate(scores) if score]
    if not places:
        return Choice(arm, None, None, forced=False)
    # The first of equal ones: Python's min keeps it.
    best = min(places, key=lambda place: (lost[place], -evidence.sign * mean(scores[place])))
    return Choice(arm, arm.trials[best], mean(scores[best]), forced=lost[best] > 0)
