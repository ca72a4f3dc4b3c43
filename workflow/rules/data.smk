rule prepare:
    input:
        config="configs/prepare/{dataset}.json",
    output:
        manifest="data/{dataset}/manifest.json",
        arrays=expand(
            "data/{{dataset}}/{split}_{content}.npy",
            split=["train", "test"],
            content=["images", "labels"],
        ),
    log:
        "logs/prepare/{dataset}.log",
    threads: 1
    resources:
        mem_mb=4000,
        runtime=60,
    shell:
        "exec lsgm prepare --config {input.config} --out data/{wildcards.dataset} --log {log}"
