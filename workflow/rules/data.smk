rule prepare:
    input:
        config="configs/prepare/{dataset}.json",
        arrays=arrays_of,
    output:
        manifest="data/{dataset}/manifest.json",
        arrays=expand("data/{{dataset}}/{split}_images.npy", split=["train", "test"]),
    log:
        "logs/prepare/{dataset}.log",
    threads: 1
    resources:
        mem_mb=4000,
        runtime=60,
    shell:
        "exec lsgm prepare --config {input.config} --out data/{wildcards.dataset} --log {log}"
