rule evaluate_model:
    input:
        config="configs/evaluate/{model}.json",
        data=store_of,
        checkpoints=lambda wildcards: expand(
            "checkpoints/{folder}/{file}",
            folder=[f"vae/{pretrained(wildcards.model)}", f"lsgm/{wildcards.model}"],
            file=["model.safetensors", "config.json", "history.csv"],
        ),
        samples=lambda wildcards: expand(
            "samples/{folder}/{file}",
            folder=[f"vae/{pretrained(wildcards.model)}", f"lsgm/{wildcards.model}"],
            file=["samples.npy", "sampling.json"],
        ),
    output:
        metrics="results/models/{model}/metrics.json",
        samples="results/models/{model}/samples.png",
        histories=expand("results/models/{{model}}/history_{kind}.csv", kind=["vae", "lsgm"]),
    log:
        "logs/evaluate/{model}.log",
    threads: threads_of("evaluate")
    resources:
        **resources_of("evaluate"),
    params:
        data=folder_of_store,
        vae=lambda wildcards: pretrained(wildcards.model),
    shell:
        "exec lsgm evaluate --config {input.config} --data {params.data}"
        " --model checkpoints/lsgm/{wildcards.model} --samples samples/lsgm/{wildcards.model}"
        " --vae checkpoints/vae/{params.vae} --vae-samples samples/vae/{params.vae}"
        " --out results/models/{wildcards.model} --log {log}"
