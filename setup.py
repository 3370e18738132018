"nbdev's settings.ini is the one place where the package is described; setup.py hands it to setuptools."
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup

config = ConfigParser(delimiters=['='])
config.read(Path(__file__).parent/'settings.ini', encoding='utf-8')
cfg = config['DEFAULT']
def extra(name): return cfg[f'{name}_requirements'].split()

setup(
    name='strip-notebooks',
    version=cfg['version'],
    description=cfg['description'],
    long_description=(Path(__file__).parent/'README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    author=cfg['author'],
    author_email=cfg['author_email'],
    license='MIT',
    keywords=cfg['keywords'].split(),
    classifiers=['Development Status :: 3 - Alpha', 'Intended Audience :: Science/Research',
                 'Programming Language :: Python :: 3', 'Programming Language :: Python :: 3.11'],
    packages=find_packages(include=['strip_notebooks', 'strip_notebooks.*']) + ['strip_notebooks.steps'],
    package_dir={'strip_notebooks.steps': 'nbs/experiments'},   # what `clot run` executes, for those who have no checkout
    package_data={'strip_notebooks.steps': ['*.ipynb'], 'strip_notebooks': ['**/*.html', '**/*.css', '**/*.js', '**/*.j2', '**/*.csv']},   # steps; the templates of the report and of the page
    python_requires=f">={cfg['min_python']}",
    install_requires=cfg['requirements'].split(),
    extras_require={'dev': extra('dev') + extra('cluster') + extra('openvino'),      # the tests need all of them
                    'cluster': extra('cluster'), 'openvino': extra('openvino')},
    dependency_links=[],
    entry_points={'console_scripts': cfg['console_scripts'].split(),
                  'nbdev': [f"{cfg['lib_name']}={cfg['lib_name']}._modidx:d"]},
    zip_safe=False,
)
