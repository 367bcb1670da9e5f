"""The drawn data set: deterministic, small objects, labels that fit the pixels, resumable writing."""

import hashlib
from pathlib import Path

import cv2
import numpy as np
import pytest

from utils.core.yamls import load_yaml
from utils.data import scenes


def digest(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_scene_is_a_function_of_its_key() -> None:
    first, again, other = scenes.draw_scene(1, 7), scenes.draw_scene(1, 7), scenes.draw_scene(1, 8)
    assert np.array_equal(first.image, again.image) and np.array_equal(first.xyxy, again.xyxy)
    assert not np.array_equal(first.image, other.image)
    assert not np.array_equal(first.image, scenes.draw_scene(2, 7).image)
    assert not np.array_equal(first.image, scenes.draw_scene(1, 7, stream=0).image)


def test_most_objects_are_small_and_every_class_occurs() -> None:
    drawn = [scenes.draw_scene(0, number) for number in range(60)]
    assert all(scene.image.shape == (160, 160, 3) and scene.image.dtype == np.uint8 for scene in drawn)
    wh = np.concatenate([scene.xyxy[:, 2:] - scene.xyxy[:, :2] for scene in drawn])
    side = np.sqrt(wh.prod(1))
    assert np.mean((side >= 4) & (side <= 24)) > 0.75
    assert np.mean(side > 96) < 0.05
    assert set(np.concatenate([scene.cls for scene in drawn]).tolist()) == set(range(len(scenes.NAMES)))
    assert any(len(scene.cls) == 0 for scene in drawn), "some scenes are pure background"


def test_boxes_lie_inside_and_enclose_what_was_painted() -> None:
    for number in range(20):
        scene = scenes.draw_scene(3, number, (96, 128))
        assert (scene.xyxy[:, :2] >= 0).all() and (scene.xyxy[:, 2:] <= (128, 96)).all()
        assert (scene.xyxy[:, 2:] > scene.xyxy[:, :2]).all()
    for cls in range(len(scenes.NAMES)):
        canvas = np.zeros((64, 64, 3), np.float32)
        box = scenes._paint(canvas, scenes.Thing(cls, (30.3, 33.6), 20.0, 0.7, (255.0, 255.0, 255.0)))
        assert box is not None
        ys, xs = np.nonzero(canvas.max(-1) > 0.3 * 255)
        painted = np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1])
        assert np.abs(painted - box).max() <= 1


def test_object_outside_the_picture_gives_no_box() -> None:
    canvas = np.zeros((32, 32, 3), np.float32)
    assert scenes._paint(canvas, scenes.Thing(0, (-20.0, 5.0), 10.0, 0.0, (255.0, 0.0, 0.0))) is None
    assert not canvas.any()


def test_write_dataset_is_complete_repeatable_and_kept(tmp_path: Path) -> None:
    spec = scenes.write_dataset(tmp_path / "a", train=4, val=2, size=96)
    data = load_yaml(spec)
    assert data["names"] == list(scenes.NAMES)
    before = digest(spec.parent)
    assert len([name for name in before if name.startswith("images/")]) == 6
    stamp = (spec.parent / "images/train/00000.png").stat().st_mtime_ns
    assert scenes.write_dataset(tmp_path / "a", train=4, val=2, size=96) == spec
    assert (spec.parent / "images/train/00000.png").stat().st_mtime_ns == stamp
    assert digest(scenes.write_dataset(tmp_path / "b", train=4, val=2, size=96).parent) == before
    spec.unlink()  # as an interrupted run leaves it
    scenes.write_dataset(tmp_path / "a", train=3, val=2, size=96)
    assert len(list((tmp_path / "a/images/train").iterdir())) == 3


def test_labels_give_the_boxes_back(tmp_path: Path) -> None:
    scene = scenes.draw_scene(0, 1)
    rows = np.array([line.split() for line in scenes.label_rows(scene).splitlines()], float).reshape(-1, 5)
    center, wh = rows[:, 1:3] * 160, rows[:, 3:] * 160
    assert np.abs(np.hstack([center - wh / 2, center + wh / 2]) - scene.xyxy).max(initial=0) < 1e-3
    assert (rows[:, 0] == scene.cls).all()


@pytest.mark.parametrize("frames", [1, 6])
def test_video_has_its_frames(tmp_path: Path, frames: int) -> None:
    video = cv2.VideoCapture(str(scenes.write_video(tmp_path / "x" / "v.mp4", frames=frames)))
    count = 0
    while True:
        ok, frame = video.read()
        if not ok:
            break
        assert frame.shape == (240, 320, 3)
        count += 1
    assert count == frames


def test_class_folders(tmp_path: Path) -> None:
    root = scenes.write_class_folders(tmp_path, train=2, val=1, size=32)
    assert sorted(path.name for path in (root / "train").iterdir()) == sorted(scenes.NAMES)
    assert len(list(root.rglob("*.png"))) == 3 * len(scenes.NAMES)
    first, second = sorted((root / "train" / "boat").iterdir())
    assert first.read_bytes() != second.read_bytes()
