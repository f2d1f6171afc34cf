"""The model card: what it says, that names are text in it, that its example runs, and that it tells no paths."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_detectors
import small_gaussian
import yaml
from markdown_it import MarkdownIt
from markdown_it.token import Token
from PIL import Image
from typer.testing import CliRunner

from hgad_fast import GaussianConfig, GaussianModel, load
from hgad_fast.cli import app
from hgad_fast.data.datasets import discover
from hgad_fast.evaluation import run_folder
from hgad_fast.evaluation.card import card_of, model_card, text, write_card
from hgad_fast.files import file_hash, printable
from hgad_fast.training import runs

NAMES = ("a|b", "<script>x & y", "*ü*_[z](www.x.de)`$1$\n# no heading")
HOSTILE = [
    *NAMES,
    "www.x.de",
    "http://x.de/a",
    "a@b.de",
    "&lt;",
    "\\",
    "~~a~~",
    "\u202egnp",
    "![i](j)",
    "\udcf6",
    "---",
]


def write_images(folder: Path, count: int, seed: int, defective: bool = False) -> None:
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    for i in range(count):
        pixels = 128 + 60 * np.sin(np.arange(32) * (1 + seed % 3)) + rng.normal(0, 8, (32, 32))
        if defective:
            pixels[8:20, 8:20] = 255 - pixels[8:20, 8:20]
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{i}.png")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("somewhere") / "my <data>"
    for k, name in enumerate(NAMES):
        write_images(root / name / "train" / "good", 10 + k, k)
        write_images(root / name / "test" / "good", 3, k + 3)
        write_images(root / name / "test" / "dent", 2, k + 6, defective=True)
    return root


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a fitted model, with its card."""
    settings = small_detectors.STAGES | {"out_indices": (1, 2), "feature_levels": 1, "img_size": 32, "msk_size": 16}
    config = GaussianConfig(3, dim=4, coarse_dim=2, calibration_fraction=0.3, **settings)
    folder = tmp_path_factory.mktemp("runs") / "run"
    GaussianModel(config).fit(data, output_dir=folder, false_alarm_rate=0.2)
    write_card(folder)
    return folder


@pytest.fixture
def copied(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


def card(folder: Path) -> str:
    return (folder / "card.md").read_text(encoding="utf-8")


def rendered(card: str) -> list[Token]:
    """Return the tokens of a card behind its front matter, as a renderer sees them that takes HTML and tables."""
    body = card.split("---\n", 2)[2]
    return MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).parse(body)


def flat(tokens: list[Token]) -> list[Token]:
    return [each for token in tokens for each in [token, *(token.children or [])]]


def shown(token: Token) -> str:
    return "".join(child.content for child in token.children or [])


def tables(card: str) -> dict[str, list[list[str]]]:
    """Return the rows of the last table below each heading."""
    found: dict[str, list[list[str]]] = {}
    heading, tokens = "", rendered(card)
    for before, token in zip(tokens, tokens[1:], strict=False):
        if before.type == "heading_open":
            heading = shown(token)
        elif before.type == "table_open":
            found[heading] = []
        elif before.type == "tr_open":
            found[heading].append([])
        elif before.type in ("th_open", "td_open"):
            found[heading][-1].append(shown(token))
    return found


def test_the_front_matter_is_yaml_and_leaves_the_licence_open(trained):
    _, front, _ = card(trained).split("---\n", 2)
    content = yaml.safe_load(front)
    assert content == {
        "library_name": "hgad_fast",
        "pipeline_tag": "image-segmentation",
        "tags": ["anomaly-detection", "visual-inspection", "gaussian"],
        "metrics": ["roc_auc"],
    }
    filled = re.sub("^# license: .*$", "license: apache-2.0", front, flags=re.MULTILINE)
    assert yaml.safe_load(filled)["license"] == "apache-2.0"


def test_names_are_text_whatever_is_in_them(trained):
    tokens = flat(rendered(card(trained)))
    kinds = {token.type for token in tokens}
    assert not kinds & {"html_block", "html_inline", "link_open", "image", "em_open", "s_open", "code_inline"}
    assert [shown(tokens[i + 1]) for i, token in enumerate(tokens) if token.tag == "h1" and token.nesting == 1] == [
        f"Visual anomaly detector for {', '.join(sorted(map(printable, NAMES)))}"
    ]
    for heading in ("Trained on", "Thresholds", "Honest protocol", "Official protocol"):
        rows = tables(card(trained))[heading]
        assert {len(row) for row in rows} == {len(rows[0])}
        names = [row[0] for row in rows[1:]]
        assert sorted(names)[: len(names)] == sorted(
            [*map(printable, NAMES), *["mean of the classes"] * (len(names) > 3)]
        )


@pytest.mark.parametrize("name", HOSTILE)
def test_a_text_is_shown_as_it_is(name):
    markdown = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
    for line in (f"x {text(name)}", f"| a | b |\n| - | - |\n| {text(name)} | c |", f"# {text(name)}"):
        tokens = flat(markdown.parse(line))
        allowed = {
            "inline",
            "text",
            "text_special",
            "paragraph_open",
            "paragraph_close",
            "heading_open",
            "heading_close",
        }
        assert {t.type for t in tokens if not re.match("t(able|head|body|r|h|d)_", t.type)} <= allowed
        inline = [shown(token) for token in tokens if token.type == "inline"]
        assert printable(name) in (inline[0], inline[0].removeprefix("x "), *inline[2:3])
    assert not re.search(r"www\.|https?://|(?<!\\)[@$~]", text(name))  # what some renderers make links and sums of


def test_the_figures_are_those_of_the_evaluation_and_the_training(trained, data):
    evaluation = run_folder.kept_evaluation(trained).evaluation
    content = tables(card(trained))
    for protocol in ("honest", "official"):
        heads, *rows = content[f"{protocol.capitalize()} protocol"]
        assert heads[:2] == ["Class", "Image AUROC"]
        for row, figures in zip(rows, [*evaluation.figures[protocol].values(), evaluation.mean(protocol)], strict=True):
            assert float(row[1]) == pytest.approx(100 * figures.image_auroc, abs=0.05)
            assert row[-1] == "–"  # there are no masks
    record = json.loads((trained / "run.json").read_text())
    for name, *counts in content["Trained on"][1:]:
        (own,) = (each for each in NAMES if printable(each) == name)
        assert sum(map(int, counts)) == len(list((data / own / "train" / "good").iterdir()))
        assert counts == [str(record["trained_on"][name]), str(record["held_out"][name])]
    model = load(trained / "model.safetensors")
    for row, rate in zip(content["Thresholds"][1:], model.calibration.rates(model.groups), strict=True):
        assert float(row[2]) == pytest.approx(rate["threshold"], rel=1e-3)
        assert row[3].startswith("20.0") and float(row[4].split("\N{NO-BREAK SPACE}")[0]) <= 20
        assert re.fullmatch(r".* \(\d of 3\)", row[5]) and re.fullmatch(r".* \(\d of 2\)", row[6])
    facts = dict(content["The file"][1:])
    assert facts["sha256"] == file_hash(trained / "model.safetensors")
    assert all(package in facts["trained with"] for package in ("hgad_fast 0.", "torch 2.", "timm 1."))
    assert f"the dataset {text('my <data>')}, on {record['date'][:10]}." in card(trained)


def test_it_tells_no_paths_of_the_machine(trained, data):
    for folder in (trained, data):
        assert str(folder.parent) not in card(trained) and folder.parent.name not in card(trained)


@pytest.mark.parametrize("make", [small_detectors.hgad, small_detectors.vqflow, small_detectors.gaussian])
def test_its_example_runs(make, tmp_path, monkeypatch, capsys):
    model = make()
    model.save(tmp_path / "it's a model.safetensors")
    monkeypatch.chdir(tmp_path)
    image = (small_detectors.images_of_classes(1)[0] * 255).byte().movedim(0, 2).numpy()
    Image.fromarray(image).save("image.png")
    content = card_of(tmp_path / "it's a model.safetensors")
    (code,) = re.findall("^```python\n(.*?)^```$", content, re.MULTILINE | re.DOTALL)
    namespace: dict[str, Any] = {}
    exec(code, namespace)  # noqa: S102
    result = model.score("image.png")
    name, score, *_ = capsys.readouterr().out.rsplit(maxsplit=3)
    assert name == model.groups[int(result.class_id[0])]
    assert float(score) == float(result.image_score[0])
    assert namespace["anomaly_map"].shape == (64, 64)
    assert text(model.about.keeps) in content and all(text(limit) in content for limit in model.about.limits)


def test_a_model_of_features_has_an_example_of_its_own(tmp_path):
    model = small_gaussian.fitted()
    model.save(tmp_path / "m.safetensors")
    content = model_card(model, tmp_path / "m.safetensors", repo="acme/screws")
    (code,) = re.findall("^```python\n(.*?)^```$", content, re.MULTILINE | re.DOTALL)
    code = code.replace('from_pretrained("acme/screws")', f"load({str(tmp_path / 'm.safetensors')!r})")
    namespace: dict[str, Any] = {"features": small_gaussian.class_features(3)}
    exec(code, namespace)  # noqa: S102
    assert namespace["result"].image_score.equal(model.score_features(namespace["features"]).image_score)
    assert "a backbone of the user's own" in content


def test_a_model_without_calibration_says_so(copied):
    model = load(copied / "model.safetensors")
    model.calibration = None
    model.save(copied / "model.safetensors")
    content = card_of(copied / "model.safetensors")
    assert "## Thresholds\n\n**None.** The model is not calibrated" in content


def test_kept_figures_stay_with_their_model(copied, data, monkeypatch):
    monkeypatch.setattr(run_folder, "evaluate", lambda *given, **options: pytest.fail("scores test images"))
    assert card_of(copied) == card(copied)  # nothing is computed again
    record = json.loads((copied / "run.json").read_text())
    (copied / "run.json").write_text(json.dumps(record | {"data": "/gone/away"}))
    gone = card_of(copied)
    assert tables(gone)["Honest protocol"] == tables(card(copied))["Honest protocol"] and "/gone" not in gone
    model = load(copied / "model.safetensors")
    model.calibration.false_alarm_rate = 0.5
    model.save(copied / "model.safetensors")
    assert "## Figures\n\n**None.**" in card_of(copied)
    (copied / "run.json").unlink()
    (copied / "evaluation.json").unlink()
    assert "of each class" not in card_of(copied).split("## Figures")[0].split("## Trained on")[1]
    for damaged in ('{"identity": [1]}', "[1", '{"identity": {}, "evaluation": 3}'):
        (copied / "evaluation.json").write_text(damaged)
        if damaged.startswith('{"identity": {}'):
            assert "**None.**" in card_of(copied)
        else:
            with pytest.raises(ValueError, match=r"evaluation\.json is damaged .* cards can do without"):
                card_of(copied)


def test_the_list_of_images_is_found_again(tmp_path):
    """Of a dataset that a CSV file lists the file is recorded, as its folder is none; figures are made from it."""
    for k in range(2):
        write_images(tmp_path / f"part {k}", 14, k)
    rows = ["path,class,split,label"]
    rows += [f"part {k}/{i}.png,{k},{'test' if i > 11 else 'train'},good" for k in range(2) for i in range(14)]
    (tmp_path / "list.csv").write_text("\n".join(rows))
    settings = small_detectors.STAGES | {"out_indices": (1, 2), "feature_levels": 1, "img_size": 32, "msk_size": 16}
    model = GaussianModel(GaussianConfig(2, dim=4, coarse_dim=2, **settings))
    model.fit(discover(tmp_path / "list.csv"), output_dir=tmp_path / "listed", false_alarm_rate=0.2)
    text = card_of(tmp_path / "listed")
    assert "Trained on the dataset list.csv" in text and (tmp_path / "listed" / "evaluation.json").exists()


def test_a_record_of_the_training_that_is_damaged_is_named(copied):
    for damaged in ('{"trained_on": {"a": null}}', '{"held_out": 3}', '{"data": 5}', "[1"):
        (copied / "run.json").write_text(damaged)
        with pytest.raises(ValueError, match=r"run\.json is damaged.* delete it: reports and cards can do without"):
            card_of(copied)


def hgad(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["card", *map(str, arguments), "--device", "cpu"])
    return result.exit_code, result.output


def test_the_command_writes_beside_the_model_and_keeps_what_was_edited(copied, data, tmp_path):
    (copied / "card.md").write_text("edited")
    code, output = hgad(copied)
    assert code == 1 and "card.md exists, and may have been edited: --overwrite" in output and card(copied) == "edited"
    code, output = hgad(copied, "--overwrite", "--repo", "acme/screws")
    assert code == 0 and output.endswith(f"card: {copied / 'card.md'}\n")
    assert 'GaussianModel.from_pretrained("acme/screws")' in card(copied)
    assert hgad(copied / "model.safetensors", "-o", tmp_path / "alone.md")[0] == 0
    alone = (tmp_path / "alone.md").read_text(encoding="utf-8")
    assert "## Figures\n\n**None.**" in alone and "metrics" not in alone.split("---\n")[1]
    assert hgad(copied / "model.safetensors", "-o", tmp_path / "tested.md", "--data", data)[0] == 0
    assert tables((tmp_path / "tested.md").read_text(encoding="utf-8"))["Honest protocol"]
    before = (copied / "model.safetensors").read_bytes()
    code, output = hgad(copied, "-o", copied / "model.safetensors", "--overwrite")
    assert code == 1 and "the model itself: name a file to write" in output
    assert (copied / "model.safetensors").read_bytes() == before
    runs.remove(copied)
    assert (copied / "card.md").exists() and not (copied / "model.safetensors").exists()


def test_the_command_names_what_is_wrong(copied, tmp_path):
    assert f"{tmp_path} holds no model.safetensors" in hgad(tmp_path)[1]
    assert "there is no model file" in hgad(tmp_path / "nowhere.safetensors")[1]
    assert "a folder; name the file to write" in hgad(copied, "-o", tmp_path)[1]
    assert "no such folder" in hgad(copied, "--data", tmp_path / "nowhere", "--overwrite")[1]
    assert card(copied)
