"Every real file that pydicom and nibabel ship, real slides, and files made to do harm: each is read or refused in words, as formats_outcomes.csv says"
import csv, gzip, importlib.util, io, logging, os, struct, subprocess, sys, warnings, zlib
from pathlib import Path

import numpy as np
import pytest

from strip_notebooks.data.formats import image_format, image_size, read_image, write_image
from strip_notebooks.data.images import ImageError, Limits, Reading

TABLE = Path(__file__).parent/'formats_outcomes.csv'
FOLDERS = {p: Path(importlib.util.find_spec(p).origin).parent/f for p,f in dict(pydicom='data', nibabel='tests/data').items()}


def read(path, limits=Limits(), **reading):
    "The picture, the choices of its `Reading` given one by one"
    return read_image(path, Reading(**reading), limits=limits)


def shipped(package):
    "Path below the folder -> path of every file of real data in an installed package"
    folder = FOLDERS[package]
    return {f.relative_to(folder).as_posix(): f for f in sorted(folder.rglob('*')) if f.is_file() and f.suffix not in ('.py', '.pyc')}


def outcome(path, **kwargs):
    "Shape and dtype, or the reason of the error"
    try: a = read(path, **kwargs)
    except ImageError as e: return e.reason
    return f'{"x".join(map(str, a.shape))} {a.dtype}'


def expected_outcomes():
    with open(TABLE, newline='') as f: return {(r['package'], r['file']): r['outcome'] for r in csv.DictReader(f)}


@pytest.fixture
def dicom(): return FOLDERS['pydicom']/'test_files'


# --- every file that is shipped ---

@pytest.mark.parametrize('package', FOLDERS)
def test_every_shipped_file_has_its_outcome(package, caplog, capsys):
    caplog.set_level(logging.INFO)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        found = {(package, n): outcome(f) for n,f in shipped(package).items()}
    assert found == {k: o for k,o in expected_outcomes().items() if k[0] == package}
    assert not caplog.records and capsys.readouterr() == ('', '')


def test_no_patient_is_named_by_an_error(dicom, caplog, capfd):
    import pydicom
    named,everyone = 0, set()
    for n,f in shipped('pydicom').items():
        try: read(f)
        except ImageError as e: text = str(e).replace(str(f), '')
        else: continue
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            ds = pydicom.dcmread(f, force=True)
        words = [str(ds.get(k, '')) for k in ('PatientName', 'PatientID', 'PatientBirthDate')]
        named += any(words)
        everyone |= {w for w in words if len(w) > 2}
        assert not [w for w in words if len(w) > 2 and w in text], n
    printed = ''.join(capfd.readouterr())                                              # what the decoders' C libraries print as well
    assert named > 50 and not caplog.records and not [w for w in everyone if w in printed]


# --- DICOM: the same pixels by another way ---

def windowed(x, ds):
    "Black 0 to white 1 by PS3.3 C.11.2.1.2, written out here"
    first = lambda v: float(v[0] if hasattr(v, '__len__') and not isinstance(v, str) else v)
    center,width = first(ds.WindowCenter), first(ds.WindowWidth)
    if ds.get('VOILUTFunction', 'LINEAR') == 'SIGMOID': return 1/(1 + np.exp(-4*(x - center)/width))
    if ds.get('VOILUTFunction', 'LINEAR') == 'LINEAR_EXACT': return np.clip((x - center)/width + .5, 0, 1)
    return np.clip((x - (center - .5))/(width - 1) + .5, 0, 1)


def independent(path):
    "The picture by pydicom's data set and the formulas of the standard; None where there is no other way"
    import pydicom
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        ds = pydicom.dcmread(path, force=True)
        if 'PixelData' not in ds or ds.file_meta.TransferSyntaxUID == pydicom.uid.JPEGExtended12Bit: return None
        try: a = ds.pixel_array
        except RuntimeError: return None                                # a coding that pydicom needs another package for
    if int(ds.get('NumberOfFrames', 1) or 1) > 1: a = a[0]
    if ds.PhotometricInterpretation == 'PALETTE COLOR':
        luts = [np.frombuffer(ds[f'{c}PaletteColorLookupTableData'].value, '<u2') for c in ('Red', 'Green', 'Blue')]
        return np.stack([l[a]//256 for l in luts], -1)/255
    top = 2**ds.BitsStored - 1
    if ds.SamplesPerPixel > 1: return a/top
    slope,intercept = float(ds.get('RescaleSlope', 1)), float(ds.get('RescaleIntercept', 0))
    x = a.astype(float)*slope + intercept
    if 'WindowCenter' in ds: x = windowed(x, ds)
    else:
        ends = [v*slope + intercept for v in ((-(top + 1)//2, top//2) if ds.PixelRepresentation else (0, top))]
        x = (x - min(ends))/(max(ends) - min(ends))
    if ds.PhotometricInterpretation == 'MONOCHROME1': x = 1 - x
    return np.repeat(x[..., None], 3, -1)


def test_dicom_pixels_by_another_way():
    checked = 0
    for (package,n),o in expected_outcomes().items():
        path = FOLDERS[package]/n
        if ' ' not in o or image_format(path) != 'dicom' or (want := independent(path)) is None: continue
        got = read(path)
        np.testing.assert_allclose(got/255. if got.dtype == np.uint8 else got, want, atol=2e-6, err_msg=n)
        checked += 1
    assert checked > 90


def test_every_frame(dicom):
    import pydicom
    for n,frames in (('rtdose.dcm', 15), ('SC_rgb_rle_2frame.dcm', 2), ('SC_rgb_rle_16bit_2frame.dcm', 2)):
        every = read(dicom/n, frame='all')
        stored = pydicom.dcmread(dicom/n).pixel_array
        assert len(every) == frames == len(stored)
        for i in (0, 1, frames - 1):
            np.testing.assert_array_equal(read(dicom/n, frame=i), every[i])
            assert np.corrcoef(every[i][..., 0].ravel(), np.atleast_3d(stored[i])[..., 0].ravel())[0, 1] > .999999
        np.testing.assert_array_equal(read(dicom/n, frame=-1), every[-1])
        for bad in (frames, -frames - 1, 'first', 1.5): assert outcome(dicom/n, frame=bad) == 'choice'


def test_twelve_bit_jpeg_shows_what_lossless_shows(dicom):
    "The same bone scan is shipped as JPEG 2000 without and as 12-bit JPEG with losses"
    import pydicom
    lossless = pydicom.dcmread(dicom/'JPEG2000.dcm').pixel_array
    for n in ('JPEG-lossy.dcm', 'JPGExtended.dcm'):
        a = read(dicom/n)[..., 0]*4095
        assert np.corrcoef(a.ravel(), lossless.ravel())[0, 1] > .95, n
        assert abs(a - np.round(a)).max() < 1e-3


def test_dicom_without_a_header(dicom, tmp_path):
    "Bare data sets, as old archives hold them: no preamble, no file meta information, no ending"
    import pydicom
    for n in ('MR_small.dcm', 'MR_small_implicit.dcm', 'MR_small_bigendian.dcm'):
        ds = pydicom.dcmread(dicom/n)
        bare = io.BytesIO(); pydicom.dcmwrite(bare, pydicom.Dataset({e.tag: e for e in ds}), implicit_vr=n == 'MR_small_implicit.dcm', little_endian=n != 'MR_small_bigendian.dcm', force_encoding=True)
        (tmp_path/'bare').write_bytes(bare.getvalue())
        assert image_format(tmp_path/'bare') == 'dicom'
        np.testing.assert_array_equal(read(tmp_path/'bare'), read(dicom/n))


@pytest.mark.parametrize('function', [None, 'LINEAR', 'LINEAR_EXACT', 'SIGMOID'])
@pytest.mark.parametrize('slope', ['1', '-1', '2.5'])
@pytest.mark.parametrize('photometric', ['MONOCHROME1', 'MONOCHROME2'])
def test_windows_slopes_and_inversion(dicom, tmp_path, function, slope, photometric):
    import pydicom
    ds = pydicom.dcmread(dicom/'CT_small.dcm')
    ds.RescaleSlope,ds.RescaleIntercept,ds.PhotometricInterpretation = slope, '10', photometric
    if function:
        ds.WindowCenter,ds.WindowWidth,ds.VOILUTFunction = str(1000*float(slope)), str(1500*abs(float(slope))), function
    ds.save_as(tmp_path/'ct.dcm')
    np.testing.assert_allclose(read(tmp_path/'ct.dcm'), independent(tmp_path/'ct.dcm'), atol=3e-6)
    x = ds.pixel_array*float(slope) + 10
    chosen = np.clip((x - 0)/(2000 - 0), 0, 1)
    np.testing.assert_allclose(read(tmp_path/'ct.dcm', window=(0, 2000))[..., 1], 1 - chosen if photometric == 'MONOCHROME1' else chosen, atol=1e-6)


def elements(**values):
    import pydicom
    d = pydicom.Dataset(); d.update(values)
    return d


def test_each_frame_of_an_enhanced_file_has_its_own_rescaling_and_window(dicom, tmp_path):
    import pydicom
    ds = pydicom.dcmread(dicom/'CT_small.dcm')
    a = ds.pixel_array.astype(float)
    del ds.RescaleSlope, ds.RescaleIntercept
    ds.NumberOfFrames,ds.PixelData = 3, ds.PixelData*3
    ds.SharedFunctionalGroupsSequence = [elements(FrameVOILUTSequence=[elements(WindowCenter='40', WindowWidth='400', VOILUTFunction='LINEAR_EXACT')])]
    ds.PerFrameFunctionalGroupsSequence = [elements(PixelValueTransformationSequence=[elements(RescaleSlope=str(i + 1), RescaleIntercept='-1024')]) for i in range(2)]   # the third is not told
    ds.save_as(tmp_path/'enhanced.dcm')
    hounsfield = [a - 1024, 2*a - 1024, a]
    for i,x in enumerate(hounsfield):
        np.testing.assert_allclose(read(tmp_path/'enhanced.dcm', frame=i)[..., 0], np.clip((x + 160)/400, 0, 1), atol=1e-6)
        np.testing.assert_allclose(read(tmp_path/'enhanced.dcm', frame='all', window=(-100, 2000))[i, ..., 0], np.clip((x + 100)/2100, 0, 1), atol=1e-6)


def test_look_up_tables(dicom, tmp_path):
    "Modality and VOI tables by hand: the first entry is for the number in the descriptor's middle, and all that lies outside takes the end's"
    import pydicom
    ds = pydicom.dcmread(dicom/'CT_small.dcm')
    a = ds.pixel_array.astype(int)
    del ds.RescaleSlope, ds.RescaleIntercept
    falling = list(range(60_000, 60_000 - 2*1500, -2))
    ds.ModalityLUTSequence = [elements(LUTDescriptor=[1500, 100, 16], ModalityLUTType='US')]
    ds.ModalityLUTSequence[0].add_new('LUTData', 'US', falling)
    ds.save_as(tmp_path/'modality.dcm')
    x = np.array(falling)[np.clip(a - 100, 0, 1499)]
    np.testing.assert_allclose(read(tmp_path/'modality.dcm')[..., 0], x/65535, atol=1e-6)
    np.testing.assert_allclose(read(tmp_path/'modality.dcm', window=(57_000, 60_000))[..., 0], np.clip((x - 57_000)/3000, 0, 1), atol=1e-6)
    del ds.ModalityLUTSequence
    ds.RescaleSlope,ds.RescaleIntercept = '1', '-1024'
    ds.VOILUTSequence = [elements(LUTDescriptor=[2000, -900, 12])]
    ds.VOILUTSequence[0].add_new('LUTData', 'US', [i//2 for i in range(2000)])
    ds.WindowCenter,ds.WindowWidth = '5', '6'                            # the table goes first
    ds.save_as(tmp_path/'voi.dcm')
    np.testing.assert_allclose(read(tmp_path/'voi.dcm')[..., 0], np.clip(a - 1024 + 900, 0, 1999)//2/4095, atol=1e-6)


def test_windows_of_no_width_are_as_if_left_out(dicom, tmp_path):
    import pydicom
    for width in ('0', '-1', None):
        ds = pydicom.dcmread(dicom/'CT_small.dcm')
        ds.WindowCenter,ds.WindowWidth = '100', width
        ds.save_as(tmp_path/'a.dcm')
        np.testing.assert_array_equal(read(tmp_path/'a.dcm'), read(dicom/'CT_small.dcm'))


# --- NIfTI ---

def test_nifti_slices_by_another_way():
    import nibabel
    checked = 0
    for (package,n),o in expected_outcomes().items():
        path = FOLDERS[package]/n
        if package != 'nibabel' or ' ' not in o or image_format(path) != 'nifti': continue
        volume = nibabel.as_closest_canonical(nibabel.load(path))
        a = np.nan_to_num(volume.get_fdata(), nan=np.nan)
        a = a[..., 0] if a.ndim == 4 else a
        low,high = float(volume.header['cal_min']), float(volume.header['cal_max'])
        if not high > low: low,high = np.nanmin(a), np.nanmax(a)
        for z in (0, a.shape[2] - 1):
            s = np.nan_to_num(np.clip((a[:, ::-1, z].T - low)/(high - low), 0, 1), nan=0)
            got = read(path, slice=z)[..., 0]
            np.testing.assert_allclose(got/255 if got.dtype == np.uint8 else got, a[:, ::-1, z].T/255 if got.dtype == np.uint8 else s, atol=1e-5, err_msg=n)
        assert outcome(path, slice=a.shape[2]) == 'choice'
        checked += 1
    assert checked >= 7


def test_nifti_that_is_no_picture(tmp_path):
    import nibabel
    nibabel.save(nibabel.Nifti1Image(np.ones((3, 3, 3), np.complex64), np.eye(4)), tmp_path/'complex.nii')
    nibabel.save(nibabel.Nifti1Image(np.full((3, 3, 3), np.nan, np.float32), np.eye(4)), tmp_path/'nan.nii')
    nibabel.save(nibabel.Nifti1Image(np.zeros((3, 3, 3, 2, 2), np.float32), np.eye(4)), tmp_path/'five.nii')
    (tmp_path/'other.img').write_bytes((tmp_path/'five.nii').read_bytes()); (tmp_path/'name.dat').write_bytes((tmp_path/'five.nii').read_bytes())
    assert [outcome(tmp_path/n) for n in ('complex.nii', 'nan.nii', 'five.nii', 'name.dat')] == ['unsupported', 'range', 'unsupported', 'unsupported']


# --- real slides ---

def test_real_slides(real):
    import tifffile
    for path in sorted((real/'slides').iterdir()):
        if path.suffix not in ('.svs', '.tif', '.tiff'): continue
        a = read(path)
        with tifffile.TiffFile(path) as f: want = f.pages[0].asarray()
        assert a.shape[:2] == want.shape[:2] == image_size(path) and a.shape[2] == 3
        if want.ndim == 3 and want.dtype == np.uint8: np.testing.assert_array_equal(a, want[..., :3])
        assert outcome(path, limits=Limits(pixels=1000)) == 'too_large' and outcome(path, frame=1000) == 'choice'
    svs = read(real/'slides'/'cmu_1_small_region.svs')
    assert svs.dtype == np.uint8 and 180 < svs.mean() < 245                    # tissue on a bright ground


# --- windows and ranges of plain files ---

def test_a_window_makes_any_numbers_a_picture(tmp_path):
    import tifffile
    from PIL import Image
    a = np.linspace(-500, 1500, 30).reshape(5, 6)
    np.save(tmp_path/'a.npy', a); tifffile.imwrite(tmp_path/'a.tif', a.astype(np.float32)); tifffile.imwrite(tmp_path/'b.tif', a.astype(np.int16))
    for n in ('a.npy', 'a.tif', 'b.tif'):
        assert outcome(tmp_path/n) in ('range', 'unsupported')
        np.testing.assert_allclose(read(tmp_path/n, window=(0, 1000))[..., 2], np.clip(a/1000, 0, 1), atol=2e-3)
        assert outcome(tmp_path/n, window=(1, 1)) == outcome(tmp_path/n, window=(2, 1)) == 'choice'
    Image.fromarray(np.array([[0, 1000, 4000]], np.uint16)).save(tmp_path/'a.png')
    np.testing.assert_allclose(read(tmp_path/'a.png', window=(0, 2000))[0, :, 0], [0, .5, 1])
    np.testing.assert_allclose(read(tmp_path/'a.png')[0, :, 0], np.array([0, 1000, 4000])/65535, rtol=1e-6)


# --- files made to do harm ---

def chunk(kind, data): return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))
def png(width, height, data=b'\0'): return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', struct.pack('>IIBBBBB', width, height, 8, 2, 0, 0, 0)) + chunk(b'IDAT', zlib.compress(data)) + chunk(b'IEND', b'')


def npy(shape):
    f = io.BytesIO(); np.lib.format.write_array_header_1_0(f, dict(descr='|u1', fortran_order=False, shape=shape))
    return f.getvalue() + b'\0'*64


def claiming(tmp_path, suffix, side):
    "A small real file of a format whose header claims to be `side` pixels wide and high"
    path = tmp_path/f'claims{suffix}'
    if suffix == '.png': path.write_bytes(png(side, side))
    elif suffix == '.npy': path.write_bytes(npy((side, side, 3)))
    else:
        write_image(path, np.zeros((16, 16, 3), np.uint8))
        if suffix == '.tif':
            import tifffile
            with tifffile.TiffFile(path, mode='r+') as f:
                for t in ('ImageWidth', 'ImageLength'): f.pages[0].tags[t].overwrite(side)
        elif suffix == '.dcm':
            import pydicom
            ds = pydicom.dcmread(path); ds.Rows,ds.Columns = side, side; ds.save_as(path)
        elif suffix == '.jpg':
            b = bytearray(path.read_bytes()); at = b.index(b'\xff\xc0') + 5; b[at:at + 4] = struct.pack('>HH', side, side); path.write_bytes(b)
        elif suffix == '.bmp': b = bytearray(path.read_bytes()); b[18:26] = struct.pack('<ii', side, side); path.write_bytes(b)
        elif suffix == '.nii': b = bytearray(path.read_bytes()); b[40:56] = struct.pack('<8h', 3, side//2, side//2, 1000, 1, 1, 1, 1); path.write_bytes(b)
    return path


@pytest.mark.parametrize('suffix', ['.png', '.jpg', '.bmp', '.tif', '.npy', '.dcm', '.nii'])
def test_headers_that_claim_too_much(tmp_path, suffix):
    path = claiming(tmp_path, suffix, 60_000)
    assert path.stat().st_size < 2**16
    assert outcome(path) in (('corrupt',) if suffix in ('.npy', '.nii', '.tif') else ('too_large',))  # nothing is opened whose bytes are not there
    assert outcome(path, limits=Limits(pixels=100)) in ('too_large', 'corrupt')


def test_many_frames_and_many_channels(tmp_path):
    import pydicom, tifffile
    write_image(tmp_path/'a.dcm', np.zeros((16, 16, 3), np.uint8))
    ds = pydicom.dcmread(tmp_path/'a.dcm'); ds.NumberOfFrames = 2**30; ds.save_as(tmp_path/'a.dcm')
    assert outcome(tmp_path/'a.dcm', frame='all') == 'too_large'
    tifffile.imwrite(tmp_path/'a.tif', np.zeros((8, 8, 40), np.uint8), photometric='minisblack', planarconfig='contig')
    assert outcome(tmp_path/'a.tif') == 'unsupported'


def test_streams_that_unpack_to_too_much(tmp_path, dicom):
    import pydicom
    ds = pydicom.dcmread(dicom/'image_dfl.dcm')
    ds.add_new(0x00420011, 'OB', bytes(2**26)); ds.save_as(tmp_path/'deflated.dcm')     # 64 MB of nothing
    assert (tmp_path/'deflated.dcm').stat().st_size < 2**20
    assert outcome(tmp_path/'deflated.dcm', limits=Limits(file_bytes=2**25)) == 'too_large'
    assert outcome(tmp_path/'deflated.dcm') == outcome(dicom/'image_dfl.dcm')
    write_image(tmp_path/'a.nii', np.zeros((16, 16, 3), np.uint8))
    with gzip.open(tmp_path/'long.nii.gz', 'wb', compresslevel=1) as f:                 # far more than the header speaks of is never unpacked
        f.write((tmp_path/'a.nii').read_bytes())
        for _ in range(64): f.write(bytes(2**20))
    assert outcome(tmp_path/'long.nii.gz') == '16x16x3 uint8'
    path = tmp_path/'big.npy'; np.save(path, np.zeros((600, 600), np.uint8))
    assert outcome(path, limits=Limits(file_bytes=1000)) == 'too_large'


def nested(depth, defined):
    "A DICOM data set of sequences in one another, little endian with explicit types"
    inner = b''
    for _ in range(depth):
        if defined: item = b'\xfe\xff\x00\xe0' + struct.pack('<I', len(inner)) + inner; inner = b'\x08\x00\x15\x11SQ\0\0' + struct.pack('<I', len(item)) + item
        else: inner = b'\x08\x00\x15\x11SQ\0\0\xff\xff\xff\xff\xfe\xff\x00\xe0\xff\xff\xff\xff' + inner + b'\xfe\xff\x0d\xe0\0\0\0\0\xfe\xff\xdd\xe0\0\0\0\0'
    return inner


@pytest.mark.parametrize('defined', [True, False])
@pytest.mark.parametrize('depth', [4, 40, 400, 4000])
def test_sequences_in_sequences(tmp_path, depth, defined):
    write_image(tmp_path/'a.dcm', np.zeros((16, 16, 3), np.uint8))
    whole = (tmp_path/'a.dcm').read_bytes()
    at = whole.index(b'\x28\x00\x02\x00US')                                             # before the description of the picture
    (tmp_path/'a.dcm').write_bytes(whole[:at] + nested(depth, defined) + whole[at:])
    assert outcome(tmp_path/'a.dcm') == ('16x16x3 uint8' if depth == 4 else 'nested')


def test_what_is_no_plain_file(tmp_path):
    os.mkfifo(tmp_path/'pipe.png'); (tmp_path/'folder.png').mkdir()
    (tmp_path/'loop.png').symlink_to(tmp_path/'loop.png'); (tmp_path/'gone.png').symlink_to(tmp_path/'nowhere'); (tmp_path/'empty.png').touch()
    found = [outcome(tmp_path/f'{n}.png') for n in ('pipe', 'folder', 'loop', 'gone', 'empty', 'none')]
    assert found == ['not_a_file', 'not_a_file', 'not_a_file', 'not_a_file', 'empty', 'missing']
    assert outcome('/dev/zero') == 'not_a_file' and outcome(tmp_path/('n'*300 + '.png')) in ('missing', 'not_a_file')


def test_an_array_of_objects_is_not_unpickled(tmp_path):
    class Trap:
        def __reduce__(self): return os.mkdir, (str(tmp_path/'sprung'),)
    np.save(tmp_path/'a.npy', np.array([Trap()], object), allow_pickle=True)
    assert outcome(tmp_path/'a.npy') == 'unsupported' and not (tmp_path/'sprung').exists()


def samples(tmp_path, dicom):
    "A real file of every kind of coding"
    import tifffile
    from PIL import Image
    image = np.random.default_rng(0).integers(0, 256, (60, 50, 3), dtype=np.uint8)
    for suffix in ('png', 'jpg', 'bmp', 'tif', 'npy', 'dcm', 'nii', 'nii.gz'): write_image(tmp_path/f'a.{suffix}', image); yield tmp_path/f'a.{suffix}'
    tifffile.imwrite(tmp_path/'strips.tif', image, photometric='rgb', rowsperstrip=16, compression='deflate'); yield tmp_path/'strips.tif'
    tifffile.imwrite(tmp_path/'jpeg.tif', image, photometric='rgb', tile=(32, 32), compression='jpeg'); yield tmp_path/'jpeg.tif'
    Image.fromarray(image).convert('P').save(tmp_path/'palette.png'); yield tmp_path/'palette.png'
    import cv2
    cv2.imwrite(str(tmp_path/'deep.png'), image.astype(np.uint16)*257); yield tmp_path/'deep.png'
    for n in ('SC_rgb_jpeg_dcmtk', 'MR_small_RLE', 'MR_small_jp2klossless', 'MR_small_jpeg_ls_lossless', 'image_dfl', 'SC_rgb_rle_2frame', 'JPGExtended'): yield dicom/f'{n}.dcm'


def test_a_cut_file_is_refused_or_whole(tmp_path, dicom):
    "Cut anywhere, a file is never read as another picture"
    for path in samples(tmp_path, dicom):
        whole,picture,refused = path.read_bytes(), read(path), 0
        suffix = ''.join(path.suffixes)
        for share in (.01, .1, .3, .5, .7, .9, .97):
            cut = tmp_path/f'cut{suffix}'
            cut.write_bytes(whole[:int(len(whole)*share)])
            try: got = read(cut)
            except ImageError as e: refused += 1; assert e.reason in ('corrupt', 'not_an_image', 'no_pixels', 'empty'), (path.name, share, e.reason); continue
            np.testing.assert_array_equal(got, picture, err_msg=f'{path.name} {share}')
        assert refused >= 6, path.name


def test_flipped_bytes_give_a_picture_or_an_image_error(tmp_path, dicom, caplog, capsys):
    rng = np.random.default_rng(1)
    for path in samples(tmp_path, dicom):
        whole = path.read_bytes()
        for _ in range(25):
            corrupt = bytearray(whole)
            for k in rng.integers(0, min(len(whole), 800), 4): corrupt[k] = rng.integers(256)
            (tmp_path/('flipped' + ''.join(path.suffixes))).write_bytes(corrupt)
            outcome(tmp_path/('flipped' + ''.join(path.suffixes)), limits=Limits(pixels=10**6))      # raises nothing but an ImageError
    assert not caplog.records and capsys.readouterr() == ('', '')


def test_strips_that_are_not_listed(tmp_path):
    import tifffile
    tifffile.imwrite(tmp_path/'a.tif', np.full((64, 20, 3), 200, np.uint8), photometric='rgb', rowsperstrip=16)
    b = bytearray((tmp_path/'a.tif').read_bytes())
    with tifffile.TiffFile(tmp_path/'a.tif') as f: tags = [f.pages[0].tags[t].offset for t in ('StripOffsets', 'StripByteCounts')]
    for at in tags: b[at + 4:at + 8] = struct.pack('<I', 1)                            # one strip of four
    (tmp_path/'a.tif').write_bytes(b)
    assert outcome(tmp_path/'a.tif') == 'corrupt'


def test_a_packed_picture_is_named(tmp_path):
    (tmp_path/'a.png.gz').write_bytes(gzip.compress(png(2, 1, b'\0' + bytes(6))))
    with pytest.raises(ImageError, match='gunzip') as caught: read(tmp_path/'a.png.gz')
    assert caught.value.reason == 'unsupported'


def test_a_large_header_is_not_called_an_object(tmp_path):
    head = b"{'descr': '|u1', 'fortran_order': False, 'shape': (3, 3)}" + b' '*50_000
    (tmp_path/'a.npy').write_bytes(b'\x93NUMPY\x02\0' + struct.pack('<I', len(head)) + head + bytes(9))
    assert outcome(tmp_path/'a.npy') == 'corrupt'


def test_a_file_that_may_not_be_read(tmp_path):
    (tmp_path/'closed').mkdir(mode=0o755)
    for p in (tmp_path/'a.png', tmp_path/'closed'/'a.png'): write_image(p, np.zeros((4, 4, 3), np.uint8))
    (tmp_path/'a.png').chmod(0); (tmp_path/'closed').chmod(0)
    code = ("import os, sys; from strip_notebooks.data.formats import *; from strip_notebooks.data.images import *\nif not os.getuid(): os.setuid(65534)\n"
            "for p in sys.argv[1:]:\n    try: read_image(p)\n    except ImageError as e: print(e.reason, 'ask for the right' in str(e))")
    for folder in (tmp_path, *tmp_path.parents[:2]): folder.chmod(0o755)
    try: done = subprocess.run([sys.executable, '-c', code, tmp_path/'a.png', tmp_path/'closed'/'a.png'], capture_output=True, text=True)
    finally: (tmp_path/'closed').chmod(0o755)
    assert done.stdout.splitlines() == ['forbidden True']*2, done


def test_nothing_heavy_is_imported():
    code = "import sys; import strip_notebooks.data.formats; print([m for m in ('torch', 'PIL', 'cv2', 'pydicom', 'nibabel', 'tifffile', 'gdcm') if m in sys.modules])"
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.strip() == '[]'


def write_table():
    "Write formats_outcomes.csv anew; read its diff before committing it"
    with open(TABLE, 'w', newline='') as f:
        w = csv.writer(f, lineterminator='\n')
        w.writerow(['package', 'file', 'outcome'])
        w.writerows([p, n, outcome(path)] for p in FOLDERS for n,path in shipped(p).items())


if __name__ == '__main__': write_table()
