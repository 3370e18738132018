"""Every library notebook and every guide runs from top to bottom, in a fresh namespace

Experiments are run by the tests of the command line, explorers by test_explore.py, in a workspace of their own."""
import os, tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
from nbdev.config import get_config
from nbdev.doclinks import nbglob
from nbdev.test import test_nb as run_notebook

root = Path(__file__).resolve().parents[1]
notebooks = sorted(p.resolve() for p in nbglob(root/'nbs', as_path=True) if not {'experiments', 'explore'} & set(p.parts))
def name(path): return path.relative_to(root/'nbs').as_posix()

@pytest.fixture(autouse=True)
def left_as_found(monkeypatch):
    "What a notebook sets in its process is not passed on to the next one, and its folder goes"
    before, here, scratch = dict(os.environ), Path.cwd(), []
    class Recorded(tempfile.TemporaryDirectory):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            scratch.append(self)
    monkeypatch.setattr(tempfile, 'TemporaryDirectory', Recorded)
    monkeypatch.chdir(root)
    yield
    for folder in scratch: folder.cleanup()     # no kernel ends here
    plt.close('all')
    os.environ.clear(); os.environ.update(before); os.chdir(here)

@pytest.mark.parametrize('path', notebooks, ids=name)
def test_notebook_runs(path):
    passed, seconds = run_notebook(path, skip_flags=get_config(path=root).tst_flags.split(), basepath=root)
    assert passed, f'{name(path)} stopped at an error, which is shown on standard error'

def test_an_error_in_a_notebook_is_seen(tmp_path):
    import nbformat
    cells = [nbformat.v4.new_code_cell('value = 1'), nbformat.v4.new_code_cell('assert value == 2')]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path/'wrong.ipynb')
    passed, seconds = run_notebook(tmp_path/'wrong.ipynb', skip_flags=[], basepath=root)
    assert not passed
