"""Processes that start quickly: they are forked from a server that has imported torch.

A new Python needs about four seconds to import the program. Tests that are about the start itself,
signals during it, or shells start one nevertheless.
"""

import multiprocessing
import os
import sys
from contextlib import chdir
from multiprocessing import forkserver
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
PRELOADED = ["glue_evaluator", "run_glue", "bitfit.results.sweeps", "bitfit.study.report",
             "sklearn.metrics", "scipy.stats", "pandas", "seaborn", "conftest",
             "transformers.models.bert.modeling_bert", "torch.distributed.run"]  # fmt: skip


def start_process(work, *args):
    """Start a process that calls `work(*args)`, and return it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    path = os.pathsep.join(map(str, (ROOT, ROOT / "tests", ROOT / "scripts")))
    with chdir(ROOT), mock.patch.dict(os.environ, {"PYTHONPATH": path}):
        forkserver.ensure_running()  # the server finds the modules of PRELOADED there
    process = context.Process(target=work, args=args)
    process.start()
    return process


def exit_status(main, argv):
    """Return the exit status of a program's main function, which may raise SystemExit."""
    try:
        return main(argv)
    except SystemExit as stop:
        return stop.code


def write_output_to(log, error_log=None):
    """Append this process's standard output and standard error to files."""
    for descriptor, path in ((1, log), (2, error_log or log)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, descriptor)


def run_program(flags, log):
    """Run `run_glue.py` in this process, with its output in `log`, and exit with its status."""
    write_output_to(log)
    import torch

    import run_glue

    torch.set_num_threads(1)
    sys.exit(run_glue.main(flags))


def be_rank(rank, size, port, work, *args):
    """Call `work(*args)` as one of `size` ranks that torchrun has started."""
    import torch

    for name, value in (("RANK", rank), ("WORLD_SIZE", size)):
        os.environ[name] = os.environ[f"LOCAL_{name}"] = str(value)
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    os.environ |= {"TORCHELASTIC_RUN_ID": "test", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    torch.set_num_threads(1)
    work(*args)


def start_ranks(size, work, *args):
    """Call `work(*args)` in `size` ranks, and return a function that waits for exit statuses."""
    from torch.distributed import TCPStore

    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    ranks = [start_process(be_rank, rank, size, store.port, work, *args) for rank in range(size)]

    def wait():
        for rank in ranks:
            rank.join(120)
        assert store.port
        return [rank.exitcode for rank in ranks]

    return wait


def in_ranks(size, work, *args):
    """Call `work(*args)` in `size` ranks, and return their exit statuses."""
    return start_ranks(size, work, *args)()
