"""The settings of samplers: what null stands for, special cases, and combinations that are refused with a way out."""

import itertools
import re

import pytest

from lsgm.config import ConfigError, EstimatorConfig, SampleConfig
from lsgm.config.mistakes import parse
from lsgm.config.sampling import SPECIAL_CASES
from lsgm.registry import SOLVERS, load

RUNGE_KUTTA = ("euler", "heun", "rk4")
OPTIONS = {
    "solver": SOLVERS.names(),
    "form": (None, "velocity", "noise", "data", "drift"),
    "order": (None, 1, 3),
    "grid": (None, "t", "log_snr", "edm"),
    "steps": (None, 1, 2, 7),
    "corrector": (False, True),
    "tau": (0.0, 0.5),
    "denoise": (None, False, True),
}


def sampler(**settings):
    return parse(SampleConfig, {"count": 1, **settings}, "test")


def resolved(**settings):
    found = sampler(**settings).resolved()
    return {key: getattr(found, key) for key in ("solver", "form", "order", "grid", "steps", "denoise")}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, ("ab", "velocity", 2, "phi", 10, False)),
        ({"form": "data"}, ("ab", "data", 2, "log_snr", 10, False)),
        ({"form": "noise", "order": 1}, ("ab", "noise", 1, "edm", 10, False)),
        ({"solver": "ddim"}, ("ab", "data", 1, "log_snr", 10, False)),
        ({"solver": "ddim", "steps": 50, "grid": "t"}, ("ab", "data", 1, "t", 50, False)),
        ({"solver": "dpmpp_2m"}, ("ab", "data", 2, "log_snr", 10, False)),
        ({"solver": "deis"}, ("ab", "noise", 3, "edm", 10, False)),
        ({"solver": "edm"}, ("heun", "noise", None, "edm", 11, True)),
        ({"solver": "edm", "steps": 35}, ("heun", "noise", None, "edm", 35, True)),
        ({"solver": "euler"}, ("euler", "drift", None, "t", 10, False)),
        ({"solver": "heun"}, ("heun", "drift", None, "t", 10, False)),
        ({"solver": "heun", "denoise": True}, ("heun", "drift", None, "t", 11, True)),
        ({"solver": "rk4"}, ("rk4", "drift", None, "t", 12, False)),
        ({"solver": "rk4", "form": "velocity", "denoise": True}, ("rk4", "velocity", None, "phi", 13, True)),
        ({"solver": "ancestral"}, ("ancestral", None, None, None, 1000, False)),
        ({"solver": "rk45"}, ("rk45", None, None, None, None, False)),
        ({"solver": "adaptive_sde"}, ("adaptive_sde", None, None, None, None, True)),
        ({"solver": "adaptive_sde", "denoise": False}, ("adaptive_sde", None, None, None, None, False)),
    ],
)
def test_what_null_stands_for(settings, expected):
    assert tuple(resolved(**settings).values()) == expected


def test_tolerances():
    assert sampler(solver="rk45").resolved().tol == 1e-5
    assert sampler(solver="adaptive_sde").resolved().tol == 0.02 and sampler().atol == 0.01
    assert sampler(solver="adaptive_sde", tol=0.1).resolved().tol == 0.1


@pytest.mark.parametrize("case", SPECIAL_CASES)
def test_special_cases_are_settings_of_others(case):
    """The same samples, and the same after a second look."""
    config = sampler(solver=case).resolved()
    spelled_out = sampler(**SPECIAL_CASES[case]).resolved()
    assert config == spelled_out == config.resolved()
    assert config.implementation == sampler(solver=case).implementation
    assert sampler(**config.model_dump()) == config


def test_every_solver_has_an_implementation():
    for solver in SOLVERS.names():
        assert callable(load(sampler(solver=solver).implementation))


@pytest.mark.parametrize(
    ("settings", "label"),
    [
        ({}, "ab2 (velocity)"), ({"order": 3}, "ab3 (velocity)"), ({"form": "data", "order": 1}, "ab1 (data)"),
        ({"solver": "ddim"}, "ddim"),
        ({"solver": "heun"}, "heun (drift)"), ({"solver": "heun", "form": "noise"}, "heun (noise)"),
    ],
)  # fmt: skip
def test_labels(settings, label):
    assert sampler(**settings).label == label


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"solver": "heun", "order": 3}, "order: 3 needs solver: ab, not heun, whose order is fixed"),
        ({"solver": "rk45", "form": "noise"}, "form: noise needs solver: ab, euler, heun or rk4, not rk45"),
        ({"solver": "rk45", "form": "data"}, "form: data needs solver: ab, not rk45"),
        ({"solver": "ancestral", "grid": "t"}, "grid: t needs solver: ab, euler, heun or rk4, not ancestral"),
        ({"solver": "rk4", "form": "data"}, "form: data needs solver: ab; rk4 takes form: velocity, noise or drift"),
        ({"corrector": True}, "corrector: true needs solver: ab with form: data"),
        ({"solver": "deis", "tau": 0.5}, "tau: 0.5 needs solver: ab with form: data"),
        (
            {"form": "data", "corrector": True, "tau": 1},
            "corrector: true and tau: 1 exclude each other; set tau: 0 or corrector: false",
        ),
        ({"solver": "ancestral", "denoise": True}, "denoise: true does not apply to ancestral, .*; leave it out"),
        ({"solver": "rk4", "steps": 10}, "steps: 10 evaluations do not .* takes 4 for each; set steps: 8 or 12"),
        ({"solver": "edm", "steps": 10}, "steps: 10 .* takes 2 for each and 1 at the end; set steps: 9 or 11"),
        ({"solver": "heun", "steps": 1}, "steps: 1 .* takes 2 for each; set steps: 2 or 4"),
        ({"denoise": True, "steps": 1}, "steps: 1 .* takes 1 for each and 1 at the end; set steps: 2 or 3"),
        (
            {"solver": "ddim", "order": 2},
            "order: 2 is not ddim, which is solver: ab, form: data, order: 1; leave order",
        ),
        (
            {"solver": "edm", "denoise": False},
            "denoise: false is not edm, which is .*, denoise: true; leave denoise out",
        ),
        ({"solver": "edm", "grid": "t"}, "grid: t is not edm, .* leave grid out"),
    ],
)
def test_misfits_are_refused_with_a_way_out(settings, message):
    with pytest.raises(ConfigError, match=f"^test: {message}") as error:
        sampler(**settings)
    assert "\n" not in str(error.value)


def ways_out(settings, message):
    """The settings that a message suggests, as changes of ``settings``."""
    message = message.partition("test: ")[2]
    key = message.partition(":")[0]
    if "; set " in message:
        rest = message.partition("; set ")[2]
        if numbers := re.findall(r"steps: (\d+)|or (\d+)$", rest):
            return [{"steps": int(a or b)} for a, b in numbers]
        return [{"tau": 0.0}, {"corrector": False}]
    if "leave" in message:
        return [{key: None}]
    if "with form: data" in message:
        return [{"solver": "ab", "form": "data"}]
    if "takes form: " in message:
        forms = re.findall("velocity|noise|drift", message.partition("takes form: ")[2])
        return [{"solver": "ab"}, *({"form": form} for form in forms)]
    named = re.search(r"needs solver: (.*), not ", message)
    return [{"solver": solver} for solver in re.split(", | or ", named[1])]


def test_every_way_out_leads_out():
    """Of all combinations: each suggestion mends what the message is about; following them ends in valid settings."""
    refused = 0
    for values in itertools.product(*OPTIONS.values()):
        settings = dict(zip(OPTIONS, values, strict=True))
        try:
            config = SampleConfig(count=1, **settings)
        except ValueError:
            refused += 1
        else:
            assert config.resolved() == config.resolved().resolved()
            SampleConfig(**config.resolved().model_dump())
            continue
        if refused % 29:  # some of them: each costs a few checks
            continue
        follow(settings, 0)
    assert refused > 5000


def follow(settings, depth):
    assert depth < 7, settings
    try:
        sampler(**settings)
    except ConfigError as error:
        for change in ways_out(settings, str(error)):
            changed = {**settings, **change}
            assert changed != settings, error
            follow(changed, depth + 1)


@pytest.mark.parametrize(("solver", "steps", "ways"), [("rk4", 10, (8, 12)), ("heun", 1, (2, 4)), ("rk4", 2, (4, 8))])
def test_likelihoods_take_whole_steps(solver, steps, ways):
    with pytest.raises(ConfigError, match=f"steps: {steps} evaluations .* set steps: {ways[0]} or {ways[1]}$"):
        parse(EstimatorConfig, {"solver": solver, "steps": steps}, "test")
    for way in ways:
        assert parse(EstimatorConfig, {"solver": solver, "steps": way}, "test").steps == way
    for other in ({"solver": "ab"}, {"solver": "rk45"}, {"estimator": "bound"}, {"estimator": "discretized"}):
        parse(EstimatorConfig, {"solver": solver, "steps": steps, **other}, "test")
