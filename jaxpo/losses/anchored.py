"""Losses that also say where each completion of its own should go."""

from typing import Literal

import jax
import jax.numpy as jnp

from jaxpo.losses import links, scores
from jaxpo.losses.registry import Needs, Range, loss
from jaxpo.types import Completion


@loss('Pal et al. 2024, arXiv:2402.13228, Eq. 3')
def dpop(chosen: Completion, rejected: Completion, *, beta: float = 0.3, penalty: float = 50.0):
    """DPO-Positive: DPO with a penalty where the chosen completion falls below the reference.

    -log sigmoid(beta * (log_ratio(chosen) - log_ratio(rejected) - penalty * max(0, -log_ratio(chosen)))), log-ratios
    summed over the completion.

    beta > 0 is the strength of the KL penalty, penalty >= 0 (the paper's lambda; 0 is DPO) how much heavier a chosen
    completion weighs that is less likely than under the reference: 50, which the paper finds to work from 5 to 500.
    Where the policy is the reference nothing has fallen yet, and max(0, .) has the slope 0: the first step is DPO's,
    and not (1 + penalty) times as long on the chosen side.

    Unverified: the defaults come from a text about the paper, not from the paper.
    """
    rewards = scores.rewards(scores.log_ratio, chosen, rejected, beta)
    fallen = jax.nn.relu(-rewards.chosen)
    return links.logistic(rewards.chosen - rewards.rejected - penalty * fallen), rewards


@loss('Xie et al. 2024, arXiv:2408.09834')
def minor_dpo(chosen: Completion, rejected: Completion, *, beta: float = 0.1):
    """MinorDPO: DPO that leaves a rejected completion alone once it is less likely than under the reference.

    -log sigmoid(beta * log_ratio(chosen) - beta * max(0, log_ratio(rejected))), log-ratios summed over the completion.

    beta > 0 is the strength of the KL penalty. Where the policy is the reference, as on the first step, the rejected
    log-ratio is exactly 0; max(0, .) has the slope 1 there, so that the first step is DPO's. (Implementations with
    jax.numpy.maximum have 0.5, with torch.clamp 1.)

    Unverified: the formula comes from two texts about the paper, which agree; no official code is known.
    """
    rewards = scores.rewards(scores.log_ratio, chosen, rejected, beta)
    risen = jnp.where(rewards.rejected >= 0, rewards.rejected, 0.0)
    return links.logistic(rewards.chosen - risen), rewards


def _anchors(chosen: Completion, rejected: Completion, chosen_target, rejected_target):
    """Half the squared distances, in nats, of both log-ratios from where they should be."""
    chosen_loss = links.squared(scores.log_ratio(chosen), chosen_target)
    return (chosen_loss + links.squared(scores.log_ratio(rejected), rejected_target)) / 2


@loss('Xiao et al. 2024, arXiv:2412.14516')
def cal_dpo(chosen: Completion, rejected: Completion, *, beta: float = 0.002):
    """Cal-DPO: DPO calibrated, so that log-ratios themselves reach a target.

    -log sigmoid(log_ratio(chosen) - log_ratio(rejected)) + ((log_ratio(chosen) - 1 / (2 beta))^2 +
    (log_ratio(rejected) + 1 / (2 beta))^2) / 2, log-ratios summed over the completion.

    beta > 0 sets the targets, plus and minus 1 / (2 beta) nats: where the implicit rewards beta * log_ratio are 1/2 and
    -1/2. It does not scale the margin within the sigmoid: the official code has none there, since calibration and not
    the sigmoid fixes the scale. 0.002 is the official configuration's.

    Unverified: the arXiv number, and that the paper's text has no beta in the sigmoid either.
    """
    rewards = scores.rewards(scores.log_ratio, chosen, rejected, beta)
    margin = scores.log_ratio(chosen) - scores.log_ratio(rejected)
    target = 1 / (2 * beta)
    return links.logistic(margin) + _anchors(chosen, rejected, target, -target), rewards


@loss(
    'Wu et al. 2024, arXiv:2405.00675',
    needs=lambda labels: Needs(completion_columns=('win_probability',) if labels == 'win_probability' else ()),
)
def sppo(
    chosen: Completion,
    rejected: Completion,
    *,
    beta: float = 0.001,
    labels: Literal['hard', 'win_probability'] = 'hard',
):
    """Self-play preference optimisation: each log-ratio regressed on its win probability.

    ((log_ratio(chosen) - (P(chosen) - 1/2) / beta)^2 + (log_ratio(rejected) - (P(rejected) - 1/2) / beta)^2) / 2,
    log-ratios summed over the completion; P = 1 and 0 with `labels='hard'`, and else the data's probabilities.

    beta > 0 is 1 / eta of the paper, whose value is 0.001: hard labels ask for plus and minus 500 nats. labels: 'hard'
    takes the chosen completion to win always; 'win_probability' reads each completion's probability, 0 to 1, of winning
    against the policy's other answers, from the columns `chosen_win_probability` and `rejected_win_probability`.

    Differs: TRL's `sppo_hard` is twice this loss; the factor 1/2 is the official code's.
    """
    targets = [(probability - 0.5) / beta for probability in _win_probabilities(chosen, rejected, labels)]
    return _anchors(chosen, rejected, *targets), scores.rewards(scores.log_ratio, chosen, rejected, beta)


def _win_probabilities(chosen, rejected, labels):
    if labels == 'hard':
        return 1.0, 0.0
    return chosen.columns['win_probability'], rejected.columns['win_probability']


def _hard_label(chosen: Completion, rejected: Completion):
    """The pair's order is trusted."""
    return 1.0


def _score_label(chosen: Completion, rejected: Completion, *, alpha: float = 1.0):
    """As probable as the softmax of the scores at temperature alpha says."""
    return jax.nn.sigmoid((chosen.columns['score'] - rejected.columns['score']) / alpha)


LABELS = {'hard': _hard_label, 'scores': _score_label}
"""How probable it is that the chosen completion of a pair is the better one, by the word of `labels`."""


def _label_needs(labels: str) -> Needs:
    return Needs(completion_columns=('score',) if labels == 'scores' else ())


@loss('Chen et al. 2024, arXiv:2402.05369', needs=_label_needs, parts={'labels': LABELS}, ranges={'alpha': Range(0)})
def info_nca(
    chosen: Completion,
    rejected: Completion,
    *,
    beta: float = 0.01,
    labels: Literal['hard', 'scores'] = 'hard',
    **label_options,
):
    """InfoNCA: classifies which completion is the better one, with soft labels from scores.

    -sum_i p_i * log softmax_i(beta * log_ratio), over chosen and rejected, log-ratios summed over the completion; p is
    (1, 0) with `labels='hard'` (DPO), and softmax(score / alpha) with `labels='scores'`.

    beta > 0 is the strength of the KL penalty, 0.01 as in the official scripts. labels: 'hard' trusts the pair's order;
    'scores' reads the columns `chosen_score` and `rejected_score`, and has the temperature alpha > 0, in units of
    scores (default 1).

    Differs: the official code divides scores by 1e-3 or less, at which labels are all but hard, and takes K completions
    of a prompt; it remarks that its temperature is the reciprocal of the paper's alpha.
    """
    label = LABELS[labels](chosen, rejected, **label_options)
    rewards = scores.rewards(scores.log_ratio, chosen, rejected, beta)
    return links.smoothed(rewards.chosen - rewards.rejected, 1 - label), rewards


@loss('Chen et al. 2024, arXiv:2402.05369', needs=_label_needs, parts={'labels': LABELS}, ranges={'alpha': Range(0)})
def nca(
    chosen: Completion,
    rejected: Completion,
    *,
    beta: float = 0.01,
    labels: Literal['hard', 'scores'] = 'hard',
    **label_options,
):
    """NCA: tells each completion on its own from noise, so that the chosen one does not become less likely.

    -sum_i (p_i * log sigmoid(beta * log_ratio_i) + log sigmoid(-beta * log_ratio_i) / 2), over chosen and rejected,
    log-ratios summed over the completion; p is (1, 0) with `labels='hard'`, and softmax(score / alpha) with 'scores'.

    beta > 0 is the strength of the KL penalty, 0.01 as in the official scripts. labels: 'hard' trusts the pair's order;
    'scores' reads the columns `chosen_score` and `rejected_score`, and has the temperature alpha > 0, in units of
    scores (default 1).

    Differs: the official code divides scores by 1e-3 or less, at which labels are all but hard, and takes K completions
    of a prompt; it remarks that its temperature is the reciprocal of the paper's alpha.
    """
    label = LABELS[labels](chosen, rejected, **label_options)
    rewards = scores.rewards(scores.log_ratio, chosen, rejected, beta)
    data = label * links.logistic(rewards.chosen) + (1 - label) * links.logistic(rewards.rejected)
    noise = (links.logistic(-rewards.chosen) + links.logistic(-rewards.rejected)) / 2
    return data + noise, rewards


@loss("D'Oosterlinck et al. 2024, arXiv:2408.06266", takes_unpaired=True)
def apo_zero(chosen: Completion, rejected: Completion, *, beta: float = 0.1):
    """APO-zero: raises chosen and lowers rejected completions, each on its own; takes unpaired rows.

    1 - sigmoid(beta * log_ratio(chosen)) + sigmoid(beta * log_ratio(rejected)), log-ratios summed over the completion;
    the half of a completion that is not there is 0.

    beta > 0 is the strength of the KL penalty, 0.1 as in TRL. The mean is over rows: a pair counts once, as in the
    paper, with both its halves; a row with one completion counts once with its half, so that data without pairs have
    the mean over their completions.
    """
    rewards = scores.rewards(scores.log_ratio, chosen, rejected, beta)
    raised = jnp.where(scores.present(chosen), jax.nn.sigmoid(-rewards.chosen), 0.0)
    lowered = jnp.where(scores.present(rejected), jax.nn.sigmoid(rewards.rejected), 0.0)
    return raised + lowered, rewards


@loss("D'Oosterlinck et al. 2024, arXiv:2408.06266")
def apo_down(chosen: Completion, rejected: Completion, *, beta: float = 0.1):
    """APO-down: lowers both completions, the rejected one more; for chosen ones worse than the policy's own.

    sigmoid(beta * log_ratio(chosen)) + 1 - sigmoid(beta * (log_ratio(chosen) - log_ratio(rejected))), log-ratios summed
    over the completion.

    beta > 0 is the strength of the KL penalty, 0.1 as in TRL. Where the policy is the reference, the chosen
    completion's two gradients cancel: the first step lowers the rejected one only.
    """
    rewards = scores.rewards(scores.log_ratio, chosen, rejected, beta)
    return jax.nn.sigmoid(rewards.chosen) + jax.nn.sigmoid(rewards.rejected - rewards.chosen), rewards
