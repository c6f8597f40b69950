"""What every file needs: the user's errors, logging, seeds, the device, whole files on disk."""

import errno
import io
import logging
import os
import random
import re
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # these imports take seconds
    import numpy as np
    import torch

LOGGER = logging.getLogger("bitfit")
FORMAT = 4  # of args.json, checkpoints and saved evaluators
LONGEST_MESSAGE = 2000  # characters of a UserError


class UserError(Exception):
    """Bad input. The message is one line: what was wrong and what to do."""

    shared = False  # whether all ranks of torchrun raise it

    def __init__(self, message: str) -> None:
        message = escaped(str(message))
        if len(message) > LONGEST_MESSAGE:  # a file's content, or an edited fact
            message = f"{message[: LONGEST_MESSAGE - 300]} ... {message[-300:]}"
        super().__init__(message)


class Diverged(Exception):
    """Training met a loss or gradient that is not finite; the message names the epoch and step."""


class NotPushed(Exception):
    """The Hub did not take a model; the message says how to push it later."""


class RankLost(Exception):
    """Another process that this one works with is gone."""


class CorruptFile(Exception):
    """A file of ours is not as it was written; the message says which and why."""


class Stopped(BaseException):
    """A signal asked the program to stop; `number` is the signal's.

    Like KeyboardInterrupt no Exception, so that no handler of errors takes it for one.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class OneLine(logging.Formatter):
    """Log lines that no character of a message can break."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return escaped(super().formatMessage(record))


def setup_logging(level: int = logging.INFO, speaker: str = "") -> None:
    """Log to standard error, so that standard output holds the results alone."""
    handler = logging.StreamHandler()
    handler.setFormatter(OneLine(f"%(asctime)s {speaker}%(message)s", datefmt="%H:%M:%S"))
    logging.basicConfig(level=level, handlers=[handler])
    for noisy in ("httpx", "httpx2", "huggingface_hub", "datasets", "matplotlib", "fsspec"):
        logging.getLogger(noisy).setLevel(logging.ERROR)


def escaped(text: str) -> str:
    """Text in one line: what cannot be printed (newlines, bytes that are no UTF-8) as `\\n`."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def write_line(line: str) -> None:
    """Write one line to standard error, if anybody can read it."""
    with suppress(OSError, AttributeError):
        sys.stderr.write(f"{escaped(line)}\n")


def print_result(text: str) -> None:
    """Print to standard output at once, whatever its encoding.

    A reader that left (`| head -1`) has all that it wants.

    Raises:
        OSError: it cannot be written.
    """
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    try:
        print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)
    except OSError as error:
        sys.stdout = io.StringIO()  # else the interpreter's end would try again
        if error.errno != errno.EPIPE:
            raise OSError(error.errno, error.strerror, "standard output") from None


def set_seed(seed: int) -> None:
    """Seed Python's, NumPy's and torch's global generators."""
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def make_generator(seed: int, purpose: str) -> "np.random.Generator":
    """A NumPy generator of its own for each (seed, purpose): no draw can move another's stream."""
    import numpy as np

    return np.random.default_rng([seed, *purpose.encode()])


def resolve_gpu(choice: int | str | None) -> int | None:
    """--gpu-device -> GPU number, or None for the CPU; without a choice the first GPU, if any."""
    import torch

    if choice is None:
        return 0 if torch.cuda.is_available() else None
    return None if choice == "cpu" else int(choice)


def choose_device(gpu: int | None) -> "torch.device":
    """The torch device for GPU number `gpu`; None means the CPU; UserError where there is none."""
    import torch

    if gpu is None:
        return torch.device("cpu")
    if not 0 <= gpu < torch.cuda.device_count():
        seen = f"torch sees {torch.cuda.device_count()} (numbered from 0)"
        what = "leave --gpu-device out, or give `--gpu-device cpu`"
        raise UserError(f"there is no GPU {gpu}: {seen}; {what}")
    return torch.device("cuda", gpu)


def default_precision(device: "torch.device") -> str:
    """bf16 on a GPU that multiplies in it by itself, else fp32."""
    import torch

    if device.type == "cpu":
        return "fp32"
    with torch.cuda.device(device):
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16" if native else "fp32"


def choose_precision(precision: str | None, device: "torch.device") -> str:
    """The precision that was asked for, or the device's default.

    Says so where a CPU would compute it without instructions for it.
    """
    if precision == "bf16" and device.type == "cpu" and not has_bf16_instructions():
        LOGGER.warning("--precision bf16: this CPU has no bf16 instructions and emulates them, "
                       "about 15 times slower than fp32")  # fmt: skip
    return precision or default_precision(device)


def has_bf16_instructions() -> bool:
    """Whether this machine's CPU multiplies in bfloat16 by itself, as far as torch can tell."""
    import torch

    names = ("avx512_bf16", "amx_bf16", "avx_ne_convert", "avx10_2", "bf16", "sve_bf16")
    known = getattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(names, True))()
    return any(known.get(name) for name in names)


def as_list(value: object) -> list:
    return [*value] if isinstance(value, (list, tuple)) else [value]


# Not all of torch has a class for it: its CPU allocator, oneDNN and CUDA's libraries only say so.
# oneDNN's "could not create a primitive descriptor" is of what it cannot compute at all.
NO_MEMORY = re.compile(
    "out of memory|DefaultCPUAllocator|ALLOC_FAILED|ALLOCATION_FAILED|[Cc]annot allocate memory|"
    "bad_alloc|could not create a primitive(?! desc)|could not (create|initialize) a memory|"
    "could not execute a primitive"
)
NO_THREAD = re.compile("can't start new thread|Resource temporarily unavailable")
MACHINES = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EAGAIN, errno.EMFILE, errno.ENFILE}


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that a device, or the machine, has no memory left."""
    torch = sys.modules.get("torch")  # what was not imported raised nothing
    if isinstance(error, MemoryError) or (torch and isinstance(error, torch.OutOfMemoryError)):
        return True
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno == errno.ENOMEM
    return isinstance(error, (RuntimeError, OSError)) and bool(NO_MEMORY.search(str(error)))


def is_machine_error(error: BaseException) -> bool:
    """Whether an exception is the machine's fault (memory, disk, threads), not the input's."""
    if isinstance(error, OSError) and error.errno in MACHINES:
        return True
    # The tokenizers' threads are Rust's, whose panics are no Exception.
    other = not isinstance(error, Exception) and type(error).__name__ == "PanicException"
    threads = isinstance(error, RuntimeError) or other
    return is_out_of_memory(error) or (threads and bool(NO_THREAD.search(str(error))))


@contextmanager
def convert_errors(make: Callable[[Exception], Exception]) -> Iterator[None]:
    """What others' code raises within becomes the UserError `make(error)`; faults stay faults."""
    try:
        yield
    except Exception as error:
        if is_machine_error(error):
            raise
        raise make(error) from None


def first_line(error: BaseException) -> str:
    """The first line of an error's text, without its final stop."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def temporary_name(path: str | Path) -> Path:
    """The name beside `path` under which it is written; see `is_temporary`."""
    path = Path(path)
    return path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Give a temporary name beside `path`; what is written there becomes `path` at the end.

    A reader sees the old file or the new one, never half of one, even after a power cut.
    """
    path, temporary = Path(path), temporary_name(path)
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
def atomic_folder(path: str | Path) -> Iterator[Path]:
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


def home_of_temporary(path: Path) -> Path:
    """Return where `atomic_folder` writes: beside the folder, or in it if beside it cannot be."""
    there = path.is_dir() and (
        not os.access(path.parent, os.W_OK) or path.stat().st_dev != path.parent.stat().st_dev
    )
    return path if there else path.parent


def remove_temporaries_of(temporary: Path) -> None:
    """Remove what killed processes left of a `atomic_folder` with the same path."""
    name = re.sub(r"\d+\.tmp$", "", temporary.name)
    for path in temporary.parent.glob(".*.tmp"):
        if re.fullmatch(re.escape(name) + r"\d+\.tmp", path.name):
            shutil.rmtree(path, ignore_errors=True)


def rename_folder(temporary: Path, path: Path) -> bool:
    """Whether a folder could take a name that is free or an empty folder's."""
    if path == Path.cwd() or temporary.parent == path:
        return False  # a shell would stay in the replaced folder
    try:
        os.rename(temporary, path)
    except OSError:  # it holds files, or is a link; if the disk fails, the next call raises that
        return False
    flush(path.parent)
    return True


def finish(file: Path, mode: int) -> None:
    """Give a file the mode of the umask, for safetensors makes its files 0600; write it to disk."""
    file.chmod(mode)
    flush(file)


def flush(path: str | Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: str | Path, text: str) -> None:
    """Write a whole text file (UTF-8; bytes of a path that are not, escaped)."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace", newline="\n")


def is_temporary(name: str) -> bool:
    """Whether a name is one of those that `atomic_file` and `atomic_folder` write under."""
    return bool(re.fullmatch(r"\..*\.\d+\.tmp(\.\w+)?", name))


def remove_temporaries(folder: str | Path) -> None:
    """What a killed process left of `atomic_file` and `atomic_folder`."""
    for path in list(Path(folder).rglob(".*.tmp*")):
        if is_temporary(path.name):
            shutil.rmtree(path, ignore_errors=True)
            path.unlink(missing_ok=True)
