#!/usr/bin/env bash
# Guess: code that travels with a model (auto_map, trust_remote_code=True) may import its neighbours as any package may:
#        what works as a package works from the model's folder, and save_pretrained copies all that the code needs.
# What happens: the neighbours to copy are found by a regular expression on the text ("from .X import" at the start of
#        a line), though imports of other packages are found in the syntax tree, where those in `try` do not count.
#        `from . import sizes` loads without sizes.py and fails. An example in a docstring, and a neighbour that
#        `except ImportError` lets be missing, must be there as files. save_pretrained goes by the same expression: it
#        leaves sizes.py out and says nothing, and the copy fails where it is loaded.
# Versions: transformers 5.23.0 (no torch needed).
# Who is hit: authors of models with their own code: it passes their tests as a package and fails for users, in the
#        case of save_pretrained after the upload.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q transformers==5.23.0 numpy==2.4.6
cat > "$folder/travel.py" <<'PY'
import importlib
import json
import pathlib
import sys

from transformers import AutoConfig

folder = pathlib.Path(sys.argv[1])
sys.path.insert(0, str(folder))
CODE = """
from transformers import PreTrainedConfig


class DemoConfig(PreTrainedConfig):
    model_type = "demo"

    def __init__(self, width={width}, **others):
        self.width = width
        super().__init__(**others)
"""
IMPORTS = {  # the lines at the top of the file, how it then names the width, and what becomes of it
    "module": ("from .sizes import WIDTH", "WIDTH", "8"),
    "dot": ("from . import sizes", "sizes.WIDTH", "ImportError"),
    "docstring": ('"""Example:\n    from .model import Demo\n"""\nfrom .sizes import WIDTH', "WIDTH", "FileNotFoundError"),
    "optional": (
        "try:\n    from .fast import WIDTH\nexcept ImportError:\n    from .sizes import WIDTH", "WIDTH", "FileNotFoundError"
    ),
}


def loaded(path: pathlib.Path) -> str:
    """The width in the config of this folder, loaded with its own code, or the kind of error."""
    try:
        return str(AutoConfig.from_pretrained(path, trust_remote_code=True).width)
    except (ImportError, FileNotFoundError) as error:
        print("   ", str(error).replace(str(folder), "FOLDER"))
        return type(error).__name__


for name, (lines, width, expected) in IMPORTS.items():
    path = folder / name
    path.mkdir()
    (path / "sizes.py").write_text("WIDTH = 8\n")
    (path / "configuration_demo.py").write_text(lines + "\n" + CODE.format(width=width))
    auto_map = {"AutoConfig": "configuration_demo.DemoConfig"}
    (path / "config.json").write_text(json.dumps({"model_type": "demo", "auto_map": auto_map}))
    assert importlib.import_module(f"{name}.configuration_demo").DemoConfig().width == 8
    print(lines, "-> as a package: 8, loaded by AutoConfig:", sep="\n")
    found = loaded(path)
    print("   ", found)
    assert found == expected

for name, expected in (("module", "8"), ("dot", "ImportError")):
    config = importlib.import_module(f"{name}.configuration_demo").DemoConfig
    config.register_for_auto_class()
    config().save_pretrained(folder / "saved" / name)
    print(IMPORTS[name][0], "-> saved:", *sorted(file.name for file in (folder / "saved" / name).iterdir()), "- loaded again:")
    found = loaded(folder / "saved" / name)
    print("   ", found)
    assert found == expected
PY
HF_MODULES_CACHE=$folder/modules HF_HUB_OFFLINE=1 "$folder/venv/bin/python" "$folder/travel.py" "$folder"
