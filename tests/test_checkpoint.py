"""Models on disk and the public face: load, sample, encode, decode, nelbo."""

import json
import math
import pickle
import resource
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import lsgm
from lsgm import checkpoint
from lsgm.config import EstimatorConfig, ImageConfig, NCSNppConfig, PretrainConfig, SDEConfig, VAEConfig
from lsgm.config.stages import PretrainStage
from lsgm.data.batches import preprocess
from lsgm.errors import LSGMError
from lsgm.model import LSGM, importance_weighted
from lsgm.registry import SOLVERS

BLOCK = {"blocks": 2, "cells": 1}
VAE = VAEConfig(
    arch="res_mbconv", channels=4, channel_mult=[1, 1, 2], groups_per_scale=2, latents_per_group=1,
    cells_per_cond=1, preprocess=BLOCK, postprocess=BLOCK,
)  # fmt: skip
PRIOR = NCSNppConfig(channels=8, scales=1, cells_per_scale=1, dropout=0, embedding_dim=16, mixing_logit_init=0)
IMAGE = ImageConfig(channels=1, size=28, padded_size=32, binary=True)
STAGE = PretrainStage(
    model="m",
    dataset="mnist",
    vae=VAE,
    pretrain=PretrainConfig(epochs=1, batch=2, kl_anneal_portion=1, kl_max_coeff=1, spectral_reg=0),
)


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    model = LSGM(IMAGE, VAE, PRIOR, SDEConfig())
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    checkpoint.save(model, tmp_path / "m", [STAGE], {"seconds": 1.5})
    return tmp_path / "m"


def test_round_trip_is_exact(folder):
    model = lsgm.load(folder)
    again = lsgm.load(folder)
    checkpoint.save(again, folder, [STAGE], {})
    state = lsgm.load(folder).state_dict()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    config = checkpoint.read_config(folder)
    assert config.stages == [STAGE.model_dump()] and config.training["parameters"] == sum(
        p.numel() for p in model.parameters()
    )


def test_public_face(folder):
    model = lsgm.load(folder)
    x, info = model.sample(5, seed=0, batch=2, return_info=True)
    assert x.shape == (5, 1, 28, 28) and x.min() >= 0 and x.max() <= 1
    assert info.images == 5 and info.solver == "ab2 (velocity)" and info.nfe == 10 and info.seconds > 0
    assert torch.equal(x, model.sample(5, seed=0, batch=2, time_eps=model.time_eps, solver="ab", order=2, steps=10))
    info = model.sample(5, solver="rk45", tol=1e-2, return_info=True)[1]
    assert info.solver == "rk45" and info.tol == 1e-2 and info.nfe >= 8
    q = model.encode(x)
    assert q.z.shape == (5, *model.latent_shape) and model.decode(q.z).shape == x.shape
    nelbo = model.nelbo((x > 0.5).float())
    assert nelbo.shape == (5,) and torch.isfinite(nelbo).all()
    z, t = torch.randn(2, *model.latent_shape), torch.tensor([0.1, 0.9])
    sigma = model.prior.sde.variance(t).sqrt()[:, None, None, None]
    torch.testing.assert_close(model.prior.score(z, t), -model.prior.predict_noise(z, t) / sigma)


@pytest.mark.parametrize("solver", [*SOLVERS.names(), "sde"])
def test_samples_depend_on_the_seed_and_not_on_the_batch(folder, solver):
    """`rk45` to its tolerance, as its steps suit a whole batch; the others to the rounding of convolutions."""
    model = lsgm.load(folder)
    settings = {"solver": solver, "steps": {"edm": 9}.get(solver, 8)}
    if solver == "sde":
        settings.update(solver="ab", form="data", tau=1.0)
    if solver in ("rk45", "adaptive_sde"):
        settings["tol"] = {"rk45": 1e-4, "adaptive_sde": 0.1}[solver]
    one = model.sample(5, seed=3, batch=5, **settings)
    tolerance = 2e-3 if solver == "rk45" else 1e-5
    for batch in (2, 1):
        torch.testing.assert_close(model.sample(5, seed=3, batch=batch, **settings), one, atol=tolerance, rtol=0)
    torch.testing.assert_close(model.sample(3, seed=3, batch=3, **settings), one[:3], atol=tolerance, rtol=0)
    assert not torch.allclose(one, model.sample(5, seed=4, batch=5, **settings), atol=1e-2)


def test_solvers_count_their_evaluations(folder):
    """`steps` counts them, those of a step with several and the last one of `denoise` too."""
    model = lsgm.load(folder)
    calls = []
    model.prior.network.register_forward_hook(lambda *_: calls.append(1))
    for solver, steps in (("ab", 1), ("ab", 5), ("ddim", 5), ("dpmpp_2m", 4), ("deis", 4), ("euler", 5), ("heun", 4),
                          ("rk4", 8), ("edm", 7), ("ancestral", 7)):  # fmt: skip
        for denoise in (False, True) if solver in ("ab", "ddim", "euler") and steps > 1 else (None,):
            calls.clear()
            _, info = model.sample(5, solver=solver, steps=steps, denoise=denoise, batch=3, return_info=True)
            assert info.nfe == steps == len(calls) / 2  # two batches
            assert info.tol is None
    calls.clear()
    _, info = model.sample(3, solver="rk45", tol=1e-2, return_info=True)
    assert info.nfe == len(calls) and info.tol == 1e-2


def test_numbers_of_evaluations_that_nobody_gave(folder):
    model = lsgm.load(folder)
    found = {
        solver: model.sample(1, solver=solver, return_info=True)[1].nfe
        for solver in SOLVERS.names()
        if solver not in ("rk45", "adaptive_sde", "ancestral")
    }
    assert found == {
        "ab": 10, "ddim": 10, "dpmpp_2m": 10, "deis": 10, "edm": 11, "euler": 10, "heun": 10, "rk4": 12
    }  # fmt: skip


def test_temperature_scales_the_draws(folder):
    """At 0 every image is that of the latent to which 0 flows; the start's spread is the temperature's."""
    model = lsgm.load(folder)
    x = model.sample(3, temperature=0.0)
    torch.testing.assert_close(x[1:], x[:1].expand(2, -1, -1, -1), atol=1e-5, rtol=0)
    model.prior, seen = None, []
    model.decode = lambda z, lower_scales: seen.append(z) or z
    model.sample(64, temperature=0.5)
    model.sample(64)
    torch.testing.assert_close(seen[0], 0.5 * seen[1])


def test_compiled_prior_gives_the_same_samples(folder):
    if shutil.which("g++") is None:
        pytest.skip("compiling on the CPU needs g++")
    model = lsgm.load(folder)
    one = model.sample(2, solver="heun", steps=6)
    model.compile_prior()
    torch.testing.assert_close(model.sample(2, solver="heun", steps=6), one, atol=1e-5, rtol=0)


def test_nelbo_of_a_model_with_a_closed_form():
    """Encoder q = N(0, I) for every x and a decoder that ignores z: KL = 0 and the pixels are coin flips.

    The NELBO is then 784 ln 2 whatever the sample, for the prior N(0, I) and for a score prior with alpha = 0.
    """
    model = LSGM(IMAGE, VAE, PRIOR, SDEConfig())
    with torch.no_grad():
        for layer in (*model.vae.posterior_heads, model.vae.output_head):
            layer.log_weight_norm.fill_(-60)
            layer.bias.zero_()
        model.prior.mixing_logit.fill_(-60)
    x = (torch.rand(4, 1, 28, 28) < 0.5).float()
    expected = torch.full((4,), 784 * torch.log(torch.tensor(2.0)).item())
    for settings in ({"solver": "rk45", "tol": 1e-6}, {}, {"solver": "ab"}, {"solver": "heun"}):
        terms = model.nelbo_terms(x, model.per_sample_noise(0, range(4)), EstimatorConfig(**settings))
        torch.testing.assert_close(terms.reconstruction, expected)
        torch.testing.assert_close(terms.kl, torch.zeros(4), atol=2e-3, rtol=0)
        torch.testing.assert_close(terms.nelbo, terms.reconstruction + terms.kl)
    model.prior = None
    torch.testing.assert_close(model.nelbo(x), expected, atol=2e-3, rtol=0)
    bits = model.bits_per_dimension(model.nelbo(x))
    torch.testing.assert_close(bits, torch.ones(4), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "settings",
    [
        {"solver": "rk45", "tol": 1e-4, "probe": "gaussian", "probes": 2},
        {"probe": "gaussian", "probes": 2},
        {"solver": "ab", "steps": 8},
        {"solver": "heun", "steps": 8},
        {"estimator": "bound", "steps": 8},
        {"estimator": "discretized", "steps": 5},
    ],
)
def test_likelihoods_can_be_chosen(folder, settings):
    """Draws belong to images: one by one or together, the same NELBO: for `rk45` to its tolerance, else to rounding."""
    model = lsgm.load(folder)
    x = (torch.rand(3, 1, 28, 28) < 0.5).float()
    nelbo = model.nelbo(x, time_eps=1e-3, **settings)
    assert torch.isfinite(nelbo).all()
    rtol = 3e-3 if settings.get("solver") == "rk45" else 1e-5
    torch.testing.assert_close(model.nelbo(x[:1], time_eps=1e-3, **settings), nelbo[:1], rtol=rtol, atol=0)


@pytest.mark.parametrize(("solver", "function"), [("rk45", "log_prob"), ("rk4", "fixed_steps_log_prob")])
def test_exact_trace_can_be_chosen(folder, monkeypatch, solver, function):
    model, seen = lsgm.load(folder), []
    monkeypatch.setattr(
        f"lsgm.solvers.likelihood.{function}",
        lambda prior, z, probes, *_: (seen.append(probes), (z[:, 0, 0, 0], 1))[1],
    )
    model.nelbo(torch.zeros(2, 1, 28, 28), probe="exact", solver=solver)
    model.nelbo(torch.zeros(2, 1, 28, 28), probes=3, solver=solver)
    assert seen[0] is None and seen[1].shape == (3, 2, *model.latent_shape)


def test_models_with_different_priors_see_the_same_encoder_samples(folder):
    """The reconstructions of several encoder samples agree, whatever the prior draws in between."""
    x = (torch.rand(3, 1, 28, 28) < 0.5).float()
    found = []
    for prior in (True, False):
        model = lsgm.load(folder)
        model.prior = model.prior if prior else None
        streams = model.per_sample_noise(5, range(3))
        found.append([model.nelbo_terms(x, streams, EstimatorConfig(steps=4)).reconstruction for _ in range(2)])
    torch.testing.assert_close(found[0], found[1])
    assert not torch.allclose(found[0][0], found[0][1])


def test_importance_weighted_bound():
    """-log mean exp(-nelbo) over samples: for equal terms the NELBO itself, else between it and the smallest."""
    nelbo = torch.tensor([[3.0, 1.0, 700.0], [3.0, 2.0, 800.0]])
    expected = [3.0, -math.log(0.5 * (math.exp(-1) + math.exp(-2))), 700 + math.log(2)]
    torch.testing.assert_close(importance_weighted(nelbo), torch.tensor(expected))


def test_more_samples_tighten_the_bound(folder):
    """On a model with N(0, I) prior: the bound falls with K on average over 16 images, K = 1 is the NELBO."""
    model = lsgm.load(folder)
    model.prior = None
    x = (torch.rand(16, 1, 28, 28) < 0.5).float()
    bounds = [model.nelbo(x, samples=k, seed=1).mean().item() for k in (1, 8, 64)]
    assert bounds[0] > bounds[1] > bounds[2]


def test_missing_and_damaged_files_are_named(folder, tmp_path):
    with pytest.raises(LSGMError, match=r"none/config.json: not found"):
        lsgm.load(tmp_path / "none")
    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    altered = content[:-100] + bytes([content[-100] ^ 1]) + content[-99:]  # one bit of one weight
    pickled = pickle.dumps({"weights": 1})  # never unpickled
    for found in (altered, content[: len(content) // 2], pickled):
        weights.write_bytes(found)
        with pytest.raises(
            LSGMError, match=r"m/model.safetensors: altered or damaged: .* delete it, then .*dvc checkout"
        ):
            lsgm.load(folder)
    config = json.loads((folder / "config.json").read_text())
    del config["sha256"]  # as written by earlier versions
    (folder / "config.json").write_text(json.dumps(config))
    for found in (content[: len(content) // 2], pickled):
        weights.write_bytes(found)
        with pytest.raises(LSGMError, match=r"model.safetensors: damaged"):
            lsgm.load(folder)
    weights.write_bytes(altered)
    lsgm.load(folder)
    weights.unlink()
    with pytest.raises(LSGMError, match=r"model.safetensors: not found; restore"):
        lsgm.load(folder)
    config["vae"]["channels"] = "four"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(LSGMError, match=r"config.json: altered or damaged"):
        lsgm.load(folder)
    config["format"] = 1  # earlier versions did not hash it
    del config["config_sha256"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(LSGMError, match=r"config.json: vae.channels: expected .* found 'four'"):
        lsgm.load(folder)


def edit(folder, change):
    """Change config.json, its hash as it was."""
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c["sde"].update(beta_end=19.0),
        lambda c: c["training"].update(seconds=1.0),
        lambda c: c.update(sha256="0" * 64),
        lambda c: c.pop("config_sha256"),
        lambda c: c.update(config_sha256=None),
        lambda c: c.update(format=1),
        lambda c: c.pop("format"),
    ],
)
def test_an_altered_configuration_is_refused(folder, change):
    assert checkpoint.verify(folder).unchecked == []
    edit(folder, change)
    for read in (checkpoint.verify, lsgm.load):
        with pytest.raises(LSGMError, match=r"(json|safetensors): altered or damaged: .* delete it, then restore it"):
            read(folder)


def test_what_cannot_be_checked_is_said(folder):
    """Of earlier versions: without the configuration's hash, and without any."""
    edit(folder, lambda c: (c.pop("config_sha256"), c.update(format=1)))
    assert checkpoint.verify(folder).unchecked == ["config.json"]
    edit(folder, lambda c: c.pop("sha256"))
    assert checkpoint.verify(folder).unchecked == ["model.safetensors", "config.json"]
    lsgm.load(folder)


def test_training_facts_that_are_not_finite_are_null(folder):
    model = lsgm.load(folder)
    checkpoint.save(model, folder, [STAGE], {"seconds": math.nan, "rate": math.inf})
    assert "NaN" not in (folder / "config.json").read_text()
    assert checkpoint.read_config(folder).training["seconds"] is None


def as_before(folder, change=lambda tensors: None):
    """A checkpoint without hashes, its weights changed."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    edit(folder, lambda c: (c.pop("config_sha256"), c.pop("sha256"), c.update(format=1)))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        (("vae", "channels"), 20_000),
        (("vae", "channels"), 10**9),
        (("vae", "groups_per_scale"), 10**9),
        (("vae", "preprocess", "cells"), 10**9),
        (("prior", "embedding_dim"), 10**12),
        (("image", "padded_size"), 10**9),
    ],
)
def test_a_configuration_is_held_against_the_weights_before_memory_is_taken(folder, key, value):
    as_before(folder)

    def change(config):
        *parents, last = key
        for name in parents:
            config = config[name]
        config[last] = value

    edit(folder, change)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    said = rf"(model.safetensors: damaged, or not the weights of this config.json|config.json: {'.'.join(key)}: )"
    with pytest.raises(LSGMError, match=said):
        lsgm.load(folder)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KB


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t["vae.stem.weight"].fill_(math.nan), "vae.stem.weight: not finite; the training diverged"),
        (lambda t: t.update({"vae.stem.weight": t["vae.stem.weight"].int()}), "such as vae.stem.weight"),
        (lambda t: t.pop("vae.stem.weight"), "such as vae.stem.weight"),
        (lambda t: t.update(more=torch.zeros(1)), "such as more"),
    ],
)
def test_weights_that_do_not_fit_are_named(folder, change, message):
    as_before(folder, change)
    with pytest.raises(LSGMError, match=f"model.safetensors: .*{message}"):
        lsgm.load(folder)


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(LSGMError, match="prior.scales: 5 scales need a latent size divisible by 16, not 8x8"):
        LSGM(IMAGE, VAE, PRIOR.model_copy(update={"scales": 5}), SDEConfig())
    with pytest.raises(
        LSGMError, match="vae.preprocess.blocks, .*: 2 halvings need an image size divisible by 4, not 30"
    ):
        LSGM(IMAGE.model_copy(update={"padded_size": 30}), VAE)


@pytest.mark.parametrize("bits", range(1, 9))
def test_images_lose_their_lower_bits_once(bits):
    """All 256 values are seen as training sees them, and what has fewer bits already stays as it is."""
    image = ImageConfig(channels=1, size=16, padded_size=16, binary=False)
    model = LSGM(image, VAE.model_copy(update={"likelihood": "dl", "x_bits": bits}))
    values = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    in_training = preprocess(values, None, 16, binarize=False, bits=bits)
    assert len(in_training.unique()) == 2**bits
    for x in (values / 255, values.double() / 255, in_training, in_training.double()):
        torch.testing.assert_close(model._seen(x).float(), in_training, rtol=1e-6, atol=0)
