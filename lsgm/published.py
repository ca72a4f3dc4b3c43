"""Checkpoints in the format of the authors' release: read, written, and the names of our parameters there.

Their towers are flat lists that count cells and combiners in the order in which they are built, their score network
is one flat list in the order of the forward pass.
"""

from __future__ import annotations

import argparse
import pickle
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lsgm.config import (
    GEOMETRIC_SIGMA2_MAX,
    BlocksConfig,
    ImageConfig,
    LikelihoodName,
    PriorConfig,
    SDEConfig,
    VAEConfig,
)
from lsgm.errors import LSGMError
from lsgm.files import atomic
from lsgm.model import LSGM
from lsgm.networks.layers import BNSwishBranch, Cell, Conv2d, DownSkip, MBConvBranch, UpSkip, WNConv2d
from lsgm.networks.ncsnpp import NCSNpp, ResidualBlock
from lsgm.networks.nvae import NVAE
from lsgm.progress import log

Pairs = Iterator[tuple[str, str]]  # (prefix of our names, prefix of theirs)


def _cell(ours: str, theirs: str, cell: nn.Module) -> Pairs:
    assert isinstance(cell, Cell)
    branch = cell.branch
    if isinstance(branch, BNSwishBranch):
        for i in (1, 2):
            yield f"{ours}.branch.norm_{i}", f"{theirs}._ops.{i - 1}.bn_act"
            yield f"{ours}.branch.conv_{i}", f"{theirs}._ops.{i - 1}.conv_0"
    elif isinstance(branch, MBConvBranch):
        op, first = f"{theirs}._ops.0.conv", 1 if branch.upsample else 0
        yield f"{ours}.branch.norm_in", f"{op}.{first}.bn"
        for i, name in enumerate(("expand", "depthwise"), 1):
            yield f"{ours}.branch.{name}", f"{op}.{first + i}.conv.0"
            yield f"{ours}.branch.norm_{i}", f"{op}.{first + i}.conv.1"
        yield f"{ours}.branch.project", f"{op}.{first + 3}"
        yield f"{ours}.branch.norm_out", f"{op}.{first + 4}.bn"
    if cell.gate is not None:
        yield f"{ours}.gate.squeeze", f"{theirs}.se.se.0"
        yield f"{ours}.gate.excite", f"{theirs}.se.se.2"
    if isinstance(cell.skip, DownSkip):
        for i in range(4):
            yield f"{ours}.skip.convs.{i}", f"{theirs}.skip.conv_{i + 1}"
    elif isinstance(cell.skip, UpSkip):
        yield f"{ours}.skip.conv", f"{theirs}.skip.1"


def _nvae(vae: NVAE) -> Pairs:
    groups, per_scale = len(vae.posterior_heads), vae.groups_per_scale
    yield "stem", "stem"
    for i, cell in enumerate(vae.preprocess):
        yield from _cell(f"preprocess.{i}", f"pre_process.{i}", cell)
    place = 0
    for g, cells in enumerate(vae.encoder_groups):
        for i, cell in enumerate(cells):  # type: ignore[arg-type]
            yield from _cell(f"encoder_groups.{g}.{i}", f"enc_tower.{place}", cell)
            place += 1
        if g < groups - 1:  # theirs stand behind the group that they serve, ours in the decoder's order
            yield f"encoder_combiners.{groups - 2 - g}", f"enc_tower.{place}.conv"
            place += 1
        scale, last = divmod(g + 1, per_scale)
        if last == 0 and scale <= len(vae.encoder_down):
            yield from _cell(f"encoder_down.{scale - 1}", f"enc_tower.{place}", vae.encoder_down[scale - 1])
            place += 1
    for i in range(len(vae.input_pyramid)):
        yield f"input_pyramid.{i}.norm", f"progressive_input_cells.{i}.conv.bn_act"
        yield f"input_pyramid.{i}.conv", f"progressive_input_cells.{i}.conv.conv_0"
    place = 0
    for g, cells in enumerate(vae.decoder_groups):
        yield f"posterior_heads.{g}", f"enc_sampler.{g}.1"
        yield f"latent_convs.{g}", f"eps_conv.{g}"
        yield f"decoder_mixers.{g}", f"dec_tower.{place}.conv"
        place += 1
        for i, cell in enumerate(cells):  # type: ignore[arg-type]
            yield from _cell(f"decoder_groups.{g}.{i}", f"dec_tower.{place}", cell)
            place += 1
        scale, last = divmod(g + 1, per_scale)
        if last == 0 and scale <= len(vae.decoder_up):
            yield from _cell(f"decoder_up.{scale - 1}", f"dec_tower.{place}", vae.decoder_up[scale - 1])
            place += 1
    for g, flow in enumerate(vae.flows):
        steps = flow.steps
        assert isinstance(steps, nn.ModuleList)
        for i in range(len(steps)):
            theirs = f"nf_cells.{g * len(steps) // 2 + i // 2}.cell{i % 2 + 1}"
            yield f"flows.{g}.steps.{i}.conv_in", f"{theirs}.conv.convz.0"
            yield f"flows.{g}.steps.{i}.depthwise", f"{theirs}.conv.convz.2"
            yield f"flows.{g}.steps.{i}.conv_out", f"{theirs}.mu.conv_0"
    for i, cell in enumerate(vae.postprocess):
        yield from _cell(f"postprocess.{i}", f"post_process.{i}", cell)
    yield "output_head", "image_conditional.1"


def _ncsnpp(network: NCSNpp) -> Pairs:
    yield "embedding", "temb_fun"  # Fourier embeddings only
    yield "embedding.linear_1", "all_modules.0"
    yield "embedding.linear_2", "all_modules.1"
    yield "conv_in", "all_modules.2"
    stages: dict[str, nn.Module] = {f"down.{i}": stage for i, stage in enumerate(network.down)}
    stages["middle"] = network.middle
    stages |= {f"up.{i}": stage for i, stage in enumerate(network.up)}
    blocks = [(f"{name}.{i}", module) for name, stage in stages.items() for i, module in stage.named_children()]
    for place, (name, module) in enumerate(blocks, 3):
        if isinstance(module, ResidualBlock):
            parts = ["norm_1:GroupNorm_0", "conv_1:Conv_0", "time:Dense_0", "norm_2:GroupNorm_1", "conv_2:Conv_1"]
            parts += ["shortcut:Conv_2"] if module.shortcut is not None else []
        else:
            parts = ["norm:GroupNorm_0", "query:NIN_0", "key:NIN_1", "value:NIN_2", "out:NIN_3"]
        for ours, theirs in (part.split(":") for part in parts):
            yield f"{name}.{ours}", f"all_modules.{place}.{theirs}"
    yield "norm_out", f"all_modules.{place + 1}"
    yield "conv_out", f"all_modules.{place + 2}"


def published_names(network: NVAE | NCSNpp) -> dict[str, str]:
    """Our name of each tensor of ``network``'s state -> its name in a published checkpoint.

    Attention's matrices (`NIN_k.W`) are stored transposed there, [in, out].
    """
    pairs = dict(_nvae(network) if isinstance(network, NVAE) else _ncsnpp(network))
    names = {}
    for ours in network.state_dict():
        if ours == "top":
            names[ours] = "prior_ftr0"
            continue
        prefix, leaf = ours.rsplit(".", 1)
        theirs = pairs[prefix]
        if ".NIN_" in theirs:
            leaf = {"weight": "W", "bias": "b"}[leaf]
        names[ours] = f"{theirs}.{leaf}"
    return names


# Their arguments. What old files lack, as it was then:
OLD = {"num_x_bits": 8, "channel_mult": [1, 2], "mixing_logit_init": -3.0, "progressive_input_vae": "none"}
LIKELIHOODS: dict[str, LikelihoodName] = {"bin": "bernoulli", "dml": "dml", "dl": "dl", "normal": "normal"}
SDES = {"vpsde": "vpsde", "geometric_sde": "geometric_vpsde", "sub_vpsde": "sub_vpsde", "vesde": "vesde"}
INACTIVE_BELOW = -12.0  # mixing logits of dropped channels stay near -15, trained ones end between -8 and 0


def is_published(path: str | Path) -> bool:
    """Whether ``path`` is, or by its name should be, a file (our models are folders)."""
    return Path(path).is_file() or (Path(path).suffix in (".pt", ".pth") and not Path(path).is_dir())


def read(path: str | Path) -> dict[str, Any]:
    """The dict in a published file. Nothing in it is executed: tensors, plain values and a Namespace are let through.

    Raises:
        LSGMError: the file is missing, truncated, holds another class, or is no checkpoint of an NVAE or LSGM.
    """
    path = Path(path)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            found = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise LSGMError(f"{path}: not found; expected a checkpoint of the authors' release") from None
    except pickle.UnpicklingError as error:
        if named := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise LSGMError(
                f"{path}: holds an object of the class {named[1]}, which could execute code; only tensors, plain "
                "values and argparse.Namespace are read"
            ) from None
        raise LSGMError(f"{path}: damaged, or not a torch file; download it again") from None
    except OSError as error:
        raise LSGMError(f"{path}: cannot be read ({error.strerror})") from None
    except Exception as error:  # torch's reader fails in many ways on bytes that are not its own
        reason = f" ({error})" if isinstance(error, RuntimeError) else ""
        raise LSGMError(f"{path}: truncated, damaged, or not a torch file{reason}; download it again") from None
    if not isinstance(found, dict) or "vae_state_dict" not in found or "args" not in found:
        raise LSGMError(f"{path}: no checkpoint of an NVAE or LSGM: the keys args and vae_state_dict are expected")
    return found


def image_of(dataset: str) -> ImageConfig:
    """The images that the published models of a dataset work on. Raises :class:`LSGMError`."""
    if dataset in ("mnist", "omniglot"):
        return ImageConfig(channels=1, size=28, padded_size=32, binary=True)
    numbers = re.findall(r"\d+", dataset)
    known = {"cifar10": 32, "ffhq": 256}
    size = known.get(dataset) or int(numbers[-1] if numbers else 0)
    if size < 8:
        raise LSGMError(f"args.dataset: cannot tell the size of the images of {dataset!r}")
    return ImageConfig(channels=3, size=size, padded_size=size, binary=False)


def _choice(args: dict[str, Any], key: str, choices: Mapping[str, str]) -> Any:
    if args[key] not in choices:
        raise LSGMError(f"args.{key}: expected one of {', '.join(choices)}, found {args[key]!r}")
    return choices[args[key]]


def configs(
    args: dict[str, Any], with_prior: bool
) -> tuple[ImageConfig, VAEConfig, PriorConfig | None, SDEConfig | None]:
    """Our configuration of a model with their arguments. Raises :class:`LSGMError`."""
    a: dict[str, Any] = OLD | args
    for ours, one, other in (("channels", "num_channels_enc", "num_channels_dec"),
                             ("cells_per_cond", "num_cell_per_cond_enc", "num_cell_per_cond_dec")):  # fmt: skip
        if a[one] != a[other]:
            raise LSGMError(f"args.{one}, args.{other}: {a[one]} and {a[other]} differ, {ours} is one number here")
    vae = VAEConfig(
        arch=a["arch_instance"],
        channels=a["num_channels_enc"],
        channel_mult=a["channel_mult"],
        latent_scales=a["num_latent_scales"],
        groups_per_scale=a["num_groups_per_scale"],
        latents_per_group=a["num_latent_per_group"],
        cells_per_cond=a["num_cell_per_cond_enc"],
        preprocess=BlocksConfig(blocks=a["num_preprocess_blocks"], cells=a["num_preprocess_cells"]),
        postprocess=BlocksConfig(blocks=a["num_postprocess_blocks"], cells=a["num_postprocess_cells"]),
        num_nf=a["num_nf"],
        progressive_input=a["progressive_input_vae"],
        use_se=a["use_se"],
        likelihood=_choice(a, "decoder_dist", LIKELIHOODS),
        x_bits=a["num_x_bits"],
        log_sigma_clamp=a["log_sig_q_scale"],
    )
    image = image_of(a["dataset"])
    if not with_prior:
        return image, vae, None, None
    for flag in ("progressive", "progressive_input"):
        if a.get(flag, "none") != "none":
            raise LSGMError(f"args.{flag}: {a[flag]!r} is not supported (no recipe of the paper uses it)")
    prior = PriorConfig(
        channels=a["num_channels_dae"],
        scales=a["num_scales_dae"],
        cells_per_scale=a["num_cell_per_scale_dae"],
        fir=a["fir"],
        dropout=a["dropout"],
        embedding=a.get("embedding_type", "positional"),
        embedding_dim=a["embedding_dim"],
        embedding_scale=a["embedding_scale"],
        mixed_prediction=a.get("mixed_prediction", True),
        mixing_logit_init=a["mixing_logit_init"],
    )
    name = _choice(a, "sde_type", SDES)
    if name == "vesde" and a["sigma2_0"] != a["sigma2_min"]:
        raise LSGMError(f"args.sigma2_0: a VESDE starts at sigma2_min = {a['sigma2_min']}, found {a['sigma2_0']}")
    sde = SDEConfig.model_validate(
        {"name": name, "beta_start": a["beta_start"], "beta_end": a["beta_end"], "time_eps": a["time_eps"]}
        | {"sigma2_min": a["sigma2_min"], "sigma2_max": a["sigma2_max"], "sigma2_0": a["sigma2_0"]}
    )
    return image, vae, prior, sde


def load(path: str | Path, device: str | torch.device = "cpu") -> LSGM:
    """A model from a published file, in evaluation mode, its parameters frozen.

    The prior's weights are the averaged ones (EMA) where the file holds them in the optimiser's state, the VAE's the
    raw ones. Which latents were dropped is not stored there: channels with a mixing logit below -12 are taken for them.

    Raises:
        LSGMError: see :func:`read`; or tensors are missing, left over or of other shapes than the arguments say.
    """
    checkpoint = read(path)
    args = checkpoint["args"]
    try:
        known = vars(args) if isinstance(args, argparse.Namespace) else dict(args)
        model = LSGM(*configs(known, with_prior="dae_state_dict" in checkpoint))
        state = _averaged(checkpoint) if model.prior is not None else {}
    except KeyError as error:
        raise LSGMError(f"{path}: args: {error.args[0]} is missing") from None
    except (TypeError, ValueError) as error:
        raise LSGMError(f"{path}: args: {error}") from None
    except LSGMError as error:
        raise LSGMError(f"{path}: {error}") from None
    assert isinstance(model.vae, NVAE)
    _fill(model.vae, checkpoint["vae_state_dict"], f"{path}: vae_state_dict")
    if model.prior is not None:
        network = model.prior.network
        assert isinstance(network, NCSNpp)
        logits = state.pop("mixing_logit", None)
        _fill(network, state, f"{path}: dae_state_dict")
        if model.prior.mixing_logit is not None:
            if logits is None or logits.shape != model.prior.mixing_logit.shape:
                raise LSGMError(f"{path}: dae_state_dict: mixing_logit is missing or of another shape")
            model.prior.mixing_logit.data.copy_(logits)
            dropped = logits.flatten() < INACTIVE_BELOW
            if dropped.any():
                model.prior.active.masked_fill_(dropped[None, :, None, None], 0.0)
                log.info(f"{path}: {int(dropped.sum())} of {len(dropped)} latent channels were dropped as inactive")
    return model.requires_grad_(False).eval().to(device)


def _averaged(checkpoint: dict[str, Any]) -> dict[str, Tensor]:
    """The score network's state, its parameters averaged where the optimiser's state has an average.

    The optimiser numbers the parameters in the order in which they were registered, which is that of the state.
    """
    state: dict[str, Tensor] = dict(checkpoint["dae_state_dict"])
    averages = checkpoint.get("dae_optimizer", {}).get("state", {})
    for i, name in enumerate(list(state)):
        average = averages.get(i, {}).get("ema")
        if average is not None:
            if average.shape != state[name].shape:
                raise LSGMError(f"dae_optimizer.state.{i}.ema: {tuple(average.shape)} does not fit {name}")
            state[name] = average
    return state


def _fill(network: NVAE | NCSNpp, published: dict[str, Tensor], where: str) -> None:
    """Load a network from tensors under their published names; raises :class:`LSGMError` that names what is wrong."""
    names = published_names(network)
    missing = [theirs for theirs in names.values() if theirs not in published]
    extra = [key for key in published if not key.endswith("weight_normalized") and key not in set(names.values())]
    if missing or extra:
        raise LSGMError(
            f"{where}: not the tensors that the arguments ask for: "
            + "; ".join(f"{what}: {', '.join(keys[:8])}{f' and {len(keys) - 8} more' if len(keys) > 8 else ''}"
                        for what, keys in (("missing", missing), ("unknown", extra)) if keys)
        )  # fmt: skip
    state = {ours: _turned(theirs, published[theirs]) for ours, theirs in names.items()}
    wrong = [names[ours] for ours, value in network.state_dict().items() if value.shape != state[ours].shape]
    if wrong:
        raise LSGMError(f"{where}: of other shapes than the arguments say: {', '.join(wrong[:8])}")
    network.load_state_dict(state)


def _turned(theirs: str, value: Tensor) -> Tensor:
    """Attention's matrices are transposed, and both directions are the same."""
    return value.T if theirs.endswith(".W") else value


def export(model: LSGM, path: str | Path, dataset: str) -> None:
    """Write ``model`` as the authors' code reads it: a first-stage file for a VAE, else one with averaged weights.

    ``dataset`` is their name of it. :func:`load` of the result is ``model``. Raises :class:`LSGMError`.
    """
    if not isinstance(model.vae, NVAE):
        raise LSGMError("the authors' code has the NVAE backbone only")
    if model.prior_config is not None and model.prior_config.attention_resolution != 16:
        raise LSGMError("the authors' code has attention at 16x16, prior.attention_resolution is another number")
    if image_of(dataset) != model.image:
        raise LSGMError(f"--dataset {dataset}: its published models see other images than this one ({model.image})")
    vae_state = _emitted(model.vae)
    for name, module in model.vae.named_modules():  # convolutions without weight norm carry a copy of their weight
        if isinstance(module, Conv2d) and not isinstance(module, WNConv2d):
            theirs = published_names(model.vae)[f"{name}.weight"]
            vae_state[f"{theirs}_normalized"] = vae_state[theirs].clone()
    content: dict[str, Any] = {"epoch": 0, "global_step": 0, "args": _arguments(model, dataset)}
    if model.prior is None:
        content |= {"best_score": 1e6, "grad_scalar": {}, "vae_optimizer": {}, "vae_scheduler": {}, "sn_calculator": {}}
    else:
        network = model.prior.network
        assert isinstance(network, NCSNpp)
        logits = model.prior.mixing_logit
        mixing = {} if logits is None else {"mixing_logit": logits.detach().cpu().clone()}
        content |= {"best_score_fid": 1e6, "best_score_nll": 1e6, "dae_state_dict": mixing | _emitted(network)}
    with atomic(path) as part:
        torch.save({**content, "vae_state_dict": vae_state}, part)


def _emitted(network: NVAE | NCSNpp) -> dict[str, Tensor]:
    names, state = published_names(network), network.state_dict()
    return {names[ours]: _turned(names[ours], value).detach().cpu().contiguous() for ours, value in state.items()}


def _arguments(model: LSGM, dataset: str) -> argparse.Namespace:
    """Their arguments, as far as they shape the model."""
    vae, prior, sde = model.vae_config, model.prior_config, model.sde_config
    assert isinstance(vae, VAEConfig)
    a: dict[str, Any] = {
        "dataset": dataset,
        "arch_instance": vae.arch,
        "channel_mult": list(vae.channel_mult),
        "num_latent_scales": vae.latent_scales,
        "num_groups_per_scale": vae.groups_per_scale,
        "num_latent_per_group": vae.latents_per_group,
        "num_nf": vae.num_nf,
        "progressive_input_vae": vae.progressive_input,
        "use_se": vae.use_se,
        "decoder_dist": {ours: theirs for theirs, ours in LIKELIHOODS.items()}[vae.likelihood],
        "num_x_bits": vae.x_bits,
        "log_sig_q_scale": vae.log_sigma_clamp,
    }
    for part in ("enc", "dec"):
        a |= {f"num_channels_{part}": vae.channels, f"num_cell_per_cond_{part}": vae.cells_per_cond}
    for part, blocks in (("preprocess", vae.preprocess), ("postprocess", vae.postprocess)):
        a |= {f"num_{part}_blocks": blocks.blocks, f"num_{part}_cells": blocks.cells}
    if prior is not None and sde is not None and model.prior is not None:
        diffusion = vars(model.prior.sde)
        a |= {
            "dae_arch": "ncsnpp",
            "num_channels_dae": prior.channels,
            "num_scales_dae": prior.scales,
            "num_cell_per_scale_dae": prior.cells_per_scale,
            "fir": prior.fir,
            "dropout": prior.dropout,
            "embedding_type": prior.embedding,
            "embedding_dim": prior.embedding_dim,
            "embedding_scale": prior.embedding_scale,
            "mixed_prediction": prior.mixed_prediction,
            "mixing_logit_init": prior.mixing_logit_init,
            "progressive": "none",
            "progressive_input": "none",
            "sde_type": {ours: theirs for theirs, ours in SDES.items()}[sde.name],
            "beta_start": sde.beta_start,
            "beta_end": sde.beta_end,
            "sigma2_0": diffusion["sigma2_0"],
            "sigma2_min": sde.sigma2_min,
            "sigma2_max": diffusion.get("sigma2_max", GEOMETRIC_SIGMA2_MAX),
            "time_eps": sde.time_eps,
        }
    return argparse.Namespace(**a)
