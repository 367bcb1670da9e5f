"""Samples of a detection data set: each a pure function of (seed, epoch, position, image).

`plan` draws everything there is to draw and works out where every object ends; `render` then makes the pixels. Workers,
processes, caches and history have no say in either.
"""

import dataclasses
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Protocol

import numpy as np

from utils.core.errors import UserError
from utils.core.hyp import Hyp
from utils.data.augment import Flip, Hsv, Warp, finish, generator
from utils.data.cache import DiskStore, Recent, SharedMemory, Store, levels_for, read_reduced, reduced_hw
from utils.data.mixing import CopyPaste, Cutmix, Mixup
from utils.data.mosaic import Frame, Placement, Scene, draw_scene, mosaic4, mosaic9, placements, scene_objects, single
from utils.data.objects import Labels, Objects
from utils.data.order import SAMPLE, before, epoch_order
from utils.ops.boxes import xyxy_to_cxcywh
from utils.ops.letterbox import Letterbox, letterbox_geometry, letterbox_image
from utils.ops.tiles import tile_boxes

SLICE_VISIBILITY = 0.25  # an object belongs to a training tile that shows at least this share of it


class Index(Labels, Protocol):
    """What is read of a label index."""

    @property
    def shapes(self) -> np.ndarray: ...

    @property
    def key(self) -> str: ...

    def __len__(self) -> int: ...

    def file(self, i: int) -> Path: ...


@dataclass(frozen=True)
class Sample:
    """image uint8 [H, W, 3] RGB; cls float32 [k]; cxcywh float32 [k, 4] in parts of the image; the dataset index; for
    samples without augmentation the letterbox that leads back to the source."""

    image: np.ndarray
    cls: np.ndarray
    cxcywh: np.ndarray
    index: int
    geometry: Letterbox | None


@dataclass(frozen=True)
class Plan:
    """Everything about an augmented sample but its pixels."""

    index: int
    scenes: tuple[Scene, ...]
    places: tuple[list[Placement | None], ...]
    before_paste: tuple[Objects, ...]
    pastes: tuple[CopyPaste, ...]
    blend: Mixup | Cutmix | None
    hsv: Hsv
    flip: Flip
    objects: Objects

    @property
    def out_hw(self) -> tuple[int, int]:
        return self.scenes[0].out_hw


class DetectionDataset:
    """Images and labels of an index as samples of `imgsz`.

    With `slices` (size, overlap) the items are tiles of the images. `rect` keeps shapes (no mosaic); the loader then
    says which shape. `cache` None, "ram" or "disk". `hyp` says how to augment when `augment` is set.
    """

    def __init__(
        self,
        index: Index,
        imgsz: int,
        hyp: Hyp,
        *,
        augment: bool,
        seed: int = 0,
        rect: bool = False,
        stride: int = 32,
        pad: float = 0.0,
        single_cls: bool = False,
        cache: str | None = None,
        slices: tuple[int, float] | None = None,
    ) -> None:
        assert imgsz > 0 and seed >= 0
        self.index, self.imgsz, self.hyp, self.augment, self.seed = index, imgsz, hyp, augment, seed
        self.rect, self.stride, self.pad, self.single_cls = rect, stride, pad, single_cls
        self.unit_image, self.unit_box = self._units(slices)
        sizes = np.stack([self.unit_box[:, 3] - self.unit_box[:, 1], self.unit_box[:, 2] - self.unit_box[:, 0]], 1)
        self.shapes: np.ndarray = sizes  # (h, w) [n, 2] of the items
        self.levels = self._levels()
        self._recent: Recent | None = None
        self._layers: dict[int, np.ndarray] = {}
        self._order: tuple[int, np.ndarray] | None = None
        self._store: Store | None = self._open(cache)

    def __len__(self) -> int:
        return len(self.unit_image)

    def _units(self, slices: tuple[int, float] | None) -> tuple[np.ndarray, np.ndarray]:
        """Image number [u] and box xyxy [u, 4] in source pixels of each item."""
        shapes = np.asarray(self.index.shapes, np.int64)
        whole = np.concatenate([np.zeros_like(shapes), shapes[:, ::-1]], 1)
        if slices is None:
            return np.arange(len(shapes)), whole
        size, overlap = slices
        tiles = [tile_boxes((int(h), int(w)), size, overlap, whole=not self.augment) for h, w in shapes]
        images = np.repeat(np.arange(len(shapes)), [len(t) for t in tiles])
        return images, np.array([box for t in tiles for box in t], np.int64).reshape(-1, 4)

    def _levels(self) -> np.ndarray:
        """How coarsely each image may be decoded, [n images]: by its smallest item and the size asked for alone."""
        if not self.augment:
            return np.ones(len(self.index.shapes), np.int64)
        long = np.full(len(self.index.shapes), np.iinfo(np.int32).max, np.int64)
        np.minimum.at(long, self.unit_image, self.shapes.max(1))
        return levels_for(long, self.imgsz)

    def _open(self, cache: str | None) -> Store | None:
        if cache is None:
            return None
        if cache not in ("ram", "disk"):
            raise UserError(f"--cache {cache}; expected ram or disk")
        shapes = [reduced_hw(hw, level) for hw, level in zip(self.index.shapes.tolist(), self.levels, strict=True)]
        if cache == "ram":
            levels = blake2b(self.levels.astype(np.int8).tobytes(), digest_size=8).hexdigest()
            return SharedMemory(f"{self.index.key[:32]}-{levels}", shapes, self._decode)
        files = [self.index.file(i) for i in range(len(self.index))]
        return DiskStore(self.index.key, files, shapes, self.levels.tolist(), self._decode)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_recent": None, "_order": None, "_layers": {}}

    def close(self) -> None:
        """Give a shared cache back."""
        if self._store is not None:
            self._store.close()
            self._store = None

    # ------------------------------------------------------------------------------------------------ items

    def _decode(self, image: int) -> np.ndarray:
        h, w = self.index.shapes[image].tolist()
        return read_reduced(self.index.file(image), (h, w), int(self.levels[image]))

    def _image(self, image: int) -> np.ndarray:
        if self._store is not None:
            return self._store.get(image)
        if self._recent is None:
            self._recent = Recent()
        return self._recent.get(image, lambda: self._decode(image))

    def frame(self, i: int) -> Frame:
        """What the pixels of item `i` stand for (see `pixels`)."""
        x1, y1, x2, y2 = self.unit_box[i].tolist()
        level = int(self.levels[self.unit_image[i]])
        left, top = x1 // level, y1 // level
        return Frame((-(-y2 // level) - top, -(-x2 // level) - left), level, (left * level - x1, top * level - y1))

    def pixels(self, i: int) -> np.ndarray:
        """The decoded pixels of item `i`, uint8 [h, w, 3]; to be used before the next are asked for."""
        (h, w), level, _ = self.frame(i)
        left, top = (int(v) // level for v in self.unit_box[i, :2])
        return self._image(int(self.unit_image[i]))[top : top + h, left : left + w]

    def objects(self, i: int) -> Objects:
        """The objects of item `i` in its own source pixels."""
        objects = Objects.of(self.index, int(self.unit_image[i]))
        if self.single_cls:
            objects = dataclasses.replace(objects, cls=np.zeros_like(objects.cls))
        box = self.unit_box[i].astype(np.float64)
        whole = np.array([0, 0, *self.index.shapes[self.unit_image[i]][::-1]], np.float64)
        if (box == whole).all() or not len(objects):
            return objects
        full = objects.areas
        seen = objects.cut(np.tile(box, (len(objects), 1)))
        seen = seen.take(seen.areas >= np.maximum(SLICE_VISIBILITY * full, 1e-9))
        ones = np.ones((len(seen), 2))
        return seen.scaled(ones, -box[:2] * ones)

    # ------------------------------------------------------------------------------------------------ samples

    def window(self, epoch: int, position: int) -> np.ndarray:
        """The partner candidates of a position: the images at the positions before it in the epoch's order."""
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, epoch_order(len(self), self.seed, epoch)
        return before(self._order[1], position, self.hyp.mosaic_window)

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
        """The sample at a position of an epoch. `window` are candidates for mosaic partners (by default those of the
        shuffled order), `hw` is another size than `imgsz` squared, `out` an array for the image."""
        if not self.augment:
            return self._plain(i, hw, out)
        return self.render(self.plan(epoch, position, i, window=window, hw=hw), out)

    def _plain(self, i: int, hw: tuple[int, int] | None, out: np.ndarray | None) -> Sample:
        geometry = letterbox_geometry(self._hw(i), self.imgsz)
        if hw is not None:
            geometry = centered(geometry, hw)
        objects = self.objects(i)
        image = letterbox_image(self.pixels(i), geometry)
        if out is not None:
            out[...] = image
            image = out
        return _sample(i, image, objects.cls, geometry.to_network(objects.xyxy), geometry)

    def _hw(self, i: int) -> tuple[int, int]:
        h, w = self.shapes[i].tolist()
        return h, w

    def plan(
        self, epoch: int, position: int, i: int, *, window: np.ndarray | None = None, hw: tuple[int, int] | None = None
    ) -> Plan:
        """Draw an augmented sample."""
        hyp, rng = self.hyp, generator(self.seed, SAMPLE, epoch, position)
        hw = hw or (self.imgsz, self.imgsz)
        mosaic = rng.random() < hyp.mosaic and not self.rect
        if window is None:
            window = self.window(epoch, position)
        scenes = [self._scene(rng, i, window, hw, mosaic)]
        mixup, cutmix = rng.random(2) < (hyp.mixup, hyp.cutmix)
        blend: Mixup | Cutmix | None = None
        if (mixup and mosaic) or cutmix:
            scenes.append(self._scene(rng, int(rng.choice(window)), window, hw, mosaic))
            blend = Mixup.draw(rng) if mixup and mosaic else Cutmix.draw(rng, hw)
        places = tuple(placements(scene, self.frame) if scene.warp.axis_aligned else [] for scene in scenes)
        before_paste = tuple(
            scene_objects(scene, where, self.objects, hyp) for scene, where in zip(scenes, places, strict=True)
        )
        pastes = tuple(CopyPaste.draw(rng, o, hw[1], hyp.copy_paste) for o in before_paste if hyp.copy_paste)
        layers = [p.objects(o, hw) for p, o in zip(pastes, before_paste, strict=True)] if pastes else before_paste
        objects = blend.objects(layers[0], layers[1], hyp) if blend else layers[0]
        hsv, flip = Hsv.draw(rng, hyp), Flip.draw(rng, hyp)
        objects = objects.flipped(hw, flip.lr, flip.ud)
        return Plan(i, tuple(scenes), places, before_paste, pastes, blend, hsv, flip, objects)

    def _scene(self, rng: np.random.Generator, i: int, window: np.ndarray, hw: tuple[int, int], mosaic: bool) -> Scene:
        hyp, size = self.hyp, max(hw)
        if not mosaic:
            geometry = letterbox_geometry(self._hw(i), self.imgsz if self.rect else hw)
            tiles = single(i, centered(geometry, hw))
            return Scene(tiles, hw, hw, Warp.draw(rng, hyp).meeting(tiles[0].offset, hw, hw))
        nine = rng.random() < hyp.mosaic9
        indices = np.append(rng.choice(window, 8 if nine else 3), i)
        indices = rng.permutation(indices).tolist()
        center = tuple(np.floor(rng.uniform(0.5 * size, 1.5 * size, 2)).astype(int).tolist())
        tiles = (mosaic9 if nine else mosaic4)(indices, [self._hw(j) for j in indices], center, size)
        canvas = 2 * size, 2 * size
        seam = tiles[4].offset if nine else center
        return Scene(tiles, canvas, hw, Warp.draw(rng, hyp).meeting(seam, canvas, hw))

    def render(self, plan: Plan, out: np.ndarray | None = None) -> Sample:
        """Make the pixels of a plan, in `out` (uint8 [H, W, 3]) where given."""
        layers = [self._layer(number, plan.out_hw) for number in range(len(plan.scenes))]
        for number, (scene, layer) in enumerate(zip(plan.scenes, layers, strict=True)):
            draw_scene(scene, plan.places[number], self.frame, self.pixels, layer)
            if plan.pastes:
                plan.pastes[number].apply(layer, plan.before_paste[number])
        if plan.blend:
            plan.blend.apply(layers[0], layers[1])
        image = np.empty_like(layers[0]) if out is None else out
        finish(layers[0], plan.hsv, plan.flip, image)
        return _sample(plan.index, image, plan.objects.cls, plan.objects.xyxy, None)

    def _layer(self, number: int, hw: tuple[int, int]) -> np.ndarray:
        """A buffer to draw in, kept from sample to sample."""
        layer = self._layers.get(number)
        if layer is None or layer.shape[:2] != hw:
            layer = self._layers[number] = np.empty((*hw, 3), np.uint8)
        return layer


def centered(geometry: Letterbox, hw: tuple[int, int]) -> Letterbox:
    """The same resized image in the middle of another target."""
    pad = ((hw[0] - geometry.resized_hw[0]) // 2, (hw[1] - geometry.resized_hw[1]) // 2)
    return dataclasses.replace(geometry, target_hw=hw, pad=pad)


def _sample(i: int, image: np.ndarray, cls: np.ndarray, xyxy: np.ndarray, geometry: Letterbox | None) -> Sample:
    h, w = image.shape[:2]
    cxcywh = xyxy_to_cxcywh(xyxy) / (w, h, w, h)
    return Sample(image, cls.astype(np.float32), cxcywh.astype(np.float32), i, geometry)
