"""`hgad-fast data --cluster` and `--suspects`: what they write and print, and that training takes the list."""

from __future__ import annotations

import importlib.util
import json
import math
import shutil
from pathlib import Path

import products
import pytest
from click.testing import Result
from PIL import Image
from typer.testing import CliRunner

from hgad_fast.cli import app
from hgad_fast.curation import suspects as suspects_module


def run(*args: object) -> Result:
    return CliRunner().invoke(app, [str(arg) for arg in args])


def fails(*args: object) -> str:
    result = run(*args)
    assert result.exit_code == 1 and result.stdout == "", result.output
    return result.stderr.splitlines()[-1]


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("images")
    for kind, count in (("amber", 13), ("blue", 12)):
        for i in range(count):
            products.write(root / f"{i}-{kind}.png", kind, i)
    return root


def test_from_unsorted_images_to_a_model(images, tmp_path):
    path = tmp_path / "my lists" / "classes.csv"
    result = run("data", images, "--cluster", "auto", "-o", path, *products.options())
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[:3] == ["25 images in 2 groups", "  group-1: 13 images", "  group-2: 12 images"]
    assert lines[3].startswith("silhouettes by the K of k-means, small groups merged: 2: 0.")
    sheets = [path.with_name(f"classes-group-{number}.jpg") for number in (1, 2)]
    assert lines[4:7] == [f"list: {path}", *(f"sheet: {sheet}" for sheet in sheets)]
    assert lines[7].startswith("next: look at the sheets") and f"sed -i s/,group-1,/,NAME,/ '{path}'" in lines[7]
    assert lines[8] == f"then: hgad-fast train '{path}'"
    assert {*sheets, path} == set(path.parent.iterdir())
    path.write_text(path.read_text().replace(",group-1,", ",amber,"))
    trained = run("train", path, "-o", tmp_path / "run", "--preset", "gaussian", *products.options())
    assert trained.exit_code == 0, trained.output
    facts = json.loads(run("info", tmp_path / "run" / "model.safetensors", "--json").stdout)["model"]
    assert facts["images a group"] == "amber 7, group-2 6"  # almost half of each is held out


def test_a_list_is_not_replaced_unasked(images, tmp_path):
    path = tmp_path / "classes.csv"
    path.write_text("names by hand")
    (tmp_path / "classes-group-9.jpg").write_text("no sheet of that list")
    (tmp_path / "classes-group-1.jpg").touch()
    arguments = ("data", images, "--cluster", 1, "-o", path, *products.options())
    assert "classes.csv exists, perhaps with names by hand; --overwrite replaces it" in fails(*arguments)
    assert path.read_text() == "names by hand"
    result = run(*arguments, "--overwrite", "--json")
    assert result.exit_code == 0, result.output
    sheet = str(tmp_path / "classes-group-1.jpg")
    facts = {"images": 25, "groups": {"group-1": 25}, "silhouettes": {}, "csv": str(path), "sheets": [sheet]}
    assert json.loads(result.stdout) == facts
    assert {file.name for file in tmp_path.iterdir()} == {"classes.csv", "classes-group-1.jpg", "classes-group-9.jpg"}
    assert (tmp_path / "classes-group-9.jpg").read_text() == "no sheet of that list"
    with Image.open(sheet) as drawn:
        drawn.load()


@pytest.mark.parametrize(
    ("options", "name"), [(("--cluster", 1), "x-group-7.jpg"), (("--suspects", 3), "x.jpg")], ids=["groups", "suspects"]
)
def test_a_file_with_the_name_of_a_sheet_is_not_replaced_unasked(images, tmp_path, options, name):
    (tmp_path / name).write_text("an image")
    message = fails("data", images, *options, "-o", tmp_path / "x.csv", *products.options())
    assert f"{tmp_path / name} exists, and is named as a sheet of {tmp_path / 'x.csv'}; give --output" in message
    assert [file.name for file in tmp_path.iterdir()] == [name] and (tmp_path / name).read_text() == "an image"


@pytest.mark.parametrize("options", [("--cluster", "auto"), ("--suspects", 3)], ids=["groups", "suspects"])
def test_a_list_in_the_folder_of_the_images(images, tmp_path, monkeypatch, options):
    """Its sheets would be images there the next time."""
    root = tmp_path / "a b"
    shutil.copytree(images, root / "deep")
    before = set(root.rglob("*"))
    (tmp_path / "link").symlink_to(root / "deep")
    monkeypatch.chdir(root)
    for roots, output, remedy in (
        (["."], "classes.csv", "-o ../classes.csv"),
        (["deep"], "deep/x/classes.csv", "-o classes.csv"),
        (["deep", "."], "deep/classes.csv", "-o ../classes.csv"),
        ([images, root], "deep/classes.csv", f"-o {tmp_path / 'classes.csv'}"),
        ([root / "deep"], "deep/classes.csv", f"-o '{root / 'classes.csv'}'"),
        (["deep"], tmp_path / "link" / "classes.csv", "-o classes.csv"),
        ([f"{images}+deep"], "deep/classes.csv", "-o classes.csv"),
    ):
        message = fails("data", *roots, *options, "-o", output, "--overwrite", *products.options())
        assert f"--output is {output}, in the folder " in message and message.endswith(f"such as {remedy}"), message
    assert set(root.rglob("*")) == before


def test_a_score_that_is_no_number_is_null_in_json(images, monkeypatch):
    score = suspects_module._map
    calls = []

    def broken(model, levels):
        calls.append(0)
        return score(model, levels) * (math.nan if len(calls) % 25 == 5 else 1)

    monkeypatch.setattr(suspects_module, "_map", broken)
    result = run("data", images, "--suspects", 2, "--json", *products.options())
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout, parse_constant=pytest.fail)
    assert rows[0]["score"] is None and rows[1]["score"] > -10


def test_one_product_is_said_to_be_one(images, tmp_path):
    root = tmp_path / "amber"
    root.mkdir()
    for file in images.glob("*-amber.png"):
        shutil.copy(file, root)
    for i in range(13, 24):
        products.write(root / f"{i}.png", "amber", i)
    (root / "notes.txt").touch()
    result = run("data", root, "--cluster", "auto", "-o", tmp_path / "c.csv", *products.options())
    assert result.stdout.splitlines()[0] == "24 images in 1 group"
    assert f"{root}: passed over: 1 .txt" in result.stderr
    if "silhouettes" in result.stdout:
        assert "none reaches 0.5, so that all images are one group; --cluster K makes more of them" in result.stdout


def test_the_first_suspects(images, tmp_path):
    root = tmp_path / "dataset"
    for file in images.glob("*-blue.png"):
        (root / "blue" / "train" / "good").mkdir(parents=True, exist_ok=True)
        shutil.copy(file, root / "blue" / "train" / "good")
    wrong = products.write(root / "blue" / "train" / "good" / "größe.png", "blue", 30, spot=True)
    path = tmp_path / "suspects.csv"
    result = run("data", root, "--suspects", 3, "-o", path, *products.options())
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0].split() == ["rank", "score", "class", "image"] and len(lines) == 7
    assert lines[1].split()[0] == "1" and lines[1].endswith(f"  blue   {wrong}")
    assert lines[4].startswith("3 of 13 training images; the score says ")
    assert lines[5:] == [f"list: {path}", f"sheet: {tmp_path / 'suspects.jpg'}"]
    assert len(path.read_text().splitlines()) == 14
    rows = json.loads(run("data", root, "--suspects", 2, "--json", *products.options()).stdout)
    assert [row["rank"] for row in rows] == [1, 2] and rows[0]["path"] == str(wrong) and rows[0]["class"] == "blue"
    assert f"{rows[0]['score']:.2f}" == lines[1].split()[1]


def test_without_matplotlib_the_sheets_are_left_out(images, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    missing = {"matplotlib"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name in missing else find(name, *rest))
    result = run("data", images, "--cluster", 2, "-o", tmp_path / "classes.csv", *products.options())
    assert result.exit_code == 0, result.output
    assert "sheets are left out, as they need matplotlib: pip install 'hgad-fast[plot]'" in result.stderr
    assert [file.name for file in tmp_path.iterdir()] == ["classes.csv"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--cluster", "auto"], "--cluster needs --output, the CSV file to write"),
        (["--cluster", "auto", "--suspects", "3", "-o", "x.csv"], "give --cluster or --suspects"),
        (["--suspects", "0"], "--suspects is 0; give a whole number from 1"),
        (["--suspects", "3", "--decode"], "--decode belongs to the count"),
        (["-o", "x.csv"], "--output is written by --cluster or --suspects"),
        (["--cluster", "auto", "-o", "x.txt"], "--output is x.txt; give a name that ends in .csv"),
        (["--cluster", "auto", "-o", "."], "--output is ., a folder; name the file to write"),
    ],
)
def test_options_that_do_not_go_together(images, options, message):
    assert message in fails("data", images, *options)


def test_numbers_of_groups_that_are_none(images, tmp_path):
    options = ("-o", tmp_path / "x.csv", *products.options())
    assert "the number of groups is 'few'; give a whole number from 1, or 'auto'" in fails(
        "data", images, "--cluster", "few", *options
    )
    assert "4 groups of 8 images or more take 32 images" in fails("data", images, "--cluster", "4", *options)
    assert list(tmp_path.iterdir()) == []


def test_weights_that_are_not_at_hand(images, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    message = fails("data", images, "--cluster", "auto", "-o", tmp_path / "x.csv")
    assert "--weights packaged" in message
