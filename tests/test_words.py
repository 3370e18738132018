r"""Plain, current, standard words: phrases that stand in no notebook, library file, report template or README

    python tests/test_words.py nbs/140_data.cohort.ipynb     # the hits of one file, with what to write instead
    python tests/test_words.py                               # of all files
"""
import json, re, sys
from pathlib import Path

root = Path(__file__).resolve().parents[1]

# A noun that is counted per something, and what it is counted per
units = 'image|patient|class|center|epoch|fold|batch|cell|row|worker|page|run|step|notebook|pixel|file|second|process|task|call|core|channel|metric|bin|resample|column|split|group|repeat|kernel'
counted = 'rows?|probabilit(?:y|ies)|columns?|numbers?|points?|files?|images?|seeds?|folders?|centers?|lines?|values?|pages?|seconds|workers?|[km]b|ms|s'
nouns = 'patients|images|rows|files|classes|centers|columns|pages|runs|epochs|workers'

banned = [
    # phrase (regular expression, case ignored), what to write instead
    (rf'\b(?:{counted}) an? (?:{units})\b', 'per: "one row per image", "a probability per class"'),
    (r'\b(?:predictions|numbers|table|metrics?|auc|scores?|validation metric|read) by (?:image|patient|center|epoch)\b', '"per image", "per patient"'),
    (r'\banswered\b', 'predicted; "the question is open" or "shown" for questions'),
    (r'\banswers? (?:by|of the (?:image|model)|for (?:each|every))\b|(?:surest|right|wrong|model.s|patient.s) answers?\b', 'predicted probability, prediction'),
    (r'\bagainst (?:answered|observed)\b', 'observed vs predicted'),
    (r'\bcalled (?:ce|laa|positive|negative|from)\b', 'classified as LAA if p >= 0.33'),
    (r'\b(?:training|test|tested|validation|train|val|empty) parts?\b|\bparts? of (?:the|a|its) split\b|\bin one part\b|\bfewer parts\b', 'training, validation or test set; split'),
    (r'\b(?:deals?|dealt|dealing)\b(?! with)', 'split, assign'),
    (r'\banew\b', 'again, from scratch'),
    (r'\bshall\b', 'must, can, is'),
    (r'\b(?:set|sets|setting|put|puts|laid|left) (?:\w+ ){0,3}aside\b', 'quarantined, excluded'),
    (r'\bmend(?:s|ed|ing)?\b', 'fix, repair'),
    (r'\bdamaged\b', 'corrupt, truncated, unsupported'),
    (r'\bforeign\b', 'unsupported; of another program'),
    (r'\bgone\b', 'missing, removed, ended, elapsed'),
    (r'\b\d+:\d\d to go\b', 'remaining'),
    (r'\b(?:take|takes|taken|took|taking) (?:it |them |this |that )?up\b', 'resume, resumed'),
    (r'\b(?:goes|go|going|went) on\b', 'continue, resume'),
    (r'\bdrawn patients\b', 'bootstrap resample'),
    (r'\bintervals? from\b|\bends of (?:the|its|an|their|each) (?:\S+ ){0,3}intervals?\b|\bthe interval.s ends\b', '95 % confidence interval (95 % CI 0.91–0.99); its bounds'),
    (r'\bthese data do not show\b', 'not distinguishable from chance (the interval includes 0.5)'),
    (r'\bprior shifted\b|\bas answered\b', 'prior-shifted log loss (equal class priors)'),
    (r'\bbest possible\b|\bthe best that any model\b|\blimit that the generator\b', 'upper bound of the generator'),
    (r'\bwhat (?:was|is) done to the pixels\b', 'preprocessing'),
    (r'\bways to tell\b|\btells? the labels?\b|\bwithout looking\b', 'shortcut (the center predicts the label)'),
    (r'\bmay be that\b', 'may, can'),
    (r'\b(?:is|are|was|were|been|be) told\b|\btold (?:by|from|of)\b', 'is given, is told apart: say what does it'),
    (r'\b(?:stands?|stood) (?:in|on|at|above|below|there|under|over|behind|where|between|beside|with)\b', 'is, are'),
    (r'\b(?:lie|lies|lay) (?:in (?:the|a|its|one of)|there|directly|with|before|under|beside|about|below a|over the|where|on someone)\b', 'is, are'),
    (r'(?<![\d.,–-])\b1 (?:%s)\b' % nouns, 'one noun has no s: plural(n, "patient")'),
    (r'\b(?:surest|needs must|of old|for want of|save for|but for|at the most|at the least|in earnest|nought|naught|aught|hitherto|hereby|herewith|heretofore|forthwith|thereof|whereof|wherein|therein|thereby|whereby|'
     r'thence|whence|hence|hither|thither|whither|whilst|amongst|betwixt|unto|upon|lest|albeit|ere|oft|ought to|besides|wholly|betray\w*|likeness|yonder|behold|reckon\w*|befall\w*|fain|nigh|ever so|'
     r'a great many|not a few|no matter|as it were|so to speak|be it)\b', 'a current word'),
    (r'\beven so\b|\bone and all\b|\bby and by\b|\bat all events\b|\bin vain\b|\bin the place of\b', 'a current word'),
    (r'colour|grey|centre|normalis|artefact|haem(?:at(?!ologica)|o|or)|behaviour|favour|neighbour|honour|tumour|fibre|licence|defence|judgement|'
     r'(?:\bmi|centi|kilo|milli)?metres?\b|\blitres?\b|catalogue|programme\b|modell(?:ed|ing)|labell(?!edby)|travell|signall|channell|ageing|draught|sceptic|oedema|anaem|ischaem|leukaem|'
     r'optimis(?!t|m)|realis(?!t|m)|generalis(?!t)|specialis(?!t)|(?:initial|recogn|organ|standard|summar|serial|minim|maxim|visual|equal|pseudonym|anonym|quant|regular|random|vector|token|penal|'
     r'character|categor|local|final|util|synchron|capital|linear|binar|discret|parametr|stabil|crystall|digit|priorit|custom|material|neutral|memor)is(?:e|ed|es|er|ers|ing|ation|ations)\b|'
     r'analys(?:e|ed|es|ing)\b(?<!analyses)|practis(?:e|ed|ing)|emphasis(?:e|ed|ing)\b', 'American spelling: color, gray, center, normalize, artifact, hematoxylin'),
]
banned = [(re.compile(pattern, re.IGNORECASE), advice) for pattern, advice in banned]
# A count before a plural noun in a message of the library reads "1 rows" one day
uncounted = re.compile(r'''\{(?!plural\()[^{}]*\}(?<!\d\}) (?:%s)\b(?!/)''' % nouns), 'plural(n, "row") of strip_notebooks.core'

# Lines that may hold a phrase after all, as (file name, part of the line)
allowed = [
    ('000_core.ipynb', "'1 patients'"),
    ('160_data.synthetic.ipynb', "derive_seed(seed, 'artefacts')"),     # another name would draw other pictures
]

def notebook_texts(path):
    "Where and what: the sources of a notebook's cells, and what its outputs print"
    for number, cell in enumerate(json.loads(path.read_text(encoding='utf-8'))['cells']):
        yield f'cell {number}', ''.join(cell['source'])
        for output in cell.get('outputs', []):
            shown = output.get('text') or output.get('data', {}).get('text/markdown') or output.get('data', {}).get('text/plain') or ''
            yield f'output of cell {number}', ''.join(shown)

def texts(path):
    return notebook_texts(path) if path.suffix == '.ipynb' else [('', path.read_text(encoding='utf-8'))]

def hits(path):
    "The banned phrases of one file, each with its place and what to write instead"
    for place, text in texts(path):
        exported = path.suffix == '.py' or bool(re.search(r'^#\|\s*export', text, flags=re.MULTILINE))
        for number, line in enumerate(text.splitlines(), 1):
            if any(path.name == name and part in line for name, part in allowed): continue
            for pattern, advice in [*banned, uncounted] if exported else banned:
                for found in pattern.finditer(line):
                    yield f'{path.name}, {place} line {number}: "{found[0]}" -> {advice}\n    {line.strip()[:160]}'

def spoken():
    "Every file that speaks to a reader; the library's modules are exported from the notebooks, so only what else the package holds is read there"
    yield from (p for p in sorted((root/'nbs').rglob('*.ipynb')) if '.ipynb_checkpoints' not in p.parts)
    yield from (p for p in sorted((root/'strip_notebooks').rglob('*')) if p.suffix in ('.html', '.css', '.js', '.j2', '.jinja', '.txt', '.md'))
    yield from (p for p in sorted((root/'tools').rglob('*')) if p.suffix in ('.py', '.md'))
    yield from (root/name for name in ('README.md', 'CHANGELOG.md', 'CONTRIBUTING.md', 'CITATION.cff', 'Makefile', 'settings.ini', '_quarto.yml', 'setup.py', 'data/README.md', 'runs/README.md', '.dockerignore'))
    yield from (p for p in sorted((root/'deploy').rglob('*')) if p.is_file() and p.name not in ('requirements.txt', '.env'))

def pytest_generate_tests(metafunc):
    if 'path' in metafunc.fixturenames:
        metafunc.parametrize('path', list(spoken()), ids=lambda p: p.relative_to(root).as_posix())

def test_words(path):
    found = list(hits(path))
    assert not found, f'{len(found)} phrases; python tests/test_words.py {path.relative_to(root)}\n' + '\n'.join(found[:20])

def test_phrases_are_found(tmp_path):
    "Each kind of phrase in a sentence, and standard sentences that hold none"
    page = tmp_path/'page.md'
    for wrong in ('The table has a row an image.', 'dealt anew', 'The training part is small.', 'It shall work', '1 patients', 'the answered probability', 'normalise_by', 'grey', 'n_colours',
                  'These files were set aside.', 'It is taken up again', 'The label stands in a column'):
        page.write_text(wrong)
        assert list(hits(page)), wrong
    page.write_text('One row per image; 1 patient, 11 patients, 2.1 images. The value lies between 0 and 1. Deal with it. The result is optimistic, a part of the picture is gray.')
    assert list(hits(page)) == []
    module = tmp_path/'module.py'
    module.write_text("raise StripError(f'{n} rows have no label')")
    assert list(hits(module))
    module.write_text("raise StripError(f'{plural(n, \"row\")} without a label')")
    assert list(hits(module)) == []

if __name__ == '__main__':
    found = [hit for path in map(Path, sys.argv[1:] or spoken()) for hit in hits(path)]
    print(*found, f'{len(found)} phrases' if found else 'no banned phrase', sep='\n')
    sys.exit(bool(found))
