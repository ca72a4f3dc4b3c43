"""The paper's models, narrower and shallower but of the same kind, trained for a few steps on images of their size.

Smaller here: 4 channels in the VAE and 8 in the prior in place of 64 to 512, one cell or block where there are several,
two groups per scale, three latent channels per group; two steps of two images. Everything else is the recipe's: scales,
likelihood, flows, input pyramid, diffusion, weighting, algorithm, three stages.
"""

import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import lsgm
from lsgm import checkpoint, cli
from lsgm.config import BlocksConfig, DatasetConfig, ResourcesConfig
from lsgm.config.model import ModelConfig
from lsgm.config.stages import PrepareStage, PretrainStage, TrainStage
from lsgm.data import prepare, registry, store
from lsgm.data.originals import read_source
from lsgm.errors import LSGMError
from lsgm.evaluation.extractors import extractor as find_extractor
from lsgm.evaluation.tables import tabulate
from lsgm.params import Params, load_params
from lsgm.training.pretrain import pretrain
from lsgm.training.train import train

CPU = torch.device("cpu")
FULL = load_params(Path(__file__).parents[1] / "params.yaml")
PAPER = [name for name in FULL.models if not name.startswith("mnist_demo")]


def slim(params: Params) -> Params:
    schedule = {"epochs": 1, "batch": 2, "warmup_epochs": 0, "lr_schedule": "iteration"}
    models = {}
    for name, model in params.models.items():
        update = {}
        if model.vae is not None and name in PAPER:
            small = {"channels": 4, "groups_per_scale": 2, "latents_per_group": 3, "cells_per_cond": 1}
            blocks = {kind: BlocksConfig(blocks=model.vae.preprocess.blocks, cells=1) for kind in
                      ("preprocess", "postprocess")}  # fmt: skip
            update["vae"] = model.vae.model_copy(update={**small, **blocks})
            update["pretrain"] = model.pretrain.model_copy(update={**schedule, "activation_checkpointing": True})
        drop = model.prior.drop_inactive and model.prior.drop_inactive.model_copy(update={"batches": 1})
        small = {"channels": 8, "cells_per_scale": 1, "drop_inactive": drop}
        update["prior"] = model.prior.model_copy(update=small)
        update["train"] = model.train.model_copy(update=schedule)
        update["resources"] = ResourcesConfig()  # one process, for batches of two
        models[name] = model.model_copy(update=update)
    return with_models(params, models)


def with_models(params: Params, models: dict[str, ModelConfig]) -> Params:
    """Not by model_copy, which would keep what was found for the other models."""
    return Params(**{name: getattr(params, name) for name in Params.model_fields} | {"models": models})


SLIM = slim(FULL)


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """A prepared dataset of four random images in place of each of the paper's, by its name."""
    root = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)

    def get(name):
        out = root / name
        if not out.exists():
            dataset = registry.dataset(name)
            (root / f"{name}_arrays").mkdir()
            for split in ("train", "test"):
                images = rng.integers(0, 256, (4, *dataset.image_shape), dtype=np.uint8)
                np.save(root / f"{name}_arrays" / f"{split}_images.npy", images)
            prepare.build(dataset, out, root / f"{name}_arrays")
        return out

    return get


@pytest.fixture(scope="module")
def made(stores, tmp_path_factory):
    """The folder of a trained model, whose ancestors are made first."""
    root = tmp_path_factory.mktemp("models")

    def get(name):
        model, out = SLIM.models[name], root / name
        if not out.exists():
            data = stores(model.dataset)
            if model.vae_of is not None:
                start = get(model.vae_of)
            else:
                start = root / f"{name}_vae"
                stage = SLIM.freeze("pretrain", name)
                assert isinstance(stage, PretrainStage)
                pretrain(stage, data, start, CPU)
            stage = SLIM.freeze("train", name)
            assert isinstance(stage, TrainStage)
            train(stage, data, start, out, CPU)
        return out

    return get


@pytest.mark.parametrize("name", PAPER)
def test_every_recipe_trains_and_samples(name, made):
    folder = made(name)
    history = pd.read_csv(folder / "history.csv")
    looks = ["test_nelbo", "test_nfe", "sampling_nfe"]  # at the end alone
    assert len(history) and history.drop(columns=looks).map(math.isfinite).all(axis=None)
    assert history[looks].iloc[-1].map(math.isfinite).all()
    model, full = lsgm.load(folder), FULL.models[name]
    sample = full.sample.model_copy(update={"tol": 1e-1, "time_eps": 1e-2})
    x = model.sample(2, **sample.model_dump(exclude={"compile", "count", "batch", "on_failure"}))
    assert x.shape == (2, *registry.dataset(full.dataset).image_shape)
    assert torch.isfinite(x).all() and 0 <= x.min() < x.max() <= 1
    assert len(model.vae.lower_scale_shapes) == 2 * (FULL.vae(name).latent_scales - 1)


def test_the_third_stage_keeps_the_vae_of_the_second(made):
    joint = lsgm.load(made("celebahq256_qualitative_joint"))
    last = lsgm.load(made("celebahq256_qualitative"))
    state = last.vae.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in joint.vae.state_dict().items())
    assert type(joint.prior.sde) is not type(last.prior.sde)
    stages = checkpoint.stages(made("celebahq256_qualitative"))
    assert [(s["stage"], s["model"]) for s in stages] == [
        ("pretrain", "celebahq256_qualitative_joint"),
        ("train", "celebahq256_qualitative_joint"),
        ("train", "celebahq256_qualitative"),
    ]


def test_images_of_all_kinds_are_prepared_from_arrays(stores, tmp_path):
    found = store.ImageStore(stores("cifar10"), "cifar10")
    assert found.images("train").shape == (4, 3, 32, 32) and read_source(found.path)["kind"] == "arrays"
    found.verify()
    stage = PrepareStage(dataset="ffhq256", source=DatasetConfig(path=None))
    with pytest.raises(LSGMError, match=r"ffhq256: .*set datasets.ffhq256.path .*train_images.npy"):
        prepare.prepare(stage, tmp_path / "out")
    np.save(tmp_path / "train_images.npy", np.zeros((4, 32, 32, 3), np.uint8))
    stage = PrepareStage(dataset="cifar10", source=DatasetConfig(path=str(tmp_path)))
    with pytest.raises(LSGMError, match=r"expected uint8 \[N, 3, 32, 32\], found uint8 \[4, 32, 32, 3\]"):
        prepare.prepare(stage, tmp_path / "out")
    np.save(tmp_path / "train_images.npy", np.zeros((4, 3, 32, 32), np.uint8))
    with pytest.raises(LSGMError, match=r"test_images.npy: is missing"):
        prepare.prepare(stage, tmp_path / "out")


def test_a_model_whose_vae_comes_from_another_is_evaluated(made, stores, tmp_path):
    """Beside the VAE that all began with, without a Fréchet distance; by the commands that the workflow runs."""
    name, joint = "celebahq256_qualitative", "celebahq256_qualitative_joint"
    folder, vae = made(name), made(joint).with_name(f"{joint}_vae")
    full = SLIM.models[name]
    sample = full.sample.model_copy(update={"count": 3, "batch": 2, "tol": 1e-1, "time_eps": 1e-2})
    few = {"images": None, "batch": 2, "tol": 1e-1, "time_eps": 1e-2, "extractor": None, "cross_check": False}
    evaluate = full.evaluate.model_copy(update=few)
    model = full.model_copy(update={"sample": sample, "evaluate": evaluate})
    params = with_models(SLIM, {**SLIM.models, name: model})
    for stage in ("nelbo", "evaluate"):
        (tmp_path / f"{stage}.json").write_text(params.freeze(stage, name).model_dump_json())
    for kind in ("vae", "lsgm"):
        (tmp_path / f"sample_{kind}.json").write_text(params.freeze("sample", f"{kind}.{name}").model_dump_json())
    for kind, model_folder in (("vae", vae), ("lsgm", folder)):
        command = [
            "sample",
            "--config",
            tmp_path / f"sample_{kind}.json",
            "--model",
            model_folder,
            "--out",
            tmp_path / kind,
        ]
        assert cli.main([*map(str, command)]) == 0
        images = np.load(tmp_path / kind / "samples.npy")
        assert images.shape == (3, 3, 256, 256) and images.dtype == np.uint8 and len(np.unique(images)) > 2
    common = ["--data", stores("celebahq256"), "--model", folder, "--vae", vae]
    command = ["nelbo", "--config", tmp_path / "nelbo.json", *common, "--out", tmp_path / "nelbo"]
    assert cli.main([*map(str, command)]) == 0
    command = ["evaluate", "--config", tmp_path / "evaluate.json", *common, "--samples", tmp_path / "lsgm"]
    command += ["--vae-samples", tmp_path / "vae", "--nelbo", tmp_path / "nelbo", "--out", tmp_path / "m"]
    assert cli.main([*map(str, command)]) == 0
    metrics = json.loads((tmp_path / "m" / "metrics.json").read_text())
    assert (
        metrics["fidelity"] is None
        and metrics["nelbo"]["images"] == 4
        and math.isfinite(metrics["nelbo"]["lsgm"]["bpd"])
    )
    assert set(metrics["code"]) == {f"pretrain {joint}", f"train {joint}", "train", "sample", "nelbo", "evaluate"}
    before = metrics["training"]["lsgm"]["seconds_before"]
    assert before == checkpoint.read_config(made(joint)).training["seconds"] > 0
    tabulate([tmp_path / "m"], tmp_path / "tables")
    table = pd.read_csv(tmp_path / "tables" / "tables" / "comparison.csv")
    seconds = [metrics["training"][kind]["seconds"] for kind in ("vae", "lsgm")]
    assert table["training_s"].tolist()[2] == pytest.approx(sum(seconds) + before, abs=1e-3)


@pytest.mark.parametrize("name", FULL.models)
def test_what_the_evaluation_asks_for_can_be_had(name):
    """Images to evaluate on; FID as published, 50,000 samples, for all that the paper gives a FID of."""
    model = FULL.models[name]
    dataset = registry.dataset(model.dataset)
    assert (model.evaluate.images or 0) <= dataset.counts["test"]
    for extractor in model.evaluate.extractors:
        find_extractor(extractor).check(extractor, dataset.image_shape)
    if model.dataset in ("cifar10", "celebahq256") and name != "cifar10_small":  # which is not the paper's
        assert model.evaluate.extractors == ["inception", "clean_fid"] and model.sample.count == 50_000
