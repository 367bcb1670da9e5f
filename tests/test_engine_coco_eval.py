"""The evaluator against pycocotools and the published numbers, and its answers to odd input."""

import contextlib
import io
import json
import math
from pathlib import Path

import numpy as np
import pytest

from utils.core.errors import UserError
from utils.engine.evaluation.coco_eval import (
    TWELVE,
    MetricSettings,
    Truth,
    coco_metrics,
    found_from_rows,
    truth_from_index,
)
from utils.engine.evaluation.coco_files import coco_results, found_from_coco, truth_from_coco
from utils.ops.metrics import Found, Objects


def random_case(seed: int, images: int = 12, nc: int = 3, ties: bool = False) -> tuple[Truth, Found]:
    """Objects with crowds and odd areas, and detections that are shaken copies of them plus noise."""
    rng = np.random.default_rng(seed)
    m = images * 8
    image = np.sort(rng.integers(0, images, m))
    wh = rng.choice([6.0, 20.0, 50.0, 150.0], (m, 2)) * rng.uniform(0.7, 1.3, (m, 2))
    xywh = np.concatenate([rng.uniform(0, 400, (m, 2)), wh], 1)
    cls = rng.integers(0, nc, m)
    area = wh.prod(1) * rng.uniform(0.5, 1.0, m)
    area[::9] = 32.0**2  # on the limit: small and medium at once
    objects = Objects(image, cls, xywh, area, rng.random(m) < 0.1)
    pick = rng.integers(0, m, 4 * m)
    boxes = xywh[pick] + rng.normal(0, 0.08, (4 * m, 4)) * np.tile(wh[pick], 2)
    boxes[:, 2:] = np.maximum(boxes[:, 2:], 1)
    score = rng.integers(0, 9, 4 * m) / 10 if ties else rng.random(4 * m)
    guess = np.where(rng.random(4 * m) < 0.85, cls[pick], rng.integers(0, nc, 4 * m))
    order = np.argsort(image[pick], kind="stable")
    found = Found(image[pick][order], guess[order], boxes[order], score[order], boxes[order, 2:].prod(1))
    shapes = np.full((images, 2), 640)
    ids = tuple(range(100, 100 + images))
    return Truth(objects, shapes, tuple("abc")[:nc], ids, tuple(range(1, nc + 1)), np.ones(images)), found


def oracle(truth: Truth, found: Found, iou_thrs: np.ndarray | None = None, max_dets: list[int] | None = None):
    """pycocotools on the same data -> its COCOeval after `accumulate`."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    def annotations(boxes, **extra):
        return [
            {
                "id": i + 1,
                "image_id": int(boxes.image[i]),
                "category_id": int(boxes.cls[i]),
                "bbox": boxes.xywh[i].tolist(),
                "area": float(boxes.area[i]),
                **{k: v[i].item() for k, v in extra.items()},
            }
            for i in range(len(boxes))
        ]

    base = {"images": [{"id": i} for i in range(len(truth))], "categories": [{"id": c} for c in range(truth.nc)]}
    with contextlib.redirect_stdout(io.StringIO()):
        gt, dt = COCO(), COCO()
        gt.dataset = {**base, "annotations": annotations(truth.objects, iscrowd=truth.objects.crowd.astype(int))}
        dt.dataset = {**base, "annotations": annotations(found, score=found.score)}
        gt.createIndex()
        dt.createIndex()
        run = COCOeval(gt, dt, "bbox")
        if iou_thrs is not None:
            run.params.iouThrs = iou_thrs
        if max_dets is not None:
            run.params.maxDets = max_dets
        run.evaluate()
        run.accumulate()
        if max_dets is None and iou_thrs is None:
            run.summarize()
    return run


def mean(values: np.ndarray) -> float:
    return float(np.mean(values[values > -1])) if (values > -1).any() else float("nan")


def test_expected_numbers_of_cocoapi(shared_data: Path):
    folder = shared_data / "cocoapi-val2014-100"
    truth = truth_from_coco(folder / "instances_val2014_100.json")
    metrics, _ = coco_metrics(truth, found_from_coco(folder / "instances_val2014_fakebbox100_results.json", truth))
    expected = json.loads((folder / "expected.json").read_text())["bbox"]
    assert [metrics[k] for k in TWELVE] == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("seed,ties", [(0, False), (1, True), (2, True)])
def test_twelve_numbers_equal_pycocotools(seed: int, ties: bool):
    truth, found = random_case(seed, ties=ties)
    metrics, _ = coco_metrics(truth, found)
    run = oracle(truth, found)
    assert [metrics[k] for k in TWELVE] == pytest.approx(run.stats.tolist(), abs=1e-12)
    precision = run.eval["precision"]
    for c, row in enumerate(metrics["per_class"]):
        assert row["AP"] == pytest.approx(mean(precision[:, :, c, 0, -1]), abs=1e-12)
        assert row["AP_S"] == pytest.approx(mean(precision[:, :, c, 1, -1]), abs=1e-12)


def test_free_thresholds_and_limits_equal_pycocotools():
    truth, found = random_case(3)
    settings = MetricSettings(iou_thrs=(0.33,), max_dets=(1, 5, 7))
    metrics, curves = coco_metrics(truth, found, settings)
    run = oracle(truth, found, np.array([0.33, 0.5, 0.75]), [1, 5, 7])
    precision, recall = run.eval["precision"], run.eval["recall"]
    assert metrics["AP"] == metrics["AP33"] == pytest.approx(mean(precision[0, :, :, 0, -1]), abs=1e-12)
    assert metrics["AP50"] == pytest.approx(mean(precision[1, :, :, 0, -1]), abs=1e-12)
    assert metrics["AR5"] == pytest.approx(mean(recall[0, :, 0, 1]), abs=1e-12)
    assert curves.iou == settings.pr_iou == 0.33


def test_further_area_bins_are_added_and_small_stays_coco():
    truth, found = random_case(4)
    metrics, _ = coco_metrics(truth, found, MetricSettings(area_bins=(8, 32, 96)))
    usual, _ = coco_metrics(truth, found)
    assert metrics["AP_S"] == usual["AP_S"]
    assert metrics["AP_32-96"] == usual["AP_M"] and metrics["AP_96+"] == usual["AP_L"]
    assert {"AP_0-8", "AP_8-32", "AR_0-8"} <= set(metrics)
    other, _ = coco_metrics(truth, found, MetricSettings(area_bins=(8, 96)))
    assert other["AP_S"] == metrics["AP_0-8"]


def test_network_pixels_scale_objects_and_detections():
    truth, found = random_case(5)
    scaled = Truth(**{**vars(truth), "area_scale": np.full(len(truth), 0.25)})
    scaled = Truth(**{**vars(scaled), "objects": Objects(**{**vars(truth.objects), "area": truth.objects.area * 0.25})})
    rows = np.concatenate([found.image[:, None], found.xywh, found.score[:, None], found.cls[:, None]], 1)
    rows[:, 3:5] += rows[:, 1:3]
    half, _ = coco_metrics(scaled, found_from_rows(rows, scaled))
    same, _ = coco_metrics(truth, found_from_rows(rows, truth), MetricSettings(area_bins=(64, 192)))
    assert half["AP_S"] == pytest.approx(same["AP_S"]) and half["AP_M"] == pytest.approx(same["AP_M"])


def empty(nc: int = 2, images: int = 3) -> tuple[Truth, Found]:
    none = np.zeros(0, np.int64)
    objects = Objects(none, none, np.zeros((0, 4)), np.zeros(0), np.zeros(0, bool))
    truth = Truth(objects, np.full((images, 2), 64), ("a", "b"), tuple(range(images)), (0, 1), np.ones(images))
    return truth, Found(none, none, np.zeros((0, 4)), np.zeros(0), np.zeros(0))


def test_nothing_to_measure_is_nan_and_nothing_found_is_zero():
    truth, none = empty()
    metrics, _ = coco_metrics(truth, none)
    assert np.isnan([metrics[k] for k in (*TWELVE, "P", "R", "F1")]).all()
    truth, _ = random_case(6)
    metrics, _ = coco_metrics(truth, none)
    assert [metrics[k] for k in (*TWELVE, "P", "R", "F1")] == [0.0] * 15


def test_false_positives_on_images_without_objects_lower_ap():
    truth, found = random_case(7)
    before, _ = coco_metrics(truth, found)
    wide = Truth(truth.objects, np.full((14, 2), 640), truth.names, tuple(range(14)), truth.category_ids, np.ones(14))
    noise = Found(*(np.concatenate([getattr(found, k), v]) for k, v in {
        "image": np.full(40, 13), "cls": np.arange(40) % 3, "xywh": np.tile([1.0, 1, 9, 9], (40, 1)),
        "score": np.full(40, 2.0), "area": np.full(40, 81.0),
    }.items()))  # fmt: skip
    after, _ = coco_metrics(wide, noise)
    assert after["AP"] < before["AP"]


def test_more_objects_than_the_limit_are_announced_with_the_flag(capsys):
    truth, found = random_case(8)
    coco_metrics(truth, found, MetricSettings(max_dets=(1, 2)))
    line = capsys.readouterr().out.strip()
    assert "--max-dets 1 " in line and "hold more than 2 objects" in line and "\n" not in line
    coco_metrics(truth, found)
    assert not capsys.readouterr().out


def test_results_travel_through_cocos_format_under_own_ids(tmp_path: Path):
    truth, found = random_case(9)
    truth = Truth(**{**vars(truth), "image_ids": tuple(f"img {i}" for i in range(12)), "category_ids": (4, 7, 90)})
    rows = np.concatenate([found.image[:, None], found.xywh, found.score[:, None], found.cls[:, None]], 1)
    rows[:, 3:5] += rows[:, 1:3]
    entries = coco_results(rows, truth)
    assert {e["category_id"] for e in entries} == {4, 7, 90} and entries[0]["image_id"].startswith("img ")
    path = tmp_path / "results.json"
    path.write_text(json.dumps(entries))
    back = found_from_coco(path, truth)
    assert np.abs(back.xywh - found.xywh).max() < 6e-4 and (back.cls == found.cls).all()


@pytest.mark.parametrize(
    "entry,words",
    [
        ({"image_id": 5, "category_id": 1, "bbox": [0, 0, 1, 1], "score": 1}, "image_id 5"),
        ({"image_id": 1, "category_id": 1, "bbox": [0, 0, 1], "score": 1}, "entry 0"),
        ({"image_id": 1, "category_id": 1, "segmentation": []}, "bbox"),
        ("text", "entry 0"),
        ({"image_id": 1, "category_id": 1, "bbox": [0, 0, 1, 1], "score": math.nan}, "entry 0 has score nan"),
        ({"image_id": 1, "category_id": 1, "bbox": [0, 0, 1, 1], "score": 90}, "entry 0 has score 90, .* from 0 to 1"),
        ({"image_id": [1], "category_id": 1, "bbox": [0, 0, 1, 1], "score": 1}, r"entry 0 has image_id \[1\]"),
        ({"image_id": 1, "category_id": [1], "bbox": [0, 0, 1, 1], "score": 1}, r"entry 0 has category_id \[1\]"),
        ({"image_id": 1, "category_id": 1, "bbox": [0, math.nan, 1, 1], "score": 1}, "entry 0 has bbox .*nan"),
        ({"image_id": 1, "category_id": 1, "bbox": [0, 0, math.inf, 1], "score": 1}, "entry 0 has bbox .*inf"),
        ({"image_id": 1, "category_id": 1, "bbox": [0, 0, 1, -2], "score": 1}, "entry 0 has bbox .*negative"),
    ],
)
def test_broken_predictions_are_named(tmp_path: Path, entry: object, words: str):
    path = tmp_path / "p.json"
    path.write_text(json.dumps([entry]))
    truth = Truth(**{**vars(empty()[0]), "image_ids": (0, 1, 2)})
    with pytest.raises(UserError, match=words):
        found_from_coco(path, truth)


def test_predictions_of_unknown_classes_are_left_out_and_counted(tmp_path: Path, capsys):
    path = tmp_path / "p.json"
    path.write_text(json.dumps([{"image_id": 1, "category_id": 99, "bbox": [0, 0, 1, 1], "score": 0.5}]))
    assert len(found_from_coco(path, empty()[0])) == 0
    assert "1 of 1 predictions" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["[]", "{", '{"images": [], "annotations": [{}], "categories": []}'])
def test_broken_annotations_are_one_line(tmp_path: Path, text: str):
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(UserError) as e:
        truth_from_coco(path)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    "part,change,words",
    [
        ("images", {"height": None}, "image entry 0 has height None"),
        ("images", {"id": [1]}, r"image entry 0 has id \[1\]"),
        ("categories", {"name": ...}, "category entry 0 has no 'name'"),
        ("annotations", {"image_id": [1]}, r"annotation entry 0 has image_id \[1\]"),
        ("annotations", {"category_id": 2}, "annotation entry 0 has category_id 2"),
        ("annotations", {"bbox": [0, 0, math.nan, 1]}, "annotation entry 0 has bbox .*nan"),
        ("annotations", {"bbox": [0, 0, -1, 1]}, "annotation entry 0 has bbox .*negative"),
        ("annotations", {"bbox": [0, 0, 1]}, "annotation entry 0 has bbox .*four"),
        ("annotations", {"area": math.nan}, "annotation entry 0 has area nan"),
    ],
)
def test_broken_entries_of_annotations_are_named(tmp_path: Path, part: str, change: dict, words: str):
    data: dict = {
        "images": [{"id": 1, "height": 10, "width": 10}],
        "categories": [{"id": 1, "name": "a"}],
        "annotations": [{"image_id": 1, "category_id": 1, "bbox": [0, 0, 1, 1]}],
    }
    path = tmp_path / "a.json"
    path.write_text(json.dumps(data))
    assert truth_from_coco(path).objects.area.tolist() == [1]
    data[part][0] = {key: value for key, value in {**data[part][0], **change}.items() if value is not ...}
    path.write_text(json.dumps(data))
    with pytest.raises(UserError, match=words):
        truth_from_coco(path)


@pytest.mark.parametrize(
    "bad",
    [
        {"iou_thrs": (1.5,)},
        {"max_dets": (0,)},
        {"area_bins": (-1,)},
        {"area_bins": (math.nan, 96)},
        {"area_bins": (32, math.inf)},
        {"area_bins": (32, 32)},
        {"area_bins": (96, 32)},
        {"area_from": "x"},
    ],
)
def test_bad_settings_are_refused(bad: dict):
    with pytest.raises(UserError):
        MetricSettings(**bad)


def test_area_from_box_ignores_the_annotated_area():
    class Index:
        shapes = np.array([[100, 100]])
        offsets = np.array([0, 1])
        cls = np.array([0])
        boxes = np.array([[0, 0, 40, 40]], np.float32)
        areas = np.array([500.0])
        crowd = np.array([False])
        image_ids = np.array([7])
        category_ids = np.array([3])

        def __len__(self) -> int:
            return 1

    assert truth_from_index(Index(), ["a"]).objects.area.tolist() == [500.0]
    truth = truth_from_index(Index(), ["a"], area_from="box")
    assert truth.objects.area.tolist() == [1600.0] and truth.image_ids == (7,) and truth.category_ids == (3,)
