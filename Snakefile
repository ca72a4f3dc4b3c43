from snakemake.utils import min_version

min_version("9.10")


report: "workflow/report/workflow.rst"


include: "workflow/rules/common.smk"
include: "workflow/rules/freeze.smk"
include: "workflow/rules/data.smk"
include: "workflow/rules/vae.smk"
include: "workflow/rules/lsgm.smk"
include: "workflow/rules/sample.smk"
include: "workflow/rules/evaluate.smk"
include: "workflow/rules/tables.smk"
include: "workflow/rules/targets.smk"


# Models and samples too: the results are in git, and would hide that the models are missing.
rule all:
    input:
        rules.pretrain.input,
        rules.train.input,
        rules.evaluate.input,
