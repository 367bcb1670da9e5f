"""Guard against steps that are not finite: decided and counted on the device, told to the host with the log line."""

from collections import deque
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from utils.core.dist import Dist
from utils.core.errors import UserError
from utils.core.log import LOGGER
from utils.engine.training.ema import FlatStatistics


class Guard:
    """Counts bad steps, restores BatchNorm statistics after them, and ends a run that only skips.

    A step is bad when a loss part, or without a scaler a gradient, is not finite on any rank; overflow of fp16
    gradients under a finite loss is the scaler's business and does not count.
    """

    def __init__(
        self,
        statistics: FlatStatistics,
        loss_names: Sequence[str],
        dist: Dist,
        limit: int,
        file: Callable[[int], str],
    ) -> None:
        self.statistics, self.names, self.dist, self.limit = statistics, list(loss_names), dist, limit
        self.file = file  # of a sample's number
        self.counts = torch.zeros(3 + len(loss_names), device=dist.device)  # in a row, untold, last step, by loss part
        self.loss_bad = torch.zeros((), dtype=torch.bool, device=dist.device)
        self.before = statistics.flat.clone()
        self.recent: deque[tuple[int, list[int]]] = deque(maxlen=64)

    def begin(self) -> None:
        """A new group of batches that will make one optimizer step."""
        self.before = self.statistics.flat.clone()
        self.loss_bad = torch.zeros_like(self.loss_bad)

    def note(self, parts: Tensor, step: int, images: list[int]) -> None:
        """Look at the loss parts of one batch."""
        bad = ~parts.isfinite()
        self.counts[3:] += bad
        self.counts[2] = torch.where(bad.any(), float(step), self.counts[2])
        self.loss_bad = self.loss_bad | bad.any()
        self.recent.append((step, images))

    def judge(self, gradient_norm: Tensor, scaled: bool, step: int) -> Tensor:
        """Whether to skip the optimizer step, as a 0-dim bool on the device; undoes the statistics of a bad step."""
        loss_bad = self.dist.sum(self.loss_bad.float()) > 0
        overflow = ~gradient_norm.isfinite()
        bad = loss_bad if scaled else loss_bad | overflow
        self.statistics.flat.copy_(torch.where(bad, self.before, self.statistics.flat))
        self.counts[0] = (self.counts[0] + 1) * bad
        self.counts[1] += bad
        self.counts[2] = torch.where(bad & ~loss_bad, float(step), self.counts[2])
        return loss_bad | overflow

    def report(self) -> None:
        """Tell what was skipped since the last report; all ranks call it together."""
        in_a_row, untold, step, *parts = self.counts.tolist()
        if not untold:
            return
        images = [self.file(i) for i in next((found for number, found in self.recent if number == int(step)), [])]
        shares = self.dist.gather((parts, int(step), images))
        if shares is not None:
            guilty = [share for share in shares if any(share[0])] or shares
            named = [name for i, name in enumerate(self.names) if any(share[0][i] for share in guilty)] or ["gradients"]
            found = [image for share in guilty for image in share[2]]
            LOGGER.warning(
                f"{int(untold)} step(s) skipped, the last one step {guilty[-1][1]}: not finite in {', '.join(named)} "
                f"(images {', '.join(found[:16])}); {int(in_a_row)} in a row"
            )
        self.counts[1] = 0
        self.counts[3:] = 0
        if in_a_row >= self.limit:
            raise UserError(
                f"{int(in_a_row)} steps in a row were not finite; weights/last.pt is the last good checkpoint; "
                "lower lr0, use --amp off, or check the images named above"
            )
