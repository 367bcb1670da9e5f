"""Runs that end early and go on: kill -9, SIGTERM, a lost rank, a full disk; what may and may not be resumed."""

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

import pytest
import torch

import train
from models import build_model
from models.weights import pack_model
from tests.runs import HYP, ROOT, SMALL, same
from utils.core.checkpoint import load_checkpoint, save_checkpoint
from utils.core.errors import UserError


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


def stop(*_):
    raise KeyboardInterrupt


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


def test_a_checkpoint_outside_a_run_folder_is_not_resumed(whole, tmp_path):
    copy = shutil.copy(whole.folder / "weights" / "last.pt", tmp_path / "mine.pt")
    with pytest.raises(UserError, match="expected RUN/weights/mine.pt"):
        train.run(resume=str(copy), epochs=3)


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
        assert f"cannot write '{last}' (No space left on device)" in process.stderr.read()
        assert "train" in load_checkpoint(last)
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=False)
