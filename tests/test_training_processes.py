"Real processes of one machine, and of two, train one model: the bits of a resumed training, kills of a member, of the parent and of a machine, what is refused, the whole command."
import contextlib, os, re, signal, socket, subprocess, sys, tempfile, time
from pathlib import Path

import psutil, pytest

from strip_notebooks.core import file_hash
from strip_notebooks.training.losses import TrainingError
from test_training import material, prepare, settings

CLOT = str(Path(sys.executable).parent/'clot')

@pytest.fixture(scope='module')
def cohort(tmp_path_factory):
    folder = tmp_path_factory.mktemp('cohort')
    prepare(folder)
    return folder

def trained(cohort, folder, on_epoch=None, **more):
    "A training by two processes, unless `more` says otherwise"
    from strip_notebooks.training.classifier import make_config, train
    return train(*material(cohort), make_config(**{**settings, 'devices': 2, **more}), folder, on_epoch)

@pytest.fixture(scope='module')
def whole(cohort, tmp_path_factory):
    "The result of a training that nothing disturbed"
    return trained(cohort, tmp_path_factory.mktemp('whole')/'training')

equal = dict(arch='test_vit(dynamic_img_size=True)', dropout=0., mixup=0., optimizer='sgd', lr=.05, loss='weighted_cross_entropy', balance='', epochs=2, batch_size=7)

@pytest.fixture(scope='module')
def plain(cohort, tmp_path_factory):
    "The same for a network and settings with which the number of processes makes no difference but rounding"
    return trained(cohort, tmp_path_factory.mktemp('plain')/'training', **equal)

def hashes(result): return {p.name: file_hash(p) for p in sorted(result.bundle_path.iterdir())}

def members(pid):
    "The members that a process has started, by rank"
    found = {}
    for child in psutil.Process(pid).children(recursive=True):
        try: words, environment = child.cmdline(), child.environ()
        except psutil.Error: continue
        if any('run_member' in word for word in words): found[int(environment['LOCAL_RANK'])] = child
    return found

@pytest.mark.slow
@pytest.mark.parametrize('rank', [0, 1])
def test_a_killed_member_ends_the_training_with_a_sentence_and_it_resumes_to_the_same_bytes(cohort, whole, tmp_path, rank):
    started = []
    def kill(history):
        started.extend(members(os.getpid()).values())
        members(os.getpid())[rank].kill()
    with pytest.raises(TrainingError, match=rf'^Process {rank + 1} of 2 was killed \(SIGKILL\).*; the others were stopped. The last checkpoint is intact'):
        trained(cohort, tmp_path/'training', kill)
    assert len(started) == 2 and not any(child.is_running() for child in started)
    assert list(Path(tempfile.gettempdir()).glob(f'strip-workers-{os.getpid()}-*/store')) == []
    again = trained(cohort, tmp_path/'training')
    assert hashes(again) == hashes(whole)
    assert again.history.equals(whole.history) and again.predictions.equals(whole.predictions)

def test_the_scores_are_those_of_all_validation_images(plain):
    "The history's scores, from predictions that two processes shared, and those of the bundle's predictions in one process"
    from strip_notebooks.bundle import load_bundle
    from strip_notebooks.predictions import aggregate_patients
    from strip_notebooks.training.classifier import patient_scores
    spec = load_bundle(plain.bundle_path).spec
    patients = aggregate_patients(plain.predictions[plain.predictions.split == 'val'])
    scores = patient_scores(patients, spec['classes'], spec['prior'])
    best = plain.history.set_index('epoch').loc[spec['trained_on']['epoch']]
    assert scores['auc'] == best.auc and scores['weighted_log_loss'] == pytest.approx(best.weighted_log_loss, abs=1e-6)

@pytest.mark.parametrize('devices', [1, 3])
def test_another_number_of_processes_is_refused(cohort, plain, devices):
    before = hashes(plain)
    with pytest.raises(TrainingError, match=f'was begun with 2 processes and cannot be resumed with {devices}'):
        trained(cohort, plain.bundle_path.parent, **{**equal, 'devices': devices})
    assert hashes(plain) == before

def test_a_batch_that_is_too_small_is_refused_before_anything_starts(cohort, tmp_path):
    from strip_notebooks.core import StripError
    with pytest.raises(StripError, match='A training batch has 1 image and 3 processes share it'):
        trained(cohort, tmp_path/'training', batch_size=2, devices=3)
    assert not (tmp_path/'training').exists()

def test_more_gpus_than_there_are_is_refused_before_anything_starts(cohort, tmp_path, monkeypatch):
    import torch
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 1)
    with pytest.raises(TrainingError, match='devices=4 is too many: this machine has 1 GPU.'):
        trained(cohort, tmp_path/'training', devices=4, device='cuda')
    assert not (tmp_path/'training').exists()

def test_two_processes_take_the_steps_of_one(cohort, plain, tmp_path):
    """Without what depends on the process (batch norm, dropout, mixing), two processes take the steps that one takes, up to rounding:
    also with a weighted loss, whose parts weigh differently, with parts of different size, and with several batches per step."""
    one, two = trained(cohort, tmp_path/'1', devices=1, **equal).history, plain.history
    for name in ('train_loss', 'weighted_log_loss'): assert two[name].tolist() == pytest.approx(one[name].tolist(), rel=1e-4)
    assert one.train_loss.iloc[0] != pytest.approx(one.train_loss.iloc[1], rel=1e-3)

@pytest.mark.slow
def test_an_error_of_a_member_is_the_error_of_the_training(cohort, tmp_path):
    with pytest.raises(TrainingError, match=r'^The loss is no longer a number'):
        trained(cohort, tmp_path/'training', lr=1e30, optimizer='sgd', clip=0., schedule='constant')

@pytest.mark.slow
def test_three_processes_resume_to_the_same_bytes(cohort, tmp_path):
    "With three processes the order of a sum can differ, so that a resumed training has other bits if gradients are packed in another way"
    class Enough(Exception): pass
    def stop(history): raise Enough
    more = dict(devices=3, arch='resnet18', epochs=2)
    whole = trained(cohort, tmp_path/'whole', **more)
    with pytest.raises(Enough): trained(cohort, tmp_path/'training', stop, **more)
    assert hashes(trained(cohort, tmp_path/'training', **more)) == hashes(whole)

SCRIPT = '''import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from test_training_processes import trained
trained(Path(sys.argv[1]), sys.argv[2], lambda history: print('epoch', flush=True), epochs=50)
'''

@pytest.mark.slow
def test_members_end_with_a_killed_script(cohort, tmp_path):
    "A plain script, without a guard around its start; the parent is killed, so it cannot end its members"
    (tmp_path/'script.py').write_text(SCRIPT.format(tests=str(Path(__file__).parent)))
    process = subprocess.Popen([sys.executable, tmp_path/'script.py', cohort, tmp_path/'training'], stdout=subprocess.PIPE, text=True,
                               env={**os.environ, 'STRIP_PROGRESS': 'none', 'OMP_NUM_THREADS': '1'})
    assert process.stdout.readline() == 'epoch\n'
    started = list(members(process.pid).values())
    process.kill()
    process.wait()
    gone, alive = psutil.wait_procs(started, timeout=10)
    assert len(started) == 2 and not alive

# Two machines, both played by this one

HELPER = """from strip_notebooks.training.machines import which_machine
from strip_notebooks.training.processes import join_together
join_together(which_machine(2))"""

def first_machine():
    "The environment of the first machine, with a port that is free"
    with socket.create_server(('127.0.0.1', 0)) as server: return dict(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(server.getsockname()[1]), NODE_RANK='0')

@contextlib.contextmanager
def second_machine(monkeypatch):
    "In the block, this process is the first machine and the given one the second"
    for name, value in first_machine().items(): monkeypatch.setenv(name, value)
    process = subprocess.Popen([sys.executable, '-c', HELPER], env={**os.environ, 'NODE_RANK': '1'}, stderr=subprocess.PIPE, text=True)
    try: yield process
    finally:
        process.kill()
        process.communicate()

def ended(process, seconds=10):
    "Whether a process ends in time, also one that its parent does not wait for"
    until = time.monotonic() + seconds
    with contextlib.suppress(psutil.NoSuchProcess):
        while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
            if time.monotonic() > until: return False
            time.sleep(.05)
    return True

def weights(result): return hashes(result)['weights.safetensors']

def same(one, other): return weights(one) == weights(other) and one.history.equals(other.history) and one.predictions.equals(other.predictions)

def test_two_machines_train_the_model_of_two_processes(cohort, plain, tmp_path, monkeypatch):
    with second_machine(monkeypatch) as other:
        result = trained(cohort, tmp_path/'training', devices=1, nodes=2, **equal)
        assert other.wait(60) == 0
    assert same(result, plain)
    assert sorted(p.name for p in (tmp_path/'training'/'checkpoints').iterdir()) == ['epoch-000001.safetensors', 'epoch-000002.safetensors', 'tensorboard']
    assert same(trained(cohort, tmp_path/'training', devices=2, **equal), plain)        # the same training, elsewhere
    with pytest.raises(TrainingError, match='was begun with 2 processes and cannot be resumed with 4'): trained(cohort, tmp_path/'training', devices=2, nodes=2, **equal)

@pytest.mark.slow
def test_two_machines_of_two_processes_train_the_model_of_four(cohort, tmp_path, monkeypatch):
    whole = trained(cohort, tmp_path/'whole', devices=4)
    with second_machine(monkeypatch): result = trained(cohort, tmp_path/'training', devices=2, nodes=2)
    assert same(result, whole)

@pytest.mark.slow
@pytest.mark.parametrize('number, says', [(signal.SIGKILL, 'has ended or cannot be reached any more'), (signal.SIGSTOP, 'has been silent for 30 s')])
def test_a_lost_machine_ends_the_training_with_a_sentence_and_it_resumes_to_the_same_weights(cohort, whole, tmp_path, monkeypatch, number, says):
    lost, started = [], []
    def lose(history):
        if lost: return
        started.extend(c for c in psutil.Process().children(recursive=True) if any('run_member' in word for word in c.cmdline()))
        other.send_signal(number)
        lost.append(time.monotonic())
    with second_machine(monkeypatch) as other:
        with pytest.raises(TrainingError, match=rf'^Machine 2 of 2 \(NODE_RANK=1\) {says}; the training was stopped. The last checkpoint is intact'):
            trained(cohort, tmp_path/'training', lose, devices=1, nodes=2, epochs=3 if number == signal.SIGKILL else 500)
        assert time.monotonic() - lost[0] < 60
    assert len(started) == 2 and all(map(ended, started))
    if number == signal.SIGSTOP: return
    with second_machine(monkeypatch): assert same(trained(cohort, tmp_path/'training', devices=1, nodes=2), whole)

@pytest.mark.slow
def test_the_first_machine_is_killed(cohort, tmp_path, monkeypatch):
    (tmp_path/'script.py').write_text(SCRIPT.format(tests=str(Path(__file__).parent)).replace('epochs=50', 'epochs=50, devices=1, nodes=2'))
    with second_machine(monkeypatch) as other:
        first = subprocess.Popen([sys.executable, tmp_path/'script.py', cohort, tmp_path/'training'], stdout=subprocess.PIPE, text=True)
        while first.stdout.readline() != 'epoch\n': pass
        started = list(members(other.pid).values())
        first.kill()
        said = other.communicate(timeout=60)[1]
        first.communicate()
    assert len(started) == 1 and all(map(ended, started))
    assert 'TrainingError: Machine 1 of 2 (NODE_RANK=0) has ended or cannot be reached any more; the training was stopped.' in said

@pytest.mark.slow
def test_the_command_on_two_machines(tmp_path):
    "The same command on both: one run, on the first; without an address nothing starts; a killed second machine ends the first, and both resume"
    environment = {**os.environ, 'OMP_NUM_THREADS': '1'}
    def clot(*words, **more): return subprocess.Popen([CLOT, 'run', *words], cwd=tmp_path, env={**environment, **more}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    prepared = clot('prepare', '-p', 'patients=48', '-p', 'size=32', '-p', 'source_size=64')
    assert prepared.communicate(timeout=300)[0] and prepared.returncode == 0
    train = ['train', '-p', 'nodes=2', '-p', 'epochs=30', '-p', 'batch_size=8', '-p', 'device=cpu']
    alone = clot(*train)
    assert 'nodes=2 needs the address of the first machine: set MASTER_ADDR' in alone.communicate(timeout=60)[1] and alone.returncode == 2
    where = first_machine()
    first, second = (clot(*train, **{**where, 'NODE_RANK': rank}) for rank in '01')
    for line in first.stdout:
        if 'epoch 1 of' in line: break
    second.kill()
    said = first.communicate(timeout=60)[1]
    second.communicate()
    assert first.returncode == 2 and 'TrainingError: Machine 2 of 2 (NODE_RANK=1) has ended' in said and len(said.strip().splitlines()) == 1
    name = re.search(r'`clot run --resume (\S+)`', said)[1]
    first, second = (clot('--resume', name, **{**where, 'NODE_RANK': rank}) for rank in '01')
    said = [process.communicate(timeout=300) for process in (first, second)]
    assert (first.returncode, second.returncode) == (0, 0), said
    assert 'epoch 1 of' not in said[0][0] and 'epoch 30 of 30' in said[0][0]
    assert 'Machine 2 of 2 (NODE_RANK=1) lends its processes' in said[1][0] and 'The training has ended; its run is on the first machine.' in said[1][0]
    assert len(list((tmp_path/'runs').glob('*-train-*'))) == 1

@pytest.mark.slow
def test_the_command(tmp_path):
    "A run by two processes, of which one is killed: the run fails with a sentence and resumes; the model can be evaluated"
    with tempfile.TemporaryDirectory(prefix='f', dir='/tmp') as temporary:
        environment = {**os.environ, 'OMP_NUM_THREADS': '2', 'TMPDIR': temporary}
        def clot(*words): return subprocess.run([CLOT, 'run', *words], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
        assert clot('prepare', '-p', 'patients=48', '-p', 'size=32', '-p', 'source_size=64').returncode == 0
        train = ['train', '-p', 'devices=2', '-p', 'epochs=30', '-p', 'batch_size=8', '-p', 'device=cpu']
        process = subprocess.Popen([CLOT, 'run', *train], cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for line in process.stdout:
            if 'epoch 1 of' in line: break
        started = members(process.pid)
        started[1].kill()
        said = process.communicate(timeout=60)[1]
        assert process.returncode == 2 and 'TrainingError: Process 2 of 2 was killed (SIGKILL)' in said and len(said.strip().splitlines()) == 1
        name = re.search(r'`clot run --resume (\S+)`', said)[1]
        assert not any(m.is_running() for m in started.values())
        done = clot('--resume', name)
        assert done.returncode == 0, done.stdout + done.stderr
        assert 'epoch 1 of' not in done.stdout and 'epoch 30 of 30' in done.stdout
        assert clot('evaluate', '-p', 'resamples=200').returncode == 0
        assert sorted(p.name for p in Path(temporary).iterdir() if p.name.startswith(('clot-', 'strip-'))) == []
