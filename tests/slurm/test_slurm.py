"""`snakemake --profile slurm` on a real Slurm that is started here: two nodes, a GPU in each that is none.

One run makes all: the whole pipeline of one model; a training that is stopped by its time limit, one that is cancelled,
one on two nodes that is put back into the queue, and one that fails. The tests look at what it left.
"""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

if TYPE_CHECKING:
    from ..conftest import Project

PATH = f"{os.environ['PATH']}{os.pathsep}/usr/sbin"
PROGRAMS = ("sbatch", "srun", "sacct", "slurmctld", "slurmd", "slurmdbd", "munged", "mariadbd", "mariadb-install-db")
MISSING = [program for program in PROGRAMS if shutil.which(program, path=PATH) is None]
pytestmark = [
    pytest.mark.skipif(bool(MISSING), reason=f"needs Slurm (tests/slurm/install.sh): no {', '.join(MISSING)}"),
    pytest.mark.skipif(not MISSING and os.geteuid() != 0, reason="only root can start this Slurm"),
]
CLUSTER = Path(__file__).with_name("cluster.sh")
# A training, its kind, and what is done to its job when it has saved a state.
DISTURBED = {
    # Slurm sends SIGTERM five minutes before the limit, but looks twice a minute: the training is held until it has.
    "limited": (
        "vae",
        "scontrol update JobId={0} TimeLimit=5 && scancel --signal=STOP {0} && "
        "(sleep 40; scancel --signal=CONT {0}) > /dev/null 2>&1 &",
    ),
    "cancelled": ("lsgm", "scancel {0}"),
    "requeued": ("lsgm", "scontrol requeue {0}"),
}


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str]) -> Iterator[dict[str, str]]:
    """The environment in which commands find the test's Slurm."""
    folder = tmp_path_factory.mktemp("slurm")
    subprocess.run([CLUSTER, "start", folder], check=True)
    found = dict(re.findall(r'(\w+)="([^"$]+)', (folder / "environment").read_text()))
    try:
        yield {
            **{name: value for name, value in environment.items() if name != "SNAKEMAKE_PROFILE"},
            "SLURM_CONF": found["SLURM_CONF"],
            "PATH": f"{found['PATH']}{environment['PATH']}",
            "SBATCH_ACCOUNT": "2024-17",
            "SBATCH_PARTITION": "all",
            "SBATCH_QOS": "short",
        }
    finally:
        subprocess.run([CLUSTER, "stop", folder], check=True)


@dataclass
class Run:
    """What a run of the workflow left."""

    project: Project
    output: str
    job_ids: dict[str, str]  # of the first jobs of the trainings that were disturbed
    accounts: list[dict[str, str]]  # Slurm's, one row each time that a job ran

    def jobs(self, comment: str) -> list[dict[str, str]]:
        """The accounts of the jobs whose comment, the rule and its wildcards, matches."""
        return [row for row in self.accounts if re.fullmatch(comment, row["Comment"])]


@pytest.fixture(scope="session")
def run(fresh: Project, cluster: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Run:
    project = type(fresh)(tmp_path_factory.mktemp("run") / "project", cluster)
    shutil.copytree(fresh.path, project.path, symlinks=True)
    write_params(project.path / "params.yaml")
    trained = [f"vae/{name}" for name in ("broken", "limited")]
    trained += [f"lsgm/{name}" for name in ("cancelled", "requeued")]
    targets = ["all", *(f"checkpoints/{name}/history.csv" for name in trained)]
    # Questions to Slurm in seconds, not minutes; the failing job is submitted twice, not four times.
    quick = ["--slurm-init-seconds-before-status-checks", "5", "--latency-wait", "5", "--retries", "1", "--keep-going"]
    said, job_ids = project.path / "said.txt", {}
    with said.open("w") as file:
        process = subprocess.Popen(
            ["snakemake", "--profile", "slurm", *quick, *targets],
            cwd=project.path, env=cluster, stdout=file, stderr=subprocess.STDOUT,
        )  # fmt: skip
        try:
            deadline = time.monotonic() + 900
            while process.poll() is None:
                time.sleep(0.1)
                assert time.monotonic() < deadline, said.read_text()
                for name, (kind, command) in DISTURBED.items():
                    states = project.path / "resume" / kind / name
                    if name not in job_ids and any(states.glob("step-*[1-9]*.pt")):  # it is in the middle
                        queue = project.run("squeue", "--noheader", "--format=%i %k")
                        (job_ids[name],) = re.findall(rf"^(\d+) .*_wildcards_{name}$", queue, flags=re.M)
                        project.run("bash", "-c", command.format(job_ids[name]))
        finally:
            process.kill()
    return Run(project, said.read_text(), job_ids, accounts(project))


def accounts(project: Project) -> list[dict[str, str]]:
    """The rows of `sacct`, once all jobs have ended there too."""
    # -D: each time that a job ran, -X: without its steps, -P: columns between bars
    columns = "JobIDRaw,Comment,State,Account,Partition,QOS,Timelimit,ReqMem,AllocTRES,Eligible,Start,End"
    for _ in range(60):
        said = project.run("sacct", "-DXP", "--starttime=now-1hour", f"--format={columns}")
        header, *rows = (line.split("|") for line in said.splitlines())
        found = [dict(zip(header, row, strict=True)) for row in rows]
        if all(row["End"] != "Unknown" for row in found):
            return found
        time.sleep(1)
    raise AssertionError(said)


def write_params(path: Path) -> None:
    """The models of the run."""
    params = yaml.safe_load(path.read_text())
    tiny = params["models"].pop("tiny")
    one = {"cpus": 1, "mem_gb": 3, "hours": 1}
    tiny["resources"] = dict.fromkeys(("pretrain", "train", "sample", "evaluate"), one)
    tiny["resources"]["sample"] = one | {"jobs": 2}
    tiny["sample"]["batch"] = 40  # the jobs share three batches
    second = {key: value for key, value in tiny.items() if key not in ("vae", "pretrain")} | {"vae_of": "tiny"}
    params["models"] = {"tiny": tiny}

    def add(name: str, like: dict[str, Any], stage: str, settings: dict[str, Any], **resources: Any) -> None:
        model = params["models"][name] = copy.deepcopy(like)
        model[stage] |= {"checkpoint_minutes": 0.01, **settings}
        model["resources"][stage] = one | resources

    add("broken", tiny, "pretrain", {"lr": 1e9, "divergence": {"skip_limit": 1, "max_restarts": 0}})
    add("limited", tiny, "pretrain", {"epochs": 0.06})
    add("cancelled", second, "train", {"epochs": 0.06}, gpus=1)
    add("requeued", second, "train", {"epochs": 0.06, "seed": 2}, nodes=2, gpus=1)
    path.write_text(yaml.safe_dump(params))


def test_the_whole_pipeline_ran_as_jobs(run: Run) -> None:
    assert (run.project.path / "results/tables/comparison.md").stat().st_size > 0
    assert (run.project.path / "results/figures/tiny_samples.png").stat().st_size > 0
    done = [row["Comment"] for row in run.jobs(".*") if row["State"] == "COMPLETED"]
    assert {"rule_prepare_wildcards_mnist", "rule_tabulate"} < set(done)
    for rule in ("pretrain_vae", "train_lsgm", "evaluate_model"):
        assert done.count(f"rule_{rule}_wildcards_tiny") == 1
    assert len([comment for comment in done if comment.startswith("rule_sample_part_")]) == 4
    assert len([comment for comment in done if re.match("rule_sample_wildcards", comment)]) == 2


def test_samples_that_two_jobs_drew(run: Run) -> None:
    folder = run.project.path / "samples" / "lsgm" / "tiny"
    assert json.loads((folder / "sampling.json").read_text())["images"] == 100
    for name in ("sample", "sample_parts"):
        assert not list((run.project.path / "resume").glob(f"{name}/*"))


def test_jobs_ask_for_what_recipe_and_environment_say(run: Run) -> None:
    for row in run.jobs(".*"):
        assert (row["Account"], row["Partition"], row["QOS"]) == ("2024-17", "all", "short")
    (row,) = run.jobs("rule_train_lsgm_wildcards_tiny")
    assert (row["Timelimit"], row["ReqMem"]) == ("01:00:00", "3000M")
    assert "cpu=1," in row["AllocTRES"]


def gpus(row: dict[str, str]) -> int:
    """GPUs that Slurm gave to a job."""
    return int(re.findall(r"gres/gpu=(\d+)", f"{row['AllocTRES']},gres/gpu=0")[0])


def test_gpus_are_scheduled(run: Run) -> None:
    """One training got a GPU, one got that of each node, no other job any; never more than there are: one waited."""
    asked = {"cancelled": 1, "requeued": 2}
    for row in run.accounts:
        rule, model = re.findall(r"rule_(\w+?)(?:_wildcards_(\w+))?$", row["Comment"])[0]
        assert gpus(row) == (asked.get(model, 0) if rule == "train_lsgm" else 0), row
        at_once = [other for other in run.accounts if other["Start"] <= row["Start"] < other["End"]]
        assert sum(map(gpus, at_once)) <= 2, at_once
    with_gpus = [row for row in run.accounts if gpus(row)]
    assert any(row["Eligible"] < other["End"] <= row["Start"] for row in with_gpus for other in with_gpus)


@pytest.mark.parametrize(
    ("name", "kind", "ends"),
    [
        ("cancelled", "lsgm", ["CANCELLED", "COMPLETED"]),
        ("limited", "vae", ["FAILED", "COMPLETED"]),
        ("requeued", "lsgm", ["REQUEUED", "COMPLETED"]),
    ],
)
def test_a_disturbed_training_goes_on_to_the_same_result(
    run: Run, undisturbed: dict[str, Path], name: str, kind: str, ends: list[str]
) -> None:
    assert name in run.job_ids, run.output
    attempts = run.jobs(f"rule_.*_wildcards_{name}")
    assert [row["State"].split()[0] for row in attempts] == ends
    assert attempts[0]["JobIDRaw"] == run.job_ids[name]
    assert (attempts[1]["JobIDRaw"] == run.job_ids[name]) == (name == "requeued")
    log = run.project.path / "logs" / {"vae": "pretrain", "lsgm": "train"}[kind] / f"{name}.log"
    (step,) = re.findall(r"resuming after step (\d+)", log.read_text())
    assert int(step) > 0
    if name != "requeued":  # whose first log is gone
        assert f"told to stop after step {step};" in run.output
    result = run.project.path / "checkpoints" / kind / name
    for file in ("model.safetensors", "history.csv"):
        assert (result / file).read_bytes() == (undisturbed[name] / file).read_bytes(), file
    assert not list((run.project.path / "resume" / kind / name).glob("*"))


@pytest.fixture(scope="session")
def undisturbed(run: Run) -> dict[str, Path]:
    """The same trainings without Slurm, from beginning to end; by the name of the disturbed one."""
    out = run.project.path / "undisturbed"
    two = ["torchrun", "--no-python", "--standalone", "--nproc-per-node", "2", "--"]
    vae = ["--vae", "checkpoints/lsgm/tiny"]
    commands = {
        "limited": ["lsgm", "pretrain", "--config", "configs/pretrain/limited.json"],
        "cancelled": ["lsgm", "train", "--config", "configs/train/cancelled.json", *vae],
        "requeued": [*two, "lsgm", "train", "--config", "configs/train/requeued.json", *vae],
    }
    for name, command in commands.items():
        rest = ["--data", "data/mnist", "--device", "cpu", "--out", str(out / name)]
        run.project.run("env", "OMP_NUM_THREADS=1", *command, *rest)
    return {name: out / name for name in commands}


def test_two_nodes_train_one_model(run: Run) -> None:
    trained = json.loads((run.project.path / "checkpoints/lsgm/requeued/config.json").read_text())
    assert trained["training"]["processes"] == 2
    for row in run.jobs("rule_train_lsgm_wildcards_requeued"):
        assert "node=2" in row["AllocTRES"]


def test_a_failing_job_reports_its_log(run: Run) -> None:
    assert "Error in rule pretrain_vae" in run.output
    assert "logs/pretrain/broken.log" in run.output
    assert "VAE: diverged at step" in run.output
    assert [row["State"] for row in run.jobs(".*_broken")] == ["FAILED", "FAILED"]
