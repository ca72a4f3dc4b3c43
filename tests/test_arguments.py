"""What the library cannot answer it refuses: images, latents, numbers and names, at every public entry."""

import math

import numpy as np
import pytest
import torch

from lsgm import load
from lsgm.config import ImageConfig, NCSNppConfig, SDEConfig, VAEConfig
from lsgm.errors import LSGMError, SolverError
from lsgm.model import LSGM
from lsgm.per_sample_noise import PerSampleNoise, mix
from lsgm.registry import SOLVERS

BLOCK = {"blocks": 1, "cells": 1}
VAE = {
    "arch": "res_mbconv", "channels": 4, "channel_mult": [1, 1], "latent_scales": 1, "groups_per_scale": 1,
    "latents_per_group": 2, "cells_per_cond": 1, "preprocess": BLOCK, "postprocess": BLOCK,
}  # fmt: skip
TWO_SCALES = {"latent_scales": 2, "channel_mult": [1, 1, 1]}
PRIOR = NCSNppConfig(channels=8, scales=1, cells_per_scale=1, dropout=0, embedding_dim=16, mixing_logit_init=0)
SHORT = {"solver": "rk45", "tol": 1e-1, "time_eps": 1e-1}


def make(prior=True, **settings):
    torch.manual_seed(0)
    binary = settings.get("likelihood") == "bernoulli"
    image = ImageConfig(channels=1 if binary else 3, size=6 if binary else 8, padded_size=8, binary=binary)
    parts = (PRIOR, SDEConfig()) if prior else ()
    return LSGM(image, VAEConfig(**{**VAE, "likelihood": "dl", **settings}), *parts).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def color():
    return make(prior=False)


@pytest.fixture(scope="module")
def binary():
    return make(prior=False, likelihood="bernoulli")


@pytest.fixture(scope="module")
def lsgm():
    return make()


X = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
BITS = (torch.rand(2, 1, 6, 6, generator=torch.Generator().manual_seed(0)) < 0.5).float()


def with_one(value):
    x = X.clone()
    x[1, 2, 3, 4] = value
    return x


@pytest.mark.parametrize("entry", ["encode", "nelbo"])
@pytest.mark.parametrize(
    ("x", "message"),
    [
        (255 * X.round(), r"in \[0, 1\], found values from 0 to 255; divide by 255"),
        (65535 * X.round(), r"found values from 0 to 6.554e\+04; divide by 65535"),
        (2 * X.round() - 1, r"found values from -1 to 1; .x . 1. / 2 if they are in \[-1, 1\]"),
        (4 * X.round() - 2, "found values from -2 to 2; undo their normalization"),
        (with_one(1.01), "found values from .* to 1.01"),
        (with_one(-0.01), "found values from -0.01 to"),
        (with_one(math.nan), "found values that are not finite"),
        (with_one(math.inf), "found values that are not finite"),
        (with_one(-math.inf), "found values that are not finite"),
        (torch.rand(2, 3, 16, 16), r"images \[B, 3, 8, 8\].*, found the shape \[2, 3, 16, 16\]"),
        (torch.rand(2, 3, 4, 4), r"found the shape \[2, 3, 4, 4\]"),
        (torch.rand(2, 3, 8, 6), r"found the shape \[2, 3, 8, 6\]"),
        (torch.rand(2, 1, 8, 8), r"found the shape \[2, 1, 8, 8\]"),
        (torch.rand(2, 8, 8, 3), r"found the shape \[2, 8, 8, 3\]; x.movedim\(-1, 1\) puts the channels first"),
        (X[0], r"found the shape \[3, 8, 8\]; x\[None\] adds a dimension"),
        (torch.tensor(0.5), r"found the shape \[\]"),
        (X[None], r"found the shape \[1, 2, 3, 8, 8\]"),
        (X[:0], "found an empty batch"),
        (X.round().long(), "found the type torch.int64; use floating-point numbers, or torch.uint8"),
        (X.round().bool(), "found the type torch.bool"),
        (X.to(torch.complex64), "found the type torch.complex64"),
        (X.numpy(), "found a value of type ndarray; torch.from_numpy makes one"),
        (None, "found None"),
        ([X, X], "found a value of type list"),
        (X.to("meta"), "on cpu, the model's device, found it on meta"),
    ],
)
def test_images_that_are_none_of_the_models(color, entry, x, message):
    with pytest.raises(LSGMError, match=rf"^x: expected .*{message}") as error:
        getattr(color, entry)(x)
    assert "\n" not in str(error.value)


def test_types_of_images(color, binary):
    """Any floating-point type; bytes are 0..255; what rounding left out of the range is put back."""
    expected = color.nelbo(X, seed=1)
    assert torch.equal(color.nelbo(X.double(), seed=1), expected)
    torch.testing.assert_close(color.nelbo(X.half(), seed=1), expected, rtol=1e-2, atol=0)
    stored = X.mul(255).round().byte()
    assert torch.equal(color.nelbo(stored, seed=1), color.nelbo(stored / 255, seed=1))
    assert torch.equal(color.nelbo(with_one(1 + 1e-6), seed=1), color.nelbo(with_one(1.0), seed=1))
    assert torch.equal(color.nelbo(with_one(-1e-6), seed=1), color.nelbo(with_one(0.0), seed=1))
    assert color.double().nelbo(X).dtype == torch.float64
    color.float()
    expected = binary.nelbo(BITS)
    for x in (BITS.bool(), 255 * BITS.byte(), BITS + 1e-6, BITS - 1e-6):
        assert torch.equal(binary.nelbo(x), expected)


def test_gray_images_of_a_binary_model(binary):
    """A likelihood is one of zeros and ones; the encoder takes the means that samples are. Bytes of 0 and 1 are
    neither."""
    gray = torch.full((2, 1, 6, 6), 0.4)
    with pytest.raises(
        LSGMError, match=r"x: expected images \[B, 1, 6, 6\] of zeros and ones, found values in between"
    ):
        binary.nelbo(gray)
    assert binary.encode(gray).z.isfinite().all()
    for entry in (binary.nelbo, binary.encode):
        with pytest.raises(LSGMError, match="found bytes of 0 and 1, but in uint8 .* use x.bool"):
            entry(BITS.byte())


def test_images_with_their_border_are_those_without(binary):
    noise = [torch.zeros(2, *binary.latent_shape)]
    padded = torch.nn.functional.pad(BITS, (1,) * 4)
    assert torch.equal(binary.encode(padded, noise).z, binary.encode(BITS, noise).z)


COUNTS = [0, -1, True, 1.5, 2.0, math.nan, "3", None, 2**63]
SEEDS = [-1, 2**63, 1.5, True, "0", None]
TOLS = [0, -1, 1.5, 1e6, math.nan, math.inf, -math.inf, True, "1e-3", torch.ones(2)]
TIMES = [0, 0.0, -0.1, 1, 1.0, 2, math.nan, math.inf, True, "0.1"]
TEMPERATURES = [-1, -1e-9, math.nan, math.inf, 10**400, True, "1", None]
NAMES = ["", "rk54", "RK45", None, 1, ["rk45"], np.ones(3)]
SAMPLE = [
    *[(name, value) for name in ("count", "batch") for value in COUNTS],
    *[("steps", value) for value in COUNTS if value is not None],
    *[("seed", value) for value in SEEDS],
    *[("tol", value) for value in TOLS],
    *[("time_eps", value) for value in TIMES],
    *[("temperature", value) for value in TEMPERATURES],
    *[(name, value) for name in ("solver", "variance") for value in NAMES],
    *[(name, value) for name in ("form", "grid") for value in NAMES if value is not None],
    *[("order", value) for value in (0, 4, 1.5, "two")],
    *[("tau", value) for value in (-1, 11, math.nan, "much")],
    *[("atol", value) for value in (0, 2, math.inf, None)],
    *[(name, value) for name in ("corrector", "denoise") for value in (2, "maybe", 0.5)],
]
NELBO = [
    *[(name, value) for name in ("samples", "probes") for value in COUNTS],
    *[("steps", value) for value in COUNTS if value is not None],
    *[("seed", value) for value in SEEDS],
    *[("tol", value) for value in (*TOLS, None)],
    *[("time_eps", value) for value in TIMES],
    *[(name, value) for name in ("estimator", "solver", "probe") for value in NAMES],
]


@pytest.mark.parametrize(("name", "value"), SAMPLE)
def test_settings_of_samples_out_of_range(color, name, value):
    """Those that the solver does not use as well."""
    with pytest.raises(LSGMError, match=rf"^(arguments: )?{name}: expected .*, found ") as error:
        color.sample(**{"count": 1, name: value})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("name", "value"), NELBO)
def test_settings_of_likelihoods_out_of_range(color, name, value):
    with pytest.raises(LSGMError, match=f"^{name}: expected .*, found "):
        color.nelbo(X, **{name: value})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda m: m.sample(1, solver="dpm"),
            "solver: expected one of ab, ddim, dpmpp_2m, deis, edm, euler, heun, rk4, rk45, ancestral, adaptive_sde, "
            "found 'dpm'",
        ),
        (lambda m: m.sample(1, solver="ancestrl"), "found 'ancestrl'; did you mean 'ancestral'"),
        (
            lambda m: m.sample(1, variance="fixed_larg"),
            "variance: expected one of fixed_large, fixed_small, .* mean 'fixed_large'",
        ),
        (lambda m: m.nelbo(X, probe="rademaher"), "probe: expected one of gaussian, .* did you mean 'rademacher'"),
        (lambda m: m.nelbo(X, estimator="discretizd"), "estimator: expected one of ode, .* mean 'discretized'"),
        (lambda m: m.nelbo(X, probs=3), "probs: unknown argument; did you mean 'probes'"),
        (lambda m: m.nelbo(X, solver="euler"), "solver: expected one of rk4, heun, ab, rk45, found 'euler'"),
        (
            lambda m: m.nelbo(X, order=2),
            "order: unknown argument; the arguments are estimator, solver, steps, tol, time_eps, ",
        ),
        (lambda m: m.sample(1, order=2, solver="rk4"), "order: 2 needs solver: ab, not rk4, whose order is fixed"),
        (
            lambda m: m.sample(1, compile=True),
            "compile: unknown argument; the arguments are solver, form, order, grid, steps",
        ),
    ],
)
def test_names_that_are_unknown(color, call, message):
    with pytest.raises(LSGMError, match=message):
        call(color)


def test_numbers_of_numpy_and_of_tensors(lsgm):
    expected, info = lsgm.sample(3, seed=7, temperature=0.5, batch=2, return_info=True, **SHORT)
    found, same = lsgm.sample(
        np.int64(3), seed=np.uint8(7), temperature=np.float32(0.5), batch=torch.tensor(2), return_info=True,
        solver="rk45", tol=np.float64(0.1), time_eps=np.array(0.1),
    )  # fmt: skip
    assert torch.equal(found, expected) and (same.images, same.tol, same.nfe) == (3, 0.1, info.nfe)
    bound = lsgm.nelbo(X, samples=np.int32(2), probes=np.int64(1), **SHORT)
    assert torch.equal(bound, lsgm.nelbo(X, samples=2, probes=1, **SHORT))


def test_latents_that_are_none_of_the_models():
    model = make(prior=False, **TWO_SCALES)
    assert len(model.vae.lower_scale_shapes) == 1
    z, lower_scales = torch.zeros(2, *model.latent_shape), [torch.zeros(2, *model.vae.lower_scale_shapes[0])]
    image = model.decode(z, lower_scales)
    assert torch.equal(model.decode(z.double(), tuple(lower_scales)), image) and image.shape == (2, 3, 8, 8)
    for wrong, message in (
        (z[:0], "found an empty batch"),
        (z[0], "found the shape"),
        (z[..., :1], "found the shape"),
        (z / 0, "expected finite values"),
        (z + math.inf, "expected finite values"),
        (z.long(), "of floating-point numbers, found the type torch.int64"),
        (z.numpy(), "found a value of type ndarray"),
        (z.to("meta"), "found it on meta"),
    ):
        with pytest.raises(LSGMError, match=rf"^z: expected .*{message}|^z: {message}"):
            model.decode(wrong, lower_scales)
    for wrong, message in (
        ([], "lower_scales: expected a list of 1 tensors, found a list of 0"),
        ([*lower_scales, *lower_scales], "lower_scales: expected a list of 1 tensors, found a list of 2"),
        (lower_scales[0], "lower_scales: expected a list of 1 tensors, found a Tensor"),
        ([lower_scales[0][:1]], r"lower_scales\[0\]: expected a tensor \[2, .*found the shape \[1"),
        ([z], r"lower_scales\[0\]: expected a tensor .*found the shape"),
        ([lower_scales[0] / 0], r"lower_scales\[0\]: expected finite values"),
        ([None], r"lower_scales\[0\]: expected .*found None"),
    ):
        with pytest.raises(LSGMError, match=f"^{message}"):
            model.decode(z, wrong)
    for wrong, message in (
        ([z], "noise: expected a list of 2 tensors, found a list of 1"),
        (z, "noise: expected a list of 2 tensors, found a Tensor"),
        ([z[:1], lower_scales[0]], r"noise\[0\]: expected a tensor \[2, "),
        ([z, lower_scales[0] / 0], r"noise\[1\]: expected finite values"),
    ):
        with pytest.raises(LSGMError, match=f"^{message}"):
            model.encode(X, wrong)


@pytest.mark.parametrize("factor", [math.inf, math.nan])
def test_a_prior_that_diverged_gives_no_samples(factor):
    model = make()
    model.prior.network.register_forward_hook(lambda module, inputs, output: output * factor)
    for solver in SOLVERS.names():
        with pytest.raises(SolverError, match="diverge"):
            model.sample(2, solver=solver, steps={"edm": 3, "rk4": 4}.get(solver, 2))
    for solver in ("ab", "heun", "rk4", "rk45"):
        with pytest.raises(SolverError, match="diverge"):
            model.nelbo(X, solver=solver, steps=4)
    for estimator in ("bound", "discretized"):
        with pytest.raises(SolverError, match="diverge"):
            model.nelbo(X, estimator=estimator, steps=2)


def test_a_decoder_that_diverged_gives_nothing():
    model = make(prior=False)
    model.vae.output_head.bias.fill_(math.nan)
    with pytest.raises(SolverError, match="sample: images after 0 are not finite; the training may have diverged"):
        model.sample(1)
    with pytest.raises(SolverError, match="nelbo: not finite for 2 of 2 images; the training may have diverged"):
        model.nelbo(X)


def test_streams_of_other_images(color):
    with pytest.raises(LSGMError, match="streams: expected those of 2 images, found those of 1"):
        color.nelbo_terms(X, color.per_sample_noise(0, range(1)))


@pytest.mark.parametrize("seed", SEEDS)
def test_seeds_out_of_range(color, seed):
    for make_streams in (PerSampleNoise, color.per_sample_noise):
        with pytest.raises(LSGMError, match="seed: expected a whole number from 0 to 2"):
            make_streams(seed, range(2))


@pytest.mark.parametrize("number", [2**63, -(2**63) - 1, 1.5, "0", None])
def test_numbers_that_cannot_be_mixed(number):
    assert mix(-(2**63), 2**63 - 1, np.int64(3)) == mix(-(2**63), 2**63 - 1, 3)
    with pytest.raises(LSGMError, match="seed: expected whole numbers from -2.63 to 2.63 - 1, found .0, "):
        mix(0, number)


@pytest.mark.parametrize("device", ["gpu", "meta", "cuda:99", None])
def test_devices_that_are_not_there(device, tmp_path) -> None:
    with pytest.raises(LSGMError, match="device: expected cpu"):
        load(tmp_path, device)
