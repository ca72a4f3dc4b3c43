"""The whole workflow on real MNIST, with a model of a few seconds, through real Snakemake and real DVC."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import yaml

if TYPE_CHECKING:
    from ..conftest import Project

REPOSITORY = Path(__file__).parents[2]

EVERYTHING = {
    "freeze": 10,
    "prepare": 1,
    "statistics": 1,
    "pretrain_vae": 1,
    "train_lsgm": 1,
    "sample": 2,
    "nelbo": 1,
    "evaluate_model": 1,
    "illustrate": 1,
    "tabulate": 1,
}
AFTER_SAMPLING = {"freeze": 2, "sample": 1, "evaluate_model": 1, "illustrate": 1, "tabulate": 1}


def unchanged(project: Project) -> bool:
    """What `dvc status` says where nothing changed: `configure` alone is run each time, to look at the originals."""
    return project.run("dvc", "status").split() == ["configure:", "always", "changed"]


def test_one_dvc_repro_makes_everything(finished: Project) -> None:
    for path in (
        "data/mnist/manifest.json",
        "checkpoints/vae/tiny/model.safetensors",
        "checkpoints/lsgm/tiny/model.safetensors",
        "evaluation/statistics/mnist/mnist_classifier.safetensors",
        "evaluation/nelbo/tiny/0-of-1.jsonl",
        "samples/lsgm/tiny/grid.png",
        "results/models/tiny/metrics.json",
        "results/tables/comparison.md",
        "results/figures/tiny_samples.png",
        "results/figures/tiny_interpolation.png",
    ):
        assert (finished.path / path).stat().st_size > 0, path
    in_git = finished.run("git", "ls-files").splitlines()
    assert "results/metrics/lsgm/tiny.json" in in_git
    assert "dvc.lock" in in_git
    assert not [
        path
        for path in in_git
        if path.startswith(("data/", "checkpoints/", "samples/", "evaluation/", "configs/", "logs/"))
    ]
    assert "tiny" in finished.run("dvc", "metrics", "show")


def test_a_second_run_does_nothing(finished: Project) -> None:
    assert finished.dry_run() == {}
    assert finished.run("dvc", "repro").count("didn't change, skipping") == 4
    assert unchanged(finished)


@pytest.mark.parametrize(
    ("model", "stages", "statistics"),
    [("cifar10_best_fid", 1, 2), ("omniglot", 1, 0), ("celebahq256_qualitative", 2, 2)],
)
def test_the_plan_of_a_model_of_the_paper(fresh: Project, model: str, stages: int, statistics: int) -> None:
    """From data to evaluation; for the three-stage model with two end-to-end trainings, one after the other."""
    with fresh.edited(
        "params.yaml", (fresh.path / "params.yaml").read_text(), (REPOSITORY / "params.yaml").read_text()
    ):
        plan = fresh.dry_run(model)
    assert plan == {
        "freeze": 7 + (stages - 1) + statistics,
        "prepare": 1,
        **({"statistics": statistics} if statistics else {}),
        "pretrain_vae": 1,
        "train_lsgm": stages,
        "sample": 2,
        "nelbo": 1,
        "evaluate_model": 1,
    }
    if stages == 2:
        joint = "checkpoints/lsgm/celebahq256_qualitative_joint/model.safetensors"
        assert re.search(rf"rule train_lsgm:\n +input: .*{joint}.*\n +output: checkpoints/lsgm/{model}/", fresh.said)


def test_a_model_on_the_vae_of_another(finished: Project) -> None:
    """It takes what the other one left, is a model to `run` like any, and a change of the other reaches it."""
    tiny = yaml.safe_load((finished.path / "params.yaml").read_text())["models"]["tiny"]
    third = {key: value for key, value in tiny.items() if key not in ("vae", "pretrain")} | {"vae_of": "tiny"}
    each = ("train_lsgm", "sample", "nelbo", "evaluate_model", "illustrate")
    added = {**dict.fromkeys(each, 1), "freeze": 6, "tabulate": 1}
    with finished.parameter("models.third", third), finished.parameter("run", ["tiny", "third"]):
        assert finished.dry_run("configs")["freeze"] == 6
        assert finished.dry_run() == added
        with finished.parameter("models.tiny.train.ema", 0.95):
            assert finished.dry_run() == added | dict.fromkeys(each, 2) | {"freeze": 7}


def test_the_cells_of_a_grid_share_what_is_the_same(fresh: Project) -> None:
    """One VAE for all; samplers share the training and the likelihood too. A cell is a target like a model."""
    axes = {"steps": {str(steps): {"sample.steps": steps} for steps in (3, 4, 6)}}
    solvers = {"title": "Solvers", "base": "tiny", "axes": axes}
    priors = {
        "title": "Priors",
        "base": "tiny",
        "axes": {
            "weighting": {"ll": {}, "un": {"train.p_weighting": "un"}},
            "q": {"1": {}, "3": {"train.algorithm": 2}},
        },
        "seeds": [1, 2],
    }
    text = (fresh.path / "params.yaml").read_text()
    params = yaml.safe_load(text) | {"ablations": {"solvers": solvers, "priors": priors}}
    with fresh.edited("params.yaml", text, yaml.safe_dump(params)):
        made = {"prepare": 1, "statistics": 1, "pretrain_vae": 1}
        plan = fresh.dry_run("solvers")
        del plan["freeze"]
        three = {"sample": 3 + 1, "evaluate_model": 3}
        assert plan == made | three | {"train_lsgm": 1, "nelbo": 1, "tabulate_ablation": 1}
        plan = fresh.dry_run("priors")
        del plan["freeze"]
        six = dict.fromkeys(("train_lsgm", "nelbo", "evaluate_model"), 6)
        assert plan == made | six | {"sample": 6 + 2, "tabulate_ablation": 1}
        assert fresh.dry_run("solvers_4_seed1")["train_lsgm"] == 1
        both = fresh.dry_run("ablations_of_tiny")
        assert (both["train_lsgm"], both["pretrain_vae"], both["tabulate_ablation"]) == (6, 1, 2)
    params["run"] = ["tiny", "solvers"]
    with fresh.edited("params.yaml", text, yaml.safe_dump(params)):
        plan = fresh.dry_run()
        assert (plan["train_lsgm"], plan["evaluate_model"], plan["tabulate"], plan["tabulate_ablation"]) == (1, 4, 1, 1)
        assert fresh.dry_run("configs") == {"freeze": plan["freeze"]}


def test_a_model_that_is_not_run_is_a_target(finished: Project) -> None:
    assert finished.dry_run("unused") == {
        "freeze": 6,
        "pretrain_vae": 1,
        "train_lsgm": 1,
        "sample": 2,
        "nelbo": 1,
        "evaluate_model": 1,
    }


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("models.tiny.pretrain.lr", 5e-3, EVERYTHING | {"freeze": 1, "prepare": 0, "statistics": 0}),
        ("models.tiny.train.lr_prior", 5e-4, AFTER_SAMPLING | {"freeze": 1, "train_lsgm": 1, "sample": 1, "nelbo": 1}),
        ("models.tiny.sample.steps", 6, AFTER_SAMPLING),
        ("models.tiny.evaluate.images", 21, {"freeze": 2, "nelbo": 1, "evaluate_model": 1, "tabulate": 1}),
        ("models.tiny.evaluate.extractor", None, {"freeze": 1, "evaluate_model": 1, "tabulate": 1}),
        ("models.tiny.resources", {"evaluate": {"jobs": 3}}, {"nelbo": 3, "evaluate_model": 1, "tabulate": 1}),
        (
            "models.tiny.resources",
            {"sample": {"jobs": 3}},
            {"sample_part": 6, "sample": 2, "evaluate_model": 1, "tabulate": 1},
        ),
        ("models.unused.train.lr_prior", 5e-4, {}),
        (
            "run",
            ["tiny", "unused"],
            EVERYTHING | {"freeze": 8, "prepare": 0, "statistics": 0},
        ),
    ],
)
def test_a_changed_parameter_reruns_what_depends_on_it(
    finished: Project, key: str, value: object, expected: dict[str, int]
) -> None:
    with finished.parameter(key, value):
        assert finished.dry_run() == {name: count for name, count in expected.items() if count}


@pytest.mark.parametrize(
    ("file", "old", "new", "expected"),
    [
        ("lsgm/model.py", '"""', '"""Edited. ', {}),
        ("lsgm/cli.py", "import sys", "import sys\n\nUNUSED = 1", {}),
        (
            "lsgm/solvers/rk45.py",
            "import math",
            "import math\n\nUNUSED = 1",
            AFTER_SAMPLING | {"freeze": 3, "nelbo": 1},
        ),
        (
            "lsgm/evaluation/fidelity.py",
            "import numpy as np",
            "import numpy as np\n\nUNUSED = 1",
            {"freeze": 1, "evaluate_model": 1, "tabulate": 1},
        ),
        ("lsgm/evaluation/tables.py", "import math", "import math\n\nUNUSED = 1", {"freeze": 1, "tabulate": 1}),
    ],
)
def test_a_changed_line_of_code_reruns_what_uses_it(
    finished: Project, file: str, old: str, new: str, expected: dict[str, int]
) -> None:
    with finished.edited(file, old, new):
        assert finished.dry_run() == expected


def test_dvc_skips_the_phases_after_an_edited_docstring(finished: Project) -> None:
    with finished.edited("lsgm/sde.py", '"""', '"""Edited. '):
        said = finished.run("dvc", "repro")
    assert said.count("didn't change, skipping") == 4
    assert "Running stage 'configure'" in said
    assert "rule " not in said
    finished.run("git", "checkout", "--", "dvc.lock")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("models.tiny.train.lr_pior", 1e-3, "models.tiny.train.lr_pior: unknown key"),
        ("models.tiny.sample.count", "many", "models.tiny.sample.count: expected a valid integer"),
        ("run", ["tyni"], "there is no model 'tyni'"),
    ],
)
def test_a_bad_parameter_is_refused(finished: Project, key: str, value: object, message: str) -> None:
    with finished.parameter(key, value):
        said = finished.run("snakemake", "--dry-run", fails=True)
    assert f"params.yaml: {message}" in said or message in said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    "code", ["__use_yte__: true\n__definitions__:\n  - open('ran', 'w')\n", "? open('ran', 'w')\n: 1\n"]
)
def test_nothing_in_params_yaml_is_run(finished: Project, code: str) -> None:
    """Snakemake's `configfile:` would pass it through its template engine, before any check."""
    text = (finished.path / "params.yaml").read_text()
    with finished.edited("params.yaml", text, code + text):
        said = finished.run("snakemake", "--dry-run", fails=True)
    assert "params.yaml: line 1: " in said or "params.yaml: open" in said
    assert "Traceback" not in said
    assert not (finished.path / "ran").exists()


def test_the_command_line_changes_what_is_run(finished: Project) -> None:
    plan = finished.run("snakemake", "--dry-run", "--config", "run=[unused]")
    assert "checkpoints/vae/unused" in plan
    for wrong in ("rum=[unused]", "run=unused"):
        said = finished.run("snakemake", "--dry-run", "--config", wrong, fails=True)
        assert "--config: expected 'run=[NAME]'" in said


def test_a_failed_job_says_why(finished: Project) -> None:
    with finished.parameter("datasets.mnist.path", "/nowhere"):
        said = finished.run("snakemake", "--profile", "local", "data/mnist/manifest.json", fails=True)
    assert "datasets.mnist.path = /nowhere" in said
    assert "Traceback" not in said
    finished.run("dvc", "checkout", "--force", "--quiet")
    finished.run("python", "workflow/scripts/adopt.py")


def test_report(finished: Project) -> None:
    finished.run("snakemake", "--report", "report.html")
    assert "tiny_samples.png" in (finished.path / "report.html").read_text()
    assert finished.run("git", "status", "--porcelain") == ""


def test_lint(finished: Project) -> None:
    titles = set(re.findall(r"^ +\* (.*)$", finished.run("snakemake", "--lint", fails=True), flags=re.M))
    assert titles == {"Specify a conda environment or container for each rule.:"}  # all rules share requirements.lock


def test_a_clone_has_nothing_to_do_after_a_pull(clone: Project) -> None:
    assert clone.dry_run() == {}
    assert unchanged(clone)
    assert clone.run("git", "status", "--porcelain") == ""


def test_an_experiment_in_a_clone_runs_what_it_changes(clone: Project) -> None:
    """Nothing was run in the clone before: what it adopts is what was pulled, not what params.yaml says by now."""
    said = clone.run("dvc", "exp", "run", "--set-param", "models.tiny.sample.steps=3")
    ran = re.findall(r"^localrule (\w+):", said, flags=re.M)
    assert sorted(set(ran)) == [
        *("configs", "evaluate", "evaluate_model", "freeze", "illustrate", "sample", "tabulate")
    ]
    assert ran.count("sample") == 1
    assert clone.dry_run() == {}

    changed = json.loads(clone.run("dvc", "params", "diff", "--json"))
    assert changed == {"params.yaml": {"models.tiny.sample.steps": {"old": 5, "new": 3, "diff": -2}}}
    changed = json.loads(clone.run("dvc", "metrics", "diff", "--json"))
    assert changed["results/metrics/lsgm/tiny.json"]["nfe"]["diff"] < 0
    assert "nelbo" not in changed["results/metrics/lsgm/tiny.json"]  # the likelihood has steps of its own
    clone.run("dvc", "plots", "diff")
    page = (clone.path / "dvc_plots/index.html").read_text()
    curves = json.loads(re.search(r"var spec = (\{.*\});\n", page)[1])
    drawn = {(row["rev"], row["model"], row["stage"]) for row in curves["data"]["values"]}
    assert drawn == {(rev, "tiny", stage) for rev in ("HEAD", "workspace") for stage in ("vae", "lsgm")}
    assert "DVC_METRIC" not in json.dumps(curves)
    assert "static/HEAD_results_figures_tiny_samples.png" in page
    assert "static/workspace_results_figures_tiny_samples.png" in page


def test_an_experiment_in_a_copy_runs_what_it_changes(clone: Project) -> None:
    """As those of `dvc exp run --queue` do. The workspace stays as it is, until the experiment is applied."""
    said = clone.run("dvc", "exp", "run", "--temp", "--name", "rough", "--set-param", "models.tiny.sample.steps=3")
    ran = set(re.findall(r"^localrule (\w+):", said, flags=re.M))
    assert ran == {"configs", "evaluate", "evaluate_model", "freeze", "illustrate", "sample", "tabulate"}
    assert clone.run("git", "status", "--porcelain") == ""
    changed = json.loads(clone.run("dvc", "metrics", "diff", "HEAD", "rough", "--json"))
    assert changed["results/metrics/lsgm/tiny.json"]["nfe"]["diff"] < 0
    clone.run("dvc", "exp", "apply", "rough")
    clone.run("git", "commit", "--quiet", "--all", "--message", "rough")
    clone.run("python", "workflow/scripts/adopt.py")
    assert clone.dry_run() == {}


def test_jobs_run_the_library_of_their_checkout(finished: Project) -> None:
    """Where another one is installed, or comes first on the path."""
    with finished.edited("lsgm/cli.py", "def prepare(", "import sys\n\nsys.exit('the edited one')\n\n\ndef prepare("):
        other = type(finished)(finished.path, {**finished.environment, "PYTHONPATH": str(REPOSITORY)})
        said = other.run("snakemake", "--force", "results/metrics/lsgm/tiny.json", fails=True)
    assert "the edited one" in said
    finished.run("git", "checkout", "--", "results")
    finished.run("dvc", "checkout", "--quiet")
    finished.run("python", "workflow/scripts/adopt.py")


def test_changed_files_are_not_adopted(clone: Project) -> None:
    with (clone.path / "checkpoints/vae/tiny/model.safetensors").open("ab") as file:
        file.write(b"x")
    output = clone.run("snakemake", "--dry-run")
    assert "dvc.lock does not describe checkpoints/vae/" in output
    assert clone.dry_run() == {name: count for name, count in EVERYTHING.items() if name != "freeze"}
    assert "Not adopted" in clone.run("python", "workflow/scripts/adopt.py", fails=True)
    clone.run("dvc", "checkout", "--force", "--quiet")
    clone.run("python", "workflow/scripts/adopt.py")
    assert clone.dry_run() == {}


def test_what_a_damaged_remote_gave_is_not_adopted(finished: Project, tmp_path: Path) -> None:
    """DVC takes an object for what its name says, unless the remote has `verify`."""
    storage, path = tmp_path / "storage", "checkpoints/lsgm/tiny/model.safetensors"
    shutil.copytree(finished.path.parent / "storage", storage)
    name = hashlib.md5((finished.path / path).read_bytes()).hexdigest()
    kept = storage / "files/md5" / name[:2] / name[2:]
    kept.chmod(0o644)
    content = bytearray(kept.read_bytes())
    content[-1] ^= 1
    kept.write_bytes(content)
    clones = {}
    for verify in ("false", "true"):
        finished.run("git", "clone", "--quiet", str(finished.path), str(tmp_path / verify))
        clones[verify] = type(finished)(tmp_path / verify, finished.environment)
        clones[verify].run("dvc", "remote", "modify", "--local", "storage", "url", str(storage))
        clones[verify].run("dvc", "remote", "modify", "--local", "storage", "verify", verify)
    assert "failed" in clones["true"].run("dvc", "pull", fails=True)
    clones["false"].run("dvc", "pull")
    assert f"dvc.lock does not describe {path}" in clones["false"].run("snakemake", "--dry-run")
    assert "Not adopted" in clones["false"].run("python", "workflow/scripts/adopt.py", fails=True)


def test_an_altered_checkpoint_is_not_recorded(clone: Project) -> None:
    """Snakemake takes altered weights for up to date, as they are newer than what they are made from."""
    weights, lock = clone.path / "checkpoints/lsgm/tiny/model.safetensors", (clone.path / "dvc.lock").read_text()
    assert clone.dry_run() == {}  # adopts what was pulled
    saved = weights.read_bytes()
    weights.write_bytes(saved[:-1] + bytes([saved[-1] ^ 1]))
    assert "modified:           checkpoints/lsgm" in clone.run("dvc", "status")
    assert clone.dry_run("train") == {}
    for command in (("dvc", "repro"), ("snakemake", "samples/lsgm/tiny/samples.npy")):
        assert "lsgm/tiny/model.safetensors: altered or damaged" in clone.run(*command, fails=True)
    assert (clone.path / "dvc.lock").read_text() == lock
    weights.unlink()
    clone.run("dvc", "checkout", "--quiet")
    assert weights.read_bytes() == saved
    clone.run("python", "workflow/scripts/adopt.py")
    assert clone.dry_run() == {}
    assert unchanged(clone)
