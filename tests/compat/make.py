"""Writes the files in this folder: models, checkpoints and a journal of hgad_fast at commit b154a6a, and what they say.

It ran once, at that commit (`python make.py FOLDER`); later versions only read what it wrote.
"""

# ruff: noqa: I001 (the modules are those of that commit)

import json
import os
import sys
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from hgad_fast import HGADConfig, HGADModel
from hgad_fast.features import FeatureSet
from hgad_fast.pipeline import Job, score_files

FOLDER = Path(sys.argv[1])
SMALL = {
    "n_classes": 3,
    "class_names": ("a", "b", "c"),
    "n_intra_centers": 2,
    "backbone_arch": None,
    "feature_levels": 2,
    "feature_dims": (12, 9),
    "coupling_layers": 3,
    "pos_embed_dim": 8,
    "msk_size": 24,
}
MODELS = {
    "conditional": {},
    "unconditional": {"flow_arch": "flow_model", "fusion": "standardised", "memory": "reversible"},
    "one-class": {"n_classes": 1, "class_names": None},
    "backbone": {
        "backbone_arch": "test_efficientnet",
        "backbone_weights": None,
        "feature_dims": None,
        "out_indices": (1,),
        "img_size": 64,
    },
}
TRAINING = {
    "n_classes": 2,
    "n_intra_centers": 3,
    "backbone_arch": None,
    "feature_levels": 2,
    "feature_dims": (8, 7),
    "coupling_layers": 2,
    "pos_embed_dim": 8,
    "msk_size": 16,
    "meta_epochs": 5,
    "sub_epochs": 2,
    "batch_size": 4,
    "lr": 1e-2,
    "calibration_fraction": 0.0,
}
RESULTS = ("anomaly_map", "image_score", "class_id", "p_value", "is_anomalous", "threshold", "false_alarm_rate")


def features(n: int, dims: tuple[int, ...], seed: int) -> list[torch.Tensor]:
    rng = np.random.default_rng(seed)
    shapes = ((n, c, 8 >> level, 10 >> level) for level, c in enumerate(dims))
    return [torch.from_numpy(rng.standard_normal(shape).astype(np.float32)) for shape in shapes]


def disturbed(model: HGADModel) -> HGADModel:
    """Off its initial values, in a way that any version and machine repeats."""
    rng = np.random.default_rng(1)
    with torch.no_grad():
        for parameter in [*model.nfs.parameters(), *model.mixture.parameters()]:
            parameter += torch.from_numpy(0.05 * rng.standard_normal(parameter.shape).astype(np.float32))
    return model


def write_models() -> None:
    for name, changes in MODELS.items():
        torch.manual_seed(0)
        model = disturbed(HGADModel(HGADConfig(**SMALL | changes)))
        dims = tuple(model.feat_dims)
        labels = torch.arange(12) % model.config.n_classes
        model.calibrate(FeatureSet.from_levels(features(12, dims, seed=2), labels), false_alarm_rate=0.2)
        model.save(FOLDER / f"{name}.safetensors")
        inputs = features(4, dims, seed=3)
        arrays = {f"features.{level}": x.numpy() for level, x in enumerate(inputs)}
        arrays |= results("inferred", model.score_features(inputs))
        arrays |= results("official", model.score_features(inputs, 0, normalization="official"))
        if model.encoder is not None:
            rng = np.random.default_rng(4)
            images = rng.random((2, 3, 70, 64), dtype=np.float32)
            arrays |= {"images": images} | results("images", model.score(torch.from_numpy(images)))
            arrays |= results("native", model.score(torch.from_numpy(images), img_size="native"))
            write_journal(model)
        np.savez_compressed(FOLDER / f"{name}.npz", **arrays)


def results(kind: str, result) -> dict[str, np.ndarray]:
    return {f"{kind}.{name}": getattr(result, name).numpy() for name in RESULTS}


def write_journal(model: HGADModel) -> None:
    rng = np.random.default_rng(5)
    folder = FOLDER / "journal"
    (folder / "images").mkdir(parents=True)
    os.chdir(folder)
    for name in ("one", "two"):
        path = Path("images") / f"{name}.png"
        Image.fromarray(rng.integers(0, 256, (64, 72, 3), dtype=np.uint8)).save(path)
        os.utime(path, ns=(10**18, 10**18))
    score_files(model, [Path("images/one.png"), Path("images/two.png")], Job(output=Path(".")))
    for path in ("scores.csv", "regions.csv"):
        os.unlink(path)
    for overlay in Path("overlays").iterdir():
        overlay.unlink()
    os.rmdir("overlays")
    os.chdir(FOLDER)


class Killed(Exception):
    pass


def training_data() -> tuple[list[torch.Tensor], torch.Tensor]:
    rng = np.random.default_rng(6)
    levels = [torch.from_numpy(rng.standard_normal((12, c, s, s + 1)).astype(np.float32)) for c, s in ((8, 4), (7, 2))]
    return levels, torch.arange(12) % 2


def write_training() -> None:
    for name, stop in (("stage-1", (1, 1)), ("stage-2", (3, 1))):
        folder = FOLDER / name

        def callback(record, stop=stop):
            if (record["meta_epoch"], record["sub_epoch"]) == stop:
                raise Killed

        try:
            HGADModel(HGADConfig(**TRAINING)).fit(training_data(), output_dir=folder, callbacks=[callback])
        except Killed:
            pass
    whole = HGADModel(HGADConfig(**TRAINING))
    history = whole.fit(training_data())
    np.savez_compressed(FOLDER / "trained.npz", **{k: v.numpy() for k, v in whole.state_dict().items()})
    losses = [record["losses"] for record in history.records]
    (FOLDER / "trained.json").write_text(json.dumps(losses) + "\n")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    FOLDER = FOLDER.absolute()
    FOLDER.mkdir(parents=True)
    write_models()
    write_training()
