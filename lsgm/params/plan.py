"""What is wrong with the plan in params.yaml and can be known before the first job. Each mistake is a line that begins
with its key. Without torch: the workflow looks here whenever it is parsed."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping

from lsgm.config import BackboneConfig, DatasetConfig, PretrainConfig, TrainConfig
from lsgm.config.model import ModelConfig
from lsgm.data.registry import DATASETS, Dataset
from lsgm.registry import EXTRACTORS
from lsgm.shapes import misfits

COMPARISON = "run"  # the name of the frozen configuration of the table that compares the models of `run`
RULES = (  # of the workflow; models and ablations become rules beside them
    "all", "configs", "freeze", "data", "prepare", "statistics", "pretrain", "pretrain_vae", "train", "train_lsgm",
    "sample", "sample_part", "nelbo", "evaluate", "evaluate_model", "illustrate", "tabulate", "tabulate_ablation",
)  # fmt: skip
RULES_OF_A_MODEL = "ablations_of_"  # begins the name of the rule for all ablations of a model
MAX_LINEAGE = 100  # trainings, each of which starts from the VAE of the one before


def wrong_names(run: Iterable[str], models: Collection[str], ablations: Collection[str]) -> Iterator[str]:
    """Names of models and ablations that the workflow has no room for, and those that `run` gives and are none."""
    for section, names in (("models", models), ("ablations", ablations)):
        for name in names:
            if name in RULES or name == COMPARISON or name.startswith(RULES_OF_A_MODEL):
                yield f"{section}.{name}: the workflow has a rule or file of this name; give it another one"
            elif section == "ablations" and name in models:
                yield f"ablations.{name}: this name is taken; give it another one"
    yield from same_but_for_case("models and ablations", [*models, *ablations])
    counts = Counter(run)
    for name, count in counts.items():
        if name not in models and name not in ablations:
            others = f", the ablations {', '.join(ablations)}" if ablations else ""
            yield f"run: there is no model {name!r}; the models are {', '.join(models)}{others}"
        if count > 1:
            yield f"run: names {name!r} {count} times; once is enough"
    if not counts.keys() & set(models) and counts.keys() <= set(ablations):
        yield f"run: name a model too; an ablation alone is made by `snakemake {next(iter(counts))}`"


def same_but_for_case(what: str, names: Iterable[str]) -> Iterator[str]:
    """Names whose files would be the same where the file system does not know upper from lower case."""
    seen: dict[str, str] = {}
    for name in names:
        other = seen.setdefault(name.lower(), name)
        if other != name:
            yield (
                f"{what}: {other} and {name} differ in upper and lower case alone, and some systems take their files "
                "for the same; give one another name"
            )


def wrong_datasets(datasets: Mapping[str, DatasetConfig]) -> Iterator[str]:
    """Datasets that are neither known nor described."""
    yield from same_but_for_case("datasets", datasets)
    for name, dataset in datasets.items():
        known = name in DATASETS
        if not isinstance(dataset, DatasetConfig):  # the format of an installed package
            if known:
                yield f"datasets.{name}.format: how this dataset is read is known; to read it otherwise, rename it"
            continue
        if known and dataset.images is not None:
            yield f"datasets.{name}.images: how this dataset is read is known; to read it otherwise, rename it"
        if not known and dataset.images is None:
            close = difflib.get_close_matches(name, DATASETS, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"the known datasets are {', '.join(DATASETS)}"
            yield (
                f"datasets.{name}: is no known dataset ({hint}); a set of your own needs path (the folder) and images "
                "(at least its size: images: {size: 64})"
            )
        elif not known and dataset.path is None:
            yield f"datasets.{name}.path: missing; the folder, zip or LMDB with your images"


def wrong_ancestry(models: Mapping[str, ModelConfig], datasets: Collection[str]) -> Iterator[str]:
    """Models on data that are not there, and those whose VAE comes from nowhere."""
    for name, model in models.items():
        if model.dataset not in datasets and not (model.extends and models[model.extends].dataset == model.dataset):
            yield f"models.{name}.dataset: {model.dataset!r} is missing under datasets"
        seen = [name]
        while (other := models[seen[-1]].vae_of) is not None:
            where = f"models.{seen[-1]}.vae_of: {other!r}"
            if other not in models or other in seen:
                what = "is a circle" if other in seen else f"the models are {', '.join(models)}"
                yield f"{where}: {what}"
                break
            if models[other].dataset != model.dataset:
                yield f"{where} is a model of another dataset"
                break
            seen.append(other)
            if len(seen) > MAX_LINEAGE:
                yield f"models.{name}.vae_of: more than {MAX_LINEAGE} trainings, each from the VAE of the one before"
                break


def misfits_of(model: ModelConfig, vae: BackboneConfig, dataset: Dataset) -> list[str]:
    """Sections of a model that do not fit together or do not fit the images; ``vae`` is that of its lineage."""
    found = misfits(dataset.image, vae, model.prior)
    if dataset.image.binary and vae.x_bits != 8:
        found.append(f"vae.x_bits: {vae.x_bits} has no meaning for binary images, which have one bit: leave it out")
    point = not found and vae.latent_shapes(dataset.image)[0][1] == 1  # latents of 1x1
    schedules: list[tuple[str, PretrainConfig | TrainConfig]] = [("train", model.train)]
    if model.pretrain is not None:
        schedules.insert(0, ("pretrain", model.pretrain))
    for stage, schedule in schedules:
        job = getattr(model.resources, stage)
        processes = job.nodes * max(1, job.gpus)
        share, rest = divmod(schedule.batch, processes * schedule.accumulate)
        if rest:
            found.append(
                f"{stage}.batch: expected a multiple of {processes * schedule.accumulate}, which is processes (nodes x "
                f"GPUs of resources.{stage}: {processes}) x accumulate ({schedule.accumulate}), found {schedule.batch}"
            )
        elif point and share * processes == 1 and (stage == "pretrain" or model.train.train_vae):
            found.append(f"{stage}.batch: batch norm has nothing to average over one image with latents of 1x1; "
                         "expected at least 2 images in a part of a batch")  # fmt: skip
    sample = model.sample
    images, jobs = model.evaluate.images, model.resources.evaluate.jobs
    if images is not None and jobs > images:
        found.append(f"resources.evaluate.jobs: {jobs} jobs cannot share the {images} images of evaluate.images")
    if point and sample.vae_batch_statistics and min(sample.batch, sample.count % sample.batch or sample.batch) == 1:
        found.append("sample.batch: batch norm has no statistics of a batch of one image with latents of 1x1; choose "
                     "another batch or count")  # fmt: skip
    return found


def wrong_counts(model: ModelConfig, dataset: Dataset) -> Iterator[str]:
    """What a model asks of its dataset, or of its samples, and cannot have."""
    counts = dataset.counts  # of a set of the user's own they are not known yet
    if "test" in counts and (model.evaluate.images or 0) > counts["test"]:
        yield (
            f"evaluate.images: {dataset.name} has {counts['test']} test images, not {model.evaluate.images}; null "
            "stands for all of them"
        )
    for stage in ("pretrain", "train"):
        schedule = getattr(model, stage)
        if schedule is None or not counts:
            continue
        if schedule.batch > counts["train"]:
            yield f"{stage}.batch: {dataset.name} has {counts['train']} training images, not {schedule.batch}"
        if schedule.eval_every_epochs > 0 and schedule.eval_images > counts["test"]:
            yield f"{stage}.eval_images: {dataset.name} has {counts['test']} test images, not {schedule.eval_images}"
    extractor = model.evaluate.extractor
    if extractor is None:
        return
    entry = EXTRACTORS.entry(extractor)
    only = entry.image_shape or dataset.image_shape
    if only != dataset.image_shape:
        yield (
            f"evaluate.extractor: {extractor} is for images of {_by(only)} (channels, height, width), those of "
            f"{dataset.name} are {_by(dataset.image_shape)}; use another one, or null"
        )
    fewest = entry.min_samples
    if model.sample.count < fewest:
        yield (
            f"sample.count: {extractor} needs at least {fewest} samples to compare, found {model.sample.count}; draw "
            "more, or set evaluate.extractor: null"
        )


def _by(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))
