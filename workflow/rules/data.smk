# What every store has; labels, and validation images, come with them where the dataset has some.
rule prepare:
    input:
        config="configs/prepare/{dataset}.json",
        originals=originals_of,
    output:
        manifest="data/{dataset}/manifest.json",
        arrays=expand("data/{{dataset}}/{split}_images.npy", split=["train", "test"]),
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
