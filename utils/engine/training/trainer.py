"""The only training loop: exact, resumable, the same on one process or many, for every task.

A run is a function of its config: order, augmentation and dropout depend on (seed, epoch, step), the learning rate on
the step. So a checkpoint needs weights, optimizer state and a position, and continuing from it is bit-exact.

Processes are joined by summing gradients once per optimizer step rather than through DistributedDataParallel: with
gradient accumulation that is the least communication, ranks without samples need no special case, and the sum is
exactly the gradient of the one-process loss.
"""

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from utils.core.checkpoint import save_checkpoint
from utils.core.config import config_dict
from utils.core.device import explain_memory_error, warn_of_emulated_bfloat16
from utils.core.dist import Dist
from utils.core.errors import UserError
from utils.core.hyp import Hyp
from utils.core.interrupts import StopRequest
from utils.core.log import LOGGER
from utils.engine.tasks import Evaluation, Task
from utils.engine.training.ema import Ema, FlatStatistics
from utils.engine.training.guard import Guard
from utils.engine.training.optim import Schedule, apply_plan, build_optimizer
from utils.engine.training.settings import TrainConfig, precision
from utils.engine.training.sinks import Sinks

EXIT_INTERRUPTED = 75  # like sysexits' EX_TEMPFAIL: run again with --resume


class Interrupted(Exception):
    """SIGTERM or SIGINT arrived; a checkpoint has been written."""


@dataclass
class Progress:
    """Where a run is. Plain numbers only: this is what a checkpoint stores."""

    epoch: int = 0
    step: int = 0  # batches done in this epoch
    best_fitness: float = -1.0
    best_epoch: int = -1
    validation_due: bool = False

    @property
    def idle(self) -> int:
        """Epochs that have ended since the best one."""
        return self.epoch - 1 - self.best_epoch


def set_determinism(mode: str, device: torch.device, seed: int) -> None:
    """Seed torch and choose algorithms. CPU kernels are always the deterministic ones; GPU ones by --deterministic."""
    torch.manual_seed(seed)
    if device.type == "cpu" or mode != "off":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=mode != "error" or device.type == "cpu")
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        torch.backends.cudnn.benchmark = False
        torch.backends.cudnn.deterministic = True
    else:
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.benchmark = True


class Trainer:
    """Trains the model of a task. Build it, `restore` a checkpoint or not, then `fit`.

    `lineage`: what the weights that training starts from say about their origin, for the checkpoints.
    """

    def __init__(
        self,
        task: Task,
        config: TrainConfig,
        hyp: Hyp,
        dist: Dist,
        folder: Path,
        lineage: Mapping[str, Any] | None = None,
    ) -> None:
        self.lineage = dict(lineage or {})
        self.task, self.config, self.hyp, self.dist, self.folder = task, config, hyp, dist, folder
        self.device = dist.device
        self.amp = precision(config.amp, self.device)
        if self.amp == torch.bfloat16 and self.device.type == "cpu":
            warn_of_emulated_bfloat16("--amp bf16")
        self.model = task.model.to(self.device).to(memory_format=torch.channels_last)
        if config.sync_bn:
            if self.device.type != "cuda":
                raise UserError("--sync-bn needs GPUs; leave it away on a CPU")
            rest = task.samples % config.batch_size
            if 0 < rest < dist.world_size:
                raise UserError(
                    f"--sync-bn: the last batch of an epoch has {rest} images for {dist.world_size} processes, "
                    "and each needs one; choose another --batch-size"
                )
            self.model = dist.sync_batch_norm(self.model)
        self.statistics = FlatStatistics(self.model)
        self.ema = Ema(self.model, hyp)
        steps = -(-task.samples // config.batch_size)
        self.schedule = Schedule(hyp, config.epochs, steps, config.batch_size, config.cosine, config.warmup_floor)
        self.optimizer = build_optimizer(self.model, config.optimizer, hyp, self.schedule.weight_decay)
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.amp == torch.float16)
        self.network: nn.Module = torch.compile(self.model) if config.compile else self.model  # type: ignore[assignment]
        self.progress = Progress()
        self.class_weights: list[float] | None = None
        self.sums = torch.zeros(len(task.loss_names), dtype=torch.float64, device=self.device)
        self.guard = Guard(self.statistics, task.loss_names, dist, config.max_bad_steps, task.file)
        self.pending = 0  # batches since the last optimizer step; 0 at every checkpoint
        self.stop = StopRequest()
        self.saved_at = time.monotonic()
        self.sinks = Sinks([])
        self.last = Evaluation({}, 0.0, "")

    # ---------------------------------------------------------------- checkpoints

    def packed(self) -> dict[str, Any]:
        """The averaged network as the model part of a checkpoint."""
        packed = self.task.pack(self.ema.model)
        packed["meta"] |= self.lineage
        return packed

    def state(self) -> dict[str, Any]:
        """Everything that continues the run, as tensors and plain values."""
        packed = self.packed()
        packed["train"] = {
            "raw": {name: t.detach().clone() for name, t in self.model.state_dict().items()},
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "ema_updates": self.ema.updates,
            "progress": {f.name: getattr(self.progress, f.name) for f in fields(Progress)},
            "sums": self.sums,
            "guard": self.guard.counts,
            "class_weights": self.class_weights,
            "samples": self.task.samples,
            "config": config_dict(self.config),
            "hyp": config_dict(self.hyp),
            "folder": str(self.folder),
        }
        return packed

    def restore(self, checkpoint: dict[str, Any]) -> None:
        """Continue from what `state` gave."""
        train = checkpoint["train"]
        if train["samples"] != self.task.samples:
            raise UserError(
                f"the training set has {self.task.samples} images, but the interrupted run had {train['samples']}; "
                "restore the data, or start a new run with --weights"
            )
        self.model.load_state_dict(train["raw"])
        self.ema.model.load_state_dict(checkpoint["state"])
        self.ema.updates = train["ema_updates"]
        self.optimizer.load_state_dict(train["optimizer"])
        if train["scaler"]:  # nothing where the run had none, as on another kind of device
            self.scaler.load_state_dict(train["scaler"])
        self.sums.copy_(train["sums"])
        self.guard.counts.copy_(train["guard"])
        self.class_weights = train["class_weights"]
        self.progress = Progress(**{f.name: train["progress"][f.name] for f in fields(Progress)})

    def checkpoint(self, name: str = "last.pt") -> None:
        """Write the full state; the main rank does, and every rank has the same state to write."""
        if self.dist.is_main:
            save_checkpoint(self.folder / "weights" / name, self.state())
        self.saved_at = time.monotonic()

    def save_best(self) -> None:
        """best.pt: the averaged network alone, its weight matrices in fp16."""
        if self.dist.is_main:
            packed = self.packed()
            matrices = {name for name, p in self.ema.model.named_parameters() if p.ndim > 1}
            packed["state"] = {k: v.half() if k in matrices else v for k, v in packed["state"].items()}
            save_checkpoint(self.folder / "weights" / "best.pt", packed)

    # ---------------------------------------------------------------- the loop

    def fit(self, sinks: Sinks) -> Evaluation:
        """Train to the end; returns the last epoch's evaluation. Raises Interrupted on SIGTERM or SIGINT."""
        self.sinks = sinks
        with self.stop:
            return self._fit()

    def _fit(self) -> Evaluation:
        loader = self.task.loader(self.class_weights)
        try:
            progress = self.progress
            if progress == Progress():
                self.checkpoint()
            if self._out_of_patience():
                LOGGER.info("this run has stopped already; a larger --patience lets it go on")
            while progress.epoch < self.config.epochs and not self._out_of_patience():
                if not progress.validation_due:
                    self._train_epoch(loader)
                weights_before = self.class_weights
                self._finish_epoch()
                if self.class_weights is not weights_before:
                    loader.close()
                    loader = self.task.loader(self.class_weights)
        except RuntimeError as error:
            told = explain_memory_error(error, self.config.batch_size, self.config.imgsz)
            if told is None:
                raise
            raise told from error
        finally:
            loader.close()
        return self.last

    def _train_epoch(self, loader: Any) -> None:
        progress, steps = self.progress, self.schedule.steps_per_epoch
        self.model.train()
        if progress.step == 0:
            self.sums.zero_()
        LOGGER.info(self._header())
        batches = loader.epoch(progress.epoch, progress.step)
        bar = tqdm(
            batches, total=steps, initial=progress.step, disable=not self.dist.is_main or None,
            bar_format="{l_bar}{bar:10}{r_bar}", mininterval=0.5,
        )  # fmt: skip
        for batch in bar:
            step = progress.epoch * steps + progress.step
            if self.dist.is_main and step < 3 and not self.config.noplots:
                self.task.batch_picture(batch, self.folder / f"train_batch{step}.jpg")
            self._train_batch(batch, step)
            progress.step += 1
            if self._boundary(step):
                self._optimizer_step(step)
                if self._look(step):
                    bar.set_description(self._line(batch))
                self._maybe_save()
        summary = self._line(None)
        bar.set_description(summary)
        bar.close()
        if bar.disable:
            LOGGER.info(summary)
        progress.step = 0
        progress.validation_due = True
        seconds, every = self.config.save_interval()
        if self._save_due(seconds, every):
            self.checkpoint()

    def _global_images(self, step: int) -> int:
        done = (step % self.schedule.steps_per_epoch) * self.config.batch_size
        return min(self.config.batch_size, self.task.samples - done)

    def _train_batch(self, batch: Any, step: int) -> None:
        """Forward and backward of this rank's share of one batch."""
        steps = self.schedule.steps_per_epoch
        apply_plan(self.optimizer, self.schedule.at(step))
        torch.manual_seed((self.config.seed * 1_000_003 + step) * 1024 + self.dist.rank)
        total = self._global_images(step)
        share = len(batch.images)
        if self.pending == 0:
            self.guard.begin()
        outputs = None
        if share:
            images = self.task.images(batch, self.device, step // steps, step % steps)
            with torch.autocast(self.device.type, dtype=self.amp or torch.bfloat16, enabled=self.amp is not None):
                outputs = self.network(images)
        term = self.task.loss(outputs, batch, total, self.dist)
        if share:
            self.scaler.scale(term.total).backward()
        parts = term.parts.float().clone()
        if self.dist.world_size > 1:
            self.statistics.flat.mul_(share / total)
            self.dist.sum_([self.statistics.flat, parts])
        self.sums += parts.double().nan_to_num(0.0, 0.0, 0.0)
        self.guard.note(term.parts, step, batch.indices.tolist())
        self.pending += 1

    def _boundary(self, step: int) -> bool:
        last = self.progress.step == self.schedule.steps_per_epoch
        return last or self.pending >= self.schedule.at(step).accumulate

    def _optimizer_step(self, step: int) -> None:
        """Sum gradients over the ranks and step, unless something is not finite; decided without leaving the device."""
        for parameter in self.parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        self.dist.sum_(gradients)
        scaled = self.scaler.is_enabled()
        if scaled:
            self.scaler.unscale_(self.optimizer)
        norm = nn.utils.get_total_norm(gradients)
        if self.hyp.grad_clip > 0:
            nn.utils.clip_grads_with_norm_(self.parameters, self.hyp.grad_clip, norm)
        self.optimizer.found_inf = self.guard.judge(norm, scaled, step).float()  # type: ignore[attr-defined]
        self.optimizer.step()
        if scaled:
            self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.update(self.statistics)
        self.pending = 0

    # ---------------------------------------------------------------- what the host sees

    def _look(self, step: int) -> bool:
        """Every few steps: tell of skipped steps, and agree on a signal."""
        alone = self.device.type == "cpu" and self.dist.world_size == 1
        if not alone and step % 10 and self.progress.step != self.schedule.steps_per_epoch:
            return False
        self.guard.report()
        if self._stop_agreed():
            self.checkpoint()
            raise Interrupted
        return True

    def _stop_agreed(self) -> bool:
        return bool(self.dist.sum(torch.tensor(float(self.stop.number > 0), device=self.device)) > 0)

    def _save_due(self, seconds: float, every: int) -> bool:
        if every:
            return self.progress.step % every == 0
        return bool(seconds) and time.monotonic() - self.saved_at >= seconds

    def _maybe_save(self) -> None:
        seconds, every = self.config.save_interval()
        if self.progress.step < self.schedule.steps_per_epoch and self._save_due(seconds, every):
            self.checkpoint()

    def _header(self) -> str:
        names = ["Epoch", "GPU_mem", *(f"{n}_loss" for n in self.task.loss_names), "Instances", "Size"]
        return "\n" + "".join(f"{name:>11}" for name in names)

    def _line(self, batch: Any) -> str:
        """Epoch, memory, mean loss parts so far, objects and size of the last batch."""
        done = max(self.progress.step, 1)
        means = (self.sums / done).tolist()
        memory = f"{torch.cuda.memory_reserved() / 2**30:.3g}G" if self.device.type == "cuda" else "-"
        count = "" if batch is None else str(len(batch.targets))
        size = "" if batch is None or not len(batch.images) else str(batch.images.shape[-1])
        losses = "".join(f"{v:>11.4g}" for v in means)
        return f"{f'{self.progress.epoch}/{self.config.epochs - 1}':>11}{memory:>11}{losses}{count:>11}{size:>11}"

    # ---------------------------------------------------------------- the end of an epoch

    def _finish_epoch(self) -> None:
        """Validate, log, keep the best, decide on stopping, write the checkpoint."""
        progress, steps = self.progress, self.schedule.steps_per_epoch
        final = progress.epoch + 1 == self.config.epochs
        means = (self.sums / steps).tolist()
        row = {f"train/{name}_loss": mean for name, mean in zip(self.task.loss_names, means, strict=True)}
        if final or not self.config.noval:
            self.last = self.task.evaluate(self.ema.model, self.dist)
            row.update(self.last.metrics)
            if self.dist.is_main:
                LOGGER.info(self.last.table)
            if self.last.fitness > progress.best_fitness:
                progress.best_fitness, progress.best_epoch = self.last.fitness, progress.epoch
                self.save_best()
            elif self.last.fitness == 0 == progress.best_fitness:
                self.save_best()
            if self.config.image_weights and self.last.class_score is not None:
                self.class_weights = [float((1 - s) ** 2) for s in self.last.class_score]
        if self.config.save_period > 0 and (progress.epoch + 1) % self.config.save_period == 0:
            self.checkpoint(f"epoch{progress.epoch}.pt")
        rates = self.schedule.at((progress.epoch + 1) * steps - 1).lr
        row.update(zip(("x/lr0", "x/lr1", "x/lr2"), rates.values(), strict=True))
        self.sinks.write(progress.epoch, row)
        progress.epoch += 1
        progress.validation_due = False
        self.checkpoint()
        if final:
            return
        if self._out_of_patience():
            LOGGER.info(f"no better fitness for {progress.idle} epochs (best: epoch {progress.best_epoch}); stopping")
        elif self._stop_agreed():
            raise Interrupted

    def _out_of_patience(self) -> bool:
        """Whether --patience says to stop; not stored, so that --resume with another number goes on."""
        patience = self.config.patience
        return bool(patience) and not self.config.noval and 0 < patience <= self.progress.idle
