"""What the folder of a training run says of its model to people: the record of the training, figures on test images.

The report and the model card are made of it.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ..data.datasets import Dataset, discover, fingerprint
from ..environment import VERSION
from ..features.extract import ShowProgress
from ..files import file_hash, printable, replacing
from ..methods import load
from ..protocol import Detector
from ..training.checkpoint import BEST, MODEL, RUN
from .evaluate import Evaluation, evaluate, test_set

EVALUATION = "evaluation.json"
EVALUATION_FORMAT = 2


@dataclass
class KeptEvaluation:
    """The evaluation in a folder.

    Attributes:
        evaluation: the figures.
        version: of the library that computed them.
        date: of that day, in ISO 8601; empty in folders of earlier versions.
    """

    evaluation: Evaluation
    version: str
    date: str


def read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file; an empty one where there is no file."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{printable(path)} is damaged ({error}); delete it: reports and cards can do without"
        ) from error


def training_record(folder: Path) -> dict[str, Any]:
    """Return what ``run.json`` in a folder says of the training; an empty object where there is none.

    Raises:
        ValueError: it is damaged.
    """
    record = read_object(folder / RUN)
    counts = [record.get(part) for part in ("trained_on", "held_out")]
    sound = isinstance(record.get("data", ""), (str, type(None))) and all(
        each is None or (isinstance(each, dict) and all(type(count) is int for count in each.values()))
        for each in counts
    )
    if not sound:
        raise ValueError(f"{printable(folder / RUN)} is damaged; delete it: reports and cards can do without")
    return record


def test_data(
    model: Detector, given: str | os.PathLike[str] | None, recorded: str | None
) -> tuple[Dataset | None, str]:
    """Return the dataset to test on, or None and a phrase on why there is none.

    A dataset that is given must be fit for it. One that is only recorded may be gone or have changed since; and of
    several datasets in one, the folder that they share is recorded, which need not be a dataset.
    """
    root = given or recorded
    if root is None:
        return None, "none were named"
    try:
        dataset = discover(root)
        if dataset.test:
            return test_set(model, dataset), ""
    except ValueError as error:
        if given is not None:
            raise
        return None, f"those of {recorded}, which the model was trained on, do not serve ({error})"
    return None, f"{printable(root)} has none"


def evaluated(model: Detector, dataset: Dataset, folder: Path, progress: ShowProgress | None) -> Evaluation:
    """Return the evaluation kept in the folder if it is of this model, dataset and version; else make and keep one."""
    masks = [replace(sample, path=sample.mask) for sample in dataset.test if sample.mask is not None]
    identity = {
        "format": EVALUATION_FORMAT,
        "version": VERSION,
        "models": _hashes(folder),
        "data": fingerprint([*dataset.test, *masks], dataset.root),
    }
    kept = read_object(folder / EVALUATION)
    if kept.get("identity") == identity:
        return Evaluation.from_dict(kept["evaluation"])
    official = load(folder / BEST, model.device) if (folder / BEST).is_file() else None
    evaluation = evaluate(model, dataset, official=official, progress=progress)
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    with replacing(folder / EVALUATION) as file:
        content = {"identity": identity, "date": date, "evaluation": evaluation.to_dict()}
        file.write_text(json.dumps(content) + "\n", encoding="utf-8")
    return evaluation


def kept_evaluation(folder: Path) -> KeptEvaluation | None:
    """Return the evaluation kept in the folder if it is of the models in it, on whatever images; else None."""
    path = folder / EVALUATION
    kept = read_object(path)
    identity = kept.get("identity", {})
    try:
        if (identity.get("format"), identity.get("models")) != (EVALUATION_FORMAT, _hashes(folder)):
            return None
        return KeptEvaluation(
            Evaluation.from_dict(kept["evaluation"]), str(identity["version"]), str(kept.get("date", ""))
        )
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{printable(path)} is damaged ({error!r}); delete it: reports and cards can do without"
        ) from error


def _hashes(folder: Path) -> list[str]:
    """Return the sha256 of the model files in a folder, in hexadecimal."""
    return [file_hash(path) for path in (folder / MODEL, folder / BEST) if path.is_file()]
