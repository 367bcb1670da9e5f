"""Moving average of a model's weights, and the BatchNorm statistics of a model as one flat tensor."""

import copy
import math

import torch
from torch import Tensor, nn

from models.graph import Network
from utils.core.hyp import Hyp


class FlatStatistics:
    """All running means and variances of a model as views into one tensor, so that a step can save, restore and average
    them in a single operation."""

    def __init__(self, model: nn.Module) -> None:
        self.owners = [
            m for m in model.modules() if isinstance(m, nn.modules.batchnorm._NormBase) and m.running_mean is not None
        ]
        parts = [t for m in self.owners for t in (m.running_mean, m.running_var) if t is not None]
        self.flat: Tensor = torch.cat([t.reshape(-1) for t in parts]) if parts else torch.zeros(0)
        offset = 0
        for module in self.owners:
            for name in ("running_mean", "running_var"):
                size = getattr(module, name).numel()
                setattr(module, name, self.flat[offset : offset + size])
                offset += size


class Ema:
    """Exponential moving average of weights and statistics: decay * (1 - exp(-updates / tau)), as in YOLOv5."""

    def __init__(self, model: Network, hyp: Hyp) -> None:
        self.model = copy.deepcopy(model).eval()
        for parameter in self.model.parameters():
            parameter.requires_grad_(False)
        self.decay, self.tau, self.updates = hyp.ema_decay, hyp.ema_tau, 0
        self.statistics = FlatStatistics(self.model)
        pairs = [(a, b) for a, b in zip(self.model.parameters(), model.parameters(), strict=True)]
        self.mine, self.theirs = [a.data for a, _ in pairs], [b.data for _, b in pairs]

    @torch.no_grad()
    def update(self, statistics: FlatStatistics) -> None:
        """Move towards the model that this average was made from (whose flat statistics are given)."""
        self.updates += 1
        weight = 1 - self.decay * (1 - math.exp(-self.updates / self.tau))
        torch._foreach_lerp_(self.mine, self.theirs, weight)
        self.statistics.flat.lerp_(statistics.flat, weight)
