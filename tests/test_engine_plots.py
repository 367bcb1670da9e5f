"""Figures and pictures are written, whole, for ordinary and for odd data."""

import csv
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from tests.test_engine_coco_eval import empty, random_case
from utils.engine.evaluation.coco_eval import TABLE, coco_metrics
from utils.engine.evaluation.report import plain, shown, table, write_confusion
from utils.engine.figures import plots
from utils.engine.figures.pictures import MAX_IMAGES, BatchPictures, draw_batch, draw_train_batch, mosaic, target_rows
from utils.engine.speed import Speed, speed_line
from utils.ops.metrics import confusion_matrix


def opened(path: Path) -> Image.Image:
    image = Image.open(path)
    image.load()
    return image


@pytest.mark.parametrize("case", [random_case(0), empty()], ids=["some", "nothing"])
def test_curves_and_confusion_are_drawn(case, tmp_path: Path):
    truth, found = case
    metrics, curves = coco_metrics(truth, found)
    ap = [row["AP50"] for row in metrics["per_class"]]
    names = [f"{plots.plot_curves.__name__} {c}" for c in range(truth.nc)]
    paths = plots.plot_curves(curves, names, ap, tmp_path)
    assert [p.name for p in paths] == ["PR_curve.png", "F1_curve.png", "P_curve.png", "R_curve.png"]
    matrix = confusion_matrix(truth.objects, found, truth.nc)
    paths += plots.plot_confusion(matrix, names, tmp_path)
    assert all(opened(path).width > 300 for path in paths)
    rows = list(csv.reader(write_confusion(tmp_path, matrix, names).read_text().splitlines()))
    assert rows[0][-1] == "background" and np.array(rows[1:])[:, 1:].astype(int).tolist() == matrix.tolist()


def test_results_with_gaps_and_padding_are_drawn(tmp_path: Path):
    path = tmp_path / "results.csv"
    path.write_text("epoch,train/box_loss,  metrics/AP_S,x/lr0\n0,0.1,nan,0.01\n1,0.05,,0.02\n2,0.04,0.3,\n")
    assert opened(plots.plot_results(path)).width > 300
    path.write_text("epoch,a\n")
    plots.plot_results(path)


def test_label_statistics_of_some_and_of_none(tmp_path: Path):
    rng = np.random.default_rng(0)
    xy = rng.uniform(0, 300, (50, 2))
    boxes = np.concatenate([xy, xy + rng.uniform(1, 60, (50, 2))], 1)
    shapes = np.full((50, 2), 400)
    plots.plot_labels(rng.integers(0, 3, 50), boxes, shapes, "abc", tmp_path / "labels.jpg")
    plots.plot_labels(np.zeros(0), np.zeros((0, 4)), np.zeros((0, 2)), "abc", tmp_path / "none.jpg")
    assert opened(tmp_path / "labels.jpg").width > 500 and opened(tmp_path / "none.jpg").width > 500


def batch(n: int, hw=(64, 96)) -> SimpleNamespace:
    images = torch.full((n, 3, *hw), 90, dtype=torch.uint8)
    targets = torch.tensor([[i, i % 2, 0.5, 0.5, 0.25, 0.5] for i in range(n)]).reshape(-1, 6)
    return SimpleNamespace(images=images, targets=targets, indices=range(n), geometries=[None] * n)


def test_target_rows_are_pixels():
    rows = target_rows(batch(3).targets, 4, (64, 96))
    assert rows[1].tolist() == [[36, 16, 60, 48, 1]] and len(rows[3]) == 0


def test_batch_pictures_hold_labels_and_confident_predictions(tmp_path: Path):
    pictures = BatchPictures(tmp_path, ["a", "b"], limit=1)
    found = torch.tensor([[30.0, 10, 50, 30, 0.9, 1], [1, 50, 9, 60, 0.1, 0]])
    for number in (0, 1):
        pictures(number, batch(2), [found, torch.zeros(0, 6)])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["val_batch0_labels.jpg", "val_batch0_pred.jpg"]
    drawn = np.asarray(opened(tmp_path / "val_batch0_pred.jpg")).astype(int)
    assert drawn.shape == (192, 578, 3), "small images are shown larger, in whole steps"
    assert np.abs(drawn[:, :288] - 90).max() > 60 and np.abs(drawn[:, 290:] - 90).max() < 20
    assert np.abs(drawn[144:, :60] - 90).max() < 20, "a prediction below the confidence is drawn"


def test_large_and_empty_batches(tmp_path: Path):
    assert draw_train_batch(batch(0), ["a"], tmp_path / "none.jpg") is None and not (tmp_path / "none.jpg").exists()
    path = draw_train_batch(batch(MAX_IMAGES + 3, (640, 640)), ["a", "b"], tmp_path / "many.jpg")
    assert path is not None and max(opened(path).size) <= 1930


def test_odd_boxes_and_unknown_classes_do_not_stop_a_picture(tmp_path: Path):
    rows = [np.array([[np.nan, 0, 5, 5, 0], [-50, -50, 900, 900, 7], [9, 9, 3, 3, 1]])]
    assert draw_batch(batch(1).images, rows, ["a"], tmp_path / "odd.jpg") is not None


def test_mosaic_places_pictures_row_by_row():
    tiles = [np.full((2, 3, 3), v, np.uint8) for v in (1, 2, 3)]
    out = mosaic(tiles, columns=2, gap=1)
    assert out.shape == (5, 7, 3)
    assert (out[:2, :3] == 1).all() and (out[:2, 4:] == 2).all() and (out[3:, :3] == 3).all() and (out[2] == 255).all()


def test_table_shows_undefined_numbers_as_dashes():
    truth, found = random_case(1)
    metrics, _ = coco_metrics(truth, found)
    lines = table(metrics).splitlines()
    assert lines[0].split() == ["Class", "Images", "Instances", *TABLE]
    assert [line.split()[0] for line in lines[1:]] == ["all", "a", "b", "c"]
    assert " - " in table(coco_metrics(*empty())[0]) and len(table(metrics, per_class=False).splitlines()) == 2
    assert shown(float("nan")) == "-" and shown(0.12345) == "0.123"


def test_plain_values_are_strict_json():
    value = {"a": float("nan"), "b": (np.float32(1.5), np.int64(2)), "c": {1: float("inf")}}
    assert plain(value) == {"a": None, "b": [1.5, 2], "c": {"1": None}}


def test_speed_line():
    line = speed_line({"pre-process": 0.51, "inference": 20, "NMS": 1}, (8, 3, 640, 640))
    assert line == "Speed: 0.5ms pre-process, 20.0ms inference, 1.0ms NMS per image at shape (8, 3, 640, 640)"


def test_speeds_of_processes_add_up():
    parts = [Speed({"inference": 3.0}, 2), Speed({"inference": 1.0, "pre-process": 0.4}, 2, (1, 3, 64, 64)), Speed()]
    total = Speed.total(parts)
    assert total.ms() == pytest.approx({"pre-process": 100.0, "inference": 1000.0}) and total.shape == (1, 3, 64, 64)
    assert list(total.ms()) == ["pre-process", "inference"], "stages in their order"


def test_legends_have_names_that_begin_with_an_underscore():
    fig, axes = plots.figure()
    for name in ("_void", "car"):
        axes[0, 0].plot([0, 1], [0, 1], label=plots.legend_text(name))
    assert [text.get_text().strip() for text in axes[0, 0].legend().get_texts()] == ["_void", "car"]


def test_dollar_signs_in_names_are_no_formulas(tmp_path: Path):
    names = ["$x^{$", "$5", "a_b"]
    assert opened(plots.heat(np.eye(3), names, "$x^{$", tmp_path / "a.png", "{:.0f}", ("x", "y"))).size[0] > 100
    plots.plot_labels(
        np.array([0, 1]), np.array([[1, 1, 9, 9]] * 2), np.array([[20, 20]] * 2), names, tmp_path / "l.jpg"
    )
    assert opened(tmp_path / "l.jpg").size[0] > 100
