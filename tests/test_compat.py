"""What earlier versions wrote is read: models of format 1, checkpoints of format 2, journals; `compat/` holds them."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import rounding
import torch
from torch import Tensor

import hgad_fast
from hgad_fast import HGADConfig, HGADModel
from hgad_fast.features.extract import FeatureSet
from hgad_fast.scoring.pipeline import Job, score_files
from hgad_fast.scoring.result import ScoreResult

COMPAT = Path(__file__).parent / "compat"
MODELS = ("conditional", "unconditional", "one-class", "backbone")
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
EXACT = ("class_id", "p_value", "is_anomalous", "threshold")


def assert_as_written(
    score: Callable[[HGADModel], ScoreResult], model: HGADModel, arrays: np.lib.npyio.NpzFile, kind: str
) -> None:
    """Check that verdicts are equal, and maps and scores as near to float64 as those of then."""
    result = score(model)
    for name in EXACT:
        np.testing.assert_array_equal(getattr(result, name).numpy(), arrays[f"{kind}.{name}"])
    # Then it was the target, wherever that could be reached; now it is what the same threshold attains.
    rate, rate_then = result.false_alarm_rate.numpy(), arrays[f"{kind}.false_alarm_rate"]
    assert np.array_equal(np.isnan(rate), np.isnan(rate_then)) and not (rate > rate_then).any()

    def values(result: ScoreResult) -> dict[str, Tensor]:
        return {name: getattr(result, name) for name in ("anomaly_map", "image_score")}

    exact, tolerance = rounding.exact_and_tolerance(lambda model: values(score(model)), model)
    rounding.assert_within(values(result), exact, tolerance)
    rounding.assert_within({name: torch.from_numpy(arrays[f"{kind}.{name}"]) for name in exact}, exact, tolerance)


@pytest.mark.parametrize("name", MODELS)
def test_models_of_format_1_give_the_scores_that_they_gave(name: str) -> None:
    model, arrays = hgad_fast.load(COMPAT / f"{name}.safetensors"), np.load(COMPAT / f"{name}.npz")
    assert isinstance(model, HGADModel) and model.config == HGADModel.load(COMPAT / f"{name}.safetensors").config
    features = [torch.from_numpy(arrays[f"features.{level}"]) for level in range(2)]
    assert_as_written(lambda model: model.score_features(features), model, arrays, "inferred")
    assert_as_written(
        lambda model: model.score_features(features, 0, normalization="official"), model, arrays, "official"
    )
    if "images" in arrays:
        images = torch.from_numpy(arrays["images"])
        assert_as_written(lambda model: model.score(images), model, arrays, "images")
        with pytest.warns(UserWarning, match="images are seen at"):
            assert_as_written(lambda model: model.score(images, img_size="native"), model, arrays, "native")


@pytest.mark.parametrize("name", MODELS)
def test_a_model_of_format_1_is_saved_with_the_same_tensors(name: str, tmp_path: Path) -> None:
    hgad_fast.load(COMPAT / f"{name}.safetensors").save(tmp_path / "again.safetensors")
    before, after = (tensors(path) for path in (COMPAT / f"{name}.safetensors", tmp_path / "again.safetensors"))
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[key]) for key, tensor in before.items())


def tensors(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(path)


def training_data() -> tuple[list[Tensor], Tensor]:
    rng = np.random.default_rng(6)
    levels = [torch.from_numpy(rng.standard_normal((12, c, s, s + 1)).astype(np.float32)) for c, s in ((8, 4), (7, 2))]
    return levels, torch.arange(12) % 2


@pytest.mark.parametrize("stopped_in", ["stage-1", "stage-2"])
def test_a_training_goes_on_from_a_checkpoint_of_format_2(stopped_in: str, tmp_path: Path) -> None:
    """To the losses and parameters of the training that was never stopped, but for rounding."""
    checkpoint = COMPAT / stopped_in / "checkpoint.pt"
    state = torch.load(checkpoint, weights_only=True)
    assert state["format"] == "hgad_fast training 2"
    levels, ids = training_data()
    data = FeatureSet([[level[i] for level in levels] for i in range(len(ids))], ids)

    def resumed(model: HGADModel, **options: Path) -> dict[str, Tensor]:
        records = model.fit(data, resume=checkpoint, **options).records
        losses = [list(level.values()) for record in records for level in record["losses"]]
        return {f"losses {i}": torch.tensor(level) for i, level in enumerate(losses)} | model.state_dict()

    actual = resumed(HGADModel(HGADConfig(**TRAINING)), output_dir=tmp_path)
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["format"] == "hgad_fast training 3"
    written = [list(level.values()) for record in json.loads((COMPAT / "trained.json").read_text()) for level in record]
    uninterrupted = {f"losses {i}": torch.tensor(level) for i, level in enumerate(written)}
    uninterrupted |= {name: torch.from_numpy(array) for name, array in np.load(COMPAT / "trained.npz").items()}
    assert len(written) == 20 and set(actual) == set(uninterrupted)

    exact, tolerance = rounding.exact_and_tolerance(resumed, HGADModel(HGADConfig(**TRAINING)))
    rounding.assert_within(actual, exact, tolerance)
    rounding.assert_within(uninterrupted, exact, tolerance)


def test_adam_s_moments_of_a_checkpoint_of_format_2_are_those_of_each_block() -> None:
    model = HGADModel(HGADConfig(**TRAINING))
    state = torch.load(COMPAT / "stage-2" / "checkpoint.pt", weights_only=True)
    converted = model.convert_checkpoint(state)["optimizer"]["state"]
    names = ("global_scale", "global_offset", "w1", "b1", "w2", "b2")  # of a block, in the order of format 2
    parameters = [p for group in model.parameter_groups() for p in group["params"]]
    for level, flow in enumerate(model.nfs):
        for k in range(2):
            for i, name in enumerate(names):
                old = state["optimizer"]["state"][(2 * level + k) * 6 + i]
                (new,) = (converted[j] for j, p in enumerate(parameters) if p is getattr(flow, name))
                for moment in ("exp_avg", "exp_avg_sq"):
                    assert torch.equal(new[moment][k], old[moment])
                assert new["step"] == old["step"]
    for offset in range(8):  # the centres and their weights
        assert torch.equal(converted[12 + offset]["exp_avg"], state["optimizer"]["state"][24 + offset]["exp_avg"])


def test_another_configuration_is_named_before_a_checkpoint_of_format_2_is_converted() -> None:
    with pytest.raises(ValueError, match="trained with another configuration: coupling_layers 2 -> 4"):
        model = HGADModel(HGADConfig(**TRAINING | {"coupling_layers": 4}))
        model.fit(training_data(), resume=COMPAT / "stage-2" / "checkpoint.pt")


@pytest.mark.parametrize("lost", ["state", "param_groups"])
def test_a_checkpoint_of_format_2_that_lacks_something_is_refused_by_name(lost: str, tmp_path: Path) -> None:
    state = torch.load(COMPAT / "stage-2" / "checkpoint.pt", weights_only=True)
    if lost == "state":
        del state["optimizer"]["state"][7]
    else:
        state["optimizer"]["param_groups"].pop()
    torch.save(state, tmp_path / "old.pt")
    with pytest.raises(ValueError, match=r"old\.pt.* does not fit this optimizer"):
        HGADModel(HGADConfig(**TRAINING)).fit(training_data(), resume=tmp_path / "old.pt")


def test_a_scoring_run_goes_on_from_an_old_journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings are those of today: nothing is scored again, and rows get the rates that they lack."""
    shutil.copytree(COMPAT / "journal", tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    files = [Path("images/one.png"), Path("images/two.png")]
    for file in files:
        os.utime(file, ns=(10**18, 10**18))  # as the journal has it; a checkout sets its own time
    for name in ("one", "two"):
        (tmp_path / "overlays").mkdir(exist_ok=True)
        (tmp_path / "overlays" / f"{name}.png").touch()
    model = HGADModel.load(COMPAT / "backbone.safetensors")
    monkeypatch.setattr("hgad_fast.scoring.pipeline._score_batch", lambda *_: pytest.fail("scored again"))
    records = score_files(model, files, Job(output=Path("."), resume=True))
    lines = [json.loads(line) for line in (COMPAT / "journal" / "scores.jsonl").read_text().splitlines()]
    rates = {"target_false_alarm_rate": 0.2, "false_alarm_rate": model.calibration.attained_rate(0)}
    assert [record.row for record in records] == [rates | line["row"] for line in lines[1:]]
    assert (tmp_path / "scores.csv").read_text().count("\n") == 3
