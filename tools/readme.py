"""README.md from nbs/index.ipynb: the home page once more, as Markdown.

The title comes first, links lead to the notebooks instead of to pages, and each picture is a file beside the notebooks.
It is made from the outputs that are saved in the notebook, so the same notebook gives the same README everywhere.
"""
import json, re
from pathlib import Path

import nbformat, yaml
from nbconvert import MarkdownExporter
from nbdev.config import get_config

from pages import page_notebook
from strip_notebooks.core import StripError, atomic_path, write_text

def repository_links(
    text:str,       # Markdown of a page among the notebooks
    notebooks:str,  # Their folder, relative to the README
)->str:
    "`text` with links to pages and notebooks turned into links to the notebooks in the repository; files are found, too"
    text = re.sub(r'\]\(((?:images|examples)/[\w./-]+)\)', rf']({notebooks}/\1)', text)
    return re.sub(r'\]\((?!\w+:)([\w./-]+)\.(?:ipynb|html)(?:#[^)]*)?\)', lambda m: m[0] if m[1].startswith(f'{notebooks}/') else f']({notebooks}/{m[1]}.ipynb)', text)

def plain_cell(
    cell:dict,  # Cell of a page
)->dict:        # The same without Quarto's options and without HTML; nbconvert leaves its source out if it says `echo: false`
    "A cell as the README shows it: a table as text, which reads well in an editor too"
    if cell['cell_type'] != 'code': return cell
    source = ''.join(cell['source'])
    outputs = [{**o, 'data': {k: v for k,v in o['data'].items() if k != 'text/html'}} if 'data' in o else o for o in cell['outputs']]
    metadata = {'transient': {'remove_source': 'echo: false' in source}}
    return {**cell, 'source': re.sub(r'^#\|.*\n?', '', source, flags=re.MULTILINE), 'outputs': outputs, 'metadata': metadata}

def readme_cells(
    page:dict,  # As from `page_notebook`
)->list[dict]:  # Cells that nbconvert makes Markdown of
    "The cells of the home page, with its title as a heading again"
    title = yaml.safe_load(''.join(page['cells'][0]['source']).strip().strip('-'))
    head = dict(cell_type='markdown', id='title', metadata={}, source=f"# {title['title']}\n\n> {title['description']}")
    return [head] + [plain_cell(c) for c in page['cells'][1:]]

def described_pictures(
    text:str,               # Markdown from nbconvert
    paths:list[str],        # Paths of its pictures
    descriptions:list[str], # One per picture, from `#| fig-alt:`
)->str:
    "`text` with each picture described; `StripError` if their numbers differ"
    if len(descriptions) != len(paths):
        raise StripError(f'index.ipynb: number of pictures {len(paths)}, of descriptions {len(descriptions)}; '
                         'give each cell with a picture its `#| fig-alt: "..."`.')
    for path, alt in zip(paths, descriptions): text = text.replace(f'![png]({path})', f'![{alt}]({path})')
    return text

def write_readme(
    folder=None,    # Where to write; the project's folder if none is given
)->Path:            # The README.md
    "Write README.md from index.ipynb, and its pictures beside the notebooks"
    config = get_config()
    folder, notebooks = Path(folder or config.config_path), config.nbs_path.name
    page = page_notebook(json.loads((config.nbs_path/'index.ipynb').read_text(encoding='utf-8')))
    code = '\n'.join(''.join(c['source']) for c in page['cells'])
    descriptions = re.findall(r'^#\|\s*fig-alt:\s*"?(.*?)"?\s*$', code, flags=re.MULTILINE)
    cells = {**page, 'cells': readme_cells(page), 'metadata': {'language_info': {'name': 'python'}}}
    exporter = MarkdownExporter(display_data_priority=['image/png', 'text/markdown', 'text/plain'])
    resources = dict(unique_key='index', output_files_dir=f'{notebooks}/images')
    text, found = exporter.from_notebook_node(nbformat.reads(json.dumps(cells), as_version=4), resources)
    pictures = found.get('outputs', {})
    for path, png in pictures.items():
        with atomic_path(folder/path) as p: p.write_bytes(png)
    text = repository_links(described_pictures(text, list(pictures), descriptions), notebooks)
    for path in set(re.findall(rf'\]\(({notebooks}/images/[\w./-]+)\)', text)) - set(pictures):
        if (folder/path).resolve() == (config.config_path/path).resolve(): continue     # it is where it belongs
        with atomic_path(folder/path) as p: p.write_bytes((config.config_path/path).read_bytes())
    head = '<!-- Made from nbs/index.ipynb by tools/readme.py; edit the notebook. -->\n'
    write_text(folder/'README.md', head + re.sub(r'\n{3,}', '\n\n', text).strip() + '\n')
    return folder/'README.md'

if __name__ == '__main__': write_readme()
