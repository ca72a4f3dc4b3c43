"""What can be known of the plan in params.yaml is said when it is read, before the first job."""

import copy
import math
import re
import resource
import time
from pathlib import Path

import pytest
import yaml

from lsgm import registry
from lsgm.config import ConfigError, DatasetConfig
from lsgm.config.mistakes import parse
from lsgm.config.stages import PretrainStage, load_stage
from lsgm.evaluation.extractors import extractor
from lsgm.params import Params, presets
from lsgm.params.plan import RULES

ROOT = Path(__file__).parents[1]
RAW = yaml.safe_load((ROOT / "params.yaml").read_text())
RAW["models"] = {name: {**model, "extends": None} for name, model in presets.resolve(RAW["models"]).items()}
RAW["datasets"]["mine"] = {"path": "/x", "images": {"size": 32}}
RAW["models"]["own"] = copy.deepcopy(RAW["models"]["cifar10_small"]) | {"dataset": "mine"}
DEMO, OWN = "models.mnist_demo", "models.own"


def changed(changes):
    raw = copy.deepcopy(RAW)
    for path, value in changes.items():
        *parents, last = path.split(".")
        section = raw
        for key in parents:
            section = section[key]
        section[last] = value
    return raw


def refused(changes, message):
    with pytest.raises(ConfigError, match=message) as caught:
        parse(Params, changed(changes), "params.yaml")
    assert str(caught.value).startswith("params.yaml: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("train.seed", -1, "expected 0 to 9223372036854775807, found -1"),
        ("pretrain.seed", 2**63, "expected 0 to 9223372036854775807, found 9223372036854775808"),
        pytest.param("sample.seed", 10**5000, "expected 0 to .*, found a number of more than 100 digits", id="digits"),
        ("evaluate.seed", 1.5, "expected a valid integer, .* found 1.5"),
        ("train.lr_vae", math.inf, "expected a finite number, found inf"),
        ("train.lr_vae", math.nan, "expected a finite number, found nan"),
        ("train.lr_vae", "nan", "expected .*, found 'nan'"),
        ("train.lr_vae", "1e400", "expected less than or equal to 1000000000, found '1e400'"),
        ("prior.mixing_logit_init", -math.inf, "expected a finite number, found -inf"),
        ("resources.train.hours", math.inf, "expected a finite number, found inf"),
        ("resources.train.hours", "1:30", "expected a valid number, .* found '1:30'"),
        ("train.epochs", 1e300, "expected less than or equal to 1000000, found 1e.300"),
        ("train.epochs", True, "expected a number, found True; YAML reads yes, no, on and off"),
        ("sample.count", 10**30, "expected less than or equal to 1000000000"),
        ("train.batch", 10**12, "expected less than or equal to 1000000"),
        ("prior.channels", 10**9, "expected less than or equal to 65536"),
        ("prior.channels", 3, "expected greater than or equal to 4, found 3"),
        ("prior.dropout", 1, "expected less than 1, found 1"),
        ("sample.temperature", -1, "expected greater than or equal to 0, found -1"),
        ("sample.time_eps", 1e-300, "expected greater than or equal to 0.000000000001"),
        ("vae.progressive_input", False, "expected 'none' or 'input_skip', found False; YAML reads yes, no, on and"),
    ],
)  # fmt: skip
def test_numbers_are_finite_and_bounded(key, value, message):
    refused({f"{DEMO}.{key}": value}, f"{DEMO}.{key}: {message}")


def numbers(section, path=()):
    for key, value in section.items():
        if isinstance(value, dict):
            yield from numbers(value, (*path, key))
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            yield ".".join((*path, key))


def test_no_number_of_a_model_may_be_anything():
    """Each one there is, with its default written out."""
    found = parse(Params, RAW, "params.yaml").models["mnist_demo"].model_dump(exclude={"vae"})
    raw = changed({DEMO: found | {"vae": RAW["models"]["mnist_demo"]["vae"]}})
    raw["models"]["mnist_demo"].pop("vae_of")
    keys = list(numbers(raw["models"]["mnist_demo"]))
    assert len(keys) > 80
    for key in keys:
        for value in (math.inf, math.nan, -(10**30), 10**30, True):
            *parents, last = key.split(".")
            section = raw["models"]["mnist_demo"]
            for name in parents:
                section = section[name]
            kept, section[last] = section[last], value
            with pytest.raises(ConfigError, match=rf"^params.yaml: {DEMO}.{key}: expected .*, found"):
                parse(Params, raw, "params.yaml")
            section[last] = kept


@pytest.mark.parametrize(("value", "read"), [("1e3", 1000), ("1.5E1", 15), (3.0, 3), ("12", 12)])
def test_numbers_that_yaml_reads_as_text(value, read):
    count = parse(Params, changed({f"{DEMO}.sample.count": value}), "p").models["mnist_demo"].sample.count
    assert count == read and isinstance(count, int)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({f"{DEMO}.prior.scales": 4}, "prior.scales: 4 scales need a latent size divisible by 8, not 4x4"),
        ({f"{DEMO}.prior.channels": 7}, "mnist_demo.prior.channels: expected 6 or 8 or another"),
        ({f"{DEMO}.vae.likelihood": "dml"}, "vae.likelihood: 'dml' does not fit: the images are binary; use bernoulli"),
        ({f"{OWN}.vae.likelihood": "bernoulli"}, "own.vae.likelihood: 'bernoulli' does not fit: the images are not"),
        ({f"{DEMO}.vae.x_bits": 5}, "mnist_demo.vae.x_bits: 5 has no meaning for binary images"),
        ({"datasets.mine.images.size": 30}, "own.vae.preprocess.blocks.*: 2 halvings need an image size divisible"),
        ({"datasets.mine.images.binary": True}, "datasets.mine.images: binary: true needs grayscale images"),
        ({f"{DEMO}.train.accumulate": 3}, r"train.batch: expected a multiple of 3, .*accumulate .3., found 64"),
        ({f"{DEMO}.resources.train": {"nodes": 3, "gpus": 2}, f"{DEMO}.train.accumulate": 2},
         r"train.batch: expected a multiple of 12, which is processes .*: 6. x accumulate .2., found 64"),
        ({f"{DEMO}.resources.pretrain.gpus": 3}, "mnist_demo.pretrain.batch: expected a multiple of 3"),
        ({f"{DEMO}.train.batch": 60001}, "mnist_demo.train.batch: mnist has 60000 training images, not 60001"),
        ({f"{DEMO}.train.eval_images": 10001}, "train.eval_images: mnist has 10000 test images, not 10001"),
        ({f"{DEMO}.sample.count": 1}, "sample.count: mnist_classifier needs at least 2 samples to compare, found 1"),
        ({f"{OWN}.sample.count": 9, f"{OWN}.evaluate.extractor": "inception"}, "inception needs at least 10 samples"),
        ({f"{OWN}.evaluate.extractor": "mnist_classifier"}, "mnist_classifier is for images of 1 x 28 x 28 .* 3 x 32"),
        ({f"{DEMO}.vae.groups_per_scale": 900}, "vae.groups_per_scale.*: 1806 residual cells, expected at most 500"),
    ],
)  # fmt: skip
def test_sections_that_do_not_fit_together(changes, message):
    refused(changes, f"params.yaml: .*{message}")


def test_one_image_gives_batch_norm_no_statistics():
    """Latents of 1x1 and one image at a time; two are enough, and so is a VAE that is not trained."""
    shape = {f"{OWN}.vae.channel_mult": [1] * 6, f"{OWN}.vae.preprocess": {"blocks": 5, "cells": 1},
             f"{OWN}.vae.postprocess": {"blocks": 5, "cells": 1}, f"{OWN}.prior.scales": 1,
             f"{OWN}.train.accumulate": 4, f"{OWN}.train.p_weighting": "ll"}  # fmt: skip
    refused(shape | {f"{OWN}.train.batch": 4}, "own.train.batch: batch norm has nothing to average over one image")
    parse(Params, changed(shape | {f"{OWN}.train.batch": 8}), "p")
    parse(Params, changed(shape | {f"{OWN}.train.batch": 4, f"{OWN}.train.train_vae": False}), "p")
    last = {f"{OWN}.sample.vae_batch_statistics": True, f"{OWN}.sample.count": 101, f"{OWN}.sample.batch": 100}
    refused(shape | last, "own.sample.batch: batch norm has no statistics of a batch of one image")


def test_nothing_is_said_of_sets_whose_counts_are_not_known():
    parse(Params, changed({f"{OWN}.evaluate.images": 10**6, f"{OWN}.train.batch": 10**5}), "params.yaml")


MNIST = RAW["models"]["mnist"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        *(({f"models.{rule}": MNIST}, f"models.{rule}: the workflow has a rule or file of this name") for rule in
          ("all", "data", "sample", "train_lsgm", "ablations_of_mnist_demo", "run")),
        ({"ablations.evaluate": RAW["ablations"]["solvers"]}, "ablations.evaluate: the workflow has a rule or file"),
        ({"models.MNIST": MNIST}, "mnist and MNIST differ in upper and lower case alone"),
        ({"datasets.Mine": RAW["datasets"]["mine"]}, "datasets: mine and Mine differ in upper and lower case alone"),
        ({f"models.{'x' * 201}": MNIST}, "models.x{100}: expected String should have at most 200 characters"),
        ({"models.two words": MNIST}, "models.two words: expected a name of letters, digits and _ that begins with a"),
        ({"models.a\nb": MNIST}, r"models.a\\nb: expected a name of letters"),
        ({"run": ["mnist", "mnist"]}, "run: names 'mnist' 2 times; once is enough"),
        ({"run": [True]}, "run.0: expected a valid string, found True; YAML reads"),
    ],
)  # fmt: skip
def test_names(changes, message):
    refused(changes, message)


def test_the_rules_of_the_workflow_are_known():
    files = [ROOT / "Snakefile", *(ROOT / "workflow/rules").glob("*.smk")]
    assert {
        name for file in files for name in re.findall(r"^(?:rule|checkpoint) (\w+):", file.read_text(), re.M)
    } == set(RULES)


def test_the_shapes_of_extractors_are_known():
    for name in registry.EXTRACTORS.ours:
        assert extractor(name).image_shape == registry.EXTRACTORS.entry(name).image_shape


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("", "is empty; expected a folder or file, or null to download"),
        (" ", "is empty"),
        ("~nobody_of_this_name/x", "~nobody_of_this_name: there is no such user; write the full path"),
        ("a\0b", r"holds a NUL character: 'a\\x00b'"),
        ("x" * 256, "is longer than a path may be"),
        ("a/" * 3000, "is longer than a path may be"),
        (3, "expected a valid string, found 3"),
    ],
)
def test_paths(path, message):
    refused({"datasets.mine.path": path}, f"datasets.mine.path: {message}")


@pytest.mark.parametrize("path", ["~/x", "{a}", 'it\'s a "name" with $HOME', "häuser", None])
def test_paths_that_may_be(path):
    assert DatasetConfig(path=path).path == path


def test_several_mistakes_have_a_line_each_and_not_without_end():
    wrong = {f"{DEMO}.train.batch": 63, f"{DEMO}.train.accumulate": 2, f"{OWN}.vae.likelihood": "bernoulli"}
    with pytest.raises(ConfigError) as caught:
        parse(Params, changed(wrong), "params.yaml")
    assert [line.split(": ")[1] for line in str(caught.value).splitlines()] == [f"{DEMO}.train.batch",
                                                                               f"{OWN}.vae.likelihood"]  # fmt: skip
    with pytest.raises(ConfigError) as caught:
        parse(Params, changed({f"{DEMO}.train.key{i}": 1 for i in range(50)}), "params.yaml")
    assert str(caught.value).splitlines()[20:] == ["params.yaml: there are more mistakes; fix these first"]


def test_long_values_and_keys_are_cut():
    refused({f"{DEMO}.vae.arch": "x" * 10**6}, r"vae.arch: expected .*, found 'x{90,100}[.]{3}$")
    refused({f"{DEMO}.train.{'y' * 10**6}": [1] * 10**6}, r"train.y{100}: unknown key .its value is \[1, ")


NOT_FINITE = b"""{"model": "m", "dataset": "d",
  "vae": {"backbone": "conv", "channels": 1, "channel_mult": [1, 1], "latents": 1},
  "pretrain": {"epochs": NaN, "batch": 1, "kl_max_coeff": 1, "kl_anneal_portion": 1, "spectral_reg": 0}}"""


def test_a_grid_of_a_million_cells_is_refused_before_it_is_made():
    axes = {f"axis {i}": {f"{j}": {} for j in range(10)} for i in range(6)}
    started, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    grid = RAW["ablations"]["end_to_end"] | {"axes": axes, "seeds": [1]}
    refused(
        {"ablations.end_to_end": grid}, "ablations: 1,000,.* cells in all, most of them in end_to_end, expected at m"
    )
    endless = grid | {"axes": {f"axis {i}": {"a": {}, "b": {}} for i in range(5000)}}
    refused({"ablations.end_to_end": endless}, "expected at most 10,000")
    assert time.process_time() - started < 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff{}", "is not a UTF-8 text file"),
        (b"[" * 100_000, "is not valid JSON .nested too deeply"),
        (NOT_FINITE, "pretrain.epochs: expected a finite number, found nan"),
        (b"3", "the whole file: expected"),
    ],
)  # fmt: skip
def test_damaged_frozen_configurations(content, message, tmp_path):
    (tmp_path / "stage.json").write_bytes(content)
    with pytest.raises(ConfigError, match=f"stage.json: {message}") as caught:
        load_stage(PretrainStage, tmp_path / "stage.json")
    assert "\n" not in str(caught.value)
