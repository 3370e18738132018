"What every test shares: the repository's root, and no more threads than there are cores for the workers."
import contextlib, fcntl, os, signal, subprocess, sys
from pathlib import Path

import pytest

os.environ.setdefault('NO_ALBUMENTATIONS_UPDATE', '1')
os.environ.setdefault('STRIP_PROGRESS', 'none')
WORKERS = int(os.environ.get('PYTEST_XDIST_WORKER_COUNT', '1'))
if WORKERS > 1: os.environ.setdefault('OMP_NUM_THREADS', str(max(1, (os.cpu_count() or 1)//WORKERS)))  # not in the process that starts them, as they would inherit it
ROOT = Path(__file__).parent.parent

# A shell that starts the tests in the background has them ignore Ctrl-C, and what they start inherits that: tests that press it need it back.
signal.signal(signal.SIGINT, signal.default_int_handler)

LONGEST = ['test_coverage', 'test_studies', 'test_search', 'test_command_line', 'test_runs', 'test_crossval', 'test_docs', 'test_explore', 'test_kills', 'test_baselines']   # then the chapters

@pytest.hookimpl(trylast=True)      # after the slow ones were left out
def pytest_collection_modifyitems(items):
    "Long tests first, divided among the workers by files: in the end only short ones are left, and no worker waits for another"
    def of(name): return [i for i in items if i.path.stem == name]
    files, chapters = [of(name) for name in LONGEST], of('test_notebooks')
    short = [i for i in items if i.path.stem not in [*LONGEST, 'test_notebooks']]
    shares = [[*sum(files[w::WORKERS], []), *chapters[w::WORKERS]] for w in range(WORKERS)]
    for share in shares:                    # xdist gives each worker as many in a row
        count = max(0, len(items)//WORKERS - len(share))
        share += short[:count]
        del short[:count]
    items[:] = sum(shares, short)

@pytest.fixture(autouse=True)
def threads_for_the_next():
    "A test that computes with more threads does not leave them to the next one"
    yield
    if WORKERS > 1 and 'torch' in sys.modules: sys.modules['torch'].set_num_threads(int(os.environ['OMP_NUM_THREADS']))

@pytest.fixture(scope='session')
def root(): return ROOT

@pytest.fixture(scope='session')
def real():
    "The folder of real images beside the repository; a test that wants it is skipped where it is absent"
    folder = ROOT.parent/'shared'/'real'
    if not folder.is_dir(): pytest.skip('there is no folder ../shared/real with real images')
    return folder

@contextlib.contextmanager
def shared_folder(tmp_path_factory, worker_id, name):
    "A folder that all workers share; in the block, no other worker is"
    base = tmp_path_factory.getbasetemp()
    folder = (base if worker_id == 'master' else base.parent)/name
    folder.mkdir(exist_ok=True)
    with open(folder/'lock', 'w') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield folder

CLASSES = ['CE', 'LAA', '<b>other</b>']

def three_classes(folder):
    "Images of three classes, which differ in brightness, with attributes of their patients, and a table of them"
    import numpy as np, pandas as pd
    from strip_notebooks.data.formats import write_image
    rng, rows = np.random.default_rng(0), []
    for patient in range(90):
        brightness = 90 + 50*(patient % 3)
        write_image(folder/f'{patient}.png', rng.normal(brightness, 20, (40, 40, 3)).clip(0, 255).astype(np.uint8))
        rows.append(dict(image_id=f'scan of Doe_Jane_{patient}', patient_id=f'Doe_Jane_{patient}', label=CLASSES[patient % 3], center_id=f'c{patient//3 % 2}',
                         sex='FM'[patient//6 % 2], age=40 + patient//3, path=f'{patient}.png'))
    pd.DataFrame(rows).to_csv(folder/'cohort.csv', index=False)

@pytest.fixture(scope='session')
def three(tmp_path_factory, worker_id):
    "A workspace with a whole demo, studies included, on images of three classes, one with markup in its name; run once for all workers"
    small = ['--data', 'cohort.csv', '--size', '32', '--epochs', '2', '-p', 'evaluate.resamples=200', '-p', 'explain.resamples=200', '-p', 'features.resamples=100',
             '-p', 'features.projection=pca', '-p', 'uncertainty.resamples=200', '-p', 'robustness.resamples=100', '-p', 'robustness.severities=3',
             '-p', 'bias.resamples=200', '-p', 'bias.permutations=500']
    with shared_folder(tmp_path_factory, worker_id, 'three') as folder:
        if not (folder/'said.txt').exists():
            three_classes(folder)
            done = subprocess.run([str(Path(sys.executable).parent/'clot'), 'demo', *small], cwd=folder, capture_output=True, text=True, env={**os.environ, 'OMP_NUM_THREADS': '1'})
            assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
            (folder/'said.txt').write_text(done.stdout)
    return folder
