"""Every loss once more, from its paper, in float64 NumPy. Shares no code with jaxpo.

ORACLES: `(chosen: Side, rejected: Side, **hyperparameters) -> loss` of one pair. COUPLED, for losses that couple the
batch: `(chosen: list[Side], rejected: list[Side], *, state, params, key, **hyperparameters) -> losses`, where `state`
is the one before this step.
"""

from losses.oracles import start
from losses.oracles.side import side_of as side_of

FAMILIES = (start,)


def _merged(name):
    return {key: value for family in FAMILIES for key, value in getattr(family, name).items()}


ORACLES, COUPLED, AT_REFERENCE = (_merged(name) for name in ('ORACLES', 'COUPLED', 'AT_REFERENCE'))
LOGISTIC = {name for family in FAMILIES for name in family.LOGISTIC}
GOLDEN = [case for family in FAMILIES for case in family.GOLDEN]
