"""data.py: datasets in miniature, laid out as the published ones are, and what is said of broken ones."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hgad_fast.data.datasets import (
    Dataset,
    DatasetError,
    Sample,
    check_images,
    content_hash,
    dataset_folders,
    discover,
    fingerprint,
    is_dataset,
    notes_on,
    union,
)
from hgad_fast.data.masks import read_mask
from hgad_fast.data.survey import survey

NOISE = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)


def draw(path: Path, pixels: np.ndarray = NOISE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def write(path: Path, content: bytes | str = b"") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


# published layouts: every file of a dataset, and every sample that is to be found in it as
# split, class, defect, image and mask

REALIAD = {
    "meta": {"prefix": "usb/", "normal_class": "OK", "pre_transform": None},
    "train": [{"category": "usb", "anomaly_class": "OK", "image_path": "OK/S1/usb_1.jpg", "mask_path": None}],
    "test": [
        {"category": "usb", "anomaly_class": "OK", "image_path": "OK/S2/usb_2.jpg", "mask_path": None},
        {
            "category": "usb",
            "anomaly_class": "HS",
            "image_path": "NG/HS/S3/usb_3.jpg",
            "mask_path": "NG/HS/S3/usb_3.png",
        },
    ],
}
REALIAD_FILES = """realiad_1024/usb/OK/S1/usb_1.jpg realiad_1024/usb/OK/S2/usb_2.jpg realiad_1024/usb/NG/HS/S3/usb_3.jpg
    realiad_1024/usb/NG/HS/S3/usb_3.png"""
REALIAD_SAMPLES = """
    train usb good realiad_1024/usb/OK/S1/usb_1.jpg -
    test usb HS realiad_1024/usb/NG/HS/S3/usb_3.jpg realiad_1024/usb/NG/HS/S3/usb_3.png
    test usb good realiad_1024/usb/OK/S2/usb_2.jpg -"""
VISA = """object,split,label,image,mask
pcb1,train,normal,pcb1/Data/Images/Normal/0000.JPG,
pcb1,test,normal,pcb1/Data/Images/Normal/0001.JPG,
pcb1,test,anomaly,pcb1/Data/Images/Anomaly/000.JPG,pcb1/Data/Masks/Anomaly/000.png
"""
PUBLISHED = {
    "MVTec AD": (
        """bolt/train/good/0.png bolt/train/good/1.png bolt/test/good/0.png bolt/test/bent/0.png
        bolt/ground_truth/bent/0_mask.png wood/train/good/0.png wood/test/hole/0.png
        wood/ground_truth/hole/0_mask.png""",
        {"license.txt": "", "readme.txt": ""},
        """train bolt good bolt/train/good/0.png -
        train bolt good bolt/train/good/1.png -
        train wood good wood/train/good/0.png -
        test bolt bent bolt/test/bent/0.png bolt/ground_truth/bent/0_mask.png
        test bolt good bolt/test/good/0.png -
        test wood hole wood/test/hole/0.png wood/ground_truth/hole/0_mask.png""",
    ),
    "MVTec LOCO": (
        """box/train/good/000.png box/validation/good/000.png box/test/good/000.png box/test/logical/000.png
        box/test/logical/001.png box/ground_truth/logical/000/000.png box/ground_truth/logical/000/001.png
        box/ground_truth/logical/001/000.png""",
        {"box/defects_config.json": "[]"},
        """train box good box/train/good/000.png -
        validation box good box/validation/good/000.png -
        test box good box/test/good/000.png -
        test box logical box/test/logical/000.png box/ground_truth/logical/000
        test box logical box/test/logical/001.png box/ground_truth/logical/001""",
    ),
    "MVTec AD 2": (
        """can/train/good/000_regular.png can/validation/good/001_regular.png can/test_public/good/002_regular.png
        can/test_public/bad/003_shift_1.png can/test_public/ground_truth/bad/003_shift_1_mask.png
        can/test_private/004_regular.png can/test_private_mixed/005_mixed.png""",
        {},
        """train can good can/train/good/000_regular.png -
        validation can good can/validation/good/001_regular.png -
        test can bad can/test_public/bad/003_shift_1.png can/test_public/ground_truth/bad/003_shift_1_mask.png
        test can good can/test_public/good/002_regular.png -""",
    ),
    "BTAD": (
        """01/train/ok/0000.bmp 01/test/ok/0001.bmp 01/test/ko/0000.bmp 01/ground_truth/ko/0000.png 02/train/ok/0.png
        02/test/ko/1.png 02/ground_truth/ko/1.png 03/train/ok/0.bmp 03/test/ko/0.bmp 03/ground_truth/ko/0.bmp""",
        {},
        """train 01 good 01/train/ok/0000.bmp -
        train 02 good 02/train/ok/0.png -
        train 03 good 03/train/ok/0.bmp -
        test 01 ko 01/test/ko/0000.bmp 01/ground_truth/ko/0000.png
        test 01 good 01/test/ok/0001.bmp -
        test 02 ko 02/test/ko/1.png 02/ground_truth/ko/1.png
        test 03 ko 03/test/ko/0.bmp 03/ground_truth/ko/0.bmp""",
    ),
    "MVTec 3D-AD": (
        """tire/train/good/rgb/000.png tire/train/good/xyz/000.tiff tire/validation/good/rgb/000.png
        tire/validation/good/xyz/000.tiff tire/test/good/rgb/000.png tire/test/good/gt/000.png
        tire/test/good/xyz/000.tiff tire/test/cut/rgb/000.png tire/test/cut/gt/000.png tire/test/cut/xyz/000.tiff""",
        {"tire/calibration/camera_parameters.json": "{}"},
        """train tire good tire/train/good/rgb/000.png -
        validation tire good tire/validation/good/rgb/000.png -
        test tire cut tire/test/cut/rgb/000.png tire/test/cut/gt/000.png
        test tire good tire/test/good/rgb/000.png -""",
    ),
    "VisA": (
        """pcb1/Data/Images/Normal/0000.JPG pcb1/Data/Images/Normal/0001.JPG pcb1/Data/Images/Anomaly/000.JPG
        pcb1/Data/Masks/Anomaly/000.png""",
        {"split_csv/1cls.csv": VISA, "split_csv/2cls_highshot.csv": "", "pcb1/image_anno.csv": ""},
        """train pcb1 good pcb1/Data/Images/Normal/0000.JPG -
        test pcb1 anomaly pcb1/Data/Images/Anomaly/000.JPG pcb1/Data/Masks/Anomaly/000.png
        test pcb1 good pcb1/Data/Images/Normal/0001.JPG -""",
    ),
    "VisA for one class": (
        """1cls/pcb1/train/good/0000.JPG 1cls/pcb1/test/good/0001.JPG 1cls/pcb1/test/bad/000.JPG
        1cls/pcb1/ground_truth/bad/000.png 2cls_fewshot/pcb1/train/good/0000.JPG""",
        {},
        """train pcb1 good 1cls/pcb1/train/good/0000.JPG -
        test pcb1 bad 1cls/pcb1/test/bad/000.JPG 1cls/pcb1/ground_truth/bad/000.png
        test pcb1 good 1cls/pcb1/test/good/0001.JPG -""",
    ),
    "Real-IAD": (REALIAD_FILES, {"realiad_jsons/usb.json": json.dumps(REALIAD)}, REALIAD_SAMPLES),
    "MPDD": (
        """tubes/train/good/0.png tubes/test/good/0.png tubes/test/anomalous/0.png
        tubes/ground_truth/anomalous/0_mask.png""",
        {},
        """train tubes good tubes/train/good/0.png -
        test tubes anomalous tubes/test/anomalous/0.png tubes/ground_truth/anomalous/0_mask.png
        test tubes good tubes/test/good/0.png -""",
    ),
}
SAME_FOLDERS = {"MPDD": "MVTec AD", "MVTec LOCO": "MVTec AD", "VisA for one class": "MVTec AD"}


def build(root: Path, name: str) -> Path:
    """Make the dataset in miniature: 12 x 8 pixels each, images of distinct content, masks with a spot of ones."""
    files, texts, _ = PUBLISHED[name]
    for i, file in enumerate(files.split()):
        is_mask = any(part in file for part in ("ground_truth", "/Masks/", "/gt/", "usb_3.png"))
        pixels = np.zeros((8, 12), np.uint8) if is_mask else np.full((8, 12, 3), 20 * i, np.uint8)
        pixels[2:4, 3:5] = 1
        draw(root / file, pixels)
    for file, text in texts.items():
        write(root / file, text)
    return root


def described(dataset: Dataset) -> list[str]:
    root = dataset.root
    return [
        f"{split} {dataset.class_names[sample.class_id]} {sample.defect} {sample.path.relative_to(root).as_posix()} "
        f"{sample.mask.relative_to(root).as_posix() if sample.mask else '-'}"
        for split in ("train", "validation", "test")
        for sample in getattr(dataset, split)
    ]


def lines(text: str) -> list[str]:
    return [line.strip() for line in text.strip().splitlines()]


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_layout(tmp_path: Path, name: str) -> None:
    actual = discover(build(tmp_path, name))
    prefix = "1cls/" if name == "VisA for one class" else ""
    assert actual.layout == SAME_FOLDERS.get(name, name)
    assert actual.root == tmp_path / prefix
    assert described(actual) == [line.replace(prefix, "") for line in lines(PUBLISHED[name][2])]
    assert actual.stray_masks == ()
    assert check_images(actual.train + actual.validation + actual.test)[1] == ()


@pytest.mark.parametrize("name", ["MVTec AD", "MVTec AD 2", "BTAD", "MVTec 3D-AD"])
def test_one_class_of_a_published_layout(tmp_path: Path, name: str) -> None:
    whole = discover(build(tmp_path, name))
    first = discover(tmp_path / whole.class_names[0])
    assert first.class_names == whole.class_names[:1] and first.layout == name
    for split in ("train", "validation", "test"):
        assert getattr(first, split) == tuple(s for s in getattr(whole, split) if s.class_id == 0)


def test_a_folder_of_masks_is_a_mask(tmp_path: Path) -> None:
    actual = discover(build(tmp_path, "MVTec LOCO"))
    first = actual.test[1].mask
    assert first is not None
    corner = np.zeros((8, 12), np.uint8)
    corner[0, 0] = 200
    before = content_hash(first)
    draw(first / "001.png", corner)
    assert content_hash(first) != before
    expected = corner > 0
    expected[2:4, 3:5] = True
    np.testing.assert_array_equal(read_mask(first).numpy(), expected)
    assert [finding.kind for finding in survey(actual).errors] == []
    draw(first / "001.png", corner[1:])
    assert [error.reason for error in check_images(actual.test, skip_bad=True)[1]] == [
        "its masks differ in size; they belong to one image, and have its size"
    ]
    write(tmp_path / "box/ground_truth/logical/007/000.png")
    assert discover(tmp_path).stray_masks == (tmp_path / "box/ground_truth/logical/007/000.png",)


def test_classes_of_several_layouts_side_by_side(tmp_path: Path) -> None:
    build(tmp_path, "BTAD")
    build(tmp_path, "MVTec 3D-AD")
    actual = discover(tmp_path)
    assert actual.class_names == ("01", "02", "03", "tire") and actual.layout == "BTAD + MVTec 3D-AD"
    assert described(actual)[4:6] == lines(PUBLISHED["MVTec 3D-AD"][2])[1:2] + lines(PUBLISHED["BTAD"][2])[3:4]


def test_real_iad_in_its_sizes_and_lists(tmp_path: Path) -> None:
    build(tmp_path, "Real-IAD")
    (tmp_path / "realiad_jsons/usb.json").unlink()
    write(tmp_path / "realiad_jsons/realiad_jsons/usb.json", json.dumps(REALIAD))
    single_view = {**REALIAD, "test": REALIAD["test"][1:]}
    write(tmp_path / "realiad_jsons/realiad_jsons_sv/usb.json", json.dumps(single_view))
    shutil.copytree(tmp_path / "realiad_1024", tmp_path / "realiad_256")
    samples = lines(REALIAD_SAMPLES)
    assert described(discover(tmp_path)) == samples
    assert described(discover(tmp_path / "realiad_jsons")) == samples
    assert described(discover(tmp_path / "realiad_256")) == [line.replace("_1024", "_256") for line in samples]
    assert described(discover(tmp_path / "realiad_jsons/realiad_jsons_sv")) == samples[:2]
    (tmp_path / "realiad_1024").rename(tmp_path / "realiad_raw")
    assert described(discover(tmp_path)) == [line.replace("_1024", "_raw") for line in samples]


def test_real_iad_with_the_class_in_its_prefix(tmp_path: Path) -> None:
    build(tmp_path, "Real-IAD")
    listed = {**REALIAD, "meta": {"prefix": "realiad_1024/usb/"}}
    write(tmp_path / "realiad_jsons/stick.json", json.dumps(listed))
    (tmp_path / "realiad_jsons/usb.json").unlink()
    actual = discover(tmp_path)
    assert described(actual) == [line.replace(" usb ", " stick ") for line in lines(REALIAD_SAMPLES)]


# a dataset of one's own: MVTec AD's layout, a CSV file, or normal images only


def test_mvtec_layout_of_ones_own(tmp_path: Path) -> None:
    for name in (
        "b.png",
        "B.PNG",
        "a.JPeG",
        "lot 2/c.tif",
        ".hidden.png",
        "Thumbs.db",
        ".trash/d.png",
        "notes.txt",
    ):
        write(tmp_path / "zahnrad" / "train" / "good" / name)
    for name in ("train/good/0.bmp", "train/bad/0.png", "test/good/1.webp", "test/scratch/2.v1.png"):
        write(tmp_path / "Öse" / name)
    for name in (
        "test/hole/1.png",
        "test/hole/2.jpg",
        "test/hole/3.png",
        "test/hole/lot/1.png",
        "test/good/1.png",
    ):
        write(tmp_path / "zahnrad" / name)
    for name in ("hole/1_mask.png", "hole/2.BMP", "hole/lot/1.png", "good/1.png"):
        write(tmp_path / "zahnrad" / "ground_truth" / name)
    for name in ("scratch/2.v1.png", "scratch/2.v1_mask.tiff"):
        write(tmp_path / "Öse" / "ground_truth" / name)
    for name in (".cache/train/good/0.png", "ground_truth/0.png", "docs/licence.txt", "overview.png"):
        write(tmp_path / name)

    actual = discover(tmp_path)

    gear, eye = tmp_path / "zahnrad", tmp_path / "Öse"
    assert actual.root == tmp_path
    assert actual.class_names == ("zahnrad", "Öse")
    normals = gear / "train" / "good"
    assert actual.train == (
        *(Sample(normals / name, 0) for name in ("B.PNG", "a.JPeG", "b.png", "lot 2/c.tif")),
        Sample(eye / "train" / "good" / "0.bmp", 1),
    )
    assert actual.test == (
        Sample(gear / "test/good/1.png", 0),
        Sample(gear / "test/hole/1.png", 0, "hole", gear / "ground_truth/hole/1_mask.png"),
        Sample(gear / "test/hole/2.jpg", 0, "hole", gear / "ground_truth/hole/2.BMP"),
        Sample(gear / "test/hole/3.png", 0, "hole", None),
        Sample(gear / "test/hole/lot/1.png", 0, "hole", gear / "ground_truth/hole/lot/1.png"),
        Sample(eye / "test/good/1.webp", 1),
        Sample(eye / "test/scratch/2.v1.png", 1, "scratch", eye / "ground_truth/scratch/2.v1_mask.tiff"),
    )
    assert [sample.is_anomalous for sample in actual.test] == [False, True, True, True, True, False, True]


@pytest.mark.parametrize("root", [".", "../bolt", "{tmp}/bolt"])
def test_one_class_as_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, root: str) -> None:
    write(tmp_path / "bolt" / "train" / "good" / "1.png")
    write(tmp_path / "bolt" / "test" / "bent" / "2.png")
    monkeypatch.chdir(tmp_path / "bolt")
    actual = discover(root.format(tmp=tmp_path))
    assert actual.class_names == ("bolt",)
    assert [(s.path.resolve(), s.class_id, s.defect) for s in actual.train + actual.test] == [
        (tmp_path / "bolt/train/good/1.png", 0, "good"),
        (tmp_path / "bolt/test/bent/2.png", 0, "bent"),
    ]


def test_folder_of_class_folders(tmp_path: Path) -> None:
    for name in ("nut/2.png", "nut/1.jpg", "bolt/1.ppm", ".git/1.png", "ground_truth/1.png", "readme.txt"):
        write(tmp_path / name)
    actual = discover(str(tmp_path))
    assert actual.class_names == ("bolt", "nut")
    assert actual.train == (
        Sample(tmp_path / "bolt/1.ppm", 0),
        Sample(tmp_path / "nut/1.jpg", 1),
        Sample(tmp_path / "nut/2.png", 1),
    )
    assert actual.test == ()


@pytest.mark.parametrize("separator", [",", ";"])
def test_csv(tmp_path: Path, separator: str) -> None:
    rows = """path,class,split,label,mask,camera
        b.png,nut,train,good,,1
        lot/a.png,nut,train,OK,,1
        c.png,bolt,train,normal,,1
        d.png,bolt,validation,0,,1
        e.png,nut,test,scratch,masks/e.png,1
        f.png,nut,test,1,,2
        {elsewhere},bolt,test,good,,2"""
    for name in ("b.png", "lot/a.png", "c.png", "d.png", "e.png", "f.png", "masks/e.png"):
        write(tmp_path / "set" / name)
    elsewhere = write(tmp_path / "other/é.png")
    text = "\n".join(lines(rows.format(elsewhere=elsewhere))).replace(",", separator)
    actual = discover(write(tmp_path / "set/list.csv", "\ufeff" + text))  # as spreadsheets write UTF-8
    root = tmp_path / "set"
    assert actual.layout == "CSV" and actual.root == root and actual.class_names == ("bolt", "nut")
    assert actual.train == (Sample(root / "c.png", 0), Sample(root / "b.png", 1), Sample(root / "lot/a.png", 1))
    assert actual.validation == (Sample(root / "d.png", 0),)
    assert actual.test == (
        Sample(elsewhere, 0),
        Sample(root / "e.png", 1, "scratch", root / "masks/e.png"),
        Sample(root / "f.png", 1, "1"),
    )
    assert fingerprint(actual.train, root) == fingerprint(discover(root / "list.csv").train, root)
    assert len(fingerprint(actual.test, root)) == 64  # of files beyond the root, too


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no column path, class, split, label; the first line must name path,class,split,label"),
        ("path,class,split\na.png,nut,train\n", "no column label"),
        ("path,class,split,label\n", "names no images"),
        ("path,class,split,label\na.png,nut,training,good\n", "csv:2: the split is 'training'; allowed are train, val"),
        ("path,class,split,label\na.png,nut,train,\n", "csv:2: label is empty; say what .*a.png is"),
        ("path,class,split,label\na.png,,train,good\n", "csv:2: class is empty"),
        ("path,class,split,label\na.png,nut,train,good\n\na.png,nut,train,hole\n", "csv:4: .*a.png is labelled 'hole'"),
        ("path,class,split,label\na.png,nut,test,good\n", "no training images of nut"),
        ("path,class,split,label\na.png,nut,train,good\nb.png,nut,test,good\n", "1 of the 2 files .* not exist.*b.png"),
        ("path,class,split,label,mask\na.png,nut,train,good,\na.png,nut,test,hole,m.png\n", "1 of the 3 files.*m.png"),
        ("path,class,split,label\na.png,n\xfct,train,good\n".encode("latin-1"), "no CSV file in UTF-8"),
    ],
)
def test_csv_that_cannot_be_used(tmp_path: Path, text: str | bytes, message: str) -> None:
    write(tmp_path / "a.png")
    with pytest.raises(DatasetError, match=message) as error:
        discover(write(tmp_path / "list.csv", text))
    assert str(error.value).startswith(str(tmp_path / "list.csv"))


# what is wrong is named


@pytest.mark.parametrize(
    ("files", "place", "remedy"),
    [
        ([], "", r"no class folders; put the normal images into .*<class>"),
        (["1.png"], "", r"no class folders"),
        (["nut/train/good/1.raw"], "nut/train/good", "no training images; put normal ones here .*png.*over: 1 .raw"),
        (["nut/train/1.png"], "nut/train/good", "no training images"),
        (["test/hole/1.png", "ground_truth/hole/1.png"], "train/good", "no training images"),
        (["bolt/1.png", "nut/1.raw"], "nut", "no training images"),
        (["bolt/train/good/1.png", "nut/1.png"], "nut", "no train/good; add it"),
        (["nut/ok/1.png", "nut/bad/1.png"], "nut/bad", "whether these images are normal; .*nut/train/good"),
        (["good/1.png", "bad/1.png"], "good", "no class; move it to .*train/good"),
        (
            ["nut/train/good/1.png", "nut/test/1.png"],
            "nut/test/1.png",
            "move it to .*test/good or .*test/<defect>",
        ),
        (
            ["nut/train/good/1.png", "nut/test/OK/1.png"],
            "nut/test/OK",
            "is this a defect?.* belong into .*nut/test/good",
        ),
        (["nut/train/ok/1.png", "nut/test/ko.png"], "nut/test/ko.png", "move it to .*test/ok or .*test/<defect>"),
        (
            ["train/good/1.png", "test/hole/1.png", "ground_truth/hole/one/000.png"],
            "ground_truth/hole",
            "no mask fits an image of .*test/hole; that of 1.png is 1_mask.png",
        ),
    ],
)
def test_what_is_missing_is_named(tmp_path: Path, files: list[str], place: str, remedy: str) -> None:
    for name in files:
        write(tmp_path / name)
    with pytest.raises(DatasetError, match=remedy) as error:
        discover(tmp_path)
    assert str(error.value).startswith(f"{tmp_path / place}: ")


def test_root_that_is_no_folder(tmp_path: Path) -> None:
    for root, kind in (
        (tmp_path / "absent", "no such folder"),
        (write(tmp_path / "data.zip"), "a file, and no dataset"),
        (write(tmp_path / "a.PNG"), "an image, and no dataset"),
        (tmp_path / "list.csv", "no such CSV file"),
    ):
        with pytest.raises(DatasetError, match=f": {kind}; give the folder that holds .*, or a CSV file") as error:
            discover(root)
        assert str(error.value).startswith(str(root))


@pytest.mark.parametrize("name", ["OK", "ok", "Good", "normal", "Normals"])
def test_the_folder_of_normal_images_may_have_other_names(tmp_path: Path, name: str) -> None:
    build(tmp_path, "MVTec AD")
    expected = discover(tmp_path)
    for split in ("train", "test"):
        (tmp_path / "bolt" / split / "good").rename(tmp_path / "bolt" / split / name)
    actual = discover(tmp_path)
    assert [len(split) for split in (actual.train, actual.test)] == [len(expected.train), len(expected.test)]
    assert sorted(sample.defect for sample in actual.test) == ["bent", "good", "hole"]
    assert actual.train[0] == Sample(tmp_path / "bolt/train" / name / "0.png", 0)


def test_two_folders_of_normal_images_are_one_too_many(tmp_path: Path) -> None:
    write(tmp_path / "bolt/train/OK/1.png")
    write(tmp_path / "bolt/train/normal/1.png")
    with pytest.raises(DatasetError, match=r"bolt/train: OK and normal; put all normal images into good"):
        discover(tmp_path)


@pytest.mark.parametrize("name", ["bolt/train/1.png", "bolt/train/fine/1.png"])
def test_images_elsewhere_in_train_are_mentioned(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name)
    with pytest.raises(DatasetError, match="no training images; put normal ones here") as error:
        discover(tmp_path)
    assert str(error.value).endswith(f"1 images lie in {path.parent}: move those that are normal")
    write(tmp_path / "bolt/train/good/1.png")
    dataset = discover(tmp_path)
    assert dataset.unused == (path,)
    assert [note.startswith(f"not used: 1 images in {path.parent}, beside") for note in notes_on(dataset)] == [True]


def test_masks_of_normal_images_and_files_that_are_none_are_kept_in_mind(tmp_path: Path) -> None:
    build(tmp_path / "a", "MVTec AD")
    mask = write(tmp_path / "a/bolt/ground_truth/good/0_mask.png")
    write(tmp_path / "a/bolt/train/good/2.heic")
    dataset = discover(tmp_path / "a")
    assert dataset.normal_masks == (mask,) and dataset.passed_over == {".heic": 1}
    listed = write(tmp_path / "list.csv", "path,class,split,label,mask\nm.png,c,train,good,\nm.png,c,test,ok,m.png\n")
    write(tmp_path / "m.png")
    assert discover(listed).normal_masks == (tmp_path / "m.png",)
    both = discover([tmp_path / "a", listed])
    assert both.normal_masks == (mask, tmp_path / "m.png") and both.passed_over == {".heic": 1}


def test_a_csv_may_have_the_backslashes_of_windows(tmp_path: Path) -> None:
    image = write(tmp_path / "lot 1/a.png")
    mask = write(tmp_path / "masks/a.png")
    rows = "path,class,split,label,mask\nlot 1\\a.png,c,train,good,\nlot 1\\a.png,c,test,hole,masks\\a.png\n"
    actual = discover(write(tmp_path / "list.csv", rows))
    assert actual.train == (Sample(image, 0),) and actual.test == (Sample(image, 0, "hole", mask),)
    with pytest.raises(
        DatasetError, match=r"b.png \(backslashes are a part of names here; neither is there a file with /"
    ):
        discover(write(tmp_path / "list.csv", "path,class,split,label\nlot\\b.png,c,train,good\n"))


def test_names_that_no_terminal_shows_are_escaped_in_errors(tmp_path: Path) -> None:
    with pytest.raises(DatasetError) as error:
        discover(tmp_path / "n\udcf6\nne")
    assert str(error.value).startswith(f"{tmp_path}/n\\xf6\\nne: no such folder")


@pytest.mark.parametrize(
    ("name", "removed", "place", "message"),
    [
        ("MVTec AD 2", "can/train/good", "can/train/good", "no training images"),
        ("MVTec AD 2", "can/validation/good", "can/validation/good", "no validation images"),
        ("BTAD", "02/train/ok/0.png", "02/train/ok", "no training images"),
        ("MVTec 3D-AD", "tire/train/good/rgb", "tire/train/good/rgb", "no training images"),
        ("MVTec 3D-AD", "tire/test/cut/rgb", "tire/test/cut/rgb", "no such folder; put the images of 'cut' here"),
        ("VisA", "split_csv", "split_csv/1cls.csv", "no such file; it comes with VisA"),
        ("VisA", "pcb1/Data/Masks", "split_csv/1cls.csv", "1 of the 4 files .* not exist.*Masks/Anomaly/000.png"),
        ("Real-IAD", "realiad_1024", "realiad_1024", "no such folder; put Real-IAD's images here"),
        ("Real-IAD", "realiad_1024/usb/OK/S2", "realiad_jsons", "1 of the 4 files .* not exist.*OK/S2/usb_2.jpg"),
    ],
)
def test_what_a_published_layout_lacks_is_named(
    tmp_path: Path, name: str, removed: str, place: str, message: str
) -> None:
    root = build(tmp_path, name)
    shutil.rmtree(root / removed) if (root / removed).is_dir() else (root / removed).unlink()
    with pytest.raises(DatasetError, match=message) as error:
        discover(root)
    assert str(error.value).startswith(f"{root / place}: ")


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"train": [{"image_path": "a.png"}], "test": []}', '{"train": []}']
)
def test_real_iad_list_that_is_none(tmp_path: Path, content: str) -> None:
    build(tmp_path, "Real-IAD")
    path = write(tmp_path / "realiad_jsons/usb.json", content)
    with pytest.raises(DatasetError, match="no list as Real-IAD has them") as error:
        discover(tmp_path)
    assert str(error.value).startswith(f"{path}: ")


def test_masks_that_belong_to_no_image_are_kept_in_mind(tmp_path: Path) -> None:
    build(tmp_path, "MVTec AD")
    stray = [
        write(tmp_path / "bolt/ground_truth/bent/7_mask.png"),
        write(tmp_path / "bolt/ground_truth/cracked/0_mask.png"),
    ]
    actual = discover(tmp_path)
    assert actual.stray_masks == tuple(stray)
    assert union([actual, discover(build(tmp_path / "btad", "BTAD"))]).stray_masks == tuple(stray)
    build(tmp_path / "visa", "VisA")
    stray = write(tmp_path / "visa/pcb1/Data/Masks/Anomaly/001.png")
    assert discover(tmp_path / "visa").stray_masks == (stray,)


# several datasets as one


def test_union_of_roots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    roots = [build(tmp_path / "a", "MVTec AD"), build(tmp_path / "b/x", "MVTec AD 2"), build(tmp_path / "b/y", "MPDD")]
    parts = [discover(root) for root in roots]
    actual = discover(roots)
    assert actual.root == tmp_path and actual.layout == "MVTec AD + MVTec AD 2"
    assert actual.class_names == ("bolt", "wood", "can", "tubes")
    expected = [
        [line.replace(str(root), "") for line in described(replace(part, root=tmp_path))]
        for root, part in zip(roots, parts, strict=True)
    ]
    assert sorted(described(actual)) == sorted(line for part in expected for line in part)
    assert discover(parts) == discover("+".join(map(str, roots))) == discover(Path("+".join(map(str, roots)))) == actual
    monkeypatch.chdir(tmp_path)
    assert discover("a+b/x+b/y") == actual
    assert discover(["a"]) == discover("a")


def test_names_that_collide_in_a_union_get_the_folder(tmp_path: Path) -> None:
    first, second = build(tmp_path / "first", "MVTec AD"), build(tmp_path / "second", "MVTec AD")
    shutil.rmtree(second / "wood")
    actual = discover([first, second])
    assert actual.class_names == ("first-bolt", "wood", "second-bolt")
    assert [actual.class_names[s.class_id] for s in actual.train] == ["first-bolt"] * 2 + ["wood"] + ["second-bolt"] * 2
    with pytest.raises(ValueError, match="two of the datasets have a class 'first-bolt': rename the folder"):
        discover([first, first])
    with pytest.raises(ValueError, match="no datasets"):
        discover([])


def test_a_folder_with_a_plus_in_its_name_is_no_union(tmp_path: Path) -> None:
    build(tmp_path / "c++", "MPDD")
    assert discover(str(tmp_path / "c++")).class_names == ("tubes",)
    with pytest.raises(DatasetError, match="d: no such folder"):
        discover([tmp_path / "c++", tmp_path / "d"])


def test_folders_of_datasets_are_told_from_classes(tmp_path: Path) -> None:
    build(tmp_path / "mvtec", "MVTec AD")
    with pytest.raises(DatasetError, match=r"no classes, but folders of classes; give .*mvtec$"):
        discover(tmp_path)
    build(tmp_path / "visa", "VisA")
    with pytest.raises(DatasetError, match=r"give .*mvtec, or all of them: .*mvtec\+.*visa$"):
        discover(tmp_path)


# checking and fingerprints


@pytest.fixture
def samples(tmp_path: Path) -> tuple[Sample, ...]:
    for name in ("bolt/1.png", "bolt/2.png", "nut/1.png", "nut/2.png"):
        draw(tmp_path / name, NOISE)
    return discover(tmp_path).train


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-400])


def test_all_bad_images_are_listed_at_once(samples: tuple[Sample, ...]) -> None:
    assert check_images(samples) == (samples, ())
    truncate(samples[1].path)
    samples[2].path.write_bytes(b"")
    with pytest.raises(DatasetError, match="2 of 4 images cannot be used; .*--skip-bad") as error:
        check_images(samples)
    _, first, second = str(error.value).splitlines()
    assert first.startswith(f"  {samples[1].path}: ") and "truncated" in first
    assert second == f"  {samples[2].path}: the file is empty"


def test_bad_images_are_skipped_on_demand(samples: tuple[Sample, ...]) -> None:
    truncate(samples[1].path)
    samples[2].path.write_bytes(b"")
    sound, errors = check_images(samples, skip_bad=True)
    assert sound == (samples[0], samples[3])
    assert [error.path for error in errors] == [samples[1].path, samples[2].path]


def test_a_class_that_loses_all_images_is_never_skipped(samples: tuple[Sample, ...]) -> None:
    truncate(samples[2].path)
    truncate(samples[3].path)
    with pytest.raises(DatasetError, match="class 1 has no image that can be used") as error:
        check_images(samples, skip_bad=True)
    assert str(samples[2].path) in str(error.value) and str(samples[3].path) in str(error.value)


def test_masks_are_checked_too(tmp_path: Path) -> None:
    image = draw(tmp_path / "test/1.png", NOISE)
    fits = Sample(image, 0, "hole", draw(tmp_path / "gt/1.png", NOISE[..., 0]))
    differs = Sample(image, 0, "hole", draw(tmp_path / "gt/2.png", NOISE[:20, :, 0]))
    broken = Sample(image, 0, "hole", write(tmp_path / "gt/3.png"))
    sound, errors = check_images([fits, differs, broken], skip_bad=True)
    assert sound == (fits,)
    assert [error.path for error in errors] == [differs.mask, broken.mask]
    assert errors[0].reason.startswith("the mask has (height, width) (20, 60), its image (40, 60)")


def test_fingerprint_hashes_class_path_and_content(tmp_path: Path) -> None:
    samples = [
        Sample(write(tmp_path / "nut/1.png", b"one"), 3),
        Sample(write(tmp_path / "nut/2.png", b""), 0),
    ]
    contents = [hashlib.sha256(content).hexdigest() for content in (b"one", b"")]
    expected = hashlib.sha256(f"3 nut/1.png\0{contents[0]}0 nut/2.png\0{contents[1]}".encode()).hexdigest()
    assert fingerprint(samples, tmp_path) == fingerprint(samples, tmp_path, contents) == expected


def test_fingerprint_is_of_the_data_and_not_of_the_place(samples: tuple[Sample, ...], tmp_path: Path) -> None:
    before = fingerprint(samples, tmp_path)
    copy = tmp_path / "elsewhere"
    for name in ("bolt", "nut"):
        shutil.copytree(tmp_path / name, copy / name)
    assert fingerprint(discover(copy).train, copy) == before

    seen = {before, fingerprint(samples[::-1], tmp_path), fingerprint(samples[:-1], tmp_path)}
    seen.add(fingerprint([*samples[:-1], Sample(samples[-1].path, 0)], tmp_path))
    (copy / "nut" / "2.png").rename(copy / "nut" / "3.png")
    seen.add(fingerprint(discover(copy).train, copy))
    draw(samples[0].path, NOISE ^ 1)
    seen.add(fingerprint(samples, tmp_path))
    assert len(seen) == 6


def test_the_datasets_in_a_folder_of_images(tmp_path: Path) -> None:
    datasets = ("a/deep/nut", "bolt", "btad", "visa", "candle", "realiad", "pytorch", "named test")
    marks = ("train/good/1.png", "test/x/1.png", "train/ok/1.png", "split_csv/1.png")
    marks += ("Data/Images/Anomaly/1.png", "realiad_jsons/1.png", "1cls/nut/train/good/1.png", "test/1.png")
    for folder, mark in zip(datasets, marks, strict=True):
        write(tmp_path / folder / mark)
    for image in ("1.png", "a/1.png", "a/Data/Images/1.png", "bolt/train/good/er/train/good/1.png", "good/1.png"):
        write(tmp_path / image)
    write(tmp_path / "__MACOSX" / "nut" / "train" / "good" / "1.png")
    (tmp_path / "a" / "link").symlink_to(tmp_path / "bolt")
    assert set(dataset_folders(tmp_path)) == {tmp_path / folder for folder in datasets}
    assert len(dataset_folders(tmp_path)) == len(datasets)
    assert dataset_folders(tmp_path / "bolt") == [tmp_path / "bolt"]
    assert dataset_folders(tmp_path / "a" / "Data") == []


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        ("nut/train/good/1.png", True),
        ("train/good/1.png", True),
        ("mvtec/nut/train/good/1.png", True),  # which `discover` refuses with advice
        ("Data/Images/1.png", False),
        ("split_csv/1.png", True),
        ("nut/1.png", False),
        ("day 1/camera 2/1.png", False),
        ("1.png", False),
    ],
)
def test_a_dataset_is_told_from_a_folder_of_images(tmp_path: Path, image: str, expected: bool) -> None:
    write(tmp_path / image)
    assert is_dataset(tmp_path) is expected
