"A bundle is what training wrote, or it is refused; what is in it never runs; any runtime can serve it."
import hashlib, json, os, pickle, shutil, subprocess, sys

import numpy as np
import pytest
import torch

from strip_notebooks.bundle import (BundleError, _digest, class_probabilities, derive_bundle, load_bundle, make_bundle, predict_cohort, save_bundle,
                                    torch_parts)
from strip_notebooks.bundle import read_pixels as real_pixels
from strip_notebooks.core import seed_everything
from strip_notebooks.data.formats import read_image
from strip_notebooks.data.images import ImageError
from strip_notebooks.data.cache import build_cache
from strip_notebooks.data.preprocess import Preprocessing
from strip_notebooks.data.synthetic import make_cohort
from strip_notebooks.models import create_model
from strip_notebooks.splits import split_patients

about = dict(classes=['CE', 'LAA'], positive='LAA', preprocessing=Preprocessing(size=64, clahe=1.), prior=[.72, .28], threshold=.4)
def parts(model=None, **changes): return torch_parts(model or create_model('simple_cnn'), 'simple_cnn', **{**about, **changes})
def contents(folder): return {p.name: p.read_bytes() for p in folder.iterdir()}

@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    seed_everything(0)
    return save_bundle(tmp_path_factory.mktemp('bundle')/'b', *parts())

@pytest.fixture(scope='module')
def cohort(tmp_path_factory):
    return split_patients(make_cohort(tmp_path_factory.mktemp('cohort'), 'easy', n_patients=24, size=96, workers=1))


# --- trust ---

def test_every_flipped_bit_is_seen(folder, tmp_path):
    rng = np.random.default_rng(0)
    for name,n in [('bundle.json', 300), ('weights.safetensors', 40)]:
        good = (folder/name).read_bytes()
        copy = shutil.copytree(folder, tmp_path/name)
        for at,bit in zip(rng.integers(0, len(good), n), rng.integers(0, 8, n)):
            bad = bytearray(good)
            bad[at] ^= 1 << bit
            (copy/name).write_bytes(bad)
            with pytest.raises(BundleError) as e: load_bundle(copy)
            assert str(copy) in str(e.value)                                # the error says which

class Payload:
    def __reduce__(self): return os.mkdir, (Payload.path,)

def test_a_pickle_is_not_opened(folder, tmp_path):
    "Even with hashes that a forger has corrected"
    copy = shutil.copytree(folder, tmp_path/'b')
    Payload.path = str(tmp_path/'it_ran')
    data = pickle.dumps(Payload())
    (copy/'weights.safetensors').write_bytes(data)
    body = json.loads((copy/'bundle.json').read_text())
    body['files'] = {'weights.safetensors': dict(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())}
    body['sha256'] = _digest({k: v for k,v in body.items() if k != 'sha256'})
    (copy/'bundle.json').write_text(json.dumps(body))
    with pytest.raises(BundleError, match='not safetensors'): load_bundle(copy)
    assert not (tmp_path/'it_ran').exists()

def test_version_1_is_refused(tmp_path):
    "As an earlier version of this library wrote it"
    body = dict(format='strip-bundle', version=1, spec=dict(arch='simple_cnn'), weights=dict(file='weights.safetensors', bytes=1, sha256='0'))
    (tmp_path/'bundle.json').write_text(json.dumps({**body, 'sha256': _digest(body)}))
    with pytest.raises(BundleError, match='train again') as e: load_bundle(tmp_path)
    assert str(tmp_path) in str(e.value)


# --- writing ---

def test_written_again_the_bytes_are_the_same(folder, tmp_path):
    "Also over what a killed process left, and with the keys in another order"
    model = load_bundle(folder).model
    spec,files = parts(model)
    first = contents(save_bundle(tmp_path/'b', spec, files))
    for leftover in ('bundle.json', 'weights.safetensors'):
        (tmp_path/'b'/leftover).unlink()
        (tmp_path/'b'/f'.0123abcd-{leftover}').write_bytes(b'half')
        assert contents(save_bundle(tmp_path/'b', dict(reversed(spec.items())), files)) == first
    assert os.listdir(tmp_path) == ['b']                                    # nothing is written beside it

def test_saving_over_a_bundle_replaces_it(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path/'b')
    save_bundle(copy, *parts())
    assert load_bundle(copy).sha256 != load_bundle(folder).sha256

def test_a_folder_of_something_else_is_not_touched(tmp_path):
    (tmp_path/'cohort.csv').write_text('of somebody')
    with pytest.raises(BundleError, match='not replaced'): save_bundle(tmp_path, *parts())
    assert contents(tmp_path) == {'cohort.csv': b'of somebody'}


# --- predicting ---

def test_files_and_cache_give_the_same_predictions(folder, cohort, tmp_path):
    bundle = load_bundle(folder)
    cache = build_cache(cohort, bundle.preprocessing, tmp_path/'cache', workers=1)
    a,b = predict_cohort(bundle, cohort), predict_cohort(bundle, cohort, cache, batch_size=5)
    assert np.allclose(a[['p_CE', 'p_LAA']], b[['p_CE', 'p_LAA']], atol=1e-6)
    assert list(a.split) == list(cohort.split)

def test_the_preprocessing_travels(folder, tmp_path):
    "The same weights with another preprocessing predict something else: it is the bundle's that is used"
    image = np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)
    bundle = load_bundle(folder)
    other = load_bundle(derive_bundle(bundle, tmp_path/'o', preprocessing=Preprocessing(size=64, clahe=0.)))
    assert not np.allclose(bundle.predict([image]), other.predict([image]), atol=1e-6)
    pixels = bundle.preprocessing.pixels(image)/255                         # by hand, with the numbers of ImageNet
    x = torch.tensor((pixels - [.485, .456, .406])/[.229, .224, .225], dtype=torch.float32).permute(2, 0, 1)[None]
    with torch.inference_mode(): assert np.allclose(bundle.model(x).softmax(1).numpy(), bundle.predict([image]), atol=1e-5)

def test_a_derived_temperature_is_used_everywhere(folder, cohort, tmp_path):
    "By `predict` and by the table that every evaluation reads; the parent is as it was"
    before = contents(folder)
    bundle = load_bundle(folder)
    warm = load_bundle(derive_bundle(bundle, tmp_path/'warm', calibration=dict(temperature=2.)))
    assert warm.parent == bundle.sha256 and warm.temperature == 2 and contents(folder) == before
    images = [read_image(p) for p in cohort.path[:5]]
    expected = class_probabilities(bundle.logits(np.stack([bundle.preprocessing.pixels(i) for i in images])), 2.)
    np.testing.assert_allclose(warm.predict(images), expected, atol=1e-6)
    assert not np.allclose(warm.predict(images), bundle.predict(images), atol=1e-6)
    np.testing.assert_allclose(predict_cohort(warm, cohort[:5])[['p_CE', 'p_LAA']], expected, atol=1e-6)

def pixels_or_end(preprocessing, item):
    "What a decoder does that a corrupt file takes down with it"
    if item[0].endswith('ends.png'): os.abort()
    return real_pixels(preprocessing, item)

def test_a_file_that_ends_its_decoder_is_an_error_of_the_prediction(folder, cohort, tmp_path, monkeypatch):
    "It is read in a worker, from the first file on; the process that predicts lives, and predicts the others"
    shutil.copy(cohort.path[0], tmp_path/'ends.png')
    monkeypatch.setattr('strip_notebooks.bundle.read_pixels', pixels_or_end)
    bundle, some = load_bundle(folder), cohort[:3].reset_index(drop=True)
    with pytest.raises(ImageError, match='ends.png') as caught: predict_cohort(bundle, some.assign(path=[str(tmp_path/'ends.png'), *some.path[1:]]))
    assert caught.value.reason == 'crashed'
    assert len(predict_cohort(bundle, some)) == 3

def test_bytes_of_a_request_are_predicted_without_a_label(folder, cohort):
    "What a server does: bytes in, probabilities out; the name is only for messages"
    bundle = load_bundle(folder)
    data = open(cohort.path[0], 'rb').read()
    p = bundle.predict([read_image(data, name='request')])
    np.testing.assert_allclose(p, predict_cohort(bundle, cohort[:1])[['p_CE', 'p_LAA']], atol=1e-6)


# --- a runtime without torch ---

numpy_runtime = '''
import io, sys
import numpy as np
from strip_notebooks.bundle import derive_bundle, load_bundle, predict_cohort, register_runtime, save_bundle
from strip_notebooks.data.cohort import check_cohort
from strip_notebooks.data.preprocess import Preprocessing
import pandas as pd

class Linear:
    "Logits from the mean color"
    def __init__(self, spec, files, device, threads=None): self.weights = np.load(io.BytesIO(files['weights.npy']))
    def batch(self, pixels): return pixels.mean((1, 2))/255
    def logits(self, batch): return (batch @ self.weights).astype(np.float32)

register_runtime('numpy', Linear)
if __name__ == '__main__':
    folder, image = sys.argv[1:]
    out = io.BytesIO(); np.save(out, np.arange(6.).reshape(3, 2))
    spec = dict(classes=['CE', 'LAA'], positive='LAA', preprocessing=Preprocessing(size=16), prior=None, threshold=.5)
    bundle = load_bundle(save_bundle(folder + '/b', spec, {'weights.npy': out.getvalue()}, runtime='numpy'))
    bundle = load_bundle(derive_bundle(bundle, folder + '/c', calibration=dict(temperature=2.)))
    cohort = check_cohort(pd.DataFrame(dict(image_id=['a'], patient_id=['1'], center_id=[''], path=[image])), labeled=False)
    table = predict_cohort(bundle, cohort)
    print(table.p_LAA[0], bundle.predict([np.full((9, 7, 3), 255, np.uint8)])[0, 1])
    assert not [m for m in sys.modules if m.split('.')[0] in ('torch', 'timm', 'torchvision')], 'torch was imported'
'''

def test_a_bundle_of_another_runtime_imports_no_torch(tmp_path):
    "Reading, deriving and predicting in a fresh process, from an unlabeled cohort"
    from PIL import Image
    Image.new('RGB', (20, 30), (255, 255, 255)).save(tmp_path/'white.png')
    script = tmp_path/'script.py'
    script.write_text(numpy_runtime)
    done = subprocess.run([sys.executable, script, tmp_path, tmp_path/'white.png'], capture_output=True, text=True, env={**os.environ, 'STRIP_PROGRESS': 'none'})
    assert done.returncode == 0, done.stderr
    expected = 1/(1 + np.exp(-(1 + 3 + 5 - 0 - 2 - 4)/2))                   # white is 1 in each channel, the temperature 2
    np.testing.assert_allclose([float(v) for v in done.stdout.split()], expected, rtol=1e-6)


# --- hooks and gradients ---

def test_a_heat_map_through_hooks_is_where_the_network_looked(folder):
    "The gradient of a logit with respect to any layer, through `bundle.batch`; here Grad-CAM on the last block (Selvaraju et al. 2017)"
    bundle = load_bundle(folder)
    kept = {}
    layer = bundle.model.blocks
    hooks = [layer.register_forward_hook(lambda m, i, o: kept.update(features=o)),
             layer.register_full_backward_hook(lambda m, i, o: kept.update(gradients=o[0]))]
    pixels = np.random.default_rng(0).integers(0, 256, (1, 64, 64, 3), dtype=np.uint8)
    bundle.model(bundle.batch(pixels))[0, 1].backward()
    for h in hooks: h.remove()
    assert kept['features'].shape == kept['gradients'].shape and kept['gradients'].abs().sum() > 0
    weights = bundle.model.head.weight[1]/kept['features'][0, 0].numel()    # known: a linear head on the mean over the image
    torch.testing.assert_close(kept['gradients'][0], weights.detach()[:, None, None].expand_as(kept['gradients'][0]), atol=1e-6, rtol=1e-4)
