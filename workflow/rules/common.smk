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


def folder_of_store(wildcards):
    """The folder of a model's prepared dataset."""
    return f"data/{PARAMS.models[wildcards.model].dataset}"


adopt_restored()
