"""The label index: every image of a split with its size and objects, in packed arrays, remembered between runs.

Labels and image sizes are read once (`utils.data.scan`) and kept as an npz in the user's cache folder, never beside the
data. The cache is valid as long as the path, size and modification time of every image and label file and the options
are the same. Arrays hold no Python objects, so that memory does not grow with the number of worker processes.
"""

import hashlib
import json
import os
import time
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from utils.core.errors import UserError
from utils.core.files import atomic_write, cache_dir
from utils.core.log import LOGGER
from utils.data.coco import CocoFile, CocoImage, labels_of, read_coco
from utils.data.labels import POLICIES, Issue, Labels, judge, no_labels, settle
from utils.data.listing import label_path, list_images, list_voc
from utils.data.problems import LEFT_OUT, USED, Problem, Report, refuse
from utils.data.scan import SMALL, SMALL_TO_VERIFY, Header, Job, Packer, Scan, scan
from utils.data.spec import DataSpec
from utils.ops.polygons import owners

SCHEMA = 4  # to be raised whenever what is read or how it is packed changes
_LABEL_KINDS = ("label-", "box-", "coco-record", "coco-reference", "voc-")


@dataclass(frozen=True)
class LabelIndex:
    """The used images of a split and their objects. Boxes are pixels of the upright original picture."""

    names: tuple[str, ...]  # classes; one name with single-class training
    report: Report
    key: str  # of everything that went in: files, options, schema
    unused: list[str]  # images of the split that could not be used
    own_ids: bool  # image_ids and category_ids are those of COCO files, as written there
    shapes: np.ndarray  # int32 [n, 2], height and width
    offsets: np.ndarray  # int64 [n + 1]: objects of image i are offsets[i] up to offsets[i + 1]
    cls: np.ndarray  # int32 [m]
    boxes: np.ndarray  # float32 [m, 4] xyxy
    areas: np.ndarray  # float64 [m]: the annotation's own, else width x height
    crowd: np.ndarray  # bool [m]: ignore regions, not for learning
    poly_offsets: np.ndarray  # int64 [m + 1]: points of the polygon of each object
    poly_xy: np.ndarray  # float32 [k, 2]
    image_ids: np.ndarray  # int64 [n]: the annotation file's own where `own_ids`
    category_ids: np.ndarray  # int64 [nc]: likewise
    paths: np.ndarray  # uint8: the file names, one after another
    path_offsets: np.ndarray  # int64 [n + 1]
    digests: np.ndarray  # uint8 [n, 16] of the files' content, or [0, 16] unless built with verify

    def __len__(self) -> int:
        return len(self.shapes)

    @property
    def image_of_box(self) -> np.ndarray:
        """Image number of every object, int64 [m]."""
        return owners(np.diff(self.offsets))

    @property
    def nc(self) -> int:
        """The number of classes."""
        return len(self.names)

    def file(self, i: int) -> Path:
        """The image file."""
        return Path(os.fsdecode(self.paths[self.path_offsets[i] : self.path_offsets[i + 1]].tobytes()))

    def labels(self, i: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Classes int32 [k], boxes float32 [k, 4] xyxy and crowd flags bool [k] of an image: views, to be read only."""
        part = slice(self.offsets[i], self.offsets[i + 1])
        return self.cls[part], self.boxes[part], self.crowd[part]

    def polygons(self, i: int) -> list[np.ndarray]:
        """A polygon float32 [points, 2] for each object of an image, of no points where it has none."""
        edges = self.poly_offsets[self.offsets[i] : self.offsets[i + 1] + 1].tolist()
        return [self.poly_xy[a:b] for a, b in zip(edges[:-1], edges[1:], strict=True)]

    @property
    def nbytes(self) -> int:
        """The size of the arrays in memory."""
        return sum(getattr(self, name).nbytes for name in _ARRAYS)

    def require_labels(self, source: str | Path) -> None:
        """UserError unless some image has an object to learn from."""
        if self.report.boxes:
            return
        tried = label_path(str(self.file(0)))
        raise UserError(
            f"{source}: none of the {len(self):,} images has a label (for {self.file(0)} it would be {tried}, unless "
            "'annotations:' names COCO JSON or VOC folders); correct the paths or add labels"
        )

    def save(self, path: str | Path) -> None:
        """Write as npz, without pickle."""
        words = {"names": self.names, "report": self.report.to_json(), "key": self.key, "unused": self.unused}
        text = json.dumps({**words, "own_ids": self.own_ids, "schema": SCHEMA}).encode()
        with atomic_write(path) as file:
            np.savez(file, words=np.frombuffer(text, np.uint8), **{name: getattr(self, name) for name in _ARRAYS})

    @staticmethod
    def load(path: str | Path) -> "LabelIndex":
        """The inverse of `save`; ValueError, KeyError or OSError for a file that is not such an index."""
        with np.load(path, allow_pickle=False) as file:
            words = json.loads(file["words"].tobytes())
            if words["schema"] != SCHEMA:
                raise ValueError(f"schema {words['schema']}, expected {SCHEMA}")
            arrays = {name: file[name] for name in _ARRAYS}
        report = Report.from_json(words["report"])
        return LabelIndex(tuple(words["names"]), report, words["key"], words["unused"], words["own_ids"], **arrays)


_ARRAYS = [field.name for field in fields(LabelIndex) if field.type is np.ndarray]


def build_index(
    spec: DataSpec,
    split: str,
    *,
    policy: str = "clip",
    single_cls: bool = False,
    rebuild: bool = False,
    workers: int | None = None,
    strict: bool = True,
    verify: bool = False,
) -> LabelIndex:
    """The index of a split, from the cache where that is fresh: one whose images were decoded before any other.

    `policy`: what to do with bad labels (see `utils.data.labels`). `strict`: class numbers out of range are an error
    that names the places; otherwise such boxes are dropped. `verify`: decode every image and take a digest of it.
    `workers`: processes for scanning (default: all cores for large splits; 0: this one).
    """
    if policy not in POLICIES:
        raise UserError(f"label policy '{policy}' is unknown; expected one of {', '.join(POLICIES)}")
    if spec.format == "folder":
        raise UserError(f"{spec.yaml} is a folder of class folders, for classification; expected a detection data set")
    sources = spec.require(split)
    job = Job(spec.format, "clip" if policy == "error" else policy, spec.names, single_cls, verify)
    plan = [SCHEMA, spec.format, split, *map(str, sources), *map(str, spec.annotations.get(split, ())), policy]
    names = [_digest([json.dumps([*plan, decoded, single_cls, spec.names])]) for decoded in (True, verify)]
    listing = _list(spec, split)
    if rebuild:
        for name in names:
            _place(name).unlink(missing_ok=True)
    known = (_from_cache(_place(name), name, listing) for name in dict.fromkeys(names))
    index = next((found for found in known if found is not None), None)
    if index is None:
        index = _build(spec, split, job, listing, workers, names[-1])
        index.save(_place(names[-1]))
    _refuse_or_tell(index, spec, split, policy, strict)
    return index


# ---------------------------------------------------------------------------------------------------- the cache


def _place(name: str) -> Path:
    return cache_dir("index") / f"{name[:32]}.npz"


def _digest(texts: Sequence[str], arrays: Sequence[np.ndarray] = ()) -> str:
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode("utf-8", "surrogateescape") + b"\0\0")
    for array in arrays:
        digest.update(array.tobytes())
    return digest.hexdigest()


def _key(name: str, files: Sequence[str], problems: Sequence[Problem]) -> str:
    """A digest of the options (in `name`) and of the path, size and modification time of every file."""
    stamps = np.array([_stamp(file) for file in files], np.int64)
    return _digest([name, "\0".join(files), *map(str, problems)], [stamps])


def _stamp(file: str) -> tuple[int, int]:
    try:
        status = os.stat(file)
    except OSError:
        return -1, -1
    return status.st_size, status.st_mtime_ns


def _from_cache(place: Path, name: str, listing: "_Listing") -> LabelIndex | None:
    """The remembered index, if it is there and every file is as it was."""
    try:
        index = LabelIndex.load(place)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        LOGGER.warning("label cache %s is not usable (%s); it is made anew", place, " ".join(str(error).split())[:100])
        return None
    if listing.coco_files:
        paths = index.paths.tobytes()
        edges = index.path_offsets.tolist()
        used = [os.fsdecode(paths[a:b]) for a, b in zip(edges[:-1], edges[1:], strict=True)]
        files = [*listing.coco_files, *sorted([*used, *index.unused])]
    else:
        files = listing.files()
    return index if index.key == _key(name, files, listing.problems) else None


# ---------------------------------------------------------------------------------------------------- building


@dataclass
class _Listing:
    """The files of a split: (image, label) pairs, or the COCO files that will name the images."""

    pairs: list[tuple[str, str]]
    problems: list[Problem]
    coco_files: list[str]

    def files(self) -> list[str]:
        return [*self.coco_files, *(image for image, _ in self.pairs), *(label for _, label in self.pairs if label)]


def _list(spec: DataSpec, split: str) -> _Listing:
    sources, annotations = spec.splits[split], spec.annotations.get(split, ())
    if spec.format == "coco":
        return _Listing([], [], [str(file) for file in annotations])
    if spec.format == "yolo":
        images, problems = list_images(sources)
        pairs = [(image, label_path(image)) for image in images]
        _note_shared_labels(pairs, problems)
    else:
        pairs, problems = list_voc(sources, annotations)
    if not pairs:
        raise UserError(
            f"{spec.yaml}: no images in {', '.join(map(str, sources))} for '{split}'; expected JPEG, PNG, ..."
        )
    return _Listing(pairs, problems, [])


def _note_shared_labels(pairs: list[tuple[str, str]], problems: list[Problem]) -> None:
    owner: dict[str, str] = {}
    for image, label in pairs:
        first = owner.setdefault(label, image)
        if first is not image:
            detail = f"belongs to {os.path.basename(first)} and to {os.path.basename(image)}"
            problems.append(Problem("label-shared", label, USED, detail))


def _build(spec: DataSpec, split: str, job: Job, listing: _Listing, workers: int | None, name: str) -> LabelIndex:
    """Scan everything."""
    began = time.perf_counter()
    report = Report()
    coco = None
    if listing.coco_files:
        coco = read_coco(spec.annotations[split], spec.splits[split], spec.root, spec.names)
        if not coco.images:
            raise UserError(f"{listing.coco_files[0]} has no usable image record; expected a COCO file with 'images'")
        listing = replace(listing, pairs=[(image.path, "") for image in coco.images])
        key = _key(name, [*listing.coco_files, *sorted(image.path for image in coco.images)], listing.problems)
    else:
        key = _key(name, listing.files(), listing.problems)
    total = len(listing.pairs)
    hidden = None if total > (SMALL_TO_VERIFY if job.verify else SMALL) else True
    with tqdm(total=total, desc=f"{split}: reading labels", unit=" images", disable=hidden) as bar:
        found = scan(replace(job, labels="none") if coco else job, listing.pairs, workers, bar.update)
    report.add([*listing.problems, *(coco.problems if coco else ()), *found.problems])
    if coco:
        found = _coco_labels(coco, found, job)
        report.add(found.problems)
    if not found.ok.any():
        example = report.problems[0] if report.problems else ""
        raise UserError(f"{spec.yaml}: none of the {total:,} images of '{split}' can be used; for example {example}")
    index = _assemble(job, key, listing.pairs, found, coco, report)
    seconds = time.perf_counter() - began
    LOGGER.info("%s: read %s images and their labels in %.1f s", split, f"{total:,}", seconds)
    return index


def _coco_labels(coco: CocoFile, sizes: Scan, job: Job) -> Scan:
    """The objects of every usable image."""
    packer = Packer()
    for i, image in enumerate(coco.images):
        hw = int(sizes.hw[i, 0]), int(sizes.hw[i, 1])
        header = Header("", *hw, int(sizes.orientation[i]))
        labels, ok = _one_coco_image(coco, image, header, job, packer) if sizes.ok[i] else (no_labels(), False)
        packer.add(ok, header, True, sizes.digest[i].tobytes(), labels)
    return packer.pack()


def _one_coco_image(coco: CocoFile, image: CocoImage, header: Header, job: Job, packer: Packer) -> tuple[Labels, bool]:
    """The objects of an image, and whether it can be used; the problems go to the packer."""
    hw, stored = (header.height, header.width), (header.width, header.height)
    turned = header.orientation >= 5 and image.size == stored != hw
    if image.size is not None and image.size != hw and not turned:
        detail = f"has {hw[1]} x {hw[0]} px, but its COCO record says {image.size[1]} x {image.size[0]}"
        packer.problems.append(Problem("coco-size", image.path, LEFT_OUT, detail))
        return no_labels(), False
    if turned:
        detail = "has a COCO record made before EXIF rotation; its boxes are rotated along"
        packer.problems.append(Problem("coco-rotated", image.path, USED, detail))
    labels, issues = labels_of(image, stored if turned else hw, header.orientation if turned else 1)
    labels, more = settle(labels, hw, job.policy)
    problems, out = judge(coco.source, _located(issues + more, image), job.policy)
    packer.problems += problems
    if out:
        return no_labels(), False
    if job.single_cls:
        labels.cls[:] = 0
    return labels, True


def _located(issues: list[Issue], image: CocoImage) -> list[Issue]:
    """Say in words where in the COCO file something is; it has no lines."""
    return [
        Issue(issue.kind, 0, f"annotation record {issue.line} of '{image.name}' {issue.detail}") for issue in issues
    ]


def _assemble(
    job: Job, key: str, pairs: list[tuple[str, str]], found: Scan, coco: CocoFile | None, report: Report
) -> LabelIndex:
    used = np.flatnonzero(found.ok)
    names = job.names
    category_ids = coco.category_ids if coco else list(range(len(names)))
    if job.single_cls:
        names, category_ids = (names if len(names) == 1 else ("item",)), category_ids[:1]
    encoded = [os.fsencode(pairs[i][0]) for i in used]
    offsets = _starts(found.count[used])
    learnable = _starts(~found.crowd)[offsets]
    report.images, report.used = len(pairs), len(used)
    report.labeled = int((np.diff(learnable) > 0).sum())
    report.without_file = int((~found.has_file[used]).sum())
    report.crowds = int(found.crowd.sum())
    report.boxes = len(found.cls) - report.crowds
    return LabelIndex(
        names=names,
        report=report,
        key=key,
        unused=[pairs[i][0] for i in np.flatnonzero(~found.ok)],
        own_ids=coco is not None and coco.own_ids,
        shapes=found.hw[used],
        offsets=offsets,
        cls=found.cls,
        boxes=found.xyxy,
        areas=found.area,
        crowd=found.crowd,
        poly_offsets=_starts(found.poly_count),
        poly_xy=found.poly_xy,
        image_ids=np.array([coco.images[i].id for i in used] if coco else range(len(used)), np.int64),
        category_ids=np.array(category_ids, np.int64),
        paths=np.frombuffer(b"".join(encoded), np.uint8),
        path_offsets=_starts(np.array([len(path) for path in encoded])),
        digests=found.digest[used] if job.verify else np.zeros((0, 16), np.uint8),
    )


def _starts(counts: np.ndarray) -> np.ndarray:
    """0, and the running sums of counts [n]: int64 [n + 1]."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(counts, dtype=np.int64)])


def _refuse_or_tell(index: LabelIndex, spec: DataSpec, split: str, policy: str, strict: bool) -> None:
    """Stop at what the options call an error; else say once what was done to what."""
    report = index.report
    if strict and (found := report.of("label-class")):
        expected = f"the classes are 0 to {spec.nc - 1} ({spec.yaml}); correct the labels or add names"
        raise refuse(found, report.counts["label-class"], expected)
    if policy == "error":
        kinds = [k for k in report.counts if k.startswith(_LABEL_KINDS) and k not in ("box-repeated", "label-shared")]
        if kinds:
            found = [problem for kind in kinds for problem in report.of(kind)]
            raise refuse(
                found, sum(report.counts[k] for k in kinds), "correct the labels, or pick another label policy"
            )
    if report.counts:
        LOGGER.warning("%s: %s", split, "\n".join(report.lines()))
