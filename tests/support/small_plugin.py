"""A small dataset of three classes, and small models of anomalib for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

CLASSES = ("cloth", "steel", "wood")
BACKBONE: dict[str, Any] = {"backbone": "test_efficientnet", "img_size": 32}
HGAD: dict[str, Any] = {"n_intra_centers": 2, "coupling_layers": 2, "pos_embed_dim": 8, "out_indices": (1,)}
VQFLOW: dict[str, Any] = {"out_indices": (1, 2, 3), "feature_levels": 3, "coupling_layers": (1, 1), "prototype_dim": 8}
VQFLOW |= {"pos_embed_dim": 4, "n_prototypes": 4, "n_patterns": 4, "hidden_channels": 8}
GAUSSIAN: dict[str, Any] = {"out_indices": ((1,),), "map_stages": 1, "dim": 6, "coarse_dim": 3}
SETTINGS = {"HGAD": HGAD, "VQFlow": VQFLOW, "PlaceGaussian": GAUSSIAN}


def settings(name: str, **changes: Any) -> dict[str, Any]:
    """Return the `settings` of a small model of this name."""
    return {"msk_size": 32, "backbone_weights": None} | SETTINGS[name] | changes


def write_dataset(root: Path, size: tuple[int, int] = (48, 72), train: int = 20, test: int = 3) -> Path:
    """Write a dataset in the MVTec AD layout: colours of each class, noise, and squares as defects; return its root.

    Args:
        root: the folder.
        size: (H, W) of the images.
        train: training images of each class.
        test: normal, and anomalous test images of each class.
    """
    rng = np.random.default_rng(0)
    height, width = size
    for k, name in enumerate(CLASSES):
        blocks = np.random.default_rng(k).random((8, 8, 3))
        pattern = np.kron(blocks, np.ones((-(-height // 8), -(-width // 8), 1)))[:height, :width]
        for folder, count in (("train/good", train), ("test/good", test), ("test/hole", test)):
            (root / name / folder).mkdir(parents=True)
            for i in range(count):
                image = pattern + 0.05 * rng.standard_normal((height, width, 3))
                if folder == "test/hole":
                    top, left = rng.integers(0, height // 2), rng.integers(0, width // 2)
                    mask = np.zeros((height, width), bool)
                    mask[top : top + height // 4, left : left + width // 4] = True
                    image[mask] = rng.random(3)
                    masks = root / name / "ground_truth" / "hole"
                    masks.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(mask.astype(np.uint8) * 255).save(masks / f"{i:03}_mask.png")
                pixels = (image.clip(0, 1) * 255).astype(np.uint8)
                Image.fromarray(pixels).save(root / name / folder / f"{i:03}.png")
    return root
