"""COCO files: masks against pycocotools, sparse ids, crowds, and records that lie."""

import json
import math

import numpy as np
import pytest
from PIL import Image

from utils.core.errors import UserError
from utils.data.coco import turn_boxes, turn_points
from utils.data.index import build_index
from utils.data.masks import decode_rle, decompress_counts, join_rings, mask_polygon, rle_box
from utils.data.spec import load_data

CATEGORIES = [{"id": 90, "name": "late"}, {"id": 3, "name": "early"}]


def data_set(folder, records, annotations, categories=CATEGORIES, names="", sizes=(), exif=0):
    """A COCO data set of 40 x 30 px images named as in `records` (or of the sizes given); returns its YAML."""
    (folder / "images").mkdir(parents=True)
    for i, record in enumerate(records):
        image = Image.new("RGB", sizes[i] if sizes else (40, 30))
        tags = Image.Exif()
        if exif:
            tags[274] = exif
        image.save(folder / "images" / record["file_name"], exif=tags)
    content = {"images": records, "annotations": annotations, "categories": categories}
    (folder / "t.json").write_text(json.dumps(content))
    (folder / "d.yaml").write_text(f"train: images\nannotations: {{train: t.json}}\n{names}")
    return folder / "d.yaml"


def record(number, **extra):
    return {"id": number, "file_name": f"{number}.png", "width": 40, "height": 30, **extra}


def box(image, bbox, category=3, **extra):
    return {"image_id": image, "category_id": category, "bbox": bbox, **extra}


def index_of(yaml, **options):
    return build_index(load_data(yaml), "train", **options)


def test_sparse_ids_crowds_areas_and_empty_images(tmp_path):
    annotations = [
        box(500, [1, 2, 10, 20], 90, id=7, area=55.5, iscrowd=0),
        box(500, [0, 0, 40, 30], 3, id=9, iscrowd=1, segmentation={"size": [30, 40], "counts": [0, 1200]}),
        box(7, [5, 5, 4, 4], segmentation=[[5, 5, 9, 5, 9, 9]]),
    ]
    index = index_of(data_set(tmp_path, [record(7), record(500), record(123456789012)], annotations))
    assert index.names == ("early", "late") and index.category_ids.tolist() == [3, 90]
    ids = index.image_ids.tolist()
    assert sorted(ids) == [7, 500, 123456789012]
    cls, xyxy, crowd = index.labels(ids.index(500))
    assert cls.tolist() == [1, 0] and crowd.tolist() == [False, True] and xyxy[0].tolist() == [1, 2, 11, 22]
    start = index.offsets[ids.index(500)]
    assert index.areas[start : start + 2].tolist() == [55.5, 1200]
    assert [p.tolist() for p in index.polygons(ids.index(7))] == [[[5, 5], [9, 5], [9, 9]]]
    assert not len(index.labels(ids.index(123456789012))[0])
    assert (index.report.boxes, index.report.crowds, index.report.labeled) == (2, 1, 2) and not index.report.counts


def test_names_of_the_yaml_choose_the_order(tmp_path):
    annotations = [box(1, [1, 1, 5, 5], 90), box(1, [9, 9, 5, 5], 3)]
    yaml = data_set(tmp_path / "a", [record(1)], annotations, names="names: [late, absent, early]\n")
    index = index_of(yaml)
    assert index.labels(0)[0].tolist() == [0, 2]
    assert index.category_ids[[0, 2]].tolist() == [90, 3] and len(set(index.category_ids.tolist())) == 3
    yaml = data_set(tmp_path / "b", [record(1)], annotations, names="names: [Late, early]\n")
    with pytest.raises(UserError, match=r"'late' \(id 90\) is not among .* did you mean 'Late'"):
        index_of(yaml)
    index = index_of(data_set(tmp_path / "c", [record(1)], annotations[1:], names="names: [early]\n"))
    assert index.labels(0)[0].tolist() == [0]  # a category without annotations may be left out


def test_several_files_and_folders(tmp_path):
    for part in ("a", "b"):
        data_set(tmp_path / part, [record(1), record(2)], [box(1, [1, 1, 2, 2]), box(2, [1, 1, 3, 3])])
    text = "train: [a/images, b/images]\nannotations: {train: [a/t.json, b/t.json]}\n"
    (tmp_path / "d.yaml").write_text(text)
    index = index_of(tmp_path / "d.yaml")
    assert len(index) == 2 and index.report.counts["coco-repeated"] == 2  # '1.png' is found in the first folder
    (tmp_path / "b" / "images").rename(tmp_path / "b" / "other")
    for name in ("1.png", "2.png"):
        (tmp_path / "b" / "other" / name).rename(tmp_path / "b" / "other" / f"b{name}")
    content = json.loads((tmp_path / "b" / "t.json").read_text())
    content["images"] = [{**image, "file_name": f"b{image['file_name']}"} for image in content["images"]]
    (tmp_path / "b" / "t.json").write_text(json.dumps(content))
    (tmp_path / "d.yaml").write_text(text.replace("b/images", "b/other"))
    index = index_of(tmp_path / "d.yaml")
    assert [index.file(i).name for i in range(4)] == ["1.png", "2.png", "b1.png", "b2.png"]
    assert len(set(index.image_ids.tolist())) == 4 and index.report.boxes == 4 and not index.own_ids


def test_text_ids(tmp_path):
    records = [record(1, id="000000000139"), record(2, id="abc")]
    index = index_of(data_set(tmp_path, records, [box("139", [1, 1, 2, 2]), box("abc", [1, 1, 3, 3])]))
    assert index.report.boxes == 2 and index.image_ids.tolist() == [0, 1] and not index.own_ids


def test_own_ids_are_numbers_in_the_file_and_outlive_the_cache(tmp_path):
    for name, ids, own in (("number", (7, 9), True), ("digits", ("7", "9"), False)):
        yaml = data_set(tmp_path / name, [record(1, id=ids[0]), record(2, id=ids[1])], [box(ids[0], [1, 1, 2, 2])])
        for _ in range(2):  # read, then from the cache
            index = index_of(yaml)
            assert index.image_ids.tolist() == [7, 9] and index.own_ids == own


def test_images_left_out_are_counted_per_image(tmp_path):
    boxes = [box(1, [90, 90, 5, 5]), box(1, [80, 80, 5, 5]), box(2, [90, 90, 5, 5]), box(2, [1, 1, 0, 5])]
    yaml = data_set(tmp_path, [record(1), record(2), record(3)], boxes)
    assert index_of(yaml, policy="drop-image").report.actions == {"image left out": 2}


@pytest.mark.parametrize("orientation", [1, 3, 5, 6, 7, 8])
def test_exif_rotation(tmp_path, orientation):
    """A bright patch in the stored picture lies in the box, whichever way the record counts its sides."""
    stored = np.zeros((30, 40, 3), np.uint8)
    stored[4:8, 20:35] = 255
    (tmp_path / "images").mkdir()
    tags = Image.Exif()
    tags[274] = orientation
    Image.fromarray(stored).save(tmp_path / "images" / "1.png", exif=tags)
    from utils.data.images import read_image

    upright = read_image(tmp_path / "images" / "1.png")
    rows, columns = np.nonzero(upright[..., 0])
    patch = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    bbox = [20, 4, 15, 4]
    if orientation == 3:  # the sides tell nothing: the record is taken to mean the upright picture
        bbox = [patch[0], patch[1], patch[2] - patch[0], patch[3] - patch[1]]
    annotation = box(1, [int(v) for v in bbox])
    content = {"images": [record(1)], "annotations": [annotation], "categories": CATEGORIES}
    (tmp_path / "t.json").write_text(json.dumps(content))
    (tmp_path / "d.yaml").write_text("train: images\nannotations: {train: t.json}\n")
    index = index_of(tmp_path / "d.yaml")
    assert index.shapes[0].tolist() == list(upright.shape[:2])
    assert index.labels(0)[1][0].tolist() == [float(v) for v in patch]
    assert ("coco-rotated" in index.report.counts) == (orientation >= 5)


def test_turned_points_come_back():
    points = np.random.default_rng(0).random((9, 2)) * (40, 30)
    for there, back in ((1, 1), (2, 2), (3, 3), (4, 4), (5, 5), (6, 8), (7, 7), (8, 6)):
        turned = turn_points(points, (30, 40), there)
        again = turn_points(turned, (40, 30) if there >= 5 else (30, 40), back)
        np.testing.assert_allclose(again, points)
        boxes = turn_boxes(np.array([[1.0, 2, 10, 20]]), (30, 40), there)
        assert (boxes[:, :2] < boxes[:, 2:]).all()


@pytest.mark.parametrize(
    ("bad", "kind"),
    [
        (box(1, [1, 1, float("nan"), 2]), "coco-record"),
        (box(1, [1, 1, float("inf"), 2]), "coco-record"),
        (box(1, [1, 1, 2]), "coco-record"),
        (box(1, "1 1 2 2"), "coco-record"),
        (box(1, [1, 1, "2", 2]), "coco-record"),
        (box(1, [1, 1, True, 2]), "coco-record"),
        (box(1, [10**400, 1, 2, 2]), "coco-record"),
        (box(1, None), "coco-record"),
        (box(1, [1, 1, 0, 5]), "box-empty"),
        (box(1, [1, 1, -3, 5]), "box-empty"),
        (box(1, [100, 1, 3, 5]), "box-outside"),
        (box(1, [30, 1, 10.9, 5]), "box-overhang"),
        (box(1, [2, 2, 5, 5]), "box-repeated"),
        (box(99, [1, 1, 3, 5]), "coco-reference"),
        (box(1, [1, 1, 3, 5], 4), "coco-reference"),
        (box(1, [1, 1, 3, 5], None), "coco-reference"),
        (box(1, [1, 1, 3, 5], [3]), "coco-reference"),
        (box([1], [1, 1, 3, 5]), "coco-record"),
        ({"bbox": [1, 1, 2, 2]}, "coco-record"),
        (None, "coco-record"),
        ([], "coco-record"),
        ("annotation", "coco-record"),
    ],
)
def test_a_bad_annotation_costs_itself_only(tmp_path, bad, kind):
    index = index_of(data_set(tmp_path, [record(1)], [box(1, [2, 2, 5, 5]), bad, box(1, [9, 9, 5, 5], 90)]))
    assert index.report.counts == {kind: 1}
    assert index.report.boxes == (3 if kind == "box-overhang" else 2)
    problem = index.report.problems[0]
    assert problem.file.endswith("t.json") and "record 1" in problem.detail


@pytest.mark.parametrize(
    ("bad", "kind", "used"),
    [
        ({"id": 2}, "coco-record", 1),
        ({"id": 2, "file_name": 5}, "coco-record", 1),
        ({"id": 2, "file_name": ""}, "coco-record", 1),
        ({"id": [2], "file_name": "x.png"}, "coco-record", 1),
        ({"id": 2, "file_name": "../../../etc/passwd"}, "coco-record", 1),
        ({"id": 2, "file_name": "/etc/passwd"}, "coco-record", 1),
        ({"id": 1, "file_name": "x.png"}, "coco-repeated", 1),
        ({"id": 2, "file_name": "1.png"}, "coco-repeated", 1),
        ({"id": 2, "file_name": "./1.png"}, "coco-repeated", 1),
        ({"id": 2, "file_name": "absent.png"}, "image-missing", 1),
        (None, "coco-record", 1),
        (7, "coco-record", 1),
    ],
)
def test_a_bad_image_record_costs_itself_only(tmp_path, bad, kind, used):
    yaml = data_set(tmp_path, [record(1)], [box(1, [2, 2, 5, 5])])
    content = json.loads((tmp_path / "t.json").read_text())
    content["images"].append(bad)
    (tmp_path / "t.json").write_text(json.dumps(content))
    index = index_of(yaml)
    assert len(index) == used and index.report.counts == {kind: 1} and index.report.boxes == 1


def test_record_of_another_size_leaves_the_image_out(tmp_path):
    index = index_of(data_set(tmp_path, [record(1), record(2, width=80)], [box(1, [1, 1, 2, 2]), box(2, [1, 1, 2, 2])]))
    assert len(index) == 1 and index.report.counts == {"coco-size": 1} and "80 x 30" in str(index.report.problems[0])


def test_record_without_size_is_fine(tmp_path):
    index = index_of(data_set(tmp_path, [{"id": 1, "file_name": "1.png"}], [box(1, [1, 1, 2, 2])]))
    assert index.shapes.tolist() == [[30, 40]] and not index.report.counts


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "null",
        "[" * 100_000,
        '{"images": [], "annotations": []}',
        '{"images": {}, "annotations": [], "categories": []}',
        '{"images": [], "annotations": {}, "categories": []}',
        '{"images": [], "annotations": [], "categories": []}',
        '{"images": [], "annotations": [], "categories": [{"id": 1}]}',
        '{"images": [], "annotations": [], "categories": [{"name": "a"}]}',
        '{"images": [], "annotations": [], "categories": [{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]}',
        '{"images": [], "annotations": [], "categories": [{"id": 1, "name": "a"}]}',
        '{"images": [{"id": 1, "file_name": "absent.png"}], "annotations": [], "categories": [{"id": 1, "name": "a"}]}',
        '\x89PNG"',
        '{"id": ' + "9" * 5000 + "}",
    ],
)
def test_a_broken_file_is_one_line(tmp_path, content):
    (tmp_path / "images").mkdir()
    (tmp_path / "t.json").write_text(content, encoding="latin-1")
    (tmp_path / "d.yaml").write_text("train: images\nannotations: {train: t.json}\n")
    with pytest.raises(UserError) as error:
        index_of(tmp_path / "d.yaml")
    assert "\n" not in str(error.value) and len(str(error.value)) < 600
    assert "t.json" in str(error.value) or "absent.png" in str(error.value)


def test_two_categories_of_one_name(tmp_path):
    twice = [{"id": 1, "name": "x"}, {"id": 2, "name": "x"}]
    both = [box(1, [1, 1, 2, 2], 1), box(1, [1, 1, 2, 2], 2)]
    with pytest.raises(UserError, match="'x'"):
        index_of(data_set(tmp_path / "a", [record(1)], both, categories=twice))
    index = index_of(data_set(tmp_path / "b", [record(1)], both[1:], categories=twice, names="names: [x]"))
    assert index.category_ids.tolist() == [2]


# ---------------------------------------------------------------------------------------------------- masks


def blob(seed, hw=(37, 53)):
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[: hw[0], : hw[1]]
    cy, cx, ry, rx = rng.random(4) * (hw[0], hw[1], 12, 16) + (0, 0, 1, 1)
    return ((y - cy) / ry) ** 2 + ((x - cx) / rx) ** 2 <= 1


@pytest.mark.parametrize("seed", range(8))
def test_run_lengths_equal_pycocotools(seed):
    coco_mask = pytest.importorskip("pycocotools.mask")
    mask = blob(seed) if seed else np.random.default_rng(0).random((37, 53)) > 0.5
    rle = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    text = rle["counts"].decode()
    decoded = decode_rle({"size": [37, 53], "counts": text}, (37, 53))
    assert decoded is not None and np.array_equal(decoded, mask)
    runs = decompress_counts(text)
    assert runs is not None and sum(runs) == mask.size and sum(runs[1::2]) == mask.sum()
    again = decode_rle({"size": [37, 53], "counts": runs}, (37, 53))
    assert again is not None and np.array_equal(again, mask)
    if mask.any():
        x, y, w, h = coco_mask.toBbox(rle)
        assert rle_box(mask) == [x, y, x + w, y + h]


@pytest.mark.parametrize(
    "segmentation",
    [
        {},
        {"size": [30, 40]},
        {"size": [30, 40], "counts": [5]},
        {"size": [30, 40], "counts": [-5, 1205]},
        {"size": [30, 40], "counts": [1200.0]},
        {"size": [30, 40], "counts": "\x00\x7f"},
        {"size": [30, 40], "counts": "oooooooooooooooooooo"},
        {"size": [30, 40], "counts": {"a": 1}},
        {"size": [100000, 100000], "counts": [10**10]},
        {"size": "30 40", "counts": [1200]},
    ],
)
def test_malformed_masks_cost_the_mask_only(tmp_path, segmentation):
    assert decode_rle(segmentation, (30, 40)) is None
    index = index_of(data_set(tmp_path, [record(1)], [box(1, [2, 2, 5, 5], segmentation=segmentation)]))
    assert index.report.boxes == 1 and not len(index.poly_xy)


@pytest.mark.parametrize("seed", range(1, 8))
def test_outline_of_a_mask_has_its_extents_and_about_its_area(seed):
    import cv2

    mask = blob(seed)
    outline = mask_polygon(mask)
    corners = rle_box(mask)
    assert corners is not None
    np.testing.assert_allclose([*outline.min(0), *outline.max(0)], corners, atol=1e-4)
    big = np.zeros((37 * 8, 53 * 8), np.uint8)
    cv2.fillPoly(big, [np.round(outline * 8).astype(np.int32)], 1)
    assert abs(big.sum() / 64 - mask.sum()) < 0.15 * mask.sum() + 4


def test_joined_rings_keep_extents_and_area():
    import cv2

    rings = [[2, 2, 12, 2, 12, 12, 2, 12], [20, 5, 30, 5, 30, 25], [35, 35, 38, 35, 38, 38]]
    joined = join_rings(rings)
    assert [*joined.min(0), *joined.max(0)] == [2, 2, 38, 38]
    x, y = joined.T
    area = abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2
    single = [abs(cv2.contourArea(np.array(ring, np.float32).reshape(-1, 2))) for ring in rings]
    assert area == pytest.approx(sum(single))
    for bad in (
        [[1, 2, 3, 4]],
        [[1, 2, 3, 4, 5, 6, 7]],
        ["x"],
        [[1, 2, 3, 4, 5, None]],
        [[1, 2, 3, 4, 5, math.nan]],
        [],
    ):
        assert len(join_rings(bad)) == 0


def test_box_from_a_shape_where_it_is_missing(tmp_path):
    mask = np.zeros((30, 40), bool)
    mask[3:9, 11:31] = True
    flat = mask.T.ravel().astype(np.int8)
    edges = np.flatnonzero(np.diff(flat)) + 1
    runs = np.diff([0, *edges, 1200]).tolist()
    shapes = [[[5, 6, 20, 6, 20, 26]], {"size": [30, 40], "counts": runs}]
    annotations = [{"image_id": 1, "category_id": 3, "segmentation": s} for s in shapes]
    index = index_of(data_set(tmp_path, [record(1)], annotations))
    assert index.labels(0)[1].tolist() == [[5, 6, 20, 26], [11, 3, 31, 9]]
    np.testing.assert_allclose(np.ptp(index.polygons(0)[1], 0), [20, 6])


def test_official_json_and_yolo_files_give_the_same_boxes(tmp_path, shared_data):
    """coco128: 929 boxes, equal to 0.01 px and in the same order; crowd regions are only in the JSON."""
    root = shared_data / "coco128"
    text = (root / "coco128.yaml").read_text().replace("path: .", f"path: {root}")
    extra = "annotations: {train: annotations/instances_train2017.json, val: annotations/instances_train2017.json}\n"
    (tmp_path / "d.yaml").write_text(text + "\n" + extra)
    coco, yolo = index_of(tmp_path / "d.yaml"), index_of(root / "coco128.yaml")
    assert coco.names == yolo.names and np.array_equal(coco.shapes, yolo.shapes)
    assert (coco.report.boxes, yolo.report.boxes, coco.report.crowds) == (929, 929, 10)
    assert [coco.file(i) for i in range(128)] == [yolo.file(i) for i in range(128)]
    assert [coco.file(i).stem for i in range(128) if not len(coco.labels(i)[0])] == ["000000000250", "000000000508"]
    for i in range(128):
        cls, xyxy, crowd = coco.labels(i)
        assert np.array_equal(cls[~crowd], yolo.labels(i)[0])
        np.testing.assert_allclose(xyxy[~crowd], yolo.labels(i)[1], atol=0.01)
        assert coco.image_ids[i] == int(coco.file(i).stem)
    with open(root / "annotations" / "instances_train2017.json") as file:
        areas = sorted(a["area"] for a in json.load(file)["annotations"])
    np.testing.assert_allclose(np.sort(coco.areas), areas)
