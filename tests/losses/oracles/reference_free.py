"""jaxpo/losses/reference_free.py once more."""

from losses.oracles.side import softplus


def simpo(chosen, rejected, beta=2.0, gamma=0.5):
    return softplus(-(beta * chosen.logp / chosen.length - beta * rejected.logp / rejected.length - gamma))


def sft(chosen, rejected):
    return -chosen.logp


ORACLES = {'simpo': simpo, 'sft': sft}
COUPLED = {}
AT_REFERENCE = {'simpo': lambda: softplus(0.5)}
LOGISTIC = set()
GOLDEN = [('simpo', {'beta': 2.0, 'gamma': 1.0}, 1.839674655553)]
