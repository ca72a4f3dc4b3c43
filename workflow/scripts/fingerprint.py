"""What a stage's result depends on in the library's code, as twelve hex digits.

The fingerprint of a stage covers the modules that its entry modules import, directly or not, read as syntax
trees: a changed comment, docstring or line break leaves it as it is. It is part of the stage's frozen
configuration, so a change of the code reruns exactly the stages that use it.
"""

from __future__ import annotations

import ast
import functools
import hashlib
from collections.abc import Iterator
from pathlib import Path

ENTRIES = {
    "prepare": ["lsgm.data.prepare"],
    "statistics": ["lsgm.evaluation.statistics"],
    "pretrain": ["lsgm.training.pretrain"],
    "train": ["lsgm.training.train"],
    "sample": ["lsgm.evaluation.generate", "lsgm.sampling.ode"],
    "nelbo": ["lsgm.evaluation.likelihood"],
    "evaluate": ["lsgm.evaluation.evaluate"],
    "illustrate": ["lsgm.evaluation.illustrate", "lsgm.sampling.ode"],
    "tabulate": ["lsgm.evaluation.ablations", "lsgm.evaluation.tables"],
}

# Left out, or every result would depend on them: the command line and the package's front door only pass things on;
# the values of the configuration are in the frozen file already (a new key must not retrain a model that has no use
# for it); error messages, atomic writing and progress bars change no result.
IGNORED = {
    "lsgm", "lsgm.bounds", "lsgm.cli", "lsgm.config", "lsgm.errors", "lsgm.files", "lsgm.grids",
    "lsgm.mistakes", "lsgm.params", "lsgm.plan", "lsgm.progress", "lsgm.yaml_reader",
}  # fmt: skip

# Imported by modules that other stages share, but called in these stages alone: a change of the ODE solver must not
# retrain a model.
ONLY_FOR = {
    "lsgm.data.download": {"prepare"},  # elsewhere it brings weights, which are known by their hash
    "lsgm.evaluation.weights": {"statistics", "evaluate"},  # a folder of files: other features draw nothing anew
    "lsgm.sampling.ode": {"sample", "nelbo", "illustrate"},
    "lsgm.sampling.ancestral": {"sample", "nelbo"},
}


def fingerprint(stage: str, root: Path) -> str:
    """Fingerprint of ``stage``; ``root`` is the folder of the package ``lsgm``."""
    digest = hashlib.sha256()
    for path in sources(stage, root):
        code = _code(path) if path.suffix == ".py" else path.read_bytes()
        digest.update(f"{path.relative_to(root).as_posix()}\0{hashlib.sha256(code).hexdigest()}\n".encode())
    return digest.hexdigest()[:12]


def sources(stage: str, root: Path) -> list[Path]:
    """The files that ``stage`` uses: the modules it imports within the package, and the weights beside them."""
    ignored = IGNORED | {module for module, stages in ONLY_FOR.items() if stage not in stages}
    found: dict[str, Path] = {}
    todo = list(ENTRIES[stage])
    while todo:
        module = todo.pop()
        if module in found or module in ignored:
            continue
        path = _file(module, root)
        if path is None:
            raise FileNotFoundError(f"there is no module {module} in {root}")
        found[module] = path
        todo.append(module.rpartition(".")[0])  # importing a module runs its package's __init__ first
        todo.extend(_imports(path, module, root))
    beside = [w for p in found.values() if p.name == "__init__.py" for w in p.parent.rglob("*.safetensors")]
    weights = [w for w in beside if ".".join(["lsgm", *w.parent.relative_to(root).parts]) not in ignored]
    return sorted({*found.values(), *weights})


def _file(module: str, root: Path) -> Path | None:
    """The file of a module of the package, None where there is no such module."""
    path = root.joinpath(*module.split(".")[1:])
    return next((p for p in (path / "__init__.py", path.with_suffix(".py")) if p.is_file()), None)


def _imports(path: Path, module: str, root: Path) -> Iterator[str]:
    """The package's own modules that a file imports anywhere, in a function or under TYPE_CHECKING too."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "lsgm")
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            if base.split(".")[0] == "lsgm":
                yield base
                yield from (n for n in (f"{base}.{a.name}" for a in node.names) if _file(n, root))


@functools.cache
def _code(path: Path) -> bytes:
    """The file's syntax tree without its docstrings."""
    tree = ast.parse(path.read_bytes())
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(tree):
        if isinstance(node, documented) and ast.get_docstring(node, clean=False) is not None:
            del node.body[0]
    return _text(tree).encode()


def _text(node: object) -> str:
    """Like `ast.dump`, but the same in every version of Python: fields without a value are left out."""
    if isinstance(node, ast.AST):
        fields = ((name, value) for name, value in ast.iter_fields(node) if value is not None and value != [])
        return f"{type(node).__name__}({','.join(f'{name}={_text(value)}' for name, value in fields)})"
    if isinstance(node, list):
        return f"[{','.join(map(_text, node))}]"
    return repr(node)
