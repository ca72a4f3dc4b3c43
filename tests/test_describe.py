"""What `lsgm describe` says, held against the paper's models and against what PyTorch does."""

from pathlib import Path

import pytest
import torch

from lsgm import cli
from lsgm.config import ConvVAEConfig, ImageConfig
from lsgm.data.registry import DATASETS
from lsgm.describe import describe
from lsgm.model import LSGM
from lsgm.params import load_params

ROOT = Path(__file__).parents[1]

# Trainable parameters of the published models: VAE, score network with its mixing coefficients, latents of the prior.
PAPER = {
    "cifar10_best_fid": (100_867_740, 375_561_064, (180, 16, 16)),
    "cifar10_balanced": (100_867_740, 375_561_064, (180, 16, 16)),
    "cifar10_best_nll": (130_622_772, 375_561_064, (180, 16, 16)),
    "mnist": (3_005_822, 63_774_544, (40, 8, 8)),
    "omniglot": (5_384_190, 97_804_152, (60, 16, 16)),
    "celebahq256_quantitative": (51_296_572, 408_367_680, (160, 32, 32)),
    "celebahq256_qualitative_joint": (17_789_540, 440_116_368, (200, 64, 64)),
    "celebahq256_qualitative": (17_789_540, 680_827_984, (200, 64, 64)),
}


@pytest.fixture(scope="module")
def params():
    return load_params(ROOT / "params.yaml")


@pytest.mark.parametrize("name", PAPER)
def test_parameter_counts_of_the_paper(name, params):
    model = params.models[name]
    with torch.device("meta"):
        built = LSGM(DATASETS[model.dataset].image, params.vae(name), model.prior, model.sde)
    vae, prior = (sum(p.numel() for p in part.parameters()) for part in (built.vae, built.prior))
    assert (vae, prior, built.latent_shape) == PAPER[name]


def test_flops_and_memory_of_a_network_one_can_count(monkeypatch):
    """A convolution of k x k from a to b channels on n pixels: 2 k k a b n FLOPs. Batch norm keeps its input, swish its
    own, each convolution its: what PyTorch says it keeps is what is said. (The kernels for CPUs keep less.)"""
    monkeypatch.setattr("lsgm.networks.kernels.library", lambda: None)
    image = ImageConfig(channels=1, size=8, padded_size=8, binary=True)
    config = ConvVAEConfig(backbone="conv", channels=4, channel_mult=[1, 2], latents=3)
    found = describe(image, config)
    convs = [(1, 4, 64), (4, 8, 16), (8, 6, 16), (3, 8, 16), (8, 4, 64), (4, 1, 64)]
    assert found.vae.flops == sum(2 * 9 * a * b * n for a, b, n in convs)
    model = LSGM(image, config)
    assert found.vae.parameters == sum(p.numel() for p in model.parameters())
    kept = {}
    own = {id(t) for t in [*model.parameters(), *model.buffers()]}
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(id(t), t), lambda t: t)
    with hooks:
        model.vae.encode(torch.zeros(2, 1, 8, 8))
    expected = sum(4 * t.numel() for key, t in kept.items() if key not in own) // 2
    assert found.vae.activations == expected == found.vae.activations_checkpointed
    assert found.memory(10) - found.memory(0) == 10 * expected


def test_recomputing_and_freezing_take_less(params):
    model = params.models["mnist"]
    image = DATASETS[model.dataset].image
    found = describe(image, params.vae("mnist"), model.prior, model.sde)
    frozen = describe(image, params.vae("mnist"), model.prior, model.sde, train_vae=False)
    assert found.memory(32, activation_checkpointing=True) < found.memory(32) / 2
    assert found.memory(0) - frozen.memory(0) == 4 * 3 * found.vae.parameters
    assert found.memory(8) - frozen.memory(8) > 8 * found.vae.activations


def test_command_line(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert cli.main(["describe", "mnist"]) == 0
    said = capsys.readouterr().out
    assert "3,005,822 parameters" in said and "63,774,544 parameters" in said and "latents: 40 x 8 x 8" in said
    assert cli.main(["describe", "nist"]) == 1
    assert "neither the folder of a model nor a model in params.yaml (mnist_demo" in capsys.readouterr().err
