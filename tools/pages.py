"""A notebook as a page: signatures in place of exported code, links between names, no housekeeping cells.

A notebook is written for the person who works in it. The reader of a site needs it slightly different: the exported code
folded below its signature and the meaning of each argument, the housekeeping cells removed, and a name in backticks
linked to the page that explains it. nbdev has processors that do this, one small change each; four are replaced here.
"""
import ast, re
from html import escape
from importlib import import_module
from io import StringIO
from itertools import takewhile
from pathlib import Path
from tokenize import COMMENT, generate_tokens

from execnb.nbio import dict2nb, mk_cell, nb2dict
from nbdev import processors
from nbdev.config import get_config
from nbdev.doclinks import NbdevLookup, _nbpath2html, nbglob
from nbdev.frontmatter import FrontmatterProc
from nbdev.process import Processor

from api_index import api_index, marker
from formulas import with_formulas

def page_names(
    notebooks:Path,     # Folder of the notebooks
)->dict[str,str]:       # Name of a page in nbdev's index -> its path on the site, both relative to `notebooks`
    "The page of each notebook: nbdev's index says core.html, Quarto keeps the number and says 000_core.html"
    paths = [Path(f).relative_to(notebooks) for f in nbglob(notebooks)]
    return {_nbpath2html(p).as_posix(): p.as_posix().replace('.ipynb', '.html') for p in sorted(paths)}

def relative_links(
    text:str,           # Markdown
    folder:str,         # Folder of the page, relative to the notebooks: '' or such as 'guides'
    pages:dict[str,str],# As from `page_names`
)->str:                 # The same Markdown; addresses of other sites are unchanged
    "`text` with the addresses of nbdev's index made relative, so that the site works in any place, a disk included"
    config = get_config()
    host = f'{config.doc_host}/{config.doc_baseurl.strip("/")}'.rstrip('/') + '/'
    up = '../'*len(Path(folder).parts)
    def local(m): return f'({up}{pages[m[1]]}' if m[1] in pages else m[0]
    return re.sub(re.escape(f'({host}') + r'([\w./-]+?\.html)', local, text)

# --- nbdev's processors, and four of our own

class ShowFromModule(processors.exec_show_docs):
    """Runs the `show_doc` cells alone, in the namespace of the exported module

    nbdev would execute every exported cell again, and each cell with an `import` in it: here, half of the tests."""
    def begin(self):
        module = processors._default_exp(self.nb)
        self.nb.has_docs_ = bool(module and self.nb.has_docs_)
        if not self.nb.has_docs_: return
        super().begin()
        self.k.user_ns.update(vars(import_module(f'{get_config().lib_name}.{module}')))

    def __call__(self, cell):
        if processors._is_showdoc(cell): super().__call__(cell)

    def end(self): pass

# The link to the source on a code host, and the signature of an error that takes anything
unwanted = re.compile(r'^\[source\]\(.*\n+|^```python\ndef \w+\(\n    \*args, \*\*(?:kwargs|kwds)\n\):\n```\n+', flags=re.MULTILINE)

def method_names(
    cell,       # Code cell
)->list[str]:   # Such as 'Run.name'
    "The methods of the classes that a cell defines, to which nbdev's index gives anchors of their own"
    classes = [c for c in cell.parsed_() or () if isinstance(c, ast.ClassDef)]
    return [f'{c.name}.{f.name}' for c in classes for f in c.body if isinstance(f, (ast.FunctionDef, ast.AsyncFunctionDef))]

def field_rows(
    node,           # Class definition
    source:str,     # Of its cell
)->list[tuple]:     # Name, type, default and meaning of each field, as text
    "The fields of a NamedTuple, a data class or a model of settings; none for other classes"
    comments = {t.start[0]: t.string.lstrip('# ') for t in generate_tokens(StringIO(source).readline) if t.type == COMMENT}
    for field in node.body:
        if not isinstance(field, ast.AnnAssign) or field.target.id.startswith('_'): continue
        value, about = field.value, comments.get(field.lineno, '')
        if isinstance(value, ast.Call) and getattr(value.func, 'id', '') == 'Field':
            given = [k.value for k in value.keywords if k.arg == 'description']
            about = next((v.value for v in given if isinstance(v, ast.Constant)), about)
            value = value.args[0] if value.args else None
        elif isinstance(value, ast.Call): value = None      # of a data class: field(default_factory=...)
        yield field.target.id, ast.unparse(field.annotation), ast.unparse(value) if value else '', about

def field_tables(
    cell,           # Code cell
)->str:             # Markdown; empty without fields
    "The fields of the classes that a cell defines, as tables; names are HTML, so that no function of that name is linked"
    tables = []
    for node in (c for c in cell.parsed_() or () if isinstance(c, ast.ClassDef)):
        rows = list(field_rows(node, cell.source))
        lines = [f'| <code>{name}</code> | `{kind}` | {f"<code>{escape(default)}</code>" if default else ""} | {about} |'
                 for name, kind, default, about in [tuple(str(v).replace('|', '\\|') for v in row) for row in rows]]
        if rows: tables += [f'Fields of `{node.name}`:', '', '| name | type | default | meaning |', '|---|---|---|---|', *lines, '']
    return '\n'.join(tables)

class FoldSource(Processor):
    """Puts the source of an exported definition, folded, below its signatures, which come in the order of the code

    Between the two are the fields of a class that has any: the signature of a NamedTuple does not say what they mean."""
    def begin(self):
        cells = self.nb.cells
        for i,cell in enumerate(cells):
            docs = list(takewhile(lambda c: getattr(c, 'has_sd', 0), cells[i+1:]))
            if not docs or getattr(cell, 'has_sd', 0): continue
            anchors = ''.join(f'<a id="{name.lower()}"></a>' for name in method_names(cell))
            anchor_cells = [mk_cell(anchors, 'markdown')] if anchors else []
            fields = field_tables(cell)
            field_cells = [mk_cell(fields, 'markdown')] if fields else []
            cell.source = f'#| code-fold: true\n#| code-summary: "Source"\n{cell.source}'
            cell.directives_ = {}
            cells[i:i+1+len(docs)] = [*anchor_cells, *reversed(docs), *field_cells, cell]

    def cell(self, cell):
        for output in cell.get('outputs', []):
            text = output.get('data', {}).get('text/markdown')
            if text: output['data']['text/markdown'] = unwanted.sub('', ''.join(text)).splitlines(True)

class LinkNames(Processor):
    "Makes each exported name in backticks a link to the page that explains it; none inside a signature, which is code"
    def begin(self):
        self.lookup, self.pages = NbdevLookup(), page_names(get_config().nbs_path)

    def linked(self,
        text:str,   # Markdown
    )->str:
        "`text` with its links"
        return relative_links(self.lookup.linkify(text) or '', self.nb.folder_, self.pages)

    def cell(self, cell):
        if cell.cell_type == 'markdown': cell.source = self.linked(cell.source)
        for output in cell.get('outputs', []):
            text = output.get('data', {}).get('text/markdown')
            if text: output['data']['text/markdown'] = self.linked(''.join(text)).splitlines(True)

class TitleBlock(FrontmatterProc):
    "Makes the title, and the sentence below it, the page's front matter; the page keeps the notebook's name"
    def end(self):
        self.nb.frontmatter_ = self.fm
        super().end()
        if self.fm: self.nb.cells[0].source = re.sub(r'^output-file:.*\n', '', self.nb.cells[0].source, flags=re.MULTILINE)

class PageProcessors(processors.FilterDefaults):
    "nbdev's processors for documentation, with ours in their places"
    ours = dict(FrontmatterProc=TitleBlock, exec_show_docs=ShowFromModule, add_links=LinkNames)
    dropped = ('insert_warning', 'mv_exports', 'add_fold')
    def base_procs(self):
        theirs = [p for p in super().base_procs() if p.__name__ not in self.dropped]
        procs = [self.ours.get(p.__name__, p) for p in theirs]
        procs.insert(procs.index(ShowFromModule) + 1, FoldSource)
        return procs

def page_notebook(
    notebook:dict,  # Notebook as JSON gives it
    folder:str='',  # Its folder, relative to the notebooks: '' or such as 'guides'
)->dict:            # Notebook as JSON takes it
    "The notebook that a page is made of: documented, linked, without its housekeeping"
    nb = dict2nb(notebook)
    nb.folder_, nb.path_ = folder, str(Path(folder)/'page.ipynb')
    PageProcessors()(nb)
    for cell in nb.cells:
        cell.pop('has_sd', None)
        if cell.cell_type != 'markdown': continue
        cell.source = with_formulas(cell.source)
        if marker in cell.source: cell.source = cell.source.replace(marker, api_index(folder, page_names(get_config().nbs_path)))
    return nb2dict(nb)
