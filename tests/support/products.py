"""Image files of three products, each of a colour and a pattern of its own, and settings of a small place Gaussian."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from hgad_fast import GaussianConfig

COLOURS = {"amber": (1.0, 0.7, 0.1), "blue": (0.1, 0.3, 1.0), "grey": (0.5, 0.5, 0.5)}
SETTINGS = {
    "backbone_arch": "test_efficientnet",
    "backbone_weights": None,
    "out_indices": (1, 2, 3),
    "grid_stride": 8,
    "img_size": 48,
    "msk_size": 48,
    "dim": 8,
    "coarse_dim": 4,
}


def config(**changes: object) -> GaussianConfig:
    return GaussianConfig(**{"n_classes": 1, **SETTINGS, **changes})


def options() -> list[str]:
    """Return the settings for the command line."""
    words = ["--backbone", "test_efficientnet", "--weights", "random", "--device", "cpu"]
    for name in ("grid_stride", "img_size", "msk_size", "dim", "coarse_dim"):
        words += ["--set", f"{name}={SETTINGS[name]}"]
    return [*words, "--set", "out_indices=[1,2,3]"]


def draw(kind: str, seed: int, size: tuple[int, int] = (48, 48), spot: bool = False) -> Image.Image:
    """Return an image of a product, (width, height); with a spot of another brightness in a corner."""
    rng = np.random.default_rng(1000 * sorted(COLOURS).index(kind) + seed)
    width, height = size
    y, x = np.mgrid[:height, :width]
    waves = {"amber": x / width, "blue": y / height, "grey": (x / width + y / height) / 2}[kind]
    pixels = (150 + 60 * np.sin(20 * waves))[..., None] * COLOURS[kind] + rng.normal(0, 5, (height, width, 3))
    if spot:
        pixels[: height // 3, : width // 3] = 255 - pixels[: height // 3, : width // 3]
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def write(path: Path, kind: str, seed: int, size: tuple[int, int] = (48, 48), spot: bool = False) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    draw(kind, seed, size, spot).save(path)
    return path
