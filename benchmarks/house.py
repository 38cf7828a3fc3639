"""The house in numbers: rooms, circles, the largest room, and which rules a change makes stale.

    python benchmarks/house.py CHECKOUT [CHECKOUT …]

Each checkout is a copy of the repository at some commit (git worktree add). Nothing of it is run.
"""

import ast
import re
import sys
from pathlib import Path

# Ten typical changes: the file that each touches before the move of November 2026, and after.
CHANGES = {
    "an estimate of time and memory": ("cost.py", "models/cost.py"),
    "the model card": ("stages/card.py", "artifacts/card.py"),
    "a figure": ("stages/figures.py", "report/figures/quality.py"),
    "a column of the table": ("results.py", "report/tables/columns.py"),
    "a mode's solution (MLP)": ("solutions/mlp.py", "solutions/mlp.py"),
    "a preset": ("solutions/modes.py", "solutions/modes.py"),
    "a family": ("models/families.py", "models/families/llama.py"),
    "the sums of Rxx": ("statistics.py", "rxx/container.py"),
    "emulated low precision": ("models/quantised.py", "models/quantised.py"),
    "the reader of texts": ("documents.py", "texts/reading.py"),
}


def imports(path: Path, package: Path) -> set[Path]:
    """The files of the package that a file imports, at any depth of it."""
    names: set[str] = set()
    tree = ast.parse(path.read_text())
    for block in [node for node in ast.walk(tree) if isinstance(node, ast.If)]:
        if isinstance(block.test, ast.Name) and block.test.id == "TYPE_CHECKING":
            block.body = [ast.Pass()]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.ImportFrom) and node.level == 1:
            base = ".".join(("a3", *path.parent.relative_to(package).parts, node.module or ""))
            names |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    found = set()
    for name in names:
        first, *rest = name.split(".")
        place = package.joinpath(*rest)
        for file in (place.with_suffix(".py"), place / "__init__.py"):
            if first == "a3" and rest and file.is_file():
                found.add(file)
    return found - {path}


def closure(start: Path, graph: dict[Path, set[Path]]) -> set[Path]:
    """A file and all that it imports, directly or not."""
    seen, queue = set(), [start]
    while queue:
        path = queue.pop()
        if path not in seen:
            seen.add(path)
            queue += graph[path]
    return seen


def circles(graph: dict[Path, set[Path]]) -> list[set[Path]]:
    """Groups of files that import each other."""
    reach = {path: closure(path, graph) for path in graph}
    groups = {frozenset(o for o in reach[path] if path in reach[o]) for path in graph}
    return [set(group) for group in groups if len(group) > 1]


def rules(root: Path) -> dict[str, list[str]]:
    """Each rule's modules, those of its fingerprint."""
    found: dict[str, list[str]] = {}
    for file in sorted((root / "workflow/rules").glob("*.smk")):
        for block in re.split(r"(?m)^\s*(?=(?:use )?rule\b)", file.read_text())[1:]:
            # Rules that a loop makes have no name of their own: they are called as their file.
            name = re.match(r"(?:use )?rule ?(\w+)?(?: as (\w+))?", block)
            code = re.search(r"fingerprint\(([^)]*)\)", block)
            if name and code:
                called = name[2] or name[1] or file.stem
                found[called] = re.findall(r'"(a3[\w.]*)"', code[1])
    return found


def describe(root: Path) -> None:
    """Print the numbers of one checkout."""
    package = root / "a3"
    files = sorted(package.rglob("*.py"))
    graph = {path: imports(path, package) for path in files}
    lines = {path: len(path.read_text().splitlines()) for path in files}
    rooms: dict[Path, int] = {}
    for path in files:
        rooms[path.parent] = rooms.get(path.parent, 0) + lines[path]
    largest = max(rooms, key=rooms.get)
    functions = [
        (node.end_lineno - node.lineno + 1, path, node.name)
        for path in files
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
    ]
    share = rooms[largest] / sum(lines.values())
    print(f"{root}: {len(files)} files, {sum(lines.values())} lines, {len(rooms)} rooms")
    print(f"  largest room: {largest.relative_to(root)}, {share:.0%} of the lines")
    print(f"  circles: {[sorted(p.stem for p in group) for group in circles(graph)] or 'none'}")
    print(f"  files over 450 lines: {sum(count > 450 for count in lines.values())}")
    print(f"  functions over 60 lines: {sum(count > 60 for count, *_ in functions)}")
    found = rules(root)
    print(f"  rules that a change makes stale, of {len(found)} with a fingerprint:")
    for change, places in CHANGES.items():
        path = next((package / p for p in reversed(places) if (package / p) in graph), None)
        if path is None:
            print(f"    {change}: no such file")
            continue
        stale = []
        for rule, modules in found.items():
            starts = [package.joinpath(*m.split(".")[1:]).with_suffix(".py") for m in modules]
            if any(start in graph and path in closure(start, graph) for start in starts):
                stale.append(rule)
        where = path.relative_to(root)
        print(f"    {change} ({where}): {len(stale)}: {', '.join(stale) or 'none'}")


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        describe(Path(argument).resolve())
