"""Runs jobs against a hub in a process of its own: each prints one line (test_hub.py)."""

import json
import sys
import time
from pathlib import Path

from a3.core.errors import A3Error
from a3.core.files import read_record
from a3.stages.inputs.model import resolve_model
from a3.stages.inputs.text import documents, make_documents


def main() -> None:
    """Run the jobs of the first argument, a list of (job, source)."""
    time.sleep = lambda seconds: None  # between the hub client's five tries
    for job, source in json.loads(sys.argv[1]):
        try:
            if job == "model":
                resolve_model(source, Path("models/m"))
                print(json.loads(Path("models/m/source.json").read_text()))
            elif job == "made":
                make_documents(source, None, (), Path("docs.jsonl"))
                texts = [document.text for document in documents(source)]
                print(json.dumps([read_record(Path("docs.json"))["source"], texts]))
            else:
                print([document.text for document in documents({"source": source})])
        except A3Error as error:
            print("A3Error:", error)
