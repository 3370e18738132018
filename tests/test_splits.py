"Splits and audit across notebooks: light imports, files between processes, real images of two laboratories"
import subprocess, sys

import numpy as np
import pandas as pd
import pytest

from strip_notebooks.splits import (SplitError, assert_disjoint, fold_patients, fold_split, leave_one_center_out, nested_folds, read_splits,
                                    split_by_center, split_patients, write_splits)


def table(n=90, n_centers=5, seed=0):
    "A cohort table without pictures: one to four images a patient, centers of unequal size, ids that look like numbers"
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
    from conftest import ROOT
    said = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True, cwd=ROOT, env={'PYTHONHASHSEED': '17', 'PATH': ''}).stdout.strip()
    cohort = table()
    here = ''.join(s[1] for s in split_patients(cohort, seed=3).split)
    here += ''.join(map(str, [*fold_patients(cohort, 4, 2, seed=3).fold, *nested_folds(cohort, 3, 2, seed=3).inner]))
    assert said == here


@pytest.mark.parametrize('seed', range(12))
def test_every_way_of_splitting_keeps_patients_whole(seed):
    cohort = table(100 + 15*seed, 2 + seed % 5, seed)
    centers = sorted(cohort.center_id.unique())
    ways = [split_patients(cohort, seed=seed)]
    folds = fold_patients(cohort, 3, repeats=2, seed=seed)
    ways += [fold_split(cohort, folds, fold, repeat) for fold in range(3) for repeat in range(2)]
    try: by_center = leave_one_center_out(cohort)
    except SplitError: by_center = None
    if by_center is not None: ways += [fold_split(cohort, by_center, fold) for fold in by_center.fold.unique()]
    try: ways.append(split_by_center(cohort, centers[1:], centers[:1], seed=seed))
    except SplitError as e: assert 'patients in the' in str(e)
    for split in ways:
        assert_disjoint(split)
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
    wrong = [lambda: read_splits(folder, cohort[cohort.patient_id != secret]),
             lambda: assert_disjoint(pd.concat([split, split[split.patient_id == secret].assign(split='test')])),
             lambda: split_patients(pd.concat([cohort, cohort[cohort.patient_id == secret].assign(label='other')])),
             lambda: split_by_center(pd.concat([cohort, cohort[cohort.patient_id == secret].assign(center_id='new')]), ['c0'], ['c1'])]
    for act in wrong:
        with pytest.raises(SplitError) as e: act()
        assert secret not in str(e.value)


@pytest.fixture(scope='module')
def white_cells(real):
    from strip_notebooks.data.cohort import read_cohort
    return read_cohort(real/'white_blood_cells'/'train.csv')


def test_the_audit_names_the_center_on_real_images(white_cells):
    from strip_notebooks.audit import audit_figure, audit_leakage
    by_center = audit_leakage(split_by_center(white_cells, train='lab1', test='lab2')).table.set_index('check')
    assert by_center.finding['center in one split'] == 'lab2 only in test'
    assert 'Center lab2 is only in test (70 patients)' in by_center.sentence['center in one split']
    assert by_center.low['mean colour -> center'] > .9 and by_center.verdict['mean colour -> center'] == 'warning'
    report = audit_leakage(split_patients(white_cells))
    mixed = report.table.set_index('check')
    assert mixed.verdict['center in one split'] == 'ok' and mixed.verdict['shared patients'] == 'ok'
    for check in ('center -> label', 'image size -> label', 'mean colour -> center'): assert mixed.verdict[check] == 'warning', mixed.sentence[check]
    assert len(report.warnings) >= 3 and audit_figure(report).axes
