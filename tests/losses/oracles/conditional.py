"""jaxpo/losses/conditional.py once more."""

from losses.oracles.side import softplus


def mdpo(chosen, rejected, beta=0.1, delta=0.0):
    good, bad, corrupted = (
        side.logp - side.reference_logp for side in (chosen, rejected, chosen.companions['corrupted'])
    )
    return softplus(-beta * (good - bad)) + softplus(-beta * (good - corrupted)) + softplus(-(beta * good - delta))


ORACLES = {'mdpo': mdpo}
COUPLED = {}
AT_REFERENCE = {}
LOGISTIC = set()
GOLDEN = []
