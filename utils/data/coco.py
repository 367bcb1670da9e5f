"""COCO JSON as it is: sparse category ids, crowds, polygons and run-length masks, records that lie.

`read_coco` gives the image records of the files, with the annotations of each; `labels_of` turns one image's
annotations into `Labels` once the size of the picture is known. Nothing here opens a picture.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from utils.core.errors import UserError
from utils.core.files import atomic_write, cache_dir, nearest
from utils.data.images import read_regular
from utils.data.labels import NO_POLYGON, Issue, Labels, no_labels
from utils.data.masks import decode_rle, join_rings, mask_polygon, rle_box
from utils.data.problems import DROPPED, LEFT_OUT, Problem

INT64 = 2**63
MAX_JSON_BYTES = 2**33


@dataclass
class CocoImage:
    """An image record and its annotations, as they stand in the file."""

    path: str  # where the picture should be
    name: str
    id: int
    size: tuple[int, int] | None  # height, width
    annotations: list[dict] = field(default_factory=list)


@dataclass
class CocoFile:
    """What a split's annotation files say."""

    images: list[CocoImage]
    classes: dict[int, int]  # category id -> class number
    category_ids: list[int]  # by class number
    problems: list[Problem]
    source: str  # the (first) JSON file, for messages
    own_ids: bool = True  # whether the ids of images and categories are those of the files, as written there


def load_json(path: Path) -> dict[str, Any]:
    """A JSON file whose top level is a COCO object with lists of images, annotations and categories."""
    try:
        data = json.loads(read_regular(path, MAX_JSON_BYTES).decode("utf-8-sig"))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}); expected a COCO JSON file") from error
    except (ValueError, RecursionError) as error:
        problem = " ".join(str(error).split())[:120]
        raise UserError(
            f"{path} is not valid JSON ({problem}); expected a COCO file, perhaps it was cut off"
        ) from error
    if not isinstance(data, dict):
        raise UserError(
            f"{path} holds a {type(data).__name__}; expected an object with images, annotations, categories"
        )
    for key in ("images", "categories"):
        if not isinstance(data.get(key), list):
            raise UserError(f"{path} has no list '{key}'; expected a COCO file with images, annotations and categories")
    if not isinstance(data.setdefault("annotations", []), list):
        raise UserError(f"{path}: 'annotations' is a {type(data['annotations']).__name__}; expected a list")
    return data


def category_names(files: Iterable[Path]) -> tuple[str, ...]:
    """The category names of the first file that exists, by rising id; remembered, since the files can be huge."""
    path = next((file for file in files if file.is_file()), None)
    if path is None:
        return ()
    status = path.stat()
    stamp = [str(path), status.st_size, status.st_mtime_ns]
    note = cache_dir("categories") / f"{hashlib.blake2b(os.fsencode(path), digest_size=12).hexdigest()}.json"
    try:
        known = json.loads(note.read_text(encoding="utf-8"))
        if known["stamp"] == stamp:
            return tuple(known["names"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # not remembered yet, or not by this version
    names = [name for _, name in sorted(_categories(path, load_json(path)["categories"]).items())]
    with atomic_write(note, "w") as file:
        json.dump({"stamp": stamp, "names": names}, file)
    return tuple(names)


def _categories(path: Path, records: list) -> dict[int, str]:
    names: dict[int, str] = {}
    for i, record in enumerate(records):
        number = whole(record.get("id")) if isinstance(record, dict) else None
        if number is None or not isinstance(record.get("name"), str):
            raise UserError(
                f"{path}: category {i} is {str(record)[:60]}; expected an object with a whole 'id' and a 'name'"
            )
        if number in names:
            raise UserError(f"{path}: category id {number} is given twice ('{names[number]}' and '{record['name']}')")
        names[number] = record["name"]
    return names


def whole(value: Any) -> int | None:
    """An id as a 64-bit number: whole numbers, and text that is one; None for anything else."""
    if isinstance(value, str) and value.isascii() and value.removeprefix("-").isdigit() and len(value) < 20:
        value = int(value)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) and -INT64 <= value < INT64 else None


def _text_ids(records: list) -> bool:
    """Whether any id is text, even where that spells a number."""
    return any(isinstance(record, dict) and isinstance(record.get("id"), str) for record in records)


def _key(value: Any) -> int | str | None:
    """An id to look up by: a whole number where it is one, else the text itself; None for anything else."""
    number = whole(value)
    return number if number is not None else value if isinstance(value, str) else None


def number(value: Any) -> bool:
    """Whether a JSON value is a number of sane size."""
    return type(value) in (int, float) and -1e12 < value < 1e12


def read_coco(files: tuple[Path, ...], folders: tuple[Path, ...], root: Path, names: tuple[str, ...]) -> CocoFile:
    """The image records of COCO files, whose pictures lie in `folders` (or beside the file, or under `root`)."""
    result = CocoFile([], {}, [], [], str(files[0]))
    own: dict[str, int] = {}
    by_path: dict[str, CocoImage] = {}
    taken: set[int] = set()
    for path in files:
        data = load_json(path)
        categories = _categories(path, data["categories"])
        classes = _classes(path, categories, data["annotations"], names, own)
        places = [*folders, root, path.parent]
        images = _images(path, data["images"], places, by_path, result.problems)
        _attach(path, data["annotations"], images, classes, result.problems)
        result.own_ids &= not _text_ids(data["images"]) and not _text_ids(data["categories"])
        fresh = list(images.values())
        if any(image.id in taken for image in fresh):  # files that number their images independently
            result.own_ids = False
            start = max(taken) + 1
            for offset, image in enumerate(fresh):
                image.id = start + offset
        taken.update(image.id for image in fresh)
        result.images += fresh
    result.images.sort(key=lambda image: (_first_folder(image.path, folders), image.path))  # as folders are listed
    free = iter(range(max(own.values(), default=0) + 1, INT64))
    result.category_ids = [own[name] if name in own else next(free) for name in names]
    return result


def _first_folder(path: str, folders: tuple[Path, ...]) -> int:
    return next((i for i, folder in enumerate(folders) if path.startswith(os.path.join(folder, ""))), len(folders))


def _classes(
    path: Path, categories: dict[int, str], annotations: list, names: tuple[str, ...], own: dict[str, int]
) -> dict[int, int]:
    """Category id -> class number, by name. `own` collects the id of each name."""
    used = {whole(a.get("category_id")) for a in annotations if isinstance(a, dict)}
    numbers = {name: i for i, name in enumerate(names)}
    if len(numbers) < len(names):
        twice = next(name for i, name in enumerate(names) if numbers[name] != i)
        raise UserError(f"the class name '{twice}' is given twice; COCO categories are matched by name")
    classes: dict[int, int] = {}
    holder: dict[str, int] = {}
    for number, name in categories.items():
        if name not in numbers:
            if number in used:
                hint = nearest(name, names) or "; add it to 'names:', or remove 'names:' to use the file's own"
                raise UserError(f"{path}: category '{name}' (id {number}) is not among the data set's names{hint}")
            continue
        if name in holder and number in used and holder[name] in used:
            raise UserError(f"{path}: categories {holder[name]} and {number} are both named '{name}'; rename one")
        if name not in holder or number in used:
            holder[name] = number
        classes[number] = numbers[name]
    for name, number in holder.items():
        own.setdefault(name, number)
    return classes


def _images(
    path: Path, records: list, places: list[Path], by_path: dict[str, CocoImage], problems: list[Problem]
) -> dict[Any, CocoImage]:
    """Image records by their id as written."""
    images: dict[Any, CocoImage] = {}
    first: dict[str, tuple[int, str]] = {}
    counts: dict[str, int] = {}
    textual = False
    folders = [str(place) for place in places]

    def note(kind: str, detail: str) -> None:
        first.setdefault(kind, (0, detail))
        counts[kind] = counts.get(kind, 0) + 1

    for i, record in enumerate(records):
        name = record.get("file_name") if isinstance(record, dict) else None
        key = _key(record.get("id")) if isinstance(record, dict) else None
        if not isinstance(name, str) or not name or "\0" in name or key is None:
            note("coco-record", f"has image record {i} without a usable id and file_name: {str(record)[:60]}")
            continue
        if key in images:
            note("coco-repeated", f"gives image id {key} to '{images[key].name}' and '{name}'")
            continue
        place = _place(name, folders)
        if place is None:
            note("coco-record", f"has image record {i} outside the data set's folders: '{name[:80]}'")
            continue
        if place in by_path:
            note("coco-repeated", f"has two image records for '{name}'")
            continue
        height, width = whole(record.get("height")), whole(record.get("width"))
        size = (height, width) if height and width and height > 0 and width > 0 else None
        textual |= not isinstance(key, int)
        images[key] = by_path[place] = CocoImage(place, name, key if isinstance(key, int) else 0, size)
    if textual:
        for i, image in enumerate(images.values()):
            image.id = i
    for kind, (_, detail) in first.items():
        problems.append(Problem(kind, str(path), LEFT_OUT, detail, count=counts[kind], images=counts[kind]))
    return images


def _place(name: str, folders: list[str]) -> str | None:
    """Where an image lies: in the first folder that has it, else in the first; None if its name leads out of all."""
    if os.sep == "/" and "\\" in name and "/" not in name:  # written on Windows, unless there is such a file
        known = any(os.path.lexists(os.path.join(folder, name)) for folder in folders)
        name = name if known else name.replace("\\", "/")
    inside = []
    for folder in folders:
        path = os.path.normpath(os.path.join(folder, name))
        if any(path.startswith(os.path.join(other, "")) for other in folders):
            inside.append(path)
    if len(inside) < 2:
        return inside[0] if inside else None
    return next((path for path in inside if os.path.lexists(path)), inside[0])


def _attach(
    path: Path, records: list, images: dict[Any, CocoImage], classes: dict[int, int], problems: list[Problem]
) -> None:
    """Hand each annotation to its image, with its class number and a word on where it stands."""
    first: dict[str, str] = {}
    counts: dict[str, int] = {}
    for i, record in enumerate(records):
        kind = detail = ""
        key = _key(record.get("image_id")) if isinstance(record, dict) else None
        image = images.get(key)
        category = whole(record.get("category_id")) if isinstance(record, dict) else None
        if key is None:
            kind, detail = "coco-record", f"has annotation record {i} without an image_id: {str(record)[:60]}"
        elif image is None:
            kind, detail = "coco-reference", f"has annotation record {i} of the unknown image {key!r}"
        elif category not in classes:
            kind, detail = "coco-reference", f"has annotation record {i} of the unknown category {category!r}"
        if image is not None and category in classes:
            record["class"], record["record"] = classes[category], i
            image.annotations.append(record)
        else:
            first.setdefault(kind, detail)
            counts[kind] = counts.get(kind, 0) + 1
    for kind, detail in first.items():
        problems.append(Problem(kind, str(path), DROPPED, detail, count=counts[kind]))


# ---------------------------------------------------------------------------------------------------- one image


def labels_of(image: CocoImage, raw_hw: tuple[int, int], orientation: int) -> tuple[Labels, list[Issue]]:
    """The objects of an image record, in pixels of the upright picture.

    `raw_hw` is the size that the record refers to; with an `orientation` of 5 to 8 it is the size before EXIF rotation,
    and the objects are rotated along. Issues carry the number of the annotation record as their line.
    """
    issues: list[Issue] = []
    rows: list[tuple] = []
    polygons: list[np.ndarray] = []
    for record in image.annotations:
        place = record["record"]
        crowd = bool(record.get("iscrowd"))
        polygon, box = _shape(record, raw_hw, crowd)
        if box is None:
            issues.append(Issue("coco-record", place, f"has the bbox {str(record.get('bbox'))[:60]}"))
            continue
        area = record.get("area")
        known = area is not None and number(area) and area >= 0
        rows.append((record["class"], place, area if known else math.nan, crowd, *box))
        polygons.append(polygon)
    if not rows:
        return no_labels(), issues
    table = np.array(rows, np.float64)
    xyxy = table[:, 4:8]
    if orientation > 1:
        xyxy = turn_boxes(xyxy, raw_hw, orientation)
        polygons = [turn_points(p, raw_hw, orientation) for p in polygons]
    labels = Labels(
        cls=table[:, 0].astype(np.int32),
        xyxy=xyxy,
        lines=table[:, 1].astype(np.int32),
        area=table[:, 2],
        crowd=table[:, 3].astype(bool),
        polygons=polygons if any(len(p) for p in polygons) else None,
    )
    return labels, issues


def _shape(record: dict, hw: tuple[int, int], crowd: bool) -> tuple[np.ndarray, list[float] | None]:
    """Polygon (empty if none or crowd) and corners of an annotation; a missing box comes from the shape."""
    bbox, segmentation = record.get("bbox"), record.get("segmentation")
    box = None
    if isinstance(bbox, list) and len(bbox) == 4 and all(map(number, bbox)):
        x, y, w, h = bbox
        box = [x, y, x + w, y + h]
    elif bbox not in (None, []):
        return NO_POLYGON, None
    if isinstance(segmentation, list) and segmentation and (not crowd or box is None):
        polygon = join_rings(segmentation)
        if len(polygon) and box is None:
            box = [*polygon.min(0).tolist(), *polygon.max(0).tolist()]
        return polygon, box
    if isinstance(segmentation, dict) and (not crowd or box is None):
        mask = decode_rle(segmentation, hw)
        if mask is None:
            return NO_POLYGON, box
        box = box or rle_box(mask)
        return (NO_POLYGON if crowd else mask_polygon(mask)), box
    return NO_POLYGON, box


def turn_points(xy: np.ndarray, hw: tuple[int, int], orientation: int) -> np.ndarray:
    """Points [n, 2] of a picture of `hw` as stored, after its EXIF orientation is applied."""
    x, y = xy[:, 0], xy[:, 1]
    h, w = hw
    turned = {
        1: (x, y), 2: (w - x, y), 3: (w - x, h - y), 4: (x, h - y),
        5: (y, x), 6: (h - y, x), 7: (h - y, w - x), 8: (y, w - x),
    }[orientation]  # fmt: skip
    return np.stack(turned, 1).astype(xy.dtype)


def turn_boxes(xyxy: np.ndarray, hw: tuple[int, int], orientation: int) -> np.ndarray:
    """Corner boxes [n, 4], like `turn_points`."""
    a, b = turn_points(xyxy[:, :2], hw, orientation), turn_points(xyxy[:, 2:], hw, orientation)
    return np.concatenate([np.minimum(a, b), np.maximum(a, b)], 1)
