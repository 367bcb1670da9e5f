"""Orders: which image stands at which position of an epoch, as pure functions; batches of similar shape."""

import itertools

import numpy as np

from utils.data.augment import generator

ORDER, SAMPLE = 0, 1  # streams of randomness under one seed
NEIGHBOURS = 8  # images of similar shape that share a rectangle in validation


def epoch_order(n: int, seed: int, epoch: int, weights: np.ndarray | None = None) -> np.ndarray:
    """Indices int64 [n] of one epoch: a permutation, or with `weights` [n] draws with replacement in proportion."""
    rng = generator(seed, ORDER, epoch)
    if weights is None:
        return rng.permutation(n)
    weights = np.asarray(weights, np.float64)
    assert weights.shape == (n,) and weights.sum() > 0, "one weight an image, not all zero"
    return rng.choice(n, n, p=weights / weights.sum())


def aspect_order(shapes: np.ndarray) -> np.ndarray:
    """Indices [n] by height / width of shapes (h, w) [n, 2], ties in the given order."""
    return np.argsort(shapes[:, 0] / shapes[:, 1], kind="stable")


def batch_shape(shapes: np.ndarray, imgsz: int, stride: int, pad: float) -> tuple[int, int]:
    """The smallest (height, width), multiples of `stride`, that holds images of these shapes [b, 2] resized to a long
    side of `imgsz`; `pad` is in strides (YOLOv5 validates with half a stride)."""
    ratios = shapes / shapes.max(1, keepdims=True)
    height, width = (int(np.ceil(side * imgsz / stride + pad)) * stride for side in ratios.max(0))
    return height, width


def eval_batches(
    shapes: np.ndarray, batch_size: int, imgsz: int, stride: int, pad: float
) -> list[tuple[np.ndarray, tuple[int, int]]]:
    """All images in order of aspect ratio as batches: indices, up to `batch_size`, with their (height, width).

    Every `NEIGHBOURS` images share the smallest rectangle that holds them, whatever the batch size: it is padding that
    the network sees, and the metrics of a data set shall depend neither on memory nor on the number of GPUs.
    """
    order = aspect_order(shapes)
    groups = [order[i : i + NEIGHBOURS] for i in range(0, len(order), NEIGHBOURS)]
    rectangles = [batch_shape(shapes[group], imgsz, stride, pad) for group in groups]
    batches = []
    for rectangle, run in itertools.groupby(zip(rectangles, groups, strict=True), key=lambda pair: pair[0]):
        indices = np.concatenate([group for _, group in run])
        batches += [(indices[i : i + batch_size], rectangle) for i in range(0, len(indices), batch_size)]
    return batches


def before(order: np.ndarray, position: int, size: int) -> np.ndarray:
    """Up to `size` entries of a circular order that stand before `position` (0: all); of a short order all, its own
    included."""
    return order[(position - 1 - np.arange(min(size or len(order), len(order)))) % len(order)]
