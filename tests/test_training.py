"A training that is really killed, at many moments, ends with the bits of one that was not."
import multiprocessing, os, random, signal, time
from pathlib import Path

import pytest

from strip_notebooks.core import file_hash

# Processes are forked from a server that has imported everything and computed nothing, so that a start takes no time.
context = multiprocessing.get_context('forkserver')
context.set_forkserver_preload(['strip_notebooks.training.loop', 'strip_notebooks.splits', 'strip_notebooks.data.synthetic', 'lightning_fabric', 'timm', 'torch.utils.tensorboard', 'albumentations', 'cv2'])

settings = dict(arch='simple_cnn', epochs=4, batch_size=8, policy='light', lr=2e-3, dropout=.2, ema=.9, mixup=.2, label_smoothing=.1, accumulate=2, balance='class')

def run(cohort_folder, folder, die=None, threads=1, **more):
    "Train in a process of its own; with `die` = (function, nth call, before or after) it kills itself at that call of the os module"
    import torch
    from strip_notebooks.data.cache import build_cache
    from strip_notebooks.data.preprocess import Preprocessing
    from strip_notebooks.data.synthetic import make_cohort
    from strip_notebooks.splits import split_patients
    from strip_notebooks.training.loop import make_config, train
    torch.set_num_threads(threads)
    cohort = split_patients(make_cohort(cohort_folder, 'easy', n_patients=32, size=128, seed=3, workers=1), (.5, .25, .25))
    preprocessing = Preprocessing(size=48)
    cache = build_cache(cohort, preprocessing, Path(cohort_folder)/'cache', workers=1)
    if die: kill_at(*die)
    train(cohort, cache, preprocessing, make_config(**{**settings, **more}), folder)

def kill_at(name, nth, when):
    "Send this process SIGKILL at the nth call of os.`name`"
    real,calls = getattr(os, name),[0]
    def deadly(*args, **kwargs):
        calls[0] += 1
        if calls[0] == nth and when == 'before': os.kill(os.getpid(), signal.SIGKILL)
        out = real(*args, **kwargs)
        if calls[0] == nth and when == 'after': os.kill(os.getpid(), signal.SIGKILL)
        return out
    setattr(os, name, deadly)

def start(*args, **kwargs):
    process = context.Process(target=run, args=args, kwargs=kwargs)
    process.start()
    return process

def finish(*args, **kwargs):
    process = start(*args, **kwargs)
    process.join(120)
    return process.exitcode

def weights(folder): return [file_hash(Path(folder)/n) for n in ('best.safetensors', 'bundle/weights.safetensors', 'predictions.csv')]

def states(folder):
    from strip_notebooks.training.loop import read_state
    tensors,about = read_state(Path(folder)/'last.safetensors')
    return {k: v.numpy().tobytes() for k,v in tensors.items()},[{k: v for k,v in row.items() if k != 'seconds'} for row in about['history']]

@pytest.fixture(scope='module')
def reference(tmp_path_factory):
    "The folder of a cohort, the folder of a training that nothing disturbed, and how long it took"
    cohort,folder = tmp_path_factory.mktemp('cohort'),tmp_path_factory.mktemp('whole')/'training'
    assert finish(cohort, tmp_path_factory.mktemp('first')/'training', epochs=1) == 0      # makes cohort and cache
    began = time.monotonic()
    assert finish(cohort, folder) == 0
    return cohort,folder,time.monotonic()-began

def assert_same(folder, reference):
    assert weights(folder) == weights(reference[1])
    assert states(folder) == states(reference[1])

def test_killed_at_random_moments(reference, tmp_path):
    cohort,_,seconds = reference
    kills = 0
    while kills < 6:
        process = start(cohort, tmp_path/'training')
        process.join(random.uniform(.05, .6)*seconds)
        if process.exitcode is not None: break      # it got through between two kills
        process.kill(); process.join(); kills += 1
        assert process.exitcode == -signal.SIGKILL
    assert kills
    assert finish(cohort, tmp_path/'training') == 0
    assert_same(tmp_path/'training', reference)

def test_killed_while_a_checkpoint_is_written(reference, tmp_path):
    "The process is killed as soon as the unfinished file is seen, three times"
    cohort,folder = reference[0],tmp_path/'training'
    for _ in range(3):
        seen,process = False,start(cohort, folder)
        while process.is_alive() and not seen: seen = folder.is_dir() and any(n.startswith('.') and n.endswith('-last.safetensors') for n in os.listdir(folder))
        process.kill(); process.join()
        assert seen or process.exitcode == 0
    assert finish(cohort, folder) == 0
    assert not list(folder.glob('.*'))
    assert_same(folder, reference)

@pytest.mark.parametrize('die', [('fsync', 2, 'before'), ('replace', 3, 'before'), ('replace', 3, 'after'), ('replace', 4, 'after'), ('replace', 9, 'before')], ids=lambda d: '-'.join(map(str, d)))
def test_killed_at_a_call(reference, tmp_path, die):
    "Before the file is on disk, before it takes its place, after it has, and while the bundle is written"
    assert finish(reference[0], tmp_path/'training', die=die) in (-signal.SIGKILL, 0)
    assert finish(reference[0], tmp_path/'training') == 0
    assert_same(tmp_path/'training', reference)

def test_another_number_of_threads_changes_nothing(reference, tmp_path):
    "Killed after the second checkpoint, and gone on with where torch would take two threads instead of one"
    folder = tmp_path/'training'
    assert finish(reference[0], folder, die=('replace', 4, 'after')) == -signal.SIGKILL
    assert (folder/'last.safetensors').exists()
    assert finish(reference[0], folder, threads=2) == 0
    assert_same(folder, reference)

def test_workers_change_nothing(reference, tmp_path):
    assert finish(reference[0], tmp_path/'training', workers=1) == 0
    assert_same(tmp_path/'training', reference)

def test_a_constant_model_is_never_better():
    import numpy as np, pandas as pd
    from strip_notebooks.predictions import make_predictions
    from strip_notebooks.training.loop import patient_scores
    n = 100
    cohort = pd.DataFrame(dict(image_id=[f'i{i}' for i in range(n)], patient_id=[f'p{i}' for i in range(n)], center_id='1', path='', label=['LAA']*28 + ['CE']*72))
    def scores(p): return patient_scores(make_predictions(cohort, np.stack([1-p, p], 1), ['CE', 'LAA'], split='val'), ['CE', 'LAA'], [.72, .28])
    constant,weak = scores(np.full(n, .28)),scores(np.r_[np.full(28, .32), np.full(72, .27)])     # the weak one never says LAA either
    assert weak['weighted_log_loss'] < constant['weighted_log_loss'] and weak['auc'] > constant['auc']
    assert scores(np.full(n, .01))['weighted_log_loss'] > constant['weighted_log_loss']           # always CE, and sure of it

def test_the_live_curve_is_one_picture_in_jupyter(monkeypatch):
    "Redrawn in place, and not shown again when the cell ends"
    from nbclient import NotebookClient
    from nbformat.v4 import new_code_cell, new_notebook
    monkeypatch.delenv('STRIP_PROGRESS', raising=False)
    rows = [dict(epoch=e, train_loss=.7/e, weighted_log_loss=.7, auc=.6, lr=.1, seconds=1.) for e in (1, 2, 3)]
    code = f"""import pandas as pd
from strip_notebooks.training.loop import LiveCurve
live = LiveCurve(3)
for n in (1, 2, 3): live(pd.DataFrame({rows}[:n]))"""
    notebook = new_notebook(cells=[new_code_cell(code)])
    NotebookClient(notebook, kernel_name='python3').execute()
    assert [list(o.data) for o in notebook.cells[0].outputs] == [['text/plain', 'image/png']]
