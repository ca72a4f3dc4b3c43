"""metrics.json of one model: NELBO and Fréchet distance of the LSGM and of its VAE backbone."""

from __future__ import annotations

import json
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lsgm import checkpoint
from lsgm.config import EvaluateStage
from lsgm.data.batches import preprocess
from lsgm.data.store import ImageStore
from lsgm.errors import LSGMError
from lsgm.evaluation.fidelity import frechet_distance, half_against_half, statistics
from lsgm.evaluation.likelihood import set_nelbo, standard_error
from lsgm.progress import log


def evaluate(
    stage: EvaluateStage, data: Path, model: Path, samples: Path, vae: Path, vae_samples: Path, device: torch.device
) -> dict[str, Any]:
    """The metrics of the LSGM in ``model`` beside those of the VAE in ``vae`` that its training started from.

    The NELBOs are on the same test images, each binarised once, with the same draws; the gain's standard error is
    that of the paired difference.
    """
    config = stage.evaluate
    store = ImageStore(data, stage.dataset)
    test = store.images("test")
    if config.images > len(test):
        raise LSGMError(
            f"evaluate.images: expected at most the {len(test)} test images of {data}, found {config.images}"
        )
    lsgm = checkpoint.load(model, device)
    backbone = checkpoint.load(vae, device)
    if lsgm.prior is None or backbone.prior is not None:
        raise LSGMError(f"expected an LSGM in {model} and a VAE with the prior N(0, I) in {vae}; are they swapped?")

    # A random subset: the order of the set is not random (the first MNIST test images are the easier ones).
    chosen = np.sort(np.random.default_rng(config.seed).permutation(len(test))[: config.images])
    images = torch.from_numpy(np.array(test[chosen]))
    generator = torch.Generator().manual_seed(config.seed)
    x = preprocess(images, generator, lsgm.image.padded_size, lsgm.image.binary)
    settings: dict[str, Any] = config.model_dump(exclude={"images", "extractor"})
    nelbo_vae = set_nelbo("NELBO of the VAE", backbone, x, **settings)
    nelbo_lsgm = set_nelbo("NELBO of the LSGM", lsgm, x, **settings)
    lsgm.prior = None  # its own encoder and decoder with the prior N(0, I)
    nelbo_normal = set_nelbo("NELBO of the LSGM's VAE", lsgm, x, **settings)

    generated, generated_vae = read_samples(samples), read_samples(vae_samples)
    images_train = store.images("train")
    real = statistics(images_train, config.extractor, device)
    count = len(generated)
    distances = {
        "lsgm": frechet_distance(generated, real, config.extractor, device),
        "vae": frechet_distance(generated_vae, real, config.extractor, device),
        "floor": half_against_half(images_train, count, config.extractor, device, config.seed),
    }
    log.info(
        f"NELBO {nelbo_vae.nelbo.mean():.2f} (VAE), {nelbo_lsgm.nelbo.mean():.2f} (LSGM) nats/image; Fréchet distance "
        f"{distances['vae']:.2f} (VAE), {distances['lsgm']:.2f} (LSGM), floor {distances['floor']:.2f}"
    )
    configs = {"vae": checkpoint.read_config(vae), "lsgm": checkpoint.read_config(model)}
    sampling = {"vae": read_json(vae_samples / "sampling.json"), "lsgm": read_json(samples / "sampling.json")}
    codes = {str(stage["stage"]): stage["code"] for stage in configs["lsgm"].stages}
    gain = nelbo_vae.nelbo - nelbo_lsgm.nelbo
    return {
        "model": stage.model,
        "dataset": store.name,
        "device": checkpoint.device_name(device),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "nelbo": {
            "unit": "nats/image",
            "images": config.images,
            "settings": config.model_dump(exclude={"images", "extractor", "batch"}),
            "lsgm": nelbo_lsgm.summary(),
            "vae": nelbo_vae.summary(),
            "lsgm_with_normal_prior": nelbo_normal.summary(),
            "gain": {"nelbo": gain.mean().item(), "stderr": standard_error(gain)},
        },
        "frechet": {"extractor": config.extractor, "images": count, **distances},
        "sampling": {kind: {k: v for k, v in facts.items() if k != "code"} for kind, facts in sampling.items()},
        "training": {kind: c.training for kind, c in configs.items()},
        "code": {**codes, "sample": sampling["lsgm"].get("code"), "evaluate": stage.code},
    }


def read_samples(folder: Path) -> NDArray[np.uint8]:
    """The images that `lsgm sample` wrote to ``folder``, uint8 [N, C, H, W]."""
    path = folder / "samples.npy"
    try:
        return np.asarray(np.load(path, allow_pickle=False))
    except (OSError, ValueError, EOFError) as error:
        raise LSGMError(f"{path}: not an array of samples ({error}); run `lsgm sample` again") from None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that an earlier stage wrote."""
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError) as error:
        raise LSGMError(f"{path}: cannot be read ({error}); run the stage that writes it again") from None
