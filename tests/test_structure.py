"The shape of the project: floors, exports, clean notebooks, documented functions, a README in step"
import ast, json, os, re, shutil, subprocess, sys
from io import StringIO
from pathlib import Path
from tokenize import COMMENT, generate_tokens

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
    assert climbs('core', 'def f():\n    from strip_notebooks.docs import stage_site') == ['docs']
    assert climbs('core', 'from strip_notebooks import docs') == ['docs'] and climbs('core', 'import strip_notebooks.docs') == ['docs']
    assert climbs('docs', 'from strip_notebooks.core import StripError') == []

def test_numbers_are_used_once():
    numbers = [floor_of(p) for p in notebooks if module_of(p)]
    assert len(set(numbers)) == len(numbers)

def test_experiments_and_guides_define_no_module():
    assert [name(p) for p in notebooks if p.parent != root/'nbs' and module_of(p)] == []

def test_every_module_comes_from_a_notebook():
    assert {'.'.join(p.relative_to(library).with_suffix('').parts) for p in modules} == set(floors)

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
    "The files of one part that differ between the project and its copy, or stand in only one of them"
    def files(top): return {p.relative_to(top).as_posix(): p.read_text(encoding='utf-8') for p in (top/part).rglob(f'*{suffix}') if '.ipynb_checkpoints' not in p.parts}
    ours, theirs = files(root), files(copy)
    return sorted(f for f in {*ours, *theirs} if ours.get(f) != theirs.get(f))

def test_export_changes_nothing(copy):
    assert differing(copy, 'strip_notebooks', '.py') == []
    assert (copy/'pyproject.toml').read_text() == (root/'pyproject.toml').read_text()

def test_export_writes_the_library_anew(copy):
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
    library_files = {name(p) for p in library.rglob('*.py')}
    assert library_files <= {p.relative_to(tmp_path/'installed').as_posix() for p in (tmp_path/'installed').rglob('*')}
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
    made = subprocess.run([sys.executable, '-c', f'from strip_notebooks.docs import write_readme; write_readme({str(tmp_path)!r})'], cwd=root, capture_output=True, text=True)
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
