rule train_lsgm:
    input:
        config="configs/train/{model}.json",
        data=store_of,
        vae=lambda wildcards: expand(
            "{folder}/{file}", folder=start_of(wildcards.model), file=["model.safetensors", "config.json"]
        ),
    output:
        weights="checkpoints/lsgm/{model}/model.safetensors",
        config="checkpoints/lsgm/{model}/config.json",
        history="checkpoints/lsgm/{model}/history.csv",
    log:
        "logs/train/{model}.log",
    threads: threads_of("train")
    resources:
        **resources_of("train"),
    params:
        data=folder_of_store,
        vae=lambda wildcards: start_of(wildcards.model),
    shell:
        "exec workflow/scripts/launch.sh {resources.nodes} {resources.gpus_per_node}"
        " lsgm train --config {input.config} --data {params.data} --vae {params.vae}"
        " --out checkpoints/lsgm/{wildcards.model} --resume resume/lsgm/{wildcards.model}"
        " --tensorboard logs/tensorboard/lsgm/{wildcards.model} --log {log}"
