"""Models that extend others, and old names of keys."""

from __future__ import annotations

import copy
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import yaml

from lsgm.config import ConfigError, DivergenceConfig, EvaluateConfig, SampleConfig, TrainConfig
from lsgm.config.section import _announce
from lsgm.describe import settings
from lsgm.params import load_params
from lsgm.params.presets import merged, resolve

ROOT = Path(__file__).parents[1]
TINY = yaml.safe_load((ROOT / "tests" / "workflow" / "tiny.yaml").read_text())
PUBLISHED = json.loads((ROOT / "tests" / "paper_models.json").read_text())


def written(folder: Path, **models: Any) -> Path:
    raw = copy.deepcopy(TINY)
    raw["models"] |= models
    path = folder / "params.yaml"
    path.write_text(yaml.safe_dump(raw, sort_keys=False))
    return path


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_models_of_the_paper_have_the_published_settings(name: str) -> None:
    model = load_params(ROOT / "params.yaml").models[name]
    found = model.model_dump(mode="json", exclude={"resources", "extends"})
    assert found | {"sample": model.sample.resolved().model_dump(mode="json")} == PUBLISHED[name]


def test_the_file_is_short() -> None:
    assert max(map(len, (ROOT / "params.yaml").read_text().splitlines())) <= 120


@pytest.mark.parametrize(
    ("base", "own", "expected"),
    [
        ({"a": {"b": 1, "c": 2}}, {"a": {"c": 3}}, {"a": {"b": 1, "c": 3}}),
        ({"a": {"b": {"c": 1, "d": 2}}}, {"a": {"b": {"d": 3}}}, {"a": {"b": {"c": 1, "d": 3}}}),
        ({"a": [1, 2, 3]}, {"a": [4]}, {"a": [4]}),
        ({"a": {"b": 1}}, {"a": None}, {"a": None}),
        ({"a": None}, {"a": {"b": 1}}, {"a": {"b": 1}}),
        ({"vae": {"arch": "x", "channels": 8}}, {"vae": {"backbone": "conv"}}, {"vae": {"backbone": "conv"}}),
        ({"vae": {"arch": "x"}}, {"vae": {"backbone": "nvae"}}, {"vae": {"arch": "x", "backbone": "nvae"}}),
        ({"sde": {"beta_end": 10}}, {"sde": {"name": "vesde"}}, {"sde": {"beta_end": 10, "name": "vesde"}}),
    ],
)  # fmt: skip
def test_sections_are_merged_and_the_rest_is_replaced(base: Any, own: Any, expected: Any) -> None:
    before = copy.deepcopy((base, own))
    assert merged(base, own) == expected
    assert (base, own) == before


def test_a_chain_of_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(
        tmp_path,
        first={"extends": "second", "train": {"ema": 0.5}, "vae": {"channel_mult": [1, 1, 2]}},
        second={"extends": "tiny", "train": {"ema": 0.7, "time_samples": 3}},
    )
    models = load_params(path).models
    assert (models["first"].train.ema, models["first"].train.time_samples, models["tiny"].train.ema) == (0.5, 3, 0.9)
    assert models["first"].vae is not None and models["first"].vae.channel_mult == [1, 1, 2]  # type: ignore[attr-defined]
    assert models["first"].prior == models["tiny"].prior
    monkeypatch.chdir(tmp_path)
    found = yaml.safe_load(settings("first"))
    assert "extends" not in found and found["train"]["time_samples"] == 3 and found["train"]["lr_vae"] == 1e-4
    alone = written(tmp_path, first=found, second={"extends": "tiny"})
    assert load_params(alone).models["first"] == models["first"].model_copy(update={"extends": None})


@pytest.mark.parametrize(
    ("models", "message"),
    [
        ({"a": {"extends": "tinny"}}, r"models\.a\.extends: there is no model 'tinny'; did you mean 'tiny'\?"),
        ({"a": {"extends": 3}}, r"models\.a\.extends: there is no model 3"),
        ({"a": {"extends": "a"}}, r"models\.a\.extends: is a circle \(a -> a\)"),
        ({"a": {"extends": "b"}, "b": {"extends": "a"}}, r"extends: is a circle \(a -> b -> a\)"),
        ({"a": {"extends": "tiny", "train": {"emma": 1}}}, r"models\.a\.train\.emma: unknown key .* mean 'ema'"),
    ],
)
def test_mistakes(tmp_path: Path, models: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load_params(written(tmp_path, **models))
    assert "\n" not in str(caught.value)


def test_an_inherited_mistake_is_told_once_where_it_stands(tmp_path: Path) -> None:
    tiny = copy.deepcopy(TINY["models"]["tiny"])
    tiny["train"]["ema"] = 2
    path = written(tmp_path, tiny=tiny, a={"extends": "tiny"}, b={"extends": "a"})
    line = path.read_text().split("\n").index("      ema: 2") + 1
    with pytest.raises(ConfigError, match=rf"models\.tiny\.train\.ema: .* found 2 \(line {line}\)$") as caught:
        load_params(path)
    assert "\n" not in str(caught.value)


OLD = [
    (TrainConfig, {"q_samples": "own"}, "algorithm", 2),
    (TrainConfig, {"q_samples": "reweighted"}, "algorithm", 3),
    (TrainConfig, {"draws": 4}, "time_samples", 4),
    (TrainConfig, {"recompute": True}, "activation_checkpointing", True),
    (TrainConfig, {"look_epochs": 2}, "eval_every_epochs", 2),
    (TrainConfig, {"look_images": 5}, "eval_images", 5),
    (TrainConfig, {"state_minutes": 3}, "checkpoint_minutes", 3),
    (TrainConfig, {"rescue": {"bad_steps": 4}}, "divergence", DivergenceConfig(skip_limit=4)),
    (TrainConfig, {"rescue": {"tries": 1}}, "divergence", DivergenceConfig(max_restarts=1)),
    (TrainConfig, {"rescue": {"give_up": "record"}}, "divergence", DivergenceConfig(on_failure="keep_last")),
    (SampleConfig, {"variances": "posterior"}, "variance", "fixed_small"),
    (SampleConfig, {"give_up": "fail"}, "on_failure", "error"),
    (EvaluateConfig, {"estimator": "discretised"}, "estimator", "discretized"),
    (EvaluateConfig, {"further_estimators": ["discretised"]}, "extra_estimators", ["discretized"]),
]
NEEDED = {
    TrainConfig: {"epochs": 1, "batch": 8},
    SampleConfig: {"count": 1},
    EvaluateConfig: {"images": 1, "extractor": None},
}


@pytest.mark.parametrize(("kind", "old", "key", "value"), OLD)
def test_an_old_name_is_read_and_the_new_one_named(
    kind: Any, old: dict[str, Any], key: str, value: Any, caplog: pytest.LogCaptureFixture
) -> None:
    _announce.cache_clear()
    with caplog.at_level(logging.WARNING, "lsgm"):
        found = kind.model_validate({**NEEDED[kind], **old})
    assert getattr(found, key) == value
    names = [record.getMessage() for record in caplog.records if next(iter(old)) in record.getMessage()]
    assert len(names) == 1 and key in names[0]


def test_old_names_in_a_grid(tmp_path: Path) -> None:
    raw = copy.deepcopy(TINY)
    grid = {
        "title": "t",
        "base": "tiny",
        "set": {"train.rescue.give_up": "record", "train.draws": 2},
        "axes": {"algorithm": {"1": {}, "3": {"train.q_samples": "reweighted"}}},
    }
    raw["ablations"] = {"grid": grid}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(raw))
    cells = load_params(tmp_path / "params.yaml").cells("grid")
    trains = [cell.model.train for cell in cells if cell.model is not None]
    assert [train.algorithm for train in trains] == [1, 3]
    assert {(train.time_samples, train.divergence.on_failure) for train in trains} == {(2, "keep_last")}


def test_resolving_leaves_what_it_was_given() -> None:
    models = {"a": {"x": {"y": 1}}, "b": {"extends": "a", "x": {"z": 2}}}
    assert resolve(models)["b"]["x"] == {"y": 1, "z": 2} and models["b"]["x"] == {"z": 2}
