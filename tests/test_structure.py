"""The shape of the project: floors, limits of size, exports, clean notebooks, documented functions, a README in step

    python tests/test_structure.py                             # the table of sizes, and what exceeds a limit
    python tests/test_structure.py nbs/140_data.cohort.ipynb   # the same for some notebooks
"""
import ast, json, os, re, shutil, subprocess, sys
from io import StringIO
from pathlib import Path
from tokenize import COMMENT, OP, generate_tokens

import pytest
import yaml
from nbdev.doclinks import patch_name

root = Path(__file__).resolve().parents[1]
library = root/'strip_notebooks'
notebooks = sorted(p for p in (root/'nbs').rglob('*.ipynb') if not any(part.startswith(('.', '_')) for part in p.relative_to(root).parts))
modules = sorted(p for p in library.rglob('*.py') if not p.name.startswith('_'))
def name(path): return str(path.relative_to(root))

def read(path): return json.loads(path.read_text(encoding='utf-8'))
def source(cell): return ''.join(cell['source'])
def code_cells(path): return [c for c in read(path)['cells'] if c['cell_type'] == 'code']

def module_of(path):
    "The module that a notebook exports, such as 'data.formats', or None"
    found = re.search(r'^#\|\s*default_exp\s+(\S+)', '\n'.join(map(source, code_cells(path))), flags=re.MULTILINE)
    return found and found[1]

def floor_of(path):
    "The number of a notebook, or None"
    found = re.match(r'(\d+)_', path.name)
    return found and int(found[1])

floors = {module_of(p): floor_of(p) for p in notebooks if module_of(p)}

def imported_modules(text):
    "The modules of our library that a piece of code imports anywhere in it, also inside its functions"
    lines = '\n'.join(l for l in text.splitlines() if not re.match(r'\s*[%!]', l))
    for node in ast.walk(ast.parse(lines)):
        if isinstance(node, ast.Import): names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level: names = [node.module] + [f'{node.module}.{a.name}' for a in node.names]
        elif isinstance(node, ast.ImportFrom): raise AssertionError(f'relative import from {node.module}: write strip_notebooks.…')
        else: continue
        yield from (n.removeprefix('strip_notebooks.') for n in names if n.removeprefix('strip_notebooks.') in floors)

def climbs(own, text):
    "The modules on the same floor or a higher one that `text` imports"
    return sorted({m for m in imported_modules(text) if floors[m] >= floors[own] and m != own})

# --- the law of the floors

@pytest.mark.parametrize('path', [p for p in notebooks if module_of(p)], ids=name)
def test_imports_go_down_the_floors(path):
    own = module_of(path)
    assert floor_of(path) is not None, f'{path.name} exports a module, but has no number'
    for cell in code_cells(path): assert climbs(own, source(cell)) == [], f'{path.name} ({floors[own]}) imports upwards in:\n{source(cell)}'

def test_an_upward_import_is_seen():
    assert climbs('core', 'def f():\n    from strip_notebooks.cli import main') == ['cli']
    assert climbs('core', 'from strip_notebooks import cli') == ['cli'] and climbs('core', 'import strip_notebooks.cli') == ['cli']
    assert climbs('cli', 'from strip_notebooks.core import StripError') == []

def test_numbers_are_used_once():
    numbers = [floor_of(p) for p in notebooks if module_of(p)]
    assert len(set(numbers)) == len(numbers)

def test_experiments_and_guides_define_no_module():
    assert [name(p) for p in notebooks if p.parent != root/'nbs' and module_of(p)] == []

def test_every_module_comes_from_a_notebook():
    assert {'.'.join(p.relative_to(library).with_suffix('').parts) for p in modules} == set(floors)

def test_numbers_have_three_digits():
    assert [p.name for p in notebooks if floor_of(p) is not None and not re.match(r'\d{3}_', p.name)] == []

# --- limits of size

LINES, WIDTH, PARAMETERS = 25, 120, 7     # of an exported cell, of an exported line, of a public function

def exported(path):
    "The exported cells of a notebook, each without its directives"
    for cell in code_cells(path):
        text = source(cell)
        if re.search(r'^#\|\s*exporti?\b', text, flags=re.MULTILINE): yield re.sub(r'^#\|.*\n?', '', text, flags=re.MULTILINE)

def code_lines(text):
    "The lines that are neither blank nor a comment alone"
    return [l for l in text.splitlines() if l.strip() and not l.lstrip().startswith('#')]

def joined(text):
    "How many semicolons join statements"
    return sum(t.type == OP and t.string == ';' for t in generate_tokens(StringIO(text).readline))

def parameters(node):
    "The names of a function's parameters, without self and cls"
    a = node.args
    return [p.arg for p in [*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, [a.vararg, a.kwarg])] if p.arg not in ('self', 'cls')]

def body_lines(node, text):
    "The lines of a function's body, without its docstring"
    body = node.body[1:] if ast.get_docstring(node) is not None else node.body
    return len(code_lines('\n'.join(text.splitlines()[body[0].lineno - 1:node.end_lineno]))) if body else 0

def functions(text): return [n for n in ast.walk(ast.parse(text)) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]

def violations(path):
    "What exceeds a limit in the exported cells of a notebook"
    for text in exported(path):
        first = next(iter(re.findall(r'^(?:async )?(?:def|class) (\w+)', text, flags=re.MULTILINE)), text.splitlines()[0][:40])
        if len(code_lines(text)) > LINES: yield f'{path.name}: the cell of {first} has {len(code_lines(text))} lines, at most {LINES}'
        yield from (f'{path.name}: {len(line)} characters, at most {WIDTH}: {line.strip()[:80]}' for line in text.splitlines() if len(line) > WIDTH)
        if joined(text): yield f'{path.name}: {joined(text)} semicolons join statements in the cell of {first}'
        for label, node in public_functions(ast.parse(text)):
            if len(parameters(node)) > PARAMETERS: yield f'{path.name}: {label} has {len(parameters(node))} parameters, at most {PARAMETERS}'

@pytest.mark.parametrize('path', [p for p in notebooks if module_of(p)], ids=name)
def test_exported_cells_keep_the_limits(path):
    assert list(violations(path)) == []

def test_what_exceeds_a_limit_is_seen(tmp_path):
    "One cell that is just within every limit, and one beyond each"
    body = lambda n: '\n'.join(f'    a{i} = {i}' for i in range(n))
    within = ['#| export\n# why\n\ndef f(a, b, c, d, e, f, g):\n' + body(24), '#| export\nclass A:\n    def f(self, a, b, c, d, e, f, g): pass', "#| export\nx = 'a;b'" + ' '*(WIDTH - 9), 'a = 1; b = 2']
    beyond = ['#| export\ndef f():\n' + body(25), '#| exporti\nx = 1; y = 2', '#| export\nx = ' + '1'*WIDTH, '#| export\ndef f(a, b, c, d, e, f, g, *, h): pass']
    for cells, n in (within, 0), (beyond, 4):
        (tmp_path/'x.ipynb').write_text(json.dumps(dict(cells=[dict(cell_type='code', source=c) for c in cells])))
        assert len(list(violations(tmp_path/'x.ipynb'))) == n, list(violations(tmp_path/'x.ipynb'))

wanted = {'exported lines per cell, median / 90 % / longest': '8 / 20 / 25', 'lines of a function body, median / 90 % / longest': '4 / 12 / 25',
          'width of exported lines, median / 90 %; over 120': '45 / 95; 0', 'lines that join statements with ;': '0',
          'parameters of public functions, 90 % / longest': '4 / 7', 'words per prose cell, mean': '35', 'pictures in all notebooks': 'wherever one would rather look'}

def sizes(paths):
    "The rows of the table of STYLE.md for some notebooks"
    at = lambda values, share: sorted(values)[min(int(share*len(values)), len(values) - 1)] if values else 0
    cells = [text for p in paths for text in exported(p)]
    lines = [len(code_lines(c)) for c in cells]
    bodies = [body_lines(n, c) for c in cells for n in functions(c)]
    widths = [len(l) for c in cells for l in c.splitlines() if l.strip()]
    counts = [len(parameters(n)) for c in cells for _, n in public_functions(ast.parse(c))]
    words = [len(source(c).split()) for p in paths for c in read(p)['cells'] if c['cell_type'] == 'markdown']
    pictures = sum(any(kind.startswith('image/') for kind in o.get('data', {})) for p in paths for c in code_cells(p) for o in outputs(c))
    found = [f'{at(lines, .5)} / {at(lines, .9)} / {max(lines, default=0)}', f'{at(bodies, .5)} / {at(bodies, .9)} / {max(bodies, default=0)}',
             f'{at(widths, .5)} / {at(widths, .9)}; {sum(w > WIDTH for w in widths)}', str(sum(map(joined, cells))),
             f'{at(counts, .9)} / {max(counts, default=0)}', f'{sum(words)/max(len(words), 1):.0f}', str(pictures)]
    return dict(zip(wanted, found))

def table(paths):
    "The table of sizes as text"
    head = f'{"":52}{"here":>16}   wanted'
    return '\n'.join([head, *(f'{label:52}{value:>16}   {wanted[label]}' for label, value in sizes(paths).items())])

def test_table_of_sizes(tmp_path, capsys):
    "Right for a notebook whose sizes are known; printed for this project, so that a reader of the log sees where it stands"
    code = ['#| export\ndef f(a, b):\n    "Adds"\n    c = a + b\n    # a comment\n\n    return c', '#| export\nx = 1; y = 2', 'z = 3']
    cells = [*(dict(cell_type='code', source=c) for c in code), dict(cell_type='markdown', source='four words of prose')]
    (tmp_path/'x.ipynb').write_text(json.dumps(dict(cells=cells)))
    assert list(sizes([tmp_path/'x.ipynb']).values()) == ['4 / 4 / 4', '2 / 2 / 2', '12 / 15; 0', '1', '2 / 2', '4', '0']
    with capsys.disabled(): print('\n' + table(notebooks))

# --- the files of a run are known to one module

run_file = re.compile(r"""\b(?:status|parameters|metrics|environment|links|record)\.json\b|\breport\.html\b(?!#)|\bpredictions\.csv\b|\blog\.txt\b|\bsummary\.(?:md|txt)\b|/\s*['"](?:tables|figures|bundle|checkpoints?|records)\b['"/]""")

def test_files_of_a_run_are_seen():
    for text in ("run.path/'status.json'", "run.path/'tables'/'x.csv'", 'path/"report.html"', "folder/'predictions.csv'"): assert run_file.search(text), text
    for text in ("run.table('splits')", "folder/'bundle.json'", 'run.report', "('report.html#x')", "image/'figures_of_merit'"): assert not run_file.search(text), text

@pytest.mark.parametrize('path', [p for p in notebooks if module_of(p) and module_of(p) != 'runs' or p.parent.name == 'experiments'], ids=name)
def test_only_runs_knows_the_files_of_a_run(path):
    "In what is exported, and in the experiments; chapters may show what a run left"
    cells = map(source, code_cells(path)) if path.parent.name == 'experiments' else exported(path)
    assert [l for text in cells for l in text.splitlines() if run_file.search(l)] == []

# --- what the library imports

builders = {'nbdev', 'execnb', 'ghapi'}

def packages(text):
    "The first name of every module that a piece of code imports, also inside its functions"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import): yield from (a.name.split('.')[0] for a in node.names)
        if isinstance(node, ast.ImportFrom): yield (node.module or '').split('.')[0]

@pytest.mark.parametrize('path', modules, ids=name)
def test_library_works_without_what_builds_it(path):
    assert builders & set(packages(path.read_text(encoding='utf-8'))) == set()

# --- exports and clean notebooks, tried on a copy

@pytest.fixture(scope='module')
def copy(tmp_path_factory):
    "The notebooks, the library and the settings, exported and cleaned by nbdev's own commands"
    folder = tmp_path_factory.mktemp('copy')
    ignore = shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints')
    for part in ('nbs', 'strip_notebooks'): shutil.copytree(root/part, folder/part, ignore=ignore)
    for part in ('settings.ini', 'pyproject.toml'): shutil.copy(root/part, folder)
    env = {k: v for k, v in os.environ.items() if k != 'IN_TEST'}     # set by nbdev's test runner; silences the export
    for command in ('nbdev_export', 'nbdev_clean'):
        subprocess.run([Path(sys.executable).with_name(command)], cwd=folder, env=env, check=True, capture_output=True, text=True)
    return folder

def differing(copy, part, suffix):
    "The files of one folder that differ between the project and its copy, or are in only one of them"
    def files(top): return {p.relative_to(top).as_posix(): p.read_text(encoding='utf-8') for p in (top/part).rglob(f'*{suffix}') if '.ipynb_checkpoints' not in p.parts}
    ours, theirs = files(root), files(copy)
    return sorted(f for f in {*ours, *theirs} if ours.get(f) != theirs.get(f))

def test_export_changes_nothing(copy):
    assert differing(copy, 'strip_notebooks', '.py') == []
    assert (copy/'pyproject.toml').read_text() == (root/'pyproject.toml').read_text()

def test_export_writes_an_emptied_library_again(copy):
    "A copy whose library was emptied gets the same one back, so the test above compares with something"
    module = copy/'strip_notebooks'/'core.py'
    before = module.read_text(); module.unlink()
    subprocess.run([Path(sys.executable).with_name('nbdev_export')], cwd=copy, check=True, capture_output=True, env={k: v for k, v in os.environ.items() if k != 'IN_TEST'})
    assert module.read_text() == before

def test_notebooks_are_clean(copy):
    assert differing(copy, 'nbs', '.ipynb') == []

def test_the_wheel_holds_the_library_and_the_experiments(copy, tmp_path):
    "So `clot run` works for those who have installed it and have no checkout"
    for part in ('setup.py', 'README.md', 'LICENSE', 'MANIFEST.in'): shutil.copy(root/part, copy)
    subprocess.run([sys.executable, 'setup.py', '-q', 'bdist_wheel', '-d', tmp_path], cwd=copy, check=True, capture_output=True)
    (wheel,) = tmp_path.glob('*.whl')
    subprocess.run([sys.executable, '-m', 'zipfile', '-e', wheel, tmp_path/'installed'], check=True)
    library_files = {name(p) for p in library.rglob('*') if p.is_file() and '__pycache__' not in p.parts}     # templates and styles too
    assert library_files - {p.relative_to(tmp_path/'installed').as_posix() for p in (tmp_path/'installed').rglob('*')} == set()
    asked = [sys.executable, '-c', 'from strip_notebooks.experiments import experiment_paths; print(*experiment_paths().values())']
    found = subprocess.run(asked, cwd=tmp_path, env={**os.environ, 'PYTHONPATH': str(tmp_path/'installed')}, capture_output=True, text=True, check=True).stdout.split()
    assert found == [str(tmp_path/'installed'/'strip_notebooks'/'steps'/p.name) for p in sorted((root/'nbs'/'experiments').glob('*.ipynb'))]

# --- what a notebook may hold

def outputs(cell): return cell.get('outputs', [])
def shown(output):
    "The text of an output, without its pictures, whose encoding may hold anything"
    return json.dumps({**output, 'data': {kind: v for kind, v in output.get('data', {}).items() if not kind.startswith('image/')}})

machine_path = re.compile(r'(?<![\w.:/~<>-])/(?:home|Users|root|work|tmp|mnt|private|var/folders)/[\w.-]+|\b[A-Z]:\\\\?Users\\')

def test_machine_paths_are_seen():
    for text in ('in /home/someone/x.py', '"/tmp/tmpabc/data"', "('/root/project')", r'C:\Users\me'): assert machine_path.search(text), text
    for text in ('https://a.org/home/page', 'data/tmp/x', '../work/x', 'and/or', '</root/x>'): assert not machine_path.search(text), text

@pytest.mark.parametrize('path', notebooks, ids=name)
def test_notebook_holds_no_error_and_no_machine_path(path):
    for cell in read(path)['cells']:
        assert not [o for o in outputs(cell) if o['output_type'] == 'error'], f'an error is saved below:\n{source(cell)}'
        found = machine_path.search(source(cell) + '\n' + '\n'.join(map(shown, outputs(cell))))
        assert not found, f'{found[0]} is a path of one machine, in or below:\n{source(cell)}'

@pytest.mark.parametrize('path', notebooks, ids=name)
def test_notebook_opens_with_a_title_and_a_sentence(path):
    "And nothing else in that cell: it becomes the page's title block, where more would be lost"
    first = read(path)['cells'][0]
    assert first['cell_type'] == 'markdown' and re.fullmatch(r'# \S.*\n+> \S.*\s*', source(first)), source(first)

@pytest.mark.parametrize('path', notebooks, ids=name)
def test_notebook_is_light(path):
    assert path.stat().st_size <= 400_000, 'smaller or fewer pictures, tables by .head()'

@pytest.mark.parametrize('path', notebooks, ids=name)
def test_run_all_does_not_rewrite_the_library(path):
    "People export with `nbdev_export`; a reader who presses Run All in a chapter only reads"
    assert not [source(c) for c in code_cells(path) if 'nbdev_export(' in source(c).replace('nbdev_export()`', '')]

def test_exported_imports_are_by_name():
    for path in modules:
        for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
            if isinstance(node, ast.ImportFrom): assert [a.name for a in node.names] != ['*'], f'{name(path)} imports * from {node.module}'

def test_nothing_large_in_git():
    listed = subprocess.run(['git', 'ls-files', '-z'], cwd=root, capture_output=True, text=True, check=True).stdout.split('\0')
    assert [f for f in listed if f and (root/f).is_file() and (root/f).stat().st_size > 1_000_000] == []

# --- documented functions

def public_functions(tree):
    "The public functions of a module, patched methods among them, and the methods of its public classes that override no other's"
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    for node in tree.body:
        if isinstance(node, functions) and not node.name.startswith('_'): yield node.name, node
        if isinstance(node, ast.ClassDef) and not node.name.startswith('_') and not node.bases:
            for method in node.body:
                if isinstance(method, functions) and (not method.name.startswith('_') or method.name == '__init__'): yield f'{node.name}.{method.name}', method

def undocumented(text):
    "What lacks a docstring, and the parameters that lack a comment on their line"
    commented = {t.start[0] for t in generate_tokens(StringIO(text).readline) if t.type == COMMENT}
    for label, node in public_functions(ast.parse(text)):
        if not ast.get_docstring(node) and node.name != '__init__': yield f'{label} has no docstring'
        a = node.args
        arguments = [*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, [a.vararg, a.kwarg])]
        yield from (f'{label}: {p.arg} has no comment' for p in arguments if p.arg not in ('self', 'cls') and p.lineno not in commented)

def undocumented_classes(text):
    return [n.name for n in ast.parse(text).body if isinstance(n, ast.ClassDef) and not n.name.startswith('_') and not ast.get_docstring(n)]

@pytest.mark.parametrize('path', modules, ids=name)
def test_public_functions_are_documented(path):
    text = path.read_text(encoding='utf-8')
    assert [*undocumented(text), *undocumented_classes(text)] == []

@pytest.mark.parametrize('path', modules, ids=name)
def test_a_name_is_defined_once(path):
    definitions = [n for n in ast.parse(path.read_text(encoding='utf-8')).body if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))]
    names = [str(patch_name(d)) for d in definitions]
    assert sorted(n for n in set(names) if names.count(n) > 1) == []

def test_a_missing_comment_is_seen():
    assert list(undocumented('def f(\n    a, # One\n    b,\n):\n    "Gives"\n')) == ['f: b has no comment']
    assert list(undocumented('def f(): pass')) == ['f has no docstring']
    assert list(undocumented('def _f(a): pass')) == []

# --- the home page

def test_readme_is_in_step_with_the_home_page(tmp_path):
    made = subprocess.run([sys.executable, '-c', f'import sys; sys.path.insert(0, "tools"); from readme import write_readme; write_readme({str(tmp_path)!r})'], cwd=root, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    for file in sorted(p for p in tmp_path.rglob('*') if p.is_file()):
        assert (root/file.relative_to(tmp_path)).read_bytes() == file.read_bytes(), f'{file.name} is out of step with nbs/index.ipynb; run make docs'

def listed_pages(contents):
    "The pages of a sidebar, from top to bottom"
    for entry in contents:
        if isinstance(entry, str): yield entry
        elif 'contents' in entry: yield from listed_pages(entry['contents'])
        else: yield entry['href']

def test_the_site_lists_every_notebook_in_order():
    config = yaml.safe_load((root/'_quarto.yml').read_text())
    render, sidebar = config['project']['render'], list(listed_pages(config['website']['sidebar']['contents']))
    assert render[0] == sidebar[0] == 'nbs/index.ipynb'
    assert sorted(render) == sorted(sidebar) == [name(p) for p in notebooks]
    chapters = [p for p in sidebar if floor_of(Path(p)) is not None]
    assert chapters == sorted(chapters)

if __name__ == '__main__':
    asked = [Path(a).resolve() for a in sys.argv[1:]] or notebooks
    found = [v for p in asked for v in violations(p)]
    print(*found, f'{len(found)} violations' if found else 'every limit is kept', '', table(asked), sep='\n')
    sys.exit(bool(found))
