"""Published checkpoint files: what is written is read, and what is wrong is named."""

import argparse
import collections
import copy
import math
import resource
import zipfile

import pytest
import torch

import lsgm
from lsgm import cli, published, published_arguments
from lsgm.config import ConvVAEConfig, ImageConfig, NCSNppConfig, SDEConfig, VAEConfig
from lsgm.errors import LSGMError
from lsgm.model import LSGM

ONE_BLOCK = {"blocks": 1, "cells": 2}
COLOUR = ImageConfig(channels=3, size=32, padded_size=32, binary=False)
MODELS = {
    "mnist": (
        ImageConfig(channels=1, size=28, padded_size=32, binary=True),
        {"arch": "res_mbconv", "channels": 4, "channel_mult": [1, 2, 2], "groups_per_scale": 2, "latents_per_group": 2,
         "cells_per_cond": 1, "preprocess": {"blocks": 2, "cells": 2}, "postprocess": {"blocks": 2, "cells": 1}},
        {"channels": 16, "scales": 2, "cells_per_scale": 1, "mixing_logit_init": -6},
        {"name": "vpsde"},
    ),
    "cifar10": (
        COLOUR,
        {"arch": "res_bnswish", "channels": 4, "channel_mult": [1, 2], "groups_per_scale": 3, "latents_per_group": 2,
         "cells_per_cond": 2, "preprocess": ONE_BLOCK, "postprocess": ONE_BLOCK, "num_nf": 2, "likelihood": "dml"},
        {"channels": 16, "scales": 2, "cells_per_scale": 1, "fir": True, "mixing_logit_init": -3,
         "embedding": "fourier"},
        {"name": "geometric_vpsde", "time_eps": 0.0, "sigma2_max": 0.999, "sigma2_0": 3e-5},
    ),
    "celeba_32": (
        COLOUR,
        {"arch": "res_mbconv", "channels": 4, "channel_mult": [1, 1, 2, 4], "latent_scales": 3, "groups_per_scale": 2,
         "latents_per_group": 2, "cells_per_cond": 1, "preprocess": ONE_BLOCK, "postprocess": ONE_BLOCK, "num_nf": 1,
         "likelihood": "dml", "x_bits": 5, "progressive_input": "input_skip"},
        {"channels": 16, "scales": 1, "cells_per_scale": 1, "mixing_logit_init": -6},
        {"name": "vpsde"},
    ),
}  # fmt: skip


def make(name):
    image, vae, prior, sde = MODELS[name]
    torch.manual_seed(0)
    model = LSGM(image, VAEConfig(**vae), NCSNppConfig(**prior), SDEConfig(**sde))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.02 * torch.randn_like(p))
    return model.eval()


@pytest.mark.parametrize("name", MODELS)
def test_what_is_exported_is_imported(name, tmp_path):
    """Configuration and every tensor, for the LSGM and for its VAE alone; and it samples."""
    model = make(name)
    published.export(model, tmp_path / "checkpoint.pt", name)
    again = lsgm.load(tmp_path / "checkpoint.pt")
    assert (again.image, again.vae_config, again.prior_config) == (model.image, model.vae_config, model.prior_config)
    assert vars(again.prior.sde) == vars(model.prior.sde)
    state = again.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    x = again.sample(2, solver="heun", steps=4, time_eps=1e-2)
    assert torch.equal(x, model.sample(2, solver="heun", steps=4, time_eps=1e-2)) and torch.isfinite(x).all()
    model.prior = None
    published.export(model, tmp_path / "vae.pt", name)
    assert lsgm.load(tmp_path / "vae.pt").prior is None


def test_the_average_is_taken_from_the_optimizer(tmp_path):
    """As in a second-stage training checkpoint: numbered by registration, frozen parameters without an entry."""
    model = make("mnist")
    published.export(model, tmp_path / "a.pt", "mnist")
    content = published.read(tmp_path / "a.pt")
    names = list(content["dae_state_dict"])
    state = {i: {"ema": value + 1.0} for i, value in enumerate(content["dae_state_dict"].values()) if i != 3}
    content["dae_optimizer"] = {"state": state, "param_groups": []}
    torch.save(content, tmp_path / "b.pt")
    raw, averaged = published.load(tmp_path / "a.pt"), published.load(tmp_path / "b.pt")
    ours = {theirs: key for key, theirs in published.published_names(raw.prior.network).items()}
    before, after = raw.prior.network.state_dict(), averaged.prior.network.state_dict()
    for i, theirs in enumerate(names):
        if theirs == "mixing_logit":
            torch.testing.assert_close(averaged.prior.mixing_logit, raw.prior.mixing_logit + 1)
        else:
            torch.testing.assert_close(after[ours[theirs]], before[ours[theirs]] + (i != 3))


def test_dropped_channels_are_found_again(tmp_path):
    model = make("mnist")
    model.prior.deactivate(torch.tensor([True, False, True, False]))
    published.export(model, tmp_path / "a.pt", "mnist")
    assert torch.equal(published.load(tmp_path / "a.pt").prior.active, model.prior.active)


def test_old_files_lack_arguments(tmp_path):
    model = make("cifar10")
    published.export(model, tmp_path / "a.pt", "cifar10")
    content = published.read(tmp_path / "a.pt")
    for key in published_arguments.OLD:
        delattr(content["args"], key)
    torch.save(content, tmp_path / "old.pt")
    assert published.load(tmp_path / "old.pt").vae_config == model.vae_config


def test_every_field_is_in_the_table():
    """Except for the fields that their release has no argument for."""
    tables = [
        (published_arguments.VAE, VAEConfig, {"backbone"}),
        (published_arguments.PRIOR, NCSNppConfig, {"network", "attention_resolution", "drop_inactive"}),
        (published_arguments.SDE, SDEConfig, set()),
    ]
    for table, config, others in tables:
        assert {argument.field.partition(".")[0] for argument in table} == config.model_fields.keys() - others
    theirs = [name for table, *_ in tables for argument in table for name in argument.theirs]
    assert len(set(theirs)) == len(theirs)


def vae_tensor(content, change):
    content["vae_state_dict"]["stem.weight"] = change(content["vae_state_dict"]["stem.weight"])


def averaged(content, change):
    average = change(content["dae_state_dict"]["all_modules.0.bias"])
    content["dae_optimizer"] = {
        "state": {list(content["dae_state_dict"]).index("all_modules.0.bias"): {"ema": average}}
    }


class Foreign(collections.OrderedDict):
    pass


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["vae_state_dict"].pop("stem.weight"), "vae_state_dict: .*missing: stem.weight"),
        (lambda c: c["dae_state_dict"].update(extra=torch.zeros(1)), "dae_state_dict: .*unknown: extra"),
        (lambda c: setattr(c["args"], "num_channels_enc", 8), "num_channels_enc, args.num_channels_dec: 8 and 4"),
        (lambda c: vars(c["args"]).update(num_channels_enc=8, num_channels_dec=8), "shapes do not match"),
        (
            lambda c: setattr(c["args"], "progressive_input", "input_skip"),
            "progressive_input: .* is not supported",
        ),
        (lambda c: delattr(c["args"], "fir"), "args: fir is missing"),
        (lambda c: delattr(c["args"], "num_channels_dae"), "args: num_channels_dae is missing"),
        (lambda c: c.update(args=None), "b.pt: args: "),
        (
            lambda c: setattr(c["args"], "decoder_dist", "gauss"),
            "decoder_dist: expected one of bin, dml, dl, normal, f",
        ),
        (lambda c: setattr(c["args"], "dataset", "things"), "b.pt: args.dataset: cannot tell"),
        (
            lambda c: c.update(dae_optimizer={"state": {1: {"ema": torch.zeros(3, 2)}}}),
            r"b.pt: dae_optimizer.state.1.ema: \(3, 2\) does not fit all_modules.0.weight",
        ),
        (lambda c: setattr(c["args"], "arch_instance", "res_elu"), "arch_instance|arch"),
        (lambda c: c.pop("vae_state_dict"), "not a checkpoint of an NVAE or LSGM"),
        (lambda c: c.update(best_score_fid=Foreign()), "object of the class .*Foreign"),
        (lambda c: c["vae_state_dict"]["stem.weight"].fill_(math.nan), "vae_state_dict: stem.weight: not finite"),
        (lambda c: c["dae_state_dict"]["mixing_logit"].fill_(math.inf), "dae_state_dict: mixing_logit: not finite"),
        (lambda c: averaged(c, lambda t: t * math.nan), "dae_state_dict: all_modules.0.bias: not finite"),
        (lambda c: averaged(c, lambda t: [1.0]), "dae_optimizer.state.2: ema: expected a named tensor"),
        (lambda c: c.update(dae_optimizer=[]), "dae_optimizer: expected the state of an optimizer"),
        (lambda c: vae_tensor(c, lambda t: t.int()), "vae_state_dict: number types differ .*: stem.weight"),
        (lambda c: vae_tensor(c, lambda t: t.to_sparse()), "stem.weight: expected a dense tensor"),
        (
            lambda c: vae_tensor(c, lambda t: t.flatten()[:1].expand(10**6, 10**6)),
            "shapes do not match .*: stem.weight",
        ),
        (lambda c: vae_tensor(c, lambda t: {"weight": t}), "vae_state_dict: stem.weight: expected a named tensor"),
        (lambda c: c.update(vae_state_dict=[]), "vae_state_dict: expected a dict of tensors, found list"),
        (lambda c: vars(c["args"]).update(num_channels_enc=10**9, num_channels_dec=10**9), "can be built|less than"),
        (lambda c: vars(c["args"]).update(num_channels_enc=-4, num_channels_dec=-4), "channels: .*found -4"),
        (lambda c: vars(c["args"]).update(num_channels_enc=900, num_channels_dec=900), "shapes do not match"),
        (lambda c: setattr(c["args"], "num_groups_per_scale", 900), "can be built"),
        (lambda c: setattr(c["args"], "num_groups_per_scale", 10**9), "can be built|less than"),
        (lambda c: setattr(c["args"], "num_latent_scales", "two"), "latent_scales: .*found 'two'"),
        (lambda c: setattr(c["args"], "embedding_dim", [16]), r"embedding_dim: .*found \[16\]"),
        (lambda c: setattr(c["args"], "sde_type", ["vpsde"]), r"args.sde_type: expected one of .*found \['vpsde'\]"),
        (lambda c: setattr(c["args"], "dataset", 3), "args.dataset: expected a name, found 3"),
        (lambda c: setattr(c["args"], "dataset", "celeba_" + "9" * 5000), "args.dataset: cannot tell"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, change, message):
    published.export(make("mnist"), tmp_path / "a.pt", "mnist")
    content = copy.deepcopy(published.read(tmp_path / "a.pt"))
    change(content)
    torch.save(content, tmp_path / "b.pt")
    with pytest.raises(LSGMError, match=message) as caught:
        published.load(tmp_path / "b.pt")
    assert "\n" not in str(caught.value)


def test_a_flipped_byte_is_noticed(tmp_path):
    """Wherever it is, of the pickle, of the tensors, of the zip's own tables: refused, or of no consequence."""
    model = make("mnist")
    model.prior = None
    published.export(model, tmp_path / "a.pt", "mnist")
    content = (tmp_path / "a.pt").read_bytes()
    expected, noticed = published.load(tmp_path / "a.pt").state_dict(), 0
    places = range(0, len(content), len(content) // 30), range(len(content) - 3000, len(content), 200)
    for place in [place for some in places for place in some]:
        damaged = bytearray(content)
        damaged[place] ^= 0x10
        (tmp_path / "b.pt").write_bytes(damaged)
        try:
            found = published.load(tmp_path / "b.pt").state_dict()
        except LSGMError as error:
            assert str(error).startswith(f"{tmp_path / 'b.pt'}: ") and "\n" not in str(error)
            noticed += 1
        else:
            assert all(torch.equal(value, found[name]) for name, value in expected.items())
    assert noticed > 25


def test_a_compressed_file_is_not_unpacked(tmp_path):
    published.export(make("mnist"), tmp_path / "a.pt", "mnist")
    with (
        zipfile.ZipFile(tmp_path / "a.pt") as archive,
        zipfile.ZipFile(tmp_path / "b.pt", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for name in archive.namelist():
            packed.writestr(name, archive.read(name))
    with pytest.raises(LSGMError, match=r"b.pt: .* is compressed, which torch files never are"):
        published.load(tmp_path / "b.pt")


def test_a_file_of_an_old_pytorch_is_read(tmp_path):
    model = make("mnist")
    published.export(model, tmp_path / "a.pt", "mnist")
    torch.save(published.read(tmp_path / "a.pt"), tmp_path / "b.pt", _use_new_zipfile_serialization=False)
    found = published.load(tmp_path / "b.pt").state_dict()
    assert all(torch.equal(value, found[name]) for name, value in model.state_dict().items())


def test_a_full_disk_is_told(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(OSError, match="a.pt"):
            published.export(make("mnist"), tmp_path / "a.pt", "mnist")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []


def test_truncated_and_missing_files(tmp_path):
    published.export(make("mnist"), tmp_path / "a.pt", "mnist")
    content = (tmp_path / "a.pt").read_bytes()
    for length in (0, 10, len(content) // 2):
        (tmp_path / "b.pt").write_bytes(content[:length])
        with pytest.raises(LSGMError, match=r"b.pt: .*(truncated|damaged|not a torch file)"):
            published.load(tmp_path / "b.pt")
    for content in (b"<!DOCTYPE html><title>404</title>", b'{"message": "not found"}', bytes(100), b"\xff" * 50):
        (tmp_path / "b.pt").write_bytes(content)
        with pytest.raises(LSGMError, match=r"b.pt: .*not a torch file") as caught:
            published.load(tmp_path / "b.pt")
        assert "could execute" not in str(caught.value)
    with pytest.raises(LSGMError, match="none.pt: not found"):
        lsgm.load(tmp_path / "none.pt")


def test_the_dataset_must_fit():
    with pytest.raises(LSGMError, match="--dataset cifar10"):
        published.export(make("mnist"), "never.pt", "cifar10")
    sizes = {"celeba_256": 256, "ffhq": 256, "celeba_64": 64, "lsun_church_256": 256, "celeba_256_lmdb": 256,
             "imagenet_32": 32, "cifar10": 32}  # fmt: skip
    assert {name: published_arguments.image_of(name).size for name in sizes} == sizes
    with pytest.raises(LSGMError, match="cannot tell the size"):
        published_arguments.image_of("things")


def test_arguments_are_a_namespace(tmp_path):
    published.export(make("mnist"), tmp_path / "a.pt", "mnist")
    assert isinstance(published.read(tmp_path / "a.pt")["args"], argparse.Namespace)


def test_command_line(tmp_path, capsys):
    """From a published file to a model's folder and back; what cannot be is one message."""
    model = make("celeba_32")
    published.export(model, tmp_path / "a.pt", "celeba_32")
    assert cli.main(["import-published", str(tmp_path / "a.pt"), "--out", str(tmp_path / "model")]) == 0
    again = lsgm.load(tmp_path / "model")
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items())
    x = torch.rand(2, 3, 32, 32).mul(31).round() / 31
    nelbo = again.nelbo(x, time_eps=1e-2)
    assert torch.isfinite(nelbo).all() and torch.equal(nelbo, model.nelbo(x, time_eps=1e-2))

    export = ["export-published", "--model", str(tmp_path / "model"), "--out", str(tmp_path / "b.pt")]
    assert cli.main(export) == 1
    assert "has no record of its dataset; name it, for example: --dataset" in capsys.readouterr().err
    assert cli.main([*export, "--dataset", "celeba_32"]) == 0
    one, two = published.read(tmp_path / "a.pt"), published.read(tmp_path / "b.pt")
    for part in ("vae_state_dict", "dae_state_dict"):
        assert one[part].keys() == two[part].keys()
        assert all(torch.equal(value, two[part][key]) for key, value in one[part].items())
    (tmp_path / "b.pt").write_bytes(b"no checkpoint")
    assert cli.main(["import-published", str(tmp_path / "b.pt"), "--out", str(tmp_path / "never")]) == 1
    assert "lsgm import-published: error: " in capsys.readouterr().err and not (tmp_path / "never").exists()


def test_only_the_nvae_can_be_exported(tmp_path):
    config = ConvVAEConfig(backbone="conv", channels=4, channel_mult=[1, 2], latents=2, likelihood="dml")
    with pytest.raises(LSGMError, match="only the NVAE backbone"):
        published.export(LSGM(COLOUR, config), tmp_path / "never.pt", "cifar10")
