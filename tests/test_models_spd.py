"""Space-to-depth against its definition by slices: order, inverse, scales, memory format, errors."""

import pytest
import torch

from models.spd import SPD, Focus, SPDConv, depth_to_space, space_to_depth


def by_slices(x: torch.Tensor, scale: int) -> torch.Tensor:
    """The definition of section 3.1, in the authors' order: columns outside, rows inside."""
    return torch.cat([x[:, :, r::scale, c::scale] for c in range(scale) for r in range(scale)], 1)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    ("scale", "shape"), [(2, (2, 3, 8, 12)), (2, (1, 1, 2, 2)), (3, (2, 5, 9, 6)), (4, (1, 2, 8, 8))]
)
def test_equals_slices_and_inverts(scale: int, shape: tuple[int, ...], layout: torch.memory_format) -> None:
    x = torch.rand(shape).contiguous(memory_format=layout)
    y = space_to_depth(x, scale)
    assert torch.equal(y, by_slices(x, scale))
    assert torch.equal(depth_to_space(y, scale), x)
    assert torch.equal(SPD(scale).inverse(SPD(scale)(x)), x)


def test_pair_of_scales() -> None:
    x = torch.rand(1, 2, 4, 9)
    y = space_to_depth(x, (2, 3))
    assert y.shape == (1, 12, 2, 3)
    assert torch.equal(y[:, 2 * (1 * 2 + 1) :][:, :2], x[:, :, 1::2, 1::3])
    assert torch.equal(depth_to_space(y, (2, 3)), x)


def test_channels_last_is_kept_forward_and_backward() -> None:
    x = torch.rand(2, 8, 6, 4).contiguous(memory_format=torch.channels_last).requires_grad_()
    y = space_to_depth(x)
    assert y.is_contiguous(memory_format=torch.channels_last)
    weights = torch.rand(y.shape).contiguous(memory_format=torch.channels_last)
    (y * weights).sum().backward()
    assert x.grad is not None and x.grad.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(x.grad, depth_to_space(weights))


def test_empty_batch() -> None:
    assert space_to_depth(torch.zeros(0, 3, 4, 4)).shape == (0, 12, 2, 2)


@pytest.mark.parametrize("size", [(5, 4), (4, 5), (1, 1)])
def test_sizes_that_do_not_divide_are_refused(size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="does not divide"):
        SPD()(torch.rand(1, 3, *size))


@pytest.mark.parametrize("scale", [1, 0, (1, 1), (2, 0)])
def test_scales_that_make_no_sense_are_refused(scale: object) -> None:
    with pytest.raises(ValueError, match="scale"):
        SPD(scale)


def test_blocks_are_spd_then_convolution() -> None:
    x = torch.rand(2, 3, 8, 8)
    for block in (SPDConv(3, 16).eval(), Focus(3, 16, 3).eval()):
        assert torch.equal(block(x), block.conv(by_slices(x, 2)))
        assert block(x).shape == (2, 16, 4, 4)
