"""Statistics, summed up batch by batch, against numpy and torch-fidelity on all features; the file of a dataset."""

from __future__ import annotations

import functools
import json
import operator
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from lsgm.config.stages import StatisticsStage
from lsgm.data.store import ImageStore
from lsgm.errors import LSGMError
from lsgm.evaluation import classifier, extractors, statistics
from lsgm.evaluation.statistics import Moments, make_reference, measure, read_reference

NAME = "mnist_classifier"
CPU = torch.device("cpu")
Digits = NDArray[np.uint8]


def random_features(n: int, dimensions: int = 7, seed: int = 0) -> Tensor:
    """Correlated, and far from 0, where the naive sum of squares loses its digits."""
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.normal(size=(n, dimensions)) @ rng.normal(size=(dimensions, dimensions)) + 1e4)


@pytest.mark.parametrize("sizes", [[300], [1, 2, 297], [100, 100, 100], [299, 1]])
def test_sums_of_parts_equal_numpy(sizes: list[int]) -> None:
    features = random_features(300)
    found = functools.reduce(operator.add, map(Moments.of, features.split(sizes)))
    assert found.count == 300
    np.testing.assert_allclose(found.mean, features.mean(0), rtol=1e-13)
    np.testing.assert_allclose(found.covariance, np.cov(features.numpy().T), rtol=1e-9)


def test_the_order_of_jobs_does_not_matter() -> None:
    one, two, three = (Moments.of(random_features(n, seed=n)) for n in (10, 20, 5))
    left, right = (one + two) + three, three + (two + one)
    torch.testing.assert_close(left.mean, right.mean, rtol=1e-13, atol=0)
    torch.testing.assert_close(left.covariance, right.covariance, rtol=1e-8, atol=0)


def test_equal_torch_fidelitys_own_on_the_same_features(digits: Digits) -> None:
    """Mean and covariance, and the distance that follows, to 1e-6, from an array that is mapped from a file."""
    network = classifier.MNISTClassifier.load()
    sets = {"a": digits[:1234], "b": digits[1500:]}
    own, theirs = [], []
    metric_fid = extractors.torch_fidelity().metric_fid
    for images in sets.values():
        found = measure(images, NAME, CPU)
        features = network.features(torch.from_numpy(images).float() / 255).double()
        reference = metric_fid.fid_features_to_statistics(features)
        np.testing.assert_allclose(found.mu, reference["mu"], atol=1e-6)
        np.testing.assert_allclose(found.sigma, reference["sigma"], atol=1e-6)
        own.append({"mu": found.mu, "sigma": found.sigma})
        theirs.append(reference)
    distances = [
        metric_fid.fid_statistics_to_metric(*pair, verbose=False)[metric_fid.KEY_METRIC_FID] for pair in (own, theirs)
    ]
    assert distances[0] == pytest.approx(distances[1], rel=1e-6)


def test_keeps_the_features_of_randomly_chosen_images(digits: Digits, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "KEPT", 300)
    found = measure(digits[:700], NAME, CPU)
    assert found.images == 700 and found.features.shape == (300, 64)
    all_of_them = classifier.MNISTClassifier.load().features(torch.from_numpy(digits[:700]).float() / 255)
    chosen = np.random.default_rng(0).permutation(700)[:300]
    torch.testing.assert_close(found.features, all_of_them[chosen], rtol=1e-4, atol=1e-4)


def test_never_sees_more_than_a_batch_of_a_mapped_file(
    digits: Digits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.save(tmp_path / "images.npy", digits[:1100])
    seen = []
    original = classifier.MNISTClassifier.features

    def features(self: Any, x: Tensor) -> Tensor:
        seen.append(len(x))
        return original(self, x)

    monkeypatch.setattr(classifier.MNISTClassifier, "features", features)
    mapped = np.load(tmp_path / "images.npy", mmap_mode="r")
    found = measure(mapped, NAME, CPU)
    assert seen == [500, 500, 100]
    np.testing.assert_array_equal(found.mu, measure(torch.from_numpy(digits[:1100]), NAME, CPU).mu)


STAGE = StatisticsStage(dataset="mnist", extractor=NAME, code="c0de")


def test_a_file_holds_what_was_measured_and_of_what(small_store: ImageStore, tmp_path: Path) -> None:
    make_reference(STAGE, small_store.path, tmp_path / "a", CPU)
    make_reference(STAGE, small_store.path, tmp_path / "b", CPU)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    found, measured = read_reference(tmp_path / "a", small_store), measure(small_store.images("train"), NAME, CPU)
    assert (found.extractor, found.images) == (NAME, 300)
    np.testing.assert_array_equal(found.sigma, measured.sigma)
    torch.testing.assert_close(found.features, measured.features)
    assert found.source["images"] == small_store.hashes("train")
    from safetensors import safe_open

    with safe_open(tmp_path / "a", "pt") as file:
        meta = json.loads(file.metadata()["statistics"])
    assert meta["code"] == "c0de" and meta["torch"] == torch.__version__


def test_a_file_of_other_images_or_weights_is_refused(
    small_store: ImageStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_reference(STAGE, small_store.path, tmp_path / "file", CPU)
    with monkeypatch.context() as patch:
        patch.setitem(small_store.manifest["files"]["train_images.npy"], "sha256", "0" * 64)
        with pytest.raises(
            LSGMError, match="file: was computed from different images; delete it, and run the workflow"
        ):
            read_reference(tmp_path / "file", small_store)
    with monkeypatch.context() as patch:
        patch.setattr(statistics, "weights_of", lambda _: Path(__file__))
        with pytest.raises(LSGMError, match="was computed from different weights"):
            read_reference(tmp_path / "file", small_store)
    (tmp_path / "file").write_bytes((tmp_path / "file").read_bytes()[:-100])
    with pytest.raises(LSGMError, match="file: is not a statistics file"):
        read_reference(tmp_path / "file", small_store)


def spoilt(path: Path, change: Callable[[dict[str, Any], dict[str, Tensor]], Any], hashes: bool = True) -> None:
    """Write the file again with other content under the old hashes, or as before there were any."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(path, "pt") as file:
        meta = json.loads(file.metadata()["statistics"])
        tensors = {name: file.get_tensor(name) for name in ("mean", "scatter", "features")}
    if not hashes:
        del meta["sha256"], meta["tensors"]
    change(meta, tensors)
    save_file({k: t.contiguous() for k, t in tensors.items()}, path, metadata={"statistics": json.dumps(meta)})


@pytest.mark.parametrize(
    "change",
    [
        lambda meta, tensors: tensors["mean"][0].add_(1),
        lambda meta, tensors: tensors["features"][7, 3].add_(1),
        lambda meta, tensors: meta.update(images=299),
        lambda meta, tensors: meta["tensors"].pop("mean"),
    ],
)
def test_a_file_whose_content_changed_is_refused(
    small_store: ImageStore, tmp_path: Path, change: Callable[[dict[str, Any], dict[str, Tensor]], Any]
) -> None:
    make_reference(STAGE, small_store.path, tmp_path / "file", CPU)
    spoilt(tmp_path / "file", change)
    with pytest.raises(LSGMError, match="file: has changed: .*; delete it, and run the workflow or `lsgm statistics`"):
        read_reference(tmp_path / "file", small_store)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda meta, tensors: None, ""),
        (lambda meta, tensors: meta.update(images=-3), "images: "),
        (lambda meta, tensors: meta.update(images="300"), "images: "),
        (lambda meta, tensors: meta.update(source=[]), "source: "),
        (lambda meta, tensors: meta.pop("extractor"), "extractor: "),
        (lambda meta, tensors: meta.update(extractor="vgg"), "there is no extractor 'vgg'"),
        (lambda meta, tensors: tensors.update(scatter=tensors["scatter"][1:]), "scatter: expected finite .* found"),
        (lambda meta, tensors: tensors.update(mean=tensors["mean"].int()), "mean: expected finite numbers .64., found"),
        (lambda meta, tensors: tensors["features"][0].fill_(float("nan")), "features: expected finite numbers"),
        (lambda meta, tensors: tensors.update(features=tensors["features"].sum()), "features: expected finite"),
    ],
)
def test_a_file_without_hashes_is_held_against_itself(
    small_store: ImageStore, tmp_path: Path, change: Callable[[dict[str, Any], dict[str, Tensor]], Any], says: str
) -> None:
    """As written before there were hashes."""
    make_reference(STAGE, small_store.path, tmp_path / "file", CPU)
    spoilt(tmp_path / "file", change, hashes=False)
    if not says:
        assert read_reference(tmp_path / "file", small_store).images == 300
        return
    with pytest.raises(LSGMError, match=says) as caught:
        read_reference(tmp_path / "file", small_store)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("images", "extractor", "says"),
    [
        (
            np.zeros((10, 1, 28, 28), np.uint8),
            "vgg",
            "there is no extractor 'vgg'; there are inception, efficientnet_lite0,",
        ),
        (np.zeros((10, 1, 28, 28), np.float32), NAME, "expected images of bytes"),
        (np.zeros((10, 28, 28), np.uint8), NAME, "expected images of bytes"),
        (np.zeros((10, 3, 32, 32), np.uint8), NAME, r"expects images of \[1, 28, 28\], found \[3, 32, 32\]"),
        (np.zeros((10, 2, 32, 32), np.uint8), "inception", r"expects images of one or three channels, found \[2, 3"),
        (np.zeros((1, 1, 28, 28), np.uint8), NAME, "at least 2 images, found 1"),
    ],
)
def test_refusals(images: Any, extractor: str, says: str) -> None:
    with pytest.raises(LSGMError, match=says):
        measure(images, extractor, CPU)
