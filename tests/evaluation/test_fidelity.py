"""The Fréchet distance against independent computations, and what it says of real and spoilt digits."""

from __future__ import annotations

import itertools
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from numpy.typing import NDArray

from lsgm.data.store import ImageStore
from lsgm.errors import LSGMError
from lsgm.evaluation import classifier, fidelity
from lsgm.evaluation.fidelity import Statistics, frechet_distance, half_against_half

NAME = "mnist_classifier"
Digits = NDArray[np.uint8]


@pytest.fixture(scope="module")
def digits(mnist_store: ImageStore) -> Digits:
    """4000 real images, [4000, 1, 28, 28]."""
    return np.array(mnist_store.images("train")[:4000])


@pytest.fixture(scope="module")
def reference(digits: Digits) -> Statistics:
    return fidelity.statistics(digits[2000:], NAME, "cpu")


def by_hand(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """The formula with scipy's matrix square root, features [N, D] against features [M, D]."""
    one, two = np.cov(a.T), np.cov(b.T)
    root = scipy.linalg.sqrtm(one @ two)
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(one + two - 2 * root.real))


def noisy(images: Digits, level: float) -> Digits:
    noise = np.random.default_rng(0).normal(0, 255 * level, images.shape)
    return np.clip(images + noise, 0, 255).astype(np.uint8)


def test_equals_an_independent_computation_on_random_features(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    mix = rng.normal(size=(8, 8))
    a, b = rng.normal(size=(300, 8)) @ mix, 0.7 * rng.normal(size=(500, 8)) + 0.3
    given = {len(x): torch.from_numpy(x) for x in (a, b)}
    monkeypatch.setattr(fidelity, "features", lambda images, extractor, device: given[len(images)])
    found = frechet_distance(np.zeros((300, 1), np.uint8), np.zeros((500, 1), np.uint8), NAME, "cpu")
    assert found == pytest.approx(by_hand(a, b), rel=1e-6)


def test_equals_the_independent_computation_on_digits(digits: Digits) -> None:
    model = classifier.MNISTClassifier.load()
    a, b = (model.features(torch.from_numpy(x).float() / 255).double().numpy() for x in (digits[:700], digits[700:]))
    assert frechet_distance(digits[:700], digits[700:], NAME, "cpu") == pytest.approx(by_hand(a, b), rel=1e-5)


def test_public_registration_gives_the_same_number(digits: Digits) -> None:
    fidelity._torch_fidelity()
    import torch_fidelity

    class Images(torch.utils.data.Dataset[torch.Tensor]):
        def __init__(self, images: Digits) -> None:
            self.images = torch.from_numpy(images)

        def __len__(self) -> int:
            return len(self.images)

        def __getitem__(self, index: int) -> torch.Tensor:
            return self.images[index]

    settings: dict[str, Any] = {"cuda": False, "verbose": False, "save_cpu_ram": True}
    one, two = noisy(digits[:300], 0.1), digits[300:600]
    public = torch_fidelity.calculate_metrics(
        input1=Images(one), input2=Images(two), fid=True, feature_extractor=NAME, **settings
    )
    assert frechet_distance(one, two, NAME, "cpu") == pytest.approx(public["frechet_inception_distance"], rel=1e-6)


def test_identical_sets_are_at_no_distance(digits: Digits) -> None:
    assert frechet_distance(digits[:500], torch.from_numpy(digits[:500]), NAME, "cpu") == pytest.approx(0, abs=1e-6)


def test_statistics_may_be_made_beforehand(digits: Digits, reference: Statistics) -> None:
    given_images = frechet_distance(digits[:500], digits[2000:], NAME, "cpu")
    assert frechet_distance(digits[:500], reference, NAME, "cpu") == given_images


def test_real_digits_are_near_and_noise_is_graded(digits: Digits, reference: Statistics) -> None:
    levels = [0.0, 0.05, 0.1, 0.2, 0.4]
    distances = [frechet_distance(noisy(digits[:2000], level), reference, NAME, "cpu") for level in levels]
    assert distances[0] < 0.6
    assert all(worse > 1.2 * better for better, worse in itertools.pairwise(distances)), distances


def test_wrong_shapes_of_digits_cost_more_than_binarised_ones(digits: Digits, reference: Statistics) -> None:
    """The features answer to what is drawn, not to the smoothness of its edges."""
    binarised = (np.random.default_rng(2).uniform(0, 255, (2000, 1, 28, 28)) < digits[:2000]).astype(np.uint8) * 255
    halves_of_two = digits[:2000].copy()
    halves_of_two[..., 14:] = np.roll(digits[:2000], 1, axis=0)[..., 14:]
    distances = [frechet_distance(images, reference, NAME, "cpu") for images in (binarised, halves_of_two)]
    assert distances[0] < 1 < 3 < distances[1]


def test_floor_falls_with_the_number_of_images_and_repeats_itself(digits: Digits) -> None:
    floors = [half_against_half(digits, n, NAME, "cpu", seed=1, repeats=2) for n in (100, 400, 1600)]
    assert floors[0] > 1.5 * floors[1] > 1.5**2 * floors[2] > 0
    assert floors[0] == half_against_half(digits, 100, NAME, "cpu", seed=1, repeats=2)


def test_committed_weights_are_standardised_and_small(mnist_store: ImageStore) -> None:
    assert classifier.WEIGHTS.stat().st_size < 400_000
    found = fidelity.features(mnist_store.images("train")[::7], NAME, "cpu")  # its order has a period of ten
    assert found.shape == (8572, 64)
    assert found.mean(0).abs().max() < 0.05
    assert (found.std(0) - 1).abs().max() < 0.05
    labels = torch.from_numpy(np.array(mnist_store.labels("test"))).long()
    images = torch.from_numpy(np.array(mnist_store.images("test")))
    assert classifier.accuracy(classifier.MNISTClassifier.load(), images, labels) > 0.99


def test_a_few_steps_of_the_training_script_learn_something(digits: Digits, mnist_store: ImageStore) -> None:
    labels = torch.from_numpy(np.array(mnist_store.labels("train")[:4000])).long()
    images = torch.from_numpy(digits)
    model = classifier.train(images[:2000], labels[:2000], epochs=3, batch=50)
    assert classifier.accuracy(model, images[3000:], labels[3000:]) > 0.8
    classifier.round_and_standardise(model, images)
    found = model.features(images.float() / 255)
    torch.testing.assert_close(found.var(0), torch.ones(64), atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    ("images", "extractor", "says"),
    [
        (np.zeros((10, 1, 28, 28), np.uint8), "inception", "unknown extractor 'inception'; there are mnist_classifier"),
        (np.zeros((10, 1, 28, 28), np.float32), NAME, "expected images of bytes"),
        (np.zeros((10, 3, 32, 32), np.uint8), NAME, r"\['N', 1, 28, 28\], found uint8 \[10, 3, 32, 32\]"),
        (np.zeros((1, 1, 28, 28), np.uint8), NAME, "at least 2 images, found 1"),
    ],
)
def test_refusals(images: Any, extractor: str, says: str) -> None:
    with pytest.raises(LSGMError, match=says):
        frechet_distance(images, images, extractor, "cpu")


def test_floor_wants_enough_images() -> None:
    with pytest.raises(LSGMError, match="two disjoint sets of 6 need 12 real images, there are 10"):
        half_against_half(np.zeros((10, 1, 28, 28), np.uint8), 6, NAME, "cpu", seed=1)


def test_the_library_imports_without_torch_fidelity() -> None:
    """And asks for it, in one line, when a distance is wanted."""
    script = """
import sys
sys.modules["torch_fidelity"] = None
import numpy as np
from lsgm.errors import LSGMError
from lsgm.evaluation import fidelity
assert "torchvision" not in sys.modules
images = np.zeros((10, 1, 28, 28), np.uint8)
try:
    fidelity.frechet_distance(images, images, "mnist_classifier", "cpu")
except LSGMError as error:
    print(error)
"""
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "pip install 'lsgm[evaluation]'" in found.stdout
