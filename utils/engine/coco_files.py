"""COCO's files: annotation files and result files, read into packed arrays and written from them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from utils.core.errors import UserError
from utils.core.files import existing_file
from utils.core.log import LOGGER
from utils.engine.coco_eval import Truth
from utils.ops.metrics import Found, Objects


def truth_from_coco(path: str | Path, *, area_from: str = "annotation") -> Truth:
    """Ground truth from a COCO annotation file, boxes as they stand there. Images in the order of their ids."""
    data = read_json(path, "annotation file")
    if not isinstance(data, dict) or not all(
        isinstance(data.get(k), list) for k in ("images", "annotations", "categories")
    ):
        raise UserError(f"'{path}' is not a COCO annotation file; expected lists images, annotations and categories")
    try:
        images = {image["id"]: image for image in data["images"]}
        ids = sorted(images, key=lambda i: (isinstance(i, str), i))
        number = {image_id: i for i, image_id in enumerate(ids)}
        category = {c["id"]: str(c["name"]) for c in sorted(data["categories"], key=lambda c: c["id"])}
        class_of = {category_id: c for c, category_id in enumerate(category)}
        rows = [
            (number[a["image_id"]], class_of[a["category_id"]], *a["bbox"], a.get("area"), a.get("iscrowd", 0))
            for a in data["annotations"]
        ]
        shapes = [(images[i].get("height", 0), images[i].get("width", 0)) for i in ids]
        table = np.array([row[:6] for row in rows], np.float64).reshape(-1, 6)
    except (KeyError, TypeError, ValueError) as e:
        raise UserError(
            f"'{path}' has a broken image, category or annotation ({type(e).__name__}: {e}); expected COCO's fields"
        ) from e
    given = np.array([np.nan if row[6] is None else row[6] for row in rows], np.float64)
    own = table[:, 4] * table[:, 5]
    area = own if area_from == "box" else np.where(np.isnan(given), own, given)
    crowd = np.array([bool(row[7]) for row in rows], bool)
    order = np.argsort(table[:, 0], kind="stable")
    table = table[order]
    objects = Objects(
        table[:, 0].astype(np.int64), table[:, 1].astype(np.int64), table[:, 2:], area[order], crowd[order]
    )
    files = tuple(str(images[i].get("file_name", "")) for i in ids)
    shape = np.array(shapes, np.int64).reshape(-1, 2)
    return Truth(objects, shape, tuple(category.values()), tuple(ids), tuple(category), np.ones(len(ids)), files)


def read_json(path: str | Path, what: str) -> Any:
    """The content of a JSON file, or a UserError."""
    file = existing_file(path, what)
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as e:
        raise UserError(f"{what} '{path}' is not valid JSON: {e}") from e


def found_from_coco(path: str | Path, truth: Truth) -> Found:
    """Detections from a file in COCO's result format (a list of image_id, category_id, bbox, score)."""
    data = read_json(path, "prediction file")
    if not isinstance(data, list):
        raise UserError(f"'{path}' is not a COCO result file; expected a list of image_id, category_id, bbox, score")
    number = {image_id: i for i, image_id in enumerate(truth.image_ids)}
    class_of = {category_id: c for c, category_id in enumerate(truth.category_ids)}
    rows, unknown = [], 0
    for i, entry in enumerate(data):
        try:
            image, category, box, score = (entry[k] for k in ("image_id", "category_id", "bbox", "score"))
            x, y, w, h = map(float, box)
            score = float(score)
        except (KeyError, TypeError, ValueError) as e:
            raise UserError(
                f"'{path}' entry {i} lacks a usable image_id, category_id, bbox or score ({type(e).__name__}: {e})"
            ) from e
        if image not in number:
            raise UserError(f"'{path}' entry {i} is for image_id {image!r}, which the annotation file does not have")
        if category not in class_of:
            unknown += 1
            continue
        rows.append((number[image], class_of[category], x, y, w, h, score))
    if unknown:
        LOGGER.warning(
            f"{unknown} of {len(data)} predictions have a category_id that the annotation file lacks; left out"
        )
    table = np.array(rows, np.float64).reshape(-1, 7)
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
    """Image ids without an annotation file: the file names where these are different numbers, else 0, 1, ..."""
    numeric = all(stem.isascii() and stem.isdigit() for stem in stems)
    ids = tuple(int(stem) for stem in stems) if numeric else ()
    return ids if ids and len(set(ids)) == len(ids) else tuple(range(len(stems)))
