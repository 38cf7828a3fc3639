#!/usr/bin/env bash
# Guess: argcomplete offers in bash what the parser allows: for an argument with choices the choices, for one with
#        SuppressCompleter ("suppress the completion of specific arguments") nothing.
# What happens: `register-python-argcomplete` tells bash `complete -o default`: wherever the program offers nothing,
#        bash offers file names. A number and a name whose completer is SuppressCompleter, and a mistyped choice, are
#        completed to a file, which the program then refuses, or takes as a name. No completer can prevent it: an empty
#        answer is what makes bash go on. Only whoever registers can, by --no-defaults; FilesCompleter still works then.
# Versions: argcomplete 3.7.2, bash 5.2.
# Who is hit: command lines with choices, numbers or names: authors who follow the README offer files everywhere, and
#        cannot see it in tests of their completers.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q argcomplete==3.7.2
mkdir "$folder/here"
cd "$folder/here"
touch notes.txt
{
  echo "#!$folder/venv/bin/python"
  cat <<'PY'
import argparse
import sys

import argcomplete

parser = argparse.ArgumentParser()
parser.add_argument("--rank", type=int).completer = argcomplete.SuppressCompleter()
parser.add_argument("--size", choices=["small", "large"])
parser.add_argument("--file").completer = argcomplete.FilesCompleter()
parser.add_argument("name", nargs="?").completer = argcomplete.SuppressCompleter()
argcomplete.autocomplete(parser)
print("typed and completed:", *sys.argv[1:])
PY
} > "$folder/venv/bin/demo"
chmod +x "$folder/venv/bin/demo"
export PATH=$folder/venv/bin:$PATH

completed() {  # what bash makes of these words at the key for completions (Alt-*), after registering with these options
  register-python-argcomplete $1 demo > "$folder/registered"
  grep -oE '^ +complete -o .*' "$folder/registered"
  printf 'source %s\ndemo --size s\e*\ndemo --size n\e*\ndemo --rank n\e*\ndemo n\e*\ndemo --file n\e*\n' "$folder/registered" > "$folder/keys"
  HISTFILE=/dev/null INPUTRC=/dev/null timeout 60 bash --norc --noprofile -i < "$folder/keys" 2> /dev/null | grep '^typed' | tee "$folder/found"
}

completed ""
test "$(cut -d: -f2 "$folder/found" | tr '\n' ,)" = " --size small, --size notes.txt, --rank notes.txt, notes.txt, --file notes.txt,"
completed --no-defaults
test "$(cut -d: -f2 "$folder/found" | tr '\n' ,)" = " --size small, --size n, --rank n, n, --file notes.txt,"
