"""Everything that a study's report says, as plain data: HTML, CSV, JSON and LaTeX print these numbers and no others.

None stands where there is no number: never NaN. Numbers of the metric are in its own units; `difference` is always
method minus baseline, whichever direction is better. Methods are in the order of the design where nothing else is
said. A section that a study has no data for is None, or an empty tuple.
"""

import dataclasses

from jaxpo.study.findings.account import CellLine as CellLine
from jaxpo.study.findings.account import Compute as Compute
from jaxpo.study.findings.account import ComputeRow as ComputeRow
from jaxpo.study.findings.account import Conclusions as Conclusions
from jaxpo.study.findings.account import Counts as Counts
from jaxpo.study.findings.account import Design as Design
from jaxpo.study.findings.account import Extension as Extension
from jaxpo.study.findings.account import GridField as GridField
from jaxpo.study.findings.account import MethodDesign as MethodDesign
from jaxpo.study.findings.account import Progress as Progress
from jaxpo.study.findings.account import Provenance as Provenance
from jaxpo.study.findings.account import Version as Version
from jaxpo.study.findings.behaviour import CalibrationBin as CalibrationBin
from jaxpo.study.findings.behaviour import Curve as Curve
from jaxpo.study.findings.behaviour import CurvePoint as CurvePoint
from jaxpo.study.findings.behaviour import Health as Health
from jaxpo.study.findings.behaviour import HealthRow as HealthRow
from jaxpo.study.findings.behaviour import HeatCell as HeatCell
from jaxpo.study.findings.behaviour import Learning as Learning
from jaxpo.study.findings.behaviour import Length as Length
from jaxpo.study.findings.behaviour import LengthRow as LengthRow
from jaxpo.study.findings.behaviour import ProfilePoint as ProfilePoint
from jaxpo.study.findings.behaviour import Robustness as Robustness
from jaxpo.study.findings.behaviour import RobustnessRow as RobustnessRow
from jaxpo.study.findings.parts import Comparison as Comparison
from jaxpo.study.findings.parts import Spread as Spread
from jaxpo.study.findings.ranking import AgainstItself as AgainstItself
from jaxpo.study.findings.ranking import ByPrompt as ByPrompt
from jaxpo.study.findings.ranking import Frontier as Frontier
from jaxpo.study.findings.ranking import FrontierPoint as FrontierPoint
from jaxpo.study.findings.ranking import FrontPoint as FrontPoint
from jaxpo.study.findings.ranking import Leaderboard as Leaderboard
from jaxpo.study.findings.ranking import LeaderboardRow as LeaderboardRow
from jaxpo.study.findings.ranking import MatchedKL as MatchedKL
from jaxpo.study.findings.ranking import MatchedRow as MatchedRow
from jaxpo.study.findings.ranking import MethodFrontier as MethodFrontier


@dataclasses.dataclass(frozen=True)
class Findings:
    """The whole report."""

    design: Design
    progress: Progress
    leaderboard: Leaderboard
    against_itself: AgainstItself
    frontier: Frontier | None
    robustness: Robustness
    length: Length | None
    health: Health | None
    learning: Learning | None
    compute: Compute
    provenance: Provenance
    conclusions: Conclusions
