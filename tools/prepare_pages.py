"""What Quarto runs before it renders: all pages are processed in one process, and kept for its filter.

Quarto starts the filter `quarto_filter.py` once per page. To process a page, the library and with it torch are imported,
which takes seconds; so it is done here once, and the filter only looks the pages up.
"""
import os

import yaml
from nbdev.config import get_config

from build_site import processed_pages
from quarto_filter import page_key, prepared
from strip_notebooks.core import write_json

def asked_pages(
    root,       # The project
)->list[str]:   # Paths of notebooks, relative to `root`
    "The pages that Quarto is about to render: those it names, or all of the site"
    pages = yaml.safe_load((root/'_quarto.yml').read_text(encoding='utf-8'))['project']['render']
    named = os.environ.get('QUARTO_PROJECT_INPUT_FILES', '').split('\n')
    some = [os.path.relpath(os.path.join(root, n.strip()), root) for n in named if n.strip().endswith('.ipynb')]
    return [p for p in pages if p in some] or pages

def prepare_pages(
    root,       # The project
)->None:
    "Process the pages and keep each under the key that the filter looks for"
    for _, folder, notebook, page in processed_pages(root, asked_pages(root)):
        write_json(prepared/f'{page_key(notebook, folder)}.json', page)

if __name__ == '__main__': prepare_pages(get_config().config_path)
