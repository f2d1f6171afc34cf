"""The pixels that are drawn for a step: which, how evenly, alike wherever they must be, and none of the others."""

from __future__ import annotations

import copy
import math

import pytest
import rounding
import torch
from rounding import SAME_IN_FLOAT64
from torch import Tensor

from hgad_fast import HGADConfig, HGADModel
from hgad_fast.features.extract import FeatureSet
from hgad_fast.modules.flow import ConditionalFlow, dense_position
from hgad_fast.training import step
from hgad_fast.training.drawing import EVERY_PIXEL, Draw, drawn_shape, pixel_count
from hgad_fast.training.feeding import DeviceFeed, Selection
from hgad_fast.training.processes import Processes
from hgad_fast.training.step import Step

DIMS = (6, 5)
SIZES = ((6, 8), (9, 5), (6, 8), (3, 3), (6, 8), (9, 5))
PIXELS = 12  # of 48 and 45; a map of 3 x 3 is used as a whole


def make_model(**changes) -> HGADModel:
    settings = {"feature_levels": 2, "feature_dims": DIMS, "n_classes": 3, "n_intra_centers": 3, "coupling_layers": 2}
    settings |= {"backbone_arch": None, "pos_embed_dim": 8, "msk_size": 16, "meta_epochs": 4, "sub_epochs": 2}
    return HGADModel(HGADConfig(**settings | {"batch_size": 5, "lr": 1e-3, "pixels_per_step": PIXELS} | changes))


def make_images(sizes=SIZES) -> list[list[Tensor]]:
    """Maps of two levels; those of the second are half as high and wide."""
    generator = torch.Generator().manual_seed(1)
    return [
        [torch.randn(c, -(-h // f), -(-w // f), generator=generator) for c, f in zip(DIMS, (1, 2), strict=True)]
        for h, w in sizes
    ]


def make_data() -> FeatureSet:
    return FeatureSet(make_images(SIZES * 2), torch.arange(12) % 3)


# ---- what is drawn


@pytest.mark.parametrize(
    ("pixels", "height", "width"),
    [(64, 16, 16), (60, 16, 16), (1, 7, 9), (7, 3, 40), (100, 100, 2), (100, 2, 100), (5, 1, 6), (47, 6, 8), (2, 2, 2)],
)
def test_the_shape_of_what_is_drawn(pixels, height, width):
    """As many pixels as asked for, but for what whole numbers cost, in about the proportions of the map."""
    rows, columns = drawn_shape(pixels, height, width)
    assert 1 <= rows <= height and 1 <= columns <= width
    assert pixels - max(rows, columns) < rows * columns <= pixels
    ideal = math.sqrt(pixels * height / width)
    if 1 <= ideal and pixels / ideal >= 1:
        assert rows < 2 * ideal + 1 and columns < 2 * pixels / ideal + 1
    drawn = Draw(pixels, seed=3, step=5).at(1, height, width)
    assert drawn is not None and (len(drawn.rows), len(drawn.columns)) == (rows, columns)
    for indices, length in zip(drawn, (height, width), strict=True):
        assert indices.dtype == torch.int64 and 0 <= indices.min() and indices.max() < length
        assert torch.equal(indices, indices.unique())  # increasing, none twice


def test_a_quarter_of_a_square_is_half_of_its_rows_and_columns():
    assert drawn_shape(64, 16, 16) == (8, 8)


@pytest.mark.parametrize(
    ("share", "height", "width", "pixels"), [(0.25, 16, 16, 64), (0.25, 8, 8, 16), (0.5, 3, 5, 8), (1e-9, 9, 9, 1)]
)
def test_a_share_is_that_of_each_level(share, height, width, pixels):
    assert pixel_count(share, height * width) == pixels
    assert_same_draw(Draw(share, 3, 5).at(1, height, width), Draw(pixels, 3, 5).at(1, height, width))


def assert_same_draw(actual, expected):
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_a_share_that_rounds_to_all_is_all():
    assert Draw(0.9).at(0, 2, 2) is None and Draw(1 - 1e-9).at(0, 100, 100) is None


def test_small_maps_are_used_as_a_whole():
    assert Draw(12).at(0, 3, 4) is None and Draw(13).at(0, 3, 4) is None
    assert Draw(11).at(0, 3, 4) is not None
    assert EVERY_PIXEL.at(0, 100, 100) is None


def test_every_pixel_is_as_likely_as_any_other():
    """In 4000 steps each of 6 x 8 is drawn 1000 times, give or take six standard deviations of a binomial count."""
    counts, steps = torch.zeros(6, 8), 4000
    for number in range(steps):
        drawn = Draw(12, seed=1, step=number).at(0, 6, 8)
        assert drawn is not None
        counts[drawn.rows[:, None], drawn.columns] += 1
    share = math.prod(drawn_shape(12, 6, 8)) / 48
    assert (counts - share * steps).abs().max() < 6 * math.sqrt(steps * share * (1 - share))


def test_the_draw_depends_on_seed_step_and_level_alone():
    def drawn(seed: int, number: int, level: int) -> list[int]:
        pixels = Draw(64, seed, number).at(level, 16, 16)
        assert pixels is not None
        return torch.cat(pixels).tolist()

    torch.manual_seed(5)
    draws = {(s, n, lv): drawn(s, n, lv) for s in (0, 1, 2**62) for n in range(4) for lv in range(3)}
    before = torch.get_rng_state()
    torch.manual_seed(6)
    assert all(drawn(*key) == pixels for key, pixels in reversed(draws.items()))
    assert len({tuple(pixels) for pixels in draws.values()}) == len(draws)
    torch.set_rng_state(before)


# ---- a step


def test_a_step_is_the_step_of_the_drawn_pixels_alone():
    """Loss terms and gradients are those of maps in which these pixels are all there is, at their own positions."""
    model = make_model(seed=2).double()
    expected = copy.deepcopy(model)
    images, labels = [[x.double() for x in maps] for maps in make_images()], torch.arange(6) % 3
    taken = Step(model, Processes())
    taken.number = 7
    with rounding.in_float64():
        terms = taken(images, labels, 2, 1e-3)
        loss = torch.zeros(())
        rows = []
        for level, flow in enumerate(expected.nfs):
            sums, count = {}, 0
            for maps, label in zip(images, labels, strict=True):
                c, h, w = maps[level].shape
                drawn = Draw(PIXELS, 2, 7).at(level, h, w)
                keep = torch.zeros(h, w, dtype=torch.bool)
                keep[(drawn.rows[:, None], drawn.columns) if drawn else ...] = True
                x = maps[level].permute(1, 2, 0)[keep]
                position = dense_position(flow.grid(h, w)).view(h, w, -1)[keep]
                z, log_det = flow(x, position)
                count += len(x)
                each = expected.mixture.losses(z, log_det, label.expand(len(x)), level, stage=2, label_smoothing=0.02)
                sums = {name: sums.get(name, 0) + term.sum() for name, term in each.items()}
            means = {name: total / count for name, total in sums.items()}
            rows.append(torch.stack([means[name] for name in taken.terms]))
            loss = loss + sum(means.values()) - (1 + 100) * means["L_mi"]
        loss.backward()
    torch.testing.assert_close(terms, torch.stack(rows).detach(), rtol=SAME_IN_FLOAT64, atol=SAME_IN_FLOAT64)
    for ours, theirs in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=SAME_IN_FLOAT64, atol=SAME_IN_FLOAT64)
    assert taken.number == 8


def test_nothing_is_computed_of_the_other_pixels(monkeypatch):
    rows: list[int] = []
    forward = ConditionalFlow.forward

    def counted(self, x, *args):
        rows.append(len(x))
        return forward(self, x, *args)

    monkeypatch.setattr(ConditionalFlow, "forward", counted)
    model = make_model()
    images = make_images(((6, 8),) * 4)
    Step(model, Processes())(images, torch.zeros(4, dtype=torch.int64), 1, 1e-3)
    assert rows == [4 * 3 * 4, 4 * 3 * 4]  # of 4 * 48 and 4 * 12: the second level has no more


@pytest.mark.parametrize("conditional", ["conditional_flow_model", "flow_model"])
@pytest.mark.parametrize("parts", [2, 3, 6])
def test_parts_of_a_batch_add_up_to_it(parts, conditional):
    whole = make_model(flow_arch=conditional).double()
    split = copy.deepcopy(whole)
    split.config = split.config.replace(batch_size=6, accumulate=parts)
    images, labels = [[x.double() for x in maps] for maps in make_images()], torch.arange(6) % 3
    steps = [Step(model, Processes()) for model in (whole, split)]
    with rounding.in_float64():
        for _ in range(3):
            terms = [taken(images, labels, 2, 1e-3) for taken in steps]
            torch.testing.assert_close(*terms, rtol=SAME_IN_FLOAT64, atol=SAME_IN_FLOAT64)
    for ours, theirs in zip(split.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=SAME_IN_FLOAT64, atol=SAME_IN_FLOAT64)


def test_a_method_that_looks_at_maps_as_a_whole_refuses():
    model = make_model()
    model.pointwise = False
    message = "pixels_per_step is 12: the method 'hgad' looks at a map as a whole, so no pixels can be left out; leave"
    with pytest.raises(ValueError, match=message):
        Step(model, Processes())


def test_a_recorded_step_is_the_step(monkeypatch, cuda, queue):
    """Its batch is filled with the rows and columns of the step, too, and from features on the device."""
    eager = make_model().double()
    model = copy.deepcopy(eager)
    recorded: list[Tensor] = []

    def record(work, pool):
        recorded.append(torch.full((2, 5), torch.nan, dtype=torch.float64))
        terms = recorded[-1]
        return lambda: terms.copy_(work()), terms

    monkeypatch.setattr(step, "on_side_stream", lambda work: work())
    monkeypatch.setattr(step, "record", record)
    ours, theirs = (Step(each, Processes()) for each in (model, eager))
    ours.feed, ours.graphs = DeviceFeed(queue), True
    for group in ours.optimizer.param_groups:
        group["lr"] = torch.tensor(group["lr"], dtype=torch.float64)
    images = [[x.double() for x in maps] for maps in make_images(((6, 8), (9, 5)) * 3)]
    labels = torch.arange(6) % 3
    for _ in range(step.EAGER_STEPS + 3):
        for numbers in torch.randperm(6).view(2, 3).sort().values:
            numbers = torch.cat([numbers[numbers % 2 == 0], numbers[numbers % 2 == 1]])
            chosen = Selection(images, numbers.tolist())
            with rounding.in_float64():
                terms = ours(chosen, labels[numbers], 2, 1e-3)
                expected = theirs([images[i] for i in numbers], labels[numbers], 2, 1e-3)
            torch.testing.assert_close(terms, expected, rtol=SAME_IN_FLOAT64, atol=SAME_IN_FLOAT64)
    assert recorded


# ---- a training


class Killed(Exception):
    pass


@pytest.mark.filterwarnings("ignore:too few calibration images")
@pytest.mark.parametrize("scaling", ["none", "std", "whiten"])
def test_resume_is_bit_exact(tmp_path, scaling):
    data = make_data()
    whole = make_model(feature_scaling=scaling)
    history = whole.fit(data, calibration=data)
    for stop in ((0, 1), (2, 0), None):

        def callback(record, stop=stop):
            if stop == (record["meta_epoch"], record["sub_epoch"]):
                raise Killed

        model = make_model(feature_scaling=scaling)
        try:
            resumed = model.fit(data, calibration=data, output_dir=tmp_path, resume=True, callbacks=[callback])
        except Killed:
            continue
    assert [record["losses"] for record in resumed.records] == [record["losses"] for record in history.records]
    for name, tensor in whole.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


@pytest.mark.filterwarnings("ignore:too few calibration images")
@pytest.mark.parametrize("free", [10**9, 0], ids=["resident", "copied"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_fed_training_is_the_training_bit_for_bit(monkeypatch, queue, free, accumulate):
    """Whether the maps are gathered on the host, stay on the device, or are copied there in each pass."""
    data, queue.free = make_data(), free
    models = [make_model(accumulate=accumulate) for _ in range(2)]
    histories = [models[0].fit(data, calibration=data)]
    monkeypatch.setattr(step, "HostFeed", lambda device: DeviceFeed(queue))
    histories.append(models[1].fit(data, calibration=data))
    assert [r["losses"] for r in histories[1].records] == [r["losses"] for r in histories[0].records]
    for ours, right in zip(models[1].parameters(), models[0].parameters(), strict=True):
        assert torch.equal(ours, right)


@pytest.mark.filterwarnings("ignore:too few calibration images")
def test_each_step_of_a_training_has_a_number_of_its_own(monkeypatch):
    numbers: list[int] = []
    original = Step._draw

    def noted(self, number):
        draw = original(self, number)
        numbers.append(draw.step)
        return draw

    monkeypatch.setattr(Step, "_draw", noted)
    make_model().fit(make_data(), calibration=make_data())  # two batches of five in each of eight passes
    assert sorted(set(numbers)) == list(range(16))
