"""What one asks for by name: `snakemake MODEL`, and the phases that the stages of dvc.yaml run."""

RUN_DATASETS = sorted({PARAMS.models[model].dataset for model in PARAMS.run})
RUN_STATISTICS = sorted({(m.dataset, e) for m in map(PARAMS.models.get, PARAMS.run) for e in m.evaluate.extractors})
RUN_PRETRAINED = list(dict.fromkeys(map(pretrained, PARAMS.run)))
RUN_TRAINED = list(dict.fromkeys(step for model in PARAMS.run for step in PARAMS.lineage(model)))


rule configs:
    input:
        expand("configs/prepare/{dataset}.json", dataset=RUN_DATASETS),
        [f"configs/statistics/{dataset}.{extractor}.json" for dataset, extractor in RUN_STATISTICS],
        expand("configs/pretrain/{model}.json", model=RUN_PRETRAINED),
        expand("configs/train/{model}.json", model=RUN_TRAINED),
        expand("configs/sample/{model}.json", model=sorted({*RUN_PRETRAINED, *PARAMS.run})),
        expand("configs/nelbo/{model}.json", model=PARAMS.run),
        expand("configs/evaluate/{model}.json", model=PARAMS.run),
        rules.tabulate.input.config,
    localrule: True


rule data:
    input:
        expand(rules.prepare.output, dataset=RUN_DATASETS),
        # kept with the evaluations, but made before the trainings: here it shows if their weights cannot be had
        [expand(rules.statistics.output, dataset=dataset, extractor=extractor) for dataset, extractor in RUN_STATISTICS],
    localrule: True


rule pretrain:
    input:
        expand(rules.pretrain_vae.output, model=RUN_PRETRAINED),
    localrule: True


rule train:
    input:
        expand(rules.train_lsgm.output, model=RUN_TRAINED),
    localrule: True


rule evaluate:
    input:
        list(dict.fromkeys(file for model in PARAMS.run for file in products(model))),
        rules.tabulate.output,
    localrule: True


for model in PARAMS.models:

    rule:
        name:
            model
        input:
            products(model),
        localrule: True
