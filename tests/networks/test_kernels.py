"""The kernels in C against PyTorch's operations in float64."""

import shutil
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lsgm.networks import kernels
from lsgm.networks.batch_norm import BatchNorm, BatchNormSwish

from lsgm.networks.nvae_cells import SqueezeExcite
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


@pytest.mark.parametrize("shape", [(3, 16, 8, 12), (2, 32, 9, 8), (16, 48, 1, 1), (4, 16, 2, 2), (2, 96, 32, 32)])
def test_depthwise_convolution(shape):
    conv = DepthwiseConv2d(shape[1], 5)
    x, gradient = feature_map(*shape).requires_grad_(), feature_map(*shape)
    found = conv(x)
    assert "_Depthwise5x5" in type(found.grad_fn).__name__
    wide, weight = x.detach().double().requires_grad_(), conv.weight.detach().double().requires_grad_()
    expected = F.conv2d(wide, weight, padding=2, groups=shape[1])
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    wanted = torch.autograd.grad(expected, (wide, weight), gradient.double())
    for one, other in zip(torch.autograd.grad(found, (x, conv.weight), gradient), wanted, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-5 * other.abs().max().item())


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
