"""Label index: first scan and cached start on synthetic label files, in files/s. `python benchmarks/index.py [N]`"""

import json
import os
import sys
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.core.machine import available_cores  # noqa: E402
from utils.data.index import build_index  # noqa: E402
from utils.data.spec import load_data  # noqa: E402

PER_FOLDER = 10_000


def draw(root: Path, count: int) -> Path:
    """`count` small JPEGs with a label file of 1 to 14 boxes each."""
    rng = np.random.default_rng(0)
    picture = cv2.imencode(".jpg", rng.integers(0, 256, (64, 64, 3), dtype=np.uint8))[1].tobytes()
    for start in range(0, count, PER_FOLDER):
        folders = [root / kind / f"{start // PER_FOLDER:03d}" for kind in ("images", "labels")]
        for folder in folders:
            folder.mkdir(parents=True)
        for i in range(start, min(start + PER_FOLDER, count)):
            rows = rng.random((rng.integers(1, 15), 4)) * (0.5, 0.5, 0.4, 0.4) + (0.25, 0.25, 0.05, 0.05)
            text = "".join(f"{k % 80} {x:.6f} {y:.6f} {w:.6f} {h:.6f}\n" for k, (x, y, w, h) in enumerate(rows))
            (folders[0] / f"{i:06d}.jpg").write_bytes(picture)
            (folders[1] / f"{i:06d}.txt").write_text(text)
    data = root / "data.yaml"
    data.write_text("train: images\nnc: 80\n")
    return data


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 100_000
    with tempfile.TemporaryDirectory() as folder:
        os.environ["YOLOV5_SPD_CACHE"] = str(Path(folder) / "cache")
        spec = load_data(draw(Path(folder), count))
        seconds, cpu = {}, {}
        runs = {"first scan, 1 process": (True, 0), f"first scan, {available_cores()} processes": (True, None)}
        for name, (rebuild, workers) in {**runs, "cached start": (False, None)}.items():
            began, busy = time.perf_counter(), sum(os.times()[:4])
            index = build_index(spec, "train", rebuild=rebuild, workers=workers)
            seconds[name], cpu[name] = time.perf_counter() - began, sum(os.times()[:4]) - busy
            assert len(index) == count and not index.report.counts
        memory = f"{index.nbytes / 1e6:.1f} MB in memory"
        print(f"\n{count:,} images with a label file each, {len(index.cls):,} boxes, {memory}")
        print(f"{'':<28}{'seconds':>10}{'label files/s':>16}{'CPU seconds':>14}")
        for name, value in seconds.items():
            print(f"{name:<28}{value:>10.2f}{count / value:>16,.0f}{cpu[name]:>14.2f}")
        print(f"load average of the last minute: {os.getloadavg()[0]:.1f} on {available_cores()} cores")
    print(json.dumps({"benchmark": "index", "files": count, "seconds": {k: round(v, 3) for k, v in seconds.items()}}))


if __name__ == "__main__":
    main()
