"""A folder of everything that goes wrong: no traceback, no hang, nothing modified, every problem named once."""

import hashlib
import os
import stat
from pathlib import Path

import hostile
import numpy as np
import pytest

from utils.core.errors import UserError
from utils.data.images import ImageError, image_size, read_image
from utils.data.index import build_index
from utils.data.spec import load_data


def fingerprint(root):
    """Name, kind, size, time and content of everything below a folder (of huge sparse files: not the content)."""
    found = {}
    for folder, _, files in os.walk(os.fsencode(root)):
        for path in [folder, *(os.path.join(folder, name) for name in files)]:
            status = os.lstat(path)
            content = b""
            if stat.S_ISREG(status.st_mode) and status.st_size < 2**24:
                content = hashlib.sha256(Path(os.fsdecode(path)).read_bytes()).digest()
            found[path] = (status.st_mode, status.st_size, status.st_mtime_ns, content)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return hostile.build(tmp_path_factory.mktemp("hostile"))


@pytest.mark.parametrize("workers", [0, 2])
def test_everything_is_named_once_and_the_healthy_is_used(folder, workers, capsys):
    assert folder.kinds >= 60
    before = fingerprint(folder.yaml.parent)
    index = build_index(load_data(folder.yaml), "train", strict=False, verify=True, workers=workers, rebuild=True)
    assert fingerprint(folder.yaml.parent) == before

    named = [(problem.kind, problem.file) for problem in index.report.problems]
    assert sorted(named) == sorted(folder.problems) and len(set(named)) == len(named)
    used = {str(index.file(i)) for i in range(len(index))}
    assert used == folder.used and index.report.boxes == folder.boxes
    assert (index.boxes[:, :2] < index.boxes[:, 2:]).all() and (index.boxes >= 0).all()
    assert (index.boxes <= np.repeat(index.shapes[:, [1, 0, 1, 0]], np.diff(index.offsets), 0)).all()
    for line in index.report.lines(examples=1000):
        assert line.isprintable() and line.encode()
    assert "Traceback" not in capsys.readouterr().out


def test_every_used_image_can_be_read_and_no_other(folder):
    index = build_index(load_data(folder.yaml), "train", strict=False, verify=True, workers=0)
    for i in range(len(index)):
        image = read_image(index.file(i))
        assert image.dtype == np.uint8 and image.shape == (*index.shapes[i], 3) == (*image_size(index.file(i)), 3)
    for problem in index.report.problems:
        if problem.kind in ("image-unreadable", "image-missing"):
            with pytest.raises(ImageError):
                read_image(problem.file)


def test_class_numbers_stop_a_strict_build_in_one_line(folder):
    with pytest.raises(UserError, match=r"class-2\.txt:2 has class 2") as error:
        build_index(load_data(folder.yaml), "train")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"\xff\xfe\0\x01", b"a\0b", b"./images/absent.jpg\n", "pipe", "folder", "gone"])
def test_hostile_list_files(folder, tmp_path, content):
    path = tmp_path / "list.txt"
    if content == "pipe":
        os.mkfifo(path)
    elif content == "folder":
        path.mkdir()
    elif content != "gone":
        path.write_bytes(content)
    (tmp_path / "d.yaml").write_text("train: list.txt\nnames: [a]\n")
    with pytest.raises(UserError) as error:
        build_index(load_data(tmp_path / "d.yaml"), "train")
    assert str(error.value).isprintable()


def test_a_list_with_every_kind_of_line(folder, tmp_path):
    good = str(folder.yaml.parent / "images" / "UPPER.JPG")
    lines = [good, good, f"  {good}  ", "", "absent.jpg", "/", "~", "..", "x" * 5000, "http://example.org/x", "*.jpg"]
    (tmp_path / "list.txt").write_text("\n".join(lines))
    (tmp_path / "d.yaml").write_text(f"train: list.txt\nnames: {list(hostile.NAMES)}\n")
    index = build_index(load_data(tmp_path / "d.yaml"), "train")
    assert len(index) == 1 and index.report.images == 8
    assert index.report.counts == {"image-repeated": 2, "image-missing": 4, "image-unreadable": 3}
