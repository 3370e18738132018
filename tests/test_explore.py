"""The explorers: their notebooks run from top to bottom and leave a static twin, and in a real browser their widgets show what is chosen

`STRIP_LAB_PICTURES=FOLDER pytest -n 0 tests/test_explore.py` keeps a picture of each in JupyterLab.
"""
import json, os, re, shutil, sys
from pathlib import Path

import pytest

from conftest import ROOT
from test_jupyterlab import FINISHED, OPENED, STATE, lab, page

sys.path.insert(0, str(ROOT/'tools'))
import widget_state

explorers = sorted((ROOT/'nbs'/'explore').glob('*.ipynb'))
pages = [*explorers, *sorted((ROOT/'nbs').glob('9*_explore.*.ipynb'))]
widget_notebooks = [p for p in explorers if p.stem != 'start']
def name(path): return path.stem

def read(path): return json.loads(path.read_text(encoding='utf-8'))
def source(cell): return ''.join(cell['source'])
def code_cells(path): return [c for c in read(path)['cells'] if c['cell_type'] == 'code']

# --- what is saved

@pytest.mark.parametrize('path', sorted((ROOT/'nbs').rglob('[!.]*.ipynb')), ids=name)
def test_no_state_of_widgets_is_saved(path):
    assert not widget_state.has_state(read(path)), f'python tools/widget_state.py {path.relative_to(ROOT)}'

@pytest.mark.parametrize('path', pages, ids=name)
def test_the_page_of_an_explorer_is_small(path): assert path.stat().st_size < 200_000

def test_the_state_of_widgets_is_seen_and_removed(tmp_path):
    view = dict(output_type='display_data', metadata={}, data={widget_state.view: {}, 'text/plain': 'Box()'})
    kept = dict(output_type='display_data', metadata={}, data={'text/plain': 'a table'})
    cell = dict(cell_type='code', id='a', metadata={}, execution_count=None, source='', outputs=[view, kept])
    notebook = dict(cells=[cell], metadata=dict(widgets={}, kernelspec={}), nbformat=4, nbformat_minor=5)
    (tmp_path/'a.ipynb').write_text(json.dumps(notebook))
    assert widget_state.main([tmp_path/'a.ipynb']) == 1
    cleaned = read(tmp_path/'a.ipynb')
    assert cleaned['cells'][0]['outputs'] == [kept] and cleaned['metadata'] == dict(kernelspec={})
    assert widget_state.main([tmp_path/'a.ipynb']) == 0

@pytest.mark.parametrize('path', widget_notebooks, ids=name)
def test_a_static_twin_is_saved(path):
    "A picture or a table below the widget, whose own cell is skipped where there is no browser"
    cells = code_cells(path)
    at = [i for i, c in enumerate(cells) if source(c).startswith('#| eval: false')]
    assert len(at) == 1 and not cells[at[0]]['outputs']
    kept = [o.get('data', {}) for c in cells[at[0] + 1:] for o in c['outputs']]
    assert [d for d in kept if 'image/png' in d or 'text/html' in d]
    assert 'so this is an example' in str([c['outputs'] for c in cells]), 'what is saved is the synthetic example'

@pytest.mark.parametrize('path', explorers, ids=name)
def test_code_fits_the_width_of_lab(path):
    assert [l for c in code_cells(path) for l in source(c).splitlines() if len(l) > 95] == []

def test_the_start_page_leads_to_every_explorer():
    text = '\n'.join(source(c) for c in read(ROOT/'nbs'/'explore'/'start.ipynb')['cells'])
    links = re.findall(r'\]\(([\w./]+\.ipynb)\)', text)
    assert {p.name for p in widget_notebooks} <= set(links)
    assert [l for l in links if not (ROOT/'nbs'/'explore'/l).is_file()] == []

# --- without a browser

@pytest.fixture(scope='module')
def empty_workspace(tmp_path_factory):
    "A workspace without runs, in which the explorers draw their example"
    folder = tmp_path_factory.mktemp('workspace')
    shutil.copy(ROOT/'settings.ini', folder)
    (folder/'nbs'/'explore').mkdir(parents=True)
    return folder

def run_all(path, folder):
    "The namespace and the outputs of all cells of a notebook, run in a folder, those for a browser included"
    from execnb.nbio import read_nb
    from execnb.shell import CaptureShell
    shell = CaptureShell(path=folder)
    nb, outputs = read_nb(path), []
    for cell in nb.cells:
        if cell.cell_type != 'code': continue
        outputs += shell.run(re.sub(r'^#\|.*\n', '', cell.source))
        assert shell.exc is None, f'{shell.exc!r} in:\n{cell.source}'
    return shell.user_ns, outputs

def test_notebooks_run_from_top_to_bottom(empty_workspace, monkeypatch):
    "One after the other, as the first of them draws the example; nothing goes into a red box"
    monkeypatch.chdir(empty_workspace/'nbs'/'explore')
    kinds = dict(cohort='CohortBrowser', runs='RunBrowser', threshold='ThresholdExplorer', gallery='PatientGallery',
                 heat='HeatExplorer', embedding='EmbeddingExplorer')
    for path in explorers:
        names, outputs = run_all(path, empty_workspace/'nbs'/'explore')
        assert not [o for o in outputs if o.get('name') == 'stderr'], path.stem
        assert path.stem == 'start' or any(kinds[path.stem] in str(o) for o in outputs), path.stem
        assert 'so this is an example: 80 synthetic patients, drawn in data/explore/' in str(outputs)
    assert not list((empty_workspace).glob('runs/*')), 'an example must not appear among the runs'

# --- in a browser

seconds = int(os.environ.get('STRIP_LAB_SECONDS', 300))     # to open a notebook, and to run it

def opened(lab, page, path):
    "The notebook in JupyterLab, after Run All Cells"
    page.goto(f'{lab}/lab/workspaces/e{path.stem}/tree/nbs/explore/{path.name}?token=t0ken', timeout=1000*seconds)
    page.wait_for_function(OPENED, timeout=1000*seconds)
    page.evaluate("() => { window.jupyterapp.commands.execute('notebook:run-all-cells').catch(() => 0); return 1 }")
    page.wait_for_function(FINISHED, timeout=1000*seconds, polling=500)
    state = page.evaluate(STATE)
    assert not state['errors'] and state['run'] == state['all'] > 0, state

RED = """() => [...window.jupyterapp.shell.currentWidget.content.model.cells].map(c => c.toJSON())
    .flatMap(c => c.outputs ?? []).filter(o => o.name === 'stderr').map(o => o.text)"""
CUT = """() => [...document.querySelectorAll('.jp-CodeCell .cm-scroller')].filter(e => e.scrollWidth > e.clientWidth + 1)
    .map(e => e.textContent)"""

def closed(page, path):
    "What a person sees has no red box and no code that is cut; a picture of it, if one is asked for"
    if os.environ.get('STRIP_LAB_PICTURES'):
        page.screenshot(path=Path(os.environ['STRIP_LAB_PICTURES'])/f'explore_{path.stem}.png')
    assert page.evaluate(RED) == [] and page.evaluate(CUT) == []
    page.evaluate("() => window.jupyterapp.shell.currentWidget.sessionContext.shutdown()")

def use_threshold(page):
    "The slider moves the counts, the predictive values and the line in the figure; the button leads back"
    from playwright.sync_api import expect
    said, matrix, values = (page.locator(f'.strip-{n}') for n in ('said', 'matrix', 'values'))
    curves = page.locator('img.strip-curves, .strip-curves img').first
    expect(matrix).to_contain_text('predicted LAA')
    before = said.inner_text(), matrix.inner_text(), values.inner_text(), curves.get_attribute('src')
    slider = page.locator('.strip-slider [role=slider]')
    slider.focus()
    for _ in range(40): slider.press('ArrowRight')
    reached = page.locator('.strip-slider .widget-readout').inner_text()
    expect(said).to_contain_text(f'p ≥ {reached}')      # the browser sends on what was held back meanwhile
    expect(said).not_to_have_text(before[0])
    expect(matrix).not_to_have_text(before[1], use_inner_text=True)
    expect(values).not_to_have_text(before[2], use_inner_text=True)
    expect(curves).not_to_have_attribute('src', before[3])
    page.get_by_role('button', name='Operating point').click()
    expect(matrix).to_have_text(before[1], use_inner_text=True)

def use_cohort(page):
    "The filters and the pages change which images are shown, and the quarantine has its own view"
    from playwright.sync_api import expect
    summary, pictures = page.locator('.strip-summary'), page.locator('.strip-pictures img')
    expect(pictures).to_have_count(24)
    everything, first = summary.inner_text(), pictures.first.get_attribute('src')
    slider = page.locator('.strip-page [role=slider]')
    slider.focus()
    slider.press('ArrowRight')
    expect(pictures.first).not_to_have_attribute('src', first)
    page.locator('.strip-class select').select_option(index=2)
    expect(summary).not_to_have_text(everything)
    expect(page.locator('.strip-pictures')).not_to_contain_text('CE')
    page.locator('.strip-kind select').select_option('quarantined images')
    expect(page.locator('.strip-pictures')).to_contain_text('None is quarantined')

def use_gallery(page):
    "The group changes the patients, and the patient the images"
    from playwright.sync_api import expect
    summary, details = page.locator('.strip-summary'), page.locator('.strip-details')
    expect(summary).to_contain_text('wrong')
    before = details.inner_text()
    page.locator('.strip-patient select').select_option(index=1)
    expect(details).not_to_have_text(before, use_inner_text=True)
    expect(details.locator('img').first).to_be_visible()
    page.get_by_role('button', name='near the threshold').click()
    expect(summary).to_contain_text('the nearest first')
    expect(page.locator('.strip-page img')).to_have_count(12)

def use_runs(page):
    "A run is described, two evaluations are compared, and a file opens in a tab of its own"
    from playwright.sync_api import expect
    chosen, about = page.locator('.strip-chosen select'), page.locator('.strip-about')
    before = about.inner_text()
    chosen.select_option(index=1)
    expect(about).not_to_have_text(before, use_inner_text=True)
    chosen.select_option(index=[0, 1])
    expect(about).to_contain_text('2 runs chosen')
    page.get_by_role('button', name='Compare').click()
    expect(page.locator('.strip-compared')).to_contain_text('roc_auc', timeout=60_000)
    page.locator('.strip-step select').select_option(index=2)
    expect(about).to_contain_text('prepare, finished')
    page.locator('.strip-links').get_by_role('link', name='parameters').click()
    page.wait_for_function("() => window.jupyterapp.shell.currentWidget.title.label === 'parameters.json'")
    page.evaluate("""() => {
        const shell = window.jupyterapp.shell
        shell.currentWidget.close()
        shell.activateById([...shell.widgets('main')].find(w => w.title.label === 'runs.ipynb').id)
    }""")
    page.wait_for_function("() => window.jupyterapp.shell.currentWidget?.title.label === 'runs.ipynb'")

def use_heat(page):
    "Patient, class, method, layer and opacity change the picture; the slider changes the picture alone"
    from playwright.sync_api import expect
    words, picture, bars = page.locator('.strip-summary'), page.locator('img.strip-picture'), page.locator('.strip-bars')
    expect(words).to_contain_text('Grad-CAM for')
    expect(words).to_contain_text('outside the tissue')
    expect(bars).to_contain_text('p(LAA)')
    said, drawn = words.inner_text(), picture.get_attribute('src')
    slider = page.locator('.strip-opacity [role=slider]')
    slider.focus()
    for _ in range(4): slider.press('ArrowLeft')
    expect(picture).not_to_have_attribute('src', drawn)
    expect(words).to_have_text(said, use_inner_text=True)
    for menu, entry, text in (('class', 'LAA rather than CE', 'Grad-CAM for LAA rather than CE'),
                              ('method', 'Layer-CAM', 'Layer-CAM for LAA rather than CE'), ('layer', 'blocks.0', 'strongest heat')):
        drawn = picture.get_attribute('src')
        page.locator(f'.strip-{menu} select').select_option(label=entry)
        expect(words).to_contain_text(text)
        expect(picture).not_to_have_attribute('src', drawn)
    said = bars.inner_text()
    page.locator('.strip-patient select').select_option(index=8)
    expect(bars).not_to_have_text(said, use_inner_text=True)
    page.locator('.strip-method select').select_option(index=4)
    expect(words).to_contain_text('passes and')
    page.locator('.strip-method select').select_option(index=0)
    expect(words).to_contain_text('Grad-CAM for')
    picture.scroll_into_view_if_needed()

def use_embedding(page):
    "The pointer shows an image, a line drawn with the mouse selects some, and another projection moves the points"
    from playwright.sync_api import expect
    words, shown, hovered = (page.locator(f'.strip-{n}') for n in ('summary', 'page', 'hovered'))
    expect(words).to_contain_text('draw a line around points')
    expect(shown.locator('img')).to_have_count(24)
    plot = page.locator('.strip-scatter canvas').last
    plot.scroll_into_view_if_needed()
    box = plot.bounding_box()
    def move(x, y, steps=4): page.mouse.move(box['x'] + x*box['width'], box['y'] + y*box['height'], steps=steps)
    for y in range(20, 96, 4):                  # until a point was under the pointer
        if hovered.locator('img').count(): break
        move(.05, y/100)
        move(.95, y/100, 60)
    expect(hovered.locator('img')).to_have_count(1)
    move(.04, .12)
    page.mouse.down()
    for corner in ((.5, .12), (.5, .96), (.04, .96), (.04, .13)): move(*corner)
    page.mouse.up()
    expect(words).to_contain_text('Selected: ')
    page.locator('.strip-order select').select_option(label='the most wrong first')
    expect(shown.locator('figure').first).to_contain_text('wrong')
    page.locator('.strip-color select').select_option(label='center')
    expect(words).to_contain_text('Selected: ')
    if os.environ.get('STRIP_LAB_PICTURES'):
        words.scroll_into_view_if_needed()
        page.wait_for_timeout(1000)
        page.screenshot(path=Path(os.environ['STRIP_LAB_PICTURES'])/'explore_embedding_selected.png')
    page.locator('.strip-projection select').select_option(label='t-SNE')
    expect(words).to_contain_text('draw a line around points')

use = dict(cohort=use_cohort, gallery=use_gallery, runs=use_runs, threshold=use_threshold, heat=use_heat,
           embedding=use_embedding)

@pytest.mark.parametrize('path', explorers, ids=name)
def test_in_jupyterlab(lab, page, path):
    from playwright.sync_api import expect
    expect.set_options(timeout=30_000)
    opened(lab, page, path)
    if path.stem in use: use[path.stem](page)
    closed(page, path)
