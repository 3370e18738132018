"A real server in a process of its own, asked by curl and by clients that behave and that do not; what it says is what `clot predict` says"
import contextlib, csv, importlib.util, json, os, re, signal, socket, subprocess, sys, threading, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pandas as pd
import psutil
import pytest
import tifffile
from conftest import shared_folder

from strip_notebooks.bundle import derive_bundle, load_bundle, outlier_file, parent_files, save_bundle, torch_parts
from strip_notebooks.data.formats import write_image
from strip_notebooks.data.preprocess import Preprocessing
from strip_notebooks.models import create_model
from strip_notebooks.optimize.export import export_bundle
from strip_notebooks.predict import predict_files
from strip_notebooks.reference import make_reference
from strip_notebooks.uncertainty.outliers import fit_limit

KEY, METRICS_KEY = 'correct-horse-battery-staple', 'another-long-enough-key'
CLOT = [sys.executable, '-c', 'from strip_notebooks.cli import main\nif __name__ == "__main__": main()']
ABOUT = dict(dropout=.3, classes=['LAA', 'CE'], positive='LAA', preprocessing=Preprocessing(32, fit='crop', clahe=1.), prior=None, threshold=.45, how='max')

def environment(**more):
    "The environment of a server; two threads of a test may share the machine with others"
    return {**os.environ, 'PYTHONUNBUFFERED': '1', **more}

# --- a bundle with every part

def noise(n, size=32): return np.random.default_rng(n).integers(0, 256, (n, size, size, 3), dtype=np.uint8)

def make_bundles(folder):
    "The folder `torch` with prediction sets and a limit for outliers, and `onnx`, the same exported"
    about = dict(**ABOUT, calibration=dict(temperature=1.7))
    import torch
    torch.manual_seed(0)
    plain = load_bundle(save_bundle(folder/'plain', *torch_parts(create_model('simple_cnn', dropout=.3), 'simple_cnn', **about)))
    seen = pd.DataFrame(dict(patient_id=[f'{k}' for k in range(60)], label=['CE', 'CE', 'LAA', 'LAA']*15, split=['train', 'val']*30))
    fit = fit_limit(plain.outputs(noise(60))['features'], seen, plain.classes)
    middle = float(np.median(1 - plain.probabilities(noise(9))[:, 1]))
    usual = make_reference(plain.probabilities(noise(60)), ['LAA', 'CE']*30, plain.classes, np.linspace(.4, 1.1, 60)).model_dump()
    changes = dict(outliers=fit.limit, conformal=dict(level=.9, limits=[1., middle], patients=[20, 20]), reference=usual)
    full = load_bundle(derive_bundle(plain, folder/'torch', {**parent_files(plain), outlier_file: fit.data}, **changes))
    export_bundle(full, folder/'onnx', noise(8))

@pytest.fixture(scope='session')
def bundles(tmp_path_factory, worker_id):
    "Made once for all workers"
    with shared_folder(tmp_path_factory, worker_id, 'serving') as folder:
        if not (folder/'onnx'/'bundle.json').exists(): make_bundles(folder)
    return folder

# --- a server

class Server:
    "A process that serves, and a client of it"
    def __init__(self, folder, *words, command=CLOT, key='', port=0, **env):
        self.said = open(folder/'said.txt', 'w+')
        words = ['serve', *map(str, words), '--port', str(port)]
        self.process = subprocess.Popen([*command, *words], cwd=folder, stdout=self.said, stderr=subprocess.STDOUT, env=environment(**env))
        self.url, self.key = '', key
        self.wait_for(lambda: re.search(r'http://\S+:(\d+)', self.text))
        self.port = int(re.search(r'http://\S+:(\d+)', self.text)[1])
        self.url = f'http://127.0.0.1:{self.port}'
        self.http = httpx.Client(base_url=self.url, headers={'X-API-Key': key} if key else {}, timeout=60)
        self.wait_for(self.is_ready)

    @property
    def text(self): return Path(self.said.name).read_text()

    def is_ready(self):
        try: return self.http.get('/ready').status_code == 200
        except httpx.TransportError: return False

    def wait_for(self, done, seconds=60):
        end = time.monotonic() + seconds
        while not (found := done()):
            assert self.process.poll() is None, self.text
            assert time.monotonic() < end, self.text
            time.sleep(.02)
        return found

    def predict(self, data, name='Doe_Jane.png', **form): return self.http.post('/predict', files=dict(file=(name, data)), data=form)
    def batch(self, files, **form): return self.http.post('/batch_predict', files=[('files', f) for f in files], data=form)

    def end(self):
        "Stop it as an operator does; what it started must end with it"
        own = psutil.Process(self.process.pid).children(recursive=True) if self.process.poll() is None else []
        if self.process.poll() is None: self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(60)
        _, left = psutil.wait_procs(own, timeout=20)
        assert not left, left
        self.said.close()
        return code

@contextlib.contextmanager
def serving(folder, *words, **more):
    server = Server(folder, *words, **more)
    try: yield server
    finally:
        if server.process.poll() is None: server.end()

@pytest.fixture(scope='module')
def server(bundles, tmp_path_factory):
    "A server of the ONNX bundle, without keys"
    with serving(tmp_path_factory.mktemp('server'), bundles/'onnx') as running: yield running

def png(image):
    import cv2
    return cv2.imencode('.png', image)[1].tobytes()

# --- what it says

def curl(line, folder):
    "What a line for a shell prints, as JSON"
    done = subprocess.run(line, shell=True, cwd=folder, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)

def test_the_three_lines_of_the_documentation(server, bundles, tmp_path):
    for name, image in zip(('image', 'a', 'b'), noise(3, 50)): write_image(tmp_path/f'{name}.png', image)
    p, port = load_bundle(bundles/'onnx').predict(noise(3, 50)), server.port
    one = curl(f'curl -X POST -F "file=@image.png" http://localhost:{port}/predict', tmp_path)
    both = curl(f'curl -X POST -F "files=@a.png" -F "files=@b.png" http://localhost:{port}/batch_predict', tmp_path)
    sure = curl(f'curl -X POST -F "file=@image.png" -F "uncertainty=true" http://localhost:{port}/predict', tmp_path)
    np.testing.assert_allclose([list(r['probabilities'].values()) for r in (one, *both['results'])], p, atol=1e-6)
    assert list(one['probabilities']) == ['LAA', 'CE'] == list(sure['uncertainty']) and one['uncertainty'] is None
    assert one['class_name'] == ('LAA' if p[0, 0] >= .45 else 'CE') == ['LAA', 'CE'][one['predicted_class']]
    assert one['confidence'] == one['probabilities'][one['class_name']] and min(sure['uncertainty'].values()) > 0
    about = load_bundle(bundles/'onnx')
    assert one['model'] == dict(version=about.sha256[:12], sha256=about.sha256, arch='simple_cnn', runtime='onnx') and one['note'] == 'research use only'
    assert 'image' not in json.dumps(one).replace('image_id', '')                                      # no name of a file

def example_files(folder):
    "A path of every kind of file that is read, and of some that are not"
    for k, ending in enumerate(['.png', '.jpg', '.bmp', '.tif', '.npy', '.dcm', '.nii', '.nii.gz']):
        write_image(folder/f'a{ending}', noise(1 + k, 60)[0])
    deep = np.random.default_rng(0).integers(0, 65536, (40, 50, 3), dtype=np.uint16)
    tifffile.imwrite(folder/'deep.tif', deep, photometric='rgb')
    tifffile.imwrite(folder/'large.tif', np.zeros((9000, 9000, 3), np.uint8), photometric='rgb', tile=(512, 512), compression='deflate')    # read as an overview
    np.save(folder/'float.npy', (deep/65535).astype(np.float32))
    (folder/'torn.png').write_bytes((folder/'a.png').read_bytes()[:900])
    (folder/'zip.png').write_bytes(b'PK\3\4' + bytes(100))
    (folder/'notes.txt').write_text('text')
    (folder/'empty.dcm').touch()
    shipped = Path(importlib.util.find_spec('pydicom').origin).parent/'data'
    with open(Path(__file__).parent/'formats_outcomes.csv', newline='') as f: rows = [r['file'] for r in csv.DictReader(f) if r['package'] == 'pydicom']
    return sorted(folder.iterdir()) + [shipped/name for name in rows[::4]]

def test_answers_are_those_of_clot_predict_for_every_format(server, bundles, tmp_path):
    "Class, probabilities and outlier of each file, set of each patient; and the same files are refused"
    paths = example_files(tmp_path)
    said = [r for k in range(0, len(paths), 40) for r in server.batch([(p.name, p.read_bytes()) for p in paths[k:k + 40]]).json()['results']]
    found = predict_files(bundles/'onnx', paths)
    images, patients = found.images.set_index('image_id'), found.patients.set_index('patient_id')
    assert len(images) >= 20 and len(found.unreadable) >= 5
    for path, answer in zip(map(str, paths), said):
        if path not in images.index:
            assert answer['error']['code'] in ('unreadable', 'unsupported', 'too_large') and path not in answer['error']['message'], path
            continue
        assert 'error' not in answer, (path, answer)
        np.testing.assert_allclose([answer['probabilities'][c] for c in ('CE', 'LAA')], images.loc[path, ['p_CE', 'p_LAA']].astype(float), atol=1e-6, err_msg=path)
        assert answer['class_name'] == images.predicted[path]
        words = patients.prediction_set[path]
        assert answer['prediction_set'] == ([words] if words in ('CE', 'LAA') else 'abstain')
        assert answer['outlier']['flag'] == (images.outlier[path] == 'yes')
    assert {a['outlier']['flag'] for a in said if 'outlier' in a} == {True, False}

def test_patients_are_those_of_clot_predict(server, bundles, tmp_path):
    files = {}
    for k, who in enumerate(['roe', 'doe', 'roe', 'doe', 'roe']):
        (tmp_path/who).mkdir(exist_ok=True)
        write_image(tmp_path/who/f'{k}.png', noise(20 + k, 40)[0])
        files[f'{k}.png'] = who, (tmp_path/who/f'{k}.png').read_bytes()
    files['5.png'] = 'poe', b'no image'
    said = server.batch([(n, data) for n, (_, data) in files.items()], patient_id=[who for who, _ in files.values()]).json()
    want = predict_files(bundles/'onnx', tmp_path).patients.set_index('patient_id')
    assert [p['patient_id'] for p in said['patients']] == ['roe', 'doe', 'poe']
    for p in said['patients'][:2]:
        row = want.loc[p['patient_id']]
        np.testing.assert_allclose([p['probabilities'][c] for c in ('CE', 'LAA')], row[['p_CE', 'p_LAA']].astype(float), atol=1e-6)
        assert (p['class_name'], p['n_images']) == (row.predicted, row.n_images)
        assert p['prediction_set'] == ([row.prediction_set] if row.prediction_set in ('CE', 'LAA') else 'abstain')
    assert said['patients'][2]['error']['code'] == 'unreadable' and said['results'][5]['error']['code'] == 'unsupported'

def test_the_addresses_without_an_image(server):
    get = server.http.get
    assert get('/health').json() | dict(version='') == dict(status='ok', model_loaded=True, version='')
    assert get('/ready').json() == dict(ready=True)
    card = get('/model').json()
    assert card == get('/model_info').json() and card['model']['classes'] == ['LAA', 'CE'] and card['served']['uncertainty']
    pages = {path: get(path, follow_redirects=True) for path in ('/', '/docs', '/openapi.json')}
    for path, page in pages.items():
        assert page.status_code == 200, path
        assert re.findall(r'''(?:https?:)?//(?!127\.0\.0\.1|localhost)[\w-]+(?:\.[\w-]+)+''', page.text) == [], path
    for script in re.findall(r'''(?:src|href)="(/[^"]+)"''', pages['/docs'].text): assert get(script).status_code == 200, script
    refused = get('/nothing')
    assert (refused.status_code, refused.json()['error']['code']) == (404, 'not_found')
    assert get('/predict').json()['error']['code'] == 'method' and server.http.post('/predict').json()['error']['code'] == 'invalid'

def test_nothing_that_was_sent_is_in_the_log(server):
    server.predict(png(noise(1)[0]), 'Roe_Richard.png', patient_id='Roe')
    server.predict(b'torn', 'Roe_Richard.dcm')
    server.batch([('Roe_Richard.png', png(noise(1)[0]))], patient_id=['Roe_Richard', 'x'])
    server.http.post('/predict?uncertainty=Roe_Richard', files=dict(file=b'Roe_Richard'))
    assert 'Roe' not in server.text and 'Doe' not in server.text

# --- a model whose calls take as long as the image is bright

SLOW = '''
import sys, time
import numpy as np
from strip_notebooks.bundle import register_runtime
from strip_notebooks.cli import main

class Slow:
    def __init__(self, spec, files, device, threads=None): self.sign = spec['threshold'] - .5
    def batch(self, pixels): return pixels
    def logits(self, batch):
        brightness = int(batch.mean())
        with open('calls.txt', 'a') as f: f.write(f'{brightness}\\n')
        time.sleep(brightness/100)
        return np.zeros((len(batch), 2), np.float32)

register_runtime('slow', Slow)
if __name__ == '__main__': main()
'''

def shade(brightness): return png(np.full((16, 16, 3), brightness, np.uint8))

def slow_bundle(folder, threshold=.6):
    return save_bundle(folder, dict(classes=['CE', 'LAA'], positive='LAA', preprocessing=Preprocessing(16), prior=None, threshold=threshold), {}, runtime='slow')

@contextlib.contextmanager
def slow_server(folder, *words, **more):
    "A server with one model call at a time, whose seconds are the brightness of the image divided by 100"
    (folder/'slow.py').write_text(SLOW)
    slow_bundle(folder/'b')
    with serving(folder, 'b', '--workers', 1, '--decoders', 0, *words, command=[sys.executable, 'slow.py'], **more) as server:
        server.calls = lambda: (folder/'calls.txt').read_text().split()
        yield server

def test_a_full_queue_and_a_deadline(tmp_path):
    with slow_server(tmp_path, '--queue', 2, '--deadline', 2) as server, ThreadPoolExecutor(4) as pool:
        busy = [pool.submit(server.predict, shade(100))]
        server.wait_for(lambda: '100' in server.calls())
        busy.append(pool.submit(server.predict, shade(150)))
        server.wait_for(lambda: 'clot_in_flight 2.0' in server.http.get('/metrics').text)      # or a probe would take the place of the second
        full = server.predict(shade(3))
        assert (full.status_code, full.json()['error']['code'], int(full.headers['retry-after'])) == (429, 'busy', 1)
        assert full.json()['error']['request_id'] == full.headers['x-request-id']
        assert [b.result().status_code for b in busy] == [200, 408] and busy[1].result().json()['error']['code'] == 'deadline'
        server.wait_for(lambda: server.predict(shade(4)).status_code == 200)

def test_whoever_leaves_the_queue_costs_no_call(tmp_path):
    with slow_server(tmp_path) as server, ThreadPoolExecutor(2) as pool:
        first = pool.submit(server.predict, shade(150))
        server.wait_for(lambda: '150' in server.calls())
        with pytest.raises(httpx.ReadTimeout): httpx.post(server.url + '/predict', files=dict(file=shade(90)), timeout=.3)
        last = server.predict(shade(5))
        assert (first.result().status_code, last.status_code) == (200, 200)
        assert [c for c in server.calls() if c != '0'] == ['150', '5']

def test_the_end_finishes_what_was_accepted(tmp_path):
    with slow_server(tmp_path) as server, ThreadPoolExecutor(4) as pool:
        accepted = [pool.submit(server.predict, shade(250))]
        server.wait_for(lambda: '250' in server.calls())
        accepted.append(pool.submit(server.predict, shade(20)))
        time.sleep(1.5)                                                 # the second is in the queue
        assert server.end() == 0
        assert [a.result().status_code for a in accepted] == [200, 200] and server.calls()[-1] == '20'
        with pytest.raises(httpx.ConnectError): server.http.get('/health')

def test_another_model_while_requests_run(tmp_path):
    "Good and bad ones, by the key and by a signal: no request fails, and a bad bundle changes nothing"
    with slow_server(tmp_path, key=KEY, STRIP_API_KEY=KEY) as server, ThreadPoolExecutor(4) as pool:
        assert httpx.post(server.url + '/reload').status_code == 401
        stop, said = threading.Event(), []
        def client():
            while not stop.is_set(): said.append(server.predict(shade(2)))
        clients = [pool.submit(client) for _ in range(3)]
        def some_more():
            "Each client gets some answers before the next change"
            least = len(said) + 6
            server.wait_for(lambda: len(said) >= least or any(c.done() for c in clients))
        some_more()
        versions = [server.http.get('/health').json()['version']]
        slow_bundle(tmp_path/'b', .4)
        some_more()
        assert server.http.post('/reload').json()['changed'] is True
        versions.append(server.http.get('/health').json()['version'])
        assert server.predict(shade(1)).json()['class_name'] == 'LAA'   # 0.5 is above the new threshold
        some_more()
        good = (tmp_path/'b'/'bundle.json').read_text()
        for broken in (good[:200], good.replace('"slow"', '"fast"'), good.replace('0.4', '0.9')):
            (tmp_path/'b'/'bundle.json').write_text(broken)
            refused = server.http.post('/reload')
            assert refused.status_code == 422 and str(tmp_path) not in refused.text
        server.process.send_signal(signal.SIGHUP)
        server.wait_for(lambda: 'not reloaded, so the old model keeps answering' in server.text)
        assert server.http.get('/health').json()['version'] == versions[1]
        slow_bundle(tmp_path/'b', .7)
        server.process.send_signal(signal.SIGHUP)
        server.wait_for(lambda: 'another model answers' in server.text)
        versions.append(server.http.get('/health').json()['version'])
        some_more()
        stop.set()
        for c in clients: c.result()
        assert {r.status_code for r in said} == {200} and len(set(versions)) == 3
        assert {r.json()['model']['version'] for r in said} == set(versions)
        for r in said: assert r.json()['class_name'] == ('LAA' if r.json()['model']['version'] == versions[1] else 'CE')

# --- who gets in, and what does not start

def refused(folder, *words, **env):
    "The sentence of a server that does not start"
    done = subprocess.run([*CLOT, 'serve', *map(str, words)], cwd=folder, capture_output=True, text=True, timeout=60, env=environment(**env))
    assert done.returncode == 2 and done.stderr.startswith('clot: ') and 'Traceback' not in done.stderr, done.stderr
    return done.stderr

def test_a_key_is_needed_elsewhere(bundles, tmp_path):
    assert 'needs a key: set STRIP_API_KEY' in refused(tmp_path, bundles/'onnx', '--host', '0.0.0.0')
    (tmp_path/'keys').write_text(KEY + '\n')
    (tmp_path/'keys').chmod(0o644)
    assert 'open to others' in refused(tmp_path, bundles/'onnx', '--host', '0.0.0.0', '--key-file', 'keys')
    (tmp_path/'keys').chmod(0o600)
    with serving(tmp_path, bundles/'onnx', '--host', '0.0.0.0', '--key-file', 'keys', '--decoders', 1, key=KEY, STRIP_METRICS_KEY=METRICS_KEY) as server:
        inherited = [child.environ() for child in psutil.Process(server.process.pid).children(recursive=True)]
        assert inherited and not any(METRICS_KEY in values.values() for values in inherited)     # what decodes hostile files knows no key
        data, bare = dict(file=png(noise(1)[0])), httpx.Client(base_url=server.url)
        assert server.http.post('/predict', files=data).status_code == 200
        assert [bare.post('/predict', files=data, headers=h).json()['error']['code'] for h in ({}, {'X-API-Key': KEY + 'x'})] == ['no_key', 'wrong_key']
        assert [bare.get(path).status_code for path in ('/health', '/ready', '/docs', '/model', '/metrics')] == [200, 200, 200, 401, 401]
        assert server.http.get('/metrics').json()['error']['code'] == 'wrong_key'            # a key of its own
        assert KEY not in server.text

def test_what_does_not_start_says_why(bundles, tmp_path):
    with socket.create_server(('127.0.0.1', 0)) as taken:
        assert 'is in use; stop what uses it, or take another with --port' in refused(tmp_path, bundles/'onnx', '--port', taken.getsockname()[1])
    derive_bundle(load_bundle(bundles/'torch'), tmp_path/'broken', threshold=.2)
    weights = bytearray((tmp_path/'broken'/'weights.safetensors').read_bytes())
    weights[-1] ^= 1
    (tmp_path/'broken'/'weights.safetensors').write_bytes(weights)
    assert 'was changed after it was written' in refused(tmp_path, 'broken')
    assert 'neither the folder of a bundle nor a run' in refused(tmp_path, 'nothing')
    assert "did you mean 'files'" in refused(tmp_path, bundles/'onnx', '--limit', 'filse=3')
    assert 'deadline=0.0 must be above 0 seconds' in refused(tmp_path, bundles/'onnx', '--deadline', 0)
    assert 'keep_alive=0.0 must be above 0 seconds' in refused(tmp_path, bundles/'onnx', '--keep-alive', 0)

# --- without torch

ABSENT = ['torch', 'torchvision', 'timm', 'lightning', 'papermill', 'nbdev', 'nbclient', 'nbformat', 'IPython', 'jupyter_client', 'matplotlib', 'sklearn', 'albumentations', 'optuna', 'onnx', 'yaml', 'httpx']
WITHOUT = f'import sys\nsys.modules.update(dict.fromkeys({ABSENT}))\n' + CLOT[-1]

def test_an_onnx_bundle_is_served_and_predicts_without_torch(bundles, tmp_path):
    "Nor with anything else that only training and notebooks need"
    command, image = [*CLOT[:-1], WITHOUT], noise(1, 40)[0]
    write_image(tmp_path/'a.png', image)
    with serving(tmp_path, bundles/'onnx', '--decoders', 1, command=command) as server:
        said = server.predict((tmp_path/'a.png').read_bytes(), uncertainty='true', explain='true').json()
        assert said['overlay'] and said['uncertainty'] and said['outlier'], said
        assert [server.http.get(path).status_code for path in ('/docs', '/model', '/openapi.json')] == [200]*3
    done = subprocess.run([*command, 'predict', bundles/'onnx', 'a.png'], cwd=tmp_path, capture_output=True, text=True, env=environment())
    assert done.returncode == 0 and f"{said['probabilities']['LAA']:.3f}" in done.stdout, done.stderr
    want = load_bundle(bundles/'torch').predict([image])[0]
    np.testing.assert_allclose(list(said['probabilities'].values()), want, atol=1e-4)

def test_what_a_model_cannot_say_is_refused_with_the_reason(tmp_path):
    "A model whose runtime shows no features"
    with slow_server(tmp_path) as server:
        for asked in ('uncertainty', 'explain'):
            said = server.predict(shade(1), **{asked: 'true'})
            assert said.status_code == 422 and said.json()['error']['code'] == 'unsupported' and f'clot run {asked}' in said.json()['error']['message']

# --- load

def memory(server):
    "Bytes that the server and its workers hold"
    own = psutil.Process(server.process.pid)
    return sum(p.memory_info().rss for p in [own, *own.children(recursive=True)])

@pytest.mark.slow
def test_two_thousand_requests_of_32_clients(bundles, tmp_path):
    "No error, and no growth of memory"
    pictures = [png(image) for image in noise(16, 224)]
    with serving(tmp_path, bundles/'onnx', '--limit', 'rate=0') as server:
        def client(k):
            with httpx.Client(base_url=server.url, timeout=120) as http:
                return [http.post('/predict', files=dict(file=pictures[(k + i) % 16])).status_code for i in range(63)]
        def wave():
            with ThreadPoolExecutor(32) as pool: return [code for codes in pool.map(client, range(32)) for code in codes]
        first, before = wave(), memory(server)
        second, after = wave(), memory(server)
        assert len(first) == len(second) == 2016 and set(first + second) == {200}
        assert after < before + 20*2**20, (before, after)
