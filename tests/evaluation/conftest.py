"""Real digits, and an Inception-v3 with random weights in the file formats of torch-fidelity and of clean-fid."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lsgm.data import prepare, registry
from lsgm.data.store import ImageStore
from lsgm.evaluation import extractors
from lsgm.evaluation.pretrained import WeightsFile
from lsgm.files import sha256


@pytest.fixture(scope="module")
def digits(mnist_store: ImageStore) -> NDArray[np.uint8]:
    """4000 real images, [4000, 1, 28, 28]."""
    return np.array(mnist_store.images("train")[:4000])


@pytest.fixture(scope="module")
def small_store(digits: NDArray[np.uint8], tmp_path_factory: pytest.TempPathFactory) -> ImageStore:
    """The first digits as a dataset of their own."""
    folder = tmp_path_factory.mktemp("store")
    for split, images in (("train", digits[:300]), ("test", digits[300:310])):
        np.save(folder / f"{split}_images.npy", images)
    prepare.build(registry.dataset("mnist"), folder / "out", folder)
    return ImageStore(folder / "out")


@pytest.fixture(scope="session")
def inception_file(tmp_path_factory: pytest.TempPathFactory) -> WeightsFile:
    """A state_dict of torch-fidelity's Inception, its activations neither vanishing nor exploding."""
    extractors.torch_fidelity()
    from torch_fidelity import feature_extractor_inceptionv3 as original

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(original, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(original.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        network = original.FeatureExtractorInceptionV3("random", ["2048"])
    torch.manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    path = tmp_path_factory.mktemp("weights") / extractors.INCEPTION_WEIGHTS.name
    torch.save(network.state_dict(), path)
    return dataclasses.replace(
        extractors.INCEPTION_WEIGHTS, sha256=sha256(path), size=path.stat().st_size, library_folder=path
    )


@pytest.fixture
def inception(inception_file: WeightsFile, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The random weights in the place of the real ones, found in the folder that LSGM_WEIGHTS names."""
    path = inception_file.library_folder
    assert path is not None
    monkeypatch.setattr(extractors, "INCEPTION_WEIGHTS", dataclasses.replace(inception_file, library_folder=None))
    monkeypatch.setenv("LSGM_WEIGHTS", str(path.parent))
    return path


class _Layers(nn.Module):
    """Shaped as the TorchScript that clean-fid loads: [B, 3, 299, 299] in [-1, 1] -> [B, 2048, 1, 1]."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 2048, 8, stride=4)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(nn.functional.adaptive_avg_pool2d(x, 16)).square().mean(dim=(2, 3), keepdim=True)


class _Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = _Layers()

    def forward(self, x: Tensor, return_features: bool = True) -> Tensor:
        return self.layers(x)


@pytest.fixture
def clean_inception(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small network with random weights in the place of clean-fid's Inception."""
    torch.manual_seed(0)
    network: Any = torch.jit.script(_Base().eval())
    path = tmp_path / "clean" / extractors.CLEAN_INCEPTION_WEIGHTS.name
    path.parent.mkdir()
    network.save(str(path))
    file = dataclasses.replace(extractors.CLEAN_INCEPTION_WEIGHTS, sha256=sha256(path), library_folder=path.parent)
    monkeypatch.setattr(extractors, "CLEAN_INCEPTION_WEIGHTS", file)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "nothing"))
    return path
