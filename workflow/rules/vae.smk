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
    threads: threads_of("pretrain")
    resources:
        **resources_of("pretrain"),
    params:
        data=folder_of_store,
    shell:
        "exec workflow/scripts/launch.sh {resources.nodes} {resources.gpus_per_node}"
        " lsgm pretrain --config {input.config} --data {params.data}"
        " --out checkpoints/vae/{wildcards.model} --resume resume/vae/{wildcards.model}"
        " --tensorboard logs/tensorboard/vae/{wildcards.model} --log {log}"
