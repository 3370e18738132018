"The documentation site: it builds from `_quarto.yml`, every link leads somewhere, and a broken one is found"
import fcntl, json, os, re, shutil, subprocess, sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import nbformat
import pytest
import yaml

root = Path(__file__).resolve().parents[1]
pages = yaml.safe_load((root/'_quarto.yml').read_text())['project']['render']

def smalldocs(task, folder):
    return subprocess.run([sys.executable, '-m', 'smalldocs.cli', task, '.'], cwd=folder, capture_output=True, text=True)

@pytest.fixture(scope='session')
def staged(tmp_path_factory, worker_id):
    "The folder that smalldocs reads, prepared once for all workers"
    base = tmp_path_factory.getbasetemp()
    folder = (base if worker_id == 'master' else base.parent)/'site'
    with open(folder.with_suffix('.lock'), 'w') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder/'index.html').exists():      # the last file that is written
            subprocess.run([sys.executable, '-c', f'from strip_notebooks.docs import stage_site; stage_site({str(folder)!r})'], cwd=root, check=True)
    return folder

@pytest.fixture(scope='session')
def site(staged, tmp_path_factory):
    "The rendered site"
    folder = tmp_path_factory.mktemp('rendered')/'site'
    shutil.copytree(staged, folder)
    done = smalldocs('render', folder)
    assert done.returncode == 0, done.stderr
    return folder/'_docs'

class Page(HTMLParser):
    "The anchors and the links of a page"
    def __init__(self, path):
        super().__init__()
        self.anchors, self.links = set(), set()
        self.feed(path.read_text(encoding='utf-8'))
    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if attrs.get('id'): self.anchors.add(attrs['id'])
        if tag == 'a' and attrs.get('href'): self.links.add(attrs['href'])

def dead_links(site):
    "(page, link) for each link within the site whose file or anchor is not there"
    read = {p.resolve(): Page(p) for p in site.rglob('*.html')}
    for path, page in read.items():
        for link in sorted(page.links):
            if re.match(r'\w+:|//', link): continue
            file, _, anchor = unquote(link).partition('#')
            target = (path.parent/file).resolve() if file else path
            if target.is_dir(): target = target/'index.html'
            if not target.exists() or anchor and target in read and anchor not in read[target].anchors: yield path.relative_to(site.resolve()).as_posix(), link

def test_check_finds_nothing(staged):
    done = smalldocs('check', staged)
    assert done.returncode == 0, done.stdout

def test_staged_notebooks_are_valid(staged):
    for page in pages: nbformat.validate(nbformat.read(staged/page, 4))

def test_every_page_is_built(site):
    for page in pages: assert (site/page).with_suffix('.html').exists()
    assert f"url={pages[0].replace('.ipynb', '.html')}" in (site/'index.html').read_text()

def test_nothing_is_fetched_from_elsewhere(site):
    "But smalldocs' KaTeX, on the pages with formulas: else a reader's address is told to nobody, and the pages look the same without a network"
    fetched = re.compile(r'@import\s+(?:url\()?["\']?https?:|url\(["\']?https?:|<(?:script|img|iframe)[^>]+src="(?:https?:)?//(?!\S+/katex@)|<link[^>]+rel="stylesheet"[^>]+href="(?:https?:)?//(?!\S+/katex@)')
    assert fetched.search('@import url(https://fonts.example.org/css2)') and fetched.search('<script defer src="https://example.org/a.js">')
    assert [p.name for p in site.rglob('*') if p.suffix in ('.html', '.css') and fetched.search(p.read_text(encoding='utf-8'))] == []

def test_every_link_leads_somewhere(site):
    assert list(dead_links(site)) == []

def test_a_broken_link_is_found(staged, tmp_path):
    shutil.copytree(staged, tmp_path/'broken')
    notebook = json.loads((tmp_path/'broken'/pages[0]).read_text())
    notebook['cells'].append(dict(cell_type='markdown', id='broken', metadata={}, source='See [a page that is not there](nowhere.ipynb).'))
    (tmp_path/'broken'/pages[0]).write_text(json.dumps(notebook))
    done = smalldocs('check', tmp_path/'broken')
    assert done.returncode == 1 and f'{pages[0]}: broken link nowhere.ipynb' in done.stdout

def test_a_missing_anchor_is_found(tmp_path):
    (tmp_path/'a.html').write_text('<a href="b.html#there"></a><a href="b.html#gone"></a><a href="c.html"></a><a href="https://a.org/x"></a>')
    (tmp_path/'b.html').write_text('<h2 id="there">')
    assert list(dead_links(tmp_path)) == [('a.html', 'b.html#gone'), ('a.html', 'c.html')]

def test_names_lead_to_their_chapters(site):
    "From another chapter, and from a guide one folder down"
    for pattern in ('nbs/[0-9]*.html', 'nbs/guides/*.html'):
        links = {(p.name, l) for p in site.glob(pattern) for l in Page(p).links if re.search(r'\d\d_[\w.]+\.html#', l)}
        assert [l for name, l in links if not l.startswith(name)], f'no page of {pattern} links a name to its chapter'

def test_pages_hold_no_housekeeping_and_no_placeholder_address(site):
    host = re.search(r'doc_host = (\S+)', (root/'settings.ini').read_text())[1]
    for path in site.glob('nbs/**/*.html'):
        found = Page(path)
        assert not [l for l in found.links if l.startswith(host)], path.name
        for word in ('default_exp', 'nbdev_export('): assert word not in path.read_text() or path.name == '960_docs.html', (path.name, word)

def test_the_filter_gives_the_page_that_is_staged(staged):
    "Quarto calls the filter in the notebook's own folder"
    for page in [pages[0], next(p for p in pages if '/guides/' in p)]:
        filtered = subprocess.run([Path(sys.executable).with_name('strip-docs-filter')], cwd=(root/page).parent, capture_output=True, check=True, input=(root/page).read_bytes())
        sources = [[''.join(c['source']) for c in json.loads(text)['cells']] for text in (filtered.stdout, (staged/page).read_text())]
        assert sources[0] == sources[1]
