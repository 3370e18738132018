"Streams that unpack to more than they should, colors and turns of TIFFs, blank DICOM elements, and sizes read from headers alone"
import importlib.util, io, struct, subprocess, sys, zlib
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
import tifffile
from PIL import Image, ImageOps

from strip_notebooks.data.formats import image_format, image_size, read_image, write_image
from strip_notebooks.data.images import ImageError, Limits, Reading

DICOM = Path(importlib.util.find_spec('pydicom').origin).parent/'data'/'test_files'
ENCODERS = dict(jpeg=imagecodecs.jpeg8_encode, jpegls=imagecodecs.jpegls_encode, jpeg2000=lambda a: imagecodecs.jpeg2k_encode(a, codecformat='j2k', level=0))


def read(path, limits=Limits(), **reading):
    "The picture, the choices of its `Reading` given one by one"
    return read_image(path, Reading(**reading), limits=limits)


def reason(path, **kwargs):
    try: return read(path, **kwargs).shape
    except ImageError as e:
        assert str(e).startswith(str(path)) and e.path == str(path)
        return e.reason


def compressed_dicom(path, coding, stream):
    "A DICOM file of 64 x 64 pixels, as it says, around a stream of its own size"
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.encaps import encapsulate
    from pydicom.uid import JPEG2000Lossless, JPEGBaseline8Bit, JPEGLSLossless, SecondaryCaptureImageStorage
    ds = Dataset(); ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = dict(jpeg=JPEGBaseline8Bit, jpegls=JPEGLSLossless, jpeg2000=JPEG2000Lossless)[coding]
    ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID = SecondaryCaptureImageStorage
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID = '1.2.3'
    ds.Rows = ds.Columns = 64
    ds.SamplesPerPixel,ds.PhotometricInterpretation,ds.PixelRepresentation = 1, 'MONOCHROME2', 0
    ds.BitsAllocated = ds.BitsStored = 8; ds.HighBit = 7
    ds.PixelData = encapsulate([stream]); ds['PixelData'].VR = 'OB'
    ds.save_as(path, enforce_file_format=True)


def compressed_tiff(path, code, stream):
    with tifffile.TiffWriter(path) as f: f.write(iter([stream]), shape=(64, 64), dtype=np.uint8, compression=code, photometric='minisblack', rowsperstrip=64)


@pytest.fixture(scope='module')
def streams():
    "Real streams of zeros, 12000 pixels wide and high: 144 million, within the usual limit, from a few kB"
    big = np.zeros((12_000, 12_000), np.uint8)
    return dict(jpeg=ENCODERS['jpeg'](big), jpegls=ENCODERS['jpegls'](big), jpeg2000=claiming(ENCODERS['jpeg2000'](big[:64, :64]), 12_000))


def claiming(stream, side):
    "A JPEG 2000 stream, of one tile, whose head says that it is `side` wide and high"
    at = stream.index(b'\xff\x4f\xff\x51') + 8
    return stream[:at] + struct.pack('>8I', side, side, 0, 0, side, side, 0, 0) + stream[at + 32:]


@pytest.mark.parametrize('coding', ENCODERS)
def test_dicom_streams_of_another_size(tmp_path, streams, coding):
    compressed_dicom(tmp_path/'bomb.dcm', coding, streams[coding])
    assert reason(tmp_path/'bomb.dcm') == 'corrupt'
    small = np.add.outer(np.arange(64), np.arange(64)).astype(np.uint8)
    compressed_dicom(tmp_path/'good.dcm', coding, ENCODERS[coding](small))
    assert abs(read(tmp_path/'good.dcm')[..., 0].astype(int) - small).max() <= (6 if coding == 'jpeg' else 0)
    compressed_dicom(tmp_path/'other.dcm', coding, ENCODERS[coding](small[:63]))
    assert reason(tmp_path/'other.dcm') == 'corrupt'


@pytest.mark.parametrize('coding,code', [('jpeg', 7), ('jpeg2000', 34712), ('jpeg2000', 33005)])
def test_tiff_streams_of_another_size(tmp_path, streams, coding, code):
    compressed_tiff(tmp_path/'bomb.tif', code, streams[coding])
    assert reason(tmp_path/'bomb.tif') == 'corrupt'
    small = np.add.outer(np.arange(64), np.arange(64)).astype(np.uint8)
    compressed_tiff(tmp_path/'good.tif', code, ENCODERS[coding](small))
    assert abs(read(tmp_path/'good.tif')[..., 0].astype(int) - small).max() <= (6 if coding == 'jpeg' else 0)


def test_bombs_take_no_memory(tmp_path, streams):
    "All in one process, which stays within 130 MB more than the libraries alone; each would take 144 MB and up, the deflated strip 512"
    import zlib
    for coding in ENCODERS: compressed_dicom(tmp_path/f'{coding}.dcm', coding, streams[coding])
    compressed_tiff(tmp_path/'jpeg.tif', 7, streams['jpeg']); compressed_tiff(tmp_path/'jpeg2000.tif', 34712, streams['jpeg2000'])
    packer = zlib.compressobj(1)
    compressed_tiff(tmp_path/'deflate.tif', 8, b''.join(packer.compress(bytes(2**20)) for _ in range(2**9)) + packer.flush())
    files = sorted(tmp_path.iterdir())
    code = '''
import sys
from strip_notebooks.data.formats import ImageError, read_image
import imagecodecs, pydicom, tifffile
from pathlib import Path
def peak(): return int(Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0])//1024     # MB
before = peak()
for f in sys.argv[1:]:
    try: print(read_image(f).shape)
    except ImageError as e: print(e.reason)
print(peak() - before < 130)
'''
    if not Path('/proc/self/status').exists(): pytest.skip('the memory of a process is read from /proc')
    done = subprocess.run([sys.executable, '-c', code, *map(str, files)], capture_output=True, text=True)
    assert done.stdout.split() == ['corrupt']*6 + ['True'] and done.stderr == '', done


def test_nothing_is_written_to_the_terminal_by_decoders(capfd):
    assert reason(DICOM/'JPEG2000-embedded-sequence-delimiter.dcm') == 'corrupt'
    assert capfd.readouterr() == ('', '')


def test_tiles_that_claim_too_much(tmp_path):
    tifffile.imwrite(tmp_path/'a.tif', np.zeros((32, 32), np.uint8), tile=(16, 16), compression='deflate')
    with tifffile.TiffFile(tmp_path/'a.tif', mode='r+') as f:
        for t in ('TileWidth', 'TileLength'): f.pages[0].tags[t].overwrite(65520)
    assert reason(tmp_path/'a.tif') == 'too_large'


def test_an_uncommon_coding_is_refused(tmp_path):
    tifffile.imwrite(tmp_path/'a.tif', np.zeros((32, 32, 3), np.uint8), photometric='rgb', compression='webp')
    assert reason(tmp_path/'a.tif') == 'unsupported'


def test_colors_of_tiffs_as_pillow_reads_them(tmp_path):
    rng = np.random.default_rng(0)
    rgb = rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(rgb).convert('YCbCr').save(tmp_path/'ycbcr.tif')
    np.testing.assert_array_equal(read(tmp_path/'ycbcr.tif'), np.asarray(Image.open(tmp_path/'ycbcr.tif').convert('RGB')))
    tifffile.imwrite(tmp_path/'lab.tif', rgb, photometric='cielab')
    assert reason(tmp_path/'lab.tif') == 'unsupported'
    opacity = rng.integers(0, 256, (20, 30, 1), dtype=np.uint8)
    weighted = (rgb*(opacity/255.) + .5).astype(np.uint8)
    tifffile.imwrite(tmp_path/'weighted.tif', np.concatenate([weighted, opacity], -1), photometric='rgb', extrasamples=['assocalpha'])
    tifffile.imwrite(tmp_path/'plain.tif', np.concatenate([rgb, opacity], -1), photometric='rgb', extrasamples=['unassalpha'])
    want = rgb*(opacity/255.) + 255 - opacity
    for n in ('weighted.tif', 'plain.tif'): assert abs(read(tmp_path/n) - want).max() <= 1, n


@pytest.mark.parametrize('orientation', range(1, 9))
def test_turns_of_tiff_jpeg_and_png(tmp_path, orientation):
    rgb = np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)
    tifffile.imwrite(tmp_path/'a.tif', rgb, photometric='rgb', extratags=[(274, 'H', 1, orientation, True)])
    exif = Image.Exif(); exif[274] = orientation
    Image.fromarray(rgb).save(tmp_path/'a.jpg', exif=exif, quality=95); Image.fromarray(rgb).save(tmp_path/'a.png', exif=exif)
    for n in ('a.tif', 'a.jpg', 'a.png'):
        want = np.asarray(ImageOps.exif_transpose(Image.open(tmp_path/n)))
        np.testing.assert_array_equal(read(tmp_path/n), want)
        assert image_size(tmp_path/n) == want.shape[:2]


def chunk(kind, data): return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))


def png_of(mode, extra=b''):
    "A PNG of 16 x 24 pixels in a mode of Pillow's, or in 16 bits (L16, RGB16, RGBA16), with further chunks after its header"
    rgba = np.random.default_rng(0).integers(0, 256, (16, 24, 4), dtype=np.uint8)
    if mode.endswith('16'):
        deep = rgba.astype(np.uint16)*257
        data = imagecodecs.png_encode(np.ascontiguousarray(dict(L16=deep[..., 0], RGB16=deep[..., :3], RGBA16=deep)[mode]))
    else:
        f = io.BytesIO()
        Image.fromarray(rgba).convert('RGB' if mode == 'P' else 'RGBA').convert(mode).save(f, 'PNG')
        data = f.getvalue()
    return data[:33] + extra + data[33:]


def jpeg_of(mode, segment=b''):
    "A JPEG of 16 x 24 pixels, with one more APP1 segment"
    rgb = np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)
    f = io.BytesIO()
    Image.fromarray(rgb).convert(mode).save(f, 'JPEG', quality=95)
    data = f.getvalue()
    return data[:2] + (b'\xff\xe1' + struct.pack('>H', len(segment) + 2) + segment if segment else b'') + data[2:]


PNG_MODES = ('1', 'L', 'P', 'LA', 'RGB', 'RGBA', 'L16', 'RGB16', 'RGBA16')
TURNED = {1: lambda a: a, 2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1], 5: lambda a: a.swapaxes(0, 1), 6: lambda a: np.rot90(a, -1),
          7: lambda a: np.rot90(a, 2).swapaxes(0, 1), 8: lambda a: np.rot90(a)}


@pytest.mark.parametrize('orientation', TURNED)
def test_one_rule_of_orientation_for_every_mode(orientation):
    "EXIF and XMP, in gray, color, palette and opacity of 8 and of 16 bits; the size agrees"
    exif = Image.Exif(); exif[274] = orientation
    xmp = b'<x:xmpmeta><rdf:Description tiff:Orientation="%d"/></x:xmpmeta>' % orientation
    files = [(png_of(m), png_of(m, c)) for m in PNG_MODES for c in (chunk(b'eXIf', exif.tobytes()[6:]), chunk(b'iTXt', b'XML:com.adobe.xmp\0\0\0\0\0' + xmp))]
    files += [(jpeg_of(m), jpeg_of(m, c)) for m in ('L', 'RGB', 'CMYK') for c in (exif.tobytes(), b'http://ns.adobe.com/xap/1.0/\0' + xmp)]
    for plain,turned in files:
        want = TURNED[orientation](read_image(plain))
        np.testing.assert_array_equal(read_image(turned), want)
        assert image_size(turned) == want.shape[:2]


@pytest.mark.parametrize('turned', [False, True])
@pytest.mark.parametrize('mode', PNG_MODES)
def test_checksums_of_png_are_compared_on_every_path(mode, turned):
    "One flipped bit in a checksum, or in the pixels with a checksum of zlib that was never reached"
    exif = Image.Exif(); exif[274] = 6
    whole = png_of(mode, chunk(b'eXIf', exif.tobytes()[6:]) if turned else b'')
    assert read_image(whole).shape == ((24, 16, 3) if turned else (16, 24, 3))
    for kind in (b'IHDR', b'IDAT', b'IEND'):
        at = whole.index(kind)
        end = at + 4 + int.from_bytes(whole[at - 4:at], 'big')
        for place in (end, end + 3):
            b = bytearray(whole)
            b[place] ^= 1
            with pytest.raises(ImageError) as caught: read_image(bytes(b))
            assert caught.value.reason == 'corrupt', kind


def test_one_transparent_color_of_a_png_is_white():
    "In gray and color of 8 and of 16 bits; the color beside it is left as it is"
    for bits,form,top in ((8, 'B', 255), (16, 'H', 65535)):
        for color,channels in ((0, 1), (2, 3)):
            row = b'\0' + struct.pack(f'>{2*channels}{form}', *[9]*channels, *[7]*channels)
            header = chunk(b'IHDR', struct.pack('>IIBBBBB', 2, 1, bits, color, 0, 0, 0))
            key = chunk(b'tRNS', struct.pack(f'>{channels}H', *[7]*channels))
            found = read_image(b'\x89PNG\r\n\x1a\n' + header + key + chunk(b'IDAT', zlib.compress(row)) + chunk(b'IEND', b''))
            np.testing.assert_allclose(found/(255 if found.dtype == np.uint8 else 1), [[[9/top]*3, [1]*3]], atol=1e-6)


def test_png_that_tells_its_turn_at_the_end(tmp_path):
    "The chunk eXIf may follow the pixels"
    import zlib
    rgb = np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)
    exif = Image.Exif(); exif[274] = 6
    Image.fromarray(rgb).save(tmp_path/'a.png'); b = (tmp_path/'a.png').read_bytes()
    tags = exif.tobytes()[6:]; chunk = struct.pack('>I', len(tags)) + b'eXIf' + tags + struct.pack('>I', zlib.crc32(b'eXIf' + tags))
    (tmp_path/'a.png').write_bytes(b[:-12] + chunk + b[-12:])
    assert read(tmp_path/'a.png').shape[:2] == image_size(tmp_path/'a.png') == (24, 16)


@pytest.mark.parametrize('options', [dict(), dict(progressive=True), dict(subsampling=0), dict(subsampling=2, optimize=True)])
def test_jpeg_and_png_are_those_of_pillow(tmp_path, options):
    smooth = np.random.default_rng(0).integers(0, 256, (9, 11, 3), dtype=np.uint8).repeat(7, 0).repeat(9, 1)
    for mode in ('RGB', 'L', 'CMYK', 'P', '1', 'RGBA', 'LA'):
        for suffix in ('.jpg', '.png'):
            if suffix == ('.png' if mode == 'CMYK' else '.jpg') and mode not in ('RGB', 'L', 'CMYK') or (suffix, mode) == ('.png', 'CMYK'): continue
            Image.fromarray(smooth).convert(mode).save(tmp_path/f'a{suffix}', **(options if suffix == '.jpg' else {}))
            with Image.open(tmp_path/f'a{suffix}') as image: want = np.asarray(image.convert('RGB'))
            np.testing.assert_array_equal(read(tmp_path/f'a{suffix}'), want, err_msg=mode + suffix)


def test_frames_and_windows_that_make_no_sense(tmp_path):
    write_image(tmp_path/'a.png', np.zeros((4, 4, 3), np.uint8)); write_image(tmp_path/'a.npy', np.zeros((4, 4, 3), np.uint8))
    for n in ('a.png', 'a.npy'):
        assert [reason(tmp_path/n, frame=i) for i in (1, 'all', 'first', -2)] == ['choice']*4
        assert reason(tmp_path/n, frame=0) == reason(tmp_path/n, frame=-1) == (4, 4, 3)
        for window in (5, (1,), (1, 2, 3), ('a', 'b'), (float('nan'), 1), (0, float('inf')), (2, 2), 'ab'): assert reason(tmp_path/n, window=window) == 'choice', window


def test_the_callers_limit_counts(tmp_path):
    write_image(tmp_path/'a.png', np.zeros((4, 4, 3), np.uint8))
    with open(tmp_path/'a.png', 'r+b') as f: f.truncate(2**32 + 1)        # a sparse file: no room is taken
    assert reason(tmp_path/'a.png') == 'too_large'
    assert image_format_of_large(tmp_path/'a.png') == 'too_large'


def image_format_of_large(path):
    try: image_format(path)
    except ImageError as e: return e.reason


def test_blank_dicom_elements_are_as_if_left_out(tmp_path):
    import pydicom
    for n,names in (('CT_small.dcm', ('RescaleSlope', 'RescaleIntercept')), ('MR_small.dcm', ('WindowCenter', 'WindowWidth')), ('MR_small.dcm', ('VOILUTSequence',)), ('MR_small.dcm', ('ModalityLUTSequence',))):
        for blank in (True, False):
            ds = pydicom.dcmread(DICOM/n)
            for k in names:
                if k in ds: del ds[k]
                if blank: setattr(ds, k, pydicom.Sequence() if k.endswith('Sequence') else None)
            ds.save_as(tmp_path/f'{blank}.dcm')
        np.testing.assert_array_equal(read(tmp_path/'True.dcm'), read(tmp_path/'False.dcm'))


def test_an_unreadable_element_beside_the_pixels_hides_nothing(tmp_path):
    b = (DICOM/'MR_small.dcm').read_bytes()
    at = b.index(b'\x20\x00\x11\x00IS') + 8                                # the series number
    (tmp_path/'a.dcm').write_bytes(b[:at] + b'x' + b[at+1:])
    np.testing.assert_array_equal(read(tmp_path/'a.dcm'), read(DICOM/'MR_small.dcm'))


def test_sizes_from_headers_are_those_of_the_pictures(tmp_path):
    import nibabel
    checked = 0
    for f in sorted(DICOM.iterdir()):
        if not f.is_file(): continue
        try: want = read(f).shape[:2]
        except ImageError: continue
        assert image_size(f) == want, f.name
        checked += 1
    assert checked > 50
    rng = np.random.default_rng(0)
    for i in range(12):                                                    # axes in any order and direction
        affine = np.eye(4); affine[:3, :3] = np.eye(3)[rng.permutation(3)]*rng.choice([-1, 1], 3)
        nibabel.save(nibabel.Nifti1Image(rng.integers(0, 255, (4, 5, 6), dtype=np.uint8), affine), tmp_path/'a.nii')
        assert image_size(tmp_path/'a.nii') == read(tmp_path/'a.nii').shape[:2]
    np.save(tmp_path/'flat.npy', np.zeros(5, np.uint8))
    with pytest.raises(ImageError): image_size(tmp_path/'flat.npy')
    with pytest.raises(ImageError) as caught: image_size(DICOM/'reportsi.dcm')
    assert caught.value.reason == 'no_pixels'


def damaged_jpegs(pixels):
    "JPEGs of a picture, in each of which something is wrong though its end-of-image marker is there"
    import io
    def stream(**options):
        f = io.BytesIO()
        Image.fromarray(pixels).save(f, 'JPEG', quality=90, **options)
        return f.getvalue()
    whole, restarts, progressive = stream(), stream(restart_marker_blocks=3), stream(progressive=True)
    size, interval = whole.index(b'\xff\xc0') + 5, restarts.index(b'\xff\xdd') + 4
    with_size = lambda rows: whole[:size] + struct.pack('>H', rows) + whole[size + 2:]
    with_interval = lambda blocks: restarts[:interval] + struct.pack('>H', blocks) + restarts[interval + 2:]
    middle = len(whole)*2//3
    return {'whole': whole, 'cut, with an end': whole[:middle] + b'\xff\xd9',
            'progressive, cut, with an end': progressive[:len(progressive)//2] + b'\xff\xd9',
            'a piece left out': whole[:middle] + whole[middle + 60:], 'a piece of zeros': whole[:middle] + bytes(60) + whole[middle + 60:],
            'fewer rows stated': with_size(len(pixels) - 16), 'more rows stated': with_size(len(pixels) + 9),
            'another restart interval': with_interval(7), 'no restart interval': with_interval(0)}


@pytest.mark.parametrize('channels', [1, 3])
def test_jpegs_that_are_wrong_inside_are_noticed(tmp_path, channels):
    "Decoders show these with gray or shifted blocks, and warn at most; each is a file of its own, and a strip of a TIFF"
    pixels = np.random.default_rng(0).integers(0, 256, (12, 15, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    if channels == 1: pixels = pixels[..., 0]
    found = {}
    for name, data in damaged_jpegs(pixels).items():
        (tmp_path/'a.jpg').write_bytes(data)
        photometric = 'ycbcr' if channels == 3 else 'minisblack'
        with tifffile.TiffWriter(tmp_path/'a.tif') as f:
            f.write(iter([data]), shape=pixels.shape, dtype=np.uint8, compression='jpeg', photometric=photometric, rowsperstrip=len(pixels))
        found[name] = reason(tmp_path/'a.jpg'), reason(tmp_path/'a.tif')
    assert found.pop('whole') == ((96, 120, 3),)*2
    assert found == {name: ('corrupt', 'corrupt') for name in found}


def test_a_jpeg_in_dicom_that_is_wrong_inside_is_noticed(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    found = {}
    for name, data in damaged_jpegs(pixels).items():
        compressed_dicom(tmp_path/'a.dcm', 'jpeg', data)
        found[name] = reason(tmp_path/'a.dcm')
    assert found.pop('whole') == (64, 64, 3)
    assert found == {name: 'corrupt' for name in found}


@pytest.mark.parametrize('sampling', ['444', '422', '420', '440', '411'])
def test_jpegs_of_each_sampling_are_read(tmp_path, sampling):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    (tmp_path/'a.jpg').write_bytes(imagecodecs.jpeg8_encode(pixels, 90, subsampling=sampling))
    np.testing.assert_array_equal(read(tmp_path/'a.jpg'), imagecodecs.imread(tmp_path/'a.jpg'))
