"The synthetic cohort where it crosses notebooks: processes, interruption, and the readers of images and cohorts."
import os, signal, subprocess, sys, time

import numpy as np
import pytest

from strip_notebooks.data.cohort import cohort_from_folder, read_cohort
from strip_notebooks.data.formats import read_image
from strip_notebooks.data.synthetic import components, formats, make_cohort, read_truth

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
    "A pool of spawned processes that was killed in the middle leaves whole files, and a second call makes the rest"
    folder, program = tmp_path/'pool', tmp_path/'draw.py'
    program.write_text(script)
    process = subprocess.Popen([sys.executable, program, folder], start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 60
    while not list(folder.glob('images/*/*/P*.png')) and process.poll() is None and time.monotonic() < end: time.sleep(.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    done = {p: p.stat().st_mtime_ns for p in folder.glob('images/*/*/P*.png')}
    assert 0 < len(done) < len(drawn[1])
    subprocess.run([sys.executable, program, folder], check=True, capture_output=True)
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

@pytest.mark.parametrize('format', [f for f in formats if f not in ('png', 'jpg')])
def test_every_lossless_format_holds_the_same_pixels(drawn, tmp_path, format):
    png = make_cohort(tmp_path/'png', 'null', n_patients=8, size=64, seed=2, workers=1)
    other = make_cohort(tmp_path/'other', 'null', n_patients=8, size=64, seed=2, format=format, workers=1)
    for a, b in zip(png.path, other.path): np.testing.assert_array_equal(read_image(a), read_image(b))

def test_truth_explains_the_picture(drawn):
    "The red pixels of a picture are as many as the red cells on its truth map"
    folder, cohort = drawn
    truth = read_truth(folder)
    assert list(truth.image_id) == list(cohort.image_id)
    np.testing.assert_allclose(truth[list(components)].sum(axis=1), 1)
    red = [np.mean(i[..., 2] < .75*i[..., 0]) for i in map(read_image, cohort.path)]
    assert np.corrcoef(red, truth.red_cells*truth.tissue)[0, 1] > .9
