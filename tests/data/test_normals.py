"""Normal images of one class, in the forms that they come in."""

from pathlib import Path

import pytest
from PIL import Image

from hgad_fast.data.datasets import DatasetError
from hgad_fast.data.normals import are_files, normal_images


def write(*files: Path) -> list[Path]:
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(file)
    return list(files)


def test_folders_files_and_lists_of_both(tmp_path):
    files = write(*(tmp_path / "new" / f"{i}.png" for i in range(3)))
    (tmp_path / "new" / "notes.txt").touch()
    assert normal_images(tmp_path / "new") == files
    assert normal_images(str(files[1])) == [files[1]]
    assert normal_images([files[2], str(files[0]), tmp_path / "new"]) == [files[2], files[0], files[1]]
    assert are_files(files) and are_files("new") and not are_files([]) and not are_files([*files, 3])


def test_the_class_of_a_dataset_gives_its_normal_training_images(tmp_path):
    files = write(*(tmp_path / "cup" / "train" / "good" / f"{i}.png" for i in range(2)))
    write(tmp_path / "cup" / "test" / "hole" / "0.png", tmp_path / "cup" / "ground_truth" / "hole" / "0_mask.png")
    assert normal_images(tmp_path / "cup") == normal_images(tmp_path) == files
    write(tmp_path / "bowl" / "train" / "good" / "0.png")
    with pytest.raises(DatasetError, match=r"images of 2 classes \(bowl, cup\); give the folder of one"):
        normal_images(tmp_path)


def test_nothing_says_whether_images_in_folders_beside_are_normal(tmp_path):
    write(tmp_path / "0.png", tmp_path / "defects" / "0.png")
    with pytest.raises(DatasetError, match="defects: nothing says whether these images are normal; put normal ones"):
        normal_images(tmp_path)


def test_what_is_not_there(tmp_path):
    with pytest.raises(DatasetError, match="nowhere: no such file or folder"):
        normal_images(tmp_path / "nowhere")
    with pytest.raises(DatasetError, match="no images; put normal images of the class here"):
        normal_images(tmp_path)
