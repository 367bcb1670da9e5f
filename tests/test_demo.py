"""The demo: a tiny run goes through the whole line; the real one (slow) reaches what is promised."""

import json
import math
from pathlib import Path

import pytest

import demo
from utils.data.scenes import NAMES


def test_draw_only(tmp_path: Path) -> None:
    assert demo.run(draw=True, train=2, val=1, imgsz=64, datasets=str(tmp_path)) is None
    assert len(list((tmp_path / "demo" / "images").rglob("*.png"))) == 3


def test_data_yaml_of_the_demo_fits_the_drawing(root: Path) -> None:
    from utils.data.spec import load_data

    spec = load_data(root / "data" / "demo.yaml")
    assert spec.names == NAMES
    assert spec.splits["train"] == (root / "datasets" / "demo" / "images" / "train",)


def test_table_shows_undefined_numbers_as_dashes() -> None:
    row = {**dict.fromkeys(demo.COLUMNS, 0.5), "AP_L": math.nan, "parameters": 1234567, "gflops": 0.55, "ms": 12.34}
    text = demo.table({"PyTorch": row}, demo.DemoConfig())
    assert "1,234,567" in text and "0.55" in text and text.count(" - ") == 1 and "12.3" in text


def check(report: demo.DemoReport | None) -> dict[str, dict[str, float]]:
    assert report is not None
    suffixes = {path.suffix for path in report.pictures}
    assert {".png", ".jpg", ".mp4"} <= suffixes and all(path.stat().st_size for path in report.pictures)
    assert (report.folder / "train" / "weights" / "best.onnx").is_file()
    assert set(report.rows) == {"PyTorch", "ONNX"}
    stored = json.loads((report.folder / "demo.json").read_text())["rows"]
    assert stored["PyTorch"]["AP50"] == pytest.approx(report.rows["PyTorch"]["AP50"])
    assert report.rows["ONNX"]["AP"] == pytest.approx(report.rows["PyTorch"]["AP"], abs=2e-3), (
        "one evaluator, one model"
    )
    assert report.rows["PyTorch"]["parameters"] > 1e6 and report.rows["PyTorch"]["ms"] > 0
    return report.rows


@pytest.mark.slow
def test_tiny_demo_goes_through_everything(tmp_path: Path) -> None:
    report = demo.run(
        epochs=1, train=8, val=4, imgsz=64, frames=4, workers=0, device="cpu",
        datasets=str(tmp_path), project=str(tmp_path / "runs"),
    )  # fmt: skip
    check(report)


@pytest.mark.slow
def test_demo_keeps_its_promise(tmp_path: Path) -> None:
    rows = check(demo.run(device="cpu", datasets=str(tmp_path), project=str(tmp_path / "runs")))
    assert rows["PyTorch"]["AP50"] >= 0.60
    assert rows["PyTorch"]["AP"] < 0.95, "hard enough to mean something"
