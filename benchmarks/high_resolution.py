"""Time and memory of large images, for docs/high-resolution.md: `python -m benchmarks.high_resolution [PART...]`.

memory: peak resident memory of scoring images at their own resolution, beyond model, image and map; a process each.
mixture: densities of 65 536 pixels under 40 classes, against the official formula, one class after the other.
speed: whole images, against the same model scored the official way, and the backbone's share of the time.
tiles: how far the features of tiles are from those of the whole image, for several networks.

Backbones have random weights, on which neither time nor memory depends. Parts that are not run keep their figures in
the file. Nothing else should run meanwhile.
"""

from __future__ import annotations

import argparse
import functools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hgad_fast import HGADConfig, HGADModel
from hgad_fast.bench import cases, measure, timing
from hgad_fast.bench.official import OfficialLevel, dense_position, official_map, official_scores
from hgad_fast.data import images
from hgad_fast.features import preprocess, tiles
from hgad_fast.features.backbone import Backbone
from hgad_fast.files import replacing
from hgad_fast.scoring.calibration import Calibration

CPU = torch.device("cpu")
IMAGES = ((2000, 2000), (4000, 4000), (8000, 8000), (16000, 3000))
TIMED = (512, 1024, 2048)  # sides of squares
NETWORKS = ("tf_efficientnet_lite0", "resnet18", "convnext_atto", "mobilenetv3_large_100", "tf_efficientnet_b6")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)}; default all")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "high-resolution.json")
    parser.add_argument("--quick", action="store_true", help="small images, to try the machinery")
    parser.add_argument("--resident", type=int, nargs=2, help=argparse.SUPPRESS)  # height and width
    options = parser.parse_args()
    if options.resident:
        print(json.dumps(resident(*options.resident)))
        return
    figures = json.loads(options.output.read_text()) if options.output.is_file() else {}
    for part in options.parts or PARTS:
        rows = []
        for row in PARTS[part](options.quick):
            print(row, flush=True)
            rows.append(row)
        figures[part] = measure.about_run(CPU) | {"rows": rows}
        with replacing(options.output) as file:
            file.write_text(json.dumps(figures, indent=1) + "\n")


def detector() -> HGADModel:
    """Return the published flow and prior of 15 classes on a small backbone, with a made-up calibration."""
    torch.manual_seed(0)
    model = HGADModel(HGADConfig(n_classes=15, backbone_arch="tf_efficientnet_lite0", backbone_weights=None))
    level_max = torch.zeros(model.config.n_classes, model.config.feature_levels)
    model.calibration = Calibration(level_max, torch.zeros(0), torch.zeros(0, dtype=torch.int64), img_size="native")
    return model


def memory(quick: bool) -> Any:
    for height, width in ((600, 600), (1600, 300)) if quick else IMAGES:
        command = [sys.executable, "-m", "benchmarks.high_resolution", "--resident", str(height), str(width)]
        yield json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def resident(height: int, width: int) -> dict[str, Any]:
    """Return peak memory and time of scoring in this process; the map goes to a file, whose pages do not count."""
    model, image = detector(), torch.rand(3, height, width)
    scored = functools.partial(model.score, img_size="native")
    scored(torch.rand(3, 128, 128))  # libraries, threads
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        peak = timing.peak_resident(lambda: scored(image, map_path=Path(folder) / "map.npy"))
        seconds = time.perf_counter() - start
    return {
        "height": height,
        "width": width,
        "peak_bytes": peak,
        "estimated_bytes": preprocess.working_set(model, model.config.replace(img_size="native"), (height, width)),
        "seconds": seconds,
        "megapixels_per_second": height * width / 1e6 / seconds,
    }


@torch.no_grad()
def mixture(quick: bool) -> Any:
    side = 32 if quick else 256
    problem = cases.Problem(cases.Size(1, side, side, channels=200, classes=40, centres=10, blocks=1), CPU)
    z, log_det = problem.latent()
    level, prior = problem.official, problem.model.mixture

    def ours() -> tuple[Tensor | None, Tensor]:
        all_scores = prior.scores(z, log_det, 0, per_class=True)
        return all_scores.class_log_density, all_scores.entropy

    def official() -> tuple[Tensor, Tensor]:
        return official_scores(z, log_det, level.mu, level.delta, level.phi_intra)

    (density, entropy), (theirs, negative_entropy) = ours(), official()
    assert density is not None
    errors = measure.relative_error(density / z.shape[1], theirs), measure.relative_error(-entropy, negative_entropy)
    seconds = medians(ours, official)
    extra = [timing.peak_memory(work, CPU) for work in (ours, official)]
    yield {
        "size": str(problem.size),
        "relative_error": max(errors),
        "seconds": seconds[0],
        "official_seconds": seconds[1],
        "times_faster": seconds[1] / seconds[0],
        "extra_bytes": extra[0],
        "official_extra_bytes": extra[1],
        "times_less_memory": extra[1] / extra[0],
    }


@torch.no_grad()
def speed(quick: bool) -> Any:
    model = detector()
    levels = [OfficialLevel.of(model, level) for level in range(model.config.feature_levels)]
    for side in (256,) if quick else TIMED:
        image = torch.rand(3, side, side)
        ours = functools.partial(model.score, image, 0, normalization="official", img_size="native")
        official = functools.partial(official_way, model, levels, image)
        error = measure.relative_error(ours().anomaly_map[0], official())
        mine, theirs, backbone = medians(
            ours, official, lambda p=image: preprocess.feature_maps(model, p, True).whole()
        )
        yield {
            "side": side,
            "relative_error": error,
            "megapixels_per_second": side * side / 1e6 / mine,
            "official_megapixels_per_second": side * side / 1e6 / theirs,
            "times_faster": theirs / mine,
            "share_of_backbone": backbone / mine,
        }


def official_way(model: HGADModel, levels: list[OfficialLevel], image: Tensor) -> Tensor:
    """Return the map of an image of class 0 as the official code computes it: timm's network, dense positions."""
    encoder, config = model.encoder, model.config
    assert isinstance(encoder, Backbone)
    height, width = image.shape[1:]
    images, scores = encoder.normalize(image[None]), []
    for s, level in enumerate(levels):
        resized = F.interpolate(images, (height >> s, width >> s), mode="bilinear", align_corners=True)
        x = encoder.net(resized)[0]
        h, w = x.shape[2:]
        pixels = x.permute(0, 2, 3, 1).reshape(h * w, -1)
        z, log_det = level.flow(pixels, [dense_position(config.pos_embed_dim, 1, h, w)])
        level_scores = official_scores(z, log_det, level.mu, level.delta, level.phi_intra, classes=[0])
        scores.append([each.view(1, h, w) for each in level_scores])
    by_density, by_entropy = (official_map(list(kind), config.msk_size) for kind in zip(*scores, strict=True))
    return F.interpolate((by_density * by_entropy)[None], (height, width), mode="bilinear")[0, 0]


@torch.no_grad()
def tile_errors(quick: bool) -> Any:
    """Return the errors of the default tiles on a photograph: noise would hide what pools over all of an image."""
    from sklearn.datasets import load_sample_image

    photograph = torch.tensor(load_sample_image("china.jpg")).permute(2, 0, 1) / 255
    for arch in NETWORKS:
        torch.manual_seed(0)
        large = (2251, 1500) if arch == "tf_efficientnet_b6" else (4501, 3000)
        image = images.resize_image(photograph, (601, 400) if quick else large)
        image = (image + 0.02 * torch.randn(image.shape)).clamp(0, 1)
        out_indices = (2,) if arch == "convnext_atto" else (3,)  # the stage of stride 16
        encoder = Backbone(
            HGADConfig(backbone_arch=arch, backbone_weights=None, feature_levels=1, out_indices=out_indices)
        )
        about, (one,) = encoder.footprint, encoder.passes(*image.shape[1:])
        (tiled,), (whole,) = encoder.feature_maps(image).whole(), encoder(encoder.normalize(image[None]))
        yield {
            "network": arch,
            "height": image.shape[1],
            "width": image.shape[2],
            "is_local": about.is_local,
            "halo": about.halo,
            "bytes_per_pixel": about.bytes_per_pixel,
            "tiles": [len(one.rows), len(one.columns)],
            "repeated": seen(one.rows) * seen(one.columns) / image[0].numel(),
            "relative_error": measure.relative_error(tiled, whole),
            "largest_error": float((tiled - whole).abs().max() / whole.abs().max()),
        }


def seen(cuts: list[tiles.Cut]) -> int:
    return sum(cut.stop - cut.start for cut in cuts)


def medians(*works: Callable[[], Any]) -> list[float]:
    """Return the median seconds of each, in turn."""
    return np.median(timing.alternate(works, rounds=3, device=CPU), 1).tolist()


PARTS: dict[str, Callable[[bool], Any]] = {
    "memory": memory,
    "mixture": mixture,
    "speed": speed,
    "tiles": tile_errors,
}

if __name__ == "__main__":
    main()
