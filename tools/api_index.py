"""The index of all public names: which chapter explains a name, and its first sentence.

It is made from nbdev's index of names and from the source of the modules, which is read and not imported.
"""
import ast
from pathlib import Path

from nbdev.config import get_config
from nbdev.doclinks import patch_name

marker = '<!-- every public name -->'   # In nbs/guides/api.ipynb, where the index is put on its page

def definitions(
    tree,       # A parsed module
):              # Gives (name, node), methods as 'Class.method'
    "The public functions, classes, patched methods and methods of public classes in a module"
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    for node in tree.body:
        if not isinstance(node, (*functions, ast.ClassDef)): continue
        name = str(patch_name(node)) if isinstance(node, functions) else node.name
        if any(part.startswith('_') for part in name.split('.')): continue
        yield name, node
        if not isinstance(node, ast.ClassDef): continue
        for method in node.body:
            if isinstance(method, functions) and not method.name.startswith('_'): yield f'{name}.{method.name}', method

def index_rows(
    names:dict[str,str],    # Of nbdev's index: full name -> address of its page and anchor
    library:Path,           # Folder of the package
)->dict[str,list]:          # Module -> (name, address, first sentence), in the order of the code
    "Every public name of the library"
    rows = {}
    for path in sorted(library.rglob('*.py')):
        module = '.'.join(path.relative_to(library).with_suffix('').parts)
        for name, node in definitions(ast.parse(path.read_text(encoding='utf-8'))):
            address = names.get(f'{library.name}.{module}.{name}')
            about = (ast.get_docstring(node) or '').strip().splitlines()
            if address: rows.setdefault(module, []).append((name, address, about[0] if about else ''))
    return rows

def api_index(
    folder:str,             # Folder of the page, relative to the notebooks: '' or such as 'guides'
    pages:dict[str,str],    # From `page_names`: name of a page in nbdev's index -> its path on the site
)->str:                     # Markdown
    "A table of names for each module, in the order of the chapters"
    from strip_notebooks._modidx import d
    up = '../'*len(Path(folder).parts)
    names = {name: at for module in d['syms'].values() for name, (at, _) in module.items()}
    def place(module): return pages[f'{module}.html']
    sections = []
    rows = index_rows(names, get_config().lib_path)
    for module in sorted(rows, key=place):
        lines = [f'| [`{name}`]({up}{place(module)}#{at.partition("#")[2].lower()}) | {cell(about)} |' for name, at, about in rows[module]]
        sections += [f'## {module}', '', '| name | what it is |', '|---|---|', *lines, '']
    return '\n'.join(sections)

def cell(
    text:str,   # A sentence
)->str:         # The same as a cell of a Markdown table, in which no name is a link
    "A sentence for a cell of a table"
    return text.replace('|', '\\|').replace('$', '\\$')
