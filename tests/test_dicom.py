"DICOM: sound files in every encoding are shown as the standard says, and hostile or truncated ones are refused in words within their limits"
import importlib.util, io, logging, struct, warnings, zlib
from pathlib import Path

import imagecodecs
import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import (DeflatedExplicitVRLittleEndian, ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian, JPEG2000Lossless,
                         JPEGBaseline8Bit, JPEGExtended12Bit, JPEGLosslessSV1, JPEGLSLossless, RLELossless, SecondaryCaptureImageStorage)

from strip_notebooks.data.decoding import decode
from strip_notebooks.data.dicom import burned_in
from strip_notebooks.data.formats import read_image
from strip_notebooks.data.images import ImageError, Limits, Reading

DATA = Path(importlib.util.find_spec('pydicom').origin).parent/'data'
FILES = DATA/'test_files'
NATIVE = dict(implicit=ImplicitVRLittleEndian, explicit=ExplicitVRLittleEndian, big=ExplicitVRBigEndian, deflated=DeflatedExplicitVRLittleEndian)


def read(source, limits=Limits(), **reading): return read_image(source, Reading(**reading), limits=limits)


def outcome(source, limits=Limits(), **reading):
    "Shape and dtype, or the reason of the error"
    try: a = read(source, limits, **reading)
    except ImageError as e: return e.reason
    return f'{"x".join(map(str, a.shape))} {a.dtype}'


def elements(**values):
    d = Dataset()
    for k,v in values.items():
        if isinstance(v, tuple): d.add_new(k, *v)
        else: setattr(d, k, v)
    return d


def dicom(a, syntax=ExplicitVRLittleEndian, photometric='MONOCHROME2', stored=None, stream=None, **values):
    "The bytes of a DICOM file of one or several frames"
    a = np.asarray(a)
    frames,plane = (len(a), a[0]) if a.ndim == 4 or (a.ndim == 3 and a.shape[-1] != 3) else (1, a)
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = syntax
    ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID = SecondaryCaptureImageStorage
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID = '1.2.3'
    ds.PatientName = 'Secret^Name'
    ds.Rows,ds.Columns = plane.shape[:2]
    ds.SamplesPerPixel = 3 if plane.ndim == 3 else 1
    if plane.ndim == 3: ds.PlanarConfiguration = 0
    ds.PhotometricInterpretation = photometric
    ds.BitsAllocated = 8*a.dtype.itemsize
    ds.BitsStored = stored or ds.BitsAllocated
    ds.HighBit = ds.BitsStored - 1
    ds.PixelRepresentation = int(a.dtype.kind == 'i')
    if frames > 1: ds.NumberOfFrames = frames
    order = '>' if syntax == ExplicitVRBigEndian else '<'
    raw = a.astype(a.dtype.newbyteorder(order)).tobytes()
    if stream is not None: ds.add_new('PixelData', 'OB', encapsulate(stream if isinstance(stream, list) else [stream]))
    elif a.dtype.kind == 'f': ds.add_new('FloatPixelData' if a.dtype == np.float32 else 'DoubleFloatPixelData', 'OF' if a.dtype == np.float32 else 'OD', raw)
    else: ds.add_new('PixelData', 'OW', raw + b'\0'*(len(raw) % 2))
    for k,v in values.items():
        if isinstance(v, tuple): ds.add_new(k, *v)
        else: setattr(ds, k, v)
    out = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        pydicom.dcmwrite(out, ds, enforce_file_format=True)
    return out.getvalue()


@pytest.fixture
def save(tmp_path):
    "Write bytes into a file"
    def write(data, name='a.dcm'):
        (tmp_path/name).write_bytes(data)
        return tmp_path/name
    return write


RAMP = np.arange(30*40, dtype=np.uint16).reshape(30, 40)
COLOR = np.random.default_rng(0).integers(0, 256, (30, 40, 3)).astype(np.uint8)


# --- sound files ---

def words(values, syntax):
    "Values of a table as an explicit or implicit file holds them"
    return np.asarray(values, '>u2' if syntax == ExplicitVRBigEndian else '<u2').tobytes()


@pytest.mark.parametrize('syntax', NATIVE.values(), ids=NATIVE)
@pytest.mark.parametrize('vr', ['US', 'OW'])
def test_look_up_tables_in_every_encoding(save, syntax, vr):
    entries = np.arange(1000)*60
    data = (vr, words(entries, syntax)) if vr == 'OW' else (vr, entries.tolist())
    table = elements(LUTDescriptor=('US', [1000, 100, 16]), LUTData=data)
    want = entries[np.clip(RAMP.astype(int) - 100, 0, 999)]
    path = save(dicom(RAMP, syntax, ModalityLUTSequence=[table]))
    np.testing.assert_allclose(read(path)[..., 0], want/65535, atol=1e-6)
    np.testing.assert_allclose(read(path, window=(1000, 50_000))[..., 0], np.clip((want - 1000)/49_000, 0, 1), atol=1e-6)
    path = save(dicom(RAMP, syntax, VOILUTSequence=[table]))
    np.testing.assert_allclose(read(path)[..., 0], want/65535, atol=1e-6)
    ds = pydicom.dcmread(path)
    if syntax != ImplicitVRLittleEndian: np.testing.assert_array_equal(pydicom.pixels.apply_voi_lut(RAMP, ds), want)


def test_tables_of_few_bits_and_of_signed_numbers(save):
    table = elements(LUTDescriptor=('SS', [300, -100, 10]), LUTData=('US', list(range(300))))
    a = (RAMP.astype(np.int16) - 600)
    for syntax in (ImplicitVRLittleEndian, ExplicitVRLittleEndian):
        np.testing.assert_allclose(read(save(dicom(a, syntax, ModalityLUTSequence=[table])))[..., 0], np.clip(a + 100, 0, 299)/1023, atol=1e-6)
    packed = elements(LUTDescriptor=('US', [256, 0, 8]), LUTData=('OW', bytes(range(255, -1, -1))))
    np.testing.assert_allclose(read(save(dicom(COLOR[..., 0], VOILUTSequence=[packed])))[..., 0], 1 - COLOR[..., 0]/255, atol=1e-6)


def palette(syntax, bits, segmented=False, count=256, first=0):
    "Elements of a palette, and its colors"
    colors = {c: (np.arange(count)*k % 256)*(257 if bits == 16 else 1) for c,k in (('Red', 1), ('Green', 3), ('Blue', 7))}
    values = {}
    for c,v in colors.items():
        values[f'{c}PaletteColorLookupTableDescriptor'] = 'US', [count % 65536, first, bits]
        if segmented: values[f'Segmented{c}PaletteColorLookupTableData'] = 'OW', words(segments(v), syntax)
        elif bits == 16: values[f'{c}PaletteColorLookupTableData'] = 'OW', words(v, syntax)
        else: values[f'{c}PaletteColorLookupTableData'] = 'OW', words(v[::2] | v[1::2] << 8, syntax)
    return values, np.stack([(v >> 8 if bits == 16 else v) for v in colors.values()], -1).astype(np.uint8)


def segments(v):
    "Entries as discrete and linear segments"
    out = [0, 2, *v[:2]]
    i = 2
    while i < len(v):
        n = 1
        while i + n < len(v) and v[i + n] - v[i + n - 1] == v[i] - v[i - 1]: n += 1
        if n > 2: out += [1, n, v[i + n - 1]]
        else: out += [0, n, *v[i:i + n]]
        i += n
    return out


@pytest.mark.parametrize('syntax', NATIVE.values(), ids=NATIVE)
@pytest.mark.parametrize('bits,segmented', [(8, False), (16, False), (16, True)])
def test_palettes_in_every_encoding(save, syntax, bits, segmented):
    values,colors = palette(syntax, bits, segmented)
    index = COLOR[..., 0].astype(np.uint16)
    np.testing.assert_array_equal(read(save(dicom(index, syntax, 'PALETTE COLOR', 8, **values))), colors[index])


def test_a_segmented_palette_with_a_repetition_is_as_pydicom_expands_it(save):
    from pydicom.pixels.processing import _expand_segmented_lut
    codes = [0, 3, 100, 200, 300, 1, 61, 60_000, 0, 2, 5, 6, 2, 2, 0, 0, 0, 1, 9]
    want = np.array(_expand_segmented_lut(tuple(codes), 'H')[:256])
    count = len(want)
    values = {}
    for c in ('Red', 'Green', 'Blue'):
        values[f'{c}PaletteColorLookupTableDescriptor'] = 'US', [count, 0, 16]
        values[f'Segmented{c}PaletteColorLookupTableData'] = 'OW', words(codes, ImplicitVRLittleEndian)
    index = np.arange(count, dtype=np.uint8)[None]
    got = read(save(dicom(index, ImplicitVRLittleEndian, 'PALETTE COLOR', **values)))[0, :, 0]
    np.testing.assert_allclose(got, want//256, atol=1)


def test_a_supplemental_palette_colors_grey_from_its_first_entry_up(save):
    values,colors = palette(ExplicitVRLittleEndian, 8, count=100, first=100)
    grey = COLOR[..., 0]//2
    got = read(save(dicom(grey, PixelPresentation='COLOR', **values)))
    np.testing.assert_array_equal(got, np.where((grey >= 100)[..., None], colors[np.clip(grey.astype(int) - 100, 0, 99)], grey[..., None]))


@pytest.mark.parametrize('high', [11, 13, 15])
def test_bits_that_do_not_count(save, high):
    a = np.random.default_rng(1).integers(0, 2**16, (20, 30)).astype(np.uint16)
    want = a >> (high - 11) & 0xfff
    np.testing.assert_allclose(read(save(dicom(a, stored=12, HighBit=high)))[..., 0], want/4095, atol=1e-6)


@pytest.mark.parametrize('syntax', NATIVE.values(), ids=NATIVE)
def test_every_frame_of_native_files(save, syntax):
    a = np.random.default_rng(2).integers(-2000, 2000, (5, 7, 9)).astype(np.int16)
    path = save(dicom(a, syntax, RescaleSlope='-2', RescaleIntercept='10', PhotometricInterpretation='MONOCHROME1'))
    want = 1 - np.clip((a*-2. + 10 + 100)/200, 0, 1)
    np.testing.assert_allclose(read(path, frame='all', window=(-100, 100))[..., 0], want, atol=1e-6)
    for i in (0, 4, -2): np.testing.assert_allclose(read(path, frame=i, window=(-100, 100))[..., 0], want[i], atol=1e-6)
    assert outcome(path, frame=5) == outcome(path, frame='last') == 'choice'


def test_single_bits_that_begin_within_a_byte(save):
    bits = np.random.default_rng(3).integers(0, 2, (3, 5, 7)).astype(np.uint8)
    raw = np.packbits(bits.ravel(), bitorder='little').tobytes()
    path = save(dicom(bits, BitsAllocated=1, BitsStored=1, HighBit=0, PixelData=('OB', raw + b'\0'*(len(raw) % 2))))
    np.testing.assert_array_equal(read(path, frame='all')[..., 1], bits)


def test_floating_point_pixels(save):
    for kind in (np.float32, np.float64):
        a = np.linspace(-3, 9, 600).reshape(20, 30).astype(kind)
        a[0, 0] = np.nan
        path = save(dicom(a))
        assert outcome(path) == 'range'
        np.testing.assert_allclose(read(path, window=(0, 5))[..., 0], np.nan_to_num(np.clip(a/5, 0, 1)), atol=1e-6)


def jpeg(a, **how): return imagecodecs.jpeg8_encode(np.ascontiguousarray(a), **{'level': 95, **how})


def test_colors_of_jpeg_with_and_without_markers(save):
    smooth = np.repeat(np.repeat(COLOR[:4, :5], 8, 0), 8, 1)
    ycc = jpeg(smooth, subsampling='444')
    rgb = jpeg(smooth, colorspace='rgb', outcolorspace='rgb')
    marker = rgb.index(b'\xff\xee')
    bare = rgb[:marker] + rgb[marker + 2 + int.from_bytes(rgb[marker + 2:marker + 4], 'big'):]
    bare = bare.replace(b'\x03R\x11\x00G\x11\x00B\x11\x00', b'\x03\x01\x11\x00\x02\x11\x00\x03\x11\x00').replace(b'\xff\xda\x00\x0c\x03R\x00G\x00B\x00', b'\xff\xda\x00\x0c\x03\x01\x00\x02\x00\x03\x00')     # nor letters
    plain_ycc = ycc[:2] + ycc[2 + 2 + int.from_bytes(ycc[4:6], 'big'):]                 # without JFIF
    for stream,photometric in ((ycc, 'YBR_FULL_422'), (ycc, 'YBR_FULL'), (ycc, 'RGB'), (plain_ycc, 'YBR_FULL'), (rgb, 'RGB'), (rgb, 'YBR_FULL'), (bare, 'RGB')):
        got = read(save(dicom(smooth, JPEGBaseline8Bit, photometric, stream=stream)))
        assert abs(got.astype(int) - smooth).max() < 12, photometric


CODED = dict(
    jpeg=(JPEGBaseline8Bit, lambda a: jpeg(a), np.uint8), jpeg12=(JPEGExtended12Bit, lambda a: jpeg(a, bitspersample=12), np.uint16),
    lossless=(JPEGLosslessSV1, lambda a: jpeg(a, lossless=True, level=None), np.uint16), jpegls=(JPEGLSLossless, imagecodecs.jpegls_encode, np.uint16),
    jpeg2000=(JPEG2000Lossless, lambda a: imagecodecs.jpeg2k_encode(a, codecformat='j2k', level=0), np.uint16), rle=(RLELossless, None, np.uint8))


def rle(a):
    "A run-length coding of bytes, literally"
    body = b''.join(bytes([len(piece) - 1]) + piece for piece in (a.tobytes()[i:i + 128] for i in range(0, a.size, 128)))
    return struct.pack('<16L', 1, 64, *[0]*14) + body + b'\0'*(len(body) % 2)


def coded(coding, frames=1, cut=1., end=True, **values):
    "A compressed file, each stream cut to a share of its length"
    syntax,encode,kind = CODED[coding]
    pictures = [np.roll(RAMP % 256, i).astype(kind) for i in range(frames)]
    streams = [(encode or rle)(p) for p in pictures]
    streams = [s if cut == 1 else s[:int(len(s)*cut)] + (b'\xff\xd9' if end else b'') for s in streams]
    stored = {'jpeg': 8, 'rle': 8, 'jpeg12': 12}.get(coding, 16)
    return pictures, dicom(np.stack(pictures) if frames > 1 else pictures[0], syntax, stored=stored, stream=streams, **values)


@pytest.mark.parametrize('coding', CODED)
def test_every_frame_of_coded_files(save, coding):
    pictures,data = coded(coding, 4)
    path = save(data)
    top = {'jpeg': 255, 'rle': 255, 'jpeg12': 4095}.get(coding, 65535)
    for i in (0, 3, -2):
        got = read(path, frame=i)[..., 0]
        got = got.astype(float)*(1 if got.dtype == np.uint8 else top)
        assert abs(got - pictures[i]).mean() < (3 if coding in ('jpeg', 'jpeg12') else 1e-2)
    np.testing.assert_array_equal(read(path, frame='all')[2], read(path, frame=2))
    np.testing.assert_array_equal(read(data, frame=1), read(path, frame=1))
    np.testing.assert_array_equal(read(io.BytesIO(data), frame=1), read(path, frame=1))


def test_burned_in_annotation(save):
    assert [burned_in(save(dicom(RAMP, s, BurnedInAnnotation=v))) for s in NATIVE.values() for v in ('YES', 'NO')] == [True, False]*4
    assert not burned_in(save(dicom(RAMP)))


# --- hostile and truncated files: each is refused with its reason ---

def spliced(data, insert, before=b'\x28\0\x02\0'):
    "Bytes inserted before an element"
    at = data.index(before)
    return data[:at] + insert + data[at:]


def sequence(depth, tag=b'\x08\x00\x15\x11'):
    "Sequences in one another, by delimiters"
    return (tag + b'SQ\0\0\xff\xff\xff\xff\xfe\xff\0\xe0\xff\xff\xff\xff')*depth + (b'\xfe\xff\x0d\xe0\0\0\0\0\xfe\xff\xdd\xe0\0\0\0\0')*depth


def empty_items(n): return b'\x08\x00\x15\x11SQ\0\0\xff\xff\xff\xff' + b'\xfe\xff\0\xe0\0\0\0\0'*n + b'\xfe\xff\xdd\xe0\0\0\0\0'


def inflating(zeros):
    "A deflated file with an element of so many zeros before its picture"
    data = dicom(RAMP, DeflatedExplicitVRLittleEndian)
    start = data.index(b'\x02\0\x00\0UL') + 12 + struct.unpack('<L', data[data.index(b'\x02\0\x00\0UL') + 8:][:4])[0]
    inside = zlib.decompress(data[start:], -15)
    at = inside.index(b'\x28\0\x02\0')
    packer = zlib.compressobj(1, wbits=-15)
    out = [packer.compress(inside[:at] + b'\x11\x00\x10\x10OB\0\0' + struct.pack('<L', zeros))]
    for _ in range(zeros//2**24): out.append(packer.compress(bytes(2**24)))
    return data[:start] + b''.join(out) + packer.compress(inside[at:]) + packer.flush()


def with_lut(**values): return dicom(RAMP, ImplicitVRLittleEndian, VOILUTSequence=[elements(**values)])


def with_segments(codes):
    values = {}
    for c in ('Red', 'Green', 'Blue'):
        values[f'{c}PaletteColorLookupTableDescriptor'] = 'US', [256, 0, 16]
        values[f'Segmented{c}PaletteColorLookupTableData'] = 'OW', words(codes, ImplicitVRLittleEndian)
    return dicom(COLOR[..., 0], ImplicitVRLittleEndian, 'PALETTE COLOR', **values)


def other_stream(a, syntax=JPEG2000Lossless, **how): return dicom(COLOR[..., 0], syntax, stream=a, **how)


def j2k(a, **how): return imagecodecs.jpeg2k_encode(a, codecformat='j2k', level=0, **how)


def scans(n):
    "A progressive JPEG whose last scan is repeated"
    image = io.BytesIO()
    from PIL import Image
    Image.fromarray(COLOR[..., 0]).save(image, 'JPEG', progressive=True)
    data = image.getvalue()
    at = data.rindex(b'\xff\xda')
    return data[:at] + data[at:-2]*n + b'\xff\xd9'


def fragments(sizes, table=b''):
    "Pixel data of fragments whose lengths are as stated"
    value = b'\xfe\xff\0\xe0' + struct.pack('<L', len(table)) + table + b''.join(b'\xfe\xff\0\xe0' + struct.pack('<L', s) + bytes(min(s, 64)) for s in sizes)
    data = dicom(COLOR[..., 0], RLELossless, stream=b'AB')
    return data[:data.index(b'\xfe\xff\0\xe0')] + value + b'\xfe\xff\xdd\xe0\0\0\0\0'


HOSTILE = {
    **{f'{c} cut to {int(s*100)} %, ended': ('corrupt', lambda c=c, s=s: coded(c, cut=s)[1]) for c in CODED for s in (.3, .6, .95)},
    **{f'{c} cut to {int(s*100)} %': ('corrupt', lambda c=c, s=s: coded(c, cut=s, end=False)[1]) for c in CODED for s in (.3, .95)},
    **{f'{c} in a file cut to 90 %': ('corrupt', lambda c=c: (lambda d: d[:len(d)*9//10])(coded(c, 3)[1])) for c in CODED},
    **{f'{c} with more frames than data': ('corrupt', lambda c=c: coded(c, 3, NumberOfFrames=4)[1]) for c in CODED},
    **{f'{n} with more frames than data': ('corrupt', lambda s=s: dicom(RAMP, s, NumberOfFrames=2)) for n,s in NATIVE.items()},
    **{f'{n} in a file without its last byte': ('corrupt', lambda s=s: dicom(RAMP, s)[:-1]) for n,s in NATIVE.items() if n != 'deflated'},
    'deflated, truncated': ('corrupt', lambda: dicom(COLOR[..., 0], DeflatedExplicitVRLittleEndian)[:-300]),
    'sequences 33 deep': ('nested', lambda: spliced(dicom(RAMP), sequence(33))),
    'sequences 100,000 deep': ('nested', lambda: spliced(dicom(RAMP), sequence(100_000))),
    'sequences of the picture 40 deep': ('nested', lambda: spliced(dicom(RAMP), sequence(40, b'\x28\0\x10\x30'))),
    'three million empty items': ('too_large', lambda: spliced(dicom(RAMP), empty_items(3_000_000))),
    'an item that is none': ('corrupt', lambda: spliced(dicom(RAMP), b'\x08\0\x15\x11SQ\0\0\xff\xff\xff\xff\x08\0\x15\x11abcd')),
    'an element longer than the file': ('corrupt', lambda: spliced(dicom(RAMP), b'\x11\0\x10\x10OB\0\0\xf0\xff\xff\x7f')),
    'a look-up table of a megabyte and more': ('corrupt', lambda: with_lut(LUTDescriptor=('US', [0, 0, 16]), LUTData=('OW', bytes(2**21)))),
    'a look-up table that is too short': ('corrupt', lambda: with_lut(LUTDescriptor=('US', [1000, 0, 16]), LUTData=('OW', bytes(200)))),
    'a look-up table of no bits': ('corrupt', lambda: with_lut(LUTDescriptor=('US', [100, 0, 0]), LUTData=('OW', bytes(200)))),
    'a look-up table without data': ('corrupt', lambda: with_lut(LUTDescriptor=('US', [100, 0, 16]))),
    'segments that repeat themselves': ('corrupt', lambda: with_segments([2, 65535, 0, 0])),
    'segments that unpack to too much': ('corrupt', lambda: with_segments([0, 1, 5] + [1, 65535, 9]*1000)),
    'segments that end too early': ('corrupt', lambda: with_segments([0, 300, 1, 2])),
    'segments of an unknown kind': ('corrupt', lambda: with_segments([9, 1, 1, 1])),
    'a stream of another size': ('corrupt', lambda: other_stream(j2k(COLOR[:20, :, 0].copy()))),
    'a stream with more components': ('corrupt', lambda: other_stream(j2k(COLOR))),
    'a stream with 200 components': ('corrupt', lambda: other_stream(j2k(np.zeros((30, 40, 200), np.uint8), mct=False))),
    'a JPEG of 3,000 scans': ('too_large', lambda: other_stream(scans(3000), JPEGBaseline8Bit)),
    'a frame longer than its pixels': ('corrupt', lambda: other_stream(jpeg(COLOR[..., 0]) + bytes(2**25), JPEGBaseline8Bit)),
    'no stream at all': ('corrupt', lambda: other_stream(b'no stream', JPEGBaseline8Bit)),
    'plain pixels under a coded syntax': ('corrupt', lambda: dicom(COLOR[..., 0]).replace(b'1.2.840.10008.1.2.1\0', b'1.2.840.10008.1.2.5\0')),
    'a fragment longer than the file': ('corrupt', lambda: fragments([2**31])),
    'offsets behind the file': ('corrupt', lambda: fragments([64, 64], struct.pack('<2L', 0, 2**31))),
    'three million fragments': ('too_large', lambda: fragments([], b'').replace(b'\xfe\xff\xdd\xe0', b'\xfe\xff\0\xe0\0\0\0\0'*3_000_000)),
    'run lengths that unpack to too much': ('corrupt', lambda: other_stream(struct.pack('<16L', 1, 64, *[0]*14) + b'\x81\0'*100_000, RLELossless)),
    'run lengths of 2**31 segments': ('corrupt', lambda: other_stream(struct.pack('<16L', 2**31, 64, *[0]*14) + b'\x81\0'*100, RLELossless)),
    'a width of 60,000 pixels': ('too_large', lambda: dicom(RAMP, Rows=60_000, Columns=60_000)),
    'no rows': ('corrupt', lambda: dicom(RAMP, Rows=0)),
    '17 of 16 bits': ('corrupt', lambda: dicom(RAMP, BitsStored=17)),
    '13 bits allocated': ('corrupt', lambda: dicom(RAMP, BitsAllocated=13, BitsStored=12)),
    'a number of frames in words': ('corrupt', lambda: spliced(dicom(RAMP), b'\x28\0\x08\0IS\x04\0many', b'\x28\0\x10\0')),
    'four samples per pixel': ('unsupported', lambda: dicom(RAMP, SamplesPerPixel=4, PhotometricInterpretation='CMYK')),
    'half a color space': ('unsupported', lambda: dicom(COLOR, PhotometricInterpretation='YBR_PARTIAL_422')),
    'a video': ('unsupported', lambda: other_stream(b'video', pydicom.uid.MPEG2MPML)),
    'an unknown syntax': ('unsupported', lambda: dicom(RAMP).replace(b'1.2.840.10008.1.2.1\0', b'1.2.840.99999.1.2.1\0')),
    'only a header': ('corrupt', lambda: (lambda d: d[:d.index(b'\xe0\x7f\x10\0')])(dicom(RAMP))),
}


def test_there_are_enough_hostile_files(): assert len(HOSTILE) >= 48


def test_hostile_files_are_refused_with_their_reason(tmp_path):
    "All in workers that may die, so that one which crashes or hangs is told from one that is refused"
    paths = {}
    for i,(name,(_,make)) in enumerate(HOSTILE.items()):
        paths[name] = tmp_path/f'{i}.dcm'
        paths[name].write_bytes(make())
    found = {n: d.error.reason if d.error else str(d.value.shape) for n,d in zip(paths, decode(read_image, paths.values(), workers=2))}
    assert found == {n: why for n,(why,_) in HOSTILE.items()}


def test_a_deflated_gigabyte_before_the_picture_takes_no_memory(save):
    "3 GB from 3 MB: skipped as it is unpacked, or refused"
    path = save(inflating(3*2**30))
    assert path.stat().st_size < 2**24
    (found,) = decode(read_image, [path])
    np.testing.assert_array_equal(found.value, read(save(dicom(RAMP), 'b.dcm')))
    assert outcome(path, Limits(file_bytes=2**25)) == 'too_large'


def test_a_million_empty_items_are_passed_over(save):
    path = save(spliced(dicom(RAMP), empty_items(1_000_000)))
    (found,) = decode(read_image, [path])
    np.testing.assert_array_equal(found.value, read(save(dicom(RAMP), 'b.dcm')))


def test_no_name_is_in_any_message_and_nothing_is_printed(tmp_path, caplog, capfd):
    caplog.set_level(logging.INFO)
    for i,(name,(_,make)) in enumerate(HOSTILE.items()):
        if 'million' in name: continue
        with pytest.raises(ImageError) as caught: read(make())
        assert 'Secret' not in str(caught.value), name
    assert not caplog.records and capfd.readouterr() == ('', '')


# --- fuzz ---

def altered(data, rng):
    "A file with flipped bits, cut, or with a piece of itself elsewhere"
    b = bytearray(data)
    how = rng.integers(4)
    if how == 0:
        for k in rng.integers(0, len(b), rng.integers(1, 6)): b[k] ^= 1 << rng.integers(8)
    elif how == 1:
        for k in rng.integers(0, min(len(b), 2000), 3): b[k] = rng.integers(256)
    elif how == 2: b = b[:rng.integers(1, len(b))]
    else:
        at,to,n = rng.integers(0, len(b), 3)
        b[to:to + n % 500] = b[at:at + n % 500]
    return bytes(b)


def test_altered_files_are_read_or_refused(capfd):
    "Every file that pydicom ships, altered: nothing but an ImageError, no crash, no hang, no word on the terminal"
    rng = np.random.default_rng(6)
    files = sorted(f for f in FILES.rglob('*') if f.is_file() and f.stat().st_size < 200_000 and 'TINY' not in str(f) and f.suffix not in ('.py', '.pyc'))
    items = [altered(f.read_bytes(), rng) for f in files for _ in range(3)]
    found = list(decode(read_image, items, name=lambda item: 'file'))
    assert len(found) > 300
    assert {d.error.reason for d in found if d.error} <= {'corrupt', 'nested', 'no_pixels', 'not_an_image', 'unsupported', 'too_large', 'range', 'empty'}
    assert sum(d.error is None for d in found) > 50 and sum(d.error is not None for d in found) > 50
    assert capfd.readouterr() == ('', '')


def test_no_flipped_bit_of_a_jpeg_in_dicom_ends_its_process(capfd):
    "8-bit JPEG is read by a decoder that raises: a C++ exception that nobody catches would end the process that reads"
    data = coded('jpeg')[1]
    rng = np.random.default_rng(1)
    items = []
    for _ in range(300):
        b = bytearray(data)
        b[rng.integers(len(b))] ^= 1 << rng.integers(8)
        items.append(bytes(b))
    found = list(decode(read_image, items, name=lambda item: 'file'))
    reasons = {f.error.reason for f in found if f.error}
    assert reasons and not reasons & {'crashed', 'memory', 'timeout'}
    assert capfd.readouterr() == ('', '')
