import torch
from torch import nn

from lsgm.networks.batch_norm import BatchNorm
from lsgm.networks.flow import Shift
from lsgm.networks.layers import Conv2d
from lsgm.networks.weight_norm import WNConv2d
from lsgm.training.ema import EMA
from lsgm.training.regularization import SpectralRegularizer


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        WNConv2d(3, 8, 3), WNConv2d(8, 8, 3), WNConv2d(8, 8, 3), Conv2d(8, 8, 5, groups=8, bias=False),
        BatchNorm(8), nn.GroupNorm(2, 8), nn.Linear(8, 8), nn.Conv2d(8, 4, 1), Shift(3, mirrored=True),
    ).double()  # fmt: skip


def test_spectral_norms_against_svd():
    net = network()
    regularizer = SpectralRegularizer(net)
    weights = [conv.effective_weight() for conv in [*net[:4], *net[8].children()]] + [net[7].weight]
    exact = sum(torch.linalg.svdvals(w.detach().flatten(1))[0] for w in weights)
    for _ in range(100):
        value = regularizer.spectral()
    torch.testing.assert_close(value.detach(), exact, rtol=1e-6, atol=0)
    assert SpectralRegularizer(net).spectral() > 0.98 * exact  # 40 iterations at first


def test_spectral_gradient_against_svd():
    net = network()
    regularizer = SpectralRegularizer(net)
    for _ in range(200):
        regularizer.spectral()
    parameters = [net[1].weight, net[1].log_weight_norm, net[3].weight, net[7].weight, net[8].conv_in.weight]
    ours = torch.autograd.grad(regularizer.spectral(), parameters)
    exact = sum(torch.linalg.svdvals(net[i].effective_weight().flatten(1))[0] for i in (1, 3))
    exact = exact + torch.linalg.svdvals(net[7].weight.flatten(1))[0]
    exact = exact + torch.linalg.svdvals(net[8].conv_in.effective_weight().flatten(1))[0]
    for a, b in zip(ours, torch.autograd.grad(exact, parameters), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


def test_norm_scales():
    net = network()
    with torch.no_grad():
        net[4].weight[3] = -7.0
        net[5].weight[0] = 2.0
    regularizer = SpectralRegularizer(net, convs=False)
    assert regularizer.norm_scales().item() == regularizer().item() == 9.0


def test_ema_is_the_weighted_sum_of_the_past():
    net = nn.Linear(2, 2)
    ema, seen = EMA(net, 0.9), []
    for i in range(5):
        with torch.no_grad():
            net.weight.fill_(float(i + 1))
        seen.append(float(i + 1))
        ema.update()
    expected = seen[0]
    for value in seen[1:]:
        expected = 0.9 * expected + 0.1 * value
    ema.copy_to_module()
    torch.testing.assert_close(net.weight, torch.full((2, 2), expected))
