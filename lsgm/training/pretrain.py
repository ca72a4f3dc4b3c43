"""First stage: the VAE with the prior N(0, I) (LSGM, appendix G; NVAE)."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from lsgm import checkpoint
from lsgm.config.stages import PretrainStage
from lsgm.data.batches import Batches
from lsgm.data.store import ImageStore
from lsgm.files import sha256
from lsgm.model import LSGM
from lsgm.training import distributed
from lsgm.training.activation_checkpointing import checkpoint_activations
from lsgm.training.batch_noise import BatchNoise
from lsgm.training.distributed import Ranks
from lsgm.training.engine import Engine, Summary, compile_networks
from lsgm.training.flat import flatten
from lsgm.training.history import History
from lsgm.training.latents import summarize_kl
from lsgm.training.objective import Objective, VAEObjective
from lsgm.training.regularization import SpectralRegularizer
from lsgm.training.schedule import linear_anneal, rows_every
from lsgm.training.state import States
from lsgm.training.step import OptimizerSpec, Task
from lsgm.training.validation import Validation


def pretrain(
    stage: PretrainStage,
    data: Path,
    out: Path,
    device: torch.device,
    tensorboard: Path | None = None,
    state: Path | None = None,
) -> Summary:
    """Train the VAE of ``stage`` on the store ``data``; write model, configuration and history to ``out``.

    Resumes from the last state in ``state`` (by default ``out``/resume) if there is one. Several processes that
    `torchrun` started train one model.
    """
    ranks, device = distributed.start(device)
    identity = {**stage.model_dump(mode="json"), "data": sha256(data / "manifest.json")}
    states = States(state or out / "resume", identity)
    engine, model = build(stage, data, device, ranks, states, tensorboard if ranks.first else None)
    summary = engine.fit()
    if ranks.first:
        engine.history.write(out / "history.csv")
        checkpoint.save(model, out, stages=[stage], summary=asdict(summary))
        states.clear()
    distributed.stop()
    return summary


def build(
    stage: PretrainStage,
    data: Path,
    device: torch.device,
    ranks: Ranks = Ranks(),  # noqa: B008  (immutable)
    states: States | None = None,
    tensorboard: Path | None = None,
) -> tuple[Engine, LSGM]:
    """The engine that trains the VAE, and the model. Raises :class:`LSGMError` if the data are damaged."""
    config = stage.pretrain
    torch.manual_seed(config.seed)
    store = ImageStore(data, stage.dataset)
    if ranks.local == 0:  # once on each node
        store.verify("train", "test")
    image = store.image
    model = LSGM(image, stage.vae).to(device).train()
    batches = Batches(
        store.images("train"), config.batch, device, config.seed, image.padded_size, image.binary, stage.vae.x_bits
    )
    optimizer = torch.optim.Adamax(
        [flatten(model.vae)], lr=config.lr, eps=config.adam_eps, weight_decay=config.weight_decay
    )
    vae_objective = VAEObjective()
    regularizer = SpectralRegularizer(model.vae)
    if config.activation_checkpointing:
        checkpoint_activations(model)
    if config.compile:
        compile_networks(model)

    def objective(x: Tensor, step: int, steps: int, random: BatchNoise) -> Objective:
        beta = linear_anneal(
            step, steps, config.kl_const_portion, config.kl_anneal_portion, config.kl_const_coeff, config.kl_max_coeff
        )
        value = vae_objective(model, x, beta, random)
        value.terms["kl_coeff"] = torch.full((), beta, device=x.device)  # without a copy from the host
        return value

    task = Task(
        optimized=[OptimizerSpec("vae", optimizer, config.lr, config.lr_min)],
        objective=objective,
        regularizers=[(config.spectral_reg, regularizer)] if config.spectral_reg > 0 else [],
        after_step=lambda: None,
        parts={"model": model, "regularizer": regularizer},
        networks={"vae": model.vae},
        summarize=summarize_kl(model.vae.latent_groups),
        validate=Validation(model, store, config.eval_images),
    )
    history = History(rows_every(config, len(batches)), tensorboard)
    return Engine("VAE", task, batches, config, history, states, ranks, device), model
