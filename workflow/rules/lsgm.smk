rule train_lsgm:
    input:
        config="configs/train/{model}.json",
        data=store_of,
        vae=start_of,
    output:
        weights="checkpoints/lsgm/{model}/model.safetensors",
        config="checkpoints/lsgm/{model}/config.json",
        history="checkpoints/lsgm/{model}/history.csv",
    log:
        "logs/train/{model}.log",
    threads: 8
    resources:
        mem_mb=8000,
        runtime=24 * 60,
    params:
        data=folder_of_store,
        vae=folder_of_start,
    shell:
        "exec lsgm train --config {input.config} --data {params.data} --vae {params.vae}"
        " --out checkpoints/lsgm/{wildcards.model} --tensorboard logs/tensorboard/lsgm/{wildcards.model} --log {log}"
