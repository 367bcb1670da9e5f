"""Image folders for classifiers: layouts, names, and samples that depend on (seed, epoch, position) alone."""

from pathlib import Path

import numpy as np
import pytest
import torch

import train
from tests.stripes import class_folders, ramp_index, stripes, write
from utils.core.errors import UserError
from utils.core.hyp import Hyp, load_hyp
from utils.core.yamls import dump_yaml
from utils.data.folder import (
    ClassDataset,
    build_class_index,
    center_crop,
    channel_statistics,
    cut,
    resize_short,
)
from utils.data.loader import TrainLoader
from utils.data.spec import load_data

PLAIN = Hyp(mosaic=0, scale=0, translate=0, fliplr=0, hsv_h=0, hsv_s=0, hsv_v=0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return class_folders(tmp_path / "data")


def test_class_folders(folder: Path) -> None:
    spec = load_data(folder)
    index = build_class_index(spec, "train")
    assert index.names == ("middle", "narrow", "wide") and np.bincount(index.labels).tolist() == [12, 12, 12]
    assert all(index.files[i].parent.name == index.names[index.labels[i]] for i in range(len(index)))
    assert index.image(0).shape == (16, 16, 3)


def test_tiny_imagenets_layout(tmp_path: Path) -> None:
    """train/<class>/images, val/images with val_annotations.txt, and the words of words.txt as names."""
    rng, root = np.random.default_rng(0), tmp_path / "tiny-imagenet-200"
    for key in ("n01", "n02"):
        for i in range(3):
            write(root / "train" / key / "images" / f"{key}_{i}.png", stripes(0, 8, rng))
    rows = [f"val_{i}.png\t{'n02' if i % 2 else 'n01'}\t0\t0\t7\t7" for i in range(4)]
    for i in range(4):
        write(root / "val" / "images" / f"val_{i}.png", stripes(0, 8, rng))
    (root / "val" / "val_annotations.txt").write_text("\n".join(rows) + "\n")
    (root / "words.txt").write_text("n01\tgoldfish, Carassius auratus\nn02\ttabby, tabby cat\nn03\tother\n")
    yaml = {"path": ".", "format": "folder", "train": f"{root.name}/train", "val": f"{root.name}/val", "nc": 2}
    dump_yaml(tmp_path / "data.yaml", yaml)
    spec = load_data(tmp_path / "data.yaml")
    train_index, val_index = build_class_index(spec, "train"), build_class_index(spec, "val")
    assert train_index.names == val_index.names == ("goldfish", "tabby")
    assert train_index.labels.tolist() == [0, 0, 0, 1, 1, 1] and val_index.labels.tolist() == [0, 1, 0, 1]
    (root / "val" / "val_annotations.txt").write_text("../x.png\tn01\n")
    with pytest.raises(UserError, match="val_annotations.txt:1"):
        build_class_index(spec, "val")


def test_names_follow_the_yaml(folder: Path) -> None:
    """Names that the folders carry decide the numbers; other names are given to the folders in their order."""
    for names, expected in ((["wide", "narrow", "middle"], 0), (["A", "B", "C"], 2)):
        dump_yaml(folder / "d.yaml", {"path": ".", "format": "folder", "train": "train", "val": "val", "names": names})
        index = build_class_index(load_data(folder / "d.yaml"), "val")
        wide = {int(index.labels[i]) for i in range(len(index)) if index.files[i].parent.name == "wide"}
        assert index.names == tuple(names) and wide == {expected}
    dump_yaml(folder / "d.yaml", {"path": ".", "format": "folder", "train": "train", "names": ["a", "b"]})
    with pytest.raises(UserError, match="2 names but 3 class folders"):
        build_class_index(load_data(folder / "d.yaml"), "train")


def test_a_class_that_training_lacks_is_refused(folder: Path) -> None:
    write(folder / "val" / "extra" / "0.png", np.zeros((8, 8, 3), np.uint8))
    with pytest.raises(UserError, match="'extra' is not one of the 3 classes"):
        build_class_index(load_data(folder), "val")


def test_what_lies_among_the_class_folders(folder: Path) -> None:
    """A class called images, deeper folders, hidden files of other systems, stray files, an empty class."""
    image = stripes(0, 8, np.random.default_rng(0))
    for name in ("images/0.png", "wide/deep/er/0.png", "wide/._0.png", ".hidden/0.png", "stray.png"):
        write(folder / "train" / name, image)
    (folder / "train" / "nothing").mkdir()
    index = build_class_index(load_data(folder), "train")
    assert index.names == ("images", "middle", "narrow", "nothing", "wide")
    assert np.bincount(index.labels).tolist() == [1, 12, 12, 0, 13]


def test_tiny_imagenet_sorted_into_class_folders(folder: Path) -> None:
    """The list of labels that is left over no longer counts; where it counts it may have a byte order mark."""
    (folder / "val" / "val_annotations.txt").write_text("val_0.png\tnarrow\n")
    assert len(build_class_index(load_data(folder), "val")) == 18
    write(folder / "test" / "images" / "val_0.png", np.zeros((8, 8, 3), np.uint8))
    for text, count in (("\ufeffval_0.png\tnarrow\n".encode(), 1), (b"val_0.png\tna\xe9\n", 0)):
        (folder / "test" / "val_annotations.txt").write_bytes(text)
        if count:
            assert build_class_index(load_data(folder), "test").labels.tolist() == [1]
        else:
            with pytest.raises(UserError, match="is not one of the 3 classes"):
                build_class_index(load_data(folder), "test")


def test_folders_that_are_not_there(folder: Path, tmp_path: Path) -> None:
    """A list file is no class folder; without train/ the folders of val/ give the classes; missing data are named."""
    (tmp_path / "list.txt").write_text("x.png\n")
    for split in ("train", "val"):
        yaml = {"path": "data", "format": "folder", "train": "train", "val": "val", split: "../list.txt", "nc": 3}
        dump_yaml(tmp_path / "d.yaml", yaml)
        with pytest.raises(UserError, match="list.txt; expected a folder with one folder per class"):
            build_class_index(load_data(tmp_path / "d.yaml"), split)
    dump_yaml(tmp_path / "d.yaml", {"path": "data", "format": "folder", "train": "no", "val": "val", "nc": 3})
    assert build_class_index(load_data(tmp_path / "d.yaml"), "val").names == ("middle", "narrow", "wide")
    dump_yaml(tmp_path / "d.yaml", {"path": "data", "format": "folder", "train": "no", "val": "val"})
    with pytest.raises(UserError, match="data/no, which does not exist"):
        train.run(cfg="models/resnet18.yaml", data=tmp_path / "d.yaml", device="cpu", project=str(tmp_path))


def test_cifar_is_read_by_torchvision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The published archive's layout; files whose checksum is another than the published one are refused."""
    import hashlib
    import pickle

    datasets = pytest.importorskip("torchvision").datasets
    home = tmp_path / "cifar-10-batches-py"
    home.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (4, 3, 32, 32), dtype=np.uint8)
    sums = {}
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"]:
        labels = [f"c{i}" for i in range(10)]
        content = {"label_names": labels} if "meta" in name else {"data": pixels.reshape(4, -1), "labels": [3, 1, 0, 9]}
        (home / name).write_bytes(pickle.dumps(content))
        sums[name] = hashlib.md5((home / name).read_bytes()).hexdigest()
    dump_yaml(tmp_path / "c.yaml", {"format": "folder", "train": home.name, "val": home.name, "nc": 10})
    with pytest.raises(UserError, match="damaged"):
        build_class_index(load_data(tmp_path / "c.yaml"), "train")
    for attribute in ("train_list", "test_list"):
        rows = [[name, sums[name]] for name, _ in getattr(datasets.CIFAR10, attribute)]
        monkeypatch.setattr(datasets.CIFAR10, attribute, rows)
    monkeypatch.setattr(datasets.CIFAR10, "meta", {**datasets.CIFAR10.meta, "md5": sums["batches.meta"]})
    spec = load_data(tmp_path / "c.yaml")
    assert len(build_class_index(spec, "train")) == 20
    index = build_class_index(spec, "val")
    assert index.labels.tolist() == [3, 1, 0, 9] and index.names[3] == "c3"
    assert np.array_equal(index.image(2), pixels[2].transpose(1, 2, 0))


def test_shipped_yamls_and_recipes(root: Path) -> None:
    """The data YAMLs load, the recipes hold the paper's values."""
    for name, nc in (("tiny-imagenet", 200), ("cifar10", 10), ("cifar100", 100)):
        spec = load_data(root / "data" / f"{name}.yaml")
        assert spec.nc == nc and spec.format == "folder" and len(spec.download[0]["sha256"]) == 64
    tiny, cifar = (load_hyp(root / "data" / "hyps" / f"hyp.{n}.yaml") for n in ("tiny-imagenet", "cifar10"))
    assert (tiny.lr0, tiny.momentum, tiny.weight_decay) == (0.01793, 0.9447, 0.002113)
    assert (cifar.lr0, cifar.momentum, cifar.weight_decay) == (0.1, 0.9, 0.0001)


def test_a_broken_image_is_named(folder: Path) -> None:
    (folder / "train" / "wide" / "0.png").write_bytes(b"no image")
    index = build_class_index(load_data(folder), "train")
    with pytest.raises(UserError, match="wide/0.png"):
        for i in range(len(index)):
            index.image(i)


# ------------------------------------------------------------------------------------------------ samples


def test_center_crop() -> None:
    """An image of the right size is untouched; a wide one loses its sides, a small one is enlarged."""
    image = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    assert np.array_equal(center_crop(image, 16), image)
    wide = np.zeros((10, 30, 3), np.uint8)
    wide[:, 10:20] = 200
    assert (center_crop(wide, 10) == 200).all() and center_crop(wide, 25).shape == (25, 25, 3)
    assert resize_short(np.zeros((1, 4000, 3), np.uint8), 8).shape == (8, 32000, 3)


@pytest.mark.parametrize(("top", "left"), [(0, 0), (-2, 3), (5, -4), (20, 0), (-30, -30)])
def test_cut_against_padding(top: int, left: int) -> None:
    """The same as padding the image with black and slicing."""
    image = np.random.default_rng(1).integers(1, 256, (9, 12, 3), dtype=np.uint8)
    padded = np.pad(image, ((40, 40), (40, 40), (0, 0)))
    out = np.full((8, 8, 3), 7, np.uint8)
    cut(image, top, left, 8, out)
    assert np.array_equal(out, padded[40 + top : 48 + top, 40 + left : 48 + left])


def test_crops_with_padding_are_whole_pixel_shifts() -> None:
    """translate = 4/12: every shift of -4 to 4 pixels occurs, nothing is interpolated, black comes in."""
    index = ramp_index(1)
    dataset = ClassDataset(index, 12, PLAIN.replace(translate=4 / 12), augment=True)
    padded = np.pad(index.image(0), ((4, 4), (4, 4), (0, 0)))
    shifts = {(y, x): padded[4 + y : 16 + y, 4 + x : 16 + x].tobytes() for y in range(-4, 5) for x in range(-4, 5)}
    places = {pixels: shift for shift, pixels in shifts.items()}
    seen = {places[dataset.sample(0, position, 0).image.tobytes()] for position in range(800)}
    assert seen == set(shifts)


def test_flips() -> None:
    index = ramp_index(1)
    for hyp, axis in ((PLAIN.replace(fliplr=1), 1), (PLAIN.replace(flipud=1), 0)):
        sample = ClassDataset(index, 12, hyp, augment=True).sample(0, 0, 0)
        assert np.array_equal(sample.image, np.flip(index.image(0), axis))


def test_samples_depend_on_seed_epoch_and_position_alone() -> None:
    hyp = Hyp(translate=0.2, scale=0.3, fliplr=0.5, flipud=0.5)
    datasets = [ClassDataset(ramp_index(), 12, hyp, augment=True, seed=s) for s in (0, 0, 1)]
    for epoch, position, i in ((0, 0, 5), (0, 7, 5), (3, 7, 5), (3, 7, 6)):
        a, b, c = (d.sample(epoch, position, i).image for d in datasets)
        assert np.array_equal(a, b) and not np.array_equal(a, c)
    samples = {datasets[0].sample(e, p, 5).image.tobytes() for e in range(3) for p in range(3)}
    assert len(samples) == 9


def test_loaders_give_the_same_on_any_number_of_processes() -> None:
    """The global batch, dealt out to three ranks, is that of one; labels stand in the targets."""
    dataset = ClassDataset(ramp_index(), 12, Hyp(), augment=True)
    whole = list(TrainLoader(dataset, 9, seed=5).epoch(2))
    ranks = [list(TrainLoader(dataset, 9, seed=5, rank=r, world_size=3).epoch(2)) for r in range(3)]
    assert len(whole) == 5
    for step, batch in enumerate(whole):
        assert torch.equal(batch.targets[:, 1].long(), torch.tensor(dataset.index.labels[batch.indices]))
        for r in range(3):
            assert torch.equal(batch.images[r::3], ranks[r][step].images)


def test_channel_statistics() -> None:
    index = ramp_index()
    mean, deviation = channel_statistics(index)
    values = index.pixels.reshape(-1, 3) / 255
    assert np.allclose(mean, values.mean(0), atol=1e-4) and np.allclose(deviation, values.std(0), atol=1e-4)
