"""The classification task: evaluation, loss, training and resuming."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import train
from models import build_model
from models.weights import load_model, pack_model
from tests.stripes import class_folders, ramp_index
from utils.core.checkpoint import save_checkpoint
from utils.core.dist import Dist
from utils.core.errors import UserError
from utils.core.hyp import Hyp, load_hyp
from utils.core.yamls import dump_yaml
from utils.data.folder import (
    ClassDataset,
    ClassIndex,
)
from utils.data.loader import EvalLoader
from utils.data.spec import load_data
from utils.engine.evaluation.class_comparison import compare_classes, comparison_lines, disagreements, sign_test
from utils.engine.evaluation.class_report import class_table
from utils.engine.evaluation.classification import ClassResult, measure, validate_classifier
from utils.engine.inference.classifying import PictureClassifier
from utils.engine.tasks.classify import ClassifyTask
from utils.engine.training.settings import TrainConfig

DIST = Dist.single(torch.device("cpu"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return class_folders(tmp_path / "data")


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
    """The losses of 4 accumulated batches of 2 add up to that of one batch of 8."""
    config = TrainConfig(cfg=str(small_cfg(tmp_path)), imgsz=16, batch_size=2, workers=0)
    task = ClassifyTask(build_model(config.cfg), load_data(folder), config, load_hyp(None, ["nominal_batch=8"]), DIST)
    batches = [batch for batch, _ in zip(task.loader(None).epoch(0), range(4), strict=False)]
    logits = torch.randn(4, 2, 3)
    losses = [task.loss(logits[i], batch, 2, DIST).total for i, batch in enumerate(batches)]
    labels = torch.cat([batch.targets[:, 1].long() for batch in batches])
    assert torch.allclose(sum(losses), F.cross_entropy(logits.flatten(0, 1), labels))


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
