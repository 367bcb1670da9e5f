"""Two classifiers on the same images: who is right where, how sure that is, and pictures of it."""

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from utils.core.errors import UserError
from utils.data.folder import ClassIndex
from utils.engine.evaluation.class_report import picture
from utils.engine.evaluation.classification import ClassResult


def disagreements(a: ClassResult, b: ClassResult) -> dict[str, np.ndarray]:
    """Image numbers by who is right: `both`, `only_a`, `only_b`, `neither`; the last two sorted by b's confidence."""
    if not np.array_equal(a.labels, b.labels):
        raise UserError("the two results are of different images; measure both models on the same split")
    sure = np.argsort(-b.confidence[:, 0], kind="stable")
    return {
        "both": np.flatnonzero(a.right & b.right),
        "only_a": np.flatnonzero(a.right & ~b.right),
        "only_b": sure[(~a.right & b.right)[sure]],
        "neither": sure[(~a.right & ~b.right)[sure]],
    }


def sign_test(one: int, other: int) -> float:
    """Two-sided exact p-value of `one` against `other` images that only one of two models gets right (McNemar)."""
    n, low = one + other, min(one, other)
    tail = sum(math.comb(n, k) for k in range(low + 1))
    return min(1.0, float(2 * tail / 2**n)) if n else 1.0


def compare_classes(
    results: tuple[ClassResult, ClassResult],
    labels: Sequence[str],
    index: ClassIndex,
    folder: str | Path,
    most: int = 8,
) -> dict[str, Any]:
    """Two classifiers on the same images: accuracies, who is right where, and the paper's Fig. 7 both ways.

    The pictures show images that one model gets wrong and the other right, with the label above and both predictions
    below; those that the right (for `neither`: the second) model is surest of come first.
    """
    a, b = results
    found = disagreements(a, b)
    found["only_a"] = found["only_a"][np.argsort(-a.confidence[found["only_a"], 0], kind="stable")]
    pictures = []
    for key in ("only_a", "only_b"):
        chosen = found[key][:most]
        lines = [
            (a.names[a.labels[i]], [f"A: {a.names[a.top[i, 0]]}", f"B: {b.names[b.top[i, 0]]}"])
            for i in chosen.tolist()
        ]
        path = picture(index, chosen, lines, Path(folder) / f"{key}_right.jpg")
        pictures += [path.name] if path else []
    counts = {key: len(images) for key, images in found.items()}
    return {
        "A": {"name": labels[0], **a.metrics},
        "B": {"name": labels[1], **b.metrics},
        "images": counts,
        "p_value": sign_test(counts["only_a"], counts["only_b"]),
        "pictures": pictures,
    }


def comparison_lines(content: dict[str, Any]) -> str:
    """The console's table of `compare_classes`; of two paths, what follows the folders that they share."""
    sides = [content["A"], content["B"]]
    shared = os.path.commonprefix([side["name"] for side in sides]).rfind("/") + 1
    names = [f"{letter}: {side['name'][shared:]}" for letter, side in zip("AB", sides, strict=True)]
    width = max(22, *map(len, names))
    rows = [f"{'':>{width}}{'top1_acc':>11}{'top5_acc':>11}"]
    rows += [f"{n:>{width}}{s['top1']:>11.4f}{s['top5']:>11.4f}" for n, s in zip(names, sides, strict=True)]
    n = content["images"]
    rows.append(
        f"both right {n['both']}, only A {n['only_a']}, only B {n['only_b']}, neither {n['neither']}; "
        f"p = {content['p_value']:.3g} that the two single counts differ by chance (exact sign test)"
    )
    return "\n".join(rows)
