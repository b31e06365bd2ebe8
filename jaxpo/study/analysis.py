"""From a study's files to what its report says: a pure function of them, the same to the last bit every time."""

from jaxpo import storage
from jaxpo.study import account, behaviour
from jaxpo.study.conclusions import conclusions
from jaxpo.study.evidence import gather
from jaxpo.study.findings import Findings
from jaxpo.study.leaderboard import against_itself, leaderboard
from jaxpo.study.matched import frontier
from jaxpo.study.over_grid import robustness
from jaxpo.study.selection import choose


def analyse(root: storage.Path) -> Findings:
    """Everything that a study's directory says, finished or not.

    Raises:
      InputError: no study there, or cells have finished and none has the study's metric on both splits.
    """
    evidence = gather(root)
    choices = {arm.name: choose(evidence, arm) for arm in evidence.arms}
    progress, provenance = account.progress(evidence), account.provenance(evidence)
    board, again = leaderboard(evidence, choices), against_itself(evidence, choices)
    return Findings(
        design=account.design(evidence),
        progress=progress,
        leaderboard=board,
        against_itself=again,
        frontier=frontier(evidence),
        robustness=robustness(evidence, choices),
        length=behaviour.length(evidence, choices),
        health=behaviour.health(evidence, choices),
        learning=behaviour.learning(evidence, choices),
        compute=account.compute(evidence),
        provenance=provenance,
        conclusions=conclusions(evidence, progress, board, again, provenance),
    )
