"The client in Python against a real server: images, patients and folders, and what may come in between"
import json, socket, subprocess, sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd
import pytest
from test_serving import KEY, Server, bundles, noise, png, serving   # noqa: F401, bundles is a fixture

from strip_notebooks.bundle import load_bundle
from strip_notebooks.data.formats import write_image
from strip_notebooks.predict import predict_files
from strip_notebooks.serving.client import AccessRefused, RequestRefused, ServerBusy, StripClient, Unreachable, overlay_pixels

@pytest.fixture(scope='module')
def server(bundles, tmp_path_factory):
    "A server with a key, which records what it predicts"
    folder = tmp_path_factory.mktemp('server')
    with serving(folder, bundles/'onnx', '--decoders', 0, '--audit', 'audit.jsonl', key=KEY, STRIP_API_KEY=KEY) as running:
        running.predicted = lambda: [json.loads(line)['image'] for line in (folder/'audit.jsonl').read_text().splitlines()]
        yield running

@pytest.fixture
def client(server):
    with StripClient(server.url, KEY) as c: yield c

@pytest.fixture(scope='module')
def cases(tmp_path_factory):
    "A folder of 30 patients with one to three images, and files that are no images"
    folder = tmp_path_factory.mktemp('cases')
    for k, image in enumerate(noise(60, 40)): write_image(folder/f'Doe_{k % 30}'/f'{k}{(".png", ".tif", ".npy")[k % 3]}', image)
    (folder/'Doe_3'/'broken.png').write_bytes(b'no image')
    (folder/'Roe').mkdir()
    (folder/'Roe'/'empty.png').touch()
    return folder

def values(found): return [found['probabilities'][c] for c in ('LAA', 'CE')]

def test_one_image(client, bundles):
    "As a path, bytes and an array; with all that can be asked"
    (image,) = noise(1, 40)
    want = load_bundle(bundles/'onnx').predict([image])[0]
    for sent in (png(image[..., ::-1]), image): np.testing.assert_allclose(values(client.predict(sent)), want, atol=1e-6)
    found = client.predict(image, uncertainty=True, explain=True)
    assert overlay_pixels(found).shape == (32, 32, 3) and min(found['uncertainty'].values()) > 0
    with pytest.raises(RequestRefused) as refused: client.predict(b'no image')
    assert (refused.value.code, refused.value.status) == ('unsupported', 422) and refused.value.request_id
    assert client.model()['model']['classes'] == ['LAA', 'CE']

def test_many_images(client, bundles):
    "More than one request takes, in order; one that cannot be read spoils only its own result"
    images = list(noise(70, 40))
    found = client.predict_many([*images[:20], b'no image', *images[20:]], uncertainty=True)
    assert [k for k, f in enumerate(found) if 'error' in f] == [20] and found[20]['error']['code'] == 'unsupported'
    np.testing.assert_allclose([values(f) for f in found if 'error' not in f], load_bundle(bundles/'onnx').predict(images), atol=1e-6)
    assert all(f['uncertainty'] for f in found if 'error' not in f)

def test_a_patient(client, bundles, tmp_path):
    for k, image in enumerate(noise(3, 40)): write_image(tmp_path/'Doe'/f'{k}.png', image)
    paths = sorted((tmp_path/'Doe').iterdir())
    found = client.predict_patient([*paths, b'no image'])
    want = predict_files(bundles/'onnx', tmp_path).patients.iloc[0]
    np.testing.assert_allclose(values(found), [want.p_LAA, want.p_CE], atol=1e-6)
    assert (found['n_images'], found['n_unreadable'], found['class_name']) == (3, 1, want.predicted) and len(found['images']) == 4
    with pytest.raises(RequestRefused, match='No image of this patient can be read'): client.predict_patient([b'no image'])

# --- a folder

def check_tables(found, want):
    "The predictions of a folder are those of `clot predict`"
    for name, key in dict(images='image_id', patients='patient_id', unreadable='image_id').items():
        ours, theirs = (getattr(tables, name).sort_values(key).reset_index(drop=True) for tables in (found, want))
        numbers = [c for c in theirs if c.startswith('p_')]
        assert len(ours) == len(theirs) and list(ours) == list(theirs), name
        np.testing.assert_allclose(ours[numbers].astype(float), theirs[numbers].astype(float), atol=1e-6)
        same = [c for c in theirs if c not in numbers + ['message', 'prediction_set']]
        assert ours[same].astype(str).equals(theirs[same].astype(str)), name

def test_a_folder_with_progress(client, bundles, cases, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv('STRIP_PROGRESS', 'lines')
    found = client.predict_folder(cases, out=tmp_path/'answers.csv')
    check_tables(found, predict_files(bundles/'onnx', cases))
    assert 'predicting: 4 of 4, elapsed' in capsys.readouterr().out
    assert sorted(p.name for p in tmp_path.iterdir()) == ['answers-patients.csv', 'answers-unreadable.csv', 'answers.csv']
    assert {p.stat().st_mode & 0o777 for p in tmp_path.iterdir()} == {0o600}

# A program that is killed before it sends its third request with images.
KILLED = '''
import os, signal, sys
from strip_notebooks.serving.client import StripClient

class Killed(StripClient):
    sent = 0
    def _send(self, method, path, *more):
        self.sent += method == 'POST'
        if self.sent == 3: os.kill(os.getpid(), signal.SIGKILL)
        return super()._send(method, path, *more)

Killed(sys.argv[1], sys.argv[2]).predict_folder(sys.argv[3], out='answers.csv')
'''

def test_a_folder_that_was_killed_is_resumed(server, client, cases, tmp_path):
    "Nothing is sent twice that had a result, and the tables are those of an uninterrupted call"
    before = len(server.predicted())
    killed = subprocess.run([sys.executable, '-c', KILLED, server.url, KEY, cases], cwd=tmp_path, capture_output=True, text=True)
    assert killed.returncode == -9 and before < len(server.predicted()) < before + 60, killed.stderr
    (kept,) = tmp_path.iterdir()
    assert 'Doe' not in kept.read_text() and kept.stat().st_mode & 0o777 == 0o600
    client.predict_folder(cases, out=tmp_path/'answers.csv')
    sent = server.predicted()[before:]
    assert len(sent) == len(set(sent)) == 60 and not kept.exists()
    client.predict_folder(cases, out=tmp_path/'whole.csv')
    for part in ('', '-patients', '-unreadable'):
        pd.testing.assert_frame_equal(*(pd.read_csv(tmp_path/f'{name}{part}.csv') for name in ('answers', 'whole')))

# --- what comes in between

def test_a_server_that_is_restarted_and_then_has_too_much_to_do(bundles, tmp_path):
    "What found no server, or was refused with 429, is sent again: no result is lost"
    images, words = list(noise(64, 40)), (tmp_path, bundles/'onnx', '--workers', 1, '--decoders', 0, '--limit', 'rate=5', '--limit', 'burst=4')
    server = Server(*words)
    try:
        with StripClient(server.url, retries=12, wait=.3) as client, ThreadPoolExecutor(1) as pool:
            first = client.predict_many(images)
            assert server.end() == 0
            again = pool.submit(client.predict_many, images)
            server = Server(*words, port=server.port)
            assert [values(f) for f in again.result()] == [values(f) for f in first]
            for image in images[:6]: client.predict(image)                  # more than the burst: the client waits as long as it is asked to
            refused = [l for l in server.http.get('/metrics').text.splitlines() if l.startswith('clot_refusals_total{code="rate"}')]
            assert float(refused[0].split()[-1]) > 0
        with StripClient(server.url, retries=0) as client, pytest.raises(ServerBusy, match='More than 5 requests per second'):
            for _ in range(20): client.predict(images[0])
    finally: server.end()

def test_a_wrong_key(server):
    for key, code, text in ((None, 'no_key', 'A key is needed; send it in the header X-API-Key.'), (KEY + 'x', 'wrong_key', 'The key is not known here; ask for a new one.')):
        with StripClient(server.url, key) as client, pytest.raises(AccessRefused) as refused: client.predict(noise(1, 40)[0])
        assert (refused.value.code, refused.value.status, str(refused.value)) == (code, 401, text) and KEY not in str(refused.value)

def test_a_server_that_is_not_there():
    with socket.socket() as held:
        held.bind(('127.0.0.1', 0))                         # nobody listens
        url = f'http://127.0.0.1:{held.getsockname()[1]}'
        with StripClient(url, retries=2, wait=.01) as client, pytest.raises(Unreachable, match='is the server running') as error: client.predict(noise(1, 40)[0])
        assert url in str(error.value)
