"From a table of predictions to a verdict: what crosses the notebooks of the metrics, and scikit-learn as the judge of every number"
import warnings

import matplotlib
matplotlib.use('Agg')
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from strip_notebooks.core import StripError
from strip_notebooks.metrics import figures
from strip_notebooks.metrics.compare import compare
from strip_notebooks.operating import choose_threshold
from strip_notebooks.benchmarks import scikit_learn_values
from strip_notebooks.metrics.intervals import expanded_level
from strip_notebooks.metrics.scores import center_table, class_table, image_scores, scores
from strip_notebooks.metrics.values import metric_names, metric_values
from strip_notebooks.predictions import (aggregate_patients, load_predictions, make_predictions, patient_arrays,
                                         save_predictions)
from strip_notebooks.statistics import (auc, auc_interval, auc_variance, bootstrap_weights, delong_paired, newcombe_auc_interval,
                                        permutation_p, wilson_interval)
from strip_notebooks.training.classifier import patient_scores

FIGURES = [f for n in figures.__all__ if n != 'picture_figure' for f in [getattr(figures, n)]]


def answers(n, strength, seed=0, prevalence=.27):
    "Truth and probabilities of `n` patients, some of them equal"
    rng = np.random.default_rng(seed)
    y = (rng.random(n) < prevalence).astype(int)
    return y, np.round(1/(1 + np.exp(-(strength*(y - .5) + rng.normal(0, 1, n)))), 3)


def predictions(n=90, strength=1.5, seed=0, split='test', ids='p{}', images=3):
    "A table by image: `n` patients with 1 to `images` images at three centers"
    rng = np.random.default_rng(seed)
    y,p = answers(n, strength, seed)
    who = np.repeat(np.arange(n), rng.integers(1, images + 1, n))
    cohort = pd.DataFrame(dict(image_id=[f'{i:05d}' for i in range(len(who))], patient_id=[ids.format(i) for i in who], label=np.where(y[who], 'LAA', 'CE'),
                               center_id=[f'{i % 3:02d}' for i in who], split=split))
    q = np.clip(p[who] + rng.normal(0, .05, len(who)), .001, .999)
    return make_predictions(cohort, np.stack([1 - q, q], 1), ['CE', 'LAA'])


# --- the numbers ---

@pytest.mark.parametrize('threshold', [.5, .3])
def test_every_metric_of_every_resample_is_that_of_scikit_learn(threshold):
    y,p = answers(632, 1.2)
    assert len(np.unique(p)) < 632                                          # there are ties
    weights = bootstrap_weights(y, 24, seed=3)
    fast,slow = metric_values(y, p, threshold, .27, weights), scikit_learn_values(y, p, threshold, .27, weights)
    assert list(fast) == list(slow) == metric_names
    for n in metric_names: np.testing.assert_allclose(fast[n], slow[n], rtol=0, atol=1e-12, err_msg=n)


def test_a_resample_is_the_same_as_its_rows_repeated():
    y,p = answers(60, 1, 2)
    weights = bootstrap_weights(y, 20, 1)
    drawn = metric_values(y, p, .4, .3, weights)
    for i,w in enumerate(weights.astype(int)):
        alone = metric_values(np.repeat(y, w), np.repeat(p, w), .4, .3)
        for n in metric_names: np.testing.assert_allclose(drawn[n][i], alone[n][0], atol=1e-12, err_msg=n)
    assert (weights.sum(1) == 60).all() and weights[:, y == 1].sum(1).std() > 1                # drawn from all patients
    assert (bootstrap_weights(y, 20, 1, stratified=True)[:, y == 1].sum(1) == y.sum()).all()


def test_intervals_are_the_quantiles_of_a_plain_loop_over_patients():
    "By image: all images of a patient are drawn together"
    from sklearn.metrics import f1_score, roc_auc_score
    table = predictions(40, seed=4)
    found = image_scores(table, n_resamples=60, seed=9)
    groups = [g for _,g in table.groupby('patient_id')]                     # patients by id
    weights = bootstrap_weights(np.array([g.label.iloc[0] == 'LAA' for g in groups]).astype(int), 60, 9).astype(int)
    drawn = []
    for w in weights:
        t = pd.concat([g for g,k in zip(groups, w) for _ in range(k)])
        drawn.append(f1_score(t.label == 'LAA', t.p_LAA >= .5))
    smaller = table.groupby('patient_id').label.first().value_counts().min()
    tail = (1 - expanded_level(smaller))/2
    np.testing.assert_allclose(found.loc['f1', ['low', 'high']].astype(float), np.quantile(drawn, [tail, 1 - tail]), atol=1e-12)
    np.testing.assert_allclose(found.value['roc_auc'], roc_auc_score(table.label == 'LAA', table.p_LAA), atol=1e-12)


@pytest.mark.parametrize('level', ['patient', 'image'])
def test_the_order_of_rows_changes_nothing(level):
    table = predictions(50, seed=5)
    if level == 'patient': table = aggregate_patients(table)
    of = dict(patient=scores, image=image_scores)[level]
    a,b = (of(t, n_resamples=80, train_prior=.27) for t in (table, table.sample(frac=1, random_state=1)))
    pd.testing.assert_frame_equal(a, b, rtol=1e-12)


def test_the_other_class_as_positive_mirrors_the_table():
    table = aggregate_patients(predictions(80, seed=6))
    a,b = scores(table, n_resamples=50), scores(table, n_resamples=50, positive='CE')
    for one,other in (('roc_auc', 'roc_auc'), ('sensitivity', 'specificity'), ('ppv', 'npv'), ('mcc', 'mcc'), ('accuracy', 'accuracy'), ('brier', 'brier'), ('weighted_log_loss', 'weighted_log_loss')):
        np.testing.assert_allclose(a.value[one], b.value[other], atol=1e-12, err_msg=one)
    assert b.attrs['positive'] == 'CE' and a.attrs['n_positive'] + b.attrs['n_positive'] == 80


def test_the_competitions_metric_by_its_definition():
    "With p rescaled to sum to 1 and clipped, also where single precision has rounded a sure answer to 1"
    rows = [('CE', .9, .1), ('CE', 3e-8, 1.), ('CE', .50004, .49999), ('LAA', 0., 1.), ('LAA', 1., 0.)]
    table = pd.DataFrame([dict(patient_id=f'p{k}', label=c, p_CE=a, p_LAA=b) for k,(c,a,b) in enumerate(rows)])
    loss = {c: [-np.log(np.clip((a if c == 'CE' else b)/(a + b), 1e-15, 1 - 1e-15)) for k,a,b in rows if k == c] for c in ('CE', 'LAA')}
    found = scores(table, train_prior=.5, n_resamples=20)
    expected = (np.mean(loss['CE']) + np.mean(loss['LAA']))/2
    np.testing.assert_allclose(found.value[['weighted_log_loss', 'weighted_log_loss_shifted']].astype(float), expected, rtol=1e-7)


def test_delong_is_that_of_a_loop_over_all_pairs():
    "One AUC, and two of the same patients, as DeLong, DeLong and Clarke-Pearson (1988) write the covariance"
    y,p = answers(70, 1.2, 3)
    q = np.round(p + np.random.default_rng(1).normal(0, .2, 70), 1)
    def structural(r):
        wins = np.array([[1. if a > b else .5 if a == b else 0. for b in r[y == 0]] for a in r[y == 1]])
        return wins.mean(1), wins.mean(0)
    a,b = structural(p), structural(q)
    covariance = sum(np.cov(u, v)/len(u) for u,v in zip(a, b))
    np.testing.assert_allclose(auc_variance(y, p), covariance[0, 0], atol=1e-12)
    assert auc_interval(y, p).low < a[0].mean() < auc_interval(y, p).high
    difference,p_value = delong_paired(y, p, q)
    z = (a[0].mean() - b[0].mean())/np.sqrt(covariance[0, 0] + covariance[1, 1] - 2*covariance[0, 1])
    from scipy.stats import norm
    np.testing.assert_allclose([difference.value, p_value], [a[0].mean() - b[0].mean(), 2*norm.sf(abs(z))], atol=1e-12)


def test_the_permutation_test_is_never_zero():
    y = np.repeat([0, 1], 40)
    assert permutation_p(y, y.astype(float), 500) == 1/501
    assert permutation_p(y, 1 - y.astype(float), 500) == 1


# --- the way from predictions to a verdict ---

def test_from_predictions_to_a_verdict(tmp_path):
    ids = '00{}e5'                                                          # looks like a number
    validation,test,worse = predictions(120, 2, 1, 'val', ids), predictions(150, 2, 2, 'test', ids), predictions(150, 2, 2, 'test', ids)
    noise = np.random.default_rng(0).permutation(len(worse))
    worse[['p_CE', 'p_LAA']] = worse[['p_CE', 'p_LAA']].to_numpy()[noise]   # answers that know nothing
    for n,t in dict(validation=validation, test=test, worse=worse).items(): save_predictions(tmp_path/f'{n}.csv', t)
    back = {n: load_predictions(tmp_path/f'{n}.csv') for n in ('validation', 'test', 'worse')}
    pd.testing.assert_frame_equal(back['test'], test)
    assert back['test'].patient_id[0] == '000e5' and back['test'].center_id[0] == '00'

    threshold = choose_threshold(back['validation'])
    with pytest.raises(StripError, match="test patients"): choose_threshold(back['test'])
    patients = aggregate_patients(back['test'])
    table = scores(patients, threshold=threshold, train_prior=.27, n_resamples=400)
    known = table.drop('calibration_error')
    assert (known.low < known.value).all() and (known.value < known.high).all() and table.attrs['patients'] == 150

    worse = aggregate_patients(back['worse'])
    verdicts = compare(patients, worse, (threshold, .5), n_resamples=400)
    assert verdicts.verdict['roc_auc'] == verdicts.verdict['weighted_log_loss'] == 'first is better' and verdicts.attrs['delong_p'] < .001
    turned = compare(worse, patients, (.5, threshold), n_resamples=400)
    np.testing.assert_allclose(turned.difference, -verdicts.difference, atol=1e-12)
    np.testing.assert_allclose(turned.low, -verdicts.high, atol=1e-12)
    assert turned.verdict['roc_auc'] == 'second is better'
    np.testing.assert_allclose(verdicts['first'], table.value[verdicts.index], atol=1e-12)
    same = compare(patients, patients.sample(frac=1, random_state=0), n_resamples=100)
    assert set(same.verdict) == {'not distinguishable'} and np.allclose(same.difference, 0, atol=1e-12)

    centers = center_table(patients, n_resamples=100).query("metric == 'roc_auc'")
    assert centers.patients.sum() == 150 and list(centers.center) == ['00', '01', '02']
    classes = class_table(patients, threshold=threshold, n_resamples=400).set_index(['class', 'metric'])
    assert classes.xs('roc_auc', level='metric').patients.sum() == 150
    for c,shown,metric in (('LAA', 'sensitivity', 'sensitivity'), ('CE', 'sensitivity', 'specificity'), ('LAA', 'precision', 'ppv'),
                           ('CE', 'precision', 'npv'), ('CE', 'roc_auc', 'roc_auc')):
        ours,theirs = classes.loc[(c, shown)], table.loc[metric]                # one table, seen from both sides
        assert ours[['value', 'low', 'high']].tolist() == theirs[['value', 'low', 'high']].tolist()


def test_figures_show_the_numbers_of_the_table():
    table = aggregate_patients(predictions(100, seed=7))
    found = scores(table, n_resamples=200)
    text = {}
    for draw in FIGURES:
        with warnings.catch_warnings():
            warnings.simplefilter('error', RuntimeWarning); warnings.simplefilter('error', UserWarning)
            fig = draw(table, **({'n_resamples': 200} if 'n_resamples' in draw.__code__.co_varnames else {}))
            fig.canvas.draw()
        ax = fig.axes[0]
        legend = [t.get_text() for l in [*fig.legends, ax.get_legend()] if l for t in l.get_texts()]
        text[draw.__name__] = ' '.join([ax.get_title(), ax.get_xlabel(), ax.get_ylabel(), *(t.get_text() for t in ax.texts + ax.get_xticklabels()), *legend])
        assert ax.get_xlabel() and ax.get_ylabel() and ('100' in text[draw.__name__] or 'patients' in text[draw.__name__])
        plt.close(fig)
    value,low,high = found.loc['roc_auc', ['value', 'low', 'high']]
    assert f'{value:.2f} (95 % CI {low:.2f}–{high:.2f})' in text['roc_figure']
    value,low,high = found.loc['pr_auc', ['value', 'low', 'high']]
    assert f'{value:.2f} (95 % CI {low:.2f}–{high:.2f})' in text['pr_figure']
    assert f'{found.value["sensitivity"]:.0%}' in text['confusion_figure'] and f'{found.value["specificity"]:.0%}' in text['confusion_figure']


def test_bands_are_the_quantiles_of_a_loop_over_resamples():
    from sklearn.metrics import roc_curve
    table = predictions(60, seed=12)
    patients = aggregate_patients(table)
    y,p = (patients.label == 'LAA').to_numpy(int), patients.p_LAA.to_numpy()
    found,precision = [],[]
    for w in bootstrap_weights(y, 50, 0).astype(int):
        a,b = np.repeat(y, w), np.repeat(p, w)
        x,height,_ = roc_curve(a, b, drop_intermediate=False)
        found.append(np.interp(.3, x, height))
        first = next(t for t in np.unique(b)[::-1] if a[b >= t].sum() >= a.sum()/2)     # the highest threshold that finds half
        precision.append(a[b >= first].mean())
    for draw,at,values in ((figures.roc_figure, .3, found), (figures.pr_figure, .5, precision)):
        fig = draw(patients, n_resamples=50)
        corners = fig.axes[0].collections[0].get_paths()[0].vertices
        ends = corners[np.isclose(corners[:, 0], at), 1]
        np.testing.assert_allclose([ends.min(), ends.max()], np.quantile(values, [.025, .975]), atol=1e-9)
        plt.close(fig)


# --- where there is little to say ---

def test_one_class_is_said_and_not_guessed():
    table = predictions(30, seed=8)
    table = aggregate_patients(table[table.label == 'CE'])
    with warnings.catch_warnings():
        warnings.simplefilter('error', RuntimeWarning); warnings.simplefilter('error', UserWarning)
        found = scores(table, n_resamples=50)
        assert found.loc[['roc_auc', 'pr_auc', 'sensitivity'], 'value'].isna().all() and found.note['roc_auc'] == 'only one class is present'
        assert found.value['specificity'] == found.value['accuracy']
        for draw in FIGURES: plt.close(draw(table))


def test_no_width_is_not_certainty():
    "Where all resamples agree, a share gets Wilson's interval among its patients, at both levels"
    table = predictions(40, seed=3)
    right = (table.label == 'LAA').to_numpy()*.8 + .1
    table = table.assign(p_LAA=right, p_CE=1 - right)
    positives = table[table.label == 'LAA'].patient_id.nunique()
    for found in (scores(aggregate_patients(table), n_resamples=50), image_scores(table, n_resamples=50)):
        for metric,n in dict(sensitivity=positives, ppv=positives, specificity=40 - positives, npv=40 - positives, accuracy=40).items():
            np.testing.assert_allclose(found.loc[metric, ['value', 'low', 'high']].astype(float), [1, *wilson_interval(n, n)], atol=1e-12)
        assert found.loc['roc_auc', ['value', 'low', 'high']].tolist() == [1, *newcombe_auc_interval(1, positives, 40 - positives)]
        assert found.note['weighted_log_loss'] == 'no interval: the same in every resample'


def test_no_patients_is_said():
    table = predictions(20)[:0]
    with pytest.raises(StripError, match='no predictions'): scores(aggregate_patients(table))
    with pytest.raises(StripError, match='no predictions'): image_scores(table)


def test_many_patients_take_little_memory():
    "Blocks of resamples change no number, and hold no matrix of all images by all resamples"
    import tracemalloc
    table = predictions(3000, images=4)
    tracemalloc.start()
    image_scores(table, n_resamples=1000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2*1000*len(table)*8                                       # all at once would take six such matrices


def test_patients_without_a_center_are_not_left_out():
    table = predictions(40)
    table['center_id'] = np.where(table.patient_id.str[1:].astype(int) < 30, 'A', None)
    centers = center_table(aggregate_patients(table), n_resamples=50).query("metric == 'roc_auc'").set_index('center')
    assert centers.patients.to_dict() == {'A': 30, 'unknown': 10}


def test_a_few_patients_of_each_class():
    table = aggregate_patients(predictions(6, seed=11))
    assert set(table.label) == {'CE', 'LAA'}
    with warnings.catch_warnings():
        warnings.simplefilter('error', RuntimeWarning); warnings.simplefilter('error', UserWarning)
        found = scores(table, n_resamples=50)
        assert 0 <= found.value['roc_auc'] <= 1
        centers = center_table(table, n_resamples=50)
        assert centers.value.isna().all() and centers.note.str.startswith('too few').all()
        for draw in FIGURES: plt.close(draw(table))


def test_patients_that_differ_are_not_compared():
    table = aggregate_patients(predictions(30, seed=9))
    with pytest.raises(StripError, match='same patients'): compare(table, table[table.patient_id != 'p0'])
    other = table.copy(); other['label'] = np.where(other.patient_id == 'p0', np.where(other.label == 'CE', 'LAA', 'CE'), other.label)
    with pytest.raises(StripError, match='another label'): compare(table, other)
    with pytest.raises(StripError, match='classes'): compare(table, table.rename(columns=dict(p_CE='p_XX')).replace(dict(label=dict(CE='XX'))))


def test_three_classes_are_scored_one_against_the_others():
    rng = np.random.default_rng(0)
    p = rng.dirichlet([1, 1, 1], 90)
    cohort = pd.DataFrame(dict(image_id=[f'i{i}' for i in range(90)], patient_id=[f'p{i}' for i in range(90)], label=np.array(['CE', 'LAA', 'Other'])[p.argmax(1)]))
    table = aggregate_patients(make_predictions(cohort, p, ['CE', 'LAA', 'Other']))
    from sklearn.metrics import roc_auc_score
    for c in ('CE', 'LAA', 'Other'): np.testing.assert_allclose(scores(table, positive=c, n_resamples=20).value['roc_auc'], roc_auc_score(table.label == c, table['p_' + c]), atol=1e-12)
    classes = class_table(table, n_resamples=20)
    sensitivity = classes[classes.metric == 'sensitivity']
    assert sensitivity.patients.sum() == 90 and (sensitivity.value == 1).all()              # each label is the most probable class
    assert compare(table, table, n_resamples=20).verdict['roc_auc'] == 'not distinguishable'
    for draw in FIGURES: plt.close(draw(table))


@pytest.mark.parametrize('n_classes', [2, 3])
def test_a_constant_predictor_has_an_auc_of_one_half_however_many_images_a_patient_has(n_classes):
    rng = np.random.default_rng(0)
    names = ['CE', 'LAA', 'Other'][:n_classes]
    for _ in range(20):
        shares = dict(zip([f'p_{c}' for c in names], rng.dirichlet(np.ones(n_classes))))
        images = pd.DataFrame([dict(image_id=f'{i}-{j}', patient_id=f'{i:02}', label=names[i % n_classes], **shares)
                               for i, n in enumerate(rng.integers(1, 6, 30)) for j in range(n)])
        patients = aggregate_patients(images)
        for c in names: assert auc(*patient_arrays(patients, c)) == .5
        assert patient_scores(patients, names, np.full(n_classes, 1/n_classes))['auc'] == .5
