"""Distances against independent computations, and what they say of real and spoilt digits."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import scipy.linalg
import torch
from numpy.typing import NDArray

from lsgm.data.store import ImageStore
from lsgm.errors import LSGMError
from lsgm.evaluation import classifier, extractors
from lsgm.evaluation.fidelity import frechet_distance, metrics, real_vs_real
from lsgm.evaluation.statistics import Images, Moments, Statistics, measure

NAME = "mnist_classifier"
Digits = NDArray[np.uint8]


def of(images: Images) -> Statistics:
    return measure(images, NAME, "cpu")


@pytest.fixture(scope="module")
def reference(digits: Digits) -> Statistics:
    return of(digits[2000:])


def by_hand(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """The formula with scipy's matrix square root, features [N, D] against features [M, D]."""
    one, two = np.cov(a.T), np.cov(b.T)
    root = scipy.linalg.sqrtm(one @ two)
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(one + two - 2 * root.real))


def noisy(images: Digits, level: float) -> Digits:
    noise = np.random.default_rng(0).normal(0, 255 * level, images.shape)
    return np.clip(images + noise, 0, 255).astype(np.uint8)


def test_equals_an_independent_computation_on_random_features() -> None:
    """Ours, which is torch-fidelity's formula, and clean-fid's own, against scipy's matrix square root."""
    rng = np.random.default_rng(1)
    mix = rng.normal(size=(8, 8))
    a, b = rng.normal(size=(300, 8)) @ mix, 0.7 * rng.normal(size=(500, 8)) + 0.3
    for name in (NAME, "clean_fid"):
        one, two = (Statistics(name, Moments.of(torch.from_numpy(x)), torch.from_numpy(x)) for x in (a, b))
        assert frechet_distance(one, two) == pytest.approx(by_hand(a, b), rel=1e-6)


def test_equals_the_independent_computation_on_digits(digits: Digits) -> None:
    model = classifier.MNISTClassifier.load()
    a, b = (model.features(torch.from_numpy(x).float() / 255).double().numpy() for x in (digits[:700], digits[700:]))
    assert frechet_distance(of(digits[:700]), of(digits[700:])) == pytest.approx(by_hand(a, b), rel=1e-5)


def test_identical_sets_are_at_no_distance(digits: Digits) -> None:
    one, two = of(digits[:500]), of(torch.from_numpy(digits[:500]))
    assert frechet_distance(one, two) == pytest.approx(0, abs=1e-6)
    found = metrics(one, two)
    assert found["precision_mnist_classifier"] == found["recall_mnist_classifier"] == 1
    assert found["kid_mnist_classifier"] < 0  # unbiased: an image has no partner in its own set, but has in the copy


def test_kid_is_the_unbiased_estimate_of_its_definition(digits: Digits) -> None:
    """Of all images at once, where there are no more than one subset holds: the mean over pairs of (x.y / D + 1)^3."""
    one, two = of(noisy(digits[:300], 0.3)), of(digits[300:600])
    x, y = one.features.double(), two.features.double()

    def kernel(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a @ b.T / 64 + 1) ** 3

    off = ~torch.eye(300, dtype=torch.bool)
    expected = kernel(x, x)[off].mean() + kernel(y, y)[off].mean() - 2 * kernel(x, y).mean()
    assert metrics(one, two)["kid_mnist_classifier"] == pytest.approx(expected.item(), rel=1e-3)


def test_precision_is_of_the_samples_and_recall_of_the_real_ones(digits: Digits) -> None:
    """Copies of few real digits are all real ones; they cover few."""
    found = metrics(of(np.tile(digits[:20], (25, 1, 1, 1))), of(digits[:500]))
    assert found["precision_mnist_classifier"] == 1
    assert found["recall_mnist_classifier"] < 0.2
    found = metrics(of(noisy(digits[500:1000], 0.6)), of(digits[:500]))
    assert found["precision_mnist_classifier"] < 0.5


def test_inception_score_of_known_predictions(digits: Digits) -> None:
    """Sure of one of ten classes, each as often: 10. Unsure: 1."""
    library = extractors.torch_fidelity()
    found = of(digits[:1000])
    for logits, score in ((100 * torch.eye(10).repeat(100, 1), 10), (torch.zeros(1000, 10), 1)):
        given = Statistics(NAME, found.moments, found.features, logits)
        assert metrics(given, found)["inception_score"] == pytest.approx(score, rel=0.1)
    assert library.metric_isc.isc_features_to_metric(torch.zeros(20, 3), 10)["inception_score_mean"] == 1


def test_real_digits_are_near_and_noise_is_graded(digits: Digits, reference: Statistics) -> None:
    levels = [0.0, 0.05, 0.1, 0.2, 0.4]
    distances = [frechet_distance(of(noisy(digits[:2000], level)), reference) for level in levels]
    assert distances[0] < 0.6
    assert all(worse > 1.2 * better for better, worse in itertools.pairwise(distances)), distances


def test_wrong_shapes_of_digits_cost_more_than_binarized_ones(digits: Digits, reference: Statistics) -> None:
    """The features answer to what is drawn, not to the smoothness of its edges."""
    binarized = (np.random.default_rng(2).uniform(0, 255, (2000, 1, 28, 28)) < digits[:2000]).astype(np.uint8) * 255
    halves_of_two = digits[:2000].copy()
    halves_of_two[..., 14:] = np.roll(digits[:2000], 1, axis=0)[..., 14:]
    distances = [frechet_distance(of(images), reference) for images in (binarized, halves_of_two)]
    assert distances[0] < 1 < 3 < distances[1]


def test_real_vs_real_falls_with_the_number_of_images_and_repeats_itself(digits: Digits) -> None:
    real = of(digits)
    distances = [real_vs_real(real, n, seed=1, repeats=2) for n in (100, 400, 1600)]
    assert distances[0] > 1.5 * distances[1] > 1.5**2 * distances[2] > 0
    assert distances[0] == real_vs_real(real, 100, seed=1, repeats=2)


def test_committed_weights_are_standardized_and_small(mnist_store: ImageStore) -> None:
    assert classifier.WEIGHTS.stat().st_size < 400_000
    found = of(mnist_store.images("train")[::7]).features  # its order has a period of ten
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
    classifier.round_and_standardize(model, images)
    found = model.features(images.float() / 255)
    torch.testing.assert_close(found.var(0), torch.ones(64), atol=1e-3, rtol=0)


def test_real_vs_real_wants_enough_images(digits: Digits) -> None:
    with pytest.raises(LSGMError, match="two disjoint sets of 6 need 12 real images, found 10"):
        real_vs_real(of(digits[:10]), 6, seed=1)
