# The text is the rule's parameter, so the file is written again exactly when its content changes. A job reads this
# file and not params.yaml: an edit made while it waits in a queue cannot change what it does.
rule freeze:
    output:
        "configs/{stage}/{name}.json",
    log:
        "logs/configs/{stage}/{name}.log",
    wildcard_constraints:
        stage="|".join(STAGES),
        name=r"[\w.]+",
    localrule: True
    params:
        text=frozen,
    shell:
        "printf '%s\\n' {params.text:q} > {output} 2> {log}"
