"What every test shares: the repository's root, and no more threads than there are cores for the workers."
import os, signal
from pathlib import Path

import pytest

os.environ.setdefault('NO_ALBUMENTATIONS_UPDATE', '1')
os.environ.setdefault('STRIP_PROGRESS', 'none')
ROOT = Path(__file__).parent.parent

# A shell that starts the tests in the background has them ignore Ctrl-C, and what they start inherits that: tests that press it need it back.
signal.signal(signal.SIGINT, signal.default_int_handler)

@pytest.fixture(scope='session')
def root(): return ROOT

@pytest.fixture(scope='session')
def real():
    "The folder of real images beside the repository; a test that wants it is skipped where it is absent"
    folder = ROOT.parent/'shared'/'real'
    if not folder.is_dir(): pytest.skip('there is no folder ../shared/real with real images')
    return folder
