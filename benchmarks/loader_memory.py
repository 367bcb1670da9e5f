"""Memory of the training loader over a large index: PSS of the process tree, for 0 and for 4 workers.

    python benchmarks/loader_memory.py [--images 100000] [--workers 4] [--steps 60] [--epochs 3]

Shared pages count once (PSS). The index holds that many images, all of them one of 64 files. Each count of workers is
measured in a process of its own, at the end of each epoch of `steps` batches of 16 at 640 px. One such epoch goes
before the first that counts: a real one is a hundred times as long, and the allocator settles early in it.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import cv2

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.loader import HW, random_index, write_images  # noqa: E402
from utils.core.hyp import Hyp  # noqa: E402
from utils.data.dataset import DetectionDataset  # noqa: E402
from utils.data.loader import TrainLoader  # noqa: E402

FILES = 64


def tree_pss(pid: int) -> int:
    """Proportional set size of a process and its descendants, bytes."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    own = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return own + sum(tree_pss(int(child)) for child in children)


def measure(workers: int, images: int, steps: int, epochs: int) -> list[int]:
    """PSS of this process tree after each epoch."""
    cv2.setNumThreads(1)
    found = []
    with tempfile.TemporaryDirectory() as folder:
        files = write_images(Path(folder), FILES, None)
        index = random_index(files, HW)
        index = replace(random_index([files[0]] * images), files=_Repeated(files, images), key=index.key)
        dataset = DetectionDataset(index, 640, Hyp(), augment=True)
        loader = TrainLoader(dataset, 16, workers=workers)
        for epoch in range(epochs + 1):
            for batch in loader.epoch(epoch, len(loader) - steps):
                del batch
            found.append(tree_pss(os.getpid()))
        loader.close()
    return found[1:]


class _Repeated(Sequence[Path]):
    """A list of `count` names out of a few."""

    def __init__(self, files: list[Path], count: int) -> None:
        self.files, self.total = files, count

    def __len__(self) -> int:
        return self.total

    def __getitem__(self, i: int) -> Path:  # type: ignore[override]
        return self.files[i % len(self.files)]


def measure_apart(workers: int, images: int, steps: int, epochs: int) -> list[int]:
    """`measure` in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.loader_memory", "--measure", str(workers), "--images", str(images)]
    command += ["--steps", str(steps), "--epochs", str(epochs)]
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run(command, cwd=root, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("images", 100_000), ("workers", 4), ("steps", 60), ("epochs", 3)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--measure", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure is not None:
        print(json.dumps(measure(options.measure, options.images, options.steps, options.epochs)))
        return
    results = {w: measure_apart(w, options.images, options.steps, options.epochs) for w in (0, options.workers)}
    for workers, sizes in results.items():
        epochs = ", ".join(f"{size / 2**20:.0f}" for size in sizes)
        print(f"{workers} workers: PSS after each epoch {epochs} MiB; last / first {sizes[-1] / sizes[0]:.3f}")
    added = (results[options.workers][-1] - results[0][-1]) / options.workers / 2**20
    print(f"a worker adds {added:.0f} MiB")
    growth = {f"{workers} workers": sizes[-1] / sizes[0] for workers, sizes in results.items()}
    print(json.dumps({"benchmark": "loader_memory", "images": options.images, "MiB a worker": added, "growth": growth}))


if __name__ == "__main__":
    main()
