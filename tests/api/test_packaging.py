"""`pip install a3` brings what compressing a model needs, and each extra what its commands need."""

import ast
import re
import subprocess
import sys
import tomllib
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from tiny import LINES, tiny_llama

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# Each extra's own libraries; workflow takes those of others, too.
DECLARED = {
    extra: {canonicalize_name(one.name): one for one in map(Requirement, of) if one.name != "a3"}
    for extra, of in ({"": PROJECT["dependencies"]} | PROJECT["optional-dependencies"]).items()
}
# The distributions that have what is imported by a name.
OWNERS = {
    library: {canonicalize_name(one) for one in of}
    for library, of in packages_distributions().items()
}
# Run as a program, not imported.
PROGRAMS = {"pip"}
# Where the methods of pandas import a library.
METHODS = {"to_markdown": "tabulate"}


@cache
def extra_of(library: str) -> str:
    """The extra ("" for none) whose distribution has a library that is imported by this name."""
    # One that is not installed here is called like its distribution.
    of = OWNERS.get(library, {canonicalize_name(library)})
    found = [extra for extra, declared in DECLARED.items() if of & declared.keys()]
    assert len(found) == 1, f"{library}: in {found or 'no list'} of pyproject.toml"
    return found[0]


@dataclass
class Imports:
    """What one function, or a file outside of its functions, imports and has required."""

    a3: set[str] = field(default_factory=set)
    libraries: set[str] = field(default_factory=set)
    required: set[tuple[str, str]] = field(default_factory=set)


def read(node: ast.AST, found: Imports, functions: list[Imports]) -> None:
    """Fill `found` with what `node` imports, and `functions` with what functions inside it do."""
    for child in ast.iter_child_nodes(node):
        inner = found
        match child:
            case ast.If(test=ast.Name("TYPE_CHECKING")):
                continue
            case ast.FunctionDef():
                functions.append(inner := Imports())
            case ast.Import():
                for alias in child.names:
                    add(found, alias.name)
            case ast.ImportFrom(level=0):
                for name in (child.module, *(f"{child.module}.{one.name}" for one in child.names)):
                    add(found, name)
            case ast.Call(ast.Name("require_installed"), [ast.Constant(one), ast.Constant(extra)]):
                found.required.add((one, extra))
            case ast.Attribute(attr=method) if method in METHODS:
                functions.append(Imports(libraries={METHODS[method]}))
        read(child, inner, functions)


def add(found: Imports, name: str) -> None:
    """Note one imported name."""
    first = name.split(".")[0]
    if first == "a3":
        found.a3.add(name)
    elif first not in sys.stdlib_module_names:
        found.libraries.add(first)


# Plugins (a3/serve) are loaded by the programs that they are for, which have their own libraries.
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / "a3").rglob("*.py"))
    if "serve" not in path.parts
}


@cache
def imports(module: str) -> tuple[Imports, list[Imports]]:
    """What a module of a3 imports, and what its functions import."""
    found: tuple[Imports, list[Imports]] = (Imports(), [])
    read(ast.parse(MODULES[module].read_text()), *found)
    return found


@cache
def needs(module: str) -> frozenset[str]:
    """Libraries of extras without which a module cannot be imported, or used once it is."""
    seen, queue, found = set(), [module], set()
    while queue:
        if (name := queue.pop()) in MODULES and name not in seen:
            seen.add(name)
            own, functions = imports(name)
            queue += own.a3
            found |= own.libraries
            found |= {one for each in functions for one in each.libraries} & {*METHODS.values()}
    return frozenset(one for one in found if extra_of(one))


def test_what_is_imported_is_declared_and_what_is_declared_is_imported():
    imported = {
        library
        for own, functions in map(imports, MODULES)
        for each in (own, *functions)
        for library in each.libraries
    }
    assert {extra_of(library) for library in imported} == {"", "eval", "export", "onnx", "workflow"}
    used = set().union(*(OWNERS.get(library, set()) for library in imported))
    assert DECLARED[""].keys() - used == PROGRAMS


@pytest.mark.parametrize("module", MODULES)
def test_functions_require_an_extra_before_they_import_what_needs_it(module):
    if needs(module):
        return  # who imports it has to require the extra, which is another module's test
    for each in imports(module)[1]:
        wanted = {one for one in each.libraries if extra_of(one)}.union(*map(needs, each.a3))
        for library in wanted:
            assert (library, extra_of(library)) in each.required, f"{module} imports {each.a3}"
        for library, extra in each.required:
            assert extra_of(library) == extra


def test_compressing_needs_no_extra():
    first = [name for name in MODULES if name.startswith(("a3.cli", "a3.stages.collect"))]
    first += ["a3", "a3.api", "a3.pipeline", "a3.jobs.forecast", "a3.stages.approx.approximate"]
    first += [
        "a3.stages.evaluate.perplexity",
        "a3.stages.evaluate.generation",
        "a3.stages.export.hf",
        "a3.stages.export.inspect",
    ]
    assert {name: needs(name) for name in first if needs(name)} == {}


WITHOUT = """
import contextlib, io, json, sys
for library in {absent}:
    sys.modules[library] = None
import a3
from a3.cli.main import main
SMALL = ["--tokens", "256", "--block-length", "32"]
sizes = {{"tokens": 256, "block_length": 32}}
small = a3.compress("tiny", texts="text.txt", ratio=0.25, **sizes, progress=False)
small.save_pretrained("python")
commands = {{
    "plan": "plan tiny --ratio 0.25",
    "compress": "compress tiny --preset a3-plus --ratio 0.25 --text text.txt -o small",
    "ppl": "eval ppl small --text text.txt -o ppl.json",
    "inspect": "inspect tiny",
    "generation": "eval generation small --prompt River -o said.json",
    "gguf": "export gguf tiny -o new.gguf",
    "onnx": "export onnx tiny -o new",
    "harness": "eval harness tiny --task piqa -o piqa.json",
    "read": "compress x.gguf --ratio 0.25 --text text.txt -o read",
    "wheel": "compress smollm2-135m --ratio 0.25 --text text.txt -o fetched",
    "recover": "recover",
    "tables": 'tables --results r --experiments [{{"model":"tiny"}}] -o tables',
    "figures": 'figures --results r --experiments [{{"model":"tiny"}}] -o figures',
    "report": 'report --results r --experiments [{{"model":"m"}}] --tables t --config {{}} -o r',
}}
said = {{}}
for name, line in commands.items():
    small = SMALL if name in ("plan", "compress", "ppl", "read", "wheel") else []
    with contextlib.redirect_stderr(io.StringIO()) as err, contextlib.redirect_stdout(sys.stderr):
        status = main(line.split() + small)
    said[name] = (status, err.getvalue())
for call in (lambda: a3.evaluate("tiny", task="piqa"), lambda: a3.export("tiny", "y.gguf")):
    try:
        call()
    except a3.A3Error as error:
        said[str(len(said))] = (1, str(error))
print(json.dumps(said))
"""
WORKS = ("plan", "compress", "ppl", "inspect", "generation")


def test_without_extras_models_are_compressed_and_the_rest_says_what_to_install(tmp_path):
    tiny_llama(tmp_path / "tiny")
    (tmp_path / "text.txt").write_text("\n\n".join(LINES * 20))
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    # accelerate needs psutil.
    extras = set().union(*(of for extra, of in DECLARED.items() if extra)) - {"psutil"}
    absent = [library for library, of in OWNERS.items() if of & extras]
    assert {"gguf", "lm_eval", "snakemake", "matplotlib", "tabulate"} <= set(absent)
    code = WITHOUT.format(absent=absent)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True
    )
    said = yaml.safe_load(done.stdout.splitlines()[-1])
    assert {name: said.pop(name)[0] for name in WORKS} == dict.fromkeys(WORKS, 0), said
    assert len(said) == 11
    for name, (status, text) in said.items():
        assert status == 1, name
        assert re.search(r"(\w+) is not installed.* pip install '\.\[\w+\]'\n?$", text), text
    made = {"tiny", "text.txt", "x.gguf", "python", "small", "ppl.json", "said.json"}
    made |= {"ppl.timing.json", "said.timing.json"}
    assert {path.name for path in tmp_path.iterdir()} == made


def test_the_lock_has_every_library_in_a_version_that_is_allowed():
    # The extra onnx is installed for make test-runtimes alone.
    locks = [ROOT / "requirements.lock", ROOT / "tests/runtimes/locks/onnx.lock"]
    lines = [x for lock in locks for x in lock.read_text().splitlines() if not x.startswith("#")]
    locked = {canonicalize_name(name): version for name, version in (x.split("==") for x in lines)}
    makefile = (ROOT / "Makefile").read_text()
    locked |= dict(re.findall(r"(mkdocs-material)==(\S+)", makefile))
    for extra, declared in DECLARED.items():
        for name, one in declared.items():
            assert one.specifier, f"{name} of {extra!r} has no lower bound"
            if name not in PROGRAMS:  # a virtual environment has its own
                assert locked[name] in one.specifier, f"{name} of {extra!r}"


def test_conda_installs_the_lock_and_a3():
    environment = yaml.safe_load((ROOT / "environment.yaml").read_text())
    assert environment["dependencies"][-1] == {"pip": ["-r requirements.lock", "-e ."]}
    assert f"python={PROJECT['requires-python'].removeprefix('>=')}" in environment["dependencies"]
