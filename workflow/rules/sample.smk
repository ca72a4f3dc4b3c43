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
    threads: 8
    resources:
        mem_mb=8000,
        runtime=4 * 60,
    shell:
        "exec lsgm sample --config {input.config} --model checkpoints/{wildcards.kind}/{wildcards.model}"
        " --out samples/{wildcards.kind}/{wildcards.model} --log {log}"
