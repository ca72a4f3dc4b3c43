"""Read and write checkpoints in the format of the authors' release."""

from __future__ import annotations

import argparse
import io
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from lsgm.checkpoint import check_weights, skeleton
from lsgm.config import NCSNppConfig, SDEConfig
from lsgm.errors import LSGMError
from lsgm.files import atomic
from lsgm.model import LSGM
from lsgm.networks.layers import Conv2d
from lsgm.networks.ncsnpp import NCSNpp
from lsgm.networks.nvae import NVAE
from lsgm.networks.published_names import published_names
from lsgm.networks.weight_norm import WNConv2d
from lsgm.progress import log
from lsgm.published_arguments import arguments, configs, image_of

INACTIVE_BELOW = -12.0  # mixing logits of dropped channels stay near -15; trained ones end between -8 and 0


def is_published(path: str | Path) -> bool:
    """Whether ``path`` is a file, or has the name of one (our own models are folders)."""
    return Path(path).is_file() or (Path(path).suffix in (".pt", ".pth") and not Path(path).is_dir())


def read(path: str | Path) -> dict[str, Any]:
    """Read the dict in a published file. Nothing is executed: only tensors, plain values and a Namespace are allowed.

    Checks the checksums of the zip file, which PyTorch does not do. Files from before PyTorch 1.6 are not zip files and
    have no checksums: damage to their tensors goes unnoticed unless it makes values non-finite.

    Raises:
        LSGMError: the file is missing or damaged, holds another class, or is not a checkpoint of an NVAE or LSGM.
    """
    path = Path(path)
    try:
        _check_zip(path)
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
    except Exception as error:  # zipfile and torch's reader raise exceptions of many kinds on damaged files
        if isinstance(error, OSError) and error.strerror:
            raise LSGMError(f"{path}: cannot be read ({error.strerror})") from None
        reason = str(error).partition("\n")[0][:200] if isinstance(error, (RuntimeError, zipfile.BadZipFile)) else ""
        raise LSGMError(
            f"{path}: truncated, damaged, or not a torch file{f' ({reason})' if reason else ''}; download it again"
        ) from None
    if not isinstance(found, dict) or "vae_state_dict" not in found or "args" not in found:
        raise LSGMError(f"{path}: not a checkpoint of an NVAE or LSGM; expected the keys args and vae_state_dict")
    return found


def _check_zip(path: Path) -> None:
    """Check all checksums in a torch file, reading a little at a time."""
    with path.open("rb") as file:
        if file.read(4) != b"PK\3\4":  # written before PyTorch 1.6
            return
        with zipfile.ZipFile(file) as archive:
            if packed := [info.filename for info in archive.infolist() if info.compress_type != zipfile.ZIP_STORED]:
                raise zipfile.BadZipFile(f"{packed[0]} is compressed, which torch files never are")
            if (damaged := archive.testzip()) is not None:
                raise zipfile.BadZipFile(f"the checksum of {damaged} differs")


def load(path: str | Path, device: str | torch.device = "cpu") -> LSGM:
    """Load a model from a published file, in evaluation mode, with frozen parameters.

    The VAE gets its raw weights; the prior gets its averaged weights (EMA) if the file has them in the optimizer's
    state. The file does not say which latent channels were dropped: those with a mixing logit below -12 are assumed.

    Raises:
        LSGMError: see :func:`read`; or tensors are missing, left over or have other shapes than the arguments imply.
    """
    checkpoint = read(path)
    args, with_prior = checkpoint["args"], "dae_state_dict" in checkpoint
    try:
        known = vars(args) if isinstance(args, argparse.Namespace) else dict(args)
        parts = configs(known, with_prior)
        vae_state = _tensors(checkpoint["vae_state_dict"], "vae_state_dict")
        prior_state = _averaged(checkpoint) if with_prior else {}
        # First compare with a model without memory: the arguments may describe a model that does not fit into memory.
        plan = skeleton(*parts)
        logits = _mixing_logits(plan, prior_state)
        networks: list[tuple[nn.Module, dict[str, Tensor], str]] = [(plan.vae, vae_state, "vae_state_dict")]
        networks += [(plan.prior.network, prior_state, "dae_state_dict")] if plan.prior is not None else []
        states = [_translated(*each) for each in networks]
        model = LSGM(*parts)
    except KeyError as error:
        raise LSGMError(f"{path}: args: {error.args[0]} is missing") from None
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise LSGMError(f"{path}: args: {error.title}: {key}: {first['msg']}, found {first['input']!r:.100}") from None
    except (TypeError, ValueError, RuntimeError, ArithmeticError) as error:
        raise LSGMError(f"{path}: args: {str(error).partition(chr(10))[0]}") from None
    except LSGMError as error:
        raise LSGMError(f"{path}: {error}") from None
    model.vae.load_state_dict(states[0])
    if model.prior is not None:
        model.prior.network.load_state_dict(states[1])
    if logits is not None and model.prior is not None and model.prior.mixing_logit is not None:
        model.prior.mixing_logit.data.copy_(logits)
        dropped = logits.flatten() < INACTIVE_BELOW
        if dropped.any():
            model.prior.active.masked_fill_(dropped[None, :, None, None], 0.0)
            log.info(f"{path}: {int(dropped.sum())} of {len(dropped)} latent channels were dropped as inactive")
    return model.requires_grad_(False).eval().to(device)


def _mixing_logits(plan: LSGM, state: dict[str, Tensor]) -> Tensor | None:
    """Remove the mixing logits from the score network's state and return them, if the model has any."""
    logits = state.pop("mixing_logit", None)
    if plan.prior is None or plan.prior.mixing_logit is None:
        return None
    if logits is None or logits.shape != plan.prior.mixing_logit.shape:
        raise LSGMError("dae_state_dict: mixing_logit is missing or has another shape")
    check_weights({"mixing_logit": logits}, "dae_state_dict")
    return logits


def _tensors(state: Any, where: str) -> dict[str, Tensor]:
    """Check that all values of a state are dense tensors on the host; raises :class:`LSGMError` for the first other."""
    if not isinstance(state, dict):
        raise LSGMError(f"{where}: expected a dict of tensors, found {type(state).__name__}")
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise LSGMError(f"{where}: {name}: expected a named tensor, found {type(value).__name__}")
        if value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized or value.is_complex():
            raise LSGMError(f"{where}: {name}: expected a dense tensor of real numbers, found {value.layout} "
                            f"{value.dtype} ({value.device.type})")  # fmt: skip
    return dict(state)


def _averaged(checkpoint: dict[str, Any]) -> dict[str, Tensor]:
    """The score network's state, with averaged parameters where the optimizer's state has an average.

    The optimizer numbers the parameters in the order of registration, which is the order of the state.
    """
    state = _tensors(checkpoint["dae_state_dict"], "dae_state_dict")
    optimizer = checkpoint.get("dae_optimizer", {})
    averages = optimizer.get("state", {}) if isinstance(optimizer, dict) else optimizer
    if not isinstance(averages, dict) or not all(isinstance(entry, dict) for entry in averages.values()):
        raise LSGMError("dae_optimizer: expected the state of an optimizer, a dict of dicts")
    for i, name in enumerate(list(state)):
        average = averages.get(i, {}).get("ema")
        if average is not None:
            where = f"dae_optimizer.state.{i}"
            if _tensors({"ema": average}, where)["ema"].shape != state[name].shape:
                raise LSGMError(f"{where}.ema: {tuple(average.shape)} does not fit {name}")
            state[name] = average
    return state


def _translated(network: nn.Module, published: dict[str, Tensor], where: str) -> dict[str, Tensor]:
    """Translate tensors with published names to the state of ``network``.

    Raises:
        LSGMError: tensors are missing, left over, not finite or have wrong shapes; the message names them.
    """
    assert isinstance(network, NVAE | NCSNpp)
    names = published_names(network)
    missing = [theirs for theirs in names.values() if theirs not in published]
    extra = [key for key in published if not key.endswith("weight_normalized") and key not in set(names.values())]
    if missing or extra:
        raise LSGMError(
            f"{where}: the tensors do not match the arguments: "
            + "; ".join(f"{what}: {', '.join(keys[:8])}{f' and {len(keys) - 8} more' if len(keys) > 8 else ''}"
                        for what, keys in (("missing", missing), ("unknown", extra)) if keys)
        )  # fmt: skip
    state = {ours: _turned(theirs, published[theirs]) for ours, theirs in names.items()}
    own = network.state_dict()
    if wrong := [names[ours] for ours, value in own.items() if value.shape != state[ours].shape]:
        raise LSGMError(f"{where}: shapes do not match the arguments: {', '.join(wrong[:8])}")
    if wrong := [names[ours] for ours, value in own.items()
                 if value.is_floating_point() != state[ours].is_floating_point()]:  # fmt: skip
        raise LSGMError(f"{where}: number types differ from those expected: {', '.join(wrong[:8])}")
    check_weights({theirs: published[theirs] for theirs in names.values()}, where)
    return state


def _turned(theirs: str, value: Tensor) -> Tensor:
    """Transpose attention matrices; the same in both directions."""
    return value.T if theirs.endswith(".W") else value


def export(model: LSGM, path: str | Path, dataset: str) -> None:
    """Write ``model`` in the authors' format: a first-stage file for a VAE, otherwise a file with averaged weights.

    ``dataset`` is the authors' name of the dataset. :func:`load` restores ``model``. Raises :class:`LSGMError`.
    """
    if not isinstance(model.vae, NVAE):
        raise LSGMError("the authors' code supports only the NVAE backbone")
    prior = model.prior_config
    if not (prior is None or isinstance(prior, NCSNppConfig)) or not isinstance(model.sde_config, SDEConfig | None):
        raise LSGMError("the authors' code supports only the NCSN++ and the SDEs of the paper")
    if prior is not None and prior.attention_resolution != 16:
        raise LSGMError("the authors' code has attention only at 16x16; prior.attention_resolution must be 16")
    try:
        image = image_of(dataset)
    except LSGMError as error:
        raise LSGMError(str(error).replace("args.dataset", "--dataset")) from None
    if image != model.image:
        raise LSGMError(f"--dataset {dataset}: its published models use other images than this model ({model.image})")
    vae_state = _emitted(model.vae)
    for (
        name,
        module,
    ) in model.vae.named_modules():  # the format has a copy of the weight of each convolution without weight norm
        if isinstance(module, Conv2d) and not isinstance(module, WNConv2d):
            theirs = published_names(model.vae)[f"{name}.weight"]
            vae_state[f"{theirs}_normalized"] = vae_state[theirs].clone()
    content: dict[str, Any] = {"epoch": 0, "global_step": 0, "args": arguments(model, dataset)}
    if model.prior is None:
        content |= {"best_score": 1e6, "grad_scalar": {}, "vae_optimizer": {}, "vae_scheduler": {}, "sn_calculator": {}}
    else:
        network = model.prior.network
        assert isinstance(network, NCSNpp)
        logits = model.prior.mixing_logit
        mixing = {} if logits is None else {"mixing_logit": logits.detach().cpu().clone()}
        content |= {"best_score_fid": 1e6, "best_score_nll": 1e6, "dae_state_dict": mixing | _emitted(network)}
    buffer = io.BytesIO()
    # via memory: torch.save to a full disk raises an obscure error
    torch.save({**content, "vae_state_dict": vae_state}, buffer)
    with atomic(path) as part:
        part.write_bytes(buffer.getbuffer())


def _emitted(network: NVAE | NCSNpp) -> dict[str, Tensor]:
    names, state = published_names(network), network.state_dict()
    return {names[ours]: _turned(names[ours], value).detach().cpu().contiguous() for ours, value in state.items()}
