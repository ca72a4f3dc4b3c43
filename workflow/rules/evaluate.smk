rule evaluate_model:
    input:
        config="configs/evaluate/{model}.json",
        data=store_of,
        checkpoints=expand(
            "checkpoints/{kind}/{{model}}/{file}",
            kind=["vae", "lsgm"],
            file=["model.safetensors", "config.json", "history.csv"],
        ),
        samples=expand(
            "samples/{kind}/{{model}}/{file}",
            kind=["vae", "lsgm"],
            file=["samples.npy", "sampling.json"],
        ),
    output:
        metrics="results/models/{model}/metrics.json",
        samples="results/models/{model}/samples.png",
        histories=expand("results/models/{{model}}/history_{kind}.csv", kind=["vae", "lsgm"]),
    log:
        "logs/evaluate/{model}.log",
    threads: 8
    resources:
        mem_mb=8000,
        runtime=12 * 60,
    params:
        data=folder_of_store,
    shell:
        "exec lsgm evaluate --config {input.config} --data {params.data}"
        " --model checkpoints/lsgm/{wildcards.model} --samples samples/lsgm/{wildcards.model}"
        " --vae checkpoints/vae/{wildcards.model} --vae-samples samples/vae/{wildcards.model}"
        " --out results/models/{wildcards.model} --log {log}"
