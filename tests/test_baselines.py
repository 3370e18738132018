"Baselines across steps: on cohorts whose answer is known, verdict and baselines say what is true"
import numpy as np
import pytest

from strip_notebooks.data.cache import build_cache
from strip_notebooks.data.preprocess import Preprocessing
from strip_notebooks.data.synthetic import make_cohort, plan_cohort
from strip_notebooks.metrics.baselines import baseline_predictions, baseline_sentence, baseline_table
from strip_notebooks.predictions import aggregate_patients
from strip_notebooks.splits import split_patients
from strip_notebooks.training.classifier import TrainConfig, train

COLORS = ['tissue color', 'tissue color within centers']


def trained(folder, preset, n_patients, epochs):
    "A cohort, its cache, and the test predictions per patient of a small network"
    cohort = split_patients(make_cohort(folder/preset, preset, n_patients, 128, 1), (.5, .15, .35))
    cache = build_cache(cohort, Preprocessing(96), folder/'cache')
    result = train(cohort, cache, Preprocessing(96), TrainConfig(epochs=epochs, batch_size=16), folder/f'{preset} run')
    return cohort, cache, aggregate_patients(result.predictions.query("split == 'test'"))


def test_on_structure_the_network_is_better_and_colors_are_at_chance(tmp_path):
    cohort, cache, patients = trained(tmp_path, 'structure', 300, 8)
    table = baseline_table(patients, baseline_predictions(cohort, cache), 500)
    auc = table[table.metric == 'roc_auc'].set_index('name')
    assert auc.low['model'] > .6
    assert ((auc.low[COLORS] < .5) & (auc.high[COLORS] > .5)).all()
    assert (auc.verdict[[*COLORS, 'class prior', 'image size']] == 'model is better').all()


def test_on_easy_a_network_that_only_knows_the_color_is_not_better(tmp_path):
    "Color within centers in place of a network: equal to itself, and the sentence says so"
    cohort = split_patients(make_cohort(tmp_path/'easy', 'easy', 160, 96, 1), (.5, .15, .35))
    baselines = baseline_predictions(cohort, build_cache(cohort, Preprocessing(64), tmp_path/'cache'))
    table = baseline_table(baselines[COLORS[1]], baselines, 500)
    auc = table[table.metric == 'roc_auc'].set_index('name')
    assert auc.low['model'] > .6 and auc.verdict[COLORS[1]] == 'not distinguishable'
    assert 'does not do better than three color numbers' in baseline_sentence(table)


@pytest.mark.parametrize('preset', ['structure', 'null'])
def test_colors_say_nothing_where_the_composition_is_the_same(preset):
    "The composition of 20,000 patients ranks the classes within four standard errors of one half"
    from sklearn.metrics import roc_auc_score
    plan = plan_cohort(preset, 20_000, 512, 3).drop_duplicates('patient_id')
    laa = plan.label == 'LAA'
    error = np.sqrt(len(laa)/12/laa.sum()/(~laa).sum())
    for c in ('red_cells', 'platelets', 'fibrin', 'white_cells'): assert abs(roc_auc_score(laa, plan[c]) - .5) < 4*error
    assert preset == 'null' or roc_auc_score(laa, plan.length) > .95
