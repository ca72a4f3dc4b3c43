"""Describe a model's parts and costs without allocating it, on PyTorch's meta device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lsgm import checkpoint
from lsgm.config import BackboneConfig, DiffusionConfig, ImageConfig, PriorConfig, SDEConfig
from lsgm.data.registry import dataset
from lsgm.errors import LSGMError
from lsgm.model import LSGM
from lsgm.params import load_params
from lsgm.shapes import misfits
from lsgm.training.activation_checkpointing import checkpoint_activations


@dataclass
class NetworkCost:
    """The size and cost of one network."""

    parameters: int
    flops: int  # per image and forward pass; a multiply-add counts as two
    activations: int  # bytes per image, in float32, that a training step keeps for the backward pass
    activations_checkpointed: int  # the same with `activation_checkpointing: true`


@dataclass
class Part:
    """A direct submodule of a network."""

    name: str
    layers: int  # number of modules with weights of their own
    parameters: int


@dataclass
class Description:
    """The parts and costs of a model; printed as a table."""

    latent_shape: tuple[int, int, int]  # of the smallest scale
    lower_scale_shapes: tuple[tuple[int, int, int], ...]  # of each group of the larger scales
    parts: list[Part]
    vae: NetworkCost
    prior: NetworkCost | None
    train_vae: bool  # False: the VAE is frozen in the second stage

    def memory(self, batch: int, activation_checkpointing: bool = False) -> int:
        """Bytes needed for training in float32: weights, gradients, two moments, the prior's average, activations.

        Assumes one sample of (t, noise) per image and one pass through the score network (`time_samples`, `q_pass`).
        This is a lower bound: temporary memory of single operations is not included.
        """
        trained = [(self.vae, 4)] if self.train_vae else []
        trained += [(self.prior, 5)] if self.prior is not None else []
        weights = sum(copies * cost.parameters for cost, copies in trained)
        weights += 0 if self.train_vae else self.vae.parameters
        per_image = sum(
            cost.activations_checkpointed if activation_checkpointing else cost.activations for cost, _ in trained
        )
        return 4 * weights + batch * per_image

    def __str__(self) -> str:
        lines = [f"{'part':28}{'layers':>8}{'parameters':>15}"]
        lines += [f"{part.name:28}{part.layers:>8}{part.parameters:>15,}" for part in self.parts]
        shapes = [self.latent_shape, *self.lower_scale_shapes]
        counts = {shape: shapes.count(shape) for shape in shapes}
        drawn = [f"{n} x ({_by(shape)})" if n > 1 else _by(shape) for shape, n in counts.items()]
        lines += ["", f"latents: {' + '.join(drawn)}" + (" (the prior covers the first)" if len(drawn) > 1 else "")]
        for name, cost in (("VAE", self.vae), ("score prior", self.prior)):
            if cost is not None:
                kept, less = _mib(cost.activations), _mib(cost.activations_checkpointed)
                lines.append(
                    f"{name}: {cost.parameters:,} parameters, {cost.flops / 1e9:.4g} GFLOP per image and forward pass, "
                    f"activations {kept} per image ({less} with activation checkpointing)"
                )
        weights = _gib(self.memory(0))
        per_batch = [f"batch {b}: {_gib(self.memory(b))} ({_gib(self.memory(b, True))})" for b in (1, 16, 64)]
        lines.append(
            f"training memory, float32 (with activation checkpointing): {', '.join(per_batch)}; of it weights {weights}"
        )
        return "\n".join(lines)


def describe_model(name: str, params_file: str | Path = "params.yaml") -> Description:
    """Describe the model called ``name`` in ``params_file``, or the one saved in the folder ``name``.

    Raises:
        LSGMError: neither exists, or the folder's config.json is damaged.
    """
    if Path(name).is_dir():
        config = checkpoint.read_config(name)
        return describe(config.image, config.vae, config.prior, config.sde)
    params = load_params(params_file)
    if name not in params.all_models:
        raise LSGMError(
            f"{name}: neither the folder of a model nor a model in params.yaml ({', '.join(params.models)})"
        )
    model = params.all_models[name]
    image = dataset(model.dataset, params.datasets[model.dataset]).image
    return describe(image, params.vae(name), model.prior, model.sde, model.train.train_vae)


def settings(name: str, params_file: str | Path = "params.yaml") -> str:
    """All settings of the model ``name`` as YAML, including inherited ones and defaults.

    Raises:
        LSGMError: there is no such model.
    """
    params = load_params(params_file)
    if name not in params.all_models:
        raise LSGMError(f"{name}: not a model in {params_file}; its models are {', '.join(params.models)}")
    found = params.all_models[name].model_dump(mode="json", exclude={"extends"})
    return yaml.safe_dump(found, sort_keys=False, default_flow_style=None)


def describe(
    image: ImageConfig,
    vae: BackboneConfig,
    prior: PriorConfig | None = None,
    sde: DiffusionConfig | None = None,
    train_vae: bool = True,
) -> Description:
    """Describe the model with these configurations. Raises :class:`LSGMError` if they do not fit together."""
    if reasons := misfits(image, vae, prior):
        raise LSGMError("\n".join(reasons))
    batch = 2
    if isinstance(sde, SDEConfig) and sde.name == "vesde":  # measured when training starts; costs do not depend on it
        sde = sde.model_copy(update={"sigma2_max": sde.sigma2_max or 1000.0})
    with torch.device("meta"):
        model = LSGM(image, vae, prior, sde)
        x = torch.zeros(batch, image.channels, image.padded_size, image.padded_size)
        cost = _cost(model.vae, model.vae.encode, (x,))
        cost_prior = None
        if model.prior is not None:
            cost_prior = _cost(model.prior, model.prior, (torch.zeros(batch, *model.latent_shape), torch.zeros(batch)))
    networks: dict[str, nn.Module] = {"vae": model.vae}
    if model.prior is not None:
        networks["prior.network"] = model.prior.network
    parts = [
        Part(f"{prefix} itself", 0, sum(p.numel() for p in network.parameters(recurse=False) if p.requires_grad))
        for prefix, network in (("vae", model.vae), ("prior", model.prior))
        if network is not None and list(network.parameters(recurse=False))
    ]
    parts += [
        Part(f"{prefix}.{name}", sum(1 for m in child.modules() if list(m.parameters(recurse=False))), _count(child))
        for prefix, network in networks.items()
        for name, child in network.named_children()
    ]
    return Description(model.latent_shape, model.vae.lower_scale_shapes, parts, cost, cost_prior, train_vae)


def _cost(module: nn.Module, forward: Callable[..., Any], inputs: tuple[Tensor, ...]) -> NetworkCost:
    batch = len(inputs[0])
    with FlopCounterMode(display=False) as counter:
        kept = _kept(module, forward, inputs)
    checkpoint_activations(module)
    return NetworkCost(
        _count(module), counter.get_total_flops() // batch, kept // batch, _kept(module, forward, inputs) // batch
    )


def _kept(module: nn.Module, forward: Callable[..., Any], inputs: tuple[Tensor, ...]) -> int:
    """Bytes that autograd keeps from a forward pass, without the module's own tensors."""
    own = {id(tensor) for tensor in [*module.parameters(), *module.buffers()]}
    kept: dict[int, Tensor] = {}  # keeps the tensors alive, so that no id is reused

    def keep(tensor: Tensor) -> Tensor:
        if id(tensor) not in own:
            kept[id(tensor)] = tensor
        return tensor

    def keep_inputs(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        for tensor in arguments:
            keep(tensor)

    recomputed = [m for m in module.modules() if "forward" in vars(m)]
    handles = [m.register_forward_pre_hook(keep_inputs) for m in recomputed]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        forward(*inputs)
    for handle in handles:
        handle.remove()
    return sum(tensor.numel() * tensor.element_size() for tensor in kept.values())


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def _by(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
