"""Converters: what goes in comes out, what a format cannot hold is counted, and the source stays as it was."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import convert_data
from utils.core.errors import UserError
from utils.data.index import build_index
from utils.data.listing import label_path
from utils.data.spec import load_data


def index_of(path, split="train"):
    return build_index(load_data(path), split)


def same_labels(a, b, atol=0.01, crowds=True):
    assert len(a) == len(b) and a.names == b.names
    for i in range(len(a)):
        cls, boxes, crowd = a.labels(i)
        keep = np.ones(len(cls), bool) if crowds else ~crowd
        assert np.array_equal(cls[keep], b.labels(i)[0])
        np.testing.assert_allclose(boxes[keep], b.labels(i)[1], atol=atol)


def snapshot(root):
    return sorted((p, p.lstat().st_mtime_ns, p.lstat().st_size) for p in root.rglob("*"))


@pytest.fixture
def source(tmp_path):
    root = tmp_path / "source"
    for part in ("images/train/a", "images/val", "labels/train/a", "labels/val"):
        (root / part).mkdir(parents=True)
    for name, size in (
        ("train/a/x.jpg", (64, 48)),
        ("train/x.png", (30, 40)),
        ("train/x.jpg", (9, 9)),
        ("val/y.jpg", (8, 8)),
    ):
        Image.new("RGB", size).save(root / "images" / name)
    (root / "labels/train/a/x.txt").write_text("1 0.5 0.5 0.25 0.5\n0 0.1 0.1 0.5 0.1 0.5 0.7\n")
    (root / "labels/train/x.txt").write_text("0 0.333333 0.25 0.1 0.2\n")
    (root / "d.yaml").write_text("train: images/train\nval: images/val\nnames: ['öne: two', b]\n")
    return root / "d.yaml"


@pytest.mark.parametrize("images", ["link", "copy"])
def test_yolo_to_coco_and_back(source, tmp_path, images):
    before = snapshot(source.parent)
    there = convert_data.run(data=source, to="coco", output=tmp_path / "coco", images=images)
    back = convert_data.run(
        data=tmp_path / "coco" / "data.yaml", output=tmp_path / "yolo", images=images, polygons=True
    )
    assert snapshot(source.parent) == before
    first, coco, yolo = (index_of(p) for p in (source, tmp_path / "coco/data.yaml", tmp_path / "yolo/data.yaml"))
    same_labels(first, coco)
    same_labels(coco, yolo)
    for i in range(len(first)):
        for p, q in zip(first.polygons(i), yolo.polygons(i), strict=True):
            np.testing.assert_allclose(p, q, atol=0.01)
    assert there["train"].lost == {} and there["train"].images == 3 and there["train"].boxes == 4
    assert back["train"].lost == {"image ids": 3, "category ids": 2} and back["train"].renamed == 1
    assert len(index_of(tmp_path / "yolo/data.yaml", "val")) == 1
    content = json.loads((tmp_path / "coco/annotations/train.json").read_text())
    assert sorted(a["id"] for a in content["annotations"]) == [1, 2, 3, 4]
    assert (tmp_path / "coco/images/train/x.png").is_symlink() == (images == "link")


def test_official_coco_to_yolo(shared_data, tmp_path):
    """The 929 boxes of coco128 survive; crowds, areas and ids are counted as lost."""
    (tmp_path / "d.yaml").write_text(
        f"path: {shared_data}/coco128\ntrain: images/train2017\n"
        "annotations: {train: annotations/instances_train2017.json}\n"
    )
    result = convert_data.run(data=tmp_path / "d.yaml", output=tmp_path / "out")["train"]
    assert result.boxes == 929 and result.lost["crowd regions (or difficult objects)"] == 10
    assert result.lost["polygons (kept with --polygons)"] == 929 and result.lost["image ids"] == 128
    same_labels(index_of(tmp_path / "d.yaml"), index_of(tmp_path / "out/data.yaml"), crowds=False)
    official = index_of(shared_data / "coco128/coco128.yaml")
    assert np.allclose(official.boxes, index_of(tmp_path / "out/data.yaml").boxes, atol=0.01)


def test_voc_to_both(tmp_path):
    for folder in ("JPEGImages", "Annotations"):
        (tmp_path / folder).mkdir()
    Image.new("RGB", (40, 30)).save(tmp_path / "JPEGImages" / "a.jpg")
    item = (
        "<object><name>b</name>{}<bndbox><xmin>1</xmin><ymin>2</ymin><xmax>11</xmax><ymax>12</ymax></bndbox></object>"
    )
    text = f"<annotation>{item.format('')}{item.format('<difficult>1</difficult>')}</annotation>"
    (tmp_path / "Annotations" / "a.xml").write_text(text)
    (tmp_path / "d.yaml").write_text("train: JPEGImages\nannotations: {train: Annotations}\nnames: [a, b]\n")
    yolo = convert_data.run(data=tmp_path / "d.yaml", output=tmp_path / "yolo")["train"]
    assert yolo.boxes == 1 and yolo.lost == {"crowd regions (or difficult objects)": 1}
    convert_data.run(data=tmp_path / "d.yaml", to="coco", output=tmp_path / "coco")
    index = index_of(tmp_path / "coco" / "data.yaml")
    assert index.boxes.tolist() == [[0, 1, 11, 12]] * 2 and index.crowd.tolist() == [False, True]


def test_nothing_is_overwritten_and_nothing_half_made_stays(source, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with pytest.raises(UserError, match="exists already"):
        convert_data.run(data=source, output=tmp_path / "full")
    (source.parent / "labels/train/x.txt").write_text("9 0.5 0.5 0.1 0.1\n")
    with pytest.raises(UserError, match="class 9"):
        convert_data.run(data=source, output=tmp_path / "half")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["full", "source"]
    with pytest.raises(UserError, match="--output"):
        convert_data.run(data=source)


def test_command_line(source, tmp_path, capsys):
    assert convert_data.main(["--data", str(source), "--to", "coco", "--output", str(tmp_path / "o")]) == 0
    assert "lost: nothing" in capsys.readouterr().out


def test_voc_and_back_keeps_every_box_class_and_ignore_region(source, tmp_path):
    """Fractions of pixels, an odd class name, pictures without boxes and ignore regions."""
    image = tmp_path / "coco" / "a.png"
    image.parent.mkdir()
    Image.new("RGB", (40, 30)).save(image)
    boxes = [[0, 0, 40, 30], [1.25, 2.5, 3.125, 0.75], [0.1, 0.2, 0.3, 0.4]]
    rows = [
        {"id": k, "image_id": 7, "category_id": 5, "bbox": box, "area": 1.0, "iscrowd": k % 2, "segmentation": []}
        for k, box in enumerate(boxes)
    ]
    images = [{"id": 7, "file_name": "a.png", "width": 40, "height": 30}]
    content = {"images": images, "annotations": rows, "categories": [{"id": 5, "name": "a<b> & öne"}]}
    (tmp_path / "coco.json").write_text(json.dumps(content))
    (tmp_path / "coco.yaml").write_text("train: coco\nannotations: {train: coco.json}\n")
    for yaml, splits in ((source, ("train", "val")), (tmp_path / "coco.yaml", ("train",))):
        there = tmp_path / f"voc-{yaml.stem}"
        result = convert_data.run(data=yaml, to="voc", output=there)
        for split in splits:
            first, voc = index_of(yaml, split), index_of(there / "data.yaml", split)
            assert (
                voc.names == first.names and set(voc.report.counts) <= {"image-tiny"} and voc.report.without_file == 0
            )
            np.testing.assert_allclose(voc.boxes, first.boxes, atol=1e-5)
            assert voc.cls.tolist() == first.cls.tolist() and voc.crowd.tolist() == first.crowd.tolist()
            assert result[split].boxes == len(first.boxes) and result[split].images == len(first)
    assert result["train"].lost == {"areas of their own": 3, "image ids": 1, "category ids": 1}


def test_names_that_voc_cannot_hold(source, tmp_path):
    for names, said in (("[a, a]", "twice"), ('["a\\tb", c]', "printable"), ("[' a', b]", "spaces")):
        source.write_text(f"train: images/train\nval: images/val\nnames: {names}\n")
        with pytest.raises(UserError, match=said):
            convert_data.run(data=source, to="voc", output=tmp_path / "voc")
    assert not (tmp_path / "voc").exists()


@pytest.mark.parametrize("to", ["yolo", "coco", "voc"])
def test_odd_names_are_found_again(tmp_path, to):
    """Hidden and missing suffixes, folders called images, names that XML cannot hold: no box gets lost."""
    names = [".hidden/a.jpg", "b", "c.dat", ".d.jpg", "images/e.jpg", "images/images/e.png", "f\x01.jpg", "g\\h.jpg"]
    names += [os.fsdecode(b"i\xff.jpg"), "ö/j.jpg", "labels/k.jpg", "b.jpg"]
    for name in names:
        path = tmp_path / "odd" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 10)).save(path, "png" if name.endswith("png") else "jpeg")
        label = Path(label_path(str(path)))
        label.parent.mkdir(parents=True, exist_ok=True)
        label.write_text("0 0.5 0.5 0.5 0.5\n")
    (tmp_path / "list.txt").write_text("".join(f"./odd/{name}\n" for name in names[:4]))
    (tmp_path / "d.yaml").write_text("train: [list.txt, odd]\nnames: [a]\n")
    result = convert_data.run(data=tmp_path / "d.yaml", to=to, output=tmp_path / "made" / to)["train"]
    index = index_of(tmp_path / "made" / to / "data.yaml")
    assert result.images == len(index) == index.report.boxes == len(names) and not index.report.counts
    assert result.renamed == (0 if to == "coco" else 5)


def test_polygons_are_for_yolo_files(source, tmp_path):
    with pytest.raises(UserError, match="--polygons has no meaning with --to voc"):
        convert_data.run(data=source, to="voc", output=tmp_path / "o", polygons=True)


def test_images_without_any_label_are_no_data_set(tmp_path):
    (tmp_path / "train" / "cat").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "train" / "cat" / "a.jpg")
    (tmp_path / "d.yaml").write_text("train: train\nnames: [cat]\n")
    with pytest.raises(UserError, match="none of its 1 images has a labeled object"):
        convert_data.run(data=tmp_path / "d.yaml", to="coco", output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_set_does_not_grow_by_its_own_copy(source):
    with pytest.raises(UserError, match="lies among the images"):
        convert_data.run(data=source, to="coco", output=source.parent / "images" / "train" / "sub" / "copy")
