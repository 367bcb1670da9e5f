"""Optimizers and the schedule: parameter groups of YOLOv5, and learning rates as a function of the step alone."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from utils.core.hyp import Hyp

SHORT_RUN = 10_000  # batches

GROUPS = ("norm", "weight", "bias")


def parameter_groups(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Trainable parameters by kind: normalization weights, other weights (these decay), biases."""
    groups: dict[str, list[nn.Parameter]] = {name: [] for name in GROUPS}
    norms = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad:
                continue
            kind = "bias" if "bias" in name else "norm" if isinstance(module, norms) else "weight"
            groups[kind].append(parameter)
    return groups


def build_optimizer(model: nn.Module, name: str, hyp: Hyp, weight_decay: float) -> torch.optim.Optimizer:
    """A fused optimizer over the three groups; its state exists from the start, so a skipped first step is harmless."""
    groups = parameter_groups(model)
    rows = [
        {"params": groups[kind], "weight_decay": weight_decay if kind == "weight" else 0.0, "name": kind}
        for kind in GROUPS
        if groups[kind]
    ]
    if name == "SGD":
        optimizer = torch.optim.SGD(rows, lr=hyp.lr0, momentum=hyp.momentum, nesterov=hyp.momentum > 0, fused=True)
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return optimizer
    kind = {"Adam": torch.optim.Adam, "AdamW": torch.optim.AdamW}[name]
    return kind(rows, lr=hyp.lr0, betas=(hyp.momentum, 0.999), fused=True)


@dataclass(frozen=True)
class StepPlan:
    """Learning rates by group name, momentum, and the number of batches that make one optimizer step."""

    lr: dict[str, float]
    momentum: float
    accumulate: int


def batches_per_step(hyp: Hyp, batch_size: int) -> int:
    """Batches of an optimizer step after warm-up: as many as come nearest to the nominal batch."""
    return max(round(hyp.nominal_batch / batch_size), 1)


@dataclass(frozen=True)
class Schedule:
    """Learning rate, momentum and accumulation of every batch as a pure function of its number."""

    hyp: Hyp
    epochs: int
    steps_per_epoch: int
    batch_size: int
    cosine: bool
    warmup_floor: int

    @property
    def warmup_steps(self) -> int:
        """max(warmup_epochs, floor) in iterations; in runs of fewer than SHORT_RUN steps at most a tenth of the run."""
        if self.hyp.warmup_epochs <= 0:
            return 0
        wanted = max(round(self.hyp.warmup_epochs * self.steps_per_epoch), self.warmup_floor)
        total = self.epochs * self.steps_per_epoch
        return min(wanted, total // 10) if total < SHORT_RUN else wanted

    @property
    def accumulate(self) -> int:
        """Batches per optimizer step after warm-up."""
        return batches_per_step(self.hyp, self.batch_size)

    @property
    def weight_decay(self) -> float:
        """Weight decay scaled to the images of one optimizer step."""
        return self.hyp.weight_decay * self.batch_size * self.accumulate / self.hyp.nominal_batch

    def factor(self, epoch: int) -> float:
        """Learning rate of an epoch relative to lr0: step decay, cosine or linear, from 1 to lrf."""
        hyp = self.hyp
        if hyp.step_decay > 0:
            return hyp.step_decay ** sum(epoch >= round(self.epochs * part) for part in (0.3, 0.6, 0.8))
        if self.cosine:
            return (1 - math.cos(epoch * math.pi / self.epochs)) / 2 * (hyp.lrf - 1) + 1
        return (1 - epoch / self.epochs) * (1 - hyp.lrf) + hyp.lrf

    def at(self, step: int) -> StepPlan:
        """The plan of batch number `step`, counted from 0 over the whole run."""
        hyp, warm = self.hyp, self.warmup_steps
        lr = hyp.lr0 * self.factor(step // self.steps_per_epoch)
        if step >= warm:
            return StepPlan(dict.fromkeys(GROUPS, lr), hyp.momentum, self.accumulate)

        def ramp(low: float, high: float) -> float:
            return float(np.interp(step, [0, warm], [low, high]))

        rates = {name: ramp(hyp.warmup_bias_lr if name == "bias" else 0.0, lr) for name in GROUPS}
        accumulate = max(round(ramp(1, hyp.nominal_batch / self.batch_size)), 1)
        return StepPlan(rates, ramp(hyp.warmup_momentum, hyp.momentum), accumulate)


def apply_plan(optimizer: torch.optim.Optimizer, plan: StepPlan) -> None:
    """Set the optimizer's learning rates and momentum."""
    for group in optimizer.param_groups:
        group["lr"] = plan.lr[group["name"]]
        if "momentum" in group:
            group["momentum"] = plan.momentum
        else:
            group["betas"] = (plan.momentum, group["betas"][1])
