"""The documentation site and the README: python tools/build_site.py (or make docs).

Quarto builds the site where it is installed. Elsewhere smalldocs does, which reads the same `_quarto.yml` in pure Python
and finds broken links; it runs no filters, so a folder with the pages' notebooks is prepared for it.
"""
import json, os, shutil, subprocess, sys
from pathlib import Path

import yaml
from nbdev.config import get_config

from pages import page_notebook
from readme import write_readme
from strip_notebooks.core import StripError, atomic_path, write_json, write_text

def site_config(
    path:Path,  # The `_quarto.yml`
)->dict:
    "The configuration of the site, without what needs Quarto, and with a redirect from the root to the first page"
    config = yaml.safe_load(path.read_text(encoding='utf-8'))
    config.pop('execute', None)
    for key in ('ipynb-filters', 'html-math-method'): config['format']['html'].pop(key, None)
    config['project'].pop('pre-render', None)
    config['project']['resources'] = ['index.html', *config['project'].get('resources', [])]
    return config

def redirect(
    page:str,   # Path of the page, relative to the root
)->str:         # HTML
    "A page that forwards to `page`"
    head = f'<!DOCTYPE html>\n<meta charset="utf-8">\n<title>{page}</title>\n'
    return head + f'<meta http-equiv="refresh" content="0; url={page}">\n<a href="{page}">{page}</a>\n'

def processed_pages(
    root:Path,          # The project
    pages:list[str],    # Paths of the notebooks, relative to `root`
):                      # Gives (path, folder relative to the notebooks, notebook, notebook of its page)
    "Each page of the site, processed; `StripError` for one that does not exist"
    for page in pages:
        if not (root/page).is_file():
            raise StripError(f'_quarto.yml lists {page}, which does not exist; remove it from the list, or write it.')
        notebook = json.loads((root/page).read_text(encoding='utf-8'))
        place = (root/page).parent.relative_to(get_config().nbs_path).as_posix()
        folder = '' if place == '.' else place
        yield page, folder, notebook, page_notebook(notebook, folder)

def stage_site(
    folder,         # Where to put it; files of the same names are replaced
)->list[str]:       # The pages, in the order of `_quarto.yml`
    "Write what `smalldocs check` and `smalldocs render` need: the configuration, the pages' notebooks, styles and pictures"
    root, folder = get_config().config_path, Path(folder)
    config = site_config(root/'_quarto.yml')
    pages = config['project']['render']
    for page, _, _, processed in processed_pages(root, pages): write_json(folder/page, processed)
    for extra in get_config().nbs_path.rglob('*.*'):
        if extra.suffix in ('.css', '.png', '.svg', '.html') and '.ipynb_checkpoints' not in extra.parts:
            with atomic_path(folder/extra.relative_to(root)) as p: shutil.copyfile(extra, p)
    write_text(folder/'_quarto.yml', yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
    write_text(folder/'index.html', redirect(pages[0].replace('.ipynb', '.html')))
    return pages

def run_tool(
    *command,   # Program and its arguments
    folder,     # Where it runs
)->None:
    "Run a program of this environment or on the path; a `StripError` with its own words if it fails"
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get('PATH', '')])
    env = {**os.environ, 'PATH': path, 'QUARTO_PYTHON': sys.executable}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    if done.returncode: raise StripError(f'`{" ".join(map(str, command))}` failed:\n{done.stdout}{done.stderr}')

def render_with_smalldocs(
    root:Path,      # The project
    staged:Path,    # Empty folder to work in
)->None:
    "The site into _docs by smalldocs, after a check for broken links"
    stage_site(staged)
    for task in ('check', 'render'): run_tool('smalldocs', task, '.', folder=staged)
    shutil.rmtree(root/'_docs', ignore_errors=True)
    shutil.move(staged/'_docs', root/'_docs')

def build_site(
    root:Path,  # The project
)->None:
    "Write README.md, and the site into _docs"
    if not (root/'_quarto.yml').is_file(): raise StripError(f'{root} has no _quarto.yml; run this in the project.')
    write_readme()
    shutil.rmtree(root/'_proc', ignore_errors=True)
    try:
        if shutil.which('quarto'): run_tool('quarto', 'render', folder=root)   # which runs prepare_pages.py first
        else: render_with_smalldocs(root, root/'_proc'/'site')
    finally: shutil.rmtree(root/'_proc', ignore_errors=True)

if __name__ == '__main__':
    root = get_config().config_path
    try: build_site(root)
    except StripError as e: sys.exit(f'build_site: {e}')
    print(f'The site is in {root/"_docs"}: open index.html there; for its search, `python -m http.server -d _docs`.')
