"""NMS against a slow loop; order, limits, classes and odd inputs."""

import pytest
import torch

from utils.ops.boxes import box_iou, cxcywh_to_xyxy
from utils.ops.detections import Detections
from utils.ops.nms import non_max_suppression, suppress


def predictions(n=120, nc=3, seed=0, shift=0.0):
    g = torch.Generator().manual_seed(seed)
    p = torch.rand(1, n, 5 + nc, generator=g)
    p[..., :2] = p[..., :2] * 60 + shift
    p[..., 2:4] = p[..., 2:4] * 30 + 2
    return p


def slow(p, conf, iou, agnostic, multi):
    rows = []
    for r in p:
        scores = r[5:] * r[4]
        chosen = range(len(scores)) if multi else [int(scores.argmax())]
        rows += [(float(scores[c]), c, cxcywh_to_xyxy(r[:4])) for c in chosen if r[4] > conf and scores[c] > conf]
    rows.sort(key=lambda x: -x[0])
    kept = []
    for s, c, box in rows:
        same = [k for k in kept if agnostic or k[1] == c]
        if all(box_iou(box[None], k[2][None]).item() <= iou for k in same):
            kept.append((s, c, box))
    return kept


@pytest.mark.parametrize("agnostic", [False, True])
@pytest.mark.parametrize("multi", [False, True])
@pytest.mark.parametrize("shift", [0.0, 50000.0])  # far beyond any fixed class offset
def test_equals_the_slow_loop(agnostic, multi, shift):
    p = predictions(shift=shift)
    got = non_max_suppression(p, conf_thres=0.1, iou_thres=0.4, agnostic=agnostic, multi_label=multi)[0]
    expected = slow(p[0], 0.1, 0.4, agnostic, multi)
    assert [int(c) for c in got[:, 5]] == [c for _, c, _ in expected]
    assert torch.allclose(got[:, 4], torch.tensor([s for s, _, _ in expected]))
    assert torch.equal(got[:, :4], torch.stack([b for _, _, b in expected]))


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_box_that_is_not_finite_does_not_save_the_others(value):
    p = predictions()
    broken = torch.cat((p, p[:, :1]), 1)
    broken[0, -1, 2], broken[0, -1, 4:6] = value, 1
    assert torch.equal(*(non_max_suppression(x, conf_thres=0.1)[0] for x in (p, broken)))


def test_limits_classes_and_empty():
    p = predictions()
    full = non_max_suppression(p, conf_thres=0.01)[0]
    assert torch.equal(non_max_suppression(p, conf_thres=0.01, max_det=5)[0], full[:5])
    only = non_max_suppression(p, conf_thres=0.01, classes=[1])[0]
    assert len(only) and set(only[:, 5].tolist()) == {1.0}
    assert non_max_suppression(p, conf_thres=0.9999)[0].shape == (0, 6)
    assert non_max_suppression(p[:, :0])[0].shape == (0, 6)
    assert non_max_suppression(p[:0]) == []


def test_an_image_does_not_depend_on_its_batch():
    p = torch.cat([predictions(seed=s) for s in range(3)])
    together = non_max_suppression(p, multi_label=True)
    for i in range(3):
        assert torch.equal(together[i], non_max_suppression(p[i : i + 1], multi_label=True)[0])


def test_detections_validate_themselves():
    found = Detections.from_rows([[0, 0, 5, 5, 0.9, 1], [1, 1, 2, 2, 0.4, 0], [1, 1, 2, 2, 0.3, 1]], ["cat", "dog"])
    assert found.summary() == "1 cat, 2 dogs"
    assert Detections.from_rows([[0, 0, 1, 1, 0.5, 0]] * 2, ["bus"]).summary() == "2 buses"
    assert len(found.filter(found.conf > 0.35)) == 2
    with pytest.raises(ValueError, match="expected 0 to 1"):
        Detections.from_rows([[0, 0, 1, 1, 0.5, 7]], ["cat", "dog"])
    assert Detections.from_rows([]).summary() == "(no detections)"


def test_a_limit_keeps_the_best_of_all():
    generator = torch.Generator().manual_seed(0)
    for n in (1, 30, 900):
        corner = torch.rand(n, 2, generator=generator) * 200
        boxes = torch.cat((corner, corner + torch.rand(n, 2, generator=generator) * 60), 1)
        scores = torch.randint(0, 40, (n,), generator=generator) / 40.0  # ties
        groups = torch.randint(0, 3, (n,), generator=generator)
        everything = suppress(boxes, scores, groups, 0.5)
        for limit in (1, 7, 50, 2000):
            assert torch.equal(suppress(boxes, scores, groups, 0.5, limit), everything[:limit])
