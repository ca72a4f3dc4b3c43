"""The fingerprint of a stage's code."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

import lsgm

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
            "    import lsgm.sde\n    from lsgm.far import below\n    return 1\n"
        ),
        "data/used.py": "A = None",
        "data/unused.py": "B = 1",
        "far/__init__.py": "",
        "far/below.py": "C = 1",
        "far/weights/a.safetensors": "bytes",
        "sde.py": "from lsgm.data import prepare",
    }
    for name, text in files.items():
        path = tmp_path / "lsgm" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path / "lsgm"


def test_covers_imports_anywhere_and_weights(module: ModuleType, package: Path) -> None:
    names = [path.relative_to(package).as_posix() for path in module.sources("prepare", package)]
    assert names == [
        "data/__init__.py",
        "data/prepare.py",
        "data/used.py",
        "far/__init__.py",
        "far/below.py",
        "far/weights/a.safetensors",
        "sde.py",
    ]


@pytest.mark.parametrize(
    ("file", "old", "new", "changes"),
    [
        ("data/prepare.py", '"""Doc."""', '"""Another doc."""', False),
        ("data/prepare.py", "return 1", "return (1)  # one", False),
        ("data/prepare.py", "return 1", "return 2", True),
        ("data/prepare.py", "return 1", "return 1.0", True),
        ("data/used.py", "None", "''", True),
        ("far/below.py", "C = 1", "C = 2", True),
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
    assert (module.fingerprint("prepare", package) != before) == changes


def test_a_missing_module_is_named(module: ModuleType, package: Path) -> None:
    (package / "sde.py").unlink()
    with pytest.raises(FileNotFoundError, match=r"lsgm\.sde"):
        module.fingerprint("prepare", package)


def test_stages_of_the_library(module: ModuleType) -> None:
    used = {
        stage: {path.relative_to(LIBRARY).as_posix() for path in module.sources(stage, LIBRARY)}
        for stage in module.ENTRIES
    }
    assert "networks/nvae.py" in used["pretrain"]
    assert "prior.py" in used["train"]
    assert "sampling/ode.py" in used["sample"] & used["nelbo"]
    assert any(name.startswith("evaluation/weights/") for name in used["statistics"])
    everything = set().union(*used.values())
    assert not everything & {"__init__.py", "cli.py", "config.py", "progress.py"}
    drawing = {
        f"evaluation/{name}.py" for name in ("__init__", "canvas", "generate", "image_grids", "records", "samples")
    }
    assert {name for name in used["sample"] if name.startswith("evaluation/")} == drawing
    for stage in ("prepare", "pretrain", "train"):
        assert not [name for name in used[stage] if name.startswith("evaluation/")], stage
    assert "sampling/ode.py" not in used["pretrain"] | used["train"]  # a better solver retrains nothing
    assert not used["train"] & {"data/sources.py", "data/registry.py"}  # nor does a new mirror, or a new dataset
    assert "evaluation/fidelity.py" not in used["nelbo"]  # another formula repeats no likelihood
    assert not {"model.py", "evaluation/likelihood.py"} & used["statistics"]  # nor another model the real images'
