import errno
import io
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT

import utils
from bitfit import files
from bitfit.model import hub


def test_each_purpose_has_its_own_stream():
    draws = {
        tuple(utils.make_generator(seed, purpose).integers(1000, size=4))
        for seed in (0, 1, 2**63 - 1)
        for purpose in ("mask", "data order of epoch 0", "data order of epoch 1")
    }
    assert len(draws) == 9
    again = utils.make_generator(1, "mask").integers(1000, size=4)
    assert np.array_equal(again, utils.make_generator(1, "mask").integers(1000, size=4))


def test_set_seed_reaches_torch_and_numpy():
    utils.set_seed(3)
    first = torch.rand(2), np.random.rand(2)
    utils.set_seed(3)
    assert torch.equal(first[0], torch.rand(2))
    assert np.array_equal(first[1], np.random.rand(2))
    assert torch.initial_seed() == 3


def test_a_file_is_whole_or_as_it_was(tmp_path):
    path = tmp_path / "metrics.json"
    files.write_text(path, "old")
    with pytest.raises(OSError), files.atomic_file(path) as temporary:
        temporary.write_text("half of the ne")
        raise OSError("disk full")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_no_such_gpu():
    assert utils.choose_device(None) == torch.device("cpu")
    with pytest.raises(utils.UserError, match="there is no GPU 99"):
        utils.choose_device(99)


@pytest.mark.parametrize("address", ["https://hub.invalid", "hub.invalid", "http://[::1"])
def test_an_unreachable_hub_is_asked_once(monkeypatch, address):
    for name in ("HF_HUB_OFFLINE", "HTTPS_PROXY", "https_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", address)
    hub.use_local_copies_when_offline()
    assert os.environ["HF_HUB_OFFLINE"] == "1"


def test_a_hub_that_is_not_needed_is_not_asked(monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(hub.socket, "create_connection", None)  # a call would fail
    hub.use_local_copies_when_offline(needs_hub=False)
    assert os.environ["HF_HUB_OFFLINE"] == "1"


HUB = "https://huggingface.co"


@pytest.mark.parametrize(
    ("names", "endpoint", "tried"),
    [
        ({"ALL_PROXY": "http://proxy:3128"}, HUB, False),
        ({"all_proxy": "socks5://proxy:1080"}, HUB, False),
        ({"https_proxy": "http://proxy:3128"}, HUB, False),
        ({"HTTPS_PROXY": "http://proxy:3128"}, HUB, False),
        ({"http_proxy": "http://proxy:3128"}, "http://mirror:8080", False),
        ({"ALL_PROXY": ""}, HUB, True),
        ({"NO_PROXY": "huggingface.co"}, HUB, True),
    ],
)
def test_the_hub_behind_a_proxy_is_not_tried(monkeypatch, names, endpoint, tried):
    """As huggingface_hub's client takes proxies from the environment."""
    for name in ("HF_HUB_OFFLINE", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    for name in ("ALL_PROXY", "HTTPS_PROXY", "HTTP_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    for name, value in {"HF_ENDPOINT": endpoint, **names}.items():
        monkeypatch.setenv(name, value)
    asked = []

    def refuse(address, timeout):
        asked.append(address)
        raise OSError

    monkeypatch.setattr(hub.socket, "create_connection", refuse)
    hub.use_local_copies_when_offline()
    assert bool(asked) == ("HF_HUB_OFFLINE" in os.environ) == tried


@pytest.mark.parametrize(
    ("precision", "device", "known", "warns"),
    [
        ("bf16", "cpu", {"avx512_f": True, "avx512_bf16": False, "amx_bf16": False}, True),
        ("bf16", "cpu", {"avx512_bf16": True}, False),
        ("bf16", "cpu", {"amx_bf16": True}, False),
        ("bf16", "cpu", {"neon": True, "bf16": True}, False),
        ("fp32", "cpu", {}, False),
        (None, "cpu", {}, False),
        ("bf16", "cuda", {}, False),
    ],
)
def test_emulated_bf16_is_told(monkeypatch, caplog, precision, device, known, warns):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known)
    assert utils.choose_precision(precision, torch.device(device)) == (precision or "fp32")
    assert len(caplog.records) == warns
    assert not warns or "about 15 times slower than fp32" in caplog.text


class PanicException(BaseException):
    """What Rust's libraries raise."""


@pytest.mark.parametrize(
    ("error", "out_of_memory", "fault"),
    [
        (RuntimeError("could not create a primitive"), True, True),
        (RuntimeError("could not create a memory object"), True, True),
        (RuntimeError("could not execute a primitive"), True, True),
        (RuntimeError("could not create a primitive descriptor for the matmul"), False, False),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), True, True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True, True),
        (RuntimeError("CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED"), True, True),
        (RuntimeError("CUDA error: out of memory"), True, True),
        (RuntimeError("unable to mmap 8 bytes: Cannot allocate memory (12)"), True, True),
        (RuntimeError("std::bad_alloc"), True, True),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), True, True),
        (RuntimeError("can't start new thread"), False, True),
        (BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable"), False, True),
        (OSError(errno.EMFILE, "Too many open files"), False, True),
        (PanicException('Os { message: "Resource temporarily unavailable" }'), False, True),
        (OSError(errno.ENOENT, "No such file or directory"), False, False),
        (RuntimeError("a bug"), False, False),
        (ValueError("a model that is out of memory"), False, False),
    ],
)
def test_the_machines_faults(error, out_of_memory, fault):
    assert utils.is_out_of_memory(error) == out_of_memory
    assert utils.is_machine_error(error) == fault
    with (
        pytest.raises(type(error) if fault else utils.UserError),
        utils.convert_errors(utils.UserError),
    ):
        raise error


def test_a_message_is_one_line_and_no_file():
    message = str(utils.UserError("no \n\t\x1b[31m\u2028\udcff\x85 é ±"))
    assert message == r"no \n\t\x1b[31m\u2028\udcff\x85 é ±"
    message = str(utils.UserError(f"task.tsv:1: {'x' * 10**6}; give columns"))
    assert len(message) < 2100
    assert message.startswith("task.tsv:1: xxx")
    assert message.endswith("xxx; give columns")


class Broken(io.RawIOBase):
    """A file that nobody can write to."""

    def __init__(self, number):
        self.number = number

    def writable(self):
        return True

    def write(self, data):
        raise OSError(self.number, "cannot")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_results_are_printed_whatever_the_encoding(monkeypatch, encoding):
    buffer = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(buffer, encoding))
    utils.print_result("56.0 ± 1.5 \u4e2d \udcff")
    message = buffer.getvalue().decode(encoding)
    plus_minus = r"\xb1" if encoding == "ascii" else "±"
    other = "\u4e2d" if encoding == "utf-8" else r"\u4e2d"
    assert message == f"56.0 {plus_minus} 1.5 {other} \\udcff\n"


def test_a_reader_that_left_is_no_error_and_a_full_disk_is_one(monkeypatch):
    for number, fails in ((errno.EPIPE, False), (errno.ENOSPC, True)):
        broken = io.TextIOWrapper(io.BufferedWriter(Broken(number)))
        monkeypatch.setattr(sys, "stdout", broken)
        if fails:
            with pytest.raises(OSError, match="'standard output'"):
                utils.print_result("text")
        else:
            utils.print_result("text")
        utils.print_result("what follows")  # nor at the interpreter's end
        monkeypatch.setattr(broken.buffer.raw, "write", len)


@pytest.mark.parametrize(
    ("before", "lines"),
    [("", ["epoch 1", "epoch 2"]), ("logging.basicConfig(level=logging.WARNING)", [])],
)
def test_log_lines_of_a_python_program(before, lines):
    """A program that configures no logging sees each line once; another configuration is kept."""
    program = (
        f"import logging, utils; from glue_evaluator import GLUEvaluator\n{before}\n"
        "GLUEvaluator('rte', 'examples/tiny_bert', None); log = logging.getLogger('bitfit')\n"
        "log.info('epoch 1'); utils.setup_logging(); log.info('epoch 2')\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert [line[9:] for line in result.stderr.splitlines()] == lines
