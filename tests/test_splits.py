"Splits and audit across notebooks: light imports, fixed splits, files between processes, findings as data, real images of two laboratories"
import hashlib, re, subprocess, sys

import numpy as np
import pandas as pd
import pytest

from conftest import ROOT
from strip_notebooks.core import StripError
from strip_notebooks.data.cohort import check_cohort
from strip_notebooks.data.measure import measure_images
from strip_notebooks.findings import Finding, Findings, NoEstimate, Verdict, kinds, read_findings
from strip_notebooks.splits import (SplitError, fold_patients, fold_split, leave_one_center_out, nested_folds, read_splits,
                                    split_by_center, split_patients, split_table, write_splits)


def table(n=90, n_centers=5, seed=0):
    "A cohort table without pictures: one to four images per patient, centers of unequal size, ids that look like numbers"
    rng = np.random.default_rng(seed)
    patients = pd.DataFrame(dict(patient_id=[f'{i:04d}' for i in range(n)], label=rng.choice(['CE', 'LAA'], n, p=[.7, .3]),
                                 center_id=rng.choice([f'c{i}' for i in range(n_centers)], n, p=rng.dirichlet(np.ones(n_centers)*5))))
    cohort = patients.loc[np.repeat(patients.index, rng.integers(1, 5, n))].reset_index(drop=True)
    return cohort.assign(image_id=[f'{i}' for i in range(len(cohort))], path='none')


def test_splits_import_nothing_heavy():
    code = "import sys; import strip_notebooks.splits, strip_notebooks.audit; print([m for m in ('torch', 'sklearn', 'matplotlib', 'seaborn') if m in sys.modules])"
    found = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == '[]'


def test_another_process_makes_the_same_split():
    code = ("import sys; sys.path.insert(0, 'tests'); from test_splits import table; from strip_notebooks.splits import *; c = table();"
            "print(''.join(s[1] for s in split_patients(c, seed=3).split), *fold_patients(c, 4, 2, seed=3).fold, *nested_folds(c, 3, 2, seed=3).inner, sep='')")
    said = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True, cwd=ROOT, env={'PYTHONHASHSEED': '17', 'PATH': ''}).stdout.strip()
    cohort = table()
    here = ''.join(s[1] for s in split_patients(cohort, seed=3).split)
    here += ''.join(map(str, [*fold_patients(cohort, 4, 2, seed=3).fold, *nested_folds(cohort, 3, 2, seed=3).inner]))
    assert said == here


def digest(values): return hashlib.sha256(' '.join(map(str, values)).encode()).hexdigest()[:16]

def digests(seed):
    "A hash of each kind of split of one table"
    cohort = table(120, 6, seed)
    centers = sorted(cohort.center_id.unique())
    folds, nested = fold_patients(cohort, 4, 2, seed=seed), nested_folds(cohort, 3, 2, seed=seed)
    return dict(
        patients=digest(split_patients(cohort, seed=seed).split),
        ratios=digest(split_patients(cohort, (.6, .1, .3), seed=seed).split),
        center=digest(split_by_center(cohort, centers[1:], centers[0], .2, seed).split),
        folds=digest([*folds.patient_id, *folds.repeat, *folds.fold]),
        fold_split=digest(fold_split(cohort, folds, 2, 1, .2, seed).split),
        left_out=digest(leave_one_center_out(cohort).fold),
        nested=digest([*nested.outer, *nested.patient_id, *nested.inner]))

def test_splits_never_change():
    "A seed gives the same split in every version: the hashes are those since each center is even over all classes"
    assert digests(0) == dict(patients='2a469270d29da898', ratios='006268d1b7bb00aa', center='e9170b372969c877', folds='58b2c52017bdb952',
                              fold_split='e615c0535b4607da', left_out='d5318c00eaec2b99', nested='835012aa66b82a7c')
    assert digests(3) == dict(patients='6b27c292530b2d53', ratios='b10fcef104f12462', center='e660b83af80759cd', folds='626ed2d1a9a4b82b',
                              fold_split='1b434778940f20e2', left_out='da1c8cff22be82b9', nested='a7fe3ed05d514802')


@pytest.mark.parametrize('seed', range(12))
def test_every_way_of_splitting_keeps_patients_whole(seed):
    cohort = table(100 + 15*seed, 2 + seed % 5, seed)
    centers = sorted(cohort.center_id.unique())
    ways = [split_patients(cohort, seed=seed)]
    folds = fold_patients(cohort, 3, repeats=2, seed=seed)
    ways += [fold_split(cohort, folds, fold, repeat) for fold in range(3) for repeat in range(2)]
    every = cohort.assign(label=cohort.patient_id.astype(int).map(lambda i: ('CE', 'LAA')[i % 2]))    # both classes at every center
    by_center = leave_one_center_out(every)
    ways += [fold_split(every, by_center, fold) for fold in by_center.fold.unique()]
    ways.append(split_by_center(every, centers[1:], centers[:1], seed=seed))
    assert len(ways) == 8 + len(centers)
    for split in ways:
        check_cohort(split, split=True)
        parts = [set(split.patient_id[split.split == s]) for s in ('train', 'val', 'test')]
        assert set.union(*parts) == set(cohort.patient_id) and sum(map(len, parts)) == cohort.patient_id.nunique()
        for s in ('train', 'val'): assert split.label[split.split == s].nunique() == 2
    tested = [set(w.patient_id[w.split == 'test']) for w in ways[1:7:2]]       # the three folds of the first repeat
    assert sum(map(len, tested)) == cohort.patient_id.nunique() and not tested[0] & tested[1]


def test_a_written_split_belongs_to_its_cohort(tmp_path):
    cohort = table()
    folder = write_splits(tmp_path/'splits', split_patients(cohort, seed=5))
    cohort.to_csv(tmp_path/'cohort.csv', index=False)
    again = read_splits(folder, pd.read_csv(tmp_path/'cohort.csv', dtype=str))
    assert again.split.tolist() == split_patients(cohort, seed=5).split.tolist() and again.attrs['split']['seed'] == 5
    with pytest.raises(SplitError, match='does not have'): read_splits(folder, pd.read_csv(tmp_path/'cohort.csv'))      # 0007 read as 7
    with pytest.raises(SplitError, match='in no split'): read_splits(folder, pd.concat([cohort, cohort.head(1).assign(patient_id='new')]))
    for name in ('train', 'val', 'test'):
        text = (folder/f'{name}.txt').read_text()
        (folder/f'{name}.txt').unlink()
        with pytest.raises(SplitError, match=f'{name}.txt does not exist'): read_splits(folder, cohort)
        (folder/f'{name}.txt').write_text(text)
    assert len(read_splits(folder, cohort)) == len(cohort)


def test_messages_name_no_patient(tmp_path):
    cohort = table()
    split = split_patients(cohort)
    folder = write_splits(tmp_path/'s', split)
    secret = split.patient_id[split.split == 'train'].iloc[0]
    hers = cohort[cohort.patient_id == secret].head(1)
    wrong = {'in no split': lambda: read_splits(folder, pd.concat([cohort, hers.assign(patient_id=f'new {secret}')])),
             'does not have': lambda: read_splits(folder, cohort[cohort.patient_id != secret]),
             'more than one split': lambda: split_table(pd.concat([split, hers.assign(split='test', image_id='other')])),
             'two labels': lambda: split_patients(pd.concat([cohort, hers.assign(label='other')])),
             'two centers': lambda: split_by_center(pd.concat([cohort, hers.assign(center_id='new')]), ['c0'], ['c1'])}
    for said, act in wrong.items():
        with pytest.raises(StripError, match=said) as e: act()
        assert secret not in str(e.value)


# --- findings

def test_every_code_is_documented_and_used():
    "The registry of findings, its page and the library name the same codes"
    library = {p: p.read_text() for p in (ROOT/'strip_notebooks').rglob('*.py') if p.name != 'findings.py'}
    used = set(re.findall(r"'((?:CHK|AUD)\d{3})'", '\n'.join(library.values())))
    assert used == set(kinds)
    page = (ROOT/'nbs'/'050_findings.ipynb').read_text()
    assert set(re.findall(r'<td>((?:CHK|AUD)\d{3})</td>', page)) == set(kinds)


def patients_at(n, n_centers, seed=0):
    "Features of patients for the probes, with no signal at all"
    rng = np.random.default_rng(seed)
    colors = dict(zip(['red', 'green', 'blue'], rng.normal(size=(3, n))))
    return pd.DataFrame(dict(patient_id=[f'{i}' for i in range(n)], label=['CE', 'LAA']*(n//2), center_id=[f'{i % n_centers}' for i in range(n)], **colors))

def test_a_question_that_could_not_be_asked_is_not_ok():
    "12 centers of 5 patients: no center has enough patients to ask whether color predicts it"
    from strip_notebooks.audit import center_colors
    asked = center_colors(patients_at(120, 4))
    assert asked.verdict == Verdict.OK and asked.estimate.value > 0
    for matters in (False, True):
        finding = center_colors(patients_at(60, 12), matters)
        assert finding.verdict != Verdict.OK and finding.estimate == NoEstimate('small_centers')
    one_large = patients_at(60, 12).assign(center_id=lambda t: np.where(t.index < 20, 'large', t.center_id))
    assert center_colors(one_large).verdict != Verdict.OK


def test_every_sentence_can_be_rendered_from_its_table(tmp_path):
    "What the checks and the audit find of a small cohort comes back from CSV as it was, and reads the same"
    from strip_notebooks.audit import audit_leakage
    from strip_notebooks.data.checks import validate
    cohort = split_patients(table(60, 3))
    rng = np.random.default_rng(0)
    measures = pd.DataFrame(dict(reason='', message='', format='png', height=96, width=rng.choice([96, 128], len(cohort)), brightness=120., contrast=30.,
                                 red=rng.normal(size=len(cohort)), green=0., blue=0., hash=[rng.bytes(32).hex() for _ in range(len(cohort))]),
                            index=cohort.image_id)
    found = Findings([*validate(cohort, measures), *audit_leakage(cohort, measures)])
    assert {'CHK005', 'CHK009', 'AUD001', 'AUD010', 'AUD014'} <= {f.code for f in found}
    found.table.to_csv(tmp_path/'found.csv', index=False)
    back = read_findings(pd.read_csv(tmp_path/'found.csv'))
    assert [(f.code, f.verdict, f.sentence) for f in back] == [(f.code, f.verdict, f.sentence) for f in found]
    assert found.table[['n', 'value', 'low', 'high']].dtypes.eq(float).all()
    assert not any('{' in f.sentence for f in found)


def test_audit_and_checks_read_no_file():
    "With a table of measures, paths that do not exist are no problem; without one they are"
    from strip_notebooks.audit import audit_leakage
    from strip_notebooks.data.checks import validate
    cohort = split_patients(table(60, 3))
    assert (measure_images(cohort).reason == 'missing').all()
    measures = pd.DataFrame(dict(reason='', format='png', height=96, width=96, brightness=9., contrast=30., red=1., green=1., blue=1.,
                                 hash=[f'{i:064x}' for i in range(len(cohort))]), index=cohort.image_id)
    assert validate(cohort, measures).find('CHK010').values['n'] == len(cohort)
    assert audit_leakage(cohort, measures).find('AUD003').verdict == Verdict.WARNING     # hashes that differ in a few bits


@pytest.fixture(scope='module')
def white_cells(real):
    from strip_notebooks.data.cohort import read_cohort
    return read_cohort(real/'white_blood_cells'/'train.csv')


def test_the_audit_names_the_center_on_real_images(white_cells):
    from strip_notebooks.audit import audit_figure, audit_leakage
    measures = measure_images(white_cells)
    by_center = audit_leakage(split_by_center(white_cells, train='lab1', test='lab2'), measures)
    assert [(f.outcome, f.values) for f in by_center if f.code == 'AUD002' and f.values['center'] == 'lab2'] == [('test', dict(n=70, center='lab2'))]
    assert 'Center lab2 is only in the test set (70 patients)' in by_center.find('AUD002').sentence
    assert by_center.find('AUD014').estimate.low > .9 and by_center.find('AUD014').verdict == Verdict.WARNING
    mixed = audit_leakage(split_patients(white_cells), measures)
    assert [mixed.find(c).verdict for c in ('AUD001', 'AUD002')] == [Verdict.OK]*2
    for code in ('AUD010', 'AUD011', 'AUD014'): assert mixed.find(code).verdict == Verdict.WARNING, mixed.find(code).sentence
    assert len(mixed.warnings) >= 3 and audit_figure(mixed).axes
