rule sample:
    input:
        config="configs/sample/{model}.json",
        weights="checkpoints/{kind}/{model}/model.safetensors",
        model="checkpoints/{kind}/{model}/config.json",
    output:
        samples="samples/{kind}/{model}/samples.npy",
        grid="samples/{kind}/{model}/grid.png",
        facts="samples/{kind}/{model}/sampling.json",
    log:
        "logs/sample/{kind}/{model}.log",
    threads: threads_of("sample")
    resources:
        **resources_of("sample"),
    shell:
        "exec lsgm sample --config {input.config} --model checkpoints/{wildcards.kind}/{wildcards.model}"
        " --out samples/{wildcards.kind}/{wildcards.model} --log {log}"
