rule sample:
    input:
        config="configs/sample/{kind}.{model}.json",
        checkpoint=lambda wildcards: expand(
            "{folder}/{file}",
            folder=checkpoint_of(wildcards.kind, wildcards.model),
            file=["model.safetensors", "config.json"],
        ),
    output:
        samples="samples/{kind}/{model}/samples.npy",
        grid="samples/{kind}/{model}/grid.png",
        facts="samples/{kind}/{model}/sampling.json",
    log:
        "logs/sample/{kind}/{model}.log",
    threads: threads_of("sample")
    resources:
        **resources_of("sample"),
    params:
        model=lambda wildcards: checkpoint_of(wildcards.kind, wildcards.model),
    shell:
        "exec lsgm sample --config {input.config} --model {params.model}"
        " --out samples/{wildcards.kind}/{wildcards.model} --log {log}"
