"""The report: what it says, that it says it alone, and that Chromium shows it well wide and narrow, light and dark."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import chromium
import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from hgad_fast import HGADConfig, HGADModel
from hgad_fast.cli import app
from hgad_fast.data.datasets import discover
from hgad_fast.evaluation import charts, report, report_figures, run_folder
from hgad_fast.evaluation.evaluate import Evaluation

LONG = "housing_of_the_left_front_door_actuator-variant_with_bracket.v2"  # no defects in its test set
ODD = "<b>seal & $ring$"  # a folder may be called that; no masks
VOID = {"meta", "link", "img", "br"}


def write_dataset(root: Path, sizes: dict[str, tuple[int, int]]) -> Path:
    """Stripes of a slope of its own for each class; `sizes`: width and height. Defects are inverted squares."""
    rng = np.random.default_rng(0)
    for slope, (name, (width, height)) in enumerate(sizes.items()):
        counts = {"train/good": 12, "test/good": 4}
        if name != LONG:
            counts |= {f"test/{'scratch' * 12}": 3, "test/dent": 3}
        for folder, count in counts.items():
            (root / name / folder).mkdir(parents=True)
            for i in range(count):
                y, x = np.mgrid[:height, :width]
                pixels = 128 + 90 * np.sin(0.7 * (x + slope * y)) + rng.normal(0, 6, (height, width))
                mask = np.zeros((height, width), np.uint8)
                if not folder.endswith("good"):
                    mask[8:24, 10:26] = 255
                    pixels = np.where(mask, 255 - pixels, pixels)
                stem = f"{i:03}_" + "a_name_without_any_space_" * 4
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(root / name / folder / f"{stem}.png")
                if mask.any() and name != ODD:
                    masks = root / name / folder.replace("test", "ground_truth")
                    masks.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(mask).save(masks / f"{stem}_mask.png")
    return root


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {"plate": (64, 48), LONG: (48, 48), ODD: (40, 96)}
    return write_dataset(tmp_path_factory.mktemp("data"), sizes)


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a finished training, with its report."""
    folder = tmp_path_factory.mktemp("run with a space")
    config = HGADConfig(
        n_classes=3,
        backbone_arch="test_efficientnet",
        backbone_weights=None,
        out_indices=(1,),
        img_size=48,
        msk_size=24,
        feature_levels=2,
        coupling_layers=2,
        n_intra_centers=2,
        pos_embed_dim=8,
        meta_epochs=4,
        sub_epochs=1,
        batch_size=4,
        lr=2e-3,
    )
    with pytest.warns(UserWarning, match="too few calibration images"):
        HGADModel(config).fit(data, output_dir=folder)
    report.write_report(folder)
    return folder


@pytest.fixture(scope="module")
def evaluation(run: Path) -> Evaluation:
    return Evaluation.from_dict(json.loads((run / "evaluation.json").read_text())["evaluation"])


class Page(HTMLParser):
    """Elements as (tag, attributes), the text of each kind, and whether tags are closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: dict[str, list[str]] = {}
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self._open.append(tag)
            self.text.setdefault(tag, []).append("")

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        for tag in set(self._open):
            self.text[tag][-1] += data

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def page(run: Path) -> Page:
    return Page((run / "report.html").read_text(encoding="utf-8"))


# ---------------------------------------------------------------------------------------------------- the page


def test_it_is_one_file_that_loads_nothing(run: Path, page: Page) -> None:
    html = (run / "report.html").read_text(encoding="utf-8")
    assert len(html) < 2_000_000
    assert "<!doctype html>" in html and "http" not in html.replace("http-equiv", "")
    addresses = [value for _, attributes in page.elements for key in ("src", "href") if (value := attributes.get(key))]
    assert addresses and all(address.startswith(("data:", "#")) for address in addresses)
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {address[1:] for address in addresses if address.startswith("#")} <= set(ids)


def test_it_can_be_read_without_seeing_it(page: Page) -> None:
    assert page.of("html") == [{"lang": "en"}]
    levels = [int(tag[1]) for tag, _ in page.elements if tag in ("h1", "h2", "h3")]
    assert levels[0] == 1 and levels.count(1) == 1 and max(np.diff(levels)) == 1
    assert all(attributes["alt"] for attributes in page.of("img"))
    drawn = [attributes for attributes in page.of("svg") if attributes["class"] == "chart"]
    assert len(drawn) > 10 and all(chart["role"] == "img" and chart["aria-label"] for chart in drawn)
    assert len(page.of("table")) == len(page.of("caption")) > 5
    assert all("scope" in attributes for attributes in page.of("th"))


def test_names_are_text_whatever_they_hold(page: Page) -> None:
    assert not page.of("b")
    assert ODD in page.text["th"] and LONG in page.text["th"]
    assert any(alt.startswith(f"{ODD}: ") for alt in (image["alt"] or "" for image in page.of("img")))


def test_tables_hold_the_figures_of_both_protocols(page: Page, evaluation: Evaluation) -> None:
    def shown(value: float) -> str:
        return "–" if np.isnan(value) else f"{100 * value:.1f}"

    cells = iter(page.text["td"])
    for kind in ("image", "pixel"):
        figures = [name for name in report_figures.NAMES if name.startswith(kind)]
        rows = [{p: evaluation.figures[p][name] for p in evaluation.figures} for name in evaluation.figures["honest"]]
        rows += [{p: evaluation.mean(p) for p in evaluation.figures}, evaluation.pooled]
        for row in rows:
            for figure in figures:
                for protocol in ("honest", "official"):
                    interval = row[protocol].intervals.get(figure)
                    small = "" if interval is None else "–".join(map(shown, interval))
                    assert next(cells) == shown(getattr(row[protocol], figure)) + small
    assert evaluation.figures["honest"]["plate"].intervals and np.isnan(evaluation.figures["honest"][LONG].image_auroc)


def test_curves_and_histograms_show_what_there_is(page: Page) -> None:
    titles = page.text["strong"]
    assert [title for title in titles if ": " in title and not title.startswith((ODD, LONG, "plate"))] == [
        "Images: ROC",
        "Images: precision and recall",
        "Pixels: ROC",
        "Pixels: precision and recall",
        "Regions: PRO",
    ]
    assert [title for title in titles if title in ("plate", LONG, ODD)] == sorted(["plate", LONG, ODD])


def test_rates_are_what_the_calibration_judges(run: Path, evaluation: Evaluation) -> None:
    model = HGADModel.load(run / "model.safetensors")
    assert model.calibration is not None
    for rate in (0.02, 0.1, 0.3):
        actual = report._at_rate(model, model.calibration, evaluation, rate)
        model.calibration.false_alarm_rate = rate
        counts: Counter[bool] = Counter()
        attained_rates: list[float] = []
        for image in evaluation.images["honest"]:
            class_id = torch.tensor([model.class_names.index(image.inferred_class)])
            _, verdict, _, attained = model.calibration.judge(torch.tensor([image.score]), class_id)
            counts[image.is_anomalous] += bool(verdict)
            if not image.is_anomalous:
                attained_rates.append(float(attained))
        assert (actual.false_alarms, actual.found) == (counts[False], counts[True])
        assert (actual.normal, actual.defective) == (evaluation.n_normal, evaluation.n_anomalous) == (12, 12)
        assert actual.attained == pytest.approx(sum(attained_rates) / 12)
    # 12 images at 1/2: 3 to 9 alarms are 96.1 % of the cases, 4 to 8 only 85.4 %
    assert report._AtRate(0.5, 0.5, 6, 12, 0, 0).expected == (3, 9)


def test_the_worst_images_come_first(page: Page, evaluation: Evaluation) -> None:
    actual = evaluation.images["honest"]
    worst = []
    for is_anomalous in (True, False):
        group = [image for image in actual if image.is_anomalous == is_anomalous]
        group.sort(key=lambda image: image.score / (image.threshold or 0), reverse=not is_anomalous)
        worst += [image.path for image in group[: report.SHOWN]]
    spans = [attributes.get("class") for attributes in page.of("span")]
    files = [text for text, name in zip(page.text["span"], spans, strict=True) if name == "file"]
    assert files == worst
    verdicts = [text for text, name in zip(page.text["span"], spans, strict=True) if name and "verdict" in name]
    flags = {image.path: (image.is_flagged, image.is_anomalous) for image in actual}
    names = {(True, True): "called defective", (False, False): "called normal"}
    names |= {(False, True): "missed", (True, False): "false alarm"}
    assert verdicts == [names[flags[file]] for file in files]


def test_a_large_image_becomes_a_small_one(data: Path, run: Path, evaluation: Evaluation, monkeypatch) -> None:
    monkeypatch.setattr(report, "THUMBNAIL", 30)
    model = HGADModel.load(run / "model.safetensors")
    image = next(p for p in evaluation.images["honest"] if p.class_name == "plate" and p.is_anomalous)
    shown = report._shown(model, discover(data), image)
    assert (shown["width"], shown["height"], shown["has_mask"]) == (30, 22, True)


# ---------------------------------------------------------------------------------------------------- the command


def hgad(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["report", *map(str, arguments), "--device", "cpu"])
    assert result.exit_code == 0, result.output
    return result.stdout


def fails(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["report", *map(str, arguments), "--device", "cpu"])
    assert result.exit_code == 1 and result.stdout == "", result.output
    return result.stderr


@pytest.fixture
def copied(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "run"))


def test_the_evaluation_is_used_again_until_model_or_data_change(
    data: Path, copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    evaluate = run_folder.evaluate
    monkeypatch.setattr(
        run_folder, "evaluate", lambda *given, **options: calls.append(options) or evaluate(*given, **options)
    )
    monkeypatch.setattr(report, "_page", lambda *given: "")  # what takes time, and other tests look at
    output = tmp_path / "elsewhere" / "page.html"
    assert hgad(copied, "--output", output) == f"report: {output}\n"
    moved = Path(shutil.copytree(data, tmp_path / "data"))
    hgad(copied, "--data", moved)
    assert not calls and output.is_file()
    mask = next((moved / "plate" / "ground_truth").rglob("*.png"))
    Image.fromarray(np.full((48, 64), 255, np.uint8)).save(mask)
    hgad(copied, "--data", moved)
    assert len(calls) == 1
    model = HGADModel.load(copied / "model.safetensors")
    model.calibration.false_alarm_rate = 0.3
    model.save(copied / "model.safetensors")
    hgad(copied, "--data", moved)
    hgad(copied, "--data", moved)
    assert [call["official"] for call in calls] == [None, None]
    model.checkpoint = "best of all"
    model.save(copied / "best.safetensors")
    hgad(copied, "--data", moved)
    assert len(calls) == 3 and calls[-1]["official"].checkpoint == "best of all"


@pytest.mark.parametrize(
    ("recorded", "reason"),
    [
        ({"data": None}, "none were named"),
        ({"data": "/no/such/folder"}, "those of /no/such/folder, which the model was trained on, do not serve"),
    ],
)
def test_without_test_images_it_says_so_and_shows_the_rest(recorded: dict, reason: str, copied: Path) -> None:
    (copied / "run.json").write_text(json.dumps(recorded))
    (copied / "evaluation.json").unlink()
    hgad(copied)
    page = Page((copied / "report.html").read_text(encoding="utf-8"))
    assert any(reason in text for text in page.text["p"])
    assert page.text["h2"] == ["What to look at", "Scores", "Calibration", "Training", "Configuration and versions"]
    assert not (copied / "evaluation.json").exists()


def test_a_dataset_without_test_images_counts_as_none(data: Path, copied: Path, tmp_path: Path) -> None:
    normals = shutil.copytree(data, tmp_path / "normals", ignore=shutil.ignore_patterns("test", "ground_truth"))
    hgad(copied, "--data", normals)
    assert f"There are no test images: {normals} has none." in (copied / "report.html").read_text(encoding="utf-8")


def test_a_model_alone_is_enough(copied: Path) -> None:
    model = HGADModel.load(copied / "model.safetensors")
    model.calibration = None
    model.save(copied / "model.safetensors")
    (copied / "metrics.jsonl").unlink()
    hgad(copied)
    page = Page((copied / "report.html").read_text(encoding="utf-8"))
    assert page.text["h2"] == [
        "What to look at",
        "How well it does",
        "Curves",
        "Scores",
        "Calibration",
        "Training",
        "Configuration and versions",
    ]
    assert "honest" not in page.text["dt"] and "official" in page.text["dt"]
    assert any("The model has no thresholds" in text for text in page.text["p"])
    assert any("There is no metrics.jsonl" in text for text in page.text["p"])


def test_wrong_folders_and_damaged_files_are_named(copied: Path, tmp_path: Path) -> None:
    assert f"{tmp_path} holds no model.safetensors" in fails(tmp_path)
    assert "no such folder" in fails(copied, "--data", tmp_path / "nowhere")
    for name in ("metrics.jsonl", "evaluation.json", "run.json"):
        (copied / name).write_text("[1")
        assert f"{copied / name} is damaged" in fails(copied)


@pytest.mark.parametrize("name", ["Jinja2", "matplotlib"])
def test_missing_packages_are_named_with_the_remedy(name: str, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda module: module != name.lower() and find_spec(module) or None
    )
    assert fails(run).endswith(f"\nhgad-fast: the report needs {name}: pip install 'hgad-fast[report]'\n")


# ---------------------------------------------------------------------------------------------------- charts


def test_a_chart_takes_colours_and_font_from_the_page() -> None:
    svg = charts.training([[3.0, 2.0, 1.0]] * 5, "a < b", 'a "description" & more', [1.5])
    root = ElementTree.fromstring(svg)
    assert root.attrib["aria-label"] == 'a "description" & more'
    assert "#" not in svg and "font-family" not in svg and " id=" not in svg and "xlink" not in svg
    assert {f"var(--line-{level})" for level in range(4)} <= set(re.findall(r"var\(--[a-z0-9-]+\)", svg))
    assert "a < b" in "".join(root.itertext())


@pytest.mark.parametrize("mark", [None, 1.0, 0.3])
@pytest.mark.parametrize("logarithmic", [False, True])
def test_no_bar_stands_on_both_sides_of_the_mark_and_none_is_lost(mark: float | None, logarithmic: bool) -> None:
    scores = np.array([0.3, 0.31, 0.9999, 1.0, 1.0001, 1.7])
    edges = charts._edges(0.3, 1.7, mark, logarithmic, 10)
    assert 10 <= len(edges) - 1 <= 12 and (np.diff(edges) > 0).all()
    assert np.histogram(scores, edges)[0].sum() == len(scores)
    assert mark is None or abs(edges - mark).min() < 1e-12


def test_a_histogram_of_one_value_or_of_many_magnitudes_can_be_drawn() -> None:
    for scores, mark in (([2.0, 2.0], None), ([0.0], 1.0), ([1e-12, 5.0], 1.0)):
        ElementTree.fromstring(charts.histogram(scores, [], "score", "words", mark))


def test_curves_end_where_the_axis_does() -> None:
    line = np.array([[0.0, 0.1, 0.5, 1.0], [0.0, 0.4, 0.8, 1.0]])
    assert charts._cut(line, 0.3).tolist() == [[0.0, 0.1, 0.3], pytest.approx([0.0, 0.4, 0.6])]
    assert charts._cut(line, 1.0) is line


# ---------------------------------------------------------------------------------------------------- Chromium


def test_it_reads_well_in_chromium(run: Path, tmp_path: Path) -> None:
    if chromium.executable() is None:
        if os.environ.get("CI") == "true":
            pytest.fail("CI installs Chromium, but there is none on PATH")
        pytest.skip("there is no Chromium on PATH to look at the report with")
    file = run / "report.html"
    with chromium.open_browser() as browser:
        backgrounds = set()
        for width in (1280, 400):
            for dark in (False, True):
                browser.open(file, width=width, dark=dark)
                assert browser.evaluate("document.documentElement.scrollWidth") == width
                assert browser.evaluate(SPILLS) == []
                assert browser.evaluate(FAINT) == []
                backgrounds.add((dark, browser.evaluate("getComputedStyle(document.body).backgroundColor")))
        assert len(backgrounds) == 2
        assert browser.evaluate("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
        assert browser.evaluate(SORTED) == [["plate", LONG, ODD], sorted(["plate", LONG, ODD])]
        browser.screenshot(tmp_path / "report.png")
        with Image.open(tmp_path / "report.png") as image:
            assert image.size == (400, 900) and len(image.convert("RGB").getcolors(1 << 20)) > 50
        assert browser.messages == []
        assert {address.partition(":")[0] for address in browser.requests} == {"file", "data"}
        assert [address for address in browser.requests if address.startswith("file")] == [file.as_uri()] * 4


# Elements that reach beyond the window, but for those in a region that scrolls.
SPILLS = """
[...document.body.querySelectorAll("*")]
  .filter(e => !e.closest(".scroll, svg") && e.getBoundingClientRect().right > innerWidth + 0.5).map(e => e.outerHTML)
"""
# Texts of less contrast to what is behind them than WCAG asks for (4.5), charts included.
FAINT = """
(() => {
  const light = colour => {
    const linear = v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
    const [r, g, b] = colour.match(/[0-9.]+/g).map(v => linear(v / 255));
    return .2126 * r + .7152 * g + .0722 * b;
  };
  const behind = e => {
    const colour = getComputedStyle(e).backgroundColor;
    return colour === "rgba(0, 0, 0, 0)" && e.parentElement ? behind(e.parentElement) : colour;
  };
  const own = e => [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim());
  return [...document.body.querySelectorAll("*")].filter(own).filter(e => {
    const style = getComputedStyle(e);
    const [a, b] = [light(e.closest("svg") ? style.fill : style.color), light(behind(e))];
    return (Math.max(a, b) + .05) / (Math.min(a, b) + .05) < 4.5;
  }).map(e => e.outerHTML.slice(0, 200));
})()
"""
# The classes of the first table, sorted by pixel figures (falling, a dash last), then by name.
SORTED = """
(() => {
  const table = document.querySelectorAll("table.sortable")[1];
  const names = () => [...table.tBodies[0].rows].map(row => row.cells[0].textContent);
  table.querySelectorAll("button")[1].click();
  const byFigure = names();
  table.querySelectorAll("button")[0].click();
  return [byFigure, names()];
})()
"""
