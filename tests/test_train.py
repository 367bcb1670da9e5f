"""`train.py` as people run it: the run folder, slices, several devices, odd data sets, bad input."""

import csv
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

import train
import val
from models import build_model
from models.weights import pack_model
from tests.runs import HYP, ROOT, SMALL
from utils.core.checkpoint import load_checkpoint, save_checkpoint
from utils.core.errors import UserError
from utils.data.scenes import write_dataset


def test_the_run_folder_holds_what_users_expect(whole):
    names = {p.relative_to(whole.folder).as_posix() for p in whole.folder.rglob("*") if p.is_file()}
    expected = {
        "opt.yaml", "hyp.yaml", "results.csv", "results.png", "labels.jpg", "train_batch0.jpg", "metrics.json",
        "val_batch0_labels.jpg", "val_batch0_pred.jpg", "confusion_matrix.png", "PR_curve.png", "F1_curve.png",
        "P_curve.png", "R_curve.png", "weights/best.pt", "weights/last.pt",
    }  # fmt: skip
    assert expected <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    rows = list(csv.DictReader((whole.folder / "results.csv").open()))
    assert [row["epoch"] for row in rows] == ["0", "1"]
    assert {"train/box_loss", "metrics/mAP_0.5:0.95", "metrics/AP_S", "val/obj_loss", "x/lr2"} <= rows[0].keys()


def test_gpus_that_are_not_there_or_too_many_are_refused(monkeypatch):
    from utils.core.device import select_device
    from utils.core.dist import Dist

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="torch sees 0 CUDA devices"):
        train.main(["--data", "data/demo.yaml", "--cfg", "yolov5n", "--device", "0,1"])
    with pytest.raises(UserError, match="2 GPUs for 1 process"):
        select_device("0,1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(UserError, match="torch sees 0 CUDA devices"):
        Dist.start("0,1")


def test_image_weights_draw_all_tiles(scenes):
    """With --slice the weights belong to tiles, not to images."""
    from utils.core.config import config_from_kwargs
    from utils.core.dist import Dist
    from utils.core.hyp import Hyp
    from utils.data.spec import load_data
    from utils.engine.tasks.detect import DetectTask
    from utils.engine.training.settings import TrainConfig

    config = config_from_kwargs(TrainConfig, **{**SMALL, "data": str(scenes), "slice": 32, "noautoanchor": True})
    spec, hyp = load_data(scenes), Hyp()
    task = DetectTask(train.make_model(config, spec, hyp)[0], spec, config, hyp, Dist.single())
    assert task.samples > 2 * len(task.train_index)
    weights = task._sample_weights(np.ones(spec.nc))
    assert weights.tolist() == [len(task.dataset.objects(i)) for i in range(task.samples)]


def test_slices_are_what_anchors_and_fitness_go_by(tmp_path):
    """Sizes are those in the tiles, and the epoch's AP is that of `val.py --slice`."""
    from utils.core.config import config_from_kwargs
    from utils.core.dist import Dist
    from utils.core.hyp import Hyp
    from utils.data.spec import load_data
    from utils.engine.tasks.detect import DetectTask
    from utils.engine.training.settings import TrainConfig

    data = write_dataset(tmp_path / "large", train=6, val=3, size=256)
    options = {**SMALL, "data": str(data), "slice": 64, "overlap": 0.5}
    spec = load_data(data)
    task = DetectTask(build_model("yolov5n", nc=spec.nc), spec, config_from_kwargs(TrainConfig, **options), Hyp(),
                      Dist.single())  # fmt: skip
    sizes, parts = task._object_sizes(), [task.dataset.objects(i).xyxy for i in range(task.samples)]
    assert np.allclose(sizes, np.concatenate([p[:, 2:] - p[:, :2] for p in parts]))  # a tile of 64 px is seen at 64 px
    made = train.run(**{**options, "epochs": 1}, hyp=HYP, project=tmp_path / "runs")
    row = next(csv.DictReader((made.folder / "results.csv").open()))
    report = val.run(weights=made.folder / "weights/last.pt", data=data, slice=64, overlap=0.5, imgsz=64, workers=0,
                     device="cpu", project=tmp_path / "val", noplots=True)  # fmt: skip
    assert float(row["metrics/mAP_0.5:0.95"]) == pytest.approx(report.metrics["AP"], abs=1e-4)
    assert row["val/box_loss"] == "" and report.metrics["images"] == 3


def test_signals_reach_the_processes_of_device_0_1(tmp_path):
    """`--device 0,1` becomes torchrun: what is sent to it arrives at its workers, which end in their own time."""
    script = tmp_path / "work.py"
    script.write_text(f"""
import os, signal, sys, time
sys.path.insert(0, {str(ROOT)!r})
from utils.core.dist import launched, relaunch
if not launched():
    relaunch(2, sys.argv[1:])
mark = {str(tmp_path)!r} + "/" + os.environ["RANK"]
def end(*_):
    time.sleep(1)
    open(mark + ".ended", "w").close()
    sys.exit(75)
signal.signal(signal.SIGTERM, end)
open(mark + ".begun", "w").close()
time.sleep(100)
""")
    process = subprocess.Popen([sys.executable, str(script)], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)

    def both(what):
        deadline = time.monotonic() + 60
        while (count := len(list(tmp_path.glob(f"*.{what}")))) < 2 and time.monotonic() < deadline:
            time.sleep(0.1)
        return count == 2

    try:
        assert both("begun")
        process.terminate()
        assert both("ended")
    finally:
        process.kill()  # once in a while torchrun itself stays for minutes after its workers have ended
        process.wait()


def data_set(folder, images, labels, names=("a", "b")):
    """A data set from {stem: picture} and {stem: label text}; validation is training."""
    import cv2

    for kind in ("images", "labels"):
        (folder / kind).mkdir(parents=True)
    for stem, image in images.items():
        cv2.imwrite(str(folder / "images" / f"{stem}.png"), image)
    for stem, text in labels.items():
        (folder / "labels" / f"{stem}.txt").write_text(text)
    spec = folder / "data.yaml"
    spec.write_text(f"path: .\ntrain: images\nval: images\nnames: {list(names)}\n")
    return spec


def pictures(count, size=64):
    g = torch.Generator().manual_seed(0)
    return {f"{i}": torch.randint(0, 255, (size, size, 3), generator=g).byte().numpy() for i in range(count)}


def crowd(count):
    g = torch.Generator().manual_seed(1)
    rows = torch.rand(count, 4, generator=g) * torch.tensor([0.9, 0.9, 0.05, 0.05]) + 0.03
    return "".join(f"0 {' '.join(f'{v:.4f}' for v in row)}\n" for row in rows.tolist())


@pytest.mark.parametrize(
    ("count", "labels", "names"),
    [
        (1, {"0": "0 .5 .5 .3 .3\n"}, ("a", "b")),
        (12, {"3": "1 .5 .5 .2 .2\n"}, ("a", "b")),
        (4, {str(i): "0 .5 .5 .2 .3\n" for i in range(4)}, ("only",)),
        (2, {"0": crowd(2000), "1": crowd(2000)}, ("a",)),
    ],
    ids=["one image", "mostly unlabeled", "one class", "2000 boxes an image"],
)
def test_odd_data_sets_train(tmp_path, count, labels, names):
    spec = data_set(tmp_path / "data", pictures(count), labels, names)
    result = train.run(**{**SMALL, "epochs": 1}, data=spec, project=tmp_path / "runs")
    assert result.best.is_file()


@pytest.mark.parametrize(
    ("labels", "names", "changes", "part"),
    [
        ({}, ("a",), {}, "has a label"),
        ({"0": "5 .5 .5 .2 .2\n"}, ("a",), {}, "class"),
        ({"0": "0 .5 .5 .2 .2\n"}, ("a",), {"imgsz": 50}, "multiple of the model's largest stride"),
        ({"0": "0 .5 .5 .2 .2\n"}, ("a",), {"cfg": "yolov5nn"}, "yolov5n"),
        ({"0": "0 .5 .5 .2 .2\n"}, ("a",), {"weights": "no.pt"}, "no.pt"),
        ({"0": "0 .5 .5 .2 .2\n"}, ("a",), {"device": "7"}, "CUDA devices"),
        ({"0": "0 .5 .5 .2 .2\n"}, ("a",), {"amp": "fp16"}, "needs a GPU"),
        ({"0": "0 .5 .5 .2 .2\n"}, ("a",), {"batch_size": -1}, "CUDA"),
        ({"0": "0 .5 .5 .2 .2\n"}, ("a",), {"seed": -1}, "--seed -1; expected 0 or more"),
        ({"0": "0 .5 .5 .2 .2\n"}, ("a",), {"overlap": 0.5}, "--overlap is about the slices"),
        ({"0": "0 .5 .5 .2 .2\n"}, ("a",), {"rect": True, "image_weights": True}, "exclude each other"),
        ({"0": "0 .5 .5 .2 .2\n"}, ("a",), {"noval": True, "patience": 1}, "exclude each other"),
    ],
)
def test_bad_input_is_one_line_before_the_first_step(tmp_path, labels, names, changes, part):
    spec = data_set(tmp_path / "data", pictures(2), labels, names)
    with pytest.raises(UserError, match=part) as error:
        train.run(**{**SMALL, **changes}, data=spec, project=tmp_path / "runs")
    assert "\n" not in str(error.value)


def test_what_cannot_train_is_refused_before_a_run_folder_exists(tmp_path):
    """A classifier's weights for a detector, and a network whose every layer is frozen."""
    spec = data_set(tmp_path / "data", pictures(2), {"0": "0 .5 .5 .2 .2\n"}, ("a",))
    classifier = tmp_path / "c.pt"
    save_checkpoint(classifier, pack_model(build_model("resnet18", nc=1), ["a"], 64))
    for changes, part in (
        ({"weights": classifier}, "yolov5n is for task detect, .*c.pt for classify"),
        ({"freeze": 25}, "nothing to train: the model has the layers 0 to 24"),
        ({"freeze": [3, 99]}, "--freeze 3 99: the model has the layers 0 to 24"),
        ({"freeze": 99}, "--freeze 99: the model has the layers 0 to 24"),
    ):
        with pytest.raises(UserError, match=part) as error:
            train.run(**{**SMALL, **changes}, data=spec, project=tmp_path / "runs")
        assert "\n" not in str(error.value) and not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"rect": True}, {"multi_scale": True}, {"image_weights": True}, {"single_cls": True}, {"freeze": [10]},
        {"optimizer": "AdamW", "preset": "v7.0"}, {"label_smoothing": 0.1, "save_period": 1}, {"amp": "bf16"},
    ],
    ids=lambda c: next(iter(c)),
)  # fmt: skip
def test_options_of_yolov5_users(scenes, tmp_path, changes):
    result = train.run(**{**SMALL, "epochs": 1, **changes}, data=scenes, hyp=HYP, project=tmp_path)
    state = load_checkpoint(result.best)["state"]
    assert all(torch.isfinite(v).all() for v in state.values() if v.is_floating_point())
    if "freeze" in changes:
        before = load_checkpoint(result.folder / "weights" / "last.pt")["train"]["raw"]
        torch.manual_seed(0)
        assert before.keys() >= state.keys()
