"""A wrong configuration is refused with the key's path, its value and what was expected."""

import copy
from pathlib import Path

import pytest
import yaml

from lsgm.config import ConfigError
from lsgm.config.mistakes import parse
from lsgm.config.stages import PretrainStage, load_stage
from lsgm.params import Params, load_params, presets

PARAMS = Path(__file__).parents[1] / "params.yaml"
RAW = yaml.safe_load(PARAMS.read_text())
RAW["models"] = {name: {**model, "extends": None} for name, model in presets.resolve(RAW["models"]).items()}


def changed(path, value):
    raw = copy.deepcopy(RAW)
    *parents, last = path.split(".")
    section = raw
    for key in parents:
        section = section[key]
    section[last] = value
    return raw


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("models.mnist_demo.train.lr_pior", 1e-3, "models.mnist_demo.train.lr_pior: unknown key .* 'lr_prior'"),
        ("models.mnist_demo.train.epochs", "many", "models.mnist_demo.train.epochs: expected .*number.* found 'many'"),
        ("models.mnist_demo.train.ema", 1.5, "models.mnist_demo.train.ema: expected .*less than 1.* found 1.5"),
        ("models.mnist_demo.train.kl_anneal.strt", 1, "kl_anneal.strt: unknown key .* 'start'"),
        ("models.mnist_demo.vae.arch", "resnet", "vae.arch: expected .*'res_bnswish'.* found 'resnet'"),
        ("models.mnist_demo.vae.channel_mult", [1], "models.mnist_demo.vae: channel_mult: expected 4 entries"),
        ("models.mnist_demo.sde.time_eps", 0, "models.mnist_demo.sde: the weights diverge at t = 0"),
        ("models.mnist_demo.evaluate.images", 0, "evaluate.images: expected .*greater than or equal to 1, found 0"),
        (
            "models.mnist_demo.resources.sample.gpus",
            2,
            "mnist_demo.resources: sample: runs as one process, which uses one node",
        ),
        ("run", ["mnist_demoo"], "run: there is no model 'mnist_demoo'; the models are mnist_demo"),
        (
            "datasets.mnistt",
            {},
            "datasets.mnistt: is no known dataset .did you mean 'mnist'.*a set of your own needs path",
        ),
        ("datasets.mine", {"images": {"size": 64}}, "datasets.mine.path: missing; the folder, zip or LMDB"),
        ("datasets.mine", {"path": "x", "images": {}}, "datasets.mine.images.size: missing"),
        ("datasets.mine", {"path": "x", "images": {"size": 64, "split": 2}}, "mine.images.split: expected less than 1"),
        ("datasets.mnist.images", {"size": 64}, "datasets.mnist.images: how this dataset is read is known"),
        ("models.mnist_demo.dataset", "mine", "models.mnist_demo.dataset: 'mine' is missing under datasets"),
        ("modles", {}, "modles: unknown key .* did you mean 'models'"),
    ],
)
def test_a_mistake_is_explained(path, value, message):
    with pytest.raises(ConfigError, match=message) as caught:
        parse(Params, changed(path, value), "params.yaml")
    assert str(caught.value).startswith("params.yaml: ") and "\n" not in str(caught.value)


def test_a_missing_key_is_named():
    raw = copy.deepcopy(RAW)
    del raw["models"]["mnist_demo"]["train"]["batch"]
    with pytest.raises(ConfigError, match="models.mnist_demo.train.batch: missing"):
        parse(Params, raw, "params.yaml")


def test_all_mistakes_are_named_at_once():
    raw = changed("models.mnist_demo.train.epochs", -1)
    raw["models"]["mnist_demo"]["sample"]["tol"] = 0
    with pytest.raises(ConfigError) as caught:
        parse(Params, raw, "params.yaml")
    assert len(str(caught.value).splitlines()) == 2


def test_unreadable_files(tmp_path):
    with pytest.raises(ConfigError, match=r"none.yaml: cannot be read \(No such file"):
        load_params(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(ConfigError, match=r"bad.yaml: is not valid YAML"):
        load_params(tmp_path / "bad.yaml")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(ConfigError, match=r"bad.json: is not valid JSON"):
        load_stage(PretrainStage, tmp_path / "bad.json")


def test_a_frozen_configuration_holds_its_stage_and_no_more(tmp_path):
    params = load_params(PARAMS)
    stage = params.freeze("pretrain", "mnist_demo", code="abc")
    (tmp_path / "stage.json").write_text(stage.model_dump_json())
    assert load_stage(PretrainStage, tmp_path / "stage.json") == stage
    others = [("train.lr_prior", 9.0), ("prior.dropout", 0.5), ("sample.tol", 1.0), ("evaluate.images", 7)]
    for path, value in [*others, ("resources.pretrain.gpus", 8)]:
        other = parse(Params, changed(f"models.mnist_demo.{path}", value), "p")
        assert other.freeze("pretrain", "mnist_demo", code="abc") == stage
    samples = {"images": 3, "extractor": "inception", "cross_check": True}
    for stage_name, same in (("nelbo", False), ("evaluate", False), ("train", True)):
        other = parse(Params, changed("models.mnist_demo.evaluate", samples), "p")
        assert (other.freeze(stage_name, "mnist_demo") == params.freeze(stage_name, "mnist_demo")) == same
    for path, value in [("evaluate.extractor", "inception"), ("resources.evaluate.jobs", 4)]:
        other = parse(Params, changed(f"models.mnist_demo.{path}", value), "p")
        assert other.freeze("nelbo", "mnist_demo") == params.freeze("nelbo", "mnist_demo")
    found = params.freeze("statistics", "mnist.mnist_classifier")
    assert (found.dataset, found.extractor) == ("mnist", "mnist_classifier")
    other = parse(Params, changed("models.mnist_demo.pretrain.lr", 9.0), "p")
    assert other.freeze("pretrain", "mnist_demo", code="abc") != stage
    with pytest.raises(ConfigError, match="stage: expected 'pretrain', found 'train'"):
        (tmp_path / "train.json").write_text(params.freeze("train", "mnist_demo").model_dump_json())
        load_stage(PretrainStage, tmp_path / "train.json")


@pytest.mark.parametrize(
    ("model", "pretrain", "train"),
    [
        ("cifar10_best_fid", 8, 16),
        ("cifar10_balanced", 8, 16),
        ("cifar10_best_nll", 4, 16),
        ("mnist", 2, 4),
        ("omniglot", 2, 4),
        ("celebahq256_quantitative", 16, 16),
        ("celebahq256_qualitative_joint", 16, 16),
        ("celebahq256_qualitative", None, 16),
    ],
)
def test_the_papers_models_ask_for_the_papers_gpus(model, pretrain, train):
    """Which can share a batch."""
    model = load_params(PARAMS).models[model]
    for schedule, job, gpus in (
        (model.pretrain, model.resources.pretrain, pretrain),
        (model.train, model.resources.train, train),
    ):
        if schedule is not None:
            assert job.nodes * job.gpus == gpus
            assert schedule.batch % gpus == 0


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("sample.solver", "ancestral"),
        ("evaluate.estimator", "discretized"),
        ("evaluate.extra_estimators", ["discretized"]),
    ],
)
def test_discretized_diffusions_must_preserve_variance(key, value):
    raw = changed(f"models.mnist_demo.{key}", value)
    parse(Params, raw, "params.yaml")
    raw["models"]["mnist_demo"]["sde"]["name"] = "sub_vpsde"
    with pytest.raises(ConfigError, match=f"{key}: '(ancestral|discretized)' needs sde.name vpsde or geometric_vpsde"):
        parse(Params, raw, "params.yaml")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("extra_estimators", ["ode"], r"evaluate: extra_estimators: \['ode'\] with estimator: ode names one twice"),
        (
            "cross_check",
            True,
            "evaluate: cross_check: compares two FIDs, which needs extractor: inception, not mnist_cl",
        ),
        ("images", 10001, "models.mnist_demo.evaluate.images: mnist has 10000 test images, not 10001; null stands for"),
    ],
)
def test_what_an_evaluation_cannot_do(key, value, message):
    with pytest.raises(ConfigError, match=message):
        parse(Params, changed(f"models.mnist_demo.evaluate.{key}", value), "params.yaml")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vae": None}, "models.celebahq256_qualitative_joint: a model needs either .* this one has pretrain"),
        ({"vae_of": "mnist_demo"}, "either vae and pretrain, or vae_of .* this one has vae and pretrain and vae_of"),
        ({"vae": None, "pretrain": None}, "this one has none of them"),
        (
            {"vae": None, "pretrain": None, "vae_of": "celebahq256_qualitative"},
            "vae_of: 'celebahq256_qualitative_joint': is a circle|vae_of: 'celebahq256_qualitative': is a circle",
        ),
        ({"vae": None, "pretrain": None, "vae_of": "mnist_demo"}, "'mnist_demo' is a model of another dataset"),
        ({"vae": None, "pretrain": None, "vae_of": "other"}, "vae_of: 'other': the models are mnist_demo"),
    ],
)
def test_a_model_has_one_vae(changes, message):
    raw = copy.deepcopy(RAW)
    section = raw["models"]["celebahq256_qualitative_joint"]
    section.update(changes)
    with pytest.raises(ConfigError, match=message):
        parse(Params, {**raw, "models": {k: {a: b for a, b in m.items() if b is not None} for k, m in
                                         raw["models"].items()}}, "params.yaml")  # fmt: skip


def test_a_lineage_starts_where_the_vae_is_pretrained():
    params = load_params(PARAMS)
    assert params.lineage("celebahq256_qualitative") == ["celebahq256_qualitative_joint", "celebahq256_qualitative"]
    assert params.lineage("mnist") == ["mnist"]
    assert params.vae("celebahq256_qualitative") == params.models["celebahq256_qualitative_joint"].vae
    with pytest.raises(ConfigError, match="has no VAE to pretrain, it takes that of celebahq256_qualitative_joint"):
        params.freeze("pretrain", "celebahq256_qualitative")


def test_a_key_of_another_backbone_is_explained():
    with pytest.raises(
        ConfigError, match=r"mnist_demo_conv.vae.arch: unknown key .*the keys here are backbone, likelihood"
    ):
        parse(Params, changed("models.mnist_demo_conv.vae.arch", "res_mbconv"), "params.yaml")
    with pytest.raises(ConfigError, match="mnist_demo.vae.chanels: unknown key .* did you mean 'channels'"):
        parse(Params, changed("models.mnist_demo.vae.chanels", 3), "params.yaml")
    with pytest.raises(ConfigError, match="mnist_demo.vae.backbone: expected 'nvae' or 'conv', found 'resnet'"):
        parse(Params, changed("models.mnist_demo.vae.backbone", "resnet"), "params.yaml")
