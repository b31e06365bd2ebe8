"""The first four losses once more, from their papers."""

from losses.oracles.side import softplus


def dpo(chosen, rejected, beta=0.1):
    return softplus(-beta * (chosen.log_ratio - rejected.log_ratio))


def ipo(chosen, rejected, tau=0.1, reduction='mean'):
    ratios = [side.log_ratio / (side.length if reduction == 'mean' else 1.0) for side in (chosen, rejected)]
    return (ratios[0] - ratios[1] - 1 / (2 * tau)) ** 2


def simpo(chosen, rejected, beta=2.0, gamma=0.5):
    return softplus(-(beta * chosen.logp / chosen.length - beta * rejected.logp / rejected.length - gamma))


def sft(chosen, rejected):
    return -chosen.logp


ORACLES = {'dpo': dpo, 'ipo': ipo, 'simpo': simpo, 'sft': sft}
COUPLED = {}

# What each loss is where the policy equals the reference (reference-free losses: where both completions are alike).
AT_REFERENCE = {
    'dpo': lambda beta=0.1: 0.6931471805599453,
    'ipo': lambda tau=0.1, reduction='mean': 25.0,
    'simpo': lambda beta=2.0, gamma=0.5: softplus(0.5),
}

# Losses for which exchanging chosen and rejected turns the margin z of the rewards into -z: L(z) - L(-z) = -z.
LOGISTIC = {'dpo'}

# Golden values: sequence log-probabilities -12, -15 (policy), -13, -14.5 (reference) over 6 and 9 tokens.
GOLDEN = [
    ('dpo', {'beta': 0.1}, 0.620957047790),
    ('ipo', {'tau': 0.1, 'reduction': 'sum'}, 12.25),
    ('ipo', {'tau': 0.1, 'reduction': 'mean'}, 22.827160493827),
    ('simpo', {'beta': 2.0, 'gamma': 1.0}, 1.839674655553),
]
