"The files of deploy/: the image's requirements, its steps run in a clean environment, manifests, metrics, rules and dashboard"
import configparser, contextlib, json, os, re, shutil, socket, subprocess, sys, time
from importlib.metadata import requires
from pathlib import Path

import httpx
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from conftest import ROOT
from test_serving import bundles   # noqa: F401, a fixture

DEPLOY = ROOT/'deploy'
NOT_SERVED = {'torch', 'torchvision', 'timm', 'lightning-fabric', 'onnx', 'onnxscript', 'jupyterlab', 'ipykernel', 'ipywidgets', 'nbdev', 'nbconvert', 'papermill', 'matplotlib',
              'scikit-learn', 'albumentations', 'optuna', 'openvino', 'distributed'}

def program(name):
    "The path of a program beside Python or on the PATH; skips the test where it is absent"
    found = shutil.which(name, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    return found or pytest.skip(f'{name} is not installed here')

def succeeds(*words, **kwargs):
    "What a command prints; fails with its words if it fails"
    done = subprocess.run([str(w) for w in words], capture_output=True, text=True, **kwargs)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout + done.stderr

def documents(path): return [d for d in yaml.safe_load_all(path.read_text(encoding='utf-8')) if d]

# --- what the image holds

def locked(path):
    "{name: {(version, marker)}} of a requirements file"
    found = {}
    for line in path.read_text().replace('\\\n', ' ').splitlines():
        if not line.strip() or line.startswith('#'): continue
        requirement = Requirement(line.split(' --hash')[0].strip())
        found.setdefault(canonicalize_name(requirement.name), set()).add((str(requirement.specifier), str(requirement.marker or '')))
    return found

@pytest.fixture(scope='module')
def lock(): return locked(DEPLOY/'requirements.txt')

@pytest.fixture(scope='module')
def settings():
    config = configparser.ConfigParser(delimiters=['='])
    config.read(ROOT/'settings.ini')
    return config['DEFAULT']

def test_the_lock_has_the_versions_of_the_constraints(lock):
    "A package may have several versions, one for each version of Python; a marker may name fewer systems"
    everywhere = locked(ROOT/'constraints.txt')
    for name, versions in lock.items():
        assert {v for v, _ in versions} <= {v for v, _ in everywhere[name]}, f'{name}: run make lock-serving'
    text = (DEPLOY/'requirements.txt').read_text()
    assert 'http' not in text
    for block in text.replace('\\\n', ' ').splitlines(): assert '--hash=sha256:' in block, block[:80]

def closure(names):
    "The names of all that `names` require here, from the metadata of what is installed"
    found, new = set(), {canonicalize_name(n) for n in names}
    while new:
        found |= new
        needed = [Requirement(r) for name in new for r in requires(name) or []]
        new = {canonicalize_name(r.name) for r in needed if not r.marker or r.marker.evaluate({'extra': ''})} - found
    return found

def test_the_lock_is_what_serving_requires(lock, settings):
    "The names in settings.ini, what they require, and nothing else; their bounds are those of the whole workspace"
    names = settings['serving_requirements'].split()
    bounds = {canonicalize_name(r.name): r.specifier for r in map(Requirement, settings['requirements'].split())}
    assert {canonicalize_name(n) for n in names} <= set(bounds) and names == [re.split('[<=>]', n)[0] for n in names]
    for name, versions in lock.items():
        assert all(v.removeprefix('==') in bounds.get(name, Requirement(name).specifier) for v, _ in versions), name
    needed = closure(names)
    assert needed <= set(lock), f'missing: {needed - set(lock)}; run make lock-serving'
    for name in set(lock) - needed: assert all(marker for _, marker in lock[name]), f'{name} is locked, and nothing requires it; run make lock-serving'

def test_the_lock_holds_nothing_of_training_or_notebooks(lock):
    assert not NOT_SERVED & set(lock)
    assert not [name for name in lock if re.match('nvidia|cuda|jupyter|ipy|nb|notebook', name)]

def steps(stage=0):
    "The instructions of a stage of the Dockerfile, as (word, rest)"
    text = re.sub(r'^#.*\n', '', (DEPLOY/'Dockerfile').read_text(), flags=re.MULTILINE).replace('\\\n', ' ')
    lines = [line.split(maxsplit=1) for line in text.splitlines() if line.strip()]
    starts = [i for i, (word, _) in enumerate(lines) if word == 'FROM'] + [None]
    return lines[starts[stage]:starts[stage + 1]]

def test_hadolint_has_no_remark():
    assert succeeds(program('hadolint'), *sorted(DEPLOY.glob('*Dockerfile'))) == ''

def test_hadolint_would_remark():
    "The check can fail: an image without version"
    done = subprocess.run([program('hadolint'), '-'], input='FROM python\nRUN pip install numpy\n', capture_output=True, text=True)
    assert done.returncode and 'DL3006' in done.stdout

def test_the_image_runs_as_nobody_in_particular():
    last = steps(1)
    words = {word: rest for word, rest in last}
    assert re.fullmatch(r'[1-9]\d+:[1-9]\d+', words['USER'])
    assert json.loads(words['ENTRYPOINT']) == ['clot'] and json.loads(words['CMD'])[0] == 'serve'
    assert '/health' in words['HEALTHCHECK'] and all(word in ('FROM', 'RUN', 'COPY', 'ENV', 'WORKDIR', 'VOLUME', 'USER', 'EXPOSE', 'HEALTHCHECK', 'ENTRYPOINT', 'CMD') for word, _ in last)
    assert not re.search('torch|jupyter', ' '.join(' '.join(s) for s in steps(0) + last))

def images():
    "Every image that is named in deploy/, with its file"
    for path in DEPLOY.rglob('*'):
        if path.suffix not in ('.yaml', '.yml') and 'Dockerfile' not in path.name: continue
        for name in re.findall(r'^\s*(?:image:|ARG (?:PYTHON|SERVER)=)\s*(\S+)', path.read_text(), flags=re.MULTILINE): yield path.name, name

def test_images_have_versions():
    found = dict(images())
    assert len(found) >= 4
    for path, name in images():
        if (path, name) == ('deployment.yaml', 'clot-model'): continue      # kustomization.yaml has its version
        assert re.search(r'(?:^|:)v?\d+\.\d+\.\d+', name) and 'latest' not in name, f'{path}: {name}'
    kustomization, = documents(DEPLOY/'kubernetes'/'kustomization.yaml')
    assert re.fullmatch(r'\d+\.\d+\.\d+', kustomization['images'][0]['newTag'])

def test_only_what_is_copied_is_sent_to_the_builder():
    "And everything that is copied"
    lines = [l for l in (ROOT/'.dockerignore').read_text().splitlines() if l and not l.startswith('#')]
    allowed = {l.removeprefix('!') for l in lines if l.startswith('!')}
    copied = {source for word, rest in steps(0) if word == 'COPY' for source in rest.split()[:-1]}
    assert lines[0] == '*' and allowed == copied and all((ROOT/c).exists() for c in copied)

def test_nothing_secret_is_in_git():
    "Keys are empty in the example, and the file that holds them is ignored"
    example = dict(l.split('=', 1) for l in (DEPLOY/'.env.example').read_text().splitlines() if l and not l.startswith('#'))
    assert {n for n in example if re.search('KEY|PASSWORD', n)} == {n for n, value in example.items() if not value} - {'BUNDLE'}
    compose = (DEPLOY/'compose.yaml').read_text()
    for name in re.findall(r'\$\{(\w+)', compose): assert name in example, name
    assert '.env' in (DEPLOY/'.gitignore').read_text().split()
    secret, = documents(DEPLOY/'kubernetes'/'secret.example.yaml')
    assert all(value.startswith('REPLACE') for value in secret['stringData'].values())

# --- compose and Kubernetes

def test_compose_is_valid():
    succeeds(program('check-jsonschema'), '--builtin-schema', 'vendor.compose-spec', DEPLOY/'compose.yaml')

def test_what_compose_mounts_exists():
    services = documents(DEPLOY/'compose.yaml')[0]['services']
    assert set(services) == {'api', 'prometheus', 'grafana'}
    for service in services.values():
        assert all(port.startswith('127.0.0.1:') for port in service['ports']) and service['cap_drop'] == ['ALL'] and service['mem_limit']
        for mount in service['volumes']:
            if mount.startswith('./'): assert (DEPLOY/mount.split(':')[0]).exists() and mount.endswith(':ro'), mount
    assert services['api']['read_only'] is True

def manifests():
    "All of them by kind"
    return {d['kind']: d for p in sorted((DEPLOY/'kubernetes').glob('*.yaml')) if p.name != 'kustomization.yaml' for d in documents(p)}

def test_manifests_are_valid():
    found = sorted(p for p in (DEPLOY/'kubernetes').glob('*.yaml') if p.name != 'kustomization.yaml')
    assert succeeds(program('kubernetes-validate'), '--strict', *found).count(' passed ') == len(found) == len(manifests())

def test_a_wrong_manifest_would_be_found(tmp_path):
    text = (DEPLOY/'kubernetes'/'deployment.yaml').read_text()
    (tmp_path/'wrong.yaml').write_text(text.replace('readinessProbe', 'readynessProbe'))
    done = subprocess.run([program('kubernetes-validate'), '--strict', tmp_path/'wrong.yaml'], capture_output=True, text=True)
    assert done.returncode and 'readynessProbe' in done.stdout + done.stderr

def test_kustomize_puts_them_together():
    text = succeeds(program('kubectl'), 'kustomize', DEPLOY/'kubernetes')
    assert {d['kind'] for d in yaml.safe_load_all(text)} == set(manifests()) - {'Secret'}

def test_manifests_agree_with_each_other_and_with_the_image():
    found = manifests()
    pod = found['Deployment']['spec']['template']
    container, = pod['spec']['containers']
    labels = pod['metadata']['labels']
    for selector in (found['Deployment']['spec']['selector']['matchLabels'], found['Service']['spec']['selector'], found['PodDisruptionBudget']['spec']['selector']['matchLabels'],
                     found['NetworkPolicy']['spec']['podSelector']['matchLabels']): assert selector.items() <= labels.items()
    user = dict(steps(1))['USER']
    security = pod['spec']['securityContext']
    assert f"{security['runAsUser']}:{security['runAsGroup']}" == user and security['runAsNonRoot'] and security['seccompProfile']
    own = container['securityContext']
    assert own['readOnlyRootFilesystem'] and not own['allowPrivilegeEscalation'] and own['capabilities'] == {'drop': ['ALL']}
    assert container['resources']['limits']['memory'] and container['resources']['limits']['cpu']
    assert {p['httpGet']['path'] for p in (container['livenessProbe'], container['readinessProbe'], container['startupProbe'])} == {'/health', '/ready'}
    keys = {e['valueFrom']['secretKeyRef']['key'] for e in container['env']}
    assert keys == set(found['Secret']['stringData']) and {e['valueFrom']['secretKeyRef']['name'] for e in container['env']} == {found['Secret']['metadata']['name']}
    compose = documents(DEPLOY/'compose.yaml')[0]['services']['api']
    assert {e['name'] for e in container['env']} == set(compose['environment'])
    assert found['HorizontalPodAutoscaler']['spec']['scaleTargetRef']['name'] == found['Deployment']['metadata']['name']

# --- the steps of the Dockerfile, in a clean environment

@pytest.fixture(scope='module')
def served_bundle(bundles):
    "An ONNX bundle with all that a bundle can have: calibration, prediction sets, a limit for outliers, dropout in its head"
    return bundles/'onnx'

@pytest.fixture(scope='module')
def pictures(tmp_path_factory):
    "A picture in every format that is written"
    import numpy as np
    from strip_notebooks.data.formats import write_image
    folder, rng = tmp_path_factory.mktemp('in')/'pictures', np.random.default_rng(0)
    for ending in ('.png', '.jpg', '.bmp', '.tif', '.npy', '.dcm', '.nii', '.nii.gz'):
        write_image(folder/f'a{ending}', rng.integers(0, 256, (40, 50, 3)).astype(np.uint8))
    return folder

def plain_environment(**more):
    "What a program finds in a container, and no more"
    kept = {n: v for n, v in os.environ.items() if n.startswith('PIP_') or n.lower().endswith('_proxy') or n in ('HOME', 'TMPDIR', 'SSL_CERT_FILE')}
    return {**kept, 'PATH': '/usr/local/bin:/usr/bin:/bin', 'STRIP_PROGRESS': 'none', 'OPENBLAS_NUM_THREADS': '1', **more}

def copy_into(build, sources, target):
    "What COPY does"
    for source in sources:
        if (ROOT/source).is_dir(): shutil.copytree(ROOT/source, build/target, ignore=shutil.ignore_patterns('__pycache__'))
        else: shutil.copy(ROOT/source, build/target)

def base_python():
    "A Python of this version that every user can run, if there is one, as that of the image"
    found = shutil.which(f'python{sys.version_info.major}.{sys.version_info.minor}', path='/usr/local/bin:/usr/bin')
    usable = found and not subprocess.run([found, '-c', 'import ensurepip, venv'], capture_output=True).returncode
    return found if usable else sys.executable

@pytest.fixture(scope='module')
def image(tmp_path_factory):
    "The folder /opt/venv of the image: the instructions of its first stage, carried out in a folder"
    base = tmp_path_factory.mktemp('image')
    (base/'build').mkdir()
    succeeds(base_python(), '-m', 'venv', base/'python')
    environment = plain_environment(PATH=f"{base/'python'/'bin'}:/usr/local/bin:/usr/bin:/bin")
    first = (DEPLOY/'requirements.txt').read_text().split()[0]
    reached = subprocess.run([base/'python'/'bin'/'pip', 'download', '-q', '--no-deps', '-d', base/'reached', first], env=environment, capture_output=True)
    if reached.returncode: pytest.skip('no package index can be reached')
    for word, rest in steps(0):
        if word == 'COPY': copy_into(base/'build', rest.split()[:-1], rest.split()[-1])
        if word == 'RUN': succeeds('bash', '-euc', rest.replace('/opt/venv', str(base/'venv')), cwd=base/'build', env=environment)
    return base/'venv'

@pytest.mark.slow
def test_the_image_holds_no_torch(image, served_bundle):
    done = subprocess.run([image/'bin'/'python', '-c', 'import torch'], capture_output=True, text=True, env=plain_environment())
    assert done.returncode and "No module named 'torch'" in done.stderr
    found = succeeds(image/'bin'/'python', '-c', "import importlib.metadata as m; print(*(d.metadata['Name'].lower() for d in m.distributions()))", env=plain_environment()).split()
    assert not NOT_SERVED & {canonicalize_name(n) for n in found} and 'pip' not in found
    assert set(map(canonicalize_name, found)) - {'strip-notebooks'} <= set(locked(DEPLOY/'requirements.txt'))
    size = sum(p.lstat().st_size for p in image.rglob('*'))
    assert size < 800e6, f'{size/1e6:.0f} MB'
    refused = subprocess.run([image/'bin'/'clot', 'predict', served_bundle.parent/'torch', '.'], capture_output=True, text=True, env=plain_environment())
    assert refused.returncode == 2 and 'needs the package torch' in refused.stderr

@pytest.mark.slow
def test_predict_says_the_same_in_the_image(image, served_bundle, pictures, tmp_path):
    "In every format; here by the same bundle in the whole workspace, and by its parent in PyTorch"
    import numpy as np
    from strip_notebooks.predict import predict_files
    succeeds(image/'bin'/'clot', 'predict', served_bundle, pictures, '--out', 'there.csv', cwd=tmp_path, env=plain_environment())
    import pandas as pd
    there = pd.read_csv(tmp_path/'there.csv')
    here, torch = (predict_files(folder, pictures).images for folder in (served_bundle, served_bundle.parent/'torch'))
    assert there.image_id.tolist() == here.image_id.tolist() and len(there) == 8
    np.testing.assert_allclose(there[['p_CE', 'p_LAA']], here[['p_CE', 'p_LAA']], atol=1e-6)
    np.testing.assert_allclose(there[['p_CE', 'p_LAA']], torch[['p_CE', 'p_LAA']], atol=1e-4)
    assert there.outlier.tolist() == here.outlier.tolist() == torch.outlier.tolist()

INSIDE = """
import json, os, signal, subprocess, sys, time, urllib.error, urllib.request
base, key = 'http://127.0.0.1:5000', os.environ['STRIP_API_KEY']
server = subprocess.Popen(['python', '/mnt/venv/bin/clot', *json.loads(os.environ['WORDS'])])

def ask(path, data=None, **headers):
    try:
        with urllib.request.urlopen(urllib.request.Request(base + path, data, headers), timeout=60) as r: return r.status, r.read().decode()
    except urllib.error.HTTPError as e: return e.code, e.read().decode()
    except OSError as e: return 0, str(e)

def predict(name):
    head = f'--x\\r\\nContent-Disposition: form-data; name="file"; filename="{name}"\\r\\n\\r\\n'
    body = head.encode() + open(f'/mnt/in/{name}', 'rb').read() + b'\\r\\n--x--\\r\\n'
    return ask('/predict?uncertainty=true', body, **{'X-API-Key': key, 'Content-Type': 'multipart/form-data; boundary=x'})

end = time.monotonic() + 60
while ask('/ready')[0] != 200 and time.monotonic() < end and server.poll() is None: time.sleep(.1)
found = dict(answers={name: predict(name) for name in sorted(os.listdir('/mnt/in'))}, health=ask('/health'), page=ask('/')[0], docs=ask('/docs')[0],
             without_key=ask('/model')[0], model=ask('/model', **{'X-API-Key': key})[0], metrics=ask('/metrics', **{'X-API-Key': os.environ['STRIP_METRICS_KEY']})[0])
try: open('/written', 'w')
except OSError as e: found['root'] = e.strerror
found['user'] = os.getuid()
server.send_signal(signal.SIGTERM)
found['code'] = server.wait(60)
print(json.dumps(found))
"""

# User, read-only root, empty /tmp, no capability, no network but loopback: as the manifests have it
CONTAINER = """
mount -t tmpfs tmpfs /mnt
mkdir /mnt/venv /mnt/bundle /mnt/in
mount --bind "$1" /mnt/venv
mount --bind "$2" /mnt/bundle
mount --bind "$3" /mnt/in
cp "$4" /mnt/inside.py
mount --bind / /
mount -o remount,bind,ro /
mount -t tmpfs -o mode=1777 tmpfs /tmp
mount -t proc proc /proc
ip link set lo up
cd /tmp
exec setpriv --reuid 10001 --regid 10001 --clear-groups --bounding-set=-all --no-new-privs env -i PATH=/mnt/venv/bin:/usr/bin:/bin HOME=/tmp PYTHONDONTWRITEBYTECODE=1 \\
    STRIP_PROGRESS=none STRIP_API_KEY=0123456789abcdef01234567 STRIP_METRICS_KEY=fedcba9876543210fedcba98 "WORDS=$5" python /mnt/inside.py
"""

@pytest.mark.slow
def test_it_serves_with_a_read_only_root_and_without_rights(image, served_bundle, pictures, tmp_path):
    "The same answers as `clot predict`, as user 10001 in namespaces of its own"
    from strip_notebooks.predict import predict_files
    words = [json.loads(rest) for word, rest in steps(1) if word in ('ENTRYPOINT', 'CMD')]
    (tmp_path/'inside.py').write_text(INSIDE)
    isolated = [program('unshare'), '--mount', '--net', '--pid', '--fork', '--propagation', 'private']
    for name in ('setpriv', 'ip'): program(name)
    if subprocess.run([*isolated, 'mount', '-t', 'tmpfs', 'tmpfs', '/mnt'], capture_output=True).returncode: pytest.skip('no namespaces can be made here without more rights')
    if base_python() == sys.executable: pytest.skip('only this user can run the Python that is installed here')
    for path in (image, served_bundle, pictures): path.chmod(0o755)
    served = [w if w != '/bundle' else '/mnt/bundle' for w in words[1]]
    said = succeeds(*isolated, 'bash', '-euc', CONTAINER, 'container', image, served_bundle, pictures, tmp_path/'inside.py', json.dumps(served))
    found = json.loads(said[said.index('{"answers"'):].splitlines()[0])
    assert (found['user'], found['root'], found['code']) == (10001, 'Read-only file system', 0), said
    assert [found[n] for n in ('page', 'docs', 'model', 'metrics', 'without_key')] == [200, 200, 200, 200, 401], said
    here = predict_files(served_bundle, pictures).images.set_index('image_id')
    assert sorted(found['answers']) == sorted(here.index)
    for name, (status, text) in found['answers'].items():
        answer = json.loads(text)
        assert status == 200 and answer['uncertainty'], text
        assert abs(answer['probabilities']['LAA'] - here.p_LAA[name]) < 1e-6

# --- metrics, rules and dashboard

def rules(): return [rule for group in documents(DEPLOY/'prometheus'/'alerts.yml')[0]['groups'] for rule in group['rules']]

def queries():
    "(title, query) of each query of the dashboard"
    panels = json.loads((DEPLOY/'grafana'/'dashboards'/'clot.json').read_text())['panels']
    return [(panel['title'], target['expr']) for panel in panels for target in panel.get('targets', [])]

def named(expression):
    "The metrics that an expression names"
    bare = re.sub(r'"[^"]*"|\{[^}]*\}|\b(?:by|without|on|ignoring|group_left|group_right)\s*(?:\([^)]*\))?|\[[^\]]*\]', ' ', expression)
    return {name for name in re.findall(r'\b[a-z_]\w*\b(?!\s*\()', bare) if name not in ('and', 'or', 'unless', 'bool', 'offset')}

def test_metrics_are_found_in_expressions():
    assert named('sum by (le, path) (rate(a_bucket{path="x", code=~"b_c"}[5m])) / on (x) group_left (y) b_total > bool 0.5 and time() - c_seconds') == {'a_bucket', 'b_total', 'c_seconds'}

def test_rules_and_their_unit_tests():
    "Every rule has one that expects it to fire"
    folder = DEPLOY/'prometheus'
    succeeds(program('promtool'), 'check', 'rules', folder/'alerts.yml')
    succeeds(program('promtool'), 'test', 'rules', 'alerts_test.yml', cwd=folder)
    tested = {t['alertname'] for test in documents(folder/'alerts_test.yml')[0]['tests'] for t in test['alert_rule_test'] if t['exp_alerts']}
    assert tested == {rule['alert'] for rule in rules()} and len(rules()) == len(tested)
    for rule in rules(): assert rule['labels']['severity'] in ('critical', 'warning') and set(rule['annotations']) == {'summary', 'description'}

def test_a_wrong_rule_would_be_found(tmp_path):
    "The unit tests see a limit that is not the tested one"
    for name in ('alerts.yml', 'alerts_test.yml'): shutil.copy(DEPLOY/'prometheus'/name, tmp_path)
    text = (tmp_path/'alerts.yml').read_text()
    (tmp_path/'alerts.yml').write_text(text.replace('> 0.01', '> 0.5'))
    assert subprocess.run([program('promtool'), 'test', 'rules', 'alerts_test.yml'], cwd=tmp_path, capture_output=True).returncode

def scrape_config(folder, port=5000, key=''):
    "The configuration that compose mounts, for a server and a key of this test"
    text = (DEPLOY/'prometheus'/'prometheus.yml').read_text().replace('api:5000', f'127.0.0.1:{port}').replace('/run/secrets/metrics_key', str(folder/'key')).replace('15s', '1s')
    (folder/'key').write_text(key)
    (folder/'prometheus.yml').write_text(re.sub(r'  - job_name: prometheus\n.*\n', '', text))
    rules = (DEPLOY/'prometheus'/'alerts.yml').read_text()
    (folder/'alerts.yml').write_text(re.sub(r'for: \d+m', 'for: 1s', rules))        # nobody waits for minutes here
    return folder/'prometheus.yml'

def test_the_configuration_of_prometheus_is_valid(tmp_path):
    assert 'SUCCESS' in succeeds(program('promtool'), 'check', 'config', scrape_config(tmp_path))

def test_the_dashboard_is_provisioned():
    source, = documents(DEPLOY/'grafana'/'provisioning'/'datasources'/'prometheus.yml')[0]['datasources']
    provider, = documents(DEPLOY/'grafana'/'provisioning'/'dashboards'/'clot.yml')[0]['providers']
    mounts = documents(DEPLOY/'compose.yaml')[0]['services']['grafana']['volumes']
    assert f"./grafana/dashboards:{provider['options']['path']}:ro" in mounts and source['url'] == 'http://prometheus:9090'
    board = json.loads((DEPLOY/'grafana'/'dashboards'/'clot.json').read_text())
    assert len({p['id'] for p in board['panels']}) == len(board['panels']) >= 8
    for p in board['panels']: assert p['datasource']['uid'] == source['uid'] and p['title'] and p['description'] and p['targets'] and p['gridPos']['x'] + p['gridPos']['w'] <= 24

# --- a real server, a real Prometheus

def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]

def until(condition, seconds, what):
    "Wait until a condition returns something true, and return that"
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if found := condition(): return found
        except httpx.TransportError: pass
        time.sleep(.2)
    raise AssertionError(f'{what}: not within {seconds} s')

@contextlib.contextmanager
def process(*words, **environment):
    "A process that is ended in the end"
    running = subprocess.Popen([str(w) for w in words], env={**os.environ, **environment}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try: yield running
    finally:
        running.terminate()
        running.wait(60)

KEYS = dict(STRIP_API_KEY='0123456789abcdef01234567', STRIP_METRICS_KEY='fedcba9876543210fedcba98')

@pytest.fixture(scope='module')
def server(served_bundle, pictures):
    "A client of a real server that has given answers and refusals, as many as its drift is computed from, and its process"
    port = free_port()
    clot = [sys.executable, '-c', 'from strip_notebooks.cli import main\nif __name__ == "__main__": main()']
    with process(*clot, 'serve', served_bundle, '--port', port, '--workers', 1, '--decoders', 1, **KEYS) as running, httpx.Client(base_url=f'http://127.0.0.1:{port}', timeout=60) as client:
        until(lambda: client.get('/ready').status_code == 200, 60, 'the server is ready')
        for picture in 3*sorted(pictures.iterdir()): assert ask(client, picture.read_bytes(), picture.name).status_code == 200
        assert ask(client, b'no image').status_code == 422
        yield client, running

def ask(client, data, name='a.png', key=KEYS['STRIP_API_KEY']):
    return client.post('/predict', files=dict(file=(name, data)), headers={'X-API-Key': key})

def exported(client):
    "The names in /metrics"
    answer = client.get('/metrics', headers={'X-API-Key': KEYS['STRIP_METRICS_KEY']})
    assert answer.status_code == 200, answer.text
    return {line.split('{')[0].split()[0] for line in answer.text.splitlines() if line and not line.startswith('#')}

def test_every_metric_that_is_asked_for_exists(server):
    "In rules and dashboard; `up` is of Prometheus itself"
    names = exported(server[0]) | {'up'}
    for title, expression in [*queries(), *((rule['alert'], rule['expr']) for rule in rules())]:
        wanted = named(expression)
        assert wanted and wanted <= names, f'{title}: {wanted - names}'

@pytest.mark.slow
def test_a_real_prometheus_finds_a_series_for_every_query_and_raises_an_alert(server, pictures, tmp_path):
    client, running = server
    exported(client)
    port, folder = free_port(), tmp_path
    config = scrape_config(folder, client.base_url.port, KEYS['STRIP_METRICS_KEY'])
    words = [f'--config.file={config}', f'--storage.tsdb.path={folder/"data"}', f'--web.listen-address=127.0.0.1:{port}']
    with process(program('prometheus'), *words), httpx.Client(base_url=f'http://127.0.0.1:{port}', timeout=30) as prometheus:
        def series(expression):
            found = prometheus.get('/api/v1/query', params=dict(query=expression.replace('$__rate_interval', '1m'))).json()
            assert found['status'] == 'success', (expression, found)
            return [s for s in found['data']['result'] if s['value'][1] != 'NaN']
        def alerts(): return {a['labels']['alertname'] for a in prometheus.get('/api/v1/alerts').json()['data']['alerts'] if a['state'] == 'firing'}
        until(lambda: series('up == 1'), 30, 'Prometheus reads the server')
        def every():
            ask(client, (pictures/'a.png').read_bytes())            # rates need counters that grow
            ask(client, b'no image')
            return all(series(expression) for _, expression in queries())
        try: until(every, 60, 'a series for every query')
        except AssertionError: pytest.fail(f'no series: {[title for title, expression in queries() if not series(expression)]}')
        assert 'ClotDown' not in alerts()
        running.terminate()
        running.wait(60)
        until(lambda: 'ClotDown' in alerts(), 30, 'an alert because the server ended')
