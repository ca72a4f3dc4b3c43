"""Fréchet distances between sets of images, computed by torch-fidelity with feature extractors that need no download.

A Fréchet distance depends on its extractor as a length does on its unit: it is always named after it, and the word
"FID" is kept for Inception-v3.

    d^2 = |mu_1 - mu_2|^2 + tr(S_1 + S_2 - 2 (S_1 S_2)^(1/2))            (Heusel et al., arXiv 1706.08500, eq. 6)

torch-fidelity is imported by the first call that needs it: the rest of the library runs without it.
"""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lsgm.errors import LSGMError
from lsgm.evaluation import classifier

Images = Tensor | NDArray[np.uint8]  # uint8 [N, C, H, W] in 0..255; an array may be mapped from a file


@dataclass(frozen=True)
class Extractor:
    """A network that turns images into features: what a Fréchet distance is named after."""

    load: Callable[[], nn.Module]
    dimensions: int
    image_shape: tuple[int, int, int]  # the only shape it accepts


# Config name -> extractor. torch-fidelity knows each by the same name.
EXTRACTORS = {
    "mnist_classifier": Extractor(classifier.MNISTClassifier.load, classifier.FEATURES, (1, 28, 28)),
}


@dataclass(frozen=True)
class Statistics:
    """Mean and covariance of the features of ``images`` images."""

    extractor: str
    images: int
    mu: NDArray[np.float64]  # [D]
    sigma: NDArray[np.float64]  # [D, D]


def frechet_distance(
    samples: Images | Statistics, reference: Images | Statistics, extractor: str, device: torch.device | str
) -> float:
    """Squared Fréchet distance d^2 (the number that is reported as "FID" elsewhere) of ``samples`` to ``reference``.

    Both are images, uint8 [N, C, H, W] in 0..255, or what :func:`statistics` made of them. By convention the
    reference is the whole training set. The distance of two finite sets from the same distribution is above 0 and
    falls with their size: quote the number of samples and :func:`half_against_half` beside it.
    Raises :class:`LSGMError`.
    """
    one, two = (
        images if isinstance(images, Statistics) else statistics(images, extractor, device)
        for images in (samples, reference)
    )
    if {one.extractor, two.extractor} != {extractor}:
        raise LSGMError(
            f"Fréchet distance: asked for {extractor}, got statistics of {one.extractor} and {two.extractor} features"
        )
    return _distance(one, two)


def half_against_half(
    reference: Images, n: int, extractor: str, device: torch.device | str, seed: int, repeats: int = 5
) -> float:
    """The floor: the distance between two disjoint random sets of ``n`` real images, on average over ``repeats`` draws.

    ``reference`` is uint8 [M, C, H, W] with M >= 2 n. Of two equally good sets of N images, one against M >> N images
    scores about half of this: only one of the two sets is then small. Raises :class:`LSGMError`.
    """
    if len(reference) < 2 * n:
        raise LSGMError(
            f"half-against-half floor: two disjoint sets of {n} need {2 * n} real images, there are {len(reference)}"
        )
    rng = np.random.default_rng(seed)
    halves = [np.split(rng.choice(len(reference), 2 * n, replace=False), 2) for _ in range(repeats)]
    return float(
        np.mean(
            [_distance(*(statistics(reference[np.sort(half)], extractor, device) for half in pair)) for pair in halves]
        )
    )


def statistics(images: Images, extractor: str, device: torch.device | str) -> Statistics:
    """Mean and covariance of the features of ``images``, uint8 [N, C, H, W]. Raises :class:`LSGMError`."""
    from_features = _torch_fidelity().metric_fid.fid_features_to_statistics
    found = from_features(features(images, extractor, device))
    return Statistics(extractor, len(images), found["mu"], found["sigma"])


@torch.inference_mode()
def features(images: Images, extractor: str, device: torch.device | str, batch: int = 500) -> Tensor:
    """Features of ``images``, uint8 [N, C, H, W]: float64 [N, D] on the CPU. Raises :class:`LSGMError`."""
    kind = _extractor(extractor)
    if str(images.dtype).removeprefix("torch.") != "uint8" or tuple(images.shape[1:]) != kind.image_shape:
        raise LSGMError(
            f"{extractor}: expected images of bytes, uint8 {['N', *kind.image_shape]}, "
            f"found {images.dtype} {list(images.shape)}"
        )
    if len(images) < 2:
        raise LSGMError(f"{extractor}: a covariance needs at least 2 images, found {len(images)}")
    network = _torch_fidelity_class(extractor)(extractor, [str(kind.dimensions)]).eval().to(device)
    found = []
    for start in range(0, len(images), batch):
        chunk = images[start : start + batch]
        if not isinstance(chunk, Tensor):
            chunk = torch.from_numpy(np.array(chunk))  # a copy: what is mapped from a file cannot be written to
        found.append(network(chunk.to(device, non_blocking=True))[0])
    return torch.cat(found).cpu()  # the one round trip to the host


def _distance(one: Statistics, two: Statistics) -> float:
    metric_fid = _torch_fidelity().metric_fid
    found = metric_fid.fid_statistics_to_metric(vars(one), vars(two), verbose=False)
    return float(found[metric_fid.KEY_METRIC_FID])


def _extractor(name: str) -> Extractor:
    if name not in EXTRACTORS:
        raise LSGMError(f"evaluate.extractor: unknown extractor {name!r}; there are {', '.join(EXTRACTORS)}")
    return EXTRACTORS[name]


@cache
def _torch_fidelity() -> Any:
    """torch-fidelity, with every extractor above in its registry."""
    _define_missing_operators()
    try:
        import torch_fidelity
        import torch_fidelity.metric_fid
    except ImportError as error:
        raise LSGMError(
            f"the Fréchet distance needs torch-fidelity ({error}); install it: pip install 'lsgm[evaluation]'"
        ) from None
    for name in EXTRACTORS:
        torch_fidelity.register_feature_extractor(name, _torch_fidelity_class(name))
    return torch_fidelity


@cache
def _torch_fidelity_class(name: str) -> Any:
    """``name`` as torch-fidelity wants its extractors: a class that takes uint8 [N, C, H, W] and returns ([N, D],)."""
    _define_missing_operators()
    from torch_fidelity import FeatureExtractorBase

    kind = _extractor(name)

    class FeatureExtractor(FeatureExtractorBase):  # type: ignore[misc]
        def __init__(self, name: str, features_list: list[str], **kwargs: Any) -> None:
            super().__init__(name, features_list)
            self.network: Any = kind.load()

        def forward(self, input: Tensor) -> tuple[Tensor]:
            # Double precision: torch-fidelity averages in the precision of the features.
            return (self.network.features(input.float() / 255).double(),)

        @staticmethod
        def get_provided_features_list() -> tuple[str]:
            return (str(kind.dimensions),)

        @staticmethod
        def get_default_feature_layer_for_metric(metric: str) -> str:
            return str(kind.dimensions)

        @staticmethod
        def can_be_compiled() -> bool:
            return True

        @staticmethod
        def get_dummy_input_for_compile() -> Tensor:
            return torch.zeros(4, *kind.image_shape, dtype=torch.uint8)

    return FeatureExtractor


_operators: list[torch.library.Library] = []  # the definitions live as long as their library object


def _define_missing_operators() -> None:
    """Let torchvision be imported beside a CPU build of torch.

    torchvision's usual binaries are linked with CUDA. Where torch has none, their operators cannot be loaded, and the
    import fails because it describes two operators that are not there. torch-fidelity uses neither: their names are
    enough.
    """
    if torch.version.cuda or torch.version.hip or "torchvision" in sys.modules or _operators:
        return
    package = importlib.util.find_spec("torchvision")
    for folder in (package.submodule_search_locations or []) if package else []:
        for binary in Path(folder).glob("_C*.*"):
            with contextlib.suppress(OSError):  # linked with a CUDA that is not there
                torch.ops.load_library(str(binary))  # what torchvision does first; a second time is harmless
    if not hasattr(torch.ops.torchvision, "nms"):
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _operators.append(library)
