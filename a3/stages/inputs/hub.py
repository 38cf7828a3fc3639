"""Hub repositories: models and data sets at a fixed revision."""

import hashlib
import shutil
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TypeVar

from datasets import Dataset, load_dataset, load_dataset_builder
from datasets.exceptions import DatasetNotFoundError, DatasetsError
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    RevisionResolutionError,
)
from huggingface_hub.file_download import repo_folder_name

from a3.core import files
from a3.core.errors import A3Error
from a3.models.inputs import MODEL_FILES, NOT_MODEL_FILES, TEMPLATES
from a3.models.readable import refuse_adapter, refuse_quantised

TABLES = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".csv": "csv"}

# `datasets` says ConnectionError where it cannot reach the hub.
OFFLINE = (LocalEntryNotFoundError, OfflineModeIsEnabled, RevisionResolutionError, ConnectionError)

Result = TypeVar("Result")


def hub_model(repo: str, revision: str, patterns: list[str] = MODEL_FILES) -> Path:
    """Folder, in the hub's cache, of a model's files: safetensors, config and tokenizer.

    Follows HF_ENDPOINT, HF_HUB_OFFLINE and HF_HOME. Raises A3Error when the repository or
    revision does not exist, or the download fails; for adapters and quantised weights before
    these are downloaded, where the small files say so.
    """

    def download(patterns: list[str], without: list[str], at: str = revision) -> Path:
        folder = snapshot_download(
            repo, revision=at, allow_patterns=patterns, ignore_patterns=without
        )
        return Path(folder)

    def whole() -> Path:
        folder = download(patterns, NOT_MODEL_FILES)
        # A snapshot's folder has the name of its commit.
        return download([f"{TEMPLATES}/*.jinja"], [], folder.name)

    small = hub_call(repo, revision, lambda: download(["*.json"], NOT_MODEL_FILES))
    refuse_adapter(small)
    refuse_quantised(small)
    return whole_snapshot(hub_call(repo, revision, whole), repo)


def whole_snapshot(folder: Path, repo: str) -> Path:
    """`folder` of the hub's cache, each of whose files has the content that the hub says it has.

    The cache names a file by the hub's hash of it: SHA-256, or Git's for small ones. Raises A3Error
    where another content was downloaded, or it changed since.
    """
    for path in sorted(folder.rglob("*")):
        expected = path.resolve().name
        if path.is_symlink() and expected not in (files.sha256(path), git_hash(path, expected)):
            raise A3Error(
                f"hub: {repo}: {path} is not what the hub records: its sha256 is "
                f"{files.sha256(path)}, expected {expected}. Delete {path.resolve()} and run it "
                "again."
            )
    return folder


def git_hash(path: Path, expected: str) -> str:
    """Git's SHA-1 of a file's content where `expected` may be one, which large files' are not."""
    if len(expected) != len("da39a3ee5e6b4b0d3255bfef95601890afd80709"):
        return ""
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def hub_rows(source: dict[str, Any], cache: str) -> Dataset:
    """The rows of one split of a hub data set, at exactly the revision asked for.

    Either of a configuration, all splits of which are downloaded, or of `files`: names or globs in
    the repository, which alone are downloaded. `cache` is where the rows of `files` are unpacked.
    Raises A3Error as `hub_call` does, and for a configuration, split or file that is not there.
    """
    if "files" in source and "config" in source:
        raise A3Error(f"source {source}: found config and files, expected one. Keep one.")
    rows = file_rows if "files" in source else configuration_rows
    return hub_call(source["hub"], source["revision"], lambda: rows(source, cache))


def file_rows(source: dict[str, Any], cache: str) -> Dataset:
    """Rows of the named files of a hub data set; they stay in the hub's cache for offline use."""
    repo, revision = source["hub"], source["revision"]
    names = [source["files"]] if isinstance(source["files"], str) else source["files"]
    folder = Path(
        snapshot_download(repo, repo_type="dataset", revision=revision, allow_patterns=names)
    )
    whole_snapshot(folder, repo)
    # Not the folder as a data set: other files of it may be cached there too.
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    inside = {path: path.relative_to(folder).as_posix() for path in paths}
    chosen = [path for path in paths if any(fnmatchcase(inside[path], name) for name in names)]
    if not chosen:
        raise A3Error(f"hub: {repo}, revision: {revision}: no file matches {names}. Correct files.")
    return table_rows(chosen, source.get("split", "train"), cache)


def table_rows(paths: list[Path], split: str, cache: str) -> Dataset:
    """Rows of .parquet, .json, .jsonl or .csv files of the hub, plain or packed, as one split.

    `split` may be a slice such as train[:1000]; `cache` is a folder for the rows.
    Raises A3Error when a file is missing, damaged, or of another kind.
    """
    reader = next((TABLES[suffix] for suffix in paths[0].suffixes if suffix in TABLES), None)
    if reader is None or not all(path.is_file() for path in paths):
        raise A3Error(
            f"{paths[0]}: no such file, or not one of {', '.join(TABLES)}. Correct path or files."
        )
    chosen = {split.split("[")[0]: [str(path) for path in paths]}
    # Left to itself, the reader takes words such as null and NA for nothing.
    options = {"keep_default_na": False} if reader == "csv" else {}
    try:
        return load_dataset(reader, data_files=chosen, split=split, cache_dir=cache, **options)
    except (DatasetsError, ValueError, OSError) as error:
        cause = first_line(error.__cause__ or error)
        raise A3Error(f"{paths[0]}: cannot be read ({cause}). Correct the file.") from error


def configuration_rows(source: dict[str, Any], _: str) -> Dataset:
    """Rows of a configuration of a hub data set; they stay in `datasets`' cache for offline use."""
    repo, revision = source["hub"], source["revision"]
    commit = HfApi().resolve_revision(repo, repo_type="dataset", revision=revision).resolved
    # The prefix keeps `datasets` from taking a local folder of the same name.
    builder = load_dataset_builder(f"hf://datasets/{repo}", source.get("config"), revision=commit)
    # Where the hub is out of reach, `datasets` takes whatever revision it cached last.
    if builder.hash != commit:
        raise A3Error(
            f"hub: {repo}, revision: {revision}: the hub cannot be reached, and the cache holds "
            f"commit {builder.hash}, not {commit}. Load it once with a network."
        )
    builder.download_and_prepare()
    name = repo_folder_name(repo_id=repo, repo_type="dataset")
    try:
        whole_snapshot(Path(HF_HUB_CACHE, name, "snapshots", commit), repo)
    except A3Error:
        shutil.rmtree(builder.cache_dir)  # rows of what was refused
        raise
    return builder.as_dataset(split=source.get("split", "train"))


def hub_commit(source: dict[str, Any]) -> str:
    """The commit of a hub data set that its revision names. Raises A3Error as `hub_call` does."""
    repo, revision = source["hub"], source["revision"]
    api = HfApi()
    return hub_call(
        repo,
        revision,
        lambda: api.resolve_revision(repo, repo_type="dataset", revision=revision).resolved,
    )


def hub_call(repo: str, revision: str, call: Callable[[], Result]) -> Result:
    """`call()`, with what can go wrong at the hub said as an A3Error."""
    where = f"hub: {repo}, revision: {revision}"
    try:
        return call()
    except GatedRepoError as error:
        raise A3Error(
            f"{where}: gated. Accept its terms on its hub page, then `hf auth login` or set "
            f"HF_TOKEN."
        ) from error
    except DatasetNotFoundError as error:
        raise A3Error(
            f"{where}: {first_line(error)} Correct the name or revision; for a private one "
            f"`hf auth login` or set HF_TOKEN."
        ) from error
    except RepositoryNotFoundError as error:
        raise A3Error(
            f"{where}: no such repository, or a private one. Correct the name (owner/name); for a "
            f"private one `hf auth login` or set HF_TOKEN."
        ) from error
    except RevisionNotFoundError as error:
        raise A3Error(
            f"{where}: the repository has no such branch, tag or commit. Correct revision."
        ) from error
    except OFFLINE as error:
        raise A3Error(
            f"{where}: the hub cannot be reached, or HF_HUB_OFFLINE is set, and the cache does not "
            f"hold all its files. Download it where there is a network, with the same HF_HOME."
        ) from error
    except HFValidationError as error:
        raise A3Error(f"{where}: not a repository name ({error}). Write owner/name.") from error
    except (ValueError, DatasetsError) as error:
        cause = f" ({first_line(error.__cause__)})" if error.__cause__ else ""
        raise A3Error(f"{where}: {str(error).strip()}{cause}. Correct the source.") from error
    except (OSError, HTTPError) as error:
        if files.is_disk_error(error):
            raise A3Error(f"{where}: the disk of HF_HOME is full. Free some space.") from error
        raise A3Error(
            f"{where}: the download failed ({type(error).__name__}: {first_line(error)}). "
            f"Run it again; files that are whole are kept."
        ) from error


def first_line(error: BaseException) -> str:
    """The first line of an error's message; libraries append pages of advice."""
    return (str(error).strip().splitlines() or ["no message"])[0]
