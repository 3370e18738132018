"Slides like those of STRIP through the whole workspace, in little memory, and hostile ones: typed errors within seconds"
import subprocess, sys, time
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
import tifffile
from simplejpeg import encode_jpeg

from strip_notebooks.data.decoding import decode
from strip_notebooks.data.formats import image_size, read_image, write_image
from strip_notebooks.data.images import ImageError, Reading
from strip_notebooks.data.measure import read_and_measure
from strip_notebooks.runs import Run

CLOT = str(Path(sys.executable).parent/'clot')
TILE = 128
BACKGROUNDS = (245, 245, 245), (225, 210, 235), (215, 225, 215)         # white, lilac, gray-green


def parts(color, tissue, seed=0):
    "Tiles of glass and of tissue"
    rng = np.random.default_rng(seed)
    noise = cv2.GaussianBlur(rng.integers(0, 256, (TILE*4, TILE, 3)).astype(np.uint8), (0, 0), 4)
    clot = np.clip(noise.astype(int) - 128 + tissue, 0, 255).astype(np.uint8)
    return [np.full((TILE, TILE, 3), color, np.uint8), *clot.reshape(4, TILE, TILE, 3)]


def strip_slide(path, side, coding='jpeg', color=BACKGROUNDS[0], tissue=(190, 80, 110), seed=0):
    "A slide as in STRIP: one level, tiles of 128 px, a resolution that means nothing, a round clot on colored glass"
    tiles = parts(color, tissue, seed)
    if coding == 'jpeg': tiles = [encode_jpeg(np.ascontiguousarray(t), 80, 'RGB', '420') for t in tiles]
    n = -(-side//TILE)
    inside = np.hypot(*(np.indices((n, n)) - n/2)) < n/3
    which = np.where(inside, np.random.default_rng(seed).integers(1, 5, (n, n)), 0).ravel()
    tifffile.imwrite(path, (tiles[k] for k in which), shape=(side, side, 3), dtype=np.uint8, tile=(TILE, TILE),
                     compression=coding, photometric='ycbcr' if coding == 'jpeg' else 'rgb', bigtiff=True,
                     subsampling=(2, 2) if coding == 'jpeg' else None, resolution=(10, 10), resolutionunit='CENTIMETER')
    return path


def peak_after(path):
    "Measures of a file, and the most memory that this worker has had, MiB"
    _, found = read_and_measure(path)
    return found, int(Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0])/1024


def outcome(path):
    "The reason with which a worker refuses a file, and the seconds that it took"
    began = time.monotonic()
    (found,) = decode(read_image, [path])
    return found.error.reason if found.error else '', time.monotonic() - began


@pytest.mark.parametrize('coding', ['jpeg', 'lzw', 'deflate'])
def test_a_slide_is_read_as_an_overview(tmp_path, coding):
    path = strip_slide(tmp_path/'a.tif', 10_000, coding)
    image = read_image(path)
    assert image_size(path) == (10_000, 10_000) and image.shape == (2500, 2500, 3)
    assert abs(image[5, 5].astype(int) - BACKGROUNDS[0]).max() <= 3
    assert abs(image[1150:1350, 1150:1350].mean((0, 1)) - (190, 80, 110)).max() < 12


def test_hostile_slides_end_as_typed_errors_within_seconds(tmp_path):
    sound = strip_slide(tmp_path/'sound.tif', 10_000)
    whole = sound.read_bytes()
    with tifffile.TiffFile(sound) as f:
        page = f.pages[0]
        at, n = page.dataoffsets[3000], page.databytecounts[3000]
        places, counts = page.tags[324].valueoffset, page.tags[325].valueoffset
        wide, high = page.tags[256].valueoffset, page.tags[257].valueoffset
    number = lambda k: int(k).to_bytes(8, 'little')
    put = lambda at, b: whole[:at] + b + whole[at + len(b):]
    other = encode_jpeg(np.zeros((16, 16, 3), np.uint8), 50, 'RGB')
    hostile = dict(truncated=whole[:len(whole)//2], beyond=put(places, number(2**40)), noise=put(at + n//2, bytes(n//3)),
                   other=put(at, other), no_jpeg=put(at, b'nothing here'), longer=put(counts, number(2**40)),
                   claims=put(wide, (2**31 - 1).to_bytes(4, 'little')), huge=put(high, (10**9).to_bytes(4, 'little')))
    assert outcome(sound)[0] == ''
    for name, b in hostile.items():
        (tmp_path/f'{name}.tif').write_bytes(b)
        reason, seconds = outcome(tmp_path/f'{name}.tif')
        assert reason in ('corrupt', 'too_large') and seconds < 60, (name, reason, seconds)


def test_a_tile_for_all_places_is_bounded(tmp_path):
    "A small file whose tiles are all the same bytes claims more than bytes can hold"
    side = 60_000
    tile = encode_jpeg(np.zeros((TILE, TILE, 3), np.uint8), 50, 'RGB', '420')
    strip_slide(tmp_path/'a.tif', 256)
    n = (-(-side//TILE))**2
    tags = {256: side, 257: side}
    with tifffile.TiffWriter(tmp_path/'few.tif', bigtiff=True) as f:
        f.write(iter([tile]), shape=(TILE, TILE, 3), dtype=np.uint8, tile=(TILE, TILE), compression='jpeg', photometric='ycbcr')
    with tifffile.TiffFile(tmp_path/'few.tif', mode='r+') as f:
        for tag, value in tags.items(): f.pages[0].tags[tag].overwrite(value)
        at, size = f.pages[0].dataoffsets[0], f.pages[0].databytecounts[0]
        f.pages[0].tags[324].overwrite([at]*n)
        f.pages[0].tags[325].overwrite([size]*n)
    reason, seconds = outcome(tmp_path/'few.tif')
    assert seconds < 300 and reason in ('', 'corrupt', 'timeout', 'memory')


def test_real_slides_as_overviews(real):
    for path, side in ((real/'slides'/'cmu_1_small_region.svs', 500), (real/'slides'/'boxes.tiff', 50)):
        height, width = image_size(path)
        small = read_image(path, Reading(overview=side))
        if height*width <= 16*side**2: continue
        factor = height//len(small)
        want = cv2.resize(read_image(path)[:len(small)*factor, :small.shape[1]*factor], small.shape[1::-1], interpolation=cv2.INTER_AREA)
        assert abs(small.astype(float) - want).mean() < 2


def test_sixteen_bits_of_which_twelve_are_used(tmp_path):
    from strip_notebooks.data.checks import range_finding
    from strip_notebooks.data.measure import measures_table
    rows = []
    for i, window in enumerate([None, (0, 4095)]):
        tifffile.imwrite(tmp_path/'a.tif', np.random.default_rng(i).integers(0, 4096, (64, 64, 3)).astype(np.uint16), photometric='rgb')
        rows.append(measures_table([read_and_measure(tmp_path/'a.tif', Reading(window=window))[1]], ['a']))
    assert 'use 6 % of their range; set window=0,4095' in range_finding(pd.concat([rows[0]]*2)).sentence
    assert range_finding(rows[1]).outcome == 'none'


@pytest.mark.slow
def test_peak_memory_of_large_slides(tmp_path):
    paths = [strip_slide(tmp_path/f'{c}.tif', 30_000, c) for c in ('jpeg', 'lzw')]
    for found in decode(peak_after, paths, workers=1):
        assert found.error is None
        measures, peak = found.value
        assert measures['height'] == 30_000 and peak < 1024, peak


@pytest.mark.slow
def test_demo_on_slides_beside_png(tmp_path):
    "Three slides of 30,000 x 30,000 px per class, and PNGs, in a folder with a table as in STRIP"
    (tmp_path/'train').mkdir()
    rows = []
    for label, tissue in dict(CE=(150, 70, 120), LAA=(205, 90, 105)).items():
        for i in range(15):
            name = f'{label.lower()}{i:02d}'
            if i < 3: strip_slide(tmp_path/'train'/f'{name}_0.tif', 30_000, color=BACKGROUNDS[i], tissue=tissue, seed=i)
            else:
                glass, *clot = parts(BACKGROUNDS[i % 3], tissue, i)
                write_image(tmp_path/'train'/f'{name}_0.png', np.vstack([np.hstack([glass, clot[0]]), np.hstack(clot[1:3])]))
            rows.append(dict(image_id=f'{name}_0', center_id=i % 3, patient_id=name, image_num=0, label=label))
    pd.DataFrame(rows).to_csv(tmp_path/'train.csv', index=False)
    done = subprocess.run([CLOT, 'demo', '--quick', '--data', 'train.csv', '--size', '64', '--epochs', '2'], cwd=tmp_path, capture_output=True, text=True, timeout=3000)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    prepared = next(r for r in map(Run, sorted((tmp_path/'runs').iterdir())) if r.step == 'prepare')
    assert (prepared.metrics['images'], prepared.metrics['quarantined']) == (30, 0)
