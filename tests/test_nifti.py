"NIfTI: the slice that is asked for, as nibabel reads it, in the memory of a slice; hostile and altered files are refused in words"
import gzip, importlib.util, io, itertools, logging, struct
from pathlib import Path

import nibabel
import numpy as np
import pytest

from strip_notebooks.data.decoding import decode
from strip_notebooks.data.formats import image_size, read_image
from strip_notebooks.data.images import ImageError, Limits, Reading

DATA = Path(importlib.util.find_spec('nibabel').origin).parent/'tests'/'data'
RNG = np.random.default_rng(0)
SOLID = RNG.integers(0, 4000, (6, 7, 8)).astype(np.int16)


def read(source, limits=Limits(), **reading): return read_image(source, Reading(**reading), limits=limits)


def outcome(source, limits=Limits(), **reading):
    "Shape and dtype, or the reason of the error"
    try: a = read(source, limits, **reading)
    except ImageError as e: return e.reason
    return f'{"x".join(map(str, a.shape))} {a.dtype}'


def nifti(a, affine=None, packed=False, kind=nibabel.Nifti1Image, slope=None, inter=0, **header):
    "The bytes of a NIfTI file"
    image = kind(a, np.eye(4) if affine is None else affine)
    if slope is not None: image.header.set_slope_inter(slope, inter)
    for k,v in header.items(): image.header[k] = v
    data = image.to_bytes()
    return gzip.compress(data, 6, mtime=0) if packed else data


def expected(a, affine, z, low, high):
    "The slice by nibabel's own steps"
    canonical = nibabel.as_closest_canonical(nibabel.Nifti1Image(a, affine)).get_fdata()
    return np.nan_to_num(np.clip((np.rot90(canonical[:, :, z]) - low)/(high - low), 0, 1))


# --- sound files ---

@pytest.mark.parametrize('packed', [False, True])
@pytest.mark.parametrize('order', itertools.permutations(range(3)))
def test_every_orientation_is_the_same_slice(packed, order):
    for sign in itertools.product((1, -1), repeat=3):
        affine = np.eye(4)
        affine[:3, :3] = np.diag(sign)[list(order)]
        data = nifti(SOLID, affine, packed)
        sides = nibabel.as_closest_canonical(nibabel.Nifti1Image(SOLID, affine)).shape
        for z in (0, 2, -1):
            got = read(data, slice=z)
            np.testing.assert_allclose(got[..., 0], expected(SOLID, affine, z, SOLID.min(), SOLID.max()), atol=1e-6)
            assert got.shape[:2] == image_size(data) == (sides[1], sides[0])
        np.testing.assert_allclose(read(data, window=(100, 900))[..., 0], expected(SOLID, affine, sides[2]//2, 100, 900), atol=1e-6)
        assert outcome(data, slice=sides[2]) == 'choice'


@pytest.mark.parametrize('kind', ['u1', 'i1', 'i2', 'u2', 'i4', 'u4', 'f4', 'f8', 'i8', 'u8'])
@pytest.mark.parametrize('swapped', [False, True])
def test_every_type_of_number(kind, swapped):
    a = RNG.integers(0, 100, (5, 6, 4)).astype(kind)
    image = (nibabel.Nifti2Image if kind[1] == '8' else nibabel.Nifti1Image)(a, np.eye(4), dtype=kind)
    if swapped:
        header = image.header.as_byteswapped()
        image = type(image)(a, np.eye(4), header)
    got = read(image.to_bytes(), slice=1)[..., 0]
    want = np.rot90(a[:, :, 1].astype(float))
    np.testing.assert_allclose(got, want if kind == 'u1' else (want - a.min())/(int(a.max()) - int(a.min())), atol=1e-6)


def test_scaling_ranges_and_what_does_not_exist():
    a = SOLID.astype(np.int16)
    for slope,inter in ((2, -1000), (-.5, 30)):
        data = nifti(a, slope=slope, inter=inter)
        stored = np.asanyarray(nibabel.Nifti1Image.from_bytes(data).dataobj)
        np.testing.assert_allclose(read(data, slice=3)[..., 0], expected(stored, np.eye(4), 3, stored.min(), stored.max()), atol=1e-4)
        np.testing.assert_allclose(read(data, slice=3, window=(-50, 60))[..., 0], expected(stored, np.eye(4), 3, -50, 60), atol=1e-5)
    np.testing.assert_allclose(read(nifti(a, cal_min=10, cal_max=50))[..., 0], expected(a, np.eye(4), 4, 10, 50), atol=1e-6)
    f = a.astype(np.float32)
    f[0, 0], f[5] = np.nan, np.nan
    np.testing.assert_allclose(read(nifti(f))[..., 0], expected(f, np.eye(4), 4, np.nanmin(f), np.nanmax(f)), atol=1e-6)
    f[1, 1, 1] = np.inf
    assert outcome(nifti(f)) == 'range' and outcome(nifti(np.full_like(f, np.nan))) == 'range'
    np.testing.assert_allclose(read(nifti(f), window=(0, 100), slice=1)[..., 0], expected(f, np.eye(4), 1, 0, 100), atol=1e-6)


def test_volumes_slices_and_flat_pictures():
    series = RNG.integers(0, 256, (5, 6, 3, 4)).astype(np.uint8)
    for packed in (False, True):
        data = nifti(series, packed=packed)
        for t in (None, 0, 3, -2): np.testing.assert_array_equal(read(data, frame=t, slice=1)[..., 0], np.rot90(series[:, :, 1, t or 0]))
    assert outcome(data, frame=4) == outcome(data, slice='top') == outcome(data, frame='all') == 'choice'
    np.testing.assert_array_equal(read(nifti(series[:, :, 0, 0]))[..., 0], np.rot90(series[:, :, 0, 0]))
    bright = np.zeros((9, 9, 9), np.float32)
    bright[2:7, 2:7, 6] = 5
    bright[0, 0, 2] = 900
    for affine in (np.eye(4), np.diag([1, -1, -1, 1]), np.eye(4)[[1, 2, 0, 3]]):
        canonical = nibabel.as_closest_canonical(nibabel.Nifti1Image(bright, affine)).get_fdata()
        z = int((canonical > canonical.mean()).sum((0, 1)).argmax())
        for packed in (False, True): np.testing.assert_array_equal(read(nifti(bright, affine, packed), slice='largest'), read(nifti(bright, affine), slice=z))


@pytest.mark.parametrize('letters', ['RGB', 'RGBA'])
def test_colors(letters):
    a = RNG.integers(0, 256, (4, 5, 3, len(letters))).astype(np.uint8)
    packed = np.ascontiguousarray(a).view([(c, 'u1') for c in letters])[..., 0]
    got = read(nifti(packed), slice=2)
    colors = np.rot90(a[:, :, 2]).astype(float)
    if len(letters) == 4: colors = colors[..., :3]*colors[..., 3:]/255 + 255 - colors[..., 3:]
    assert got.dtype == np.uint8 and abs(got - colors).max() <= 1


def test_a_name_needs_no_ending(tmp_path):
    for packed in (False, True):
        (tmp_path/'volume.dat').write_bytes(nifti(SOLID, packed=packed))
        np.testing.assert_array_equal(read(tmp_path/'volume.dat'), read(nifti(SOLID)))
        with open(tmp_path/'volume.dat', 'rb') as f: np.testing.assert_array_equal(read(f), read(nifti(SOLID)))


# --- hostile and truncated files ---

def patched(at, form, *values, a=SOLID, **how):
    "A file with some bytes of its header replaced"
    data = bytearray(nifti(a))
    struct.pack_into('<' + form, data, at, *values)
    return gzip.compress(bytes(data), mtime=0) if how.get('packed') else bytes(data)


def wrong(data, at, bit=1):
    "A file with a flipped bit"
    b = bytearray(data)
    b[at] ^= bit
    return bytes(b)


PACKED = nifti(SOLID, packed=True)
HOSTILE = {
    'checksum': ('corrupt', lambda: wrong(PACKED, -6)),
    'length behind the checksum': ('corrupt', lambda: wrong(PACKED, -2)),
    'packed, without its last byte': ('corrupt', lambda: PACKED[:-1]),
    'packed, without its checksum': ('corrupt', lambda: PACKED[:-8]),
    'packed, half': ('corrupt', lambda: PACKED[:len(PACKED)//2]),
    'packed, fewer numbers than the header says': ('corrupt', lambda: gzip.compress(nifti(SOLID)[:-2])),
    'garbage behind the stream': ('corrupt', lambda: PACKED + b'garbage'),
    'without its last byte': ('corrupt', lambda: nifti(SOLID)[:-1]),
    'half': ('corrupt', lambda: nifti(SOLID)[:500]),
    'only a header': ('corrupt', lambda: nifti(SOLID)[:352]),
    'a header that claims 32,767 voxels on each side': ('corrupt', lambda: patched(42, '3h', 32767, 32767, 32767)),
    'the same, packed': ('too_large', lambda: patched(42, '3h', 32767, 32767, 32767, packed=True)),
    'many volumes': ('corrupt', lambda: patched(40, '5h', 4, 6, 7, 8, 32767)),
    'a negative side': ('corrupt', lambda: patched(42, 'h', -6)),
    'a side of none': ('corrupt', lambda: patched(42, 'h', 0)),
    '-3 dimensions': ('unsupported', lambda: patched(40, 'h', -3)),
    'an unknown type': ('corrupt', lambda: patched(70, 'h', 999)),
    'single bits': ('unsupported', lambda: patched(70, '2h', 1, 1)),
    'an infinite intercept': ('corrupt', lambda: patched(112, '2f', 2, np.inf)),
    'numbers behind the file': ('corrupt', lambda: patched(108, 'f', 1e9)),
    'numbers at no place': ('corrupt', lambda: patched(108, 'f', np.nan)),
    'complex numbers': ('unsupported', lambda: nifti(np.zeros((3, 3, 3), np.complex64))),
    'five dimensions': ('unsupported', lambda: nifti(np.zeros((3, 3, 3, 2, 2), np.float32))),
    'one dimension': ('unsupported', lambda: nifti(np.zeros(9, np.float32))),
    'connectivity': ('unsupported', lambda: (DATA/'row_major.dconn.nii').read_bytes()),
    'a quaternion of no rotation': ('corrupt', lambda: patched(252, '2h3f', 1, 0, 9., 9., 9.)),
}


@pytest.mark.parametrize('name', HOSTILE)
def test_hostile_files_are_refused_with_their_reason(name): assert outcome(HOSTILE[name][1]()) == HOSTILE[name][0]


def test_no_flipped_bit_of_a_packed_volume_changes_the_picture():
    "The header of gzip has bits that mean nothing (time, name of the system); all others are covered by its checksum"
    want = read(PACKED)
    refused = 0
    for at in range(0, len(PACKED), 7):
        try: np.testing.assert_array_equal(read(wrong(PACKED, at, 1 << at % 8), window=None), want)
        except ImageError: refused += 1
    assert refused > len(PACKED)//7 - 10


def test_one_slice_of_a_large_volume_takes_the_memory_of_a_slice(tmp_path):
    "570 MB of zeros in a file without blocks, and the same packed, in workers with limits"
    head = bytearray(nifti(np.zeros((2, 2, 2), np.float32)))[:352]
    struct.pack_into('<4h', head, 40, 3, 512, 512, 570)
    with open(tmp_path/'a.nii', 'wb') as f:
        f.write(head)
        f.truncate(352 + 4*512*512*570)
    with gzip.open(tmp_path/'a.nii.gz', 'wb', 1) as f:
        f.write(head)
        for _ in range(570): f.write(bytes(2**20))
    (tmp_path/'too_long.nii.gz').write_bytes((tmp_path/'a.nii.gz').read_bytes())
    found = list(decode(read_image, [tmp_path/'a.nii', tmp_path/'a.nii.gz']))
    assert [d.error or d.value.shape for d in found] == [(512, 512, 3)]*2
    assert outcome(tmp_path/'a.nii.gz', Limits(file_bytes=2**29)) == 'too_large'
    assert outcome(tmp_path/'a.nii', Limits(pixels=1000)) == 'too_large'


def test_altered_files_are_read_or_refused(caplog, capfd):
    "Every file that nibabel ships, altered: nothing but an ImageError, no crash, no word on the terminal"
    from test_dicom import altered
    caplog.set_level(logging.INFO)
    rng = np.random.default_rng(5)
    files = [f.read_bytes() for f in sorted(DATA.glob('*.nii*')) if f.stat().st_size < 200_000] + [PACKED, nifti(SOLID)]
    items = [altered(b, rng) for b in files for _ in range(20)]
    found = list(decode(read_image, items, name=lambda item: 'file'))
    assert {d.error.reason for d in found if d.error} <= {'corrupt', 'not_an_image', 'unsupported', 'too_large', 'range', 'empty', 'choice'}
    assert sum(d.error is None for d in found) > 20 and sum(d.error is not None for d in found) > 20
    assert capfd.readouterr() == ('', '') and not caplog.records
