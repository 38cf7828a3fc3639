"""Short names of methods, for legends and sentences: presets where the modes are those of one."""

from collections.abc import Collection

from a3.solutions.modes import COMPONENTS, PRESETS

# A method's modes and its preset.
KNOWN = {"+".join(modes[one] for one in COMPONENTS): name for name, modes in PRESETS.items()}


def named(method: str) -> str:
    """A method with its preset's name in place of the modes; unchanged if they are none's.

    What follows the modes, a training or quantisation, stays.
    """
    for modes, name in KNOWN.items():
        if method == modes or method.startswith(f"{modes}+"):
            return name + method.removeprefix(modes)
    return method


def legend_label(method: str) -> str:
    """A method as legends show it."""
    return named(method).replace("+", " + ")


def legend_title(methods: Collection[str]) -> str:
    """What a legend of methods lists."""
    presets = [named(method) != method for method in methods]
    if all(presets):
        return "preset"
    return "preset, or QK + OV + MLP" if any(presets) else "QK + OV + MLP"
