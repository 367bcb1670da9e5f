"""The training loop: exact resume from any step, bad steps, early stop, schedules, shares of a batch."""

import math
import sys

import pytest
import torch
import torch.multiprocessing as mp

from tests.toy import Interrupted, Sinks, ToyTask, config, trainer, weights
from utils.core.checkpoint import load_checkpoint
from utils.core.dist import Dist
from utils.core.errors import UserError
from utils.core.hyp import Hyp
from utils.engine.training.autobatch import fit_batch_size
from utils.engine.training.optim import Schedule
from utils.engine.training.runs import resumed_config
from utils.engine.training.sinks import CsvSink, open_sinks


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def finished(folder, task=None, **changes):
    made = trainer(folder, task or ToyTask(), config(**changes))
    made.fit(Sinks([]))
    return made


STEPS = [(epoch, step) for epoch in range(3) for step in range(6)]


@pytest.mark.parametrize(("optimizer", "stops"), [("SGD", STEPS[::2]), ("AdamW", [(0, 3), (2, 5)])])
def test_resume_after_any_step_is_bit_exact(tmp_path, optimizer, stops):
    settings = config(optimizer=optimizer)
    whole = weights(finished(tmp_path / "whole", optimizer=optimizer))
    for epoch, step in stops:
        folder = tmp_path / f"{epoch}.{step}"
        with pytest.raises(Interrupted):
            trainer(folder, ToyTask(stop_at=(epoch, step)), settings).fit(Sinks([]))
        second = trainer(folder, ToyTask(), settings)
        second.restore(load_checkpoint(folder / "weights" / "last.pt"))
        assert second.progress.epoch * 6 + second.progress.step > epoch * 6 + step
        second.fit(Sinks([]))
        assert equal(weights(second), whole), (epoch, step)


def test_checkpoints_by_step_resume_exactly_and_exist_before_the_first_step(tmp_path):
    whole = weights(finished(tmp_path / "whole"))
    made = trainer(tmp_path / "a", ToyTask(), config(save_every="2"))
    seen = []
    original = made.checkpoint

    def keep(name="last.pt"):
        original(name)
        seen.append(load_checkpoint(tmp_path / "a" / "weights" / name))

    made.checkpoint = keep
    made.fit(Sinks([]))
    first = seen[0]["train"]["progress"]
    assert (first["epoch"], first["step"]) == (0, 0)
    assert len(seen) > 6
    assert any(s["train"]["progress"]["validation_due"] for s in seen)
    for i, state in enumerate(seen):
        again = trainer(tmp_path / f"r{i}", ToyTask(), config(save_every="2"))
        again.restore(state)
        again.fit(Sinks([]))
        assert equal(weights(again), whole), i


def test_a_bad_step_is_skipped_told_and_leaves_no_trace(tmp_path, capsys):
    made = finished(tmp_path, ToyTask(poison={(1, 2)}))
    assert all(torch.isfinite(v).all() for v in weights(made).values())
    out = capsys.readouterr().out
    assert "not finite in box, cls" in out
    assert "images 8.jpg, 9.jpg, 10.jpg, 11.jpg" in out


@pytest.mark.parametrize("has_it", [True, False])
def test_bf16_on_a_cpu_that_emulates_it_is_told(tmp_path, monkeypatch, capsys, has_it):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: has_it)
    trainer(tmp_path, ToyTask(), config(amp="bf16"))
    told = "--amp bf16: this processor has no 16-bit arithmetic" in "".join(capsys.readouterr())
    assert told is not has_it


def test_a_bad_first_step_is_harmless(tmp_path):
    made = finished(tmp_path, ToyTask(poison={(0, 0)}))
    assert all(torch.isfinite(v).all() for v in weights(made).values())
    assert made.progress.epoch == 3


def test_a_run_that_only_skips_ends(tmp_path):
    poison = {(1, s) for s in range(6)}
    with pytest.raises(UserError, match="in a row were not finite"):
        finished(tmp_path, ToyTask(poison=poison), max_bad_steps=2)
    state = load_checkpoint(tmp_path / "weights" / "last.pt")["state"]
    assert all(torch.isfinite(v).all() for v in state.values() if v.is_floating_point())


def test_patience_stops_and_flat_fitness_counts_as_no_gain(tmp_path):
    class Flat(ToyTask):
        def evaluate(self, model, dist, *, folder=None):
            result = super().evaluate(model, dist)
            return type(result)(result.metrics, 0.5, "table")

    made = finished(tmp_path, Flat(), epochs=20, patience=3)
    assert made.progress.epoch == 4 and made.progress.best_epoch == 0


def test_noval_validates_once(tmp_path):
    task = ToyTask()
    finished(tmp_path, task, noval=True)
    assert task.evaluations == 1


def test_best_is_slim_and_last_is_full(tmp_path):
    finished(tmp_path)
    best, last = (load_checkpoint(tmp_path / "weights" / n) for n in ("best.pt", "last.pt"))
    assert "train" not in best and "optimizer" in last["train"]
    assert best["state"]["0.weight"].dtype == torch.float16
    assert best["state"]["1.running_var"].dtype == torch.float32


def test_results_are_cut_back_to_the_checkpoint(tmp_path):
    sink = CsvSink(tmp_path / "results.csv", ["a", "b"])
    for epoch in range(4):
        sink.write(epoch, {"a": epoch, "b": 0.5})
    again = CsvSink(tmp_path / "results.csv", ["a", "b"], finished_epochs=2)
    again.write(2, {"a": 20})
    assert (tmp_path / "results.csv").read_text().splitlines() == ["epoch,a,b", "0,0,0.5", "1,1,0.5", "2,20,"]


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_logger_that_is_not_installed_is_left_out_with_a_warning(tmp_path, monkeypatch, capsys, name):
    monkeypatch.setitem(sys.modules, name, None)
    sinks = open_sinks(tmp_path, ["a"], 0, [name], {})
    sinks.write(0, {"a": 1.0})
    sinks.close()
    assert f"pip install {name}" in "".join(capsys.readouterr())
    assert (tmp_path / "results.csv").read_text() == "epoch,a\n0,1\n"


def test_a_run_without_a_gradient_scaler_goes_on_with_one(tmp_path):
    """As when it moves from the CPU to a GPU, where --amp auto is float16."""
    finished(tmp_path)
    checkpoint = load_checkpoint(tmp_path / "weights" / "last.pt")
    assert not checkpoint["train"]["scaler"]
    other = trainer(tmp_path / "b", ToyTask())
    other.scaler = torch.amp.GradScaler("cpu")
    other.restore(checkpoint)
    assert other.scaler.is_enabled() and other.progress.epoch == 3


def test_a_measured_batch_size_is_kept_at_resume(tmp_path):
    """The command line of a restarted group still says -1."""
    made = finished(tmp_path)
    last = tmp_path / "weights" / "last.pt"
    again = resumed_config(config(batch_size=-1), load_checkpoint(last), last, {"cfg", "batch_size"})
    assert again.batch_size == made.config.batch_size == 4
    with pytest.raises(UserError, match="batch-size 8 differs"):
        resumed_config(config(batch_size=8), load_checkpoint(last), last, {"cfg", "batch_size"})


def test_another_training_set_is_refused_at_resume(tmp_path):
    finished(tmp_path)
    task = ToyTask()
    task.samples = 23
    with pytest.raises(UserError, match="23 images"):
        trainer(tmp_path / "b", task).restore(load_checkpoint(tmp_path / "weights" / "last.pt"))


def test_schedule_follows_the_recipe():
    schedule = Schedule(Hyp(), 300, 7393, 16, True, 1000)
    assert (schedule.warmup_steps, schedule.accumulate, schedule.weight_decay) == (3 * 7393, 4, 0.0005)
    start, end = schedule.at(0), schedule.at(300 * 7393 - 1)
    assert start.lr == {"norm": 0, "weight": 0, "bias": 0.1}
    assert (start.momentum, start.accumulate) == (0.8, 1)
    assert end.lr["weight"] == pytest.approx(0.01 * ((1 - math.cos(299 * math.pi / 300)) / 2 * -0.9 + 1))
    assert (end.momentum, end.accumulate) == (0.937, 4)
    assert Schedule(Hyp(), 30, 63, 16, True, 1000).warmup_steps == 189  # a tenth of a short run
    assert Schedule(Hyp(), 300, 50, 128, True, 1000).warmup_steps == 1000
    assert Schedule(Hyp(), 30, 63, 128, True, 1000).accumulate == 1
    steps = Schedule(Hyp(step_decay=0.2, warmup_epochs=0), 200, 1, 128, True, 1000)
    rates = [steps.at(e).lr["weight"] for e in (0, 59, 60, 120, 160)]
    assert rates == pytest.approx([0.01, 0.01, 0.002, 0.0004, 0.00008])


def _share(rank, world, folder, port):
    import os

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist = Dist.start("cpu", 60)
    made = trainer(folder, ToyTask(batch_size=4, dist=dist, norm=False), config())
    made.fit(Sinks([]))
    torch.save({**weights(made), "sums of the epoch": made.sums}, folder / f"rank{rank}.pt")
    dist.stop()


def test_processes_train_the_network_of_one(tmp_path):
    """22 samples in batches of 4 over 3 processes: every batch is uneven, and in the last one a rank is idle."""
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.start_processes(_share, (3, tmp_path, port), nprocs=3, start_method="spawn")
    shares = [torch.load(tmp_path / f"rank{r}.pt", weights_only=True) for r in range(3)]
    assert all(equal(shares[0], share) for share in shares[1:])
    alone = finished(tmp_path / "alone", ToyTask(norm=False))
    for name, value in {**weights(alone), "sums of the epoch": alone.sums}.items():
        assert torch.allclose(value, shares[0][name], atol=1e-6), name


def test_batch_size_fits_the_measured_line():
    assert fit_batch_size([1, 2, 4], [3.0, 5.0, 9.0], 101.0) == 48  # memory 1 + 2 b; 50 rounded to a multiple of 8
    assert fit_batch_size([1, 2], [3.0, 5.0], 9.0) == 4
    assert fit_batch_size([1, 2], [3.0, 5.0], 0.0) == 1
