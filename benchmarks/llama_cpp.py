"""Speed in llama.cpp on this CPU: dense models against compressed ones, and what sizes promise.

    make test-runtimes   # once: the environment with llama.cpp
    python benchmarks/llama_cpp.py my-llama --text my-text.txt -o work

Makes models by the settings of MODELS at each ratio, and GGUF files of each type, in the folder
`work`, where it finds them the next time. All files are loaded in one process and take turns. The
promise of a prompt is the dense model's operations over the compressed one's, that of a new token
the bytes of weights and cache that are read for it. Run it on a machine that does nothing else.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from math import prod
from pathlib import Path
from statistics import median

from gguf import GGUFReader

ROOT = Path(__file__).parents[1]
LLAMA = ROOT / ".venv-runtimes/llama/bin/python"
# By name, the settings of a3 compress: sizes that llama.cpp is fast with, any sizes, and heads of
# three quarters of SmolLM2's, so that the cache shrinks, too.
MODELS = {
    "for llama.cpp": ["--for", "llama.cpp"],
    "a3-stock": ["--preset", "a3-stock"],
    "heads of 48": ["--preset", "a3-stock", "--qk", "uniform-global@48", "--ov", "joint@48"],
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="dense folder")
    parser.add_argument("--text", type=Path, required=True, help="calibration, .txt or .jsonl")
    parser.add_argument("--tokens", default="4096", help="of the calibration; speed needs few")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=[*MODELS])
    parser.add_argument("--ratios", nargs="+", default=["0.2", "0.4"])
    parser.add_argument("--types", nargs="+", default=["f16", "q8_0"])
    parser.add_argument("--prompt", type=int, default=512, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=64, help="tokens after it")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("-o", "--out", type=Path, required=True, help="folder for models")
    options = parser.parse_args()
    if (load := os.getloadavg()[0]) > 1.5:
        print(
            f"warning: the machine is busy (load {load:.1f}): speeds will be off", file=sys.stderr
        )
    files = made(options)
    print(table(files, timed(files, options), options), end="")


def made(options):
    """{(model, type): GGUF file}, the dense model's first, each made where it is missing."""
    folders = {"dense": options.model}
    for name in options.models:
        for ratio in options.ratios:
            folder = folders[f"{name} {ratio}"] = options.out / f"{name}-{ratio}"
            words = ["--ratio", ratio, "--text", options.text, "--tokens", options.tokens]
            if not folder.exists():
                a3("compress", options.model, *MODELS[name], *words, "-o", folder)
    files = {}
    for name, folder in folders.items():
        for kind in options.types:
            path = files[name, kind] = options.out / f"{name.replace(' ', '-')}-{kind}.gguf"
            if not path.exists():
                a3("export", "gguf", folder, "--type", kind, "-o", path)
    return files


def a3(*words):
    subprocess.run([sys.executable, "-m", "a3", *map(str, words)], check=True)


def timed(files, options):
    """{file: [(seconds of the prompt, seconds of the new tokens), one a repeat]}."""
    with tempfile.TemporaryDirectory() as folder:
        asked, out = Path(folder, "asked.json"), Path(folder, "answers.json")
        said = {"files": [str(path) for path in files.values()]}
        said |= {name: getattr(options, name) for name in ("prompt", "new", "repeats")}
        asked.write_text(json.dumps(said))
        script = Path(__file__).with_name("in_llama.py")
        alone = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        subprocess.run([LLAMA, script, asked, out], check=True, env=alone)
        return json.loads(out.read_text())


def sizes(path, options):
    """(operations of a prompt, bytes read for a new token after it)."""
    reader = GGUFReader(path)

    def field(name):
        arch = reader.fields["general.architecture"].contents()
        found = reader.fields[f"{arch}.{name}"].contents()
        return found if isinstance(found, list) else [found]

    tensors = {tensor.name: tensor for tensor in reader.tensors}
    head = "output.weight" if "output.weight" in tensors else "token_embd.weight"
    # Of the embedding one row is read a token, unless it is the head.
    read = {name: one for name, one in tensors.items() if name in (head,) or "blk." in name}
    weights = sum(int(prod(one.shape)) for name, one in read.items() if name != head)
    (layers,) = field("block_count")
    queries = per_layer(field("attention.head_count"), layers)
    keys = per_layer(field("attention.head_count_kv"), layers)
    size = field("attention.key_length")[0] + field("attention.value_length")[0]
    # The head is computed for the last token alone; a token sees half of the prompt on average.
    operations = 2 * weights * options.prompt + 2 * int(prod(tensors[head].shape))
    operations += 2 * queries * size * options.prompt * options.prompt // 2
    context = options.prompt + options.new // 2
    return operations, sum(one.n_bytes for one in read.values()) + 2 * keys * size * context


def per_layer(counts, layers):
    """The sum over layers of a count that may stand for all of them."""
    return sum(counts) * (layers if len(counts) == 1 else 1)


def table(files, seconds, options):
    """Tokens a second, medians over repeats; ratios to the dense model of the same type are medians
    within repeats."""
    counts = options.prompt, options.new
    lines = [
        "| model | type | MB | prompt, tokens/s | × dense | promise | of it "
        "| new, tokens/s | × dense | promise | of it |",
        "|" + "---|" * 11,
    ]
    for (name, kind), path in files.items():
        dense = files["dense", kind]
        own, base = seconds[str(path)], seconds[str(dense)]
        cells = []
        promises = (a / b for a, b in zip(sizes(dense, options), sizes(path, options), strict=True))
        for i, promise in enumerate(promises):
            speed = counts[i] / median(times[i] for times in own)
            faster = median(b[i] / a[i] for a, b in zip(own, base, strict=True))
            cells += [f"{speed:.1f}", f"{faster:.2f}", f"{promise:.2f}", f"{faster / promise:.2f}"]
        size = path.stat().st_size / 1e6
        lines.append(f"| {name} | {kind} | {size:.0f} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
