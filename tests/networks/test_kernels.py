"""The kernels in C against PyTorch's operations in float64."""

import copy
import shutil
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lsgm.networks import kernels
from lsgm.networks.batch_norm import BatchNorm, BatchNormSwish
from lsgm.networks.group_norm import GroupNorm, GroupNormSwish
from lsgm.networks.layers import Conv2d
from lsgm.networks.mbconv import MBConvBranch
from lsgm.networks.nvae_cells import SqueezeExcite
from lsgm.networks.weight_norm import NormalizedWeights, WNConv2d
from lsgm.training.regularization import SpectralRegularizer

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("cc") is None, reason="the kernels need Linux and a C compiler"
)


def feature_map(*shape: int, mean: float = 0.0) -> torch.Tensor:
    return (torch.randn(*shape) + mean).contiguous(memory_format=torch.channels_last)


def test_the_kernels_are_compiled_here():
    assert kernels.library() is not None


@pytest.mark.parametrize("norm", [BatchNorm, BatchNormSwish])
@pytest.mark.parametrize("shape", [(2, 4, 4, 4), (3, 20, 4, 4), (4, 8, 16, 16), (8, 96, 16, 16), (2, 200, 8, 24)])
def test_batch_norm(norm, shape):
    """Result, gradients and running statistics; a mean of a hundred deviations costs no accuracy."""
    layer = norm(shape[1]).train()
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    x, gradient = feature_map(*shape, mean=100.0).requires_grad_(), feature_map(*shape)
    found = layer(x)
    assert "_Normalize" in type(found.grad_fn).__name__
    wide, weight, bias = (v.detach().double().requires_grad_() for v in (x, layer.weight, layer.bias))
    running = torch.zeros(shape[1]).double(), torch.ones(shape[1]).double()
    expected = F.batch_norm(wide, *running, weight, bias, True, layer.momentum, layer.eps)
    expected = F.silu(expected) if layer.swish else expected
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=3e-5)
    wanted = torch.autograd.grad(expected, (wide, weight, bias), gradient.double())
    got = torch.autograd.grad(found, (x, layer.weight, layer.bias), gradient)
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-4 * other.abs().max().item())
    torch.testing.assert_close(layer.running_mean.double(), running[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(layer.running_var.double(), running[1], rtol=1e-5, atol=0)
    assert layer.num_batches_tracked == 1


def test_swish_far_from_zero_and_of_nan():
    layer = BatchNormSwish(4).train()
    with torch.no_grad():
        layer.bias.copy_(torch.tensor([-200.0, -50.0, 60.0, 300.0]))
    x = feature_map(2, 4, 4, 4)
    expected = F.silu(F.batch_norm(x.double(), None, None, layer.weight.double(), layer.bias.double(), True))
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-4, atol=1e-12)
    x[1, 2, 0, 0] = torch.nan
    found = layer(x)
    assert found[:, 2].isnan().all() and found[:, [0, 1, 3]].isfinite().all()


def same_as_in_float64(module, inputs, function):
    """Result, gradients and buffers of a module in float32, of which the last operation is ``function``."""
    wide = copy.deepcopy(module).double()
    wide_inputs = [x.detach().double().requires_grad_() for x in inputs]
    found, expected = module(*inputs), wide(*wide_inputs)
    assert function in type(found.grad_fn).__name__
    gradient = torch.randn_like(expected)
    got = torch.autograd.grad(found, [*inputs, *module.parameters()], gradient.float())
    wanted = torch.autograd.grad(expected, [*wide_inputs, *wide.parameters()], gradient)
    largest = max(other.abs().max().item() for other in wanted)  # that of a bias before a batch norm is nothing
    for one, other in zip((found, *got), (expected, *wanted), strict=True):
        scale = max(0.1 * largest, other.abs().max().item())
        torch.testing.assert_close(one.double(), other, rtol=0, atol=1e-5 * scale)
    for (name, one), other in zip(module.named_buffers(), wide.buffers(), strict=True):
        torch.testing.assert_close(one.double(), other.double(), rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "batch, c_in, c_out, resample, size",
    [
        (4, 16, 16, 0, 8),
        (4, 32, 16, 1, 8),
        (2, 16, 32, 1, 16),
        (3, 64, 48, 0, 16),
        (4, 16, 16, 1, 6),
        (16, 48, 16, 0, 2),
    ],
)
def test_mbconv(batch, c_in, c_out, resample, size, training):
    """With the statistics of the batch, or the running ones."""
    branch = MBConvBranch(c_in, c_out, resample, 3).train(training)
    for norm in (branch.norm_in, branch.norm_1, branch.norm_2, branch.norm_out):
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
        nn.init.uniform_(norm.running_var, 0.5, 2.0)
        nn.init.normal_(norm.running_mean)
    x = feature_map(batch, c_in, size, size, mean=1.0).requires_grad_()
    same_as_in_float64(branch, [x], "_Fused")


def test_mbconv_of_maps_that_do_not_fit_is_the_same():
    """12 channels are not a multiple of 16: PyTorch's operations do it."""
    same_as_in_float64(MBConvBranch(12, 8, 1, 2), [feature_map(2, 12, 4, 4).requires_grad_()], "_Normalize")


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "batch, c_in, c_out, height, width",
    [
        (3, 16, 32, 8, 8),
        (6, 48, 16, 4, 8),
        (64, 64, 64, 2, 2),
        (6, 128, 80, 16, 6),
        (2, 16, 1, 8, 8),
        (2, 32, 3, 6, 12),
    ],
)
def test_convolution(batch, c_in, c_out, height, width, bias):
    conv = Conv2d(c_in, c_out, 3, bias=bias).to(memory_format=torch.channels_last)
    same_as_in_float64(conv, [feature_map(batch, c_in, height, width, mean=2.0).requires_grad_()], "_Convolution")


@pytest.mark.parametrize("norm", [GroupNorm, GroupNormSwish])
@pytest.mark.parametrize(
    "shape, shifts", [((4, 16, 4, 4), 4), ((3, 64, 8, 8), 0), ((2, 256, 4, 6), 2), ((4, 16, 4, 4), 1)]
)
def test_group_norm(norm, shape, shifts):
    layer = norm(shape[1])
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    inputs = [feature_map(*shape, mean=10.0), *([torch.randn(shifts, shape[1])] if shifts else [])]
    same_as_in_float64(layer, [x.requires_grad_() for x in inputs], "_GroupNorm")


def test_weight_norm():
    network = nn.Sequential(WNConv2d(5, 7, 3), WNConv2d(7, 20, 1), WNConv2d(20, 4, 3)).to(
        memory_format=torch.channels_last
    )
    with NormalizedWeights(network):
        found = [conv.effective_weight() for conv in network]
    assert all("_NormalizedWeights" in type(weight.grad_fn).__name__ for weight in found)
    expected = [conv.effective_weight() for conv in network]
    gradients = [torch.randn_like(weight) for weight in found]
    parameters = [p for conv in network for p in (conv.weight, conv.log_weight_norm)]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    got, wanted = (torch.autograd.grad(weights, parameters, gradients) for weights in (found, expected))
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(2, 20, 4, 4), (4, 64, 8, 8), (3, 16, 32, 32)])
def test_gated_sum(shape):
    gate = SqueezeExcite(shape[1])
    skip, x, gradient = (feature_map(*shape).requires_grad_() for _ in range(3))
    inputs = (skip, x, *gate.parameters())
    found = gate.gated_sum(skip, x)
    assert "_GatedSum" in type(found.grad_fn).__name__
    got = torch.autograd.grad(found, inputs, gradient)
    gate.double()
    wide = [v.detach().double().requires_grad_() for v in (skip, x)]
    expected = wide[0] + 0.1 * gate(wide[1]) * wide[1]
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    wanted = torch.autograd.grad(expected, (*wide, *gate.parameters()), gradient.double())
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-5 * other.abs().max().item())


def test_largest_singular_values():
    network = nn.Sequential(nn.Conv2d(5, 7, 3), nn.Conv2d(5, 7, 3), nn.Conv2d(7, 20, 1))
    regularizer = SpectralRegularizer(network)
    for _ in range(100):
        found = regularizer.spectral()
    weights = [conv.weight for conv in network]
    expected = sum(torch.linalg.matrix_norm(w.flatten(1).double(), 2) for w in weights)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)
    wanted = torch.autograd.grad(expected, weights)
    torch.testing.assert_close(torch.autograd.grad(found, weights), wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("environment", [{"LSGM_KERNELS": "0"}, {"CC": "no-such-compiler"}, {"CC": "false"}])
def test_without_kernels_training_works_all_the_same(environment, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # nothing compiled yet
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    kernels.library.cache_clear()
    try:
        layer, x = BatchNormSwish(8).train(), feature_map(2, 8, 4, 4)
        torch.testing.assert_close(layer(x), F.silu(F.batch_norm(x, None, None, training=True)))
        assert kernels.library() is None
    finally:
        kernels.library.cache_clear()


def test_the_compiled_library_is_found_again(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = kernels.compiled(shutil.which("cc"))
    assert tmp_path in first.parents and len(list(first.parent.iterdir())) == 1
    monkeypatch.setattr(subprocess, "run", None)
    assert kernels.compiled(shutil.which("cc")) == first
