"From pictures on disk to batches: a cache that survives being killed, and batches that depend on nothing but their seeds"
import json, os, signal, subprocess, sys, time
from dataclasses import asdict

import numpy as np
import pandas as pd
import pytest

from strip_notebooks.core import read_json
from strip_notebooks.data.augment import policy, policy_names
from strip_notebooks.data.formats import ImageError, write_image
from strip_notebooks.data.loading import CohortImages, make_loader
from strip_notebooks.data.preprocess import Cache, Preprocessing, PreprocessError, build_cache

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


def test_a_killed_build_goes_on_where_it_was(tmp_path):
    cohort = draw(tmp_path/'pictures', 60, side=700)
    cohort.to_csv(tmp_path/'cohort.csv', index=False)
    code = ("import sys, pandas as pd; from strip_notebooks.data.preprocess import *;"
            "build_cache(pd.read_csv(sys.argv[1] + '/cohort.csv', dtype=str), Preprocessing(size=48, stain='macenko'), sys.argv[1] + '/cache', workers=1)")
    child = subprocess.Popen([sys.executable, '-c', code, str(tmp_path)], stderr=subprocess.DEVNULL)
    try:
        until = time.monotonic() + 60
        while child.poll() is None and time.monotonic() < until:
            flags = list((tmp_path/'cache').glob('*/done.npy'))
            if flags and (np.load(flags[0]) > 0).sum() >= 5: break
            time.sleep(.002)
    finally:
        child.send_signal(signal.SIGKILL)
        assert child.wait(30) == -signal.SIGKILL, 'the build ended before it could be killed'
    before = np.load(flags[0])
    assert 5 <= (before > 0).sum() < 60 and not (flags[0].parent/'index.json').exists()
    done = before > 0
    images = np.load(flags[0].parent/'images.npy', mmap_mode='r+')
    marked = np.flatnonzero(done)[0]
    kept = images[marked].copy()
    images[marked] = 255 - kept; images.flush(); del images                 # a mark: a row that is done is not done again
    settings = Preprocessing(size=48, stain='macenko')
    resumed = build_cache(cohort, settings, tmp_path/'cache', workers=1)
    whole = build_cache(cohort, settings, tmp_path/'other', workers=1)
    np.testing.assert_array_equal(resumed.images[marked], 255 - kept)
    rest = np.arange(60) != marked
    np.testing.assert_array_equal(resumed.images[rest], whole.images[rest])
    assert len(list((tmp_path/'cache').iterdir())) == 1


BUILD = ("import os, sys, time, pandas as pd; from strip_notebooks.data.preprocess import *\n"
         "print('ready', flush=True)\n"
         "while not os.path.exists(sys.argv[1] + '/go'): time.sleep(.001)\n"
         "print(build_cache(pd.read_csv(sys.argv[1] + '/cohort.csv', dtype=str), Preprocessing(size=224, stain='macenko'), sys.argv[1] + '/cache', workers=1).images.mean())")


def start(code, *arguments, **kwargs): return subprocess.Popen([sys.executable, '-c', code, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kwargs)


def wait_for(condition, seconds=60):
    until = time.monotonic() + seconds
    while not (found := condition()) and time.monotonic() < until: time.sleep(.002)
    return found


@pytest.mark.parametrize('kill', [False, True])
def test_processes_that_build_the_same_cache_at_once(tmp_path, kill):
    cohort = draw(tmp_path/'pictures', 40)
    cohort.to_csv(tmp_path/'cohort.csv', index=False)
    builders = [start(BUILD, tmp_path) for _ in range(3)]
    for b in builders: assert b.stdout.readline() == 'ready\n'
    (tmp_path/'go').touch()
    if kill:                                                                # the one that builds; of those that wait, one goes on
        if not os.path.exists('/proc/self/maps'): pytest.skip('who builds is read from /proc')
        (flags,) = wait_for(lambda: [f for f in (tmp_path/'cache').glob('*/done.npy') if (np.load(f) > 0).sum() > 4])
        (building,) = [b for b in builders if 'images.npy' in open(f'/proc/{b.pid}/maps').read()]
        building.kill(); building.communicate(); builders.remove(building)
        assert not (flags.parent/'index.json').exists(), 'the build ended before it could be killed'
    answers = [b.communicate(timeout=120) for b in builders]
    assert not any(b.returncode for b in builders), answers
    settings = Preprocessing(size=224, stain='macenko')
    whole = build_cache(cohort, settings, tmp_path/'alone', workers=1)
    np.testing.assert_array_equal(build_cache(cohort, settings, tmp_path/'cache', workers=1).images, whole.images)
    assert {a.split()[-1] for a,_ in answers} == {str(whole.images.mean())}
    assert sum('waiting' in a for a,_ in answers) == 2


def test_a_file_that_has_gone_is_named(tmp_path):
    cohort = draw(tmp_path/'pictures', 6)
    for r in (2, 4): os.remove(cohort.path[r])
    with pytest.raises(ImageError, match=r'002.png: 2 of 6 files cannot be opened any more.*quarantine') as caught: build_cache(cohort, SETTINGS, tmp_path/'cache')
    assert caught.value.reason == 'missing' and not (tmp_path/'cache').exists()


def test_a_file_is_whole_whenever_its_writer_is_killed(tmp_path):
    code = ("import sys; from strip_notebooks.core import write_json\n"
            "n = 0\nwhile True: n += 1; write_json(sys.argv[1] + '/a.json', [n]*50_000)")
    seen = []
    for turn in range(3):
        child = start(code, tmp_path)
        assert wait_for(lambda: (tmp_path/'a.json').exists() and read_json(tmp_path/'a.json')[0] > 2*turn)
        time.sleep(.013*turn); child.kill(); child.communicate()
        values = read_json(tmp_path/'a.json')
        assert len(values) == 50_000 and len(set(values)) == 1
        seen.append(values[0])
    assert max(seen) > 2


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
    names = {build_cache(moved, Preprocessing(**(asdict(SETTINGS) | change)), tmp_path/'cache', workers=1).folder.name
             for change in ({}, dict(size=40), dict(fit='crop'), dict(clahe=2.), dict(stain='reinhard'))}
    assert len(names) == 5
    write_image(moved.path[3], np.zeros((60, 60, 3), np.uint8))
    other = build_cache(moved, SETTINGS, tmp_path/'cache', workers=1)
    assert other.folder.name not in names and not other.images[3].any()


def test_a_broken_image_is_named_after_the_others_are_done(tmp_path):
    cohort = draw(tmp_path/'pictures', 12)
    whole = open(cohort.path[4], 'rb').read()
    open(cohort.path[4], 'wb').write(whole[:len(whole)//2])
    with pytest.raises(ImageError) as caught: build_cache(cohort, SETTINGS, tmp_path/'cache', workers=1)
    assert str(caught.value.path) == cohort.path[4] and '004.png' in str(caught.value) and '1 of 12' in str(caught.value)
    done = np.load(next((tmp_path/'cache').glob('*/done.npy')))
    assert [bool(d) for d in done] == [r != 4 for r in range(12)]
    assert not list((tmp_path/'cache').glob('*/index.json'))                # it is not taken for a finished cache


def test_settings_travel_as_json(cache):
    assert Preprocessing(**json.loads(json.dumps(asdict(SETTINGS)))) == SETTINGS
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
    code = ("import sys; import strip_notebooks.data.preprocess, strip_notebooks.data.augment, strip_notebooks.data.loading;"
            "print([m for m in ('torch', 'torchvision', 'albumentations', 'sklearn', 'matplotlib') if m in sys.modules])")
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True, env=dict(os.environ)).stdout.strip() == '[]'
