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
from lsgm.evaluation.fidelity import EXTRACTORS, frechet_distance, half_against_half, statistics
from lsgm.evaluation.likelihood import set_nelbo, standard_error
from lsgm.progress import log


def evaluate(
    stage: EvaluateStage, data: Path, model: Path, samples: Path, vae: Path, vae_samples: Path, device: torch.device
) -> dict[str, Any]:
    """The metrics of the LSGM in ``model`` beside those of the pretrained VAE in ``vae`` that all began with.

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
    generated = None
    if config.extractor is not None:
        generated = {"lsgm": read_samples(samples), "vae": read_samples(vae_samples)}
        check_images(config.extractor, store.images("train"), generated)  # before hours are spent on the rest
    lsgm = checkpoint.load(model, device)
    backbone = checkpoint.load(vae, device)
    if lsgm.prior is None or backbone.prior is not None:
        raise LSGMError(f"expected an LSGM in {model} and a VAE with the prior N(0, I) in {vae}; are they swapped?")

    # A random subset: the order of the set is not random (the first MNIST test images are the easier ones).
    chosen = np.sort(np.random.default_rng(config.seed).permutation(len(test))[: config.images])
    images = torch.from_numpy(np.array(test[chosen]))
    generator = torch.Generator().manual_seed(config.seed)
    x = preprocess(images, generator, lsgm.image.padded_size, lsgm.image.binary, lsgm.vae_config.x_bits)
    settings: dict[str, Any] = config.model_dump(exclude={"images", "extractor"})
    nelbo_vae = set_nelbo("NELBO of the VAE", backbone, x, **settings)
    nelbo_lsgm = set_nelbo("NELBO of the LSGM", lsgm, x, **settings)
    lsgm.prior = None  # its own encoder and decoder with the prior N(0, I)
    nelbo_normal = set_nelbo("NELBO of the LSGM's VAE", lsgm, x, **settings)

    log.info(f"NELBO {nelbo_vae.nelbo.mean():.2f} (VAE), {nelbo_lsgm.nelbo.mean():.2f} (LSGM) nats/image")
    frechet = None
    if config.extractor is not None and generated is not None:
        frechet = distances(generated, store.images("train"), config.extractor, device, config.seed)
    configs = {"vae": checkpoint.read_config(vae), "lsgm": checkpoint.read_config(model)}
    sampling = {"vae": read_json(vae_samples / "sampling.json"), "lsgm": read_json(samples / "sampling.json")}
    codes = {  # of the stages of other models, which this one starts from, by their name too
        f"{s['stage']}" if s["model"] == stage.model else f"{s['stage']} {s['model']}": s["code"]
        for s in configs["lsgm"].stages
    }
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
        "frechet": frechet,
        "sampling": {kind: {k: v for k, v in facts.items() if k != "code"} for kind, facts in sampling.items()},
        "training": {kind: c.training for kind, c in configs.items()},
        "code": {**codes, "sample": sampling["lsgm"].get("code"), "evaluate": stage.code},
    }


def check_images(extractor: str, train: NDArray[np.uint8], generated: dict[str, NDArray[np.uint8]]) -> None:
    """Raise :class:`LSGMError` where the Fréchet distances of :func:`distances` cannot be computed."""
    count = len(generated["lsgm"])
    if len(generated["vae"]) != count:
        raise LSGMError(
            f"sample.count: the Fréchet distances of {count} images of the LSGM and {len(generated['vae'])} of the "
            "VAE do not compare; draw as many from both"
        )
    if 2 * count > len(train):
        raise LSGMError(
            f"sample.count: {count} images; the floor of the Fréchet distance needs twice as many real ones and there "
            f"are {len(train)}: at most {len(train) // 2}"
        )
    shape = EXTRACTORS[extractor].image_shape
    if train.shape[1:] != shape:
        raise LSGMError(f"evaluate.extractor: {extractor} is for images of {list(shape)}, these are {train.shape[1:]}")


def distances(
    generated: dict[str, NDArray[np.uint8]],
    train: NDArray[np.uint8],
    extractor: str,
    device: torch.device,
    seed: int,
) -> dict[str, Any]:
    """Fréchet distances of sets of images to the training images, and the floor of images of the training set."""
    real = statistics(train, extractor, device)
    found = {kind: frechet_distance(images, real, extractor, device) for kind, images in generated.items()}
    count = len(generated["lsgm"])
    found["floor"] = half_against_half(train, count, extractor, device, seed)
    log.info("Fréchet distance: " + ", ".join(f"{value:.2f} ({kind})" for kind, value in found.items()))
    return {"extractor": extractor, "images": count, **found}


def read_samples(folder: Path) -> NDArray[np.uint8]:
    """The images that `lsgm sample` wrote to ``folder``, uint8 [N, C, H, W], mapped from the disk."""
    path = folder / "samples.npy"
    try:
        return np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))
    except (OSError, ValueError, EOFError) as error:
        raise LSGMError(f"{path}: not an array of samples ({error}); run `lsgm sample` again") from None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that an earlier stage wrote."""
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError) as error:
        raise LSGMError(f"{path}: cannot be read ({error}); run the stage that writes it again") from None
