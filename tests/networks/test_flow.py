"""Flows: the Jacobian is triangular with a unit diagonal, in the order that is promised."""

import pytest
import torch

from lsgm.networks.flow import Flow, Shift

CHANNELS, SIZE = 3, 4


def jacobian(module):
    """d output / d input, both as [H * W * C] in raster order, channels fastest."""

    def f(flat):
        z = flat.view(SIZE, SIZE, CHANNELS).permute(2, 0, 1)[None]
        return module(z)[0].permute(1, 2, 0).flatten()

    torch.manual_seed(0)
    return torch.autograd.functional.jacobian(f, torch.randn(SIZE * SIZE * CHANNELS, dtype=torch.float64))


def shift(mirrored):
    torch.manual_seed(1)
    module = Shift(CHANNELS, mirrored).double()
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return module


def test_raster_shift_sees_what_came_before():
    """Strictly lower triangular in raster order; and it does see the pixel above and the channel before."""
    j = jacobian(shift(mirrored=False))
    assert (j.triu() == 0).all()
    at = lambda y, x, c: (y * SIZE + x) * CHANNELS + c  # noqa: E731
    assert j[at(1, 1, 0), at(0, 1, 2)] != 0 and j[at(1, 1, 1), at(1, 1, 0)] != 0 and j[at(1, 1, 0), at(0, 2, 2)] != 0
    assert j[at(1, 1, 0), at(1, 1, 2)] == 0


def test_mirrored_shift_reverses_pixels_and_not_channels():
    j = jacobian(shift(mirrored=True)).view(SIZE * SIZE, CHANNELS, SIZE * SIZE, CHANNELS)
    j = j.flip(0, 2).reshape(SIZE * SIZE * CHANNELS, -1)  # pixels reversed, channels as they are
    assert (j.triu() == 0).all() and (j.tril(-1) != 0).any()


@pytest.mark.parametrize("pairs", [1, 2])
def test_flow_preserves_volume(pairs):
    torch.manual_seed(2)
    flow = Flow(CHANNELS, pairs).double()
    with torch.no_grad():
        for p in flow.parameters():
            p.add_(0.1 * torch.randn_like(p))
    assert len(flow.steps) == 2 * pairs
    sign, log_det = torch.linalg.slogdet(jacobian(flow))
    assert sign == 1 and abs(log_det.item()) < 1e-10
