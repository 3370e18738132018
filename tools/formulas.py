"""Formulas as pictures that need no script: TeX in, an SVG inside the page out.

Quarto and smalldocs leave formulas to MathJax or KaTeX, which a reader's browser fetches from another site. The pages of
this project work without a network, so each formula is drawn here by matplotlib; its TeX is the text for those who cannot
see it.
"""
import base64, re
from io import BytesIO

from matplotlib import mathtext, rc_context
from matplotlib.font_manager import FontProperties

points = 12     # Size of the letters; the page scales a formula with its text

def formula_svg(
    tex:str,    # Such as '1/(2k-2)', without dollars
)->tuple:       # SVG as bytes, and how far it reaches below the line, in points
    "A formula as a picture"
    file = BytesIO()
    drawn = re.sub(r'\\sum(_\{[^}]*\}|_\w)?', r'\\,\\sum\1\\,', tex)    # matplotlib leaves no space around a sum
    with rc_context({'mathtext.fontset': 'cm', 'svg.hashsalt': tex}):
        depth = mathtext.math_to_image(f'${drawn}$', file, dpi=72, format='svg', prop=FontProperties(size=points))
    return re.sub(rb'\s*<metadata>.*?</metadata>', b'', file.getvalue(), flags=re.DOTALL), float(depth)

def formula_html(
    tex:str,            # Such as '1/(2k-2)', without dollars
    display:bool=False, # On a line of its own
)->str:                 # HTML
    "A formula as an element of a page, as high as the letters around it"
    svg, depth = formula_svg(tex)
    width, height = (float(re.search(rf'<svg [^>]*{side}="([\d.]+)pt"'.encode(), svg)[1])/points for side in ('width', 'height'))
    style = f'width:{width:.2f}em; height:{height:.2f}em; vertical-align:{-depth/points:.2f}em'
    alt = tex.replace('&', '&amp;').replace('<', '&lt;').replace('>', '&gt;').replace('"', '&quot;')
    image = f'<img class="formula" alt="{alt}" style="{style}" src="data:image/svg+xml;base64,{base64.b64encode(svg).decode()}">'
    return f'<span class="formula-line">{image}</span>' if display else image

code = re.compile(r'(^```.*?^```|``[^\n]+?``|`[^`\n]+`)', flags=re.DOTALL | re.MULTILINE)
dollars = re.compile(r'\$\$(.+?)\$\$|(?<![\\\w$])\$(?=\S)([^$\n]+?)(?<=\S)\$(?![\w$])', flags=re.DOTALL)

def with_formulas(
    text:str,   # Markdown
)->str:         # Markdown; code is unchanged
    "`text` with its formulas drawn"
    def drawn(m): return formula_html((m[1] or m[2]).strip(), display=bool(m[1]))
    parts = code.split(text)
    return ''.join(part if i % 2 else dollars.sub(drawn, part) for i, part in enumerate(parts))
