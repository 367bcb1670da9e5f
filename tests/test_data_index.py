"""The label index: listing, caching, policies, and the same arrays from one process or many."""

import os
import threading
from dataclasses import fields

import numpy as np
import pytest
from PIL import Image

from utils.core.errors import UserError
from utils.core.files import cache_dir
from utils.core.hyp import Hyp
from utils.data.dataset import DetectionDataset
from utils.data.index import LabelIndex, build_index
from utils.data.listing import label_path
from utils.data.spec import load_data


def data_set(root, labels, extra="", names="[a, b]", train="images", size=(40, 20)):
    """Images under root/images, one for each (name, label text or None); returns the data YAML."""
    for name, text in labels.items():
        image, label = root / "images" / name, root / "labels" / name
        image.parent.mkdir(parents=True, exist_ok=True)
        label.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size).save(image)
        if text is not None:
            label.with_suffix(".txt").write_text(text)
    (root / "d.yaml").write_text(f"train: {train}\nnames: {names}\n{extra}")
    return root / "d.yaml"


def index_of(yaml, **options):
    return build_index(load_data(yaml), "train", **options)


def same(a, b):
    arrays = [f.name for f in fields(LabelIndex) if isinstance(getattr(a, f.name), np.ndarray)]
    return all(np.array_equal(getattr(a, name), getattr(b, name)) for name in arrays) and a.names == b.names


BOX = "0 0.5 0.5 0.5 0.5\n"


@pytest.mark.parametrize(
    ("image", "label"),
    [
        ("/d/images/train/a.jpg", "/d/labels/train/a.txt"),
        ("/images/images/a.b.jpg", "/images/labels/a.b.txt"),
        ("/d/images/x/images/y/a.PNG", "/d/images/x/labels/y/a.txt"),
        ("/d/pictures/a.jpg", "/d/pictures/a.txt"),
        ("/d/images2/a.jpg", "/d/images2/a.txt"),
    ],
)
def test_label_of_an_image(image, label):
    assert label_path(image) == label


def test_arrays(tmp_path):
    polygon = "1 0.1 0.1 0.3 0.1 0.3 0.5\n"
    yaml = data_set(tmp_path, {"b.png": BOX + polygon, "a.jpg": "", "sub/c.png": None, "d.png": "1 0.5 0.5 1 1"})
    index = index_of(yaml)
    assert [index.file(i).name for i in range(len(index))] == ["a.jpg", "b.png", "d.png", "c.png"]
    assert index.shapes.tolist() == [[20, 40]] * 4 and index.offsets.tolist() == [0, 0, 2, 3, 3]
    cls, boxes, crowd = index.labels(1)
    assert cls.tolist() == [0, 1] and not crowd.any()
    np.testing.assert_allclose(boxes, [[10, 5, 30, 15], [4, 2, 12, 10]], rtol=1e-6)
    assert [len(p) for p in index.polygons(1)] == [0, 3] and index.polygons(0) == []
    np.testing.assert_allclose(index.areas, [200, 64, 800])
    assert index.image_ids.tolist() == [0, 1, 2, 3] and index.category_ids.tolist() == [0, 1]
    report = index.report
    assert (report.images, report.used, report.labeled, report.without_file, report.boxes) == (4, 4, 2, 1, 3)
    types = {"shapes": "int32", "offsets": "int64", "cls": "int32", "boxes": "float32", "areas": "float64"}
    types |= {"crowd": "bool", "poly_offsets": "int64", "poly_xy": "float32", "image_ids": "int64"}
    assert {name: str(getattr(index, name).dtype) for name in types} == types


def test_all_ways_to_name_images(tmp_path, monkeypatch):
    data_set(tmp_path / "x", {f"{i}.png": BOX for i in range(6)})
    lists = tmp_path / "x" / "lists"
    lists.mkdir()
    (lists / "a.txt").write_text("\ufeff./../images/0.png\n\n  ./../images/1.png  \n")
    (lists / "b.txt").write_text(f"{tmp_path}/x/images/2.png\n./../images/0.png\nx/images/3.png\n")
    (tmp_path / "d.yaml").write_text("train: [x/lists/a.txt, x/lists/b.txt, x/images/../more]\nnames: [a]\n")
    data_set(tmp_path / "x" / "more" / "y", {"9.png": BOX})
    monkeypatch.chdir(tmp_path)
    index = index_of("d.yaml")
    assert [index.file(i).name for i in range(len(index))] == ["0.png", "1.png", "2.png", "3.png", "9.png"]
    assert all(index.file(i).is_absolute() for i in range(5)) and index.report.boxes == 5
    assert index.report.counts == {"image-repeated": 1}


def test_links_are_followed_once_and_never_in_circles(tmp_path):
    yaml = data_set(tmp_path, {"0.png": BOX, "sub/1.png": BOX})
    images = tmp_path / "images"
    (images / "loop").symlink_to(images)
    (images / "sub" / "up").symlink_to("..")
    (images / "aaa").symlink_to("sub")
    (images / "self.png").symlink_to("self.png")
    data_set(tmp_path / "elsewhere", {"2.png": None})
    (images / "other").symlink_to(tmp_path / "elsewhere" / "images")
    index = index_of(yaml)
    assert sorted(index.file(i).name for i in range(len(index))) == ["0.png", "1.png", "2.png"]
    assert index.report.counts == {"folder-repeated": 3, "image-unreadable": 1}


@pytest.mark.parametrize(
    "change", ["image", "label", "new image", "new label", "gone label", "option", "names", "same"]
)
def test_cache_is_used_until_anything_changes(tmp_path, change, monkeypatch):
    yaml = data_set(tmp_path, {"0.png": BOX, "1.png": BOX, "2.png": None})
    first = index_of(yaml)
    options = {}
    if change == "image":
        Image.new("RGB", (80, 20)).save(tmp_path / "images" / "0.png")
    elif change == "label":
        (tmp_path / "labels" / "0.txt").write_text(BOX.replace("0.5 0.5 0.5", "0.4 0.5 0.5"))
    elif change == "new image":
        Image.new("RGB", (40, 20)).save(tmp_path / "images" / "3.png")
    elif change == "new label":
        (tmp_path / "labels" / "2.txt").write_text(BOX)
    elif change == "gone label":
        (tmp_path / "labels" / "1.txt").unlink()
    elif change == "option":
        options = {"single_cls": True}
    elif change == "names":
        yaml.write_text("train: images\nnames: [b, a]\n")
    import utils.data.index as module

    scans = []
    scan = module.scan
    monkeypatch.setattr(module, "scan", lambda *args: scans.append(args) or scan(*args))
    second = index_of(yaml, **options)
    assert len(scans) == (change != "same") and same(first, second) == (change == "same")
    assert same(second, index_of(yaml, **options, rebuild=True))
    assert len(scans) == 1 + (change != "same")


def test_same_size_and_time_of_another_folder_is_another_index(tmp_path):
    for part, text in (("a", BOX), ("b", BOX.replace("0", "1", 1))):
        yaml = data_set(tmp_path / part, {"0.png": text})
        for path in yaml.parent.rglob("*"):
            os.utime(path, (1, 1))
    assert index_of(tmp_path / "a" / "d.yaml").cls.tolist() == [0]
    assert index_of(tmp_path / "b" / "d.yaml").cls.tolist() == [1]


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04 not a zip", b"\0" * 4000, "half", "other"])
def test_damaged_cache_is_made_anew(tmp_path, damage, monkeypatch):
    monkeypatch.setenv("YOLOV5_SPD_CACHE", str(tmp_path / "cache"))
    yaml = data_set(tmp_path, {"0.png": BOX})
    first = index_of(yaml)
    (file,) = cache_dir("index").iterdir()
    if damage == "half":
        damage = file.read_bytes()[:-200]
    if damage == "other":
        np.savez(file, words=np.zeros(3))
    else:
        file.write_bytes(damage)
    assert same(first, index_of(yaml))
    assert same(first, LabelIndex.load(file))


def test_nothing_is_written_beside_the_data(tmp_path):
    yaml = data_set(tmp_path, {"0.png": BOX})
    before = sorted((p, p.stat().st_mtime_ns) for p in tmp_path.rglob("*"))
    index_of(yaml)
    assert sorted((p, p.stat().st_mtime_ns) for p in tmp_path.rglob("*")) == before


def test_children_give_what_one_process_gives(tmp_path):
    rng = np.random.default_rng(0)
    texts = {}
    for i in range(150):
        rows = rng.random((rng.integers(0, 6), 4)) * 0.5 + (0.2, 0.2, 0.05, 0.05)
        texts[f"{i:03}.png"] = "".join(f"{rng.integers(3)} {' '.join(map(str, row))}\n" for row in rows)
    texts["x\udcff\u706b.png"] = "1 0.1 0.1 0.3 0.1 0.3 0.5\n"  # a name that is not UTF-8
    yaml = data_set(tmp_path, texts, names="[a, b]")
    alone = index_of(yaml, strict=False, workers=0, rebuild=True)
    together = index_of(yaml, strict=False, workers=3, rebuild=True)
    assert same(alone, together) and alone.report == together.report
    assert alone.report.counts["label-class"] > 5 and together.file(150).exists()


def test_several_builds_at_once(tmp_path):
    yaml = data_set(tmp_path, {f"{i}.png": BOX for i in range(20)})
    results = []
    threads = [threading.Thread(target=lambda: results.append(index_of(yaml, rebuild=True))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4 and all(same(results[0], other) for other in results)


def test_class_numbers_out_of_range_stop_before_training(tmp_path):
    yaml = data_set(tmp_path, {"0.png": BOX, "1.png": BOX + "7 0.5 0.5 0.1 0.1\n", "2.png": "-1 0.5 0.5 0.1 0.1\n" * 2})
    for _ in range(2):  # from the cache too
        with pytest.raises(UserError, match=r"1\.txt:2 has class 7; .*2\.txt:1 has class -1.*0 to 1") as error:
            index_of(yaml)
    assert "\n" not in str(error.value)
    assert len(index_of(yaml, strict=False)) == 3
    assert set(index_of(yaml, single_cls=True).cls.tolist()) == {0}


def test_single_class(tmp_path):
    yaml = data_set(tmp_path, {"0.png": BOX + BOX.replace("0", "1", 1)})
    index = index_of(yaml, single_cls=True)
    assert index.names == ("item",) and index.nc == 1 and index.cls.tolist() == [0, 0]


def test_policies_of_whole_images(tmp_path):
    yaml = data_set(tmp_path, {"0.png": BOX, "1.png": BOX + "0 0.9 0.5 0.5 0.5\n"})
    assert [len(index_of(yaml, policy=p).cls) for p in ("clip", "drop-box", "drop-image")] == [2, 2, 1]
    assert [len(index_of(yaml, policy=p)) for p in ("clip", "drop-box", "drop-image")] == [2, 2, 1]
    many = data_set(tmp_path / "many", {"0.png": BOX, "1.png": "0 0.9 0.5 0.5 0.5\n" * 2 + "0 2 2 0.1 0.1\nx\n"})
    report = index_of(many, policy="drop-image").report
    assert sum(report.counts.values()) == 4 and report.actions == {"image left out": 1, "counted once": 1}
    with pytest.raises(UserError, match=r"1\.txt:2 has a box"):
        index_of(yaml, policy="error")
    with pytest.raises(UserError, match="label policy 'crop'"):
        index_of(yaml, policy="crop")
    clean = data_set(tmp_path / "clean", {"0.png": BOX + BOX})
    assert len(index_of(clean, policy="error").cls) == 1


def test_no_images_no_usable_image_and_no_label(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "d.yaml").write_text("train: images\nval: v.txt\ntest: missing\nnames: [a]\n")
    with pytest.raises(UserError, match="no images in .*images"):
        index_of(tmp_path / "d.yaml")
    (tmp_path / "v.txt").write_text("\n")
    with pytest.raises(UserError, match="no images"):
        build_index(load_data(tmp_path / "d.yaml"), "val")
    with pytest.raises(UserError, match="missing, which does not exist"):
        build_index(load_data(tmp_path / "d.yaml"), "test")
    (tmp_path / "images" / "0.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"none of the 1 images .*0\.png is empty"):
        index_of(tmp_path / "d.yaml")
    index = index_of(data_set(tmp_path / "x", {"0.png": None, "1.png": ""}))
    assert index.report.boxes == 0
    with pytest.raises(UserError, match=r"none of the 2 images has a label.*labels/0\.txt"):
        index.require_labels("d.yaml")


def test_verify_decodes_and_digests(tmp_path):
    yaml = data_set(tmp_path, {"0.png": BOX, "1.png": BOX, "2.png": BOX}, size=(400, 300))
    data = bytearray((tmp_path / "images" / "2.png").read_bytes())
    data[len(data) // 2] ^= 255
    (tmp_path / "images" / "2.png").write_bytes(data)
    quick, thorough = index_of(yaml), index_of(yaml, verify=True)
    assert len(quick) == 3 and quick.digests.shape == (0, 16)
    assert len(thorough) == 2 and thorough.report.counts == {"image-unreadable": 1}
    assert np.array_equal(thorough.digests[0], thorough.digests[1]) and thorough.digests.any()


def test_what_check_could_not_decode_is_left_out_from_then_on(tmp_path):
    """Headers alone do not show it: reading it says what to do, and after a check nobody reads it."""
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        Image.fromarray(rng.integers(0, 256, (60, 80, 3), dtype=np.uint8)).save(tmp_path / f"{name}.png")
    whole = (tmp_path / "b.png").read_bytes()
    (tmp_path / "b.png").write_bytes(whole[:2000] + bytes(4000) + whole[6000:])
    (tmp_path / "d.yaml").write_text("train: .\nnames: [x]\n")
    spec = load_data(tmp_path / "d.yaml")
    index = build_index(spec, "train")
    assert len(index) == 2
    with pytest.raises(UserError, match=r"b\.png cannot be decoded .*; replace the file .* or run check\.py"):
        DetectionDataset(index, 64, Hyp(), augment=False).sample(0, 1, 1)
    build_index(spec, "train", verify=True, strict=False)
    index = build_index(spec, "train")
    assert [index.file(i).name for i in range(len(index))] == ["a.png"]
    assert len(build_index(spec, "train", rebuild=True)) == len(build_index(spec, "train")) == 2


def test_shared_data_sets_are_clean(shared_data):
    spec = load_data(shared_data / "deeppcb" / "deeppcb.yaml")
    train, val = (build_index(spec, split) for split in ("train", "val"))
    assert (len(train), train.report.boxes, len(val), val.report.boxes) == (1000, 6873, 500, 3140)
    assert set(train.report.counts) <= {"box-overhang", "box-repeated"}, train.report.lines()


def test_a_child_that_dies_is_an_error_and_not_a_hang(tmp_path, monkeypatch):
    yaml = data_set(tmp_path, {f"{i}.png": BOX for i in range(40)})
    monkeypatch.setattr("sys.executable", "/bin/false")
    with pytest.raises(RuntimeError, match="ended early"):
        index_of(yaml, workers=2, rebuild=True)
