"""Speed of making training samples on one core: the fast path against the classic canvas, in one run.

    python benchmarks/loader.py [--images FOLDER] [--imgsz 640] [--count 256] [--rounds 5]

640x480 JPEGs to 640x640 mosaic samples with the default recipe. The classic path gets its random draws for free. Rounds
of the two paths alternate; the clock is the CPU time of this process, and the best round of each counts.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.classic import classic_sample, resized  # noqa: E402
from utils.core.hyp import Hyp  # noqa: E402
from utils.data.dataset import DetectionDataset  # noqa: E402
from utils.data.images import read_image  # noqa: E402
from utils.data.order import epoch_order  # noqa: E402

HW = (480, 640)


@dataclass(frozen=True)
class PlainIndex:
    """The parts of a label index that a dataset reads, filled with random boxes."""

    files: Sequence[Path]
    shapes: np.ndarray
    offsets: np.ndarray
    cls: np.ndarray
    boxes: np.ndarray
    crowd: np.ndarray
    poly_offsets: np.ndarray
    poly_xy: np.ndarray
    key: str

    def __len__(self) -> int:
        return len(self.files)

    def file(self, i: int) -> Path:
        return self.files[i]


def random_index(files: Sequence[Path], hw: tuple[int, int] = HW, mean: int = 7, seed: int = 0) -> PlainIndex:
    """Boxes of COCO's density and sizes."""
    rng = np.random.default_rng(seed)
    counts = rng.poisson(mean, len(files))
    m = int(counts.sum())
    size = np.exp(rng.uniform(np.log(8), np.log(300), (m, 2)))
    center = rng.random((m, 2)) * hw[::-1]
    boxes = np.concatenate([center - size / 2, center + size / 2], 1).clip(0, np.array(hw[::-1] * 2))
    return PlainIndex(
        files,
        np.tile(np.array([hw], np.int32), (len(files), 1)),
        np.concatenate([[0], np.cumsum(counts)]),
        rng.integers(0, 80, m).astype(np.int32),
        boxes.astype(np.float32),
        np.zeros(m, bool),
        np.zeros(m + 1, np.int64),
        np.zeros((0, 2), np.float32),
        f"benchmark-{time.time_ns():x}",
    )


def textured(rng: np.random.Generator, hw: tuple[int, int] = HW) -> np.ndarray:
    """A drawn picture with detail at all scales, about as costly to decode as a photograph."""
    image = np.zeros((*hw, 3), np.float32)
    for octave in range(8):
        cells = 2 ** (octave + 1)
        noise = rng.normal(0, 1, (cells, cells, 3)).astype(np.float32)
        image += cv2.resize(noise, hw[::-1], interpolation=cv2.INTER_CUBIC) * 60 / (octave + 1)
    return np.clip(image + 120, 0, 255).astype(np.uint8)


def write_images(folder: Path, count: int, source: Path | None) -> list[Path]:
    """`count` JPEGs of 640x480: photographs from `source`, resized, else drawn ones."""
    photos = sorted(p for p in source.rglob("*") if p.suffix.lower() in (".jpg", ".png")) if source else []
    if source and not photos:
        raise SystemExit(f"no JPEG or PNG files under {source}")
    rng, files = np.random.default_rng(0), []
    for number in range(count):
        image = cv2.resize(read_image(photos[number % len(photos)]), HW[::-1]) if photos else textured(rng)
        files.append(folder / f"{number:05d}.jpg")
        cv2.imwrite(str(files[-1]), image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 90])
    return files


def clock(work: Callable[[int], object], count: int) -> float:
    """CPU seconds of one round."""
    start = time.process_time()
    for position in range(count):
        work(position)
    return time.process_time() - start


def compare(name: str, paths: dict[str, Callable[[int], object]], count: int, rounds: int) -> dict[str, float]:
    """Images a second of each path, best round, with their ratio printed."""
    best = dict.fromkeys(paths, float("inf"))
    for work in paths.values():
        clock(work, min(count, 32))
    for _ in range(rounds):
        for path, work in paths.items():
            best[path] = min(best[path], clock(work, count))
    rates = {path: count / seconds for path, seconds in best.items()}
    classic, fast = rates["classic"], rates["fast"]
    print(f"{name:10s} classic {classic:7.1f} images/s   fast {fast:7.1f} images/s   ratio {fast / classic:.2f}")
    return rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, help="folder of photographs to use (default: drawn pictures)")
    parser.add_argument("--imgsz", type=int, default=640)
    parser.add_argument("--count", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    cv2.setNumThreads(1)
    hyp, count = Hyp(), options.count
    with tempfile.TemporaryDirectory() as folder:
        index = random_index(write_images(Path(folder), count, options.images))
        order = epoch_order(count, 0, 0)
        disk = DetectionDataset(index, options.imgsz, hyp, augment=True)
        cached = DetectionDataset(index, options.imgsz, hyp, augment=True, cache="ram")
        plans = [disk.plan(0, position, int(order[position])) for position in range(count)]
        images = [resized(read_image(path), options.imgsz) for path in index.files]
        out = np.empty((options.imgsz, options.imgsz, 3), np.uint8)

        def classic(read: Callable[[int], np.ndarray]) -> Callable[[int], object]:
            return lambda position: classic_sample(plans[position], read, disk.objects, hyp)

        def fast(dataset: DetectionDataset) -> Callable[[int], object]:
            return lambda position: dataset.sample(0, position, int(order[position]), out=out)

        def fast_from_disk(position: int) -> object:
            nonlocal disk
            if position == 0:  # each round begins with nothing decoded
                disk = DetectionDataset(index, options.imgsz, hyp, augment=True)
            return disk.sample(0, position, int(order[position]), out=out)

        print(f"{count} JPEGs of {HW[1]}x{HW[0]} to {options.imgsz} px mosaics, one core")
        rates = {}
        rates["cached"] = compare(
            "cached", {"classic": classic(images.__getitem__), "fast": fast(cached)}, count, options.rounds
        )
        cached.close()
        from_disk = classic(lambda i: resized(read_image(index.file(i)), options.imgsz))
        rates["from disk"] = compare("from disk", {"classic": from_disk, "fast": fast_from_disk}, count, options.rounds)
    ratios = {name: {**r, "ratio": r["fast"] / r["classic"]} for name, r in rates.items()}
    print(json.dumps({"benchmark": "loader", "imgsz": options.imgsz, "images": count, "images_per_second": ratios}))


if __name__ == "__main__":
    main()
