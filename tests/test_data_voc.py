"""Pascal VOC XML: official corners, difficult objects, list files of names, and broken files."""

import numpy as np
import pytest
from PIL import Image

from utils.core.errors import UserError
from utils.data.index import build_index
from utils.data.spec import load_data
from utils.data.voc import read_voc

NAMES = ("cat", "dog")


def item(name="cat", box=(2, 3, 10, 20), extra=""):
    corners = "".join(f"<{k}>{v}</{k}>" for k, v in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True))
    return f"<object><name>{name}</name>{extra}<bndbox>{corners}</bndbox></object>"


def xml(*items, size=(40, 30)):
    head = f"<size><width>{size[0]}</width><height>{size[1]}</height><depth>3</depth></size>" if size else ""
    return f"<annotation><filename>other.jpg</filename>{head}{''.join(items)}</annotation>"


def devkit(root, files):
    for name, text in files.items():
        for folder in ("JPEGImages", "Annotations"):
            (root / folder).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 30)).save(root / "JPEGImages" / f"{name}.jpg")
        if text is not None:
            (root / "Annotations" / f"{name}.xml").write_text(text)


def test_corners_count_from_one_and_are_inclusive(tmp_path):
    path = tmp_path / "a.xml"
    path.write_text(xml(item(box=(1, 1, 40, 30)), item("dog", (8, 9, 8, 9), "<difficult>1</difficult>")))
    labels, issues, there = read_voc(path, (30, 40), NAMES)
    assert there and not issues and labels.cls.tolist() == [0, 1] and labels.crowd is not None
    assert labels.xyxy.tolist() == [[0, 0, 40, 30], [7, 8, 8, 9]] and labels.crowd.tolist() == [False, True]


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("", "label-unreadable"),
        ("<annotation>", "label-unreadable"),
        ("not xml", "label-unreadable"),
        ('<?xml version="1.0"?><!DOCTYPE x [<!ENTITY a "b">]><annotation>&a;</annotation>', "label-unreadable"),
        ('<?xml version="1.0" encoding="x-none"?><annotation/>', "label-unreadable"),
        (xml(item(), size=(41, 30)), "label-unreadable"),
        (xml(item("mouse")), "voc-class"),
        (xml(item("")), "voc-class"),
        (xml(item(box=(1, 2, "x", 4))), "label-format"),
        (xml(item(box=(1, 2, "nan", 4))), "label-format"),
        (xml("<object><name>cat</name></object>"), "label-format"),
    ],
)
def test_broken_files(tmp_path, text, kind):
    (tmp_path / "a.xml").write_text(text)
    _, issues, _ = read_voc(tmp_path / "a.xml", (30, 40), NAMES)
    assert [issue.kind for issue in issues] == [kind]


@pytest.mark.parametrize("listed", [True, False])
def test_data_set(tmp_path, listed):
    devkit(tmp_path / "VOC", {"a": xml(item(), item("dog")), "b": xml(), "c": None, "d": xml(item("mouse"), item())})
    sets = tmp_path / "VOC" / "ImageSets" / "Main"
    sets.mkdir(parents=True)
    (sets / "train.txt").write_text("a  1\nb -1\nd\n")
    train = "ImageSets/Main/train.txt" if listed else "JPEGImages"
    text = f"path: VOC\ntrain: {train}\nannotations: {{train: Annotations}}\nnames: [cat, dog]\n"
    (tmp_path / "d.yaml").write_text(text)
    spec = load_data(tmp_path / "d.yaml")
    assert spec.format == "voc"
    index = build_index(spec, "train")
    assert [index.file(i).stem for i in range(len(index))] == (["a", "b", "d"] if listed else ["a", "b", "c", "d"])
    np.testing.assert_array_equal(index.labels(0)[1], [[1, 2, 10, 20], [1, 2, 10, 20]])
    assert index.report.boxes == 3 and index.report.counts == {"voc-class": 1}
    assert index.report.without_file == (0 if listed else 1)


def test_number_of_folders_must_fit(tmp_path):
    devkit(tmp_path / "VOC", {"a": xml(item())})
    (tmp_path / "d.yaml").write_text(
        "train: VOC/JPEGImages\nannotations: {train: [VOC/Annotations, VOC/Annotations]}\nnames: [cat]\n"
    )
    with pytest.raises(UserError, match="annotation folders"):
        build_index(load_data(tmp_path / "d.yaml"), "train")
