"A training that is really killed, at many moments, ends with the bits of one that was not."
import multiprocessing, os, random, resource, signal, sys
from functools import partial
from pathlib import Path

import pytest

from strip_notebooks.core import file_hash

# Processes are forked from a server that has imported everything and computed nothing, so that a start takes no time.
context = multiprocessing.get_context('forkserver')
context.set_forkserver_preload(['strip_notebooks.training.classifier', 'strip_notebooks.splits', 'strip_notebooks.data.synthetic',
                                'strip_notebooks.data.cache', 'lightning_fabric', 'timm', 'torch.utils.tensorboard', 'albumentations', 'cv2'])

settings = dict(arch='simple_cnn', epochs=3, batch_size=8, policy='light', lr=2e-3, dropout=.2, ema=.9, mixup=.2,
                label_smoothing=.1, accumulate=2, balance='class', precision='32-true', device='cpu')


# What runs in the processes

def prepare(folder):
    "A cohort with splits and its cache, in this process"
    from strip_notebooks.data.cache import build_cache
    from strip_notebooks.data.preprocess import Preprocessing
    from strip_notebooks.data.synthetic import make_cohort
    from strip_notebooks.splits import split_patients
    cohort = split_patients(make_cohort(folder, 'easy', n_patients=32, size=128, seed=3), (.5, .25, .25))
    cache = build_cache(cohort, Preprocessing(size=48), Path(folder)/'cache')
    (Path(folder)/'where').write_text(str(cache.folder))
    cohort.to_csv(Path(folder)/'splits.csv', index=False)

def material(folder):
    "The cohort, its cache and its preprocessing, as `prepare` left them"
    import pandas as pd
    from strip_notebooks.data.cache import Cache
    cohort = pd.read_csv(Path(folder)/'splits.csv', dtype={c: str for c in ('image_id', 'patient_id', 'center_id')})
    cache = Cache((Path(folder)/'where').read_text())
    return cohort, cache, cache.preprocessing

def run(cohort_folder, folder, before=None, threads=1, on_epoch=None, **more):
    "Train in a process of its own; `before` is called when the training is about to start"
    import torch
    from strip_notebooks.training.classifier import make_config, train
    torch.set_num_threads(threads)
    cohort,cache,preprocessing = material(cohort_folder)
    if before: before()
    result = train(cohort, cache, preprocessing, make_config(**{**settings, **more}), folder, on_epoch)
    sys.setprofile(None)
    result.predictions.to_csv(Path(folder)/'predictions.csv', index=False)

def count_calls(report=None, deadly=None):
    "Count the calls of functions of the library; send SIGKILL at number `deadly`, and write the count so far to `report`"
    import strip_notebooks
    ours = str(Path(strip_notebooks.__file__).parent)
    calls = [0]
    def count(frame, event, arg):
        if event != 'call' or not frame.f_code.co_filename.startswith(ours): return
        calls[0] += 1
        if calls[0] == deadly: os.kill(os.getpid(), signal.SIGKILL)
        if report: Path(report).write_text(str(calls[0]))
    sys.setprofile(count)

def kill_at(name, when):
    "Send SIGKILL before or after a file whose name starts with `name` takes its place"
    real = os.replace
    def deadly(source, target):
        at_it = Path(target).name.startswith(name)
        if at_it and when == 'before': os.kill(os.getpid(), signal.SIGKILL)
        real(source, target)
        if at_it: os.kill(os.getpid(), signal.SIGKILL)
    os.replace = deadly

def run_to_a_sentence(cohort_folder, folder, **more):
    "Train until an error of ours, and leave its text beside the training"
    from strip_notebooks.core import StripError
    try: run(cohort_folder, folder, **more)
    except StripError as e:
        (Path(folder).parent/'sentence').write_text(str(e))
        sys.exit(1)

def fill_the_disk(history):
    "From the end of the second epoch on, no file may grow beyond a megabyte"
    if len(history) == 2: resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


# What the tests ask of them

def finish(target, *args, **kwargs):
    "The exit code of a process"
    process = context.Process(target=target, args=args, kwargs=kwargs)
    process.start()
    process.join(100)
    if process.exitcode is None: process.kill()
    return process.exitcode

def result(folder):
    "What a training left: the hashes of bundle and predictions, and the content of its last checkpoint"
    from strip_notebooks.training.trainer import checkpoints, read_state
    assert not list(Path(folder).rglob('.*')), 'something half-written is left'
    tensors,about = read_state(checkpoints(Path(folder)/'checkpoints')[-1])
    files = [*sorted((Path(folder)/'bundle').iterdir()), Path(folder)/'predictions.csv']
    return {p.name: file_hash(p) for p in files}, {k: v.numpy().tobytes() for k,v in tensors.items()}, about['history']

@pytest.fixture(scope='module')
def cohort(tmp_path_factory):
    "The folder of a cohort and its cache"
    folder = tmp_path_factory.mktemp('cohort')
    prepare(folder)
    return folder

@pytest.fixture(scope='module')
def reference(cohort, tmp_path_factory):
    "What a training left that nothing disturbed"
    folder = tmp_path_factory.mktemp('whole')/'training'
    assert finish(run, cohort, folder) == 0
    return result(folder)

@pytest.fixture(scope='module')
def calls(cohort, tmp_path_factory):
    "How many calls a whole training makes, and how many one that has nothing left to do"
    folder,report = tmp_path_factory.mktemp('counted')/'training',tmp_path_factory.mktemp('calls')/'count'
    counts = []
    for _ in range(2):
        assert finish(run, cohort, folder, before=partial(count_calls, report)) == 0
        counts.append(int(report.read_text()))
    assert counts[0] > 2*counts[1] > 0
    return counts


# Killed

@pytest.mark.parametrize('seed', range(4))
def test_killed_at_random_moments_twice(cohort, reference, calls, tmp_path, seed):
    "Anywhere in the work of the library, then anywhere in the work that is left in any case"
    rng = random.Random(seed)
    for most in calls:
        deadly = partial(count_calls, deadly=rng.randint(1, most))
        assert finish(run, cohort, tmp_path/'training', before=deadly) == -signal.SIGKILL
    assert finish(run, cohort, tmp_path/'training') == 0
    assert result(tmp_path/'training') == reference

@pytest.mark.parametrize('name, when', [('epoch-000002', 'before'), ('epoch-000002', 'after'), ('weights', 'before'), ('weights', 'after'),
                                        ('bundle.json', 'before'), ('bundle.json', 'after')])
def test_killed_while_a_file_is_written(cohort, reference, tmp_path, name, when):
    "Complete and on disk but without its name, and the moment it has its name; and the same again when it is resumed"
    folder = tmp_path/'training'
    for attempt in range(2):
        # once the file is complete, the second attempt need not write it again, and gets through
        assert finish(run, cohort, folder, before=partial(kill_at, name, when)) in ([-signal.SIGKILL] if attempt == 0 or when == 'before' else [-signal.SIGKILL, 0])
        there = [p.name for p in folder.rglob(f'*{name}*')]
        assert any(n.startswith('.') for n in there) == (when == 'before')
        assert any(n.startswith(name) for n in there) == (when == 'after')
    assert finish(run, cohort, folder) == 0
    assert result(folder) == reference

def test_another_number_of_threads_changes_nothing(cohort, reference, tmp_path):
    "Killed after the second checkpoint, and resumed where torch would take two threads instead of one"
    assert finish(run, cohort, tmp_path/'training', before=partial(kill_at, 'epoch-000002', 'after')) == -signal.SIGKILL
    assert finish(run, cohort, tmp_path/'training', threads=2) == 0
    assert result(tmp_path/'training') == reference

def test_workers_change_nothing(cohort, reference, tmp_path):
    assert finish(run, cohort, tmp_path/'training', workers=1) == 0
    assert result(tmp_path/'training') == reference

def test_a_full_disk_is_an_error_that_costs_one_epoch(cohort, reference, tmp_path):
    folder = tmp_path/'training'
    assert finish(run_to_a_sentence, cohort, folder, on_epoch=fill_the_disk) == 1
    said = (tmp_path/'sentence').read_text()
    assert 'epoch-000003.safetensors could not be written' in said and 'free disk space' in said and str(tmp_path) not in said
    from strip_notebooks.training.trainer import checkpoints, read_state
    assert not list(folder.rglob('.*'))
    assert len(read_state(checkpoints(folder/'checkpoints')[-1])[1]['history']) == 2
    assert finish(run, cohort, folder) == 0
    assert result(folder) == reference


# In this process, interrupted by an exception

class Interruption(Exception): pass

def interrupted_and_whole(cohort, tmp_path, at=1, **more):
    "The results of a training that is interrupted after epoch `at` and resumed, and of one that is not"
    from strip_notebooks.training.classifier import make_config, train
    def interrupt(history):
        if len(history) == at: raise Interruption
    images,cache,preprocessing = material(cohort)
    config = make_config(**{**settings, **more})
    whole = train(images, cache, preprocessing, config, tmp_path/'whole')
    with pytest.raises(Interruption): train(images, cache, preprocessing, config, tmp_path/'broken', interrupt)
    again = train(images, cache, preprocessing, config, tmp_path/'broken')
    assert again.history.equals(whole.history) and again.predictions.equals(whole.predictions)
    assert file_hash(again.bundle_path/'weights.safetensors') == file_hash(whole.bundle_path/'weights.safetensors')
    assert file_hash(again.bundle_path/'bundle.json') == file_hash(whole.bundle_path/'bundle.json')
    return whole

def test_unfreezing_continues(cohort, tmp_path):
    from safetensors.torch import load_file
    whole = interrupted_and_whole(cohort, tmp_path, trainable='head', unfreeze_every=1, mixup=0.)
    assert len(whole.history) == 3
    names = load_file(whole.bundle_path/'weights.safetensors')
    assert 'head.weight' in names

def test_the_plateau_continues(cohort, tmp_path):
    "The rate falls after four epochs without a better score, of which two lie before the interruption"
    whole = interrupted_and_whole(cohort, tmp_path, at=2, schedule='plateau', lr=1e-12, ema=0., norm_batches=0, epochs=7)
    assert whole.history.lr.iloc[0] == 1e-12 and whole.history.lr.iloc[-1] == pytest.approx(5e-13, rel=1e-9)

def test_patience_continues(cohort, tmp_path):
    whole = interrupted_and_whole(cohort, tmp_path, at=2, patience=2, monitor='auc', lr=1e-12, ema=0., norm_batches=0, epochs=9)
    assert len(whole.history) == 3

def test_norms_continue_and_the_plateau_lowers_the_rate_of_a_constant_auc(cohort, tmp_path):
    """Without a running mean of the weights, the measured statistics are those of the network that trains on; an AUC that
    never improves is negative for the schedule, of which torch's relative threshold makes an improvement"""
    import torch
    from strip_notebooks.training.config import TrainerConfig
    from strip_notebooks.training.trainer import Trainer
    interrupted_and_whole(cohort, tmp_path, at=2, ema=0., norm_batches=2)
    task = bag_task()
    task.better, task.scores = dict(auc='high'), lambda logits: dict(auc=.7)
    config = TrainerConfig(epochs=6, schedule='plateau', monitor='auc', lr=.01, precision='32-true', device='cpu')
    assert Trainer(task, config, tmp_path/'plateau').fit().lr.tolist() == [.01]*5 + [.005]

def test_bf16_continues(cohort, tmp_path):
    whole = interrupted_and_whole(cohort, tmp_path, precision='bf16-mixed', epochs=2)
    exact = interrupted_and_whole(cohort, tmp_path/'exact', epochs=2)
    assert whole.history.train_loss.tolist() != exact.history.train_loss.tolist()
    assert whole.history.train_loss.tolist() == pytest.approx(exact.history.train_loss.tolist(), abs=.05)

def test_frozen_features_continue_and_move_the_head_alone(cohort, tmp_path):
    "The bundle holds the whole network: the body with the bits of its start, and a head that has learned"
    import torch
    from strip_notebooks.bundle import load_bundle
    from strip_notebooks.training.classifier import FrozenClassifier, make_config
    from strip_notebooks.training.trainer import Trainer
    frozen = dict(features='frozen', mixup=0.)
    whole = interrupted_and_whole(cohort, tmp_path, **frozen)
    config = make_config(**{**settings, **frozen})
    task = FrozenClassifier(*material(cohort), config)
    Trainer(task, config, tmp_path/'start')
    start,learned = task.body.state_dict(),load_bundle(whole.bundle_path).model.state_dict()
    assert [n for n in start if not torch.equal(start[n], learned[n])] == ['head.weight', 'head.bias']

def test_frozen_features_are_killed_and_resume(cohort, tmp_path):
    more = dict(features='frozen', mixup=0.)
    assert finish(run, cohort, tmp_path/'whole', **more) == 0
    for when in ('before', 'after'):
        killed = partial(kill_at, 'epoch-000002', when)
        assert finish(run, cohort, tmp_path/when, before=killed, **more) == -signal.SIGKILL
        assert finish(run, cohort, tmp_path/when, **more) == 0
        assert result(tmp_path/when) == result(tmp_path/'whole')

def test_frozen_features_predict_what_the_frozen_network_predicts(cohort, tmp_path):
    import numpy as np
    from strip_notebooks.training.classifier import make_config, train
    same = {**settings, **dict(policy='none', mixup=0., dropout=0., trainable='head')}
    results = [train(*material(cohort), make_config(**same, features=f), tmp_path/f) for f in ('trained', 'frozen')]
    through,on_features = (r.predictions.p_LAA for r in results)
    np.testing.assert_allclose(through, on_features, rtol=0, atol=1e-4)

def test_a_network_with_more_than_a_linear_head_is_not_trained_on_features(cohort, monkeypatch):
    from strip_notebooks.models import ModelError, SimpleCNN
    from strip_notebooks.training.classifier import FrozenClassifier, make_config
    monkeypatch.setattr(SimpleCNN, 'forward', lambda self, x: 2*self.forward_head(self.forward_features(x)) + 1)
    task = FrozenClassifier(*material(cohort), make_config(features='frozen'))
    with pytest.raises(ModelError, match="simple_cnn does more than a linear layer .* trainable='head'"): task.network()

@pytest.fixture
def downloaded(tmp_path):
    "What a model of the hub consists of, in a folder: weights, with a head for two classes, and config.json beside them"
    import json, timm, torch
    from safetensors.torch import save_file
    torch.manual_seed(1)
    model = timm.create_model('test_vit', num_classes=2, dynamic_img_size=True, init_values=1e-5)
    path = tmp_path/'downloaded'/'model.safetensors'
    path.parent.mkdir()
    save_file(model.state_dict(), path)
    about = dict(architecture='test_vit', model_args=dict(dynamic_img_size=True, init_values=1e-5),
                 pretrained_cfg=dict(mean=[.7, .5, .6], std=[.2, .3, .25]))
    path.with_name('config.json').write_text(json.dumps(about))
    return path

def test_a_downloaded_model_of_the_hub_is_trained_without_the_hub(cohort, downloaded, tmp_path, monkeypatch):
    """Its arguments and its normalization come from the config.json, its weights from the file, its head from nowhere: the
    file's head has the same size, and is another task's. The bundle needs neither file nor hub."""
    import torch
    from safetensors.torch import load_file
    from strip_notebooks import models
    from strip_notebooks.bundle import load_bundle
    monkeypatch.setattr(models, '_download', lambda *_: pytest.fail('the hub is asked'))
    more = dict(arch='hf-hub:somebody/clots', pretrained=str(downloaded), features='frozen', mixup=0.)
    whole = interrupted_and_whole(cohort, tmp_path, **more)
    weights = load_file(downloaded)
    downloaded.unlink()
    bundle = load_bundle(whole.bundle_path)
    learned = bundle.model.state_dict()
    assert bundle.spec['arch'] == 'test_vit(dynamic_img_size=True, init_values=1e-05)'
    assert (bundle.preprocessing.shift, bundle.preprocessing.scale) == ((.7, .5, .6), (.2, .3, .25))
    assert learned.keys() == weights.keys()
    assert {n for n in weights if not torch.equal(weights[n], learned[n])} == {'head.weight', 'head.bias'}

def test_the_head_of_another_task_is_not_taken_over(downloaded):
    import torch
    from safetensors.torch import load_file
    from strip_notebooks.models import ModelError, create_model
    weights = load_file(downloaded)
    net = create_model('hf-hub:somebody/clots', 2, pretrained=str(downloaded))
    assert net.head.weight.shape == weights['head.weight'].shape and not torch.equal(net.head.weight, weights['head.weight'])
    assert torch.equal(net.patch_embed.proj.weight, weights['patch_embed.proj.weight'])
    with pytest.raises(ModelError, match='does not fit .* give weights of the same architecture'): create_model('test_vit', 2, pretrained=str(downloaded))

def test_a_corrupt_last_checkpoint_falls_back_and_says_so(cohort, tmp_path, capsys):
    from strip_notebooks.training.classifier import make_config, train
    from strip_notebooks.training.trainer import checkpoints
    images,cache,preprocessing = material(cohort)
    whole = train(images, cache, preprocessing, make_config(**settings), tmp_path/'training')
    weights = file_hash(whole.bundle_path/'weights.safetensors')
    last = checkpoints(tmp_path/'training'/'checkpoints')[-1]
    data = bytearray(last.read_bytes())
    data[-1000] ^= 1
    last.write_bytes(data)
    (whole.bundle_path/'bundle.json').unlink()
    again = train(images, cache, preprocessing, make_config(**settings), tmp_path/'training')
    assert 'epoch-000003.safetensors is corrupt (ValueError). Resuming from the checkpoint before it.' in capsys.readouterr().out
    assert again.history.equals(whole.history) and file_hash(again.bundle_path/'weights.safetensors') == weights

@pytest.mark.parametrize('loss', ['cross_entropy', 'weighted_cross_entropy'])
def test_accumulated_batches_equal_one_large_batch(cohort, tmp_path, loss):
    """Batches of unequal size, and of unequal weight where the loss is weighted. Normalization is frozen, as it sees each
    batch alone"""
    import torch
    from strip_notebooks.training.classifier import make_config, train
    from strip_notebooks.bundle import load_bundle
    images,cache,preprocessing = material(cohort)
    rows = images.index[images.split == 'train']
    keep = len(rows) - (len(rows) - 9)%12                   # of 12, 9 are left for the last step: batches of 6 and 3
    images = images.drop(rows[keep:])
    assert (images.split == 'train').sum()%12 == 9
    heads = []
    for size,accumulate in [(12, 1), (6, 2)]:
        config = make_config(**{**settings, **dict(batch_size=size, accumulate=accumulate, trainable='head', policy='none', mixup=0., dropout=0., ema=0.,
                                                   balance='', optimizer='sgd', lr=.1, loss=loss, clip=0., epochs=2)})
        bundle = load_bundle(train(images, cache, preprocessing, config, tmp_path/str(accumulate)).bundle_path)
        heads.append(bundle.model.head.weight.detach())
    torch.testing.assert_close(*heads, rtol=0, atol=1e-6)


# A second kind of task, without a change to the trainer

def bag_task():
    "Bags of 2 to 9 vectors, mean pooling"
    import numpy as np, torch
    from torch import nn
    from strip_notebooks.training.trainer import Task

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed,self.head = nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Dropout(.2)),nn.Linear(16, 2)
        def forward(self, bags): return self.head(torch.stack([self.embed(bag).mean(0) for bag in bags]))

    class Loader:
        def __init__(self, bags, targets): self.bags,self.targets,self.epoch = bags,targets,0
        def set_epoch(self, epoch): self.epoch = epoch
        def __len__(self): return 4
        def __iter__(self):
            for at in np.array_split(np.random.default_rng(self.epoch).permutation(len(self.bags)), 4):
                yield dict(bags=[self.bags[i] for i in at], target=self.targets[torch.from_numpy(at)])

    class Bags(Task):
        def __init__(self):
            rng = np.random.default_rng(0)
            self.targets = torch.arange(24)%2
            self.bags = [torch.tensor(rng.normal(size=(rng.integers(2, 10), 5)) + [1.5*int(t), 0, 0, 0, 0], dtype=torch.float32) for t in self.targets]
        def network(self): return Net()
        def loaders(self): return Loader(self.bags[:16], self.targets[:16]), Loader(self.bags[16:], self.targets[16:])
        def size(self, batch): return len(batch['bags'])
        def logits(self, model, batch): return model(batch['bags'])
        def loss(self, model, batch, seed): return nn.functional.cross_entropy(self.logits(model, batch), batch['target'])
        def scores(self, logits): return dict(loss=logits.square().mean().item())
        def fingerprint(self): return 'bags'
    return Bags()

def run_bags(folder, before=None):
    import numpy as np, torch
    from strip_notebooks.training.config import TrainerConfig
    from strip_notebooks.training.trainer import Trainer
    torch.set_num_threads(1)
    if before: before()
    task = bag_task()
    trainer = Trainer(task, TrainerConfig(epochs=4, ema=.5, accumulate=3, lr=.01, precision='32-true', device='cpu'), folder)
    trainer.fit()
    with torch.inference_mode(): logits = trainer.best_model()(task.bags)
    np.save(Path(folder)/'logits.npy', logits.numpy())

def test_a_task_of_bags_is_killed_and_resumes(tmp_path):
    assert finish(run_bags, tmp_path/'whole') == 0
    for when in ('before', 'after'):
        for name in ('epoch-000001', 'epoch-000003'):
            assert finish(run_bags, tmp_path/when, before=partial(kill_at, name, when)) == -signal.SIGKILL
        assert finish(run_bags, tmp_path/when) == 0
        for name in ('logits.npy', 'epoch-000004.safetensors'): assert file_hash(tmp_path/when/name) == file_hash(tmp_path/'whole'/name)


# Settings, scores, figures, hooks

def test_the_parameters_of_train_are_those_of_its_settings():
    from strip_notebooks.experiments import experiment_parameters, experiment_path
    from strip_notebooks.training.config import TrainConfig, parameter_type
    cell = experiment_parameters(experiment_path('train'))
    fields = {n: dict(type=parameter_type(f.annotation), default=f.default, help=f.description) for n,f in TrainConfig.model_fields.items()}
    assert {n: p for n,p in cell.items() if n != 'prepare_run'} == fields

def test_a_constant_model_is_never_better():
    import numpy as np, pandas as pd
    from strip_notebooks.training.classifier import patient_scores
    label = ['LAA']*28 + ['CE']*72
    def scores(p): return patient_scores(pd.DataFrame(dict(label=label, p_CE=1-p, p_LAA=p)), ['CE', 'LAA'], [.72, .28])
    constant,weak = scores(np.full(100, .28)),scores(np.r_[np.full(28, .32), np.full(72, .27)])     # the weak one never predicts LAA either
    assert weak['weighted_log_loss'] < constant['weighted_log_loss'] and weak['auc'] > constant['auc']
    assert scores(np.full(100, .01))['weighted_log_loss'] > constant['weighted_log_loss']           # always CE, and sure of it

@pytest.mark.parametrize('arch', ['simple_cnn', 'resnet18', 'efficientnet_b0', 'vit_tiny_patch16_224'])
def test_any_layer_takes_a_backward_hook(arch):
    "And what a forward hook kept is not overwritten by the next layer"
    import torch
    from strip_notebooks.models import create_model
    model = create_model(arch).eval()
    kept,gradients = {},set()
    def keep(module, inputs, output): kept[module] = (output, output.detach().clone())
    for module in model.modules():
        module.register_forward_hook(keep)
        module.register_full_backward_hook(lambda m, i, o: gradients.add(m))
    model(torch.rand(1, 3, 224, 224)).sum().backward()
    assert len(kept) > 10 and set(kept) == gradients
    assert all(torch.equal(now, then) for now,then in kept.values())

def test_the_live_curve_is_one_picture_in_jupyter(monkeypatch):
    "Redrawn in place, and not shown again when the cell ends"
    from nbclient import NotebookClient
    from nbformat.v4 import new_code_cell, new_notebook
    monkeypatch.delenv('STRIP_PROGRESS', raising=False)
    rows = [dict(epoch=e, train_loss=.7/e, weighted_log_loss=.7, auc=.6, lr=.1) for e in (1, 2, 3)]
    code = f"""import pandas as pd
from strip_notebooks.training.classifier import LiveCurve
live = LiveCurve(3)
for n in (1, 2, 3): live(pd.DataFrame({rows}[:n]))"""
    notebook = new_notebook(cells=[new_code_cell(code)])
    NotebookClient(notebook, kernel_name='python3').execute()
    assert [list(o.data) for o in notebook.cells[0].outputs] == [['text/plain', 'image/png']]
