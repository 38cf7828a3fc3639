#!/usr/bin/env bash
# Guess: a job that fails leaves no trace of success: Snakemake deletes what it wrote, the next run tries it again, and
#        "Nothing to be done" is said only when all results come from the parameters of now. With --keep-incomplete
#        the file stays to be looked at, marked incomplete, and is not used.
# What happens: a job that fails is recorded like one that finished, with its new parameters and "incomplete": false
#        (postprocess in jobs.py calls persistence.finished in either case).
#        (1) Change a parameter, let its job fail: its output is deleted, those of the rules behind it stay. The same
#        command again says "Nothing to be done (all requested files are present and up to date)" with exit status 0;
#        the table there is that of the old parameter. Before the failure a dry run names all three jobs.
#        (2) With --keep-incomplete the next run takes the half-written file for complete and builds on it, exit
#        status 0.
# Versions: snakemake 9.27.1 ((2) is known as snakemake issue 3808, of 9.13.4).
# Who is hit: whoever starts a workflow again after a failure that passes (memory, disk, network), or loops until exit
#        status 0: results of old parameters, or of half a file, look like new ones.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q snakemake==9.27.1
cat > "$folder/Snakefile" <<'SNAKEFILE'
rule table:
    input: "used.txt"
    output: "table.txt"
    shell: "cp {input} {output}"

rule use:
    input: "model.txt"
    output: "used.txt"
    shell: "cp {input} {output}"

rule model:
    output: "model.txt"
    params: size=config["size"]
    shell: "echo half of size {params.size} > {output}; test {params.size} -lt 5; echo whole >> {output}"
SNAKEFILE

workflow() {  # run the workflow in a folder of its own for this case, say what became of it
  mkdir -p "$folder/$1"
  local status=0
  (cd "$folder/$1"; shift; "$folder/venv/bin/snakemake" --snakefile ../Snakefile --cores 1 "$@") > "$folder/log" 2>&1 || status=$?
  echo "snakemake ${*:2}: exit status $status"
  grep -E '^Nothing to be done|^Error in rule' "$folder/log" | sed 's/^/    /' || true
  echo "    jobs: $(grep -oE '^(local)?rule [a-z]+' "$folder/log" | awk '{print $2}' | xargs)"
  echo "    the table: $(cat "$folder/$1/table.txt" 2> /dev/null | xargs)"
  return "$status"
}

echo "(1) a parameter changes and its job fails"
workflow deleted --config size=1
workflow deleted --config size=9 --dry-run
grep -q "Params have changed" "$folder/log"
if workflow deleted --config size=9; then echo "the job does not fail now"; exit 1; fi
workflow deleted --config size=9
grep -q "Nothing to be done" "$folder/log"
test ! -e "$folder/deleted/model.txt"
test "$(xargs < "$folder/deleted/table.txt")" = "half of size 1 whole"

echo "(2) the same with --keep-incomplete, from nothing"
if workflow kept --config size=9 --keep-incomplete; then echo "the job does not fail now"; exit 1; fi
workflow kept --config size=9
test "$(xargs < "$folder/kept/table.txt")" = "half of size 9"
