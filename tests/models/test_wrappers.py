"""Models of several modalities: the language model compressed in place, all else carried along."""

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import run
from tiny_wrappers import CONFIGS, image_inputs, tiny_wrapper
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

import a3
from a3.cli.main import main
from a3.models.arch import describe, load_arch, sketch
from a3.models.checkpoint import Checkpoint
from a3.models.compressed import compressed_arch, compressed_record
from a3.models.layerwise import layerwise
from a3.models.load import load_tokenizer
from a3.models.probe.table import read_table
from a3.models.probe.trial import cut, difference
from a3.models.probe.wrapper import WrapperTrial, refuted
from a3.models.wrappers import REFUSED_WRAPPERS, WRAPPERS
from a3.stages.export.checks import check_folder

TABLE = read_table()["wrappers"]
# One in so many of the types in `make test`; all of them in `make test-families`.
EVERY = 8
# What lies beside the weights of such models, and is no tokenizer's.
BESIDE = {
    "preprocessor_config.json": '{"image_processor_type": "SiglipImageProcessor",\n "size":16}',
    "processor_config.json": '{"processor_class": "Gemma3Processor"}',
    "chat_template.jinja": "{{ messages[0]['content'] }}\n\n",
}


def load(folder):
    options = {"dtype": torch.float32, "attn_implementation": "eager"}
    return AutoModelForImageTextToText.from_pretrained(folder, **options).eval()


# Types whose language model is probed in them.
PROBED = ("glm4v", "qwen3_vl_moe")


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(name, marks=pytest.mark.families) if name in PROBED else name
        for name in sorted(CONFIGS)
    ],
)
def folder(request, tmp_path_factory):
    """A folder with a tiny model `dense`, a `full` one of all ranks, and a `small` one."""
    work = tmp_path_factory.mktemp(request.param)
    tiny_wrapper(work / "dense", request.param)
    for name, content in BESIDE.items():
        (work / "dense" / name).write_text(content)
    (work / "text.txt").write_text("A river moves towards an ocean. In 1969 a fox jumps. " * 60)
    cut = ["--text", work / "text.txt", "--tokens", 512, "--block-length", 64]
    for name, ratio, preset in (("full", 0, "a3"), ("small", 0.3, "a3-plus")):
        how = ["--preset", preset, "--ratio", ratio, *cut]
        run("compress", work / "dense", *how, "-o", work / name)
    return work


def logits(model, inputs):
    with torch.inference_mode():
        return model(**inputs).logits


# --- all types ------------------------------------------------------------------------------------
def test_the_table_has_every_type_of_transformers_that_makes_text_of_images():
    """A type that is missing here is new: add it to a3/models/wrappers.py, then docs/probe.py."""
    known = set(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
    assert set(TABLE) == {*WRAPPERS, *REFUSED_WRAPPERS}
    assert {name for name, row in TABLE.items() if not row["why"]} == set(WRAPPERS)
    readme = Path(__file__).parents[2] / "README.md"
    assert f"[{len(WRAPPERS)} of {len(TABLE)} types]" in readme.read_text()
    if transformers.__version__ == read_table()["transformers"]:
        assert set(TABLE) == known
    if new := sorted(known - set(TABLE)):
        warnings.warn(f"not in the table: {', '.join(new)}", stacklevel=1)


@pytest.mark.parametrize(
    "model_type",
    [
        name if number % EVERY == 0 else pytest.param(name, marks=pytest.mark.families)
        for number, name in enumerate(sorted(WRAPPERS))
    ],
)
def test_a_tiny_model_of_every_type_is_the_dense_one_with_smaller_layers(model_type):
    if model_type not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        pytest.skip(f"transformers {transformers.__version__} has no {model_type}")
    assert refuted(model_type, describe) is None


@pytest.mark.parametrize("model_type", ["llama4", "mllama", "molmo2"])
def test_other_types_are_refused_with_the_reason(tmp_path, capsys, model_type):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    assert main(["plan", str(tmp_path), "--ratio", "0.2"]) == 1
    said = capsys.readouterr().err
    assert REFUSED_WRAPPERS[model_type] in said
    assert said.count("\n") == 1


# --- with images ----------------------------------------------------------------------------------
def test_at_full_rank_logits_are_the_dense_ones_with_an_image_and_without(folder):
    dense, full = load(folder / "dense"), load(folder / "full")
    inputs = image_inputs(dense)
    assert difference(logits(full, inputs), logits(dense, inputs), "with an image") is None
    text = {"input_ids": inputs["input_ids"][:, :3]}
    assert difference(logits(full, text), logits(dense, text), "text") is None
    others = inputs | {"pixel_values": inputs["pixel_values"] + 1}
    assert difference(logits(full, others), logits(full, inputs), "another image") is not None


def test_at_real_ranks_logits_are_those_of_the_dense_model_with_the_same_cuts(folder, tmp_path):
    dense = load(folder / "dense")
    trial = WrapperTrial(dense, dense.config, tmp_path, positions=True)
    trial.describe = describe
    # Of text: padded, with a cache, saved and loaded. Qwen's models remember an image that they
    # have seen, and count positions of later text from it.
    assert trial.compared({}) is None
    arch, inputs = trial.arch({}), image_inputs(dense)
    checkpoint = Checkpoint(tmp_path / "dense", arch.adapter.prefix)
    torch.manual_seed(5)
    cuts = [cut(checkpoint, arch, layer, 0.5) for layer in range(arch.layers)]
    small, emulated = trial.small(checkpoint, arch, cuts), trial.emulated(arch, cuts)
    found = logits(small, inputs)
    assert difference(found, logits(emulated, inputs), "with an image") is None
    assert difference(found, logits(dense, inputs), "uncut") is not None


def test_text_is_generated_with_a_cache_after_an_image(folder):
    small = load(folder / "small")
    inputs = image_inputs(small)
    length = inputs["input_ids"].shape[1]
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    made = [small.generate(**inputs, **options, use_cache=cache) for cache in (True, False)]
    assert made[0].shape[1] == length + 6
    assert made[0].equal(made[1])
    other = inputs | {"pixel_values": -inputs["pixel_values"]}
    assert not logits(small, other).allclose(logits(small, inputs), atol=1e-2)


# --- files ----------------------------------------------------------------------------------------
def test_all_else_is_carried_along_byte_for_byte(folder):
    for name in BESIDE:
        assert (folder / "small" / name).read_bytes() == (folder / "dense" / name).read_bytes()
    dense, small = (Checkpoint(folder / name) for name in ("dense", "small"))
    carried = [name for name in dense.names() if "language_model" not in name]
    assert len(carried) > 10
    assert set(carried) < set(small.names())
    assert all(small.tensor(name).equal(dense.tensor(name)) for name in carried)


def test_sizes_say_what_is_compressed_and_what_is_carried(folder, capsys):
    dense, small = load(folder / "dense"), load(folder / "small")
    count = {
        name: sum(p.numel() for p in m.parameters()) for name, m in (("d", dense), ("s", small))
    }
    record = compressed_record(folder / "small")
    assert record["size"]["dense"]["parameters"] == count["d"]
    assert record["size"]["compressed"]["parameters"] == count["s"]
    language = dense.get_decoder().parameters()
    head = 0 if dense.config.tie_word_embeddings else dense.lm_head.weight.numel()
    carried = count["d"] - head - sum(value.numel() for value in language)
    assert record["base"]["size"]["carried"] == carried > 0
    assert sketch(folder / "dense").size == describe(folder / "dense").size
    card = (folder / "small/README.md").read_text()
    assert f"{carried:,} of the parameters" in card
    assert "AutoProcessor" in card
    run("inspect", folder / "small")
    shown = capsys.readouterr().out
    assert f"{carried:,}" in shown
    assert "AutoModelForImageTextToText" in shown
    assert f"{record['base']['family']} in a {record['base']['wrapper']}" in shown


@pytest.mark.parametrize("command", ["hf", "gguf"])
def test_runtimes_for_language_models_are_refused_in_a_line(folder, tmp_path, capsys, command):
    assert main(["export", command, str(folder / "small"), "-o", str(tmp_path / "out.gguf")]) == 1
    said = capsys.readouterr().err
    assert "of several modalities, and a3 exports language models alone" in said
    assert said.count("\n") == 1
    assert not (tmp_path / "out.gguf").exists()


def test_vllm_is_refused_before_anything_is_read(folder, capsys):
    words = ["compress", str(folder / "dense"), "--for", "vllm", "--ratio", "0.2"]
    assert main([*words, "--text", str(folder / "text.txt"), "-o", str(folder / "served")]) == 1
    family = json.loads((folder / "dense/config.json").read_text())["model_type"]
    said = capsys.readouterr().err
    assert f"vllm cannot run it: it is in a {family}" in said


def test_speed_from_a_config_builds_its_language_model_in_place(folder, tmp_path):
    few = ["--prompt", 8, "--new-tokens", 2, "--repeats", 1, "--layers", 2, "--ratio", 0.3]
    run("eval", "speed", folder / "dense", *few, "-o", tmp_path / "speed.json")
    layers = json.loads((tmp_path / "speed.json").read_text())["layers"]
    assert layers == {"timed": 2, "of": 3}


def test_what_is_published_is_checked_as_a_model_of_images(folder):
    found = dict(check_folder(folder / "small", "float32", "cpu"))
    assert found["loads"].startswith(type(load(folder / "small")).__name__)


def test_read_layer_by_layer_it_computes_the_same(folder):
    block = torch.arange(2, 34)
    for name, arch in (("dense", load_arch), ("small", compressed_arch)):
        found = []
        for stream in (False, True):
            model = layerwise(folder / name, arch(folder / name), "float32", "cpu", stream)
            with torch.no_grad(), model.entrance():
                model.record(block)
                hidden = model.enter(block)
            for number in range(len(model.layers)):
                with torch.no_grad(), model.layer(number):
                    hidden = model.run(number, hidden)
            with torch.no_grad(), model.exit():
                found.append(model.leave(hidden).logits)
        assert found[0].equal(found[1])
        assert (
            difference(found[0], logits(load(folder / name), {"input_ids": block[None]}), "")
            is None
        )


def test_files_of_both_kinds_of_names_are_read(folder, tmp_path):
    """Hub folders are older than the classes, and name tensors otherwise."""
    names = Checkpoint(folder / "dense").names()
    new = tmp_path / "new"
    load(folder / "dense").save_pretrained(new, save_original_format=False)
    assert sorted(load_file(new / "model.safetensors")) == names
    old = sorted(load_file(folder / "dense/model.safetensors"))
    family = load_arch(folder / "dense").wrapper
    assert (old == names) == (family in ("qwen3_vl", *PROBED))
    one, two = (vars(describe(path)) for path in (new, folder / "dense"))
    assert one | {"weights_sha256": ""} == two | {"weights_sha256": ""}


def test_from_python_it_stays_a_model_of_images(folder, tmp_path, caplog):
    dense = load(folder / "dense")
    tokenizer = load_tokenizer(folder / "dense")
    options = {"ratio": 0.3, "tokens": 256, "block_length": 64, "progress": False}
    text = ["A river moves towards an ocean. " * 200]
    small = a3.compress(dense, tokenizer, text, **options)
    assert "will have no processor of images" in caplog.text
    inputs = image_inputs(dense)
    small.save_pretrained(tmp_path / "saved")
    again = load(tmp_path / "saved")
    assert type(again).__name__ == f"A3{type(dense).__name__}"
    assert difference(logits(again, inputs), logits(small.eval(), inputs), "again") is None
    assert Checkpoint(tmp_path / "saved").names() == Checkpoint(folder / "small").names()
    # Of a model that was not loaded from files, transformers would save older names.
    AutoModelForImageTextToText.from_config(small.config).save_pretrained(tmp_path / "new")
    assert Checkpoint(tmp_path / "new").names() == Checkpoint(folder / "small").names()
    run("inspect", tmp_path / "saved")
    score = a3.evaluate(tmp_path / "saved", texts=text, tokens=128, block_length=64, progress=False)
    assert score["perplexity"] > 1


# --- particular types -----------------------------------------------------------------------------
def test_gemma3_is_a_causal_type_as_well_and_has_a_processor(tmp_path):
    dense = tiny_wrapper(tmp_path / "dense", "gemma3")
    # No file names the processor's class: transformers finds it by the type of the dense model.
    images = {"image_processor_type": "Gemma3ImageProcessor", "image_seq_length": 4}
    content = json.dumps(images | {"size": {"height": 16, "width": 16}})
    (dense / "preprocessor_config.json").write_text(content)
    path = dense / "tokenizer_config.json"
    words = {"image_token": "<s>", "boi_token": "</s>", "eoi_token": "</s>"}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"extra_special_tokens": words}))
    text = tmp_path / "text.txt"
    text.write_text("A river moves towards an ocean. " * 60)
    cut = ["--text", text, "--tokens", 256, "--block-length", 64, "--ratio", 0.3]
    run("compress", tmp_path / "dense", *cut, "-o", tmp_path / "small")
    one = AutoModelForCausalLM.from_pretrained(tmp_path / "small", dtype=torch.float32).eval()
    assert type(one) is type(load(tmp_path / "small"))
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8))
    given = {"images": image, "text": "</s> A river", "return_tensors": "pt"}
    made = [AutoProcessor.from_pretrained(tmp_path / name)(**given) for name in ("dense", "small")]
    assert made[0]["pixel_values"].shape == (1, 3, 16, 16)
    assert all(made[0][name].equal(made[1][name]) for name in made[0])
    assert (tmp_path / "small/preprocessor_config.json").read_text() == content


def test_an_old_config_of_qwen_without_a_part_for_text_is_read(tmp_path):
    """As on the hub: the language model's keys lie beside vision_config."""
    tiny_wrapper(tmp_path / "dense", "qwen2_5_vl")
    path = tmp_path / "dense/config.json"
    content = json.loads(path.read_text())
    text = content.pop("text_config")
    rope = text.pop("rope_parameters")
    flat = {key: value for key, value in text.items() if key not in ("model_type", "dtype")}
    flat |= {"rope_theta": rope["rope_theta"]}
    flat |= {"rope_scaling": {"type": "mrope", "mrope_section": rope["mrope_section"]}}
    path.write_text(json.dumps(flat | content))
    assert AutoConfig.from_pretrained(tmp_path / "dense").text_config.hidden_size == 64
    (tmp_path / "text.txt").write_text("A river moves towards an ocean. " * 60)
    cut = ["--text", tmp_path / "text.txt", "--tokens", 256, "--block-length", 64, "--ratio", 0]
    run("compress", tmp_path / "dense", *cut, "-o", tmp_path / "small")
    dense, small = load(tmp_path / "dense"), load(tmp_path / "small")
    inputs = image_inputs(dense)
    assert difference(logits(small, inputs), logits(dense, inputs), "") is None


def test_a_damaged_vision_tower_is_named(tmp_path, capsys):
    tiny_wrapper(tmp_path / "dense", "mistral3")
    path = tmp_path / "dense/model.safetensors"
    tensors = load_file(path)
    lost = next(name for name in tensors if "patch_conv" in name)
    del tensors[lost]
    save_file(tensors, path, {"format": "pt"})
    assert main(["inspect", str(tmp_path / "dense")]) == 1
    assert "vision_tower.patch_conv.weight" in capsys.readouterr().err
