"""The one place that knows the rank. In a single process every operation is a no-op."""

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn, TypeVar, cast

import torch
import torch.distributed as torch_dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous

from utils.core.device import select_device
from utils.core.errors import UserError

T = TypeVar("T")
Module = TypeVar("Module", bound=nn.Module)


@dataclass(frozen=True)
class Dist:
    """This process among its peers; built by `Dist.start`, handed down as a value."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = torch.device("cpu")

    @classmethod
    def single(cls, device: torch.device | str = "cpu") -> "Dist":
        """One process on one device."""
        return cls(device=torch.device(device))

    @classmethod
    def start(cls, device_spec: str, timeout: float = 600.0) -> "Dist":
        """Join the group that torchrun announced in the environment, or be the only process."""
        world = int(os.environ.get("WORLD_SIZE", 1))
        if world == 1:
            return cls.single(select_device(device_spec))
        local = int(os.environ.get("LOCAL_RANK", 0))
        device = select_device(device_spec or _own_gpu(local))
        backend = "nccl" if device.type == "cuda" else "gloo"
        if device.type == "cuda":
            torch.cuda.set_device(device)
        limit = timedelta(seconds=timeout)
        store, rank, world = next(rendezvous("env://", timeout=limit))
        torch_dist.init_process_group(
            backend, timeout=limit, store=torch_dist.PrefixStore(_attempt(), store), rank=rank, world_size=world,
            device_id=device if device.type == "cuda" else None,
        )  # fmt: skip
        return cls(rank, world, device)

    def stop(self) -> None:
        """Leave the group."""
        if self.world_size > 1 and torch_dist.is_initialized():
            torch_dist.destroy_process_group()

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world_size > 1:
            torch_dist.barrier()

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over the ranks (a new tensor)."""
        if self.world_size == 1:
            return tensor
        total = tensor.detach().clone()
        torch_dist.all_reduce(total)
        return total

    def sum_(self, tensors: list[Tensor]) -> None:
        """Sum a list of tensors over the ranks in place, in one flat message per dtype."""
        if self.world_size == 1 or not tensors:
            return
        groups: dict[torch.dtype, list[Tensor]] = {}
        for tensor in tensors:
            groups.setdefault(tensor.dtype, []).append(tensor)
        for group in groups.values():
            flat = torch.cat([t.reshape(-1) for t in group])
            torch_dist.all_reduce(flat)
            for tensor, part in zip(group, flat.split([t.numel() for t in group]), strict=True):
                tensor.copy_(part.view_as(tensor))

    def mean(self, tensor: Tensor) -> Tensor:
        """Mean over the ranks (a new tensor)."""
        return self.sum(tensor) / self.world_size

    def gather(self, value: T) -> list[T] | None:
        """All ranks' values, in rank order, on the main rank; None elsewhere."""
        if self.world_size == 1:
            return [value]
        out: list[Any] | None = [None] * self.world_size if self.is_main else None
        torch_dist.gather_object(value, out)
        return out

    def broadcast(self, value: T) -> T:
        """The main rank's value, on every rank."""
        if self.world_size == 1:
            return value
        box: list[Any] = [value]
        torch_dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def main_first(self, function: Callable[[], T]) -> T:
        """Run `function` on the main rank, then on the others (which find its caches warm)."""
        if self.world_size == 1:
            return function()
        result = self._on_main(function)[0]
        return result if self.is_main else function()

    def main_decides(self, function: Callable[[], T]) -> T:
        """What `function` gives on the main rank, on every rank."""
        return function() if self.world_size == 1 else self.broadcast(self._on_main(function)[0])

    def _on_main(self, function: Callable[[], T]) -> list[T]:
        """[its result] on the main rank, [None] elsewhere; its UserError is raised on all ranks."""
        failure: str | None = None
        result: Any = None
        if self.is_main:
            try:
                result = function()
            except UserError as error:
                failure = str(error)
        failure = self.broadcast(failure)
        if failure is not None:
            raise UserError(failure)
        return [result]

    def sync_batch_norm(self, model: Module) -> Module:
        """BatchNorm layers take their statistics over all ranks."""
        return cast(Module, nn.SyncBatchNorm.convert_sync_batchnorm(model)) if self.world_size > 1 else model


def _own_gpu(local_rank: int) -> str:
    """The default device of a rank: the GPU of its number, or the CPU where there is none."""
    return str(local_rank) if torch.cuda.is_available() else "cpu"


def _attempt() -> str:
    """A name for this attempt of a group that may be restarted: torchrun's store keeps the addresses of dead ranks.

    With several nodes each agent counts its own restarts, so there the name is one and the same.
    """
    alone = os.environ.get("GROUP_WORLD_SIZE", "1") == "1"
    return f"attempt{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}" if alone else "attempt"


def is_restarted() -> bool:
    """Whether torchrun started this group again after a failure (`--max-restarts`)."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


def launched() -> bool:
    """Whether this process was started by torchrun or another launcher."""
    return "LOCAL_RANK" in os.environ and "WORLD_SIZE" in os.environ


def relaunch(processes: int, argv: Sequence[str]) -> NoReturn:
    """Become torchrun with this program on one process per GPU; signals and the exit code are its own."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [*command, sys.argv[0], *argv])
