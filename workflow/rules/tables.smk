rule tabulate:
    input:
        config=f"configs/tabulate/{COMPARISON}.json",
        results=expand(
            "results/models/{model}/{file}",
            model=PARAMS.table_models,
            file=["metrics.json", "samples.png", "history_vae.csv", "history_lsgm.csv"],
        ),
    output:
        metrics=expand(
            "results/metrics/{prior}/{model}.json",
            prior=["vae", "lsgm_with_normal_prior", "lsgm"],
            model=PARAMS.table_models,
        ),
        history="results/tables/history.csv",
        markdown="results/tables/comparison.md",
        csv="results/tables/comparison.csv",
        table=report(
            "results/tables/comparison.html",
            caption="../report/table.rst",
            category="1. Comparison",
            labels={"of all models": "table"},
        ),
        nelbo=report(
            "results/figures/nelbo.png",
            caption="../report/nelbo.rst",
            category="1. Comparison",
            labels={"of all models": "NELBO"},
        ),
        samples=[
            report(
                f"results/figures/{model}_samples.png",
                caption="../report/samples.rst",
                category="2. Samples",
                labels={"model": model},
            )
            for model in PARAMS.table_models
        ],
        training=[
            report(
                f"results/figures/{model}_training.png",
                caption="../report/training.rst",
                category="4. Training",
                labels={"model": model},
            )
            for model in PARAMS.table_models
        ],
    log:
        "logs/tabulate.log",
    threads: 1
    resources:
        mem_mb=4000,
        runtime=30,
    params:
        results=expand("results/models/{model}", model=PARAMS.table_models),
    shell:
        "exec lsgm tabulate --results {params.results} --out results --log {log}"


rule tabulate_ablation:
    input:
        config="configs/tabulate/{ablation}.json",
        results=lambda wildcards: expand(
            "results/models/{model}/metrics.json", model=PARAMS.members(wildcards.ablation)
        ),
    output:
        csv="results/tables/ablations/{ablation}.csv",
        markdown="results/tables/ablations/{ablation}.md",
        table=report(
            "results/tables/ablations/{ablation}.html",
            caption="../report/ablation.rst",
            category="5. Ablations",
            labels={"ablation": "{ablation}", "": "table"},
        ),
        figure=report(
            "results/figures/ablations/{ablation}.png",
            caption="../report/ablation_figure.rst",
            category="5. Ablations",
            labels={"ablation": "{ablation}", "": "figure"},
        ),
    log:
        "logs/tabulate/{ablation}.log",
    threads: 1
    resources:
        mem_mb=4000,
        runtime=30,
    params:
        results=lambda wildcards: expand("results/models/{model}", model=PARAMS.members(wildcards.ablation)),
    shell:
        "exec lsgm tabulate --config {input.config} --results {params.results} --out results --log {log}"
