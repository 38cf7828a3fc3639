"""The libraries of a3's extras, which compressing a model does not need.

pyproject.toml says which extra has which library. A module that imports one is itself imported in
functions that call `require_installed` first (checked by tests/api/test_packaging.py).
"""

from importlib.util import find_spec

from a3.core.errors import A3Error


def require_installed(module: str, extra: str) -> None:
    """Raise A3Error if a library is not installed that the extra has."""
    if find_spec(module) is None:
        # By its name alone, pip would look on PyPI, where another project is called a3.
        raise A3Error(
            f"{module} is not installed; the extra {extra!r} of a3 has it. In a clone of a3: "
            f"pip install '.[{extra}]'"
        )
