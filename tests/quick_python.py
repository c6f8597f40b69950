"""A stand-in for `python` that starts a program in 0.1 s: it is forked from a preloaded process.

A new Python needs about four seconds to import the program. `serve` runs in a process that has
imported it (see `processes.start_process`). `write_stand_in` writes an executable, which sends its
arguments, environment and open files to `serve`, passes signals on, and exits with the program's
status. The program's code, files, output and signals are those of a real start.
"""

import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
from conftest import ROOT, wait_for
from processes import start_process

CLIENT = """#!{python} -IS
import array, json, os, signal, socket, sys
words = sys.argv[2:] if sys.argv[1:2] == ["-u"] else sys.argv[1:]
if not words or (words[0].startswith("-") and words[0] != "-m"):
    os.execv({python!r}, [{python!r}, *words])
early, pid = [], 0
def forward(number, frame):
    os.kill(pid, number) if pid else early.append(number)
for number in (1, 2, 10, 12, 15):  # those that the program handles
    signal.signal(number, forward)
numbers = [int(name) for name in os.listdir("/proc/self/fd")]
numbers = [n for n in numbers if os.path.exists(f"/proc/self/fd/{{n}}")]
server = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
server.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 400_000)
server.connect({address!r})
request = [words, sys.argv[0], os.getcwd(), dict(os.environ), numbers]
socket.send_fds(server, [json.dumps(request).encode()], numbers)
for number in numbers:
    os.close(number) if number > 2 else None
pid = int(server.recv(100))
while early:
    os.kill(pid, early.pop(0))
status = int(server.recv(100))
if status < 0:
    signal.signal(-status, signal.SIG_DFL) if -status != 9 else None
    os.kill(os.getpid(), -status)
os._exit(status)
"""


def write_stand_in(path, address):
    """Write an executable that runs Python programs through the server at an address."""
    path.write_text(CLIENT.format(python=sys.executable, address=str(address)))
    path.chmod(0o755)


def serve(address):
    """Fork a process for each connection, without end."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    server = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    server.bind(str(address))
    server.listen(20)
    while True:
        connection, _ = server.accept()
        if os.fork() == 0:
            server.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            return answer(connection)
        connection.close()


def answer(connection):
    """Start the requested program, and send its process number and later its exit status.

    If the stand-in is killed, its program is killed too.
    """
    message, descriptors, _, _ = socket.recv_fds(connection, 400_000, 100)
    program = os.fork()
    if program == 0:
        connection.close()
        return run(json.loads(message), descriptors)
    for descriptor in descriptors:
        os.close(descriptor)
    connection.send(str(program).encode())
    watch = os.pidfd_open(program)
    ready, _, _ = select.select([connection, watch], [], [])
    if watch not in ready:
        os.kill(program, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(program, 0)[1])
    if watch in ready:
        connection.send(str(status).encode())
    os._exit(0)


def run(request, descriptors):
    """Run `python words...` in this process, with the open files of the stand-in."""
    import torch
    from pictures import real_pictures

    words, python, folder, environment, numbers = request
    spare = [os.dup2(d, 500 + i, inheritable=False) for i, d in enumerate(descriptors)]
    for descriptor in descriptors:
        os.close(descriptor)
    for number, descriptor in zip(numbers, spare, strict=True):
        os.dup2(descriptor, number)
        os.close(descriptor)
    if 0 in numbers:  # multiprocessing gives its processes an empty input.
        sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.executable = python
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(int(environment.get("OMP_NUM_THREADS") or 1))
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with real_pictures() if "REAL_PICTURES" in environment else nullcontext():
        if words[0] == "-m":
            sys.argv = words[1:]
            sys.modules.pop(words[1], None)  # else runpy warns
            sys.path.insert(0, folder)
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = words
            sys.path.insert(0, str(Path(words[0]).resolve().parent))
            runpy.run_path(words[0], run_name="__main__")


@pytest.fixture(scope="session")
def stand_in(tmp_path_factory):
    """The folder of stand-ins named python and python3."""
    folder = tmp_path_factory.mktemp("python")
    process = start_process(serve, folder / "socket")
    wait_for((folder / "socket").exists)
    for name in ("python", "python3"):
        write_stand_in(folder / name, folder / "socket")
    yield folder
    process.kill()


@pytest.fixture
def quick_python(stand_in, monkeypatch):
    """Programs that the test starts with this Python start quickly."""
    monkeypatch.setattr(sys, "executable", str(stand_in / "python"))
    monkeypatch.setenv("PYTHON_EXEC", str(stand_in / "python"))  # torchrun's ranks
    monkeypatch.setenv("PATH", f"{stand_in}{os.pathsep}{os.environ['PATH']}")


def run_script(script, *words, cwd=ROOT):
    """Run a script of the project and return its `CompletedProcess`."""
    command = [sys.executable, str(ROOT / script), *words]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True)
