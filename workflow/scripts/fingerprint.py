"""What a stage's result depends on in the library's code, as twelve hex digits.

The fingerprint of a job covers the modules that the entry modules of its stage import, directly or not, and those that
implement what its configuration chooses. They are read as syntax trees: a changed comment, docstring or line break
leaves it as it is. It is part of the job's frozen configuration, so a change of the code reruns exactly the jobs that
use it.
"""

from __future__ import annotations

import ast
import functools
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lsgm.registry import module_of

ENTRIES = {
    "prepare": ["lsgm.data.prepare"],
    "statistics": ["lsgm.evaluation.statistics"],
    "pretrain": ["lsgm.training.pretrain"],
    "train": ["lsgm.training.train"],
    "sample": ["lsgm.evaluation.generate"],
    "sample.vae": ["lsgm.evaluation.generate"],
    "nelbo": ["lsgm.evaluation.nelbo"],
    "evaluate": ["lsgm.evaluation.evaluate"],
    "illustrate": ["lsgm.evaluation.illustrate"],
    "tabulate": ["lsgm.evaluation.ablations", "lsgm.evaluation.tables"],
}

# Left out, or every result would depend on them: the command line and the package's front door only pass things on;
# the values of the configuration, defaults resolved, are in the frozen file already (a new key must not retrain a model
# that has no use for it); error messages, atomic writing and progress bars change no result.
IGNORED = {
    "lsgm.cli", "lsgm.config", "lsgm.errors", "lsgm.files", "lsgm.params", "lsgm.progress", "lsgm.registry",
    "lsgm.runtime", "lsgm.shapes",
}  # fmt: skip

# Imported by modules that other stages share, but called in these stages alone: a change of the ODE solver must not
# retrain a model.
WITH_A_PRIOR = {"train", "sample", "nelbo", "illustrate"}
ONLY_FOR = {
    "lsgm.data.download": {"prepare"},  # elsewhere it fetches weights, which are known by their hash
    "lsgm.noise_schedule": WITH_A_PRIOR,
    "lsgm.normal_error": WITH_A_PRIOR,
    "lsgm.prior": WITH_A_PRIOR,
    "lsgm.sde": WITH_A_PRIOR,
    "lsgm.weighting": {"train"},
    "lsgm.solvers": WITH_A_PRIOR - {"train"},
}


def fingerprint(stage: str, root: Path, parts: Sequence[Any] = ()) -> str:
    """Fingerprint of ``stage``, a key of :data:`ENTRIES`; ``root`` is the folder of the package ``lsgm``.

    Args:
        parts: where what the job uses of what can be swapped is implemented, "module:name" or the object itself; of an
            installed package the modules that it imports from that package and from ours count too.
    """
    digest = hashlib.sha256()
    for part in parts:
        digest.update(f"{part if isinstance(part, str) else part.__qualname__}\n".encode())
    for name, path in sources(stage, root, parts).items():
        code = _code(path) if path.suffix == ".py" else path.read_bytes()
        digest.update(f"{name}\0{hashlib.sha256(code).hexdigest()}\n".encode())
    return digest.hexdigest()[:12]


def sources(stage: str, root: Path, parts: Sequence[Any] = ()) -> dict[str, Path]:
    """The files that ``stage`` uses, by name: the modules it imports, directly or not, with C code and weights."""
    roots = {"lsgm": root}
    for module in map(module_of, parts):
        package = module.partition(".")[0]
        if package not in roots:
            roots[package] = _root(package)
    left_out = IGNORED | {module for module, stages in ONLY_FOR.items() if stage not in stages}
    found: dict[str, Path] = {}
    todo = [*ENTRIES[stage], *map(module_of, parts)]
    while todo:
        module = todo.pop()
        if module in ("", "lsgm", *found) or any(f"{module}.".startswith(f"{name}.") for name in left_out):
            continue
        path = _file(module, roots)
        if path is None:
            raise FileNotFoundError(f"there is no module {module} in {roots[module.partition('.')[0]]}")
        found[module] = path
        todo.append(module.rpartition(".")[0])  # importing a module runs its package's __init__ first
        todo.extend(_imports(path, module, roots))
    weights = {
        f"{path.parents[1].name}/weights/{path.name}": path
        for module in found.values()
        for path in (module.parent / "weights").glob("*")
        if path.name in module.read_text(encoding="utf-8")
    }
    packages = {name: path.parent for name, path in found.items() if path.name == "__init__.py"}
    in_c = {f"{name}/{path.name}": path for name, folder in packages.items() for path in folder.glob("*.[ch]")}
    return dict(sorted({**found, **in_c, **weights}.items()))


def _root(package: str) -> Path:
    """The folder of an installed package, or that of a module which stands alone."""
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise FileNotFoundError(f"the package {package} is not installed")
    return Path(spec.origin).parent


def _file(module: str, roots: Mapping[str, Path]) -> Path | None:
    """The file of a module of one of the packages, None where there is no such module."""
    package, *rest = module.split(".")
    path = roots[package].joinpath(*rest)
    if not rest and not (path / "__init__.py").is_file():  # a module that stands alone
        path = roots[package] / package
    return next((p for p in (path / "__init__.py", path.with_suffix(".py")) if p.is_file()), None)


def _imports(path: Path, module: str, roots: Mapping[str, Path]) -> Iterator[str]:
    """The modules of the packages that a file imports anywhere, in a function or under TYPE_CHECKING too."""
    for base, names in _imported(path, module):
        if base.split(".")[0] in roots:
            yield base
            yield from (name for name in names if _file(name, roots))


@functools.cache
def _imported(path: Path, module: str) -> list[tuple[str, list[str]]]:
    """What a file imports: modules, and what it takes from them, which may be modules too."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    found: list[tuple[str, list[str]]] = []
    for node in _statements(_tree(path)):
        if isinstance(node, ast.Import):
            found += [(alias.name, []) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            found.append((base, [f"{base}.{alias.name}" for alias in node.names]))
    return found


@functools.cache
def _code(path: Path) -> bytes:
    """The file's syntax tree without its docstrings."""
    tree = _tree(path)
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in [tree, *_statements(tree)]:
        if isinstance(node, documented) and ast.get_docstring(node, clean=False) is not None:
            del node.body[0]
    return _text(tree).encode()


@functools.cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_bytes())


def _statements(node: ast.AST) -> Iterator[ast.stmt]:
    """The statements below a node at any depth; expressions, which hold none, are not searched."""
    for field in ("body", "orelse", "finalbody", "handlers", "cases"):
        children = getattr(node, field, None)
        for child in children if isinstance(children, list) else ():  # that of a lambda is an expression
            if isinstance(child, ast.stmt):
                yield child
            yield from _statements(child)


def _text(node: object) -> str:
    """Like `ast.dump`, but the same in every version of Python: fields without a value are left out."""
    if isinstance(node, ast.AST):
        values = ((name, getattr(node, name, None)) for name in node._fields)
        fields = [f"{name}={_text(value)}" for name, value in values if value is not None and value != []]
        return f"{type(node).__name__}({','.join(fields)})"
    if isinstance(node, list):
        return f"[{','.join(map(_text, node))}]"
    return repr(node)
