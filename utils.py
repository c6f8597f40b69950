"""What every file needs: the user's errors, logging, seeds, the device, whole files on disk."""

import logging
import os
import random
import socket
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np

LOGGER = logging.getLogger("bitfit")


class UserError(Exception):
    """Bad input. The message is one line: what was wrong and what to do."""


class Diverged(Exception):
    """Training met a loss or gradient that is not finite; the message names the epoch and step."""


def setup_logging(level=logging.INFO):
    """Log to standard error, so that standard output holds the results alone."""
    logging.basicConfig(level=level, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    for noisy in ("httpx", "huggingface_hub", "datasets", "matplotlib", "fsspec"):
        logging.getLogger(noisy).setLevel(logging.ERROR)


def set_seed(seed):
    """Seed Python's, NumPy's and torch's global generators."""
    import torch

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def generator(seed, purpose):
    """A NumPy generator of its own for each (seed, purpose): no draw can move another's stream."""
    return np.random.default_rng([seed, *purpose.encode()])


def choose_device(gpu):
    """The torch device for GPU number `gpu`; None means the CPU.

    Raises:
        UserError: if there is no such GPU.
    """
    import torch

    if gpu is None:
        return torch.device("cpu")
    if not 0 <= gpu < torch.cuda.device_count():
        raise UserError(
            f"there is no GPU {gpu}: torch sees {torch.cuda.device_count()} (numbered from 0); "
            "leave --gpu-device out, or give `--gpu-device cpu`"
        )
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


@contextmanager
def whole_file(path):
    """Give a temporary name beside `path`; what is written there becomes `path` at the end.

    A reader sees the old file or the new one, never half of one.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path, text):
    """Write a whole text file (UTF-8)."""
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")
