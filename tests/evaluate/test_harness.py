"""Harness results: every kind of score in tables and comparisons, prompts, and what is refused."""

import json
import math
import random
import re
import shutil

import lm_eval
import pytest
import yaml
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager
from safetensors.torch import load_file, save_file
from test_tables import TEXTS, change, experiment, rows, write_results
from test_text import Guess
from tiny import BLOCK, run, tiny_llama, tiny_model, tiny_tokenizer

import a3.stages.evaluate.harness as stage
from a3.cli.main import main
from a3.core.errors import A3Error
from a3.core.files import load_yaml, read_record
from a3.experiments.config import complete
from a3.models.load import load_tokenizer
from a3.report.figures.build import build_figures
from a3.report.page import build_report
from a3.report.tables.columns import result_columns
from a3.report.tables.frames import print_table, read_csv
from a3.report.tables.results import build_tables
from a3.stages.evaluate.prompting import Prompting, choose_template
from a3.stages.evaluate.scores import scores

DOCS = [
    {
        "query": f"The {word} is",
        "choices": [" red", " a river", " of the"],
        "gold": i % 3,
        "yes": i % 2,
        "answer": f"the {word} and water " * (1 + i % 3),
        "null": None,
    }
    for i, word in enumerate(["fox", "dog", "lake", "moon", "sea", "sun"])
]
OURS = "rxx-w-rxx+xkv+rxx-w"
CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def metrics(*names, **more):
    return [{"metric": name, **more} for name in names]


CHOICE = {"output_type": "multiple_choice", "doc_to_choice": "choices", "doc_to_target": "gold"}
BINARY = CHOICE | {"doc_to_choice": [" no", " yes"], "doc_to_target": "yes"}
SCORED = {"output_type": "loglikelihood", "doc_to_target": "{{answer}}"}
ROLLING = {
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "{{answer}}",
}
WRITTEN = {
    "output_type": "generate_until",
    "doc_to_target": "{{answer}}",
    "generation_kwargs": {"until": ["\n"], "max_gen_toks": 8},
}
FILTERS = [
    {
        "name": "strict",
        "filter": [
            {"function": "regex", "regex_pattern": "(the .*)"},
            {"function": "take_first"},
        ],
    },
    {"name": "loose", "filter": [{"function": "take_first"}]},
]
# What lm-eval aggregates how: a mean, a perplexity (whose logarithm is a mean), or no mean.
MEAN, LOG, NONE = "mean", "log", "none"
KINDS = {
    "acc": (CHOICE | {"metric_list": metrics("acc", "acc_norm")}, "acc", MEAN),
    "norm": (CHOICE | {"metric_list": metrics("acc", "acc_norm")}, "acc_norm", MEAN),
    "lower": (CHOICE | {"metric_list": metrics("acc", higher_is_better=False)}, "acc", MEAN),
    "nanmean": (CHOICE | {"metric_list": metrics("acc", aggregation="nanmean")}, "acc", MEAN),
    "brier": (CHOICE | {"metric_list": metrics("brier_score")}, "brier_score", MEAN),
    "median": (CHOICE | {"metric_list": metrics("acc", aggregation="median")}, "acc", NONE),
    "mcc": (CHOICE | {"metric_list": metrics("mcc")}, "mcc", NONE),
    "f1": (BINARY | {"metric_list": metrics("f1")}, "f1", NONE),
    "lambada": (SCORED | {"metric_list": metrics("perplexity", "acc")}, "perplexity", LOG),
    "likely": (
        SCORED | {"metric_list": metrics("perplexity", aggregation="mean", higher_is_better=True)},
        "perplexity",
        MEAN,
    ),
    "words": (ROLLING, "word_perplexity", LOG),
    "bytes": (ROLLING, "byte_perplexity", LOG),
    "bits": (ROLLING, "bits_per_byte", MEAN),
    "bleu": (WRITTEN | {"metric_list": metrics("bleu")}, "bleu", NONE),
    "ter": (WRITTEN | {"metric_list": metrics("ter")}, "ter", NONE),
    "chrf": (WRITTEN | {"metric_list": metrics("chrf")}, "chrf", NONE),
    "exact": (
        WRITTEN | {"metric_list": metrics("exact_match"), "filter_list": FILTERS},
        "exact_match,strict",
        MEAN,
    ),
}
LOWER = {"lower", "brier", "ter", "lambada", "words", "bytes", "bits"}


class Noise(LM):
    """Answers at random; `good` is how likely right things are."""

    def __init__(self, seed, good):
        super().__init__()
        self.draw, self.good = random.Random(seed), good

    def loglikelihood(self, requests):
        right = [self.draw.random() < self.good for _ in requests]
        return [(-1 - self.draw.random() - 3 * (not each), each) for each in right]

    def loglikelihood_rolling(self, requests):
        return [-len(r.args[0]) * (2 - self.good + 0.1 * self.draw.random()) for r in requests]

    def generate_until(self, requests):
        return [
            r.doc["answer"] if self.draw.random() < self.good else "a lake of water"
            for r in requests
        ]


def write_task(path, **changes):
    """A local task on DOCS, and its file of data."""
    data = path.with_name("data.json")
    data.write_text("".join(json.dumps(each) + "\n" for each in DOCS))
    task = {
        "task": "mine",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "doc_to_text": "{{query}}",
    }
    kept = {key: value for key, value in (task | changes).items() if value != "leave out"}
    path.write_text(yaml.safe_dump(kept))
    return path


def result(folder, spec, metric, model):
    """What the stage records of one task and one model."""
    path = write_task(folder / "task.yaml", **spec)
    config, manager, _ = stage.find_task("mine", None, path, 0, str(folder / "cache"))
    loaded = manager.load([config])
    stage.rehearse("mine", loaded, True, metric, 0, 0, Prompting().options(None))
    found = lm_eval.evaluate(model, loaded, bootstrap_iters=20)
    means = {name: each.aggregation() for name, each in loaded["tasks"].items()}
    return scores("mine", found, means, metric) | Prompting().record


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    """A table of two methods, the other one worse, with every kind of score."""
    folder = tmp_path_factory.mktemp("kinds")
    patch = pytest.MonkeyPatch()
    patch.setenv("DISABLE_MULTIPROC", "1")
    methods = [experiment("small"), experiment("small", "svd", "svd", "svd")]
    results = folder / "results"
    write_results(results, methods)
    places = {
        "dense": results / "eval/small/dense",
        "ours": results / "eval/small/wiki" / OURS / "0.2",
        "other": results / "eval/small/wiki/svd+svd+svd/0.2",
    }
    records = {}
    for kind, (spec, metric, _) in KINDS.items():
        for seed, (name, place) in enumerate(places.items()):
            made = result(folder, spec, metric, Noise(seed, 0.35 if name == "other" else 0.9))
            records[kind, name] = made
            path = place / "harness" / f"{kind}.json"
            path.write_text((place / "harness/titles.json").read_text())
            (place / f"harness/{kind}.timing.json").write_text(
                (place / "harness/titles.timing.json").read_text()
            )
            change(path, **made)
    patch.undo()
    return results, methods, records


def built(kinds, tasks, reference=OURS):
    results, methods, _ = kinds
    out = results / "tables/out"
    build_tables(results, methods, TEXTS, tasks, out, reference)
    return out


@pytest.mark.parametrize("kind", KINDS)
def test_a_difference_is_of_what_its_name_says(kinds, kind):
    """Of means over items, and of perplexities' logarithms, paired; of other scores as they are."""
    _, metric, of = KINDS[kind]
    (row,) = rows(built(kinds, [kind]) / "comparisons.csv")
    ours, other = (kinds[2][kind, name]["value"] for name in ("ours", "other"))
    name = f"{kind}.log_{metric}" if of == LOG else f"{kind}.{metric}"
    expected = math.log(other / ours) if of == LOG else other - ours
    assert float(row[f"{name}_delta"]) == pytest.approx(expected, abs=1e-9)
    assert [key for key in row if key.startswith(kind) and key.endswith("_delta")] == [
        f"{name}_delta"
    ]
    if of == NONE:
        assert row[f"{name}_delta_stderr"] == row[f"{name}_verdict"] == ""
    elif abs(expected) > 2 * float(row[f"{name}_delta_stderr"]):
        better = (expected < 0) == (kind in LOWER)
        assert row[f"{name}_verdict"] == ("better" if better else "worse")
    else:
        assert row[f"{name}_verdict"] == "no difference"


def test_perplexities_are_told_apart(kinds):
    """The other method is worse by far: what is tested above is not only of equal scores."""
    for kind, sign in (("lambada", 1), ("words", 1), ("bits", 1), ("likely", -1)):
        (row,) = rows(built(kinds, [kind]) / "comparisons.csv")
        (delta,) = (float(v) for k, v in row.items() if k.startswith(kind) and k.endswith("delta"))
        (said,) = (v for k, v in row.items() if k.startswith(kind) and k.endswith("verdict"))
        assert (math.copysign(1, delta), said) == (sign, "worse")


@pytest.mark.parametrize("reference", [None, OURS])
def test_tables_figures_and_report_take_every_kind(kinds, reference):
    results, methods, records = kinds
    out = built(kinds, list(KINDS), reference)
    shutil.rmtree(out / "figures", ignore_errors=True)
    build_figures(results, methods, [], ["words"], out / "figures")
    page = out / "report.html"
    build_report(results, methods, TEXTS, list(KINDS), out, {}, page, reference)
    text = print_table(out)
    assert "words word_perplexity" in text
    assert ("lambada Δ log_perplexity" in text) == (reference is not None)
    assert "N/A" not in text + (out / "report.html").read_text()
    dense, _, other = rows(out / "results.csv")
    assert dense["words.value_stderr"] == ""
    values = [float(row["words.value"]) for row in (dense, other)]
    assert float(other["words.value_delta"]) == pytest.approx(values[1] - values[0])
    assert records["words", "dense"]["stderr"] is None


def test_a_score_that_is_no_number_is_a_dash(kinds):
    """As of nanmean where no item has a value: in every row, or in one alone."""
    results, methods, _ = kinds
    names = ["dense", f"wiki/{OURS}/0.2", "wiki/svd+svd+svd/0.2"]
    paths = [results / "eval/small" / name / "harness/titles.json" for name in names]
    for without in ([paths[2]], paths):
        for path in without:
            change(path, value=None, stderr=None)
        out = built(kinds, ["titles"])
        (row,) = rows(out / "comparisons.csv")
        assert not any(key.startswith("titles") for key in row)
        assert rows(out / "results.csv")[2]["titles.value_delta"] == ""
        found = read_csv(out / "results.csv")
        columns_ = {each.title: each.texts for each in result_columns(found, TEXTS, ["titles"])}
        assert columns_["titles acc"][2] == columns_["titles Δ acc"][2] == "–"
    shutil.rmtree(out / "figures", ignore_errors=True)
    build_figures(results, methods, [], ["titles"], out / "figures")


def test_a_text_and_a_task_of_one_name_are_both_there(kinds):
    results, methods, _ = kinds
    for path in results.glob("eval/**/harness/lambada.json"):
        for ending in (".json", ".timing.json"):
            source = path.with_name(f"lambada{ending}")
            source.with_name(f"encyclopedia{ending}").write_text(source.read_text())
    out = results / "tables/out"
    build_tables(results, methods, TEXTS, ["encyclopedia"], out, OURS)
    (row,) = rows(out / "comparisons.csv")
    assert row["encyclopedia.nll_delta"] != row["encyclopedia.log_perplexity_delta"] != ""
    assert print_table(out).count("encyclopedia verdict") == 2


def test_of_a_group_of_unlike_tasks_items_are_not_paired(tmp_path):
    """Its value is the mean of two perplexities, which is no mean over items."""
    manager = group(tmp_path, SCORED | {"metric_list": metrics("perplexity")}, "perplexity")
    loaded = manager.load(["both"])
    stage.rehearse("both", loaded, False, None, 0, 0, Prompting().options(None))
    found = lm_eval.evaluate(Noise(0, 0.5), loaded, bootstrap_iters=0)
    means = {name: each.aggregation() for name, each in loaded["tasks"].items()}
    record = scores("both", found, means)
    assert (record["item_scores"], record["stderr"]) == (None, None)
    assert record["value"] > 1


def group(folder, spec, metric, aggregates=True):
    """Tasks of all items and of the first two, and a group of both."""
    (folder / "group").mkdir()
    for name, count in (("a", 6), ("b", 2)):
        path = write_task(folder / "group" / f"{name}.yaml", **spec, task=name)
        data = folder / f"{name}.json"
        data.write_text("".join(json.dumps(each) + "\n" for each in DOCS[:count]))
        files = {"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")}
        made = yaml.safe_load(path.read_text()) | {"dataset_kwargs": files}
        path.write_text(yaml.safe_dump(made))
    made = {"group": "both", "task": ["a", "b"]}
    if aggregates:
        made["aggregate_metric_list"] = [{"metric": metric, "weight_by_size": True}]
    (folder / "group/both.yaml").write_text(yaml.safe_dump(made))
    return TaskManager(include_path=str(folder / "group"), include_defaults=False)


# --- refused before the model is loaded -----------------------------------------------------------


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A tiny model whose tokenizer has a chat template, and the same one made smaller."""
    folder = tmp_path_factory.mktemp("models")
    tiny_llama(folder / "dense")
    path = folder / "dense/tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": CHAT}))
    (folder / "learn.txt").write_text("A river moves towards an ocean or a lake. " * 60)
    calibration = ["--text", folder / "learn.txt", "--tokens", "512", *BLOCK]
    run("compress", folder / "dense", "--ratio", "0.25", *calibration, "-o", folder / "small")
    return folder


def evaluated(folder, model, task, *words):
    run("eval", "harness", model, "--task", "mine", "--yaml", task, *words, "-o", folder / "o.json")
    return read_record(folder / "o.json")


SHOWN = CHOICE | {"fewshot_split": "test"}


@pytest.mark.parametrize(
    ("spec", "words", "says"),
    [
        (SHOWN, ["--shots", 6], "shots is 6, and there are 5 examples"),
        (SHOWN | {"fewshot_config": {"sampler": "first_n"}}, ["--shots", 6], "are 5 examples"),
        (CHOICE | {"fewshot_config": {"samples": DOCS[:1]}}, ["--shots", 2], "are 1 examples"),
        (SHOWN | {"num_fewshot": 9}, [], "shots is 9"),
        (CHOICE, ["--shots", 1], "shown with its answer"),
        (
            SHOWN | {"test_split": "leave out", "validation_split": "test"},
            ["--shots", 1],
            "shown with its answer",
        ),
        (ROLLING, ["--shots", 1], "without a prompt"),
        (ROLLING, ["--system-instruction", "Be brief."], "without a prompt"),
        (ROLLING, ["--apply-chat-template"], "without a prompt"),
        (CHOICE, ["--metric", "f2"], "metric is f2, expected acc or acc_norm"),
        (
            WRITTEN | {"filter_list": FILTERS, "metric_list": metrics("exact_match")},
            ["--metric", "exact_match"],
            "expected exact_match,strict or exact_match,loose",
        ),
        (CHOICE | {"metric_list": metrics("f2")}, [], "one of lm-eval's own: acc"),
        (CHOICE | {"metric_list": metrics("bleu", hf_evaluate=True)}, [], "one of lm-eval's own"),
        (CHOICE | {"metric_list": "acc"}, [], "one of lm-eval's own"),
        (CHOICE | {"metric_list": 3}, [], "one of lm-eval's own"),
        (CHOICE | {"metric_list": metrics("bleu")}, [], r"none of its metrics \(bleu\)"),
        (CHOICE | {"metric_list": metrics("acc", aggregation="x")}, [], "no such aggregation"),
        (CHOICE | {"metric_list": metrics("likelihood")}, [], "not a number, so it has no mean"),
        (CHOICE | {"output_type": "mc"}, [], "output_type 'mc'"),
        (CHOICE | {"surprise": 1}, [], "unexpected keyword argument 'surprise'"),
        (CHOICE | {"test_split": "x"}, [], "KeyError: 'x'"),
        (CHOICE | {"test_split": "leave out"}, [], "must have valid or test docs"),
        (CHOICE | {"doc_to_text": "{{question}}"}, [], "'question' is undefined"),
        (CHOICE | {"doc_to_text": "{{query"}, [], "TemplateSyntaxError"),
        (CHOICE | {"doc_to_text": "null"}, [], "Context is not a string"),
        (CHOICE | {"doc_to_text": "leave out"}, [], "no doc_to_text"),
        (CHOICE | {"doc_to_target": "leave out"}, [], "no doc_to_target"),
        (CHOICE | {"doc_to_choice": "leave out"}, [], "no doc_to_choice"),
        (CHOICE | {"doc_to_target": "golds"}, [], "answer of item 0 is 'golds'"),
        (CHOICE | {"doc_to_choice": [" a", " b"]}, [], "IndexError|answer of item 2 is 2"),
        (CHOICE | {"unsafe_code": True}, [], "code that the model writes"),
        (CHOICE | {"doc_to_image": "query"}, [], "images or audio"),
        (CHOICE | {"dataset_kwargs": [1]}, [], "with files \\[\\]"),
        (CHOICE | {"dataset_kwargs": {"data_files": 3}}, [], "with files \\[\\]"),
        (CHOICE, ["--fewshot-as-multiturn"], "Set apply-chat-template too"),
        (CHOICE, ["--apply-chat-template", "tool"], "no chat template 'tool'; it has default"),
    ],
)
def test_a_mistake_is_said_in_a_line_before_the_model_is_loaded(
    models, tmp_path, monkeypatch, capsys, spec, words, says
):
    monkeypatch.setattr(stage, "load", lambda *_: pytest.fail("the model was loaded"))
    task = ["--yaml", write_task(tmp_path / "task.yaml", **spec), *words]
    out = tmp_path / "out.json"
    words = ["eval", "harness", models / "dense", "--task", "mine", *task, "-o", out]
    assert main([str(word) for word in words]) == 1
    (line,) = re.findall(r"a3: error: .*", capsys.readouterr().err)
    assert re.search(says, line)
    assert not out.exists()


def test_a_task_is_made_of_items_or_of_a_yaml(models, tmp_path, capsys):
    """And not of both, of which one would be left out in silence; nor is the other looked at."""
    task = ["--task", "x", "--items", tmp_path / "items.jsonl", "--yaml", tmp_path / "nope.yaml"]
    words = ["eval", "harness", models / "dense", *task, "-o", tmp_path / "out.json"]
    assert main([str(word) for word in words]) == 1
    (line,) = re.findall(r"a3: error: .*", capsys.readouterr().err)
    assert re.search(r"found items .*items\.jsonl and yaml .*nope\.yaml; .* Leave the other", line)
    assert not list(tmp_path.iterdir())


def test_what_shows_while_scoring_is_said_in_a_line(models, tmp_path, capsys):
    """A word of a text without spaces is the whole text: its perplexity is beyond all floats."""
    spec = ROLLING | {"doc_to_target": "{{ '漢字' * 200 }}"}
    task = write_task(tmp_path / "task.yaml", **spec)
    words = ["eval", "harness", models / "dense", "--task", "m", "--yaml", task]
    assert main([*map(str, words), "-o", str(tmp_path / "o.json")]) == 1
    assert "Take byte_perplexity or bits_per_byte." in capsys.readouterr().err


def test_without_a_network_a_task_of_lm_evals_is_one_line(models, tmp_path, monkeypatch, capsys):
    class Offline:
        all_subtasks, all_groups = ["arc_easy"], []

        def load(self, _):
            raise ConnectionError("Couldn't reach 'allenai/ai2_arc'\non the Hub")

    monkeypatch.setattr(stage, "TaskManager", lambda **_: Offline())
    words = ["eval", "harness", models / "dense", "--task", "arc_easy", "-o", tmp_path / "o.json"]
    assert main([str(word) for word in words]) == 1
    said = capsys.readouterr().err
    assert "'allenai/ai2_arc' on the Hub). Its data set comes from the hub" in said


def test_a_group_without_a_score_is_refused(tmp_path):
    manager = group(tmp_path, CHOICE, "acc", aggregates=False)
    with pytest.raises(A3Error, match=r"a group without a score of its own.*: a, b"):
        stage.rehearse("both", manager.load(["both"]), False, None, 0, 0, Prompting().options(None))


def test_a_task_that_allows_no_examples_gets_none_in_silence(tmp_path):
    manager = group(tmp_path, SHOWN | {"num_fewshot": 0}, "acc")
    with pytest.raises(A3Error, match=r"shots is 2.*num_fewshot to 0"):
        stage.rehearse("both", manager.load(["both"]), False, None, 2, 0, Prompting().options(None))


# --- prompts --------------------------------------------------------------------------------------


def asked(monkeypatch):
    """The first request of each item, in the results of runs to come."""
    kept, evaluate = [], lm_eval.evaluate

    def spied(*words, **options):
        found = evaluate(*words, **options)
        samples = [each for leaf in found["samples"].values() for each in leaf]
        kept.append([each["arguments"][0][0] for each in samples])
        return found

    monkeypatch.setattr(stage.lm_eval, "evaluate", spied)
    return kept


def test_chat_template_turns_and_instruction_make_the_prompt(models, tmp_path, monkeypatch):
    """Of the dense and the compressed model alike; the result says them."""
    kept = asked(monkeypatch)
    task = write_task(tmp_path / "task.yaml", **SHOWN)
    chat, turns = ["--apply-chat-template"], ["--fewshot-as-multiturn"]
    system = ["--system-instruction", "Be brief."]
    said = []
    for words in ([], chat, [*chat, *system], [*chat, "--shots", 2], [*chat, *turns, "--shots", 2]):
        found = [evaluated(tmp_path, models / m, task, *words) for m in ("dense", "small")]
        keys = ("prompts_sha256", "task_hash", "apply_chat_template", "fewshot_as_multiturn")
        one, two = ([each[key] for key in (*keys, "system_instruction")] for each in found)
        assert one == two
        assert kept[-1] == kept[-2]
        said.append(tuple(one))
    assert len({each[0] for each in said}) == 5
    assert [each[2:] for each in said] == [
        (False, False, None),
        (True, False, None),
        (True, False, "Be brief."),
        (True, False, None),
        (True, True, None),
    ]
    plain, templated, instructed, single, multiple = (each[0] for each in kept[::2])
    assert plain == "The fox is"
    assert templated == "<user>The fox is\n<assistant>"
    assert instructed == "<system>Be brief.\n<user>The fox is\n<assistant>"
    assert single.count("<user>") == 1
    assert multiple.count("<user>") == multiple.count("<assistant>") == 3


def named(folder, template):
    tokenizer = tiny_tokenizer(folder)
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize(
    ("template", "asked", "system", "says"),
    [
        (None, True, None, "has no chat template"),
        ({"tool": CHAT}, True, None, "no chat template 'default'; it has tool"),
        ({"default": CHAT, "tool": CHAT}, "x", None, "no chat template 'x'; it has default, tool"),
        ("{% broken", True, None, "cannot be applied"),
        ("{{ 1 + 'a' }}", True, None, "cannot be applied"),
        (
            "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}",
            True,
            "Be brief.",
            "no system.*leave system-instruction out",
        ),
        ("{{ messages[-1].content }}", True, "Be brief.", "leaves the system instruction out"),
    ],
)
def test_a_template_that_is_not_there_or_refuses_is_named(tmp_path, template, asked, system, says):
    prompting = Prompting(asked, False, system)
    with pytest.raises(A3Error, match=says):
        choose_template(named(tmp_path, template), prompting, tmp_path)


def test_a_named_template_is_the_one_that_is_applied(tmp_path):
    """lm-eval checks the name and then takes the default one."""
    for name, expected in ((True, "first"), ("default", "first"), ("tool", "second")):
        tokenizer = named(tmp_path, {"default": "first", "tool": "second"})
        choose_template(tokenizer, Prompting(name), tmp_path)
        turns = [{"role": "user", "content": "Hi"}]
        assert tokenizer.apply_chat_template(turns, tokenize=False) == expected


def test_a_prompt_has_no_date_of_today(tmp_path):
    tokenizer = named(tmp_path, "{{ strftime_now('%d %b %Y') }}: {{ messages[0].content }}")
    choose_template(tokenizer, Prompting(True), tmp_path)
    turns = [{"role": "user", "content": "Hi"}]
    assert tokenizer.apply_chat_template(turns, tokenize=False) == "26 Jul 2024: Hi"


def test_turns_without_a_template_are_refused_in_the_config():
    schema = load_yaml(stage.Path(__file__).parents[2] / "workflow/schemas/config.schema.yaml")
    entry = {"task": "arc_easy", "fewshot_as_multiturn": True}
    config = {"experiments": "x.tsv", "calibrations": {}, "harness": {"mine": entry}}
    with pytest.raises(A3Error, match=r"harness\.mine\.fewshot_as_multiturn"):
        complete(config, schema)
    entry["apply_chat_template"] = "tool"
    assert complete(config, schema)["harness"]["mine"]["apply_chat_template"] == "tool"


# --- the model as it is ---------------------------------------------------------------------------


def test_lm_eval_does_not_tie_a_head_that_is_stored_apart(tmp_path):
    folder = tiny_model(tmp_path, "llama", tie_word_embeddings=True)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].flip(0).contiguous()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    tokenizer = load_tokenizer(folder)
    model = stage.wrap(folder, tokenizer, "float32", "cpu").model
    assert (model.lm_head.weight == tensors["lm_head.weight"]).all()


def test_the_length_is_the_models_whatever_the_tokenizer_says(models, tmp_path):
    tiny_model(tmp_path / "bloom", "bloom", n_head=4)
    path = tmp_path / "bloom/config.json"
    said = {k: v for k, v in json.loads(path.read_text()).items() if "position" not in k}
    path.write_text(json.dumps(said))
    for folder, length in (
        (models / "dense", 512),
        (models / "small", 512),
        (tmp_path / "bloom", 2048),
    ):
        tokenizer = load_tokenizer(folder)
        tokenizer.model_max_length = 8
        assert stage.wrap(folder, tokenizer, "float32", "cpu").max_length == length


def test_resampling_starts_no_processes(models, tmp_path, monkeypatch):
    """They would inherit the command line's handler of SIGTERM, and some never end."""
    monkeypatch.setattr(stage, "BOOTSTRAPS", 20)
    monkeypatch.setattr("multiprocessing.Pool", lambda *_: pytest.fail("a pool of processes"))
    spec = SCORED | {"metric_list": metrics("perplexity")}
    found = evaluated(tmp_path, models / "dense", write_task(tmp_path / "task.yaml", **spec))
    assert found["stderr"] > 0


def test_a_tokenizer_without_an_end_takes_the_models(models, tmp_path, capsys):
    folder = tiny_llama(tmp_path / "m")
    path = folder / "tokenizer_config.json"
    said = json.loads(path.read_text()) | {"eos_token": None, "pad_token": None}
    path.write_text(json.dumps(said))
    spec = WRITTEN | {"metric_list": metrics("chrf")}
    task = write_task(tmp_path / "task.yaml", **spec)
    found = evaluated(tmp_path, folder, task)
    dense = evaluated(tmp_path, models / "dense", task)
    assert found["value"] == dense["value"]
    for name in ("config.json", "generation_config.json"):
        kept = json.loads((folder / name).read_text()) | {"eos_token_id": None}
        (folder / name).write_text(json.dumps(kept))
    words = ["eval", "harness", folder, "--task", "m", "--yaml", task, "-o", tmp_path / "o.json"]
    assert main([str(word) for word in words]) == 1
    assert "name the token that ends a text" in capsys.readouterr().err


def test_guessing_is_a_model_too():
    """The model that other tests evaluate is one of lm-eval's."""
    assert isinstance(Guess(), LM)
