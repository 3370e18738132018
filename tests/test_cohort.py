"A cohort from folders and tables as people really keep them, and a quarantine that loses nothing"
import os, shutil, struct, subprocess, sys, tempfile, tracemalloc, warnings, zlib
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from strip_notebooks.data.checks import hash_distances, near_duplicates, validate
from strip_notebooks.data.cohort import (CohortError, CohortWarning, check_cohort, cohort_from_csv, cohort_from_folder, cohort_from_frame, hide, identity_table,
    load_cohort, load_salt, patient_table, read_cohort, reveal, save_cohort)
from strip_notebooks.data.measure import measure_images, quarantine
from strip_notebooks.data.measure import _measure as real_measure
from strip_notebooks.findings import Verdict
from strip_notebooks.data.formats import write_image

IDS = ['000123', '1e5123', 'NA', 'nan', 'True', '12.0', 'None', '0x1F', '-7']


def draw(path, seed=0, side=24):
    path.parent.mkdir(parents=True, exist_ok=True)
    write_image(path, np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8))
    return path


def table(**columns):
    "A valid table of nine images of nine patients, with some columns exchanged"
    return pd.DataFrame(dict(image_id=IDS, patient_id=[f'p{i}' for i in IDS], label=['CE', 'LAA', 'CE']*3, center_id='1', path=[f'/nowhere/{i}.png' for i in IDS]) | columns)


# --- twenty broken images in ten ways ---

def huge_png():
    "A PNG of a few bytes that claims 40,000 x 40,000 pixels"
    def chunk(kind, data): return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))
    return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', struct.pack('>IIBBBBB', 40_000, 40_000, 8, 2, 0, 0, 0)) + chunk(b'IDAT', zlib.compress(b'\0')) + chunk(b'IEND', b'')


def report_without_pixels(path):
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, generate_uid
    meta = FileMetaDataset()
    meta.TransferSyntaxUID, meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = ExplicitVRLittleEndian, '1.2.840.10008.5.1.4.1.1.88.11', generate_uid()
    ds = FileDataset(str(path), {}, file_meta=meta, preamble=b'\0'*128)
    ds.SOPClassUID = meta.MediaStorageSOPClassUID
    ds.save_as(path, enforce_file_format=True)


def half(path):
    whole = path.read_bytes()
    path.write_bytes(whole[:len(whole)//2])


def half_gzip(path):
    draw(path)
    path.write_bytes(path.read_bytes()[:200])


BROKEN = {  # name of the way: ending, how to break the file at a path, the reason that must be given
    'no bytes':            ('.png', lambda p: p.write_bytes(b''), 'empty'),
    'text':                ('.png', lambda p: p.write_text('the scanner was busy\n'*40), 'not_an_image'),
    'half a PNG':          ('.png', lambda p: half(draw(p, side=64)), 'corrupt'),
    'half a JPEG':         ('.jpg', lambda p: half(draw(p, side=64)), 'corrupt'),
    'half a TIFF':         ('.tif', lambda p: half(draw(p, side=64)), 'corrupt'),
    'more than allowed':   ('.png', lambda p: p.write_bytes(huge_png()), 'too_large'),
    'Python objects':      ('.npy', lambda p: np.save(p, np.array([{}, []], object), allow_pickle=True), 'unsupported'),
    'numbers of no range': ('.npy', lambda p: np.save(p, np.full((8, 8), 700.)), 'range'),
    'a DICOM report':      ('.dcm', report_without_pixels, 'no_pixels'),
    'half a gzip':         ('.nii.gz', half_gzip, 'corrupt'),
}


def test_twenty_broken_images_in_ten_ways_are_quarantined_and_nothing_else(tmp_path):
    folder,expected = tmp_path/'cohort',{}
    for i in range(180): draw(folder/('LAA' if i % 4 == 0 else 'CE')/f'p{i//2*2:03d}{"a" if i % 4 == 0 else "b"}'/f'{i:03d}.png', i, side=8)
    for j,(way,(ending,damage,reason)) in enumerate(BROKEN.items()):
        for k in range(2):
            path = folder/('CE', 'LAA')[k]/f'q{j}{k}'/f'scan{ending}'
            path.parent.mkdir(parents=True)
            damage(path)
            expected[str(path)] = (way, reason)
    cohort = read_cohort(folder)
    assert len(cohort) == 200
    good,bad = quarantine(cohort, workers=2)
    assert len(bad) == 20 and set(bad.path) == set(expected)
    assert {p: r for p,r in zip(bad.path, bad.reason)} == {p: r for p,(_,r) in expected.items()}
    assert all(os.path.basename(p) in m and len(m) > len(p) + 10 for p,m in zip(bad.path, bad.message))
    assert len(good) == 180 and sorted([*good.image_id, *bad.image_id]) == sorted(cohort.image_id)
    pd.testing.assert_frame_equal(good, cohort[~cohort.path.isin(expected)].reset_index(drop=True))
    alone = quarantine(cohort, workers=1)
    pd.testing.assert_frame_equal(alone[0], good); pd.testing.assert_frame_equal(alone[1], bad)


def test_missing_files_of_a_table_are_quarantined(tmp_path):
    draw(tmp_path/'train'/'a.png'); draw(tmp_path/'train'/'b.png')
    (tmp_path/'train.csv').write_text('image_id,patient_id,label,center_id\na,1,CE,1\nb,2,LAA,1\nc,3,LAA,1\n')
    good,bad = quarantine(read_cohort(tmp_path/'train.csv'))
    assert good.image_id.tolist() == ['a', 'b'] and bad[['image_id', 'reason']].values.tolist() == [['c', 'missing']]


def test_quarantine_works_in_a_script(tmp_path):
    "A plain script starts its workers by spawning, which runs its main module again"
    for i in range(60): draw(tmp_path/'data'/'CE'/f'p{i}'/'a.png', i, side=8)
    (tmp_path/'data'/'CE'/'p7'/'a.png').write_bytes(b'')
    script = tmp_path/'script.py'
    script.write_text("import sys\nfrom strip_notebooks.data.cohort import read_cohort\nfrom strip_notebooks.data.measure import quarantine\n"
                      "if __name__ == '__main__':\n    good,bad = quarantine(read_cohort(sys.argv[1]), workers=2)\n    print(len(good), bad.patient_id.tolist())\n")
    done = subprocess.run([sys.executable, script, tmp_path/'data'], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "59 ['p7']"


def measure_or_die(item):
    "What a decoder does that a corrupt file takes down with it"
    if item[0].endswith('p2/a.png'): os.abort()
    return real_measure(item)


def test_a_file_that_kills_its_reader_is_quarantined(tmp_path, monkeypatch, capfd):
    for i in range(6): draw(tmp_path/'CE'/f'p{i}'/'a.png', i, side=8)
    monkeypatch.setattr('strip_notebooks.data.measure._measure', measure_or_die)
    good,bad = quarantine(cohort_from_folder(tmp_path), workers=2)
    assert good.patient_id.tolist() == ['p0', 'p1', 'p3', 'p4', 'p5'] and bad[['patient_id', 'reason']].values.tolist() == [['p2', 'crashed']]
    assert 'p2/a.png' in bad.message[0] and 'leave it out' in bad.message[0]


def measure_and_note(item):
    "Measure an image, and leave a line beside the cohort"
    with open(Path(item[0]).parents[2]/'read.txt', 'a') as f: f.write(item[0] + '\n')
    return real_measure(item)


def test_images_are_read_once_until_they_change(tmp_path, monkeypatch):
    for i in range(4): draw(tmp_path/'CE'/f'p{i}'/'a.png', i)
    cohort = cohort_from_folder(tmp_path)
    monkeypatch.setattr('strip_notebooks.data.measure._measure', measure_and_note)
    def read(): return (tmp_path/'read.txt').read_text().split()
    first = measure_images(cohort)
    good,_ = quarantine(cohort)
    assert len(measure_images(good).hash) == 4 and sorted(read()) == sorted(cohort.path)
    draw(tmp_path/'CE'/'p1'/'a.png', 99); os.remove(tmp_path/'CE'/'p2'/'a.png')
    second = measure_images(cohort)
    assert set(read()[4:]) <= {cohort.path[1], cohort.path[2]} and cohort.path[1] in read()[4:] and second.reason.tolist() == ['', '', 'missing', '']
    assert (second.hash == first.hash).tolist() == [True, False, False, True]


# --- ids are text ---

def test_ids_that_look_like_something_else_stay_text(tmp_path):
    cohort = check_cohort(table(patient_id=IDS, label=['NA', 'True', '01']*3))
    for _ in range(2):                                                   # and a second time from what was written
        save_cohort(tmp_path/'cohort.csv', cohort)
        cohort = load_cohort(tmp_path/'cohort.csv')
        assert cohort.image_id.tolist() == IDS and cohort.patient_id.tolist() == IDS
        assert cohort.label.tolist() == ['NA', 'True', '01']*3 and cohort.center_id.tolist() == ['1']*9
        assert {type(v) for c in ('image_id', 'patient_id', 'label', 'center_id', 'path') for v in cohort[c]} == {str}
    assert read_cohort(tmp_path/'cohort.csv').image_id.tolist() == IDS
    back = load_cohort(tmp_path/'cohort.csv')
    pd.testing.assert_frame_equal(back, cohort)


def test_spaces_quotes_and_line_ends_in_ids_come_back(tmp_path):
    ids = [' a', 'a', 'a ', 'b;c', 'b,c', 'b"c', 'b\nc', "'d'", '\té']
    cohort = check_cohort(table(image_id=ids, patient_id=[f' {i}' for i in IDS], center_id=' 1'))
    save_cohort(tmp_path/'cohort.csv', cohort)
    pd.testing.assert_frame_equal(load_cohort(tmp_path/'cohort.csv'), cohort)


def test_ids_that_were_read_as_floats_are_refused(tmp_path):
    (tmp_path/'t.csv').write_text('image_id,patient_id,label,center_id,path\na,000123,CE,1,a.png\nb,7,LAA,,b.png\n')
    assert cohort_from_frame(pd.read_csv(tmp_path/'t.csv', dtype=str)).center_id.tolist() == ['1', 'unknown']
    guessed = pd.read_csv(tmp_path/'t.csv')
    with pytest.raises(CohortError, match='center_id holds floating-point numbers.*row 0.*dtype=str'): cohort_from_frame(guessed)
    for values in ([123.0, 7.0], np.array([123, 7], np.float32), ['123', np.float64(7)], pd.array([123., 7.], dtype='Float64')):
        with pytest.raises(CohortError, match='patient_id holds floating-point numbers.*dtype=str'): cohort_from_frame(guessed.assign(center_id='1', patient_id=values))


def test_attributes_are_numbers_only_where_nothing_is_lost(tmp_path):
    save_cohort(tmp_path/'cohort.csv', table(age=range(60, 69), scanner=[f'00{i}' for i in range(9)], sex=['F', 'M', '']*3))
    back = load_cohort(tmp_path/'cohort.csv')
    assert back.age.tolist() == list(range(60, 69)) and back.scanner[3] == '003' and back.sex.tolist() == ['F', 'M', '']*3


# --- what is no cohort ---

def test_errors_say_what_and_where():
    with pytest.raises(CohortError, match='1 image id used more than once.*row 8'): check_cohort(table(image_id=IDS[:8] + IDS[:1]))
    with pytest.raises(CohortError, match='1 patient with images under two labels'): check_cohort(table(patient_id=['p', 'p', *IDS[2:]]))
    with pytest.raises(CohortError, match='Row 4 has no label'): check_cohort(table(label=['CE']*4 + [None] + ['CE']*4))
    assert check_cohort(table(center_id=['', ' ', None, float('nan'), *'12121'])).center_id.tolist() == ['unknown']*4 + list('12121')
    with pytest.raises(CohortError, match='Columns 6 and 7 have the same name;'): check_cohort(pd.concat([table(age=1), table(age=2)[['age']]], axis=1))
    with pytest.raises(CohortError, match='3 rows, the first is row 0, have no patient_id'): check_cohort(table(patient_id=['', ' ', float('nan'), *IDS[3:]]))
    with pytest.raises(CohortError, match='no images'): check_cohort(table()[:0])
    with pytest.raises(CohortError, match="no column 'patient_id'.*patientid"): check_cohort(table().rename(columns=dict(patient_id='patientid')))


def test_errors_about_a_table_count_its_lines_as_an_editor_does(tmp_path):
    "The header is line 1; empty lines and cells of two lines count, a split and a warning too"
    for i in 'abcd': draw(tmp_path/'t'/f'{i}.png')
    (tmp_path/'t.csv').write_text('image_id,patient_id,label,note\na,1,CE,\n\nb,2,LAA,"two\nlines"\nc,1,LAA,\nd,3,CE,\n')
    with pytest.raises(CohortError, match='under two labels, the first in line 2;'): read_cohort(tmp_path/'t.csv')
    (tmp_path/'t.csv').write_text('image_id,patient_id,label,note\na,1,CE,\n\nb,2,LAA,"two\nlines"\nc,,LAA,\nd,3,CE,\n')
    with pytest.raises(CohortError, match='Line 6 has no patient_id'): read_cohort(tmp_path/'t.csv')
    (tmp_path/'t.csv').write_text('image_id,patient_id,label\na,1,CE\nb,2,LAA\ne,3,ce\n')
    with pytest.warns(CohortWarning) as caught: assert list(read_cohort(tmp_path/'t.csv').index) == [0, 1, 2]
    said = ' '.join(str(w.message) for w in caught)
    assert 'the first is that of line 4' in said and 'spaces or capitals only, the first in line 4' in said


def test_a_missing_column_says_which_there_are_and_how_to_map_them(tmp_path):
    "Names are quoted only where the first line is a header: of a table without one, they are patients' data"
    (tmp_path/'cases.csv').write_text('slide,case,diagnosis\na,1,CE\nb,2,LAA\n')
    with pytest.raises(CohortError) as caught: read_cohort(tmp_path/'cases.csv')
    said = str(caught.value)
    assert said.startswith(str(tmp_path/'cases.csv')) and 'its columns are slide, case and diagnosis' in said
    assert '--columns image_id=NAME,patient_id=NAME,label=NAME' in said and '-p columns=' in said
    (tmp_path/'cases.csv').write_text('image_id,patient,labels\na,1,CE\nb,2,LAA\n')
    with pytest.raises(CohortError, match='--columns patient_id=patient,label=labels '): read_cohort(tmp_path/'cases.csv')
    (tmp_path/'cases.csv').write_text('scan1,Doe Jane,CE\nscan2,Roe Richard,LAA\n')
    with pytest.raises(CohortError, match='the first line must name the columns') as caught: read_cohort(tmp_path/'cases.csv')
    assert 'Doe' not in str(caught.value)


def test_labels_that_differ_by_capitals_are_pointed_out(tmp_path):
    with pytest.warns(CohortWarning, match='spaces or capitals only, the first in row 2'): check_cohort(table(label=['CE', 'LAA', 'ce']*3))
    assert set(check_cohort(table(label=['CE', ' LAA', 'CE ']*3)).label) == {'CE', 'LAA'}


def test_a_patient_at_two_centers_is_a_warning():
    with pytest.warns(CohortWarning, match='1 patient with images from two centers'): check_cohort(table(patient_id=['p', 'b', 'p', *IDS[3:]], center_id=list('112222222')))
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        check_cohort(table(center_id=list('112222222')))


def test_errors_and_warnings_do_not_name_patients():
    name = 'DOE^JANE'
    for change in (dict(patient_id=[name]*9), dict(image_id=[name]*9), dict(patient_id=[name] + IDS[1:], label=['']*9)):
        with pytest.raises(CohortError) as caught: check_cohort(table(**change))
        assert name not in str(caught.value)
    with pytest.warns(CohortWarning) as caught: check_cohort(table(patient_id=[name]*9, label='CE', center_id=list('112222222')))
    assert not any(name in str(w.message) for w in caught)


# --- tables as they come ---

@pytest.mark.parametrize('separator', [',', ';', '\t'])
@pytest.mark.parametrize('encoding', ['utf-8', 'utf-8-sig'])
def test_separators_and_byte_order_mark(tmp_path, separator, encoding):
    for i in ('000123', '1e5123', 'NA'): draw(tmp_path/'images'/f'{i}.png')
    lines = [['image_id', 'patient_id', 'label', 'center_id'], ['000123', '007', 'CE', '1'], ['1e5123', '1e7', 'LAA', '02'], ['NA', 'nan', 'CE', '1']]
    (tmp_path/'table.csv').write_text('\r\n'.join(separator.join(l) for l in lines), encoding=encoding)
    cohort = read_cohort(tmp_path/'table.csv')
    assert cohort.iloc[:, :4].values.tolist() == lines[1:]
    assert not len(quarantine(cohort)[1])


def test_other_column_names(tmp_path):
    draw(tmp_path/'scans'/'x1.png'); draw(tmp_path/'scans'/'x2.png')
    (tmp_path/'t.csv').write_text('Slide;Patient;Diagnosis;age\nx1;01;CE;71\nx2;02;LAA;65\n')
    columns = dict(image_id='Slide', patient_id='Patient', label='Diagnosis')
    cohort = cohort_from_csv(tmp_path/'t.csv', tmp_path/'scans', columns)
    assert cohort.patient_id.tolist() == ['01', '02'] and cohort.label.tolist() == ['CE', 'LAA'] and set(cohort.center_id) == {'unknown'} and 'age' in cohort
    with pytest.raises(CohortError, match="'Diagnose'.*Diagnosis"): cohort_from_csv(tmp_path/'t.csv', tmp_path/'scans', columns | dict(label='Diagnose'))
    with pytest.raises(CohortError, match="'Patients'.*Patient"): cohort_from_frame(pd.read_csv(tmp_path/'t.csv', sep=';'), columns | dict(patient_id='Patients'))


def test_tables_that_cannot_be_read(tmp_path):
    with pytest.raises(CohortError, match='does not exist'): read_cohort(tmp_path/'none.csv')
    (tmp_path/'empty.csv').write_text(''); (tmp_path/'bytes.csv').write_bytes(b'image_id\n\xff\xfe\xfa')
    with pytest.raises(CohortError, match='is empty'): read_cohort(tmp_path/'empty.csv')
    with pytest.raises(CohortError, match='UTF-8'): read_cohort(tmp_path/'bytes.csv')
    (tmp_path/'lone.csv').write_text('image_id,patient_id,label\na,1,CE\n')
    with pytest.raises(CohortError, match='No image'): read_cohort(tmp_path/'lone.csv')


@pytest.mark.parametrize('rows,why', [
    ('a,1,CE,1,x\nb,2,LAA,1\n', '5 cells in line 2 and 4 in the header'), ('a,1,CE,1\nb,2,LAA,1,x\n', '5 cells in line 3'),
    ('a,1,CE,1,\nb,2,LAA,1,\n', '5 cells in line 2'), ('a,1,CE,1\nb,2,LA', '3 cells in line 3'), ('a,"1,CE,1\nb,2,LAA,1\n', 'cannot be read as CSV')])
def test_rows_of_another_length_are_refused(tmp_path, rows, why):
    draw(tmp_path/'t'/'a.png'); draw(tmp_path/'t'/'b.png')
    (tmp_path/'t.csv').write_text('image_id,patient_id,label,center_id\n' + rows)
    with pytest.raises(CohortError, match=why): read_cohort(tmp_path/'t.csv')
    with pytest.raises(CohortError, match=why): load_cohort(tmp_path/'t.csv')


def test_columns_twice_and_cells_that_are_empty(tmp_path):
    (tmp_path/'t.csv').write_text('image_id,label,patient_id,path,label \na,CE,1,a.png,LAA\n')
    with pytest.raises(CohortError, match='Columns 2 and 5 have the same name'): read_cohort(tmp_path/'t.csv')
    (tmp_path/'t.csv').write_text('image_id,label,patient_id,path,center_id\na,CE,1,a.png,\nb,LAA,2,,3\n')
    with pytest.raises(CohortError, match='Line 3 has no path'): read_cohort(tmp_path/'t.csv')
    (tmp_path/'t.csv').write_text('image_id,label,patient_id,path,center_id\na,CE,1,a.png,\nb,LAA,2,b.png,3\n')
    assert read_cohort(tmp_path/'t.csv').center_id.tolist() == ['unknown', '3']


@pytest.mark.parametrize('second', ['a.jpg', 'deeper/a.png'])
def test_an_id_that_fits_two_files_is_refused(tmp_path, second):
    for p in ('b.png', 'a.png', second): draw(tmp_path/'t'/p)
    (tmp_path/'t.csv').write_text('image_id,patient_id,label\nb,1,CE\na,2,LAA\n')
    with pytest.raises(CohortError, match='line 3 fits 2 files.*add a column path'): read_cohort(tmp_path/'t.csv')
    (tmp_path/'t.csv').write_text('image_id,patient_id,label,path\nb,1,CE,t/b.png\na,2,LAA,t/a.png\n')
    assert read_cohort(tmp_path/'t.csv').path.tolist() == [str(tmp_path/'t'/'b.png'), str(tmp_path/'t'/'a.png')]


def test_an_id_does_not_lead_out_of_the_folder(tmp_path):
    draw(tmp_path/'secret.png'); draw(tmp_path/'data'/'t'/'a.png')
    for i in ('../../secret.png', '../../secret', 't/../../secret.png', str(tmp_path/'secret.png')):
        (tmp_path/'data'/'t.csv').write_text(f'image_id,patient_id,label\na,1,CE\n{i},2,LAA\n')
        with pytest.raises(CohortError, match='line 3 leads out of the folder'): read_cohort(tmp_path/'data'/'t.csv')


# --- folders as they come ---

def test_stray_hidden_and_nested_files(tmp_path):
    for p in ('CE/007/a.png', 'CE/007/2024/deep/b.png', 'LAA/1e5/a.png'): draw(tmp_path/p)
    for p in ('notes.txt', 'CE/list.xlsx', 'CE/007/report.pdf', 'CE/007/Thumbs.db', 'CE/007/._a.png', '.DS_Store', '.cache/x/y.png', 'LAA/.hidden/a.png'):
        (tmp_path/p).parent.mkdir(parents=True, exist_ok=True); (tmp_path/p).write_bytes(b'x')
    (tmp_path/'LAA'/'nobody').mkdir()
    cohort = cohort_from_folder(tmp_path, center='9')
    assert sorted(zip(cohort.label, cohort.patient_id, cohort.image_id)) == [('CE', '007', '007/2024/deep/b.png'), ('CE', '007', '007/a.png'), ('LAA', '1e5', '1e5/a.png')]
    assert set(cohort.center_id) == {'9'} and all(os.path.isabs(p) for p in cohort.path)


def test_folders_that_are_no_cohort(tmp_path):
    with pytest.raises(CohortError, match='No images'): cohort_from_folder(tmp_path)
    with pytest.raises(CohortError, match='not a folder'): cohort_from_folder(tmp_path/'none')
    draw(tmp_path/'CE'/'p1'/'a.png'); draw(tmp_path/'LAA'/'loose.png')
    with pytest.raises(CohortError, match='1 of .* images in .* without a folder of a patient') as error: cohort_from_folder(tmp_path)
    assert 'loose' not in str(error.value)


def test_a_file_name_that_is_not_utf8_is_an_error(tmp_path):
    "Such a name, as an old disk holds it, cannot be written to the tables"
    draw(tmp_path/'CE'/'p1'/'a.png')
    (tmp_path/'LAA'/'p2').mkdir(parents=True)
    try: os.link(tmp_path/'CE'/'p1'/'a.png', os.fsencode(tmp_path/'LAA'/'p2') + b'/M\xfcller.png')
    except OSError: pytest.skip('this file system takes names in UTF-8 only')
    with pytest.raises(CohortError, match='1 image in .* not in UTF-8') as error: cohort_from_folder(tmp_path)
    assert 'ller' not in str(error.value)


def test_a_patient_in_the_folders_of_two_labels(tmp_path):
    draw(tmp_path/'CE'/'p1'/'a.png'); draw(tmp_path/'LAA'/'p1'/'b.png', 1)
    with pytest.raises(CohortError, match='two labels'): cohort_from_folder(tmp_path)


def test_a_copy_under_another_label_is_told_as_such(tmp_path):
    for label in ('CE', 'LAA'): draw(tmp_path/label/'p1'/'x.png')
    with pytest.raises(CohortError, match='1 patient with images under two labels'): cohort_from_folder(tmp_path)


def test_links(tmp_path):
    data = tmp_path/'data'
    draw(data/'CE'/'p1'/'a.png'); draw(tmp_path/'disk'/'x.png'); draw(data/'LAA'/'p2'/'a.png', 1)
    for name,target in [('CE/p1/b.png', tmp_path/'gone.png'), ('CE/p1/c.png', data/'CE/p1/c.png'), ('CE/p1/d.png', tmp_path/'disk/x.png'), ('LAA/p3', tmp_path/'disk'), ('LAA/p2/round', data)]: (data/name).symlink_to(target)
    good,bad = quarantine(cohort_from_folder(data))
    assert good.image_id.tolist() == ['p1/a.png', 'p1/d.png', 'p2/a.png', 'p3/x.png']
    assert list(zip(bad.image_id, bad.reason)) == [('p1/b.png', 'not_a_file'), ('p1/c.png', 'not_a_file')]
    (data/'LAA'/'p4').symlink_to(tmp_path/'gone')
    with pytest.raises(CohortError, match='1 broken link .* in place of the folder') as caught: cohort_from_folder(data)
    assert 'p4' not in str(caught.value)


# --- names of patients stay inside ---

@pytest.mark.parametrize('text', ['DOE^JANE,7,CE,1\nROE^RICHARD,8,LAA,1\n', 'DOE^JANE,DOE^JANE,CE\nROE,ROE,LAA\n', 'DOE^JANE\n7\n'])
@pytest.mark.parametrize('columns', [{}, dict(image_id='Slide')])
def test_a_table_without_a_header_is_not_quoted(tmp_path, text, columns):
    (tmp_path/'t.csv').write_text(text)
    with pytest.raises(CohortError) as caught: cohort_from_csv(tmp_path/'t.csv', columns=columns)
    assert 'DOE' not in str(caught.value)
    with pytest.raises(CohortError) as caught: load_cohort(tmp_path/'t.csv')
    assert 'DOE' not in str(caught.value)


def as_nobody(action):
    "What an action prints or raises in a process without root's rights, to which nothing is forbidden"
    read,write = os.pipe()
    if not (child := os.fork()):
        try:
            if not os.geteuid(): os.setuid(65534)
            message = str(action())
        except Exception as e: message = f'{type(e).__name__}: {e}'
        os.write(write, message.encode()); os._exit(0)
    os.close(write)
    with open(read) as f: message = f.read()
    os.waitpid(child, 0)
    return message


def test_a_folder_that_cannot_be_listed_is_not_named():
    folder = Path(tempfile.mkdtemp())
    try:
        folder.chmod(0o755)
        draw(folder/'CE'/'DOE^JANE'/'a.png'); draw(folder/'LAA'/'p2'/'a.png')
        (folder/'CE'/'DOE^JANE').chmod(0)
        message = as_nobody(lambda: cohort_from_folder(folder))
        assert message.startswith('CohortError: A folder in') and 'cannot be listed' in message and 'DOE' not in message
    finally:
        (folder/'CE'/'DOE^JANE').chmod(0o700); shutil.rmtree(folder)


def test_centers_that_hold_names_are_numbered_outside(tmp_path):
    names = [f'DOE^{i}' for i in range(6)] + ['North']*3
    with pytest.warns(CohortWarning, match='More than half of the centers have one patient'): cohort = check_cohort(table(center_id=names))
    identities = identity_table(cohort, load_salt(tmp_path))
    hidden = hide(cohort, identities)
    assert not any('DOE' in str(v) or 'North' in str(v) for v in hidden.center_id) and hidden.center_id.nunique() == 7
    assert hidden.center_id[6:].nunique() == 1 and identities.original_center_id.tolist() == names
    pd.testing.assert_frame_equal(reveal(hidden, identities), cohort)
    hospitals = check_cohort(table(center_id=list('112222222')))
    assert hide(hospitals, identity_table(hospitals, 'key')).center_id.tolist() == list('112222222')


def test_saved_cohorts_are_private_and_no_spreadsheet_runs_them(tmp_path):
    formula = ['=HYPERLINK("http://x")', '+1+cmd', '-2+3', '@SUM(A1)', '\tx', "'=1", '-7', 'plain', '']
    cohort = check_cohort(table(note=pd.Series(formula, dtype=object), image_id=['=1+1', *IDS[1:]]))
    save_cohort(tmp_path/'cohort.csv', cohort)
    assert (tmp_path/'cohort.csv').stat().st_mode & 0o777 == 0o600
    import csv
    with open(tmp_path/'cohort.csv', newline='') as f: cells = [c for line in csv.reader(f) for c in line]
    assert not any(c[:1] in ('=', '+', '@', '\t') or c[:2] == '-2' for c in cells)
    pd.testing.assert_frame_equal(load_cohort(tmp_path/'cohort.csv'), cohort)


def test_a_pipe_and_a_nul_byte_are_errors(tmp_path):
    "A pipe would block for ever; so this runs in a process with a limit"
    os.mkfifo(tmp_path/'t.csv')
    code = 'import sys; from strip_notebooks.data.cohort import *\ntry: read_cohort(sys.argv[1])\nexcept CohortError as e: print(e)'
    done = subprocess.run([sys.executable, '-c', code, tmp_path/'t.csv'], capture_output=True, text=True, timeout=60)
    assert 'not a regular file' in done.stdout, done.stderr
    (tmp_path/'nul.csv').write_text('image_id,patient_id,label,path\na,1,CE,a\0.png\n')
    with pytest.raises(CohortError, match='NUL byte in line 2'): read_cohort(tmp_path/'nul.csv')
    os.mkfifo(tmp_path/'a.png')
    (tmp_path/'rows.csv').write_text('image_id,patient_id,label,path\na,1,CE,a.png\n')
    code = ('import sys; from strip_notebooks.data.cohort import *; from strip_notebooks.data.measure import quarantine\n'
            'print(quarantine(read_cohort(sys.argv[1]), workers=1)[1].reason.tolist())')
    done = subprocess.run([sys.executable, '-c', code, tmp_path/'rows.csv'], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "['not_a_file']", done.stderr


def test_paths_that_lead_outside_are_counted(tmp_path):
    draw(tmp_path/'data'/'a.png'); draw(tmp_path/'b.png')
    (tmp_path/'data'/'t.csv').write_text('image_id,patient_id,label,path\na,1,CE,a.png\nb,2,LAA,../b.png\nc,3,LAA,/etc/hostname\n')
    with pytest.warns(CohortWarning, match='2 paths of 3 in t.csv outside its folder') as caught: read_cohort(tmp_path/'data'/'t.csv')
    assert not any('hostname' in str(w.message) for w in caught)


# --- without labels, with frames and slices, with splits ---

def test_a_cohort_without_labels(tmp_path):
    draw(tmp_path/'t'/'a.png'); draw(tmp_path/'t'/'b.png')
    for header,rows in [('image_id,patient_id', ['a,1', 'b,2']), ('image_id,patient_id,label', ['a,1,', 'b,2,'])]:
        (tmp_path/'t.csv').write_text('\n'.join([header, *rows]))
        with warnings.catch_warnings():
            warnings.simplefilter('ignore', CohortWarning)
            cohort = read_cohort(tmp_path/'t.csv')
        assert list(cohort) == ['image_id', 'patient_id', 'center_id', 'path'] and list(patient_table(cohort)) == ['patient_id', 'center_id', 'n_images']
        save_cohort(tmp_path/'saved.csv', cohort)
        pd.testing.assert_frame_equal(load_cohort(tmp_path/'saved.csv'), cohort)
        good,bad = quarantine(cohort, workers=1)
        assert len(good) == 2 and not len(bad) and 'label' not in bad
        with pytest.raises(CohortError, match="no column 'label'"): check_cohort(cohort)
    with pytest.raises(CohortError, match='Row 4 has no label'): check_cohort(table(label=['CE']*4 + [None] + ['CE']*4), labeled=False)


def test_splits_are_checked_in_one_place():
    split = ['train']*5 + ['val']*2 + ['test']*2
    assert check_cohort(table(split=split), split=True).split.tolist() == split
    for change,why in [(dict(split=[None] + split[1:]), 'Row 0 has no valid split'), (dict(split=['train']*7 + ['val']*2), 'The split test has no patients'),
                       (dict(split=split, patient_id=['DOE']*2 + IDS[2:6] + ['DOE'] + IDS[7:], label='CE'), '1 patient in more than one split')]:
        with pytest.raises(CohortError, match=why) as caught: check_cohort(table(**change), split=True)
        assert 'DOE' not in str(caught.value)
    with pytest.raises(CohortError, match='no column split'): check_cohort(table(), split=True)


def test_frames_and_slices_come_back(tmp_path):
    cohort = check_cohort(table(frame=[0, -1, None, '2', '', 3, 4, 5, 6], slice=['largest', 'middle', 7, '8', None, '', 1, 2, 3]))
    save_cohort(tmp_path/'cohort.csv', cohort)
    back = load_cohort(tmp_path/'cohort.csv')
    assert back.frame.tolist() == cohort.frame.tolist() == [0, -1, None, 2, None, 3, 4, 5, 6]
    assert back['slice'].tolist() == ['largest', 'middle', 7, 8, None, None, 1, 2, 3]
    with pytest.raises(CohortError, match='The frame of row 1 is not a whole number'): check_cohort(table(frame=[0, 1.5] + [0]*7))

# --- real images, near-duplicates, imports ---

def test_real_images_need_no_options(real):
    cohort = read_cohort(real/'white_blood_cells'/'train.csv')
    listed = (real/'white_blood_cells'/'train.csv').read_text().strip().splitlines()
    assert len(cohort) == len(listed) - 1 and cohort.label.nunique() > 1 and cohort.center_id.nunique() == 2
    good,bad = quarantine(cohort, workers=2)
    assert len(good) == len(cohort) and not len(bad)


def test_near_duplicates_against_brute_force():
    rng = np.random.default_rng(0)
    numbers = [int.from_bytes(rng.bytes(32)) for _ in range(120)]
    for i in range(0, 40, 2):                                            # 20 pairs that differ in 0 to 38 bits
        numbers[i + 1] = numbers[i]
        for b in rng.choice(256, i, replace=False): numbers[i + 1] ^= 1 << int(b)
    hashes = pd.Series([f'{n:064x}' for n in numbers], index=[f'i{k}' for k in range(120)])
    brute = {(f'i{a}', f'i{b}', (numbers[a] ^ numbers[b]).bit_count()) for a in range(120) for b in range(a + 1, 120) if (numbers[a] ^ numbers[b]).bit_count() <= 20}
    found = near_duplicates(hashes, 20)
    assert set(found.itertuples(index=False, name=None)) == brute and len(brute) >= 11
    assert found.distance.is_monotonic_increasing and (np.diag(hash_distances(hashes)) == 0).all()


def test_near_duplicates_of_many_need_little_memory():
    rng = np.random.default_rng(0)
    hashes = pd.Series([rng.bytes(32).hex() for _ in range(6000)])
    hashes[5999] = hashes[0]
    tracemalloc.start()
    found = near_duplicates(hashes)
    peak = tracemalloc.get_traced_memory()[1]; tracemalloc.stop()
    assert found.values.tolist() == [[0, 5999, 0]]
    assert peak < 60e6                                                   # all distances as float32 would be 144 MB


def test_what_could_not_be_looked_at_is_not_ok(tmp_path):
    for name in ('a.png', 'b.png'): (tmp_path/name).write_bytes(b'')
    report = validate(table(path=[str(tmp_path/'a.png'), str(tmp_path/'b.png')]*4 + [str(tmp_path/'c.png')]))
    assert report.find('CHK001').values['n'] == 9
    assert {report.find(f'CHK{n:03}').verdict for n in (1, 2, 3, 4, 8, 9, 10)} == {Verdict.ERROR}


def test_cohort_and_checks_import_nothing_heavy():
    code = ("import sys; import strip_notebooks.data.cohort, strip_notebooks.data.checks;"
            "print([m for m in ('torch', 'matplotlib', 'sklearn', 'imagehash', 'pydicom', 'nibabel', 'cv2') if m in sys.modules])")
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.strip() == '[]'
