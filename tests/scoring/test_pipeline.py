"""Many files through one model: the same figures as one by one, whatever is bad, cut short, resumed or shared out."""

from __future__ import annotations

import copy
import csv
import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rounding
import torch
from PIL import Image
from scipy import ndimage
from typer.testing import CliRunner

from hgad_fast import HGADConfig, HGADModel
from hgad_fast.cli import app
from hgad_fast.data.images import read_image
from hgad_fast.features.backbone import Backbone
from hgad_fast.scoring import pipeline
from hgad_fast.scoring.outputs import not_written
from hgad_fast.scoring.pipeline import Job, score_files

ROOT = Path(__file__).resolve().parents[2]


def write_image(path: Path, seed: int, size: tuple[int, int] = (40, 56)) -> Path:
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[: size[0], : size[1]]
    pixels = 128 + 90 * np.sin(0.7 * x + 0.3 * y)[..., None] + rng.normal(0, 12, (*size, 3))
    if seed % 3 == 0:
        pixels[5:25, 9:30] = rng.uniform(0, 255, (20, 21, 3))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path)
    return path


@pytest.fixture(scope="module")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    config = HGADConfig(
        n_classes=2, class_names=("a", "b"), n_intra_centers=2, backbone_arch="test_efficientnet",
        backbone_weights=None, out_indices=(1,), img_size=40, msk_size=24, feature_levels=2, coupling_layers=2,
        pos_embed_dim=8, batch_size=4,
    )  # fmt: skip
    model = HGADModel(config)
    for k, name in enumerate("ab"):
        for i in range(5):
            write_image(folder / "normal" / name / f"{i}.png", 3 * (10 * k + i) + 1)
    model.calibrate(folder / "normal", false_alarm_rate=0.2)
    model.save(folder / "model.safetensors")
    return folder / "model.safetensors"


@pytest.fixture(scope="module")
def model(model_file: Path) -> HGADModel:
    return HGADModel.load(model_file)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Images of two sizes, of which the fourth is damaged and the last so long and thin that it is refused."""
    folder = tmp_path_factory.mktemp("images")
    sizes = [(40, 56)] * 6 + [(64, 40)] * 3 + [(40, 56)] * 2
    files = [write_image(folder / f"{i:02}.png", i, size) for i, size in enumerate(sizes)]
    files[3].write_bytes(files[3].read_bytes()[:300])
    return [*files, write_image(folder / "11.png", 11, (1, 80000))]


def rows_of(records: list[pipeline.Record]) -> list[dict[str, Any]]:
    return [record.row for record in records if record.row is not None]


def score(*arguments: Any) -> Any:
    return CliRunner().invoke(app, ["score", *map(str, arguments)])


@pytest.mark.parametrize("limit", [2**25, 40 * 56, 1])
def test_rows_are_those_of_one_by_one_scoring_in_the_order_of_the_files(
    limit: int, model: HGADModel, files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "MAX_PIXELS_IN_FLIGHT", limit)
    seen: list[pipeline.Record] = []
    records = score_files(model, files, Job(output=tmp_path, maps="npy"), seen.append)
    assert records == seen and [record.task.file for record in records] == files
    bad = [record for record in records if record.error is not None]
    assert [record.task.file for record in bad] == [files[3], files[11]]
    assert str(bad[1].error).startswith(f"{files[11]}: an image of 1 x 80000 pixels")
    for record in records:
        if record.row is not None:
            expected = model.score(record.task.file)
            assert record.row["score"] == float(expected.image_score)
            assert record.row["p_value"] == float(expected.p_value)
            written = np.load(tmp_path / "maps" / f"{record.task.name}.npy")
            assert torch.equal(torch.from_numpy(written), expected.anomaly_map[0])
            for region in record.row["regions"]:
                inside = written[region["top"] : region["bottom"], region["left"] : region["right"]]
                assert inside.max() >= region["peak"] == written[region["peak_y"], region["peak_x"]]
            labels, _ = ndimage.label(written > record.row["threshold"], np.ones((3, 3)))
            areas = np.bincount(labels.flat)[1:].tolist()
            boxes = [(x.start, y.start, x.stop, y.stop) for y, x in ndimage.find_objects(labels)]
            assert sorted(zip(boxes, areas, strict=True)) == sorted(
                ((region["left"], region["top"], region["right"], region["bottom"]), region["area"])
                for region in record.row["regions"]
            )
    assert any(row["regions"] for row in rows_of(records))


def test_no_more_pixels_are_decoded_than_allowed(
    model: HGADModel, files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded, most = 0, 0
    finish = pipeline._finished

    def read(path: Path, white_level: int) -> torch.Tensor:
        nonlocal decoded, most
        image = read_image(path, white_level)
        decoded += image[0].numel()
        most = max(most, decoded)
        return image

    def finished(task: Any, image: torch.Tensor, *rest: Any) -> pipeline.Record:
        nonlocal decoded
        decoded -= image[0].numel()
        return finish(task, image, *rest)

    monkeypatch.setattr(pipeline, "read_image", read)
    monkeypatch.setattr(pipeline, "_finished", finished)
    monkeypatch.setattr(pipeline, "MAX_PIXELS_IN_FLIGHT", 2 * 40 * 56)
    score_files(model, [files[0]] * 12, Job())
    assert 40 * 56 <= most <= 2 * 40 * 56


def test_throughput_agrees(model: HGADModel, files: list[Path]) -> None:
    alone, together = (rows_of(score_files(model, files, Job(throughput=flag))) for flag in (False, True))
    assert [row["file"] for row in together] == [row["file"] for row in alone]
    scored = [Path(row["file"]) for row in alone[:3]]
    exact, tolerance = rounding.exact_and_tolerance(lambda model: model.score(scored).image_score, model)
    for rows in (alone, together):
        rounding.assert_within(torch.tensor([row["score"] for row in rows[:3]]), exact, tolerance)


@pytest.mark.parametrize("map_format", ["tiff16", "tiff32"])
def test_tiff_maps_hold_the_scores(map_format: str, model: HGADModel, files: list[Path], tmp_path: Path) -> None:
    (row,) = rows_of(score_files(model, files[:1], Job(output=tmp_path, maps=map_format)))
    expected = model.score(files[0]).anomaly_map[0].numpy()
    with Image.open(tmp_path / "maps" / "00.tif") as image:
        values, about = np.asarray(image), json.loads(image.tag_v2[270])
    if map_format == "tiff32":
        np.testing.assert_array_equal(values, expected)
    else:
        assert values.dtype == np.uint16 and values.max() == 65535 and about["scale"] == row["map_scale"]
        np.testing.assert_allclose(values * row["map_scale"], expected, atol=0.51 * row["map_scale"])


def test_a_resumed_run_scores_only_what_is_missing_or_changed(
    model: HGADModel, files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = [write_image(tmp_path / "in" / f"{i}.png", i) for i in range(5)]
    output = tmp_path / "out"
    score_files(model, mine[:4], Job(output=output))
    (output / "overlays" / "0.png").unlink()
    write_image(mine[2], 77)
    os.utime(mine[2], ns=(1, 1))
    with open(output / "scores.jsonl", "a") as journal:
        journal.write('{"name": "4", "sta')  # cut off by a kill
    scored: list[str] = []
    finish = pipeline._finished
    monkeypatch.setattr(pipeline, "_finished", lambda task, *rest: scored.append(task.name) or finish(task, *rest))
    records = score_files(model, mine, Job(output=output, resume=True))
    assert sorted(scored) == ["0", "2", "4"]
    fresh = score_files(model, mine, Job(output=tmp_path / "fresh"))
    assert rows_of(records) == rows_of(fresh)
    for name in ("scores.csv", "regions.csv", "scores.jsonl"):
        assert (output / name).read_bytes() == (tmp_path / "fresh" / name).read_bytes()
    with pytest.raises(ValueError, match=r"scores.jsonl was written with another class: "):
        score_files(model, mine, Job(class_id="a", output=output, resume=True))


@pytest.mark.parametrize(
    ("change", "odd"),
    [
        ({"img_size": "native"}, "img_size"),
        ({"img_size": 56, "tiles": "never"}, "img_size, tiles"),
        ({"img_size": 40, "tiles": "auto", "max_memory": "2GB"}, "max_memory"),
        ({"img_size": 40, "max_memory": 4 * 10**9}, None),  # what it is anyway
    ],
)
def test_what_was_scored_with_other_options_is_not_taken_up(
    change: dict[str, Any], odd: str | None, model: HGADModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Backbone, "is_local", False)  # the memory allowed decides about tiles, hence features
    file = write_image(tmp_path / "image.png", 0)
    score_files(model, [file], Job(output=tmp_path / "out"))
    again = Job(output=tmp_path / "out", resume=True, options=change)
    if odd is None:
        score_files(model, [file], again)
    else:
        with pytest.raises(ValueError, match=f"written with another {odd}: "):
            score_files(model, [file], again)


def test_a_full_disk_is_named_with_the_file_and_leaves_whole_files(
    model: HGADModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What writes to a descriptor knows no name; NumPy gives not even the error's number."""
    save = np.save

    def full(path: Path, scores: np.ndarray) -> None:
        save(path, scores[:3])
        raise OSError("2240 requested and 3 written") if path.parent.name == "maps" else OSError(28, "No space left")

    monkeypatch.setattr(np, "save", full)
    file, output = write_image(tmp_path / "image.png", 0), tmp_path / "out"
    with pytest.raises(OSError, match=r"2240 requested and 3 written: '.*maps/image.npy'"):
        score_files(model, [file], Job(output=output, maps="npy"))
    with pytest.raises(OSError, match=r"\[Errno 28\] No space left: '.*image.npy'"):
        pipeline.write_map(tmp_path / "image.npy", np.zeros((4, 4), np.float32), "npy")
    assert not list((output / "maps").iterdir()) and not list(tmp_path.glob(".*"))
    assert (output / "scores.csv").read_text().count("\n") == 1


def test_a_refused_image_can_be_tried_with_more_memory(model: HGADModel, tmp_path: Path) -> None:
    file = write_image(tmp_path / "image.png", 0)
    for memory, rows in (("10MB", 0), ("4GB", 1)):
        job = Job(output=tmp_path / "out", resume=True, options={"max_memory": memory})
        assert len(rows_of(score_files(model, [file], job))) == rows


def start(arguments: list[Any], **environment: str) -> subprocess.Popen[str]:
    """A process of the command line, that takes notice of Ctrl-C even if this one, in the background, does not."""
    command = [sys.executable, "-m", "hgad_fast", "score", *map(str, arguments)]
    env = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def test_ctrl_c_leaves_whole_files_and_a_table_and_the_rest_can_follow(model_file: Path, tmp_path: Path) -> None:
    image = write_image(tmp_path / "in" / "000.png", 0)
    for i in range(1, 300):
        image.with_name(f"{i:03}.png").symlink_to(image)
    arguments = [model_file, tmp_path / "in", "--output", tmp_path / "out", "--device", "cpu"]
    process = start(arguments)
    journal = tmp_path / "out" / "scores.jsonl"
    while not journal.exists() or journal.read_text().count("\n") < 4:
        assert process.poll() is None  # it ends by itself, so this does, too
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 130, errors
    first, *later = errors.splitlines()
    assert first == f"loading {model_file}"
    assert later[-1] == "hgad-fast: interrupted; every file written so far is whole"
    assert all(line.startswith("scoring: ") for line in later[:-1])
    with open(tmp_path / "out" / "scores.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert 3 <= len(table) < 300 and [Path(row["file"]).stem for row in table] == [f"{i:03}" for i in range(len(table))]
    written = list((tmp_path / "out" / "overlays").iterdir())
    assert len(written) >= len(table) and not any(path.name.startswith(".") for path in written)
    for path in written:
        read_image(path)
    for extra in list((tmp_path / "in").iterdir()):  # 300 overlays take long
        if int(extra.stem) > len(table):
            extra.unlink()
    result = score(*arguments, "--resume")
    assert result.exit_code == 0 and result.stdout.count("\n") == len(table) + 1
    with open(tmp_path / "out" / "scores.csv", newline="") as file:
        assert list(csv.DictReader(file))[: len(table)] == table


def test_two_ranks_share_the_files_and_merge_in_order(model_file: Path, files: list[Path], tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    options = ["--device", "cpu", "--img-size", "36", "--max-memory", "3GB", "--tiles", "never"]
    both = [
        start(
            [model_file, *files, "--output", tmp_path / "two", *options],
            RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=port,
        )
        for rank in range(2)
    ]  # fmt: skip
    outputs = [process.communicate(timeout=300) for process in both]
    alone = score(model_file, *files, "--output", tmp_path / "one", *options)
    assert [process.returncode for process in both] == [1, 0], outputs  # rank 0 reports the bad files
    assert outputs[0][0] == alone.stdout and outputs[1][0] == ""
    assert str(files[3]) in outputs[0][1]
    for name in ("scores.csv", "regions.csv", "scores.jsonl"):
        assert (tmp_path / "two" / name).read_text() == (tmp_path / "one" / name).read_text()
    names = {path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*")}
    assert {path.relative_to(tmp_path / "two") for path in (tmp_path / "two").rglob("*")} == names


# ---------------------------------------------------------------------------------------------- names of files


NAMES = {  # as bytes, and as they are shown
    b"plain.png": "plain.png",
    b"Gr\xf6\xdfe.png": r"Gr\xf6\xdfe.png",
    b"two\nlines\r\x1b[31m.png": r"two\nlines\r\x1b[31m.png",
    "部品\u202e😀.png".encode(): "部品\\u202e😀.png",
    b"x" * 251 + b".png": "x" * 251 + ".png",
    b"$x_2$ [red].png": "$x_2$ [red].png",
    b"\\xf6.png": r"\xf6.png",
    b"\xf6.png": r"\xf6.png",
}


@pytest.fixture
def odd_files(tmp_path: Path) -> list[Path]:
    source = write_image(tmp_path / "source.png", 1).read_bytes()
    (tmp_path / "in").mkdir()
    files = [tmp_path / "in" / os.fsdecode(name) for name in NAMES]
    for number, file in enumerate(files):
        file.write_bytes(source)
        os.utime(file, ns=(number, number))
    return files


@pytest.mark.parametrize("encoding", ["utf-8", "cp1252", "ascii"])
def test_names_of_any_kind_are_written_and_printed(
    encoding: str, model_file: Path, odd_files: list[Path], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    result = CliRunner(charset=encoding).invoke(
        app, ["score", str(model_file), *map(str, odd_files), "-o", str(output)]
    )
    assert result.exit_code == 0 and len(result.stdout_bytes.splitlines()) == len(NAMES)
    with open(output / "scores.csv", newline="", encoding="utf-8") as file:
        shown = [Path(row["file"]).name for row in csv.DictReader(file)]
    assert shown == list(NAMES.values())
    overlays = list((output / "overlays").iterdir())
    assert len(overlays) == len(NAMES) and {len(read_image(path).shape) for path in overlays} == {3}
    for path in output.rglob("*"):
        path.name.encode("utf-8")
        assert len(os.fsencode(path.name)) <= 255 and path.name.isprintable() and "\\" not in path.name


def test_a_resumed_run_knows_files_of_any_name_again(
    model: HGADModel, odd_files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = score_files(model, odd_files, Job(output=tmp_path / "out"))
    monkeypatch.setattr(pipeline, "_finished", lambda *_: pytest.fail("scored again"))
    again = score_files(model, odd_files, Job(output=tmp_path / "out", resume=True))
    assert rows_of(again) == rows_of(first)


def test_an_overlay_that_cannot_be_drawn_costs_itself_alone(
    model_file: Path, files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overlay = pipeline.overlay

    def broken(*arguments: Any, path: Path, **options: Any) -> Path:
        if path.stem == "01":
            raise RuntimeError("no font")
        return overlay(*arguments, path=path, **options)

    output = tmp_path / "out"
    monkeypatch.setattr(pipeline, "overlay", broken)
    result = score(model_file, *files[:3], "--output", output)
    assert result.exit_code == 0 and result.stdout.count("\n") == 3
    assert f"hgad-fast: {files[1]}: no overlay could be drawn (RuntimeError: no font)\n" in result.stderr
    assert (output / "scores.csv").read_text().count("\n") == 4
    assert sorted(path.stem for path in (output / "overlays").iterdir()) == ["00", "02"]
    monkeypatch.undo()
    assert score(model_file, *files[:3], "--output", output, "--resume").exit_code == 0  # tries it again
    assert sorted(path.stem for path in (output / "overlays").iterdir()) == ["00", "01", "02"]


def test_no_cell_of_a_table_is_a_formula(tmp_path: Path) -> None:
    names = ["=cmd|' -C calc'!A0.png", "+1.png", "-1.png", "@x.png", "a=b.png"]
    row = {"class": "=a", "score": -1.5, "regions": []}
    records = [pipeline.Record(pipeline.Task(Path(name), name, None), row | {"file": name}) for name in names]
    pipeline.write_tables(tmp_path, records)
    with open(tmp_path / "scores.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["file"] for row in rows] == [f"./{name}" for name in names[:4]] + names[4:]
    assert {(row["class"], row["score"]) for row in rows} == {("'=a", "-1.5")}


def test_a_score_that_is_no_number_is_a_failure(model: HGADModel, files: list[Path], tmp_path: Path) -> None:
    broken = copy.deepcopy(model)
    broken.calibration.level_max[:] = math.nan
    (record,) = score_files(broken, files[:1], Job(output=tmp_path / "out"))
    assert record.row is None and "the image has no score: it is nan" in str(record.error)
    with open(tmp_path / "out" / "scores.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    assert row["anomalous"] == "" and row["error"] == str(record.error)


# ---------------------------------------------------------------------------------------------- whose folder it is


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_folder_that_holds_a_run_is_refused_or_becomes_the_new_runs(
    model: HGADModel, files: list[Path], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    score_files(model, files[:3], Job(output=output, maps="npy"))
    before = contents(output)
    with pytest.raises(ValueError, match=r"out holds the results of an earlier run \(scores.csv\): --resume .* --over"):
        score_files(model, files[4:5], Job(output=output))
    with pytest.raises(ValueError, match=r"out holds results of 3 images that are not given now, such as .*00.png"):
        score_files(model, files[4:5], Job(output=output, maps="npy", resume=True))
    assert contents(output) == before
    mine = ["notes.txt", "overlays/mine.png", "scores-old.jsonl"]
    for name in mine:
        (output / name).write_text("mine")
    (output / "overlays" / ".00-abc123_x.png").touch()  # what a kill leaves of a write
    score_files(model, files[4:5], Job(output=output, overwrite=True))
    score_files(model, files[4:5], Job(output=tmp_path / "fresh"))
    after = contents(output)
    assert {name: after.pop(name) for name in mine} == dict.fromkeys(mine, b"mine")
    assert after.keys() == contents(tmp_path / "fresh").keys() == {
        *("scores.csv", "regions.csv", "scores.jsonl", "overlays/04.png")
    }  # fmt: skip


@pytest.mark.parametrize("how", ["resume", "overwrite"])
def test_what_no_run_wrote_is_neither_removed_nor_replaced(
    how: str, model: HGADModel, files: list[Path], tmp_path: Path
) -> None:
    output, mine = tmp_path / "out", tmp_path / "mine"
    score_files(model, files[:1], Job(output=output, overlays=False))
    mine.mkdir()
    for folder, name in (("maps", f"{files[0].stem}.npy"), ("overlays", f"{files[0].stem}.png")):
        (mine / name).write_text("mine")
        (output / folder).symlink_to(mine, target_is_directory=True)
        with pytest.raises(ValueError, match=f"{folder} is a link"):
            score_files(model, files[:1], Job(output=output, **{how: True}))
        (output / folder).unlink()
        assert (mine / name).read_text() == "mine"
    (output / "maps").mkdir()
    (output / "maps" / f"{files[0].stem}.tif").write_text("mine")
    with pytest.raises(ValueError, match="maps holds files that no run wrote"):
        score_files(model, files[:1], Job(output=output, **{how: True}))
    assert (output / "maps" / f"{files[0].stem}.tif").read_text() == "mine"


def test_a_run_below_its_images_does_not_score_its_own_overlays(tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("a.png", "out/overlays/a.png", "out/maps/a.tif", "out/b.png")]
    assert not_written(files, tmp_path / "out") == ([files[0], files[3]], 2)


@pytest.mark.parametrize("left", ["scores.csv", "regions.csv", "scores.jsonl", "scores-rank2.jsonl", "overlays/00.png"])
def test_anything_that_a_run_leaves_shows_it(left: str, model: HGADModel, files: list[Path], tmp_path: Path) -> None:
    (tmp_path / left).parent.mkdir(exist_ok=True)
    (tmp_path / left).touch()
    with pytest.raises(ValueError, match="holds the results of an earlier run"):
        score_files(model, files[:1], Job(output=tmp_path))


def test_a_resumed_run_leaves_nothing_of_images_that_are_gone(
    model: HGADModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = [write_image(tmp_path / "in" / f"{i}.png", i) for i in range(3)]
    output = tmp_path / "out"
    score_files(model, mine, Job(output=output, maps="npy"))
    mine.pop(1).unlink()
    (tmp_path / "in" / "other").mkdir()
    mine.append(write_image(tmp_path / "in" / "other" / "2.png", 5))  # "2" is no name for one of them any more
    records = score_files(model, mine, Job(output=output, maps="npy", resume=True))
    names = {record.task.name for record in records}
    assert names == {"0", "in-2", "in-other-2"} or names == {"0", "2", "other-2"}
    for folder in ("overlays", "maps"):
        assert {path.stem for path in (output / folder).iterdir()} == names


def test_a_journal_of_an_earlier_version_is_scored_anew(model: HGADModel, files: list[Path], tmp_path: Path) -> None:
    score_files(model, files[:2], Job(output=tmp_path / "new"))
    settings, *entries = map(json.loads, (tmp_path / "new" / "scores.jsonl").read_text().splitlines())
    del settings["names"]
    for entry in entries:
        del entry["path"], entry["row"]["false_alarm_rate"], entry["row"]["target_false_alarm_rate"]
    old = tmp_path / "old"
    old.mkdir()
    (old / "scores.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [settings, *entries]))
    score_files(model, files[:2], Job(output=old, resume=True))
    for name in ("scores.csv", "scores.jsonl"):
        assert (old / name).read_bytes() == (tmp_path / "new" / name).read_bytes()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]\n",
        '{"names": ["../mine"]}\n',
        '{"model": 1}\n{"name": "a"}\n',
        '{}\n{"name": "a", "state": 1, "row": 2}\n',
    ],
)
def test_a_damaged_journal_is_named(text: str, model: HGADModel, files: list[Path], tmp_path: Path) -> None:
    (tmp_path / "scores.jsonl").write_text(text)
    for job in (Job(output=tmp_path, resume=True), Job(output=tmp_path, overwrite=True)):
        with pytest.raises(ValueError, match=r"scores.jsonl is damaged \(.*\): delete it, or"):
            score_files(model, files[:1], job)
