"""Errors, messages, logging, seeds and the device, for all other modules."""

import errno
import io
import logging
import random
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from bitfit.signals import is_first_rank

if TYPE_CHECKING:  # these imports take seconds
    import numpy as np
    import torch

LOGGER = logging.getLogger("bitfit")
FORMAT = 4  # of args.json, checkpoints and saved evaluators
LONGEST_MESSAGE = 2000  # characters of a UserError
PRINT_SECONDS = 5  # for rank 0 to print a line before another rank ends


class UserError(Exception):
    """Invalid input. The message is one line with the problem and what to do."""

    shared = False  # whether all ranks of torchrun raise it

    def __init__(self, message: str) -> None:
        message = escape_unprintable(str(message))
        if len(message) > LONGEST_MESSAGE:  # a quoted value of a file may be long
            message = f"{message[: LONGEST_MESSAGE - 300]} ... {message[-300:]}"
        super().__init__(message)


class Diverged(Exception):
    """A loss or gradient is not finite; the message names the epoch and the step."""


class NotPushed(Exception):
    """An upload to the Hub failed; the message has the command to upload later."""


class RankLost(Exception):
    """Another rank of torchrun has ended."""


class CorruptFile(Exception):
    """A file of this program was changed or damaged; the message has the file and the reason."""


class OneLine(logging.Formatter):
    """Log each message as one line, whatever its characters."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return escape_unprintable(super().formatMessage(record))


def setup_logging(level: int = logging.INFO, speaker: str = "") -> None:
    """Log to standard error, so that standard output holds the results alone."""
    if LOGGER.handlers:  # Undo `setup_default_logging`.
        LOGGER.handlers.clear()
        LOGGER.propagate = True
        LOGGER.setLevel(logging.NOTSET)
    logging.basicConfig(level=level, handlers=[stderr_handler(speaker)])
    for noisy in ("httpx", "httpx2", "huggingface_hub", "datasets", "matplotlib", "fsspec"):
        logging.getLogger(noisy).setLevel(logging.ERROR)


def setup_default_logging() -> None:
    """Log this program's lines to standard error, unless the Python program configured logging."""
    if not LOGGER.hasHandlers():
        LOGGER.addHandler(stderr_handler())
        LOGGER.setLevel(logging.INFO)
        LOGGER.propagate = False


def stderr_handler(speaker: str = "") -> logging.Handler:
    """Return a handler that writes one line for each message."""
    handler = logging.StreamHandler()
    handler.setFormatter(OneLine(f"%(asctime)s {speaker}%(message)s", datefmt="%H:%M:%S"))
    return handler


def escape_unprintable(text: str) -> str:
    """Return text with escapes such as `\\n` for characters that cannot be printed."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def print_once(line: str, at_once: bool = False) -> None:
    """Write one line to standard error, once for all ranks of torchrun.

    torchrun ends all ranks as soon as one of them ends. So the others give rank 0 some seconds to
    write the line, unless they have to end `at_once`.
    """
    if is_first_rank():
        write_line(line)
    elif not at_once:
        time.sleep(PRINT_SECONDS)


def write_line(line: str) -> None:
    """Write one line to standard error, unless it is closed."""
    with suppress(OSError, AttributeError):
        sys.stderr.write(f"{escape_unprintable(line)}\n")


def print_result(text: str) -> None:
    """Print to standard output at once, whatever its encoding; OSError if that fails.

    A reader that has closed the pipe (`| head -1`) is no error.
    """
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    try:
        print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)
    except OSError as error:
        sys.stdout = io.StringIO()  # The interpreter would try again at exit.
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
    """Return the NumPy generator of a seed and a purpose; draws for one purpose change no other."""
    import numpy as np

    return np.random.default_rng([seed, *purpose.encode()])


def resolve_gpu(choice: int | str | None) -> int | None:
    """Return the number of the chosen GPU, or None for the CPU; by default the first GPU."""
    import torch

    if choice is None:
        return 0 if torch.cuda.is_available() else None
    return None if choice == "cpu" else int(choice)


def choose_device(gpu: int | None) -> "torch.device":
    """Return the torch device of a GPU number, None for the CPU; UserError for an unknown GPU."""
    import torch

    if gpu is None:
        return torch.device("cpu")
    if not 0 <= gpu < torch.cuda.device_count():
        seen = f"torch sees {torch.cuda.device_count()} (numbered from 0)"
        raise UserError(f"there is no GPU {gpu}: {seen}; give the number of one, or `cpu`")
    return torch.device("cuda", gpu)


def choose_precision(precision: str | None, device: "torch.device") -> str:
    """Return the precision, by default bf16 if a GPU has it, else fp32; warn if it is emulated."""
    import torch

    if precision is None and device.type == "cuda":
        with torch.cuda.device(device):
            native = torch.cuda.is_bf16_supported(including_emulation=False)
        return "bf16" if native else "fp32"
    if precision == "bf16" and device.type == "cpu" and not has_bf16_instructions():
        LOGGER.warning("--precision bf16: this CPU has no bf16 instructions and emulates them, "
                       "about 15 times slower than fp32")  # fmt: skip
    return precision or "fp32"


def has_bf16_instructions() -> bool:
    """Return whether the CPU has bf16 instructions, as far as torch can tell."""
    import torch

    names = ("avx512_bf16", "amx_bf16", "avx_ne_convert", "avx10_2", "bf16", "sve_bf16")
    known = getattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(names, True))()
    return any(known.get(name) for name in names)


def as_list(value: object) -> list:
    """Return the items of a sequence of Python or NumPy, or another value as the only item."""
    value = value.tolist() if hasattr(value, "tolist") else value
    return [*value] if isinstance(value, (list, tuple, range)) else [value]


# torch's CPU allocator, oneDNN and CUDA's libraries have no exception class for this.
# oneDNN's "could not create a primitive descriptor" means an unsupported operation instead.
NO_MEMORY = re.compile(
    "out of memory|DefaultCPUAllocator|ALLOC_FAILED|ALLOCATION_FAILED|[Cc]annot allocate memory|"
    "bad_alloc|could not create a primitive(?! desc)|could not (create|initialize) a memory|"
    "could not execute a primitive"
)
NO_THREAD = re.compile("can't start new thread|Resource temporarily unavailable")
MACHINE_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EAGAIN, errno.EMFILE, errno.ENFILE}


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an exception means that a device or the machine has no memory left."""
    torch = sys.modules.get("torch")  # If it is not imported, it did not raise the exception.
    if isinstance(error, MemoryError) or (torch and isinstance(error, torch.OutOfMemoryError)):
        return True
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno == errno.ENOMEM
    return isinstance(error, (RuntimeError, OSError)) and bool(NO_MEMORY.search(str(error)))


def is_machine_error(error: BaseException) -> bool:
    """Return whether the machine (memory, disk, threads) caused an exception, not the input."""
    if isinstance(error, OSError) and error.errno in MACHINE_ERRNOS:
        return True
    # Panics of the tokenizers' Rust threads are no subclass of Exception.
    other = not isinstance(error, Exception) and type(error).__name__ == "PanicException"
    threads = isinstance(error, RuntimeError) or other
    return is_out_of_memory(error) or (threads and bool(NO_THREAD.search(str(error))))


@contextmanager
def convert_errors(make: Callable[[Exception], Exception]) -> Iterator[None]:
    """Raise `make(error)` for exceptions of other code in the context, except machine errors."""
    try:
        yield
    except Exception as error:
        if is_machine_error(error):
            raise
        raise make(error) from None


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's text, without the number of an OSError."""
    text = re.sub(r"^\[Errno \d+\] ", "", str(error))
    return (text.strip().splitlines() or [type(error).__name__])[0].rstrip(".")
