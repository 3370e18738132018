"The command line as a user has it: whole runs in processes of their own, wrong parameters, failures, a killed training"
import fcntl, json, os, re, shutil, signal, subprocess, sys, time
from pathlib import Path

import pytest

from strip_notebooks.runs import Run, list_runs
from strip_notebooks.predictions import load_predictions

CLOT = [str(Path(sys.executable).parent/'clot')]
SMALL = ['--patients', '60', '--size', '48', '--epochs', '2']

def clot(*words, cwd, **kwargs):
    "A finished `clot` process"
    return subprocess.run([*CLOT, *map(str, words)], cwd=cwd, capture_output=True, text=True, timeout=300, env={**os.environ, 'OMP_NUM_THREADS': '1'}, **kwargs)

@pytest.fixture(scope='session')
def demo(tmp_path_factory, worker_id):
    "A workspace in which a small demo was run, and what it printed; run once for all workers"
    base = tmp_path_factory.getbasetemp()
    folder = (base if worker_id == 'master' else base.parent)/'work space'
    folder.mkdir(exist_ok=True)
    with open(folder/'lock', 'w') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder/'said.txt').exists():
            done = clot('demo', *SMALL, cwd=folder)
            assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
            (folder/'said.txt').write_text(done.stdout)
    return folder, (folder/'said.txt').read_text()

def test_demo_ends_with_a_table_and_a_report(demo):
    folder, said = demo
    assert re.search(r'ROC AUC +[01]\.\d\d \([01]\.\d\d to [01]\.\d\d\)', said)
    assert 'Next: open the report' in said and said.count('patient AUC for LAA is') == 1
    report = folder/said.strip().splitlines()[-1].removeprefix('report: ')
    page = report.read_text()
    assert 'patient AUC for LAA' in page and page.count('src="data:image/png') >= 11
    assert 'src="http' not in page and 'href="http' not in page             # nothing is fetched
    runs = list_runs(folder/'runs')
    assert runs['name'].tolist() == ['prepare', 'train', 'evaluate', 'report'] and set(runs.state) == {'finished'}

def test_runs_keep_what_explains_them(demo):
    folder, _ = demo
    for path in (folder/'runs').iterdir():
        for name in ('notebook.ipynb', 'parameters.json', 'environment.json', 'status.json', 'metrics.json', 'log.txt'): assert (path/name).is_file(), f'{path.name} has no {name}'
        environment = json.loads((path/'environment.json').read_text())
        assert environment['packages']['torch'] and environment['commit'] and environment['python']

def test_training_and_test_patients_are_disjoint(demo):
    folder, _ = demo
    train = next(Run(p) for p in (folder/'runs').glob('*-train-*'))
    predictions = load_predictions(train.path/'tables'/'predictions.csv')
    patients = {s: set(predictions.patient_id[predictions.split == s]) for s in ('train', 'val', 'test')}
    assert not patients['train'] & patients['test'] and not patients['train'] & patients['val'] and all(patients.values())

def test_runs_command_lists_and_compares(demo):
    folder, _ = demo
    assert clot('runs', cwd=folder).stdout.count('finished') == 4
    train = next((folder/'runs').glob('*-train-*')).name
    reader = subprocess.run(f'"{CLOT[0]}" runs | true', shell=True, cwd=folder, capture_output=True, text=True)      # one that hears nothing
    assert reader.stderr == ''
    assert re.search(rf'^{train} +finished +validation AUC [01]\.\d\d$', clot('runs', cwd=folder).stdout, flags=re.MULTILINE)
    said = clot('runs', train, train, cwd=folder)
    assert 'not distinguishable' in said.stdout, said.stderr

@pytest.mark.parametrize('words, sentence', [
    (['run', 'trian'], "did you mean 'train'?"),
    (['run', 'train', '-p', 'epoch=3'], "did you mean 'epochs'?"),
    (['run', 'train', '-p', 'epochs=many'], "epochs='many' is not an int"),
    (['run', 'train', '-p', 'epochs'], 'name=value'),
    (['run', 'train', '-f', 'none.yaml'], 'none.yaml does not exist'),
    (['demo', '--data', 'nowhere'], 'nowhere does not exist'),
    (['demo', '--runs', '/dev/null'], '/dev/null'),
    (['run', '--resume', 'nothing'], 'not a run')])
def test_wrong_words_are_refused_before_anything_runs(tmp_path, words, sentence):
    done = clot(*words, cwd=tmp_path)
    assert done.returncode == 2 and sentence in done.stderr and 'Traceback' not in done.stderr
    assert not (tmp_path/'runs').exists()

def test_a_failed_run_keeps_its_notebook_and_says_why(tmp_path):
    done = clot('run', 'prepare', '-p', 'data=nowhere.csv', cwd=tmp_path)
    assert done.returncode == 2 and 'nowhere.csv does not exist' in done.stderr and 'Traceback' not in done.stderr
    run = Run(next((tmp_path/'runs').iterdir()))
    assert run.state == 'failed' and 'nowhere.csv' in run.status['error'] and (run.path/'log.txt').exists() is not None
    cells = json.loads((run.path/'notebook.ipynb').read_text())['cells']
    assert any(o['output_type'] == 'error' for c in cells for o in c.get('outputs', []))
    assert 'failed' in clot('runs', cwd=tmp_path).stdout

def until(line, *words, cwd, stop):
    "The process of `clot WORDS`, stopped by a signal to its group as soon as it prints `line`; its exit code and what it said to standard error"
    process = subprocess.Popen([*CLOT, *words], cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, env={**os.environ, 'OMP_NUM_THREADS': '1'})
    for printed in process.stdout:
        if printed.strip().startswith(line): break
    os.killpg(process.pid, stop)
    return process.wait(), process.stderr.read()

def test_a_killed_and_then_interrupted_training_is_resumed_in_its_folder(demo):
    folder, _ = demo
    prepared = next((folder/'runs').glob('*-prepare-*'))
    until('epoch 2', 'run', 'train', '--runs', 'killed', '-p', f'prepare_run={prepared}', '-p', 'epochs=40', '-p', 'batch_size=16', cwd=folder, stop=signal.SIGKILL)
    (run,) = (folder/'killed').iterdir()
    time.sleep(1)
    assert list_runs(folder/'killed').state.tolist() == ['interrupted']
    resume = 'run', '--resume', run.name, '--runs', 'killed'
    code, said = until('epoch', *resume, cwd=folder, stop=signal.SIGINT)         # Ctrl-C
    assert code == 130 and f'clot run --resume {run.name}' in said and 'Traceback' not in said, said
    assert Run(run).state == 'failed' and Run(run).status['error'] == 'interrupted'
    done = clot(*resume, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert 'epoch 1 of' not in done.stdout and 'epoch 40 of 40' in done.stdout
    assert Run(run).state == 'finished' and Run(run).metrics['epochs_run'] == 40
    assert clot(*resume, cwd=folder).returncode == 2        # finished is finished

def test_help_helps(tmp_path):
    for words, needed in [(['--help'], 'demo'), (['demo', '--help'], 'FOLDER_OR_CSV'), (['run', '--help'], 'NAME=VALUE'), (['run', 'train', '--help'], 'learning rate')]:
        done = clot(*words, cwd=tmp_path)
        assert done.returncode == 0 and needed.lower() in done.stdout.lower()

def test_own_images_run_through_with_broken_ones_among_them(tmp_path):
    "Folders of one's own, three files broken: the report counts them, and no id of a patient is in any run"
    import numpy as np
    from strip_notebooks.data.formats import write_image
    rng = np.random.default_rng(0)
    for p in range(48):
        label = 'CE' if p % 2 else 'LAA'
        write_image(tmp_path/'images'/label/f'Doe_Jane_{p:02}'/'scan.png', (rng.normal(150 + 50*(p % 2), 30, (64, 80, 3))).clip(0, 255).astype(np.uint8))
    for p in (0, 1, 2): next((tmp_path/'images').glob(f'*/Doe_Jane_{p:02}/scan.png')).write_bytes(b'\x89PNG\r\n\x1a\n torn')
    done = clot('demo', '--data', 'images', '--size', '32', '--epochs', '2', cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    prepare = next(Run(p) for p in (tmp_path/'runs').glob('*-prepare-*'))
    assert prepare.metrics['quarantined'] == 3 and prepare.metrics['patients'] == 45
    for file in (tmp_path/'runs').rglob('*'):
        if file.is_file(): assert b'Doe_Jane' not in file.read_bytes(), f'{file.name} holds the id of a patient'
    assert 'Doe_Jane' not in done.stdout + done.stderr
    assert 'Doe_Jane' in next((tmp_path/'data').glob('prepared/*/identities.csv')).read_text()

def test_a_csv_with_other_column_names_and_a_frozen_backbone(demo, tmp_path):
    "Columns are mapped on the command line, the parameters of the training reach it, and a step looks for the one before it in the folder of runs that it is given"
    import pandas as pd
    folder, _ = demo
    cohort = pd.read_csv(next((folder/'data'/'synthetic').glob('*/cohort.csv')), dtype=str)
    cohort.rename(columns=dict(patient_id='subject', label='etiology')).drop(columns='center_id').to_csv(tmp_path/'mine.csv', index=False)
    elsewhere = '--runs', 'my runs'
    prepared = clot('run', 'prepare', *elsewhere, '-p', 'data=mine.csv', '-p', 'columns=patient_id=subject,label=etiology', '-p', 'size=48', cwd=tmp_path)
    assert prepared.returncode == 0, prepared.stderr
    trained = clot('run', 'train', *elsewhere, '-p', 'arch=resnet18', '-p', 'epochs=1', '-p', 'trainable=head', '-p', 'label_smoothing=0.1', cwd=tmp_path)
    assert trained.returncode == 0 and 'resnet18, 11,' in trained.stdout, trained.stderr
    assert Run(sorted((tmp_path/'my runs').glob('*-train-*'))[-1]).metrics['epochs_run'] == 1
    shutil.rmtree(tmp_path/'data')
    evaluated = clot('run', 'evaluate', *elsewhere, cwd=tmp_path)
    assert evaluated.returncode == 2 and 'no finished cache' in evaluated.stderr and '`clot run prepare`' in evaluated.stderr
