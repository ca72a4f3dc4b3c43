"""`lsgm evaluate`: NELBO and fidelity of an LSGM beside those of the VAE that it began with."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lsgm import checkpoint
from lsgm.checkpoint import CheckpointConfig
from lsgm.config.mistakes import parse
from lsgm.config.stages import EvaluateStage
from lsgm.data.store import ImageStore
from lsgm.errors import LSGMError
from lsgm.evaluation.extractors import extractor
from lsgm.evaluation.fidelity import kept, metrics, real_vs_real
from lsgm.evaluation.history import read_history
from lsgm.evaluation.image_grids import save_panels
from lsgm.evaluation.metrics import NELBO, Fidelity, Gain, Metrics, NELBOs, Samplings, Training, Trainings
from lsgm.evaluation.nelbo_results import SetNELBO, read_parts, standard_error
from lsgm.evaluation.samples import DRAW_AGAIN, SamplingFile, check_samples, read_samples, read_sampling
from lsgm.evaluation.statistics import Statistics, measure, read_reference
from lsgm.files import copy, write_json
from lsgm.progress import log
from lsgm.runtime import device_name

PANEL = 64  # images of each kind in samples.png


@dataclass(frozen=True)
class Inputs:
    """The files that one evaluation reads."""

    data: Path  # folder that `lsgm prepare` wrote
    model: Path  # folder of the LSGM
    samples: Path  # folder that `lsgm sample` wrote for the LSGM
    vae: Path  # folder of the pretrained VAE that the LSGM began with
    vae_samples: Path
    nelbo: Sequence[Path]  # all the parts that `lsgm nelbo` wrote
    statistics: Sequence[Path]  # what `lsgm statistics` wrote, for each extractor of the configuration

    @property
    def models(self) -> dict[str, Path]:
        return {"vae": self.vae, "lsgm": self.model}

    @property
    def drawn(self) -> dict[str, Path]:
        return {"vae": self.vae_samples, "lsgm": self.samples}


def write_results(stage: EvaluateStage, inputs: Inputs, out: Path, device: torch.device) -> None:
    """Write metrics.json, samples.png, history_vae.csv and history_lsgm.csv to the folder ``out``.

    Raises:
        LSGMError: an input is damaged, missing, or belongs to another model or other data than the others.
    """
    for folder in inputs.models.values():
        read_history(folder / "history.csv", "restore it, or train the model again")
    found = evaluate(stage, inputs, device)
    panels = {
        f"{stage.dataset}, test set": ImageStore(inputs.data).images("test")[:PANEL],
        "VAE, prior N(0, I)": read_samples(inputs.vae_samples)[:PANEL],
        "LSGM": read_samples(inputs.samples)[:PANEL],
    }
    out.mkdir(parents=True, exist_ok=True)
    save_panels(panels, out / "samples.png")
    for kind, folder in inputs.models.items():
        copy(folder / "history.csv", out / f"history_{kind}.csv")
    write_json(out / "metrics.json", found.written())


def evaluate(stage: EvaluateStage, inputs: Inputs, device: torch.device) -> Metrics:
    """The metrics of an LSGM and of the pretrained VAE that it began with.

    Raises:
        LSGMError: an input is damaged, missing, or belongs to another model or other data than the others.
    """
    store = ImageStore(inputs.data, stage.dataset)
    store.verify("test")
    header, nelbos = read_parts(inputs.nelbo)
    configs = {kind: checkpoint.read_config(folder) for kind, folder in inputs.models.items()}
    for folder in (inputs.vae, inputs.model):
        checkpoint.verify_history(folder)
    sampling = {kind: read_sampling(folder) for kind, folder in inputs.drawn.items()}
    _check_they_belong_together(inputs, header, configs, sampling, store)
    log.info(f"NELBO {nelbos['vae'].nelbo.mean():.2f} (VAE), {nelbos['lsgm'].nelbo.mean():.2f} (LSGM) nats/image")
    training = {kind: parse(Training, c.training, inputs.models[kind] / "config.json") for kind, c in configs.items()}
    return Metrics(
        model=stage.model,
        dataset=store.name,
        device=device_name(device),
        date=datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        nelbo=_nelbos(header, nelbos),
        fidelity=_fidelity(stage, inputs, store, sampling, device),
        sampling=Samplings(vae=sampling["vae"].sampling, lsgm=sampling["lsgm"].sampling),
        training=Trainings(vae=training["vae"], lsgm=training["lsgm"]),
        code={
            **_training_codes(stage.model, configs["lsgm"]),
            "sample": sampling["lsgm"].code,
            "nelbo": header["stage"]["code"],
            "evaluate": stage.code,
        },
    )


def _check_they_belong_together(
    inputs: Inputs,
    header: Mapping[str, Any],
    configs: Mapping[str, CheckpointConfig],
    sampling: Mapping[str, SamplingFile],
    store: ImageStore,
) -> None:
    """Raise :class:`LSGMError` unless NELBOs and samples are of these models, and the NELBOs of these test images."""
    # By the weights, not the name: models with the same settings share a training, its NELBO and its samples.
    for kind, key in (("lsgm", "model"), ("vae", "vae")):
        trained = configs[kind].sha256  # None: saved by an older version
        folder, drawn = inputs.models[kind], inputs.drawn[kind]
        if trained not in (None, header[key]):
            raise LSGMError(f"{inputs.nelbo[0]}: is of other weights than {folder}; run `lsgm nelbo` again")
        if trained not in (None, sampling[kind].model):
            raise LSGMError(f"{drawn}: was drawn from other weights than those of {folder}; {DRAW_AGAIN}")
        check_samples(drawn, sampling[kind], configs[kind].image)
    if header["data"] != store.hashes("test"):
        raise LSGMError(
            f"{inputs.nelbo[0]}: is of other test images than those in {inputs.data}; run `lsgm nelbo` again"
        )


def _nelbos(header: Mapping[str, Any], nelbos: Mapping[str, SetNELBO]) -> NELBOs:
    gain = nelbos["vae"].nelbo - nelbos["lsgm"].nelbo  # paired: the same images and draws
    settings = header["stage"]["nelbo"].items()
    return NELBOs.model_validate(
        {
            "unit": "nats/image",
            "images": header["images"],
            "settings": {key: value for key, value in settings if key not in ("images", "batch", "on_failure")},
            **{key: NELBO.model_validate(found.summary()) for key, found in nelbos.items()},
            "gain": Gain(nelbo=gain.mean().item(), stderr=standard_error(gain)),
        }
    )


def _fidelity(
    stage: EvaluateStage,
    inputs: Inputs,
    store: ImageStore,
    sampling: Mapping[str, SamplingFile],
    device: torch.device,
) -> Fidelity | None:
    config = stage.evaluate
    if config.extractor is None:
        return None
    references = {found.extractor: found for found in (read_reference(path, store) for path in inputs.statistics)}
    if missing := [name for name in config.extractors if name not in references]:
        raise LSGMError(
            f"--statistics: those of {store.name}'s training images in {' and '.join(missing)} features are not "
            "among the files given; make them with `lsgm statistics`"
        )
    generated = {kind: read_samples(inputs.drawn[kind]) for kind in ("lsgm", "vae")}
    failed = {kind for kind, facts in sampling.items() if facts.failed is not None}
    return compare(generated, [references[name] for name in config.extractors], device, config.seed, failed)


def _training_codes(name: str, config: CheckpointConfig) -> dict[str, Any]:
    """Fingerprints of the training stages; the key of another model's stage, which this one started from, names it."""
    return {
        f"{s.get('stage')}" if s.get("model") == name else f"{s.get('stage')} {s.get('model')}": s.get("code")
        for s in config.stages
    }


def compare(
    generated: dict[str, NDArray[np.uint8]],
    references: Sequence[Statistics],
    device: torch.device,
    seed: int,
    failed: Collection[str] = (),
) -> Fidelity:
    """The part `fidelity` of metrics.json: ``generated`` images by kind against the real ones of ``references``.

    The first reference is of the extractor that the configuration names, the others check it. Kinds whose sampling
    ``failed`` have no numbers. Raises :class:`LSGMError` where the counts of images differ.
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
    found |= {"real_vs_real_images": n, "real_vs_real": {distance: real_vs_real(main, n, seed)}}
    found["reference"] = {reference.extractor: reference.source for reference in references}
    log.info(
        ", ".join(
            f"{distance} {found[kind].get(distance, math.nan):.2f} ({kind})" for kind in (*generated, "real_vs_real")
        )
    )
    return Fidelity.model_validate(found)
