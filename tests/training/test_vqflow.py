"""Training of VQ-Flow: codes stay alive, runs resume to the bit, processes agree, and looking on changes nothing."""

from __future__ import annotations

import copy
import json
import os
import re
import socket
import subprocess
import sys
import textwrap
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import rounding
import torch
from rounding import SAME_IN_FLOAT64
from small_vqflow import (
    DIMS,
    SMALL,
    assert_same_scores,
    assert_same_state,
    class_features,
    labels,
    small_config,
    small_model,
    stirred,
)
from torch import Tensor

from hgad_fast import VQFlowConfig, VQFlowModel
from hgad_fast.features.extract import FeatureSet
from hgad_fast.modules.codebook import Codebook
from hgad_fast.modules.synchronised import BatchNorm
from hgad_fast.training.checkpoint import CHECKPOINT, METRICS, MODEL
from hgad_fast.training.fit import NonFiniteLossError
from hgad_fast.training.processes import Processes
from hgad_fast.training.step import Step

ROOT = Path(__file__).parents[2]


def prepared(n: int = 12, **options: Any) -> FeatureSet:
    """Return the features of `class_features`, pooled as a model of the default `pool_type` does."""
    levels = small_model().prepare(class_features(n, **options))
    return FeatureSet.from_levels(levels, labels(n))


def batch_of(features: FeatureSet, numbers: range) -> tuple[list[list[Tensor]], Tensor]:
    return [features.images[i] for i in numbers], features.class_ids[list(numbers)]


def codebooks(model: VQFlowModel) -> list[Codebook]:
    return [module for module in model.modules() if isinstance(module, Codebook)]


# ---- what training comes to


@pytest.mark.parametrize("as_tuple", [True, False])
def test_codes_stay_alive_and_the_loss_falls(as_tuple: bool) -> None:
    """Three classes far apart get prototypes of their own; nobody told the model which image is of which."""
    model = small_model(meta_epochs=4)
    records = model.fit((class_features(), labels()) if as_tuple else prepared()).records
    assert model.purity == 1
    assert int((model.prototype_images.sum(1) > 0).sum()) >= 3
    assert model.prototype_images.sum(0).tolist() == [4, 4, 4]
    losses = [record["losses"][0] for record in records]
    assert list(losses[0]) == ["L_nll", "L_prototype", "L_pattern", "prototypes", "patterns"]
    assert losses[-1]["L_nll"] < losses[0]["L_nll"] - 0.1
    assert losses[-1]["patterns"] > 3 and 3 < losses[-1]["prototypes"] <= 6
    levels = model.prepare(class_features())
    with torch.no_grad():
        conditions = model.eval().conditions(levels).levels
    assert all(len(condition.indices.unique()) >= 2 for condition in conditions)
    assert not model.training


def test_the_official_procedure_collapses_to_a_prototype_or_two() -> None:
    """What the default settings mend: random codes with counts of 0 (docs/vqflow.md)."""
    model = VQFlowModel(VQFlowConfig.official(**SMALL))
    records = model.fit((class_features(), labels())).records
    assert int((model.prototype_images.sum(1) > 0).sum()) <= 2
    assert model.purity < 0.7
    assert records[-1]["losses"][0]["prototypes"] < 2


def test_tuples_are_pooled_and_sets_are_taken_as_they_are() -> None:
    models = [small_model(meta_epochs=1), small_model(meta_epochs=1)]
    models[0].fit((class_features(), labels()))
    models[1].fit(prepared())
    assert_same_state(models[0].state_dict(), models[1].state_dict())


def test_labels_change_no_weight() -> None:
    models = [small_model(meta_epochs=1), small_model(meta_epochs=1)]
    models[0].fit((class_features(), labels()))
    models[1].fit((class_features(), torch.full((12,), 70)))  # of a dataset with other classes
    states = [model.state_dict() for model in models]
    counts = [state.pop("prototype_images") for state in states]
    assert_same_state(*states)
    assert int(counts[0].sum()) == 12 and int(counts[1].sum()) == 0


def test_the_start_is_taken_from_the_first_batches_and_leaves_the_batch_norms() -> None:
    """Latents of the level are standard where training begins, and codes are vectors of the data."""
    model = small_model(meta_epochs=1)
    before = copy.deepcopy(model.state_dict())
    model.begin(prepared())
    for name, tensor in model.state_dict().items():
        is_start = "quantizer" in name or name.startswith("prior.")
        assert is_start or torch.equal(tensor, before[name]), name
    assert all(torch.equal(book.cluster_size, torch.ones(book.size)) for book in codebooks(model))
    assert all(int(book.updates) == 0 for book in codebooks(model))
    # 12 images in two batches of 6, normalised within their batch, as in training
    order = torch.randperm(12, generator=torch.Generator().manual_seed(model.config.seed)).tolist()
    images = prepared().images
    conditions = copy.deepcopy(model.conditions).train()
    for book in conditions.modules():
        if isinstance(book, Codebook):
            book.eval()
    latents: list[list[Tensor]] = [[] for _ in DIMS[:-1]]
    with torch.no_grad():
        for batch in (order[:6], order[6:]):
            levels = [torch.stack(level) for level in zip(*(images[i] for i in batch), strict=True)]
            found = conditions(levels)
            for level, (z, _) in enumerate(model._parallel(levels, found)):
                mean, std = model.prior(found.prototype, level)
                latents[level].append(((z - mean[:, None, None]) / std[:, None, None]).flatten(0, 2))
    for parts in latents:
        z = torch.cat(parts)
        assert z.mean(0).abs().max() < 1e-3  # sums over 48 pixels or more, in float32
        assert (z.std(0) - 1).abs().max() < 1e-3


# ---- resume


class Killed(Exception):
    pass


def kill_in(meta_epoch: int, sub_epoch: int) -> Callable[[dict[str, Any]], None]:
    def callback(record: dict[str, Any]) -> None:
        if (record["meta_epoch"], record["sub_epoch"]) == (meta_epoch, sub_epoch):
            raise Killed

    return callback


@pytest.mark.parametrize("official", [False, True])
def test_resume_is_bit_exact(tmp_path: Path, official: bool) -> None:
    """Killed in the second meta-epoch: weights, codebooks, their counts of batches, and batch norms."""
    config = VQFlowConfig.official(**SMALL) if official else small_config()
    data = class_features(13), labels(13)
    whole = VQFlowModel(config)
    whole.fit(data, output_dir=tmp_path / "whole")
    with pytest.raises(Killed):
        VQFlowModel(config).fit(data, output_dir=tmp_path / "killed", callbacks=[kill_in(1, 0)])
    resumed = VQFlowModel(config)
    history = resumed.fit(data, output_dir=tmp_path / "killed", resume=True)
    assert_same_state(resumed.state_dict(), whole.state_dict())
    names = set(whole.state_dict())
    assert {"prototype_images", "conditions.cpc_quantizer.updates", "conditions.cspc_quantizers.3.embed_avg"} <= names
    assert all(int(book.updates) == 12 for book in codebooks(resumed))
    norms = [module for module in resumed.modules() if isinstance(module, BatchNorm)]
    assert norms and all(int(norm.num_batches_tracked) == 12 for norm in norms)
    assert len(history.records) == 6
    states = [torch.load(tmp_path / run / CHECKPOINT, weights_only=True) for run in ("whole", "killed")]
    assert_same_state(states[0]["model"], states[1]["model"])
    for number, moments in states[0]["optimizer"]["state"].items():
        assert_same_state(moments, states[1]["optimizer"]["state"][number])
    passes = [json.loads(line) for line in (tmp_path / "killed" / METRICS).read_text().splitlines()]
    assert [(record["meta_epoch"], record["sub_epoch"]) for record in passes] == [divmod(i, 2) for i in range(6)]
    assert_same_state(VQFlowModel.load(tmp_path / "killed" / MODEL).state_dict(), whole.state_dict())


def test_a_resumed_run_has_the_same_settings_or_is_refused(tmp_path: Path) -> None:
    data = class_features(), labels()
    small_model(meta_epochs=1).fit(data, output_dir=tmp_path)
    with pytest.raises(ValueError, match="another configuration: n_patterns 8 -> 9"):
        small_model(meta_epochs=1, n_patterns=9).fit(data, output_dir=tmp_path, resume=True)


# ---- several processes

# A bias in front of a batch norm has no gradient but rounding, of which Adam makes steps; the running mean follows it.
NO_GRADIENT = re.compile(r"(semantic_mlp|semantic_encoder|feature_mlps\.\d)\.([03]\.bias|[14]\.running_mean)$")
ROUNDED = 1e-6
CASES = (
    ({}, 0.9),  # codes die, and are revived on the way
    ({"concat_pos": False, "quantize_type": "naive", "prior_std": "signed", "nll_reduction": "sum"}, 0.02),
)
SCRIPT = """
    import os, sys, warnings
    import torch
    from small_vqflow import class_features, labels, small_model
    from hgad_fast.features import extract
    from hgad_fast.features.extract import FeatureSet
    from hgad_fast.modules import codebook
    from hgad_fast.training import fit

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # so few calibration images
    if "WORLD_SIZE" in os.environ:
        torch.distributed.init_process_group("gloo")
    extract.FEATURES, fit.require_float32 = (torch.float32, torch.float64), lambda model: None  # see `double` below
    revived, revive = [], codebook.Codebook._revive

    def counted(self, x, total):
        before = self.embed.clone()
        revive(self, x, total)
        revived.append(int((before != self.embed).any(0).sum()))
        assert len(torch.unique(self.embed.t(), dim=0)) == self.size  # else ties, which may fall either way

    codebook.Codebook._revive = counted
    results = []
    for settings, codebook.DEAD_BELOW in eval(sys.argv[2]):
        revived.clear()
        levels = [level.double() for level in small_model().prepare(class_features(11))]
        data = FeatureSet([[level[i] for level in levels] for i in range(11)], labels(11))
        model = small_model(batch_size=5, meta_epochs=1, sub_epochs=3, n_prototypes=3, lr=1e-2, **settings).double()
        history = model.fit(data)
        tensors = {"model": model.state_dict(), "calibration": model.calibration.tensors()}
        losses = [record["losses"][0] for record in history.records]
        results.append(tensors | {"losses": losses, "revived": list(revived)})
    torch.save(results, sys.argv[1])
    if "WORLD_SIZE" in os.environ:
        torch.distributed.destroy_process_group()
"""


def start(out: Path, processes: int) -> list[subprocess.Popen[str]]:
    """Start processes as torchrun would, without its launcher."""
    environment = os.environ | {
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests' / 'support'}",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    if processes > 1:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = str(listener.getsockname()[1])
        environment |= {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    command = [sys.executable, "-c", textwrap.dedent(SCRIPT)]
    return [
        subprocess.Popen(
            [*command, f"{out} {rank}.pt", repr(CASES)],
            env=environment | {"RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(processes)
    ]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[list[dict[str, Any]]]:
    """Return what one process, and each of two, come to in each case."""
    folder = tmp_path_factory.mktemp("processes")
    running = [*start(folder / "single", 1), *start(folder / "pair", 2)]
    try:
        errors = [process.communicate(timeout=600)[1] for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0, 0, 0], errors
    return [torch.load(folder / f"{name}.pt") for name in ("single 0", "pair 0", "pair 1")]


@pytest.mark.parametrize("case", range(len(CASES)))
def test_two_processes_train_what_one_does(outcomes: list[list[dict[str, Any]]], case: int) -> None:
    """Batches of five: three images for one process, two for the other. All in float64."""
    single, *pair = (results[case] for results in outcomes)
    assert (sum(single["revived"]) > 0) == (case == 0)
    for other in pair:
        assert other["revived"] == single["revived"]
        assert other["model"].keys() == single["model"].keys()
        for name, tensor in single["model"].items():
            tolerance = ROUNDED if NO_GRADIENT.search(name) else SAME_IN_FLOAT64
            torch.testing.assert_close(other["model"][name], tensor, rtol=SAME_IN_FLOAT64, atol=tolerance, msg=name)
            assert torch.equal(other["model"][name], pair[0]["model"][name]), name  # or they would part in time
        for ours, theirs in zip(other["losses"], single["losses"], strict=True):
            assert ours == pytest.approx(theirs, rel=SAME_IN_FLOAT64)
        for name, tensor in single["calibration"].items():
            torch.testing.assert_close(
                other["calibration"][name], tensor, rtol=SAME_IN_FLOAT64, atol=SAME_IN_FLOAT64, msg=name
            )
    assert int(single["model"]["conditions.cpc_quantizer.updates"]) == 2 * 3


# ---- what goes wrong is named


@pytest.mark.parametrize("level", range(4))
@pytest.mark.parametrize("vq_init", ["kmeans", "randn0"])
def test_a_broken_feature_is_named(tmp_path: Path, level: int, vq_init: str) -> None:
    levels = class_features()
    levels[level][7, 2, 1, 1] = torch.nan
    with pytest.raises((NonFiniteLossError, ValueError)) as error:
        small_model(vq_init=vq_init).fit((levels, labels()), output_dir=tmp_path)
    if isinstance(error.value, NonFiniteLossError):
        assert "of level 0 is nan at step " in str(error.value)
    else:
        message = f"image 7 has a NaN or an infinity in its features of level {level}"
        assert message in str(error.value)
    state = torch.load(tmp_path / CHECKPOINT, weights_only=True)
    assert all(tensor.isfinite().all() for tensor in state["model"].values())


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.nan, "L_nll of level 0 is nan at step 2"),
        # Latents are clamped, as published, so that the loss stays finite; the parameter does not pass unnoticed.
        (torch.inf, r"parameter fusion_flow\.subnet_1\.conv_t\.0\.bias is not finite after step 3"),
    ],
)
def test_what_is_not_finite_is_named_with_its_step(value: float, message: str) -> None:
    model = small_model()
    seen = []

    def spoil(record: dict[str, Any]) -> None:
        seen.append(record)
        with torch.no_grad():
            model.fusion_flow.subnet_1.conv_t[0].bias.fill_(value)

    with pytest.raises(NonFiniteLossError, match=message):
        model.fit((class_features(), labels()), callbacks=[spoil])


def test_gradients_are_clipped_over_all_parameters_together() -> None:
    data = prepared()
    free, clipped = stirred(small_model(clip_grad_norm=None)).double(), stirred(small_model()).double()
    batch = batch_of(data, range(6))
    batch = [[level.double() for level in image] for image in batch[0]], batch[1]
    with rounding.in_float64():
        Step(free, Processes())(*batch, 1, 1e-3)
        gradients = {name: p.grad for name, p in free.named_parameters()}
        assert all(gradient is not None for gradient in gradients.values())
        norm = float(torch.cat([gradient.flatten() for gradient in gradients.values()]).norm())
        clipped.config = clipped.config.replace(clip_grad_norm=norm / 3)
        Step(clipped, Processes())(*batch, 1, 1e-3)
    for name, parameter in clipped.named_parameters():
        # torch.nn.utils.clip_grad_norm_ adds 1e-6 to the norm
        torch.testing.assert_close(parameter.grad, gradients[name] / 3, rtol=1e-5, atol=1e-6 * norm, msg=name)


def test_a_batch_is_not_worked_off_in_parts() -> None:
    with pytest.raises(ValueError, match=r"VQFlowConfig\.accumulate is 2; allowed: 1: batch norms and codebooks"):
        small_config(accumulate=2)
    model = small_model()
    object.__setattr__(model.config, "accumulate", 2)  # as a file of another version might say
    with pytest.raises(ValueError, match="accumulate is 2: the method 'vqflow' looks at a batch as a whole"):
        model.fit((class_features(), labels()))


def test_one_image_is_no_training_set() -> None:
    with pytest.raises(ValueError, match="VQ-Flow needs at least 2 training images"):
        small_model().fit((class_features(1), labels(1)))
    with pytest.raises(ValueError, match=r"VQFlowConfig\.batch_size is 1; allowed: a whole number from 2"):
        small_config(batch_size=1)


def test_images_of_several_sizes_are_refused() -> None:
    small, large = prepared(4), prepared(4, sides=(32, 16, 8, 4))
    mixed = FeatureSet([*small.images, *large.images], labels(8))
    for vq_init, prior_std in (("kmeans", "softplus"), ("randn0", "signed")):
        with pytest.raises(ValueError, match="VQ-Flow takes images of one size"):
            small_model(vq_init=vq_init, prior_std=prior_std).fit(mixed)
    uneven = FeatureSet.from_levels([level[..., :-1] for level in small_model().prepare(class_features())], labels())
    with pytest.raises(ValueError, match="VQ-Flow takes squares, each as large as the top level's or a multiple of it"):
        small_model().fit(uneven)


# ---- looking on


def looked_at(model: VQFlowModel) -> None:
    """Score in every way that there is."""
    levels = class_features(4, seed=9)
    model.score_features(levels, normalization="official")
    model.score_features(levels, [0, 1, "prototype 2", 3], normalization="official", throughput=True)
    model.log_density(model.prepare(levels))
    model.describe()


def test_scoring_during_a_training_changes_nothing_of_it() -> None:
    """As a callback does that keeps the best state (`evaluation.evaluate.BestCheckpoint`)."""
    alone, watched = small_model(), small_model()
    alone.fit((class_features(), labels()))
    calls = []

    def look(record: dict[str, Any]) -> None:
        assert watched.training
        looked_at(watched)
        assert all(module.training for module in watched.modules())
        calls.append(record)

    watched.fit((class_features(), labels()), callbacks=[look])
    assert len(calls) == 6
    assert_same_state(watched.state_dict(), alone.state_dict())


def test_scores_in_the_middle_of_a_training_are_those_in_evaluation_mode() -> None:
    model = small_model(meta_epochs=2)
    levels = class_features(4, seed=9)

    def look(record: dict[str, Any]) -> None:
        still = copy.deepcopy(model).eval()
        assert_same_scores(*(m.score_features(levels, normalization="official") for m in (model, still)))
        prepared_levels = model.prepare(levels)
        assert torch.equal(model.log_density(prepared_levels), still.log_density(prepared_levels))

    model.fit((class_features(), labels()), callbacks=[look])


def test_parts_that_are_frozen_stay_so_when_the_model_scores() -> None:
    """A training may keep the batch norms' statistics as they are; scoring in between must not thaw them."""
    model = small_model().train()
    norms = [module for module in model.modules() if isinstance(module, BatchNorm)]
    for norm in norms:
        norm.eval()
    looked_at(model)
    assert model.training and model.conditions.training
    assert not any(norm.training for norm in norms)


# ---- tables are forgotten when what they are made of changes


def fresh_copy(model: VQFlowModel) -> VQFlowModel:
    fresh = VQFlowModel(model.config)
    fresh.load_state_dict(model.state_dict())
    fresh.calibration = model.calibration
    return fresh.eval()


def step(model: VQFlowModel) -> None:
    Step(model, Processes())(*batch_of(prepared(), range(6)), 1, 1e-2)


def step_in_evaluation_mode(model: VQFlowModel) -> None:
    step(model.eval())


def step_between_a_score_and_the_next(model: VQFlowModel) -> None:
    """The tables are made when gradients are there already; nothing but the optimizer comes after that."""
    model.eval()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, fused=True)
    model.latents(model.prepare(class_features())).nll().sum().backward()
    model.score_features(class_features(4, seed=9), normalization="official")
    optimizer.step()


def load_another(model: VQFlowModel) -> None:
    model.load_state_dict(stirred(small_model(seed=3)).state_dict())


def load_another_in_inference_mode(model: VQFlowModel) -> None:
    with torch.inference_mode():
        load_another(model)


def move_a_pattern(model: VQFlowModel) -> None:
    model.conditions.cspc_quantizers[1].embed += 0.5


def move_the_prototypes(model: VQFlowModel) -> None:
    model.conditions.cpc_quantizer.embed *= 1.5


def scale_a_weight(model: VQFlowModel) -> None:
    with torch.no_grad():
        model.parallel_flows[0].module_list[0].subnet.conv1.weight.mul_(1.5)


def replace_a_weight(model: VQFlowModel) -> None:
    convolution = model.fusion_flow.subnet_2.cross_convs["conv1"]
    convolution.weight.data = convolution.weight.data * 1.5


@pytest.mark.parametrize(
    "change",
    [
        step,
        step_in_evaluation_mode,
        step_between_a_score_and_the_next,
        load_another,
        load_another_in_inference_mode,
        move_a_pattern,
        move_the_prototypes,
        scale_a_weight,
        replace_a_weight,
    ],
)
@pytest.mark.parametrize("in_training", [True, False])
def test_scores_follow_every_change_of_the_model(change: Callable[[VQFlowModel], None], in_training: bool) -> None:
    model = stirred(small_model())
    model.begin(prepared())
    model.train(in_training)
    levels = class_features(4, seed=9)
    before = [model.score_features(levels, normalization="official") for _ in range(2)]
    assert_same_scores(*before)
    change(model)
    after, expected = (m.score_features(levels, normalization="official") for m in (model, fresh_copy(model)))
    assert not torch.equal(after.image_score, before[0].image_score)
    assert_same_scores(after, expected)


def test_scores_follow_the_parameters_of_a_model_that_counts_no_changes() -> None:
    """Tensors made in inference mode have no versions."""
    levels = class_features(4, seed=9)
    with torch.inference_mode():
        model = stirred(small_model()).eval()
        model.begin(prepared())
        before = model.score_features(levels, normalization="official")
        scale_a_weight(model)
        move_a_pattern(model)
        after, expected = (m.score_features(levels, normalization="official") for m in (model, fresh_copy(model)))
    assert not torch.equal(after.image_score, before.image_score)
    assert_same_scores(after, expected)


def test_maps_of_other_sizes_take_tables_of_their_own() -> None:
    model = stirred(small_model()).eval()
    sets = [class_features(2, seed=9), class_features(2, seed=9, sides=(32, 16, 8, 4))]
    for levels in (*sets, *sets):
        actual = model.score_features(levels, normalization="official")
        assert_same_scores(actual, fresh_copy(model).score_features(levels, normalization="official"))


# ---- the caller's context


@pytest.mark.parametrize(
    "context", [lambda: torch.autocast("cpu", torch.bfloat16), torch.inference_mode, torch.no_grad, nullcontext]
)
def test_the_callers_context_changes_no_training_and_no_score(context: Callable[[], AbstractContextManager]) -> None:
    settings = {"meta_epochs": 1, "calibration_fraction": 0.3}
    expected, model = small_model(**settings), small_model(**settings)
    levels = class_features(4, seed=9)
    with pytest.warns(UserWarning, match="too few calibration images"):
        expected.fit((class_features(), labels()))
        with context():
            model.fit((class_features(), labels()))
    assert_same_state(model.state_dict(), expected.state_dict())
    assert_same_state(model.calibration.tensors(), expected.calibration.tensors())
    with context():
        actual = [model.score_features(levels), model.score_features(levels, normalization="official")]
        density = model.log_density(model.prepare(levels))
    assert_same_scores(actual[0], expected.score_features(levels))
    assert_same_scores(actual[1], expected.score_features(levels, normalization="official"))
    assert torch.equal(density, expected.log_density(expected.prepare(levels)))
    step(model)  # what scoring keeps does not stand in the way of training
    model.score_features(levels)
