"""Feeding a device: the batches that the host gathers, from few copies, each in its order. The device is a stand-in."""

from __future__ import annotations

import copy
import itertools
import threading
from contextlib import nullcontext

import numpy as np
import pytest
import rounding
import torch
from PIL import Image
from rounding import SAME_IN_FLOAT64
from torch import Tensor

from hgad_fast import HGADConfig, HGADModel
from hgad_fast.features.extract import FeatureSet, feature_set
from hgad_fast.training import feeding, step
from hgad_fast.training.feeding import Batch, DeviceFeed, DeviceQueue, HostFeed, Selection, gather
from hgad_fast.training.processes import Processes

CPU = torch.device("cpu")
DIMS = (6, 5)
SIZES = ((4, 5), (3, 3), (4, 5), (1, 6), (3, 3), (4, 5), (4, 5))


def channels_first(x: Tensor) -> Tensor:
    return x


def channels_last(x: Tensor) -> Tensor:
    return x.permute(1, 2, 0).contiguous().permute(2, 0, 1)


def sliced(x: Tensor) -> Tensor:
    return torch.stack([x, x], 3)[..., 0]


def make_images(sizes=SIZES, layouts=(channels_last,), dtypes=(torch.float32,)) -> list[list[Tensor]]:
    """Maps of two levels; layouts and precisions take turns."""
    kinds = itertools.cycle(itertools.product(layouts, dtypes))
    images = []
    for h, w in sizes:
        layout, dtype = next(kinds)
        images.append([layout(torch.randn(c, h * f, w * f).to(dtype)) for c, f in zip(DIMS, (2, 1), strict=True)])
    return images


def widened(images: list[list[Tensor]]) -> list[list[Tensor]]:
    return [[features.to(torch.promote_types(features.dtype, torch.float32)) for features in maps] for maps in images]


def expected_batches(images, labels: Tensor, count: int) -> list[Batch]:
    images = widened(list(images))
    return [gather(images[part], labels[part]) for part in feeding.bounds(len(images), count)]


def assert_same(batches: list[Batch], expected: list[Batch]) -> None:
    for batch, right in zip(batches, expected, strict=True):
        for groups, right_groups in zip(batch, right, strict=True):
            for group, right_group in zip(groups, right_groups, strict=True):
                assert group.x.dtype == right_group.x.dtype and group.x.is_contiguous()
                assert torch.equal(group.x, right_group.x) and torch.equal(group.labels, right_group.labels)
                assert group[2:] == right_group[2:]


def batches_of(feed: DeviceFeed, images, labels: Tensor, count: int = 1) -> list[Batch]:
    return [part.batch() for part in feed.parts(images, labels, count)]


@pytest.mark.parametrize("count", [1, 2, 7])
@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("known", [False, True], ids=["list", "selection"])
@pytest.mark.parametrize(
    "layouts", [(channels_first,), (channels_last,), (sliced,), (channels_first, channels_last)], ids=len
)
@pytest.mark.parametrize(
    "dtypes", [(torch.float32,), (torch.float16,), (torch.bfloat16, torch.float16), (torch.float64,)], ids=str
)
def test_a_batch_is_what_the_host_gathers(queue, count, ahead, known, layouts, dtypes):
    """Also of images of several sizes, from several precisions, and when they come from the device's memory."""
    images, labels = make_images(layouts=layouts, dtypes=dtypes), torch.arange(len(SIZES))
    feed = DeviceFeed(queue)
    for _ in range(3):
        order = torch.randperm(len(images)).tolist()
        chosen = Selection(images, order) if known else [images[i] for i in order]
        chosen_labels = labels[order]
        if ahead:
            feed.prefetch(chosen, chosen_labels, count)
        batches = batches_of(feed, chosen, chosen_labels, count)
        assert_same(batches, expected_batches(chosen, chosen_labels, count))
        for part, batch in zip(feed.parts(chosen, chosen_labels, count), batches, strict=True):
            for x in [x for groups in batch for group in groups for x in (group.x, group.labels)]:
                x.zero_()
            part.fill(batch)
        assert_same(batches, expected_batches(chosen, chosen_labels, count))


def test_half_precision_is_copied_as_it_is(queue):
    """Two bytes a value, and eight for each label; the buffer's sections begin at multiples of 256 bytes."""
    images = make_images(((16, 16),) * 4, dtypes=(torch.bfloat16,))
    batches_of(DeviceFeed(queue), images, torch.zeros(4, dtype=torch.int64))
    values = 4 * (DIMS[0] * 32 * 32 + DIMS[1] * 16 * 16)
    assert queue.named("copy")[0][1] == 2 * values + 4 * 8


def test_one_allocation_serves_all_steps(queue):
    """It grows with the largest batch, and other shapes that fit find room in it."""
    feed, labels = DeviceFeed(queue), torch.arange(3)
    largest = [make_images(((6, 6),) * 3) for _ in range(3)]
    for images in (*largest, make_images(((5, 5), (2, 3), (2, 3))), make_images(((1, 8),) * 3), *largest):
        feed.prefetch(images, labels, 1)
        assert_same(batches_of(feed, images, labels), expected_batches(images, labels, 1))
    assert len(queue.named("allocate")) == 1
    images = make_images(((7, 6),) * 3)
    assert_same(batches_of(feed, images, labels), expected_batches(images, labels, 1))
    assert len(queue.named("allocate")) == 2


@pytest.mark.parametrize("waits", [True, False], ids=["waits", "does not wait"])
def test_the_host_waits_before_it_overwrites_pinned_memory(queue, monkeypatch, waits):
    """Batches are announced, and others used instead: their copies, the latest that may be, find what they should."""
    feed, labels = DeviceFeed(queue), torch.arange(7)
    if not waits:
        monkeypatch.setattr(queue, "finish", lambda event: None)
    for _ in range(2):
        feed.prefetch(make_images(), labels, 1)
    images = make_images()
    with nullcontext() if waits else pytest.raises(AssertionError, match="overwritten before it was copied"):
        assert_same(batches_of(feed, images, labels), expected_batches(images, labels, 1))


def test_the_order_of_things(queue):
    """A copy follows the reading of the one before; the host waits for copies alone, the device for its own."""
    feed, labels = DeviceFeed(queue), torch.arange(7)
    first, second = make_images(), make_images()
    feed.parts(first, labels, 1)
    assert queue.calls == []
    batches_of(feed, first, labels)
    (_, size), (_, copied, after, event) = queue.calls[:2]
    assert size == copied and after is None
    assert queue.calls[2:] == [("wait", event), ("read", 2)]
    queue.calls.clear()
    feed.prefetch(second, labels, 1)  # while the device works on the first
    assert queue.calls == [("finish", event), ("copy", size, 2, 3)]
    queue.calls.clear()
    batches_of(feed, second, labels)
    assert queue.calls == [("wait", 3), ("read", 4)]


def test_parts_of_a_batch_take_turns_in_the_buffer(queue):
    feed, images, labels = DeviceFeed(queue), make_images(((2, 2),) * 6), torch.arange(6)
    batches_of(feed, images, labels, 3)
    names = [call[0] for call in queue.calls]
    assert names == ["allocate", "copy", "wait", "read"] + ["finish", "copy", "wait", "read"] * 2


def test_a_batch_that_was_not_announced_is_taken_all_the_same(queue):
    feed, labels = DeviceFeed(queue), torch.arange(7)
    announced, other = make_images(), make_images()
    feed.prefetch(announced, labels, 1)
    assert_same(batches_of(feed, other, labels), expected_batches(other, labels, 1))
    assert_same(batches_of(feed, announced, labels), expected_batches(announced, labels, 1))
    feed.prefetch(announced, labels, 1)
    assert_same(batches_of(feed, announced, labels, 3), expected_batches(announced, labels, 3))
    feed.prefetch(announced, labels, 1)
    others = labels.flip(0)
    assert_same(batches_of(feed, announced, others), expected_batches(announced, others, 1))


def test_features_that_require_gradients_are_copied_like_others(queue):
    """Nothing of their history is kept: the buffer outlives the batch."""
    images, labels = [[features.requires_grad_() for features in maps] for maps in make_images()], torch.arange(7)
    batches = batches_of(DeviceFeed(queue), images, labels)
    assert not any(group.x.requires_grad for groups in batches[0] for group in groups)
    assert_same(batches, expected_batches([[x.detach() for x in maps] for maps in images], labels, 1))


# ---- what stays on the device


class Counted(list):
    """Images that count how often each of them is asked for."""

    def __init__(self, images) -> None:
        super().__init__(images)
        self.asked = [0] * len(images)

    def __getitem__(self, i):
        self.asked[i] += 1
        return super().__getitem__(i)


def passes(feed: DeviceFeed, images: Counted, count: int = 3, batch: int = 4) -> list[int]:
    """Return the copies from the host in each pass over all images, in an order of its own; check every batch."""
    labels, copies = torch.arange(len(images)) % 3, []
    for _ in range(count):
        before = len(feed.queue.named("copy"))
        chosen = torch.randperm(len(images)).split(batch)
        inputs = [(Selection(images, numbers.tolist()), labels[numbers]) for numbers in chosen]
        for i, (selection, selected_labels) in enumerate(inputs):
            batches = batches_of(feed, selection, selected_labels)
            if i + 1 < len(inputs):
                feed.prefetch(*inputs[i + 1], 1)
            right = [list.__getitem__(images, number) for number in selection.numbers]
            assert_same(batches, expected_batches(right, selected_labels, 1))
        copies.append(len(feed.queue.named("copy")) - before)
    return copies


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_features_that_fit_are_uploaded_once(queue, dtype):
    images = Counted(make_images(((4, 4), (3, 5)) * 6, dtypes=(dtype,)))
    assert passes(DeviceFeed(queue), images) == [3, 0, 0]
    assert images.asked == [1] * 12
    assert len(queue.named("free memory")) == 1


def test_features_that_do_not_fit_are_copied_each_time(queue):
    images = Counted(make_images(((4, 4),) * 12))
    size = 12 * (4 * (DIMS[0] * 64 + DIMS[1] * 16) + 8)
    queue.free = 3 * (size - 1) - size // 3  # beside the first of three batches, which is there already
    assert passes(DeviceFeed(queue), images) == [3, 3, 3]
    assert len(queue.named("free memory")) == 1
    roomy = DeviceFeed(type(queue)(queue.free + 4))
    assert passes(roomy, images) == [3, 0, 0]


def test_what_is_beyond_the_share_is_copied_each_time(queue):
    """Judged by the first batch, all would fit; the images that come later are larger."""
    images = Counted(make_images(((2, 2),) * 4 + ((8, 8),) * 8))
    small, large = ([x.nbytes for x in images[i]] for i in (0, 11))
    small_image, large_image = sum(small) + 8, sum(large) + 8
    queue.free = 3 * (4 * small_image + 5 * large_image) - 4 * small_image
    feed, labels = DeviceFeed(queue), torch.zeros(4, dtype=torch.int64)
    for _ in range(2):
        for first in (0, 4, 8):
            selection = Selection(images, range(first, first + 4))
            right = [list.__getitem__(images, number) for number in selection.numbers]
            assert_same(batches_of(feed, selection, labels), expected_batches(right, labels, 1))
    assert len(queue.named("copy")) == 4
    mixed = Selection(images, (1, 9, 5, 8))  # of which two are on the device
    assert_same(batches_of(feed, mixed, labels), expected_batches([images[i] for i in mixed.numbers], labels, 1))
    assert queue.named("copy")[-1][1] < 2 * large_image + 3 * feeding.ALIGNMENT


def test_other_images_take_the_place_of_the_first(queue):
    feed = DeviceFeed(queue)
    for _ in range(2):
        assert passes(feed, Counted(make_images(((4, 4),) * 8))) == [2, 0, 0]


def test_cleared_memory_is_given_back(queue):
    feed, images = DeviceFeed(queue), Counted(make_images(((4, 4),) * 8))
    for _ in range(2):
        assert passes(feed, images) == [2, 0, 0]
        feed.clear()
        assert vars(feed) == vars(DeviceFeed(queue))
    assert len(queue.named("allocate")) == 2


# ---- in a training


def make_model(**changes) -> HGADModel:
    settings = {"feature_levels": 2, "feature_dims": DIMS, "n_classes": 3, "n_intra_centers": 3, "coupling_layers": 2}
    settings |= {"backbone_arch": None, "pos_embed_dim": 8, "msk_size": 16, "meta_epochs": 3, "sub_epochs": 2}
    return HGADModel(HGADConfig(**settings | {"batch_size": 5, "lr": 1e-3} | changes))


@pytest.mark.filterwarnings("ignore:too few calibration images")
@pytest.mark.parametrize("free", [10**9, 0], ids=["resident", "copied"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_fed_training_is_the_training_bit_for_bit(monkeypatch, queue, free, accumulate):
    data = FeatureSet(make_images(SIZES * 2), torch.arange(14) % 3)
    queue.free = free
    models = [make_model(accumulate=accumulate) for _ in range(2)]
    histories = [models[0].fit(data, calibration=data)]
    feeds: list[DeviceFeed] = []
    monkeypatch.setattr(step, "HostFeed", lambda device: feeds.append(DeviceFeed(queue)) or feeds[-1])
    histories.append(models[1].fit(data, calibration=data))
    assert [r["losses"] for r in histories[1].records] == [r["losses"] for r in histories[0].records]
    for ours, right in zip(models[1].parameters(), models[0].parameters(), strict=True):
        assert torch.equal(ours, right)
    assert vars(feeds[0]) == vars(DeviceFeed(queue))  # calibration has the memory
    passes_of_it, parts = 6, 2 * accumulate  # two batches a pass
    if not free:
        assert len(queue.named("copy")) == passes_of_it * parts
    else:
        assert parts <= len(queue.named("copy")) < 14  # images that a pass dropped come in later ones
    assert len(queue.named("allocate")) < 4


@pytest.mark.filterwarnings("ignore:too few calibration images")
def test_the_next_batch_is_on_its_way_before_the_losses_are_fetched(monkeypatch, queue):
    """And the last one of a pass announces none."""
    data = FeatureSet(make_images(((2, 2),) * 15), torch.arange(15) % 3)
    events: list[str] = []
    monkeypatch.setattr(step, "HostFeed", lambda device: DeviceFeed(queue))
    for kind, name in ((step.Step, "_advance"), (DeviceFeed, "prefetch"), (step.Processes, "sum")):
        original = getattr(kind, name)

        def recorded(self, *args, name=name, original=original):
            events.append(name)
            return original(self, *args)

        monkeypatch.setattr(kind, name, recorded)
    make_model(meta_epochs=1, sub_epochs=1).fit(data, calibration=data)
    assert events == ["_advance", "prefetch", "sum"] * 2 + ["_advance", "sum"]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_recorded_steps_from_features_on_the_device(monkeypatch, cuda, queue, accumulate):
    """What a recorded step overwrites, its batch, is none of the features that stay."""
    eager = make_model(accumulate=accumulate).double()
    model = copy.deepcopy(eager)
    recorded: list[Tensor] = []

    def record(work, pool):
        recorded.append(torch.full((2, 5), torch.nan, dtype=torch.float64))
        terms = recorded[-1]
        return lambda: terms.copy_(work()), terms

    monkeypatch.setattr(step, "on_side_stream", lambda work: work())
    monkeypatch.setattr(step, "record", record)
    ours, theirs = (step.Step(each, Processes()) for each in (model, eager))
    ours.feed, ours.graphs = DeviceFeed(queue), True
    for group in ours.optimizer.param_groups:
        group["lr"] = torch.tensor(group["lr"], dtype=torch.float64)
    images, labels = make_images(((2, 3), (2, 2)) * 4, dtypes=(torch.float64,)), torch.arange(8) % 3
    versions = [parameter._version for parameter in model.parameters()]
    for _ in range(step.EAGER_STEPS + 2):
        order = torch.cat([torch.randperm(4) * 2, torch.randperm(4) * 2 + 1]).view(2, 4).T.reshape(2, 4)
        for numbers in order:
            with rounding.in_float64():
                terms = ours(Selection(images, numbers.tolist()), labels[numbers], 2, 1e-3)
                expected = theirs([images[i] for i in numbers], labels[numbers], 2, 1e-3)
            torch.testing.assert_close(terms, expected, rtol=SAME_IN_FLOAT64, atol=SAME_IN_FLOAT64)
    assert len(recorded) == 1 and len(queue.named("copy")) == 2 * accumulate
    assert all(p._version > version for p, version in zip(model.parameters(), versions, strict=True))  # see `_graphed`


# ---- the queue of a GPU, on a stand-in for torch.cuda


def test_the_queue_of_a_gpu(cuda, monkeypatch):
    """Copies run on one stream of the model's device; the current stream there waits, and so does the copy for it."""
    empty = torch.empty

    def noted(*args, pin_memory=False, device=None, **kwargs):
        cuda.note("pinned" if pin_memory else "memory", args[0], device and str(device), cuda.stream_of(1).name)
        return empty(*args, **kwargs)

    monkeypatch.setattr(torch, "empty", noted)
    monkeypatch.setattr(Tensor, "record_stream", lambda x, stream: cuda.note("used by", stream.name))
    device = torch.device("cuda:1")
    feed = DeviceFeed(DeviceQueue(device))
    assert cuda.calls == [("new stream", 1)]
    images, labels = make_images(((2, 2),)), torch.tensor([2])
    size = 3 * feeding.ALIGNMENT + 8  # 384 bytes of a level, 80 of the other, and a label
    with torch.cuda.device(device):
        for allocated in (True, False):
            cuda.calls.clear()
            assert_same(batches_of(feed, images, labels), expected_batches(images, labels, 1))
            made = [("pinned", size, None, "default 1"), ("memory", size, "cuda:1", "side 1")]
            buffers = [call for call in cuda.calls if call[:2] in (("pinned", size), ("memory", size))]
            assert buffers == (made if allocated else [])
            before = [] if allocated else [("host waits", "side 1"), ("wait", "side 1", "default 1")]
            assert [call for call in cuda.calls if call[0] not in ("pinned", "memory")] == [
                *before,
                ("event", "side 1"),
                ("wait", "default 1", "side 1"),
                ("used by", "default 1"),
                ("event", "default 1"),
            ]
    assert feed.queue.free_memory() == 300


def write_images(folder, count: int) -> None:
    (folder / "oak").mkdir()
    for i in range(count):
        pixels = np.random.default_rng(i).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "oak" / f"{i}.png")


def model_of_images(**settings) -> HGADModel:
    settings = {"n_classes": 1, "feature_levels": 1, "out_indices": [2], "img_size": 32, **settings}
    return HGADModel(HGADConfig(backbone_arch="test_efficientnet", backbone_weights=None, **settings))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_cached_features_are_copied_in_the_precision_of_the_cache(queue, tmp_path, dtype):
    write_images(tmp_path, 4)
    features = feature_set(model_of_images(), tmp_path, cache_dtype=dtype).subset(torch.tensor([2, 0, 1]))
    chosen, labels = Selection(features.images, [0, 2]), torch.zeros(2, dtype=torch.int64)
    assert_same(batches_of(DeviceFeed(queue), chosen, labels), expected_batches(chosen, labels, 1))
    values = sum(features.images[i][0].numel() for i in chosen.numbers)
    assert queue.named("copy")[0][1] == values * getattr(torch, dtype).itemsize + 2 * 8


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("cache", ["ram", "disk"])
def test_the_host_reads_the_next_step_of_a_cache_ahead(tmp_path, cache, dtype):
    write_images(tmp_path, 5)
    folder = {"cache_dir": tmp_path / "cache"} if cache == "disk" else {}
    features = feature_set(model_of_images(), tmp_path, cache=cache, cache_dtype=dtype, **folder)
    chosen, labels = Selection(features.images, [3, 0, 4, 1]), torch.zeros(4, dtype=torch.int64)
    feed = HostFeed(CPU)
    feed.prefetch(chosen, labels, 2)
    assert feed.ahead is not None
    ahead = feed.ahead.parts()
    assert_same([part.batch() for part in feed.parts(chosen, labels, 2)], expected_batches(chosen, labels, 2))
    assert feed.parts(chosen, labels, 2)[0] is not ahead[0]  # what was read serves once
    feed.prefetch(chosen, labels, 2)
    assert_same([part.batch() for part in feed.parts(chosen, labels, 1)], expected_batches(chosen, labels, 1))
    feed.prefetch(make_images(), torch.arange(len(SIZES)), 1)
    assert feed.ahead is None  # nobody's images but those of a cache


def test_an_error_of_reading_ahead_comes_up_in_its_step_and_no_thread_is_left(tmp_path, monkeypatch):
    write_images(tmp_path, 10)
    read, threads = feeding.kept, set(threading.enumerate())

    def breaking(images, i):
        if threading.current_thread() is not threading.main_thread():
            raise OSError("features.bin: Input/output error")
        return read(images, i)

    monkeypatch.setattr(feeding, "kept", breaking)
    model = model_of_images(batch_size=2, meta_epochs=1, sub_epochs=3, pos_embed_dim=4, coupling_layers=1)
    with pytest.raises(OSError, match=r"features.bin: Input/output error"):
        model.fit(tmp_path)
    assert set(threading.enumerate()) == threads


def test_the_next_step_is_read_while_a_step_is_computed(tmp_path, monkeypatch):
    write_images(tmp_path, 9)
    advance, reading = step.Step._advance, []
    monkeypatch.setattr(
        step.Step, "_advance", lambda self, *args: reading.append(self.feed.ahead) or advance(self, *args)
    )
    model = model_of_images(
        batch_size=2, calibration_fraction=0, meta_epochs=1, sub_epochs=2, pos_embed_dim=4, coupling_layers=1
    )
    model.fit(tmp_path, cache="disk", cache_dir=tmp_path / "cache")
    assert [ahead is not None for ahead in reading] == [True, True, True, False] * 2


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_training_that_reads_ahead_is_the_training_bit_for_bit(tmp_path, monkeypatch, accumulate):
    write_images(tmp_path, 9)
    states = []
    for ahead in (True, False):
        if not ahead:
            monkeypatch.setattr(Selection, "in_cache", lambda self: False)
        model = model_of_images(
            batch_size=3, accumulate=accumulate, meta_epochs=1, sub_epochs=2, pos_embed_dim=4, coupling_layers=1
        )
        model.fit(tmp_path, cache_dtype="float16")
        states.append(model.state_dict())
    assert all(states[0][name].equal(tensor) for name, tensor in states[1].items())
