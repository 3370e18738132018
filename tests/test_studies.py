"""The five studies of a model in a whole demo: what they leave, what the report and `clot predict` make of it, and cohorts whose truth is known (pytest -m slow)"""
import json, os, re, subprocess, sys
from pathlib import Path

import pandas as pd, pytest

from conftest import CLASSES
from strip_notebooks.bundle import load_bundle
from strip_notebooks.records import Study
from strip_notebooks.runs import Run
from strip_notebooks.settings import study_steps

CLOT = str(Path(sys.executable).parent/'clot')

def clot(*words, cwd):
    "What a command printed; it must succeed"
    done = subprocess.run([CLOT, *map(str, words)], cwd=cwd, capture_output=True, text=True, env={**os.environ, 'OMP_NUM_THREADS': '1'})
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout

def first(folder, step): return Run(sorted((folder/'runs').glob(f'*-{step}-*'))[0])

# --- what a demo leaves

@pytest.mark.parametrize('step', study_steps)
def test_a_study_leaves_what_its_record_names(three, step):
    run = first(three, step)
    study = run.record(Study)
    assert study.title and study.sentences and study.figures and study.tables
    for about in study.figures: assert run.figure(about['name']).stat().st_size > 1000 and about['caption']
    for about in study.tables: assert about['caption'] and len(run.table(about['name']).columns)
    assert run.metrics and run.links['train'].name == first(three, 'train').name

@pytest.mark.parametrize('step', study_steps)
def test_the_sentences_of_a_study_are_sentences(three, step):
    for sentence in first(three, step).record(Study).sentences:
        assert re.match(r'[A-Z0-9<]', sentence) and sentence.endswith('.'), sentence
        assert not re.search(r'\bnan\b|\bNone\b|−0\.00 |_auc|p_holm|\bp[0-9]+\b', sentence), sentence

def test_the_report_has_a_section_for_each_study(three):
    page = first(three, 'report').report.read_text()
    places = [page.index(f'<h2 id="{step}">') for step in study_steps]
    assert places == sorted(places) and page.index('id="pictures"') < places[0] and places[-1] < page.index('id="limits"')
    for step in study_steps: assert f'href="#{step}"' in page
    text = re.sub(r'<style>.*?</style>|<[^>]*>', ' ', re.sub(r'src="data:[^"]*"', '', page), flags=re.DOTALL)
    assert not re.search(r'\bnan\b|roc_auc|p_holm', text)

def test_the_report_names_no_patient_and_no_image(three):
    page, ids = first(three, 'report').report.read_text(), first(three, 'train').predictions
    page = re.sub(r'src="data:[^"]*"', '', page)
    assert not [i for i in {*ids.patient_id, *ids.image_id} if i in page]

def test_no_file_of_a_run_holds_an_id_of_the_users_table(three):
    for step in study_steps:
        for file in first(three, step).path.rglob('*'):
            if file.is_file(): assert b'Doe_Jane' not in file.read_bytes(), f'{step}/{file.name} holds the id of a patient'

def test_the_demo_ends_with_what_the_studies_found(three):
    said = (three/'said.txt').read_text()
    found = said[said.index('What the studies found:'):]
    titles = [first(three, step).record(Study).title for step in study_steps]
    assert [t for t in titles if not re.search(rf'^  {re.escape(t)}: ', found, flags=re.MULTILINE)] == []
    assert [int(n) for n in re.findall(r'^\[(\d)/9\]', said, flags=re.MULTILINE)] == list(range(1, 10))

def test_three_classes_reach_the_tables(three):
    "The heat maps, the prediction sets and the groups know all classes"
    bundle = load_bundle(first(three, 'uncertainty').bundle)
    assert bundle.classes == sorted(CLASSES) and bundle.parent == load_bundle(first(three, 'train').bundle).sha256

# --- the bundle that uncertainty leaves

def test_predict_uses_what_uncertainty_stored(three, tmp_path):
    run = first(three, 'uncertainty')
    bundle = load_bundle(run.bundle)
    clot('predict', run.path, '0.png', '1.png', '2.png', '--out', tmp_path/'out.csv', cwd=three)
    table = pd.read_csv(tmp_path/'out.csv')
    assert len(table) == 3 and (table.filter(like='p_').sum(axis=1) - 1).abs().max() < 1e-6
    assert bundle.spec['calibration'] is not None
    if bundle.spec['outliers'] is not None: assert 'outlier' in table
    plain = json.loads((first(three, 'train').bundle/'bundle.json').read_text())['spec']
    assert plain.get('conformal') is None and plain.get('outliers') is None       # the run of train is as it was

# --- wrong input is refused in a sentence, before or in the run

@pytest.mark.parametrize('words, sentence', [
    (['explain', '-p', 'method=gradcm'], "did you mean 'gradcam'"), (['explain', '-p', 'patients=2'], 'patients=2 must be'),
    (['features', '-p', 'projection=umpa'], "did you mean 'umap'"), (['uncertainty', '-p', 'coverage=1.5'], 'coverage=1.5 must be'),
    (['robustness', '-p', 'severities=7'], 'whole numbers from 1 to 5'), (['robustness', '-p', 'bounds=0.5'], 'whole numbers from 1 to 255'), (['bias', '-p', 'intersections=sex'], 'must be two columns'),
    (['bias', '-p', 'attribute=sex'], "did you mean 'attributes'")])
def test_wrong_settings_are_refused(three, words, sentence):
    before = len(list((three/'runs').iterdir()))
    done = subprocess.run([CLOT, 'run', *words], cwd=three, capture_output=True, text=True)
    assert done.returncode == 2 and sentence in done.stderr and done.stderr.count('\n') == 1, done.stderr
    assert not [p for p in (three/'runs').glob(f'*-{words[0]}-*') if p != first(three, words[0]).path and Run(p).parameters.get('method') == 'gradcm']

def test_the_bundle_of_uncertainty_is_evaluated_by_name(three):
    "Its card has results of test patients then, and a report of them can be made"
    run = first(three, 'uncertainty')
    said = clot('run', 'evaluate', '-p', f'train_run={run.path}', '-p', 'resamples=200', '--runs', three/'evaluated', cwd=three)
    assert 'Patient AUC' in said or 'per patient' in said
    clot('run', 'report', '--runs', three/'evaluated', cwd=three)
    evaluated = Run(next((three/'evaluated').glob('*-evaluate-*')))
    assert evaluated.links['uncertainty'].name == run.name and evaluated.table('scores').value.notna().any()

@pytest.mark.parametrize('words, sentence', [
    (['explain', '-p', 'layer=blocks.9'], 'blocks.9'), (['robustness', '-p', 'corruptions=gausian_blur'], "did you mean 'gaussian_blur'"),
    (['bias', '-p', 'attributes=sexx'], "did you mean 'sex'")])
def test_what_the_model_or_the_cohort_lacks_is_said(three, words, sentence):
    train = first(three, 'train')
    done = subprocess.run([CLOT, 'run', *words, '-p', f'train_run={train.path}', '--runs', str(three/'refused')], cwd=three, capture_output=True, text=True,
                          env={**os.environ, 'OMP_NUM_THREADS': '1'})
    assert done.returncode == 2 and sentence in done.stderr and 'Traceback' not in done.stderr, done.stderr

# --- other architectures and numbers of classes, with random weights: no study assumes a small network or two classes

ARCHITECTURES = {'simple_cnn': 2, 'resnet18': 3, 'efficientnet_b0': 2, 'vit_tiny_patch16_224(img_size=64)': 3, 'swin_tiny_patch4_window7_224(img_size=64)': 2}

@pytest.fixture(scope='module')
def pixels_of_clots(tmp_path_factory):
    "A cohort of 60 patients with its sets and pixels"
    from strip_notebooks.data.cache import build_cache
    from strip_notebooks.data.preprocess import Preprocessing
    from strip_notebooks.data.synthetic import make_cohort
    from strip_notebooks.splits import split_patients
    folder = tmp_path_factory.mktemp('clots')
    cohort = split_patients(make_cohort(folder/'cohort', 'easy', 90, 64), (.4, .3, .3))
    return cohort.reset_index(drop=True), build_cache(cohort, Preprocessing(64), folder/'cache'), folder

def untrained(arch, classes, pixels_of_clots):
    "An untrained network of `classes` classes as a trained model"
    import torch
    from strip_notebooks.bundle import make_bundle, predict_cohort, torch_parts
    from strip_notebooks.data.preprocess import Preprocessing
    from strip_notebooks.models import create_model
    from strip_notebooks.records import Prepared
    from strip_notebooks.trained import TrainedModel
    cohort, cache, folder = pixels_of_clots
    names = ['CE', 'LAA', 'other'][:classes]
    if classes == 3:
        number = cohort.patient_id.str.removeprefix('P').astype(int)
        cohort = cohort.assign(label=cohort.label.where(number % 3 > 0, 'other'))
    torch.manual_seed(0)
    spec, files = torch_parts(create_model(arch, classes, dropout=.2), arch, classes=names, positive='LAA', preprocessing=Preprocessing(64), prior=[1/classes]*classes, threshold=.4, dropout=.2)
    bundle = make_bundle(spec, files)
    prepared = Prepared('', '', 'clots', '', len(cohort), cohort.patient_id.nunique(), 11, names)
    return TrainedModel(bundle, cohort, cohort, predict_cohort(bundle, cohort, cache), cache, prepared, 'easy', folder/'cohort')

def bounded(settings, **values): return settings(**{name: value for name, value in values.items() if name in settings.model_fields})

@pytest.mark.slow
@pytest.mark.parametrize('arch, classes', ARCHITECTURES.items())
def test_every_study_takes_every_architecture(arch, classes, pixels_of_clots):
    import matplotlib
    matplotlib.use('Agg')
    from strip_notebooks import settings as s
    from strip_notebooks.bias.study import bias_study
    from strip_notebooks.explain.study import heat_sentences, heat_table, measure_heat
    from strip_notebooks.features.study import feature_study
    from strip_notebooks.robustness.study import attack_part, corrupted_model, corruption_part
    from strip_notebooks.uncertainty.study import uncertainty_study
    model = untrained(arch, classes, pixels_of_clots)
    common = dict(resamples=100, permutations=200, patients=10, projection='pca', passes=3, views='flips', severities=[5.], corruptions=['gaussian_blur'], steps=1, bounds=[2.])
    settings = {step: bounded(s.step_settings[step], **common) for step in study_steps}
    given = model.bundle, model.cohort, model.cache, model.predictions
    heat = measure_heat(model, settings['explain'])
    said = heat_sentences(heat, heat_table(heat, 100, 0), model, settings['explain'])
    said += feature_study(*given, settings['features'], model.shown.image_id).sentences
    parts, fitted = uncertainty_study(*given, settings['uncertainty'])
    parts += [corruption_part(corrupted_model(model.bundle, model.cohort, model.cache, settings['robustness']), None, settings['robustness']),
              attack_part(model.bundle, model.test, model.cache, None, settings['robustness'])]
    said += [sentence for part in parts for sentence in part.sentences] + bias_study(*given, settings['bias']).sentences
    assert len(said) > 10 and not [sentence for sentence in said if not sentence.endswith('.') or 'nan' in sentence.split()]

# --- cohorts whose truth is known: the numbers, each a training of some minutes

def demo(folder, *words):
    "The runs of a demo"
    clot('demo', *words, cwd=folder)
    return {step: first(folder, step) for step in ('prepare', 'train', 'evaluate', *study_steps)}

def outlier_auc(runs, folder):
    "How well test patients are distinguished from validation patients by the distance that uncertainty has fitted"
    from strip_notebooks.data.cache import Cache
    from strip_notebooks.features.embedding import image_embeddings
    from strip_notebooks.records import Prepared
    from strip_notebooks.statistics import auc
    from strip_notebooks.uncertainty.outliers import outlier_scores, patient_scores
    bundle, images = load_bundle(runs['uncertainty'].bundle), runs['train'].predictions
    cache, both = Cache(folder/runs['prepare'].record(Prepared).cache), images[images.split.isin(['val', 'test'])]
    features = image_embeddings(bundle, cache.images[cache.rows(both.image_id)], bundle.spec['outliers']['layer'])
    scores = patient_scores(outlier_scores(features, bundle.arrays), both.patient_id)
    return auc(both.groupby('patient_id').split.first()[scores.index] == 'test', scores.to_numpy())

@pytest.mark.slow
def test_easy_clots(tmp_path):
    "Heat on the tissue of the label beats its area, and 90 % prediction sets cover both classes"
    runs = demo(tmp_path, '--preset', 'easy')
    heat = runs['explain'].table('heat_maps').set_index('measure')
    assert heat.low['heat minus area'] > 0
    sets = runs['uncertainty'].table('sets')
    coverage = sets[(sets.measure == 'coverage') & sets.group.isin(['CE', 'LAA'])]
    assert len(coverage) == 2 and (coverage.high >= .9).all()

@pytest.mark.slow
def test_confounded_clots(tmp_path):
    "The features group by center more than by class, and the bias study shows the centers"
    runs = demo(tmp_path, '--preset', 'confounded')
    features = runs['features'].table('features').set_index('measure')
    assert features.low['silhouette, center minus class'] > 0
    groups = runs['bias'].table('groups')
    assert {'4', '11'} <= set(groups.group[groups.attribute == 'center'].astype(str))
    assert any('center' in sentence for sentence in runs['bias'].record(Study).sentences)

@pytest.mark.slow
def test_blood_cells_of_two_laboratories(tmp_path, real):
    "Trained in one laboratory, tested in another: unlike images, two intervals apart, and a gap"
    table = real/'white_blood_cells'/'train.csv'
    runs = demo(tmp_path, '--data', table, '--train-centers', 'lab1', '--test-centers', 'lab2', '--size', '96', '--epochs', '8', '-p', 'train.seed=0')
    auc = runs['robustness'].table('centers').iloc[:2]          # validation of known centers, test of the new one
    assert auc.low.max() > auc.high.min()
    gaps = runs['bias'].table('gaps')
    assert gaps[gaps.attribute == 'center'].p_holm.min() < .05
    assert outlier_auc(runs, tmp_path) > .8
