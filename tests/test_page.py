"The page at / of a real server, operated in a real browser at the width of a desktop and of a phone, by keyboard alone"
import re, shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from test_serving import KEY, bundles, noise, png, serving, shade, slow_server    # noqa: F401, bundles is a fixture

CHROMIUM = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')
QUIET = ['--no-sandbox', '--disable-gpu', '--disable-background-networking', '--disable-component-update', '--disable-sync', '--no-first-run']
WIDTHS = dict(desktop=1280, phone=390)

@pytest.fixture(scope='module')
def browser():
    if not CHROMIUM: pytest.skip('there is no Chromium on this machine')
    from playwright.sync_api import sync_playwright
    with sync_playwright() as p:
        found = p.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield found
        found.close()

@pytest.fixture(scope='module')
def server(bundles, tmp_path_factory):
    "A server of a model with every part, without keys"
    with serving(tmp_path_factory.mktemp('page'), bundles/'onnx', '--workers', 1, '--decoders', 1) as running: yield running

@pytest.fixture(scope='module')
def strict(tmp_path_factory):
    "A server that demands a key, takes one image at a time, and has a model that shows no features"
    with slow_server(tmp_path_factory.mktemp('strict'), '--queue', 1, key=KEY, STRIP_API_KEY=KEY) as running: yield running

# what is put into a form; the bodies of requests with files are not shown to a test
SPY = '''window.put = []
FormData.prototype.append = new Proxy(FormData.prototype.append, {apply(f, self, a) { put.push([a[0], a[2] || (a[1].name ?? a[1])]); return Reflect.apply(f, self, a) }})'''

class Visit:
    "A page that is open in the browser, with what it has said and asked"
    def __init__(self, browser, url, width=1280, **more):
        self.page = browser.new_page(viewport=dict(width=width, height=900), **more)
        self.said, self.asked = [], []
        self.page.on('console', lambda m: self.said.append(m.text))
        self.page.on('pageerror', lambda e: self.said.append(str(e)))
        self.page.on('request', lambda r: self.asked.append(r))
        self.page.on('filechooser', lambda _: None)         # watched from now on: a key that is pressed before that opens nothing
        self.page.add_init_script(SPY)
        self.url = url
        self.page.goto(url)

    def add(self, *files): self.page.set_input_files('#files', [dict(name=n, mimeType='', buffer=data) for n, data in files])
    def ready(self, n, refused=0):
        from playwright.sync_api import expect
        expect(self.page.locator('#status')).to_have_text(f'{n} image{"s"*(n != 1)}: ' + (f'{n - refused} ready, {refused} refused.' if refused else 'all ready.'), timeout=20_000)
    def text(self, k=0): return self.page.locator('article').nth(k).inner_text()

    def end(self, but=r'^$'):
        "Close it; it kept to its server, to the width of the window and to its policy"
        wide = self.page.evaluate('[document.documentElement.scrollWidth, innerWidth]')
        assert wide[0] <= wide[1], wide
        addresses = [r.url for r in self.asked]
        assert all(u.startswith((self.url, 'data:', 'blob:')) for u in addresses), addresses
        assert [s for s in self.said if not re.search(but, s)] == []
        self.page.close()

@pytest.fixture(params=WIDTHS)
def visit(request, browser, server): return Visit(browser, server.url, WIDTHS[request.param])

FOCUS = '(() => { const a = document.activeElement; return [a === document.body ? "" : a.id || a.textContent, getComputedStyle(a).outlineStyle] })()'

def reached(page):
    "The ids, or the text, of all that the Tab key reaches, from the top to the end; each has a visible outline"
    def tab():
        page.keyboard.press('Tab')
        return page.evaluate(FOCUS)
    while tab()[0]: pass                # to the end
    found = []
    while (at := tab())[0]: found.append(at)
    assert all(outline != 'none' for _, outline in found), found
    return [name for name, _ in found]

def test_a_person_without_a_mouse_sees_all_of_an_answer(visit, server, tmp_path):
    "Boxes and files by keyboard; then the numbers are those of the API"
    from playwright.sync_api import expect
    page, (one, two) = visit.page, noise(2, 50)
    (tmp_path/'Doe_Jane.png').write_bytes(png(one))
    expect(page.locator('#model-name')).to_have_text('simple_cnn for LAA, CE')
    expect(page.locator('#model-facts')).to_contain_text(server.http.get('/model').json()['served']['sha256'])
    assert reached(page) == ['uncertainty', 'explain', 'together', 'files', 'Documentation of the API']
    page.locator('#uncertainty').focus()
    page.keyboard.press('Space')
    page.keyboard.press('Tab')
    page.keyboard.press('Space')
    page.keyboard.press('Tab')
    page.keyboard.press('Tab')
    with page.expect_file_chooser() as chosen: page.keyboard.press('Enter')
    chosen.value.set_files(tmp_path/'Doe_Jane.png')
    visit.ready(1)
    want = server.predict(png(one), uncertainty='true', explain='true').json()
    text = visit.text()
    assert 'Doe_Jane.png' in text and f"{want['class_name']}, confidence {want['confidence']:.3f}" in text
    for name, p in want['probabilities'].items(): assert f"{p:.3f} (SD {want['uncertainty'][name]:.3f})" in text
    assert ('Abstain' if want['prediction_set'] == 'abstain' else f"Prediction set: {want['prediction_set'][0]} alone.") in text
    assert re.search(r'(Outlier: unlike|No outlier) .*distance [\d.]+, limit [\d.]+', text) and re.search(r'Request \w{16}, \d+ ms', text)
    images = page.locator('article img')
    expect(images).to_have_count(2)
    assert images.nth(1).get_attribute('src') == 'data:image/png;base64,' + want['overlay']
    assert page.evaluate('[...document.querySelectorAll("article img")].map(i => i.naturalWidth)') == [50, 32]
    assert page.evaluate('[...document.querySelectorAll(".bar")].map(b => b.firstChild.getBoundingClientRect().width / b.getBoundingClientRect().width)') == pytest.approx(list(want['probabilities'].values()), abs=.01)
    assert page.evaluate('put') == [['file', 'image.png'], ['uncertainty', 'true'], ['explain', 'true']]
    assert not any('Doe' in r.url + str(r.headers) for r in visit.asked)
    assert 'clear' in reached(page)
    page.locator('#clear').focus()
    page.keyboard.press('Enter')
    expect(page.locator('article')).to_have_count(0)
    visit.end()

def test_what_cannot_be_read_is_said_in_the_words_of_the_server(visit, server):
    "And spoils nothing else; a name with markup is text"
    torn, name = png(noise(1, 50)[0])[:900], '<img src=x onerror=alert(1)>' + 'long'*40 + '.png'
    visit.add(('a.png', png(noise(1, 40)[0])), (name, torn), ('notes.txt', b'text'), ('scan.dcm', b''))
    visit.ready(4, 3)
    assert 'confidence' in visit.text(0) and name in visit.text(1)
    for k, data in ((1, torn), (2, b'text'), (3, b'')):
        want = server.predict(data, ('x.png', 'x.txt', 'x.dcm')[k - 1]).json()['error']['message']
        assert want in visit.text(k) and 'confidence' not in visit.text(k), visit.text(k)
    assert 'no preview of .dcm' in visit.text(3)
    visit.end(but='status of 422')

def test_outliers_and_abstention_are_warnings(browser, server):
    files = [(f'{k}.png', png(image)) for k, image in enumerate([*noise(12, 32), np.zeros((32, 32, 3), np.uint8)])]
    want = [server.predict(data).json() for _, data in files]
    assert {w['outlier']['flag'] for w in want} == {True, False} and 'abstain' in [w['prediction_set'] for w in want]
    visit = Visit(browser, server.url)
    visit.add(*files)
    visit.ready(len(files))
    for k, w in enumerate(want):
        warnings = ' '.join(visit.page.locator('article').nth(k).locator('.warning').all_inner_texts())
        assert ('Do not rely on this prediction' in warnings, 'Abstain' in warnings) == (w['outlier']['flag'], w['prediction_set'] == 'abstain'), visit.text(k)
    visit.end()

def test_images_of_a_patient(visit, server):
    files = [(f'{k}.png', png(image)) for k, image in enumerate(noise(3, 40))] + [('torn.png', b'torn')]
    want = server.batch(files, patient_id=['P']*4).json()['patients'][0]
    visit.page.check('#together')
    visit.add(*files)
    visit.ready(4, 1)
    text = visit.text(0)
    assert f"{want['class_name']}, confidence {want['confidence']:.3f}" in text and 'From 3 images.' in text and '1 file could not be read.' in text
    assert visit.page.evaluate('put') == [['files', 'image.png'], ['patient_id', 'patient']]*4
    assert visit.page.locator('article').count() == 5 and 'confidence' in visit.text(3) and 'confidence' not in visit.text(4)
    visit.end()

def test_files_are_dropped(browser, server):
    "On the zone or beside it; the browser does not open them"
    visit = Visit(browser, server.url)
    drop = '''([bytes, where]) => {
        const data = new DataTransfer()
        data.items.add(new File([new Uint8Array(bytes)], 'a.png'))
        for (const kind of ['dragover', 'drop']) document.querySelector(where).dispatchEvent(new DragEvent(kind, {dataTransfer: data, bubbles: true, cancelable: true}))
    }'''
    for k, where in enumerate(('#drop', 'h1'), 1):
        visit.page.evaluate(drop, [list(png(noise(1, 20)[0])), where])
        visit.ready(k)
    visit.end()

def test_the_key_is_asked_for_and_kept_nowhere(browser, strict):
    from playwright.sync_api import expect
    visit = Visit(browser, strict.url, 390)
    page = visit.page
    expect(page.locator('#key')).to_be_focused()
    visit.add(('a.png', shade(5)))
    page.keyboard.type('no-key-of-this-server')
    page.keyboard.press('Enter')
    expect(page.locator('#key-hint')).to_contain_text('The key is not known here; ask for a new one.')
    expect(page.locator('#key')).to_be_focused()
    assert reached(page)[:2] == ['key', 'Use this key']
    page.locator('#key').focus()
    page.keyboard.type(KEY)
    page.keyboard.press('Enter')
    visit.ready(1)
    expect(page.locator('#key')).to_be_hidden()
    expect(page.locator('#model-name')).to_have_text('slow for CE, LAA')
    assert 'confidence' in visit.text()
    assert page.evaluate('[localStorage.length, sessionStorage.length, document.cookie]') == [0, 0, '']
    assert page.locator('#key').input_value() == '' and KEY not in page.content()
    visit.end(but='status of 401')

def test_what_the_model_cannot_say_costs_no_prediction(browser, strict):
    "A model that shows no features: both reasons, and the prediction; a full queue is waited for; what is removed holds nothing up"
    from playwright.sync_api import expect
    with ThreadPoolExecutor(1) as pool:
        visit = Visit(browser, strict.url)
        visit.page.fill('#key', KEY)
        visit.page.keyboard.press('Enter')
        expect(visit.page.locator('#model-name')).to_have_text('slow for CE, LAA')
        for name in ('uncertainty', 'explain'): visit.page.check('#' + name)
        visit.add(('a.png', shade(1)))
        visit.ready(1)
        busy = pool.submit(strict.predict, shade(240))
        strict.wait_for(lambda: '240' in strict.calls())
        visit.add(('b.png', shade(2)))
        visit.page.locator('#status', has_text='Next try in 1 second.').wait_for()
        visit.ready(2)
        assert busy.result().status_code == 200
        for k in range(2): assert all(words in visit.text(k) for words in ('CE, confidence 0.500', 'clot run uncertainty', 'clot run explain', 'The model has no prediction sets.')), visit.text(k)
        assert visit.page.locator('article img').count() == 2
        visit.add(('c.png', shade(250)), ('d.png', shade(251)))
        strict.wait_for(lambda: '250' in strict.calls())
        visit.page.click('#clear')
        visit.add(('e.png', shade(3)))
        visit.ready(1)
        assert visit.page.locator('article').count() == 1 and '251' not in strict.calls()
        visit.end(but='status of 4(01|22|29)')
