"""The objectives of every model of params.yaml on a GPU that is not there: fake tensors have a device but no values.

What would read a value on the host, and so wait for the GPU in the middle of a step, fails: `.item()`, `float(tensor)`,
`if tensor:`, `nonzero`. So does an operation on tensors of two devices.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lsgm.data.registry import dataset
from lsgm.model import LSGM
from lsgm.params import load_params
from lsgm.training.objective import LSGMObjective, Objective, VAEObjective
from lsgm.weighting import TimeSampler

pytestmark = pytest.mark.skipif(torch.version.cuda is None, reason="needs a CUDA build of PyTorch, but no GPU")

PARAMS = load_params(Path(__file__).parents[2] / "params.yaml")
STEPS = ["VAE", "algorithm 1", "algorithm 2", "algorithm 3"]


class HostCopies(TorchDispatchMode):
    """Collects the operations that copy a tensor from the host to the GPU and wait for it."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and args[0].device.type == "cpu" and result.is_cuda:
            self.found.append(f"{func} of {tuple(args[0].shape)}")
        return result


def on_fake_gpu(model: LSGM) -> None:
    """Give each module of a meta model parameters and buffers on the GPU; within a FakeTensorMode."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                fake = torch.empty_strided(parameter.shape, parameter.stride(), device="cuda")
                module._parameters[name] = nn.Parameter(fake, requires_grad=parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                kind = {"dtype": buffer.dtype, "device": "cuda"}
                module._buffers[name] = torch.empty_strided(buffer.shape, buffer.stride(), **kind)


def objective(name: str, step: str) -> tuple[Objective, list[str]]:
    """The objective of the model ``name`` for two images, and the copies from the host on the way to it."""
    settings = PARAMS.models[name]
    image, sde = dataset(settings.dataset, PARAMS.datasets[settings.dataset]).image, settings.sde.resolved()
    with torch.device("meta"):
        model = LSGM(image, PARAMS.vae(name), settings.prior, sde).train()
    assert model.prior is not None
    # These are made before the first step, on the host.
    p, q = (
        TimeSampler(model.prior.sde, weighting, sampling, sde.time_eps)
        for weighting, sampling in (
            (settings.train.p_weighting, settings.train.p_sampling),
            ("ll", settings.train.q_sampling),
        )
    )
    estimator: Any = "control_variate" if getattr(PARAMS.vae(name), "num_nf", 0) else "marginal"
    algorithm: Any = 1 if step == "VAE" else int(step[-1])
    lsgm = LSGMObjective(
        *(p, algorithm), q=q, time_samples=settings.train.time_samples, balance=algorithm == 1, cross_entropy=estimator
    )
    with FakeTensorMode(allow_non_fake_inputs=True), HostCopies() as copies:
        on_fake_gpu(model)
        x = torch.zeros(2, image.channels, image.padded_size, image.padded_size, device="cuda")
        if step == "VAE":
            return VAEObjective()(model, x, 0.7), copies.found
        return lsgm(model, x, 0.7), copies.found


@pytest.fixture(autouse=True)
def gradients_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Algorithm 2 asks for a gradient on the way. PyTorch computes one on a device that is there only."""
    if not torch.cuda.is_available():
        monkeypatch.setattr(
            torch.autograd, "grad", lambda loss, leaves, **options: tuple(map(torch.zeros_like, leaves))
        )


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("name", list(PARAMS.models))
def test_a_step_stays_on_the_gpu(name: str, step: str) -> None:
    value, copies = objective(name, step)
    tensors = [leaf for leaf in tree_leaves([value.loss, value.terms]) if isinstance(leaf, Tensor)]
    assert {tensor.device.type for tensor in tensors} == {"cuda"}
    assert value.loss.shape == ()
    assert not copies
