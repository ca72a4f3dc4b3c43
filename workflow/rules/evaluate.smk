# NELBOs of a part of the test images. Finished results are kept in resume/: a job that was stopped resumes.
rule nelbo:
    input:
        config="configs/nelbo/{model}.json",
        data=store_of,
        checkpoints=lambda wildcards: checkpoints_of(wildcards.model, ["model.safetensors", "config.json"]),
    output:
        "evaluation/nelbo/{model}/{part}-of-{parts}.jsonl",
    log:
        "logs/nelbo/{model}/{part}-of-{parts}.log",
    threads: threads_of("evaluate")
    resources:
        **resources_of("evaluate"),
    params:
        data=folder_of_store,
        vae=lambda wildcards: checkpoint_of("vae", wildcards.model),
        lsgm=lambda wildcards: checkpoint_of("lsgm", wildcards.model),
    shell:
        "exec lsgm nelbo --config {input.config} --data {params.data} --model {params.lsgm} --vae {params.vae}"
        " --part {wildcards.part} --parts {wildcards.parts} --out {output}"
        " --resume resume/nelbo/{wildcards.model}/{wildcards.part}-of-{wildcards.parts}.jsonl --log {log}"


rule evaluate_model:
    input:
        config="configs/evaluate/{model}.json",
        data=store_of,
        nelbo=parts_of,
        statistics=statistics_of,
        checkpoints=lambda wildcards: checkpoints_of(wildcards.model, ["config.json", "history.csv"]),
        samples=lambda wildcards: expand(
            "{folder}/{file}",
            folder=[samples_of(kind, wildcards.model) for kind in ("vae", "lsgm")],
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
        vae=lambda wildcards: checkpoint_of("vae", wildcards.model),
        lsgm=lambda wildcards: checkpoint_of("lsgm", wildcards.model),
        vae_samples=lambda wildcards: samples_of("vae", wildcards.model),
        lsgm_samples=lambda wildcards: samples_of("lsgm", wildcards.model),
    shell:
        "exec lsgm evaluate --config {input.config} --data {params.data}"
        " --model {params.lsgm} --samples {params.lsgm_samples} --vae {params.vae} --vae-samples {params.vae_samples}"
        " --nelbo {input.nelbo} --statistics {input.statistics}"
        " --out results/models/{wildcards.model} --log {log}"


rule illustrate:
    input:
        config="configs/illustrate/{model}.json",
        data=store_of,
        checkpoint=lambda wildcards: expand(
            "{folder}/{file}",
            folder=checkpoint_of("lsgm", wildcards.model),
            file=["model.safetensors", "config.json", "history.csv"],
        ),
    output:
        [
            report(
                f"results/figures/{{model}}_{name}.png",
                caption=f"../report/{name}.rst",
                category="3. Latents",
                labels={"model": "{model}", "figure": name},
            )
            for name in ("reconstructions", "interpolation", "ode", "mixing")
        ],
    log:
        "logs/illustrate/{model}.log",
    threads: threads_of("sample")
    resources:
        **resources_of("sample"),
    params:
        data=folder_of_store,
        model=lambda wildcards: checkpoint_of("lsgm", wildcards.model),
    shell:
        "exec lsgm illustrate --config {input.config} --data {params.data} --model {params.model}"
        " --out results/figures --log {log}"
