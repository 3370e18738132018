"Real images of another kind are unlike the training images of a model for clots"
import numpy as np
import pandas as pd

from strip_notebooks.bundle import load_bundle
from strip_notebooks.data.cache import build_cache
from strip_notebooks.data.formats import read_image
from strip_notebooks.data.preprocess import Preprocessing
from strip_notebooks.data.synthetic import make_cohort
from strip_notebooks.features.embedding import image_embeddings
from strip_notebooks.splits import split_patients
from strip_notebooks.training.classifier import train
from strip_notebooks.training.config import make_config
from strip_notebooks.uncertainty.outliers import detection_table, fit_limit, outlier_scores, patient_scores

def test_blood_smears_are_found(real, tmp_path):
    "White blood cells of two laboratories, 40 of each, against the test patients of synthetic clots"
    cohort = split_patients(make_cohort(tmp_path/'easy', 'easy', n_patients=100, size=96, seed=2, workers=1), (.5, .25, .25))
    cache = build_cache(cohort, Preprocessing(size=64), tmp_path/'cache', workers=1)
    train(cohort, cache, cache.preprocessing, make_config(arch='simple_cnn', epochs=4, batch_size=16, policy='light', lr=2e-3), tmp_path/'run')
    bundle = load_bundle(tmp_path/'run'/'bundle')
    features = image_embeddings(bundle, cache.images)
    fit, test = fit_limit(features, cohort, bundle.classes), (cohort.split == 'test').to_numpy()
    own = patient_scores(outlier_scores(features[test], fit.arrays), cohort.patient_id[test])
    cells = pd.read_csv(real/'white_blood_cells'/'train.csv').groupby('center_id').head(40)
    pixels = [bundle.preprocessing.pixels(read_image(real/'white_blood_cells'/'train'/f'{i}.png')) for i in cells.image_id]
    scores = {lab: outlier_scores(image_embeddings(bundle, np.stack([p for p, c in zip(pixels, cells.center_id) if c == lab])), fit.arrays) for lab in ('lab1', 'lab2')}
    table = detection_table(own, scores, fit.limit.threshold)
    assert (table[table.measure == 'AUC'].low > .9).all() and (table[table.measure == 'AUC'].value > .95).all(), table.to_string()
