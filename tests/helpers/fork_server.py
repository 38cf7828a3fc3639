"""A server that forks a child for each `a3` and `snakemake`; the libraries are imported once.

A job imports torch, transformers and what they import for seconds, and computes for less than one;
tests of the workflow start hundreds. The child imports a3 itself from the project's own folder, as
the program does. The programs themselves run in test_cli.py and in the tests of Slurm.
"""

import atexit
import importlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from functools import cache
from pathlib import Path

LIBRARIES = (
    "lm_eval.models.huggingface",
    "transformers.models.llama.modeling_llama",
    "pandas",
    "matplotlib.pyplot",
    "snakemake.cli",
)
# Those that do not import huggingface_hub, which reads its settings when it is imported.
WITHOUT_HUB = (
    *("torch._dynamo", "torch.distributed.tensor", "torch.distributed.checkpoint"),
    *("scipy.optimize", "pandas", "pyarrow.dataset"),
)
PROGRAMS = {"a3": "a3.cli.main", "snakemake": "snakemake.cli", "hub-jobs": "hub_jobs"}
CLIENT = """#!{python} -IS
import json, os, socket, sys
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
socket.send_fds(server, [b" "], [0, 1, 2])
request = {{"program": {program!r}, "words": sys.argv[1:]}}
request |= {{"folder": os.getcwd(), "environ": dict(os.environ)}}
server.sendall(json.dumps(request).encode() + b"\\n")
status = server.makefile().readline()
sys.exit(int(status) if status else 137)
"""


@cache
def python(libraries: tuple[str, ...] = LIBRARIES) -> str:
    """A Python beside which PROGRAMS are clients of a server with `libraries`, which is started.

    Snakemake puts the folder of its own Python first in the PATH of jobs.
    """
    folder = Path(tempfile.mkdtemp(prefix="a3-"))  # addresses of sockets are short
    atexit.register(shutil.rmtree, folder)
    (folder / "bin").mkdir()
    mine, address = folder / "bin" / "python", str(folder / "socket")
    mine.symlink_to(sys.executable)
    (folder / "lib").symlink_to(Path(sys.prefix, "lib"))
    (folder / "pyvenv.cfg").write_bytes(Path(sys.prefix, "pyvenv.cfg").read_bytes())
    own = Path(sys.executable).resolve()
    for program in PROGRAMS:
        client = folder / "bin" / program
        client.write_text(CLIENT.format(python=own, address=address, program=program))
        client.chmod(0o755)
    environ = os.environ | {"TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error"}
    server = subprocess.Popen(
        [mine, __file__, address, *libraries], stdout=subprocess.PIPE, env=environ, text=True
    )
    assert server.stdout.readline() == "ready\n"
    return str(mine)


def serve(address: str, *libraries: str) -> None:
    """Take requests until the tests, whose child this is, have ended."""
    for library in libraries:
        importlib.import_module(library)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen()
    listener.settimeout(1)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    print("ready", flush=True)
    tests = os.getppid()
    while os.getppid() == tests:
        try:
            connection, _ = listener.accept()
        except TimeoutError:
            continue
        connection.settimeout(None)
        _, descriptors, _, _ = socket.recv_fds(connection, 1, 3)
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            listener.close()
            answer(connection, descriptors)
        connection.close()
        for descriptor in descriptors:
            os.close(descriptor)


def answer(connection: socket.socket, descriptors: list[int]) -> None:
    """Run one command as the client would, and send its exit status."""
    request = json.loads(connection.makefile().readline())
    for number, descriptor in enumerate(descriptors):
        os.dup2(descriptor, number)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environ"])
    sys.argv = [request["program"], *request["words"]]
    sys.path[:1] = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    opened: set[str] = set()
    sys.addaudithook(lambda event, said: event == "open" and opened.add(str(said[0])))
    status = 1
    try:
        status = run(request["program"]) or 0
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
    if used := os.environ.get("A3_USED"):
        modules = sorted(name for name in sys.modules if name.split(".")[0] == "a3")
        Path(used).write_text(json.dumps({"modules": modules, "files": sorted(opened)}))
    sys.stdout.flush()
    sys.stderr.flush()
    connection.sendall(f"{status}\n".encode())
    os._exit(status)


def run(program: str) -> int | None:
    """Run a program in this process."""
    return importlib.import_module(PROGRAMS[program]).main()


if __name__ == "__main__":
    serve(*sys.argv[1:])
