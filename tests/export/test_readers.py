"""The programs in examples/ that read exported files: images go in as the library sees them, and its table comes out.

Most models here give the mean of what goes in as the score, so that it is known. The reader in C++ is tested where
there are a compiler and onnxruntime's headers: from its release archive, a package of the system, or the npm package
com.github.asus4.onnxruntime. The variable ONNXRUNTIME_INCLUDE names their folder.
"""

from __future__ import annotations

import ast
import csv
import io
import json
import os
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import exported
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from image_files import in_rows, png, tiff, with_alpha
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from hgad_fast.data.images import ImageError, read_header, read_image
from hgad_fast.data.listing import is_image, list_images
from hgad_fast.export.contract import FORMAT, KEY
from hgad_fast.export.graph import GIVEN_CLASS, OUTPUTS
from hgad_fast.features.preprocess import preprocess
from hgad_fast.scoring.outputs import COLUMNS, FIGURES, Job
from hgad_fast.scoring.pipeline import score_files

EXAMPLES = Path(__file__).parents[2] / "examples"
READER = EXAMPLES / "onnx_score.py"
reader = SimpleNamespace(**runpy.run_path(str(READER)))

DRAWN = np.random.default_rng(0)
COLOUR = DRAWN.integers(0, 256, (20, 30, 3), dtype=np.uint8)
COLOUR16 = DRAWN.integers(0, 65536, (20, 30, 3), dtype=np.uint16)
GREY16 = COLOUR16[..., 0]
ORIENTATION = 0x0112
TURNED = Image.Exif()
TURNED[ORIENTATION] = 6


def pillow(values: np.ndarray, mode: str | None = None, **options: Any) -> Callable[[Path], None]:
    """Return a function that writes values to a path by Pillow, converted to a mode."""

    def write(path: Path) -> None:
        image = Image.fromarray(values)
        (image.convert(mode) if mode else image).save(path, **options)

    return write


def content(data: bytes) -> Callable[[Path], None]:
    """Return a function that writes these bytes to a path."""

    def write(path: Path) -> None:
        path.write_bytes(data)

    return write


def pgm(values: np.ndarray, largest: int) -> bytes:
    """Return a binary PGM (H, W) or PPM (H, W, 3) whose header says `largest`."""
    kind, size = (b"P6" if values.ndim == 3 else b"P5"), values.dtype.itemsize
    header = b"%s\n# drawn\n%d %d\n%d\n" % (kind, values.shape[1], values.shape[0], largest)
    return header + values.astype(f">u{size}").tobytes()


WIDE, HIGH = COLOUR16.shape[1], COLOUR16.shape[0]
FILES = {
    "colour.jpg": pillow(COLOUR, quality=90),
    "grey.jpg": pillow(COLOUR[..., 0]),
    "cmyk.jpg": pillow(COLOUR, "CMYK"),
    "turned.jpg": pillow(COLOUR, exif=TURNED),
    "turned-cmyk.jpg": pillow(COLOUR, "CMYK", exif=TURNED),
    "colour.png": pillow(COLOUR),
    "grey.png": pillow(COLOUR[..., 0]),
    "turned.png": pillow(COLOUR, exif=TURNED),
    "bits.png": pillow(COLOUR, "1"),
    "palette.png": pillow(COLOUR, "P"),
    "transparent-palette.png": pillow(COLOUR, "P", transparency=3),
    "alpha.png": pillow(np.dstack([COLOUR, COLOUR[..., 0]])),
    "grey-alpha.png": pillow(COLOUR, "LA"),
    "grey16.png": pillow(GREY16),
    "turned-grey16.png": pillow(GREY16, exif=TURNED),
    "colour16.png": content(png(WIDE, HIGH, 16, 2, in_rows(COLOUR16))),
    "alpha16.png": content(png(WIDE, HIGH, 16, 6, in_rows(with_alpha(COLOUR16)))),
    "grey16.tif": pillow(GREY16),
    "grey16-lzw.tif": pillow(GREY16, compression="tiff_lzw"),
    "grey16-big.tif": pillow(GREY16.astype(">u2")),
    "turned-grey16.tif": pillow(GREY16, tiffinfo={ORIENTATION: 6}),
    "integers.tif": pillow(GREY16.astype(np.int32)),
    "floats.tif": pillow(COLOUR[..., 0].astype(np.float32) / 300),
    "colour.tif": pillow(COLOUR, compression="tiff_deflate"),
    "cmyk.tif": pillow(COLOUR, "CMYK"),
    "colour16.tif": content(tiff(COLOUR16, "<")),
    "colour16-big.tif": content(tiff(COLOUR16, ">")),
    "deflated16.tif": content(tiff(COLOUR16, "<", deflated=True)),
    "alpha16.tif": content(tiff(with_alpha(COLOUR16), "<")),
    **{f"turned{i}-colour16.tif": content(tiff(COLOUR16, "<", orientation=i)) for i in range(2, 9)},
    "colour.bmp": pillow(COLOUR),
    "palette.bmp": pillow(COLOUR[..., 0], "P"),
    "colour.gif": pillow(COLOUR),
    "colour.webp": pillow(COLOUR, lossless=True),
    "grey16.pgm": content(pgm(GREY16, 65535)),
    "grey10.pgm": content(pgm(GREY16 % 1001, 1000)),
    "colour16.ppm": content(pgm(COLOUR16, 65535)),
}


@pytest.mark.parametrize("name", FILES)
def test_files_are_read_as_by_the_library(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    FILES[name](path)
    image = reader.read(path, 65535)
    assert image.dtype == np.float32 and np.ptp(image) > 0
    np.testing.assert_array_equal(image, read_image(path).numpy())


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_sixteen_bits_count_by_the_white_level(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    pillow(GREY16 // 16)(path)
    np.testing.assert_array_equal(reader.read(path, 4095), read_image(path, 4095).numpy())
    with pytest.raises(ValueError, match=r"values from \d+ to \d+ are not in 0 to 1023"):
        reader.read(path, 1023)


REFUSED = {
    "high.tif": pillow(np.array([[0.0, 1.5]], np.float32)),
    "negative.tif": pillow(np.array([[-0.1, 1.0]], np.float32)),
    "nan.tif": pillow(np.array([[0.0, np.nan]], np.float32)),
    "integers.tif": pillow(np.array([[0, 65536]], np.int32)),
    "white.tif": pillow(GREY16, tiffinfo={262: 0}),
    "planes.tif": content(tiff(COLOUR16, "<", planar=2)),
    "empty.png": content(b""),
    "text.png": content(b"no image"),
    "postscript.png": content(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_files_that_the_library_refuses_are_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    REFUSED[name](path)
    with pytest.raises(ImageError):
        read_image(path)
    with pytest.raises((ValueError, OSError)):
        reader.read(path, 65535)


def test_what_cannot_be_read_exactly_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(png(WIDE, HIGH, 16, 4, in_rows(with_alpha(GREY16[..., None]))))
    with pytest.raises(ValueError, match="grey with alpha"):
        reader.read(path, 65535)
    pillow(COLOUR)(path)
    path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(OSError, match="truncated"):
        reader.read(path, 65535)


@pytest.mark.parametrize("size", [(40, 60), (60, 40), (33, 47), (47, 33), (32, 32), (32, 48), (7, 10), (31, 97)])
@pytest.mark.parametrize(
    ("rule", "config"),
    [
        ("short side", {"img_size": 32}),
        ("short side", {"img_size": 33}),
        ("square", {"img_size": 32, "square": True}),
        ("square", {"img_size": "native", "square": True}),
        ("centre crop", {"img_size": 32, "center_crop": True}),
        ("centre crop", {"img_size": 17, "center_crop": True}),
        ("centre crop", {"img_size": "native", "center_crop": True}),
        ("native", {"img_size": "native"}),
    ],
)
def test_images_are_resized_as_by_the_library(size: tuple[int, int], rule: str, config: dict[str, Any]) -> None:
    image = torch.rand(3, *size)
    expected = preprocess(image, SimpleNamespace(**{"center_crop": False, "square": False} | config)).numpy()
    height, width = expected.shape[1:]
    resize = {"rule": rule, "img_size": config["img_size"], "height": height, "width": width}
    np.testing.assert_array_equal(reader.seen(image.numpy(), resize), expected)


@pytest.mark.parametrize(
    ("rule", "img_size", "height", "size"),
    [
        ("short side", 20, 20, "20x30"),
        ("native", "native", 20, "20x30"),
        ("square", "native", 40, "20x20"),
        ("centre crop", "native", 10, "20x20"),
        ("centre crop", "native", 40, "20x20"),
    ],
)
def test_an_image_of_another_size_is_an_error_that_names_both(
    rule: str, img_size: int | str, height: int, size: str
) -> None:
    resize = {"rule": rule, "img_size": img_size, "height": height, "width": height}
    taken = f"seen at {size}, the file takes {height}x{height}: export with --size {size}"
    with pytest.raises(ValueError, match=taken):
        reader.seen(np.zeros((3, 20, 30), np.float32), resize)


# ---------------------------------------------------------------------------------------------- the table

GROUPS = [
    {"threshold": 0.25, "false_alarm_rate": 0.05},
    {"threshold": None, "false_alarm_rate": None},
]
P_VALUES, THRESHOLDS = [0.5, np.nan], [0.25, np.nan]
ROUNDING = 3 * 20 * 20 * 2**-24  # of a mean of 3 x 20 x 20 positive values, each of which is added with half a unit


def mean_model(
    path: Path,
    size: tuple[int, int] = (20, 20),
    *,
    divisor: float = 1,
    names: Sequence[str] = ("dark", "bright"),
    version: str | None = FORMAT,
    inputs: Sequence[str] = ("image",),
    outputs: Sequence[str] = OUTPUTS[1:],
    **changes: Any,
) -> Path:
    """Write a model whose score is the mean of the image over a divisor, and whose second class is above a half.

    Args:
        path: of the model. Nothing is beside it: the sidecar is in its metadata alone.
        size: height and width of the images.
        divisor: of the mean: 0 for scores that are infinite, or NaN where the image is black.
        names: of both classes.
        version: the format that the sidecar names; None: there is no sidecar.
        inputs: names of what goes in; what is no image is not used.
        outputs: names of what comes out.
        **changes: entries of the sidecar's rule of resizing.
    """
    sidecar = {
        "format": version,
        "inputs": dict.fromkeys(inputs, {}),
        "resize": {"rule": "square", "img_size": 20, "height": size[0], "width": size[1]} | changes,
        "white_level": 65535,
        "outputs": dict.fromkeys(outputs, {}),
        "groups": [group | {"name": name} for group, name in zip(GROUPS, names, strict=True)],
        "target_false_alarm_rate": 0.01,
    }
    constants = {
        "axes": np.array([1, 2, 3]),
        "divisor": np.float32(divisor),
        "half": np.float32(0.5),
        "thresholds": np.array(THRESHOLDS, np.float32),
        "p_values": np.array(P_VALUES, np.float32),
    }
    types = {"score": TensorProto.FLOAT, "class_id": TensorProto.INT64, "is_anomalous": TensorProto.BOOL}
    graph = helper.make_graph(
        [
            helper.make_node("ReduceMean", ["image", "axes"], ["mean"], keepdims=0),
            helper.make_node("Div", ["mean", "divisor"], ["score"]),
            helper.make_node("Greater", ["score", "half"], ["is_bright"]),
            helper.make_node("Cast", ["is_bright"], ["class_id"], to=TensorProto.INT64),
            helper.make_node("Gather", ["thresholds", "class_id"], ["threshold"]),
            helper.make_node("Gather", ["p_values", "class_id"], ["p_value"]),
            helper.make_node("Greater", ["score", "threshold"], ["is_anomalous"]),
        ],
        "mean",
        [
            helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 3, *size]),
            *(helper.make_tensor_value_info(name, TensorProto.INT64, ["batch"]) for name in inputs if name != "image"),
        ],
        [helper.make_tensor_value_info(name, types.get(name, TensorProto.FLOAT), ["batch"]) for name in outputs],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    helper.set_model_props(model, {} if version is None else {KEY: json.dumps(sidecar, indent=2)})
    onnx.save(model, path)
    return path


def said_by(*command: Path | str, **options: Any) -> tuple[int, str, str]:
    """Run a program, and return its exit code, what it prints, and its errors."""
    done = subprocess.run(command, capture_output=True, env=os.environ | {"PYTHONIOENCODING": "ascii"}, **options)
    return done.returncode, done.stdout.decode(), done.stderr.decode()


def table_of(model: Path, *paths: Path | str, **options: Any) -> tuple[int, list[dict[str, str]], str]:
    """Run the reader, and return its exit code, the rows of its table, and what else it says."""
    code, text, errors = said_by(sys.executable, READER, model, *paths, **options)
    header, *_ = text.splitlines() or [""]
    assert header.split(",") == list(COLUMNS), errors
    return code, list(csv.DictReader(io.StringIO(text, newline=""))), errors


def test_the_table_is_that_of_the_command(tmp_path: Path) -> None:
    model = mean_model(tmp_path / "model.onnx")
    for name, level in {"a.png": 40, "b.jpg": 100, "c.png": 200}.items():
        pillow(np.full((20, 30, 3), level, np.uint8))(tmp_path / name)
    code, rows, said = table_of(model, *(tmp_path / name for name in ("c.png", "a.png", "b.jpg")))
    assert code == 0 and said == ""
    assert [Path(row["file"]).name for row in rows] == ["c.png", "a.png", "b.jpg"]
    assert [row["class"] for row in rows] == ["bright", "dark", "dark"]
    assert [row["threshold"] for row in rows] == ["", "0.25", "0.25"]
    assert [row["p_value"] for row in rows] == ["", "0.5", "0.5"]
    assert [row["anomalous"] for row in rows] == ["", "False", "True"]
    assert [row["target_false_alarm_rate"] for row in rows] == 3 * ["0.01"]
    assert [row["false_alarm_rate"] for row in rows] == ["", "0.05", "0.05"]
    assert [row["error"] for row in rows] == 3 * [""]
    # the mean of 400 equal float32 values: each of its additions rounds by half a unit of 2**-23
    np.testing.assert_allclose(
        [float(row["score"]) for row in rows], np.array([200, 40, 100]) / 255, rtol=1200 * 2**-24
    )


def test_all_kinds_of_files_of_a_folder_are_scored(tmp_path: Path) -> None:
    model = mean_model(tmp_path / "model.onnx")
    folder = tmp_path / "images"
    for name, write in FILES.items():
        path = folder / name.split(".")[1] / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path)
    code, rows, said = table_of(model, folder)
    assert code == 0, said
    files = list_images(folder)
    assert [row["file"] for row in rows] == [str(file) for file in files] and len(files) == len(FILES)
    square = SimpleNamespace(img_size=20, center_crop=False, square=True)
    expected = [float(preprocess(read_image(file), square).double().mean()) for file in files]
    np.testing.assert_allclose([float(row["score"]) for row in rows], expected, rtol=ROUNDING)


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A model of images, and what it is exported to, for images of 64 x 96 pixels."""
    model = exported.on_images()
    return model, model.export(tmp_path_factory.mktemp("real") / "model.onnx", size=(64, 96))


# Preprocessing is the same to the bit, so that scores differ by the rounding of two runtimes alone: see test_graph.py.
SAME_SCORE = 300 * 2**-23


def test_an_exported_model_gives_the_verdicts_of_the_model(tmp_path: Path, real: tuple[Any, Path]) -> None:
    """An image that was turned upright is of another size: it is an error that says so."""
    model, path = real
    for name, write in FILES.items():
        write(tmp_path / name)
    code, rows, _ = table_of(path, tmp_path)
    records = score_files(model, list_images(tmp_path), Job(regions=False, overlays=False))
    assert code == 1 and [row["file"] for row in rows] == [str(record.task.file) for record in records]
    verdicts = set()
    for row, record in zip(rows, records, strict=True):
        assert record.row is not None
        height, width, _ = read_header(record.task.file)
        if height > width:
            assert "seen at 96x64, the file takes 64x96: export with --size 96x64" in row["error"]
            continue
        assert row["error"] == ""
        for name in FIGURES:
            if isinstance(record.row[name], float):
                assert float(row[name]) == pytest.approx(record.row[name], rel=SAME_SCORE), (row["file"], name)
            else:
                assert row[name] == str(record.row[name])
        verdicts.add(row["anomalous"])
    assert verdicts == {"True", "False"}


def test_what_is_no_image_of_a_folder_is_left_out(tmp_path: Path) -> None:
    for name in ("b.PNG", "a/z.png", "c.jpeg", ".hidden.png", ".folder/a.png", "ground_truth/x/mask.png", "notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert reader.listed(tmp_path) == [tmp_path / name for name in ("a/z.png", "b.PNG", "c.jpeg")]
    assert reader.listed(tmp_path / "ground_truth") == [tmp_path / "ground_truth/x/mask.png"]
    assert reader.listed(tmp_path / "notes.txt") == [tmp_path / "notes.txt"]


def test_images_with_errors_stand_in_the_table_and_in_the_exit_code(tmp_path: Path) -> None:
    model = mean_model(tmp_path / "model.onnx", rule="short side")
    pillow(COLOUR[:, :20])(tmp_path / "good.png")
    pillow(COLOUR)(tmp_path / "wide.png")
    (tmp_path / "broken.png").write_bytes(b"no image")
    code, rows, said = table_of(model, tmp_path, tmp_path / "absent.png")
    assert code == 1 and "3 of 4 images could not be scored" in said
    errors = {Path(row["file"]).name: row["error"] for row in rows}
    assert errors.pop("good.png") == ""
    assert "seen at 20x30, the file takes 20x20: export with --size 20x30" in errors["wide.png"]
    assert "cannot identify image" in errors["broken.png"] and "No such file" in errors["absent.png"]
    assert all(error.startswith(str(tmp_path / name)) for name, error in errors.items())
    assert all(row["score"] == "" for row in rows if row["error"])


NAMES = ['cr\u00e8me "br\u00fbl\u00e9e", \U0001f36e', '=back\\slash\n"name": \x7f\ud7ff\t]']
OVERFLOW = "it has no score: its features overflow"


def test_a_class_is_written_as_by_the_command(tmp_path: Path) -> None:
    """A name may be any text, and none begins like a formula."""
    model = mean_model(tmp_path / "model.onnx", names=NAMES)
    for name, level in {"a.png": 40, "b.png": 200}.items():
        pillow(np.full((20, 30), level, np.uint8))(tmp_path / name)
    code, rows, said = table_of(model, tmp_path)
    assert code == 0, said
    assert [row["class"] for row in rows] == [NAMES[0], f"'{NAMES[1]}"]


def test_a_score_that_is_no_number_is_an_error(tmp_path: Path) -> None:
    model = mean_model(tmp_path / "model.onnx", divisor=0)
    for name, level in {"infinite.png": 1, "nan.png": 0}.items():
        pillow(np.full((20, 30), level, np.uint8))(tmp_path / name)
    code, rows, said = table_of(model, tmp_path)
    assert code == 1 and "2 of 2 images could not be scored" in said
    for row in rows:
        assert row.pop("error") == f"{row.pop('file')}: {OVERFLOW}" and set(row.values()) == {""}


UNUSABLE: dict[str, dict[str, Any]] = {
    "features": {"inputs": ["features_0", "features_1", "image"]},
    "class": {"inputs": ["image", GIVEN_CLASS]},
    "outputs": {"outputs": [name for name in OUTPUTS[1:] if name != "p_value"]},
    "version": {"version": "hgad_fast export 2"},
    "other": {"version": None},
}
REMEDY = "for this program, export it without --inputs features, --class-input and --outputs"
FOREIGN = f"not written by hgad-fast export, or by another version: its sidecar is no {FORMAT!r}"


@pytest.mark.parametrize("kind", UNUSABLE)
def test_a_model_that_the_reader_cannot_use_is_refused_once(tmp_path: Path, kind: str) -> None:
    model = mean_model(tmp_path / "model.onnx", **UNUSABLE[kind])
    reason = FOREIGN if kind in ("version", "other") else REMEDY
    assert said_by(sys.executable, READER, model, "a.png", "b.png") == (1, "", f"{model}: {reason}{os.linesep}")


def test_outputs_that_the_reader_does_not_need_may_be_missing(tmp_path: Path) -> None:
    model = mean_model(tmp_path / "model.onnx", outputs=reader.OUTPUTS)
    pillow(COLOUR)(tmp_path / "a.png")
    code, rows, said = table_of(model, tmp_path)
    assert code == 0 and len(rows) == 1, said


def test_a_model_that_is_none_is_refused_in_a_line(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.onnx", tmp_path / "text.onnx"):
        (tmp_path / "text.onnx").write_text("no model")
        code, printed, said = said_by(sys.executable, READER, path, "a.png")
        assert code == 1 and printed == "" and said.startswith(f"{path}: ") and len(said.splitlines()) == 1


def test_missing_arguments_are_answered_by_the_usage() -> None:
    for arguments in ([], ["model.onnx"]):
        code, printed, said = said_by(sys.executable, READER, *arguments)
        assert code == 1 and printed == "" and len(said.splitlines()) == 1
        assert said.startswith("usage: python onnx_score.py model.onnx IMAGES_OR_FOLDERS...")


def test_a_run_without_images_fails(tmp_path: Path) -> None:
    folder = tmp_path / "empty"
    folder.mkdir()
    assert table_of(mean_model(tmp_path / "model.onnx"), folder)[0] == 1


@pytest.mark.skipif(sys.platform != "linux", reason="file names are bytes on Linux alone")
def test_names_are_written_as_by_the_command(tmp_path: Path) -> None:
    model = mean_model(tmp_path / "model.onnx")
    for name in (b"Gr\xf6.png", "Gr\u00f6.png".encode(), b"=1+1.png"):
        pillow(COLOUR)(tmp_path / "a.png")
        os.rename(tmp_path / "a.png", os.path.join(os.fsencode(tmp_path), name))
    code, rows, said = table_of(model, ".", cwd=tmp_path)
    assert code == 0, said
    assert {row["file"] for row in rows} == {
        "Gr\\xf6.png",
        "Gr\N{LATIN SMALL LETTER O WITH DIAERESIS}.png",
        "./=1+1.png",
    }


# ---------------------------------------------------------------------------------------------- what it is made of


def test_the_reader_is_short_and_needs_neither_torch_nor_this_package() -> None:
    """Its functions have 40 lines, docstrings and empty lines aside, and nothing that it loads brings torch."""
    tree = ast.parse(READER.read_text())
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    assert all(ast.get_docstring(node) for node in (tree, *functions))
    assert sum((node.end_lineno or 0) - node.body[1].lineno + 1 for node in functions) <= 40
    code = f"import runpy, sys; runpy.run_path({str(READER)!r}); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True).stdout.split()
    assert "onnxruntime" in loaded and not {"torch", "hgad_fast"} & set(loaded)


def test_the_reader_knows_the_format_of_the_library() -> None:
    assert reader.VERSION == FORMAT and set(reader.OUTPUTS) < set(OUTPUTS)


def test_the_reader_knows_the_suffixes_of_the_library() -> None:
    known = [ending for ending, kind in Image.registered_extensions().items() if kind in reader.FORMATS]
    assert [ending for ending in known if not is_image(Path(f"a{ending}"))] in ([], [".pfm"])


# ---------------------------------------------------------------------------------------------- C++

INCLUDE = "ONNXRUNTIME_INCLUDE"
FOLDERS = (
    os.environ.get(INCLUDE, ""),
    "/usr/include/onnxruntime",
    "/usr/local/include/onnxruntime",
    "/usr/local/include",
)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The C++ reader, compiled against headers that were found and linked to the library in onnxruntime's wheel."""
    headers = next((folder for folder in FOLDERS if folder and Path(folder, "onnxruntime_cxx_api.h").is_file()), None)
    if headers is None:
        pytest.skip(f"no onnxruntime_cxx_api.h: let {INCLUDE} name its folder")
    if (compiler := shutil.which("g++")) is None:
        pytest.skip("no g++")
    libraries = list(Path(onnxruntime.__file__).parent.glob("capi/libonnxruntime.so.*"))
    if not libraries:
        pytest.skip("onnxruntime's wheel brings no shared library here")
    folder = tmp_path_factory.mktemp("cpp")
    library = folder / "libonnxruntime.so.1"  # the name that the program will look for
    library.symlink_to(libraries[0])
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-isystem", headers, f"-Wl,-rpath,{folder}"]
    program = folder / "onnx_score"
    done = subprocess.run(
        [compiler, *flags, EXAMPLES / "onnx_score.cpp", library, "-o", program], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return program


def test_the_program_in_cpp_gives_the_same_figures(tmp_path: Path, program: Path) -> None:
    model = mean_model(tmp_path / "model.onnx", (20, 30), rule="native", img_size="native")
    drawn = {
        "colour.ppm": pgm(COLOUR, 255),
        "dark.ppm": pgm(COLOUR // 8, 255),
        "dim.ppm": pgm(COLOUR // 2, 200),
        "grey.pgm": pgm(COLOUR[..., 0] // 4, 255),
        "grey16.pgm": pgm(GREY16 // 3, 65535),
        "grey10.pgm": pgm(GREY16 % 1001, 1000),
        "colour16.ppm": pgm(COLOUR16, 65535),
        'na"me.pgm': pgm(COLOUR[..., 0] // 3, 255),
    }
    for name, data in drawn.items():
        (tmp_path / name).write_bytes(data)
    files = [tmp_path / name for name in drawn]
    code, text, said = said_by(program, model, *files)
    assert code == 0, said
    rows = list(csv.DictReader(text.splitlines()))
    _, expected, _ = table_of(model, *files)
    assert [row["file"] for row in rows] == [row["file"] for row in expected]
    assert {(row["class_id"], row["class"]) for row in rows} == {("0", "dark"), ("1", "bright")}
    for name in ("class", "threshold", "p_value", "anomalous"):
        assert [row[name] for row in rows] == [row[name] for row in expected]
    assert [np.float32(row["score"]) for row in rows] == [np.float32(row["score"]) for row in expected]


def test_the_program_in_cpp_scores_by_an_exported_model(tmp_path: Path, real: tuple[Any, Path], program: Path) -> None:
    """Of images that need no resizing it gives to the bit what the reader in Python gives."""
    _, model = real
    drawn = {"colour.ppm": (64, 96, 3), "grey.pgm": (64, 96)}
    for name, shape in drawn.items():
        values = np.random.default_rng(1).integers(0, 256, shape, dtype=np.uint8)
        (tmp_path / name).write_bytes(pgm(values, 255))
    files = [tmp_path / name for name in drawn]
    code, text, said = said_by(program, model, *files)
    assert code == 0, said
    _, expected, _ = table_of(model, *files)
    for row, other in zip(csv.DictReader(text.splitlines()), expected, strict=True):
        assert np.float32(row["score"]) == np.float32(other["score"])
        assert np.float32(row["threshold"]) == np.float32(other["threshold"])
        assert row["class"] == other["class"] and row["anomalous"] == other["anomalous"]


def test_the_program_in_cpp_names_what_it_cannot_score(tmp_path: Path, program: Path) -> None:
    model = mean_model(tmp_path / "model.onnx", (20, 30), rule="native", img_size="native")
    drawn = {
        "good.pgm": (pgm(COLOUR[..., 0], 255), ""),
        "small.pgm": (pgm(COLOUR[:10, :, 0], 255), "it is 10x30 (height x width), and the model takes 20x30"),
        "cut.pgm": (pgm(COLOUR[..., 0], 255)[:-1], "truncated"),
        "above.pgm": (pgm(COLOUR[..., 0], 9), "a value above its largest, 9"),
        "text.pgm": (b"no image", "no PPM or PGM"),
        "header.pgm": (b"P5 30 x", "its header lacks a number"),
    }
    for name, (data, _) in drawn.items():
        (tmp_path / name).write_bytes(data)
    code, text, said = said_by(program, model, *(tmp_path / name for name in drawn))
    assert code == 1 and len(text.splitlines()) == 2
    *errors, total = said.splitlines()
    assert total == "5 of 6 images could not be scored"
    for error, (name, (_, reason)) in zip(errors, list(drawn.items())[1:], strict=True):
        assert error.startswith(f"{tmp_path / name}: ") and reason in error


def test_the_program_in_cpp_writes_any_name_of_a_class(tmp_path: Path, program: Path) -> None:
    model = mean_model(tmp_path / "model.onnx", names=NAMES)
    files = [tmp_path / "dark.pgm", tmp_path / "bright.pgm"]
    for file, level in zip(files, (40, 200), strict=True):
        file.write_bytes(pgm(np.full((20, 20), level, np.uint8), 255))
    code, text, said = said_by(program, model, *files)
    assert code == 0, said
    assert [row["class"] for row in csv.DictReader(io.StringIO(text, newline=""))] == NAMES


def test_a_score_that_is_no_number_is_an_error_in_cpp(tmp_path: Path, program: Path) -> None:
    model = mean_model(tmp_path / "model.onnx", divisor=0)
    files = [tmp_path / "infinite.pgm", tmp_path / "nan.pgm"]
    for file, level in zip(files, (1, 0), strict=True):
        file.write_bytes(pgm(np.full((20, 20), level, np.uint8), 255))
    code, text, said = said_by(program, model, *files)
    assert code == 1 and len(text.splitlines()) == 1
    assert said.splitlines() == [*(f"{file}: {OVERFLOW}" for file in files), "2 of 2 images could not be scored"]


@pytest.mark.parametrize("kind", UNUSABLE)
def test_a_model_that_the_program_in_cpp_cannot_use_is_refused_once(tmp_path: Path, program: Path, kind: str) -> None:
    model = mean_model(tmp_path / "model.onnx", **UNUSABLE[kind])
    reason = FOREIGN if kind in ("version", "other") else REMEDY
    assert said_by(program, model, "a.pgm", "b.pgm") == (1, "", f"{model}: {reason}\n")
