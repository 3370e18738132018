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
from strip_notebooks.description import description_table, flow_table
from strip_notebooks.report import (metric_titles, report_html, result_figures, result_sentences, table_report_html,
                                    wide_table, write_report)
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

    def prepared(self, checks=(), audit=(), described=None, **parameters):
        splits = pd.DataFrame(dict(split=['train', 'val', 'test'], patients=[70, 15, 1500]) | {c: 5 for c in self.classes})
        reasons = pd.DataFrame(dict(reason=['corrupt'], images=[2]))
        about = Prepared('p', 'c', 'images of your own', 'By patient.', 128, 100, 3, self.classes, 2)
        tables = dict(splits=splits, quarantine_reasons=reasons, checks=Findings(checks).table, audit=Findings(audit).table)
        if described is not None: tables |= dict(description=description_table(described), flow=flow_table(described, described))
        return self.made('prepare', about, tables, ['validation', 'audit', 'contact_sheet'], **parameters)

    def trained(self, prepared):
        return self.made('train', Trained('simple_cnn', 98_000, 1, 1, 'weighted_log_loss', .7, .6, 'cpu', '32-true'), {}, ['training'], [prepared], seed=3)

    def evaluated(self, model, auc=Estimate(.56, .42, .68), centers=2, step='evaluate'):
        positive = self.classes[-1]
        record = Evaluated(self.classes, positive, .33, "Youden's index", 'mean', {c: 20 for c in self.classes}, 2000, auc, .3)
        def long(**first): return pd.DataFrame([dict(first, metric=m, value=.7123, low=.6, high=.8, note='') for m in ('sensitivity', 'precision', 'roc_auc')])
        scores = pd.DataFrame([dict(level=level, metric=m, value=.5, low=.4, high=.6, note='') for level in ('patient', 'image') for m in metric_titles(record)])
        classes = pd.concat([long(**{'class': c, 'patients': 20}) for c in self.classes])
        per_center = [long(center=c, patients=40, **{c: 20 for c in self.classes}) for c in [self.center, 'another'][:centers]]
        tables = dict(scores=scores, classes=classes)
        if centers: tables['centers'] = pd.concat(per_center)
        return self.made(step, record, tables, [*result_figures, 'pictures'], [model] if model else [])

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
    assert ('most probable' in text) == ('Per class' in text) == (len(classes) > 2)      # the scores say it of two


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
    places = [text.index(p) for p in ('Patient AUC', 'The model does not do better than three color numbers', 'Test set: ', 'Beside baselines', 'Per center')]
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
    places = [text.index(p) for p in ('2 findings of checks and audit', 'AUD001', 'CHK011', 'Patient AUC', 'ROC AUC')]
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


def cohort(patients=40, **attributes):
    "Patients with one image each, in the three sets"
    ids = [f'p{i}' for i in range(patients)]
    split = [('train', 'train', 'val', 'test')[i//2 % 4] for i in range(patients)]
    return pd.DataFrame(dict(image_id=ids, patient_id=ids, label=['CE', 'LAA']*(patients//2), center_id='1', path='', split=split, **attributes))


def test_the_label_has_three_warnings_and_three_numbers_and_says_what_is_not_stated(tmp_path):
    runs = Runs(tmp_path)
    audit = [Finding('AUD001', Verdict.ERROR, 'found', values=dict(n=2)), Finding('AUD010', Verdict.WARNING, 'tells', estimate=Estimate(.8, .7, .9))]
    checks = [Finding('CHK011', Verdict.WARNING, 'found', values=dict(n=1)), Finding('CHK001', Verdict.WARNING, 'quarantined', values=dict(n=2))]
    evaluated = runs.evaluated(runs.trained(runs.prepared(checks=checks, audit=audit)))
    run = new_run('report', dict(author='A. <b>Person</b>', dates='2019/2021', title=''), tmp_path)
    page = write_report(run, evaluated).read_text()
    label = Page(page[page.index('<section class="label"'):page.index('</section>')]).text
    for words in ('Can the model', 'A. <b>Person</b>', 'Not a medical device', '40 test patients (20 CE and 20 LAA)', 'and 1 other finding below', '95 % CI 0.40–0.60'):
        assert words in label, words
    assert 'sensitivity for LAA' in label and label.count('95 % CI 0.40–0.60') == 3
    text = Page(page).text
    assert 'Dates 2019/2021' in text and 'Eligibility not stated' in text and 'Reference standard not stated' in text
    named = write_report(new_run('report', dict(title='Clots of <two> kinds'), tmp_path), evaluated).read_text()
    assert '<title>Clots of &lt;two&gt; kinds</title>' in named


def test_attributes_are_in_table_1_with_what_is_missing_and_nothing_that_names_a_patient(tmp_path):
    table = cohort(age=[nan, *range(50, 89)], sex=['male', 'female']*20, remark=[f'Dr. {i}' for i in range(40)], record=range(12_000, 12_040))
    text = Page(Runs(tmp_path).page(described=table)).text
    for words in ('age: missing', 'age: median (quartiles)', 'sex: male', 'remark: other (40 values)', 'record: not shown (40 values)', 'Training set', 'Flow of patients'):
        assert words in text, words
    assert 'Dr. ' not in text and '12020' not in text and '12,020' not in text
    bare = Page(Runs(tmp_path/'b').page(described=cohort())).text
    assert 'Table 1' in bare and 'missing' not in bare and 'center:' not in bare


def test_a_report_without_centers_has_no_section_of_them(tmp_path):
    runs = Runs(tmp_path)
    model = runs.trained(runs.prepared())
    for centers in (0, 1):
        text = Page(report_html(runs.evaluated(model, centers=centers))).text
        assert 'Per center' not in text and 'Forest' not in text
    assert 'Per center' in Page(report_html(runs.evaluated(model))).text


def test_a_report_of_a_table_has_a_label_and_no_section_of_a_cohort(tmp_path):
    page = table_report_html(Runs(tmp_path).evaluated(None, centers=0, step='evaluate_table'))
    text, parsed = Page(page).text, Page(page)
    assert 'Can the predictions in a table' in text and 'Nothing was checked' in text and 'Model card' not in text
    assert 'The patients' not in text and parsed.open == []


def test_nothing_on_the_page_is_empty_or_doubled(tmp_path):
    page = Runs(tmp_path).page(described=cohort(age=range(50, 90)))
    for empty in (r'<(p|li|h2|h3|dd|figcaption|caption|ul|tbody)[^>]*>\s*</', r'<div[^>]*>\s*</div>'): assert not re.search(empty, page), re.search(empty, page)[0]
    images = re.findall(r'alt="([^"]+)"', page)
    headings = re.findall(r'<h[23][^>]*>([^<]+)<', page)
    assert len(set(images)) == len(images) and len(set(headings)) == len(headings)


def test_the_style_prints_page_numbers_and_shows_that_tables_scroll():
    style = (ROOT/'strip_notebooks'/'assets'/'report.css').read_text()
    for words in ('@page', 'counter(page)', 'counter(pages)', '@media print', 'overflow-x: auto', 'linear-gradient'): assert words in style
