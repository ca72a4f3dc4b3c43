"""What all rules share: the checked parameters, the frozen configurations, the adoption of restored files."""

import json
import os
import sys
from importlib.util import find_spec
from pathlib import Path

from snakemake.exceptions import WorkflowError

# Each job runs the `lsgm` that is installed beside this Snakemake, whether or not its environment is activated.
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
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


# The text is the rule's parameter, so the file is written again exactly when its content changes. A job reads this
# file and not params.yaml: an edit made while it waits in a queue cannot change what it does.
rule freeze:
    output:
        "configs/{stage}/{name}.json",
    log:
        "logs/configs/{stage}/{name}.log",
    wildcard_constraints:
        stage="|".join([*STAGES, "tabulate"]),
        name=r"\w+",
    localrule: True
    params:
        text=frozen,
    shell:
        "printf '%s\\n' {params.text:q} > {output} 2> {log}"


def store_of(wildcards):
    """The prepared dataset of a model."""
    return expand(rules.prepare.output, dataset=PARAMS.models[wildcards.model].dataset)


def folder_of_store(wildcards):
    """The folder of a model's prepared dataset."""
    return f"data/{PARAMS.models[wildcards.model].dataset}"


adopt_restored()
