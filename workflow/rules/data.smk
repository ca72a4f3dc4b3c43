# The store's manifest stands for all of it. `update`: Snakemake neither deletes it before the job runs nor after one that
# failed; the arrays, which are no outputs here, are replaced by `lsgm prepare` when the new ones are whole. A manifest
# with the same content makes nothing again.
rule prepare:
    input:
        config="configs/prepare/{dataset}.json",
    output:
        manifest=update("data/{dataset}/manifest.json"),
    log:
        "logs/prepare/{dataset}.log",
    threads: 4
    resources:
        mem_mb=4000,
        runtime=240,
    shell:
        "exec lsgm prepare --config {input.config} --out data/{wildcards.dataset} --log {log}"


# What samples are compared with. First of all that can run: where weights cannot be had, it says so before the trainings.
rule statistics:
    input:
        rules.prepare.output,
        config="configs/statistics/{dataset}.{extractor}.json",
    output:
        "evaluation/statistics/{dataset}/{extractor}.safetensors",
    log:
        "logs/statistics/{dataset}.{extractor}.log",
    priority: 100
    threads: threads_of("evaluate")
    resources:
        **resources_of("evaluate"),
    shell:
        "exec lsgm statistics --config {input.config} --data data/{wildcards.dataset} --out {output} --log {log}"
