"Runs under real faults: kills, signals, dead kernels, full tables of files, two resumes at once, every step resumed"
import json, os, signal, subprocess, sys, tempfile, time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path

import nbformat, psutil, pytest

from conftest import CLASSES
from strip_notebooks.core import StripError, read_json, write_json
from strip_notebooks.runs import Owner, Run, RunError, list_runs, new_run

CLOT = str(Path(sys.executable).parent/'clot')

# --- a workspace with a tiny notebook

WAIT = '''import os, pathlib
if out: pathlib.Path(out, '.0123abcd-half.pt').touch()
print('ready', os.getpid(), flush=True)
text = open(gate).read()
print('read', text)'''

KERNEL = dict(kernelspec=dict(name='python3', display_name='python3', language='python'))

def hear_signals():
    "In a new process: hear the signals that the tests may have been started without, as by `nohup` or in the background"
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP): signal.signal(number, signal.SIG_DFL)

class Workspace:
    "A folder with notebooks, a gate that they wait at, and a temporary folder of its own, whose name is short enough for sockets"
    def __init__(self, folder):
        self.folder, self.temporary, self.gate = folder, folder/'t', folder/'gate'
        self.temporary.mkdir()
        os.mkfifo(self.gate)

    def notebook(self, body, name='wait'):
        cells = [nbformat.v4.new_code_cell(f"gate: str = '{self.gate}'\nout: str = ''", metadata=dict(tags=['parameters'])), nbformat.v4.new_code_cell(body)]
        nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=KERNEL), self.folder/f'{name}.ipynb')
        return f'{name}.ipynb'

    def start(self, *words, before='', **environment):
        "A process of `clot run WORDS`"
        environment = {**os.environ, 'OMP_NUM_THREADS': '1', 'TMPDIR': str(self.temporary), **environment}
        command = [CLOT, 'run', *map(str, words)]
        if before: command = ['bash', '-c', f'{before}; exec "$@"', 'bash', *command]
        return subprocess.Popen(command, cwd=self.folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                                preexec_fn=hear_signals)

    def run(self, *words, before='', **environment):
        "The exit code of `clot run WORDS`, and what it said"
        process = self.start(*words, before=before, **environment)
        out, err = process.communicate(timeout=120)
        return process.returncode, out, err

    def ready(self, *words):
        "A process of `clot run WORDS` whose notebook waits at the gate, and the kernel"
        process = self.start(*words)
        for line in process.stdout:
            if line.strip().startswith('ready'): return process, psutil.Process(int(line.split()[1]))
        raise AssertionError(process.stderr.read())

    def open_gate(self): self.gate.write_text('go')
    def only_run(self): return Run(*(self.folder/'runs').iterdir())
    def left(self): return sorted(p.name for p in self.temporary.iterdir())

@pytest.fixture
def place():
    with tempfile.TemporaryDirectory(prefix='w', dir='/tmp') as folder: yield Workspace(Path(folder))

def kill(process, kernel):
    "Kill `clot` as the system would; its kernel must end by itself within 5 seconds"
    process.kill()
    process.wait()
    gone, alive = psutil.wait_procs([kernel], timeout=5)
    assert not alive, 'the kernel outlives clot'

# --- kills

def test_a_killed_run_is_interrupted_and_resumed_any_number_of_times(place):
    words = [place.notebook(WAIT)]
    for attempt in (1, 2, 3):
        kill(*place.ready(*words))
        run = place.only_run()
        assert (run.state, run.status.attempts) == ('interrupted', attempt)
        words = ['--resume', run.name]
    assert len(place.left()) == 1 and (run.path/'.0123abcd-half.pt').exists()       # what a killed command leaves
    assert subprocess.run([CLOT, 'runs'], cwd=place.folder, env={**os.environ, 'TMPDIR': str(place.temporary)}, capture_output=True).returncode == 0
    assert place.left() == [] and not (run.path/'.0123abcd-half.pt').exists()       # the next command removes
    process, kernel = place.ready(*words)
    place.open_gate()
    assert process.wait(60) == 0 and run.state == 'finished'
    assert sorted(p.name for p in run.path.glob('notebook*')) == ['notebook-1.ipynb', 'notebook-2.ipynb', 'notebook-3.ipynb', 'notebook.ipynb']
    code, _, said = place.run(*words)
    assert code == 2 and 'has finished' in said

def test_several_resumes_at_once(place):
    kill(*place.ready(place.notebook(WAIT)))
    run = place.only_run()
    started = [place.start('--resume', run.name) for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        ended = as_completed([pool.submit(p.communicate, timeout=120) for p in started])
        refused = [next(ended).result()[1] for _ in range(3)]
        place.open_gate()                                                           # the one that works may go on
        next(ended)
    assert all('is running, in process' in said and 'Traceback' not in said for said in refused), refused
    assert sorted(p.returncode for p in started) == [0, 2, 2, 2] and run.status.attempts == 2 and run.state == 'finished'

RESUME = """import sys, time
from strip_notebooks.runs import Run, RunError
print('ready', flush=True)
start, won = float(sys.stdin.readline()), []
for at, folder in enumerate(sys.argv[1:]):
    while time.time() < start + .05*at: pass
    try: Run(folder).resume(); won.append(at)
    except RunError as e: assert 'is running' in str(e), e
print(won, flush=True)
sys.stdin.read()"""

def test_of_many_resumes_at_the_same_moment_one_works(tmp_path):
    "Four processes reach for 12 runs at the same clock, and each keeps what it has until all are done"
    runs = [new_run('train', {}, tmp_path) for _ in range(12)]
    for run in runs: run.finish('stopped', interrupted=True)
    command = [sys.executable, '-c', RESUME, *(str(run.path) for run in runs)]
    processes = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    for process in processes: assert process.stdout.readline() == 'ready\n'
    for process in processes: print(time.time() + 1, file=process.stdin, flush=True)
    won = [at for process in processes for at in json.loads(process.stdout.readline())]
    assert [process.communicate() and process.returncode for process in processes] == [0]*4
    assert sorted(won) == list(range(12)) and all(run.status.attempts == 2 for run in runs)

def test_a_recycled_process_id_is_another_process(tmp_path):
    run = new_run('train', {}, tmp_path)
    status = read_json(run.path/'status.json')
    write_json(run.path/'status.json', {**status, 'process_started': status['process_started'] - 600})
    assert run.state == 'interrupted' and list_runs(tmp_path).state.tolist() == ['interrupted']
    run.resume()
    assert run.state == 'running' and run.status.process_started == Owner.this().process_started

@pytest.mark.parametrize('changed', [dict(process=None), dict(process='7'), dict(links=['a']), dict(links=dict(prepare=5)), dict(state=[1])])
def test_a_status_with_a_wrong_type_is_a_corrupt_run(tmp_path, changed):
    run = new_run('train', {}, tmp_path)
    write_json(run.path/'status.json', {**read_json(run.path/'status.json'), **changed})
    with pytest.raises(RunError, match='not the status of a run'): run.links
    assert list_runs(tmp_path).state.tolist() == ['corrupt']

@pytest.mark.parametrize('name, text', [('status.json', '['*100_000), ('metrics.json', '['*100_000), ('metrics.json', '[1]')])
def test_files_that_are_nested_too_deep_or_no_dictionary_are_a_corrupt_run(tmp_path, name, text):
    run = new_run('train', {}, tmp_path)
    (run.path/name).write_text(text)
    assert list_runs(tmp_path).state.tolist() == ['corrupt']

# --- signals

STUBBORN = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n" + WAIT

@pytest.mark.parametrize('body, signals, code', [(WAIT, [signal.SIGTERM], 143), (WAIT, [signal.SIGHUP], 129), (WAIT, [signal.SIGINT], 130),
                                                 (WAIT, [signal.SIGINT]*2, 130), (STUBBORN, [signal.SIGINT]*2, 130), (STUBBORN, [signal.SIGTERM], 143)])
def test_a_signal_ends_with_a_sentence_and_without_a_kernel(place, body, signals, code):
    process, kernel = place.ready(place.notebook(body))
    for number in signals: process.send_signal(number)
    said = process.communicate(timeout=60)[1]
    assert not kernel.is_running() and process.returncode == code
    run = place.only_run()
    assert said.strip() == f'clot: {run.name} was stopped; `clot run --resume {run.name}` resumes it.'
    assert run.state == run.status.state == 'interrupted'
    assert place.left() == [] and not (run.path/'.0123abcd-half.pt').exists()
    nbformat.read(run.notebook, 4)

# --- kernels that die, and systems that refuse

MEMORY = '''import resource
used = int(open('/proc/self/statm').read().split()[0])*resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**27, used + 2**27))
bytearray(2**32)'''

@pytest.mark.parametrize('body, cause', [('import os; os.kill(os.getpid(), 9)', 'was killed (SIGKILL)'), ('import os; os.abort()', 'crashed (SIGABRT)'),
                                         ('import os; os._exit(3)', 'ended with the code 3'), (MEMORY, 'MemoryError'), ('1/0', 'ZeroDivisionError')])
def test_a_dead_kernel_is_a_sentence_and_a_failed_run(place, body, cause):
    code, _, said = place.run(place.notebook(body))
    run = place.only_run()
    assert code == 2 and cause in said and f'`clot run --resume {run.name}` resumes it.' in said
    assert len(said.strip().splitlines()) == 1 and 'Traceback' not in said
    assert run.state == 'failed' and cause in run.status.error and run.notebook.exists() and place.left() == []

def test_a_home_that_cannot_be_written(place):
    code, out, said = place.run(place.notebook("print('done')"), HOME='/dev/null', XDG_CONFIG_HOME='/dev/null', XDG_CACHE_HOME='/dev/null')
    assert (code, said) == (0, '') and place.only_run().state == 'finished' and place.left() == []

@pytest.mark.parametrize('handles', [24, 64])
def test_too_few_file_handles(place, handles):
    code, _, said = place.run(place.notebook("print('done')"), before=f'ulimit -n {handles}')
    run = place.only_run()
    assert code == 2 and len(said.strip().splitlines()) == 1, said
    assert f'only {handles} files can be open' in said and f'`clot run --resume {run.name}` resumes it.' in said
    assert run.state == 'failed' and place.left() == []
    assert place.run('--resume', run.name)[0] == 0

# --- notebooks of the user's own

def test_a_notebook_of_ones_own_is_resumed(place):
    name = place.notebook("print('value', float(open('value.txt').read()))", 'mine')
    assert place.run(name)[0] == 2
    run = place.only_run()
    (place.folder/'value.txt').write_text('7')
    (place.folder/name).unlink()                                                    # its copy in the run is there
    code, out, said = place.run('--resume', run.name)
    assert code == 0 and 'value 7.0' in out and run.state == 'finished', said

def test_the_number_of_threads_is_kept(place):
    name = place.notebook("import os; print('threads', os.environ['OMP_NUM_THREADS'])")
    process = place.start(name, OMP_NUM_THREADS='3')
    assert 'threads 3' in process.communicate()[0]
    run = place.only_run()
    assert run.environment['threads'] == 3
    assert 'threads 3' in place.run('--repeat', run.name, OMP_NUM_THREADS='1')[1]

# --- rules of a run

def test_a_finished_run_never_changes(tmp_path):
    run = new_run('train', {}, tmp_path)
    run.save_metrics(dict(auc=.5))
    run.finish()
    before = {p: p.read_bytes() for p in run.path.rglob('*') if p.is_file()}
    import pandas as pd
    changes = [lambda: run.save_metrics({}), lambda: run.save_table(pd.DataFrame(), 'a'), lambda: run.save_summary(''), lambda: run.log(''), lambda: run.finish(),
               lambda: run.finish('error'), run.resume, lambda: run.save_record(Owner())]
    for change in changes:
        with pytest.raises(RunError, match='has finished'): change()
    assert {p: p.read_bytes() for p in run.path.rglob('*') if p.is_file()} == before

def test_a_step_builds_on_finished_runs_only(tmp_path):
    from strip_notebooks.experiments import find_run
    run = new_run('train', {}, tmp_path)
    with pytest.raises(StripError, match='has not finished: it is running; wait'): find_run(run.path, 'train')
    run.finish('out of memory')
    with pytest.raises(StripError, match='has not finished: it is failed; resume it'): find_run(run.path, 'train')

def test_settings_are_those_of_the_notebooks():
    "Names, order, types, defaults and comments of each experiment's parameters cell"
    from strip_notebooks.experiments import experiment_parameters, experiment_paths
    from strip_notebooks.settings import setting_parameters, step_settings
    assert set(step_settings) == set(experiment_paths())
    for step, path in experiment_paths().items():
        told, cell = setting_parameters(step_settings[step]), experiment_parameters(path)
        assert {n: (p['type'], p['default'], p['help']) for n, p in told.items()} == {n: (p['type'], p['default'], p['help']) for n, p in cell.items()}, step

# --- the whole way: three classes, one with markup in its name; each step killed and resumed

STEPS = ['prepare', 'train', 'evaluate', 'explain', 'features', 'uncertainty', 'robustness', 'bias', 'report']

def latest(folder, step): return Run(sorted((folder/'runs').glob(f'*-{step}-*'))[0])

def test_three_classes_end_to_end(three):
    predictions = latest(three, 'train').predictions
    assert [c for c in predictions if c.startswith('p_')] == [f'p_{c}' for c in sorted(CLASSES)]
    assert {latest(three, step).state for step in STEPS} == {'finished'}

def test_markup_in_labels_is_escaped_everywhere(three):
    for run in (latest(three, step) for step in STEPS):
        for cell in nbformat.read(run.notebook, 4).cells:
            for output in cell.get('outputs', []):
                data = output.get('data', {})
                for kind in ('text/html', 'text/markdown'): assert '<b>other' not in data.get(kind, ''), f'{run.step}: {kind}'
    assert '<b>other' not in latest(three, 'report').report.read_text()

def artifacts(run):
    "The bytes of what a run leaves for others"
    folders = [run.path/'tables', run.path/'figures', run.bundle]
    files = [f for folder in folders for f in sorted(folder.glob('*'))] + sorted(run.path.glob('record.json'))
    return {f.relative_to(run.path).as_posix(): f.read_bytes() for f in files}

STUDIES = [pytest.param(step, marks=pytest.mark.slow) for step in ('explain', 'features', 'robustness', 'bias')]

@pytest.mark.parametrize('step', ['prepare', 'train', 'derive', 'evaluate', 'uncertainty', 'report', *STUDIES])
def test_each_step_is_killed_resumed_and_ends_the_same(three, step):
    if step == 'derive':
        made = [CLOT, 'run', 'derive', '-p', f"train_run={latest(three, 'train').path}", '-p', 'temperature=2']
        assert subprocess.run(made, cwd=three, capture_output=True, env={**os.environ, 'OMP_NUM_THREADS': '1'}).returncode == 0
    first = latest(three, step)
    given = [f'-p{name}={",".join(map(str, value)) if isinstance(value, list) else value}' for name, value in first.parameters.items()]
    process = subprocess.Popen([CLOT, 'run', step, *given], cwd=three, stdout=subprocess.PIPE, text=True, env={**os.environ, 'OMP_NUM_THREADS': '1'})
    process.stdout.readline()
    process.kill()
    process.wait()
    run = Run(sorted((three/'runs').glob(f'*-{step}-*'))[-1])
    assert run.state == 'interrupted' and run.name != first.name
    done = subprocess.run([CLOT, 'run', '--resume', run.name], cwd=three, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    left, expected = artifacts(run), artifacts(first)
    assert sorted(left) == sorted(expected) and [name for name in left if left[name] != expected[name]] == []


def test_a_run_that_is_killed_while_it_is_made_leaves_nothing(tmp_path):
    "A process that makes runs is killed at many moments: each folder that is left is a whole run, or is removed by the next command"
    from strip_notebooks.experiments import remove_leftovers
    code = 'import sys\nfrom strip_notebooks.runs import new_run\nprint("ready", flush=True)\nwhile True: new_run("train", dict(seed=1), sys.argv[1])'
    hidden = 0
    for k in range(6):
        process = subprocess.Popen([sys.executable, '-c', code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        process.stdout.readline()
        time.sleep(.15 + .11*k)
        process.kill()
        process.wait()
        hidden += sum(p.name.startswith('.') for p in tmp_path.iterdir())
        remove_leftovers(tmp_path)
        assert not [p.name for p in tmp_path.iterdir() if p.name.startswith('.')]
    assert hidden > 0                                                               # at least one was hit in the middle
    for path in tmp_path.iterdir(): assert Run(path).parameters == dict(seed=1) and Run(path).environment['seed'] == 1
