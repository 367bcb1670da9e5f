"""COCO's files: annotation files and result files, read into packed arrays and written from them."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from utils.core.errors import UserError
from utils.core.files import existing_file
from utils.core.log import LOGGER
from utils.data.coco import INT64
from utils.data.coco import number as is_number
from utils.engine.evaluation.coco_eval import Truth
from utils.ops.metrics import Found, Objects


def truth_from_coco(path: str | Path, *, area_from: str = "annotation", area_pixels: str = "source") -> Truth:
    """Ground truth from a COCO annotation file, boxes as they stand there. Images in the order of their ids."""
    if area_pixels == "network":
        raise UserError("--area-pixels network needs a model; with --predictions use source")
    data = read_json(path, "annotation file")
    if not isinstance(data, dict) or not all(
        isinstance(data.get(k), list) for k in ("images", "annotations", "categories")
    ):
        raise UserError(f"'{path}' is not a COCO annotation file; expected lists images, annotations and categories")
    images = dict(_each(path, "image", data["images"], _image))
    ids = sorted(images, key=_rank)
    category = dict(_each(path, "category", data["categories"], lambda c: (_id(c, "id"), str(c["name"]))))
    category = {category_id: category[category_id] for category_id in sorted(category, key=_rank)}
    number = {image_id: i for i, image_id in enumerate(ids)}
    class_of = {category_id: c for c, category_id in enumerate(category)}

    def row(a: dict) -> tuple[float, ...]:
        image, cls = _known(number, a, "image_id"), _known(class_of, a, "category_id")
        x, y, w, h = _box(a["bbox"])
        area = w * h if area_from == "box" or a.get("area") is None else _finite(a["area"], "area")
        return image, cls, x, y, w, h, area, bool(a.get("iscrowd", 0))

    table = np.array(_each(path, "annotation", data["annotations"], row), np.float64).reshape(-1, 8)
    if not len(table):
        raise UserError(f"'{path}' has no annotations; there is nothing to measure by")
    table = table[np.argsort(table[:, 0], kind="stable")]
    objects = Objects(
        table[:, 0].astype(np.int64), table[:, 1].astype(np.int64), table[:, 2:6], table[:, 6], table[:, 7] > 0
    )
    shapes = np.array([images[i][:2] for i in ids], np.int64).reshape(-1, 2)
    files = tuple(images[i][2] for i in ids)
    return Truth(objects, shapes, tuple(category.values()), tuple(ids), tuple(category), np.ones(len(ids)), files)


def _each(path: str | Path, what: str, records: list, read: Callable[[Any], Any]) -> list[Any]:
    """`read` of every record; a UserError that gives the number of the first one that is broken, and why."""
    found = []
    for i, record in enumerate(records):
        try:
            if not isinstance(record, dict):
                raise ValueError(f"is {str(record)[:60]!r}, which is not an object")
            found.append(read(record))
        except (KeyError, ValueError) as e:
            reason = f"has no {e}" if isinstance(e, KeyError) else str(e)
            raise UserError(f"'{path}' {what} entry {i} {reason}; expected COCO's fields") from e
    return found


def _image(record: dict) -> tuple[Any, tuple[int, int, str]]:
    """Id, and (height, width, file name); sizes are 0 where the record has none."""
    height, width = (int(_finite(record.get(side, 0), side)) for side in ("height", "width"))
    return _id(record, "id"), (height, width, str(record.get("file_name", "")))


def _rank(value: Any) -> tuple[bool, Any]:
    """Ids in order: numbers first, then text."""
    return isinstance(value, str), value


def _id(record: dict, key: str) -> Any:
    """An id: a whole number of 64 bits, or text."""
    value = record[key]
    whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    if not (isinstance(value, str) or (whole and -INT64 <= value < INT64)):
        raise ValueError(f"has {key} {str(value)[:60]}, which is neither text nor a whole number of 64 bits")
    return value


def _known(numbers: dict[Any, int], record: dict, key: str) -> int:
    """The number of the image or class that an id stands for."""
    value = _id(record, key)
    if value not in numbers:
        raise ValueError(f"has {key} {value!r}, which the annotation file does not have")
    return numbers[value]


def _finite(value: Any, what: str) -> float:
    """A number that is neither NaN nor beyond all sizes."""
    if not is_number(value):
        raise ValueError(f"has {what} {str(value)[:60]}, which is not a finite number")
    return float(value)


def _score(value: Any) -> float:
    """A confidence: P, R, F1 and the confusion matrix are read at confidences from 0 to 1."""
    score = _finite(value, "score")
    if not 0 <= score <= 1:
        raise ValueError(
            f"has score {score:g}, which is not from 0 to 1; scale the scores (AP depends on their order only)"
        )
    return score


def _box(value: Any) -> list[float]:
    """x, y, width, height: four finite numbers, no negative size."""
    if not isinstance(value, list) or len(value) != 4 or not all(map(is_number, value)):
        raise ValueError(f"has bbox {str(value)[:60]}, which is not four finite numbers")
    if value[2] < 0 or value[3] < 0:
        raise ValueError(f"has bbox {value}, whose width or height is negative")
    return value


def read_json(path: str | Path, what: str) -> Any:
    """The content of a JSON file, or a UserError."""
    file = existing_file(path, what)
    try:
        return json.loads(file.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as e:
        raise UserError(f"{what} '{path}' is not valid JSON: {e}") from e


def found_from_coco(path: str | Path, truth: Truth) -> Found:
    """Detections from a file in COCO's result format (a list of image_id, category_id, bbox, score)."""
    data = read_json(path, "prediction file")
    if not isinstance(data, list):
        raise UserError(f"'{path}' is not a COCO result file; expected a list of image_id, category_id, bbox, score")
    number = {image_id: i for i, image_id in enumerate(truth.image_ids)}
    class_of = {category_id: c for c, category_id in enumerate(truth.category_ids)}

    def row(entry: dict) -> tuple[float, ...]:
        image, cls = _known(number, entry, "image_id"), class_of.get(_id(entry, "category_id"), -1)
        return image, cls, *_box(entry["bbox"]), _score(entry["score"])

    table = np.array(_each(path, "prediction", data, row), np.float64).reshape(-1, 7)
    unknown = int((table[:, 1] < 0).sum())
    if unknown:
        LOGGER.warning(
            f"{unknown} of {len(data)} predictions have a category_id that the annotation file lacks; left out"
        )
    table = table[table[:, 1] >= 0]
    image, xywh = table[:, 0].astype(np.int64), table[:, 2:6]
    area = xywh[:, 2] * xywh[:, 3] * truth.area_scale[image]
    return Found(image, table[:, 1].astype(np.int64), xywh, table[:, 6], area)


def coco_results(rows: np.ndarray, truth: Truth) -> list[dict[str, Any]]:
    """Detections [k, 7] in COCO's result format under the annotation file's own ids, box to 1e-3 px, score to 1e-5."""
    boxes = rows[:, 1:5].astype(np.float64)
    boxes[:, 2:] -= boxes[:, :2]
    columns = (rows[:, 0].astype(int).tolist(), rows[:, 6].astype(int).tolist(), boxes.round(3).tolist())
    return [
        {"image_id": truth.image_ids[i], "category_id": truth.category_ids[c], "bbox": box, "score": score}
        for i, c, box, score in zip(*columns, rows[:, 5].astype(np.float64).round(5).tolist(), strict=True)
    ]


def coco_annotations(truth: Truth, file_names: Sequence[str]) -> dict[str, Any]:
    """Ground truth as the content of a COCO annotation file, for data sets that have none."""
    objects = truth.objects
    columns = (objects.image.tolist(), objects.cls.tolist(), objects.xywh.tolist(), objects.area.tolist())
    return {
        "images": [
            {"id": image_id, "file_name": name, "height": int(h), "width": int(w)}
            for image_id, name, (h, w) in zip(truth.image_ids, file_names, truth.shapes, strict=True)
        ],
        "categories": [{"id": c, "name": name} for c, name in zip(truth.category_ids, truth.names, strict=True)],
        "annotations": [
            {
                "id": number,
                "image_id": truth.image_ids[image],
                "category_id": truth.category_ids[cls],
                "bbox": box,
                "area": area,
                "iscrowd": int(crowd),
            }
            for number, (image, cls, box, area, crowd) in enumerate(zip(*columns, objects.crowd, strict=True), 1)
        ],
    }


def ids_from_names(stems: Sequence[str]) -> tuple[int, ...]:
    """Image ids without an annotation file: the file names where these are different 64-bit numbers, else 0, 1, ..."""
    numeric = all(stem.isascii() and stem.isdigit() for stem in stems)
    ids = tuple(int(stem) for stem in stems) if numeric else ()
    usable = ids and len(set(ids)) == len(ids) and max(ids) < INT64
    return ids if usable else tuple(range(len(stems)))
