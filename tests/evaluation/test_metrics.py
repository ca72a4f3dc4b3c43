"""metrics.json: one schema describes the committed files completely, and reads those of before."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path

import pytest

from lsgm.evaluation.metrics import Metrics, read_metrics
from lsgm.evaluation.samples import Sampling
from lsgm.files import to_json
from lsgm.model import SampleInfo

from .test_tables import METRICS

FILES = sorted((Path(__file__).parents[2] / "results" / "models").glob("*/metrics.json"))
RENAMED = {'"floor_images":': '"real_vs_real_images":', '"floor":': '"real_vs_real":'}


def test_there_are_committed_files() -> None:
    assert FILES


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.parent.name)
def test_what_is_read_is_written_again_byte_for_byte(path: Path) -> None:
    """So no key is left out of the schema; the renamed ones have their new names."""
    text = path.read_text()
    for old, new in RENAMED.items():
        text = text.replace(old, new)
    assert to_json(read_metrics(path).written(), indent=2) + "\n" == text


def test_old_and_new_names_are_read() -> None:
    new, old = copy.deepcopy(METRICS), copy.deepcopy(METRICS)
    for key in ("", "_images"):
        old["fidelity"][f"floor{key}"] = old["fidelity"].pop(f"real_vs_real{key}")
    assert Metrics.model_validate(old) == Metrics.model_validate(new)


def test_order_of_keys_with_further_estimators_and_several_samples() -> None:
    given = copy.deepcopy(METRICS)
    nelbo = given["nelbo"]
    nelbo["lsgm"] |= {"iw_samples": 2, "iw_bound": None, "iw_stderr": 1.0}
    nelbo["lsgm_discretized"] = nelbo["lsgm"]
    found = json.loads(to_json(Metrics.model_validate(given).written()))
    priors = ["vae", "lsgm", "lsgm_discretized", "lsgm_with_normal_prior"]
    assert list(found["nelbo"]) == ["unit", "images", *priors, "gain"]
    assert found["nelbo"]["lsgm"]["iw_bound"] is None and "iw_bound" not in found["nelbo"]["vae"]
    assert found == given


def test_sampling_begins_with_what_the_model_says_of_its_sampling() -> None:
    names = [field.name for field in dataclasses.fields(SampleInfo)]
    assert list(Sampling.model_fields)[: len(names)] == names
