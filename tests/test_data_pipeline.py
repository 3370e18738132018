"From pictures on disk to batches: a cache that survives being killed, and batches that depend on nothing but their seeds"
import json, os, signal, subprocess, sys
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from strip_notebooks.audit import audit_leakage
from strip_notebooks.core import read_json
from strip_notebooks.data.augment import policy, policy_names
from strip_notebooks.data.cache import Cache, build_cache, contact_sheet
from strip_notebooks.data.checks import validate
from strip_notebooks.data.cohort import load_cohort, save_cohort
from strip_notebooks.data.formats import write_image
from strip_notebooks.data.images import Reading
from strip_notebooks.data.loading import CohortImages, make_loader
from strip_notebooks.data.measure import measure_images, quarantine
from strip_notebooks.data.preprocess import Preprocessing, PreprocessError
from strip_notebooks.splits import split_patients

SETTINGS = Preprocessing(size=48)


def draw(folder, n, side=90, seed=0):
    "A cohort of `n` pictures, each of a patient"
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(n): write_image(folder/f'{i:03d}.png', rng.integers(0, 256, (side, side + i % 7, 3), dtype=np.uint8))
    return pd.DataFrame(dict(image_id=[f'{i:03d}' for i in range(n)], patient_id=[f'p{i}' for i in range(n)], label=['LAA' if i % 4 == 0 else 'CE' for i in range(n)],
                             center_id='1', path=[str(folder/f'{i:03d}.png') for i in range(n)]))


@pytest.fixture(scope='module')
def cohort(tmp_path_factory): return draw(tmp_path_factory.mktemp('pictures'), 24)


@pytest.fixture(scope='module')
def cache(cohort, tmp_path_factory): return build_cache(cohort, SETTINGS, tmp_path_factory.mktemp('cache'), workers=1)


# What a builder of a cache does: after some rows it says so and waits for a line, or kills itself before or after the line of a row.
BUILD = """
import os, signal, sys
import strip_notebooks.data.cache as c
from strip_notebooks.data.cohort import load_cohort
from strip_notebooks.data.preprocess import Preprocessing
folder, at, what = sys.argv[1], int(sys.argv[2]), sys.argv[3]
write = c._write_row
def watched(build, files, row, found):
    if what == 'before' and row == at:                                      # pixels without a line, and half a line
        files[0][row] = 7; files[1].write(b'{"row": 9, "rea'); files[1].flush(); os.kill(os.getpid(), signal.SIGKILL)
    write(build, files, row, found)
    if what == 'after' and row == at: os.kill(os.getpid(), signal.SIGKILL)
    if what == 'wait' and row == at: print('waiting at a row', flush=True); sys.stdin.readline()
c._write_row = watched
print(c.build_cache(load_cohort(folder + '/cohort.csv'), Preprocessing(size=48, stain='macenko'), folder + '/cache', workers=1).images.mean())
"""
STAINED = Preprocessing(size=48, stain='macenko')


def start(code, *arguments, **kwargs):
    return subprocess.Popen([sys.executable, '-c', code, *map(str, arguments)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kwargs)


@pytest.mark.parametrize('kill', ['before', 'after'])
def test_a_killed_build_resumes(tmp_path, kill):
    cohort = draw(tmp_path/'pictures', 20)
    save_cohort(tmp_path/'cohort.csv', cohort)
    child = start(BUILD, tmp_path, 7, kill)
    assert child.communicate(timeout=120) and child.returncode == -signal.SIGKILL
    (folder,) = (tmp_path/'cache').iterdir()
    assert not (folder/'index.json').exists()
    done = 7 if kill == 'before' else 8
    assert (folder/'measures.jsonl').read_bytes().count(b'\n') == done and (folder/'measures.jsonl').stat().st_mode & 0o777 == 0o600
    images = np.load(folder/'images.npy', mmap_mode='r+')
    kept = images[3].copy()
    images[3] = 255 - kept; images.flush(); del images                      # a mark: a row that is done is not done again
    resumed = build_cache(cohort, STAINED, tmp_path/'cache', workers=1)
    whole = build_cache(cohort, STAINED, tmp_path/'other', workers=1)
    np.testing.assert_array_equal(resumed.images[3], 255 - kept)
    rest = np.arange(20) != 3
    np.testing.assert_array_equal(resumed.images[rest], whole.images[rest])
    pd.testing.assert_frame_equal(resumed.measures, whole.measures)
    assert resumed.decodes == 20 and list((tmp_path/'cache').iterdir()) == [folder]


@pytest.mark.parametrize('kill', [False, True])
def test_processes_that_build_the_same_cache_at_once(tmp_path, kill):
    "One builds, held at its sixth row until the two others have said that they wait; then it goes on or is killed"
    cohort = draw(tmp_path/'pictures', 20)
    save_cohort(tmp_path/'cohort.csv', cohort)
    first = start(BUILD, tmp_path, 5, 'wait')
    assert first.stdout.readline() == 'waiting at a row\n'
    others = [start(BUILD, tmp_path, -1, '') for _ in range(2)]
    for b in others: assert 'waiting for it' in b.stdout.readline()
    if kill: first.kill(); first.communicate()
    builders = others if kill else [first, *others]
    answers = [b.communicate('\n', timeout=120) for b in builders]
    assert not any(b.returncode for b in builders), answers
    whole = build_cache(cohort, STAINED, tmp_path/'alone', workers=1)
    built = build_cache(cohort, STAINED, tmp_path/'cache', workers=1)
    np.testing.assert_array_equal(built.images, whole.images)
    assert {a.split()[-1] for a,_ in answers} == {str(whole.images.mean())}
    assert built.decodes == 20                                              # nothing was done twice


WRITE = """
import os, signal, sys
from pathlib import Path
from strip_notebooks.core import write_json
def die(*a, **k): os.kill(os.getpid(), signal.SIGKILL)
def half(self, text, **k):
    with open(self, 'w') as f: f.write(text[:len(text)//2]); f.flush(); die()
write_json(sys.argv[1] + '/a.json', dict(a=[1]*50_000))
if sys.argv[2] == 'write': Path.write_text = half
else: setattr(os, sys.argv[2], die)
write_json(sys.argv[1] + '/a.json', dict(a=[2]*50_000))
"""


@pytest.mark.parametrize('at', ['write', 'fsync', 'replace'])
def test_a_file_is_whole_wherever_its_writer_is_killed(tmp_path, at):
    child = start(WRITE, tmp_path, at)
    assert child.communicate(timeout=60) and child.returncode == -signal.SIGKILL
    assert read_json(tmp_path/'a.json') == dict(a=[1]*50_000)


# --- a disk that is full ---

@pytest.fixture
def small_disk(tmp_path):
    "A folder on a file system of 4 MiB"
    folder = tmp_path/'disk'; folder.mkdir()
    mounted = subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=4m', 'tmpfs', folder], capture_output=True)
    if mounted.returncode: pytest.skip('a small file system can be mounted by root only')
    yield folder
    subprocess.run(['umount', '-l', folder], check=True)


FULL = """
import sys
from strip_notebooks.data.cache import build_cache
from strip_notebooks.data.cohort import load_cohort
from strip_notebooks.data.preprocess import Preprocessing, PreprocessError
try: cache = build_cache(load_cohort(sys.argv[1]), Preprocessing(size=int(sys.argv[3])), sys.argv[2], workers=1)
except PreprocessError as e: print(e)
else: print(sorted(set(cache.measures.reason)))
"""


def test_a_full_disk_is_an_error_before_the_first_image(tmp_path, small_disk):
    "24 pictures of 256 pixels need 4.5 MiB; the sparse file of before would be killed by SIGBUS on the way"
    save_cohort(tmp_path/'cohort.csv', draw(tmp_path/'pictures', 24))
    child = start(FULL, tmp_path/'cohort.csv', small_disk, 256)
    printed = child.communicate(timeout=120)
    assert child.returncode == 0 and 'The pixels of 24 images need 4.5 MiB' in printed[0] and 'make room' in printed[0], printed
    assert not [f for f in small_disk.glob('*/*') if f.suffix in ('.npy', '.jsonl', '.json')]


def test_a_disk_that_another_program_fills_is_an_error_and_the_build_resumes(tmp_path, small_disk):
    "Held at its third row, while another file takes what is left: the pixels have their room, what else is written has not"
    cohort = draw(tmp_path/'pictures', 40)
    save_cohort(small_disk/'cohort.csv', cohort)
    builder = start(BUILD, small_disk, 2, 'wait')
    assert builder.stdout.readline() == 'waiting at a row\n'
    with open(small_disk/'filler', 'wb', buffering=0) as f, pytest.raises(OSError):
        while True: f.write(bytes(4096))
    _,error = builder.communicate('\n', timeout=120)
    assert builder.returncode == 1 and 'PreprocessError: The ' in error and 'make room' in error, error
    (small_disk/'filler').unlink()
    resumed = build_cache(cohort, STAINED, small_disk/'cache', workers=1)
    whole = build_cache(cohort, STAINED, tmp_path/'whole', workers=1)
    np.testing.assert_array_equal(resumed.images, whole.images)
    assert resumed.decodes == 40 and not resumed.measures.reason.any()


def test_every_good_image_is_good_whatever_the_room(tmp_path):
    "A limit of the file's size stands for a disk that has no more room, at every number of bytes that matters"
    save_cohort(tmp_path/'cohort.csv', draw(tmp_path/'pictures', 6))
    code = "import resource, sys\nresource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[4]), resource.RLIM_INFINITY))\n" + FULL
    for limit in (0, 100, 2_000, 6*48*48*3 + 100):
        printed = start(code, tmp_path/'cohort.csv', tmp_path/'cache', 48, limit).communicate(timeout=120)
        assert 'make room' in printed[0] and 'Traceback' not in printed[1], (limit, printed)
    cache = build_cache(load_cohort(tmp_path/'cohort.csv'), SETTINGS, tmp_path/'cache', workers=1)
    assert not cache.measures.reason.any() and len(cache.row_of) == 6


# --- the cache and what is in it ---

def test_two_processes_write_what_one_writes(tmp_path):
    cohort = draw(tmp_path/'pictures', 130, side=60)                        # enough that a second process is started
    one,two = (build_cache(cohort, SETTINGS, tmp_path/f'{w}', workers=w) for w in (1, 2))
    np.testing.assert_array_equal(one.images, two.images)
    assert one.folder.name == two.folder.name
    assert (one.folder/'index.json').read_bytes() == (two.folder/'index.json').read_bytes()


def test_the_key_is_content_and_settings(cohort, cache, tmp_path):
    moved = cohort.copy()
    for r,p in enumerate(cohort.path):
        moved.loc[r, 'path'] = str(tmp_path/f'elsewhere{r}.png')
        (tmp_path/f'elsewhere{r}.png').write_bytes(open(p, 'rb').read())
    same = build_cache(moved, SETTINGS, tmp_path/'cache', workers=1)
    assert same.folder.name == cache.folder.name                            # not where the files lie, nor when they were written
    names = {build_cache(moved, replace(SETTINGS, **change), tmp_path/'cache', workers=1).folder.name
             for change in ({}, dict(size=40), dict(fit='crop'), dict(clahe=2.), dict(stain='reinhard'))}
    assert len(names) == 5
    write_image(moved.path[3], np.zeros((60, 60, 3), np.uint8))
    other = build_cache(moved, SETTINGS, tmp_path/'cache', workers=1)
    assert other.folder.name not in names and not other.images[3].any()


def test_bad_files_are_rows_with_a_reason(tmp_path):
    cohort = draw(tmp_path/'pictures', 12)
    whole = open(cohort.path[4], 'rb').read()
    open(cohort.path[4], 'wb').write(whole[:len(whole)//2])
    os.remove(cohort.path[7])
    os.mkfifo(tmp_path/'pipe.png')
    cohort.loc[9, 'path'] = str(tmp_path/'pipe.png')
    cache = build_cache(cohort, SETTINGS, tmp_path/'cache', workers=1)
    assert cache.measures.reason.tolist() == ['corrupt' if r == 4 else 'missing' if r == 7 else 'not_a_file' if r == 9 else '' for r in range(12)]
    assert sorted(cache.row_of) == [i for r,i in enumerate(cohort.image_id) if r not in (4, 7, 9)]
    good,bad = quarantine(cohort, cache.measures)
    assert bad.image_id.tolist() == ['004', '007', '009'] and cache.rows(good.image_id).tolist() == [0, 1, 2, 3, 5, 6, 8, 10, 11]
    with pytest.raises(PreprocessError, match='3 images in the cache cannot be used'): cache.rows(cohort.image_id)
    open(cohort.path[4], 'wb').write(whole)                                 # repaired: another cache
    assert build_cache(cohort, SETTINGS, tmp_path/'cache', workers=1).measures.reason.iloc[4] == ''


def test_after_the_cache_no_file_is_read(tmp_path):
    cohort = draw(tmp_path/'pictures', 40)
    cache = build_cache(cohort, SETTINGS, tmp_path/'cache', workers=1)
    measured = measure_images(cohort)
    pd.testing.assert_frame_equal(cache.measures, measured, check_dtype=False)
    for p in cohort.path: os.remove(p)
    good,bad = quarantine(cohort, cache.measures)
    assert len(good) == 40 and not len(bad) and cache.decodes == 40
    validate(good, cache.measures)
    assert contact_sheet(good, cache, each=2)
    report = audit_leakage(split_patients(good), cache.measures, cache)
    assert len(report.table) > 5


def test_what_failed_for_want_of_time_is_tried_again(tmp_path):
    cohort = draw(tmp_path/'pictures', 3)
    cache = build_cache(cohort, SETTINGS, tmp_path/'cache', workers=1)
    lines = (cache.folder/'measures.jsonl').read_text().splitlines()
    (cache.folder/'measures.jsonl').write_text('\n'.join([*lines, json.dumps(dict(row=1, stained=False, reason='timeout', message='', printed=''))]) + '\n')
    assert Cache(cache.folder).measures.reason.tolist() == ['', 'timeout', '']
    again = build_cache(cohort, SETTINGS, tmp_path/'cache', workers=1)
    assert again.measures.reason.tolist() == ['']*3 and again.decodes == 5


def test_which_picture_of_a_file_is_cached(tmp_path):
    import tifffile
    pages = np.stack([np.full((60, 80, 3), v, np.uint8) for v in (10, 100, 200)])
    tifffile.imwrite(tmp_path/'pages.tif', pages, photometric='rgb')
    np.save(tmp_path/'hounsfield.npy', np.full((60, 80), 100., np.float32))
    cohort = pd.DataFrame(dict(image_id=list('abcd'), patient_id=list('abcd'), center_id='1', frame=[0, 2, None, None],
                               path=[str(tmp_path/'pages.tif')]*3 + [str(tmp_path/'hounsfield.npy')]))
    def build(**reading): return build_cache(cohort, Preprocessing(48, reading=Reading(**reading)), tmp_path/'cache', workers=1)
    plain = build()
    assert [plain.images[r].mean() for r in (0, 1, 2)] == [10, 200, 10] and plain.measures.reason.tolist() == ['', '', '', 'range']
    second = build(frame=1)
    assert [second.images[r].mean() for r in (0, 1, 2)] == [10, 200, 100] and second.folder != plain.folder
    window = build(window=(0, 200))
    assert abs(window.images[3].mean() - 127.5) < 1 and window.measures.reason.iloc[3] == ''
    assert Cache(window.folder).preprocessing.reading == Reading(window=(0, 200))
    assert build_cache(cohort.assign(frame=[0, 2, 0, None]), Preprocessing(48), tmp_path/'cache', workers=1).folder != plain.folder


@pytest.mark.parametrize('fit', ['pad', 'crop'])
@pytest.mark.parametrize('height,width', [(1500, 4000), (3000, 700)])
def test_a_map_finds_its_place_on_the_original(fit, height, width):
    image = np.zeros((height, width, 3), np.uint8)
    y,x = height//2 - 40, width//2 + 60
    image[y:y+200, x:x+160] = 255
    settings = Preprocessing(size=256, fit=fit)
    back = settings.geometry(height, width).to_original(settings.pixels(image)[..., 0])
    assert back.shape == (height, width)
    found,step = np.argwhere(back > 127), max(height, width)/256
    for side,edge in zip((*found.min(0), *found.max(0)), (y, x, y + 199, x + 159)): assert abs(side - edge) <= step
    coarse = np.zeros((8, 8)); coarse[4, 4] = 1                             # the cell right and below of the middle
    top = np.unravel_index(settings.geometry(height, width).to_original(coarse).argmax(), (height, width))
    side = (max if fit == 'pad' else min)(height, width)
    assert abs(top[0] - (height/2 + side/16)) < side/16 and abs(top[1] - (width/2 + side/16)) < side/16


def test_burned_in_text_stays_out_of_the_contact_sheet(tmp_path):
    import pydicom
    cohort = draw(tmp_path/'pictures', 4)
    for r in range(4):
        path = tmp_path/f'{r}.dcm'
        write_image(path, np.full((60, 60, 3), 10 + r, np.uint8))
        if r in (1, 2):
            ds = pydicom.dcmread(path); ds.BurnedInAnnotation = 'YES'; ds.save_as(path)
        cohort.loc[r, 'path'] = str(path)
    cache = build_cache(cohort, SETTINGS, tmp_path/'cache', workers=1)
    assert cache.measures.burned_in.tolist() == [False, True, True, False]
    def shown(**allow): return {int(i.get_array().max()) for ax in contact_sheet(cohort, cache, 4, **allow).axes for i in ax.images}
    assert shown() == {10, 13} and shown(allow_burned_in=True) == {10, 11, 12, 13}


def test_settings_travel_as_json(cache):
    settings = Preprocessing(size=48, reading=Reading(frame=2, slice='largest', window=(-100, 300), level=1))
    for s in (SETTINGS, settings): assert Preprocessing.from_dict(json.loads(json.dumps(s.to_dict()))) == s
    assert Cache(cache.folder).preprocessing == SETTINGS
    with pytest.raises(PreprocessError): cache.rows(['not here'])


def test_what_is_cached_is_what_serving_sees(cohort, cache):
    from strip_notebooks.data.formats import read_image
    for r in (0, 5, 23): np.testing.assert_array_equal(cache.images[r], SETTINGS.pixels(read_image(cohort.path[r])))


def epoch_of(loader, epoch):
    loader.set_epoch(epoch)
    batches = list(loader)
    return {k: np.concatenate([b[k].numpy() for b in batches]) for k in ('image', 'target', 'row')}


def test_workers_change_nothing_and_epochs_do(cohort, cache):
    def loader(workers, seed=0): return make_loader(CohortImages(cohort, cache, ['CE', 'LAA'], policy('strong', 48), seed), 5, workers=workers, seed=seed)
    alone,helped = loader(0), loader(2)
    runs = {e: epoch_of(alone, e) for e in (0, 1)}
    for e in (1, 0):                                                        # in the other order: nothing hangs on what came before
        for k,v in epoch_of(helped, e).items(): np.testing.assert_array_equal(v, runs[e][k])
    assert (runs[0]['row'] != runs[1]['row']).any() and sorted(runs[0]['row']) == list(range(24))
    images = [r['image'][np.argsort(r['row'])] for r in (runs[0], runs[1], epoch_of(loader(0, 1), 0))]
    for a,b in ((0, 1), (0, 2)): assert sum((images[a][i] != images[b][i]).any() for i in range(24)) >= 22
    np.testing.assert_array_equal(runs[0]['target'], (cohort.label == 'LAA').to_numpy()[runs[0]['row']])


def test_workers_have_seeds_of_their_own(cohort, cache):
    import random
    from strip_notebooks.data.loading import _start_worker
    state,old = random.getstate(), np.random.get_state()
    try:
        def first(seed, worker): _start_worker(seed, worker); return random.random(), np.random.rand()
        drawn = [first(s, w) for s in (0, 1) for w in (0, 1)]
        assert len({v for d in drawn for v in d}) == 8 and first(1, 1) == drawn[3]
    finally: random.setstate(state); np.random.set_state(old)


@pytest.mark.parametrize('name', policy_names)
def test_policies_give_uint8_and_obey_their_seed(cache, name):
    p = policy(name, 48)
    image = np.array(cache.images[0])
    for seed in range(40):
        out = p(image, seed)
        assert out.dtype == np.uint8 and out.shape == image.shape
        np.testing.assert_array_equal(out, policy(name, 48)(image, seed) if seed < 3 else p(image, seed))
    np.testing.assert_array_equal(image, cache.images[0])                   # what was given is left as it was


def test_the_data_modules_import_nothing_heavy():
    code = ("import sys; import strip_notebooks.data.cache, strip_notebooks.data.augment, strip_notebooks.data.loading;"
            "print([m for m in ('torch', 'torchvision', 'albumentations', 'sklearn', 'matplotlib') if m in sys.modules])")
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True, env=dict(os.environ)).stdout.strip() == '[]'

def test_progress_ends_with_all_of_them(tmp_path, monkeypatch, capsys):
    "Reading and preprocessing count the last file, too"
    monkeypatch.setenv('STRIP_PROGRESS', 'lines')
    cohort = draw(tmp_path/'few', 3)
    measure_images(cohort)
    build_cache(cohort, SETTINGS, tmp_path/'cache')
    said = capsys.readouterr().out.splitlines()
    for what in ('reading images', 'fingerprinting files', 'preprocessing'):
        assert [line for line in said if line.startswith(what)][-1].startswith(f'{what}: 3 of 3'), said
