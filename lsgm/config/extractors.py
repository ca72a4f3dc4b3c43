"""What is known of an extractor of features without torch: which images it is for, and where it is implemented."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ExtractorEntry:
    """An entry of the registry of extractors.

    Attributes:
        implementation: "module:name" of a :class:`lsgm.evaluation.extractors.Extractor`.
        image_shape: the only (channels, height, width) that it takes; None: any.
        min_samples: how many samples its metrics need at least; a covariance needs two.
    """

    implementation: Any
    image_shape: tuple[int, int, int] | None = None
    min_samples: int = 2


# The Inception score is the mean over ten parts.
INCEPTION = ExtractorEntry("lsgm.evaluation.extractors:INCEPTION", min_samples=10)
EFFICIENTNET_LITE0 = ExtractorEntry("lsgm.evaluation.extractors:EFFICIENTNET_LITE0")
MNIST_CLASSIFIER = ExtractorEntry("lsgm.evaluation.extractors:MNIST_CLASSIFIER", image_shape=(1, 28, 28))
