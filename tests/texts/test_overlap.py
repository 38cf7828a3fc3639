"""The same document in both texts is left out, whatever its script and length; others stay."""

import json
import random
import re
import unicodedata

import numpy as np
import pytest
from tiny import run

from a3.core.files import read_json
from a3.stages.inputs.split import exclude_and_split
from a3.texts.overlap import NGRAM, exclusions, windows
from a3.texts.reading import Document, load_documents, write_documents

# Sentences of Unicode's own kind of text, in scripts with and without spaces.
TEXTS = {
    "chinese": "河流是沿着河床流动的天然水流，通常注入海洋、湖泊或"
    "另一条河流。有些河流在到达另一水体之前就渗入地下。",
    "japanese": "川は、地表の水が集まって流れる水路であり、海や湖、"
    "あるいは別の川へと注いでいる。ﾊﾝｶｸカナも使う。",
    "thai": "แม่น้ำเป็นทางน้ำธรรมชาติที่ไหลลงสู่มหาสมุทร ทะเลสาบ หรือแม่น้ำสายอื่น บางสายไหลซึมลงใต้ดินก่อน",
    "lao": "ແມ່ນ້ຳແມ່ນທາງນ້ຳທຳມະຊາດທີ່ໄຫຼລົງສູ່ມະຫາສະໝຸດ ທະເລສາບ ຫຼືແມ່ນ້ຳສາຍອື່ນ",
    "khmer": "ទន្លេគឺជាផ្លូវទឹកធម្មជាតិដែលហូរទៅកាន់មហាសមុទ្រ បឹង ឬទន្លេផ្សេងទៀត",
    "burmese": "မြစ်ဆိုသည်မှာ သမုဒ္ဒရာ၊ ရေကန် သို့မဟုတ် အခြားမြစ်သို့ စီးဆင်းသော သဘာဝရေစီးကြောင်းဖြစ်သည်။",
    "korean": "강은 바다나 호수 또는 다른 강으로 흘러가는 자연의 물줄기이며 "
    "때로는 땅속으로 스며들어 사라지기도 한다 그리고 다시 솟는다",
    "hindi": "नदी भूतल पर प्रवाहित एक जलधारा है जिसका स्रोत प्रायः "
    "कोई झील हिमनद झरना या बारिश का पानी होता है",
    "arabic": "النهر مجرى مائي طبيعي يتدفق نحو محيط أو بحيرة أو "
    "نهر آخر وقد يغور بعضه في الأرض قبل أن يبلغ غايته",
    "hebrew": "נָהָר הוא זרם מים טבעי הזורם אל אוקיינוס או אגם או "
    "נהר אחר ולעתים הוא נעלם באדמה לפני הגיעו ליעדו",
    "greek": "Ο ποταμός είναι φυσικό ρεύμα νερού που ρέει προς έναν "
    "ωκεανό μια λίμνη ή έναν άλλο ποταμό και όχι μόνο",
    "mixed": "在 Python 3.11 中，使用 numpy 的 cumsum 函数可以很快地计算前缀和，然后再做减法。",
    "english": "A river is a natural flowing watercourse that moves "
    "towards an ocean, or a lake, or another river.",
    "one word": "River",
    "ideograph": "川",
    "eleven words": "Straße, Œuvre and ﬁne ½ naïve cafés of the old town.",
    "code": "def f(x):\n    return x ** 2\n",
    "digits": "3.14159 26535",
    "emoji": "😀👩‍👩‍👧 ❤️",
    "symbols": "∀x ∈ ℝ",
    "punctuation": "…!",
}
ELSE = ["Else", "别的", "ほか", "another thing that was never in the text", "😡", "!", ""]


def reason(seen: str, text: str) -> str | None:
    """Why `text` is left out where `seen` is among the excluded documents."""
    others = [Document("", other) for other in ELSE]
    return exclusions([Document("", text)], [*others, Document("", seen)])[0]


CHANGES = {
    "nothing": lambda text: text,
    "case": str.upper,
    "white space": lambda text: " \r\n" + text.replace(" ", "\u00a0\n") + "\t",
    "decomposed": lambda text: unicodedata.normalize("NFD", text),
    "compatible": lambda text: unicodedata.normalize("NFKD", text),
    "full width": lambda text: "".join(chr(ord(c) + 65248) if "!" <= c <= "~" else c for c in text),
    "marks of direction": lambda text: "\u200f" + text.replace(" ", " \u200e") + "\u200b",
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("script", TEXTS)
def test_the_same_document_is_left_out(script, change):
    text = TEXTS[script]
    assert reason(text, CHANGES[change](text)) is not None
    assert reason(CHANGES[change](text), text) is not None


@pytest.mark.parametrize("script", TEXTS)
def test_another_document_stays(script):
    others = [text for name, text in TEXTS.items() if name != script]
    found = exclusions([Document("", TEXTS[script])], [Document("", text) for text in others])
    assert found == [None]


@pytest.mark.parametrize(
    ("unit", "count"),
    [
        ("word", 13),
        ("nước", 13),
        ("한국", 13),
        ("हिन्दी", 13),
        ("川", 22),
        ("ꀀ", 22),
        ("か", 26),
        ("ｶ", 26),
        ("ㄅ", 26),
        ("ก", 44),
        ("กี่", 44),
        ("ກ", 44),
        ("កី", 44),
        ("က", 44),
    ],
)
def test_so_many_in_a_row_are_thirteen_words(unit, count):
    """A run is found inside another text from `count` units on, and not one earlier."""
    joint = "" if unicodedata.category(unit[0]) == "Lo" and count > 13 else " "
    # Each unit of a script is another word: numbers in it would end the run.
    for length, expected in ((count, f"{NGRAM}-gram"), (count - 1, None)):
        run_of = joint.join([unit] * length)
        assert reason(f"Before that. {run_of}. After", f"Now: {run_of}; done") == expected


def test_scripts_are_added_up():
    numbers: dict[str, int] = {}
    assert len(windows("a " * 7 + "川" * 10, numbers)) == 1  # 7 words and 10 times 0.6
    assert len(windows("a " * 7 + "川" * 9, numbers)) == 0


def plain_runs(text: str) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[i : i + NGRAM]) for i in range(len(words) - NGRAM + 1)}


def test_words_with_spaces_are_as_they_were():
    """Documents that share 5 to 20 words in a row: those that share 13 are left out."""
    draw = random.Random(0)

    def some(count: int) -> list[str]:
        return [f"{draw.choice(['Río', 'it', 'a1'])}{draw.randrange(300)}," for _ in range(count)]

    seen = [" ".join(some(200)) for _ in range(20)]
    found = []
    for i in range(300):
        words = seen[i % 20].split()
        start, length = draw.randrange(150), draw.randrange(5, 21)
        found.append(" ".join([*some(30), *words[start : start + length], *some(30)]))
    known = set.union(*map(plain_runs, seen))
    expected = ["13-gram" if plain_runs(text) & known else None for text in found]
    assert 80 < expected.count(None) < 220
    assert exclusions([Document("", t) for t in found], [Document("", t) for t in seen]) == expected


def test_different_runs_have_different_hashes():
    numbers: dict[str, int] = {}
    text = " ".join(str(i % 251 * (i % 7)) for i in range(50_000))
    found = windows(text, numbers)
    assert len(np.unique(found)) == len(plain_runs(text))
    assert np.isin(windows(" ".join(text.split()[1000:1100]), numbers), found).all()


def test_a_short_document_is_not_a_line_of_the_other_text():
    assert reason("First line.\nA short one.\nThe last.", "a SHORT  one.") == "whole"
    assert reason("First line.\nA short one indeed.", "A short one.") is None


def test_lines_that_follow_each_other_are_a_document():
    seen = "First line.\nA short one,\n\nin two lines.\nThe last."
    assert reason(seen, "A short one, in two lines") == "whole"
    assert reason(seen, "First line. A short one, in two lines.") == "whole"
    assert reason(seen, "First line. In two lines.") is None
    assert reason(seen, "short one in two lines") is None


def test_punctuation_makes_no_other_document():
    for one, other in (
        ("Hello world.", "Hello, world"),
        ("川は流れる。", "川は流れる"),
        ("a-b", "A b"),
    ):
        assert reason(one, other) == reason(other, one) == "whole"
    assert reason("Hello world.", "Hello worlds.") is None
    # Without words, all of it counts.
    assert reason("…!", "!?") is None


@pytest.mark.parametrize("title", [None, "", "  ", "\t\n", "\u200b"])
def test_no_title_is_the_title_of_no_other(tmp_path, title):
    """Titles of null on both sides: nothing is left out for it."""
    for name, said in (("score", "scored text"), ("cal", "something else")):
        rows = [{"title": title, "text": f"{said} {i}"} for i in range(9)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "split"
    run("split", tmp_path / "score.jsonl", "--exclude", tmp_path / "cal.jsonl", "-o", out)
    record = read_json(out / "split.json")
    assert record["excluded"] == {"title": 0, "13-gram": 0, "whole": 0}
    assert record["documents"]["test"] == 9


def test_a_title_in_other_form_is_the_same():
    found = [Document("ＣＡＦÉ  Noir", "a"), Document("Live Stock", "b"), Document("None", "c")]
    excluded = [Document("cafe\u0301 noir", "x"), Document("Livestock", "y"), Document("", "z")]
    assert exclusions(found, excluded) == ["title", None, None]


def test_the_same_text_is_in_one_split(tmp_path):
    """Also where title, case or spaces differ; documents that stand alone go where they went."""
    once = [Document(f"T{i}", f"text number {i}") for i in range(200)]
    again = [Document(f"other {i}", f"Text  NUMBER {i}\n") for i in range(100)]
    empty = [Document(f"E{i}", "") for i in range(50)]
    shares = {"dev": 0.2, "test": 0.5, "harness": 0.3}
    found: dict[str, dict[Document, str]] = {}
    for name, some in (
        ("once", once),
        ("twice", [*once, *empty, *again]),
        ("back", [*again, *once]),
    ):
        write_documents(tmp_path / name / "docs.jsonl", some)
        exclude_and_split(tmp_path / name / "docs.jsonl", [], shares, tmp_path / name)
        found[name] = {
            document: split
            for split in shares
            for document in load_documents_or_none(tmp_path / name / f"{split}.jsonl")
        }
    for first, second in zip(once, again, strict=False):
        assert found["twice"][first] == found["twice"][second] == found["back"][first]
    assert [found["twice"][d] for d in once[100:]] == [found["once"][d] for d in once[100:]]
    assert len({found["twice"][document] for document in empty}) == 3


def load_documents_or_none(path):
    return load_documents(path) if path.stat().st_size else []
