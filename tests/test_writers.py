"""Writers: files read back say what the detections said; nothing of the user's is overwritten."""

import csv
import json
import re
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from utils.core.errors import UserError
from utils.data.frames import Frame
from utils.engine.figures.draw import Style, annotate, color_of, label_of, text_color
from utils.engine.inference import writers
from utils.engine.inference.records import detection_forms
from utils.engine.inference.writers import (
    CropWriter,
    CsvWriter,
    NdjsonWriter,
    PictureWriter,
    Stems,
    TextWriter,
    ViewWriter,
    crop,
    refuse_overwrite,
)
from utils.ops.detections import Detections

FORMS = detection_forms(Style())
NAMES = ("person", "../evil/path", "b/c", "b_c")


def some(n=3, hw=(48, 64), track=False):
    """Detections of classes 0, 1, 2, ... with boxes inside a picture of `hw`."""
    xyxy = [[2 + 3 * i, 4, 2 + 3 * i + 10, 4 + 20] for i in range(n)]
    ids = np.arange(n) - 1 if track else None
    return Detections(np.array(xyxy, np.float32).reshape(-1, 4), np.linspace(0.9, 0.3, n), np.arange(n) % 4, NAMES, ids)


def picture(name="street.jpg", item=1, hw=(48, 64), **options):
    image = np.zeros((*hw, 3), np.uint8)
    image[:, :, 0] = np.arange(hw[1])
    return Frame(image, f"in/{name}", "image", item, path=Path(f"in/{name}"), **options)


def video(index, item=1, fps=12.5, name="cars.mp4", kind="video", hw=(48, 64), **options):
    image = np.full((*hw, 3), 10 * index % 250, np.uint8)
    path = Path(f"in/{name}") if kind == "video" else None
    options.setdefault("timestamp", (index - 1) / fps if fps else 0)
    shown = f"in/{name}" if path else "rtsp://cam:554/live"
    return Frame(image, shown, kind, item, 2, index, 10, fps=fps, path=path, **options)


# ------------------------------------------------------------------------------------------------ drawing


def test_annotate_leaves_the_picture_alone_and_draws_every_box():
    frame, detections = picture(), some()
    before = frame.image.copy()
    drawn = annotate(frame.image, detections, Style(line_width=1, hide_labels=True))
    assert np.array_equal(frame.image, before) and drawn.shape == before.shape and drawn.dtype == np.uint8
    for i in range(3):
        x1 = int(detections.xyxy[i, 0])
        assert tuple(drawn[14, x1]) == color_of(int(detections.cls[i]))
    assert np.array_equal(annotate(frame.image, some(0)), before)


@pytest.mark.parametrize("hw", [(1, 1), (3, 200), (10_000, 20)])
def test_annotate_takes_any_size_and_any_text(hw):
    box = np.array([[0, 0, hw[1], hw[0]]], np.float32)
    detections = Detections(box, np.ones(1), np.zeros(1, int), ("車 Straße\nnew line",))
    assert annotate(np.zeros((*hw, 3), np.uint8), detections).shape == (*hw, 3)


def test_lines_are_thin_on_small_objects():
    box = np.array([[20, 20, 29, 29]], np.float32)
    drawn = annotate(np.zeros((48, 64, 3), np.uint8), Detections(box, np.ones(1), np.zeros(1, int)), Style(3, True))
    assert not drawn[22:28, 22:28].any()


def test_labels_name_class_track_and_confidence():
    detections = some(track=True)
    assert [label_of(detections, i) for i in (0, 1)] == ["person 0.90", "#0 ../evil/path 0.60"]
    assert label_of(detections, 0, hide_conf=True) == "person"
    assert text_color((255, 255, 255)) == (0, 0, 0) and text_color((0, 0, 90)) == (255, 255, 255)
    assert len({color_of(i) for i in range(80)}) == 80


# ------------------------------------------------------------------------------------------- text and tables


def test_text_rows_give_the_boxes_back(tmp_path):
    writer = TextWriter(tmp_path, detection_forms(Style(), save_conf=True))
    frame, detections = picture(), some()
    writer.write(frame, detections)
    rows = np.loadtxt(tmp_path / "labels" / "street.txt")
    h, w = frame.image.shape[:2]
    x, y, bw, bh = rows[:, 1:5].T * np.array([w, h, w, h])[:, None]
    assert np.allclose(np.stack((x - bw / 2, y - bh / 2, x + bw / 2, y + bh / 2), 1), detections.xyxy, atol=1e-3)
    assert rows[:, 0].tolist() == [0, 1, 2] and np.allclose(rows[:, 5], detections.conf, atol=1e-5)
    assert len(list((tmp_path / "labels").iterdir())) == 1


def test_text_of_videos_has_frame_numbers_and_tracks_and_stale_rows_go(tmp_path):
    writer = TextWriter(tmp_path, FORMS)
    writer.write(video(1), some(2, track=True))
    writer.write(video(7), some(1))
    assert sorted(p.name for p in (tmp_path / "labels").iterdir()) == ["cars_1.txt", "cars_7.txt"]
    assert (tmp_path / "labels" / "cars_1.txt").read_text().splitlines()[1].split()[5:] == ["0"]
    TextWriter(tmp_path, FORMS).write(video(7), some(0))
    assert not (tmp_path / "labels" / "cars_7.txt").exists()


def test_equal_names_get_files_of_their_own(tmp_path):
    writer = TextWriter(tmp_path, FORMS)
    for item, name in enumerate(["a/x.jpg", "b/x.png", "c/X.jpg", "d/x_2.jpg", "e/x.bmp"], 1):
        writer.write(picture(name, item), some(1))
    assert len(list((tmp_path / "labels").iterdir())) == 5


@pytest.mark.parametrize("video_first", [True, False])
def test_a_video_and_its_frames_as_pictures_get_files_of_their_own(video_first, tmp_path):
    writer = TextWriter(tmp_path, FORMS)
    frames = [video(1, item=1), video(2, item=1), picture("cars_1.jpg", 2), picture("Cars_2.jpg", 3)]
    for frame in frames if video_first else frames[::-1]:
        writer.write(frame, some(1))
    assert len(list((tmp_path / "labels").iterdir())) == 4


def test_stems_are_stable_within_a_video():
    stems = Stems()
    assert [stems.of_frame(video(i, item)) for i, item in ((1, 1), (2, 1), (1, 2), (2, 2))] == [
        "cars_1",
        "cars_2",
        "cars_2_1",
        "cars_2_2",
    ]


def test_csv_has_a_row_for_each_box(tmp_path):
    writer = CsvWriter(tmp_path, FORMS)
    writer.write(video(3), some(2, track=True))
    writer.write(picture(), some(1))
    writer.close()
    with open(tmp_path / "predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["Image Name"] for row in rows] == ["cars.mp4", "cars.mp4", "street.jpg"]
    assert rows[1]["Prediction"] == "../evil/path" and rows[1]["Track"] == "0" and rows[2]["Track"] == ""
    assert (rows[0]["Frame"], rows[0]["Timestamp"], rows[0]["X1"]) == ("3", "0.160", "2.00")


def test_ndjson_has_a_line_for_each_frame(tmp_path):
    writer = NdjsonWriter(tmp_path, FORMS)
    writer.write(video(3), some(2, track=True))
    writer.write(picture(), some(0))
    lines = (tmp_path / "predictions.ndjson").read_text().splitlines()  # readable before it is closed
    writer.close()
    first, second = map(json.loads, lines)
    assert (first["source"], first["frame"], first["timestamp"]) == ("in/cars.mp4", 3, 0.16)
    assert (first["height"], first["width"]) == (48, 64)
    box = {"class": 1, "name": "../evil/path", "confidence": 0.3, "xyxy": [5, 4, 15, 24], "track": 0}
    assert first["boxes"][0]["track"] is None and first["boxes"][1] == box
    assert second["kind"] == "image" and second["boxes"] == []


# -------------------------------------------------------------------------------------------------- crops


def test_crops_stay_in_their_folder_whatever_the_class_is_called(tmp_path):
    writer = CropWriter(tmp_path / "run", NAMES)
    writer.write(picture(), some(4))
    files = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*.jpg"))
    assert files == [f"run/crops/{folder}/street.jpg" for folder in ("b_c", "b_c_3", "evil_path", "person")]


def test_crops_are_cut_from_the_clean_picture_with_a_margin():
    image = picture(hw=(100, 100)).image
    cut = crop(image, np.array([40.0, 30, 60, 50]))
    assert cut.shape == (32, 32, 3) and np.array_equal(cut, image[24:56, 34:66])
    assert crop(image, np.array([-5.0, -5, 200, 200])).shape == image.shape
    assert crop(image, np.array([100.0, 100, 100, 100]), 1, 0).shape == (1, 1, 3)


def test_several_crops_of_one_class_are_numbered(tmp_path):
    detections = Detections(some(3).xyxy, np.ones(3), np.zeros(3, int), NAMES)
    CropWriter(tmp_path, NAMES).write(video(5), detections)
    names = sorted(p.name for p in (tmp_path / "crops" / "person").iterdir())
    assert names == ["cars_5.jpg", "cars_5_2.jpg", "cars_5_3.jpg"]


def test_crops_of_pictures_with_numbered_names_do_not_replace_each_other(tmp_path):
    detections = Detections(some(3).xyxy, np.ones(3), np.zeros(3, int), NAMES)
    writer = CropWriter(tmp_path, NAMES)
    for item, name in enumerate(["street.jpg", "street_2.jpg", "street_2_2.jpg"], 1):
        writer.write(picture(name, item), detections)
    assert len(list((tmp_path / "crops" / "person").iterdir())) == 9


# ------------------------------------------------------------------------------------ pictures and videos


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.jpg", "a.jpg"),
        ("a.PNG", "a.png"),
        ("a.webp", "a.webp"),
        ("a.tif", "a.tif"),
        ("a.gif", "a.jpg"),
        ("a", "a.jpg"),
    ],
)
def test_pictures_keep_their_name_and_format_where_it_can_be_written(tmp_path, name, expected):
    PictureWriter(tmp_path, FORMS).write(picture(name), some(1))
    with Image.open(tmp_path / expected) as image:
        assert image.size == (64, 48)


def read_video(path):
    capture = cv2.VideoCapture(str(path))
    fps, values = capture.get(cv2.CAP_PROP_FPS), []
    while True:
        ok, image = capture.read()
        if not ok:
            return fps, values
        values.append(float(image.mean()))


def test_videos_keep_rate_length_and_order(tmp_path):
    writer = PictureWriter(tmp_path, FORMS)
    for item in (1, 2):
        for index in range(1, 11):
            writer.write(video(index, item, hw=(47, 63)), some(0))
    writer.close()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cars.mp4", "cars_2.mp4"]
    fps, values = read_video(tmp_path / "cars.mp4")
    assert fps == pytest.approx(12.5) and np.allclose(values, 10 * np.arange(1, 11), atol=4)


def test_recordings_of_streams_last_as_long_as_reality(tmp_path):
    writer = PictureWriter(tmp_path, FORMS)
    times = [100.0, 100.01, 100.02, 100.5, 101.0, 200.0, 200.04]  # faster and slower than 25 a second, and a gap
    for index, seconds in enumerate(times, 1):
        writer.write(video(index, kind="stream", fps=25.0, timestamp=seconds), some(0))
    writer.close()
    (path,) = tmp_path.iterdir()
    assert path.name == "rtsp_cam_554_live.mp4"
    assert len(read_video(path)[1]) == pytest.approx(25 * (1.0 + writers.LONGEST_STILL + 0.04), abs=3)


def test_a_stream_that_changes_its_size_starts_a_new_part(tmp_path):
    writer = PictureWriter(tmp_path, FORMS)
    writer.write(video(1, kind="stream", timestamp=1.0), some(0))
    writer.write(video(2, kind="stream", timestamp=1.1, hw=(96, 64)), some(0))
    writer.close()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["rtsp_cam_554_live.mp4", "rtsp_cam_554_live_part2.mp4"]


@pytest.mark.parametrize("folder", [".", "pictures", "pictures/deep", "link"])
def test_results_never_land_among_the_sources(tmp_path, folder):
    source = tmp_path / "pictures" / "deep" / "a.jpg"
    source.parent.mkdir(parents=True)
    source.write_bytes(b"")
    (tmp_path / "link").symlink_to(source.parent, target_is_directory=True)
    with pytest.raises(UserError, match="holds the source"):
        refuse_overwrite(tmp_path / folder, [source])
    refuse_overwrite(tmp_path / "runs", [source])


def test_view_without_windows_is_refused(monkeypatch):
    monkeypatch.setattr(cv2, "getBuildInformation", lambda: "  GUI:                           NONE\n")
    with pytest.raises(UserError, match="--view-img needs an OpenCV with windows"):
        ViewWriter(FORMS)
    monkeypatch.setattr(cv2, "getBuildInformation", lambda: "  GUI:                           QT5\n")
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    monkeypatch.setattr("sys.platform", "linux")
    with pytest.raises(UserError, match="DISPLAY"):
        ViewWriter(FORMS)


@pytest.mark.parametrize("pictures", [["cars.png"], ["cars.png", "cars.jpg"], ["cars_2.png", "cars.png"]])
def test_pictures_that_are_called_like_a_video_before_them(pictures: list[str]) -> None:
    """`cars_2` would be the name of a frame; names are found, and all differ from those of frames."""
    stems = Stems()
    video = Frame(np.zeros((4, 4, 3), np.uint8), "cars.mp4", "video", 1, 9, path=Path("cars.mp4"))
    assert stems.of(video) == "cars"
    names = [stems.of(replace(video, name=n, kind="image", item=i, path=Path(n))) for i, n in enumerate(pictures, 2)]
    assert len(set(names)) == len(names) and not any(re.fullmatch(r"cars(_\d+)?", name) for name in names)
