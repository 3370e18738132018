"The documentation site: it builds from `_quarto.yml`, every link leads somewhere, and a broken one is found"
import fcntl, json, os, re, shutil, subprocess, sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import nbformat
import pytest
import yaml

root = Path(__file__).resolve().parents[1]
tools = root/'tools'
sys.path.insert(0, str(tools))
import build_site, pages as page_tools, quarto_filter, readme
from strip_notebooks.core import StripError, write_json, write_text

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
            subprocess.run([sys.executable, '-c', f'import sys; sys.path.insert(0, {str(tools)!r}); from build_site import stage_site; stage_site({str(folder)!r})'], cwd=root, check=True)
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
    "So the pages look the same without a network, and nobody learns who reads them"
    fetched = re.compile(r'@import\s+(?:url\()?["\']?https?:|url\(["\']?https?:|<(?:script|img|iframe)[^>]+src="(?:https?:)?//|<link[^>]+rel="stylesheet"[^>]+href="(?:https?:)?//')
    assert fetched.search('@import url(https://fonts.example.org/css2)') and fetched.search('<script defer src="https://example.org/a.js">')
    assert [p.name for p in site.rglob('*') if p.suffix in ('.html', '.css') and fetched.search(p.read_text(encoding='utf-8'))] == []

def test_formulas_need_no_script(site):
    "They are pictures in the page, with their TeX as text; Quarto, which would ask for MathJax, is given MathML for what may be left"
    losses = (site/'nbs'/'400_training.losses.html').read_text()
    assert losses.count('<img class="formula"') >= 8 and 'alt="w_c = N / (C\\,n_c)"' in losses and '<span class="formula-line">' in losses
    for path in site.rglob('*.html'): assert 'class="math ' not in path.read_text(), path.name
    assert yaml.safe_load((root/'_quarto.yml').read_text())['format']['html']['html-math-method'] == 'mathml'

def test_the_index_of_names_is_complete(site):
    "Every public function and class that nbdev knows, with a link to its place, and nothing private"
    from strip_notebooks._modidx import d
    names = {full.removeprefix(f'{module}.') for module, known in d['syms'].items() for full in known}
    public = {n for n in names if not any(part.startswith('_') for part in n.split('.'))}
    page = (site/'nbs'/'guides'/'api.html').read_text()
    listed = set(re.findall(r'<a href="\.\./\d{3}_[\w.]+\.html#[\w.]+"><code>([\w.]+)</code></a>', page))
    assert public - listed == set() and listed - public == set() and len(listed) > 400

def test_the_example_report_is_part_of_the_site(site):
    "One page without anything from elsewhere, small enough for the repository, and linked from the home page"
    report = (site/'nbs'/'examples'/'report.html').read_text()
    assert report == (root/'nbs'/'examples'/'report.html').read_text() and len(report) < 1_000_000
    assert 'examples/report.html' in Page(site/'nbs'/'index.html').links and (root/'nbs'/'images'/'report.png').stat().st_size < 300_000

def test_fields_of_named_tuples_and_data_classes_are_shown(site):
    for page, names in {'030_statistics': ['value', 'low', 'high'], '310_bundle': [], '100_data.images': ['frame', 'slice', 'window']}.items():
        text = (site/'nbs'/f'{page}.html').read_text()
        for name in names: assert re.search(rf'<td><code>{name}</code></td>', text), f'{page}: the field {name} is not in a table'

def test_every_link_leads_somewhere(site):
    assert list(dead_links(site)) == []

def test_a_broken_link_is_found(staged, tmp_path):
    shutil.copytree(staged, tmp_path/'broken')
    config = yaml.safe_load((tmp_path/'broken'/'_quarto.yml').read_text())
    config['project']['render'] = pages[:3]             # the others take their time
    write_text(tmp_path/'broken'/'_quarto.yml', yaml.safe_dump(config, sort_keys=False))
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
        assert 'default_exp' not in path.read_text(), path.name

# --- the filter that Quarto calls

def sources(page): return [''.join(c['source']) for c in page['cells']]

def run_filter(page):
    "The page of a notebook as Quarto gets it: the filter is called in the notebook's own folder, with a path relative to it"
    folder = (root/page).parent
    command = [sys.executable, os.path.relpath(tools/'quarto_filter.py', folder)]
    return json.loads(subprocess.run(command, cwd=folder, input=(root/page).read_bytes(), capture_output=True, check=True).stdout)

def test_quarto_is_given_the_filter():
    "Quarto makes a path of `_quarto.yml` relative to the notebook where such a file exists"
    (filter,) = yaml.safe_load((root/'_quarto.yml').read_text())['format']['html']['ipynb-filters']
    assert (root/filter).samefile(tools/'quarto_filter.py')

def test_the_filter_gives_the_page_that_is_staged(staged):
    for page in [pages[0], next(p for p in pages if '/guides/' in p)]:
        assert sources(run_filter(page)) == sources(json.loads((staged/page).read_text()))

def test_the_filter_looks_up_a_prepared_page_without_importing_the_library(tmp_path):
    "However the JSON of the notebook is laid out; another notebook is not taken for it"
    notebook = json.loads((root/pages[0]).read_text())
    write_json(tmp_path/f"{quarto_filter.page_key(notebook, '')}.json", dict(cells=[], prepared=True))
    script = ('import json, sys; from pathlib import Path; import quarto_filter as q; q.prepared = Path(sys.argv[1]); q.main(); '
              'sys.exit("strip_notebooks" in sys.modules or "nbdev" in sys.modules)')
    text = json.dumps({**notebook, 'cells': [{**c, 'source': ''.join(c['source'])} for c in notebook['cells']]}, indent=3)
    done = subprocess.run([sys.executable, '-c', script, tmp_path], cwd=root/'nbs', input=text, capture_output=True, text=True, env={**os.environ, 'PYTHONPATH': str(tools)})
    assert (done.returncode, json.loads(done.stdout)) == (0, dict(cells=[], prepared=True)), done.stderr
    other = {**notebook, 'cells': notebook['cells'][:-1]}
    assert quarto_filter.page_key(other, '') != quarto_filter.page_key(notebook, '') != quarto_filter.page_key(notebook, 'guides')

def test_the_folder_of_a_page():
    assert [quarto_filter.page_folder(f) for f in (root/'nbs', root/'nbs'/'guides', root)] == ['', 'guides', '']

def test_quarto_prepares_all_pages_in_one_process(toy, monkeypatch):
    "What it runs first leaves every page where the filter looks; the site without Quarto does not run it"
    config = yaml.safe_load((root/'_quarto.yml').read_text())
    assert config['project']['pre-render'] == 'tools/prepare_pages.py' and 'pre-render' not in build_site.site_config(root/'_quarto.yml')['project']
    shutil.copytree(tools, toy/'tools', ignore=shutil.ignore_patterns('__pycache__'))
    done = subprocess.run([sys.executable, 'tools/prepare_pages.py'], cwd=toy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for page, folder in {'index.ipynb': '', 'guides/other.ipynb': 'guides'}.items():
        key = quarto_filter.page_key(json.loads((toy/'nbs'/page).read_text()), folder)
        assert (toy/'_proc'/'pages'/f'{key}.json').is_file()

# --- one page

def text_of(page): return '\n'.join(sources(page) + [''.join(o.get('data', {}).get('text/markdown', '')) for c in page['cells'] for o in c.get('outputs', [])])

def linked(prose, folder=''):
    "A line of Markdown as a page in `folder` shows it"
    cell = dict(cell_type='markdown', metadata={}, source=prose)
    return sources(page_tools.page_notebook(dict(cells=[cell], metadata={}, nbformat=4, nbformat_minor=5), folder))[-1]

@pytest.fixture
def here(monkeypatch): monkeypatch.chdir(root)

def test_names_of_pages(tmp_path):
    for name in ('index.ipynb', '000_core.ipynb', '130_data.formats.ipynb', 'guides/quickstart.ipynb'): write_text(tmp_path/name, '{}')
    assert page_tools.page_names(tmp_path) == {'core.html': '000_core.html', 'data.formats.html': '130_data.formats.html',
                                               'guides/quickstart.html': 'guides/quickstart.html', 'index.html': 'index.html'}

def test_links_are_relative(here):
    "From any folder; addresses of other sites are unchanged"
    link, names = '[`derive_seed`](https://example.org/core.html#derive_seed)', {'core.html': '000_core.html'}
    assert page_tools.relative_links(link, '', names) == '[`derive_seed`](000_core.html#derive_seed)'
    assert page_tools.relative_links(link, 'guides', names) == '[`derive_seed`](../000_core.html#derive_seed)'
    elsewhere = '[`Path`](https://docs.python.org/3/library/pathlib.html)'
    assert page_tools.relative_links(elsewhere, '', names) == elsewhere

def test_a_name_in_prose_is_linked(here):
    assert linked('see `derive_seed`') == 'see [`derive_seed`](000_core.html#derive_seed)'
    assert linked('see `derive_seed`', 'guides') == 'see [`derive_seed`](../000_core.html#derive_seed)'
    assert linked('no `such_name_anywhere`') == 'no `such_name_anywhere`'

def test_a_page_shows_signatures_in_order_and_folds_the_source(here, tmp_path):
    "Two definitions in one cell come in the order of the code; an error's `*args, **kwargs` is left out"
    page = page_tools.page_notebook(json.loads((root/'nbs'/'000_core.ipynb').read_text()))
    module = (root/'strip_notebooks'/'core.py').read_text()
    shown = [s.split('show_doc(')[1].rsplit(')')[0] for s in sources(page) if 'show_doc(' in s]
    assert len(shown) > 5 and shown == sorted(shown, key=lambda name: re.search(rf'^(?:class|def) {re.escape(name)}\b', module, flags=re.MULTILINE).start())
    assert sources(page)[0].startswith('---') and 'output-file' not in sources(page)[0]
    folded = [s for s in sources(page) if 'code-fold: true' in s]
    assert any('class StripError' in s for s in folded) and any('def nearest' in s for s in folded)
    assert '### StripError' in text_of(page) and 'def StripError' not in text_of(page) and 'def nearest' in text_of(page)

def test_formulas_become_pictures_and_code_does_not(here):
    made = linked('A $x < 1$, a price of 5 $ or 6 $, `$code$`, and $$\\frac{1}{n}\\sum_i p_i$$')
    assert made.count('<img class="formula"') == 2 and 'alt="x &lt; 1"' in made and '5 $ or 6 $, `$code$`' in made
    assert made.count('<span class="formula-line">') == 1

def test_fields_of_a_class():
    import ast
    source = 'class A(NamedTuple):\n    low:float # Lower bound\n    kind:str|None = None # Which\n    _hidden:int = 0\nclass B(Settings):\n    n:int = Field(3, ge=1, description="How many")'
    first, second = ast.parse(source).body
    assert list(page_tools.field_rows(first, source)) == [('low', 'float', '', 'Lower bound'), ('kind', 'str | None', 'None', 'Which')]
    assert list(page_tools.field_rows(second, source)) == [('n', 'int', '3', 'How many')]

# --- the whole site, on a project of two notebooks

@pytest.fixture
def toy(tmp_path):
    "A project with a home page and a guide"
    write_page(tmp_path, 'index.ipynb', '# Toy\n\n> Two pages.', 'Next: [the other](guides/other.ipynb).')
    write_page(tmp_path, 'guides/other.ipynb', '# Other', 'Back to [the first](../index.ipynb), whose seeds come from `derive_seed`.')
    shutil.copy(root/'settings.ini', tmp_path)
    project = {'type': 'website', 'output-dir': '_docs', 'render': ['nbs/index.ipynb', 'nbs/guides/other.ipynb']}
    html = {'toc': True, 'ipynb-filters': ['tools/quarto_filter.py']}
    write_text(tmp_path/'_quarto.yml', yaml.safe_dump(dict(project=project, execute=dict(enabled=False), format=dict(html=html))))
    return tmp_path

def write_page(folder, name, *texts):
    "A notebook of Markdown cells"
    kernel = dict(kernelspec=dict(name='python3', language='python', display_name='python3'))
    cells = [dict(cell_type='markdown', id=f'cell{i}', metadata={}, source=t) for i, t in enumerate(texts)]
    write_json(folder/'nbs'/name, dict(nbformat=4, nbformat_minor=5, metadata=kernel, cells=cells))

def build(folder):
    "`make docs` on a machine without Quarto"
    path = os.pathsep.join(p for p in os.environ['PATH'].split(os.pathsep) if not (Path(p)/'quarto').exists())
    return subprocess.run([sys.executable, tools/'build_site.py'], cwd=folder, capture_output=True, text=True, env={**os.environ, 'PATH': path})

def test_a_site_is_built(toy):
    done = build(toy)
    assert done.returncode == 0, done.stderr
    assert 'href="guides/other.html"' in (toy/'_docs'/'nbs'/'index.html').read_text()
    assert 'url=nbs/index.html' in (toy/'_docs'/'index.html').read_text()
    assert (toy/'README.md').read_text().splitlines()[1:] == ['# Toy', '', '> Two pages.', '', 'Next: [the other](nbs/guides/other.ipynb).']
    assert not (toy/'_proc').exists()

def test_a_broken_link_ends_the_build(toy):
    write_page(toy, 'index.ipynb', '# Toy\n\n> Two pages.', 'Next: [nowhere](guides/nowhere.ipynb).')
    done = build(toy)
    assert done.returncode == 1 and 'broken link guides/nowhere.ipynb' in done.stderr and 'Traceback' not in done.stderr
    assert not (toy/'_docs').exists() and not (toy/'_proc').exists()

def test_citation_changelog_and_contributing(here):
    about = yaml.safe_load((root/'CITATION.cff').read_text())
    settings = (root/'settings.ini').read_text()
    assert f"version = {about['version']}\n" in settings and {'cff-version', 'message', 'title', 'authors', 'license'} <= set(about)
    assert '## Unreleased' in (root/'CHANGELOG.md').read_text() and f"## {about['version']}" in (root/'CHANGELOG.md').read_text()
    for target in re.findall(r'`make (\w+)`', (root/'CONTRIBUTING.md').read_text()): assert re.search(rf'^{target}:', (root/'Makefile').read_text(), flags=re.MULTILINE), target

def test_a_page_that_does_not_exist_ends_the_build(toy):
    (toy/'nbs'/'guides'/'other.ipynb').unlink()
    done = build(toy)
    assert done.returncode == 1 and 'nbs/guides/other.ipynb, which does not exist' in done.stderr and 'Traceback' not in done.stderr

def test_a_folder_without_a_site_is_refused(tmp_path):
    with pytest.raises(StripError, match='has no _quarto.yml'): build_site.build_site(tmp_path)
    with pytest.raises(StripError, match='failed'): build_site.run_tool('smalldocs', 'check', '.', folder=tmp_path)

# --- the README

def test_links_of_the_readme():
    given = '[a](000_core.html#derive_seed) [b](guides/quickstart.ipynb) [c](https://quarto.org/a.html) ![d](a.png) ![e](images/b.png) [f](examples/report.html)'
    assert readme.repository_links(given, 'nbs') == ('[a](nbs/000_core.ipynb) [b](nbs/guides/quickstart.ipynb) [c](https://quarto.org/a.html) ![d](a.png) '
                                                     '![e](nbs/images/b.png) [f](nbs/examples/report.html)')

def test_the_readme_names_commands_that_exist():
    "Each command of its blocks is one of make or clot; `clot` takes the options"
    from strip_notebooks.cli import parser
    text = (root/'README.md').read_text()
    lines = [re.split('[#>]', line)[0].strip() for block in re.findall(r'^```\n(.*?)^```', text, flags=re.MULTILINE | re.DOTALL) for line in block.splitlines()]
    targets = re.findall(r'^(\w+):', (root/'Makefile').read_text(), flags=re.MULTILINE)
    for line in lines:
        if line.startswith('make '): assert line.split()[1] in targets, line
        if line.startswith('clot '): parser().parse_args(line.split()[1:])
    assert {'make demo', 'source .venv/bin/activate'} <= set(lines) and sum(line.startswith('clot ') for line in lines) >= 4

def test_pictures_of_the_readme_are_described():
    assert readme.described_pictures('![png](a.png) text', ['a.png'], ['A clot']) == '![A clot](a.png) text'
    with pytest.raises(StripError, match='fig-alt'): readme.described_pictures('![png](a.png)', ['a.png'], [])

def test_the_readme_begins_with_the_title_and_shows_its_pictures(here, tmp_path):
    text = readme.write_readme(tmp_path).read_text()
    assert text.splitlines()[1].startswith('# ') and '#|' not in text and '.html' not in re.sub(r'https?:\S+|nbs/examples/report.html', '', text)
    pictures = re.findall(r'!\[[^]]+\]\((.*?)\)', text)
    assert pictures and all((tmp_path/p).read_bytes()[1:4] == b'PNG' for p in pictures)
