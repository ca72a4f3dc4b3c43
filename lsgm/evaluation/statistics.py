"""Feature statistics for comparing sets of images: mean, covariance, and the features of a random subset.

Moments are accumulated batch by batch in double precision, so the features of all images are never in memory at once.
`lsgm statistics` computes the statistics of the training images once for each dataset and extractor, and saves them.
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

Images = Tensor | NDArray[np.uint8]  # uint8 [N, C, H, W] in 0..255; an array may be memory-mapped

KEPT = 10_000  # KID, precision and recall use the features of at most this many images per set

WAY_OUT = "delete it, and run the workflow or `lsgm statistics` again"


@dataclass(frozen=True)
class Moments:
    """Count, mean and scatter matrix of features, in double precision. `a + b` gives the moments of the union."""

    count: int
    mean: Tensor  # [D]
    scatter: Tensor  # [D, D], sum of (f - mean) (f - mean)^T

    @classmethod
    def of(cls, features: Tensor) -> Moments:
        """Compute the moments of features [B, D]."""
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
        """The unbiased covariance matrix [D, D]."""
        return self.scatter / (self.count - 1)


@dataclass(frozen=True)
class Statistics:
    """Feature statistics of a set of images."""

    extractor: str
    moments: Moments
    features: Tensor  # [min(N, KEPT), D], features of a random subset in random order
    logits: Tensor | None = None  # [N, classes], for generated images, if the extractor returns logits
    source: dict[str, Any] = field(default_factory=dict)  # hashes of the images and weights they were computed from

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
    """Compute the feature statistics of ``images``, uint8 [N, C, H, W], with the extractor ``name``.

    Args:
        what: what the images are, shown in the progress bar.
        keep_logits: keep the logits [N, classes] in memory, to compute an Inception score.

    Raises:
        LSGMError: the extractor does not accept such images, or its weights or package are missing.
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
    place = np.full(len(images), -1)  # row of each image among the kept features; -1: not kept
    kept = np.random.default_rng(0).permutation(len(images))[:KEPT]
    place[kept] = np.arange(len(kept))
    features, logits = torch.empty(len(kept), kind.dimensions), []
    moments: Moments | None = None
    starts = range(0, len(images), kind.batch)
    with Progress(f"{name} of {what}", len(starts), "img", kind.batch) as bar:
        for start in starts:
            chunk = images[start : start + kind.batch]
            if not isinstance(chunk, Tensor):
                chunk = torch.from_numpy(np.array(chunk))  # a copy, because a memory-mapped array is read-only
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
    """The metadata of a statistics file. Files from older versions have no hashes."""

    model_config = ConfigDict(extra="ignore", strict=True)

    extractor: str
    images: Annotated[int, Field(ge=2)]
    source: dict[str, Any]
    tensors: dict[str, str] | None = None  # name -> sha256


def make_reference(stage: StatisticsStage, data: Path, out: Path, device: torch.device) -> None:
    """Write the statistics of the training images in the store ``data`` to the file ``out``.

    Raises:
        LSGMError: the data are damaged, belong to another dataset, or do not fit the extractor.
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
    """The sha256 of a tensor's raw bytes."""
    return hashlib.sha256(tensor.numpy().tobytes()).hexdigest()


def read_reference(path: Path, store: ImageStore) -> Statistics:
    """Read the statistics of the training images in ``store`` from the file ``path``.

    Raises:
        LSGMError: the file is unreadable, damaged, or was computed from other images, weights or packages.
    """
    try:
        with safe_open(path, "pt") as file:
            meta = parse_json(file.metadata()["statistics"], path)
            tensors = {name: file.get_tensor(name) for name in ("mean", "scatter", "features")}
        facts = _Facts.model_validate(meta)
    except ValidationError as error:
        first = error.errors()[0]
        raise LSGMError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}; {WAY_OUT}") from None
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, LSGMError) as error:
        raise LSGMError(f"{path}: is not a statistics file ({error}); {WAY_OUT}") from None
    if "sha256" in meta and not (
        is_sealed(meta) and facts.tensors == {name: _digest(tensor) for name, tensor in tensors.items()}
    ):
        raise LSGMError(f"{path}: has changed: its sha256 does not match its content; {WAY_OUT}")
    d = extractor(facts.extractor).dimensions
    kept = min(facts.images, len(tensors["features"]) if tensors["features"].dim() else 0)
    for (name, tensor), shape in zip(tensors.items(), ([d], [d, d], [kept, d]), strict=True):
        if list(tensor.shape) != shape or not tensor.is_floating_point() or not tensor.isfinite().all():
            raise LSGMError(f"{path}: {name}: expected finite numbers {shape}, found {tensor.dtype} "
                            f"{list(tensor.shape)}; {WAY_OUT}")  # fmt: skip
    expected = source(store, facts.extractor)
    if facts.source != expected:
        differing = sorted(key for key in expected if expected[key] != facts.source.get(key))
        raise LSGMError(f"{path}: was computed from different {' and '.join(differing) or 'inputs'}; {WAY_OUT}")
    moments = Moments(facts.images, tensors["mean"], tensors["scatter"])
    return Statistics(facts.extractor, moments, tensors["features"], source=expected)


def source(store: ImageStore, name: str) -> dict[str, Any]:
    """The content hashes and package versions that the statistics of a store's training images depend on."""
    return {"dataset": store.name, "images": store.hashes("train"), "weights": sha256(weights_of(name)),
            "packages": {package: version(package) for package in extractor(name).packages}}  # fmt: skip
