"""supervise.sh against scripted machines: every one that is made is deleted, and the same command is started again."""

import json
import time

import pytest

COMMAND = ('run', '--', 'jaxpo', 'train', 'experiments/x.py', '--output', 'gs://bucket/run')
ON_ITS_WAY = ['WAITING_FOR_RESOURCES', 'PROVISIONING', 'ACTIVE']


def supervise(world, *options, **changes):
    return world.run('supervise.sh', *options, *COMMAND, changes=changes)


def test_a_preempted_run_is_made_anew_and_goes_on(world):
    world.play([*ON_ITS_WAY, 'ACTIVE*', 'SUSPENDING'], ON_ITS_WAY)
    world.codes(['hang', 0], ['hang', 0])
    done = supervise(world)
    assert done.returncode == 0, done.stderr
    assert world.made_and_deleted() == (2, 2)
    starts = world.sent('start')
    assert len(starts) == 2 and starts[0] == starts[1]
    assert len(world.sent('setup')) == 2
    assert 'the machines are SUSPENDING' in done.stderr and 'exit code 0' in done.stderr


def test_bad_input_is_not_tried_again(world):
    world.codes([2], ['hang'])
    done = supervise(world)
    assert done.returncode == 2
    assert world.made_and_deleted() == (1, 1)
    assert len(world.sent('start')) == 1
    # What the command said of it is shown.
    assert 'host-0: arguments: train experiments/x.py' in done.stdout


def test_a_command_that_is_not_there_is_not_tried_again(world):
    done = world.run('supervise.sh', 'run', '--', 'jaxpoo', 'train')
    assert done.returncode == 2
    assert world.made_and_deleted() == (1, 1)


def test_a_run_that_had_to_stop_is_not_tried_again(world):
    world.codes([1], [1])
    done = supervise(world)
    assert done.returncode == 1
    assert world.made_and_deleted() == (1, 1)
    assert len(world.sent('start')) == 1


def test_endless_suspension_spends_the_tries(world):
    world.play(['WAITING_FOR_RESOURCES', 'SUSPENDED'])
    done = supervise(world)
    assert done.returncode == 75
    assert world.made_and_deleted() == (5, 5)
    assert not world.sent('start')


def test_a_request_that_is_never_granted_is_given_up(world):
    world.play(['WAITING_FOR_RESOURCES'])
    done = supervise(world, TRIES='2', WAIT_POLLS='4')
    assert done.returncode == 75
    assert world.made_and_deleted() == (2, 2)
    assert 'not granted within 4 looks' in done.stderr


def test_a_request_that_failed_is_made_again(world):
    world.play(['FAILED'], ['ACTIVE'])
    assert supervise(world).returncode == 0
    assert world.made_and_deleted() == (2, 2)


def test_a_worker_that_fails_alone_stops_the_others(world):
    world.codes([134, 0], ['hang', 0])
    done = supervise(world, GRACE_POLLS='1')
    assert done.returncode == 0, done.stderr
    # The machines were not at fault: the command starts again where it is set up already.
    assert world.made_and_deleted() == (1, 1)
    assert len(world.sent('start')) == 2
    assert len(world.sent('setup')) == 1
    assert len(world.sent('stop')) == 1


def test_an_interrupted_run_goes_on_where_it_was(world):
    world.codes([75, 0], [75, 0])
    assert supervise(world).returncode == 0
    assert world.made_and_deleted() == (1, 1)
    assert len(world.sent('start')) == 2


def test_a_run_that_always_breaks_spends_the_tries(world):
    world.codes([75] * 9, [139] * 9)
    done = supervise(world, TRIES='2')
    assert done.returncode == 75
    assert world.made_and_deleted() == (1, 1)
    assert len(world.sent('start')) == 2


def test_a_worker_that_does_not_answer_costs_the_machines(world):
    world.play(['ACTIVE'], unreachable=[1])
    done = supervise(world, TRIES='2', GRACE_POLLS='1')
    assert done.returncode == 75
    assert world.made_and_deleted() == (2, 2)
    assert 'no answer from 1' in done.stderr


def test_a_worker_that_falls_silent_costs_the_machines(world):
    world.play(['ACTIVE', 'ACTIVE*', 'SILENT'], ['ACTIVE'])
    world.codes(['hang', 0], ['hang', 0])
    done = supervise(world, GRACE_POLLS='1')
    assert done.returncode == 0, done.stderr
    assert world.made_and_deleted() == (2, 2)


def test_a_run_that_goes_on_already_is_watched(world):
    world.codes(['hang'], ['hang'])
    assert world.run('create_queued.sh').returncode == 0
    assert world.run('setup_workers.sh').returncode == 0
    assert world.run('run_all.sh', *COMMAND).returncode == 0
    changed = json.loads((world.directory / 'world.json').read_text())
    changed['lives'] = [['ACTIVE', 'ACTIVE', 'ACTIVE', 'SUSPENDED'], ['ACTIVE']]
    changed['looks'] = 0
    (world.directory / 'world.json').write_text(json.dumps(changed))
    done = supervise(world)
    assert done.returncode == 0, done.stderr
    assert 'runs already: watching it' in done.stderr
    # Once by hand, not by the first try, which must not touch the code of what runs, and once on machines of its own.
    assert len(world.sent('start')) == len(world.sent('setup')) == 2
    assert world.made_and_deleted() == (2, 2)


@pytest.mark.parametrize('refusal', ['PERMISSION_DENIED: ask your administrator', 'INVALID_ARGUMENT: no such type'])
def test_a_refused_request_is_not_made_again(world, refusal):
    world.play(['ACTIVE'], refuse_create=[refusal])
    done = supervise(world)
    assert done.returncode == 2
    assert refusal in done.stderr
    assert world.made_and_deleted() == (1, 0)


def test_a_request_that_failed_by_chance_is_made_again(world):
    world.play(['ACTIVE'], refuse_create=['INTERNAL: try again'])
    assert supervise(world).returncode == 0
    assert world.made_and_deleted() == (2, 1)


def test_deleting_is_tried_until_it_is_done(world):
    world.play(['ACTIVE'], refuse_delete=['INTERNAL: try again'])
    done = supervise(world)
    assert done.returncode == 0
    assert world.made_and_deleted() == (1, 2)


def test_what_could_not_be_deleted_is_said(world):
    world.play(['ACTIVE'], refuse_delete=['INTERNAL: try again'] * 9)
    done = supervise(world)
    assert done.returncode == 1
    assert 'COULD NOT BE DELETED and may cost money' in done.stderr


def test_a_question_that_is_not_answered_for_a_while_disturbs_nothing(world):
    world.play(['ACTIVE'], refuse_describe=['Reauthentication failed'] * 2)
    done = supervise(world)
    assert done.returncode == 0
    assert world.made_and_deleted() == (1, 1)
    assert 'Reauthentication failed' in done.stderr


def test_packages_that_could_not_be_fetched_are_fetched_again(world):
    (world.directory / 'no_network.1').touch()
    done = supervise(world)
    assert done.returncode == 0, done.stderr
    assert world.made_and_deleted() == (1, 1)
    assert len(world.sent('setup')) == 2


def test_interrupting_the_supervisor_leaves_all_as_it_is(world):
    world.codes(['hang'], ['hang'])
    process = world.open('supervise.sh', *COMMAND, changes={'POLL_SECONDS': '1'})
    while not (world.home(0) / 'started').exists() or not (world.home(1) / 'started').exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.terminate()
    assert process.wait(timeout=60) == 130
    assert 'goes on on the workers, which cost money until delete.sh' in process.communicate()[1]
    assert world.made_and_deleted() == (1, 0)
    assert world.run('status.sh', 'run').stdout.count('running') == 2


def test_machines_can_be_kept(world):
    assert supervise(world, '--keep').returncode == 0
    assert world.made_and_deleted() == (1, 0)


def test_a_group_of_machines_is_supervised_the_same(world):
    world.play(['PROVISIONING', 'ACTIVE', 'ACTIVE*', 'SUSPENDED'], ['ACTIVE'])
    world.codes(['hang', 0], ['hang', 0])
    done = supervise(world, PROVIDER='mig')
    assert done.returncode == 0, done.stderr
    assert world.made_and_deleted() == (2, 2)
    for kind in ('instance-templates', 'resource-policies'):
        assert len(world.calls(kind, 'create')) == len(world.calls(kind, 'delete')) == 2
    assert len(world.sent('start')) == 4


def test_what_another_script_would_refuse_is_refused_before_anything_is_made(world):
    done = supervise(world, COMMIT='')
    assert done.returncode == 2
    assert 'COMMIT is empty' in done.stderr
    assert not world.calls()
