"""Box arithmetic and the letterbox against slow loops and torchvision."""

import numpy as np
import pytest
import torch
import torchvision

from utils.ops.boxes import box_ioa, box_iou, ciou, clip_boxes, cxcywh_to_xyxy, xyxy_to_cxcywh
from utils.ops.letterbox import FILL, letterbox_geometry, letterbox_image


def random_boxes(n, seed=0, size=100.0):
    g = torch.Generator().manual_seed(seed)
    a, b = torch.rand(n, 2, generator=g) * size, torch.rand(n, 2, generator=g) * size
    return torch.cat((torch.minimum(a, b), torch.maximum(a, b)), 1)


def test_conversions_are_inverse_for_tensors_and_arrays():
    boxes = random_boxes(50)
    assert torch.allclose(cxcywh_to_xyxy(xyxy_to_cxcywh(boxes)), boxes, atol=1e-4)
    assert np.allclose(cxcywh_to_xyxy(xyxy_to_cxcywh(boxes.numpy())), boxes.numpy(), atol=1e-4)


def test_iou_is_torchvisions():
    a, b = random_boxes(30, 1), random_boxes(20, 2)
    expected = torchvision.ops.box_iou(a, b)
    assert torch.allclose(box_iou(a, b), expected, atol=1e-6)
    assert np.allclose(box_iou(a.numpy(), b.numpy()), expected.numpy(), atol=1e-6)
    assert box_iou(torch.zeros(1, 4), torch.zeros(2, 4)).tolist() == [[0, 0]]
    assert box_iou(a[:0], b).shape == (0, 20)


def test_ioa_of_a_contained_box_is_one():
    outer, inner = torch.tensor([[0.0, 0, 10, 10]]), torch.tensor([[2.0, 2, 4, 4]])
    assert box_ioa(outer, inner).item() == 1
    assert box_ioa(inner, outer).item() == pytest.approx(0.04)


def test_ciou_is_one_minus_torchvisions_loss():
    a, b = random_boxes(40, 3) + torch.tensor([0, 0, 1, 1]), random_boxes(40, 4) + torch.tensor([0, 0, 1, 1])
    expected = 1 - torchvision.ops.complete_box_iou_loss(a, b)
    assert torch.allclose(ciou(xyxy_to_cxcywh(a), xyxy_to_cxcywh(b)), expected, atol=1e-4)


def test_clip():
    assert clip_boxes(np.array([[-5.0, 2, 50, 90]]), (40, 30)).tolist() == [[0, 2, 30, 40]]


@pytest.mark.parametrize("hw", [(480, 640), (640, 480), (1, 1), (200, 10000), (33, 77), (1080, 1920)])
@pytest.mark.parametrize("auto", [False, True])
def test_letterbox_shape_round_trip_and_fill(hw, auto):
    geometry = letterbox_geometry(hw, 320, auto=auto)
    image = np.full((*hw, 3), 200, np.uint8)
    out = letterbox_image(image, geometry)
    assert out.shape == (*geometry.target_hw, 3)
    assert all(side % 32 == 0 and side <= 320 for side in geometry.target_hw)
    (top, left), (rh, rw) = geometry.pad, geometry.resized_hw
    inside = np.zeros(out.shape[:2], bool)
    inside[top : top + rh, left : left + rw] = True
    assert (out[inside] == 200).all()
    assert (out[~inside] == FILL).all()
    boxes = np.array([[0.0, 0, hw[1], hw[0]], [hw[1] * 0.2, hw[0] * 0.3, hw[1] * 0.6, hw[0] * 0.9]])
    assert np.allclose(geometry.to_source(geometry.to_network(boxes)), boxes, atol=1e-6 * max(hw))


def test_letterbox_without_scaleup_keeps_small_images():
    geometry = letterbox_geometry((50, 40), 320, scaleup=False)
    assert geometry.resized_hw == (50, 40)
