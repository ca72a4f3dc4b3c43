"""Second stage: VAE and score prior, end to end (LSGM, section 3 and appendix G.6)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn

from lsgm import checkpoint
from lsgm.config import SDEConfig, TrainConfig
from lsgm.config.stages import TrainStage
from lsgm.data.batches import Batches
from lsgm.data.store import ImageStore
from lsgm.errors import LSGMError
from lsgm.files import sha256
from lsgm.model import LSGM
from lsgm.prior import ScorePrior
from lsgm.progress import log
from lsgm.training import distributed
from lsgm.training.activation_checkpointing import checkpoint_activations
from lsgm.training.batch_noise import BatchNoise
from lsgm.training.distributed import Ranks
from lsgm.training.ema import EMA, Averages
from lsgm.training.engine import Engine, Summary, compile_networks
from lsgm.training.flat import flatten
from lsgm.training.history import History
from lsgm.training.latents import encodings, kl_per_channel, largest_squared_distance, summarize_kl
from lsgm.training.objective import LSGMObjective, Objective
from lsgm.training.regularization import SpectralRegularizer
from lsgm.training.schedule import linear_anneal, rows_every
from lsgm.training.state import States
from lsgm.training.step import OptimizerSpec, Stateful, Task
from lsgm.training.validation import Validation
from lsgm.weighting import TimeSampler


def train(
    stage: TrainStage,
    data: Path,
    vae: Path,
    out: Path,
    device: torch.device,
    tensorboard: Path | None = None,
    state: Path | None = None,
) -> Summary:
    """Train VAE and prior from the VAE in ``vae``; write model (EMA prior, raw VAE), configuration and history.

    ``vae`` is the folder of a pretrained VAE, or of an LSGM whose VAE is taken. With ``train_vae: false`` the VAE is
    frozen in evaluation mode. Resumes from the last state in ``state`` (by default ``out``/resume) if there is one.
    Several processes that `torchrun` started train one model.
    """
    ranks, device = distributed.start(device)
    inputs = {"data": sha256(data / "manifest.json"), "vae": sha256(vae / "model.safetensors")}
    states = States(state or out / "resume", {**stage.model_dump(mode="json"), **inputs})
    start = checkpoint.read_config(vae)
    before = sum(_seconds(start, key, vae) for key in ("seconds", "seconds_before")) if start.prior is not None else 0.0
    engine, model, averages = build(stage, data, vae, device, ranks, states, tensorboard if ranks.first else None)
    summary = engine.fit()
    if ranks.first:
        averages.copy_to_module()
        facts = {**asdict(summary), "seconds_before": before}  # of earlier end-to-end trainings
        engine.history.write(out / "history.csv")
        checkpoint.save(model, out, stages=[*start.stages, stage], summary=facts)
        states.clear()
    distributed.stop()
    return summary


def _seconds(start: checkpoint.CheckpointConfig, key: str, folder: Path) -> float:
    value = start.training.get(key, 0.0)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise LSGMError(
            f"{folder / 'config.json'}: training.{key}: expected a number, found {value!r}; restore the model"
        )
    return float(value)


def build(
    stage: TrainStage,
    data: Path,
    vae: Path,
    device: torch.device,
    ranks: Ranks = Ranks(),  # noqa: B008  (immutable)
    states: States | None = None,
    tensorboard: Path | None = None,
) -> tuple[Engine, LSGM, Averages]:
    """The engine that trains VAE and prior, the model, and the averages of its weights.

    Raises:
        LSGMError: the data or the VAE are damaged, or do not fit together.
    """
    config = stage.train
    store = ImageStore(data, stage.dataset)
    if ranks.local == 0:  # once on each node
        store.verify("train", "test")
    pretrained = checkpoint.load(vae)
    image = store.image
    if pretrained.image != image:
        raise LSGMError(
            f"{vae}: this VAE was trained on different images ({pretrained.image}) than those in {data} ({image})"
        )
    bits = pretrained.vae_config.x_bits
    batches = Batches(store.images("train"), config.batch, device, config.seed, image.padded_size, image.binary, bits)
    model = _start_from(pretrained.to(device), stage, batches)
    prior = model.prior
    assert isinstance(prior, ScorePrior)
    optimized, regularizers = _optimizers(model, config)
    if config.activation_checkpointing:
        checkpoint_activations(model)
    of_vae = None if config.ema_vae is None or not config.train_vae else EMA(model.vae, config.ema_vae)
    averages = Averages(EMA(prior, config.ema), of_vae)
    if config.compile:
        compile_networks(model)
    parts: dict[str, Stateful] = {"model": model, "ema": averages.prior}
    if averages.vae is not None:
        parts["ema_vae"] = averages.vae
    parts |= {f"regularizer {i}": regularizer for i, (_, regularizer) in enumerate(regularizers)}
    task = Task(
        optimized=optimized,
        objective=_objective(model, config, averages.prior),
        regularizers=regularizers,
        after_step=averages.update,
        parts=parts,
        networks={"vae": model.vae, "prior": prior} if config.train_vae else {"prior": prior},
        summarize=summarize_kl(model.vae.latent_groups),
        validate=Validation(
            model, store, config.eval_images, averages.prior.module, averages.vae.module if averages.vae else None
        ),
    )
    history = History(rows_every(config, len(batches)), tensorboard)
    return Engine("LSGM", task, batches, config, history, states, ranks, device), model, averages


def _start_from(pretrained: LSGM, stage: TrainStage, batches: Batches) -> LSGM:
    """The model with the pretrained VAE and a new prior. Logs what was measured on the VAE's latents."""
    config, sde = stage.train, stage.sde
    torch.manual_seed(config.seed)
    if isinstance(sde, SDEConfig) and sde.name == "vesde" and sde.sigma2_max is None:
        sde = sde.model_copy(update={"sigma2_max": largest_squared_distance(encodings(pretrained, batches))})
        log.info(f"VESDE: sigma2_max = {sde.sigma2_max:.1f}, the largest squared distance between two encodings")
    torch.manual_seed(config.seed)
    model = LSGM(pretrained.image, pretrained.vae_config, stage.prior, sde)
    model.vae.load_state_dict(pretrained.vae.state_dict())
    model.to(pretrained.device).train()
    assert model.prior is not None
    if stage.prior.drop_inactive is not None:
        kl = kl_per_channel(pretrained, batches, stage.prior.drop_inactive.batches)
        inactive = kl <= stage.prior.drop_inactive.threshold
        model.prior.deactivate(inactive)
        log.info(f"{int(inactive.sum())} of {len(kl)} latent channels are inactive: their prior stays N(0, I)")
    if not config.train_vae:
        model.vae.eval().requires_grad_(False)
    return model


def _optimizers(
    model: LSGM, config: TrainConfig
) -> tuple[list[OptimizerSpec], list[tuple[float, SpectralRegularizer]]]:
    """Adam for VAE and prior, each with its own learning rate (LSGM, appendix G), and their spectral regularizers."""
    assert model.prior is not None
    networks: dict[str, tuple[nn.Module, float, float, float, float]] = {}
    if config.train_vae:
        networks["vae"] = (model.vae, config.lr_vae, config.lr_min_vae, config.adam_eps_vae, config.spectral_reg_vae)
    networks["prior"] = (
        *(model.prior, config.lr_prior, config.lr_min_prior, config.adam_eps_prior, config.spectral_reg_prior),
    )
    optimized, regularizers = [], []
    for name, (network, lr, lr_min, adam_eps, spectral_reg) in networks.items():
        optimizer = torch.optim.AdamW(
            [flatten(network)],
            lr=lr,
            eps=adam_eps,
            weight_decay=config.weight_decay,
            fused=model.device.type in ("cpu", "cuda"),
        )
        optimized.append(OptimizerSpec(name, optimizer, lr, lr_min))
        if spectral_reg > 0:
            convs = name == "vae" or config.spectral_reg_prior_convs
            regularizers.append((spectral_reg, SpectralRegularizer(network, convs=convs)))
    return optimized, regularizers


def _objective(
    model: LSGM, config: TrainConfig, ema: EMA[ScorePrior]
) -> Callable[[Tensor, int, int, BatchNoise], Objective]:
    """The objective in the form that the training step calls, with the KL coefficient of the step."""
    prior, anneal = model.prior, config.kl_anneal
    assert isinstance(prior, ScorePrior) and model.sde_config is not None
    time_eps = model.sde_config.time_eps
    lsgm_objective = LSGMObjective(
        TimeSampler(prior.sde, config.p_weighting, config.p_sampling, time_eps),
        config.algorithm,
        q=TimeSampler(prior.sde, "ll", config.q_sampling, time_eps),
        joint=config.q_pass == "joint",
        q_prior=ema.module if config.q_uses_ema else None,
        time_samples=config.time_samples,
        balance=config.kl_balance,
        train_vae=config.train_vae,
        cross_entropy=config.cross_entropy,
        stratified_t=config.stratified_t,
    )

    def objective(x: Tensor, step: int, steps: int, random: BatchNoise) -> Objective:
        beta = linear_anneal(step, steps, 0.0, anneal.portion, anneal.start, anneal.end) if anneal else 1.0
        value = lsgm_objective(model, x, beta, random)
        value.terms["kl_coeff"] = torch.full((), beta, device=x.device)  # without a copy from the host
        if prior.mixing_logit is not None:
            value.terms["alpha_mean"] = torch.sigmoid(prior.mixing_logit.detach()).mean()
        return value

    return objective
