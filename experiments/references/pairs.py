"""The pairs of a study of many references: TruthfulQA split by seed, few or more to train on and some to choose by.

    python experiments/references/pairs.py [--output runs/many_references]

For each of SEEDS it writes OUTPUT/seed_N/scarce.jsonl (24 pairs), larger.jsonl (72, the scarce ones among them) and
validation.jsonl (64 others, by which mixing weights are chosen or judged); and once for all OUTPUT/evaluation.jsonl
(150 pairs of other questions). Seeds split anew, so that the spread over seeds has that of all three choices in it.

Rows are read from a folder beside the repository (`../shared/data/ci`). After training on them, do not report
TruthfulQA itself.
"""

import argparse
import pathlib

import numpy as np

from jaxpo.errors import InputError

SHARED = pathlib.Path(__file__).resolve().parents[3] / 'shared/data/ci'
OUTPUT = 'runs/many_references'
SEEDS = (0, 1, 2)
SCARCE, LARGER, VALIDATION = 24, 72, 64


def split(count: int, seed: int) -> dict[str, np.ndarray]:
    """Places of the pairs of each part, int64, in drawn order: `scarce` is the first of `larger`.

    Philox keyed by the seed, and its raw bits sorted: the same on every machine and version. InputError: `count`
    pairs are too few.
    """
    if count < VALIDATION + LARGER:
        raise InputError(f'{count} pairs are too few for {VALIDATION} to validate on and {LARGER} to train on.')
    order = np.argsort(np.random.Philox(key=seed).random_raw(count), kind='stable')
    training = order[VALIDATION : VALIDATION + LARGER]
    return {'scarce': training[:SCARCE], 'larger': training, 'validation': order[:VALIDATION]}


def file(output: str | pathlib.Path, seed: int, part: str) -> pathlib.Path:
    """Where a part of a seed's split is written: `scarce`, `larger` or `validation`."""
    return pathlib.Path(output) / f'seed_{seed}' / f'{part}.jsonl'


def evaluation_file(output: str | pathlib.Path) -> pathlib.Path:
    """Where the pairs that all seeds are evaluated on are written."""
    return pathlib.Path(output) / 'evaluation.jsonl'


def lines_of(path: pathlib.Path) -> list[str]:
    """The rows of a file as they stand. InputError: no such file."""
    if not path.is_file():
        raise InputError(f'There is no file {str(path)!r} to make the pairs of.')
    return [line for line in path.read_text(encoding='utf-8').split('\n') if line.strip()]


def write(output: str | pathlib.Path, shared: pathlib.Path = SHARED) -> dict[pathlib.Path, int]:
    """Writes all files of all seeds. By file: its pairs. InputError: a file of `shared` is not there."""
    rows = lines_of(shared / 'truthfulqa.train.jsonl')
    found = {evaluation_file(output): lines_of(shared / 'truthfulqa.eval.jsonl')}
    for seed in SEEDS:
        for part, places in split(len(rows), seed).items():
            found[file(output, seed, part)] = [rows[place] for place in places]
    for path, lines in found.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(''.join(line + '\n' for line in lines), encoding='utf-8')
    return {path: len(lines) for path, lines in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description='Write the pairs of the study of many references, split by seed.')
    parser.add_argument('--output', type=pathlib.Path, default=pathlib.Path(OUTPUT))
    try:
        found = write(parser.parse_args().output)
    except InputError as error:
        parser.error(str(error))
    for path, count in found.items():
        print(f'{count:>4} {path}')


if __name__ == '__main__':
    main()
