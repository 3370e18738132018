"The report across steps: runs of two and of three classes, on train and on derive; nothing fetched, nothing unescaped, no names"
import re
from html.parser import HTMLParser

import matplotlib
import numpy as np
import pandas as pd
import pytest

matplotlib.use('Agg')
from conftest import ROOT
from strip_notebooks.core import StripError
from strip_notebooks.findings import Finding, Findings, Verdict
from strip_notebooks.records import Evaluated, Prepared, Trained
from strip_notebooks.report import (metric_titles, report_html, result_figures, result_sentences, wide_table,
                                    write_report)
from strip_notebooks.runs import RunError, new_run
from strip_notebooks.statistics import Estimate

nan = float('nan')


class Runs:
    "Finished runs by hand in one folder of runs, with any classes"
    def __init__(self, folder, classes=('CE', 'LAA'), center='1'):
        self.folder, self.classes, self.center = folder, list(classes), center

    def made(self, step, record=None, tables={}, figures=(), links=(), **parameters):
        import matplotlib.pyplot as plt
        run = new_run(step, parameters, self.folder)
        for other in links: run.link(other)
        for name, table in tables.items(): run.save_table(table, name)
        for name in figures: run.save_figure(plt.figure(figsize=(1, 1)), name)
        plt.close('all')
        if record: run.save_record(record)
        run.finish()
        return run

    def prepared(self, checks=(), audit=(), **parameters):
        splits = pd.DataFrame(dict(split=['train', 'val', 'test'], patients=[70, 15, 1500]) | {c: 5 for c in self.classes})
        reasons = pd.DataFrame(dict(reason=['corrupt'], images=[2]))
        about = Prepared('p', 'c', 'images of your own', 'By patient.', 128, 100, 3, self.classes, 2)
        tables = dict(splits=splits, quarantine_reasons=reasons, checks=Findings(checks).table, audit=Findings(audit).table)
        return self.made('prepare', about, tables, ['validation', 'audit', 'contact_sheet'], **parameters)

    def trained(self, prepared):
        return self.made('train', Trained('simple_cnn', 98_000, 1, 1, 'weighted_log_loss', .7, .6, 'cpu', '32-true'), {}, ['training'], [prepared], seed=3)

    def evaluated(self, model, auc=Estimate(.56, .42, .68)):
        positive = self.classes[-1]
        record = Evaluated(self.classes, positive, .33, "Youden's index", 'mean', {c: 20 for c in self.classes}, 2000, auc, .3)
        def long(**first): return pd.DataFrame([dict(first, metric=m, value=.7123, low=.6, high=.8, note='') for m in ('sensitivity', 'precision', 'roc_auc')])
        scores = pd.DataFrame([dict(level=level, metric=m, value=.5, low=.4, high=.6, note='') for level in ('patient', 'image') for m in metric_titles(record)])
        classes = pd.concat([long(**{'class': c, 'patients': 20}) for c in self.classes])
        centers = long(center=self.center, patients=40, **{c: 20 for c in self.classes})
        return self.made('evaluate', record, dict(scores=scores, classes=classes, centers=centers), [*result_figures, 'pictures'], [model])

    def page(self, **prepared): return report_html(self.evaluated(self.trained(self.prepared(**prepared))))


class Page(HTMLParser):
    "Tags, their attributes and the text of a page"
    def __init__(self, page):
        super().__init__()
        self.tags, self.words, self.open = [], [], []
        self.feed(page)
    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ('meta', 'img'): self.open.append(tag)
    def handle_endtag(self, tag): assert self.open.pop() == tag
    def handle_data(self, data): self.words.append(data)
    @property
    def text(self): return ' '.join(' '.join(self.words).split())


def test_the_page_is_one_well_formed_offline_file(tmp_path):
    page = Runs(tmp_path).page()
    parsed = Page(page)
    assert parsed.open == []
    for tag, attrs in parsed.tags:
        assert tag not in ('script', 'link', 'iframe')
        for name in ('src', 'href'): assert attrs.get(name, '#').startswith(('#', 'data:image/png;base64,'))
        if tag == 'img': assert attrs['alt']
    ids = [a['id'] for _, a in parsed.tags if 'id' in a]
    assert len(set(ids)) == len(ids) and {a['href'][1:] for t, a in parsed.tags if t == 'a'} <= set(ids)
    assert not re.search(r'https?:|url\(|@import', page)


@pytest.mark.parametrize('classes', [('CE', 'LAA'), ('CE', 'LAA', 'other')])
def test_two_and_more_classes(tmp_path, classes):
    text = Page(Runs(tmp_path, classes).page()).text
    assert 'Patient AUC 0.56 (95 % CI 0.42–0.68): not distinguishable from chance.' in text
    for c in classes: assert f'20 patients of {c}' in text
    assert ('most probable' in text) == (len(classes) > 2)


def test_baselines_are_in_the_second_sentence_and_in_a_table(tmp_path):
    runs = Runs(tmp_path)
    model = runs.trained(runs.prepared())
    evaluated = runs.evaluated(model)
    assert 'None: this evaluation was made without images.' in Page(report_html(evaluated)).text
    first = dict(value=.56, low=.42, high=.68, note='')
    rows = [dict(first, name='model', metric=m) for m in ('roc_auc', 'weighted_log_loss')]
    rows += [dict(first, name='tissue color', metric=m, difference=.0, difference_low=-.1, difference_high=.1, verdict='not distinguishable')
             for m in ('roc_auc', 'weighted_log_loss')]
    table = pd.DataFrame(rows)
    tables = {name: evaluated.table(name) for name in ('scores', 'classes', 'centers')}
    beside = runs.made('evaluate', evaluated.record(Evaluated), dict(tables, baselines=table), [*result_figures, 'pictures'], [model])
    text = Page(report_html(beside)).text
    places = [text.index(p) for p in ('Patient AUC', 'The model does not do better than three color numbers', 'Test set: ', 'Beside baselines', 'Per class')]
    assert places == sorted(places) and 'made without images' not in text


def test_labels_with_markup_are_shown_as_written(tmp_path):
    bad = '<img src=x onerror=alert(1)>', '"><b>&amp;'
    runs = Runs(tmp_path, bad, center='<i>1</i>')
    page = runs.page(audit=[Finding('AUD002', Verdict.WARNING, 'test', values=dict(n=4, center='<u>lab</u>'))], preset='<s>easy')
    parsed = Page(page)
    assert 'onerror' not in {k for _, attrs in parsed.tags for k in attrs} and not {'b', 'i', 'u', 's'} & {t for t, _ in parsed.tags}
    for shown in (*bad, '<i>1</i>', '<u>lab</u>', '<s>easy'): assert shown in parsed.text


def test_warnings_come_first_with_code_and_what_to_do(tmp_path):
    checks = [Finding('CHK011', Verdict.WARNING, 'found', values=dict(n=1)), Finding('CHK002', Verdict.OK, 'none', values=dict(n=0))]
    audit = [Finding('AUD001', Verdict.ERROR, 'found', values=dict(n=2)), Finding('AUD014', Verdict.OK, 'tells', estimate=Estimate(.8, .7, .9))]
    text = Page(Runs(tmp_path).page(checks=checks, audit=audit)).text
    places = [text.index(p) for p in ('2 findings of checks and audit', 'AUD001', 'CHK011', 'Patient AUC')]
    assert places == sorted(places)
    assert 'What to do: Split again by patient' in text and 'What to do: Look at the images where' in text
    assert '1 image may show text that identifies the patient; it is left out of figures and reports.' in text


def test_a_report_of_a_derived_bundle_says_what_was_changed(tmp_path):
    runs = Runs(tmp_path)
    trained = runs.trained(runs.prepared())
    derived = runs.made('derive', links=[trained], train_run=trained.name, temperature=2.)
    text = Page(report_html(runs.evaluated(derived))).text
    assert f'derived from the trained one in {derived.name}, with temperature = 2.0' in text
    for run in (trained, derived): assert run.name in text
    assert 'derived' not in Page(report_html(runs.evaluated(trained))).text


def test_how_it_was_made_has_threads_commit_and_versions_but_no_folder(tmp_path):
    runs = Runs(tmp_path)
    prepared = runs.prepared(data=f'{tmp_path}/cases of somebody/train.csv')
    evaluated = runs.evaluated(runs.trained(prepared))
    text = Page(report_html(evaluated)).text
    e = evaluated.environment
    for word in (e['commit'][:12], e['python'], e['packages']['torch'], e['processor'], 'threads', 'train.csv'): assert word in text
    assert 'somebody' not in text and str(tmp_path) not in text


def test_a_run_without_its_figure_or_record_is_an_error_in_a_sentence(tmp_path):
    runs = Runs(tmp_path)
    prepared = runs.prepared()
    bare = runs.made('train', links=[prepared])
    with pytest.raises(RunError, match='left no record Trained'): report_html(runs.evaluated(bare))
    run = new_run('report', {}, tmp_path)
    with pytest.raises(StripError, match="a run of 'prepare'"): write_report(run, prepared)
    assert not run.report.exists()


def test_a_result_of_one_class_or_no_interval_is_never_certain():
    def said(auc, **counts): return result_sentences(Evaluated([*counts], 'LAA', .5, 'x', 'mean', counts, 500, Estimate(*auc), nan))
    assert said((nan, nan, nan), CE=9)[0].startswith('No patient AUC')
    assert 'no verdict' in said((1., .4, 1.), CE=9, LAA=1)[0] and 'the interval is not known' in said((1., nan, nan), CE=9, LAA=9)[0]
    assert 'With only 1 patient of LAA the interval itself is not reliable.' in said((.8, .6, .9), CE=19, LAA=1)
    assert 'worse than chance' in said((.2, .1, .3), CE=9, LAA=9)[0]


def test_the_template_writes_no_number_or_name_of_a_file():
    "Numbers are formatted in the chapter, and only runs know the names of files"
    template = (ROOT/'strip_notebooks'/'assets'/'report.j2').read_text()
    assert not re.search(r'round|format|%\.|\.json|\.csv|\.png', template.replace('image/png', ''))


def test_tables_hold_numbers_and_the_page_text():
    table = pd.DataFrame(dict(center=['01', '2'], metric='roc_auc', value=[.7123, nan], low=[.62, nan], high=[.789, nan], note=['', 'too few: 3 LAA']))
    assert wide_table(table, dict(roc_auc='ROC AUC')).values.tolist() == [['01', '0.71 (0.62–0.79)', ''], ['2', '–', 'too few: 3 LAA']]
