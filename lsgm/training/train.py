"""Second stage: VAE and score prior, end to end (LSGM, section 3 and appendix G.6, algorithm 1)."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from lsgm import checkpoint
from lsgm.config import TrainStage
from lsgm.data.batches import Batches
from lsgm.data.store import ImageStore
from lsgm.errors import LSGMError
from lsgm.model import LSGM
from lsgm.prior import ScorePrior
from lsgm.training.ema import EMA
from lsgm.training.engine import ROWS, History, Optimised, Schedule, fit
from lsgm.training.objective import LSGMObjective, linear_anneal
from lsgm.training.regularisation import SpectralRegulariser
from lsgm.weighting import TimeSampler


def train(
    stage: TrainStage, data: Path, vae: Path, out: Path, device: torch.device, tensorboard: Path | None = None
) -> None:
    """Train VAE and prior from the VAE in ``vae``; write model (EMA prior, raw VAE), configuration and history."""
    config = stage.train
    torch.manual_seed(config.seed)
    store = ImageStore(data, stage.dataset)
    pretrained = checkpoint.load(vae)
    image = checkpoint.image_config(store.dataset)
    if pretrained.image != image:
        raise LSGMError(
            f"{vae}: this VAE was trained on other images ({pretrained.image}) than those of {data} ({image})"
        )
    model = LSGM(image, pretrained.vae_config, stage.prior, stage.sde)
    model.vae.load_state_dict(pretrained.vae.state_dict())
    model.to(device).train()
    prior = model.prior
    assert isinstance(prior, ScorePrior)

    batches = Batches(store.images("train"), config.batch, device, config.seed, image.padded_size, image.binary)
    schedule = Schedule(config, len(batches))
    fused = device.type in ("cpu", "cuda")
    optimiser_vae = torch.optim.AdamW(
        model.vae.parameters(), lr=config.lr_vae, eps=config.adam_eps_vae, weight_decay=config.weight_decay, fused=fused
    )
    optimiser_prior = torch.optim.AdamW(
        prior.parameters(), lr=config.lr_prior, eps=config.adam_eps_prior, weight_decay=config.weight_decay, fused=fused
    )
    ema = EMA(prior, config.ema)
    time_sampler = TimeSampler(prior.sde, config.p_weighting, config.p_sampling, stage.sde.time_eps)
    objective = LSGMObjective(time_sampler, config.draws)
    regularisers = [
        (weight, SpectralRegulariser(network))
        for weight, network in ((config.spectral_reg_vae, model.vae), (config.spectral_reg_prior, prior))
        if weight > 0
    ]
    anneal = config.kl_anneal

    def update(x: Tensor, step: int, steps: int) -> dict[str, Tensor]:
        beta = linear_anneal(step, steps, 0.0, anneal.portion, anneal.start, anneal.end) if anneal else 1.0
        value = objective(model, x, beta)
        loss = value.loss
        for weight, regulariser in regularisers:
            loss = loss + weight * regulariser()
        optimiser_vae.zero_grad(set_to_none=True)
        optimiser_prior.zero_grad(set_to_none=True)
        loss.backward()
        optimiser_vae.step()
        optimiser_prior.step()
        ema.update()
        alpha = torch.sigmoid(prior.mixing_logit.detach()).mean()
        return {"loss": loss.detach(), **value.terms, "kl_coeff": torch.tensor(beta), "alpha_mean": alpha}

    history = History(max(1, schedule.steps // ROWS), tensorboard)
    optimised = [
        Optimised("vae", optimiser_vae, config.lr_vae, config.lr_min_vae),
        Optimised("prior", optimiser_prior, config.lr_prior, config.lr_min_prior),
    ]
    summary = fit("LSGM", batches, schedule, optimised, update, history)
    ema.copy_to_module()
    checkpoint.save(model, out, stages=[*checkpoint.stages(vae), stage], summary=summary.__dict__)
    history.write(out / "history.csv")
