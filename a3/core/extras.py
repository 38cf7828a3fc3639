"""The optional libraries (extras), which compressing a model does not need.

pyproject.toml lists the libraries of each extra. A module that imports one of them may only be
imported in functions that first call `require_installed` (tests/api/test_packaging.py checks this).
"""

from importlib.util import find_spec

from a3.core.errors import A3Error


def require_installed(module: str, extra: str) -> None:
    """Raise A3Error if a library of the extra is not installed."""
    if find_spec(module) is None:
        # For a bare `a3`, pip would look on PyPI, where another project has this name.
        raise A3Error(
            f"{module} is not installed; the extra {extra!r} of a3 has it. In a clone of a3: "
            f"pip install '.[{extra}]'"
        )
