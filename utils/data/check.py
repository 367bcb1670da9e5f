"""What a data set holds, before anything is trained on it: counts, balance, sizes at the network's scale, and problems.

The numbers are plain values (`check`), so that they can be printed (`render`), written as JSON, or drawn
(`utils.data.check_picture`). `digest` is the three-line form that training prints.
"""

import math
import os
from collections.abc import Iterable, Sequence
from itertools import combinations
from typing import Any

import numpy as np

from utils.data.index import LabelIndex, build_index
from utils.data.listing import label_path
from utils.data.problems import KINDS, NOT_READ, Problem, spelled_out
from utils.data.spec import DataSpec

TINY = (2, 4, 8)  # px of the shorter side after resizing
EDGES = (0, 2, 4, 8, 16, 32, 64, 96, 128, 256, 512, math.inf)  # px of sqrt(width * height)
SHOWN_CLASSES = 100


def object_sizes(index: LabelIndex, imgsz: int) -> tuple[np.ndarray, np.ndarray]:
    """Width and height [m, 2] of every object that is learned from, in original pixels and resized to `imgsz`."""
    keep = ~index.crowd
    boxes = index.boxes[keep].astype(np.float64)
    sizes = boxes[:, 2:] - boxes[:, :2]
    scale = imgsz / np.maximum(index.shapes.max(1), 1)
    return sizes, sizes * scale[index.image_of_box[keep], None]


def digest(index: LabelIndex, imgsz: int, network: np.ndarray | None = None) -> list[str]:
    """Three lines: counts, class balance, and boxes that nearly vanish at the network's size.

    `network` are the sizes [m, 2] of the objects there, where the network sees something else than whole images.
    """
    report = index.report
    counts = np.bincount(index.cls[~index.crowd], minlength=index.nc)
    background = report.used - report.labeled
    first = f"{report.used:,} images ({background:,} without a box), {report.boxes:,} boxes of {index.nc} classes"
    if report.images > report.used:
        first += f"; {report.images - report.used:,} images left out"
    network = object_sizes(index, imgsz)[1] if network is None else network
    shorter = network.min(1) if len(network) else np.zeros(0)
    tiny = ", ".join(f"{_share(int((shorter < px).sum()), len(shorter))} under {px} px" for px in TINY)
    median = f"; median {np.median(network[:, 0]):.0f} x {np.median(network[:, 1]):.0f} px" if len(network) else ""
    return [first, _balance(index.names, counts), f"shorter side at {imgsz} px: {tiny}{median}"]


def _share(count: int, total: int) -> str:
    return f"{count:,} ({count / max(total, 1):.1%})"


def _balance(names: Sequence[str], counts: np.ndarray, most: int = 4) -> str:
    order = [int(i) for i in np.argsort(-counts, kind="stable") if counts[i]]
    text = ", ".join(f"{spelled_out(names[i])} {_share(int(counts[i]), int(counts.sum()))}" for i in order[:most])
    if len(order) > most:
        text += f", ...; rarest {spelled_out(names[order[-1]])} {counts[order[-1]]:,}"
    absent = len(counts) - len(order)
    return f"classes: {text}" + (f"; {absent} without any box" if absent else "")


# ---------------------------------------------------------------------------------------------------- the full check


def check(
    spec: DataSpec,
    imgsz: int,
    splits: Sequence[str] = (),
    *,
    policy: str = "clip",
    verify: bool = True,
    workers: int | None = None,
    rebuild: bool = False,
) -> tuple[dict[str, Any], dict[str, LabelIndex]]:
    """Everything about the splits (default: all declared) as plain values, and their indices.

    `verify` decodes every image and compares contents; without it, only headers are read.
    """
    indices = {
        split: build_index(spec, split, policy=policy, verify=verify, workers=workers, rebuild=rebuild, strict=False)
        for split in splits or spec.splits
    }
    result: dict[str, Any] = {"data": str(spec.yaml), "format": spec.format, "imgsz": imgsz, "names": list(spec.names)}
    result["splits"] = {}
    for split, index in indices.items():
        index.report.add(orphan_labels(spec, split, index))
        result["splits"][split] = summary(index, imgsz)
    result["duplicates"] = duplicates(indices) if verify else {}
    return result, indices


def summary(index: LabelIndex, imgsz: int) -> dict[str, Any]:
    """One split in numbers."""
    report = index.report
    original, network = object_sizes(index, imgsz)
    shorter = network.min(1) if len(network) else np.zeros(0)
    per_image = np.diff(np.concatenate([[0], np.cumsum(~index.crowd)])[index.offsets])
    counts = np.bincount(index.cls[~index.crowd], minlength=index.nc).tolist()
    areas = index.shapes.astype(np.int64).prod(1)
    ordered = index.shapes[np.argsort(areas, kind="stable")]
    return {
        "images": report.images,
        "used": report.used,
        "without_box": report.used - report.labeled,
        "without_label_file": report.without_file,
        "boxes": report.boxes,
        "crowds": report.crowds,
        "boxes_per_image": {"mean": float(per_image.mean()), "max": int(per_image.max())},
        "image_sizes_hw": {name: ordered[i].tolist() for name, i in _picks(len(ordered)).items()},
        "classes": dict(zip(_unlike(index.names), counts, strict=True)),
        "box_sizes": {"edges": [*EDGES[:-1], None], "original": _histogram(original), "network": _histogram(network)},
        "under_px": {str(px): int((shorter < px).sum()) for px in TINY},
        "counts": report.counts,
        "actions": report.actions,
        "problems": [vars(problem) for problem in report.problems],
    }


def _unlike(names: Sequence[str]) -> list[str]:
    """The class names, with their number where two are alike."""
    return [name if names.count(name) == 1 else f"{name} ({i})" for i, name in enumerate(names)]


def _picks(n: int) -> dict[str, int]:
    return {"smallest": 0, "median": n // 2, "largest": n - 1}


def _histogram(sizes: np.ndarray) -> list[int]:
    return np.histogram(np.sqrt(sizes.astype(np.float64).prod(1)), bins=np.array(EDGES))[0].tolist()


def duplicates(indices: dict[str, LabelIndex]) -> dict[str, list[list[str]]]:
    """Images of equal content: for each split and each pair of splits, [file, file] pairs."""
    first: dict[str, dict[bytes, int]] = {}
    found: dict[str, list[list[str]]] = {}
    for split, index in indices.items():
        seen: dict[bytes, int] = {}
        twice = []
        for i, digest_ in enumerate(index.digests):
            j = seen.setdefault(digest_.tobytes(), i)
            if j != i:
                twice.append([str(index.file(j)), str(index.file(i))])
        first[split], found[split] = seen, twice
    for a, b in combinations(indices, 2):
        common = [(first[a][content], i) for content, i in first[b].items() if content in first[a]]
        found[f"{a}/{b}"] = [[str(indices[a].file(i)), str(indices[b].file(j))] for i, j in common]
    return found


def orphan_labels(spec: DataSpec, split: str, index: LabelIndex) -> list[Problem]:
    """YOLO label files that belong to no image, in the label folders of the split's image folders."""
    if spec.format != "yolo":
        return []
    images = [str(index.file(i)) for i in range(len(index))] + index.unused
    known = {label_path(image) for image in images}
    problems = []
    for source in spec.splits[split]:
        if not source.is_dir():
            continue  # a list file may name a part of a folder
        folder = os.path.dirname(label_path(os.path.join(source, "x")))
        for path in sorted(_text_files(folder)):
            if path not in known:
                problems.append(Problem("label-orphan", path, NOT_READ, "belongs to no image"))
    return problems


def _text_files(folder: str) -> Iterable[str]:
    for current, _, names in os.walk(folder):
        yield from (os.path.join(current, name) for name in names if name.endswith(".txt") and name != "classes.txt")


def problem_count(result: dict[str, Any]) -> int:
    """Problems of all splits, each occurrence counted."""
    return sum(sum(split["counts"].values()) for split in result["splits"].values())


# ---------------------------------------------------------------------------------------------------- as text


def render(result: dict[str, Any], examples: int = 3) -> list[str]:
    """The check as lines of a table, with so many examples of each kind of problem."""
    splits: dict[str, dict] = result["splits"]
    lines = [
        f"{result['data']}: {len(result['names'])} classes, format {result['format']}, image size {result['imgsz']}"
    ]
    rows = [("", *splits)]
    for label, key in (("images", "images"), ("used", "used"), ("without a box", "without_box"), ("boxes", "boxes")):
        rows.append((label, *(f"{s[key]:,}" for s in splits.values())))
    rows.append(("crowd regions", *(f"{s['crowds']:,}" for s in splits.values())))
    rows.append(("boxes an image, mean", *(f"{s['boxes_per_image']['mean']:.1f}" for s in splits.values())))
    rows.append(("boxes an image, most", *(f"{s['boxes_per_image']['max']:,}" for s in splits.values())))
    for name in ("smallest", "median", "largest"):
        sizes = [s["image_sizes_hw"][name] for s in splits.values()]
        rows.append((f"{name} image", *(f"{w} x {h}" for h, w in sizes)))
    for px in TINY:
        rows.append((f"boxes under {px} px", *(_share(s["under_px"][str(px)], s["boxes"]) for s in splits.values())))
    lines += ["", *_table(rows), f"(shorter side, resized to {result['imgsz']} px)", ""]
    lines += [*_size_table(splits), "", *_class_table(splits), ""]
    for split, values in splits.items():
        lines += _problem_lines(split, values, examples)
    for where, pairs in result["duplicates"].items():
        if pairs:
            what = f"{len(pairs):,} images of equal content in {where.replace('/', ' and ')}"
            lines.append(spelled_out(f"{what}, e.g. {pairs[0][0]} and {pairs[0][1]}"))
    return lines


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _size_table(splits: dict[str, dict]) -> list[str]:
    heads = [f"{split}, {scale}" for split in splits for scale in ("original", "network")]
    rows = [("box size (square root of area)", *heads)]
    for i, low in enumerate(EDGES[:-1]):
        high = EDGES[i + 1]
        label = f"{low} to {high} px" if math.isfinite(high) else f"{low} px and more"
        cells = [f"{s['box_sizes'][scale][i]:,}" for s in splits.values() for scale in ("original", "network")]
        rows.append((label, *cells))
    return _table(rows)


def _class_table(splits: dict[str, dict]) -> list[str]:
    names = list(next(iter(splits.values()))["classes"])
    rows = [("class", *splits)]
    for name in names[:SHOWN_CLASSES]:
        cells = [_share(s["classes"].get(name, 0), s["boxes"]) for s in splits.values()]
        rows.append((spelled_out(name), *cells))
    more = [f"... and {len(names) - SHOWN_CLASSES} more classes"] if len(names) > SHOWN_CLASSES else []
    return _table(rows) + more


def _problem_lines(split: str, values: dict, examples: int) -> list[str]:
    if not values["counts"]:
        return [f"{split}: no problems"]
    lines = [f"{split}: " + ", ".join(f"{count:,} x {action}" for action, count in sorted(values["actions"].items()))]
    problems = [Problem(**problem) for problem in values["problems"]]
    for kind, count in sorted(values["counts"].items(), key=lambda item: -item[1]):
        lines.append(f"  {count:,} x {KINDS[kind]}")
        shown = [problem for problem in problems if problem.kind == kind]
        lines += [f"      {problem}" for problem in shown[:examples]]
        if len(shown) > examples:
            lines.append(f"      ... and in {len(shown) - examples:,} more places")
    return lines
