"""Removes the state of widgets from saved notebooks: python tools/widget_state.py [NOTEBOOK ...] (default: all of nbs/).

A widget lives in a running kernel. What a notebook keeps of it is large, may hold images, and shows nothing: JupyterLab says
"Loading widget", and the documentation site is blank. The static twin below each widget is what stays.
"""
import sys
from pathlib import Path

from strip_notebooks.core import read_json, write_text

view = 'application/vnd.jupyter.widget-view+json'

def has_state(
    notebook:dict,  # Notebook as JSON gives it
)->bool:
    "Whether a notebook holds the state or the view of a widget"
    views = [o for c in notebook['cells'] for o in c.get('outputs', []) if view in o.get('data', {})]
    return bool(views) or 'widgets' in notebook['metadata']

def without_state(
    notebook:dict,  # Notebook as JSON gives it
)->dict:            # The same notebook
    "`notebook` without the state and the views of widgets"
    notebook['metadata'].pop('widgets', None)
    for cell in notebook['cells']:
        if 'outputs' in cell: cell['outputs'] = [o for o in cell['outputs'] if view not in o.get('data', {})]
    return notebook

def main(
    paths,          # Notebooks
)->int:             # How many were changed
    "Clean notebooks in place"
    import json
    changed = [p for p in map(Path, paths) if has_state(read_json(p, ['cells', 'metadata']))]
    for path in changed:
        cleaned = without_state(read_json(path))
        write_text(path, json.dumps(cleaned, indent=1, ensure_ascii=False, sort_keys=True) + '\n')
    return len(changed)

if __name__ == '__main__':
    notebooks = sys.argv[1:] or sorted(Path(__file__).resolve().parents[1].glob('nbs/**/[!.]*.ipynb'))
    print(f'cleaned: {main(notebooks)}')
