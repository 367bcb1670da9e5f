"""Shared fixtures: the folder of real data, a private cache, and random states that no test can leak."""

import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.runs import HYP, SMALL
from utils.data.scenes import write_dataset

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session", autouse=True)
def _session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Caches go to a temporary folder (child processes included); a fixed number of threads keeps results equal."""
    before = os.environ.get("YOLOV5_SPD_CACHE")
    os.environ["YOLOV5_SPD_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    threads = max((os.cpu_count() or 1) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1)), 1)
    torch.set_num_threads(threads)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    yield
    if before is None:
        del os.environ["YOLOV5_SPD_CACHE"]
    else:
        os.environ["YOLOV5_SPD_CACHE"] = before


@pytest.fixture(autouse=True)
def rng() -> Iterator[None]:
    """Every test starts from the same seeds and restores the random states, and the threads, that it found."""
    states, threads = (random.getstate(), np.random.get_state(), torch.get_rng_state()), torch.get_num_threads()
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    yield
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real data sets ($YOLOV5_SPD_DATA, else ../shared/data); tests that need them skip where they are absent."""
    folder = Path(os.environ.get("YOLOV5_SPD_DATA") or ROOT.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"needs real data in {folder} (or name its folder in YOLOV5_SPD_DATA)")
    return folder


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data YAML of 24 + 8 drawn pictures of 64 px."""
    return write_dataset(tmp_path_factory.mktemp("scenes"), train=24, val=8, size=64)


@pytest.fixture(scope="session")
def whole(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """An uninterrupted training run with pictures, as `train.run` returns it."""
    import train

    project = tmp_path_factory.mktemp("runs")
    return train.run(**{**SMALL, "noplots": False}, data=scenes, hyp=HYP, project=project, save_every="1")
