"""Assignment and loss against slow loops; splitting a batch over processes leaves the sum unchanged."""

import pytest
import torch
import torch.nn.functional as F
import torchvision

from utils.core.hyp import Hyp
from utils.ops.anchors import anchor_fit, check_anchors, kmeans_anchors
from utils.ops.assign import assign_layer
from utils.ops.boxes import cxcywh_to_xyxy
from utils.ops.loss import DetectionLoss

ANCHORS = torch.tensor(
    [[[10.0, 13], [16, 30], [33, 23]], [[30, 61], [62, 45], [59, 119]], [[116, 90], [156, 198], [373, 326]]]
)
STRIDES = [8, 16, 32]


def targets(n, images=2, nc=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    rows = torch.rand(n, 6, generator=g)
    rows[:, 0] = torch.randint(0, images, (n,), generator=g)
    rows[:, 1] = torch.randint(0, nc, (n,), generator=g)
    rows[:, 4:] = rows[:, 4:] * 0.4 + 0.01
    return rows


def maps(images=2, size=128, nc=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(images, 3, size // s, size // s, 5 + nc, generator=g) for s in STRIDES]


def slow_assign(rows, anchors, h, w, limit):
    found = set()
    for t in rows.tolist():
        cx, cy, bw, bh = t[2] * w, t[3] * h, t[4] * w, t[5] * h
        for a, (aw, ah) in enumerate(anchors.tolist()):
            if max(bw / aw, aw / bw, bh / ah, ah / bh) >= limit:
                continue
            cells = [(int(cx), int(cy))]
            if cx % 1 < 0.5 and cx > 1:
                cells.append((int(cx) - 1, int(cy)))
            if cy % 1 < 0.5 and cy > 1:
                cells.append((int(cx), int(cy) - 1))
            if (w - cx) % 1 < 0.5 and w - cx > 1:
                cells.append((int(cx) + 1, int(cy)))
            if (h - cy) % 1 < 0.5 and h - cy > 1:
                cells.append((int(cx), int(cy) + 1))
            for x, y in cells:
                box = (round(cx - x, 3), round(cy - y, 3), round(bw, 3), round(bh, 3))
                found.add((int(t[0]), a, y, x, int(t[1]), box))
    return found


@pytest.mark.parametrize("level", [0, 1, 2])
def test_assignment_equals_the_slow_loop(level):
    rows = targets(200)
    grid, anchors = 128 // STRIDES[level], ANCHORS[level] / STRIDES[level]
    got = assign_layer(rows, anchors, (grid, grid), 4.0)
    boxes = [tuple(round(v, 3) for v in b) for b in got.box.tolist()]
    columns = (got.image, got.anchor, got.y, got.x, got.cls)
    mine = set(zip(*(c.tolist() for c in columns), boxes, strict=True))
    expected = slow_assign(rows, anchors, grid, grid, 4.0)
    assert {m[:5] for m in mine} == {e[:5] for e in expected}
    assert len(mine) == len(expected)


def test_no_targets_and_degenerate_targets():
    loss = DetectionLoss(ANCHORS, STRIDES, 4, Hyp(), 640)
    parts = loss(maps(), torch.zeros(0, 6))
    assert parts["box"] == 0 and parts["cls"] == 0 and parts["obj"] > 0
    flat = torch.tensor([[0, 1, 0.5, 0.5, 0.0, 0.1], [0, 1, 1.0, 1.0, 0.1, 0.1]])
    assert all(torch.isfinite(p) for p in loss(maps(), flat).values())


def test_loss_equals_a_slow_loop():
    nc, hyp = 4, Hyp()
    loss = DetectionLoss(ANCHORS, STRIDES, nc, hyp, 640)
    raw, rows = maps(nc=nc), targets(12)
    parts = loss(raw, rows)
    box = cls = obj = 0.0
    for m, layer, anchors, balance in zip(raw, loss.assign(rows, raw), loss.anchors, (4.0, 1.0, 0.4), strict=True):
        wanted = torch.zeros(m.shape[:4])
        for i in range(len(layer)):
            b, a, y, x = (int(getattr(layer, k)[i]) for k in ("image", "anchor", "y", "x"))
            p = m[b, a, y, x]
            pred = torch.cat((p[:2].sigmoid() * 2 - 0.5, (p[2:4].sigmoid() * 2) ** 2 * anchors[a]))
            pair = [cxcywh_to_xyxy(t)[None] for t in (pred, layer.box[i])]
            value = torchvision.ops.complete_box_iou(*pair).item()
            box += (1 - value) / len(layer)
            wanted[b, a, y, x] = max(wanted[b, a, y, x].item(), value)
            one_hot = F.one_hot(layer.cls[i], nc).float()
            cls += F.binary_cross_entropy_with_logits(p[5:], one_hot).item() / len(layer)
        obj += balance * F.binary_cross_entropy_with_logits(m[..., 4], wanted).item()
    assert parts["box"].item() == pytest.approx(box * 0.05, rel=1e-3)
    assert parts["cls"].item() == pytest.approx(cls * 0.5 * nc / 80, rel=1e-3)
    assert parts["obj"].item() == pytest.approx(obj, rel=1e-3)


def test_shares_of_a_batch_sum_to_the_whole():
    loss = DetectionLoss(ANCHORS, STRIDES, 4, Hyp(), 640)
    raw, rows = maps(4), targets(40, images=4)
    whole = loss(raw, rows)
    counts = torch.tensor([float(len(a)) for a in loss.assign(rows, raw)])
    total = dict.fromkeys(whole, 0.0)
    for images in ([0, 2], [1, 3]):
        mine = torch.cat([rows[rows[:, 0] == i] for i in images])
        mine[:, 0] = torch.tensor([images.index(int(i)) for i in mine[:, 0]])
        for name, value in loss([m[images] for m in raw], mine, positives=counts, images=4).items():
            total[name] += value.item()
    for name, value in whole.items():
        assert total[name] == pytest.approx(value.item(), rel=1e-5)


def test_focal_loss_without_focus_is_weighted_bce():
    plain = DetectionLoss(ANCHORS, STRIDES, 4, Hyp(), 640)(maps(), targets(9))
    focal = DetectionLoss(ANCHORS, STRIDES, 4, Hyp(fl_gamma=1.5), 640)(maps(), targets(9))
    assert focal["obj"] < plain["obj"]
    assert focal["box"] == plain["box"]


def test_anchors_that_fit_are_kept_and_others_fitted():
    g = torch.Generator().manual_seed(0)
    tiny = (torch.rand(500, 2, generator=g) * 4 + 2).numpy()
    check = check_anchors(tiny, ANCHORS.numpy() * 4, 4.0)
    assert check.changed and check.new_recall > 0.98 > check.recall
    again = check_anchors(tiny, check.anchors, 4.0)
    assert not again.changed
    assert kmeans_anchors(tiny[:3], 9, 4.0) is None
    assert (kmeans_anchors(tiny, 9, 4.0) == kmeans_anchors(tiny, 9, 4.0)).all()
    assert anchor_fit(tiny, tiny[:1], 1e9)[0] == 1.0
