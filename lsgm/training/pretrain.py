"""First stage: the VAE with the prior N(0, I) (LSGM, appendix G; NVAE)."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from lsgm import checkpoint
from lsgm.config import PretrainStage
from lsgm.data.batches import Batches
from lsgm.data.store import ImageStore
from lsgm.model import LSGM
from lsgm.training.engine import ROWS, History, Optimised, Schedule, fit
from lsgm.training.objective import VAEObjective, linear_anneal
from lsgm.training.recompute import recompute
from lsgm.training.regularisation import SpectralRegulariser


def pretrain(
    stage: PretrainStage, data: Path, out: Path, device: torch.device, tensorboard: Path | None = None
) -> None:
    """Train the VAE of ``stage`` on the store ``data``; write model, configuration and history to ``out``."""
    config = stage.pretrain
    torch.manual_seed(config.seed)
    store = ImageStore(data, stage.dataset)
    image = checkpoint.image_config(store.dataset)
    model = LSGM(image, stage.vae).to(device).train()
    batches = Batches(
        store.images("train"), config.batch, device, config.seed, image.padded_size, image.binary, stage.vae.x_bits
    )
    schedule = Schedule(config, len(batches))
    optimiser = torch.optim.Adamax(
        model.vae.parameters(), lr=config.lr, eps=config.adam_eps, weight_decay=config.weight_decay, foreach=True
    )
    if config.recompute:
        recompute(model)
    objective = VAEObjective()
    regulariser = SpectralRegulariser(model.vae)

    def update(x: Tensor, step: int, steps: int) -> dict[str, Tensor]:
        beta = linear_anneal(
            step, steps, config.kl_const_portion, config.kl_anneal_portion, config.kl_const_coeff, config.kl_max_coeff
        )
        objective_value = objective(model, x, beta)
        spectral = regulariser()
        loss = objective_value.loss + config.spectral_reg * spectral
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        return {
            "loss": loss.detach(),
            **objective_value.terms,
            "kl_coeff": torch.tensor(beta, device=x.device),
            "spectral": spectral.detach(),
        }

    history = History(max(1, schedule.steps // ROWS), tensorboard)
    summary = fit("VAE", batches, schedule, [Optimised("vae", optimiser, config.lr, config.lr_min)], update, history)
    checkpoint.save(model, out, stages=[stage], summary=summary.__dict__)
    history.write(out / "history.csv")
