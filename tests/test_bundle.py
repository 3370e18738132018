"A bundle is what training wrote, or it is refused; what is in it never runs."
import json, os, pickle, shutil

import numpy as np
import pytest
import torch

from strip_notebooks.bundle import BundleError, _digest, load_bundle, predict_cohort, save_bundle
from strip_notebooks.core import seed_everything
from strip_notebooks.data.preprocess import Preprocessing, build_cache
from strip_notebooks.data.synthetic import make_cohort
from strip_notebooks.models import create_model
from strip_notebooks.splits import split_patients

spec = dict(arch='simple_cnn', n_classes=2, in_channels=3, dropout=0., classes=['CE', 'LAA'], positive='LAA', preprocessing=Preprocessing(size=64, clahe=1.), prior=.28, threshold=None, calibration=None, trained_on={})

@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    seed_everything(0)
    return save_bundle(tmp_path_factory.mktemp('bundle')/'b', create_model('simple_cnn'), spec)

def test_every_flipped_bit_is_seen(folder, tmp_path):
    rng = np.random.default_rng(0)
    for name,n in [('bundle.json', 300), ('weights.safetensors', 40)]:
        good = (folder/name).read_bytes()
        copy = shutil.copytree(folder, tmp_path/name)
        for at,bit in zip(rng.integers(0, len(good), n), rng.integers(0, 8, n)):
            bad = bytearray(good); bad[at] ^= 1 << bit
            (copy/name).write_bytes(bad)
            with pytest.raises(BundleError): load_bundle(copy)

class Payload:
    def __reduce__(self): return os.mkdir, (Payload.path,)

def test_a_pickle_is_not_opened(folder, tmp_path):
    "Even with hashes that a forger has made right"
    import hashlib
    copy = shutil.copytree(folder, tmp_path/'b')
    Payload.path = str(tmp_path/'it_ran')
    data = pickle.dumps(Payload())
    (copy/'weights.safetensors').write_bytes(data)
    body = json.loads((copy/'bundle.json').read_text())
    body['weights'].update(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    body['sha256'] = _digest({k: v for k,v in body.items() if k != 'sha256'})
    (copy/'bundle.json').write_text(json.dumps(body))
    with pytest.raises(BundleError, match='not safetensors'): load_bundle(copy)
    assert not (tmp_path/'it_ran').exists()

def test_saving_over_a_bundle_replaces_it_whole(folder, tmp_path):
    save_bundle(tmp_path/'b', create_model('simple_cnn'), spec)
    first = load_bundle(tmp_path/'b').sha256
    (tmp_path/'b'/'stray').write_text('x')
    save_bundle(tmp_path/'b', create_model('simple_cnn'), spec)
    assert load_bundle(tmp_path/'b').sha256 != first
    assert sorted(os.listdir(tmp_path)) == ['b'] and sorted(os.listdir(tmp_path/'b')) == ['bundle.json', 'weights.safetensors']

def test_files_and_cache_give_the_same_predictions(folder, tmp_path):
    cohort = split_patients(make_cohort(tmp_path/'c', 'easy', n_patients=24, size=96, workers=1))
    bundle = load_bundle(folder)
    cache = build_cache(cohort, bundle.preprocessing, tmp_path/'cache', workers=1)
    a,b = predict_cohort(bundle, cohort),predict_cohort(bundle, cohort, cache, batch_size=5)
    assert np.allclose(a[['p_CE', 'p_LAA']], b[['p_CE', 'p_LAA']], atol=1e-6)
    assert list(a.split) == list(cohort.split)

def test_the_preprocessing_travels(folder, tmp_path):
    "The same weights with another preprocessing answer otherwise: it is the bundle's that is used"
    image = np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)
    bundle = load_bundle(folder)
    model = create_model('simple_cnn'); model.load_state_dict(bundle.model.state_dict())
    other = load_bundle(save_bundle(tmp_path/'o', model, {**spec, 'preprocessing': Preprocessing(size=64, clahe=0.)}))
    assert not np.allclose(bundle.predict([image]), other.predict([image]), atol=1e-6)
    with torch.inference_mode():
        x = bundle.preprocessing.normalise(torch.from_numpy(np.array(bundle.preprocessing.pixels(image)))[None].permute(0, 3, 1, 2))
        assert np.allclose(bundle.model(x).softmax(1).numpy(), bundle.predict([image]), atol=1e-6)
