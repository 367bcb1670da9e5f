"""Image classification data: folders of class folders, Tiny ImageNet's own layout, CIFAR-10 and -100.

A split becomes a `ClassIndex` (images and labels), a `ClassDataset` makes samples of it, each a pure function of (seed,
epoch, position, image). The loaders are those of detection.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from utils.core.errors import UserError
from utils.core.hyp import Hyp
from utils.data.augment import Flip, Hsv, finish, generator
from utils.data.dataset import Sample
from utils.data.images import IMAGE_SUFFIXES, read_image
from utils.data.order import SAMPLE
from utils.data.spec import DataSpec

ANNOTATIONS = "val_annotations.txt"
CIFAR_FILES = {"CIFAR10": ("data_batch_1", "test_batch"), "CIFAR100": ("train", "test", "meta")}
FULL_BOX = np.array([[0.5, 0.5, 1.0, 1.0]], np.float32)


@dataclass(frozen=True)
class ClassIndex:
    """Images of a split with one label each. Either `files` or `pixels` (uint8 [n, h, w, 3] RGB) holds the images."""

    labels: np.ndarray  # int64 [n]
    names: tuple[str, ...]
    files: tuple[Path, ...] = ()
    pixels: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, i: int) -> np.ndarray:
        """Image number `i`, uint8 [h, w, 3] RGB."""
        if self.pixels is not None:
            return self.pixels[i]
        return read_image(self.files[i])

    def title(self, i: int) -> str:
        """What image number `i` is called in reports."""
        return str(self.files[i]) if self.files else f"image {i}"


def build_class_index(spec: DataSpec, split: str) -> ClassIndex:
    """The images and labels of a split; every image has one class, folders that name no class are refused."""
    folders = spec.require(split)
    keys = class_keys(spec)
    files: list[Path] = []
    labels: list[int] = []
    for folder in folders:
        if not folder.is_dir():
            raise UserError(
                f"{spec.yaml}: '{split}' names the file {folder}; expected a folder with one folder per class"
            )
        kind = cifar_kind(folder)
        if kind:
            return _cifar(spec, folder, kind, train=split == "train")
        found = _annotated(folder) if _annotation_file(folder) else _class_folders(folder)
        for path, key in found:
            if key not in keys:
                raise UserError(f"{path}: '{key}' is not one of the {len(keys)} classes of {spec.yaml} ({_few(keys)})")
            files.append(path)
            labels.append(keys[key])
    if not files:
        where = ", ".join(map(str, folders))
        raise UserError(f"{spec.yaml}: no images for '{split}:' in {where}; expected one folder of images per class")
    return ClassIndex(np.array(labels, np.int64), display_names(spec, keys), tuple(files))


def class_keys(spec: DataSpec) -> dict[str, int]:
    """Class number by folder name; folders match the data YAML's names where they carry them, else by their order."""
    declared = [list(spec.splits.get(split, ())) for split in ("train", "val")]
    folders = next(([f for f in places if f.is_dir()] for places in declared if any(f.is_dir() for f in places)), [])
    found = sorted({entry.name for f in folders if not _annotation_file(f) for entry in _class_entries(f)})
    if not found or set(found) <= set(spec.names):
        return {name: number for number, name in enumerate(spec.names)}
    if len(found) != spec.nc:
        raise UserError(
            f"{spec.yaml}: {spec.nc} names but {len(found)} class folders in {folders[0]} ({_few(found)}); "
            "expected one folder per name"
        )
    return {name: number for number, name in enumerate(found)}


def display_names(spec: DataSpec, keys: dict[str, int]) -> tuple[str, ...]:
    """Names to show: the data YAML's, or the folders' where it has none, in the words of a `words.txt` beside them."""
    names = list(spec.names)
    if names == [f"class{i}" for i in range(len(names))]:
        names = list(keys)
    folders = [folder.parent for folder in spec.splits.get("train") or spec.splits.get("val") or ()]
    table = next((f / "words.txt" for f in (spec.root, *folders) if (f / "words.txt").is_file()), None)
    if table is not None:
        rows = (
            line.rstrip("\n").split("\t") for line in table.read_text(encoding="utf-8", errors="replace").split("\n")
        )
        words = {row[0]: row[1].split(",")[0].strip() for row in rows if len(row) == 2}
        spoken = [words.get(name, name) for name in names]
        if len(set(spoken)) == len(spoken):
            return tuple(spoken)
    return tuple(names)


def _few(names: Sequence[str] | dict[str, int]) -> str:
    names = list(names)
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def _class_entries(folder: Path) -> list[Path]:
    return sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _class_folders(folder: Path) -> list[tuple[Path, str]]:
    """(image, class folder's name), sorted; images may lie deeper in their class folder (Tiny ImageNet's `images/`)."""
    found = []
    for entry in _class_entries(folder):
        images = (p for p in entry.rglob("[!.]*") if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())
        found += [(path, entry.name) for path in sorted(images)]
    return found


def _annotation_file(folder: Path) -> Path | None:
    """Tiny ImageNet's label file, in the folder or beside its `images` folder; None where class folders took over."""
    if any(entry.name != "images" for entry in _class_entries(folder)):
        return None
    places = (folder, folder.parent) if folder.name == "images" else (folder,)
    return next((place / ANNOTATIONS for place in places if (place / ANNOTATIONS).is_file()), None)


def _annotated(folder: Path) -> list[tuple[Path, str]]:
    """(image, class) of Tiny ImageNet's validation layout: rows of file name, class and a box, parted by tabs."""
    table = _annotation_file(folder)
    assert table is not None
    images = folder / "images" if (folder / "images").is_dir() else folder
    found = []
    for number, line in enumerate(table.read_text(encoding="utf-8-sig", errors="replace").splitlines(), 1):
        row = line.split("\t")
        if not line.strip():
            continue
        path = images / row[0]
        if len(row) < 2 or Path(row[0]).name != row[0] or not path.is_file():
            raise UserError(
                f"{table}:{number}: '{line[:60]}'; expected the name of an image in {images}, a tab, its class"
            )
        found.append((path, row[1].strip()))
    return sorted(found)


def cifar_kind(folder: Path) -> str:
    """`CIFAR10` or `CIFAR100` for a folder of the published Python archives, else an empty string."""
    return next((k for k, files in CIFAR_FILES.items() if all((folder / f).is_file() for f in files)), "")


def _cifar(spec: DataSpec, folder: Path, kind: str, train: bool) -> ClassIndex:
    """Read by torchvision, which accepts the published files only (by their checksums)."""
    from torchvision import datasets

    reader = getattr(datasets, kind)
    if folder.name != reader.base_folder:
        raise UserError(f"{folder} holds {kind}; torchvision expects the folder to be named {reader.base_folder}")
    try:
        data = reader(str(folder.parent), train=train, download=False)
    except (RuntimeError, OSError) as error:
        raise UserError(f"{folder}: the files of {kind} are damaged ({error}); fetch them again") from error
    if len(data.classes) != spec.nc:
        raise UserError(
            f"{spec.yaml}: {spec.nc} names for the {len(data.classes)} classes of {kind}; correct names: or nc:"
        )
    placeholder = list(spec.names) == [f"class{i}" for i in range(spec.nc)]
    names = tuple(data.classes) if placeholder else spec.names
    return ClassIndex(np.array(data.targets, np.int64), names, pixels=np.ascontiguousarray(data.data))


def channel_statistics(index: ClassIndex, most: int = 2000) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel in 0..1, over up to `most` images spread evenly over the split."""
    total, square, count = np.zeros(3), np.zeros(3), 0
    for i in np.unique(np.linspace(0, len(index) - 1, min(most, len(index))).astype(int)).tolist():
        pixels = index.image(i).reshape(-1, 3).astype(np.float64) / 255
        total, square, count = total + pixels.sum(0), square + (pixels**2).sum(0), count + len(pixels)
    mean = total / count
    deviation = np.sqrt(np.maximum(square / count - mean**2, 1e-4))
    return [round(v, 4) for v in mean.tolist()], [round(v, 4) for v in deviation.tolist()]


def resize_short(image: np.ndarray, size: int) -> np.ndarray:
    """The image with its shorter side at `size` pixels; the same array where it has that already."""
    h, w = image.shape[:2]
    if min(h, w) == size:
        return image
    gain = size / min(h, w)
    hw = (max(round(h * gain), size), max(round(w * gain), size))
    return cv2.resize(image, hw[::-1], interpolation=cv2.INTER_AREA if gain < 1 else cv2.INTER_LINEAR)


def cut(image: np.ndarray, top: int, left: int, size: int, out: np.ndarray) -> None:
    """The square of `size` whose corner is at (top, left) of the image, black where it lies outside, into `out`."""
    h, w = image.shape[:2]
    y1, y2, x1, x2 = max(top, 0), min(top + size, h), max(left, 0), min(left + size, w)
    if y2 - y1 < size or x2 - x1 < size:
        out[...] = 0
    if y1 < y2 and x1 < x2:
        out[y1 - top : y2 - top, x1 - left : x2 - left] = image[y1:y2, x1:x2]


def center_crop(image: np.ndarray, size: int, out: np.ndarray | None = None) -> np.ndarray:
    """What a classifier sees of an image: the shorter side at `size`, the middle square; uint8 [size, size, 3]."""
    image = resize_short(image, size)
    out = np.empty((size, size, 3), np.uint8) if out is None else out
    cut(image, (image.shape[0] - size) // 2, (image.shape[1] - size) // 2, size, out)
    return out


class ClassDataset:
    """Samples of a `ClassIndex` at `imgsz`; what the loaders of `utils.data.loader` ask for.

    With `augment`, hyp's `scale` (zoom by 1 +- scale), `translate` (a shift of up to that part of the side, whole
    pixels, black outside: "crop with padding"), `fliplr`, `flipud` and `hsv_*` apply; its other keys are detection's.
    The label stands in a sample as a box over the whole image.
    """

    rect = False
    stride = 1
    pad = 0.0

    def __init__(self, index: ClassIndex, imgsz: int, hyp: Hyp, *, augment: bool, seed: int = 0) -> None:
        self.index, self.imgsz, self.hyp, self.augment, self.seed = index, imgsz, hyp, augment, seed

    def __len__(self) -> int:
        return len(self.index)

    def sample(
        self,
        epoch: int,
        position: int,
        i: int,
        *,
        window: np.ndarray | None = None,
        hw: tuple[int, int] | None = None,
        out: np.ndarray | None = None,
    ) -> Sample:
        """The sample at a position of an epoch, drawn from (seed, epoch, position) alone; in `out` where given."""
        out = np.empty((self.imgsz, self.imgsz, 3), np.uint8) if out is None else out
        image = self.index.image(i)
        if self.augment:
            self._augmented(image, generator(self.seed, SAMPLE, epoch, position), out)
        else:
            center_crop(image, self.imgsz, out)
        return Sample(out, self.index.labels[i : i + 1].astype(np.float32), FULL_BOX, i, None)

    def _augmented(self, image: np.ndarray, rng: np.random.Generator, out: np.ndarray) -> None:
        size, hyp = self.imgsz, self.hyp
        zoom, down, right = rng.uniform(-1, 1, 3).tolist()
        image = resize_short(image, max(round(size * (1 + zoom * hyp.scale)), 1))
        reach = round(hyp.translate * size)
        corner = []
        for side, draw in zip(image.shape[:2], (down, right), strict=True):
            spare = side - size  # every crop inside the image, and `reach` pixels beyond, is equally likely
            low, high = min(spare, 0) - reach, max(spare, 0) + reach
            corner.append(low + min(int((draw + 1) / 2 * (high - low + 1)), high - low))
        square = np.empty_like(out)
        cut(image, corner[0], corner[1], size, square)
        finish(square, Hsv.draw(rng, hyp), Flip.draw(rng, hyp), out)
