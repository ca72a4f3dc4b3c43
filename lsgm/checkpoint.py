"""Models on disk: a folder with model.safetensors and config.json. Reading one never executes stored code."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import JsonValue
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes

from lsgm.config import BackboneConfig, DiffusionConfig, ImageConfig, PriorConfig, Section
from lsgm.config.mistakes import parse
from lsgm.config.model import AnyBackbone, AnyPrior, AnySDE
from lsgm.config.stages import StageConfig
from lsgm.errors import LSGMError
from lsgm.files import atomic, read_json, seal, sha256, write_json
from lsgm.model import LSGM
from lsgm.runtime import device_name
from lsgm.shapes import misfits

RESTORE = "delete it, then restore it (`dvc checkout`, or `dvc pull`) or train again"


class CheckpointConfig(Section):
    """config.json: the configuration of the model and a record of its training.

    Format 1 has no hash of config.json itself; its earliest files have no hash of the weights either.
    """

    format: Literal[1, 2] = 1
    image: ImageConfig
    vae: AnyBackbone
    prior: AnyPrior | None = None
    sde: AnySDE | None = None
    stages: list[dict[str, JsonValue]]  # frozen configurations of the training stages, in order, as written at the time
    training: dict[str, JsonValue]  # facts about the last stage: seconds, steps, device, date ...
    sha256: str | None = None  # of model.safetensors
    history_sha256: str | None = None  # of history.csv, if it exists
    config_sha256: str | None = None  # of all keys except `sha256` and itself

    @property
    def unchecked(self) -> list[str]:
        """The files that cannot be checked, because they were saved before hashes were recorded."""
        hashes = {"model.safetensors": self.sha256, "config.json": self.config_sha256}
        return [name for name, found in hashes.items() if found is None]


def save(
    model: LSGM, folder: str | Path, stages: Sequence[StageConfig | dict[str, Any]], summary: dict[str, Any]
) -> None:
    """Write ``model`` to ``folder``. config.json is written last: a folder that has one is complete."""
    folder = Path(folder)
    (folder / "config.json").unlink(missing_ok=True)
    state = model.state_dict()
    tensors = {name: value.detach().cpu().clone(memory_format=torch.contiguous_format) for name, value in state.items()}
    weights = to_bytes(tensors)  # not save_file, which makes files that only their owner can read
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
        "format": 2,
        "image": model.image.model_dump(),
        "vae": model.vae_config.model_dump(),
        "prior": model.prior_config.model_dump() if model.prior_config else None,
        "sde": model.sde_config.model_dump() if model.sde_config else None,
        "stages": [stage if isinstance(stage, dict) else stage.model_dump() for stage in stages],
        "training": training,
        "sha256": hashlib.sha256(weights).hexdigest(),
    }
    if (folder / "history.csv").exists():
        config["history_sha256"] = sha256(folder / "history.csv")
    write_json(folder / "config.json", _sealed(config))


def read_config(folder: str | Path) -> CheckpointConfig:
    """Read config.json in a model's folder and check its own hash; raises :class:`LSGMError`."""
    path = Path(folder) / "config.json"
    if not path.exists():
        raise LSGMError(f"{path}: not found; expected the folder of a model that `lsgm pretrain` or `lsgm train` wrote")
    raw = read_json(path, RESTORE)
    if isinstance(raw, dict) and (raw.get("format") == 2 or "config_sha256" in raw) and _sealed(raw) != raw:
        raise LSGMError(f"{path}: altered or damaged: its config_sha256 does not match its content; {RESTORE}")
    return parse(CheckpointConfig, raw, path)


def _sealed(config: dict[str, Any]) -> dict[str, Any]:
    """Add config.json's own hash. It does not cover the weights' hash, which is checked against the weights."""
    weights = {"sha256": config["sha256"]} if "sha256" in config else {}
    return weights | seal({key: value for key, value in config.items() if key != "sha256"}, "config_sha256")


def stages(folder: str | Path) -> list[dict[str, Any]]:
    """The frozen configurations of the training stages of the model in ``folder``."""
    return list(read_config(folder).stages)


def verify(folder: str | Path) -> CheckpointConfig:
    """Check that the files in ``folder`` are unchanged since they were saved, and return its config.json.

    :attr:`CheckpointConfig.unchecked` names the files that cannot be checked.

    Raises:
        LSGMError: a file is missing or altered.
    """
    config = read_config(folder)
    path = Path(folder) / "model.safetensors"
    if not path.is_file():
        raise LSGMError(f"{path}: not found; restore the checkpoint (`dvc pull`, or train again)")
    if config.sha256 is not None and sha256(path) != config.sha256:
        raise LSGMError(f"{path}: altered or damaged: its sha256 is not the one in config.json; {RESTORE}")
    return config


def verify_history(folder: str | Path) -> None:
    """Check that history.csv in ``folder`` is the one that was saved with the model.

    Raises:
        LSGMError: it is missing or altered.
    """
    path, expected = Path(folder) / "history.csv", read_config(folder).history_sha256
    if expected is None:
        return
    if not path.is_file() or sha256(path) != expected:
        raise LSGMError(f"{path}: missing, altered or damaged, according to the sha256 in config.json; {RESTORE}")


def load(folder: str | Path, device: str | torch.device = "cpu") -> LSGM:
    """Load a model in evaluation mode, with frozen parameters.

    Raises:
        LSGMError: a file is missing, altered or damaged, or the weights do not fit the configuration. Weights without a
            recorded hash must also be finite.
    """
    config = verify(folder)
    path = Path(folder) / "model.safetensors"
    parts = config.image, config.vae, config.prior, config.sde
    try:
        with safe_open(path, "pt") as file:  # reads only the header
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            found = {name: (tuple(s.get_shape()), "F" in s.get_dtype()) for name, s in slices.items()}
        model = skeleton(*parts)
        expected = {name: (tuple(t.shape), t.is_floating_point()) for name, t in model.state_dict().items()}
        if wrong := [name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)]:
            raise ValueError(f"{len(wrong)} tensors are missing, unknown or have wrong shapes, such as {min(wrong)}")
        weights = load_file(path)
    except (SafetensorError, ValueError, OSError, LSGMError) as error:
        reason = " ".join(str(error).split())[:300]
        raise LSGMError(f"{path}: damaged, or not the weights of this config.json ({reason})") from None
    if config.sha256 is None:  # otherwise they are as saved; if the model diverged, sampling reports it
        check_weights(weights, path)
    model = LSGM(*parts)
    model.load_state_dict(weights)
    return model.requires_grad_(False).eval().to(device)


def skeleton(image: ImageConfig, vae: BackboneConfig, prior: PriorConfig | None, sde: DiffusionConfig | None) -> LSGM:
    """The model without memory for its tensors, to compare names, shapes and dtypes with a file before reading it.

    Raises:
        LSGMError: the configuration describes no valid model.
    """
    if reasons := misfits(image, vae, prior):
        raise LSGMError(f"no model can be built from the configuration ({reasons[0]})")
    with torch.device("meta"):
        return LSGM(image, vae, prior, sde)


def check_weights(weights: Mapping[str, Any], where: str | Path) -> None:
    """Raise :class:`LSGMError` unless all of ``weights`` are finite."""
    for name, value in weights.items():
        if not value.isfinite().all():
            raise LSGMError(f"{where}: {name}: not finite; the training diverged, or the file is damaged")
