# Where `resources.sample.jobs` is above 1, each of them draws a part of the images and leaves it in resume/, where the
# rule `sample` finds it. A job that was stopped resumes.
rule sample_part:
    input:
        config="configs/sample/{kind}.{model}.json",
        checkpoint=sampled_checkpoint,
    output:
        temp(touch("resume/sample_parts/{kind}.{model}.{part}-of-{parts}")),
    log:
        "logs/sample/{kind}/{model}.{part}-of-{parts}.log",
    threads: threads_of("sample")
    resources:
        **resources_of("sample"),
    params:
        model=lambda wildcards: checkpoint_of(wildcards.kind, wildcards.model),
    shell:
        "exec lsgm sample --config {input.config} --model {params.model} --part {wildcards.part}"
        " --parts {wildcards.parts} --out samples/{wildcards.kind}/{wildcards.model}"
        " --resume resume/sample/{wildcards.kind}.{wildcards.model} --log {log}"


rule sample:
    input:
        config="configs/sample/{kind}.{model}.json",
        checkpoint=sampled_checkpoint,
        parts=sample_parts_of,
    output:
        samples="samples/{kind}/{model}/samples.npy",
        grid="samples/{kind}/{model}/grid.png",
        facts="samples/{kind}/{model}/sampling.json",
    log:
        "logs/sample/{kind}/{model}.log",
    threads: threads_of("sample")
    resources:
        **resources_of("sample", joined=True),
    params:
        model=lambda wildcards: checkpoint_of(wildcards.kind, wildcards.model),
    shell:
        "exec lsgm sample --config {input.config} --model {params.model}"
        " --out samples/{wildcards.kind}/{wildcards.model}"
        " --resume resume/sample/{wildcards.kind}.{wildcards.model} --log {log}"
