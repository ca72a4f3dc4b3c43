"""What all rules share: the checked parameters, the frozen configurations, the adoption of restored files."""

import functools
import json
import math
import os
import sys
from importlib.util import find_spec
from pathlib import Path
from shlex import quote

from snakemake.exceptions import WorkflowError
from snakemake.io import IOFile

# Each job runs with the environment of this Snakemake, activated or not, and the library of this checkout, also where
# another one is installed: `dvc exp run --temp` and `--queue` work in a copy.
HERE = str(workflow.basedir)
BESIDE = str(Path(sys.executable).parent)
shell.prefix(f'export PATH={quote(BESIDE)}:"$PATH" PYTHONPATH={quote(HERE)}:"' + '${{PYTHONPATH-}}"; ')

sys.path[:0] = [HERE, str(Path(HERE) / "workflow" / "scripts")]

from adopt import adopt_restored, adopting
from fingerprint import fingerprint
from lsgm.config import ConfigError, JobConfig
from lsgm.config.stages import STAGES
from lsgm.data.originals import plan, read_source
from lsgm.errors import LSGMError
from lsgm.params import COMPARISON, load_params
from lsgm.progress import set_up_logging

set_up_logging()

# Not by `configfile:`, which would execute Python that stands in the file. `config` is what --config sets.
try:
    PARAMS = load_params("params.yaml", config)
except ConfigError as error:
    raise WorkflowError(str(error)) from None
if mistakes := [mistake for model in PARAMS.models for mistake in PARAMS.wrong_counts(model, Path("data"))]:
    raise WorkflowError("\n".join(mistakes))

LIBRARY = Path(find_spec("lsgm").submodule_search_locations[0])


wildcard_constraints:
    dataset="|".join(PARAMS.datasets),
    model="|".join(PARAMS.all_models),
    ablation="|".join(PARAMS.ablations) or "-",
    kind="vae|lsgm",
    extractor=r"\w+",
    part=r"\d+",
    parts=r"\d+",


def frozen(wildcards):
    """The text of one job's configuration."""
    path = Path(f"configs/{wildcards.stage}/{wildcards.name}.json")
    if adopting() and path.exists():  # the restored files belong to this text, whatever params.yaml says by now
        return path.read_text().rstrip("\n")
    return frozen_stage(wildcards.stage, wildcards.name).model_dump_json(indent=2)


@functools.cache
def frozen_stage(stage, name):
    """One job's configuration, with the fingerprint of its code and, for `prepare`, of its originals."""
    job = "sample.vae" if stage == "sample" and name.startswith("vae.") else stage  # needs no prior
    found = PARAMS.freeze(stage, name, fingerprint(job, LIBRARY, PARAMS.parts(stage, name)))
    if stage != "prepare":
        return found
    try:
        return plan(found, Path("data") / name, Path(f"resume/originals/{name}.json"))
    except LSGMError as error:
        raise WorkflowError(f"params.yaml: {error}") from None


def store_of(wildcards):
    """The prepared dataset of a model: its manifest, which has the hashes of all that is in it."""
    model = wildcards.get("model")
    dataset = PARAMS.all_models[model].dataset if model else wildcards.dataset
    manifest = checkpoints.prepare.get(dataset=dataset).output
    if model and (mistakes := PARAMS.wrong_counts(model, Path("data"))):  # of a set that was counted just now
        raise WorkflowError("\n".join(mistakes))
    return manifest


# Models with the same settings of a stage share what it makes; it is kept under the name of the first of them.


def checkpoint_of(kind, model):
    """The folder of the pretrained VAE (kind `vae`) that ``model`` began with, or of its end-to-end training (`lsgm`)."""
    return f"checkpoints/{kind}/{PARAMS.canonical_model(kind, model)}"


def checkpoints_of(model, files):
    """These files of both."""
    return [f"{checkpoint_of(kind, model)}/{file}" for kind in ("vae", "lsgm") for file in files]


def samples_of(kind, model):
    """The folder of samples from that VAE, or from the model."""
    return f"samples/{kind}/{PARAMS.canonical_model(f'{kind}_samples', model)}"


def start_of(model):
    """The folder of the model whose VAE a training starts from."""
    other = PARAMS.all_models[model].vae_of
    return checkpoint_of("lsgm", other) if other else checkpoint_of("vae", model)


def folder_of_store(wildcards):
    """The folder of a model's prepared dataset."""
    return f"data/{PARAMS.all_models[wildcards.model].dataset}"


def statistics_of(wildcards):
    """The statistics of the training images that a model's samples are compared with."""
    model = PARAMS.all_models[wildcards.model]
    return expand(rules.statistics.output, dataset=model.dataset, extractor=model.evaluate.extractors)


def parts_of(wildcards):
    """The parts that a model's test images are shared out in."""
    parts = job_of("evaluate", wildcards).jobs
    return expand(
        rules.nelbo.output, model=PARAMS.canonical_model("nelbo", wildcards.model), part=range(parts), parts=parts
    )


def sampled_checkpoint(wildcards):
    """The files of the model that samples are drawn from."""
    folder = checkpoint_of(wildcards.kind, wildcards.model)
    return expand("{folder}/{file}", folder=folder, file=["model.safetensors", "config.json"])


def sample_parts_of(wildcards):
    """The parts that a model's samples are shared out in; none for a single job."""
    parts = job_of("sample", wildcards).jobs
    names = {"kind": wildcards.kind, "model": wildcards.model, "parts": parts}
    return expand(rules.sample_part.output, part=range(parts), **names) if parts > 1 else []


def job_of(stage, wildcards):
    """The resources of a stage of a model; for statistics, which several share, those of the first that needs them."""
    if "model" in wildcards.keys():
        return getattr(PARAMS.all_models[wildcards.model].resources, stage)
    asked = (model for model in PARAMS.all_models.values() if model.dataset == wildcards.dataset)
    sharing = (model for model in asked if wildcards.extractor in model.evaluate.extractors)
    return next((getattr(model.resources, stage) for model in sharing), JobConfig())


def threads_of(stage):
    """The CPUs of a model's job on each node, as a function of the wildcards."""
    return lambda wildcards: (job := job_of(stage, wildcards)).cpus * max(1, job.gpus)


def resources_of(stage, joined=False):
    """What else a model's job asks for, as functions of the wildcards; None stands for a resource that is not asked for.

    A job that only joins what several have made (`joined`) needs no GPU. In a job of several nodes, `launch.sh` starts a task on each, and the GPUs are asked for by node.
    """

    def asked(job):
        several, gpus = job.nodes > 1, job.gpus or None
        return {
            "mem_mb": math.ceil(1000 * job.mem_gb),
            "runtime": math.ceil(60 * job.hours),
            "nodes": job.nodes,
            "gpus_per_node": job.gpus,
            "gpu": None if several else gpus,
            "gres": f"gpu:{gpus}" if several and gpus else None,
            "tasks": job.nodes if several else None,
            "tasks_per_gpu": 0 if several else None,
            "mpi": "srun" if several else None,
        }

    def one(name):
        def found(wildcards):
            job = job_of(stage, wildcards)
            return asked(job.model_copy(update={"gpus": 0}) if joined and job.jobs > 1 else job)[name]

        return found

    return {name: one(name) for name in asked(JobConfig())}


def canonical_models(what, models):
    """The models under whose names ``what`` of these models is kept, each once."""
    return list(dict.fromkeys(PARAMS.canonical_model(what, model) for model in models))


def trained(models):
    """The models that are trained end to end on the way to these, and they."""
    return canonical_models("lsgm", [step for model in models for step in PARAMS.lineage(model)])


def products(models):
    """Everything that is made for these models."""
    return [
        *expand(rules.pretrain_vae.output, model=canonical_models("vae", models)),
        *expand(rules.train_lsgm.output, model=trained(models)),
        *expand(rules.sample.output, kind="vae", model=canonical_models("vae_samples", models)),
        *expand(rules.sample.output, kind="lsgm", model=canonical_models("lsgm_samples", models)),
        *expand(rules.evaluate_model.output, model=models),
    ]


adopt_restored()
