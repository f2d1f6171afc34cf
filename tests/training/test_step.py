"""The step of a training: parts of a batch add up to it, gradients are clipped, and nothing waits for the device."""

from __future__ import annotations

import copy
from unittest import mock

import pytest
import rounding
import torch
from pretended import pretended_gpu
from rounding import SAME_IN_FLOAT64
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hgad_fast import HGADConfig, HGADModel
from hgad_fast.features.extract import FeatureSet
from hgad_fast.ops import mixture
from hgad_fast.training import step
from hgad_fast.training.processes import Processes
from hgad_fast.training.step import Step

DIMS = (8, 7)
CLIPPING = 1e-5  # torch.nn.utils.clip_grad_norm_ adds 1e-6 to the norm, which is of the order of one here


def make_model(**changes) -> HGADModel:
    settings = {"feature_levels": 2, "feature_dims": DIMS, "n_classes": 3, "n_intra_centers": 3, "coupling_layers": 2}
    settings |= {"backbone_arch": None, "pos_embed_dim": 8, "batch_size": 7, "lr": 1e-2}
    return HGADModel(HGADConfig(**settings | changes))


def make_batch(seed: int = 0, sizes=((4, 5), (3, 3), (4, 5), (2, 6), (3, 3), (4, 5), (4, 5))):
    """Images of several sizes and three classes."""
    generator = torch.Generator().manual_seed(seed)
    images = [[torch.randn(c, h, w, generator=generator) for c in DIMS] for h, w in sizes]
    return images, torch.randint(3, (len(sizes),), generator=generator)


def gradients(model: HGADModel) -> list[Tensor]:
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters() if p.requires_grad]


def relative_error(actual: list[Tensor], expected: list[Tensor]) -> float:
    actual, expected = (torch.cat([t.double().flatten() for t in tensors]) for tensors in (actual, expected))
    return float((actual - expected).detach().norm() / expected.detach().norm())


@pytest.mark.parametrize("parts", [2, 3, 7])
@pytest.mark.parametrize("stage", [1, 2])
def test_parts_of_a_batch_add_up_to_it(parts, stage):
    """Also where they have unequal numbers of images and pixels."""
    whole = make_model()
    split = copy.deepcopy(whole)
    split.config = split.config.replace(accumulate=parts)
    images, labels = make_batch()
    with rounding.in_float64():
        terms = [Step(model.double(), Processes())(images, labels, stage, 1e-3) for model in (whole, split)]
    assert relative_error([terms[1]], [terms[0]]) < SAME_IN_FLOAT64
    assert relative_error(gradients(split), gradients(whole)) < SAME_IN_FLOAT64
    assert relative_error(list(split.parameters()), list(whole.parameters())) < SAME_IN_FLOAT64
    in_stage_2_only = [*split.mu_deltas, *split.phi_intras]
    assert all((parameter.grad is None) == (stage == 1) for parameter in in_stage_2_only)


@pytest.mark.filterwarnings("ignore:too few calibration images")
def test_accumulation_trains_the_same_model():
    models = [make_model(accumulate=parts, meta_epochs=5, sub_epochs=2, lr=1e-3) for parts in (1, 3)]
    levels = [torch.randn(14, c, 3, 4) for c in DIMS]
    data = FeatureSet([[level[i] for level in levels] for i in range(14)], torch.arange(14) % 3)
    with rounding.in_float64():
        for model in models:
            model.double().fit(data, calibration=data)
    assert relative_error(list(models[1].parameters()), list(models[0].parameters())) < SAME_IN_FLOAT64


@pytest.mark.parametrize("parts", [1, 3])
def test_the_gradient_of_each_level_is_clipped_by_itself(parts):
    free, clipped = make_model().double(), make_model(accumulate=parts).double()
    batch = *make_batch(), 2, 1e-3
    with rounding.in_float64():
        Step(free, Processes())(*batch)
    norms = []
    for level, flow in enumerate(free.nfs):
        parts_of_it = [p.grad for p in (*flow.parameters(), *free.mixture.level(level))]
        norms.append(torch.cat([g.flatten() for g in parts_of_it]).norm())
    limit = float(sum(norms) / 2)  # between the two: one level is clipped, one is not
    clipped.config = clipped.config.replace(clip_grad_norm=limit)
    with rounding.in_float64():
        Step(clipped, Processes())(*batch)
    assert min(norms) < limit < max(norms)
    for level, (flow, mine) in enumerate(zip(free.nfs, clipped.nfs, strict=True)):
        factor = min(1.0, limit / float(norms[level]))
        for a, b in zip(
            (*flow.parameters(), *free.mixture.level(level)),
            (*mine.parameters(), *clipped.mixture.level(level)),
            strict=True,
        ):
            torch.testing.assert_close(b.grad, a.grad * factor, rtol=CLIPPING, atol=CLIPPING * limit)


def test_adam_is_fused_and_equal_to_the_plain_one():
    model = make_model().double()
    reference = copy.deepcopy(model)
    taken = Step(model, Processes())
    assert all(group["fused"] for group in taken.optimizer.param_groups)
    plain = torch.optim.Adam(
        [
            {"params": reference.nfs.parameters(), "weight_decay": 1e-4},
            {"params": reference.mixture.parameters(), "weight_decay": 0.0},
        ],
        betas=(0.95, 0.99),
        foreach=False,
    )
    for i in range(5):
        batch = make_batch(i)
        with rounding.in_float64():
            taken(*batch, 2, 1e-3 * (i + 1))
        for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
            theirs.grad = ours.grad.clone()
        for group in plain.param_groups:
            group["lr"] = 1e-3 * (i + 1)
        plain.step()
    assert relative_error(list(model.parameters()), list(reference.parameters())) < SAME_IN_FLOAT64


# ---- nothing waits for the device

WAITS = {
    torch.ops.aten._local_scalar_dense,  # .item(), .tolist(), bool(), float()
    torch.ops.aten.nonzero,
    torch.ops.aten.masked_select,
    torch.ops.aten._unique2,
    torch.ops.aten.unique_consecutive,
    torch.ops.aten.unique_dim,
    torch.ops.aten.repeat_interleave,
    torch.ops.aten.bincount,
    torch.ops.aten.equal,
}


class NoWaiting(TorchDispatchMode):
    """Fails on operators whose result's size or value the host must have from the device."""

    def __enter__(self):
        self.tolist = mock.patch.object(Tensor, "tolist", lambda tensor: tensor[0].item())  # a CPU's calls no operator
        self.tolist.start()
        return super().__enter__()

    def __exit__(self, *error):
        self.tolist.stop()
        return super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        masks = func.overloadpacket in (torch.ops.aten.index, torch.ops.aten.index_put_) and any(
            t is not None and t.dtype == torch.bool for t in args[1]
        )
        assert func.overloadpacket not in WAITS and not masks, f"{func} waits for the device"
        return func(*args, **kwargs or {})


def test_the_check_sees_what_waits():
    x = torch.arange(3.0)
    for waiting in (x[0].item, lambda: x.tolist(), lambda: x[x > 1], x.nonzero, x.unique, lambda: bool((x > 1).all())):
        with pytest.raises(AssertionError, match="waits for the device"), NoWaiting():
            waiting()


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"clip_grad_norm": 1.0, "accumulate": 2},
        {"memory": "reversible"},
        {"pixels_per_step": 4, "feature_scaling": "whiten"},
        {"precision": "bf16", "memory": "reversible"},
    ],
)
def test_nothing_in_a_step_waits_for_the_device(interpreted, monkeypatch, settings):
    """With the kernels, as on a GPU: the definition in torch sorts the pixels of a CPU by class on the host.

    Operations look at labels of a CPU alone; what is on a GPU was looked at before.
    """
    monkeypatch.setattr(mixture, "_check_labels", lambda labels, classes: None)
    taken = Step(make_model(**settings), Processes())
    batch = make_batch(sizes=((2, 3), (2, 3)))
    for stage in (1, 2):
        taken(*batch, stage, 1e-3)
        with NoWaiting():
            taken(*batch, stage, 1e-3)


def test_a_recorded_step_is_the_step(monkeypatch, cuda):
    """Shapes, fixed memory and rates of recorded steps, with a recording that runs its work again on the CPU."""
    model = make_model().double()
    eager = copy.deepcopy(model)
    recorded: list[Tensor] = []

    def record(work, pool):
        terms = torch.full((2, 5), torch.nan, dtype=torch.float64)
        recorded.append(terms)
        return lambda: terms.copy_(work()), terms

    monkeypatch.setattr(step, "on_side_stream", lambda work: work())
    monkeypatch.setattr(step, "record", record)
    ours, theirs = Step(model, Processes()), Step(eager, Processes())
    ours.graphs = True
    for group in ours.optimizer.param_groups:
        group["lr"] = torch.tensor(group["lr"], dtype=torch.float64)
    terms, expected = [], []
    for i in range(6):
        for sizes in (((4, 5), (3, 3)), ((4, 5), (4, 5))):
            batch = *make_batch(i, sizes), 2, 1e-3 * (i + 1)
            with rounding.in_float64():
                terms.append(ours(*batch).clone())
                expected.append(theirs(*batch))
    assert len(recorded) == 2
    assert relative_error(terms, expected) < SAME_IN_FLOAT64
    assert relative_error(list(model.parameters()), list(eager.parameters())) < SAME_IN_FLOAT64


GPU = torch.device("cuda:1")  # which is not the current one


def test_work_on_the_side_takes_one_stream_of_its_device(cuda):
    for device in (GPU, GPU, None, None):
        assert step.on_side_stream(lambda: (cuda.device, cuda.stream_of(cuda.device).name), device) == (
            (1, "side 1") if device else (0, "side 0")
        )
    expected = [("new stream", 1), *[("wait", "side 1", "default 1"), ("wait", "default 1", "side 1")] * 2]
    expected += [("new stream", 0), *[("wait", "side 0", "default 0"), ("wait", "default 0", "side 0")] * 2]
    assert cuda.calls == expected


def test_a_graph_is_made_on_its_device(cuda):
    replay, result = step.record(lambda: cuda.device, device=GPU)
    assert result == 1 and cuda.device == 0
    assert cuda.calls == [("new graph", 1), ("new stream", 1), ("record", None, "side 1")]
    step.record(lambda: None)  # as benchmarks call it
    assert cuda.calls[3:] == [("new graph", 0), ("new stream", 0), ("record", None, "side 0")]


@pytest.fixture
def recording(monkeypatch, cuda) -> Step:
    """Return steps of a model that is said to be on cuda:1, and is on the CPU; recordings run their work again."""
    taken = Step(make_model(), Processes())
    monkeypatch.setattr(HGADModel, "device", GPU)
    taken.graphs = True
    for group in taken.optimizer.param_groups:
        group["lr"] = torch.tensor(group["lr"])
    return taken


def test_recorded_steps_are_dropped_when_the_stage_changes(recording, cuda):
    """Four shapes in stage 1 leave room for four in stage 2, in a pool of its own: the old one is gone."""
    sizes = [((2, width),) for width in range(2, 7)]
    batches = [make_batch(sizes=size) for size in sizes]
    for stage in (1, 2):
        cuda.calls.clear()
        for _ in range(step.EAGER_STEPS + 1):
            for batch in batches:
                recording(*batch, stage, 1e-3)
        recorded = [call for call in cuda.calls if call[0] == "record"]
        assert recorded == [("record", f"pool {stage}", "side 1")] * step.MAX_GRAPHS
        assert cuda.calls.count(("synchronize", 1)) == stage - 1
        assert len(recording._recorded) == step.MAX_GRAPHS
    assert cuda.streams == 1


def test_a_step_runs_on_the_device_of_its_model(recording, cuda, monkeypatch):
    devices = []
    advance = Step._advance
    monkeypatch.setattr(Step, "_advance", lambda *args: devices.append(cuda.device) or advance(*args))
    batch = make_batch(sizes=((2, 3),))
    for graphs in (True, False):
        recording.graphs = graphs
        recording(*batch, 1, 1e-3, batch)
    assert devices == [1, 1] and cuda.device == 0


@pytest.mark.parametrize("label", [-1, 3, 70])
def test_labels_out_of_range_are_told(label):
    images, labels = make_batch()
    labels[2] = label
    message = f"class id {label} is out of range: the model's classes have the ids 0 to 2"
    with pytest.raises(ValueError, match=message):
        Step(make_model(), Processes())(images, labels, 1, 1e-3)


def test_labels_of_a_method_that_forms_its_own_groups_may_be_any():
    model = make_model()
    model.groups_are_classes = False
    step.check_labels(torch.tensor([70]), model)


def test_graphs_need_kernels():
    with pretended_gpu(), pytest.raises(ValueError, match="cuda_graphs=True records Triton's kernels"):
        Step(make_model().to("cuda"), Processes(), graphs=True)


def test_graphs_need_a_gpu():
    with pytest.raises(ValueError, match="cuda_graphs=True needs the model on a CUDA device; it is on cpu"):
        make_model().fit(([torch.randn(6, c, 2, 2) for c in DIMS], torch.arange(6) % 3), cuda_graphs=True)
