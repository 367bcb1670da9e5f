"""`train.py` as people run it: the run folder, resuming, kill -9, SIGTERM, torchrun, odd data sets, bad input."""

import csv
import multiprocessing
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import train
import val
from models import build_model
from models.weights import pack_model
from utils.core.checkpoint import load_checkpoint, save_checkpoint
from utils.core.errors import UserError
from utils.data.scenes import write_dataset

ROOT = Path(__file__).resolve().parent.parent
SMALL = {"cfg": "yolov5n", "epochs": 2, "imgsz": 64, "batch_size": 8, "device": "cpu", "workers": 0, "noplots": True}
HYP = ["nominal_batch=16", "warmup_epochs=0"]


@pytest.fixture(scope="session")
def scenes(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("scenes"), train=24, val=8, size=64)


@pytest.fixture(scope="session")
def whole(scenes, tmp_path_factory):
    """An uninterrupted run with pictures."""
    project = tmp_path_factory.mktemp("runs")
    return train.run(**{**SMALL, "noplots": False}, data=scenes, hyp=HYP, project=project, save_every="1")


def final(folder):
    """Every tensor that a finished run ends with."""
    last = load_checkpoint(folder / "weights" / "last.pt")
    return {
        **{f"ema.{k}": v for k, v in last["state"].items()},
        **{f"raw.{k}": v for k, v in last["train"]["raw"].items()},
    }


def same(a, b):
    a, b = final(a), final(b)
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


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


def test_workers_do_not_change_the_weights(whole, scenes, tmp_path):
    other = train.run(**{**SMALL, "workers": 2}, data=scenes, hyp=HYP, project=tmp_path, save_every="0")
    assert same(whole.folder, other.folder)


def test_finished_runs_and_changed_options_are_refused_at_resume(whole):
    last = str(whole.folder / "weights" / "last.pt")
    with pytest.raises(UserError, match="batch-size 4 differs"):
        train.run(resume=last, batch_size=4)
    with pytest.raises(UserError, match="batch-size 99 differs"):
        train.run(resume=last, batch=99)
    with pytest.raises(UserError, match="imgsz 128 differs"):
        train.run(resume=last, img=128)
    with pytest.raises(UserError, match="no weights/last.pt below"):
        train.run(resume=True, project=str(whole.folder / "none"))
    with pytest.raises(UserError, match="larger number"):
        train.run(resume=last, epochs=1)
    with pytest.raises(UserError, match="cannot be resumed"):
        train.run(resume=str(whole.best))


def _child(options):
    os.chdir(ROOT)
    torch.set_num_threads(1)
    sys.exit(train.main(options))


def options_of(data, project, workers=0):
    flat = {"--cfg": "yolov5n", "--epochs": 2, "--imgsz": 64, "--batch-size": 8, "--device": "cpu", "--save-every": 1}
    flat |= {"--data": data, "--project": project, "--workers": workers}
    return [str(x) for pair in flat.items() for x in pair] + ["--noplots", "--hyp", *HYP]


def killed_and_resumed(data, project, delay, workers, number=signal.SIGKILL):
    """Start a run, send it a signal after `delay` seconds, resume until it ends; returns how often it was killed."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["train"])
    kills = 0
    argv = options_of(data, project, workers)
    while True:
        last = project / "exp" / "weights" / "last.pt"
        process = server.Process(
            target=_child, args=(argv if not last.exists() else ["--resume", str(last), "--workers", str(workers)],)
        )
        process.start()
        if kills == 0:
            while not last.exists() and process.is_alive():
                time.sleep(0.01)
            process.join(delay)
            if process.is_alive():
                os.kill(process.pid, number)
                kills += 1
        process.join(120)
        if process.exitcode == 0:
            return kills
        assert process.exitcode == (-9 if number == signal.SIGKILL else 75), process.exitcode
        shutil.rmtree(project / "gone", ignore_errors=True)


@pytest.fixture(scope="session")
def reference(scenes, tmp_path_factory):
    """The uninterrupted run in a child of one thread, like the runs that are killed."""
    project = tmp_path_factory.mktemp("reference")
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["train"])
    process = server.Process(target=_child, args=(options_of(scenes, project),))
    process.start()
    process.join(240)
    assert process.exitcode == 0
    return project / "exp"


@pytest.mark.parametrize(("delay", "workers", "number"), [(0.2, 0, 9), (0.9, 2, 9), (0.5, 0, signal.SIGTERM)])
def test_killed_runs_end_like_the_uninterrupted_one(reference, scenes, tmp_path, delay, workers, number):
    killed_and_resumed(scenes, tmp_path, delay, workers, number)
    assert same(reference, tmp_path / "exp")
    assert (reference / "results.csv").read_text() == (tmp_path / "exp" / "results.csv").read_text()


def interrupted(monkeypatch, at, **options):
    """A run that ends by SIGTERM after `at` optimizer steps."""
    from utils.engine.training.trainer import Interrupted, Trainer

    step = Trainer._optimizer_step
    done = []

    def counting(self, number):
        step(self, number)
        done.append(number)
        if len(done) == at:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_optimizer_step", counting)
        with pytest.raises(Interrupted):
            train.run(**options)


def test_frozen_layers_stay_frozen_after_resuming(scenes, tmp_path, monkeypatch):
    options = {**SMALL, "data": scenes, "hyp": HYP, "freeze": [3]}
    expected = train.run(**options, project=tmp_path / "a")
    interrupted(monkeypatch, 1, **options, project=tmp_path / "b")
    train.run(resume=str(tmp_path / "b" / "exp"))
    assert same(expected.folder, tmp_path / "b" / "exp")


def test_what_is_trained_from_imported_weights_keeps_their_licence(scenes, tmp_path, monkeypatch):
    source = build_model("yolov5n", nc=2)
    facts = {"licence": "AGPL-3.0", "origin": "YOLOv5", "data": "theirs.yaml"}
    save_checkpoint(tmp_path / "imported.pt", pack_model(source, ["a", "b"], 64, **facts))
    options = {**SMALL, "data": scenes, "hyp": HYP, "weights": str(tmp_path / "imported.pt"), "epochs": 1}
    interrupted(monkeypatch, 1, **options, project=tmp_path)
    for expected in ("last.pt", "best.pt"):
        meta = load_checkpoint(tmp_path / "exp" / "weights" / expected)["meta"]
        assert (meta["licence"], meta["origin"], meta["data"]) == ("AGPL-3.0", "YOLOv5", "data.yaml")
        if expected == "last.pt":
            train.run(resume=str(tmp_path / "exp"))


def test_an_older_run_in_the_same_folder_is_not_what_is_resumed(scenes, tmp_path, monkeypatch):
    options = {**SMALL, "data": scenes, "hyp": HYP, "project": tmp_path, "exist_ok": True, "epochs": 1}
    train.run(**options)
    monkeypatch.setattr("utils.engine.training.trainer.Trainer._train_epoch", stop)
    with pytest.raises(KeyboardInterrupt):
        train.run(**options, seed=5)
    weights = tmp_path / "exp" / "weights"
    last = load_checkpoint(weights / "last.pt")["train"]
    assert last["config"]["seed"] == 5 and last["progress"]["epoch"] == 0 and not (weights / "best.pt").exists()


@pytest.mark.parametrize("world", ["1", "2"])
def test_a_restarted_group_finds_its_own_run(tmp_path, monkeypatch, world):
    """What torchrun --max-restarts starts again goes on; what somebody else started there does not."""
    from utils.core.config import config_from_kwargs
    from utils.core.dist import Dist
    from utils.engine.training.runs import find_resume, open_run
    from utils.engine.training.settings import TrainConfig

    for name, value in {"LOCAL_RANK": "0", "WORLD_SIZE": world, "TORCHELASTIC_RUN_ID": "run"}.items():
        monkeypatch.setenv(name, value)
    config = config_from_kwargs(TrainConfig, cfg="yolov5n", project=str(tmp_path))
    folder = open_run(config, Dist.single())
    last = folder / "weights" / "last.pt"
    last.touch()
    assert find_resume(config, Dist.single()) is None
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert find_resume(config, Dist.single()) == last
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "another")
    assert find_resume(config, Dist.single()) is None


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


def stop(*_):
    raise KeyboardInterrupt


def test_a_checkpoint_outside_a_run_folder_is_not_resumed(whole, tmp_path):
    copy = shutil.copy(whole.folder / "weights" / "last.pt", tmp_path / "mine.pt")
    with pytest.raises(UserError, match="expected RUN/weights/mine.pt"):
        train.run(resume=str(copy), epochs=3)


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


def test_a_stopped_run_goes_on_with_more_patience(scenes, tmp_path, capsys):
    """And the memory of --cache ram is given back."""
    options = {**SMALL, "epochs": 6, "patience": 1, "cache": "ram", "data": str(scenes), "project": str(tmp_path)}
    before = set(Path("/dev/shm").glob("yolov5-spd-*"))
    made = train.run(**options, hyp=[*HYP, "lr0=1e-9", "warmup_bias_lr=0"])
    rows = lambda: len((made.folder / "results.csv").read_text().splitlines()) - 1  # noqa: E731
    assert rows() == 2 and "stopping" in capsys.readouterr().out
    last = str(made.folder / "weights" / "last.pt")
    train.run(resume=last)
    assert rows() == 2 and "a larger --patience lets it go on" in capsys.readouterr().out
    train.run(resume=last, patience=3)
    assert rows() == 4
    assert set(Path("/dev/shm").glob("yolov5-spd-*")) == before


def test_signals_reach_the_processes_of_device_0_1(tmp_path):
    """`--device 0,1` becomes torchrun: what is sent to it arrives at its workers, and it ends after them."""
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
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("*.begun"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    process.terminate()
    assert process.wait(timeout=60) != 0
    assert len(list(tmp_path.glob("*.ended"))) == 2


@pytest.mark.slow
def test_twenty_kills_at_random_moments(reference, scenes, tmp_path):
    rng, kills, runs = random.Random(0), 0, 0
    while kills < 20:  # a run that ends before its kill is no kill
        project = tmp_path / str(runs)
        kills += killed_and_resumed(scenes, project, rng.uniform(0, 1.0), runs % 2 * 2)
        assert same(reference, project / "exp"), runs
        runs += 1
        assert runs < 60, f"only {kills} of {runs} runs could be killed in time"


def torchrun(processes, argv, *extra):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        str(processes),
        "--master-port",
        str(port),
    ]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, *extra, "train.py", *argv],
        cwd=ROOT,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.slow
def test_two_processes_and_a_killed_rank(scenes, tmp_path):
    """One of two ranks is killed: the group ends within a minute; with a restart it ends like the uninterrupted run."""
    plain = torchrun(2, options_of(scenes, tmp_path / "a"))
    assert plain.wait(300) == 0, plain.communicate()[0]
    for restarts, expected in ((0, False), (1, True)):
        project = tmp_path / f"r{restarts}"
        process = torchrun(2, options_of(scenes, project), "--max-restarts", str(restarts))
        while not (project / "exp" / "weights" / "last.pt").exists():
            time.sleep(0.05)
        time.sleep(0.5)
        victim = next(
            pid for pid in children(process.pid) if b"LOCAL_RANK=1" in Path(f"/proc/{pid}/environ").read_bytes()
        )
        os.kill(victim, signal.SIGKILL)
        started = time.monotonic()
        code = process.wait(120)
        if expected:
            assert code == 0, process.communicate()[0]
            assert same(tmp_path / "a" / "exp", project / "exp")
        else:
            assert code != 0 and time.monotonic() - started < 60


def children(pid):
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.slow
def test_a_full_disk_keeps_the_earlier_checkpoint(scenes, tmp_path):
    """A run folder on a small tmpfs: the second checkpoint does not fit, the first one stays readable."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("mounting a tmpfs needs root")
    try:
        process = subprocess.Popen(
            [sys.executable, "train.py", *options_of(scenes, disk)], cwd=ROOT, stderr=subprocess.PIPE, text=True
        )
        last = disk / "exp" / "weights" / "last.pt"
        while not last.exists():
            time.sleep(0.02)
        with (disk / "filler").open("wb") as filler:
            try:
                while True:
                    filler.write(bytes(1 << 20))
                    filler.flush()
            except OSError:
                pass
        assert process.wait(120) == 1
        assert "cannot write checkpoint" in process.stderr.read()
        assert "train" in load_checkpoint(last)
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=False)


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
        ({"freeze": [3, 99]}, "--freeze 99: the model has the layers 0 to 24"),
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
