"""A model on disk: a folder with model.safetensors and config.json. Reading one never executes stored code."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import JsonValue
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes

from lsgm.config import AnyVAEConfig, ImageConfig, PriorConfig, SDEConfig, Section, StageConfig, parse
from lsgm.errors import LSGMError
from lsgm.files import atomic, sha256, write_json
from lsgm.model import LSGM


class CheckpointConfig(Section):
    """config.json: what is needed to build the model, and where it came from."""

    format: Literal[1] = 1
    image: ImageConfig
    vae: AnyVAEConfig
    prior: PriorConfig | None = None
    sde: SDEConfig | None = None
    stages: list[dict[str, JsonValue]]  # the frozen configurations of the stages that made it, in order, as they were
    training: dict[str, JsonValue]  # of the last stage: seconds, steps, device, date ...
    sha256: str | None = None  # of model.safetensors; None: written before this was recorded


def save(
    model: LSGM, folder: str | Path, stages: Sequence[StageConfig | dict[str, Any]], summary: dict[str, Any]
) -> None:
    """Write ``model`` to ``folder``; config.json comes last, so that a folder that has one is complete."""
    folder = Path(folder)
    (folder / "config.json").unlink(missing_ok=True)
    state = model.state_dict()
    tensors = {name: value.detach().cpu().clone(memory_format=torch.contiguous_format) for name, value in state.items()}
    weights = to_bytes(tensors)  # not save_file, whose files only their owner can read
    with atomic(folder / "model.safetensors") as part:
        part.write_bytes(weights)
    parameters = sum(p.numel() for p in model.parameters())
    training = {
        **summary,
        "parameters": parameters,
        "device": device_name(model.device),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
    }
    config = {
        "format": 1,
        "image": model.image.model_dump(),
        "vae": model.vae_config.model_dump(),
        "prior": model.prior_config.model_dump() if model.prior_config else None,
        "sde": model.sde_config.model_dump() if model.sde_config else None,
        "stages": [stage if isinstance(stage, dict) else stage.model_dump() for stage in stages],
        "training": training,
        "sha256": hashlib.sha256(weights).hexdigest(),
    }
    write_json(folder / "config.json", config)


def read_config(folder: str | Path) -> CheckpointConfig:
    """The config.json of a model's folder; raises :class:`LSGMError`."""
    path = Path(folder) / "config.json"
    try:
        raw = json.loads(path.read_text())
    except OSError:
        raise LSGMError(
            f"{path}: not found; expected the folder of a model that `lsgm pretrain` or `lsgm train` wrote"
        ) from None
    except json.JSONDecodeError as error:
        raise LSGMError(f"{path}: is not valid JSON ({error}); restore the checkpoint") from None
    return parse(CheckpointConfig, raw, path)


def stages(folder: str | Path) -> list[dict[str, Any]]:
    """The frozen configurations of the stages that made the model in ``folder``."""
    return list(read_config(folder).stages)


def verify(folder: str | Path) -> CheckpointConfig:
    """Check that the weights in ``folder`` are those that were saved there, and return its config.json.

    Raises:
        LSGMError: a file is missing, or the weights were altered since.
    """
    config = read_config(folder)
    path = Path(folder) / "model.safetensors"
    if not path.is_file():
        raise LSGMError(f"{path}: not found; restore the checkpoint (`dvc pull`, or train again)")
    if config.sha256 is not None and sha256(path) != config.sha256:
        raise LSGMError(
            f"{path}: altered or damaged, its sha256 is not the one in the config.json beside it; delete it, then "
            "restore it (`dvc checkout`, or `dvc pull`) or train again"
        )
    return config


def load(folder: str | Path, device: str | torch.device = "cpu") -> LSGM:
    """Read a model, in evaluation mode, its parameters frozen.

    Raises:
        LSGMError: a file is missing, altered or damaged, or the weights do not fit the configuration.
    """
    config = verify(folder)
    path = Path(folder) / "model.safetensors"
    model = LSGM(config.image, config.vae, config.prior, config.sde)
    try:
        model.load_state_dict(load_file(path))
    except (SafetensorError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise LSGMError(f"{path}: damaged, or not the weights of the config.json beside it ({reason})") from None
    return model.requires_grad_(False).eval().to(device)


def device_name(device: torch.device) -> str:
    """A name for tables: the GPU's, or `cpu` and the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu, {torch.get_num_threads()} threads" if device.type == "cpu" else device.type
