"""Score images by an exported model, without torch: `python onnx_score.py model.onnx IMAGES_OR_FOLDERS... > table.csv`.

It prints the table of `hgad-fast score`; every setting is in the file's metadata. TGA and AVIF are not read.
"""

import csv
import io
import json
import re
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

COLUMNS = "file class score threshold p_value anomalous target_false_alarm_rate false_alarm_rate error".split()
FORMATS = "PNG JPEG BMP PPM GIF DIB TIFF WEBP JPEG2000".split()
OUTPUTS = "score p_value is_anomalous class_id".split()
VERSION = "hgad_fast export 1"


def listed(path: Path) -> list[Path]:
    """Return the images below a folder, without hidden ones and the masks of MVTec AD; a file as it is."""
    images = [file for file in path.rglob("*") if Image.registered_extensions().get(file.suffix.lower()) in FORMATS]
    left_out = re.compile(r"(^|[\\/])(\.|ground_truth[\\/])", re.IGNORECASE)
    return sorted(x for x in images if not left_out.search(str(x.relative_to(path)))) if path.is_dir() else [path]


def read(file: Path, white_level: int) -> np.ndarray:
    """Return an image file as (3, H, W) float32 in [0, 1], upright and without alpha; 16-bit white is `white_level`."""
    image, again = (Image.open(io.BytesIO(content), formats=FORMATS) for content in 2 * [file.read_bytes()])
    tags, tiles = getattr(image, "tag_v2", {}), str(image.tile)
    if "'LA;16B'" in tiles or 16 in tags.get(258, ()) and (tags.get(262) == 0 or tags.get(284) == 2):
        raise ValueError("16 bits of grey with alpha, with white as zero or in separate planes: store it without")
    values = np.asarray(ImageOps.exif_transpose(image if image.mode[0] in "IF" else image.convert("RGB")))
    if raw := re.search(r"'(RGB[AX]?;16)([BLN])'", tiles):  # Pillow keeps upper bytes: read the lower as such
        swapped = raw[1] + ("L" if raw[2] == "B" else "B")
        again.tile = [(*x[:3], swapped if isinstance(x[3], str) else (swapped, *x[3][1:])) for x in again.tile]
        values = values.astype(np.uint16) << 8 | np.asarray(ImageOps.exif_transpose(again).convert("RGB"))
    white = {"uint8": 255, "float32": 1}.get(values.dtype.name, white_level)
    if not 0 <= values.min() <= values.max() <= white:
        raise ValueError(f"values from {values.min():g} to {values.max():g} are not in 0 to {white}")
    values = np.atleast_3d(values.astype(np.float32) / np.float32(white)).transpose(2, 0, 1)
    return values.repeat(3 // len(values), axis=0)


def seen(image: np.ndarray, resize: dict) -> np.ndarray:
    """Return an image (3, H, W) as the model sees it: by the rule of the sidecar, with Pillow's Lanczos filter."""
    crop, square, short = resize["rule"] == "centre crop", resize["rule"] == "square", min(image.shape[1:])
    side = short if resize["img_size"] == "native" else resize["img_size"]
    h, w = (side if square else (int if crop else round)(side * length / short) for length in image.shape[1:])
    top, left, *size = (round((h - side) / 2), round((w - side) / 2), side, side) if crop else (0, 0, h, w)
    if size != (taken := [resize["height"], resize["width"]]):
        raise ValueError("seen at {0}x{1}, the file takes {2}x{3}: export with --size {0}x{1}".format(*size, *taken))
    image = np.stack([Image.fromarray(x).resize((w, h), Image.Resampling.LANCZOS) for x in image]).clip(0, 1)
    return image[:, top : top + size[0], left : left + size[1]]


def row(file: Path, session: onnxruntime.InferenceSession, sidecar: dict) -> list:
    """Return the cells of an image's line in the table: its figures, or the error."""
    name = re.sub("^(?=[=+@-])", "./", bytes(file).decode(errors="backslashreplace"))  # no formula to spreadsheets
    try:
        image = seen(read(file, sidecar["white_level"]), sidecar["resize"])[None]
        score, p_value, is_anomalous, class_id = (x.item() for x in session.run(OUTPUTS, {"image": image}))
        if not np.isfinite(score):
            raise ValueError("it has no score: its features overflow")
    except Exception as error:
        return [name, *[None] * 7, f"{name}: {error}"]
    group, verdict = sidecar["groups"][class_id], [None, None] if np.isnan(p_value) else [p_value, is_anomalous]
    rates = [sidecar["target_false_alarm_rate"], group["false_alarm_rate"]]
    return [name, re.sub("^(?=[=+@-])", "'", group["name"]), score, group["threshold"], *verdict, *rates, None]


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit("usage: python onnx_score.py model.onnx IMAGES_OR_FOLDERS... > table.csv")
    try:
        session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
        sidecar = json.loads(session.get_modelmeta().custom_metadata_map.get("hgad_fast", "{}"))
        if sidecar.get("format") != VERSION:
            raise ValueError(f"not written by hgad-fast export, or by another version: its sidecar is no {VERSION!r}")
        if sidecar["inputs"].keys() != {"image"} or not sidecar["outputs"].keys() >= set(OUTPUTS):
            raise ValueError("for this program, export it without --inputs features, --class-input and --outputs")
    except Exception as error:
        sys.exit(f"{sys.argv[1]}: {error}")
    sys.stdout.reconfigure(encoding="utf-8", newline="")
    rows = [row(file, session, sidecar) for path in sys.argv[2:] for file in listed(Path(path))]
    csv.writer(sys.stdout).writerows([COLUMNS, *rows])
    failed = sum(cells[-1] is not None for cells in rows)
    sys.exit(f"{failed} of {len(rows)} images could not be scored" if failed or not rows else 0)
