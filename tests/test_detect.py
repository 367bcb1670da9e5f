"""detect.py as a whole: from flags to files, with random weights and with a predictor that sees red."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch

import detect
from models import build_model
from models.weights import pack_model
from tests.media import RedFinder, one_thread, with_squares, write_picture, write_video  # noqa: F401
from utils.core.checkpoint import save_checkpoint
from utils.core.errors import UserError
from utils.data.frames import Frame, Tally
from utils.engine.inference.predict import Detector, PredictSettings

NAMES = ["ant", "bee", "cat"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A checkpoint of a very narrow yolov5n."""
    torch.manual_seed(0)
    config = {**build_model("yolov5n", nc=3).cfg, "width_multiple": 0.125}
    path = tmp_path_factory.mktemp("weights") / "tiny.pt"
    save_checkpoint(path, pack_model(build_model(config, nc=3), NAMES, 64))
    return path


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for i in range(3):
        image = np.random.default_rng(i).integers(0, 255, (48 + 16 * i, 64, 3), np.uint8)
        cv2.imwrite(str(folder / f"{'abc'[i]}.png"), image)
    return folder


@pytest.fixture
def everything(tmp_path):
    """Options that make random weights find something, and write every kind of file."""
    return {
        "imgsz": 64,
        "device": "cpu",
        "conf_thres": 1e-4,
        "max_det": 4,
        "project": tmp_path / "runs",
        **dict.fromkeys(("save_txt", "save_conf", "save_crop", "save_csv", "save_json"), True),
    }


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_pictures_give_every_kind_of_file(weights, pictures, everything, capsys):
    report = detect.run(weights=weights, source=pictures, **everything)
    folder = report.save_dir
    assert report.frames == 3 and not report.failed and folder.name == "exp"
    assert {"a.png", "b.png", "c.png", "labels", "crops", "predictions.csv", "predictions.ndjson"} == {
        p.name for p in folder.iterdir()
    }
    records = lines_of(folder / "predictions.ndjson")
    assert [r["source"].rsplit("/")[-1] for r in records] == ["a.png", "b.png", "c.png"]
    assert sum(len(r["boxes"]) for r in records) == report.boxes > 0
    assert len((folder / "labels" / "a.txt").read_text().split()) == 6 * len(records[0]["boxes"])
    assert len((folder / "predictions.csv").read_text().splitlines()) == report.boxes + 1
    assert len(list((folder / "crops").rglob("*.jpg"))) == report.boxes
    out = capsys.readouterr().out
    assert f"image 1/3 {pictures}/a.png: 48x64 " in out and "ms\n" in out
    assert "Speed: " in out and f"Results saved to {folder}" in out
    assert detect.run(weights=weights, source=pictures / "a.png", **everything).save_dir.name == "exp2"


def test_a_video_is_written_tracked_and_numbered(weights, tmp_path, everything, capsys):
    pytest.importorskip("trackers")
    write_video(tmp_path / "v.avi", frames=8, fps=10)
    report = detect.run(weights=weights, source=tmp_path / "v.avi", track="bytetrack", vid_stride=2, **everything)
    capture = cv2.VideoCapture(str(report.save_dir / "v.mp4"))
    assert capture.get(cv2.CAP_PROP_FRAME_COUNT) == 4 and capture.get(cv2.CAP_PROP_FPS) == pytest.approx(5)
    records = lines_of(report.save_dir / "predictions.ndjson")
    assert [r["frame"] for r in records] == [1, 3, 5, 7]
    assert np.allclose([r["timestamp"] for r in records], [0, 0.2, 0.4, 0.6], atol=1e-3)
    assert all("track" in box for r in records for box in r["boxes"])
    assert "video 1/1 (7/8)" in capsys.readouterr().out


def test_tracking_needs_a_sequence(weights, pictures, everything):
    pytest.importorskip("trackers")
    with pytest.raises(UserError, match="--track needs a video or a stream"):
        detect.run(weights=weights, source=pictures, track="bytetrack", **everything)


def test_batches_slices_augmentation_and_ensembles_run(weights, pictures, everything):
    plain = detect.run(weights=weights, source=pictures, **everything)
    batched = detect.run(weights=weights, source=pictures, batch_size=3, **everything)
    one, other = (lines_of(r.save_dir / "predictions.ndjson") for r in (plain, batched))
    for a, b in zip(one, other, strict=True):
        assert a["source"] == b["source"]
        assert np.allclose([x["xyxy"] for x in a["boxes"]], [x["xyxy"] for x in b["boxes"]], atol=0.05)
    options = {**everything, "save_txt": False, "save_conf": False, "save_crop": False, "nosave": True}
    for more in ({"slice": 32, "batch_size": 4}, {"augment": True}, {"weights": [weights, weights]}):
        assert detect.run(**{"weights": weights, "source": pictures, **options, **more}).frames == 3


def test_nothing_is_written_when_nothing_is_asked_for(weights, pictures, tmp_path):
    report = detect.run(weights=weights, source=pictures, imgsz=64, device="cpu", nosave=True, project=tmp_path / "r")
    assert report.save_dir is None and not (tmp_path / "r").exists()


def test_odd_pictures_get_through(weights, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    write_picture(folder / "dot.png", (1, 1))
    write_picture(folder / "tower.png", (10_000, 200))
    write_picture(folder / "road.jpg", (200, 10_000))
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff but no picture")
    report = detect.run(weights=weights, source=folder, imgsz=64, device="cpu", conf=1e-4, project=tmp_path / "runs")
    assert report.frames == 3 and [name.rsplit("/")[-1] for name in report.failed] == ["broken.jpg"]


def test_only_unreadable_pictures_are_an_error(weights, tmp_path, capsys):
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    with pytest.raises(UserError, match="none of the 1 source files can be read"):
        detect.run(weights=weights, source=tmp_path / "broken.jpg", imgsz=64, device="cpu", project=tmp_path / "runs")
    assert "broken.jpg: skipped" in capsys.readouterr().out


def test_sources_are_never_overwritten(weights, pictures):
    before = {p: p.read_bytes() for p in pictures.iterdir()}
    with pytest.raises(UserError, match="holds the source"):
        detect.run(
            weights=weights, source=pictures, imgsz=64, device="cpu", project=pictures.parent, name="in", exist_ok=True
        )
    assert before == {p: p.read_bytes() for p in pictures.iterdir()}


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "no --weights given"),
        (["--weights", "x.pt", "--source", "nowhere.jpg"], "'nowhere.jpg' not found"),
        (["--weights", "x.pt"], "no --source given"),
        (["--weights", "x.pt", "--source", "a.png"], "x.pt"),
        (["--visualize"], "--visualize does not exist here"),
        (["--save-format", "1"], "--save-json"),
        (["--conf-thresh", "1"], "did you mean"),
        (["--weights", "x.pt", "--source", "0", "--line-thickness", "0"], "--line-thickness 0"),
        (["--weights", "x.pt", "--source", "0", "--track", "deep"], "deep"),
        (["--weights", "x.pt", "--source", "a.png", "--view-img"], "--view-img needs"),
        (["--weights", "x.pt", "--source", "a.png", "--save-conf"], "give that too"),
        (["--weights", "x.pt", "--source", "a.png", "--overlap", "0.5"], "--overlap is about the slices"),
    ],
)
def test_mistakes_are_named_in_one_line(argv, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cv2, "getBuildInformation", lambda: "GUI: NONE\n")
    write_picture(tmp_path / "a.png")
    with pytest.raises(UserError) as error:
        detect.main(argv)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_names_that_people_type_work(weights, pictures, tmp_path):
    argv = f"--weights {weights} --source {pictures}/a.png {pictures}/b.png --img 64 --conf 0.0001 --iou 0.5 --batch 2"
    assert detect.main([*argv.split(), "--device", "cpu", "--project", str(tmp_path / "r"), "--save_txt"]) == 0
    assert len(list((tmp_path / "r" / "exp" / "labels").iterdir())) == 2


def test_a_full_disk_is_named(weights, pictures, everything, monkeypatch):
    def full(self, frame, detections):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(detect.TextWriter, "write", full)
    with pytest.raises(UserError, match="No space left on device"):
        detect.run(weights=weights, source=pictures, **everything)


class Synthetic:
    """A source of many small frames that nothing holds on to."""

    live, items, files = False, 1, ()

    def __init__(self, count: int, side: int) -> None:
        self.count, self.side, self.tally = count, side, Tally()

    def batches(self, size):
        for index in range(1, self.count + 1, size):
            frames = []
            for i in range(index, min(index + size, self.count + 1)):
                image = with_squares((self.side, self.side), [(i % 50, 20, i % 50 + 10, 60)])
                frames.append(Frame(image, "synthetic", "video", 1, 1, i, self.count, i / 25, 25.0))
            self.tally.frames += len(frames)
            yield frames

    def close(self):
        pass


def run_synthetic(count, folder, monkeypatch, side=96):
    source = Synthetic(count, side)
    settings = PredictSettings(imgsz=(96, 96), batch_size=4)
    monkeypatch.setattr(detect, "open_source", lambda *args, **options: source)
    monkeypatch.setattr(detect, "build_runner", lambda cfg: Detector(RedFinder(), settings))
    return detect.run(weights="x", source="x", project=folder, batch_size=4, save_json=True, save_csv=True)


def resident_mib() -> float:
    """What the process holds in memory."""
    status = Path("/proc/self/statm")
    if not status.exists():
        pytest.skip("needs /proc to see the memory of the process")
    return int(status.read_text().split()[1]) * os.sysconf("SC_PAGESIZE") / 2**20


def memory_growth(count, folder, monkeypatch, side) -> float:
    """MiB that the process gains over `count` frames after a shorter stretch."""
    run_synthetic(40, folder, monkeypatch, side)
    before = resident_mib()
    report = run_synthetic(count, folder, monkeypatch, side)
    assert report.frames == count and len(lines_of(report.save_dir / "predictions.ndjson")) == count
    return resident_mib() - before


def test_memory_does_not_grow_with_the_frames(tmp_path, monkeypatch):
    assert memory_growth(100, tmp_path, monkeypatch, side=640) < 40  # frames alone are 117 MiB


@pytest.mark.slow
def test_memory_does_not_grow_over_10_000_frames(tmp_path, monkeypatch):
    assert memory_growth(10_000, tmp_path, monkeypatch, side=96) < 30  # frames alone are 264 MiB


def test_an_interrupt_keeps_what_was_found(tmp_path, monkeypatch, capsys):
    original = Detector.__call__
    calls = SimpleNamespace(count=0)

    def interrupted(self, images):
        calls.count += 1
        if calls.count == 3:
            raise KeyboardInterrupt
        return original(self, images)

    monkeypatch.setattr(Detector, "__call__", interrupted)
    report = run_synthetic(100, tmp_path, monkeypatch)
    assert len(lines_of(report.save_dir / "predictions.ndjson")) == 8
    assert (report.save_dir / "synthetic.mp4").is_file() and "interrupted" in capsys.readouterr().out


def test_a_classifier_names_pictures(weights, pictures, tmp_path, capsys):
    torch.manual_seed(1)
    names = ["ant", "bee", "cat", "dog", "elk", "fox", "gnu"]
    save_checkpoint(tmp_path / "c.pt", pack_model(build_model("resnet18", nc=7), names, 32))
    out = {"save_txt": True, "save_json": True, "save_csv": True, "project": tmp_path / "runs", "device": "cpu"}
    report = detect.run(weights=tmp_path / "c.pt", source=pictures, **out)
    records = lines_of(report.save_dir / "predictions.ndjson")
    assert report.frames == 3 and report.boxes == 0 and len(records) == 3
    for record in records:
        conf = [c["confidence"] for c in record["classes"]]
        assert len(conf) == 5 and conf == sorted(conf, reverse=True) and sum(conf) <= 1.0001
    best = records[0]["classes"][0]
    text = (report.save_dir / "labels" / "a.txt").read_text()
    assert text.startswith(f"{best['confidence']:.4f} {best['name']}\n")
    assert len((report.save_dir / "predictions.csv").read_text().splitlines()) == 16
    assert f"48x64 {best['name']} {best['confidence']:.2f}, " in capsys.readouterr().out
    assert (cv2.imread(str(report.save_dir / "a.png")) != cv2.imread(str(pictures / "a.png"))).any()
    hidden = detect.run(weights=tmp_path / "c.pt", source=pictures, hide_conf=True, project=tmp_path / "h")
    assert (cv2.imread(str(report.save_dir / "a.png")) != cv2.imread(str(hidden.save_dir / "a.png"))).any()
    wrongs = ({"track": "sort"}, {"slice": 32}, {"save_crop": True}, {"save_conf": True, "save_txt": True})
    for wrong in (*wrongs, {"weights": [weights, tmp_path / "c.pt"]}):
        with pytest.raises(UserError, match="c.pt', a classifier|c.pt' is a classifier"):
            detect.run(**{"weights": tmp_path / "c.pt", "source": pictures, "device": "cpu", **wrong})


@pytest.mark.slow
def test_the_command_line_exits_with_0_or_1_and_one_line(weights, pictures, tmp_path, root):
    def call(*argv):
        command = [sys.executable, str(root / "detect.py"), *map(str, argv)]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)

    good = call("--weights", weights, "--source", pictures, "--img", 64, "--device", "cpu")
    assert good.returncode == 0 and not good.stderr
    bad = call("--weights", weights, "--source", "rtsp://u:secret@127.0.0.1:9/x", "--stream-timeout", 1, "--img", 64)
    assert bad.returncode == 1 and bad.stderr.startswith("error: no frame came") and bad.stderr.count("\n") == 1
    assert "secret" not in bad.stderr + bad.stdout
