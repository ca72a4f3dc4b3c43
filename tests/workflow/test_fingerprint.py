"""The fingerprint of a stage's code."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import yaml

import lsgm
from lsgm.config.mistakes import parse
from lsgm.params import Params

LIBRARY = Path(lsgm.__file__).parent


@pytest.fixture(scope="module")
def module() -> ModuleType:
    path = Path(__file__).parents[2] / "workflow" / "scripts" / "fingerprint.py"
    spec = importlib.util.spec_from_file_location("fingerprint", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A library of a few files, of which lsgm.data.prepare is what `prepare` enters by."""
    files = {
        "__init__.py": "",
        "config.py": "KEY = 1",
        "data/__init__.py": "",
        "data/prepare.py": (
            '"""Doc."""\nfrom lsgm.config import KEY\nfrom . import used\n\n\ndef f():\n    """Doc."""\n'
            "    import lsgm.streams\n    from lsgm.far import below\n    return 1\n"
        ),
        "data/used.py": "A = None",
        "data/unused.py": "B = 1",
        "far/__init__.py": "",
        "far/below.py": "C = 'a.safetensors'",
        "far/weights/a.safetensors": "bytes",
        "streams.py": "from lsgm.data import prepare",
    }
    for name, text in files.items():
        path = tmp_path / "lsgm" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path / "lsgm"


def test_covers_imports_anywhere_and_weights(module: ModuleType, package: Path) -> None:
    assert list(module.sources("prepare", package)) == [
        "far/weights/a.safetensors",
        "lsgm.data",
        "lsgm.data.prepare",
        "lsgm.data.used",
        "lsgm.far",
        "lsgm.far.below",
        "lsgm.streams",
    ]


@pytest.mark.parametrize(
    ("file", "old", "new", "changes"),
    [
        ("data/prepare.py", '"""Doc."""', '"""Another doc."""', False),
        ("data/prepare.py", "return 1", "return (1)  # one", False),
        ("data/prepare.py", "return 1", "return 2", True),
        ("data/prepare.py", "return 1", "return 1.0", True),
        ("data/used.py", "None", "''", True),
        ("far/below.py", "C = ", "D = ", True),
        ("far/weights/a.safetensors", "bytes", "other", True),
        ("data/unused.py", "B = 1", "B = 2", False),
        ("config.py", "KEY = 1", "KEY = 2", False),
        ("__init__.py", "", "X = 1", False),
    ],
)
def test_changes_with_the_code_alone(
    module: ModuleType, package: Path, file: str, old: str, new: str, changes: bool
) -> None:
    before = module.fingerprint("prepare", package)
    path = package / file
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    module._code.cache_clear()
    module._imported.cache_clear()
    module._tree.cache_clear()
    assert (module.fingerprint("prepare", package) != before) == changes


def test_a_missing_module_is_named(module: ModuleType, package: Path) -> None:
    module._imported.cache_clear()
    module._tree.cache_clear()
    (package / "streams.py").unlink()
    with pytest.raises(FileNotFoundError, match=r"lsgm\.streams"):
        module.fingerprint("prepare", package)


@pytest.fixture(scope="module")
def params() -> Params:
    raw = yaml.safe_load((Path(__file__).parent / "tiny.yaml").read_text())
    return parse(Params, raw, "tiny.yaml")


JOBS = {  # job -> stage and name
    "prepare": ("prepare", "mnist"),
    "statistics": ("statistics", "mnist.mnist_classifier"),
    "pretrain": ("pretrain", "tiny"),
    "train": ("train", "tiny"),
    "vae samples": ("sample.vae", "vae.tiny"),
    "samples": ("sample", "lsgm.tiny"),
    "nelbo": ("nelbo", "tiny"),
    "evaluate": ("evaluate", "tiny"),
    "illustrate": ("illustrate", "tiny"),
    "tabulate": ("tabulate", "run"),
}
TRAININGS, PRIORS = {"pretrain", "train"}, {"train", "samples", "nelbo", "illustrate"}
MODELS = {*PRIORS, "pretrain", "vae samples"}
NO_RESULT = (
    *("cli", "config", "convert", "describe", "errors", "files", "networks.published_names", "params", "progress"),
    *("published", "published_arguments", "registry", "runtime", "shapes", "verify"),
)
# Module or package -> the jobs whose result it can change; of those that a module is in, the longest counts. Jobs read
# what others made, so that what is not here is made again all the same where it depends on these.
CHANGES: dict[str, set[str]] = {
    # These only pass on, check, explain or describe; the values of the configuration are in each job's file.
    **{name: set() for name in NO_RESULT},
    "arguments": {*MODELS, "evaluate"},
    "checkpoint": {*MODELS, "evaluate"},
    "per_sample_noise": {*MODELS, "evaluate"},
    "model": {*MODELS, "evaluate"},
    "likelihoods": {*MODELS, "evaluate"},
    "widths": PRIORS,
    "nfe": PRIORS - {"train"},
    "gaussian": {*MODELS, "evaluate"},
    "networks": MODELS,
    "networks.posterior": {*MODELS, "evaluate"},
    "networks.layers": {*MODELS, "evaluate"},
    "networks.batch_norm": {*MODELS, "evaluate"},
    "networks.kernels": {*MODELS, "evaluate"},
    "networks.gather": {*MODELS, "evaluate"},
    "networks.winograd": {*MODELS, "evaluate"},
    "networks.group_norm": PRIORS,
    "networks.convvae": set(),  # the tiny model has the other backbone
    "networks.ncsnpp": PRIORS,
    "noise_schedule": PRIORS,
    "normal_error": PRIORS,
    "prior": PRIORS,
    "sde": PRIORS,
    "weighting": {"train"},
    "solvers": PRIORS - {"train"},
    "solvers.sampling": {"samples"},
    "solvers.adaptive_sde": {"samples"},
    "solvers.exponential": {"samples"},
    "solvers.cuda_graph": {"samples"},
    "training": TRAININGS,
    "training.pretrain": {"pretrain"},
    "training.train": {"train"},
    "training.ema": {"train"},
    "data": {"prepare"},
    "data.store": {*TRAININGS, "prepare", "statistics", "nelbo", "evaluate", "illustrate"},
    "data.batches": {*TRAININGS, "nelbo", "illustrate"},
    "evaluation.statistics": {"statistics", "evaluate"},
    "evaluation.extractors": {"statistics", "evaluate"},
    "evaluation.classifier": {"statistics", "evaluate"},
    "evaluation.pretrained": {"statistics", "evaluate"},
    "evaluation.evaluate": {"evaluate"},
    "evaluation.fidelity": {"evaluate"},
    "evaluation.nelbo": {"nelbo"},
    "evaluation.nelbo_results": {"evaluate"},
    "evaluation.parts": {"nelbo", "evaluate"},
    "evaluation.metrics": {"evaluate", "tabulate"},
    "evaluation.illustrate": {"illustrate"},
    "evaluation.charts": {"illustrate", "tabulate"},
    "evaluation.canvas": {"samples", "vae samples", "evaluate", "illustrate", "tabulate"},
    "evaluation.image_grids": {"samples", "vae samples", "evaluate", "illustrate"},
    "evaluation.generate": {"samples", "vae samples"},
    "evaluation.sample_chunks": {"samples", "vae samples"},
    "evaluation.samples": {"samples", "vae samples", "evaluate", "tabulate"},
    "evaluation.records": {"samples", "vae samples", "evaluate", "nelbo", "tabulate"},
    "evaluation.history": {"evaluate", "illustrate", "tabulate"},
    "evaluation.tables": {"tabulate"},
    "evaluation.ablations": {"tabulate"},
}
MODULES = [path.relative_to(LIBRARY).with_suffix("") for path in sorted(LIBRARY.rglob("*.py"))]


@pytest.mark.parametrize("file", [path.as_posix() for path in MODULES if path.name != "__init__"])
def test_a_changed_module_reruns_what_depends_on_it(
    module: ModuleType, params: Params, file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = file.replace("/", ".")
    around = [".".join(name.split(".")[:n]) for n in range(name.count(".") + 1, 0, -1)]
    expected = next((CHANGES[key] for key in around if key in CHANGES), None)
    assert expected is not None, f"{name}: say in CHANGES what it can change"
    original = module._code

    def fingerprints() -> dict[str, str]:
        return {
            job: module.fingerprint(stage, LIBRARY, params.parts(stage.partition(".")[0], of))
            for job, (stage, of) in JOBS.items()
        }

    before = fingerprints()
    changed = LIBRARY / f"{file}.py"
    monkeypatch.setattr(module, "_code", lambda path: original(path) + (b"\nCHANGED = 1" if path == changed else b""))
    after = fingerprints()
    assert {job for job in JOBS if before[job] != after[job]} == expected
