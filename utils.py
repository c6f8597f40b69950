"""What every file needs: the user's errors, logging, seeds, the device, whole files on disk."""

import errno
import logging
import os
import random
import re
import shutil
import signal
import socket
import sys
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np

LOGGER = logging.getLogger("bitfit")
FORMAT = 4  # of args.json, checkpoints and saved evaluators


class UserError(Exception):
    """Bad input. The message is one line: what was wrong and what to do."""

    shared = False  # whether all ranks of torchrun raise it


class Diverged(Exception):
    """Training met a loss or gradient that is not finite; the message names the epoch and step."""


class NotPushed(Exception):
    """The Hub did not take a model; the message says how to push it later."""


class Lost(Exception):
    """Another process that this one works with is gone."""


class Damaged(Exception):
    """A file of ours is not as it was written; the message says which and why."""


class Stopped(BaseException):
    """A signal asked the program to stop; `number` is the signal's.

    Like KeyboardInterrupt no Exception, so that no handler of errors takes it for one.
    """

    def __init__(self, number):
        super().__init__(signal.Signals(number).name)
        self.number = number


class Signals:
    """SIGTERM, SIGINT and SIGUSR1: what users and schedulers send to stop a program.

    At first a signal raises `Stopped` at once. Within `held` it is only noted in `received`, for
    the training loop to finish its step; a second SIGINT stops at once even there.
    """

    NUMBERS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

    def __init__(self):
        self.received, self.waits = None, False

    def __enter__(self):
        self.before = {number: signal.signal(number, self._handle) for number in self.NUMBERS}
        self.hook, sys.unraisablehook = sys.unraisablehook, self._swallowed
        return self

    def __exit__(self, kind, *exception):
        sys.unraisablehook = self.hook
        for number, handler in self.before.items():
            signal.signal(number, handler)
        if self.received and kind is None:
            raise Stopped(self.received)  # a destructor swallowed it, and nobody asked since

    def _swallowed(self, unraisable):
        if unraisable.exc_type is not Stopped:
            self.hook(unraisable)

    def _handle(self, number, frame):
        if self.received == number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number
        if not self.waits:
            raise Stopped(number)
        LOGGER.info("%s: finishing the step and writing a checkpoint", signal.Signals(number).name)

    @contextmanager
    def held(self, waits=True):
        """Within: a signal waits to be asked for, or raises `Stopped` at once."""
        before, self.waits = self.waits, waits
        try:
            if self.received and not waits:
                raise Stopped(self.received)
            yield
        finally:
            self.waits = before
        if self.received and not before:
            raise Stopped(self.received)  # it came too late for anybody inside to ask


def setup_logging(level=logging.INFO, speaker=""):
    """Log to standard error, so that standard output holds the results alone."""
    form = f"%(asctime)s {speaker}%(message)s"
    logging.basicConfig(level=level, format=form, datefmt="%H:%M:%S")
    for noisy in ("httpx", "httpx2", "huggingface_hub", "datasets", "matplotlib", "fsspec"):
        logging.getLogger(noisy).setLevel(logging.ERROR)


def end_of(program, work, stopped="", fault=""):
    """A program's exit status: that of `work()`, or with one line where it did not end well.

    Args:
        program: its name.
        stopped, fault: what the line says after the name of the signal, and after the fault.
    """
    setup_logging()
    try:
        with Signals():
            return work() or 0
    except UserError as error:
        status, said = 2, f"error: {error}"
    except (Stopped, KeyboardInterrupt) as error:
        number = getattr(error, "number", signal.SIGINT)
        status, said = 128 + number, f"stopped: {signal.Signals(number).name}{stopped}"
    except (OSError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not is_out_of_memory(error):
            raise
        status, said = 1, f"stopped: {one_line(error)}{fault}"
    sys.stderr.write(f"{program}: {said}\n")
    return status


def set_seed(seed):
    """Seed Python's, NumPy's and torch's global generators."""
    import torch

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def generator(seed, purpose):
    """A NumPy generator of its own for each (seed, purpose): no draw can move another's stream."""
    return np.random.default_rng([seed, *purpose.encode()])


def gpu_of(choice):
    """--gpu-device -> GPU number, or None for the CPU; without a choice the first GPU, if any."""
    import torch

    first = 0 if torch.cuda.is_available() else None
    return {None: first, "cpu": None}.get(choice, choice)


def choose_device(gpu):
    """The torch device for GPU number `gpu`; None means the CPU; UserError where there is none."""
    import torch

    if gpu is None:
        return torch.device("cpu")
    if not 0 <= gpu < torch.cuda.device_count():
        seen = f"torch sees {torch.cuda.device_count()} (numbered from 0)"
        what = "leave --gpu-device out, or give `--gpu-device cpu`"
        raise UserError(f"there is no GPU {gpu}: {seen}; {what}")
    return torch.device("cuda", gpu)


def default_precision(device):
    """bf16 on a GPU that multiplies in it by itself, else fp32."""
    import torch

    if device.type == "cpu":
        return "fp32"
    with torch.cuda.device(device):
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16" if native else "fp32"


def use_local_copies_when_offline(needs_hub=True):
    """Tell the Hub's clients to use their cache when the Hub is out of reach or not needed.

    They would ask for every file six times over 20 seconds; one connection tells as much.
    """
    if not needs_hub:
        os.environ["HF_HUB_OFFLINE"] = "1"
    if any(os.environ.get(name) for name in ("HF_HUB_OFFLINE", "HTTPS_PROXY", "https_proxy")):
        return
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    url = urlsplit(endpoint)
    port = url.port or (80 if url.scheme == "http" else 443)
    try:
        socket.create_connection((url.hostname, port), timeout=5).close()
    except OSError:
        os.environ["HF_HUB_OFFLINE"] = "1"


def as_list(value):
    return [*value] if isinstance(value, (list, tuple)) else [value]


def is_out_of_memory(error):
    """Whether an exception says that a device, or the machine, has no memory left."""
    import torch

    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    # Not all of torch says it with a class: its CPU allocator and CUDA's libraries do not.
    said = ("DefaultCPUAllocator", "out of memory", "ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(words in str(error) for words in said)


def is_fault(error):
    """Whether an exception is the machine's fault (memory, disk), not that of what was given."""
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO)
    return full or is_out_of_memory(error)


@contextmanager
def blaming(make):
    """What others' code raises within becomes the UserError `make(error)`; faults stay faults."""
    try:
        yield
    except Exception as error:
        if is_fault(error):
            raise
        raise make(error) from None


def one_line(error):
    """The first line of an error's text, without its final stop."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


@contextmanager
def whole_file(path):
    """Give a temporary name beside `path`; what is written there becomes `path` at the end.

    A reader sees the old file or the new one, never half of one, even after a power cut.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        finish(temporary, mode)
        os.replace(temporary, path)
        flush(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def whole_folder(path):
    """The same for a folder: one that is new or empty appears with all of its files.

    In another one the files get their names one by one, config.json last; others are left alone.
    """
    path = Path(path).absolute()
    temporary = home_of_temporary(path) / f".{path.name}.{os.getpid()}.tmp"
    try:
        remove_temporaries_of(temporary)
        temporary.mkdir(parents=True)
        yield temporary
        files = sorted(temporary.iterdir(), key=lambda file: file.name == "config.json")
        for file in files:
            finish(file, temporary.stat().st_mode & 0o666)
        if not rename_folder(temporary, path):
            path.mkdir(exist_ok=True)
            for file in files:
                os.replace(file, path / file.name)
        flush(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def home_of_temporary(path):
    """Return where `whole_folder` writes: beside the folder, or in it if beside it cannot be."""
    there = path.is_dir() and (
        not os.access(path.parent, os.W_OK) or path.stat().st_dev != path.parent.stat().st_dev
    )
    return path if there else path.parent


def remove_temporaries_of(temporary):
    """Remove what killed processes left of a `whole_folder` with the same path."""
    name = re.sub(r"\d+\.tmp$", "", temporary.name)
    for path in temporary.parent.glob(".*.tmp"):
        if re.fullmatch(re.escape(name) + r"\d+\.tmp", path.name):
            shutil.rmtree(path, ignore_errors=True)


def rename_folder(temporary, path):
    """Whether a folder could take a name that is free or an empty folder's."""
    if path == Path.cwd() or temporary.parent == path:
        return False  # a shell would stay in the replaced folder
    try:
        os.rename(temporary, path)
    except OSError:  # it holds files, or is a link; if the disk fails, the next call raises that
        return False
    flush(path.parent)
    return True


def finish(file, mode):
    """Give a file the mode of the umask, for safetensors makes its files 0600; write it to disk."""
    file.chmod(mode)
    flush(file)


def flush(path):
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path, text):
    """Write a whole text file (UTF-8)."""
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def is_temporary(name):
    """Whether a name is one of those that `whole_file` and `whole_folder` write under."""
    return bool(re.fullmatch(r"\..*\.\d+\.tmp(\.\w+)?", name))


def remove_temporaries(folder):
    """What a killed process left of `whole_file` and `whole_folder`."""
    for path in list(Path(folder).rglob(".*.tmp*")):
        if is_temporary(path.name):
            shutil.rmtree(path, ignore_errors=True)
            path.unlink(missing_ok=True)
