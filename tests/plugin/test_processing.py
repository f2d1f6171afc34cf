"""What stands before and behind a model in anomalib: the library's own view of images, and its thresholds."""

from __future__ import annotations

import pytest

pytest.importorskip("anomalib")

import torch  # noqa: E402
from anomalib.data import ImageBatch, InferenceBatch  # noqa: E402
from torch import Tensor  # noqa: E402
from torchvision.transforms.v2 import Compose, RandomHorizontalFlip  # noqa: E402
from torchvision.tv_tensors import Image, Mask  # noqa: E402

from hgad_fast.features.preprocess import preprocess  # noqa: E402
from hgad_fast.plugin.processing import SeenPreProcessor, SeenResize, ThresholdPostProcessor, View  # noqa: E402

VIEWS = (View(24), View("native"), View(24, center_crop=True), View(24, square=True))


def drawn(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("view", VIEWS, ids=str)
def test_images_and_masks_are_seen_as_the_library_sees_them(view: View) -> None:
    image, mask = drawn(3, 40, 61), drawn(40, 61) > 0.7
    seen, seen_mask = SeenResize(view)(Image(image), Mask(mask.to(torch.uint8)))
    assert isinstance(seen, Image) and isinstance(seen_mask, Mask) and seen_mask.dtype == torch.uint8
    assert torch.equal(seen.as_subclass(Tensor), preprocess(image, view))
    assert torch.equal(seen_mask.as_subclass(Tensor).bool(), preprocess(mask, view))


@pytest.mark.parametrize("view", VIEWS, ids=str)
def test_what_is_seen_once_stays_as_it_is(view: View) -> None:
    """anomalib applies the transform in its workers, and again to the batch."""
    resize = SeenResize(view)
    once = resize(drawn(2, 3, 40, 61))
    assert torch.equal(resize(once), once)


def test_batches_are_seen_like_single_images() -> None:
    images, masks = drawn(2, 3, 40, 61), Mask((drawn(2, 40, 61) > 0.5).to(torch.uint8))
    resize = SeenResize(View(24))
    seen, seen_masks = resize(images, masks)
    for i in range(2):
        image, mask = resize(Image(images[i]), Mask(masks[i]))
        assert torch.equal(seen[i], image) and torch.equal(seen_masks[i], mask)
    assert resize(images, None)[1] is None


def test_it_goes_with_other_transforms() -> None:
    assert Compose([RandomHorizontalFlip(1.0), SeenResize(View(24))])(drawn(3, 40, 61)).shape == (3, 24, 37)


def test_exported_models_resize_with_antialiasing() -> None:
    """anomalib's own pre-processor leaves it out of exported models."""
    image = drawn(1, 3, 200, 200)
    assert torch.equal(SeenPreProcessor(View(20))(image)[0], preprocess(image[0], View(20)))


def test_a_checkpoint_keeps_the_view() -> None:
    there = SeenPreProcessor(View("native", center_crop=True))
    here = SeenPreProcessor(View(24))
    transform = here.transform  # what a dataset has taken over
    here.load_checkpoint_config(there.checkpoint_config())
    assert here.view == transform.view == View("native", center_crop=True)


def test_scores_are_normalised_by_the_threshold_alone() -> None:
    post_processor = ThresholdPostProcessor()
    x = torch.tensor([0.0, 0.5, 1.0, 3.0])
    batch = ImageBatch(image=drawn(4, 3, 8, 8), pred_score=x, anomaly_map=x[:, None, None].expand(4, 8, 8))
    post_processor.post_process_batch(batch)
    assert batch.pred_label.tolist() == [False, False, False, True]
    torch.testing.assert_close(batch.pred_score, x / (1 + x))
    assert torch.equal(batch.pred_mask.bool(), (x > 1)[:, None, None].expand(4, 8, 8))
    result = post_processor(InferenceBatch(pred_score=x, anomaly_map=x[:, None, None, None].expand(4, 1, 8, 8)))
    assert torch.equal(result.pred_score, batch.pred_score) and result.pred_label.tolist() == [
        False,
        False,
        False,
        True,
    ]


def test_nothing_is_learnt_from_validation() -> None:
    """Of anomalib's own post-processor, thresholds and range would move."""
    post_processor = ThresholdPostProcessor()
    before = {name: tensor.clone() for name, tensor in post_processor.state_dict().items()}
    labels = torch.tensor([0, 1, 1, 0])
    batch = ImageBatch(image=drawn(4, 3, 8, 8), gt_label=labels, pred_score=torch.tensor([5.0, 9.0, 7.0, 6.0]))
    post_processor.on_validation_batch_end(None, None, batch)
    post_processor.on_validation_epoch_end(None, None)
    for name, tensor in post_processor.state_dict().items():
        assert torch.equal(tensor.nan_to_num(-1), before[name].nan_to_num(-1)), name


@pytest.mark.parametrize("enable_normalization", (True, False))
def test_sensitivity(enable_normalization: bool) -> None:
    """A sensitivity of 0.75 calls a quarter of the scale normal: multiples up to a third."""
    post_processor = ThresholdPostProcessor(enable_normalization, image_sensitivity=0.75, pixel_sensitivity=0.25)
    x = torch.tensor([0.3, 0.4, 2.9, 3.1])
    batch = ImageBatch(image=drawn(4, 3, 8, 8), pred_score=x, anomaly_map=x[:, None, None].expand(4, 8, 8))
    post_processor.post_process_batch(batch)
    assert batch.pred_label.tolist() == [False, True, True, True]
    assert batch.pred_mask[:, 0, 0].bool().tolist() == [False, False, False, True]


@pytest.mark.parametrize("value", (0.0, 1.0, float("nan")))
def test_a_sensitivity_that_cannot_be(value: float) -> None:
    with pytest.raises(ValueError, match="pixel_sensitivity"):
        ThresholdPostProcessor(pixel_sensitivity=value)
