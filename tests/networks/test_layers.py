"""Layers against computations written another way."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lsgm.networks.batch_norm import BATCH_NORM_MOMENTUM, BatchNormSwish
from lsgm.networks.flow import Shift
from lsgm.networks.layers import soft_clamp
from lsgm.networks.mbconv import MBConvBranch
from lsgm.networks.nvae_cells import BNSwishBranch, Cell, DownSkip, SqueezeExcite, UpSkip
from lsgm.networks.weight_norm import NormalizedWeights, WNConv2d


def double(module):
    """In float64, every parameter random: biases and norms too."""
    module = module.double()
    for p in module.parameters():
        torch.nn.init.normal_(p, std=0.5)
    return module


def test_weight_norm_against_a_loop():
    conv = double(WNConv2d(3, 5, 3))
    weight = torch.empty_like(conv.weight)
    for o in range(5):
        norm = sum(w.item() ** 2 for w in conv.weight[o].flatten()) ** 0.5
        weight[o] = conv.log_weight_norm[o].exp() * conv.weight[o] / (norm + 1e-5)
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    torch.testing.assert_close(conv(x), F.conv2d(x, weight, conv.bias, padding=1))


def test_weights_normalized_at_once_are_those_normalized_one_by_one():
    """In values and gradients, masked ones too; outside of the context each convolution computes its own again."""
    network = torch.nn.Sequential(WNConv2d(4, 8, 3), WNConv2d(8, 8, 3), WNConv2d(8, 8, 3), Shift(8, mirrored=False))
    double(network)
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    expected = network(x)
    gradients = torch.autograd.grad(expected.square().sum(), list(network.parameters()))
    with NormalizedWeights(network):
        found = network(x)
        assert network[1].effective_weight()._base is network[2].effective_weight()._base  # one tensor holds both
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found.square().sum(), list(network.parameters())), gradients)
    with torch.no_grad():
        network[0].weight.mul_(2).add_(1)
    assert not torch.allclose(network(x), expected)


def test_pointwise_convolution_of_channels_last_maps_is_the_same():
    conv = double(WNConv2d(6, 4, 1))
    x = torch.randn(3, 6, 5, 7, dtype=torch.float64)
    found = conv(x.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(found, conv(x))
    assert found.is_contiguous(memory_format=torch.channels_last)


def test_weight_norm_starts_as_the_plain_convolution():
    conv = WNConv2d(3, 5, 3)
    norm = conv.weight.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    torch.testing.assert_close(conv.effective_weight(), conv.weight * (norm + 1e-2) / (norm + 1e-5))
    assert torch.autograd.gradcheck(
        double(WNConv2d(2, 2, 3)), torch.randn(1, 2, 3, 3, dtype=torch.float64).requires_grad_()
    )


@pytest.mark.parametrize(("channels", "hidden"), [(16, 4), (160, 10)])
def test_squeeze_excite_against_numpy(channels, hidden):
    gate = double(SqueezeExcite(channels))
    x = torch.randn(2, channels, 3, 5, dtype=torch.float64)
    first, second = gate.squeeze, gate.excite
    assert first.out_features == hidden
    mean = x.numpy().mean(axis=(2, 3))
    h = np.maximum(mean @ first.weight.detach().numpy().T + first.bias.detach().numpy(), 0)
    expected = 1 / (1 + np.exp(-(h @ second.weight.detach().numpy().T + second.bias.detach().numpy())))
    np.testing.assert_allclose(gate(x).detach()[:, :, 0, 0], expected, rtol=1e-12)


def test_batch_norm_swish_normalizes_and_keeps_running_statistics():
    layer = BatchNormSwish(3).double()
    x = torch.randn(8, 3, 4, 4, dtype=torch.float64) * 3 + 1
    mean, var = x.mean(dim=(0, 2, 3)), x.var(dim=(0, 2, 3), unbiased=False)
    normal = (x - mean[:, None, None]) / (var[:, None, None] + 1e-5).sqrt()
    torch.testing.assert_close(layer(x), normal * torch.sigmoid(normal))
    torch.testing.assert_close(layer.running_mean, BATCH_NORM_MOMENTUM * mean)


def test_soft_clamp():
    x = torch.tensor([-1e3, -0.01, 0.0, 0.01, 1e3])
    torch.testing.assert_close(soft_clamp(x), torch.tensor([-5.0, -0.01, 0.0, 0.01, 5.0]), atol=1e-6, rtol=1e-4)


def test_down_skip_sees_the_four_shifted_grids():
    skip = double(DownSkip(3, 10))
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    y = x * torch.sigmoid(x)
    assert [conv.out_channels for conv in skip.convs] == [2, 2, 2, 4]
    parts = []
    for conv, (row, column) in zip(skip.convs, [(0, 0), (1, 1), (0, 1), (1, 0)], strict=True):
        grid = y[:, :, row::2, column::2]
        parts.append(
            torch.einsum("oi,bihw->bohw", conv.effective_weight()[:, :, 0, 0], grid) + conv.bias[:, None, None]
        )
    torch.testing.assert_close(skip(x), torch.cat(parts, dim=1))


def test_up_skip_interpolates_then_convolves():
    skip = double(UpSkip(3, 4))
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    big = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)
    torch.testing.assert_close(skip(x), F.conv2d(big, skip.conv.effective_weight()))


def test_mbconv_may_repeat_pixels_after_the_expansion():
    """Repeating the pixels first, as defined, gives the same output in training mode."""
    branch = double(MBConvBranch(4, 6, 1, 3)).train()
    x = torch.randn(8, 4, 4, 4, dtype=torch.float64)
    ours = branch(x)
    branch.upsample = False
    torch.testing.assert_close(ours, branch(F.interpolate(x, scale_factor=2, mode="nearest")))


@pytest.mark.parametrize(
    ("kind", "resample"),
    [("bnswish", -1), ("bnswish", 0), ("bnswish", 1), ("mbconv", 0), ("mbconv", 1)],
)
def test_cell_is_a_gated_residual(kind, resample):
    c_out = 8 if resample == 0 else 12
    branch = BNSwishBranch(8, c_out, resample) if kind == "bnswish" else MBConvBranch(8, c_out, resample, 3)
    cell = double(Cell(branch, 8, c_out, resample, use_se=True)).eval()
    x = torch.randn(2, 8, 4, 4, dtype=torch.float64)
    h = cell.branch(x)
    expected = cell.skip(x) + 0.1 * h * cell.gate(h)
    torch.testing.assert_close(cell(x), expected)
    assert cell(x).shape == (2, c_out, *[int(4 * 2.0**resample)] * 2)
