"Raster and TIFF files made to do harm: each ends within its limits, in a worker, as a picture or as a typed error"
import io, math, os, struct, subprocess, sys, zlib

import imagecodecs
import numpy as np
import pytest
import tifffile
from PIL import Image

from strip_notebooks.data.decoding import Allowance, decode, decode_image
from strip_notebooks.data.formats import image_size, read_image
from strip_notebooks.data.images import ImageError, image_reasons

RNG = np.random.default_rng(0)
PICTURE = RNG.integers(0, 256, (8, 10, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)             # 64 x 80


# --- pieces ---

def chunk(kind, data): return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))


def png(width=80, height=64, data=None, bits=8, color=2, interlace=0, extra=b'', after=b'', pixels=True):
    "A PNG by hand"
    if data is None: data = b''.join(b'\0' + row.tobytes() for row in PICTURE)
    body = chunk(b'IDAT', zlib.compress(data)) if pixels else b''
    header = chunk(b'IHDR', struct.pack('>IIBBBBB', width, height, bits, color, 0, 0, interlace))
    return b'\x89PNG\r\n\x1a\n' + header + extra + body + after + chunk(b'IEND', b'')


def jpeg(**options):
    f = io.BytesIO()
    Image.fromarray(PICTURE).save(f, 'JPEG', quality=90, **options)
    return f.getvalue()


def bmp():
    f = io.BytesIO()
    Image.fromarray(PICTURE).save(f, 'BMP')
    return f.getvalue()


def tiff(**options):
    f = io.BytesIO()
    tifffile.imwrite(f, PICTURE, **(dict(photometric='rgb', metadata=None) | options))
    return f.getvalue()


TYPES = {1: 'B', 3: 'H', 4: 'I', 16: 'Q'}


def raw_tiff(tags, data=b'', following=0, big=False):
    "A TIFF of one page with these tags (number -> type, values), written as they are, true or not"
    word,entry = ('Q', 20) if big else ('I', 12)
    size = struct.calcsize(word)
    start = 16 if big else 8
    entries,extra,at = [],b'',start + len(data) + (8 if big else 2) + entry*len(tags) + size
    for tag,(kind,values) in sorted(tags.items()):
        count,values = values if isinstance(values, tuple) else (len(values), values)             # a tuple lies about the count
        b = struct.pack('<' + TYPES[kind]*len(values), *values)
        if len(b) > size: b,extra = struct.pack('<' + word, at + len(extra)),extra + b
        entries.append(struct.pack('<HH' + word, tag, kind, count) + b.ljust(size, b'\0'))
    head = struct.pack('<2sHHHQ', b'II', 43, 8, 0, 16 + len(data)) if big else struct.pack('<2sHI', b'II', 42, 8 + len(data))
    return head + data + struct.pack('<Q' if big else '<H', len(tags)) + b''.join(entries) + struct.pack('<' + word, following) + extra


def tags(width=8, height=8, bits=8, compression=1, photometric=1, at=8, n=64, **more):
    return {256: (4, [width]), 257: (4, [height]), 258: (3, [bits]), 259: (3, [compression]), 262: (3, [photometric]), 273: (4, [at]),
            277: (3, [1]), 278: (4, [height]), 279: (4, [n])} | {int(k[1:]): v for k,v in more.items()}


def many_scans(scans, side=16, progressive=True):
    "A JPEG whose pixels are gone through again and again"
    f = io.BytesIO()
    Image.fromarray(np.zeros((side, side), np.uint8)).save(f, 'JPEG', progressive=progressive)
    b = f.getvalue()
    at = b.rindex(b'\xff\xda')
    return b[:-2] + b[at:-2]*scans + b'\xff\xd9'


def stream_tiff(stream, code, shape=(64, 64)):
    f = io.BytesIO()
    with tifffile.TiffWriter(f) as w: w.write(iter([stream]), shape=shape, dtype=np.uint8, compression=code, photometric='minisblack', rowsperstrip=shape[0])
    return f.getvalue()


def loop(pages):
    "A TIFF whose last page leads back to its first"
    b = tiff() if pages == 1 else None
    if b is None:
        f = io.BytesIO()
        with tifffile.TiffWriter(f) as w:
            for _ in range(pages): w.write(np.zeros((2, 2), np.uint8), metadata=None, contiguous=False)
        b = f.getvalue()
    with tifffile.TiffFile(io.BytesIO(b)) as f:
        first,last = f.pages[0].offset, f.pages[pages - 1].offset
    at = last + 2 + 12*struct.unpack('<H', b[last:last + 2])[0]
    return b[:at] + struct.pack('<I', first) + b[at + 4:]


def chain(pages):
    "Pages without any tag, one after the other"
    step = 6
    return struct.pack('<2sHI', b'II', 42, 8) + b''.join(struct.pack('<HI', 0, 8 + step*(i + 1)) for i in range(pages)) + struct.pack('<HI', 0, 0)


def flip(b, at, bits=1): return b[:at] + bytes([b[at] ^ bits]) + b[at + 1:]
def adam7(): return png(interlace=1, data=b'\0'*10)
def text_bomb(): return png(extra=chunk(b'iTXt', b'XML:com.adobe.xmp\0\1\0\0\0' + zlib.compress(bytes(2**28), 9)))
def deep_exif(): return b'Exif\0\0II*\0\x08\0\0\0' + struct.pack('<HHHII', 1, 34665, 4, 1, 8) + bytes(4)        # an IFD within itself


def in_app1(exif):
    b = jpeg()
    return b[:2] + b'\xff\xe1' + struct.pack('>H', len(exif) + 2) + exif + b[2:]


def packed(bytes_, level=9):
    c = zlib.compressobj(level)
    return c.compress(bytes(bytes_)) + c.flush()


LIE = 2**31 - 8
FILES = {
    # bombs
    'png_claims_60000.png': lambda: png(60_000, 60_000),
    'png_claims_2_31.png': lambda: png(2**31 - 1, 2**31 - 1),
    'png_of_one_row.png': lambda: png(140_000_000, 1, b'\0'*1000),
    'png_that_is_all_zero.png': lambda: png(12_000, 12_000, bytes(12_000*(3*12_000 + 1))),
    'png_that_goes_on.png': lambda: png(data=bytes(2**27)),
    'png_text_bomb.png': text_bomb,
    'jpeg_claims_65500.jpg': lambda: jpeg()[:2] + jpeg()[2:].replace(struct.pack('>BHH', 8, 64, 80), struct.pack('>BHH', 8, 65_500, 65_500), 1),
    'jpeg_of_zeros.jpg': lambda: imagecodecs.jpeg8_encode(np.zeros((11_000, 11_000), np.uint8)),
    'bmp_claims_2_31.bmp': lambda: bmp()[:18] + struct.pack('<ii', LIE, LIE) + bmp()[26:],
    'bmp_claims_12000.bmp': lambda: bmp()[:18] + struct.pack('<ii', 12_000, 12_000) + bmp()[26:],
    'bmp_packed_claims.bmp': lambda: bmp()[:18] + struct.pack('<iiHHI', 12_000, 12_000, 1, 8, 1) + bmp()[34:],
    'tiff_claims_2_32.tif': lambda: raw_tiff(tags(2**32 - 1, 2**32 - 1), bytes(64)),
    'tiff_deflate_bomb.tif': lambda: raw_tiff(tags(compression=8, n=len(packed(2**28))), packed(2**28)),
    'tiff_lzw_bomb.tif': lambda: raw_tiff(tags(compression=5, n=len(LZW)), LZW),
    'tiff_lzma_bomb.tif': lambda: raw_tiff(tags(compression=34925, n=len(LZMA)), LZMA),
    'tiff_zstd_bomb.tif': lambda: raw_tiff(tags(compression=50000, n=len(ZSTD)), ZSTD),
    'tiff_large_tile.tif': lambda: raw_tiff(tags(s322=(4, [65_520]), s323=(4, [65_520]), s324=(4, [8]), s325=(4, [64])), bytes(64)),
    'tiff_jpeg_bomb.tif': lambda: stream_tiff(imagecodecs.jpeg8_encode(np.zeros((11_000, 11_000), np.uint8)), 7),
    'tiff_jpeg2000_bomb.tif': lambda: stream_tiff(claiming(imagecodecs.jpeg2k_encode(np.zeros((64, 64), np.uint8), codecformat='j2k', level=0), 60_000), 34712),
    # many scans
    'scans_3000.jpg': lambda: many_scans(3000, 1200),
    'scans_3000_sequential.jpg': lambda: many_scans(3000, 200, False),
    'scans_in_a_tiff.tif': lambda: stream_tiff(many_scans(3000, 64), 7),
    # truncations
    'png_cut.png': lambda: png()[:200], 'png_without_end.png': lambda: png()[:-12], 'png_without_pixels.png': lambda: png(pixels=False),
    'png_short_pixels.png': lambda: png(data=b'\0'*100), 'png_interlaced_short.png': adam7, 'png_signature_only.png': lambda: png()[:8],
    'jpeg_cut.jpg': lambda: jpeg()[:-300], 'jpeg_without_end.jpg': lambda: jpeg()[:-2], 'jpeg_start_only.jpg': lambda: b'\xff\xd8\xff\xe0',
    'jpeg_progressive_cut.jpg': lambda: jpeg(progressive=True)[:-300], 'jpeg_12_bits_cut.jpg': lambda: TWELVE[:len(TWELVE)*3//10],
    'bmp_cut.bmp': lambda: bmp()[:-50], 'bmp_header_only.bmp': lambda: bmp()[:30],
    'tiff_cut.tif': lambda: tiff(compression='zlib')[:-200], 'tiff_header_only.tif': lambda: tiff()[:8], 'tiff_without_tags.tif': lambda: raw_tiff({}),
    'tiff_jpeg_without_end.tif': lambda: stream_tiff(imagecodecs.jpeg8_encode(PICTURE[:64, :64, 0].copy())[:-2], 7),
    'tiff_jpeg2000_cut.tif': lambda: stream_tiff(imagecodecs.jpeg2k_encode(PICTURE[:64, :64, 0].copy(), codecformat='j2k', level=0)[:-90], 34712),
    'tiff_short_strip.tif': lambda: raw_tiff(tags(compression=8, n=20), zlib.compress(bytes(range(64)))),
    # checksums
    'png_header_checksum.png': lambda: flip(png(), 30), 'png_pixels_checksum.png': lambda: flip(png(), 300),
    'png_text_checksum.png': lambda: flip(png(extra=chunk(b'tEXt', b'a\0b')), 43), 'png_end_checksum.png': lambda: flip(png(), len(png()) - 1),
    'tiff_deflate_checksum.tif': lambda: raw_tiff(tags(compression=8, n=len(packed(64))), flip(packed(64), len(packed(64)) - 1)),
    # lies, loops, zeros
    'png_zero.png': lambda: png(0, 0), 'png_zero_wide.png': lambda: png(0, 64), 'jpeg_zero.jpg': lambda: jpeg().replace(struct.pack('>BHH', 8, 64, 80), bytes([8, 0, 0, 0, 0]), 1),
    'bmp_zero.bmp': lambda: bmp()[:18] + bytes(8) + bmp()[26:], 'tiff_zero.tif': lambda: raw_tiff(tags(0, 0), bytes(64)),
    'tiff_rows_zero.tif': lambda: raw_tiff(tags(s278=(4, [0])), bytes(64)), 'tiff_zero_tile.tif': lambda: raw_tiff(tags(s322=(4, [0]), s323=(4, [0]), s324=(4, [8]), s325=(4, [64])), bytes(64)),
    'png_bits_of_3.png': lambda: png(bits=3), 'png_color_of_5.png': lambda: png(color=5), 'png_palette_without.png': lambda: png(color=3),
    'png_long_chunk.png': lambda: png()[:33] + struct.pack('>I', 2**31 - 1) + png()[37:],
    'tiff_loop.tif': lambda: loop(1), 'tiff_loop_of_150.tif': lambda: loop(150), 'tiff_chain.tif': lambda: chain(300_000),
    'tiff_huge_tag.tif': lambda: raw_tiff(tags(s700=(1, (2**32 - 1, [1, 2, 3, 4]))), bytes(64)),
    'tiff_many_strips.tif': lambda: raw_tiff(tags(s273=(4, (2**31, [8, 8])), s279=(4, (2**31, [8, 8]))), bytes(64)),
    'tiff_strip_beyond.tif': lambda: raw_tiff(tags(at=2**31), bytes(64)), 'tiff_bits_of_0.tif': lambda: raw_tiff(tags(bits=0), bytes(64)),
    'tiff_bits_of_65535.tif': lambda: raw_tiff(tags(bits=65_535), bytes(64)), 'tiff_samples_of_65535.tif': lambda: raw_tiff(tags(s277=(3, [65_535])), bytes(64)),
    'tiff_volume.tif': lambda: raw_tiff(tags(s32997=(4, [100_000])), bytes(64)), 'tiff_palette_without.tif': lambda: raw_tiff(tags(photometric=3), bytes(64)),
    'tiff_palette_short.tif': lambda: raw_tiff(tags(photometric=3, s320=(3, [1, 2, 3])), bytes([255]*64)), 'tiff_subifd_loop.tif': lambda: raw_tiff(tags(s330=(4, [72])), bytes(64)),
    'tiff_unknown_coding.tif': lambda: raw_tiff(tags(compression=4711), bytes(64)), 'bigtiff_claims.tif': lambda: raw_tiff(tags(s256=(16, [2**62]), s257=(16, [2**62])), bytes(64), big=True),
    'bigtiff_next_beyond.tif': lambda: raw_tiff(tags(), bytes(64), following=2**63, big=True),
    'jpeg_exif_loop.jpg': lambda: in_app1(deep_exif()), 'jpeg_exif_of_nothing.jpg': lambda: in_app1(b'Exif\0\0'),
    # splices
    'png_in_png.png': lambda: png(after=png()[8:]), 'two_headers.png': lambda: png(extra=png()[8:33]), 'jpeg_two_frames.jpg': lambda: jpeg()[:-2] + jpeg()[2:],
    'png_then_jpeg.png': lambda: png()[:100] + jpeg()[100:], 'tiff_then_png.tif': lambda: tiff()[:100] + png(), 'jpeg_half_of_another.jpg': lambda: jpeg()[:900] + jpeg(progressive=True)[900:],
}
LZW,LZMA,ZSTD = (getattr(imagecodecs, f'{n}_encode')(bytes(2**27)) for n in ('lzw', 'lzma', 'zstd'))
TWELVE = imagecodecs.jpeg8_encode(RNG.integers(0, 4096, (64, 64)).astype(np.uint16), level=95, bitspersample=12)
SOUND = {'png_that_is_all_zero.png', 'png_that_goes_on.png', 'png_text_bomb.png', 'jpeg_of_zeros.jpg', 'tiff_loop.tif', 'tiff_loop_of_150.tif', 'bigtiff_next_beyond.tif',
         'tiff_lzw_bomb.tif', 'tiff_lzma_bomb.tif', 'tiff_subifd_loop.tif', 'jpeg_exif_loop.jpg',
         'jpeg_exif_of_nothing.jpg', 'tiff_huge_tag.tif', 'png_in_png.png'}   # a viewer shows a picture, and it costs no more than one


def claiming(stream, side):
    "A JPEG 2000 stream, of one tile, whose head says that it is `side` wide and high"
    at = stream.index(b'\xff\x4f\xff\x51') + 8
    return stream[:at] + struct.pack('>8I', side, side, 0, 0, side, side, 0, 0) + stream[at + 32:]


def shape_and_size(path):
    "What is known of a file in the end, by either way of looking"
    shape = read_image(path).shape
    assert image_size(path) == shape[:2], path
    return shape


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp('hostile')
    for name,make in FILES.items(): (folder/name).write_bytes(make())
    return folder


def test_hostile_files_end_within_their_limits(folder, capfd):
    assert len(FILES) >= 80
    found = dict(zip(FILES, decode(shape_and_size, [str(folder/n) for n in FILES], workers=2)))
    wrong = {n: f.error and f.error.reason for n,f in found.items() if (f.error is None) != (n in SOUND)}
    assert not wrong
    reasons = {n: f.error.reason for n,f in found.items() if f.error}
    assert set(reasons.values()) <= {'corrupt', 'too_large', 'unsupported'}, reasons       # none by time, memory or crash: each was seen through before
    assert all(n in str(f.error) for n,f in found.items() if f.error)
    assert capfd.readouterr() == ('', '')


# --- random accidents ---

def accidents(rng, whole, n):
    "Cut, flip, overwrite and splice a sound file"
    for i in range(n):
        b,at = bytearray(whole),int(rng.integers(len(whole)))
        if i % 4 == 0: del b[at:]
        elif i % 4 == 1:
            for k in rng.integers(0, len(b), 3): b[k] ^= 1 << int(rng.integers(8))
        elif i % 4 == 2: b[at:at + 40] = rng.bytes(40)
        else: b[at:at] = whole[int(rng.integers(len(whole))):][:200]
        yield bytes(b)


WHOLE = dict(rgb=png(), progressive=jpeg(progressive=True), baseline=jpeg(), bmp=bmp(), plain=tiff(), deflate=tiff(compression='zlib', predictor=2), lzw=tiff(compression='lzw', rowsperstrip=8),
             tiles=tiff(compression='jpeg', tile=(32, 32), photometric='ycbcr'), jpeg2000=tiff(compression='jpeg2000', tile=(32, 32)), big=tiff(bigtiff=True), packbits=tiff(compression='packbits'))


def shape_of(data): return read_image(data, name='x').shape


def test_accidents_end_as_a_picture_or_a_typed_error(capfd):
    rng = np.random.default_rng(1)
    names = [n for n in WHOLE for _ in range(40)]
    files = [b for n in WHOLE for b in accidents(rng, WHOLE[n], 40)]
    found = list(decode(shape_of, files, workers=2, name=lambda b: 'x'))
    assert len(found) == len(files) == 440
    reasons = {f.error.reason for f in found if f.error}
    assert reasons <= set(image_reasons) - {'missing', 'not_a_file', 'forbidden'}
    assert sum(f.error is None for f in found) > 20 < sum(f.error is not None for f in found)
    assert not [n for n,f in zip(names, found) if n == 'rgb' and not f.error]               # every accident of a PNG shows in its checksums or its structure
    assert capfd.readouterr() == ('', '')


def test_a_file_that_is_cut_is_never_filled_in():
    for name,whole in WHOLE.items():
        picture = read_image(whole)
        for at in [*np.linspace(1, len(whole) - 1, 60).astype(int), len(whole) - 1, len(whole) - 2]:
            try: got = read_image(whole[:at])
            except ImageError as e:
                assert e.reason in ('corrupt', 'not_an_image', 'unsupported'), (name, at, e.reason)
                continue
            np.testing.assert_array_equal(got, picture, err_msg=f'{name} {at}')             # only what is not of the picture was lost


# --- the limits themselves ---

def slow_tiff():
    "White noise of 24 megapixels in JPEG 2000, which takes most decoders longer than everything else"
    return stream_tiff(imagecodecs.jpeg2k_encode(np.random.default_rng(0).integers(0, 256, (1500, 1500), dtype=np.uint8), codecformat='j2k', level=0), 34712, (1500, 1500))


def test_a_file_that_exceeds_its_time_is_a_timeout():
    data = slow_tiff()
    with pytest.raises(ImageError, match='took longer') as caught: decode_image(data, name='slow.tif', allowance=Allowance(seconds=.05, pixels_per_second=math.inf))
    assert caught.value.reason == 'timeout' and str(caught.value).startswith('slow.tif: ')
    assert decode_image(data, name='slow.tif').shape == (1500, 1500, 3)


def test_a_file_that_exceeds_its_memory_says_so():
    data = png(5000, 5000, bytes(5000*15_001))
    with pytest.raises(ImageError, match='memory') as caught: decode_image(data, name='large.png', allowance=Allowance(bytes=2**25, bytes_per_pixel=1))
    assert caught.value.reason == 'memory'
    assert decode_image(data).shape == (5000, 5000, 3)


def read_and_take(path):
    "Read a file, then take more time and memory than reading may: the limits are those of reading alone"
    image = read_image(path)
    blank = np.ones(2**28, np.uint8)
    return image.shape, int(sum(blank[::2**10].tolist()))


def test_the_limits_end_with_the_reading(tmp_path):
    (tmp_path/'a.png').write_bytes(png())
    (found,) = decode(read_and_take, [tmp_path/'a.png'], allowance=Allowance(bytes=2**27, bytes_per_pixel=0))
    assert found.value == ((64, 80, 3), 2**18)


def crash(path):
    os.write(1, b'what a C library prints')
    os.abort()


def test_a_crash_costs_its_own_file_only(tmp_path, capfd):
    files = [str(tmp_path/f'{i}.png') for i in range(6)]
    for f in files: open(f, 'wb').write(png())
    found = list(decode(crash_at_three, files, workers=2))
    assert [f.error.reason if f.error else f.value for f in found] == [(64, 80, 3)]*3 + ['crashed'] + [(64, 80, 3)]*2
    assert found[3].printed == found[3].error.printed == 'what a C library prints' and found[3].error.path == files[3]
    assert capfd.readouterr() == ('', '')


def crash_at_three(path): return crash(path) if path.endswith('3.png') else read_image(path).shape


short_of_handles = """
import os, resource, sys
from strip_notebooks.core import StripError
from strip_notebooks.data.formats import read_image
from strip_notebooks.data.images import ImageError
read_image(sys.argv[1])                                     # what it imports is loaded
os.close(free := os.open(os.devnull, os.O_RDONLY))
resource.setrlimit(resource.RLIMIT_NOFILE, (free, free))
try: read_image(sys.argv[1])
except StripError as e: print(isinstance(e, ImageError), e)
"""

def test_a_machine_that_is_short_of_something_quarantines_nothing(tmp_path):
    "Too few file handles are no fault of the image; in a process of its own, where nothing else closes one"
    (tmp_path/'a.png').write_bytes(png())
    done = subprocess.run([sys.executable, '-c', short_of_handles, str(tmp_path/'a.png')], capture_output=True, text=True, timeout=120)
    assert done.stdout.startswith('False ') and 'file handles' in done.stdout, done.stdout + done.stderr
