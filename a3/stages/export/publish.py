"""a3 publish: checks a folder, and uploads it to a hub or says what would be uploaded."""

import hashlib
import socket
import ssl
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    ModelInfo,
    RepoFile,
    constants,
)
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from a3.core.errors import A3Error
from a3.core.files import (
    RECORDS,
    read_record,
    sha256,
)
from a3.core.progress import LOG
from a3.models.checkpoint import CARD, recorded_files
from a3.stages.export.checks import card_of, check_folder, licence_of
from a3.stages.export.sharing import files_to_share, rewritten

Result = TypeVar("Result")

# Errors of the network among Python's errors of the operating system; others are of files here.
UNREACHED = (ConnectionError, TimeoutError, socket.gaierror, ssl.SSLError, LocalEntryNotFoundError)

# The hub makes this file itself.
OF_HUB = (".gitattributes",)

# What loaders of models read.
READ_BY_LOADERS = (
    *(".safetensors", ".bin", ".json", ".jinja", ".model", ".py", ".txt"),
    *(".gguf", ".onnx", ".pt", ".pth", ".h5", ".msgpack"),
)

# Bytes; the hub keeps larger files outside of git (it takes 10 MB in it).
LARGEST_REGULAR = 2**26

# Lines of the card that are shown.
HEAD = 14


class Hashes(NamedTuple):
    """Of a file: SHA-256, and git's SHA-1 if the hub may keep the file in git itself."""

    sha256: str
    git: str | None


@dataclass(frozen=True)
class There:
    """A repository as it is: its commit, and its files; `private` None if it does not exist.

    `made_of` is the SHA-256 of the weights that its model was made of, None if no record of a3 in
    it says so.
    """

    private: bool | None = None
    commit: str | None = None
    files: tuple[str, ...] = ()
    made_of: str | None = None


def publish(
    folder: Path,
    repo: str,
    *,
    upload: bool = False,
    private: bool = False,
    replace: bool = False,
    dtype: str = "float32",
    device: str = "cpu",
) -> Iterator[str]:
    """Check a compressed or exported folder and, with `upload`, put it into a hub's repository.

    Yields what was found and done, a line each. The repository is made if it does not exist,
    `private` or not, and one that is public cannot be asked to be private; all files come in one
    commit, after which the hub's hashes are compared to those that were checked. Files of another
    model in the repository are an error, or overwritten and deleted with `replace`.
    In the uploaded card the example names `repo`, and records name no path of this machine. Raises
    A3Error if a check fails, and for an upload if the licence is unknown or forbids it, or the hub
    refuses it.
    """
    api = HfApi()
    there = call(repo, lambda: look(api, repo), "asked") if upload else asked(api, repo)
    if private and there is not None and there.private is False:
        raise A3Error(f"{repo}: is public. Make it private first, or leave out --private.")
    for name, said in check_folder(folder, dtype, device, upload):
        yield f"{name:<10} {said}"
    licence, said = licence_of(folder)
    yield f"{'card':<10} {card_of(folder)}"
    yield f"{'licence':<10} {said}"
    with tempfile.TemporaryDirectory(prefix="a3-publish-") as work:
        files, left = files_to_share(folder)
        copies, hidden = rewritten(folder, repo, Path(work), files)
        files |= copies
        gone = leftover(there, files, origin_in(folder))
        yield from listed(folder, files, left)
        if hidden:
            yield f"{'hides':<10} {shown(hidden)}: records name a path's last part only"
        yield f"{'hub':<10} {plan_of(repo, there, gone, private, replace)}"
        yield from card_head(files[CARD])
        if licence is None and upload:
            raise A3Error(f"{folder / CARD}: licence {said}. Not uploaded.")
        if gone and not replace and upload:
            raise A3Error(
                f"{repo}: has files of another model: {shown(gone)}. Replace them with --replace, "
                "or name another repository."
            )
        if not upload:
            yield f"Nothing was uploaded. `a3 publish {folder} {repo} --upload` does."
            return
        hashes = hashes_of(folder, files, copies)
        commit = send(api, repo, files, gone, there, private, hashes)
        verify(api, repo, commit, hashes)
    yield f"Uploaded {len(files)} files: {api.endpoint}/{repo}, commit {commit}"


def listed(folder: Path, files: dict[str, Path], left: list[str]) -> Iterator[str]:
    """The files to upload with their sizes, and those left out, a line each."""
    sizes = {name: path.stat().st_size for name, path in sorted(files.items())}
    yield f"{'uploads':<10} {len(files)} files, {size(sum(sizes.values()))}"
    width = max(map(len, sizes))
    yield from (f"  {name:<{width}}  {size(count):>9}" for name, count in sizes.items())
    if left:
        yield f"{'stays':<10} {shown(left)}: not shared"


def card_head(card: Path) -> Iterator[str]:
    """The first lines of the card."""
    lines = card.read_text(errors="replace").splitlines()
    yield "card's head"
    yield from (f"  {line}".rstrip() for line in lines[:HEAD])
    if len(lines) > HEAD:
        yield f"  … {len(lines) - HEAD} more lines"


def size(count: int) -> str:
    """Bytes as people read them."""
    for unit, least in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= least:
            return f"{count / least:.1f} {unit}"
    return f"{count} B"


def shown(names: list[str]) -> str:
    """The first names of a list."""
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


# --- the hub ---
def look(api: HfApi, repo: str) -> There:
    """The repository as it is."""
    try:
        found: ModelInfo = api.model_info(repo)
    except RepositoryNotFoundError:
        return There()
    names = tuple(one.rfilename for one in found.siblings or [])
    return There(bool(found.private), found.sha, names, origin_there(api, repo, found.sha, names))


def origin_there(api: HfApi, repo: str, commit: str | None, names: tuple[str, ...]) -> str | None:
    """As `origin_of`, of a repository's record at a commit."""
    name = next((name for name in RECORDS if name in names), None)
    if name is None:
        return None
    with tempfile.TemporaryDirectory(prefix="a3-publish-") as work:
        path = Path(api.hf_hub_download(repo, name, revision=commit, local_dir=work))
        # Another program's file of this name says nothing of a3's models.
        try:
            return origin_of(read_record(path))
        except A3Error:
            return None


def asked(api: HfApi, repo: str) -> There | None:
    """As `look`; None if the hub cannot be reached, which a dry run does not need."""
    try:
        return call(repo, lambda: look(api, repo), "asked")
    except A3Error as error:
        if isinstance(error.__cause__, HFValidationError):
            raise
        LOG.warning(str(error))
        return None


def leftover(there: There | None, files: dict[str, Path], made_of: str | None) -> list[str]:
    """Files in the repository that loaders would read, and that are another model's.

    These are the files that the folder lacks. Weights and config that both have count, too, unless
    both models are made of the same weights, whose SHA-256 is `made_of`.
    """
    if there is None:
        return []
    same = made_of is not None and there.made_of == made_of
    others = {name for name in there.files if name not in OF_HUB and name not in files}
    if not same:
        both = files.keys() & {*there.files}
        others |= {one for one in both if one == "config.json" or one.endswith(".safetensors")}
    return sorted(name for name in others if name.lower().endswith(READ_BY_LOADERS))


def origin_of(record: dict[str, Any]) -> str | None:
    """SHA-256 of the weights of which a record's model was made; None if it does not say so."""
    base, made = record.get("base"), record.get("provenance")
    if isinstance(base, dict):
        return base.get("weights_sha256")
    found = made.get("checkpoint_sha256") if isinstance(made, dict) else None
    return found or record.get("weights_sha256")


def origin_in(folder: Path) -> str | None:
    """As `origin_of`, of the record in a folder."""
    found = next((folder / name for name in RECORDS if (folder / name).exists()), None)
    return None if found is None else origin_of(read_record(found))


def plan_of(repo: str, there: There | None, gone: list[str], private: bool, replace: bool) -> str:
    """What becomes of the repository, in a line."""
    if there is None:
        return f"{repo}: not known whether it exists"
    if there.private is None:
        return f"{repo}: new, {'private' if private else 'public'}"
    kind = "private" if there.private else "public"
    said = f"{repo}: exists, {kind}, with {len(there.files)} files; one commit replaces them"
    if not gone:
        return said
    return f"{said}; {'replaces' if replace else 'needs --replace for'} {shown(gone)}"


def send(
    api: HfApi,
    repo: str,
    files: dict[str, Path],
    gone: list[str],
    there: There | None,
    private: bool,
    hashes: dict[str, Hashes],
) -> str:
    """Make the repository where needed and upload all files in one commit; returns its hash.

    Raises A3Error if a file is not the one that was checked.
    """
    added = [CommitOperationAdd(name, str(path)) for name, path in sorted(files.items())]
    for one in added:
        if one.upload_info.sha256.hex() != hashes[one.path_in_repo].sha256:
            raise A3Error(
                f"{files[one.path_in_repo]}: changed since it was checked. Not uploaded; run it "
                "again."
            )
    removed = [CommitOperationDelete(name) for name in gone if name not in files]
    operations: list[Any] = [*removed, *added]
    # Another's commit meanwhile is an error.
    parent = there.commit if there is not None else None

    def commit() -> str:
        if there is None or there.private is None:
            api.create_repo(repo, private=private, exist_ok=False)
        done = api.create_commit(
            repo, operations, commit_message="Upload with a3 publish", parent_commit=parent
        )
        return str(done.oid)

    return call(repo, commit, "written")


def hashes_of(folder: Path, files: dict[str, Path], copies: dict[str, Path]) -> dict[str, Hashes]:
    """The hashes of the files as they were checked: those of the folder's record, where it has any.

    The record's are not of the `copies`, which say the same in other words.
    """
    recorded = {name: one for name, one in recorded_files(folder).items() if name not in copies}
    return {
        name: Hashes(
            recorded.get(name) or sha256(path),
            git_hash(path) if path.stat().st_size <= LARGEST_REGULAR else None,
        )
        for name, path in files.items()
    }


def verify(api: HfApi, repo: str, commit: str, hashes: dict[str, Hashes]) -> None:
    """Raise A3Error unless the hub's hashes at `commit` are these."""

    def tree() -> dict[str, RepoFile]:
        found = api.list_repo_tree(repo, recursive=True, revision=commit)
        return {one.path: one for one in found if isinstance(one, RepoFile)}

    found = call(repo, tree, "asked")
    for name, known in hashes.items():
        there = found.get(name)
        whole = there is not None and (
            there.lfs.sha256 == known.sha256 if there.lfs else there.blob_id == known.git
        )
        if not whole:
            raise A3Error(
                f"{repo}, commit {commit}: {name} is not what was uploaded, or not there. "
                "Run it again."
            )


def git_hash(path: Path) -> str:
    """Git's SHA-1 of a file."""
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def call(repo: str, do: Callable[[], Result], what: str) -> Result:
    """`do()`, with what can go wrong at the hub said as an A3Error; `what`: asked or written."""
    where = f"hub: {repo}"
    token = "Log in (`hf auth login`) or set HF_TOKEN, with a token that may write"
    try:
        return do()
    except HFValidationError as error:
        raise A3Error(f"{where}: no repository name. Write owner/name.") from error
    except OfflineModeIsEnabled as error:
        raise A3Error(f"{where}: HF_HUB_OFFLINE is set, so it was not {what}. Unset it.") from error
    except LocalTokenNotFoundError as error:
        raise A3Error(f"{where}: no token. {token}.") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        lines = (error.server_message or str(error)).strip().splitlines()
        said = lines[0] if lines else "no message"
        if status in (401, 403):
            raise A3Error(f"{where}: may not be {what} ({status}: {said}). {token}.") from error
        if status in (409, 412):
            instead = "Somebody else changed it meanwhile. Look at it, and run it again"
            raise A3Error(f"{where}: not {what} ({status}: {said}). {instead}.") from error
        raise A3Error(f"{where}: not {what} ({status}: {said}). Run it again.") from error
    except ValueError as error:
        said = str(error).strip().replace("\n", " ")
        raise A3Error(f"{where}: not {what}: {said}") from error
    except (HTTPError, *UNREACHED, RuntimeError) as error:
        cause = error.__cause__ or error
        raise A3Error(
            f"{where}: {constants.ENDPOINT} cannot be reached "
            f"({type(cause).__name__}: {cause}). Run it again; what has arrived is kept."
        ) from error
    except OSError as error:
        here = error.filename or "a file of this machine"
        raise A3Error(
            f"{here}: {error.strerror or error}, so {repo} was not {what}. Look at it, and run it "
            "again."
        ) from error
