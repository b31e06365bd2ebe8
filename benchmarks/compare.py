"""Put results of both sides beside each other: refuse unequal work, print one table row for each result."""

import argparse
import json
import pathlib

EQUAL = ('pairs', 'warmup_steps', 'timed_steps', 'threads', 'machine')
HEADER = (
    'side',
    'mode',
    's/step',
    'tokens/s',
    'peak memory, GiB',
    'setup, s',
    'of it compiling',
    'largest loss difference',
)


def refuse_unequal_work(first: dict, other: dict) -> None:
    for name in EQUAL:
        if first[name] != other[name]:
            raise SystemExit(f'Not comparable: {name} is {first[name]} on one side and {other[name]} on the other.')


def loss_difference(first: dict, other: dict) -> float:
    """Largest absolute difference of the losses of a step, nats, over all steps."""
    return max(abs(a['loss'] - b['loss']) for a, b in zip(first['steps'], other['steps'], strict=True))


def row(first: dict, result: dict) -> tuple[str, ...]:
    return (
        result['side'],
        result['mode'],
        f'{result["seconds_per_step"]:.2f}',
        f'{result["tokens_per_second"]:.1f}',
        f'{result["peak_rss_gib"]:.2f}',
        f'{result["setup_seconds"]:.1f}',
        f'{result.get("compile_seconds", 0.0):.1f}',
        f'{loss_difference(first, result):.1e}',
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('results', nargs='+', help='result files; losses are compared with the first')
    results = [json.loads(pathlib.Path(path).read_text()) for path in parser.parse_args().results]
    for result in results[1:]:
        refuse_unequal_work(results[0], result)
    for cells in (HEADER, ('---',) * len(HEADER), *(row(results[0], result) for result in results)):
        print(f'| {" | ".join(cells)} |')


if __name__ == '__main__':
    main()
