"""Findings of a study with every section, made by hand: no two numbers of a row mean the same."""

import dataclasses
import math

from jaxpo.study import findings


def spread(mean, width=0.1):
    return findings.Spread(mean, mean - width, mean + width, 3)


def comparison(difference, width=0.02, verdict='no claim'):
    ends = (difference - width, difference + width)
    return findings.Comparison(3, difference, *ends, 0.04, 0.08, 0.93, 0.05, verdict)


def board_row(place, name, baseline):
    verdict = ('no claim', 'better', 'worse')[place % 3]
    against = None if name == baseline else comparison(0.03 - 0.01 * place, verdict=verdict)
    mean = 0.7 - 0.01 * place
    return findings.LeaderboardRow(
        rank=place + 1,
        method=name,
        is_baseline=name == baseline,
        setting='beta 0.1, learning rate 1e-5',
        n=3,
        mean=mean,
        sd=0.012,
        values=(mean, mean + 0.01, None),
        selection_mean=mean + 0.02,
        against_baseline=against,
        by_prompt=None if against is None else findings.ByPrompt(3, 120, 0.03, -0.01, None),
        failed=place % 2,
        cells=('0123456789ab', 'ba9876543210'),
        note='' if place else 'a seed has no number',
    )


def design(names, again):
    grid = (
        findings.GridField('objective.dpo.beta', ('0.05', '0.1')),
        findings.GridField('optimizer.learning_rate', ('1e-5', '3e-5')),
    )
    return findings.Design(
        name='a study',
        question='Which is better?',
        methods=tuple(findings.MethodDesign(name, '{"dpo": {}}', grid, (('train.steps', '9'),), 4) for name in names),
        seeds=(0, 1, 2),
        seeds_again=(3, 4, 5),
        trials=4,
        cells=12 * (len(names) + 1),
        baseline=names[0],
        again=again,
        metric='rewards/accuracies',
        higher_is_better=True,
        selection_share=0.5,
        confidence=0.95,
        rules=(('Selection', 'best mean over seeds on the selection split'),),
        base=(('model.source', 'random:tiny.json'),),
        extensions=(findings.Extension(12, (names[-1],), 24),),
    )


def progress(names):
    counts = tuple(findings.Counts(name, 12, 10, 1, 1, 0, 0) for name in names)
    whole = findings.Counts('', *(12 * len(names), 10 * len(names), len(names), len(names), 0, 0))
    return findings.Progress(whole, counts, True, 'Failed cells count as the worst.')


def frontier(names, again):
    methods = tuple(
        findings.MethodFrontier(
            name,
            tuple(
                findings.FrontierPoint('beta 0.1', 0, step, 2.0 * step, math.sqrt(step) - 0.1 * place, '0123456789ab')
                for step in range(6)
            ),
            tuple(findings.FrontPoint(2.0 * step, math.sqrt(step) - 0.1 * place) for step in range(6)),
            1.5,
            None if place == 0 else comparison(0.1),
        )
        for place, name in enumerate((*names, again))
    )
    rows = tuple(
        findings.MatchedRow(name, 3, 1.2, None if place == 0 else comparison(0.2, verdict='better'), '')
        for place, name in enumerate(names)
    )
    missed = findings.MatchedRow(again, 0, None, None, 'not reached')
    return findings.Frontier(
        methods, (findings.MatchedKL(4.0, 'half of what all reached', (*rows, missed)),), 0.0, 8.0, 'Compare at one KL.'
    )


def robustness(names):
    def cells(place):
        for beta in ('0.05', '0.1'):
            for rate in ('1e-5', '3e-5'):
                chosen = (beta, rate) == ('0.1', '1e-5')
                value = None if (beta, rate) == ('0.05', '3e-5') else 0.6 + 0.01 * place + 0.5 * float(beta)
                yield findings.HeatCell(f'{beta} {rate}', (beta, rate), value, value, 3, 0, chosen)

    rows = tuple(
        findings.RobustnessRow(
            method=name,
            runs=12,
            failed=1,
            interquartile_mean=0.66,
            worst_quartile=None,
            share_above_start=0.99999,
            share_above_baseline=0.25,
            profile=tuple(
                findings.ProfilePoint(t / 10, 1 - t / 10, 0.95 * (1 - t / 10), None if t == 5 else 1 - 0.9 * t / 10)
                for t in range(11)
            ),
            best_of=(None, 0.66, 0.68, 0.69 - 0.01 * place),
            fields=('objective.dpo.beta', 'optimizer.learning_rate'),
            grid=tuple(cells(place)),
        )
        for place, name in enumerate(names)
    )
    return findings.Robustness(rows, 0.5, 'Few settings matter.')


def length(names):
    rows = tuple(
        findings.LengthRow(name, spread(0.3), spread(0.7), spread(0.65), spread(0.2), None, None) for name in names
    )
    return findings.Length(rows, 200, 31.0, 24.5, 0.6, 'Length explains little.')


def health(names):
    bins = tuple(findings.CalibrationBin(0.55 + 0.1 * b, 0.5 + 0.09 * b, 20) for b in range(5))
    rows = tuple(
        findings.HealthRow(
            name, spread(-3.0), spread(-9.0), spread(-0.1), spread(-0.3), spread(0.7), spread(6.0), spread(0.9),
            spread(0.7), spread(0.2), spread(0.08), bins, spread(1.1), spread(4.0), 0.9,
        )
        for name in names
    )  # fmt: skip
    return findings.Health(rows, 'Chosen completions fall.')


def learning(names):
    def points(place):
        return tuple(
            findings.CurvePoint(float(step), 0.5 + 0.02 * step - 0.01 * place, 0.45 + 0.02 * step, 0.6, 3)
            for step in range(6)
        )

    return findings.Learning(
        tuple(findings.Curve(name, points(place), points(place)) for place, name in enumerate(names)), 'All learn.'
    )


def compute(names):
    rows = tuple(findings.ComputeRow(name, 12, 1200, 480_000, 400.0, 800.0, 1200.0, 4) for name in names)
    total = findings.ComputeRow('', 36, 3600, 1_440_000, 1200.0, 9000.0, 1200.0, 4)
    return findings.Compute(rows, total, 'All cost the same.')


def provenance(names):
    lines = tuple(
        findings.CellLine(f'{place:012d}', name, 'beta 0.1', 0, 0, state, error, 0.6, None)
        for place, (name, state, error) in enumerate(
            (name, *end) for name in names for end in (('finished', ''), ('error', 'out of <memory>'))
        )
    )
    versions = (findings.Version('jax', '0.10.2', 20), findings.Version('commit', 'abcdef', 20))
    return findings.Provenance(
        versions, ('jax',), lines, 60, 'a' * 64, 'b' * 64, 'jaxpo report runs/study', 'Every number is from these.'
    )


def sample(*names, baseline='dpo'):
    """Findings of a study of the baseline and these methods, with every section."""
    names = (baseline, *names)
    again = f'{baseline} (A/A)'
    rows = tuple(board_row(place, name, baseline) for place, name in enumerate(names))
    own = dataclasses.replace(board_row(0, again, ''), rank=None)
    return findings.Findings(
        design(names, again),
        progress((*names, again)),
        findings.Leaderboard(rows, 'report', 'Nothing can be claimed.', 'No method beats the baseline.'),
        findings.AgainstItself(own, 4, 0, 0.2, 'As it should be, nothing is found.'),
        frontier(names, again),
        robustness(names),
        length(names),
        health(names),
        learning(names),
        compute((*names, again)),
        provenance(names),
        findings.Conclusions(('ipo is better.',), ('Nothing about other models.',)),
    )
