"""What sets of images are compared by: mean and covariance of their features, and the features of some of them.

Features are summed up batch by batch, in double precision: those of all images are never held at once. The statistics
of the training images are computed once for each dataset and extractor and kept as a file (`lsgm statistics`).
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from lsgm.config import Section
from lsgm.config.stages import StatisticsStage
from lsgm.data.store import ImageStore
from lsgm.errors import LSGMError
from lsgm.evaluation.extractors import extractor, weights_of
from lsgm.files import atomic, is_sealed, parse_json, seal, sha256
from lsgm.progress import Progress

Images = Tensor | NDArray[np.uint8]  # uint8 [N, C, H, W] in 0..255; an array may be mapped from a file

KEPT = 10_000  # images of a set whose features KID, precision and recall are computed from

WAY_OUT = "delete it, and run the workflow or `lsgm statistics` again"


@dataclass(frozen=True)
class Moments:
    """Number, mean and scatter of features, in double precision; those of two sets add up to those of their union."""

    count: int
    mean: Tensor  # [D]
    scatter: Tensor  # [D, D], sum of (f - mean) (f - mean)^T

    @classmethod
    def of(cls, features: Tensor) -> Moments:
        """Of features [B, D]."""
        features = features.double()
        mean = features.mean(dim=0)
        centered = features - mean
        return cls(len(features), mean, centered.T @ centered)

    def __add__(self, other: Moments) -> Moments:
        """Chan, Golub & LeVeque, 'Updating formulae and a pairwise algorithm for computing sample variances' (1979)."""
        count = self.count + other.count
        step = other.mean - self.mean
        return Moments(
            count,
            self.mean + step * (other.count / count),
            self.scatter + other.scatter + torch.outer(step, step) * (self.count * other.count / count),
        )

    @property
    def covariance(self) -> Tensor:
        """[D, D], unbiased."""
        return self.scatter / (self.count - 1)


@dataclass(frozen=True)
class Statistics:
    """Of the features of a set of images."""

    extractor: str
    moments: Moments
    features: Tensor  # [min(N, KEPT), D], of randomly chosen images in random order
    logits: Tensor | None = None  # [N, classes], of generated images where the extractor has them
    source: dict[str, Any] = field(default_factory=dict)  # which images and weights they are of

    @property
    def images(self) -> int:
        return self.moments.count

    @cached_property
    def mu(self) -> NDArray[np.float64]:
        return self.moments.mean.cpu().numpy()

    @cached_property
    def sigma(self) -> NDArray[np.float64]:
        return self.moments.covariance.cpu().numpy()


@torch.inference_mode()
def measure(
    images: Images, name: str, device: torch.device | str, *, what: str = "images", keep_logits: bool = False
) -> Statistics:
    """Statistics of ``images``, uint8 [N, C, H, W], in the features of the extractor ``name``.

    Args:
        what: they are, for the progress bar.
        keep_logits: for an Inception score, [N, classes] in memory.

    Raises:
        LSGMError: the images do not fit the extractor, or its weights or package are not there.
    """
    kind = extractor(name)
    if str(images.dtype).removeprefix("torch.") != "uint8" or images.ndim != 4:
        raise LSGMError(
            f"{name}: expected images of bytes, uint8 [N, C, H, W], found {images.dtype} {list(images.shape)}"
        )
    kind.check(name, tuple(images.shape[1:]))
    if len(images) < 2:
        raise LSGMError(f"{name}: a covariance needs at least 2 images, found {len(images)}")
    network = kind.load(weights_of(name)).eval().to(device)
    place = np.full(len(images), -1)  # of an image's features among those that are kept
    kept = np.random.default_rng(0).permutation(len(images))[:KEPT]
    place[kept] = np.arange(len(kept))
    features, logits = torch.empty(len(kept), kind.dimensions), []
    moments: Moments | None = None
    starts = range(0, len(images), kind.batch)
    with Progress(f"{name} of {what}", len(starts), "img", kind.batch) as bar:
        for start in starts:
            chunk = images[start : start + kind.batch]
            if not isinstance(chunk, Tensor):
                chunk = torch.from_numpy(np.array(chunk))  # a copy: what is mapped from a file cannot be written to
            chunk = chunk.to(device, non_blocking=True)
            if kind.image_shape is None and chunk.shape[1] == 1:
                chunk = chunk.expand(-1, 3, -1, -1)
            found, scores = network(chunk)
            part = Moments.of(found)
            moments = part if moments is None else moments + part
            where = torch.from_numpy(place[start : start + len(chunk)])
            features[where[where >= 0]] = found.float().cpu()[where >= 0]
            if keep_logits and scores is not None:
                logits.append(scores.cpu())
            bar.step()
    assert moments is not None
    return Statistics(name, moments, features, torch.cat(logits) if logits else None)


class _Facts(Section):
    """What a file of statistics says of itself. Older ones have no hashes."""

    model_config = ConfigDict(extra="ignore", strict=True)

    extractor: str
    images: Annotated[int, Field(ge=2)]
    source: dict[str, Any]
    tensors: dict[str, str] | None = None  # sha256 of each


def make_reference(stage: StatisticsStage, data: Path, out: Path, device: torch.device) -> None:
    """Write the statistics of the training images in the store ``data`` to the file ``out``.

    Raises:
        LSGMError: the data are damaged, another dataset, or none that the extractor takes.
    """
    store = ImageStore(data, stage.dataset)
    store.verify("train")
    found = measure(store.images("train"), stage.extractor, device, what=f"{store.name}'s training images")
    tensors = {"mean": found.moments.mean, "scatter": found.moments.scatter, "features": found.features}
    content = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    meta = {
        "extractor": stage.extractor,
        "images": found.images,
        "source": source(store, stage.extractor),
        "torch": version("torch"),
        "code": stage.code,
        "tensors": {name: _digest(tensor) for name, tensor in content.items()},
    }
    with atomic(out) as part:
        part.write_bytes(to_bytes(content, metadata={"statistics": json.dumps(seal(meta))}))


def _digest(tensor: Tensor) -> str:
    """sha256 of a tensor's numbers."""
    return hashlib.sha256(tensor.numpy().tobytes()).hexdigest()


def read_reference(path: Path, store: ImageStore) -> Statistics:
    """The statistics in the file ``path``, of the training images in ``store``; raises :class:`LSGMError`."""
    try:
        with safe_open(path, "pt") as file:
            meta = parse_json(file.metadata()["statistics"], path)
            tensors = {name: file.get_tensor(name) for name in ("mean", "scatter", "features")}
        facts = _Facts.model_validate(meta)
    except ValidationError as error:
        first = error.errors()[0]
        raise LSGMError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}; {WAY_OUT}") from None
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, LSGMError) as error:
        raise LSGMError(f"{path}: no statistics of images ({error}); {WAY_OUT}") from None
    if "sha256" in meta and not (
        is_sealed(meta) and facts.tensors == {name: _digest(tensor) for name, tensor in tensors.items()}
    ):
        raise LSGMError(f"{path}: has changed, its content is not that of its sha256; {WAY_OUT}")
    d = extractor(facts.extractor).dimensions
    kept = min(facts.images, len(tensors["features"]) if tensors["features"].dim() else 0)
    for (name, tensor), shape in zip(tensors.items(), ([d], [d, d], [kept, d]), strict=True):
        if list(tensor.shape) != shape or not tensor.is_floating_point() or not tensor.isfinite().all():
            raise LSGMError(f"{path}: {name}: expected finite numbers {shape}, found {tensor.dtype} "
                            f"{list(tensor.shape)}; {WAY_OUT}")  # fmt: skip
    expected = source(store, facts.extractor)
    if facts.source != expected:
        differing = sorted(key for key in expected if expected[key] != facts.source.get(key))
        raise LSGMError(f"{path}: is of other {' and '.join(differing) or 'facts'} than are here now; {WAY_OUT}")
    moments = Moments(facts.images, tensors["mean"], tensors["scatter"])
    return Statistics(facts.extractor, moments, tensors["features"], source=expected)


def source(store: ImageStore, name: str) -> dict[str, Any]:
    """What the statistics of a store's training images depend on, by content."""
    return {"dataset": store.name, "images": store.hashes("train"), "weights": sha256(weights_of(name)),
            "packages": {package: version(package) for package in extractor(name).packages}}  # fmt: skip
