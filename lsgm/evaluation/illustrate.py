"""Draws figures of a trained LSGM: reconstructions, interpolations, ODE trajectories and mixing coefficients."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lsgm import checkpoint
from lsgm.config.stages import IllustrateStage
from lsgm.data.batches import preprocess
from lsgm.data.store import ImageStore
from lsgm.errors import LSGMError, SolverError
from lsgm.evaluation.charts import save_mixing
from lsgm.evaluation.history import read_history
from lsgm.evaluation.image_grids import save_panels
from lsgm.model import LSGM
from lsgm.networks.batch_norm import batch_statistics
from lsgm.per_sample_noise import PerSampleNoise
from lsgm.prior import ScorePrior
from lsgm.progress import log
from lsgm.solvers.probability_flow import drift
from lsgm.solvers.rk45 import rk45

RECONSTRUCTED = 64  # at most this many images, and at most `sample.batch`
TOL = 1e-4  # tolerance of rk45 if `sample` sets none, because it uses another solver
ROWS = 8  # maximum number of rows in a figure
WEIGHTS = (0.0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0)
TIMES = (1.0, 0.8, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.05)  # the final time is appended
WIDTH = 84  # pixels; small images are enlarged to about this column width


@torch.no_grad()
def illustrate(stage: IllustrateStage, data: Path, folder: Path, out: Path, device: torch.device) -> None:
    """Write MODEL_reconstructions.png, _interpolation.png, _ode.png and _mixing.png to ``out``.

    Raises:
        LSGMError: ``folder`` holds no LSGM, the data are damaged or belong to another dataset, or the ODE could not be
            solved and ``sample.on_failure`` is `error`.
    """
    config = stage.sample
    model = checkpoint.load(folder, device).eval()
    prior = model.prior
    if prior is None:
        raise LSGMError(f"{folder}: is a VAE with the prior N(0, I); give the folder of an LSGM")
    checkpoint.verify_history(folder)
    history = read_history(folder / "history.csv", "train the model again", ["epoch"])
    store = ImageStore(data, stage.dataset)
    store.verify("test")
    x = _test_images(model, store, config.seed, min(RECONSTRUCTED, max(2, config.batch)))
    rows = min(ROWS, len(x) // 2)
    draws = PerSampleNoise(config.seed, range(len(x)), device)
    posterior = model.encode(x, [draws.normal(shape) for shape in (model.latent_shape, *model.vae.lower_scale_shapes)])
    tol, time_eps = config.tol or TOL, model.time_eps if config.time_eps is None else config.time_eps
    solve = partial(rk45, partial(drift, prior), tol=tol)
    decode = partial(_decode, model, config.vae_batch_statistics)

    save_panels(
        {f"{stage.dataset}, test set": to_bytes(x), "reconstructions": decode(posterior.z, posterior.lower_scales)},
        out / f"{stage.model}_reconstructions.png",
    )

    def interpolations() -> dict[str, Tensor]:
        # Solve the ODE to t = 1, where the prior is normal, interpolate on the sphere, and solve it back.
        noise = solve(posterior.z[: 2 * rows], time_eps, 1.0).y
        ends = [(z[:rows], z[rows : 2 * rows]) for z in (noise, *posterior.lower_scales)]
        columns = {"A": to_bytes(x[:rows])}
        for weight in WEIGHTS:
            between, *lower_scales = (slerp(a, b, weight) for a, b in ends)
            columns[f"{weight:g}"] = decode(solve(between, 1.0, time_eps).y, lower_scales)
        return columns | {"B": to_bytes(x[rows : 2 * rows])}

    def samples() -> dict[str, Tensor]:
        return along_the_ode(model, prior, config.seed, tol, time_eps, config.vae_batch_statistics)

    for name, columns in {"interpolation": interpolations, "ode": samples}.items():
        path = out / f"{stage.model}_{name}.png"
        try:
            _save_columns(columns(), path)
        except SolverError as error:
            if config.on_failure == "error":
                raise
            log.warning(f"{path}: drawn without the model's images, because the ODE could not be solved: {error}")
            _save_columns({"the ODE cannot be solved": to_bytes(x[:rows])}, path)

    save_mixing(history, mixing_coefficients(prior).tolist(), out / f"{stage.model}_mixing.png")


def along_the_ode(
    model: LSGM, prior: ScorePrior, seed: int, tol: float, time_eps: float, vae_batch_statistics: bool = False
) -> dict[str, Tensor]:
    """Decode latents at several times of the ODE: column title -> uint8 [ROWS, C, H, W].

    The last column shows the samples that `rk45` draws with ``seed`` at temperature 1.
    """
    draws = PerSampleNoise(seed, range(ROWS), model.device)
    z = draws.normal(model.latent_shape) * prior.sde.base_variance**0.5
    lower_scales = [draws.normal(shape) for shape in model.vae.lower_scale_shapes]
    times = [t for t in TIMES if t > time_eps] + [time_eps]
    columns = {}
    for before, t in zip([1.0, *times], times, strict=False):
        if t < before:
            z = rk45(partial(drift, prior), z, before, t, tol).y
        columns["t = 1" if t == 1 else f"{t:g}"] = _decode(model, vae_batch_statistics, z, lower_scales)
    return columns


def mixing_coefficients(prior: ScorePrior) -> Tensor:
    """The score network's weight alpha in each latent channel, [C]; 1 without a mixed score."""
    share = torch.ones_like(prior.active) if prior.mixing_logit is None else torch.sigmoid(prior.mixing_logit)
    return (share * prior.active).flatten()


def slerp(a: Tensor, b: Tensor, weight: float) -> Tensor:
    """Interpolate spherically from ``a`` to ``b``, each [B, ...], so that the norm stays typical of normal samples."""
    first, last = a.flatten(1), b.flatten(1)
    cosine = torch.nn.functional.cosine_similarity(first, last).clamp(-1 + 1e-6, 1 - 1e-6)
    angle = torch.acos(cosine)[:, None]
    between = (torch.sin((1 - weight) * angle) * first + torch.sin(weight * angle) * last) / torch.sin(angle)
    return between.view_as(a)


def to_bytes(x: Tensor) -> Tensor:
    """Convert images in [0, 1] to uint8."""
    return x.mul(255).round().byte()


def _test_images(model: LSGM, store: ImageStore, seed: int, count: int) -> Tensor:
    test = store.images("test")
    chosen = np.sort(np.random.default_rng(seed).permutation(len(test))[:count])
    if len(chosen) < 2:
        raise LSGMError(f"{store.name}: the figures need two test images; a larger datasets.{store.name}.images.split "
                        "makes some")  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    stored = torch.from_numpy(np.array(test[chosen]))
    return preprocess(stored, generator, model.image.size, model.image.binary).to(model.device)


def _decode(model: LSGM, vae_batch_statistics: bool, z: Tensor, lower_scales: Sequence[Tensor]) -> Tensor:
    with batch_statistics(model.vae) if vae_batch_statistics else nullcontext():
        return to_bytes(model.decode(z, lower_scales))


def _save_columns(columns: dict[str, Tensor], path: Path) -> None:
    size = next(iter(columns.values())).shape[-1]
    save_panels(columns, path, columns=1, scale=max(1, WIDTH // size))
