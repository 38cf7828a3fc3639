#!/usr/bin/env bash
# Guess: a plugin is found where its package can be imported: `pip install -e .` of a project that holds the package
#        snakemake_logger_plugin_demo lets `import snakemake_logger_plugin_demo` work, and `--logger demo` with it.
# What happens: plugins are searched by pkgutil.iter_modules, which lists folders of sys.path. setuptools installs a
#        project whose packages lie beside pyproject.toml by an import hook, which lists nothing: the package is
#        imported, the plugin is unknown ("invalid choice"). The same plugin below src/, or with editable_mode=compat,
#        is installed by a path, and found; so is a plain install. Whether the folder that holds the package is on
#        sys.path by chance (python -m snakemake in the project's root) decides too.
# Versions: snakemake 9.27.1, snakemake-interface-common 1.23.0 (a comment in its source knows), setuptools 84.2.1.
# Who is hit: workflows and tools that bring a logger, executor, report or scheduler plugin of their own: it works for
#        users and fails for developers, or in the root and not elsewhere.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q snakemake==9.27.1 snakemake-interface-common==1.23.0 setuptools==84.2.1
mkdir -p "$folder/flat/snakemake_logger_plugin_demo" "$folder/below/src" "$folder/elsewhere"
cat > "$folder/flat/pyproject.toml" <<'TOML'
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"

[project]
name = "snakemake-logger-plugin-demo"
version = "1.0"
TOML
cat > "$folder/flat/snakemake_logger_plugin_demo/__init__.py" <<'PY'
from snakemake_interface_logger_plugins.base import LogHandlerBase


class LogHandler(LogHandlerBase):
    """Says nothing."""

    writes_to_stream = writes_to_file = has_filter = has_formatter = needs_rulegraph = False

    def emit(self, record) -> None:
        pass
PY
cp "$folder/flat/pyproject.toml" "$folder/below/"
cp -r "$folder/flat/snakemake_logger_plugin_demo" "$folder/below/src/"
printf 'rule all:\n    shell: "true"\n' | tee "$folder/flat/Snakefile" > "$folder/elsewhere/Snakefile"

install() {
  "$folder/venv/bin/pip" install -q --no-build-isolation --no-deps --force-reinstall "$@"
}

seen() {  # whether Python and Snakemake find the plugin, Snakemake started in this folder by this command
  local import=no plugin=no
  cd "$folder/$2"
  if "$folder/venv/bin/python" -c "import snakemake_logger_plugin_demo"; then import=yes; fi
  if "${@:3}" --logger demo --cores 1 --dry-run > "$folder/log" 2>&1; then plugin=yes; fi
  found="imported: $import, plugin found: $plugin"
  echo "$1: $found"
  if test "$plugin" = no; then tail -n 1 "$folder/log"; fi
}

install -e "$folder/flat"
seen "beside pyproject.toml, editable" elsewhere "$folder/venv/bin/snakemake"
test "$found" = "imported: yes, plugin found: no"
grep -q "invalid choice: 'demo'" "$folder/log"
seen "the same by python -m snakemake in the project's root" flat "$folder/venv/bin/python" -m snakemake
test "$found" = "imported: yes, plugin found: yes"
install -e "$folder/flat" --config-settings editable_mode=compat
seen "beside pyproject.toml, editable, editable_mode=compat" elsewhere "$folder/venv/bin/snakemake"
test "$found" = "imported: yes, plugin found: yes"
install -e "$folder/below"
seen "below src/, editable" elsewhere "$folder/venv/bin/snakemake"
test "$found" = "imported: yes, plugin found: yes"
install "$folder/flat"
seen "beside pyproject.toml, not editable" elsewhere "$folder/venv/bin/snakemake"
test "$found" = "imported: yes, plugin found: yes"
