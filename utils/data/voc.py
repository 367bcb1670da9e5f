"""Pascal VOC XML, read and written: one file an image, pixel corners counted from 1 and inclusive.

A box `xmin ymin xmax ymax` covers the pixels from (xmin - 1, ymin - 1) up to (xmax, ymax). Objects marked `difficult`
are ignore regions, as crowds are: neither learned nor counted as missed. XML with a document type is refused, since
entities can make a small file explode.
"""

import os
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from utils.core.files import nearest
from utils.data.images import read_regular
from utils.data.labels import MAX_LABEL_BYTES, Issue, Labels, no_labels
from utils.data.problems import spelled_out


def read_voc(path: str | Path, hw: tuple[int, int], names: tuple[str, ...]) -> tuple[Labels, list[Issue], bool]:
    """Labels of an image of height and width `hw`, what is wrong with the file, and whether there is a file.

    The line of an issue is the number of the object in the file, from 1.
    """
    try:
        data = read_regular(path, MAX_LABEL_BYTES)
    except FileNotFoundError:
        if os.path.islink(path):
            return no_labels(), [_unreadable("is a link to nothing")], True
        return no_labels(), [], False
    except OSError as error:
        return no_labels(), [_unreadable(f"cannot be read ({error.strerror or error})")], True
    if b"<!DOCTYPE" in data or b"<!ENTITY" in data or b"\0" in data:
        return no_labels(), [_unreadable("has a document type or zero bytes; expected plain XML in UTF-8")], True
    try:
        root = ElementTree.fromstring(data)
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        return no_labels(), [_unreadable(f"is not valid XML ({' '.join(str(error).split())[:80]})")], True
    labels, issues = _objects(root, names)
    size = root.find("size")
    said = tuple(_number(size, key) for key in ("height", "width")) if size is not None else (None, None)
    if all(said) and said != hw:
        issues.append(_unreadable(f"says {said[1]:.0f} x {said[0]:.0f} px, but the image has {hw[1]} x {hw[0]}"))
    return labels, issues, True


def _unreadable(detail: str) -> Issue:
    return Issue("label-unreadable", 0, detail)


def _objects(root: ElementTree.Element, names: tuple[str, ...]) -> tuple[Labels, list[Issue]]:
    numbers = {name: i for i, name in enumerate(names)}
    rows: list[tuple] = []
    issues: list[Issue] = []
    for place, item in enumerate(root.iter("object"), 1):
        name = (item.findtext("name") or "").strip()
        found = [_number(item.find("bndbox"), key) for key in ("xmin", "ymin", "xmax", "ymax")]
        box = [value for value in found if value is not None]
        if name not in numbers:
            issues.append(Issue("voc-class", place, f"has class '{name[:60]}'{nearest(name, names)}"))
        elif len(box) < 4:
            issues.append(Issue("label-format", place, f"has a '{name}' without four numbers in its bndbox"))
        else:
            difficult = (item.findtext("difficult") or "").strip() == "1"
            x1, y1, x2, y2 = box
            rows.append((numbers[name], place, difficult, x1 - 1, y1 - 1, x2, y2))
    if not rows:
        return no_labels(), issues
    table = np.array(rows, np.float64)
    crowd = table[:, 2].astype(bool)
    return Labels(table[:, 0].astype(np.int32), table[:, 3:7], table[:, 1].astype(np.int32), crowd=crowd), issues


def _number(parent: ElementTree.Element | None, key: str) -> float | None:
    try:
        value = float(parent.findtext(key) or "") if parent is not None else None
    except ValueError:
        return None
    return value if value is not None and -1e12 < value < 1e12 else None


def voc_xml(file_name: str, hw: tuple[int, int], objects: Iterable[tuple[str, Sequence[float], bool]]) -> bytes:
    """The XML of one image; `objects` are (class name, xyxy in pixels, difficult).

    Corners that are no whole pixels keep their decimals. Class names are plain text without control codes, and
    without spaces at their ends.
    """
    root = ElementTree.Element("annotation")
    ElementTree.SubElement(root, "filename").text = spelled_out(file_name)
    size = ElementTree.SubElement(root, "size")
    for key, value in (("width", hw[1]), ("height", hw[0]), ("depth", 3)):
        ElementTree.SubElement(size, key).text = str(value)
    for name, (x1, y1, x2, y2), difficult in objects:
        item = ElementTree.SubElement(root, "object")
        ElementTree.SubElement(item, "name").text = name
        ElementTree.SubElement(item, "difficult").text = str(int(difficult))
        box = ElementTree.SubElement(item, "bndbox")
        for key, value in (("xmin", x1 + 1), ("ymin", y1 + 1), ("xmax", x2), ("ymax", y2)):
            ElementTree.SubElement(box, key).text = f"{value:.8g}"
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="utf-8", xml_declaration=True)
