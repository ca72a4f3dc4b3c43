"""What one asks for by name: `snakemake MODEL`, and the phases that the stages of dvc.yaml run."""

# Everything that is made for one model.
PRODUCTS = [
    *rules.pretrain_vae.output,
    *rules.train_lsgm.output,
    *expand(rules.sample.output, kind=["vae", "lsgm"], allow_missing=True),
    *rules.evaluate_model.output,
]


rule configs:
    input:
        expand("configs/prepare/{dataset}.json", dataset=sorted({PARAMS.models[model].dataset for model in PARAMS.run})),
        expand("configs/{stage}/{model}.json", stage=STAGES[1:], model=PARAMS.run),
        rules.tabulate.input.config,
    localrule: True


rule data:
    input:
        expand(rules.prepare.output, dataset=sorted({PARAMS.models[model].dataset for model in PARAMS.run})),
    localrule: True


rule pretrain:
    input:
        expand(rules.pretrain_vae.output, model=PARAMS.run),
    localrule: True


rule train:
    input:
        expand(rules.train_lsgm.output, model=PARAMS.run),
    localrule: True


rule evaluate:
    input:
        expand(PRODUCTS, model=PARAMS.run),
        rules.tabulate.output,
    localrule: True


for model in PARAMS.models:

    rule:
        name:
            model
        input:
            expand(PRODUCTS, model=model),
        localrule: True
