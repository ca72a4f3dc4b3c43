"""What all rules share: the checked parameters, the frozen configurations, the adoption of restored files."""

import json
import sys
from importlib.util import find_spec
from pathlib import Path
from shlex import quote

from snakemake.exceptions import WorkflowError

# Each job runs the `lsgm` that is installed beside this Snakemake, whether or not its environment is activated.
shell.prefix(f'export PATH={quote(str(Path(sys.executable).parent))}:"$PATH"; ')

sys.path.insert(0, str(Path(workflow.basedir) / "workflow" / "scripts"))

from adopt import adopt_restored, adopting
from fingerprint import fingerprint
from lsgm.config import STAGES, ConfigError, Params
from lsgm.config import parse as check  # Snakemake has a `parse` of its own among these globals
from lsgm.data.registry import DATASETS

try:
    PARAMS = check(Params, config, "params.yaml")
except ConfigError as error:
    raise WorkflowError(str(error)) from None

LIBRARY = Path(find_spec("lsgm").submodule_search_locations[0])


wildcard_constraints:
    dataset="|".join(PARAMS.datasets),
    model="|".join(PARAMS.models),
    kind="vae|lsgm",


def frozen(wildcards):
    """The text of one job's configuration."""
    path = Path(f"configs/{wildcards.stage}/{wildcards.name}.json")
    if adopting() and path.exists():  # the restored files belong to this text, whatever params.yaml says by now
        return path.read_text().rstrip("\n")
    code = fingerprint(wildcards.stage, LIBRARY)
    if wildcards.stage == "tabulate":
        return json.dumps({"stage": "tabulate", "code": code, "models": PARAMS.run}, indent=2)
    return PARAMS.freeze(wildcards.stage, wildcards.name, code).model_dump_json(indent=2)


def store_of(wildcards):
    """The prepared dataset of a model."""
    return expand(rules.prepare.output, dataset=PARAMS.models[wildcards.model].dataset)


def arrays_of(wildcards):
    """The user's arrays, where a dataset is made from such; the others are downloads, known by their hashes."""
    path = PARAMS.datasets[wildcards.dataset].path
    if path is None or DATASETS[wildcards.dataset].files:
        return []
    return [Path(path).expanduser() / f"{split}_images.npy" for split in DATASETS[wildcards.dataset].splits]


def folder_of_start(wildcards):
    """The folder of the model whose VAE a model's training starts from."""
    other = PARAMS.models[wildcards.model].vae_of
    return f"checkpoints/lsgm/{other}" if other else f"checkpoints/vae/{wildcards.model}"


def start_of(wildcards):
    """Its files."""
    return [f"{folder_of_start(wildcards)}/{file}" for file in ("model.safetensors", "config.json")]


def pretrained(model):
    """The model, of those that are trained on the way to ``model``, whose VAE is pretrained."""
    return PARAMS.lineage(model)[0]


def folder_of_store(wildcards):
    """The folder of a model's prepared dataset."""
    return f"data/{PARAMS.models[wildcards.model].dataset}"


def products(model):
    """Everything that is made for one model."""
    return [
        *expand(rules.pretrain_vae.output, model=pretrained(model)),
        *expand(rules.train_lsgm.output, model=PARAMS.lineage(model)),
        *expand(rules.sample.output, kind="vae", model=pretrained(model)),
        *expand(rules.sample.output, kind="lsgm", model=model),
        *expand(rules.evaluate_model.output, model=model),
    ]


adopt_restored()
