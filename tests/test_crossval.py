"Cross-validation as a user has it: whole runs of every scheme, killed and resumed, with too few patients or centers"
import os, re, signal, subprocess, sys, time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from strip_notebooks.bundle import load_bundle
from strip_notebooks.data.formats import write_image
from strip_notebooks.metrics.folds import fold_auc
from strip_notebooks.predictions import aggregate_patients
from strip_notebooks.records import CrossValidated
from strip_notebooks.runs import Run, list_runs

CLOT = str(Path(sys.executable).parent/'clot')
ENVIRONMENT = {**os.environ, 'OMP_NUM_THREADS': '1'}
SMALL = ['-p', 'epochs=1', '-p', 'batch_size=16', '-p', 'resamples=100', '-p', 'policy=none']

def clot(*words, cwd):
    "A finished `clot` process"
    return subprocess.run([CLOT, *map(str, words)], cwd=cwd, capture_output=True, text=True, timeout=600, env=ENVIRONMENT)

def newest(folder, step): return Run(max((folder/'runs').glob(f'*-{step}-*'), key=lambda p: p.stat().st_mtime))

def crossval(folder, *parameters):
    "A finished run of crossval on the cohort of the workspace"
    done = clot('run', 'crossval', *SMALL, *(word for p in parameters for word in ('-p', p)), cwd=folder)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return Run(done.stdout.strip().splitlines()[-1].removeprefix('finished: '))

@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "A workspace with a prepared cohort: 48 patients, LAA a little brighter, and center c2 has patients of CE only"
    folder, rows = tmp_path_factory.mktemp('crossval'), []
    rng = np.random.default_rng(0)
    for k in range(48):
        laa = k%3 == 0
        center = 'c2' if k >= 40 and not laa else f'c{k%2}'
        image = rng.normal(rng.normal(110 + 15*laa, 12), 20, (40, 40, 3)).clip(0, 255).astype(np.uint8)
        write_image(folder/f'{k}.png', image)
        rows.append(dict(image_id=f'i{k}', patient_id=f'p{k}', label='LAA' if laa else 'CE', center_id=center, path=f'{k}.png'))
    pd.DataFrame(rows).to_csv(folder/'cohort.csv', index=False)
    done = clot('run', 'prepare', '-p', 'data=cohort.csv', '-p', 'size=32', '-p', 'normalize=zscore', cwd=folder)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder

@pytest.fixture(scope='module')
def kfold(folder): return crossval(folder, 'folds=2', 'seeds=2')


def test_every_patient_is_tested_once_per_repeat(kfold):
    predictions = kfold.predictions
    assert predictions.groupby('repeat').patient_id.apply(lambda p: sorted(p) == sorted(set(p)) and len(p) == 48).all()
    assert set(predictions.split) == {'test'} and predictions['repeat'].nunique() == 2
    folds = predictions.drop_duplicates(['patient_id', 'repeat']).pivot(index='patient_id', columns='repeat', values='fold')
    assert (folds[0] == folds[1]).all()                     # two seeds on the same folds

def test_the_numbers_follow_from_the_predictions(kfold):
    patients = aggregate_patients(kfold.predictions)
    model = patients['repeat']*100 + patients.fold
    expected = fold_auc(patients.label == 'LAA', patients.p_LAA, patients.patient_id, model)
    record = kfold.record(CrossValidated)
    assert record.auc == pytest.approx(tuple(expected), abs=1e-6) and record.models == 4 and record.patients == dict(CE=32, LAA=16)
    assert kfold.table('spread').among.tolist() == ['folds', 'seeds']
    scores = kfold.table('scores').set_index('metric')
    assert scores.loc['roc_auc', ['value', 'low', 'high']].tolist() == pytest.approx(record.auc)
    thresholds = patients.merge(kfold.table('models'), on=['repeat', 'fold'])
    right = (thresholds.p_LAA >= thresholds.threshold) == (thresholds.label == 'LAA')
    assert scores.loc['accuracy', 'value'] == pytest.approx(right.mean())
    assert kfold.table('baselines').name.unique().tolist()[:2] == ['model', 'class prior']

def test_all_models_are_one_bundle_that_predicts(kfold, folder):
    bundle = load_bundle(kfold.bundle)
    members = [load_bundle(p) for p in sorted(kfold.checkpoints.glob('repeat*/bundle'))]
    assert len(members) == len(bundle.engine.members) == 4
    images = [np.full((40, 40, 3), v, np.uint8) for v in (90, 130, 170)]
    np.testing.assert_allclose(bundle.predict(images), np.mean([m.predict(images) for m in members], 0), atol=1e-6)
    assert len({m.preprocessing.shift for m in members}) == 4           # each normalized by its own training patients
    said = clot('predict', kfold.name, '0.png', '1.png', cwd=folder)
    assert said.returncode == 0 and 'ensemble of 4 x simple_cnn' in said.stdout, said.stderr
    card = clot('predict', kfold.name, '--about', cwd=folder).stdout
    assert '| out-of-fold | ROC AUC |' in card and 'is not tested' in card

def test_the_page_is_offline_and_says_what_was_done(kfold, folder):
    page = kfold.report.read_text()
    assert '2-fold cross-validation' in page and 'src="http' not in page and 'href="http' not in page
    assert page.count('src="data:image/png') >= 7
    listed = clot('runs', cwd=folder).stdout
    assert re.search(rf'^{kfold.name} +finished +cohort.csv +simple_cnn +1 +0 ', listed, flags=re.MULTILINE), listed

def test_a_killed_run_resumes_with_the_folds_that_are_done(kfold, folder):
    words = [CLOT, 'run', 'crossval', *SMALL, '-p', 'folds=2', '-p', 'seeds=2']
    process = subprocess.Popen(words, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True, env=ENVIRONMENT)
    def started(): return [p for p in (folder/'runs').glob('*-crossval-*/checkpoints/repeat0-fold0/bundle/bundle.json') if kfold.name not in str(p)]
    while process.poll() is None and not started(): time.sleep(.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    first = started()[0]
    run, before = Run(first.parents[3]), first.stat().st_mtime_ns
    assert run.state == 'interrupted'
    done = clot('run', '--resume', run.name, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert first.stat().st_mtime_ns == before                           # not trained again
    def left(run):
        files = [p for part in (run.path/'tables', run.path/'figures', run.bundle) for p in sorted(part.iterdir())] + [run.path/'record.json']
        return {p.relative_to(run.path).as_posix(): p.read_bytes() for p in files}
    ours, theirs = left(run), left(kfold)
    assert ours.keys() == theirs.keys() and [name for name in ours if ours[name] != theirs[name]] == []

def test_one_center_out_with_a_center_of_one_class(folder):
    run = crossval(folder, 'scheme=leave_one_center_out')
    table = run.table('folds', text=['center']).query("metric == 'roc_auc'").set_index('center')
    assert table.index.tolist() == ['c0', 'c1', 'c2'] and table.note['c2'] == 'only one class is present' and np.isnan(table.value['c2'])
    assert 'No AUC for center c2' in run.summary and 'center c2' in run.report.read_text()
    cohort = pd.read_csv(folder/'cohort.csv')
    assert len(run.predictions) == len(cohort)
    assert (run.predictions.groupby('fold').center_id.nunique() == 1).all()

def test_nested_chooses_without_the_tested_patients(folder):
    run = crossval(folder, 'scheme=nested', 'folds=2', 'inner_folds=2', 'grid=lr=0.01|0.0000001')
    choices = run.table('choices')
    assert choices.groupby('outer').chosen.sum().tolist() == [1, 1] and set(choices.settings) == {'lr=0.01', 'lr=0.0000001'}
    tested = run.predictions.groupby('fold').patient_id.agg(set)
    for outer, patients in tested.items():
        inner = [pd.read_csv(p) for p in run.checkpoints.glob(f'inner{outer}/candidate*/out-of-fold.csv')]
        assert len(inner) == 2
        for table in inner: assert not patients & set(table.patient_id) and len(set(table.patient_id)) == 48 - len(patients)
    assert 'What was chosen for each outer fold' in run.report.read_text()

@pytest.mark.parametrize('parameters, sentence', [
    (['folds=20'], "Class 'LAA' has 16 patients, but a division into 20 folds needs at least 20"),
    (['scheme=nested', 'folds=8', 'inner_folds=15'], 'needs at least 15')])
def test_too_few_patients_end_with_a_sentence_before_anything_is_trained(folder, parameters, sentence):
    done = clot('run', 'crossval', *SMALL, *(word for p in parameters for word in ('-p', p)), cwd=folder)
    assert done.returncode == 2 and sentence in done.stderr and 'Traceback' not in done.stderr, done.stderr
    assert not list((newest(folder, 'crossval').path/'checkpoints').glob('*'))

def test_wrong_settings_make_no_run(folder):
    before = len(list_runs(folder/'runs'))
    for parameter, sentence in (('repeats=3', 'needs scheme=repeated'), ('scheme=loco', "There is no scheme 'loco'"), ('grid=lr', 'name=value|value')):
        done = clot('run', 'crossval', '-p', parameter, cwd=folder)
        assert done.returncode == 2 and sentence in done.stderr, done.stderr
    assert len(list_runs(folder/'runs')) == before

@pytest.mark.slow
def test_the_demo_can_end_with_a_cross_validation(tmp_path):
    done = clot('demo', '--quick', '--crossval', '--preset', 'easy', '--patients', '60', '--size', '32', '--epochs', '1', '-p', 'prepare.source_size=64',
                '-p', 'evaluate.resamples=100', '-p', 'crossval.resamples=100', cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert '[4/5] crossval' in done.stdout and re.search(r'^cross-validation: .*report\.html$', done.stdout, flags=re.MULTILINE)
    assert newest(tmp_path, 'crossval').record(CrossValidated).folds == 3
