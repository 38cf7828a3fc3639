"""Provenance of an artifact: a fingerprint of its stage's source code, and library versions."""

import ast
import hashlib
import importlib.metadata
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).parent.parent

LIBRARIES = ("torch", "transformers", "safetensors", "tokenizers", "numpy")


def _statements(tree: ast.Module) -> Iterator[ast.AST]:
    """Every statement of a module: the expressions, which are most of its nodes, import nothing."""
    queue: list[ast.AST] = [tree]
    while queue:
        node = queue.pop()
        yield node
        for field in ("body", "orelse", "finalbody", "handlers", "cases"):
            # A conditional expression has one node there, and no list.
            inner = getattr(node, field, None)
            queue += inner if isinstance(inner, list) else []


@cache
def _imports(path: Path) -> set[str]:
    """Names of a3 modules that a file imports, also inside functions and by relative names.

    Parsed once for all stages: a start of Snakemake asks for the fingerprints of some thirty.
    """
    names: set[str] = set()
    folders = ["a3", *path.relative_to(PACKAGE).parent.parts]
    for node in _statements(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = folders[: len(folders) + 1 - node.level] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            names |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return {name for name in names if name.split(".")[0] == "a3"}


@cache
def _path(module: str) -> Path | None:
    """The file of a module of a3, or None if the name is not a module (a function, say)."""
    base = PACKAGE.joinpath(*module.split(".")[1:])
    candidates = (base.with_suffix(".py"), base / "__init__.py")
    return next((path for path in candidates if path.is_file()), None)


@cache
def sources(module: str) -> tuple[Path, ...]:
    """Files of `module` ("a3.stages.collect.collect") and of all a3 modules it imports, sorted."""
    seen: set[Path] = set()
    queue = [module]
    while queue:
        path = _path(queue.pop())
        if path is not None and path not in seen:
            seen.add(path)
            queue += _imports(path)
    if not seen:
        raise ValueError(f"{module}: no such module")
    return tuple(sorted(seen))


@cache
def fingerprint(*modules: str) -> str:
    """Hash of the source files of a stage, including code that it loads without an import.

    Equal fingerprints mean the same code (16 hex digits). Snakemake does not follow Python imports,
    so every rule has the fingerprint as a parameter. Code that is loaded by name, as transformers
    loads the compressed model, cannot be found by following imports. A stage therefore imports it
    explicitly, or it is listed here. tests/artifacts/test_fingerprints.py compares each fingerprint
    with the modules that the stage has really loaded.
    """
    digest = hashlib.sha256()
    for path in sorted({path for module in modules for path in sources(module)}):
        digest.update(_content(path))
    return digest.hexdigest()[:16]


@cache
def _content(path: Path) -> bytes:
    """What a fingerprint has of a source file: its name and its bytes."""
    content = path.relative_to(PACKAGE).as_posix().encode() + b"\0" + path.read_bytes()
    # A template beside a stage belongs to it.
    templates = sorted(path.parent.glob(f"{path.stem}.*.jinja"))
    return content + b"".join(template.read_bytes() for template in templates)


_version = cache(importlib.metadata.version)  # parses a library's METADATA each time


def provenance(*modules: str, **settings: Any) -> dict[str, Any]:
    """The record that every artifact carries: stage, code fingerprint, versions and settings.

    The first module is that of the stage, and the last part of its name is the stage's name.
    """
    return {
        "stage": modules[0].rsplit(".", 1)[-1],
        "modules": list(modules),
        "code": fingerprint(*modules),
        "libraries": {name: _version(name) for name in LIBRARIES},
        **settings,
    }
