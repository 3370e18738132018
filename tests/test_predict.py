"Predictions for images as they come: every format, no labels, no workspace, no torch where the bundle needs none"
import os, subprocess, sys

import nibabel
import numpy as np
import pandas as pd
import pytest

from strip_notebooks.bundle import derive_bundle, load_bundle, outlier_file, parent_files, save_bundle, torch_parts
from strip_notebooks.cli import main
from strip_notebooks.core import StripError
from strip_notebooks.data.formats import read_image, write_image
from strip_notebooks.data.images import Reading
from strip_notebooks.data.preprocess import Preprocessing
from strip_notebooks.features.embedding import image_embeddings
from strip_notebooks.models import create_model
from strip_notebooks.predict import predict_files
from strip_notebooks.predictions import load_predictions
from strip_notebooks.uncertainty.conformal import conformal_sets, set_words
from strip_notebooks.uncertainty.outliers import fit_limit

ENDINGS = ['.png', '.jpg', '.bmp', '.tif', '.npy', '.dcm', '.nii', '.nii.gz']

@pytest.fixture(scope='module')
def model(tmp_path_factory):
    "The folder of a bundle with settings that differ from every default"
    about = dict(classes=['CE', 'LAA'], positive='CE', preprocessing=Preprocessing(32, fit='crop', clahe=1.), prior=[.7, .3], threshold=.3, how='max')
    return save_bundle(tmp_path_factory.mktemp('model')/'bundle', *torch_parts(create_model('simple_cnn'), 'simple_cnn', **about))

@pytest.fixture(scope='module')
def scans(tmp_path_factory):
    "Two patients with a picture in every format each, and files that cannot be read"
    folder, rng = tmp_path_factory.mktemp('in')/'scans', np.random.default_rng(0)
    for patient in ('Doe', 'Roe'):
        for ending in ENDINGS:
            (folder/patient).mkdir(parents=True, exist_ok=True)
            write_image(folder/patient/f'a{ending}', rng.integers(0, 256, (40, 50, 3)).astype(np.uint8))
    (folder/'Roe'/'torn.png').write_bytes(b'\x89PNG\r\n\x1a\n torn')
    (folder/'Poe').mkdir()
    (folder/'Poe'/'empty.jpg').touch()
    (folder/'notes.txt').write_text('text')
    return folder

def test_every_format_is_predicted_by_the_bundles_own_settings(model, scans):
    found, bundle = predict_files(model, scans), load_bundle(model)
    assert sorted(found.images.image_id) == sorted(f'{p}/a{e}' for p in ('Doe', 'Roe') for e in ENDINGS)
    p = bundle.predict([read_image(scans/i) for i in found.images.image_id])
    np.testing.assert_allclose(found.images[['p_CE', 'p_LAA']], p, atol=1e-6)
    assert (found.images.predicted == np.where(found.images.p_CE >= .3, 'CE', 'LAA')).all()
    highest = found.images.assign(sure=p.max(1)).sort_values('sure').groupby('patient_id').last()
    np.testing.assert_allclose(found.patients.set_index('patient_id').p_CE, highest.p_CE, atol=1e-6)
    assert found.patients[['n_images', 'n_unreadable']].to_numpy().tolist() == [[8, 0], [8, 1]]

def test_nothing_is_dropped(model, scans):
    found = predict_files(model, scans)
    files = {p.relative_to(scans).as_posix() for p in scans.rglob('*') if p.is_file()}
    assert set(found.images.image_id) | set(found.unreadable.image_id) == files
    assert set(found.unreadable.image_id) == {'Roe/torn.png', 'Poe/empty.jpg', 'notes.txt'} and (found.unreadable.message != '').all()
    assert '1 patient without any readable image: Poe.' in found.text()       # notes.txt is no patient

def test_a_table_says_which_slice_and_whose_image(model, tmp_path):
    volume = np.zeros((40, 40, 3), np.uint8)
    volume[:20, :, 2] = 200
    nibabel.save(nibabel.Nifti1Image(volume, np.eye(4)), tmp_path/'v.nii')
    pd.DataFrame(dict(image_id=['a', 'b'], subject=['007', '007'], path='v.nii', slice=['2', '0'])).to_csv(tmp_path/'t.csv', index=False)
    found, bundle = predict_files(model, tmp_path/'t.csv', columns=dict(patient_id='subject')), load_bundle(model)
    want = bundle.predict([read_image(tmp_path/'v.nii', Reading(slice=k)) for k in (2, 0)])
    np.testing.assert_allclose(found.images[['p_CE', 'p_LAA']], want, atol=1e-6)
    assert found.patients.patient_id.tolist() == ['007'] and found.patients.n_images.tolist() == [2]
    with pytest.raises(StripError, match='patient_id'): predict_files(model, tmp_path/'t.csv')

def test_labels_go_along_where_every_image_has_one(model, scans, tmp_path):
    for label in ('CE', 'LAA'):
        write_image(tmp_path/label/f'P{label}'/'a.png', np.full((40, 40, 3), 90, np.uint8))
    found = predict_files(model, tmp_path)
    assert found.patients[['patient_id', 'label']].to_numpy().tolist() == [['PCE', 'CE'], ['PLAA', 'LAA']]
    assert 'label' not in predict_files(model, [tmp_path, scans]).images

def test_from_an_empty_folder(model, scans, tmp_path):
    "Without a workspace: the answers on the terminal and in tables, and nothing else is written"
    clot = [sys.executable, '-c', 'from strip_notebooks.cli import main; main()']
    words = ['predict', model, scans, scans/'Roe'/'a.dcm', '--out', 'answers.csv']
    done = subprocess.run([*clot, *map(str, words)], cwd=tmp_path, capture_output=True, text=True, env={**os.environ, 'STRIP_PROGRESS': 'lines'})
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stdout.splitlines() if not line.startswith('predicting')]
    assert said[0] == 'Positive class CE: classified as CE if p_CE ≥ 0.300.' and 'predicting: 18 of 18' in done.stdout
    assert 'given twice' in done.stdout and 'torn.png: ' in done.stdout
    assert sorted(os.listdir(tmp_path)) == ['answers-patients.csv', 'answers-unreadable.csv', 'answers.csv']
    table = load_predictions(tmp_path/'answers.csv')
    assert set(table.threshold.astype(float)) == {.3} and set(table.positive) == {'CE'}
    again = subprocess.run([*clot, *map(str, words)], cwd=tmp_path, capture_output=True, text=True)
    assert again.returncode == 2 and 'would be replaced' in again.stderr

@pytest.mark.parametrize('words, sentence', [([], 'No images are named'), (['nothing.png'], 'no such file'), (['.', '--patient', 'person'], 'There is no rule'),
                                             (['.', '--columns', 'x'], 'ours=theirs'), (['.', '--out', 'a.xlsx'], 'must end in .csv')])
def test_wrong_input_is_a_sentence(model, tmp_path, monkeypatch, capsys, words, sentence):
    monkeypatch.chdir(tmp_path)
    (tmp_path/'x').touch()
    with pytest.raises(SystemExit) as ended: main(['predict', str(model), *words])
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.startswith('clot: ') and sentence in said and said.count('\n') == 1, said

def test_prediction_sets_and_a_strange_image(tmp_path):
    "A calibrated bundle with both: the set of each patient, and an image far from the training images, which is predicted and marked"
    rng, about = np.random.default_rng(0), dict(classes=['LAA', 'CE'], positive='LAA', preprocessing=Preprocessing(32), prior=None, threshold=.5)
    plain = load_bundle(save_bundle(tmp_path/'plain', *torch_parts(create_model('simple_cnn'), 'simple_cnn', **about)))
    def noise(n): return rng.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8)
    seen = pd.DataFrame(dict(patient_id=[f'{k}' for k in range(90)], label=['CE', 'LAA']*45, split=['train', 'train', 'val']*30))
    fit = fit_limit(image_embeddings(plain, noise(90)), seen, plain.classes)
    middle = float(np.median(1 - plain.probabilities(noise(8))[:, 1]))
    changes = dict(outliers=fit.limit, conformal=dict(level=.9, limits=[1., middle], patients=[20, 20]), calibration=dict(platt=dict(slope=.5, shift=0.)))
    full = derive_bundle(plain, tmp_path/'full', {**parent_files(plain), outlier_file: fit.data}, **changes)
    for k in range(3):
        (tmp_path/'in'/f'P{k}').mkdir(parents=True)
        write_image(tmp_path/'in'/f'P{k}'/'a.png', noise(1)[0])
    write_image(tmp_path/'in'/'P0'/'white.png', np.full((32, 32, 3), 255, np.uint8))
    found = predict_files(full, tmp_path/'in')
    assert found.images.set_index('image_id').outlier.to_dict() == {'P0/a.png': 'no', 'P0/white.png': 'yes', 'P1/a.png': 'no', 'P2/a.png': 'no'}
    assert found.patients.outlier.tolist() == ['yes', 'no', 'no'] and found.images.p_LAA.notna().all()
    sets = conformal_sets(found.patients[['p_LAA', 'p_CE']], changes['conformal'])
    assert found.patients.prediction_set.tolist() == set_words(sets, ['LAA', 'CE'])
    assert 'Unlike the training images: 1 image of 1 patient' in found.text() and 'hold the true class for 90 %' in found.text()
    found.save(tmp_path/'out.csv')
    assert load_predictions(tmp_path/'out-patients.csv').prediction_set.tolist() == found.patients.prediction_set.tolist()
    before = predict_files(tmp_path/'plain', tmp_path/'in')
    assert not {'outlier', 'prediction_set'} & {*before.images, *before.patients} and 'Prediction sets' not in before.text()

SCRIPT = '''
import sys
import numpy as np
from safetensors.numpy import save
from strip_notebooks.bundle import register_runtime, save_bundle
from strip_notebooks.cli import main
from strip_notebooks.data.preprocess import Preprocessing

class Gray:
    def __init__(self, spec, files, device, threads=None): pass
    def batch(self, pixels): return pixels
    def logits(self, batch): return np.stack([0*batch.mean((1, 2, 3)), batch.mean((1, 2, 3))/64 - 2], 1).astype(np.float32)

register_runtime('gray', Gray)
if __name__ == '__main__':
    spec = dict(classes=['CE', 'LAA'], positive='LAA', preprocessing=Preprocessing(16), prior=None, threshold=.5)
    files = {}
    if 'more' in sys.argv:
        spec |= dict(calibration=dict(platt=dict(slope=.5, shift=0.)), conformal=dict(level=.9, limits=[.6, .6], patients=[20, 20]),
                     outliers=dict(threshold=9., share=.05, patients=20))
        files = {'outliers.safetensors': save(dict(means=np.zeros((2, 3), np.float32), precision=np.eye(3, dtype=np.float32)))}
    main(['predict', str(save_bundle('b', spec, files, runtime='gray')), sys.argv[1]])
    assert not [m for m in sys.modules if m.split('.')[0] in ('torch', 'timm', 'torchvision')], 'torch was imported'
'''

@pytest.mark.parametrize('more', [[], ['more']], ids=['plain', 'calibrated'])
def test_no_torch_where_the_bundle_needs_none(scans, tmp_path, more):
    "Also where it is calibrated and has prediction sets and a limit for outliers, which this runtime cannot use"
    (tmp_path/'script.py').write_text(SCRIPT)
    done = subprocess.run([sys.executable, 'script.py', str(scans), *more], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and 'Positive class LAA' in done.stdout, done.stderr
    assert ("the runtime 'gray' shows no features" in done.stdout) == ('prediction_set' in done.stdout) == bool(more)
