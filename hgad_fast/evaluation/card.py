"""The model card: a page of Markdown for people who are given a model, with the front matter that a model hub reads.

It says how the model is used, what it was trained on, how well it does by which protocol, what its thresholds stand
for, what it cannot do, and which file it is about. It is made of what the report is made of, but holds no images, no
names of files and no paths. Names may come from anybody: they are text wherever they stand, never Markdown, HTML or
YAML.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..environment import VERSION
from ..features.extract import ShowProgress
from ..files import file_hash, printable, replacing
from ..methods import describe_file, load, opened
from ..protocol import Detector
from ..scoring.calibration import rate_table
from ..training.checkpoint import MODEL
from .evaluate import Evaluation, Figures, evaluate, test_set
from .remarks import remarks
from .report_figures import description, percent, protocol_names, threshold_table
from .run_folder import evaluated, kept_evaluation, test_data, training_record

CARD = "card.md"
LISTED = 100  # classes that have a row each
NAMED = 5  # classes that the title names
FIGURES = {
    "image_auroc": "Image AUROC",
    "image_average_precision": "Image AP",
    "image_f1_max": "Image F1max",
    "pixel_auroc": "Pixel AUROC",
    "pixel_average_precision": "Pixel AP",
    "pixel_aupro_30": "AUPRO 30 %",
}
NOT_LISTED = ("model file", "size", "method", "classes", "calibration", "note")  # told in words, or for this machine

FRONT_MATTER = """\
---
# license: the licence under which you pass the model on, e.g. apache-2.0 (write it here, without the # before it)
library_name: hgad_fast
pipeline_tag: image-segmentation
tags:
- anomaly-detection
- visual-inspection
- {method}
{metrics}---
"""


@dataclass
class Background:
    """What is known of a model beside its file.

    Attributes:
        record: what ``run.json`` of its training says; empty where there is none.
        evaluation: its figures on test images; None: there are none.
        evaluated_by: with which version and when these were computed, as a phrase; empty where it is not known.
    """

    record: Mapping[str, Any] = field(default_factory=dict)
    evaluation: Evaluation | None = None
    evaluated_by: str = ""


def write_card(
    run: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    data: str | os.PathLike[str] | None = None,
    *,
    repo: str | None = None,
    overwrite: bool = False,
    device: str | torch.device | None = None,
    progress: ShowProgress | None = None,
) -> Path:
    """Write the model card of a training run, or of a model file alone.

    Args:
        run: the folder that `fit` wrote, or a model file, of which nothing more is known.
        output: the file to write; None: ``card.md`` in the folder, or beside the file.
        data, device, progress: as in `report.write_report`. Figures that are kept in the folder are shown even where
            the test images are gone. Those of a model file alone are computed from `data`, and not kept.
        repo: name of the repository, owner/name, for which the card is; its example loads the model from there.
        overwrite: replace a card that is there; it may have been edited, e.g. to name a licence.

    Returns:
        The path of the card.

    Raises:
        ValueError: there is no model, `data` cannot be used, or there is a card already.
    """
    run = Path(run)
    file = run / MODEL if run.is_dir() else run
    output = Path(output or file.with_name(CARD))
    if output.resolve() == file.resolve():
        raise ValueError(f"--output is {printable(output)}, the model itself: name a file to write")
    if output.exists() and not overwrite:
        raise ValueError(
            f"{printable(output)} exists, and may have been edited: --overwrite (overwrite=True) replaces it; or give "
            "another --output"
        )
    text = card_of(run, data, repo=repo, device=device, progress=progress)
    with replacing(output) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return output


def card_of(
    run: str | os.PathLike[str],
    data: str | os.PathLike[str] | None = None,
    *,
    repo: str | None = None,
    device: str | torch.device | None = None,
    progress: ShowProgress | None = None,
) -> str:
    """Return the text of the card that `write_card` writes."""
    run = Path(run)
    if not run.is_dir():
        model = load(run, device)
        evaluation = None if data is None else evaluate(model, test_set(model, data), progress=progress)
        return model_card(model, run, Background(evaluation=evaluation), repo=repo)
    if not (run / MODEL).is_file():
        raise ValueError(f"{printable(run)} holds no {MODEL}; give the folder that training wrote, or a model file")
    model = load(run / MODEL, device)
    record = training_record(run)
    dataset, _ = test_data(model, data, record.get("data"))
    if dataset is not None:
        evaluated(model, dataset, run, progress)
    return model_card(model, run / MODEL, background_in(run), repo=repo)


def background_in(folder: Path) -> Background:
    """Return what the folder of a training run says of its model; nothing is computed for it."""
    background = Background(training_record(folder))
    if (kept := kept_evaluation(folder)) is not None:
        background.evaluation = kept.evaluation
        background.evaluated_by = f"with hgad_fast {kept.version}" + (f" on {kept.date[:10]}" if kept.date else "")
    return background


def model_card(model: Detector, file: Path, background: Background | None = None, *, repo: str | None = None) -> str:
    """Return the card of a model.

    Args:
        model: the model.
        file: the file with it, which the card describes and names by its hash.
        background: what else is known of it; None: nothing.
        repo: as in `write_card`.
    """
    background = background or Background()
    evaluation = background.evaluation
    blocks = [
        FRONT_MATTER.format(
            method=model.config.method,
            metrics="" if evaluation is None else "metrics:\n- roc_auc\n",
        ),
        f"# {text(_title(model))}",
        "Given an image of a product, this model says how anomalous it is, whether that is more than normal images of "
        "the product are, and where. It has seen normal images and nothing else. The method is "
        f"{text(model.about.what)}, in the library hgad_fast.",
        "## Use",
        *_use(model, file, repo),
        "## Trained on",
        *_trained_on(model, background.record),
        "## Figures",
        *_figures(model, background),
        "## Thresholds",
        *_thresholds(model, evaluation),
        "## Limits",
        bullets(_limits(model, evaluation)),
        "## What the file holds of the training images",
        f"No image. {text(model.about.keeps)} Beside that: the names of the classes, the scores of the normal images "
        "that were held out, and the settings, among them where the backbone's weights came from, be it a path.",
        "## Licence",
        "**To be filled in by whoever passes the model on**: the licence of the model, here and in the first lines of "
        f"this file. {_backbone_licence(model)}",
        "## The file",
        *_file(model, file, background),
    ]
    return "\n\n".join(block.strip("\n") for block in blocks) + "\n"


# ------------------------------------------------------------------------------------------------ Markdown


def text(value: str) -> str:
    """Return text that Markdown, with tables, HTML and links in it, shows as it is, in one line.

    What cannot be shown is escaped as by `terminal.printable`; punctuation that would mean something gets a backslash.
    """
    return _MEANINGFUL.sub(r"\\\g<0>", printable(value))


_MEANINGFUL = re.compile(r"[\\`*_{}\[\]<>#!|&~$^@]|:(?=//)|(?<=www)\.", re.IGNORECASE)


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table whose first column is of names, the others of numbers."""
    cells = [[text(cell) for cell in row] for row in (heads, *rows)]
    cells.insert(1, [":---", *["---:"] * (len(heads) - 1)])
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def bullets(sentences: Sequence[str]) -> str:
    """Return a list of sentences."""
    return "\n".join(f"- {text(sentence)}" for sentence in sentences)


def _literal(value: str) -> str:
    """Return a text as Python writes it, whatever is in it; a plain name in double quotes."""
    return f'"{value}"' if re.fullmatch(r"[\w./ -]+", value, re.ASCII) else repr(value)


# ------------------------------------------------------------------------------------------------ the sections


def _title(model: Detector) -> str:
    """Return the title, which names the classes if they are few."""
    names = model.groups
    if not model.groups_are_classes:
        return "Visual anomaly detector"
    others = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return f"Visual anomaly detector for {', '.join(names[:NAMED])}{others}"


def _use(model: Detector, file: Path, repo: str | None) -> list[str]:
    """Return the example, which runs as it is where the model and an image are, and what is needed for it."""
    if repo is None:
        lines = ["from hgad_fast import load", "", f"model = load({_literal(file.name)})  # the file beside this card"]
    else:
        name = type(model).__name__
        lines = [f"from hgad_fast import {name}", "", f"model = {name}.from_pretrained({_literal(repo)})"]
    if model.encoder is None:
        dims = ", ".join(map(str, model.feature_dims))
        lines += [
            f"# features: of each level a tensor (B, C, h, w), of {dims} channels, by the backbone of the training"
        ]
        lines += ["result = model.score_features(features)"]
    else:
        lines += ['result = model.score("image.png")  # or several: a list, a folder, arrays (RGB)']
    lines += [
        "parts = result.class_id, result.image_score, result.threshold, result.is_anomalous",
        "for k, score, threshold, anomalous in zip(*parts):",
        "    print(model.groups[k], float(score), float(threshold), bool(anomalous))",
        "anomaly_map = result.anomaly_map[0]  # where: higher is more anomalous",
    ]
    code = "\n".join(lines)
    needs = f"This takes the library hgad_fast, {VERSION} or later. Nothing in the file is executed when it is loaded."
    with opened(file) as content:
        if content.metadata.get("backbone") == "left out":
            needs += (
                f" The file does not hold the backbone: {text(str(model.config.backbone_arch))} has to be at hand with "
                "the weights of the training."
            )
    return [f"```python\n{code}\n```", needs]


def _trained_on(model: Detector, record: Mapping[str, Any]) -> Iterator[str]:
    """Yield what is known of the training: images of each class, the backbone, when and from what."""
    trained_on, held_out = (record.get(part) or {} for part in ("trained_on", "held_out"))
    names = [*model.groups] if model.groups_are_classes else [*trained_on]
    if trained_on:
        rows = [[name, *(str(each.get(name, 0)) for each in (trained_on, held_out))] for name in names]
        yield "Normal images of each class:"
        yield table(["Class", "Trained on", "Held out for the thresholds"], rows[:LISTED])
        yield from _others(rows, "classes")
    elif names:
        shown = ", ".join(names[:LISTED]) + (f" and {len(names) - LISTED} more" if len(names) > LISTED else "")
        yield f"Normal images of {len(names)} class{'es' * (len(names) > 1)}: {text(shown)}."
    else:
        yield "Normal images; of which products is not recorded."
    root = re.split(r"[\\/]", str(record.get("data") or "").rstrip("\\/"))[-1]
    facts = [f"the dataset {text(root)}"] if root else []
    facts += [f"on {text(str(record['date'])[:10])}"] if record.get("date") else []
    if facts:
        yield f"Trained on {', '.join(facts).removeprefix('on ')}."
    if model.encoder is None:
        yield "The features come from a backbone of the user's own, which is not in the file."
    else:
        yield f"The backbone is {text(str(model.config.backbone_arch))} of timm, frozen."


def _others(rows: Sequence[Any], what: str) -> Iterator[str]:
    """Yield how many rows a table of `LISTED` leaves out, if any."""
    if len(rows) > LISTED:
        yield f"And {len(rows) - LISTED} more {what}."


def _figures(model: Detector, background: Background) -> Iterator[str]:
    """Yield tables of figures for each protocol, the honest one first, and in words what the protocol is."""
    evaluation = background.evaluation
    if evaluation is None:
        yield "**None.** This card was made without test images: nothing is known here of how well the model detects."
        return
    by = f", {background.evaluated_by}" if background.evaluated_by else ""
    yield (
        f"On {evaluation.n_normal:,} normal and {evaluation.n_anomalous:,} defective test images{text(by)}, in "
        "percent. AUROC: 50 is chance. AUPRO 30 %: how much of a defect is marked, on average over up to 30 % of the "
        "normal pixels marked. A dash: the test images lack what the figure takes."
    )
    if evaluation.knows_classes and len(model.groups) > 1:
        yield f"The class is recognised in {percent(evaluation.inferred_class_accuracy)} of the test images."
    for protocol in protocol_names(evaluation):
        by_class = evaluation.figures[protocol]
        rows = [_row(name, figures) for name, figures in by_class.items()]
        checkpoint = text(evaluation.checkpoints[protocol])
        yield f"### {text(protocol.capitalize())} protocol"
        yield f"{text(description(evaluation, protocol))} Checkpoint: {checkpoint}."
        mean = [_row("mean of the classes", evaluation.mean(protocol))] if len(rows) > 1 else []
        yield table(["Class", *FIGURES.values()], rows[:LISTED] + mean)
        yield from _others(rows, "classes, which are in the mean")


def _row(name: str, figures: Figures) -> list[str]:
    return [name, *(percent(getattr(figures, figure)).removesuffix("\N{NO-BREAK SPACE}%") for figure in FIGURES)]


def _thresholds(model: Detector, evaluation: Evaluation | None) -> Iterator[str]:
    """Yield what the thresholds stand for, with a table of the groups that have some."""
    calibration = model.calibration
    if calibration is None:
        yield "**None.** The model is not calibrated: it gives scores, and calls no image anomalous."
        return
    content = threshold_table(model, calibration, evaluation)
    with_rates = zip(content["rows"], rate_table(model), strict=True)
    rows = [row for row, rate in with_rates if rate["images"] or model.groups_are_classes]
    yield (
        f"They come from {len(calibration.scores)} normal images that were held out of the training, and are meant to "
        f"call {percent(calibration.false_alarm_rate)} of such images anomalous. With n of them the rates that can be "
        "attained are multiples of 1 / (n + 1). Where too few are of a class or group, those of the others stand in, "
        "which assumes that their scores differ in location and scale alone."
    )
    yield table(content["heads"], rows[:LISTED])
    yield from _others(rows, "groups")


def _limits(model: Detector, evaluation: Evaluation | None) -> list[str]:
    """Return what the model cannot do, and what somebody should look at in its figures."""
    config = model.config
    limits = [
        "It says that an image is unlike normal ones, not what is wrong with it, nor whether that matters.",
        "It knows the classes above. An image of anything else is judged as one of that to which it is most like."
        if model.groups_are_classes
        else "An image of another product than those trained on is judged as one of that to which it is most like.",
        "Thresholds hold for images like those held out: after a change of camera, lens, light, position or material "
        "calibrate anew (hgad-fast calibrate).",
    ]
    if model.encoder is not None and isinstance(config.img_size, int):
        limits.append(
            f"Images are seen with a {'side' if config.square else 'short side'} of {config.img_size} pixels"
            f"{', the centre alone' if config.center_crop else ''}: what cannot be seen at that size is not found."
        )
    looks = [sentence[:1].upper() + sentence[1:] + "." for sentence in remarks(model, evaluation, None)]
    return [*limits, *model.about.limits, *looks]


def _backbone_licence(model: Detector) -> str:
    """Return a sentence on the licence that this card cannot know."""
    if model.encoder is None:
        return "The backbone has a licence of its own."
    return (
        f"The weights of the backbone ({text(str(model.config.backbone_arch))}) have a licence of their own, which may "
        "restrict what is made with them: look it up where they come from."
    )


def _file(model: Detector, file: Path, background: Background) -> Iterator[str]:
    """Yield a table of what identifies the file and what it holds, and the versions that it was trained with."""
    described = {name: value for name, value in describe_file(file).items() if not name.startswith("threshold")}
    facts = {
        "sha256": file_hash(file),
        "size": described["size"],
        "method": model.config.method,
        **{name: str(value) for name, value in described.items() if name not in NOT_LISTED},
    }
    versions = background.record.get("versions")
    if isinstance(versions, dict):
        facts["trained with"] = ", ".join(f"{name} {version}" for name, version in versions.items())
    yield "\n".join(
        ["| | |", "| :--- | :--- |", *(f"| {text(name)} | {text(value)} |" for name, value in facts.items())]
    )
