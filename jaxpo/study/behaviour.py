"""What training did at the chosen settings: to lengths, log-probabilities, calibration and gradients, step by step."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from scipy.special import expit

from jaxpo.study.evidence import REPORT, TRAIN, Evidence, Found, finite, mean, spread, there
from jaxpo.study.findings import (
    CalibrationBin,
    Curve,
    CurvePoint,
    Health,
    HealthRow,
    Learning,
    Length,
    LengthRow,
    Spread,
)
from jaxpo.study.measures import PairNumbers
from jaxpo.study.preferences import LengthControl, expected_calibration_error, length_controlled_accuracy
from jaxpo.study.records import DIVERGED
from jaxpo.study.selection import Choice
from jaxpo.study.wording import counted, figure, listed, share

STRETCHES = 40  # of steps, that a curve of the training loss is averaged over
FALLING = 0.5  # share of pairs whose chosen completion became less likely, above which a caption names the method

Choices = Mapping[str, Choice]


def _cells(choice: Choice) -> list[Found]:
    return [] if choice.trial is None else [cell for cell in choice.trial.cells if cell.finished]


def _spread_of(cells: Sequence[Found], value: Callable[[Found], float | None]) -> Spread | None:
    return spread(value(cell) for cell in cells)


def _last(cells: Sequence[Found], name: str, split: str = REPORT) -> Spread | None:
    return _spread_of(cells, lambda cell: cell.last(name, split))


def _margins(numbers: PairNumbers) -> np.ndarray:
    return numbers.chosen_reward - numbers.rejected_reward


def length(evidence: Evidence, choices: Choices) -> Length | None:
    """None where there are neither numbers by pair nor sampled completions."""
    rows = tuple(_length_row(arm.name, _cells(choices[arm.name])) for arm in evidence.methods)
    held = [cell.pairs for arm in evidence.methods for cell in _cells(choices[arm.name]) if cell.pairs is not None]
    if not held and not any(row.sampled_after for row in rows):
        return None
    longer = mean(float(np.mean(one.chosen_tokens > one.rejected_tokens)) for one in held)
    return Length(
        rows,
        pairs=len(held[0].pair) if held else None,
        chosen_tokens=mean(float(np.mean(one.chosen_tokens)) for one in held),
        rejected_tokens=mean(float(np.mean(one.rejected_tokens)) for one in held),
        share_chosen_longer=longer,
        caption=_length_caption(rows, longer),
    )


def _length_row(method: str, cells: Sequence[Found]) -> LengthRow:
    controls = [_control(cell) for cell in cells if cell.pairs is not None]
    return LengthRow(
        method=method,
        correlation=spread(control.correlation for control in controls),
        accuracy=spread(control.accuracy for control in controls),
        controlled_accuracy=spread(control.controlled for control in controls),
        log_ratio_correlation=_last(cells, 'length_correlation'),
        sampled_before=_spread_of(cells, lambda cell: cell.first('completion_tokens')),
        sampled_after=_last(cells, 'completion_tokens'),
    )


def _control(cell: Found) -> LengthControl:
    numbers = cell.pairs
    return length_controlled_accuracy(_margins(numbers), numbers.chosen_tokens - numbers.rejected_tokens)


def _length_caption(rows: Sequence[LengthRow], longer: float | None) -> str:
    text = ''
    if longer is not None:
        text = (
            f'Of the held-out pairs, {share(longer)} have the longer completion as the chosen one. The controlled '
            'accuracy is what is left once the part of the margin that follows the difference in length in a line is '
            'taken out; a method that loses much of its accuracy there has learned length.'
        )
        losses = [
            (row.accuracy.mean - row.controlled_accuracy.mean, row.method) for row in rows if row.controlled_accuracy
        ]
        if losses:
            most, method = max(losses, key=lambda loss: loss[0])
            text += f' The most is lost by {method}: {figure(most)}.'
    grown = [
        (row.sampled_after.mean - row.sampled_before.mean, row.method)
        for row in rows
        if row.sampled_after and row.sampled_before
    ]
    if grown:
        most, method = max(grown, key=lambda growth: growth[0])
        text += f' Sampled completions grow the most under {method}: by {figure(most)} tokens.'
    return text.strip()


def health(evidence: Evidence, choices: Choices) -> Health | None:
    """None where no chosen setting has any such number."""
    rows = tuple(
        _health_row(arm.name, _cells(choices[arm.name]), [cell.state for cell in arm.cells]) for arm in evidence.methods
    )
    told = ('chosen_change', 'margin', 'accuracy_report', 'calibration_error', 'gradient_norm_median')
    if not any(getattr(row, name) for row in rows for name in told):
        return None
    return Health(rows, _health_caption(rows))


def _health_row(method: str, cells: Sequence[Found], states: Sequence[str]) -> HealthRow:
    ended = [state for state in states if state != 'missing']
    numbers = [cell.pairs for cell in cells if cell.pairs is not None]
    return HealthRow(
        method=method,
        chosen_change=_last(cells, 'log_ratios/chosen'),
        rejected_change=_last(cells, 'log_ratios/rejected'),
        chosen_change_per_token=_last(cells, 'log_ratios/chosen_per_token'),
        rejected_change_per_token=_last(cells, 'log_ratios/rejected_per_token'),
        chosen_falling=_last(cells, 'chosen_falling'),
        margin=_last(cells, 'rewards/margins'),
        accuracy_train=_last(cells, 'rewards/accuracies', TRAIN),
        accuracy_report=_last(cells, 'rewards/accuracies'),
        accuracy_gap=_spread_of(cells, _gap),
        calibration_error=spread(expected_calibration_error(expit(_margins(one))).error for one in numbers),
        calibration=_calibration(numbers),
        gradient_norm_median=_spread_of(cells, lambda cell: _of_norms(cell, np.median)),
        gradient_norm_largest=_spread_of(cells, lambda cell: _of_norms(cell, np.max)),
        finite_share=1 - ended.count(DIVERGED) / len(ended) if ended else None,
    )


def _gap(cell: Found) -> float | None:
    train, held_out = (cell.last('rewards/accuracies', split) for split in (TRAIN, REPORT))
    return None if train is None or held_out is None else train - held_out


def _of_norms(cell: Found, statistic: Callable[[list[float]], float]) -> float | None:
    norms = there(finite(line.get('grad_norm')) for line in cell.training)
    return float(statistic(norms)) if norms else None


def _calibration(numbers: Sequence[PairNumbers]) -> tuple[CalibrationBin, ...]:
    """Bins that hold pairs, of all seeds together."""
    if not numbers:
        return ()
    found = expected_calibration_error(expit(np.concatenate([_margins(one) for one in numbers])))
    bins = zip(found.confidence, found.correct, found.count)
    return tuple(
        CalibrationBin(float(confidence), float(correct), int(count)) for confidence, correct, count in bins if count
    )


def _health_caption(rows: Sequence[HealthRow]) -> str:
    falling = [row.method for row in rows if row.chosen_falling and row.chosen_falling.mean > FALLING]
    text = 'Changes are of summed log-probabilities of held-out completions since before training, in nats.'
    if falling:
        text += (
            f' Under {counted(len(falling), "method")} most chosen completions have become less likely than they were '
            f'({listed(falling)}): where their margins grow, it is by pushing the rejected ones down further.'
        )
    gaps = [(row.accuracy_gap.mean, row.method) for row in rows if row.accuracy_gap]
    if gaps:
        widest, method = max(gaps, key=lambda gap: gap[0])
        text += f' The widest gap between training and held-out accuracy is that of {method}: {figure(widest)}.'
    if any(row.calibration for row in rows):
        text += (
            " Calibration reads the margin of a method's own reward as the log-odds of a preference, which only some "
            'methods mean it to be.'
        )
    return text


def learning(evidence: Evidence, choices: Choices) -> Learning | None:
    """None where nothing was evaluated and no training loss is there."""
    metric = evidence.design['metric']
    curves = tuple(
        Curve(arm.name, _metric_curve(_cells(choices[arm.name]), metric), _loss_curve(_cells(choices[arm.name])))
        for arm in evidence.methods
    )
    if not any(curve.metric or curve.loss for curve in curves):
        return None
    return Learning(curves, _learning_caption(evidence, curves))


def _metric_curve(cells: Sequence[Found], metric: str) -> tuple[CurvePoint, ...]:
    by_step: dict[float, list[float]] = {}
    for cell in cells:
        for step, line in cell.evaluations.get(REPORT, {}).items():
            by_step.setdefault(step, []).extend(there([finite(line.get(metric))]))
    return _curve(by_step)


def _loss_curve(cells: Sequence[Found]) -> tuple[CurvePoint, ...]:
    """Each seed's mean over a stretch, at the stretch's last step, then over seeds."""
    most = max((line['step'] for cell in cells for line in cell.training), default=0)
    width = max(1, -(-most // STRETCHES))
    by_step: dict[float, list[float]] = {}
    for cell in cells:
        stretches: dict[int, list[float | None]] = {}
        for line in cell.training:
            stretches.setdefault(-(-line['step'] // width) * width, []).append(finite(line.get('loss')))
        for step, losses in stretches.items():
            by_step.setdefault(min(step, most), []).extend(there([mean(losses)]))
    return _curve(by_step)


def _curve(by_step: Mapping[float, Sequence[float]]) -> tuple[CurvePoint, ...]:
    return tuple(
        CurvePoint(float(step), mean(values), min(values), max(values), len(values))
        for step, values in sorted(by_step.items())
        if values
    )


def _learning_caption(evidence: Evidence, curves: Sequence[Curve]) -> str:
    sign, metric = evidence.sign, evidence.design['metric']
    past = [curve.method for curve in curves if _fell(curve, sign)]
    text = (
        f'{metric} on the report split by step at the chosen setting: mean over seeds, band from the lowest to the '
        'highest seed. Training losses of different methods are not on one scale.'
    )
    if past:
        text += f' Better at an earlier step than at the last two, as over-optimisation has it: {listed(past)}.'
    return text


def _fell(curve: Curve, sign: int) -> bool:
    means = [sign * point.mean for point in curve.metric]
    return len(means) > 2 and max(means[:-2]) > max(means[-2:])
