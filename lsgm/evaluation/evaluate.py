"""metrics.json of one model: NELBO and fidelity of the LSGM beside those of the VAE that it began with.

Its parts, in the order of the file::

    model, dataset, device, date
    nelbo       unit, images, settings, then for each prior (vae; lsgm; lsgm_<estimator> for every further estimator;
                lsgm_with_normal_prior) nelbo, stderr, bpd, bpd_stderr, reconstruction, kl, nfe, seconds and, of several
                encoder samples, iw_samples, iw_bound, iw_stderr, iw_bpd, iw_bpd_stderr; gain (of the LSGM over the
                VAE): nelbo, stderr
    fidelity    null without an extractor; extractor, images (samples of each model), real_images, kept_images (as many
                samples and real ones: of KID, precision and recall), then for lsgm and vae the metrics by their names:
                fid or frechet_<extractor>, kid_<extractor>, kid_<extractor>_std, precision_<extractor>,
                recall_<extractor>, inception_score, inception_score_std, clean_fid; floor: the distance between two
                sets of floor_images real ones, under the same name; reference: hashes of what it was computed from
    sampling    for lsgm and vae images, solver, tol, nfe, temperature, seconds, device
    training    for lsgm and vae steps, seconds, skipped, restarts, diverged_at (a step, or null) ... of the last stage
    code        fingerprints of the stages that made it
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lsgm import checkpoint
from lsgm.config import ConfigError, EvaluateStage, ImageConfig, parse
from lsgm.data.store import ImageStore
from lsgm.errors import LSGMError
from lsgm.evaluation.extractors import extractor
from lsgm.evaluation.fidelity import real_vs_real, kept, metrics
from lsgm.evaluation.likelihood import read_parts, standard_error
from lsgm.evaluation.metrics import Sampling
from lsgm.evaluation.statistics import Statistics, measure, read_reference
from lsgm.files import is_sealed, read_json, sha256
from lsgm.progress import log

DRAW_AGAIN = "run `lsgm sample` again"


class SamplingFile(Sampling):
    """sampling.json, beside samples.npy."""

    model: str | None = None  # sha256 of the weights
    code: str | None = None
    samples_sha256: str | None = None  # None, both: written before they were recorded
    sha256: str | None = None  # of this file


def evaluate(
    stage: EvaluateStage,
    data: Path,
    model: Path,
    samples: Path,
    vae: Path,
    vae_samples: Path,
    nelbo: Sequence[Path],
    statistics: Sequence[Path],
    device: torch.device,
) -> dict[str, Any]:
    """The metrics of the LSGM in ``model`` beside those of the pretrained VAE in ``vae`` that all began with.

    Args:
        nelbo: all the parts that `lsgm nelbo` wrote.
        statistics: what `lsgm statistics` wrote for the extractors of the configuration.

    Raises:
        LSGMError: a file is damaged, missing, or of another model or other data than the others.
    """
    config = stage.evaluate
    store = ImageStore(data, stage.dataset)
    store.verify("test")
    header, nelbos = read_parts(nelbo)
    configs = {"vae": checkpoint.read_config(vae), "lsgm": checkpoint.read_config(model)}
    for folder in (vae, model):
        checkpoint.verify_history(folder)
    folders = {"vae": vae_samples, "lsgm": samples}
    sampling = {kind: _read_sampling(folder / "sampling.json") for kind, folder in folders.items()}
    # By the weights, not the name: models with the same settings share a training, its NELBO and its samples.
    for kind, key, trained_in in (("lsgm", "model", model), ("vae", "vae", vae)):
        trained = configs[kind].sha256  # None: of an older version
        if trained not in (None, header[key]):
            raise LSGMError(f"{nelbo[0]}: is of other weights than {trained_in}; run `lsgm nelbo` again")
        if trained not in (None, sampling[kind].get("model")):
            raise LSGMError(f"{folders[kind]}: was drawn from other weights than those of {trained_in}; {DRAW_AGAIN}")
        _check_samples(folders[kind], sampling[kind], configs[kind].image)
    if header["data"] != store.hashes("test"):
        raise LSGMError(f"{nelbo[0]}: is of other test images than those in {data}; run `lsgm nelbo` again")
    gain = nelbos["vae"].nelbo - nelbos["lsgm"].nelbo  # paired: the same images and draws
    log.info(f"NELBO {nelbos['vae'].nelbo.mean():.2f} (VAE), {nelbos['lsgm'].nelbo.mean():.2f} (LSGM) nats/image")
    codes = {  # of the stages of other models, which this one starts from, by their name too
        f"{s.get('stage')}" if s.get("model") == stage.model else f"{s.get('stage')} {s.get('model')}": s.get("code")
        for s in configs["lsgm"].stages
    }
    fidelity = None
    if config.extractor is not None:
        references = {found.extractor: found for found in (read_reference(path, store) for path in statistics)}
        if missing := [name for name in config.extractors if name not in references]:
            raise LSGMError(
                f"--statistics: those of {store.name}'s training images in {' and '.join(missing)} features are not "
                "among the files given; make them with `lsgm statistics`"
            )
        generated = {kind: read_samples(folders[kind]) for kind in ("lsgm", "vae")}
        failed = {kind for kind, facts in sampling.items() if "failed" in facts}
        fidelity = compare(generated, [references[name] for name in config.extractors], device, config.seed, failed)
    return {
        "model": stage.model,
        "dataset": store.name,
        "device": checkpoint.device_name(device),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "nelbo": {
            "unit": "nats/image",
            "images": header["images"],
            "settings": {
                key: value
                for key, value in header["stage"]["nelbo"].items()
                if key not in ("images", "batch", "give_up")
            },
            **{key: found.summary() for key, found in nelbos.items()},
            "gain": {"nelbo": gain.mean().item(), "stderr": standard_error(gain)},
        },
        "fidelity": fidelity,
        "sampling": {
            kind: {k: v for k, v in facts.items() if k not in ("code", "model", "samples_sha256", "sha256")}
            for kind, facts in sampling.items()
        },
        "training": {kind: c.training for kind, c in configs.items()},
        "code": {
            **codes,
            "sample": sampling["lsgm"].get("code"),
            "nelbo": header["stage"]["code"],
            "evaluate": stage.code,
        },
    }


def compare(
    generated: dict[str, NDArray[np.uint8]],
    references: Sequence[Statistics],
    device: torch.device,
    seed: int,
    failed: Collection[str] = (),
) -> dict[str, Any]:
    """The part `fidelity` of metrics.json: ``generated`` images by kind against the real ones of ``references``.

    The first of these is the extractor's that the configuration names, the others check it. Kinds that
    ``failed``, whose sampling was given up, have no numbers. Raises :class:`LSGMError`.
    """
    main = references[0]
    counts = {kind: len(images) for kind, images in generated.items()}
    if len(set(counts.values())) > 1:
        raise LSGMError(
            f"sample.count: distances of {counts['lsgm']} images of the LSGM and {counts['vae']} of the VAE do not "
            "compare; draw as many from both"
        )
    found: dict[str, Any] = {"extractor": main.extractor, "images": counts["lsgm"], "real_images": main.images}
    for kind, images in generated.items():
        found[kind] = {}
        for reference in references if kind not in failed else ():
            measured = measure(images, reference.extractor, device, what=f"samples ({kind})", keep_logits=True)
            found[kind] |= metrics(measured, reference)
            if reference is main:
                found["kept_images"] = kept(measured, main)
    distance = extractor(main.extractor).distance
    n = min(counts["lsgm"], len(main.features) // 2)
    found |= {"floor_images": n, "floor": {distance: real_vs_real(main, n, seed)}}
    found["reference"] = {reference.extractor: reference.source for reference in references}
    log.info(
        ", ".join(f"{distance} {found[kind].get(distance, math.nan):.2f} ({kind})" for kind in (*generated, "floor"))
    )
    return found


def read_samples(folder: Path) -> NDArray[np.uint8]:
    """The images that `lsgm sample` wrote to ``folder``, uint8 [N, C, H, W], mapped from the disk."""
    path = folder / "samples.npy"
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except OSError as error:
        raise LSGMError(f"{path}: cannot be read ({error.strerror}); {DRAW_AGAIN}") from None
    except Exception as error:  # NumPy's reader fails in many ways on a header that is not its own
        raise LSGMError(f"{path}: not an array of samples ({error}); {DRAW_AGAIN}") from None
    if not isinstance(array, np.ndarray) or array.dtype != np.uint8 or array.ndim != 4:
        found = f"{array.dtype} {list(array.shape)}" if isinstance(array, np.ndarray) else "an archive"
        raise LSGMError(f"{path}: expected images, uint8 [N, C, H, W], found {found}; {DRAW_AGAIN}")
    return array


def _check_samples(folder: Path, facts: dict[str, Any], image: ImageConfig) -> None:
    """Raise :class:`LSGMError` unless samples.npy holds the images that were written there, and those of ``image``."""
    path, found = folder / "samples.npy", read_samples(folder)
    expected = (facts["images"], image.channels, image.size, image.size)
    if found.shape != expected:
        raise LSGMError(
            f"{path}: expected {list(expected)} by the model and by sampling.json, found {list(found.shape)}; "
            f"{DRAW_AGAIN}"
        )
    if facts.get("samples_sha256") not in (None, sha256(path)):
        raise LSGMError(f"{path}: has changed, its sha256 is not the one in sampling.json; {DRAW_AGAIN}")


def _read_sampling(path: Path) -> dict[str, Any]:
    """What `lsgm sample` wrote about its samples; raises :class:`LSGMError`."""
    facts = read_json(path, DRAW_AGAIN)
    try:
        parse(SamplingFile, facts, path)
    except ConfigError as error:
        raise LSGMError(f"{str(error).splitlines()[0]}; {DRAW_AGAIN}") from None
    if facts.keys() & {"sha256", "samples_sha256"} and not is_sealed(facts):
        raise LSGMError(f"{path}: has changed, its sha256 is not that of its content; {DRAW_AGAIN}")
    return dict(facts)
