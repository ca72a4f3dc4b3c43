rule tabulate:
    input:
        config="configs/tabulate/run.json",
        results=expand(
            "results/models/{model}/{file}",
            model=PARAMS.run,
            file=["metrics.json", "samples.png", "history_vae.csv", "history_lsgm.csv"],
        ),
    output:
        metrics=expand(
            "results/metrics/{prior}/{model}.json", prior=["vae", "lsgm_with_normal_prior", "lsgm"], model=PARAMS.run
        ),
        history="results/tables/history.csv",
        markdown="results/tables/comparison.md",
        csv="results/tables/comparison.csv",
        table=report("results/tables/comparison.html", caption="../report/table.rst", category="1. Comparison"),
        nelbo=report("results/figures/nelbo.png", caption="../report/nelbo.rst", category="1. Comparison"),
        samples=report(
            expand("results/figures/{model}_samples.png", model=PARAMS.run),
            caption="../report/samples.rst",
            category="2. Samples",
        ),
        training=report(
            expand("results/figures/{model}_training.png", model=PARAMS.run),
            caption="../report/training.rst",
            category="3. Training",
        ),
    log:
        "logs/tabulate.log",
    threads: 1
    resources:
        mem_mb=4000,
        runtime=30,
    params:
        results=expand("results/models/{model}", model=PARAMS.run),
    shell:
        "exec lsgm tabulate --results {params.results} --out results --log {log}"
