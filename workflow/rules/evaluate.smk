# Part of the test images. What is done is kept in states/: a job that was stopped goes on from there.
rule nelbo:
    input:
        config="configs/nelbo/{model}.json",
        data=store_of,
        checkpoints=lambda wildcards: expand(
            "checkpoints/{folder}/{file}",
            folder=[f"vae/{pretrained(wildcards.model)}", f"lsgm/{wildcards.model}"],
            file=["model.safetensors", "config.json"],
        ),
    output:
        "evaluation/nelbo/{model}/{part}-of-{parts}.jsonl",
    log:
        "logs/nelbo/{model}/{part}-of-{parts}.log",
    threads: threads_of("evaluate")
    resources:
        **resources_of("evaluate"),
    params:
        data=folder_of_store,
        vae=lambda wildcards: pretrained(wildcards.model),
    shell:
        "exec lsgm nelbo --config {input.config} --data {params.data}"
        " --model checkpoints/lsgm/{wildcards.model} --vae checkpoints/vae/{params.vae}"
        " --part {wildcards.part} --parts {wildcards.parts} --out {output}"
        " --state states/nelbo/{wildcards.model}/{wildcards.part}-of-{wildcards.parts}.jsonl --log {log}"


rule evaluate_model:
    input:
        config="configs/evaluate/{model}.json",
        data=store_of,
        nelbo=parts_of,
        statistics=statistics_of,
        checkpoints=lambda wildcards: expand(
            "checkpoints/{folder}/{file}",
            folder=[f"vae/{pretrained(wildcards.model)}", f"lsgm/{wildcards.model}"],
            file=["config.json", "history.csv"],
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
        " --nelbo {input.nelbo} --statistics {input.statistics}"
        " --out results/models/{wildcards.model} --log {log}"
