"""Registry entries of feature extractors: the images they accept and where they are implemented. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ExtractorEntry:
    """An entry of the registry of extractors.

    Attributes:
        implementation: "module:name" of a :class:`lsgm.evaluation.extractors.Extractor`.
        image_shape: the only (channels, height, width) that it accepts; None: any.
        min_samples: the smallest number of samples that its metrics need; a covariance needs two.
    """

    implementation: Any
    image_shape: tuple[int, int, int] | None = None
    min_samples: int = 2


# The Inception score is a mean over ten subsets.
INCEPTION = ExtractorEntry("lsgm.evaluation.extractors:INCEPTION", min_samples=10)
EFFICIENTNET_LITE0 = ExtractorEntry("lsgm.evaluation.extractors:EFFICIENTNET_LITE0")
MNIST_CLASSIFIER = ExtractorEntry("lsgm.evaluation.extractors:MNIST_CLASSIFIER", image_shape=(1, 28, 28))
