"""The filter that Quarto calls: a notebook on standard input, the notebook of its page on standard output.

Quarto starts one process per page, in the notebook's own folder. To process a page, the library has to be imported,
which takes seconds; so `prepare_pages.py`, which Quarto runs before it renders, processes all pages in one process and
keeps them in `_proc/pages`, and this filter only looks them up. A page that is not there, as one that was changed during a
preview, is processed here.
"""
import hashlib, json, sys
from contextlib import redirect_stdout
from pathlib import Path

root = Path(__file__).resolve().parents[1]
prepared = root/'_proc'/'pages'

def page_key(
    notebook:dict,  # Notebook as JSON gives it
    folder:str,     # Its folder, relative to the notebooks: '' or such as 'guides'
)->str:             # Hexadecimal
    "A name for the page of a notebook, the same however its JSON is laid out"
    cells = [[c['cell_type'], ''.join(c['source']), c.get('outputs', [])] for c in notebook['cells']]
    return hashlib.sha256(json.dumps([folder, cells], sort_keys=True).encode()).hexdigest()

def page_folder(
    folder:Path,    # Folder of a notebook
)->str:             # '' or such as 'guides'
    "A folder relative to the notebooks; '' for one elsewhere"
    notebooks = root/'nbs'
    inside = folder.resolve().relative_to(notebooks).as_posix() if folder.resolve().is_relative_to(notebooks) else '.'
    return '' if inside == '.' else inside

def filtered(
    notebook:dict,  # Notebook as JSON gives it
    folder:str,     # As from `page_folder`
)->dict:            # Notebook as JSON takes it
    "The notebook of a page, looked up or processed"
    page = prepared/f'{page_key(notebook, folder)}.json'
    if page.is_file(): return json.loads(page.read_text(encoding='utf-8'))
    from pages import page_notebook
    return page_notebook(notebook, folder)

def main():
    "What the libraries print goes to standard error: standard output is for the page alone"
    with redirect_stdout(sys.stderr): page = filtered(json.load(sys.stdin), page_folder(Path.cwd()))
    json.dump(page, sys.stdout)

if __name__ == '__main__': main()
