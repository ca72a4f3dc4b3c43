"""The arguments of the authors' release that shape a model, and the configurations here that they stand for.

One table says which argument is which field; it is read in one direction by :func:`configs` and in the other by
:func:`arguments`.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lsgm.config import ImageConfig, NCSNppConfig, SDEConfig, VAEConfig
from lsgm.config.sdes import GEOMETRIC_SIGMA2_MAX
from lsgm.errors import LSGMError
from lsgm.model import LSGM


@dataclass(frozen=True)
class Argument:
    """One field of a section of the configuration and the argument, or arguments of equal value, that it is there."""

    field: str  # a dot leads into a nested section
    theirs: tuple[str, ...]
    values: Mapping[str, str] | None = None  # their name of a value -> ours; None: values are the same


LIKELIHOODS = {"bin": "bernoulli", "dml": "dml", "dl": "dl", "normal": "normal"}
SDES = {"vpsde": "vpsde", "geometric_sde": "geometric_vpsde", "sub_vpsde": "sub_vpsde", "vesde": "vesde"}

VAE = (
    Argument("arch", ("arch_instance",)),
    Argument("channels", ("num_channels_enc", "num_channels_dec")),
    Argument("channel_mult", ("channel_mult",)),
    Argument("latent_scales", ("num_latent_scales",)),
    Argument("groups_per_scale", ("num_groups_per_scale",)),
    Argument("latents_per_group", ("num_latent_per_group",)),
    Argument("cells_per_cond", ("num_cell_per_cond_enc", "num_cell_per_cond_dec")),
    Argument("preprocess.blocks", ("num_preprocess_blocks",)),
    Argument("preprocess.cells", ("num_preprocess_cells",)),
    Argument("postprocess.blocks", ("num_postprocess_blocks",)),
    Argument("postprocess.cells", ("num_postprocess_cells",)),
    Argument("num_nf", ("num_nf",)),
    Argument("progressive_input", ("progressive_input_vae",)),
    Argument("use_se", ("use_se",)),
    Argument("likelihood", ("decoder_dist",), LIKELIHOODS),
    Argument("x_bits", ("num_x_bits",)),
    Argument("log_sigma_clamp", ("log_sig_q_scale",)),
)
PRIOR = (
    Argument("channels", ("num_channels_dae",)),
    Argument("scales", ("num_scales_dae",)),
    Argument("cells_per_scale", ("num_cell_per_scale_dae",)),
    Argument("fir", ("fir",)),
    Argument("dropout", ("dropout",)),
    Argument("embedding", ("embedding_type",)),
    Argument("embedding_dim", ("embedding_dim",)),
    Argument("embedding_scale", ("embedding_scale",)),
    Argument("mixed_prediction", ("mixed_prediction",)),
    Argument("mixing_logit_init", ("mixing_logit_init",)),
)
SDE = (
    Argument("name", ("sde_type",), SDES),
    Argument("beta_start", ("beta_start",)),
    Argument("beta_end", ("beta_end",)),
    Argument("time_eps", ("time_eps",)),
    Argument("sigma2_min", ("sigma2_min",)),
    Argument("sigma2_max", ("sigma2_max",)),
    Argument("sigma2_0", ("sigma2_0",)),
)

# What files of old versions lack, as it was then.
OLD = {"num_x_bits": 8, "channel_mult": [1, 2], "mixing_logit_init": -3.0, "progressive_input_vae": "none"}
DEFAULTS = {"embedding_type": "positional", "mixed_prediction": True}  # what any file may lack
UNSUPPORTED = {"progressive": "none", "progressive_input": "none"}  # features that must be off
LARGEST = 1 << 13  # height and width of an image


def image_of(dataset: str) -> ImageConfig:
    """The images that the published models of a dataset work on. Raises :class:`LSGMError`."""
    if not isinstance(dataset, str):
        raise LSGMError(f"args.dataset: expected a name, found {dataset!r}")
    if dataset in ("mnist", "omniglot"):
        return ImageConfig(channels=1, size=28, padded_size=32, binary=True)
    numbers = re.findall(r"\d+", dataset)
    known = {"cifar10": 32, "ffhq": 256}
    size = known.get(dataset) or int(numbers[-1][:9] if numbers else 0)
    if not 8 <= size <= LARGEST:
        raise LSGMError(f"args.dataset: cannot tell the size of the images of {dataset!r}")
    return ImageConfig(channels=3, size=size, padded_size=size, binary=False)


def configs(
    args: dict[str, Any], with_prior: bool
) -> tuple[ImageConfig, VAEConfig, NCSNppConfig | None, SDEConfig | None]:
    """The configuration of a model with these arguments.

    Raises:
        LSGMError: the value of an argument is not supported.
        KeyError: an argument is missing.
        ValidationError: a value is of another type or out of its range.
    """
    args = {**DEFAULTS, **OLD, **args}
    vae = VAEConfig.model_validate(_to_section(VAE, args))
    image = image_of(args["dataset"])
    if not with_prior:
        return image, vae, None, None
    for flag, off in UNSUPPORTED.items():
        if args.get(flag, off) != off:
            raise LSGMError(f"args.{flag}: {args[flag]!r} is not supported (no recipe of the paper uses it)")
    prior = NCSNppConfig.model_validate(_to_section(PRIOR, args))
    sde = _to_section(SDE, args)
    if sde["name"] == "vesde" and sde["sigma2_0"] != sde["sigma2_min"]:
        raise LSGMError(f"args.sigma2_0: a VESDE starts at sigma2_min = {sde['sigma2_min']}, found {sde['sigma2_0']}")
    return image, vae, prior, SDEConfig.model_validate(sde)


def arguments(model: LSGM, dataset: str) -> argparse.Namespace:
    """The arguments of the authors' release with which it would build ``model``, trained on ``dataset``."""
    args: dict[str, Any] = {"dataset": dataset} | _from_section(VAE, model.vae_config.model_dump())
    if model.prior is not None and model.prior_config is not None and model.sde_config is not None:
        diffusion = vars(model.prior.sde)  # has values where the configuration says null
        resolved = {
            "sigma2_0": diffusion["sigma2_0"],
            "sigma2_max": diffusion.get("sigma2_max", GEOMETRIC_SIGMA2_MAX),
        }
        args |= {"dae_arch": "ncsnpp"} | UNSUPPORTED | _from_section(PRIOR, model.prior_config.model_dump())
        args |= _from_section(SDE, model.sde_config.model_dump() | resolved)
    return argparse.Namespace(**args)


def _to_section(table: tuple[Argument, ...], args: Mapping[str, Any]) -> dict[str, Any]:
    """A section of the configuration from their arguments."""
    section: dict[str, Any] = {}
    for argument in table:
        first, *others = argument.theirs
        for other in others:
            if args[other] != args[first]:
                raise LSGMError(f"args.{first}, args.{other}: {args[first]} and {args[other]} differ, "
                                f"{argument.field} is one number here")  # fmt: skip
        value = args[first]
        if argument.values is not None:
            if not isinstance(value, str) or value not in argument.values:
                raise LSGMError(f"args.{first}: expected one of {', '.join(argument.values)}, found {value!r}")
            value = argument.values[value]
        *outer, leaf = argument.field.split(".")
        inner = section
        for key in outer:
            inner = inner.setdefault(key, {})
        inner[leaf] = value
    return section


def _from_section(table: tuple[Argument, ...], section: Mapping[str, Any]) -> dict[str, Any]:
    """Their arguments from a section of the configuration."""
    args: dict[str, Any] = {}
    for argument in table:
        value: Any = section
        for key in argument.field.split("."):
            value = value[key]
        if argument.values is not None:
            value = next(theirs for theirs, ours in argument.values.items() if ours == value)
        args |= dict.fromkeys(argument.theirs, value)
    return args
