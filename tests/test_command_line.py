"The command line as a user has it: whole runs in processes of their own, wrong input, failures, a stopped training"
import json, os, re, shlex, shutil, signal, subprocess, sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import shared_folder

from strip_notebooks.bundle import load_bundle
from strip_notebooks.cli import main, parser
from strip_notebooks.data.formats import write_image
from strip_notebooks.findings import read_findings
from strip_notebooks.metrics.compare import compare
from strip_notebooks.predictions import aggregate_patients
from strip_notebooks.runs import Run, list_runs

CLOT = str(Path(sys.executable).parent/'clot')
SMALL = ['--quick', '--patients', '60', '--size', '48', '--epochs', '2', '-p', 'train.batch_size=16', '-p', 'prepare.source_size=64', '-p', 'evaluate.resamples=200']
ENVIRONMENT = {**os.environ, 'OMP_NUM_THREADS': '1'}

def clot(*words, cwd, **kwargs):
    "A finished `clot` process"
    options = dict(cwd=cwd, capture_output=True, text=True, timeout=300, env=ENVIRONMENT)
    return subprocess.run([CLOT, *map(str, words)], **{**options, **kwargs})

def newest(folder, step):
    "The newest run of a step in a folder of runs"
    return Run(max(Path(folder).glob(f'*-{step}-*'), key=lambda p: (Run(p).status.started, p.name)))

@pytest.fixture(scope='session')
def demo(tmp_path_factory, worker_id):
    "A workspace in which a small demo was run, and what it printed; run once for all workers"
    with shared_folder(tmp_path_factory, worker_id, 'work space') as folder:
        if not (folder/'said.txt').exists():
            done = clot('demo', *SMALL, cwd=folder)
            assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
            (folder/'said.txt').write_text(done.stdout)
    return folder, (folder/'said.txt').read_text()


# The demo

def test_demo_ends_with_a_table_and_a_report(demo):
    folder, said = demo
    assert re.search(r'^ +ROC AUC +[01]\.\d\d \([01]\.\d\d–[01]\.\d\d\)', said, flags=re.MULTILINE)
    page = Path(folder, said.strip().splitlines()[-1].removeprefix('report: ')).read_text()
    assert 'AUC' in page and page.count('src="data:image/png') >= 11
    assert 'src="http' not in page and 'href="http' not in page             # nothing is fetched
    runs = list_runs(folder/'runs')
    assert runs.step.tolist() == ['prepare', 'train', 'evaluate', 'report'] and set(runs.state) == {'finished'}

def test_demo_ends_with_its_warnings_the_baselines_and_a_command_to_paste(demo):
    "In this order below the verdict, so that a good number is not the last word"
    folder, said = demo
    end = said[said.rindex('\nPatient AUC '):]
    assert re.match(r'\nPatient AUC [01]\.\d\d \(95 % CI', end)
    assert re.search(r'^(Better than every baseline|The model does (not do better|worse) than|Whether the model) ', end, flags=re.MULTILINE)
    prepared = newest(folder/'runs', 'prepare')
    warnings = [f for name in ('audit', 'checks') for f in read_findings(prepared.table(name)).warnings]
    assert [re.search(rf'^  {f.verdict} {f.code}: ', end, flags=re.MULTILINE) for f in warnings].count(None) == 0
    places = [end.index(words) for words in ('Patient AUC', 'hecks and audit' if not warnings else 'Read the result together with ', 'Next, ', '\nreport: ')]
    assert places == sorted(places) and end.strip().splitlines()[-1].startswith('report: ')
    commands = re.findall(r'^Next, .*:\n  (.*)$', end, flags=re.MULTILINE)
    parsed = [parser().parse_args(shlex.split(command)[1:]) for command in commands]
    assert len(parsed) == 2 and parsed[-1].data == 'FOLDER_OR_CSV'
    assert re.search(' run (train|crossval) ', commands[0]) and 'epochs=2' in commands[0]
    assert f'prepare_run={prepared.name}' in commands[0] and (('scheme=leave_one_center_out' in commands[0]) == ('crossval' in commands[0]))

def test_demo_passes_parameters_to_their_steps(demo):
    folder, _ = demo
    given = {step: newest(folder/'runs', step).parameters for step in ('prepare', 'train', 'evaluate')}
    assert (given['prepare']['patients'], given['prepare']['source_size']) == (60, 64)
    assert (given['train']['epochs'], given['train']['batch_size'], given['evaluate']['resamples']) == (2, 16, 200)
    assert given['train']['prepare_run'] == newest(folder/'runs', 'prepare').name

def test_runs_keep_what_explains_them(demo):
    folder, _ = demo
    for run in map(Run, sorted((folder/'runs').iterdir())):
        assert run.notebook.is_file() and run.metrics and run.parameters and (run.path/'log.txt').is_file()
        made_with = run.environment
        assert made_with['packages']['torch'] and made_with['commit'] and made_with['python'] and made_with['threads'] == 1

def test_runs_say_what_they_build_on(demo):
    folder, _ = demo
    report = newest(folder/'runs', 'report')
    assert [report.origin(step).name for step in ('evaluate', 'train', 'prepare')] == [newest(folder/'runs', s).name for s in ('evaluate', 'train', 'prepare')]

def test_training_and_test_patients_are_disjoint(demo):
    predictions = newest(demo[0]/'runs', 'train').predictions
    patients = {s: set(predictions.patient_id[predictions.split == s]) for s in ('train', 'val', 'test')}
    assert not patients['train'] & patients['test'] and not patients['train'] & patients['val'] and all(patients.values())


# Lists and help

def test_runs_command_lists_and_compares(demo):
    folder, _ = demo
    listed = clot('runs', cwd=folder).stdout
    train = newest(folder/'runs', 'train').name
    assert re.match(r'run +state +data +model +epochs +seed +minutes +result$', listed.splitlines()[0])
    assert re.search(rf'^{train} +finished +structure, 60 patients +simple_cnn +2 +0 +\d+\.\d +validation AUC [01]\.\d\d$', listed, flags=re.MULTILINE)
    assert re.search(r'-evaluate-\w+ +finished +structure, 60 patients +simple_cnn +2 +0 +\d+\.\d +test AUC [01]\.\d\d \(95 % CI', listed)
    said = clot('runs', train, train, cwd=folder)
    assert said.returncode == 2 and 'named twice' in said.stderr

def test_a_reader_that_has_enough_is_no_error(demo):
    reader = subprocess.run(f'"{CLOT}" runs | true', shell=True, cwd=demo[0], capture_output=True, text=True)
    assert reader.stderr == ''

@pytest.mark.parametrize('words, needed', [
    ([], 'COMMAND'),
    (['--help'], 'demo'),
    (['--version'], 'clot 0.'),
    (['predict', '--help'], 'RUN_OR_BUNDLE'),
    (['demo', '--help'], 'FOLDER_OR_CSV'),
    (['runs', '--help'], 'compare'),
    (['run', '--help'], 'NAME=VALUE'),
    (['run', '--list'], 'prepare, pretrain, report, robustness, search_trial, train'),
    (['run'], 'derive'),
    (['run', 'train', '--help'], 'lr  (float, 0 or more, default 0.0)\n      Highest learning rate; 0 takes 0.002, or 0.0002 for pretrained weights'),
    (['run', 'derive', '--help'], 'temperature  (float, above 0 to below 1000, default 1.0)'),
    (['run', 'evaluate', '--help'], 'resamples  (int, 100 to 100000, default 2000)')])
def test_help_helps(words, needed, capsys):
    try: main(words)
    except SystemExit as e: assert not e.code
    assert needed in capsys.readouterr().out

def test_help_does_not_import_torch():
    code = "import atexit, sys; from strip_notebooks.cli import main; atexit.register(lambda: print(sorted({'torch', 'scipy', 'matplotlib'} & set(sys.modules)))); main(sys.argv[1:])"
    for words in (['--help'], ['demo', '--help'], ['run', '--help'], ['run', 'train', '--help'], ['predict', '--help']):
        done = subprocess.run([sys.executable, '-c', code, *words], capture_output=True, text=True)
        assert done.returncode == 0 and done.stdout.splitlines()[-1] == '[]'


# Wrong input: a sentence, exit code 2, and no run folder

PARAMETERS = {'broken.yaml': 'epochs: [1', 'list.yaml': '- 1', 'nan.yaml': 'lr: .nan', 'inf.yaml': 'lr: .inf', 'date.yaml': 'arch: 2020-01-01',
              'map.yaml': 'arch: {a: 1}', 'nul.yaml': 'prepare.data: "a\\0b"', 'folders.yaml': 'prepare.data: [a, b]', 'key.yaml': '? [1]\n: 2', 'true.yaml': 'epochs: true'}

WRONG = {
    'run trian': "did you mean 'train'?",
    'run train -p epoch=3': "did you mean 'epochs'?",
    'run train -p epochs=many': "epochs='many' is not an int",
    'run train -p epochs': 'name=value',
    'run train -p =3': 'name=value',
    'run train -f none.yaml': "'none.yaml' is not a file",
    'run train -f .': "'.' is not a file",
    'run train -f broken.yaml': 'broken.yaml is not readable as YAML',
    'run train -f list.yaml': 'name: value',
    'run train -f key.yaml': 'key.yaml is not readable as YAML',
    'run train -f nan.yaml': 'lr=nan',
    'run train -f inf.yaml': 'lr=inf',
    'run train -f date.yaml': 'is not a str',
    'run train -f map.yaml': 'is not a str',
    'run train -f true.yaml': 'epochs=True is not an int',
    'run train -f bytes.yaml': 'bytes.yaml is not readable as YAML',
    'run train -p seed=-1': 'seed=-1',
    'run train -p seed=4294967296': 'seed=4294967296',
    'run train -p epochs=0': 'epochs=0',
    'run train -p epochs=1e3': "epochs='1e3' is not an int",
    'run train -p lr=nan': 'lr=nan',
    'run train -p lr=inf': 'lr=inf',
    'run train -p lr=-1': 'lr=-1',
    'run train -p lr=1e999': 'lr=inf',
    'run train -p label_smoothing=1': 'label_smoothing=1.0',
    'run train -p dropout=-0.1': 'dropout=-0.1',
    'run train -p target=1.01': 'target=1.01',
    'run train -p workers=100000': 'workers=100000 is more than 4 per CPU core',
    'run train -p policy=lite': "did you mean 'light'?",
    'run train -p trainable=some': "trainable='some'",
    'run train -p arch=': 'arch is empty',
    'run prepare -p size=8': 'size=8',
    'run prepare -p patients=0': 'patients=0',
    'run prepare -p val_ratio=nan': 'val_ratio=nan',
    'run prepare -p val_ratio=1.5': 'val_ratio=1.5',
    'run prepare -p val_ratio=.5 -p test_ratio=.5': 'leave no patient',
    'run prepare -p train_centers=a': 'go together',
    'run prepare -p window=1': 'window=[1.0]',
    'run prepare -p window=400,0': 'window=[400.0, 0.0]',
    'run prepare -p window=low,high': "window='low' is not a float",
    'run prepare -p window=0,nan': 'window=nan',
    'run prepare -p columns=patient_id': 'ours=theirs',
    'run prepare -p slice=top': 'slice=',
    'run prepare -p red_cell_shift=5': 'red_cell_shift=5.0',
    'run derive -p temperature=0': 'temperature=0.0',
    'run derive -p temperature=inf': 'temperature=inf',
    'run derive -p rule=best': 'best',
    'run evaluate -p resamples=1000000000': 'resamples=1000000000',
    'run evaluate -p resamples=10': 'resamples=10',
    'run evaluate -p threshold=nan': "no parameter 'threshold'",
    'run report -p evaluate=x': "did you mean 'evaluate_run'?",
    'run benchmark -p turns=0': 'turns=0',
    'run --resume nothing': 'not a run',
    'run --repeat nothing': 'not a run',
    'run train --resume x': 'nothing beside it',
    'run --resume x --repeat y': 'nothing beside it',
    'runs --runs list.yaml': 'list.yaml is not a folder of runs',
    'run train --runs list.yaml': 'list.yaml is not a folder of runs',
    'demo --runs list.yaml': 'list.yaml is not a folder of runs',
    'runs a b a': 'named twice',
    'runs a b': 'not a run',
    'predict nothing a.png': 'neither the folder of a bundle nor a run',
    'demo --data nowhere': "'nowhere' does not exist",
    'demo -f nul.yaml': 'does not exist',
    'demo -f folders.yaml': 'is not a str',
    'demo --data . --preset easy': '--preset is about the synthetic cohort',
    'demo --columns a=b': 'with --data',
    'demo --preset easier': "did you mean 'easy'",
    'demo --seed -1': 'seed=-1',
    'demo --arch resnet19': "did you mean 'resnet18'",
    'demo -p lr=1': 'such as train.epochs=3',
    'demo -p trian.lr=1': "did you mean 'train'?",
    'demo -p train.prepare_run=x': 'leave it out',
    'demo -p train.lr=nan': 'lr=nan',
    'demo -p evaluate.resample=100': "did you mean 'resamples'?",
    'demo -p report.x=1': "no parameter 'x'"}
EMPTY = [(['run', ''], 'no experiment'), (['predict', '', 'a.png'], 'No model is named'), (['run', '--resume', ''], 'is empty'), (['run', '--resume', ' '], 'is empty'), (['run', '--repeat', ''], 'is empty'),
         (['runs', '', ''], 'give two names'), (['demo', '--data', ''], "'' does not exist"), (['run', 'train', '-p', ''], 'name=value'), (['run', 'train', '-f', ''], "'' is not a file")]

@pytest.fixture
def desk(tmp_path, monkeypatch):
    "An empty workspace with some files of parameters, as the current folder"
    for name, text in PARAMETERS.items(): (tmp_path/name).write_text(text)
    (tmp_path/'bytes.yaml').write_bytes(b'arch: \xff\xfe\x00')
    monkeypatch.chdir(tmp_path)
    return tmp_path

@pytest.mark.parametrize('words, sentence', [*((words.split(), sentence) for words, sentence in WRONG.items()), *EMPTY], ids=lambda x: ' '.join(x) if isinstance(x, list) else '')
def test_wrong_input_is_a_sentence_before_anything_runs(desk, capsys, words, sentence):
    with pytest.raises(SystemExit) as ended: main(words)
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.startswith('clot: ') and sentence in said and said.count('\n') == 1, said
    assert not (desk/'runs').exists() and not (desk/'data').exists()

@pytest.mark.parametrize('words, sentence', [(['run', ''], 'no experiment'), (['run', '--resume', ''], 'is empty'), (['runs', '--runs', 'list.yaml'], 'not a folder'),
                                             (['run', 'train', '-p', 'seed=-1'], 'seed=-1'), (['demo', '-p', 'train.lr=inf'], 'lr=inf')])
def test_wrong_input_ends_a_process_with_code_2(desk, words, sentence):
    done = clot(*words, cwd=desk)
    assert done.returncode == 2 and sentence in done.stderr and 'Traceback' not in done.stderr and not (desk/'runs').exists()

def test_a_folder_of_runs_that_cannot_be_made_is_a_sentence(tmp_path):
    done = clot('run', 'prepare', '--runs', '/proc/runs', cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith('clot: /proc/runs') and 'Traceback' not in done.stderr


# Failed and stopped runs

def test_a_failed_run_keeps_its_notebook_and_says_why(tmp_path):
    for label in ('CE', 'LAA'):
        (tmp_path/'images'/label/f'p{label}').mkdir(parents=True)
        (tmp_path/'images'/label/f'p{label}'/'a.png').touch()
    done = clot('run', 'prepare', '-p', 'data=images', cwd=tmp_path)
    assert done.returncode == 2 and 'None of the 2 images can be read' in done.stderr and 'Traceback' not in done.stderr
    run = newest(tmp_path/'runs', 'prepare')
    assert f'clot run --resume {run.name}' in done.stderr
    assert run.state == 'failed' and 'None of the 2 images' in run.status.error
    cells = json.loads(run.notebook.read_text())['cells']
    assert any(o['output_type'] == 'error' for c in cells for o in c.get('outputs', []))
    assert re.search(rf'^{run.name} +failed +.*None of the 2 images', clot('runs', cwd=tmp_path).stdout, flags=re.MULTILINE)
    refused = clot('run', 'train', '-p', f'prepare_run={run.name}', cwd=tmp_path)
    assert refused.returncode == 2 and 'has not finished: it is failed' in refused.stderr

def until(line, *words, cwd, stop):
    "The exit code and the errors of `clot WORDS`, stopped by a signal to its group as soon as it prints `line`"
    process = subprocess.Popen([CLOT, *words], cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, env=ENVIRONMENT)
    seen = any(printed.strip().startswith(line) for printed in process.stdout)
    assert seen, process.stderr.read()
    os.killpg(process.pid, stop)
    _, errors = process.communicate()
    return process.returncode, errors

def test_an_interrupted_training_is_resumed_in_its_folder(demo):
    folder, _ = demo
    prepared = newest(folder/'runs', 'prepare').path
    train = 'run', 'train', '--runs', 'stopped', '-p', f'prepare_run={prepared}', '-p', 'epochs=40', '-p', 'batch_size=16'
    code, said = until('epoch 2', *train, cwd=folder, stop=signal.SIGINT)         # Ctrl-C
    run = newest(folder/'stopped', 'train')
    assert code == 130 and 'clot run --resume' in said and run.name in said and 'Traceback' not in said, said
    assert run.state == 'interrupted' and 'SIGINT' in run.status.error
    resume = 'run', '--resume', run.name, '--runs', 'stopped'
    done = clot(*resume, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert 'epoch 1 of' not in done.stdout and 'epoch 40 of 40' in done.stdout
    assert run.state == 'finished' and run.metrics['epochs_run'] == 40 and run.status.attempts == 2
    again = clot(*resume, cwd=folder)
    assert again.returncode == 2 and 'has finished' in again.stderr


# Other ways through the steps

def test_a_derived_model_is_evaluated_with_its_temperature(demo):
    "The derived bundle names its parent, its probabilities are softer, and the run that it builds on is as it was"
    folder, _ = demo
    trained = newest(folder/'runs', 'train')
    files = {p.name: p.read_bytes() for p in trained.bundle.iterdir()}
    elsewhere = '--runs', 'derived'
    done = clot('run', 'derive', *elsewhere, '-p', f'train_run={trained.path}', '-p', 'temperature=2', '-p', 'positive=CE', cwd=folder)
    assert done.returncode == 0, done.stderr
    derived = newest(folder/'derived', 'derive')
    bundle, parent = load_bundle(derived.bundle), load_bundle(trained.bundle)
    assert (bundle.parent, bundle.temperature, bundle.positive) == (parent.sha256, 2, 'CE')
    kept = 'rule', 'how', 'target'
    assert [bundle.spec[k] for k in kept] == [parent.spec[k] for k in kept]
    refused = clot('runs', str(trained.path), derived.name, *elsewhere, cwd=folder)
    assert refused.returncode == 2 and 'The positive class is LAA in one run and CE in another' in refused.stderr
    assert abs(derived.predictions.p_LAA - .5).max() < abs(trained.predictions.p_LAA - .5).max()
    done = clot('run', 'evaluate', *elsewhere, '-p', 'resamples=100', cwd=folder)
    assert done.returncode == 0 and 'the positive class is CE' in done.stdout, done.stderr
    evaluated = newest(folder/'derived', 'evaluate')
    assert list(evaluated.links) == ['derive'] and evaluated.origin('prepare').name == newest(folder/'runs', 'prepare').name
    assert {p.name: p.read_bytes() for p in trained.bundle.iterdir()} == files

def test_someone_elses_predictions_are_evaluated_from_a_table_alone(tmp_path):
    "Other column names, three digits, no images: the numbers are those of the table, and the report has no empty section"
    from sklearn.metrics import roc_auc_score
    rng = np.random.default_rng(0)
    laa = rng.random(80) < .3
    score = (1/(1 + np.exp(1 - rng.normal(laa)))).round(3)
    pd.DataFrame(dict(subject=[f'Roe_{i:03}' for i in range(80)], label=np.where(laa, 'LAA', 'CE'), LAA=score)).to_csv(tmp_path/'theirs.csv', index=False)
    refused = clot('evaluate', 'theirs.csv', cwd=tmp_path)
    assert refused.returncode == 2 and 'add --columns patient_id=NAME' in refused.stderr and not list(tmp_path.glob('runs/*'))
    done = clot('evaluate', 'theirs.csv', '--columns', 'patient_id=subject', '--threshold', '.3', '--prior', '.3', '-p', 'resamples=200', cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.lstrip().startswith('Positive class LAA: classified as LAA if p ≥ 0.300.')
    run = newest(tmp_path/'runs', 'evaluate_table')
    table = run.table('scores').set_index('metric')
    assert abs(table.value['roc_auc'] - roc_auc_score(laa, score)) < 1e-9 and table.value['sensitivity'] == (score[laa] >= .3).mean()
    page = run.report.read_text()
    assert 'no audit looked for leaks' in page and 'id="cohort"' not in page and 'Roe_' not in page
    assert 'Roe_' not in done.stdout + (run.path/'log.txt').read_text() + (run.path/'notebook.ipynb').read_text()

def test_models_are_compared_at_their_own_operating_points(demo):
    folder, _ = demo
    trained, elsewhere = newest(folder/'runs', 'train'), ('--runs', 'sensitive')
    done = clot('run', 'derive', *elsewhere, '-p', f'train_run={trained.path}', '-p', 'rule=sensitivity', '-p', 'target=1', cwd=folder)
    assert done.returncode == 0, done.stderr
    derived = newest(folder/'sensitive', 'derive')
    said = clot('runs', str(trained.path), derived.name, *elsewhere, cwd=folder)
    assert said.returncode == 0, said.stderr
    for run in (trained, derived): assert f'{run.name}, classified as LAA if p ≥ {load_bundle(run.bundle).threshold:.3f}' in said.stdout
    patients = [aggregate_patients(run.predictions.query("split == 'test'")) for run in (trained, derived)]
    want = compare(*patients, thresholds=[load_bundle(run.bundle).threshold for run in (trained, derived)])
    assert "DeLong's test of the two AUCs: p = 1" in said.stdout and 'weighted_log_loss_shifted' in said.stdout
    row = next(line.split() for line in said.stdout.splitlines() if line.startswith('specificity'))
    np.testing.assert_allclose([float(v) for v in row[1:4]], want.loc['specificity', ['first', 'second', 'difference']].tolist(), atol=.001)
    assert want.difference['roc_auc'] == 0

def test_own_images_run_through_with_broken_ones_among_them(tmp_path):
    "Folders of one's own, three files broken: the report counts them, and no id of a patient is in any run"
    import numpy as np
    rng = np.random.default_rng(0)
    for p in range(48):
        folder = tmp_path/'images'/('CE' if p % 2 else 'LAA')/f'Doe_Jane_{p:02}'
        write_image(folder/'scan.png', (rng.normal(150 + 50*(p % 2), 30, (64, 80, 3))).clip(0, 255).astype(np.uint8))
    for p in (0, 1, 2): next((tmp_path/'images').glob(f'*/Doe_Jane_{p:02}/scan.png')).write_bytes(b'\x89PNG\r\n\x1a\n torn')
    done = clot('demo', '--quick', '--data', 'images', '--size', '32', '--epochs', '2', '-p', 'evaluate.resamples=100', cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    prepare = newest(tmp_path/'runs', 'prepare')
    assert prepare.metrics['quarantined'] == 3 and prepare.metrics['patients'] == 45
    for file in (tmp_path/'runs').rglob('*'):
        if file.is_file(): assert b'Doe_Jane' not in file.read_bytes(), f'{file.name} holds the id of a patient'
    assert 'Doe_Jane' not in done.stdout + done.stderr
    assert 'Doe_Jane' in next((tmp_path/'data').glob('prepared/*/identities.csv')).read_text()

def test_a_csv_with_other_column_names(demo, tmp_path):
    "Columns are mapped on the command line; a step finds the one before it in the folder of runs, but not its data"
    cohort = pd.read_csv(next((demo[0]/'data'/'synthetic').glob('*/cohort.csv')), dtype=str)
    cohort = cohort.rename(columns=dict(patient_id='subject', label='etiology')).drop(columns='center_id')
    cohort.to_csv(tmp_path/'mine.csv', index=False)
    words = ['data=mine.csv', 'columns=patient_id=subject,label=etiology', 'size=48']
    prepared = clot('run', 'prepare', '--runs', 'my runs', *(w for word in words for w in ('-p', word)), cwd=tmp_path)
    assert prepared.returncode == 0, prepared.stderr
    assert newest(tmp_path/'my runs', 'prepare').metrics['patients'] == 60
    shutil.rmtree(tmp_path/'data')
    trained = clot('run', 'train', '--runs', 'my runs', cwd=tmp_path)
    assert trained.returncode == 2 and '`clot run prepare`' in trained.stderr and 'Traceback' not in trained.stderr

def test_numbers_without_a_range_are_prepared_with_a_window_and_a_slice(tmp_path):
    "Arrays in Hounsfield units and a NIfTI volume, without labels: the choices of prepare reach the pixels, and training says what it needs"
    import nibabel, numpy as np
    from strip_notebooks.data.cache import Cache
    from strip_notebooks.records import Prepared
    for i, value in enumerate((-50, 100, 250)): np.save(tmp_path/f'{i}.npy', np.full((40, 40), value, np.float32))
    volume = np.zeros((40, 40, 5), np.int16)
    volume[..., 3] = 150
    nibabel.save(nibabel.Nifti1Image(volume, np.eye(4)), tmp_path/'3.nii')
    rows = [dict(image_id=f'i{i}', patient_id=f'p{i}', path=f'{i}.npy' if i < 3 else '3.nii') for i in range(4)]
    pd.DataFrame(rows).to_csv(tmp_path/'ct.csv', index=False)
    given = ['-p', 'data=ct.csv', '-p', 'size=32', '-p', 'window=0,200', '-p', 'slice=3']
    done = clot('run', 'prepare', *given, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    run = newest(tmp_path/'runs', 'prepare')
    assert (run.metrics['images'], run.metrics['quarantined']) == (4, 0)
    images = Cache(tmp_path/run.record(Prepared).cache).images
    assert [int(image[16, 16, 0]) for image in images] == [0, 128, 255, 191]
    trained = clot('run', 'train', cwd=tmp_path)
    assert trained.returncode == 2 and 'without labels' in trained.stderr and 'Traceback' not in trained.stderr
