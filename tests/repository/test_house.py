"""Files and functions of a3 are short enough to be read at once (CONTRIBUTING.md)."""

import ast

from a3.core.provenance import PACKAGE

LINES_OF_A_FILE = 450
LINES_OF_A_FUNCTION = 60

SOURCES = {path.relative_to(PACKAGE).as_posix(): path.read_text() for path in PACKAGE.rglob("*.py")}


def test_no_file_is_too_long():
    lengths = {name: len(source.splitlines()) for name, source in SOURCES.items()}
    assert len(lengths) > 100
    assert {name: n for name, n in lengths.items() if n > LINES_OF_A_FILE} == {}


def test_no_function_is_too_long():
    lengths = {
        f"{name}: {node.name}": node.end_lineno - node.lineno + 1
        for name, source in SOURCES.items()
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert len(lengths) > 1000
    assert {name: n for name, n in lengths.items() if n > LINES_OF_A_FUNCTION} == {}
