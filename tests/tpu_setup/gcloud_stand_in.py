"""Plays gcloud for the tests: logs its arguments, plays the states of scripted machines, and runs what is sent to them.

Each made TPU has a life: a list of states that looks at it take up in turn, the last one for ever. `ACTIVE*` stays
until every worker started the command once; from `SILENT` on worker 1 does not answer. A worker is a home directory;
commands for it run there by bash.
"""

import contextlib
import fcntl
import glob
import json
import os
import sys

WORLD = os.environ['STAND_IN_WORLD']
ENDED = ('SUSPENDING', 'SUSPENDED', 'FAILED')


def main(arguments: list[str]) -> int:
    with open(f'{WORLD}/lock', 'w') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with open(f'{WORLD}/log.jsonl', 'a') as log:
            log.write(json.dumps(arguments) + '\n')
        with open(f'{WORLD}/world.json') as file:
            world = json.load(file)
        code = answer(world, [word for word in arguments if word != 'alpha'])
        with open(f'{WORLD}/world.json', 'w') as file:
            json.dump(world, file)
    return remote(world, arguments) if code is None else code


def answer(world: dict, words: list[str]) -> int | None:
    """What a command about machines says; None for commands to them, which may overlap."""
    match [word for word in words if not word.startswith('-')]:
        case ['storage', 'buckets', 'describe', *_]:
            return say(world['bucket']) if world['bucket'] else absent()
        case ['compute', 'tpus', 'queued-resources', 'ssh' | 'scp', *_] | ['compute', 'ssh' | 'scp', *_]:
            return None
        case ['compute', 'instance-templates' | 'resource-policies', *_]:
            return 0
        case ['compute', 'tpus', 'queued-resources', verb, *_] | ['compute', 'instance-groups', 'managed', verb, *_]:
            verbs = {'create': create, 'delete': delete, 'describe': describe, 'list-instances': instances}
            return verbs[verb](world, words)
    return say(f'ERROR: the stand-in knows no {words}', 2)


def say(text: str, code: int = 0) -> int:
    print(text, file=sys.stderr if code else sys.stdout)
    return code


def absent() -> int:
    return say('ERROR: NOT_FOUND: Resource was not found', 1)


def create(world: dict, words: list[str]) -> int:
    if world['refuse_create']:
        return say(f'ERROR: {world["refuse_create"].pop(0)}', 1)
    if world['life'] is not None:
        return say('ERROR: ALREADY_EXISTS', 1)
    world['made'] += 1
    world['life'] = min(world['made'], len(world['lives'])) - 1
    world['looks'], world['silent'] = 0, []
    return 0


def delete(world: dict, words: list[str]) -> int:
    if world['life'] is None:
        return absent()
    if world['refuse_delete']:
        return say(f'ERROR: {world["refuse_delete"].pop(0)}', 1)
    take_away()
    world['life'] = None
    return 0


def describe(world: dict, words: list[str]) -> int:
    if world['refuse_describe']:
        return say(f'ERROR: {world["refuse_describe"].pop(0)}', 1)
    return absent() if world['life'] is None else say(look(world))


def instances(world: dict, words: list[str]) -> int:
    if world['life'] is None:
        return absent()
    if '--format=value(instance.basename())' in words:
        return say('\n'.join(f'machine-{worker}' for worker in range(world['workers'])))
    status = {'ACTIVE': 'RUNNING', 'SUSPENDED': 'STOPPED'}.get(look(world), 'STAGING')
    return say('\n'.join([status] * world['workers']))


def look(world: dict) -> str:
    """The state that this look finds; the machines are gone where it is one of the end."""
    states = world['lives'][world['life']]
    state = states[min(world['looks'], len(states) - 1)]
    if state == 'ACTIVE*' and len(glob.glob(f'{WORLD}/workers/*/started')) < world['workers']:
        return 'ACTIVE'
    world['looks'] += 1
    if state == 'ACTIVE*':
        return look(world)
    if state == 'SILENT':
        world['silent'] = [1]
        return 'ACTIVE'
    if state in ENDED:
        take_away()
    return state


def take_away() -> None:
    """Ends all runs on the workers, whose homes go with them."""
    import shutil

    for path in glob.glob(f'{WORLD}/workers/*/jaxpo_runs/*/pid'):
        with open(path) as file:
            group = int(file.read())
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, 9)
    shutil.rmtree(f'{WORLD}/workers', ignore_errors=True)


def remote(world: dict, words: list[str]) -> int:
    """ssh or scp to all workers at once, or to the one of a group that is named."""
    named = [word for word in words if word.startswith('machine-')]
    workers = [int(named[0].split(':')[0].removeprefix('machine-'))] if named else range(world['workers'])
    if world['life'] is None or not reachable(world):
        return say('ERROR: could not connect', 255)
    lost = [worker for worker in workers if worker in (*world['unreachable'], *world['silent'])]
    for worker in lost:
        say(f'ERROR: no answer from {worker}', 255)
    homes = {worker: home(worker) for worker in workers if worker not in lost}
    codes = (copy if 'scp' in words else execute)(homes, words)
    return max([*codes, 255 if lost else 0])


def reachable(world: dict) -> bool:
    states = world['lives'][world['life']]
    return states[min(max(world['looks'] - 1, 0), len(states) - 1)].startswith(('ACTIVE', 'SILENT'))


def home(worker: int) -> str:
    import shutil

    path = f'{WORLD}/workers/{worker}'
    if not os.path.exists(path):
        shutil.copytree(f'{WORLD}/image', path, symlinks=True)
    return path


def copy(homes: dict[int, str], words: list[str]) -> list[int]:
    import shutil

    source, destination = [word for word in words[words.index('scp') + 1 :] if not word.startswith('-')]
    for path in homes.values():
        shutil.copy(source, os.path.join(path, destination.partition(':')[2]))
    return [0]


def execute(homes: dict[int, str], words: list[str]) -> list[int]:
    import subprocess

    command = next(word.removeprefix('--command=') for word in words if word.startswith('--command='))
    running = []
    for worker, path in homes.items():
        environment = {'HOME': path, 'PATH': f'{WORLD}/tools:/usr/bin:/bin', 'WORKER': str(worker)}
        environment['STAND_IN_WORLD'] = WORLD
        running.append(subprocess.Popen(['bash', '-c', command], cwd=path, env=environment, stdin=subprocess.DEVNULL))
    return [process.wait() for process in running]


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
