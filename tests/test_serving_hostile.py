"""A real server attacked: malformed files, fuzzed requests, slow, huge and broken connections, missing keys. It must answer others, and stay healthy

STRIP_HOSTILE_FILES=1000 STRIP_FUZZ_SEED=7 python -m pytest -n 0 -m slow tests/test_serving_hostile.py takes more files, and other ones."""
import contextlib, gzip, io, os, re, select, socket, struct, subprocess, sys, threading, time, zipfile
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest

import test_hostile
from strip_notebooks.data.formats import write_image
from strip_notebooks.serving.access import refusals
from test_fuzz import MARK, corpus
from test_serving import KEY, METRICS_KEY, Server, bundles, noise, png, serving   # noqa: F401, bundles is a fixture

FILES, SEED = int(os.environ.get('STRIP_HOSTILE_FILES', 220)), int(os.environ.get('STRIP_FUZZ_SEED', 0))

@pytest.fixture(scope='module')
def guarded(bundles, tmp_path_factory):
    "A server with keys, an audit log and short limits of time; in the end nothing that identifies anybody is in what it wrote"
    folder = tmp_path_factory.mktemp('guarded')
    limits = [w for name, n in dict(head_seconds=1, body_seconds=1, body_rate=20_000, body_bytes=8*2**20, pixels=20_000_000, rate=0).items() for w in ('--limit', f'{name}={n}')]
    with serving(folder, bundles/'onnx', '--workers', 1, '--decoders', 1, '--audit', 'audit.jsonl', *limits, key=KEY, STRIP_API_KEY=KEY, STRIP_METRICS_KEY=METRICS_KEY) as running:
        running.folder = folder
        yield running
        assert is_healthy(running)
    written = running.text + (folder/'audit.jsonl').read_text()
    assert 'Traceback' not in written, written[-3000:]
    for secret in (KEY, METRICS_KEY, MARK, 'Doe', 'PatientName', 'CompressedSamples', '/tmp/'): assert secret not in written.replace(str(folder), ''), secret

def is_healthy(server):
    "It answers a good image within its time, and no request is left over"
    answer = server.predict(png(noise(1, 40)[0]))
    return answer.status_code == 200 and server.process.poll() is None and 'clot_in_flight 0.0' in metrics(server)

def metrics(server): return server.http.get('/metrics', headers={'X-API-Key': METRICS_KEY}).text
def memory(server): return psutil.Process(server.process.pid).memory_info().rss
def connected(server): return socket.create_connection(('127.0.0.1', server.port), timeout=30)

def is_typed(answer):
    "Whether a refusal has a known code, the status that belongs to it, and the id of the request"
    error = answer.json()['error']
    assert sorted(error) == ['code', 'message', 'request_id'] and error['request_id'] == answer.headers['x-request-id']
    return refusals[error['code']] == answer.status_code and KEY not in answer.text and MARK not in answer.text

# --- files

def nested_dicom(depth):
    "A DICOM whose sequences are nested so deep"
    from pydicom.dataset import Dataset
    element = lambda tag, vr, data: struct.pack('<HH2sHI', *tag, vr, 0, len(data)) + data
    inner = b''
    for _ in range(depth): inner = element((0x0040, 0xA730), b'SQ', struct.pack('<HHI', 0xFFFE, 0xE000, len(inner)) + inner)
    buffer, ds = io.BytesIO(), Dataset()
    ds.PatientName, ds.Modality = MARK, 'OT'
    ds.file_meta = __import__('pydicom').dataset.FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = '1.2.840.10008.1.2.1'
    ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID = '1.2.840.10008.5.1.4.1.1.7'
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID = '1.2.3'
    ds.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue() + inner

def zipped():
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, 'w') as z: z.writestr(f'{MARK}.png', png(noise(1)[0]))
    return buffer.getvalue()

def nifti(folder):
    write_image(folder/'a.nii', noise(1, 40)[0])
    return (folder/'a.nii').read_bytes()

NAMED = {
    'no bytes': (lambda folder: b'', {'unreadable'}), 'a text': (lambda folder: b'Doe Jane', {'unsupported'}),
    'a zip': (lambda folder: zipped(), {'unsupported'}), 'a PNG bomb': (lambda folder: test_hostile.png(60_000, 60_000), {'too_large'}),
    'a deep DICOM': (lambda folder: nested_dicom(1000), {'unreadable'}), 'a truncated NIfTI': (lambda folder: nifti(folder)[:-200], {'unreadable'}),
    'a truncated packed NIfTI': (lambda folder: gzip.compress(nifti(folder))[:-30], {'unreadable'})}
ENDINGS = {'a deep DICOM': '.dcm', 'a truncated NIfTI': '.nii', 'a truncated packed NIfTI': '.nii.gz'}

@pytest.mark.parametrize('what', NAMED)
def test_a_bad_file_is_refused_with_its_reason(guarded, tmp_path, what):
    data, codes = NAMED[what][0](tmp_path), NAMED[what][1]
    answer = guarded.predict(data, f'{MARK}{ENDINGS.get(what, ".png")}')
    assert answer.status_code in (413, 422) and is_typed(answer) and answer.json()['error']['code'] in codes, answer.text
    batch = guarded.batch([(f'{MARK}.png', data), ('a.png', png(noise(1)[0]))]).json()['results']
    assert batch[0]['error']['code'] in codes and 'confidence' in batch[1]          # it spoils only its own answer

def check_files(server, files):
    "Each file has an answer or a typed refusal, alone and in a batch"
    seen = {}
    for name, data in files:
        answer = server.predict(data, name)
        assert answer.status_code in (200, 413, 422), (name, answer.text)
        assert answer.status_code == 200 or is_typed(answer)
        seen[answer.status_code] = seen.get(answer.status_code, 0) + 1
    assert seen.get(422, 0) > len(files)/5, seen
    assert is_healthy(server)

def small_corpus(folder, count): return [(p.name, p.read_bytes()) for p in corpus(folder, count, SEED)]

def test_malformed_files(guarded, tmp_path): check_files(guarded, small_corpus(tmp_path, 40)[-25:])

@pytest.mark.slow
def test_many_malformed_files(guarded, tmp_path):
    "Files that were cut, flipped and spliced, and files made to do harm"
    made = {n: f() for n, f in test_hostile.FILES.items()}
    check_files(guarded, [*small_corpus(tmp_path, FILES), *((f'{MARK}-{n}', data) for n, data in made.items() if len(data) < 8_000_000)])

# --- requests

def fuzz(server, folder, count):
    "Requests that schemathesis makes from the server's own description of itself; what it printed"
    (folder/'schemathesis.toml').write_text('')
    words = ['run', f'{server.url}/openapi.json', '--checks', 'not_a_server_error,status_code_conformance,response_schema_conformance', '-H', f'X-API-Key: {KEY}',
             '--seed', str(SEED), '--max-examples', str(count), '--phases', 'examples,coverage,fuzzing', '--workers', '1', '--no-color', '--suppress-health-check', 'all',
             '--exclude-path', '/metrics', '--generation-database', 'none']
    done = subprocess.run([str(Path(sys.executable).parent/'schemathesis'), *words], cwd=folder, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    return done.stdout

def requests_of(server): return sum(float(l.split()[-1]) for l in metrics(server).splitlines() if l.startswith('clot_requests_total'))

def test_fuzzed_requests(guarded, tmp_path):
    before = requests_of(guarded)
    said = fuzz(guarded, tmp_path, 10)
    assert requests_of(guarded) - before > 50, said[-2000:]
    assert is_healthy(guarded)

@pytest.mark.slow
def test_many_fuzzed_requests(guarded, tmp_path):
    before = requests_of(guarded)
    said = fuzz(guarded, tmp_path, 1200)
    assert requests_of(guarded) - before > 2000, said[-2000:]
    assert is_healthy(guarded)

# --- keys

def test_keys(guarded):
    ask = lambda path, key=None, **more: httpx.get(guarded.url + path, headers={**({'X-API-Key': key} if key else {}), **more})
    assert [ask(p).status_code for p in ('/health', '/ready', '/docs', '/openapi.json')] == [200]*4
    for path in ('/model', '/metrics', '/predict', '/nothing'):
        for key, code in ((None, 'no_key'), (KEY + 'x', 'wrong_key'), (METRICS_KEY if path != '/metrics' else KEY, 'wrong_key')):
            answer = ask(path, key)
            assert (answer.status_code, answer.json()['error']['code']) == (401, code) and is_typed(answer), path
    assert ask('/metrics', METRICS_KEY).status_code == ask('/model', KEY).status_code == ask('/model', None, Authorization=f'Bearer {KEY}').status_code == 200
    assert ask('/health', None, Host='evil.example').status_code == ask('/model', KEY, Origin='https://evil.example').status_code == 403
    assert 'access-control-allow-origin' not in ask('/health', None, Origin=guarded.url).headers
    assert KEY not in metrics(guarded)

def test_rate(bundles, tmp_path):
    with serving(tmp_path, bundles/'onnx', '--workers', 1, '--decoders', 0, '--limit', 'rate=0.1', '--limit', 'burst=5', key=KEY, STRIP_API_KEY=KEY) as server:
        answers = [server.http.get('/model') for _ in range(8)]
        assert [a.status_code for a in answers] == [200]*5 + [429]*3 and is_typed(answers[-1])
        assert 1 <= int(answers[-1].headers['retry-after']) <= 11
        assert server.http.get('/ready').status_code == 200

# --- connections

def head(length, path='/predict'): return f'POST {path} HTTP/1.1\r\nHost: localhost\r\nX-API-Key: {KEY}\r\nContent-Type: multipart/form-data; boundary=x\r\nContent-Length: {length}\r\n\r\n'.encode()

def read_all(connection):
    "What comes until the connection ends"
    parts = []
    with contextlib.suppress(ConnectionResetError, BrokenPipeError):
        while part := connection.recv(65536): parts.append(part)
    return b''.join(parts)

def test_a_client_that_sends_one_byte_per_second(guarded):
    connection = connected(guarded)
    connection.sendall(head(1000) + next(endless(0)))
    def drip():
        with contextlib.suppress(OSError):
            for _ in range(60):
                connection.sendall(b'x')
                time.sleep(1)
    thread = threading.Thread(target=drip, daemon=True)
    thread.start()
    assert is_healthy(guarded)                              # while it is sending
    answer = read_all(connection)
    assert answer.startswith(b'HTTP/1.1 408') and b'too_slow' in answer
    connection.close()

def test_a_client_that_never_ends_its_head(guarded):
    connection = connected(guarded)
    connection.sendall(b'POST /predict HTTP/1.1\r\nX-Slow: ')
    assert read_all(connection) == b''

def test_clients_that_disconnect(guarded):
    body = b'--x\r\nContent-Disposition: form-data; name="file"; filename="Doe_Jane.png"\r\n\r\n' + png(noise(1, 200)[0]) + b'\r\n--x--\r\n'
    for sent in (head(len(body)), head(len(body)) + body[:100], head(len(body)) + body):
        for _ in range(5):
            connection = connected(guarded)
            connection.sendall(sent)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))     # a reset, not a farewell
            connection.close()
    guarded.wait_for(lambda: is_healthy(guarded))

@pytest.mark.parametrize('sent', [b'', b'GET /health HTTP/1.1\r\n', head(5000) + b'x'], ids=['nothing', 'half a head', 'half a body'])
def test_500_connections_leave_room_for_others(guarded, sent):
    crowd = []
    try:
        for _ in range(500):
            crowd.append(connected(guarded))
            if sent: crowd[-1].sendall(sent)
        with httpx.Client(timeout=20) as other: assert other.get(guarded.url + '/ready').status_code == 200
        assert guarded.predict(png(noise(1, 40)[0])).status_code == 200
    finally:
        for connection in crowd: connection.close()
    guarded.wait_for(lambda: is_healthy(guarded))

# --- answers that nobody reads

def never_reads(server, sent):
    "A connection whose client sends, has room for a few answers, and does not read"
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.settimeout(30)
    connection.connect(('127.0.0.1', server.port))
    connection.sendall(sent)
    return connection

def open_connections(server):
    "The local ports of the clients of a server"
    found = psutil.Process(server.process.pid).net_connections('tcp')
    return {c.raddr.port for c in found if c.raddr and c.status == psutil.CONN_ESTABLISHED}

def script_request(server):
    "A request for the largest file that needs no key"
    path = re.search(r'/[^"]+bundle.js', server.http.get('/docs').text)[0]
    return f'GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n'.encode()

def batch_request(count=60):
    "A request for many pictures"
    part = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n' + png(noise(1, 40)[0]) + b'\r\n'
    body = part*count + b'--x--\r\n'
    return head(len(body), '/batch_predict?explain=true') + body

def test_clients_that_never_read(guarded):
    "Neither requests one behind the other nor large answers hold a place or a connection for ever"
    crowd, script = [], script_request(guarded)
    try:
        for _ in range(70): crowd.append(never_reads(guarded, script*8))
        for _ in range(3): crowd.append(never_reads(guarded, batch_request()*3))
        while len(select.select(crowd, [], [], 30)[0]) < len(crowd): time.sleep(.05)     # each has an answer that waits
        assert guarded.predict(png(noise(1, 40)[0])).status_code == 200                 # although there are more than may be in flight
        ports = {c.getsockname()[1] for c in crowd}
        guarded.wait_for(lambda: not ports & open_connections(guarded))
    finally:
        for connection in crowd: connection.close()
    assert is_healthy(guarded)

# --- sizes

def endless(count, piece=b'x'*2**20):
    "The beginning of a form, and then pieces without an end"
    yield b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.png"\r\n\r\n'
    for _ in range(count): yield piece

def test_an_upload_of_10_gb_is_cut_off_while_it_is_read(guarded):
    before, sent = memory(guarded), 0
    def pieces():
        nonlocal sent
        for piece in endless(10_240):
            sent += len(piece)
            yield piece
    answer = guarded.http.post('/predict', content=pieces(), headers={'Content-Type': 'multipart/form-data; boundary=x'})
    assert answer.status_code == 413 and answer.json()['error']['code'] == 'too_large'
    assert sent < 200*2**20, sent
    assert memory(guarded) - before < 60*2**20

def test_an_upload_that_announces_10_gb_is_refused_before_it_is_read(guarded):
    connection = connected(guarded)
    connection.sendall(head(10*2**30))
    assert read_all(connection).startswith(b'HTTP/1.1 413')

def test_without_a_key_nothing_is_read(guarded):
    answer = httpx.post(guarded.url + '/predict', content=endless(100), headers={'Content-Type': 'multipart/form-data; boundary=x'}, timeout=60)
    assert answer.status_code == 401

def test_a_full_disk_fails_no_request(bundles, tmp_path):
    "The audit log is a link to a file of Linux that is always full"
    if not os.path.exists('/dev/full'): pytest.skip('this system has no /dev/full')
    (tmp_path/'audit.jsonl').symlink_to('/dev/full')
    with serving(tmp_path, bundles/'onnx', '--workers', 1, '--decoders', 0, '--audit', 'audit.jsonl') as server:
        assert [server.predict(png(noise(1, 40)[0])).status_code for _ in range(3)] == [200]*3
        assert 'clot_audit_failures_total 3.0' in server.http.get('/metrics').text
        assert server.text.count('The audit log cannot be written') == 1
