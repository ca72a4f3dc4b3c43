"""Grids: the cells they stand for, what these share, and what is said of a wrong one."""

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from lsgm.config import ConfigError, SampleConfig
from lsgm.config.mistakes import parse
from lsgm.config.stages import TabulateStage
from lsgm.params import Params, load_params
from lsgm.params.params import SHARED

PARAMS = Path(__file__).parents[1] / "params.yaml"
TINY = yaml.safe_load((Path(__file__).parent / "workflow/tiny.yaml").read_text())
GRID = {
    "title": "A grid",
    "base": "tiny",
    "set": {"train.epochs": 0.02, "prior.drop_inactive": {"batches": 3}},
    "axes": {
        "weighting": {"ll": {}, "un": {"train.p_weighting": "un"}},
        "samples": {"shared": {}, "own, joint": {"train.algorithm": 2, "train.q_pass": "joint"}},
    },
    "seeds": [1, 2],
}


def params(**changes):
    raw = copy.deepcopy(TINY)
    raw["ablations"] = {"grid": copy.deepcopy(GRID) | changes}
    return parse(Params, raw, "params.yaml")


def test_a_grid_is_every_combination_with_every_seed():
    found = params()
    cells = found.cells("grid")
    assert [cell.name for cell in cells[:4]] == [
        "grid_ll_shared_seed1", "grid_ll_shared_seed2", "grid_ll_own_joint_seed1", "grid_ll_own_joint_seed2",
    ]  # fmt: skip
    assert len(cells) == 8 and cells[2].labels == {"weighting": "ll", "samples": "own, joint"}
    model, base = cells[7].model, found.models["tiny"]
    assert (model.train.p_weighting, model.train.algorithm, model.train.q_pass) == ("un", 2, "joint")
    assert (model.train.seed, model.sample.seed, model.pretrain.seed) == (2, 2, 1)
    assert (model.train.epochs, model.prior.drop_inactive.batches) == (0.02, 3)
    assert (model.vae, model.pretrain, model.sde) == (base.vae, base.pretrain, base.sde)
    assert base.train.epochs == 0.01


def test_a_combination_that_fits_no_algorithm_is_marked():
    found = params()
    invalid = [cell for cell in found.cells("grid") if cell.model is None]
    assert [cell.labels for cell in invalid] == [{"weighting": "un", "samples": "shared"}] * 2
    assert "must then be 'll', not 'un'" in invalid[0].invalid and invalid[0].invalid.startswith("train: algorithm")
    assert len(found.members("grid")) == 6 and "grid_un_shared_seed1" not in found.all_models
    frozen = found.freeze("tabulate", "grid", "abc")
    assert parse(TabulateStage, frozen.model_dump(), "test") == frozen
    assert len(frozen.cells) == 8 and frozen.models == found.members("grid")
    assert [cell.invalid is None for cell in frozen.cells].count(False) == 2


def test_a_combination_that_fits_no_shape_or_job_is_marked():
    axes = {
        "scales": {"1": {"prior.scales": 1}, "5": {"prior.scales": 5}},
        "parts": {"1": {}, "3": {"train.accumulate": 3}},
    }
    cells = params(axes=axes, seeds=[1]).cells("grid")
    assert [cell.invalid for cell in cells] == [
        None,
        "train.batch: expected a multiple of 3, which is processes (nodes x GPUs of resources.train: 1) x accumulate "
        "(3), found 32",
        "prior.scales: 5 scales need a latent size divisible by 16, not 8x8",
        f"{cells[2].invalid} and {cells[1].invalid}",
    ]


def test_what_has_the_same_settings_is_shared():
    axes = {"steps": {"3": {"sample.steps": 3}, "5": {"sample.steps": 5}}}
    found = params(axes=axes, set={}, seeds=[1])
    rough, same = found.members("grid")
    assert {what: found.canonical_model(what, rough) for what in SHARED} == {
        "vae": "tiny", "lsgm": "tiny", "vae_samples": "tiny", "lsgm_samples": rough, "nelbo": "tiny",
    }  # fmt: skip
    assert {found.canonical_model(what, same) for what in SHARED} == {"tiny"}
    found = params(seeds=[3])
    cells = found.members("grid")
    assert {found.canonical_model("vae", cell) for cell in cells} == {"tiny"}
    assert {found.canonical_model("vae_samples", cell) for cell in cells} == {cells[0]}
    for what in ("lsgm", "lsgm_samples", "nelbo"):
        assert [found.canonical_model(what, cell) for cell in cells] == cells


def test_a_seed_of_the_pretraining_makes_another_vae():
    found = params(axes={"vae": {"one": {}, "two": {"pretrain.seed": 2}}}, seeds=[1])
    assert [found.canonical_model("vae", cell) for cell in found.members("grid")] == ["tiny", "grid_two_seed1"]


def test_a_vae_of_another_model_belongs_to_it():
    found = load_params(PARAMS)
    qualitative, joint = "celebahq256_qualitative", "celebahq256_qualitative_joint"
    assert [found.canonical_model(what, qualitative) for what in ("vae", "vae_samples", "lsgm")] == [
        joint,
        joint,
        qualitative,
    ]


def test_run_names_models_and_ablations():
    raw = copy.deepcopy(TINY) | {"run": ["tiny", "grid"], "ablations": {"grid": GRID}}
    found = parse(Params, raw, "params.yaml")
    assert found.table_models == ["tiny"] and found.selected_models == ["tiny", *found.members("grid")]
    with pytest.raises(ConfigError, match="run: name a model too; an ablation alone is made by `snakemake grid`"):
        parse(Params, raw | {"run": ["grid"]}, "params.yaml")
    with pytest.raises(ConfigError, match="no model 'gird'; the models are tiny, the ablations grid"):
        parse(Params, raw | {"run": ["gird"]}, "params.yaml")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"axes": {"a": {"x": {"train.p_weigthing": "un"}}}},
         "ablations.grid.axes.a.x: train.p_weigthing: no setting of a model; did you mean 'train.p_weighting'"),
        ({"axes": {"a": {"x": {"p_weighting": "un"}}}}, "a.x: p_weighting: .* did you mean 'train.p_weighting'"),
        ({"set": {"qqq": 1}}, "ablations.grid.set: qqq: no setting of a model; it begins with one of dataset, vae"),
        ({"axes": {"a": {"x": {"train.p_weighting": "best"}}}},
         "ablations.grid.axes.a.x: train.p_weighting: expected 'll', 'un'.*found 'best'"),
        ({"set": {"prior.drop_inactive": {"bathces": 3}}}, "grid.set: .*bathces: unknown key .*did you mean 'batches'"),
        ({"axes": {"a": {"x y": {}, "x-y": {}}}}, "two cells or models are called grid_x_y_seed1"),
        ({"axes": {"a": {"x": {"train.p_weighting": "un"}}}}, "none of its cells is a model: train: algorithm"),
        ({"base": "tyni"}, "ablations.grid.base: 'tyni': the models are tiny"),
        ({"columns": ["sample"]}, "there is no axis 'sample'; the axes are weighting, samples"),
        ({"columns": ["weighting", "samples"]}, "columns: leave an axis for the rows"),
        ({"set": {"dataset": "cifar10"}}, "dataset and vae_of are those of the base tiny"),
        ({"axes": {"seed": {"x": {}}}}, "'seed' is a column of the table already; give the axis another name"),
        ({"axes": {"a": {"x|y": {}}}}, "'x|y': a name must not contain"),
        ({"axes": {"a": {"x": {"prior.channels": 8}}, "b": {"y": {"prior": {}}}}},
         "both 'a' and 'b' set prior.channels; make them one axis"),
        ({"set": {"train.seed": 3}}, "train.seed: is set for each of `seeds`; name them there"),
        ({"axes": {"a": {"x": {"resources.train.cpus": 1}}}}, "resources.train.cpus: changes no result"),
        ({"axis": {}}, "ablations.grid.axis: unknown key .* did you mean 'axes'"),
        ({"axes": {"a": {"x": {"train.ema": float("nan")}}}}, "a.x: train.ema: expected a finite number, found nan"),
        ({"axes": {"a": {"x": {"train.ema": True}, "y": {}}}}, "axes.a.x: train.ema: expected a number, found True"),
        ({"axes": {"a": {"x": {"prior.channels": 2}, "y": {}}}}, "a.x: prior.channels: expected greater than or equal"),
        ({"axes": {"a": {4: {}}}}, "ablations.grid.axes.a.4: expected a valid string, found 4"),
        ({"axes": {"a": {"": {}}}}, "axes: '': a name is one line of text, which is not empty"),
        ({"axes": {"a": {"x\ny": {}}}}, r"axes: 'x\\ny': a name is one line of text"),
        ({"axes": {"a": {"x" * 190: {}}}}, "a cell's name is 201 characters long, expected at most 200"),
        ({"axes": {"a": {"X": {}, "x": {}}}, "seeds": [1]}, "grid_X_seed1 and grid_x_seed1 differ in upper and"),
        ({"axes": {"a": {"x": {"evaluate.images": 20000}, "y": {}}}, "seeds": [1, 2]},
         "ablations.grid: grid_x_seed1: evaluate.images: mnist has 10000 test images, not 20000"),
        ({"seeds": [1, 2, 1]}, "ablations.grid: seeds: 1 stands there more than once"),
        ({"seeds": [-1]}, "ablations.grid.seeds.0: expected 0 to 9223372036854775807, found -1"),
        ({"columns": ["weighting"] * 2, "axes": GRID["axes"] | {"b": {"x": {}}}}, "columns: 'weighting' stands there"),
        ({"set": {"vae.backbone": "resnet", "vae.channels": 4}}, "grid.set: vae.backbone: expected 'nvae' or 'conv'"),
        ({"set": {"a\nb": 4}}, r"grid.set: a\\nb: no setting of a model"),
        ({"axes": {"a": {"x": {"prior.scales": 5}}}}, "none of its cells is a model: prior.scales: 5 scales need"),
    ],
)  # fmt: skip
def test_a_mistake_in_a_grid_is_explained(changes, message):
    with pytest.raises(ConfigError, match=message) as caught:
        params(**changes)
    assert "\n" not in str(caught.value)


SAMPLERS: dict[str, dict[str, Any]] = {
    "velocity AB2": {"solver": "ab", "form": "velocity", "order": 2},
    "DDIM": {"solver": "ddim"},
    "DPM-Solver++(2M)": {"solver": "dpmpp_2m"},
    "DEIS": {"solver": "deis"},
    "UniPC": {"solver": "dpmpp_2m", "corrector": True},
    "data AB2 with noise": {"solver": "dpmpp_2m", "tau": 0.5},
    "EDM": {"solver": "edm"},
    "Heun": {"solver": "heun"},
    "rk45": {"solver": "rk45"},
    "adaptive SDE": {"solver": "adaptive_sde"},
    "ancestral": {"solver": "ancestral"},
}


def test_the_papers_ablations_are_declared_at_two_scales():
    found = load_params(PARAMS)
    assert {grid.base for grid in found.ablations.values()} == {"mnist_demo", "mnist_small"}
    assert len(found.ablations) == 10
    cells = found.cells("sde_weighting")
    assert len(cells) == 36 and sum(cell.invalid is not None for cell in cells) == 8
    demo = [m for name, g in found.ablations.items() if g.base == "mnist_demo" for m in found.members(name)]
    assert len({found.canonical_model("lsgm", model) for model in found.members("solvers")}) == 1
    assert len({found.canonical_model("lsgm", model) for model in demo}) == 38
    for cell in found.cells("solvers"):  # the labels say what they set, whatever the base has
        sample, label = found.all_models[cell.name].sample, cell.labels["sampler"]
        kind, number = label.removesuffix(" steps").removeprefix("tol ").split(", ")
        given = SAMPLERS[kind] | ({"tol": float(number[4:])} if "tol" in number else {"steps": int(number)})
        stated = SampleConfig(count=sample.count, on_failure="record", batch=sample.batch, **given)
        assert sample.resolved() == stated.resolved()
    for model in map(found.all_models.get, [*demo, *found.members("small_backbones")]):
        if model.train != found.models["mnist_demo"].train:
            gives_up = {model.train.divergence.on_failure, model.sample.on_failure, model.evaluate.on_failure}
            assert gives_up == {"keep_last", "record"}
    for name in ("backbones", "small_backbones"):  # with VAEs of their own
        assert {found.all_models[cell].pretrain.divergence.on_failure for cell in found.members(name)} == {"keep_last"}


def test_models_on_different_data_share_nothing():
    raw = copy.deepcopy(TINY)
    tiny = raw["models"]["tiny"]
    raw["models"] |= {
        "other": tiny | {"dataset": "digits"},
        "strict": tiny | {"evaluate": tiny["evaluate"] | {"tol": 1e-4}},
    }
    raw["datasets"]["digits"] = {"images": {"size": 28, "channels": 1, "binary": True}, "path": "/x"}
    found = parse(Params, raw, "params.yaml")
    assert {found.canonical_model(what, "other") for what in SHARED} == {"other"}
    strict = {what: found.canonical_model(what, "strict") for what in SHARED}
    assert strict == dict.fromkeys(SHARED, "tiny") | {"nelbo": "strict"}
