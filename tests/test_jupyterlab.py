"""JupyterLab in a real browser opens a notebook and runs it top to bottom.

One notebook stands for all in the daily run; `STRIP_LAB_NOTEBOOKS=all pytest -n 0 tests/test_jupyterlab.py` opens every one,
and `STRIP_LAB_NOTEBOOKS=nbs/guides/quickstart.ipynb,...` those that it names. `STRIP_LAB_PICTURES=FOLDER` keeps a picture of each.
"""
import os, shutil, socket, subprocess, sys, threading
from pathlib import Path

import pytest

from conftest import ROOT

CHROMIUM = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')
EVERY = sorted(p.relative_to(ROOT).as_posix() for p in (ROOT/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts)
# the steps come last, in the order in which they build on each other
ORDER = ['prepare', 'pretrain', 'train', 'search_trial', 'crossval', 'derive', 'evaluate', 'explain', 'features', 'uncertainty', 'robustness', 'bias', 'optimize',
         'report', 'benchmark']
NEEDS_A_FILE = ['nbs/experiments/evaluate_table.ipynb']       # a table of someone else's predictions
EVERY = [n for n in EVERY if n not in NEEDS_A_FILE]
STEPS = sorted((n for n in EVERY if '/experiments/' in n), key=lambda n: ORDER.index(Path(n).stem))
ASKED = os.environ.get('STRIP_LAB_NOTEBOOKS', 'nbs/000_core.ipynb')
NOTEBOOKS = [n for n in EVERY if n not in STEPS] + STEPS if ASKED == 'all' else ASKED.split(',')
STATE = """() => {
    const panel = window.jupyterapp.shell.currentWidget
    const cells = [...panel.content.model.cells].map(c => c.toJSON()).filter(c => c.cell_type === 'code' && String(c.source).trim())
    return {all: cells.length, run: cells.filter(c => c.execution_count).length, status: panel.sessionContext.kernelDisplayStatus,
            errors: cells.flatMap(c => c.outputs).filter(o => o.output_type === 'error').map(o => o.ename + ': ' + o.evalue)}
}"""
FINISHED = f"() => {{ const s = ({STATE})(); return s.errors.length > 0 || s.run === s.all && s.status === 'idle' }}"
OPENED = ("() => window.jupyterapp?.shell?.currentWidget?.content?.model?.cells?.length > 0"
          " && window.jupyterapp.shell.currentWidget.sessionContext?.session?.kernel")

@pytest.fixture(scope='module')
def lab(tmp_path_factory):
    "A JupyterLab on the loopback, over a copy of the notebooks; gives its address and token"
    if not CHROMIUM: pytest.skip('there is no Chromium on this machine')
    folder = tmp_path_factory.mktemp('lab')
    shutil.copytree(ROOT/'nbs', folder/'nbs', ignore=shutil.ignore_patterns('.ipynb_checkpoints'))
    for name in ('settings.ini', 'README.md', 'setup.py', 'pyproject.toml', '_quarto.yml'):
        if (ROOT/name).exists(): shutil.copy(ROOT/name, folder)
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); port = s.getsockname()[1]
    options = ['--allow-root', '--no-browser', f'--ServerApp.root_dir={folder}', '--ip=127.0.0.1', f'--port={port}', '--ServerApp.port_retries=0',
               '--IdentityProvider.token=t0ken', '--LabApp.expose_app_in_browser=True']
    env = {**os.environ, 'JUPYTER_CONFIG_DIR': str(folder/'.config'), 'JUPYTER_DATA_DIR': str(folder/'.data')}
    server = subprocess.Popen([sys.executable, '-m', 'jupyter', 'lab', *options], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=folder, env=env)
    try:
        said = ''
        for line in server.stderr:
            said += line
            if 'is running at' in line: break
        else: pytest.fail(f'JupyterLab did not start:\n{said}')
        threading.Thread(target=lambda: [None for _ in server.stderr], daemon=True).start()       # a full pipe would stop the server
        yield f'http://127.0.0.1:{port}'
    finally:
        server.terminate()
        server.wait(20)

@pytest.fixture(scope='module')
def page(lab):
    "A page of a real browser"
    from playwright.sync_api import sync_playwright
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=['--no-sandbox', '--disable-gpu', '--disable-background-networking', '--disable-component-update', '--disable-sync', '--no-first-run'])
        yield browser.new_page(viewport=dict(width=1280, height=1000))
        browser.close()

@pytest.mark.parametrize('notebook', NOTEBOOKS)
def test_lab_runs_notebook(lab, page, notebook):
    from playwright.sync_api import TimeoutError
    page.goto(f'{lab}/lab/workspaces/w{abs(hash(notebook))}/tree/{notebook}?token=t0ken')
    page.wait_for_function(OPENED, timeout=90_000)
    page.evaluate("() => { window.jupyterapp.commands.execute('notebook:run-all-cells').catch(() => 0); return 1 }")
    try: page.wait_for_function(FINISHED, timeout=1000*int(os.environ.get('STRIP_LAB_SECONDS', 600)), polling=500)
    except TimeoutError: pass           # the state below says how far it is
    state = page.evaluate(STATE)
    if os.environ.get('STRIP_LAB_PICTURES'): page.screenshot(path=Path(os.environ['STRIP_LAB_PICTURES'])/(Path(notebook).stem + '.png'))
    assert not state['errors'], state['errors']
    assert state['run'] == state['all'] > 0, state
    page.evaluate("() => window.jupyterapp.shell.currentWidget.sessionContext.shutdown()")
