"""The example report and its picture: python tools/example.py (or make example).

The demo runs with its defaults in an empty folder, which takes some minutes. Its report becomes nbs/examples/report.html, a page
of the site, and the top of it nbs/images/report.png, the picture of the README, taken by Chromium.

    python tools/example.py --patients 120 --size 64     # options are those of `clot demo`
    python tools/example.py --report FILE                # another report; no demo is run
"""
import base64, os, re, shutil, subprocess, sys, tempfile
from io import BytesIO
from pathlib import Path

from nbdev.config import get_config
from PIL import Image

from strip_notebooks.core import StripError, write_text, atomic_path

browsers = 'chromium', 'chromium-browser', 'google-chrome', 'chrome'
width, height = 1000, 1300      # Of the window, pixels
most_bytes = 1_000_000          # Of a file in the repository

def run_demo(
    words,      # Options of `clot demo`
    folder,     # Where it runs; its data and runs stay there
)->Path:        # The report
    "Run the demo; what it prints is printed"
    environment = {**os.environ, 'PYTHONPATH': str(get_config().config_path)}
    demo = [sys.executable, '-c', 'from strip_notebooks.cli import main; main()', 'demo', *words]
    if subprocess.run(demo, cwd=folder, env=environment).returncode: raise StripError('The demo failed; its message is above.')
    return max(Path(folder).glob('runs/*-report-*/report.html'))

def picture_of(
    page:Path,  # An HTML file
)->Image:
    "The top of a page, as Chromium shows it"
    browser = next(filter(None, map(shutil.which, browsers)), None)
    if not browser: raise StripError(f'The picture needs a browser, one of {", ".join(browsers)}; install one.')
    with tempfile.TemporaryDirectory() as folder:
        options = ['--headless', '--no-sandbox', '--disable-gpu', '--hide-scrollbars', f'--window-size={width},{height}']
        subprocess.run([browser, *options, f'--screenshot={folder}/page.png', page.resolve().as_uri()], check=True, capture_output=True)
        with Image.open(f'{folder}/page.png') as picture: return picture.convert('RGB')

def small_png(
    picture:Image,
)->bytes:
    "A picture with 128 colors, which are enough for text and bars"
    file = BytesIO()
    picture.quantize(128, dither=Image.Dither.NONE).save(file, 'png', optimize=True)
    return file.getvalue()

def with_small_pictures(
    html:str,   # A report
)->str:
    "A page with its pictures in 128 colors each, or as WebP where that is smaller, as for photographs"
    def small(m):
        picture, webp = Image.open(BytesIO(base64.b64decode(m[1]))).convert('RGB'), BytesIO()
        picture.save(webp, 'webp', quality=65, method=6)
        kind, data = min(('png', small_png(picture)), ('webp', webp.getvalue()), key=lambda way: len(way[1]))
        return f'data:image/{kind};base64,{base64.b64encode(data).decode()}'
    return re.sub(r'data:image/png;base64,([A-Za-z0-9+/=]+)', small, html)

def save_example(
    report:Path,    # From a run of report
    notebooks:Path, # Where `examples` and `images` are
)->None:
    "Write the report and its picture; a `StripError` if the report is too large for the repository"
    html = with_small_pictures(report.read_text(encoding='utf-8'))
    if len(html) > most_bytes: raise StripError(f'The report has {len(html):,} bytes, and {most_bytes:,} are allowed; choose fewer patients.')
    write_text(notebooks/'examples'/'report.html', html)
    with atomic_path(notebooks/'images'/'report.png') as path: path.write_bytes(small_png(picture_of(report)))

def main(words):
    "Make the example with the options of `clot demo`, or from the report after `--report`"
    notebooks = get_config().nbs_path
    if words[:1] == ['--report']: return save_example(Path(words[1]), notebooks)
    with tempfile.TemporaryDirectory() as folder: save_example(run_demo(words, folder), notebooks)

if __name__ == '__main__':
    try: main(sys.argv[1:])
    except StripError as e: sys.exit(f'example: {e}')
