"""Stage mix: one text of several, in equal shares."""

from pathlib import Path

from a3.documents import Document, load_documents, write_documents
from a3.errors import A3Error
from a3.files import sha256, write_record
from a3.provenance import provenance


def mix(texts: list[Path], out: Path) -> None:
    """Write the documents of several texts, in equal shares, to `out`, a .jsonl file.

    What made them lies beside it in JSON. Raises A3Error for another name, or a text that cannot
    be read.
    """
    if out.suffix != ".jsonl":
        raise A3Error(f"{out}: expected a name that ends in .jsonl. Choose such a one.")
    write_documents(out, equal_shares([load_documents(path) for path in texts]))
    record = {
        "files": {out.name: sha256(out)},
        "inputs": {f"{path.parent.name}/{path.name}": sha256(path) for path in texts},
        "provenance": provenance(__name__, text={"source": {"mix": [str(p) for p in texts]}}),
    }
    write_record(out.with_suffix(".json"), record)


def equal_shares(texts: list[list[Document]]) -> list[Document]:
    """Documents of all texts, in the order of each, until one that is due has no more.

    The text that has given the fewest characters is due, so that all have given as many, to the
    length of a document.
    """
    given, used = [0] * len(texts), [0] * len(texts)
    found: list[Document] = []
    while True:
        due = given.index(min(given))
        if used[due] == len(texts[due]):
            return found
        document = texts[due][used[due]]
        found.append(document)
        used[due] += 1
        given[due] += len(document.text)
