TABLES = ["models"]
FIGURES = ["training"]


rule tabulate:
    input:
        config="configs/tabulate/run.json",
        results=expand(
            "results/models/{model}/{file}",
            model=PARAMS.run,
            file=["metrics.json", "samples.png", "history_vae.csv", "history_lsgm.csv"],
        ),
    output:
        metrics="results/metrics.json",
        tables=report(
            expand("results/tables/{name}.{kind}", name=TABLES, kind=["csv", "md"]),
            caption="../report/tables.rst",
            category="Tables",
        ),
        figures=report(
            expand("results/figures/{name}.png", name=FIGURES),
            caption="../report/figures.rst",
            category="Figures",
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
