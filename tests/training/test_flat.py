import torch
from torch import nn

from lsgm.training.flat import flatten


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.GroupNorm(1, 3), nn.Flatten(), nn.Linear(12, 5)).to(
        memory_format=torch.channels_last
    )


def test_an_optimizer_over_the_vector_does_what_one_over_the_weights_does():
    plain, flat = network(), network()
    plain[1].bias.requires_grad_(False)
    flat[1].bias.requires_grad_(False)
    options = {"lr": 0.1, "weight_decay": 0.01}
    one, other = torch.optim.Adamax(plain.parameters(), **options), torch.optim.Adamax([flatten(flat)], **options)
    for _ in range(3):
        x = torch.randn(4, 2, 4, 4)
        for net, optimizer in ((plain, one), (flat, other)):
            optimizer.zero_grad(set_to_none=False)
            net(x).square().sum().backward()
            optimizer.step()
    for name, value in plain.state_dict().items():
        assert torch.equal(flat.state_dict()[name], value), name
    assert flat[0].weight.is_contiguous(memory_format=torch.channels_last)


def test_what_is_loaded_into_the_network_is_in_the_vector():
    net = network()
    vector = flatten(net)
    net.load_state_dict({name: torch.full_like(value, 3.0) for name, value in net.state_dict().items()})
    assert vector.sum() == 3 * sum(p.numel() for p in net.parameters())
