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
