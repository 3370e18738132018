"The synthetic cohort where it crosses notebooks: processes, interruption, and the readers of images and cohorts."
import os, signal, subprocess, sys, time

import numpy as np
import pytest

from strip_notebooks.data.cohort import cohort_from_folder, read_cohort
from strip_notebooks.data.formats import read_image
from strip_notebooks.data.drawing import artifacts, center_stain, components, draw_style, render_clot
from strip_notebooks.data.synthetic import formats, make_cohort, plan_cohort, read_truth

script = """
import sys
from strip_notebooks.data.synthetic import make_cohort
if __name__ == '__main__': make_cohort(sys.argv[1], 'easy', n_patients=24, size=128, seed=5, workers=2)
"""

@pytest.fixture(scope='module')
def drawn(tmp_path_factory):
    "24 patients drawn in this process"
    folder = tmp_path_factory.mktemp('synthetic')/'alone'
    return folder, make_cohort(folder, 'easy', n_patients=24, size=128, seed=5, workers=1)

def contents(folder): return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob('*')) if p.is_file() and p.name != 'cohort.csv'}

def test_killed_pool_is_completed_to_the_same_bytes(drawn, tmp_path):
    "A pool of spawned processes that was killed in the middle leaves whole files; two calls at once make the rest, once each or twice alike"
    folder, program = tmp_path/'pool', tmp_path/'draw.py'
    program.write_text(script)
    process = subprocess.Popen([sys.executable, program, folder], start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 60
    while not list(folder.glob('images/*/*/P*.png')) and process.poll() is None and time.monotonic() < end: time.sleep(.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    done = {p: p.stat().st_mtime_ns for p in folder.glob('images/*/*/P*.png')}
    assert 0 < len(done) < len(drawn[1])
    both = [subprocess.Popen([sys.executable, program, folder], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) for _ in range(2)]
    assert [p.wait() for p in both] == [0, 0]
    assert all(p.stat().st_mtime_ns == t for p, t in done.items())
    for part in folder.rglob('.*-*'): part.unlink()     # what the killed writer had begun
    assert contents(folder) == contents(drawn[0])

def test_the_cohort_readers_agree(drawn):
    folder, cohort = drawn
    for found in (read_cohort(folder/'cohort.csv'), cohort_from_folder(folder/'images')):
        both = found.merge(cohort, on='path', suffixes=('', '_drawn'))
        assert len(both) == len(found) == len(cohort)
        assert (both.patient_id == both.patient_id_drawn).all() and (both.label == both.label_drawn).all()
        assert both.image_id_drawn.map(lambda i: f'/{i}.png').to_numpy().tolist() == both.path.str.extract(r'(/[^/]+)$')[0].tolist()

@pytest.mark.parametrize('format', [f for f in formats if f != 'png'])
def test_every_format_holds_the_same_pixels(drawn, tmp_path, format):
    png = make_cohort(tmp_path/'png', 'null', n_patients=8, size=64, seed=2, workers=1)
    other = make_cohort(tmp_path/'other', 'null', n_patients=8, size=64, seed=2, format=format, workers=1)
    assert read_truth(tmp_path/'png').equals(read_truth(tmp_path/'other'))
    for a, b in zip(map(read_image, png.path), map(read_image, other.path)):
        if format != 'jpg': np.testing.assert_array_equal(a, b)
        else: assert a.shape == b.shape and 0 < abs(a.astype(int) - b).mean() < 8      # lossy, but the same picture

def test_truth_explains_the_picture(drawn):
    "The red pixels of a picture are as many as the red cells on its truth map"
    folder, cohort = drawn
    truth = read_truth(folder)
    assert list(truth.image_id) == list(cohort.image_id)
    np.testing.assert_allclose(truth[list(components)].sum(axis=1), 1)
    red = [np.mean(i[..., 2] < .75*i[..., 0]) for i in map(read_image, cohort.path)]
    assert np.corrcoef(red, truth.red_cells*truth.tissue)[0, 1] > .9

middle_blocks = dict(    # mean red, green and blue of the four middle blocks of 4 x 4, of pictures of version 1 of the generator
    none   = [215.1, 154.2, 191.1, 211.6, 152.8, 188.9, 204.5, 146.1, 183.7, 200.2, 144.6, 182.0],
    pen    = [199.5, 154.8, 165.5, 214.6, 150.5, 162.1, 183.7, 141.1, 157.7, 185.2, 123.9, 133.7],
    fold   = [209.1, 131.5, 161.7, 212.8, 143.4, 172.2, 203.2, 127.4, 157.1, 213.3, 131.5, 155.4],
    bubble = [213.8, 149.0, 169.8, 213.8, 182.0, 200.6, 218.2, 182.1, 203.4, 211.0, 137.1, 150.8],
    blur   = [211.3, 145.1, 175.0, 199.0, 136.2, 167.3, 202.4, 140.4, 173.2, 203.0, 136.0, 167.6])

@pytest.mark.parametrize('seed, artifact', enumerate(middle_blocks))
def test_a_version_of_the_generator_draws_the_same_pictures(seed, artifact):
    "A change that draws other pictures needs another `generator_version`, or cohorts of two kinds share a folder"
    style = draw_style(np.random.default_rng(seed))
    picture, _ = render_clot([.4, .25, .3, .05], style, center_stain(seed + 1), 128, seed=seed, artifact=artifact)
    blocks = picture.reshape(4, 32, 4, 32, 3).mean((1, 3))[1:3, 1:3]
    np.testing.assert_allclose(blocks.ravel(), middle_blocks[artifact], atol=.3)      # another machine may round a pixel differently

def test_tiff_is_tiled(tmp_path):
    import tifffile
    cohort = make_cohort(tmp_path/'tif', 'easy', n_patients=8, size=160, format='tif', workers=1)
    with tifffile.TiffFile(cohort.path[0]) as tiff: assert tiff.pages[0].is_tiled and tiff.pages[0].shape == (160, 160, 3)

@pytest.mark.parametrize('preset', ['null', 'confounded'])
def test_nothing_in_the_plan_tells_the_label_but_the_center_of_confounded(preset):
    "Order, number of images, attributes, artifact, composition and size, each alone: an AUC within four standard errors of one half"
    plan = plan_cohort(preset, 20_000, 512, seed=3)
    patients = plan.groupby('patient_id', sort=False).agg(
        label=('label', 'first'), center=('center_id', 'first'), images=('label', 'size'), size=('size', 'first'), age=('age', 'first'),
        sex=('sex', 'first'), scanner=('scanner', 'first'), **{c: (c, 'mean') for c in components})
    laa = (patients.label == 'LAA').to_numpy()
    scores = dict(order=np.arange(len(patients)), images=patients.images, size=patients['size'], age=patients.age, sex=patients.sex == 'F',
                  **{f'scanner {s}': patients.scanner == s for s in 'ABC'},
                  **{f'center {c}': patients.center == str(c) for c in range(1, 12)},
                  **{a: plan.artifact.eq(a).groupby(plan.patient_id, sort=False).mean() for a in artifacts}, **{c: patients[c] for c in components})
    from sklearn.metrics import roc_auc_score
    found = {k: abs(roc_auc_score(laa, s) - .5) > 4*np.sqrt(len(laa)/12/laa.sum()/(~laa).sum()) for k, s in scores.items()}
    telling = {k.split()[0] for k, told in found.items() if told}
    assert telling == ({'center', 'size'} if preset == 'confounded' else set())

def test_attributes_came_without_changing_a_plan():
    "The first patients of a plan, as they were drawn before patients had age, sex and scanner"
    plan = plan_cohort('easy', 120, 128, 3)
    assert plan.center_id.head(12).tolist() == ['11', '7', '3', '11', '11', '11', '11', '11', '11', '4', '6', '11']
    assert plan.artifact.head(12).tolist() == ['none', 'none', 'none', 'none', 'none', 'none', 'none', 'none', 'pen', 'none', 'none', 'none']
    np.testing.assert_allclose(plan.red_cells.head(4), [0.235484, 0.423495, 0.414676, 0.696322], atol=1e-6)

def test_the_group_without_signal_has_none():
    "In `unequal` the true composition, known exactly, ranks men near the bound of `easy` and women at chance"
    from sklearn.metrics import roc_auc_score
    plan = plan_cohort('unequal', 6000, 512, seed=4).drop_duplicates('patient_id')
    for sex, low, high in (('F', .47, .53), ('M', .9, 1)):
        some = plan[plan.sex == sex]
        assert low < roc_auc_score(some.label == 'LAA', some.red_cells - some.platelets) < high
