"""Converters between label formats, by way of the index: whatever can be read can be written as any other.

A converted data set is a new folder with `images/<split>/` (links or copies), the labels, and a `data.yaml`; the source
is left alone. What the target format cannot hold is counted and returned.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from utils.core.errors import UserError
from utils.core.yamls import dump_yaml
from utils.data.images import IMAGE_SUFFIXES, open_regular, sniff
from utils.data.index import LabelIndex, build_index
from utils.data.listing import label_path
from utils.data.spec import DataSpec
from utils.data.voc import voc_xml

TARGETS = ("yolo", "coco", "voc")
IMAGES = ("link", "copy")


@dataclass
class Converted:
    """What one split became."""

    images: int = 0
    boxes: int = 0
    lost: dict[str, int] = field(default_factory=dict)  # what the target cannot hold -> how many
    renamed: int = 0  # images that would not be found by their name, or whose label file another one would have had

    def lose(self, what: str, count: int) -> None:
        if count:
            self.lost[what] = self.lost.get(what, 0) + count


def convert(
    spec: DataSpec,
    to: str,
    output: str | Path,
    splits: Sequence[str] = (),
    *,
    images: str = "link",
    polygons: bool = False,
    policy: str = "clip",
) -> dict[str, Converted]:
    """Write `spec` in format `to` into the new folder `output`; returns what became of each split.

    `polygons`: YOLO lines are polygons where there are any (their extents are the boxes then), instead of boxes.
    """
    if to == "voc":
        _check_voc_names(spec.names)
    output = Path(os.path.abspath(output))
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output} exists already; expected the name of a new folder, nothing is overwritten")
    for source in (Path(os.path.abspath(path)) for split in splits or spec.splits for path in spec.require(split)):
        if source.is_dir() and source in output.parents:
            raise UserError(f"{output} lies among the images of {spec.yaml}; choose a folder elsewhere")
    output.parent.mkdir(parents=True, exist_ok=True)
    results: dict[str, Converted] = {}
    with tempfile.TemporaryDirectory(prefix=f".{output.name[:100]}-", dir=output.parent) as folder:
        made = Path(folder) / "made"
        data: dict = {"path": ".", **{split: f"images/{split}" for split in splits or spec.splits}}
        for split in splits or spec.splits:
            index = build_index(spec, split, policy=policy)
            result = results[split] = Converted(len(index))
            files = _place_images(index, made / "images" / split, to, images, result)
            if to == "yolo":
                _write_yolo(index, files, made / "images" / split, polygons, result)
            elif to == "voc":
                _write_voc(index, files, made / "annotations" / split, result)
                data.setdefault("annotations", {})[split] = f"annotations/{split}"
            else:
                _write_coco(index, files, made / "annotations" / f"{split}.json", spec.format, result)
                data.setdefault("annotations", {})[split] = f"annotations/{split}.json"
        if not any(result.boxes for result in results.values()):
            count = sum(result.images for result in results.values())
            raise UserError(
                f"{spec.yaml}: none of its {count:,} images has a labeled object, so there is nothing to convert; "
                "expected label files, or 'annotations:' that names COCO JSON or VOC folders"
            )
        data["names"] = dict(enumerate(spec.names))
        dump_yaml(made / "data.yaml", data)
        if output.exists():
            output.rmdir()
        made.rename(output)
    return results


def _place_images(index: LabelIndex, folder: Path, to: str, how: str, result: Converted) -> list[str]:
    """Link or copy the images; their names relative to `folder`, in order."""
    sources = [index.file(i) for i in range(len(index))]
    common = os.path.commonpath([source.parent for source in sources])
    taken: set[str] = set()
    names = []
    for source in sources:
        own = os.path.relpath(source, common)
        name = own if to == "coco" else _free_name(_findable_name(own, source), taken)
        result.renamed += name != own
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if how == "copy":
            shutil.copyfile(source, target)
        else:
            target.symlink_to(source)
        names.append(name)
    return names


def _findable_name(name: str, source: Path) -> str:
    """A name that shows up when the folder is listed: without hidden parts, and with the suffix of an image."""
    name = os.sep.join(f"_{part}" if part.startswith(".") else part for part in name.split(os.sep))
    if os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES:
        return name
    with open_regular(source) as file:
        kind = f".{sniff(file.read(32))}"
    return name + (kind if kind in IMAGE_SUFFIXES else ".jpg")


def _free_name(name: str, taken: set[str]) -> str:
    """The name with a number where its stem is `taken`: a.jpg and a.png cannot share a.txt or a.xml."""
    stem, suffix = os.path.splitext(name)
    free, number = stem, 2
    while free in taken:
        free, number = f"{stem}_{number}", number + 1
    taken.add(free)
    return free + suffix


def _write_yolo(index: LabelIndex, files: list[str], images: Path, polygons: bool, result: Converted) -> None:
    for i, name in enumerate(files):
        cls, boxes, crowd = index.labels(i)
        shapes = index.polygons(i)
        scale = index.shapes[i, ::-1].astype(np.float64)
        lines = []
        for k in np.flatnonzero(~crowd):
            if polygons and len(shapes[k]):
                values = shapes[k] / scale
            else:
                corners = boxes[k].astype(np.float64).reshape(2, 2) / scale
                values = np.stack([corners.mean(0), corners[1] - corners[0]])
                result.lose("polygons (kept with --polygons)", int(len(shapes[k]) > 0))
            lines.append(" ".join([str(cls[k]), *(f"{v:.8g}" for v in values.ravel())]) + "\n")
        result.boxes += len(lines)
        target = Path(label_path(str(images / name)))
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text("".join(lines))
    result.lose("crowd regions (or difficult objects)", int(index.crowd.sum()))
    _lose_areas_and_ids(index, ~index.crowd, result)


def _lose_areas_and_ids(index: LabelIndex, written: np.ndarray, result: Converted) -> None:
    """Count what only COCO JSON holds; `written` [m]: the objects that were written at all."""
    box_areas = np.diff(index.boxes.reshape(-1, 2, 2), axis=1)[:, 0].astype(np.float64).prod(1)
    known = ~np.isclose(index.areas, box_areas, rtol=1e-4) & written
    result.lose("areas of their own", int(known.sum()))
    result.lose("image ids", int((index.image_ids != np.arange(len(index))).sum()))
    result.lose("category ids", int((index.category_ids != np.arange(index.nc)).sum()))


def _write_voc(index: LabelIndex, files: list[str], folder: Path, result: Converted) -> None:
    for i, name in enumerate(files):
        cls, boxes, crowd = index.labels(i)
        rows = zip(cls.tolist(), boxes.tolist(), crowd.tolist(), strict=True)
        objects = [(str(index.names[c]), box, difficult) for c, box, difficult in rows]
        height, width = index.shapes[i].tolist()
        target = folder / (os.path.splitext(name)[0] + ".xml")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(voc_xml(os.path.basename(name), (height, width), objects))
        result.boxes += len(objects)
        result.lose("polygons", sum(len(polygon) > 0 for polygon in index.polygons(i)))
    _lose_areas_and_ids(index, np.ones(len(index.crowd), bool), result)


def _check_voc_names(names: Sequence[str]) -> None:
    """UserError where XML cannot hold the class names, or objects could not be told apart by them."""
    for name in names:
        if not name.isprintable() or name != name.strip() or not name:
            raise UserError(f"class name {name!r} cannot stand in VOC XML; expected printable text, no outer spaces")
        if list(names).count(name) > 1:
            raise UserError(f"class name {name!r} is given twice; VOC XML tells classes apart by name: rename one")


def _write_coco(index: LabelIndex, files: list[str], path: Path, source: str, result: Converted) -> None:
    first = 0 if source == "coco" else 1  # numbers of our own start at 1
    categories = [{"id": int(c) + first, "name": name} for c, name in zip(index.category_ids, index.names, strict=True)]
    images, annotations = [], []
    for i, name in enumerate(files):
        number = int(index.image_ids[i]) + first
        height, width = index.shapes[i].tolist()
        images.append({"id": number, "file_name": name.replace(os.sep, "/"), "width": width, "height": height})
        cls, boxes, crowd = index.labels(i)
        areas = index.areas[index.offsets[i] : index.offsets[i + 1]]
        for k, polygon in enumerate(index.polygons(i)):
            x1, y1, x2, y2 = boxes[k].tolist()
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": categories[cls[k]]["id"],
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": float(areas[k]),
                    "iscrowd": int(crowd[k]),
                    "segmentation": [polygon.ravel().tolist()] if len(polygon) else [],
                }
            )
    result.boxes = len(annotations)
    result.lose("masks of crowd regions (their boxes are kept)", int(index.crowd.sum()) if source == "coco" else 0)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8") as file:
        json.dump({"images": images, "annotations": annotations, "categories": categories}, file)
