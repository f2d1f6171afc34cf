"""Training: the official trajectory, resume to the bit, and every way in which a run can go wrong."""

from __future__ import annotations

import copy
import errno
import io
import itertools
import json
import math
import os
import re
import resource
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import rounding
import torch
from PIL import Image
from rounding import SAME_IN_FLOAT64
from torch import Tensor

from hgad_fast import HGADConfig, HGADModel, ops
from hgad_fast.features import cache, extract
from hgad_fast.features.extract import FeatureSet, feature_set
from hgad_fast.protocol import Progress
from hgad_fast.scoring.calibration import calibrate_on, split
from hgad_fast.training import display, fit
from hgad_fast.training.checkpoint import CHECKPOINT, METRICS, MODEL, RUN
from hgad_fast.training.fit import NonFiniteLossError
from hgad_fast.training.processes import Processes
from hgad_fast.training.step import Step

DIMS = (8, 7)
SMALL = {
    "backbone_arch": None,
    "feature_levels": 2,
    "feature_dims": DIMS,
    "n_classes": 2,
    "n_intra_centers": 3,
    "coupling_layers": 2,
    "pos_embed_dim": 8,
    "msk_size": 16,
    "meta_epochs": 4,
    "sub_epochs": 2,
    "batch_size": 4,
    "lr": 1e-2,
}
TERMS = ("L_g", "L_mi", "L_e", "L_g_intra", "L_z")


def small_model(**changes) -> HGADModel:
    return HGADModel(HGADConfig(**SMALL | changes))


def images(n: int = 12, classes: int = 2) -> tuple[list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(1)
    levels = [torch.randn(n, c, size, size + 1, generator=generator) for c, size in zip(DIMS, (4, 2), strict=True)]
    return levels, torch.arange(n) % classes


# ---- the definition, written down again


def positional_code(h: int, w: int, dim: int) -> Tensor:
    """hgad.md, section 2: (h w, dim) in float64."""
    half = dim // 2
    code = np.zeros((h, w, dim))
    for i in range(half // 2):
        frequency = math.exp(-2 * i * math.log(1e4) / half)
        code[..., 2 * i], code[..., 2 * i + 1] = np.sin(np.arange(w) * frequency), np.cos(np.arange(w) * frequency)
        rows = np.arange(h)[:, None] * frequency
        code[..., half + 2 * i], code[..., half + 2 * i + 1] = np.sin(rows), np.cos(rows)
    return torch.from_numpy(code).reshape(h * w, dim)


def reference_terms(model: HGADModel, level: int, maps: list[Tensor], labels: list[int], stage: int) -> list[Tensor]:
    """hgad.md, section 3: the mean of each term over the pixels of all maps, in float64, every distance written out."""
    flow, config = model.nfs[level], model.config
    mu, delta, phi_inter, phi_intra = model.mixture.level(level)
    log_pi, log_w = phi_inter.log_softmax(0), phi_intra.log_softmax(1)
    e, classes = config.label_smoothing, config.n_classes
    per_pixel = []
    for features, y in zip(maps, labels, strict=True):
        c, h, w = features.shape
        position = positional_code(h, w, config.pos_embed_dim)
        z, log_det = ops.flow_definition(features.double().permute(1, 2, 0).reshape(-1, c), flow.blocks, position)
        d = -0.5 * (z[:, None] - mu).square().sum(-1)
        target = torch.full((classes,), e / classes, dtype=torch.float64)
        target[y] += 1 - e
        centres = torch.cat([mu[y : y + 1], mu[y] + delta[y]]).sub(mu[y]).add(mu[y].detach())
        own = torch.logsumexp(-0.5 * (z[:, None] - centres).square().sum(-1) + log_w[y], 1)
        posterior = d.softmax(1)
        terms = [
            -(torch.logsumexp(d + log_pi, 1) + log_det) / c,
            (target * ((d + log_pi.detach()).log_softmax(1) - log_pi.detach())).sum(1),
            -(posterior * posterior.log()).sum(1),
            -(own + log_det) / c,
            -torch.nn.functional.logsigmoid((own + log_det - c / 2 * math.log(2 * math.pi)) / c),
        ]
        per_pixel.append(torch.stack(terms[: 5 if stage == 2 else 3]))
    return list(torch.cat(per_pixel, 1).mean(1))


def reference_rate(config: HGADConfig, meta_epoch: int, done: float) -> float:
    """hgad.md, section 4; `done` is the part of the warm-up that has passed."""
    floor = config.lr * 1e-3
    m = max(meta_epoch, 2)
    cosine = floor + (config.lr - floor) * (1 + math.cos(math.pi * m / config.meta_epochs)) / 2
    return cosine if meta_epoch >= 2 else config.lr / 10 + done * (cosine - config.lr / 10)


def test_learning_rate_is_official():
    golden = np.load(Path(__file__).parents[1] / "golden" / "hgad_small.npz")["lr_schedule"]
    model = small_model(meta_epochs=25, sub_epochs=8, lr=2e-4)
    ours = [model.schedule(Progress(int(m), int(s), int(b), 4))[1] for m, s, b, _ in golden]
    np.testing.assert_allclose(ours, golden[:, 3], rtol=SAME_IN_FLOAT64)


@pytest.mark.parametrize("trained", [TERMS, TERMS[:3], TERMS[:1], ("L_g", "L_z")])
def test_trajectory_across_the_stage_switch_equals_plain_autograd(monkeypatch, trained):
    """Meta-epochs 0 to 3 (stage 2 from the third on) against one Adam over float64 autograd of the equations."""
    order: list[list[int]] = []
    batches = fit._Run._batches

    def recorded(self, passes):
        for indices in batches(self, passes):
            order.append(indices)
            yield indices

    monkeypatch.setattr(fit._Run, "_batches", recorded)
    model = small_model(calibration_fraction=0.0, loss_terms=trained).double()
    reference = copy.deepcopy(model)
    levels, ids = images(10)
    data = FeatureSet([[level[i] for level in levels] for i in range(10)], ids)
    with rounding.in_float64():
        history = model.fit(data)

    mixture = reference.mixture
    optimizer = torch.optim.Adam(
        [
            {"params": reference.nfs.parameters(), "weight_decay": 1e-4},
            {"params": mixture.parameters(), "weight_decay": 0.0},
        ],
        betas=(0.95, 0.99),
    )
    config, steps = reference.config, 2 * 2  # sub-epochs, batches a sub-epoch
    previous: list[list[float]] = []
    for step, indices in enumerate(order):
        meta_epoch, stage = step // steps, 2 if step >= 2 * steps and "L_z" in trained else 1
        for group in optimizer.param_groups:
            group["lr"] = reference_rate(config, meta_epoch, step / (2 * steps))
        optimizer.zero_grad()
        actual = []
        for level in range(2):
            terms = reference_terms(reference, level, [levels[level][i] for i in indices], ids[indices].tolist(), stage)
            weights = dict.fromkeys(TERMS, 1) | {"L_g": config.lambda1, "L_mi": -config.lambda2}
            weights = [weights[name] * (name in trained) for name in TERMS]
            sum(weight * term for weight, term in zip(weights, terms, strict=False)).backward()
            actual.append([term.item() for term in terms])
        optimizer.step()
        if step % 2:  # the records hold the means of two batches
            record = history.records[step // 2]
            assert record["stage"] == stage
            ours = [[level[name] for name in TERMS[: len(actual[0])]] for level in record["losses"]]
            np.testing.assert_allclose(ours, np.mean([previous, actual], 0), rtol=SAME_IN_FLOAT64)
        previous = actual
    assert len(order) == 16
    for (name, ours), theirs in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert (ours - theirs).norm() <= SAME_IN_FLOAT64 * theirs.norm(), name


@pytest.mark.parametrize(
    "class_ids, sizes",
    [
        ([0, 1, 0], [(3, 4)] * 3),  # fewer images than batch_size
        ([0] * 6, [(4, 4)] * 6),  # one class
        ([0, 0, 0, 0, 1, 2], [(4, 4), (2, 5), (4, 4), (5, 2), (3, 3), (2, 5)]),  # unequal classes, sizes mixed
    ],
)
def test_losses_of_odd_sets(class_ids, sizes):
    """A rate of 1e-30 moves nothing, so that every record shows the losses of the initial parameters."""
    classes = max(class_ids) + 1
    model = small_model(
        n_classes=classes, meta_epochs=3, sub_epochs=1, batch_size=6, lr=1e-30, calibration_fraction=0.0
    ).double()
    images = [[torch.randn(c, h, w) for c in DIMS] for h, w in sizes]
    reference = copy.deepcopy(model)
    data = FeatureSet(images, torch.tensor(class_ids))
    with rounding.in_float64():
        records = model.fit(data).records
    assert [record["stage"] for record in records] == [1, 1, 2]
    for record in records:
        for level, losses in enumerate(record["losses"]):
            maps = [image[level] for image in images]
            expected = reference_terms(reference, level, maps, class_ids, record["stage"])
            expected = [term.item() for term in expected]
            np.testing.assert_allclose(list(losses.values()), expected, rtol=SAME_IN_FLOAT64, atol=SAME_IN_FLOAT64)


# ---- what is trained on


class Recording(list):
    """A list that remembers what was asked of it."""

    def __init__(self, items):
        super().__init__(items)
        self.asked: list[int] = []

    def __getitem__(self, i):
        self.asked.append(i)
        return super().__getitem__(i)


def trained_on(model: HGADModel, **options) -> list[list[int]]:
    """Images that each sub-epoch asked for, of 22 of which the first 12 are class 0."""
    levels, ids = images(22)
    recording = Recording(FeatureSet.from_levels(levels, ids).images)
    passes = []

    def note(record):
        passes.append(recording.asked.copy())
        recording.asked.clear()

    features = FeatureSet(recording, torch.tensor([0] * 12 + [1] * 10))
    recording.asked.clear()
    model.fit(features, callbacks=[note], **options)
    return passes


@pytest.mark.filterwarnings("ignore:too few calibration images")
def test_batches_and_held_out_images():
    first, again, other = (trained_on(small_model(seed=seed)) for seed in (0, 0, 1))
    assert first == again
    assert first != other
    assert all(len(asked) == len(set(asked)) == 8 for asked in first)  # 11 of 22 are held out, 3 in each pass dropped
    assert len({tuple(asked) for asked in first}) == len(first)  # in another order in each pass
    used = set().union(*first)
    assert len(used) == 11 and sum(i < 12 for i in used) == 6  # half of either class

    model = small_model()
    trained_on(model)
    assert model.calibration.class_ids.tolist() == [0] * 6 + [1] * 5


@pytest.mark.filterwarnings("ignore:too few calibration images")
def test_calibration_on_other_images_holds_none_out():
    model = small_model()
    passes = trained_on(model, calibration=images(10))
    assert set().union(*passes) == set(range(22))
    assert len(model.calibration.scores) == 10
    assert model.config.calibration_fraction == 0.1  # a setting of the user's, which the next run may need


def test_fraction_0_trains_on_all_and_knows_no_p_values():
    model = small_model(calibration_fraction=0.0)
    assert set().union(*trained_on(model)) == set(range(22))
    assert model.calibration.level_max.isfinite().all()
    assert model.score_features(images(2)[0]).p_value.isnan().all()


@pytest.mark.filterwarnings("ignore:too few calibration images")
def test_global_random_state_is_neither_used_nor_changed():
    outcomes = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        model = small_model()
        model.fit(images())
        assert torch.equal(torch.get_rng_state(), before)
        outcomes.append(model.state_dict())
    assert_equal(*outcomes)


@pytest.mark.parametrize(
    "changes, options, message",
    [
        ({"n_classes": 3}, {}, "no images of 'class 2'"),
        ({}, {"false_alarm_rate": 0.0}, "false_alarm_rate"),
        ({}, {"cache": "disc"}, "cache is 'disc'"),
        ({}, {"resume": True}, "resume=True needs output_dir"),
    ],
)
def test_mistakes_are_told_before_the_training(changes, options, message):
    with pytest.raises(ValueError, match=message):
        small_model(**changes).fit(images(), callbacks=[lambda record: pytest.fail("was trained")], **options)


# ---- the backbone


@pytest.fixture
def photographs(tmp_path) -> Path:
    """Two classes of six and five noisy images of several sizes."""
    generator = np.random.default_rng(0)
    for name, count in (("ash", 6), ("oak", 5)):
        folder = tmp_path / "woods" / name
        folder.mkdir(parents=True)
        for i in range(count):
            noise = generator.integers(0, 256, (40 + 8 * (i % 2), 48, 3), dtype=np.uint8)
            Image.fromarray(noise).save(folder / f"{i}.png")
    return tmp_path / "woods"


def image_model(**changes) -> HGADModel:
    settings = {"backbone_arch": "test_efficientnet", "backbone_weights": None, "feature_dims": None, "img_size": 64}
    return small_model(**settings | {"meta_epochs": 3, "class_names": ("ash", "oak"), "out_indices": (2,)} | changes)


@pytest.mark.filterwarnings("ignore:too few calibration images")
@pytest.mark.parametrize("cache, calls", [("ram", 11), (None, 6 * 4 + 2 * 5)])
def test_features_are_extracted_once_and_the_backbone_stays(photographs, cache, calls):
    """Without a cache: 4 of the 6 training images in each of 6 passes, and twice the 5 held out."""
    model = image_model()
    before = {k: v.clone() for k, v in model.encoder.state_dict(keep_vars=True).items()}
    seen = []
    model.encoder.register_forward_hook(lambda *_: seen.append(model.encoder.training))

    def check(record):
        assert model.training and not any(module.training for module in model.encoder.modules())

    model.fit(photographs, cache=cache, callbacks=[check])
    assert len(seen) == calls and not any(seen)
    assert before.keys() == model.encoder.state_dict().keys()
    assert all(same_bits(v, before[k]) for k, v in model.encoder.state_dict().items())
    assert not model.training


@pytest.mark.filterwarnings("ignore:too few calibration images")
def test_computing_features_anew_changes_no_bit(photographs):
    kept, anew = image_model(), image_model()
    kept.fit(photographs)
    anew.fit(photographs, cache=None)
    assert_equal(kept.state_dict(), anew.state_dict())


@pytest.mark.filterwarnings("ignore:too few calibration images")
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_where_features_are_kept_changes_no_bit_also_of_a_resumed_run(photographs, tmp_path, dtype):
    """Killed with one cache, gone on with the next; the calibration images are on disk, too."""
    whole = image_model()
    whole.fit(photographs, calibration=photographs, cache_dtype=dtype)
    options = {"calibration": photographs, "cache_dtype": dtype, "data": photographs, "resume": True}
    for kept, stop in (("disk", (1, 0)), (None, (2, 0))):
        with pytest.raises(Killed):
            fit_to(tmp_path / "run", stop=stop, model=image_model(), cache=kept, **options)
    seen = []
    resumed = image_model()
    resumed.encoder.register_forward_hook(lambda *_: seen.append(1))
    fit_to(tmp_path / "run", model=resumed, cache="disk", **options)
    assert not seen and (tmp_path / "run" / "features").is_dir()
    assert_equal(resumed.state_dict(), whole.state_dict())
    assert_equal(resumed.calibration.tensors(), whole.calibration.tensors())
    other = {"float32": "float16", "float16": "float32"}[dtype]
    with pytest.raises(ValueError, match="features of another precision"):
        fit_to(tmp_path / "run", model=image_model(), **options | {"cache_dtype": other})


@pytest.mark.filterwarnings("ignore:too few calibration images")
def test_features_trained_on_are_rounded_and_those_calibrated_on_are_not(photographs):
    whole, half = image_model(), image_model()
    whole.fit(photographs)
    half.fit(photographs, cache_dtype="bfloat16")
    assert not torch.equal(half.mixture.mus[0], whole.mixture.mus[0])
    exact = feature_set(half, photographs)
    _, held_out = split(exact.class_ids, half.config.calibration_fraction, half.config.seed)
    actual = half.calibration.tensors()
    calibrate_on(half, exact.subset(held_out))
    assert_equal(half.calibration.tensors(), actual)


@pytest.mark.filterwarnings("ignore:too few calibration images")
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_training_goes_on_when_the_disk_of_the_cache_is_full(photographs, tmp_path, monkeypatch, code):
    monkeypatch.setattr(extract, "SHARD_IMAGES", 4)
    write, shards = cache._write_shard, []

    def fill(path, *arguments):
        if len(shards) == 2:
            raise OSError(code, os.strerror(code))
        shards.append(path)
        write(path, *arguments)

    monkeypatch.setattr(cache, "_write_shard", fill)
    model, expected = image_model(), image_model()
    message = rf"{os.strerror(code)}\); the features of 3 images are computed anew each time they are needed"
    with pytest.warns(UserWarning, match=message):
        model.fit(photographs, cache="disk", output_dir=tmp_path / "run")
    expected.fit(photographs)
    assert_equal(model.state_dict(), expected.state_dict())


# ---- files, resume


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.numpy().tobytes() == b.detach().numpy().tobytes()


def assert_equal(a, b):
    """Nested dicts and lists of tensors and values, to the bit."""
    if isinstance(a, Tensor):
        assert same_bits(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_equal(a[key], b[key])
    elif isinstance(a, list):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_equal(x, y)
    else:
        assert a == b


def without_times(records: list[dict]) -> list[dict]:
    return [{k: v for k, v in record.items() if k not in ("seconds", "images_per_second")} for record in records]


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]


class Killed(Exception):
    pass


def fit_to(folder: Path, *, stop: tuple[int, int] | None = None, model: HGADModel | None = None, **options):
    """Train in `folder`; a callback that also draws random numbers ends the run after sub-epoch `stop`."""
    drawn = []

    def callback(record):
        drawn.append(float(torch.rand(())))
        if stop == (record["meta_epoch"], record["sub_epoch"]):
            raise Killed

    torch.manual_seed(7)
    model = model or small_model(calibration_fraction=0.0)
    history = model.fit(options.pop("data", images()), output_dir=folder, callbacks=[callback], **options)
    return model, history, drawn


@pytest.mark.parametrize("stops", [[(0, 0)], [(1, 1)], [(2, 0), (2, 1), (3, 0)]])
def test_resume_is_bit_exact(tmp_path, stops):
    model, history, drawn = fit_to(tmp_path / "whole")
    for stop in stops:
        with pytest.raises(Killed):
            fit_to(tmp_path / "stopped", stop=stop, resume=True)
    torch.manual_seed(99)
    resumed, resumed_history, drawn_last = fit_to(tmp_path / "stopped", resume=True)

    assert_equal(model.state_dict(), resumed.state_dict())
    assert_equal(model.calibration.tensors(), resumed.calibration.tensors())
    assert without_times(history.records) == without_times(resumed_history.records)
    assert drawn[-len(drawn_last) :] == drawn_last  # callbacks see the random numbers of an uninterrupted run
    checkpoints = [torch.load(tmp_path / run / CHECKPOINT, weights_only=True) for run in ("whole", "stopped")]
    for checkpoint in checkpoints:
        checkpoint["history"] = without_times(json.loads(checkpoint["history"]))
    assert_equal(*checkpoints)
    for folder, records in ((tmp_path / "whole", history.records), (tmp_path / "stopped", resumed_history.records)):
        assert metrics(folder) == records
        assert sorted(os.listdir(folder)) == sorted([CHECKPOINT, METRICS, MODEL, RUN])


def test_resume_from_a_file_or_from_nothing(tmp_path):
    model, history, _ = fit_to(tmp_path / "a", resume=True)
    done, same, drawn = fit_to(tmp_path / "b", resume=str(tmp_path / "a" / CHECKPOINT))
    assert not drawn and same.records == history.records == metrics(tmp_path / "b")
    assert_equal(model.state_dict(), done.state_dict())
    with pytest.raises(ValueError, match="there is no checkpoint .*nowhere"):
        fit_to(tmp_path / "c", resume=tmp_path / "nowhere")


def test_a_new_run_replaces_the_files_of_an_older_one(tmp_path):
    """A second run from trained weights that dies at once is resumed as such, not as the finished first one."""
    model, _, _ = fit_to(tmp_path)
    twice = copy.deepcopy(model)
    twice.fit(images())
    with pytest.raises(Killed):
        fit_to(tmp_path, model=model, stop=(0, 0))
    assert len(metrics(tmp_path)) == 1
    resumed, history, _ = fit_to(tmp_path, resume=True)
    assert len(history.records) == len(metrics(tmp_path)) == 8
    assert_equal(resumed.state_dict(), twice.state_dict())


KILLED_AGAIN_AND_AGAIN = """
    import os, random, signal, sys
    from pathlib import Path
    import torch
    from hgad_fast import HGADConfig, HGADModel

    torch.set_num_threads(1)
    folder, kills, meta_epochs = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    levels = [torch.randn(12, 6, 3, 3, generator=torch.Generator().manual_seed(0))]
    chance = random.Random(kills)

    def run(name, callbacks=()):
        config = HGADConfig(
            n_classes=2, n_intra_centers=2, backbone_arch=None, feature_levels=1, feature_dims=(6,), coupling_layers=2,
            pos_embed_dim=4, meta_epochs=meta_epochs, sub_epochs=2, batch_size=6, msk_size=8, calibration_fraction=0,
        )
        data = levels, torch.arange(12) % 2
        HGADModel(config).fit(data, output_dir=folder / name, callbacks=callbacks, resume=True)

    def profiled(frame, event, argument):
        # A moment is a call of a function, in Python or in C, or its return.
        global moments
        moments += 1
        if moments == last_moment:
            os.kill(os.getpid(), signal.SIGKILL)

    def begin(record):
        if 2 * record["meta_epoch"] + record["sub_epoch"] + 1 >= records and sys.getprofile() is None:
            sys.setprofile(profiled)

    moments, last_moment, records = 0, -1, 1
    if os.fork() == 0:
        run("whole", [begin])
        sys.setprofile(None)
        (folder / "moments").write_text(str(moments))
        os._exit(0)
    assert os.wait()[1] == 0
    of_a_pass = int((folder / "moments").read_text()) // (2 * meta_epochs - 1)
    for records in sorted(chance.sample(range(1, 3 * meta_epochs // 2), kills)):
        last_moment = chance.randrange(1, 2 * of_a_pass)
        if os.fork() == 0:
            run("killed", [begin])
            os._exit(1)  # it came to its end unharmed
        status = os.wait()[1]
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, status
    run("killed")
"""


@pytest.mark.parametrize(("kills", "meta_epochs"), [(3, 16), pytest.param(30, 60, marks=pytest.mark.long)])
def test_killed_again_and_again(tmp_path, kills, meta_epochs):
    """SIGKILL at chance moments (of a pass, or of what is between two): the end is that of an uninterrupted run."""
    script = [sys.executable, "-c", textwrap.dedent(KILLED_AGAIN_AND_AGAIN), tmp_path, str(kills), str(meta_epochs)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(script, env=environment, capture_output=True, timeout=300 * kills)
    assert done.returncode == 0, done.stderr.decode()
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    assert_equal(HGADModel.load(killed / MODEL).state_dict(), HGADModel.load(whole / MODEL).state_dict())
    states = [torch.load(folder / CHECKPOINT, weights_only=True) for folder in (killed, whole)]
    assert_equal(states[0]["optimizer"], states[1]["optimizer"])
    assert without_times(metrics(killed)) == without_times(metrics(whole))
    passes = [(record["meta_epoch"], record["sub_epoch"]) for record in metrics(killed)]
    assert passes == [(m, s) for m in range(meta_epochs) for s in range(2)]
    assert sorted(os.listdir(killed)) == sorted([CHECKPOINT, METRICS, MODEL, RUN])  # no half-written leftovers


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("stopped")
    with pytest.raises(Killed):
        fit_to(folder, stop=(2, 0))
    return folder / CHECKPOINT


@pytest.mark.parametrize("keep", [0, 1, 1000, -30000, -1])
def test_truncated_checkpoint_is_refused(tmp_path, checkpoint, keep):
    content = checkpoint.read_bytes()
    (tmp_path / CHECKPOINT).write_bytes(content[:keep])
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path / CHECKPOINT} cannot be read as a training checkpoint")):
        fit_to(tmp_path, resume=True)


def test_damaged_checkpoint_is_refused(tmp_path, checkpoint):
    content = bytearray(checkpoint.read_bytes())
    with zipfile.ZipFile(checkpoint) as archive:
        tensor = max(archive.infolist(), key=lambda item: item.file_size)
    content[tensor.header_offset + tensor.file_size // 2] ^= 1
    (tmp_path / CHECKPOINT).write_bytes(content)
    with pytest.raises(ValueError, match=f"{CHECKPOINT} cannot be read as a training checkpoint"):
        fit_to(tmp_path, resume=True)


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("executed",)


@pytest.mark.parametrize("foreign", [{"epoch": 3}, [1, 2], Malicious()])
def test_foreign_checkpoint_is_refused(tmp_path, foreign, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(foreign, tmp_path / CHECKPOINT)
    with pytest.raises(ValueError, match=f"{CHECKPOINT} (is no|cannot be read as a) training checkpoint"):
        fit_to(tmp_path, resume=True)
    assert not (tmp_path / "executed").exists()


def another_image():
    levels, ids = images()
    levels[1][3, 2, 1, 0] += 1e-3
    return levels, ids


@pytest.mark.parametrize(
    "changes, data, message",
    [
        ({}, another_image(), "trained on other images"),
        ({}, (images()[0], 1 - images()[1]), "trained on other images"),
        ({}, images(11), "trained on other images"),
        ({"clip_grad_norm": 1.0}, images(), "another configuration: clip_grad_norm None -> 1.0"),
        ({"lr": 2e-2}, images(), "another configuration: lr 0.01 -> 0.02"),
        ({"seed": 5}, images(), "another configuration: seed 0 -> 5"),
        ({"coupling_layers": 3}, images(), "coupling_layers 2 -> 3"),
    ],
)
def test_checkpoint_of_another_run_is_refused(checkpoint, changes, data, message):
    model = small_model(calibration_fraction=0.0, **changes)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=f"{CHECKPOINT} was .*{message}"):
        model.fit(data, resume=checkpoint)
    assert_equal(before, model.state_dict())


@pytest.mark.filterwarnings("ignore:too few calibration images")
def test_checkpoint_of_another_split_is_refused(tmp_path):
    fit_to(tmp_path, model=small_model(), calibration=images(8))
    with pytest.raises(ValueError, match="held out others"):
        fit_to(tmp_path, model=small_model(), resume=True)


@pytest.mark.filterwarnings("ignore:too few calibration images")
def test_checkpoint_of_other_backbone_weights_is_refused(photographs, tmp_path):
    fit_to(tmp_path / "run", model=image_model(), data=photographs)
    _, history, drawn = fit_to(tmp_path / "run", model=image_model(), data=photographs, resume=True)
    assert len(history.records) == 6 and not drawn
    other = image_model()
    next(other.encoder.parameters()).data[0] += 1e-3
    with pytest.raises(ValueError, match="other backbone weights"):
        fit_to(tmp_path / "run", model=other, data=photographs, resume=True)


@pytest.mark.parametrize("part", ["model", "optimizer"])
@pytest.mark.parametrize("tampering", ["missing", "reshaped", "added"])
def test_checkpoint_with_other_tensors_is_refused(tmp_path, checkpoint, part, tampering):
    state = torch.load(checkpoint, weights_only=True)
    tensors = state["model"] if part == "model" else state["optimizer"]["param_groups"][0]
    key = "mixture.mus.1" if part == "model" else "params"
    if tampering == "missing":
        del tensors[key]
    elif tampering == "reshaped":
        tensors[key] = tensors[key][:-1]
    else:
        extra = "nfs.0.extra" if part == "model" else "params"
        tensors[extra] = tensors[key] if part == "model" else [*tensors[key], 1000]
    torch.save(state, tmp_path / CHECKPOINT)
    model = small_model(calibration_fraction=0.0)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=f"{CHECKPOINT} "):
        fit_to(tmp_path, model=model, resume=True)
    assert_equal(before, model.state_dict())


@pytest.mark.parametrize("lost", [("exp_avg",), ("exp_avg_sq",), ("step", "exp_avg", "exp_avg_sq"), "all"])
def test_checkpoint_without_moments_is_refused(tmp_path, checkpoint, lost):
    """torch's own Adam would take it, and start the moments anew."""
    state = torch.load(checkpoint, weights_only=True)
    moments = state["optimizer"]["state"]
    if lost == "all":
        moments.clear()
    else:
        for name in lost:
            del moments[3][name]
    torch.save(state, tmp_path / CHECKPOINT)
    with pytest.raises(ValueError, match=f"{CHECKPOINT} does not fit this optimizer: it lacks moments of "):
        fit_to(tmp_path, resume=True)


def test_what_only_costs_memory_may_change_on_resuming(tmp_path):
    levels, ids = images()
    data = FeatureSet([[level[i] for level in levels] for i in range(len(ids))], ids)

    def model(**changes) -> HGADModel:
        return small_model(calibration_fraction=0.0, **changes).double()

    with rounding.in_float64():
        whole, *_ = fit_to(tmp_path / "whole", model=model(), data=data)
        with pytest.raises(Killed):
            fit_to(tmp_path / "stopped", stop=(1, 0), model=model(), data=data)
        changed = model(memory="reversible", checkpoint_every=1, accumulate=2)
        fit_to(tmp_path / "stopped", model=changed, data=data, resume=True)
    for (name, a), b in zip(whole.named_parameters(), changed.parameters(), strict=True):
        torch.testing.assert_close(b, a, rtol=SAME_IN_FLOAT64, atol=SAME_IN_FLOAT64, msg=name)


def test_records_are_the_same_everywhere(tmp_path, monkeypatch):
    seen, looks = [], itertools.count(step=0.5)
    monkeypatch.setattr(fit, "time", SimpleNamespace(perf_counter=lambda: next(looks)))
    history = small_model(calibration_fraction=0.0).fit(images(), output_dir=tmp_path, callbacks=[seen.append])
    assert seen == history.records == metrics(tmp_path)
    for i, record in enumerate(seen):
        assert (record["meta_epoch"], record["sub_epoch"]) == divmod(i, 2)
        assert [list(level) for level in record["losses"]] == [list(TERMS[: 3 if i < 4 else 5])] * 2
        done = (i * 3 + 2) / 12  # at the last of 3 batches
        assert record["lr"] == pytest.approx(reference_rate(HGADConfig(**SMALL), i // 2, done), rel=1e-12)
        assert record["seconds"] == 2.0  # looks at the clock: at the start, after each of 3 batches, in the end
        assert record["images_per_second"] == 6.0


def test_checkpoint_after_every_meta_epoch(tmp_path):
    """Seen from the callbacks: the checkpoint holds the records up to the last full meta-epoch."""
    held = []

    def look(record):
        held.append(len(json.loads(torch.load(tmp_path / CHECKPOINT, weights_only=True)["history"])))

    small_model(calibration_fraction=0.0).fit(images(), output_dir=tmp_path, callbacks=[look])
    assert held == [0, 0, 2, 2, 4, 4, 6, 6]


def test_output_folder_is_made_and_does_not_depend_on_the_working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    model = small_model(calibration_fraction=0.0)
    model.fit(images(), output_dir="new/run", callbacks=[lambda record: os.chdir(tmp_path / "elsewhere")])
    assert sorted(os.listdir(tmp_path / "new" / "run")) == sorted([CHECKPOINT, METRICS, MODEL, RUN])
    assert not os.listdir(tmp_path / "elsewhere")
    assert_equal(HGADModel.load(tmp_path / "new" / "run" / MODEL).state_dict(), model.state_dict())


def test_output_folder_that_cannot_be_made(tmp_path, photographs):
    (tmp_path / "file").touch()
    model = image_model()
    model.encoder.register_forward_hook(lambda *_: pytest.fail("features were computed first"))
    with pytest.raises(OSError, match=re.escape(f"{tmp_path / 'file' / 'run'} cannot be written")):
        model.fit(photographs, output_dir=tmp_path / "file" / "run")


def test_full_disk_leaves_the_last_checkpoint(tmp_path):
    """The limit on a file's size stands for a disk that fills up in the third meta-epoch."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(record):
        if (record["meta_epoch"], record["sub_epoch"]) == (2, 1):
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))

    try:
        with pytest.raises(OSError, match=re.escape(f"{tmp_path / CHECKPOINT} cannot be written")):
            small_model(calibration_fraction=0.0).fit(images(), output_dir=tmp_path, callbacks=[fill])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert sorted(os.listdir(tmp_path)) == sorted([CHECKPOINT, METRICS])
    resumed, _, drawn = fit_to(tmp_path, resume=True)
    whole, _, _ = fit_to(tmp_path / "whole")
    assert len(drawn) == 4
    assert_equal(resumed.state_dict(), whole.state_dict())


# ---- divergence


@pytest.mark.parametrize("level", [0, 1])
def test_broken_feature_stops_the_run(tmp_path, level):
    levels, ids = images()
    levels[level][7, 2, 1, 1] = float("nan")
    model = small_model(calibration_fraction=0.0)
    order = torch.cat([torch.tensor(b) for b in fit._Run._batches(train_run(model, (levels, ids)), 0)])
    step = order.tolist().index(7) // 4
    with pytest.raises(NonFiniteLossError) as error:
        model.fit((levels, ids), output_dir=tmp_path)
    assert f"L_g of level {level} is nan at step {step};" in str(error.value)
    assert str(tmp_path / CHECKPOINT) in str(error.value)
    assert_last_good(tmp_path)


def train_run(model: HGADModel, data) -> fit._Run:
    step = Step(model, Processes())
    return fit._Run(model, feature_set(model, data), None, (), display.Display(False), step)


def assert_last_good(folder: Path) -> None:
    state = torch.load(folder / CHECKPOINT, weights_only=True)
    assert all(tensor.isfinite().all() for tensor in state["model"].values())
    assert sorted(os.listdir(folder)) == sorted([CHECKPOINT, METRICS])


def test_divergence_stops_the_run_and_its_checkpoint_can_be_resumed(tmp_path):
    settings = {"calibration_fraction": 0.0, "lr": 1e4, "meta_epochs": 10, "sub_epochs": 1}
    messages = []
    for _ in range(2):  # the resumed run comes to the same end
        with pytest.raises(NonFiniteLossError) as error:
            small_model(**settings).fit(images(), output_dir=tmp_path, resume=True)
        messages.append(str(error.value))
    assert messages[0] == messages[1]
    assert re.match(r"L_\w+ of level \d is (nan|-?inf) at step \d+; the last good checkpoint is /", messages[0])
    assert_last_good(tmp_path)


def test_last_step_of_a_meta_epoch_may_break_the_parameters(tmp_path):
    """The loss is taken before the step: finite, while a gradient that overflows ruins what the step leaves."""
    model = small_model(calibration_fraction=0.0, sub_epochs=1)
    steps = []
    offset = model.nfs[1].global_offset
    offset.register_hook(lambda gradient: gradient * (math.inf if steps.append(1) or len(steps) == 6 else 1))
    with pytest.raises(
        NonFiniteLossError, match=r"parameter nfs\.1\.global_offset is not finite after step 5; the last good"
    ):
        model.fit(images(), output_dir=tmp_path)
    assert_last_good(tmp_path)
    assert torch.load(tmp_path / CHECKPOINT, weights_only=True)["meta_epoch"] == 1


# ---- progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_bar(monkeypatch):
    """In 80 columns: counts, time left, rate, images/s and every loss term, the mean over the levels."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm")
    records = small_model(calibration_fraction=0.0, batch_size=12).fit(images()).records
    shown = re.sub(r"\x1b\[[0-9;?]*m", "", terminal.getvalue())  # colours
    lines = re.split(r"(?:[\r\n]|\x1b\[[0-9;?]*[A-Za-z])+", shown)  # a move of the cursor ends a line as well
    assert max(map(len, lines)) <= 80 and not any("…" in line for line in lines)
    bars = [line for line in lines if "8/8" in line]
    assert re.fullmatch(r"meta-epoch 3 ━+ 8/8 \d:\d\d:\d\d lr \d\.\de-\d\d  \d+ images/s\s*", bars[-1]), bars[-1]
    means = {name: np.mean([level[name] for level in records[-1]["losses"]]) for name in TERMS}
    assert lines[lines.index(bars[-1]) + 1].split() == [w for name in TERMS for w in (name, f"{means[name]:.3f}")]


def test_no_progress_without_a_terminal(capfd):
    small_model(calibration_fraction=0.0).fit(images())
    assert capfd.readouterr() == ("", "")
