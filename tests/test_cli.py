"""The command line as its users meet it: a whole story on a tiny dataset, and every way to get it wrong."""

from __future__ import annotations

import csv
import json
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import torch
import typer.main
from click.testing import Result
from PIL import Image
from typer.testing import CliRunner

import hgad_fast
from hgad_fast import HGADModel, methods
from hgad_fast import options as shared_options
from hgad_fast.cli import app
from hgad_fast.data.images import read_image
from hgad_fast.evaluation.evaluate import Evaluation
from hgad_fast.methods import METHODS
from hgad_fast.scoring.regions import find_regions

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = tuple(typer.main.get_command(app).commands)
BEGINNINGS = ("reading ", "loading ")  # of what is said at once
TINY = {
    "backbone_arch": "test_efficientnet",
    "out_indices": [1],
    "img_size": 48,
    "msk_size": 24,
    "feature_levels": 2,
    "coupling_layers": 2,
    "n_intra_centers": 2,
    "pos_embed_dim": 8,
    "meta_epochs": 3,
    "sub_epochs": 1,
    "batch_size": 4,
}


def hgad(*args: Any) -> Result:
    return CliRunner().invoke(app, [str(arg) for arg in args])


def succeeds(*args: Any) -> Result:
    result = hgad(*args)
    assert result.exit_code == 0, result.output
    return result


def fails(*args: Any) -> str:
    """Return the one line of the error, after what the command begins with; nothing is on stdout, nothing raised."""
    result = hgad(*args)
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit)
    assert result.stdout == ""
    *before, line = result.stderr.splitlines()
    assert line.startswith("hgad-fast: ") and len(before) <= 1, result.stderr
    assert all(other.startswith(BEGINNINGS) for other in before), result.stderr
    return line


def draw(rng: np.random.Generator, slope: float, defect: bool) -> tuple[Image.Image, Image.Image]:
    """Stripes of the given slope, 64 wide and 48 high, with or without a patch of negative; and its mask."""
    y, x = np.mgrid[:48, :64]
    pixels = 128 + 90 * np.sin(0.7 * (x + slope * y))[..., None] * (1.0, 0.8, 0.5) + rng.normal(0, 6, (48, 64, 3))
    mask = np.zeros((48, 64), np.uint8)
    if defect:
        top, left = rng.integers(4, 28), rng.integers(4, 44)
        pixels[top : top + 16, left : left + 16] = 255 - pixels[top : top + 16, left : left + 16]
        mask[top : top + 16, left : left + 16] = 255
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)), Image.fromarray(mask)


def write_dataset(root: Path) -> Path:
    rng = np.random.default_rng(0)
    for name, slope in (("leaning", 1.0), ("upright", 0.0)):
        for folder, count in (("train/good", 10), ("test/good", 2), ("test/patch", 3)):
            for i in range(count):
                image, mask = draw(rng, slope, folder == "test/patch")
                (root / name / folder).mkdir(parents=True, exist_ok=True)
                image.save(root / name / folder / f"{i:03}.png")
                if folder == "test/patch":
                    (root / name / "ground_truth/patch").mkdir(parents=True, exist_ok=True)
                    mask.save(root / name / "ground_truth/patch" / f"{i:03}_mask.png")
    return root


def train_arguments(data: Path, output: Path) -> list[str]:
    settings = [word for name, value in TINY.items() for word in ("--set", f"{name}={json.dumps(value)}")]
    return ["train", str(data), "--output", str(output), "--weights", "random", "--device", "cpu", *settings]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def training(data, tmp_path_factory) -> tuple[Path, Result]:
    output = tmp_path_factory.mktemp("out") / "run"
    return output, succeeds(*train_arguments(data, output), "--keep-best")


@pytest.fixture(scope="module")
def model(training) -> Path:
    return training[0] / "model.safetensors"


# ---------------------------------------------------------------------------------------------------- the story


def test_train_writes_a_calibrated_model_and_says_where(training):
    output, result = training
    written = {"best.safetensors", "checkpoint.pt", "metrics.jsonl", "model.safetensors", "run.json"}
    assert {path.name for path in output.iterdir()} == written
    held_out, *table, model, command = result.stdout.splitlines()
    assert re.fullmatch(r"held-out normal images: 10, of which \d raise an alarm \(target 1.0%\)", held_out)
    assert [line.split()[:2] + line.split()[3:5] for line in table[1:]] == [
        [name, "5", "1.0%", "9.1%"] for name in ("leaning", "upright")
    ]
    assert model == f"model: {output / 'model.safetensors'}"
    assert command == f"next: hgad-fast score {shlex.quote(str(output / 'model.safetensors'))} NEW_IMAGES -o scores"
    first, estimate, warning, *others = result.stderr.splitlines()
    assert first.startswith("reading ")
    assert re.fullmatch(
        r"(about|under) .+ on \d+ CPU threads? \(features .+, 6 steps .+, calibration .+\), .+ of memory", estimate
    )
    assert warning.startswith("hgad-fast: too few calibration images for a false-alarm rate of 1.0%")
    assert all(line.startswith("hgad-fast: the class of ") for line in others)  # of six steps' training
    trained = HGADModel.load(output / "model.safetensors")
    assert trained.class_names == ("leaning", "upright")
    assert trained.config.img_size == 48 and trained.config.out_indices == (1,)
    assert len(trained.calibration.scores) == 10


def test_a_place_gaussian_from_its_preset(data, tmp_path):
    output = tmp_path / "run"
    small = ["--backbone", "test_efficientnet", "--weights", "random", "--device", "cpu"]
    for setting in ("img_size=48", "msk_size=48", "dim=8", "coarse_dim=4", "grid_stride=8", "out_indices=[1,2,3]"):
        small += ["--set", setting]
    arguments = ["train", str(data), "--output", str(output), "--preset", "gaussian", *small]
    message = fails(*arguments, "--keep-best")
    assert "--keep-best chooses among meta-epochs, and the method 'gaussian' is fitted at once" in message
    trained = succeeds(*arguments, "--false-alarm-rate", "0.2", "--resume")
    assert f"\nmodel: {output / 'model.safetensors'}\n" in trained.stdout
    facts = json.loads(succeeds("info", str(output / "model.safetensors"), "--json").stdout)["model"]
    assert (
        facts["method"] == "gaussian"
        and facts["places"] == "6 x 8"
        and facts["images a group"] == "leaning 5, upright 5"
    )
    assert "leaning" in succeeds("eval", str(output / "model.safetensors"), str(data)).stdout
    scored = succeeds("score", str(output / "model.safetensors"), str(data / "upright/test/patch"), "--json")
    assert len(json.loads(scored.stdout)) == 3
    recalibrated = tmp_path / "recalibrated.safetensors"
    succeeds("calibrate", str(output / "model.safetensors"), str(data), "-o", str(recalibrated))
    assert recalibrated.is_file()
    before = (output / "model.safetensors").read_bytes()
    assert "there is nothing to resume, and --overwrite fits it anew" in fails(*arguments, "--resume")
    assert (output / "model.safetensors").read_bytes() == before


def test_train_resumes_where_it_stood(training, data, tmp_path):
    output, _ = training
    shutil.copytree(output, tmp_path / "run")
    (tmp_path / "run" / "model.safetensors").unlink()
    succeeds(*train_arguments(data, tmp_path / "run"), "--resume")
    first, again = (HGADModel.load(folder / "model.safetensors") for folder in (output, tmp_path / "run"))
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    other = hgad(*train_arguments(data, tmp_path / "run"), "--resume", "--set", "lr=0.1")
    (*_, message), code = other.stderr.splitlines(), other.exit_code
    assert code == 1 and "checkpoint.pt was trained with another configuration: lr 0.0002 -> 0.1" in message


def test_a_run_is_never_replaced_unasked(training, data, tmp_path, monkeypatch):
    folder = shutil.copytree(training[0], tmp_path / "run")
    for name in ("notes.txt", "report.html"):
        (folder / name).touch()
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    arguments = train_arguments(data, folder)
    assert "run holds a training run (model.safetensors): --resume goes on with it, --overwrite" in fails(*arguments)
    assert "give one of them" in fails(*arguments, "--resume", "--overwrite")
    assert "HGADConfig has no field" in fails(*arguments, "--overwrite", "--set", "nothing=1")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    (folder / "model.safetensors").rename(tmp_path / "model.safetensors")  # of a run that did not end
    assert "holds a training run (best.safetensors)" in fails(*arguments)
    succeeds(*arguments, "--overwrite")
    after = {path.name for path in folder.iterdir()}
    assert after == before.keys() - {"best.safetensors", "report.html"}


def test_train_keeps_features_on_disk_for_the_next_run(data, tmp_path):
    options = ["--cache", "disk", "--cache-dir", tmp_path / "kept", "--cache-dtype", "float16", "--cache-limit", "1GB"]
    first, second = (succeeds(*train_arguments(data, tmp_path / name), *options) for name in ("a", "b"))
    (folder,) = (tmp_path / "kept").iterdir()
    assert folder.name.startswith("test_efficientnet-48-float16-")
    assert f"\nfeatures of 20 images, about 230 kB, go to {folder} (" in first.stderr
    assert "features of" not in second.stderr
    a, b = (HGADModel.load(tmp_path / name / "model.safetensors").state_dict() for name in ("a", "b"))
    assert all(torch.equal(tensor, b[name]) for name, tensor in a.items())
    assert "'many' is no size" in fails(*train_arguments(data, tmp_path / "c"), "--cache-limit", "many")


def test_settings_come_from_a_file_and_from_options_that_go_before(data, tmp_path, monkeypatch):
    made = []

    def fit(self, dataset, **options):
        made.append((self.config, options))

    monkeypatch.setattr(HGADModel, "fit", fit)
    (tmp_path / "c.json").write_text(json.dumps(TINY | {"lr": 0.5, "memory": "standard", "backbone_arch": "nobody"}))
    succeeds(
        *("train", data, "--config", tmp_path / "c.json", "--set", "lr=1e-3", "--set", "memory=reversible"),
        *("--backbone", "test_efficientnet", "--weights", "random", "--false-alarm-rate", "0.2", "--skip-bad"),
    )
    ((config, options),) = made
    assert (config.lr, config.memory, config.backbone_weights) == (1e-3, "reversible", None)
    assert config.class_names == ("leaning", "upright") and config.coupling_layers == 2
    assert options["false_alarm_rate"] == 0.2 and options["skip_bad"] is True and options["resume"] is False


def test_score_prints_a_line_an_image(model, data):
    folder = data / "upright" / "test" / "patch"
    result = succeeds("score", model, folder, data / "leaning" / "test" / "good" / "000.png")
    lines = result.stdout.splitlines()
    trained = HGADModel.load(model)
    expected = trained.score([*sorted(folder.iterdir()), data / "leaning/test/good/000.png"])
    anomalous = int(expected.is_anomalous.sum())
    first, counts, rates = result.stderr.splitlines()
    assert len(lines) == 4 and first == f"loading {model}"
    assert counts == f"4 images: {anomalous} ANOMALOUS, {4 - anomalous} normal"
    assert rates.startswith("false-alarm rate: 1.0% asked for; the thresholds attain 9.1% of ")
    for i, line in enumerate(lines):
        assert float(line.split()[0]) == pytest.approx(float(expected.image_score[i]), abs=5e-5)
        assert float(line.split()[2]) == pytest.approx(float(expected.p_value[i]), abs=5e-4)
        assert ("ANOMALOUS" in line) == bool(expected.is_anomalous[i])
        assert line.split("/")[0].split()[-1] == trained.class_names[expected.class_id[i]]
        assert line.endswith("000.png" if i == 3 else f"{i:03}.png")


def test_score_prints_nothing_but_json_when_asked(model, data):
    file = data / "upright" / "test" / "patch" / "001.png"
    (row,) = json.loads(succeeds("score", model, file, "--json").stdout)
    trained = HGADModel.load(model)
    expected = trained.score(file)
    assert row == {
        "file": str(file),
        "class": trained.class_names[expected.class_id],
        "score": float(expected.image_score),
        "threshold": float(expected.threshold),
        "p_value": float(expected.p_value),
        "anomalous": bool(expected.is_anomalous),
        "target_false_alarm_rate": 0.01,
        "false_alarm_rate": float(expected.false_alarm_rate),
        "regions": [asdict(region) for region in find_regions(expected.anomaly_map[0], float(expected.threshold))],
    }


@pytest.mark.parametrize("name", ["leaning", "0"])
def test_score_takes_the_class_by_name_or_number(model, data, name):
    file = data / "upright" / "test" / "good" / "000.png"
    (row,) = json.loads(succeeds("score", model, file, "--json", "--class", name).stdout)
    assert row["class"] == "leaning"
    assert row["score"] == float(HGADModel.load(model).score(file, "leaning").image_score)


def test_score_writes_table_overlays_and_maps(model, data, tmp_path):
    images = [data / "upright" / "test" / "patch", data / "leaning" / "test" / "patch" / "000.png"]
    output = tmp_path / "new" / "scored"
    succeeds("score", model, *images, "--output", output, "--maps")
    names = ["upright-test-patch-000", "001", "002", "leaning-test-patch-000"]
    assert {path.name for path in (output / "overlays").iterdir()} == {f"{name}.png" for name in names}
    for name in names:
        assert read_image(output / "overlays" / f"{name}.png").shape[2] > 600
    actual = np.load(output / "maps" / "leaning-test-patch-000.npy")
    expected = HGADModel.load(model).score(images[1]).anomaly_map[0]
    assert actual.dtype == np.float32 and actual.shape == (48, 64)
    np.testing.assert_array_equal(actual, expected.numpy())
    with open(output / "scores.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["file"] for row in rows] == [str(images[0] / f"{i:03}.png") for i in range(3)] + [str(images[1])]
    assert float(rows[3]["score"]) == pytest.approx(float(expected.max()), rel=0.2)
    assert {row["anomalous"] for row in rows} <= {"True", "False"}
    assert {row["target_false_alarm_rate"] for row in rows} == {"0.01"} and {row["error"] for row in rows} == {""}
    assert {float(row["false_alarm_rate"]) for row in rows} == {1 / 11}


def test_one_image_of_many_names_never_overwrites_another(model, data, tmp_path):
    source = data / "upright" / "test" / "good" / "000.png"
    files = [tmp_path / name for name in ("a/x.png", "a/x.bmp", "b/X.png", "a-x.png", "y.png")]
    for file in files:
        file.parent.mkdir(exist_ok=True)
        Image.open(source).save(file)
    scored = succeeds("score", model, *files, files[-1], tmp_path / "b", "--output", tmp_path / "out")
    assert len(scored.stdout.splitlines()) == len(files)  # each once, however often it is given
    names = {path.stem for path in (tmp_path / "out" / "overlays").iterdir()}
    assert names == {"a-x", "a-x-2", "b-X", "a-x-3", "y"}


def test_a_bad_image_among_good_ones_is_named_and_the_others_scored(model, data, tmp_path):
    good = data / "upright" / "test" / "good" / "000.png"
    bad = tmp_path / "bad.png"
    bad.write_bytes(good.read_bytes()[:200])
    result = hgad("score", model, bad, good, tmp_path / "none.png", "--json", "--output", tmp_path / "out")
    assert result.exit_code == 1
    assert [row["file"] for row in json.loads(result.stdout)] == [str(good)]
    lines = result.stderr.splitlines()
    assert lines[1].startswith(f"hgad-fast: {bad}: ")
    assert lines[2] == f"hgad-fast: {tmp_path / 'none.png'}: No such file or directory"
    assert re.match(r"3 images: \d ANOMALOUS, \d normal, 2 failed; .*/out/scores.csv, .*/out/overlays/$", lines[3])
    assert lines[-1] == "hgad-fast: 2 of 3 images could not be scored; the others are scored"
    with open(tmp_path / "out" / "scores.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["file"] for row in rows] == [str(bad), str(good), str(tmp_path / "none.png")]
    assert [(row["score"] == "", row["error"] != "") for row in rows] == [(True, True), (False, False), (True, True)]
    alone = hgad("score", model, bad)
    assert alone.exit_code == 1 and alone.stderr.endswith("\nhgad-fast: 1 of 1 image could not be scored\n")


def test_data_counts_and_names_what_must_be_fixed(data, tmp_path):
    lines = succeeds("data", data).stdout.splitlines()
    assert lines[0] == f"MVTec AD: {data}"
    assert lines[2].split() == ["leaning", "10", "0", "2", "3", "3"]
    copy = shutil.copytree(data, tmp_path / "copy")
    (copy / "upright/test/good/000.png").write_bytes(b"")
    actual = hgad("data", data, copy, "--json")
    told = json.loads(actual.stdout)
    assert actual.exit_code == 1 and actual.stderr.splitlines()[1].startswith(
        f"hgad-fast: {sum(f['is_error'] for f in told['findings'])} "
    )
    assert list(told["counts"]) == [f"{root.name}-{name}" for root in (data, copy) for name in ("leaning", "upright")]
    assert {f["kind"] for f in told["findings"] if f["is_error"]} == {"unreadable file", "same image in two places"}
    assert "no such folder" in fails("data", tmp_path / "absent")


def test_eval_prints_a_table_or_json_and_writes_it(model, data, tmp_path):
    figures = json.loads(succeeds("eval", model, data, "--json").stdout)
    result = succeeds("eval", model, data, "--output", tmp_path / "figures.json", "--official", model)
    written = Evaluation.from_dict(json.loads((tmp_path / "figures.json").read_text()))
    for protocol in ("official", "honest"):
        assert f"{protocol} protocol" in result.stdout
        rows = figures["protocols"][protocol]
        assert set(rows["classes"]) == {"leaning", "upright"}
        for figure in ("image_auroc", "pixel_auroc"):
            mean = (rows["classes"]["leaning"][figure] + rows["classes"]["upright"][figure]) / 2
            assert rows["mean"][figure] == pytest.approx(mean) == getattr(written.mean(protocol), figure)
            assert f"{100 * mean:.1f}" in result.stdout
    best = succeeds("eval", model, data, "--official", model.parent / "best.safetensors")
    assert "checkpoint: best on the test set" in best.stdout and "checkpoint: last" in best.stdout
    assert (figures["n_normal"], figures["n_anomalous"]) == (4, 6) == (written.n_normal, written.n_anomalous)


def test_another_false_alarm_rate_changes_the_verdict(model, data):
    # 10 calibration images, 5 of each class, are pooled: p-values are multiples of 1/11
    file = data / "upright" / "test" / "good" / "000.png"
    p_value, thresholds = None, []
    for rate in (0.1, 0.999):
        (row,) = json.loads(succeeds("score", model, file, "--json", "--false-alarm-rate", rate).stdout)
        p_value = row["p_value"]
        thresholds.append(row["threshold"])
        assert row["anomalous"] == (p_value <= rate + 1e-9)
    assert thresholds[1] is None or thresholds[1] < thresholds[0]


def test_images_seen_at_another_size(model, data, tmp_path):
    """Thresholds of that size come from `calibrate`; `score` and `eval` then say the same, without a warning."""
    file = data / "upright" / "test" / "patch" / "000.png"
    warned = succeeds("score", model, file, "--img-size", "native", "--json")
    assert "hgad-fast calibrate, makes new ones" in warned.stderr
    native, expected = tmp_path / "native.safetensors", HGADModel.load(model)
    made = succeeds("calibrate", model, data, "--output", native, "--img-size", "native")
    assert made.stdout.startswith("held-out normal images: 20, ") and made.stdout.endswith(f"\nmodel: {native}\n")
    expected.calibrate(data, img_size="native", false_alarm_rate=expected.calibration.false_alarm_rate)
    assert torch.equal(HGADModel.load(native).calibration.scores, expected.calibration.scores)
    again = succeeds("score", native, file, "--img-size", "native", "--max-memory", "3GB", "--tiles", "never", "--json")
    assert "calibrate" not in again.stderr
    (row,) = json.loads(again.stdout)
    actual = expected.score(file, img_size="native")
    assert (row["score"], row["threshold"]) == (float(actual.image_score), float(actual.threshold))
    succeeds("eval", native, data, "--img-size", "native", "--output", tmp_path / "figures.json")
    tested = json.loads((tmp_path / "figures.json").read_text())["images"]["honest"]
    (same,) = [p for p in tested if p["path"] == "upright/test/patch/000.png"]
    for name in ("score", "threshold"):
        assert same[name] == row[name]


@pytest.mark.parametrize(
    ("options", "method", "backbone"),
    [
        ((), "hgad", "tf_efficientnet_b6"),
        (("--preset", "official"), "hgad", "tf_efficientnet_b6"),
        (("--preset", "official", "--method", "vqflow"), "vqflow", "convnextv2_base"),
        (("--preset", "small"), "vqflow", "tf_efficientnet_lite0"),
        (("--method", "vqflow"), "vqflow", "convnextv2_base"),
        (("--preset", "gaussian"), "gaussian", "tf_efficientnet_lite0"),
    ],
)
def test_the_method_follows_from_the_preset(options, method, backbone, data, monkeypatch):
    made = []
    monkeypatch.setattr("hgad_fast.methods.create", lambda config: made.append(config) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        raise hgad("train", data, *options).exception
    assert [(config.method, config.backbone_arch) for config in made] == [(method, backbone)]


@pytest.mark.parametrize("command", ["train", "ablate"])
def test_a_preset_of_another_method_is_refused(command, data):
    message = fails(command, data, "--preset", "small", "--method", "hgad")
    assert "--preset is 'small', which is one of vqflow, and --method is 'hgad': leave --method out, or take" in message
    for options in ((), ("--method", "hgad")):
        message = fails(command, data, "--preset", "tiny", *options)
        assert "--preset is 'tiny'; allowed are official, fast (hgad); " in message
        assert "gaussian, gaussian-dinov2 (gaussian)" in message and "official, small (vqflow)" in message
    message = fails(command, data, "--method", "patchcore")
    assert "--method is 'patchcore'; allowed are " in message and all(name in message for name in METHODS)


@pytest.mark.parametrize("command", ["train", "ablate"])
def test_the_fields_of_the_configurations_are_listed(command):
    text = succeeds(command, "--set", "help").stdout  # without the arguments that the command needs
    for field in ("img_size", "coupling_layers", "n_prototypes", "coarse_dim"):
        assert re.search(rf"^  {field} +\S+ +\w", text, re.MULTILINE), field


def test_presets_are_listed_with_what_they_need(data):
    rows = json.loads(succeeds("presets", "--json").stdout)
    assert {row["method"] for row in rows} == set(METHODS) and all(all(row.values()) for row in rows)
    text = succeeds("presets").stdout
    for row in rows:
        assert all(value in text for value in row.values())
        assert row["preset"] in click.unstyle(succeeds("train", "--help").stdout)


def test_train_under_torchrun_says_its_estimate_once(data, tmp_path, monkeypatch):
    monkeypatch.setattr(HGADModel, "fit", lambda *_, **__: None)
    monkeypatch.setattr("hgad_fast.training.runs.summary", lambda model: [])
    for rank, lines in (("1", 0), ("0", 2)):
        monkeypatch.setenv("RANK", rank)
        assert len(succeeds(*train_arguments(data, tmp_path / "run")).stderr.splitlines()) == lines


def test_centres_are_of_hgad_alone(data):
    message = fails("ablate", data, "--method", "vqflow", "--centres", "1,5")
    assert message.endswith("--centres is '1,5', and models of the method 'vqflow' have no centres")


def test_info_describes_machine_and_model(model):
    actual = json.loads(succeeds("info", model, "--json").stdout)
    assert actual["hgad_fast"] == hgad_fast.__version__ and actual["torch"] == torch.__version__
    assert actual["backend"] in ("torch", "triton")
    assert actual["model"]["classes"] == "leaning, upright"
    assert actual["model"]["backbone"] == "test_efficientnet"
    assert actual["model"]["calibration"].startswith("10 images, false-alarm rate 1.0%")
    text = succeeds("info", model).stdout
    for word in (hgad_fast.__version__, torch.__version__, "leaning, upright", str(model)):
        assert word in text


def test_info_without_triton(monkeypatch):
    import importlib.metadata
    import importlib.util

    find_spec, version = importlib.util.find_spec, importlib.metadata.version

    def no_version(name: str) -> str:
        if name == "triton":
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "triton" else find_spec(name, *a))
    monkeypatch.setattr(importlib.metadata, "version", no_version)
    actual = json.loads(succeeds("info", "--json").stdout)
    assert actual["triton"] is None and actual["backend"] == "torch"


# ---------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--set", "img_sizes=3"), "HGADConfig has no field 'img_sizes'; it has n_classes, "),
        (("--set", "img_size=big"), "HGADConfig.img_size is 'big'; allowed: a whole number from 1"),
        (("--set", "lr=NaN"), "HGADConfig.lr is nan; allowed: a finite number above 0"),
        (("--set", "img_size"), "--set 'img_size' is no assignment; write --set FIELD=VALUE"),
        (("--set", 'class_names=["a","b"]', "--weights", "random"), "has the classes leaning, upright"),
        (("--backbone", "resnet5O"), "'resnet5O', which this timm"),
        (("--weights", "none.pth"), "--weights: there is no file none.pth"),
        (("--set", "img_sizes=3"), "Did you mean 'img_size'?"),
        (("--weights", "packged"), "did you mean 'packaged'. Allowed are 'pretrained', 'packaged', 'random' "),
        (("--config", "none.json"), "'none.json'"),
        (("--false-alarm-rate", "0"), "--false-alarm-rate is 0.0; allowed: above 0 and below 1"),
        (("--device", "cuda:99", "--weights", "random"), "device 'cuda:99' cannot be used"),
        (("--device", "gpu", "--weights", "random"), "device 'gpu' cannot be used"),
    ],
)
def test_a_bad_argument_of_train_is_named(arguments, message, data, tmp_path):
    small = ("--backbone", "test_efficientnet", *(("--weights", "random") if "--weights" not in arguments else ()))
    assert message in fails("train", data, "--output", tmp_path / "run", *small, *arguments)
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "c.json is no JSON: "),
        (b"\xff\xfe\x00", "c.json is no JSON: "),
        (b"[1]", "c.json holds a list; it must hold the fields of a configuration"),
        (b'{"img": 3}', "HGADConfig has no field 'img'"),
        (b'{"n_classes": 7}', "HGADConfig.class_names is ('leaning', 'upright'); allowed: 7 different names"),
    ],
)
def test_a_bad_configuration_file_is_named(content, message, data, tmp_path):
    (tmp_path / "c.json").write_bytes(content)
    assert message in fails("train", data, "--config", tmp_path / "c.json")


def test_every_bad_training_image_is_listed(data, tmp_path):
    shutil.copytree(data, tmp_path / "data")
    bad = [tmp_path / "data" / name for name in ("leaning/train/good/003.png", "upright/train/good/000.png")]
    for file in bad:
        file.write_bytes(b"no image")
    result = hgad(*train_arguments(tmp_path / "data", tmp_path / "run"))
    assert result.exit_code == 1 and not list((tmp_path / "run").iterdir())
    assert "2 of 20 images cannot be used" in result.stderr and "--skip-bad" in result.stderr
    assert all(str(file) in result.stderr for file in bad)
    skipped = succeeds(*train_arguments(tmp_path / "data", tmp_path / "run"), "--skip-bad", "--set", "meta_epochs=1")
    assert all(f"skipped {file}" in skipped.stderr for file in bad)


@pytest.mark.parametrize("command", ["score", "eval", "info"])
def test_a_bad_model_file_is_named(command, data, tmp_path):
    rest = [] if command == "info" else [data]
    assert f"there is no model file {tmp_path / 'm'}" in fails(command, tmp_path / "m", *rest)
    (tmp_path / "m").write_bytes(b"no model")
    assert f"{tmp_path / 'm'} is no whole safetensors file" in fails(command, tmp_path / "m", *rest)


def test_bad_arguments_of_score_and_eval_are_named(model, data, tmp_path):
    file = data / "upright" / "test" / "good" / "000.png"
    assert "--maps needs --output" in fails("score", model, file, "--maps")
    assert "--map-format needs --output" in fails("score", model, file, "--map-format", "tiff16")
    assert "--resume needs --output" in fails("score", model, file, "--resume")
    assert "--map-format is 'gif'; allowed are npy, " in fails(
        "score", model, file, "--map-format", "gif", "-o", tmp_path / "out"
    )
    for size in ("big", "0", "-3"):
        assert f"--img-size is '{size}'; give the short side" in fails("score", model, file, "--img-size", size)
    assert "--max-memory is 'lots'; pass bytes, " in fails("score", model, file, "--max-memory", "lots")
    assert "--tiles is 'maybe'; allowed are auto, always, never" in fails("score", model, file, "--tiles", "maybe")
    assert "class 'upside' is unknown; the model knows leaning, upright" in fails(
        "score", model, file, "--class", "upside"
    )
    assert "class 2 is unknown; the model knows leaning, upright" in fails("score", model, file, "--class", "2")
    assert "--false-alarm-rate is 1.5" in fails("score", model, file, "--false-alarm-rate", "1.5")
    assert f"there are no images in {tmp_path}" in fails("score", model, tmp_path)
    assert f"{tmp_path / 'none'}: no such folder" in fails("eval", model, tmp_path / "none")
    (tmp_path / "file").touch()
    assert str(tmp_path / "file") in fails("score", model, file, "--output", tmp_path / "file" / "out").replace("'", "")
    for command in (["eval", model, data], ["calibrate", model, data], ["report", tmp_path]):
        assert f"--output is {tmp_path}, a folder" in fails(*command, "--output", tmp_path)
    for name in ("leaning", "bent"):
        shutil.copytree(data / "upright", tmp_path / "other" / name)
    assert "classes the model does not know: bent" in fails("eval", model, tmp_path / "other")


def test_without_matplotlib_the_tables_are_written_and_overlays_left_out(model, data, tmp_path, monkeypatch):
    import importlib.util

    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "matplotlib" else find_spec(name, *a)
    )
    file, output = data / "upright/test/good/000.png", tmp_path / "out"
    result = succeeds("score", model, file, "--output", output)
    assert result.stderr.count("matplotlib: pip install 'hgad-fast[plot]'") == 1
    assert (output / "scores.csv").read_text().count("\n") == 2 and not (output / "overlays").exists()
    assert "pip install" not in succeeds("score", model, file, "--output", tmp_path / "b", "--no-overlays").stderr
    for command in (
        ("score", model, file, "--output", tmp_path / "c", "--overlays"),
        ("ablate", data, "--output", tmp_path / "c"),
        ("bench", "--plot", tmp_path / "c"),
        ("demo", "--output", tmp_path / "c"),
    ):
        assert "needs matplotlib: pip install 'hgad-fast[" in fails(*command)
    assert not (tmp_path / "c").exists()


def test_a_backend_that_cannot_run_is_named(model, data, monkeypatch):
    monkeypatch.setenv("HGAD_FAST_BACKEND", "triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "backend 'triton' cannot run" in fails("score", model, data, "--device", "cpu")
    monkeypatch.setenv("HGAD_FAST_BACKEND", "cuda")
    assert "backend is 'cuda'; allowed are auto, triton, torch" in fails("info")


def test_an_interrupt_ends_with_its_own_code(data, tmp_path, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(HGADModel, "fit", interrupted)
    result = hgad(*train_arguments(data, tmp_path / "run"))
    assert result.exit_code == 130
    assert result.stderr.splitlines()[2:] == ["hgad-fast: interrupted; every file written so far is whole"]


def test_an_error_of_ours_is_not_hidden(data, tmp_path, monkeypatch):
    def broken(*_, **__):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(HGADModel, "fit", broken)
    result = hgad(*train_arguments(data, tmp_path / "run"))
    assert result.exit_code == 1 and isinstance(result.exception, ZeroDivisionError)


# ---------------------------------------------------------------------------------------------------- help


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command):
    text = click.unstyle(succeeds(command, "--help").stdout)
    assert f"Usage: hgad-fast {command}" in text.replace("root", "hgad-fast")
    assert ("--json" in text) == (command not in ("train", "calibrate", "report", "card", "weights"))


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_has_every_word(command):
    """No word is taken for markup: what is in brackets is shown, too."""
    words = [command] if command else []
    text = click.unstyle(succeeds(*words, "--help").stdout)
    assert succeeds(*words, "-h").stdout == succeeds(*words, "--help").stdout
    group = typer.main.get_command(app)
    about = group.commands[command] if command else group
    told = [about.help, about.epilog or "", *(getattr(p, "help", None) or "" for p in about.params)]
    assert about.help
    for part in told:
        assert "".join(part.split()) in "".join(text.split())  # lines may be broken anywhere


def test_the_names_in_help_are_those_of_the_methods():
    assert (
        shared_options.METHOD_NAMES == ", ".join(sorted(METHODS)) and shared_options.DEFAULT_METHOD == methods.DEFAULT
    )
    assert shared_options.PRESET_NAMES == methods.preset_names()


def test_version():
    assert succeeds("--version").stdout == f"hgad-fast {hgad_fast.__version__}\n"


def test_alone_it_lists_its_commands():
    result = hgad()
    assert result.exit_code == 2  # nothing was done
    assert all(f" {command} " in click.unstyle(result.output) for command in COMMANDS)


def run(*args: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "hgad_fast", *map(str, args)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_as_a_module_it_is_the_same_command(model, data):
    file = data / "upright" / "test" / "good" / "000.png"
    scored = run("score", model, file, "--json")
    assert scored.returncode == 0 and scored.stderr.startswith(f"loading {model}\n1 image: ")
    assert json.loads(scored.stdout)[0]["file"] == str(file)
    wrong = run("info", data / "none.safetensors")
    assert wrong.returncode == 1 and wrong.stdout == ""
    assert wrong.stderr.splitlines()[1:] == [f"hgad-fast: there is no model file {data / 'none.safetensors'}"]
