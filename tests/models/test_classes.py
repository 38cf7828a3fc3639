"""What loads a compressed folder, attentions and adapters: models with any head, or none; LoRA."""

import copy
import pickle
from types import ModuleType

import pytest
import torch
from test_compressed import MODELS, needs, redraw, tokens
from tiny import tiny_model
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from a3.models import modeling_a3
from a3.models.arch import load_arch
from a3.models.attention_a3 import A3Attention
from a3.models.families import FAMILIES
from a3.models.modeling_a3 import AUTO, LowRank, adapt_by_default
from a3.solutions.modes import choose
from a3.solutions.plan import Plan
from a3.stages.approx.approximate import approximate, repack

# One model a family; Falcon's dense model with ALiBi differs with eager attention.
CASES = {family: case for case, (family, _) in reversed(MODELS.items()) if "alibi" not in case}
PRODUCTS = ("llama", "gpt2", "opt", "phi3", "bloom", "qwen3_moe")


def pair(folder, case, **modes):
    """A dense model, and one of full ranks or compressed by modes, in `dense` and `small`."""
    family, config = MODELS[case]
    needs(family)
    tiny_model(folder / "dense", family, **config)
    redraw(folder / "dense")
    if modes:
        approximate(folder / "dense", folder, Plan(choose(modes)), folder / "small")
    else:
        repack(folder / "dense", folder / "small")


def both(folder, auto, **options):
    """The dense and the compressed model by an auto class, of one head; and what was missing."""
    models, missing = [], []
    for name in ("dense", "small"):
        model, info = auto.from_pretrained(folder / name, output_loading_info=True, **options)
        models.append(model.eval())
        missing.append({str(key) for key in info["missing_keys"]})
    dense, small = models
    small.load_state_dict({key: dense.state_dict()[key] for key in missing[1]}, strict=False)
    return dense, small, missing


@torch.inference_mode()
def outputs(model, ids, **options):
    return model(input_ids=ids, **options)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_auto_class_of_a_family_loads_the_compressed_folder(family, tmp_path):
    pair(tmp_path, CASES[family])
    ids = tokens(tmp_path, count=12)
    asked = {"output_attentions": True, "output_hidden_states": True}
    for auto, mapping in AUTO:
        if type(load_dense(tmp_path).config) not in mapping:
            with pytest.raises(ValueError, match="Unrecognized configuration class"):
                auto.from_pretrained(tmp_path / "small")
            continue
        dense, small, missing = both(tmp_path, auto, attn_implementation="eager")
        # Dense models of some families find nothing for question answering in such a folder.
        lost = {key for key in missing[0] if not key.startswith("transformer.layers")}
        assert missing[1] <= lost
        assert all(key.split(".")[0] in ("score", "qa_outputs", "classifier") for key in missing[1])
        if missing[0] != missing[1]:
            continue
        expected, found = outputs(dense, ids, **asked), outputs(small, ids, **asked)
        torch.testing.assert_close(found[0], expected[0], rtol=0, atol=2e-5)
        layers = small.config.num_hidden_layers
        assert len(found.attentions) == layers
        assert len(found.hidden_states) == layers + 1
        for name in ("attentions", "hidden_states"):
            torch.testing.assert_close(found[name], expected[name], rtol=0, atol=2e-5)


def load_dense(folder):
    return AutoModelForCausalLM.from_pretrained(folder / "dense")


def test_question_answering_finds_the_weights_that_llamas_own_class_does_not(tmp_path):
    pair(tmp_path, "llama")
    auto = next(auto for auto, _ in AUTO if "Question" in auto.__name__)
    small, ids = auto.from_pretrained(tmp_path / "small").eval(), tokens(tmp_path)
    body = AutoModel.from_pretrained(tmp_path / "dense").eval()
    found = outputs(small.base_model, ids).last_hidden_state
    torch.testing.assert_close(found, outputs(body, ids).last_hidden_state)


@pytest.mark.parametrize("case", ["llama", "gpt2", "opt", "mixtral"])
def test_attentions_as_the_dense_model_gives_them_otherwise_too(case, tmp_path):
    pair(tmp_path, case)
    ids = tokens(tmp_path, count=7)
    dense, small, _ = both(tmp_path, AutoModelForCausalLM, attn_implementation="eager")
    options = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "pad_token_id": 1}
    options |= {"output_attentions": True, "return_dict_in_generate": True}
    expected, found = (model.generate(ids, **options).attentions for model in (dense, small))
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)
    # Asked for by the config; and of fused attention, which shows none.
    small.config.output_attentions = True
    assert len(outputs(small, ids).attentions) == 2
    fused = both(tmp_path, AutoModelForCausalLM)[:2]
    dense, small = (outputs(model, ids, output_attentions=True).attentions for model in fused)
    assert len(dense) == len(small)


@pytest.mark.parametrize("case", ["mixtral", "qwen3_moe"])
def test_routers_are_seen_and_balanced_as_in_the_dense_model(case, tmp_path):
    pair(tmp_path, case)
    ids = tokens(tmp_path, count=9)
    dense, small, _ = both(tmp_path, AutoModelForCausalLM)
    expected, found = (
        outputs(model, ids, labels=ids, output_router_logits=True) for model in (dense, small)
    )
    assert len(found.router_logits) == 2
    torch.testing.assert_close(found.router_logits, expected.router_logits, rtol=0, atol=2e-5)
    torch.testing.assert_close(found.aux_loss, expected.aux_loss, rtol=0, atol=2e-5)
    torch.testing.assert_close(found.loss, expected.loss, rtol=0, atol=2e-5)


@pytest.mark.parametrize("case", ["llama", "gpt2", "opt"])
def test_a_classifier_trains_and_is_loaded_again(case, tmp_path):
    products(tmp_path, case)
    torch.manual_seed(0)
    auto = AutoModelForSequenceClassification
    model = auto.from_pretrained(tmp_path / "small", num_labels=3)
    model.gradient_checkpointing_enable()
    ids, labels = tokens(tmp_path, count=9), torch.tensor([0, 2])
    before = outputs(model.eval(), ids, labels=labels).loss
    model.train()(input_ids=ids, labels=labels).loss.backward()
    assert not [name for name, value in model.named_parameters() if value.grad is None]
    torch.optim.SGD(model.parameters(), lr=0.01).step()
    assert outputs(model.eval(), ids, labels=labels).loss < before
    model.save_pretrained(tmp_path / "trained")
    again = auto.from_pretrained(tmp_path / "trained").eval()
    torch.testing.assert_close(outputs(again, ids).logits, outputs(model, ids).logits)


def products(folder, case):
    """A model whose matrices (of a mixture, those of attention) are factored."""
    modes = dict.fromkeys(("qk", "ov", "mlp"), "svd") | {"ratio": "0.25"}
    pair(folder, case, **modes | ({"mlp": "dense"} if "moe" in case else {}))
    return AutoModelForCausalLM.from_pretrained(folder / "small").eval()


@pytest.mark.parametrize("case", PRODUCTS)
def test_factors_are_plain_linear_layers_and_no_other_module_has_their_name(case, tmp_path):
    """peft and quantisers replace modules by their type, or by the end of their name."""
    model, ids = products(tmp_path, case), tokens(tmp_path)
    arch, names = load_arch(tmp_path / "dense"), dict(model.named_modules())
    factored = [name for name, module in names.items() if isinstance(module, LowRank)]
    assert len(factored) == 2 * (4 if arch.experts else 4 + arch.mlp_inputs + 1)
    linears = {name.removesuffix("_factors").rpartition(".")[2] for name in factored}
    for linear in linears:
        ending = [module for name, module in names.items() if name.endswith(f".{linear}")]
        assert {type(module) for module in ending} == {nn.Linear}
        assert len(ending) == arch.layers
    for name in factored:
        # The family's code finds the product where the linear layer was.
        product = model.get_submodule(name.removesuffix("_factors"))
        assert product is names[name]
        assert {type(module) for module in product.children()} == {nn.Linear}
    expected = outputs(model, ids).logits
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # noqa: S301
        torch.testing.assert_close(outputs(other, ids).logits, expected)
        assert sum(isinstance(module, LowRank) for module in other.modules()) == len(factored)
        assert all(
            isinstance(module, A3Attention) == isinstance(other.get_submodule(name), A3Attention)
            for name, module in names.items()
        )


@pytest.mark.parametrize("case", ["llama", "gpt2", "opt"])
def test_products_compile_to_one_graph(case, tmp_path):
    model, ids = products(tmp_path, case), tokens(tmp_path)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(outputs(compiled, ids).logits, outputs(model, ids).logits)


def test_peft_is_told_where_adapters_are_by_default(monkeypatch):
    """By methods whose modules of Llama are attention's, the names of which all families share."""
    constants = ModuleType(modeling_a3.PEFT)
    constants.LORA_TARGET_MODULES_MAPPING = {"llama": ["q_proj", "v_proj"], "gpt2": ["c_attn"]}
    constants.IA3_TARGET_MODULES_MAPPING = {"llama": ["k_proj", "down_proj"]}
    constants.VIT_TARGET_MODULES_MAPPING = {"vit": ["query"]}
    adapt_by_default(constants)
    assert constants.LORA_TARGET_MODULES_MAPPING["a3"] == ["q_proj", "v_proj"]
    assert "a3" not in constants.IA3_TARGET_MODULES_MAPPING | constants.VIT_TARGET_MODULES_MAPPING


@pytest.mark.parametrize("case", PRODUCTS)
@pytest.mark.parametrize("whole", [True, False])
def test_lora_of_every_kind_of_targets(case, whole, tmp_path):
    peft = pytest.importorskip("peft", reason="benchmarks/requirements.txt has it")
    if whole:
        pair(tmp_path, case)
    else:
        products(tmp_path, case)
    ids = tokens(tmp_path, count=9)
    adapter = load_arch(tmp_path / "dense").adapter
    rest = [
        place.rpartition(".")[2]
        for projection, place in adapter.places.items()
        if projection not in "qkvo"
    ]
    named = [f"{projection}_proj" for projection in "qkvo"] + (
        ["down_proj"] if adapter.experts else rest
    )
    for targets in (None, named, "all-linear"):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "small").eval()
        before = outputs(model, ids).logits
        config = peft.LoraConfig(
            r=4, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM"
        )
        adapted = peft.get_peft_model(model, config)
        adapted(input_ids=ids, labels=ids).loss.backward()
        expected = outputs(adapted, ids).logits
        assert (expected - before).abs().max() > 1e-2
        adapted.save_pretrained(tmp_path / "adapter")
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "small").eval()
        again = peft.PeftModel.from_pretrained(model, tmp_path / "adapter")
        torch.testing.assert_close(outputs(again, ids).logits, expected)
        merged = adapted.merge_and_unload()
        torch.testing.assert_close(outputs(merged, ids).logits, expected, rtol=0, atol=1e-4)
        merged.save_pretrained(tmp_path / "merged")
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
        torch.testing.assert_close(outputs(loaded, ids).logits, outputs(merged, ids).logits)
