"""Recall of small objects on a 4000x3000 image, with and without slices, for a trained model.

    python benchmarks/slices.py --weights yolov5n.pt --data ../shared/data/coco-val200/coco-val200.yaml [--cell 250]

The image is a collage of the data set's validation pictures, each shrunk to a cell, so that objects of a real and known
kind become small. `val.py` measures it whole and in slices of 640 and of 320 pixels: recall at IoU 0.5 of all
detections (`AR` with one threshold), AP50, and the time. The last line is the result as JSON.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import val  # noqa: E402
from utils.core.yamls import dump_yaml  # noqa: E402
from utils.data.images import read_image  # noqa: E402
from utils.data.index import build_index  # noqa: E402
from utils.data.spec import load_data  # noqa: E402
from utils.ops.letterbox import FILL  # noqa: E402

HW = (3000, 4000)
MOST = 3000  # detections that count


def collage(data: str, cell: int, folder: Path) -> tuple[Path, int]:
    """Writes the picture, its labels and a data YAML; returns the YAML and the number of objects."""
    spec = load_data(data)
    index = build_index(spec, "val")
    canvas = np.full((*HW, 3), FILL, np.uint8)
    across, down = HW[1] // cell, HW[0] // cell
    lines = []
    for place in range(min(across * down, len(index))):
        image = read_image(index.file(place))
        h, w = image.shape[:2]
        gain = cell / max(h, w)
        small = cv2.resize(image, (int(w * gain), int(h * gain)), interpolation=cv2.INTER_AREA)
        top, left = place // across * cell, place % across * cell
        canvas[top : top + small.shape[0], left : left + small.shape[1]] = small
        own = slice(index.offsets[place], index.offsets[place + 1])
        boxes = index.boxes[own] * gain + np.array([left, top, left, top])
        for cls, (x1, y1, x2, y2) in zip(index.cls[own], boxes, strict=True):
            center = (x1 + x2) / 2 / HW[1], (y1 + y2) / 2 / HW[0]
            lines.append(f"{cls} {center[0]} {center[1]} {(x2 - x1) / HW[1]} {(y2 - y1) / HW[0]}")
    for name in ("images", "labels"):
        (folder / name).mkdir()
    cv2.imwrite(str(folder / "images" / "collage.png"), canvas[..., ::-1])
    (folder / "labels" / "collage.txt").write_text("\n".join(lines), encoding="utf-8")
    dump_yaml(folder / "data.yaml", {"train": "images", "val": "images", "names": list(spec.names)})
    return folder / "data.yaml", len(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", required=True)
    parser.add_argument("--data", required=True, help="data YAML whose val pictures make the collage")
    parser.add_argument("--cell", type=int, default=250, help="long side of a picture in the collage, pixels")
    parser.add_argument("--slices", type=int, nargs="+", default=[0, 640, 320], help="0: the whole image at once")
    parser.add_argument("--imgsz", type=int, default=640)
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        data, objects = collage(options.data, options.cell, Path(name))
        for size in options.slices:
            began = time.perf_counter()
            report = val.run(
                weights=options.weights, data=str(data), imgsz=options.imgsz, slice=size, max_det=MOST,
                max_dets=[1, 10, MOST], iou_thrs=[0.5], workers=0, noplots=True, project=name, name=str(size),
            )  # fmt: skip
            seconds = time.perf_counter() - began
            found = report.metrics
            rows.append({"slice": size, "recall": found[f"AR{MOST}"], "AP50": found["AP50"], "seconds": seconds})
    print(f"\n{HW[1]}x{HW[0]} pixels, {objects} objects, network size {options.imgsz}")
    print(f"{'slice':>8}{'recall':>10}{'AP50':>10}{'seconds':>10}")
    for row in rows:
        print(f"{row['slice'] or 'whole':>8}{row['recall']:>10.3f}{row['AP50']:>10.3f}{row['seconds']:>10.1f}")
    print(json.dumps({"benchmark": "slices", "objects": objects, "cell": options.cell, "rows": rows}))


if __name__ == "__main__":
    main()
