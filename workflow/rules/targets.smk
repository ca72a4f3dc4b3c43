"""What one asks for by name: `snakemake MODEL`, and the phases that the stages of dvc.yaml run."""

RUN_MODELS = [PARAMS.all_models[name] for name in PARAMS.selected_models]
RUN_DATASETS = sorted({model.dataset for model in RUN_MODELS})
if workflow.is_main_process and not adopting():  # said here, it is not buried in Snakemake's report of a rule
    for dataset in RUN_DATASETS:
        frozen_stage("prepare", dataset)
RUN_STATISTICS = sorted({(model.dataset, e) for model in RUN_MODELS for e in model.evaluate.extractors})
RUN_PRETRAINED = canonical_models("vae", PARAMS.selected_models)
RUN_TRAINED = trained(PARAMS.selected_models)
RUN_SAMPLED = [
    f"{kind}.{model}"
    for kind in ("vae", "lsgm")
    for model in canonical_models(f"{kind}_samples", PARAMS.selected_models)
]
RUN_ABLATIONS = [name for name in PARAMS.run if name in PARAMS.ablations]


rule configs:
    input:
        expand("configs/prepare/{dataset}.json", dataset=RUN_DATASETS),
        [f"configs/statistics/{dataset}.{extractor}.json" for dataset, extractor in RUN_STATISTICS],
        expand("configs/pretrain/{model}.json", model=RUN_PRETRAINED),
        expand("configs/train/{model}.json", model=RUN_TRAINED),
        expand("configs/sample/{name}.json", name=RUN_SAMPLED),
        expand("configs/nelbo/{model}.json", model=canonical_models("nelbo", PARAMS.selected_models)),
        expand("configs/evaluate/{model}.json", model=PARAMS.selected_models),
        expand("configs/illustrate/{model}.json", model=PARAMS.table_models),
        expand("configs/tabulate/{name}.json", name=[COMPARISON, *RUN_ABLATIONS]),
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
        products(PARAMS.selected_models),
        expand(rules.illustrate.output, model=PARAMS.table_models),
        rules.tabulate.output,
        expand(rules.tabulate_ablation.output, ablation=RUN_ABLATIONS),
    localrule: True


for model in PARAMS.all_models:

    rule:
        name:
            model
        input:
            products([model]),
        localrule: True


for ablation in PARAMS.ablations:

    rule:
        name:
            ablation
        input:
            products(PARAMS.members(ablation)),
            expand(rules.tabulate_ablation.output, ablation=ablation),
        localrule: True


# All ablations of a model.
for base in sorted({grid.base for grid in PARAMS.ablations.values()}):

    rule:
        name:
            f"ablations_of_{base}"
        input:
            [
                [products(PARAMS.members(name)), expand(rules.tabulate_ablation.output, ablation=name)]
                for name, grid in PARAMS.ablations.items()
                if grid.base == base
            ],
        localrule: True
