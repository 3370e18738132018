"""Real and broken files through the whole of `clot run prepare`: every one is read or quarantined with a reason.

STRIP_FUZZ_FILES=1000 STRIP_FUZZ_SEED=7 python -m pytest -n 0 tests/test_fuzz.py takes more files, and other ones."""
import os, random, subprocess, sys
from pathlib import Path

import numpy as np
import pandas as pd

from strip_notebooks.data.formats import write_image
from strip_notebooks.runs import Run

CLOT = str(Path(sys.executable).parent/'clot')
FILES, SEED = int(os.environ.get('STRIP_FUZZ_FILES', 160)), int(os.environ.get('STRIP_FUZZ_SEED', 0))
MARK = 'doe^jane'               # stands in every file name, as a patient's name may; it must appear nowhere outside data/
SOUND = 24                      # pictures that are beyond doubt, so that both classes have patients whatever the rest turns out to be

def drawn_files(folder):
    "Pictures in every format and coding that the libraries here can write"
    import cv2, tifffile
    from PIL import Image
    rng = np.random.default_rng(0)
    smooth = cv2.GaussianBlur(rng.integers(0, 256, (96, 128, 3)).astype(np.uint8), (0, 0), 5)
    rgb = cv2.normalize(smooth, None, 0, 255, cv2.NORM_MINMAX)
    gray, deep = rgb[..., 0], (rgb.astype(np.uint16) << 8) | 7
    rgba = np.dstack([rgb, gray])
    image = Image.fromarray(rgb)
    folder.mkdir(parents=True, exist_ok=True)
    def put(name, save, *args, **kwargs):
        save(folder/name, *args, **kwargs)
        return folder/name
    exif = Image.Exif(); exif[274] = 6
    yield put('rgb.png', image.save)
    yield put('alpha.png', Image.fromarray(rgba).save)
    yield put('palette.png', image.quantize(16).save, transparency=3)
    yield put('bits.png', Image.fromarray(gray > 128).save)
    yield put('gray16.png', Image.fromarray(deep[..., 0]).save)
    yield put('turned.png', image.save, exif=exif)
    yield put('base.jpg', image.save, quality=90)
    yield put('progressive.jpg', image.save, progressive=True)
    yield put('turned.jpg', image.save, exif=exif)
    yield put('cmyk.jpg', image.convert('CMYK').save)
    yield put('gray.jpg', Image.fromarray(gray).save)
    yield put('rgb.bmp', image.save)
    yield put('rle.bmp', image.quantize(16).save)
    for coding in (None, 'lzw', 'deflate', 'packbits', 'jpeg', 'jpeg2000', 'zstd', 'lzma'):
        for tile in (None, (32, 32)): yield put(f'{coding}{bool(tile)}.tif', tifffile.imwrite, rgb, compression=coding, tile=tile, photometric='rgb')
    yield put('deep.tif', tifffile.imwrite, deep, photometric='rgb', predictor=True, compression='deflate')
    yield put('float.tif', tifffile.imwrite, (rgb/255).astype(np.float32), photometric='rgb')
    yield put('alpha.tif', tifffile.imwrite, rgba, photometric='rgb', extrasamples=['unassalpha'])
    yield put('pages.tif', tifffile.imwrite, np.stack([rgb]*3), photometric='rgb')
    yield put('big.tif', tifffile.imwrite, rgb, photometric='rgb', bigtiff=True)
    for kind, array in dict(rgb=rgb, gray=gray, float=(gray/255), deep=deep, long=gray.astype(np.int64)).items(): yield put(f'{kind}.npy', np.save, array)
    for ending in ('dcm', 'nii', 'nii.gz'): yield put(f'own.{ending}', write_image, rgb)

def originals(folder):
    "Every file to begin from: drawn ones, the test files of pydicom and of nibabel, as far as they are small"
    import nibabel
    from pydicom.data import get_testdata_files
    theirs = [Path(p) for p in get_testdata_files()] + sorted((Path(nibabel.__file__).parent/'tests'/'data').iterdir())
    return [*drawn_files(folder), *sorted(p for p in theirs if p.is_file() and 0 < p.stat().st_size < 2_000_000)]

def flipped(data, rng):
    "A few flipped bits, half of them in the first kilobyte, where the headers are"
    out = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 8, 64])):
        at = rng.randrange(min(len(out), 1024) if rng.random() < .5 else len(out))
        out[at] ^= 1 << rng.randrange(8)
    return bytes(out)

def cut(data, rng): return data[:rng.randrange(1, max(2, len(data)))]

def spliced(data, rng):
    "A piece of the file copied over another place, or put in between, or taken out"
    a, b = sorted(rng.randrange(len(data)) for _ in range(2))
    b, at = min(b, a + 4096), rng.randrange(len(data))
    piece = data[a:b]
    return rng.choice([data[:at] + piece + data[at + len(piece):], data[:at] + piece + data[at:], data[:a] + data[b:]]) or data[:1]

def corpus(folder, count, seed):
    "`count` files: originals as they are, then broken ones; the paths"
    rng = random.Random(seed)
    found = originals(folder/'drawn')
    rng.shuffle(found)
    paths = []
    for i in range(count):
        source = found[i % len(found)]
        data = source.read_bytes()
        if i >= len(found) or rng.random() < .5: data = rng.choice([flipped, flipped, cut, spliced])(data, rng)
        path = folder/'images'/f'{MARK}{i:04d}{"".join(source.suffixes[-2:]) if source.name.endswith(".nii.gz") else source.suffix}'
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
        paths.append(path)
    return paths

def test_prepare_reads_or_quarantines_every_file(tmp_path):
    broken = corpus(tmp_path, FILES, SEED)
    sound = [tmp_path/'images'/f'{MARK}-sound{i}.png' for i in range(SOUND)]
    for i, path in enumerate(sound): write_image(path, np.random.default_rng(i).integers(0, 256, (80, 90, 3)).astype(np.uint8))
    paths = [*broken, *sound]
    table = pd.DataFrame(dict(image_id=[p.name for p in paths], patient_id=[f'{MARK} {i}' for i in range(len(paths))],
                              label=[('CE', 'LAA')[i % 2] for i in range(len(paths))], path=paths))
    table.to_csv(tmp_path/'table.csv', index=False)
    done = subprocess.run([CLOT, 'run', 'prepare', '-p', f'data={tmp_path/"table.csv"}', '-p', 'size=32'], cwd=tmp_path, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stderr == ''
    run = Run(next((tmp_path/'runs').iterdir()))
    assert run.metrics['images'] + run.metrics['quarantined'] == len(paths)
    listed = pd.read_csv(next((tmp_path/'data'/'prepared').glob('*/quarantine.csv')), dtype=str, keep_default_na=False)
    assert len(listed) == run.metrics['quarantined'] > FILES/4, 'what is broken is seen'
    assert not set(listed.path) & {str(p) for p in sound}
    known = {'empty', 'too_large', 'not_an_image', 'no_pixels', 'unsupported', 'nested', 'range', 'choice', 'corrupt', 'timeout', 'memory', 'crashed'}
    assert set(listed.reason) <= known and (listed.message != '').all()
    texts = [p for p in run.path.rglob('*') if p.suffix in ('.txt', '.json', '.csv', '.ipynb')]
    assert [p.name for p in texts if MARK in p.read_text()] == [] and MARK not in done.stdout
