"An encoder is pretrained by its experiment at smoke size, and a training starts from the weights that it leaves"
import warnings

import numpy as np
import pytest


@pytest.fixture(scope='module')
def pretrained(tmp_path_factory):
    "A finished run of pretrain, in a workspace of its own"
    from strip_notebooks.experiments import run_experiment
    folder = tmp_path_factory.mktemp('pretrained')
    small = dict(patients=32, source_size=64, size=32, epochs=1, batch_size=8, seed=2, device='cpu')
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return run_experiment('pretrain', small, folder/'runs', show=False)

def test_a_run_of_pretrain_leaves_weights_and_what_to_do_with_them(pretrained):
    from strip_notebooks.models import read_weights
    assert pretrained.state == 'finished' and read_weights(pretrained.weights)['head.weight'].shape[0] == 4
    assert f'-p pretrained=runs/{pretrained.name}/weights.safetensors' in pretrained.summary
    assert len(pretrained.table('history')) == 1 and pretrained.metrics['constant_error'] > 0
    assert pretrained.figure('pretraining').stat().st_size > 1000

def test_no_label_is_read(tmp_path):
    "Other labels, the same weights"
    from strip_notebooks.data.cache import build_cache
    from strip_notebooks.data.preprocess import Preprocessing
    from strip_notebooks.data.synthetic import make_cohort
    from strip_notebooks.splits import split_patients
    from strip_notebooks.training.config import PretrainConfig
    from strip_notebooks.training.pretrain import CompositionTask, pretrain, true_composition
    cohort = split_patients(make_cohort(tmp_path/'null', 'null', n_patients=24, size=64, workers=1), (.6, .2, .2))
    other = cohort.assign(label=np.roll(cohort.label, 7))
    assert (other.label != cohort.label).any()
    pixels = Preprocessing(32)
    cache, config = build_cache(cohort, pixels, tmp_path/'cache'), PretrainConfig(epochs=1, batch_size=8, device='cpu')
    for name,images in dict(cohort=cohort, other=other).items():
        task = CompositionTask(images, true_composition(tmp_path/'null', images), cache, pixels, config)
        pretrain(task, tmp_path/name, tmp_path/f'{name}.safetensors')
    assert (tmp_path/'cohort.safetensors').read_bytes() == (tmp_path/'other.safetensors').read_bytes()

def test_a_training_starts_from_the_weights_and_knows_their_pixels(pretrained, tmp_path, monkeypatch):
    """The body has the bits of the file, the head those of a random start, the normalization is the file's, whatever the
    cohort was prepared with, and rate and layer decay are those of fine-tuning"""
    import torch
    from strip_notebooks.bundle import load_bundle
    from strip_notebooks.data.cache import build_cache
    from strip_notebooks.data.preprocess import Preprocessing, imagenet
    from strip_notebooks.data.synthetic import make_cohort
    from strip_notebooks.models import read_weights
    from strip_notebooks.splits import split_patients
    from strip_notebooks.training.classifier import ImageClassifier, make_config, train
    monkeypatch.setenv('STRIP_PROGRESS', 'none')
    warnings.simplefilter('ignore')
    cohort = split_patients(make_cohort(tmp_path/'easy', 'easy', n_patients=24, size=64, workers=1), (.5, .25, .25))
    prepared = Preprocessing(32, normalize='zscore', shift=(.9, .8, .9), scale=(.5, .5, .5))
    cache = build_cache(cohort, prepared, tmp_path/'cache')
    config = make_config(pretrained=str(pretrained.weights), epochs=1, batch_size=8, device='cpu', precision='32-true')
    assert (config.lr, config.layer_decay) == (.0002, .75)
    net, file = ImageClassifier(cohort, cache, prepared, config).network().state_dict(), read_weights(pretrained.weights)
    assert {n for n in net if n not in file or not torch.equal(net[n], file[n])} == {'head.weight', 'head.bias'}
    bundle = load_bundle(train(cohort, cache, prepared, config, tmp_path/'training').bundle_path)
    np.testing.assert_allclose((bundle.preprocessing.shift, bundle.preprocessing.scale), imagenet)
    assert bundle.spec['trained_on']['config']['pretrained'] == 'weights.safetensors'
