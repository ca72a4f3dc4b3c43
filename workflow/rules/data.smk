# The store's manifest stands for all of it, with the hashes of its arrays. The old one is whole until `lsgm prepare` puts
# the new one in its place, and stays where that fails (`update`). A checkpoint, because what depends on the manifest is
# to be looked at again when it is there: one with the same content makes nothing again.
checkpoint prepare:
    input:
        config="configs/prepare/{dataset}.json",
    output:
        update("data/{dataset}/manifest.json"),
    log:
        "logs/prepare/{dataset}.log",
    threads: 4
    resources:
        mem_mb=4000,
        runtime=240,
    shell:
        "exec lsgm prepare --config {input.config} --out data/{wildcards.dataset} --log {log}"


# Snakemake takes a manifest that it put back after a failure for the new one. Its record goes, and its time is to be
# before that of the configuration (not 0, which Snakemake takes for no time): the next run tries again.
onerror:
    for path in Path("configs/prepare").glob("*.json"):
        store = Path("data") / path.stem
        manifest = store / "manifest.json"
        if manifest.exists() and read_source(store).get("stage") != json.loads(path.read_text()):
            workflow.persistence.cleanup_metadata(IOFile(manifest))
            os.utime(manifest, (1, 1))


# What samples are compared with. First of all that can run: where weights cannot be had, it says so before the trainings.
rule statistics:
    input:
        store_of,
        config="configs/statistics/{dataset}.{extractor}.json",
    output:
        "evaluation/statistics/{dataset}/{extractor}.safetensors",
    log:
        "logs/statistics/{dataset}.{extractor}.log",
    priority: 100
    threads: threads_of("evaluate")
    resources:
        **resources_of("evaluate"),
    shell:
        "exec lsgm statistics --config {input.config} --data data/{wildcards.dataset} --out {output} --log {log}"
