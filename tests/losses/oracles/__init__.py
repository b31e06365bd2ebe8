"""Every loss once more, from its paper, in float64 NumPy. Shares no code with jaxpo. Each family's module holds:

ORACLES: name -> `(chosen: Side, rejected: Side, **hyperparameters) -> loss` of one pair.
COUPLED: the same for losses that couple the batch, `(chosen: list[Side], rejected: list[Side], **) -> losses`. They may
  name `state` (the one before this step) and `key`.
  Any oracle may name `params`, and `frozen`: sides (or lists of them) that are never perturbed, for what the loss does
  not differentiate.
AT_REFERENCE: name -> `() -> loss` where the policy equals the reference (reference-free losses: where both completions
  are alike) and every token's gradient is non-zero, with the sign that raises chosen and lowers rejected.
LOGISTIC: losses for which exchanging chosen and rejected turns the margin z of the rewards into -z: L(z) - L(-z) = -z.
GOLDEN: (name, hyperparameters, loss) for sequence log-probabilities -12, -15 (policy) and -13, -14.5 (reference) of
  chosen and rejected, over 6 and 9 tokens.
"""

from losses.oracles import (
    anchored,
    batch,
    conditional,
    many,
    margins,
    masks,
    moments,
    multi_objective,
    pairwise,
    priors,
    reference_free,
    token_level,
    weighted,
)
from losses.oracles.side import side_of as side_of

FAMILIES = (
    anchored,
    batch,
    conditional,
    many,
    margins,
    masks,
    moments,
    multi_objective,
    pairwise,
    priors,
    reference_free,
    token_level,
    weighted,
)


def _merged(name):
    return {key: value for family in FAMILIES for key, value in getattr(family, name).items()}


ORACLES, COUPLED, AT_REFERENCE = (_merged(name) for name in ('ORACLES', 'COUPLED', 'AT_REFERENCE'))
LOGISTIC = {name for family in FAMILIES for name in family.LOGISTIC}
GOLDEN = [case for family in FAMILIES for case in family.GOLDEN]
