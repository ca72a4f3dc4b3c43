rule pretrain_vae:
    input:
        config="configs/pretrain/{model}.json",
        data=store_of,
    output:
        weights="checkpoints/vae/{model}/model.safetensors",
        config="checkpoints/vae/{model}/config.json",
        history="checkpoints/vae/{model}/history.csv",
    log:
        "logs/pretrain/{model}.log",
    threads: 8
    resources:
        mem_mb=8000,
        runtime=24 * 60,
    params:
        data=folder_of_store,
    shell:
        "exec lsgm pretrain --config {input.config} --data {params.data}"
        " --out checkpoints/vae/{wildcards.model} --tensorboard logs/tensorboard/vae/{wildcards.model} --log {log}"
