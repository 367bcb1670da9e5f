"""The classification task: data layouts, samples that depend on (seed, epoch, position) alone, loss and evaluation."""

import csv
import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import train
from models import build_model
from models.weights import load_model, pack_model
from utils.core.checkpoint import save_checkpoint
from utils.core.dist import Dist
from utils.core.errors import UserError
from utils.core.hyp import Hyp, load_hyp
from utils.core.yamls import dump_yaml
from utils.data.folder import (
    ClassDataset,
    ClassIndex,
    build_class_index,
    center_crop,
    channel_statistics,
    cut,
    resize_short,
)
from utils.data.loader import EvalLoader, TrainLoader
from utils.data.spec import load_data
from utils.engine.evaluation.classification import (
    ClassResult,
    class_table,
    compare_classes,
    comparison_lines,
    disagreements,
    measure,
    sign_test,
    validate_classifier,
)
from utils.engine.inference.classifying import PictureClassifier
from utils.engine.tasks.classify import ClassifyTask
from utils.engine.training.settings import TrainConfig

PLAIN = Hyp(mosaic=0, scale=0, translate=0, fliplr=0, hsv_h=0, hsv_s=0, hsv_v=0)
DIST = Dist.single(torch.device("cpu"))


def stripes(number: int, size: int, rng: np.random.Generator) -> np.ndarray:
    """A picture whose class is the width of its stripes, with noise."""
    x = np.arange(size)[None, :] // (1 + 2 * number) % 2 * 120 + rng.integers(0, 80, (size, size))
    return np.repeat(x[..., None], 3, 2).astype(np.uint8)


def write(path: Path, image: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), image[..., ::-1])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three classes of stripes, 12 train and 6 val images each, 16 pixels."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 6)):
        for number, name in enumerate(("narrow", "middle", "wide")):
            for i in range(count):
                write(tmp_path / "data" / split / name / f"{i}.png", stripes(number, 16, rng))
    return tmp_path / "data"


# ------------------------------------------------------------------------------------------------ data


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


def ramp_index(n: int = 40, size: int = 12) -> ClassIndex:
    pixels = np.random.default_rng(3).integers(1, 256, (n, size, size, 3), dtype=np.uint8)
    return ClassIndex(np.arange(n) % 4, tuple("abcd"), pixels=pixels)


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


# ------------------------------------------------------------------------------------------------ measuring


def result_of(labels: list[int], top: list[list[int]]) -> ClassResult:
    confidence = np.linspace(0.9, 0.3, len(labels))[:, None] * np.array([1, 0.1])
    return ClassResult(np.array(labels), np.array(top), confidence, ("a", "b", "c"), 1.0, {})


def test_metrics_by_hand() -> None:
    result = result_of([0, 0, 1, 1], [[0, 1], [1, 0], [0, 2], [1, 2]])
    metrics = result.metrics
    assert (metrics["top1"], metrics["top5"]) == (0.5, 0.75)
    assert [row["top1"] for row in metrics["per_class"][:2]] == [0.5, 0.5] and np.isnan(metrics["per_class"][2]["top1"])
    assert result.confusion.tolist() == [[1, 1, 0], [1, 1, 0], [0, 0, 0]]
    assert "0.5000" in class_table(result) and class_table(result).splitlines()[-1].split() == ["c", "0", "-", "-"]


def test_measuring_against_a_slow_loop() -> None:
    """Batches, an incomplete last one included, against image by image."""
    index = ramp_index(23)
    weights = torch.randn(3 * 12 * 12, 4)
    loader = EvalLoader(ClassDataset(index, 12, Hyp(), augment=False), 5)
    result = measure(lambda x: x.flatten(1) @ weights, loader, index, DIST)
    losses, hits = [], []
    for i in range(23):
        x = torch.from_numpy(index.image(i)).permute(2, 0, 1).float() / 255
        logits = x.flatten() @ weights
        losses.append(F.cross_entropy(logits[None], torch.tensor([index.labels[i]])).item())
        hits.append(int(logits.argmax()) == index.labels[i])
    assert result.right.tolist() == hits and result.loss == pytest.approx(np.mean(losses), rel=1e-5)
    assert result.top.shape == (23, 4) and np.allclose(result.confidence.sum(1), 1, atol=1e-5)


def test_disagreements(tmp_path: Path) -> None:
    """Fig. 7's question: which images does one model get wrong and the other right."""
    a = result_of([0, 0, 1, 1], [[0, 1], [1, 0], [0, 2], [1, 2]])
    b = result_of([0, 0, 1, 1], [[0, 1], [0, 1], [1, 2], [0, 2]])
    found = {key: value.tolist() for key, value in disagreements(a, b).items()}
    assert found == {"both": [0], "only_a": [3], "only_b": [1, 2], "neither": []}
    index = ClassIndex(np.array([0, 0, 1, 1]), ("a", "b", "c"), pixels=ramp_index(4).pixels)
    content = compare_classes((a, b), ("plain", "spd"), index, tmp_path)
    assert content["images"] == {"both": 1, "only_a": 1, "only_b": 2, "neither": 0} and content["p_value"] == 1
    assert all((tmp_path / name).stat().st_size > 1000 for name in ("only_a_right.jpg", "only_b_right.jpg"))
    assert "only B 2" in comparison_lines(content)
    paths = "runs/train/resnet18/weights/best.pt", "runs/train/resnet18-spd/weights/best.pt"
    lines = comparison_lines(compare_classes((a, b), paths, index, tmp_path)).splitlines()
    assert [line.split()[:2] for line in lines[1:3]] == [
        ["A:", "resnet18/weights/best.pt"],
        ["B:", "resnet18-spd/weights/best.pt"],
    ]
    assert len({len(line) for line in lines[:3]}) == 1
    with pytest.raises(UserError, match="different images"):
        disagreements(a, result_of([1, 0, 1, 1], [[0, 1]] * 4))


@pytest.mark.parametrize(("one", "other", "p"), [(0, 0, 1.0), (5, 5, 1.0), (0, 5, 0.0625), (10, 2, 0.038574)])
def test_sign_test(one: int, other: int, p: float) -> None:
    """Binomial tails by hand: 2 / 2^5, and 2 * (1 + 12 + 66) / 2^12."""
    assert sign_test(one, other) == pytest.approx(p, abs=1e-6) == sign_test(other, one)


def test_compare_py_takes_classifiers(folder: Path, tmp_path: Path) -> None:
    import compare

    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        model = build_model(str(small_cfg(tmp_path))).eval()
        save_checkpoint(tmp_path / f"{name}.pt", pack_model(model, ["middle", "narrow", "wide"], 16))
    files = [str(tmp_path / f"{name}.pt") for name in "ab"]
    report = compare.run(weights=files, data=str(folder), device="cpu", workers=0, project=str(tmp_path / "c"))
    assert (report.save_dir / "compare.json").is_file() and len(report.metrics) == 2


# ------------------------------------------------------------------------------------------------ the task


def small_cfg(tmp_path: Path) -> Path:
    rows = [[-1, 1, "SPD", [2]], [-1, 1, "ConvBNReLU", [16, 3]], [-1, 1, "BasicStage", [16]]]
    head = [[-1, 1, "Classify", ["nc"]]]
    dump_yaml(tmp_path / "small.yaml", {"task": "classify", "nc": 3, "backbone": rows, "head": head})
    return tmp_path / "small.yaml"


def test_loss_of_shares_is_that_of_the_batch(folder: Path, tmp_path: Path) -> None:
    """Two processes' shares add up to the mean cross-entropy of the whole batch, whatever their sizes."""
    config = TrainConfig(cfg=str(small_cfg(tmp_path)), imgsz=16, batch_size=8, workers=0)
    task = ClassifyTask(build_model(config.cfg), load_data(folder), config, load_hyp(None, ["nominal_batch=8"]), DIST)
    batch = next(iter(task.loader(None).epoch(0)))
    logits = torch.randn(8, 3)
    labels = batch.targets[:, 1].long()
    expected = F.cross_entropy(logits, labels)
    from dataclasses import replace

    parts = []
    for rows in (slice(0, 3), slice(3, 8)):
        share = replace(batch, images=batch.images[rows], targets=batch.targets[rows])
        parts.append(task.loss(logits[rows], share, 8, DIST))
    parts.append(task.loss(None, batch, 8, DIST))
    assert torch.allclose(sum(p.total for p in parts), expected)
    assert torch.allclose(sum(p.parts for p in parts)[0], expected) and len(parts[0].parts) == len(task.loss_names)


def test_an_optimizer_step_is_the_mean_over_the_nominal_batch(folder: Path, tmp_path: Path) -> None:
    """Gradients of 4 accumulated batches of 2 equal those of one batch of 8 at nominal batch 8."""
    config = TrainConfig(cfg=str(small_cfg(tmp_path)), imgsz=16, batch_size=2, workers=0)
    task = ClassifyTask(build_model(config.cfg), load_data(folder), config, load_hyp(None, ["nominal_batch=8"]), DIST)
    assert task.accumulate == 4


def test_train_val_resume(folder: Path, tmp_path: Path) -> None:
    """Training learns, the stored best.pt gives the table's numbers in other hands too, the files are complete."""
    options: dict[str, Any] = dict(
        cfg=str(small_cfg(tmp_path)), data=str(folder), epochs=6, batch_size=12, imgsz=16, workers=0, device="cpu",
        hyp=["lr0=0.05", "nominal_batch=12", "ema_decay=0", "mosaic=0", "scale=0", "translate=0.1"],
        project=str(tmp_path / "runs"), name="a",
    )  # fmt: skip
    result = train.run(**options)
    assert result.metrics["metrics/accuracy_top1"] >= 0.8
    rows = list(csv.DictReader((result.folder / "results.csv").read_text().splitlines()))
    assert len(rows) == 6 and float(rows[-1]["train/cls_loss"]) < float(rows[0]["train/cls_loss"])
    saved = json.loads((result.folder / "metrics.json").read_text())
    assert saved["top1"] == result.metrics["metrics/accuracy_top1"] and len(saved["per_class"]) == 3
    for name in ("per_class.csv", "predictions.csv", "confusion_matrix.csv", "confusion_matrix.png", "results.png"):
        assert (result.folder / name).is_file(), name
    assert (result.folder / "train_batch0.jpg").is_file()

    from models.backends import load_predictor

    predictor = load_predictor(result.best, device="cpu")
    measured, index = validate_classifier(predictor, load_data(folder), DIST, batch_size=7)
    assert measured.metrics["top1"] == saved["top1"] and len(index) == 18
    best = PictureClassifier(predictor)([index.image(0)])[0]
    assert best.cls.tolist() == measured.top[0].tolist() and np.allclose(best.conf, measured.confidence[0], atol=1e-5)
    loaded = load_model(result.best)
    assert loaded.names == ["middle", "narrow", "wide"] and loaded.meta["task"] == "classify"
    assert loaded.meta["preprocessing"]["resize"] == "short side, center crop"


def test_resumed_training_is_exact(folder: Path, tmp_path: Path) -> None:
    """Stopped after two of three epochs and resumed: the weights of the uninterrupted run, bit by bit."""
    common: dict[str, Any] = dict(
        cfg=str(small_cfg(tmp_path)), data=str(folder), batch_size=12, imgsz=16, workers=0, device="cpu", noplots=True,
        hyp=["lr0=0.02", "nominal_batch=12", "step_decay=0.5", "warmup_epochs=0", "mosaic=0"],
        project=str(tmp_path / "r"),
    )  # fmt: skip
    whole = train.run(**common, epochs=3, name="whole")
    states = torch.load(whole.folder / "weights" / "last.pt", weights_only=True)
    kept: dict[str, Any] = {}
    from utils.engine.training.trainer import Trainer

    original = Trainer._finish_epoch

    class Stop(Exception):
        pass

    def stop_after_two(self: Trainer) -> None:
        original(self)
        if self.progress.epoch == 2:
            raise Stop

    Trainer._finish_epoch = stop_after_two  # type: ignore[method-assign]
    try:
        with pytest.raises(Stop):
            train.run(**common, epochs=3, name="half")
    finally:
        Trainer._finish_epoch = original  # type: ignore[method-assign]
    train.run(resume=str(tmp_path / "r" / "half" / "weights" / "last.pt"))
    kept = torch.load(tmp_path / "r" / "half" / "weights" / "last.pt", weights_only=True)
    assert all(torch.equal(kept["train"]["raw"][k], v) for k, v in states["train"]["raw"].items())
    assert kept["model_cfg"] == states["model_cfg"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"imgsz": 15}, "not a multiple"),
        ({"single_cls": True}, "--single-cls"),
        ({"cfg": "yolov5-spd-n", "imgsz": 64}, "for classification"),
    ],
)
def test_what_makes_no_sense_is_refused(options: dict, message: str, folder: Path, tmp_path: Path) -> None:
    base = dict(cfg=str(small_cfg(tmp_path)), data=str(folder), imgsz=16, epochs=1, workers=0, project=str(tmp_path))
    with pytest.raises(UserError, match=message):
        train.run(**{**base, **options})


def test_another_class_count_is_refused(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And class names in another order are said: the accuracy would be that of other classes."""
    from models.backends.pytorch import PyTorchPredictor

    predictor = PyTorchPredictor(build_model(str(small_cfg(tmp_path)), nc=3), ["narrow", "middle", "wide"], imgsz=16)
    validate_classifier(predictor, load_data(folder), DIST)
    assert "2 class names differ between model and" in "".join(capsys.readouterr())
    predictor = PyTorchPredictor(build_model(str(small_cfg(tmp_path)), nc=2), ["a", "b"], imgsz=16)
    with pytest.raises(UserError, match="the model has 2 classes"):
        validate_classifier(predictor, load_data(folder), DIST)
