"""Searches and batches under real faults: killed coordinators, killed workers, resumed, and wrong files.

The quick tests use two tiny trials and small notebooks; the slow ones search on a demo cohort, and on two Dask workers."""
import collections, os, shutil, signal, subprocess, sys, tempfile, time
from pathlib import Path

import nbformat, psutil, pytest

from strip_notebooks.cli import main
from strip_notebooks.runs import Run, list_runs
from strip_notebooks.search.space import read_plan
from strip_notebooks.search.trials import TrialResult, next_round, open_study, record_trial, trial_table
from strip_notebooks.searches import check_search

CLOT = str(Path(sys.executable).parent/'clot')
KERNEL = dict(kernelspec=dict(name='python3', display_name='python3', language='python'))

class Place:
    "A workspace with a temporary folder of its own, whose name is short enough for sockets"
    def __init__(self, folder):
        self.folder, self.temporary = folder, folder/'t'
        self.temporary.mkdir()
        self.environment = {**os.environ, 'OMP_NUM_THREADS': '1', 'TMPDIR': str(self.temporary)}

    def start(self, *words):
        return subprocess.Popen([CLOT, *map(str, words)], cwd=self.folder, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                text=True, start_new_session=True)

    def clot(self, *words):
        "The code of a command, and what it said"
        process = self.start(*words)
        said = process.communicate(timeout=900)[0]
        return process.returncode, said

    def runs(self, step): return [Run(p) for p in sorted((self.folder/'runs').glob(f'*-{step}-*'))] if (self.folder/'runs').exists() else []
    def write(self, name, text): (self.folder/name).write_text(text)

    def kill_when(self, condition, *words):
        "Start a command, kill it as the system would when the condition holds; its children must end, too"
        process = self.start(*words)
        until = time.monotonic() + 600
        while process.poll() is None and not condition() and time.monotonic() < until: time.sleep(.05)
        alive = process.poll() is None
        children = psutil.Process(process.pid).children(recursive=True) if alive else []
        process.kill()
        process.communicate()
        left = psutil.wait_procs(children, timeout=60)[1]
        assert not left, f'{left} outlived clot'
        return alive

@pytest.fixture(scope='module')
def prepared():
    with tempfile.TemporaryDirectory(prefix='s', dir='/tmp') as folder:
        place = Place(Path(folder))
        code, said = place.clot('run', 'prepare', '-p', 'preset=easy', '-p', 'patients=40', '-p', 'size=32', '-p', 'source_size=64')
        assert code == 0, said
        yield place

@pytest.fixture
def place():
    with tempfile.TemporaryDirectory(prefix='s', dir='/tmp') as folder: yield Place(Path(folder))

def finished(place, step): return sum(run.state == 'finished' for run in place.runs(step))

def checked_search(place, search, total):
    "The table of a finished search, none of whose trials is lost or double"
    table = search.table('trials')
    assert search.state == 'finished' and table.trial.tolist() == list(range(total)) and table.state.isin(['finished', 'pruned']).all(), table
    parts = collections.Counter(run.status.part_of for run in place.runs('search_trial') if run.status.part_of.startswith(search.name))
    assert parts == {f'{search.name}/main/{k}': 1 for k in range(total)}, parts
    assert {run.state for run in place.runs('search_trial')} == {'finished'}
    return table

def undisturbed(table, file, size, folder):
    "The parameters that a search draws which nothing disturbs, if its trials have these scores"
    plan = read_plan(file, trials=len(table))
    space = check_search(plan)[0]
    study = open_study(folder/'undisturbed.log', plan)
    while trials := next_round(study, plan, space, size):
        for t in trials:
            row = table.iloc[t.number]
            record_trial(study, t.number, TrialResult(row.score, [row.score]*int(row.epochs), int(row.epochs)*(row.state == 'pruned'), row.run))
    return trial_table(study, space)[[d.name for d in space]]

SMALL = '''metric: validation_weighted_log_loss
trials: 2
fixed: {train.epochs: 1, train.policy: none}
search: {train.lr: {low: 1e-4, high: 1e-1, log: true}, train.dropout: {low: 0.0, high: 0.5}}
'''

def test_a_killed_search_continues_with_its_own_parameters(prepared):
    prepared.write('small.yaml', SMALL)
    words = ['search', 'small.yaml', '--workers', '2']
    assert prepared.kill_when(lambda: len(prepared.runs('search_trial')) == 2, *words)
    assert prepared.kill_when(lambda: finished(prepared, 'search_trial') >= 1, *words)
    code, said = prepared.clot(*words)
    assert code == 0, said
    search, = prepared.runs('search')
    table = checked_search(prepared, search, 2)
    assert search.status.attempts == 3
    expected = undisturbed(table, prepared.folder/'small.yaml', 2, prepared.folder)
    assert table[list(expected)].to_numpy().tolist() == expected.to_numpy().tolist()
    for run in prepared.runs('search_trial'):                               # the test patients took no part
        assert set(run.table('judges').split) == {'val'} and not list(run.path.glob('tables/predictions.csv'))
    assert 'best of 2 trials' in prepared.clot('runs')[1]
    code, said = prepared.clot(*words)
    assert code == 0 and 'had finished with 2 trials' in said and len(prepared.runs('search')) == 1

@pytest.mark.slow
def test_the_best_trial_is_done_again_if_its_run_was_removed(prepared):
    prepared.write('other.yaml', 'sampler: grid\ntrials: 2\nfixed: {train.epochs: 1, train.policy: none}\nsearch: {train.lr: [0.001, 0.0001, 1.0]}\n')
    code, said = prepared.clot('search', 'other.yaml')
    assert code == 0, said
    first = prepared.runs('search')[-1]
    table = first.table('trials')
    best = table.loc[table.score.idxmin()]                                  # the third, with lr=1, is worse
    shutil.rmtree(prepared.folder/'runs'/best.run)
    code, said = prepared.clot('search', 'other.yaml', '--trials', '3')
    assert code == 0 and f'the run of trial {best.trial}, the best, was removed' in said, said
    again = prepared.runs('search')[-1].table('trials')
    same = table.columns.difference(['run'])
    assert again[:2][same].equals(table[same]) and len(again) == 3 and again.state.eq('finished').all()
    assert all((prepared.folder/'runs'/run).is_dir() for run in again.run)

WRONG = {'search: {train.lr: [0.1]}\nmetric: test_auc': 'test patients', 'search: {train.lrr: [0.1]}': "did you mean 'lr'",
         'search: {train.lr: []}': 'is empty', 'search: {train.lr: {low: 0.2, high: 0.1}}': 'is empty', 'search: {train.lr: [-1]}': 'lr=-1.0',
         'search: {prepare.test_ratio: [0.1, 0.2]}': 'which patients', 'search: {train.lr: [0.1]}\ntrails: 3': "did you mean 'trials'",
         'search: {train.arch: [simple_cnn, resnet81]}': 'resnet81', '': 'search is empty'}

@pytest.mark.parametrize('text', WRONG, ids=lambda text: text[:40])
def test_a_wrong_search_ends_with_a_sentence_before_anything_runs(tmp_path, monkeypatch, capsys, text):
    monkeypatch.chdir(tmp_path)
    (tmp_path/'search.yaml').write_text(text)
    with pytest.raises(SystemExit) as ended: main(['search', 'search.yaml'])
    said = capsys.readouterr().err
    assert ended.value.code == 2 and WRONG[text] in said and len(said.strip().splitlines()) == 1 and not (tmp_path/'runs').exists()

@pytest.mark.parametrize('words, sentence', [(['search'], '--example'), (['search', 'none.yaml'], 'is not a file'), (['batch', 'none.yaml'], 'is not a file'),
                                             (['batch', 'b.yaml', '--engine', 'dusk'], "did you mean 'dask'"), (['batch', 'b.yaml', '--engine', 'dask'], 'needs --address'),
                                             (['batch', 'b.yaml', '--workers', '0'], 'give 1 or more')])
def test_wrong_words(tmp_path, monkeypatch, capsys, words, sentence):
    monkeypatch.chdir(tmp_path)
    (tmp_path/'b.yaml').write_text('jobs: [{notebook: train}]')
    with pytest.raises(SystemExit) as ended: main(words)
    assert ended.value.code == 2 and sentence in capsys.readouterr().err and not (tmp_path/'runs').exists()

# --- batches

JOB = '''import os, pathlib, time
print('begins', os.getpid())
while n >= wait and not pathlib.Path(folder, 'gate').exists(): time.sleep(.05)
with open(pathlib.Path(folder, f'done{n}'), 'a') as f: f.write('.')'''

def batch(place, count, wait):
    "A batch of small notebooks, of which those from the number `wait` wait at a gate"
    source = f"n: int = 0\nwait: int = {wait}\nfolder: str = '{place.folder}'\nout: str = ''"
    cells = [nbformat.v4.new_code_cell(source, metadata=dict(tags=['parameters'])), nbformat.v4.new_code_cell(JOB)]
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=KERNEL), place.folder/'job.ipynb')
    place.write('batch.yaml', f'jobs: [{{notebook: job.ipynb, product: {{n: {list(range(count))}}}}}]')

def test_a_killed_batch_does_what_is_left(place):
    batch(place, 4, wait=2)
    assert place.kill_when(lambda: finished(place, 'job') == 2 and len(place.runs('job')) == 4, 'batch', 'batch.yaml', '--workers', '2')
    place.write('gate', '')
    code, said = place.clot('batch', 'batch.yaml', '--workers', '2')
    assert code == 0 and '2 jobs of 4 had finished' in said, said
    assert [(place.folder/f'done{n}').read_text() for n in range(4)] == ['.']*4
    assert [run.status.attempts for run in place.runs('job')] == [1, 1, 2, 2] and len(place.runs('batch')) == 1

def test_a_batch_with_failures_lists_them_and_ends_with_a_code(place):
    batch(place, 2, wait=9)
    place.write('batch.yaml', (place.folder/'batch.yaml').read_text().replace('job.ipynb,', "job.ipynb, parameters: {folder: missing},"))
    code, said = place.clot('batch', 'batch.yaml')
    assert code == 2 and '2 of 2 jobs failed' in said and 'FileNotFoundError' in said, said
    assert place.runs('batch')[0].state == 'failed' and 'Traceback' not in said
    (place.folder/'missing').mkdir()
    assert place.clot('batch', 'batch.yaml')[0] == 0 and place.runs('batch')[0].state == 'finished'

def test_ctrl_c_stops_a_batch_and_its_jobs(place):
    batch(place, 2, wait=0)
    process = place.start('batch', 'batch.yaml', '--workers', '2')
    while sum('begins' in (run.path/'log.txt').read_text() for run in place.runs('job') if (run.path/'log.txt').exists()) < 2: time.sleep(.05)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=300)[0]
    assert process.returncode == 130 and said.endswith(f"clot: {place.runs('batch')[0].name} was stopped; the same command continues it.\n"), said
    assert not psutil.wait_procs(children, timeout=60)[1]
    assert {run.state for run in [*place.runs('job'), *place.runs('batch')]} == {'interrupted'}

# --- more than one machine

def distributed(): return pytest.importorskip('distributed')

@pytest.fixture
def cluster(place, monkeypatch):
    "A Dask cluster of two worker processes on this machine"
    for name, value in place.environment.items(): monkeypatch.setenv(name, value)
    with distributed().LocalCluster(n_workers=2, threads_per_worker=1, host='127.0.0.1', dashboard_address='127.0.0.1:0') as found: yield found

def kill_worker(cluster):
    "Kill one worker process as the system would; what it started must end, too"
    with distributed().Client(cluster.scheduler_address) as client: pid = sorted(client.run(os.getpid).values())[0]
    started = psutil.Process(pid).children(recursive=True)
    os.kill(pid, signal.SIGKILL)
    assert started and not psutil.wait_procs(started, timeout=60)[1]

def test_a_batch_on_two_workers_of_which_one_is_killed(place, cluster):
    batch(place, 4, wait=0)
    process = place.start('batch', 'batch.yaml', '--engine', 'dask', '--address', cluster.scheduler_address)
    while sum('begins' in (run.path/'log.txt').read_text() for run in place.runs('job') if (run.path/'log.txt').exists()) < 2: time.sleep(.05)
    kill_worker(cluster)
    place.write('gate', '')
    said = process.communicate(timeout=300)[0]
    assert process.returncode == 0, said
    assert [(place.folder/f'done{n}').read_text() for n in range(4)] == ['.']*4      # none lost, none double
    assert len(place.runs('job')) == 4 and max(run.status.attempts for run in place.runs('job')) == 2

def test_a_cluster_without_workers_says_that_it_waits(place, monkeypatch):
    batch(place, 1, wait=9)
    for name, value in place.environment.items(): monkeypatch.setenv(name, value)
    with distributed().LocalCluster(n_workers=0, threads_per_worker=1, host='127.0.0.1', dashboard_address='127.0.0.1:0') as cluster:
        process = place.start('batch', 'batch.yaml', '--engine', 'dask', '--address', cluster.scheduler_address)
        lines = iter(process.stdout.readline, '')
        waits = f'No Dask worker is connected, so the work waits for one; start it with `dask worker {cluster.scheduler_address}`, or see `squeue` with Slurm.\n'
        assert waits in lines           # reads up to this line
        cluster.scale(1)
        assert process.wait(timeout=300) == 0 and 'finished' in ''.join(lines)

CLUSTER = '''from distributed import LocalCluster
if __name__ == '__main__':
    with LocalCluster(n_workers=1, threads_per_worker=1, host='127.0.0.1', dashboard_address='127.0.0.1:0') as found:
        print(found.scheduler_address, flush=True)
        input()
'''

@pytest.mark.slow
def test_a_search_whose_scheduler_is_killed_loses_no_trial(prepared):
    distributed()
    prepared.write('cluster.py', CLUSTER)
    prepared.write('third.yaml', SMALL + 'seed: 9\n')
    scheduler = subprocess.Popen([sys.executable, 'cluster.py'], cwd=prepared.folder, env=prepared.environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    address, before = scheduler.stdout.readline().strip(), len(prepared.runs('search_trial'))
    process = prepared.start('search', 'third.yaml', '--engine', 'dask', '--address', address)
    while len(prepared.runs('search_trial')) == before and process.poll() is None: time.sleep(.05)
    scheduler.kill()
    said = process.communicate(timeout=300)[0]
    scheduler.communicate()
    assert process.returncode == 2 and said.splitlines()[-1] == (
        'clot: The Dask scheduler was lost before all work was done. Start it and its workers again; the same command continues what is left.'), said
    code, said = prepared.clot('search', 'third.yaml')
    assert code == 0, said
    checked_search(prepared, prepared.runs('search')[-1], 2)

DEMO = '''metric: validation_auc
startup: 4
trials: 12
fixed: {train.epochs: 2, train.policy: none}
search:
  train.lr: {low: 1e-4, high: 1e-1, log: true}
  train.dropout: {low: 0.0, high: 0.5}
  train.batch_size: [16, 32]
'''

def demo(place):
    code, said = place.clot('run', 'prepare', '-p', 'preset=easy', '-p', 'patients=120', '-p', 'size=48', '-p', 'source_size=64')
    assert code == 0, said
    place.write('search.yaml', DEMO)

@pytest.mark.slow
def test_twelve_trials_on_the_demo_cohort_are_killed_twice(place):
    demo(place)
    words = ['search', 'search.yaml', '--workers', '2']
    assert place.kill_when(lambda: finished(place, 'search_trial') >= 3, *words)
    assert place.kill_when(lambda: finished(place, 'search_trial') >= 8, *words)
    code, said = place.clot(*words)
    assert code == 0, said
    table = checked_search(place, place.runs('search')[0], 12)
    with tempfile.TemporaryDirectory(prefix='s', dir='/tmp') as folder:
        other = Place(Path(folder))
        demo(other)
        code, said = other.clot(*words)
        assert code == 0, said
        whole = checked_search(other, other.runs('search')[0], 12)
    assert table.drop(columns='run').equals(whole.drop(columns='run'))

@pytest.mark.slow
def test_a_search_on_two_workers_of_which_one_is_killed(place, cluster):
    demo(place)
    process = place.start('search', 'search.yaml', '--workers', '2', '--trials', '6', '--engine', 'dask', '--address', cluster.scheduler_address)
    while finished(place, 'search_trial') < 2 and process.poll() is None: time.sleep(.1)
    while len(place.runs('search_trial')) < 4 and process.poll() is None: time.sleep(.1)
    kill_worker(cluster)
    said = process.communicate(timeout=900)[0]
    assert process.returncode == 0, said
    checked_search(place, place.runs('search')[0], 6)
