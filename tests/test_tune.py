"""tune.py: spaces, pruning, resuming and sharing a study, on a stand-in for train.py whose optimum is known."""

import csv
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

import tune
from utils.core.config import parse_config
from utils.core.errors import UserError
from utils.core.hyp import load_hyp
from utils.core.yamls import load_yaml
from utils.engine.training.search import AP, AP50, Range, epoch_values, load_space, plot_parallel
from utils.engine.training.settings import TrainConfig

# Trains nothing: AP rises with the epoch and peaks at lr0 = 0.02; writes what train.py writes. lr0 > 0.09 fails.
FAKE = """
import csv, os, sys, time
from pathlib import Path
args = sys.argv[1:]
get = lambda flag: args[args.index(flag) + 1]
hyp = dict(pair.split("=") for pair in args[args.index("--hyp") + 1:] if "=" in pair)
folder = Path(get("--project")) / get("--name")
lr0 = float(hyp["lr0"])
(folder / "pid").write_text(str(os.getpid()))
(folder / "hyp.yaml").write_text("".join(f"{k}: {v}\\n" for k, v in hyp.items()))
if lr0 > 0.09:
    sys.exit("error: diverged")
rows = [["epoch", "metrics/mAP_0.5", "metrics/mAP_0.5:0.95"]]
for epoch in range(int(get("--epochs"))):
    value = max(0.0, 0.5 - 10 * abs(lr0 - 0.02)) * (epoch + 1) / 10
    rows.append([epoch, value, value])
    temporary = folder / "x.tmp"
    with open(temporary, "w", newline="") as file:
        csv.writer(file).writerows(rows)
    temporary.replace(folder / "results.csv")
    time.sleep(0.05)
"""


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project folder whose train.py is the stand-in, with a space of one hyper-parameter."""
    pytest.importorskip("optuna")
    (tmp_path / "train.py").write_text(textwrap.dedent(FAKE))
    (tmp_path / "space.yaml").write_text("lr0: {low: 0.001, high: 0.08, log: true, steps: 5}\n")
    monkeypatch.setattr(tune, "HERE", tmp_path)
    return tmp_path


def options(folder: Path, **more: object) -> dict:
    base = {"cfg": "x.yaml", "space": str(folder / "space.yaml"), "project": str(folder / "tune"), "epochs": 4}
    return {**base, **more}


def test_space_is_checked(tmp_path: Path) -> None:
    space = tmp_path / "space.yaml"
    for text, told in (
        ("lr: [0.1]", "did you mean"),
        ("lr0: [a]", "expected a list of numbers"),
        ("lr0: {low: 0.1}", "expected low, high"),
        ("lr0: {low: 0.1, high: 0.01}", "low < high"),
        ("lr0: {low: 0, high: 0.1, log: true}", "above 0"),
        ("", "no hyper-parameter"),
    ):
        space.write_text(text)
        with pytest.raises(UserError, match=told):
            load_space(space)
    assert set(load_space(tune.HERE / "data/hyps/space.yaml")) >= {"lr0", "momentum", "weight_decay"}


def test_grid_is_even_on_its_scale() -> None:
    assert Range(0.0, 1.0, steps=3).grid() == [0.0, 0.5, 1.0]
    assert Range(0.001, 0.1, True, steps=3).grid() == [0.001, 0.01, 0.1]
    assert Range(values=(0.0, 2.0)).grid() == [0.0, 2.0]


def test_epoch_values_by_metric(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    assert epoch_values(path, "fitness") == []
    path.write_text(f"epoch,{AP50},{AP},metrics/AP_S\n0,0.5,0.3,nan\n1,0.6,0.4,0.1\n")
    assert epoch_values(path, "fitness") == pytest.approx([0.1 * 0.5 + 0.9 * 0.3, 0.1 * 0.6 + 0.9 * 0.4])
    assert epoch_values(path, "AP_S") == [0.0, 0.1]
    with pytest.raises(UserError, match="AP_S"):
        epoch_values(path, "AP_XL")


def test_grid_search_finds_the_best_point_and_goes_on(fake: Path) -> None:
    first = tune.run(**options(fake, sampler="random-grid", trials=2, prune=False))
    assert first.trials == 2
    report = tune.run(project=str(fake / "tune"), trials=5)  # everything else is remembered
    assert report.trials == 5
    with open(report.folder / "trials.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert sorted(float(row["lr0"]) for row in rows) == Range(0.001, 0.08, True, 5).grid(), "each point once"
    best = min((abs(float(row["lr0"]) - 0.02), float(row["lr0"])) for row in rows)[1]
    assert load_hyp(report.best_hyp).lr0 == best
    assert (report.folder / "parallel_coordinates.png").stat().st_size > 10_000
    assert tune.run(project=str(fake / "tune"), trials=5).trials == 5, "a finished study runs nothing"


def test_bad_trials_are_pruned_by_their_early_epochs(fake: Path) -> None:
    (fake / "space.yaml").write_text("lr0: [0.02, 0.021, 0.019, 0.022, 0.06, 0.065, 0.0601]\n")
    report = tune.run(**options(fake, sampler="random-grid", trials=7, prune_after=1, epochs=12))
    with open(report.folder / "trials.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    pruned = [row for row in rows if row["state"] == "pruned"]
    assert pruned and all(int(row["epochs"]) < 12 for row in pruned)
    assert load_hyp(report.best_hyp).lr0 in (0.02, 0.021, 0.019, 0.022)


def child(fake: Path, call: str) -> subprocess.Popen[str]:
    """A process with the stand-in that makes a call."""
    program = f"""
import sys; sys.path.insert(0, {str(Path(tune.__file__).parent)!r})
import tune; from pathlib import Path; from utils.core.config import run_cli
tune.HERE = Path({str(fake)!r})
{call}
"""
    return subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True)


def call_without_end(fake: Path, epochs: int) -> str:
    """The command line of a search that takes far longer than a test."""
    flags = ["--cfg", "x.yaml", "--epochs", str(epochs), "--trials", "99", "--no-prune"]
    flags += ["--space", str(fake / "space.yaml"), "--project", str(fake / "tune")]
    return f"run_cli(lambda: tune.main({flags!r}))"


def test_what_was_found_is_kept_when_the_search_is_ended(fake: Path) -> None:
    """SIGTERM: one line, exit code 130, results of the finished trials, and no training left behind."""
    search = child(fake, call_without_end(fake, epochs=40))
    found = fake / "tune/exp/best_hyp.yaml"
    deadline = time.monotonic() + 120
    while not found.is_file() and search.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    search.terminate()
    assert search.wait(timeout=120) == 130 and search.stderr is not None
    assert "interrupted" in search.stderr.read() and load_hyp(found).lr0 > 0
    with open(fake / "tune/exp/trials.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) >= 1
    begun = sorted((fake / "tune/exp").glob("trial*/pid"))
    for pid in begun:
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid.read_text()), 0)
    assert len(begun) >= 1


def test_a_signal_between_two_trials_ends_the_search(fake: Path) -> None:
    """The moment at which an exception would leave Optuna's heartbeat thread running, and with it the process."""
    search = child(
        fake,
        f"""
import os, signal, optuna
thread, begun = optuna.storages._heartbeat.HeartbeatThread, []
start = thread.start
def started(self):
    start(self)
    begun.append(self)
    if len(begun) == 2:
        os.kill(os.getpid(), signal.SIGTERM)
thread.start = started
{call_without_end(fake, epochs=2)}
""",
    )
    try:
        assert search.wait(timeout=120) == 130
    finally:
        search.kill()
    assert (fake / "tune/exp/best_hyp.yaml").is_file() and not (fake / "tune/exp/trial1").exists()


def test_processes_share_a_study(fake: Path) -> None:
    tune.run(**options(fake, sampler="random-grid", trials=1, prune=False))
    call = f"tune.run(**{options(fake, sampler='random-grid', trials=5, prune=False)!r})"
    children = [child(fake, call) for _ in range(2)]
    assert [child.wait(timeout=120) for child in children] == [0, 0]
    with open(fake / "tune/exp/trials.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) >= 5
    assert load_yaml(fake / "tune/exp/study.yaml")["sampler"] == "random-grid"


def test_failing_trials_are_told_and_end_the_search(fake: Path) -> None:
    (fake / "space.yaml").write_text("lr0: [0.0901, 0.0902, 0.0903, 0.0904]\n")
    with pytest.raises(UserError, match="three trials in a row failed, the last with 'error: diverged'"):
        tune.run(**options(fake, sampler="random-grid", trials=4))


def test_options_that_differ_from_the_study_are_refused(fake: Path) -> None:
    """A second start may repeat the study's options or leave them out; others are named with the study's values."""
    settings = options(fake, sampler="random-grid", trials=1, prune=False)
    tune.run(**settings)
    assert tune.run(**settings, workers=1).trials == 1
    with pytest.raises(UserError, match=r"--epochs 5 \(there 4\), --imgsz 32 \(there 640\) differs") as error:
        tune.run(**{**settings, "epochs": 5}, img=32)
    assert "study.yaml" in str(error.value) and "--name" in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(UserError, match="--metric AP_S"):
        tune.main(["--project", str(fake / "tune"), "--metric", "AP_S"])


def test_train_args_of_switches_are_flags_or_nothing() -> None:
    config = tune.TuneConfig(cfg="x.yaml", train_args=["rect=True", "cos_lr=false", "optimizer=Adam", "policy=error"])
    command = tune.train_command(config, Path("runs/trial0"), {"lr0": 0.1})
    parsed = parse_config(TrainConfig, command[2:], "train.py")
    assert (parsed.rect, parsed.cos_lr, parsed.optimizer, parsed.label_policy) == (True, False, "Adam", "error")
    for pair, told in (("rect=maybe", "rect=true or rect=false"), ("rect", "key=value"), ("recd=1", "did you mean")):
        with pytest.raises(UserError, match=told):
            tune.TuneConfig(cfg="x.yaml", train_args=[pair])


def test_a_study_is_not_begun_with_what_cannot_be_read(fake: Path) -> None:
    for wrong in ({"space": "nope.yaml"}, {"data": "nope.yaml"}, {"metric": "nope"}):
        with pytest.raises(UserError, match="nope") as error:
            tune.run(**options(fake, **wrong))
        assert "hyp.scratch" not in str(error.value)
        assert not (fake / "tune/exp/study.yaml").exists()


def test_nothing_to_train_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing to train"):
        tune.run(project=str(tmp_path))


def test_parallel_coordinates_of_equal_values(tmp_path: Path) -> None:
    plot_parallel([({"lr0": 0.01}, 0.5), ({"lr0": 0.01}, 0.5)], ["lr0"], "AP", tmp_path / "p.png")
    assert (tmp_path / "p.png").is_file()
