"""A training that is killed again and again, at random moments and at the worst ones, ends in the same weights,
also where a resume is given another number of threads than the run began with.

STRIP_KILLS=10 python -m pytest -n 0 tests/test_kills.py does it ten times over instead of once."""
import hashlib, os, random, signal, subprocess, sys, tempfile, time
from pathlib import Path

import psutil
import pytest

from strip_notebooks.runs import Run, list_runs

CLOT = str(Path(sys.executable).parent/'clot')
ROUNDS = int(os.environ.get('STRIP_KILLS', 1))
TRAIN = ['run', 'train', '-p', 'epochs=4', '-p', 'batch_size=8', '-p', 'arch=simple_cnn', '-p', 'dropout=0.1', '-p', 'ema=0.9']

def environment(words):
    "One thread for a new run, two for a resumed one, which must keep to its own number"
    return {**os.environ, 'OMP_NUM_THREADS': '2' if '--resume' in words else '1'}

def clot(*words, cwd):
    done = subprocess.run([CLOT, *words], cwd=cwd, capture_output=True, text=True, timeout=600, env=environment(words))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout

def newest(cwd): return max((cwd/'runs').glob('*-train-*'), key=lambda p: p.stat().st_mtime)

def weights(run): return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(run.bundle.iterdir())}

@pytest.fixture(scope='module', autouse=True)
def temporary():
    "A temporary folder of these tests alone, with a name short enough for sockets"
    with tempfile.TemporaryDirectory(prefix='k', dir='/tmp') as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv('TMPDIR', folder)
        yield Path(folder)

def leftovers(folder):
    "Sockets, connection files and folders of kernels and workers in the temporary folder"
    return sorted(p.name for p in folder.iterdir() if p.name.startswith(('clot-', 'strip-', 'pymp-')))

def half_written(run):
    "Temporary files of a run; the lock that guards its status stays"
    return [p.name for p in run.path.rglob('.*') if p.name != '.lock']

def killed(words, cwd, when, rng):
    "Start `clot` and kill it, or it and its kernel, at a moment; whether it was still at work"
    process = subprocess.Popen([CLOT, *words], cwd=cwd, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                               start_new_session=True, env=environment(words))
    until = time.monotonic() + (when if isinstance(when, float) else 300)
    while process.poll() is None and time.monotonic() < until and not (callable(when) and when()): time.sleep(.001)
    alive = process.poll() is None
    children = psutil.Process(process.pid).children(recursive=True) if alive else []
    if alive and rng.random() < .5: os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.wait()
    _, left = psutil.wait_procs(children, timeout=5)
    assert not left, 'a kernel outlived clot'
    return alive

def moments(run_folder, rng):
    "Random moments, and the moments at which the files that matter appear"
    def there(pattern): return lambda: (folder := run_folder()) is not None and any(folder.rglob(pattern))
    chosen = [rng.uniform(1, 14), there('*.safetensors'), there('bundle.json'), rng.uniform(1, 14), there('predictions.csv'), there('history.csv'), there('record*.json'), there('metrics.json')]
    rng.shuffle(chosen)
    return chosen

@pytest.fixture(scope='module')
def prepared(tmp_path_factory, temporary):
    folder = tmp_path_factory.mktemp('kills')
    clot('run', 'prepare', '-p', 'patients=48', '-p', 'size=32', '-p', 'source_size=64', cwd=folder)
    clot(*TRAIN, cwd=folder)
    return folder, weights(Run(newest(folder)))

@pytest.mark.parametrize('seed', range(ROUNDS))
def test_killed_and_resumed_until_it_ends(prepared, temporary, seed):
    folder, expected = prepared
    rng, before = random.Random(seed), {p.name for p in (folder/'runs').iterdir()}
    def run_folder(): return next((p for p in (folder/'runs').iterdir() if p.name not in before and '-train-' in p.name), None)
    words, kills, interrupted = TRAIN, 0, 0
    for when in moments(run_folder, rng):
        if not killed(words, folder, when, rng): break
        kills += 1
        if (path := run_folder()) is None: continue                     # killed before there was a run
        if not (path/'status.json').exists(): before.add(path.name); continue
        states = list_runs(folder/'runs').set_index('run').state
        assert states[path.name] in ('interrupted', 'finished') and 'running' not in set(states)
        if states[path.name] == 'finished': break                           # killed after its last write
        interrupted += 1
        words = ['run', '--resume', path.name]
    if run_folder() is None or Run(run_folder()).state != 'finished': clot(*words, cwd=folder)
    run = Run(run_folder())
    assert kills and (run.status.attempts > 1) == (interrupted > 0) and run.environment['threads'] == 1
    assert run.state == 'finished' and weights(run) == expected
    clot('runs', cwd=folder)
    assert leftovers(temporary) == []
    assert half_written(run) == []
