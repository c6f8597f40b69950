"""Code shared by the benchmarks: models, examples, training epochs, the speed of the machine."""

import argparse
import dataclasses
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from transformers import PreTrainedModel, PreTrainedTokenizerBase  # noqa: E402

from bitfit.data import splits  # noqa: E402
from bitfit.data.task_files import resolve_task  # noqa: E402
from bitfit.data.tasks import TASKS, Task  # noqa: E402
from bitfit.data.tokens import (  # noqa: E402
    Split,
    TokenizedSplit,
    split_long_sentences,
    tokenize,
)
from bitfit.model import loading  # noqa: E402
from bitfit.model.forward import Forward  # noqa: E402
from bitfit.model.precision import DTYPES  # noqa: E402
from bitfit.model.run import Run  # noqa: E402
from bitfit.model.trainable import matrix_weights, select_trainable  # noqa: E402
from bitfit.training.checkpoints import CheckpointManager  # noqa: E402
from bitfit.training.loop import step_graphs, train_epoch  # noqa: E402
from bitfit.training.plan import Plan, TrainOptions  # noqa: E402
from bitfit.training.prepare import assemble  # noqa: E402
from bitfit.training.progress import Progress  # noqa: E402
from bitfit.training.state import init_state  # noqa: E402
from bitfit.training.train import new_training  # noqa: E402

LENGTH = 128
SIZES = {  # hidden size, layers, heads, intermediate size
    "tiny": (32, 2, 2, 64),
    "minilm": (384, 6, 12, 1536),
    "bert-base": (768, 12, 12, 3072),
}


def make_parser(description: str, rows: int) -> argparse.ArgumentParser:
    """Return a parser with the flags of benchmarks that train on a task."""
    parser = argparse.ArgumentParser(
        description=description.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--task-name", default="cola", choices=TASKS)
    parser.set_defaults(task_file=None)
    parser.add_argument("--data-dir", help="None: the toy data, or the folder of the task file")
    parser.add_argument("--model-name", help="a folder; None: a random encoder")
    parser.add_argument("--size", default="minilm", choices=SIZES, help="of the random encoder")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rows", type=int, default=rows, help="training rows of each run")
    parser.add_argument("--rounds", type=int, default=3)
    return parser


def make_command_parser(description: str) -> argparse.ArgumentParser:
    """Return a parser with the flags of benchmarks that time whole commands."""
    parser = argparse.ArgumentParser(
        description=description.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--task-name", default="cola")
    parser.add_argument("--data-dir", default=str(ROOT / "examples/glue"))
    parser.add_argument("--model-name", default=str(ROOT / "examples/tiny_bert"))
    parser.add_argument("--precision", default="bf16", choices=("fp32", "bf16"))
    parser.add_argument("--batch-size", default="16")
    return parser


def command_flags(args: argparse.Namespace) -> list[str]:
    """Return the flags of `run_glue.py` that all benchmarks of whole commands use."""
    return [
        "--task-name", args.task_name, "--data-dir", args.data_dir, "--model-name",
        args.model_name, "--precision", args.precision, "--train-size", args.train_size,
        "--epochs", args.epochs, "--batch-size", args.batch_size,
    ]  # fmt: skip


def pick_device() -> torch.device:
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def random_model(size: str, labels: int = 2, is_tagging: bool = False) -> PreTrainedModel:
    """Return a random BERT of one of SIZES, always with the same weights."""
    hidden, layers, heads, inner = SIZES[size]
    config = transformers.BertConfig(
        hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
        intermediate_size=inner, num_labels=labels,
    )  # fmt: skip
    torch.manual_seed(0)
    if is_tagging:
        return transformers.BertForTokenClassification(config)
    return transformers.BertForSequenceClassification(config)


def load(
    args: argparse.Namespace, task: Task
) -> tuple[PreTrainedTokenizerBase, Callable[[], PreTrainedModel]]:
    """Return (tokenizer, function that returns a new model with the same weights)."""
    name = args.model_name or str(ROOT / "examples/tiny_bert")
    tokenizer = loading.load_tokenizer(name, for_words=task.is_tagging)
    if args.model_name:
        return tokenizer, lambda: loading.load_model(name, task)[0]
    return tokenizer, lambda: random_model(args.size, task.num_labels, task.is_tagging)


def find_task(args: argparse.Namespace) -> tuple[Task, Any]:
    """Return (task, folder of its data)."""
    if args.task_file:
        return resolve_task(args.task_file, args.data_dir)
    return TASKS[args.task_name], args.data_dir or ROOT / "examples/glue"


def pick_rows(
    args: argparse.Namespace, task: Task, data_dir: str | Path | None
) -> tuple[splits.TextColumns, int]:
    """Return (the training examples to use, number of training examples)."""
    texts = splits.read_split(task, "train", data_dir)
    picked = np.random.default_rng(0).permutation(len(texts))[: args.rows]
    return texts.take(picked), len(texts)


def examples(tokens: TokenizedSplit) -> list[dict[str, Any]]:
    """Return the examples of a split: [{"input_ids", "token_type_ids", "labels"}] of lists.

    In tagging a word's label is at its first token, and -100 at all other tokens.
    """
    ids, labels = tokens.ids.cpu().numpy(), tokens.require_labels().cpu().numpy()
    types = None if tokens.types is None else tokens.types.cpu().numpy()
    of_token = np.full(len(ids), -100)
    if tokens.word_index is not None:
        of_token[tokens.word_index] = labels
    rows = []
    for number, (begin, length) in enumerate(zip(tokens.starts, tokens.lengths, strict=True)):
        label = labels[number] if tokens.word_index is None else of_token[begin : begin + length]
        row = {"input_ids": ids[begin : begin + length].tolist(), "labels": label.tolist()}
        if types is not None:
            row["token_type_ids"] = types[begin : begin + length].tolist()
        rows.append(row)
    return rows


def train_biases(model: PreTrainedModel) -> PreTrainedModel:
    """Set `requires_grad` for the parameters that BitFit trains."""
    names = select_trainable(model, "bitfit", ["bias"])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)
    return model


class Ours:
    """K runs of a fine-tune type on one model, trained one epoch at a time."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokens: TokenizedSplit,
        task: Task,
        batch_size: int,
        runs: int,
        max_tokens: int | None = None,
        method: str = "bitfit",
    ) -> None:
        self.device = tokens.ids.device
        grid = [Run(1e-4 * (1 + k % 4), k // 4) for k in range(runs)]
        components = ["bias"] if method == "bitfit" else []
        trainable = select_trainable(
            model, method, components, mask_size=None, rng=np.random.default_rng(0)
        )
        self.prepared = assemble(
            model, "the model", trainable, runs=grid, dtype=torch.float32, max_tokens=max_tokens
        )
        self.prepared.init_head = loading.init_head
        self.prepared.selected_forward = Forward(model)
        train = Split(tokens, dict.fromkeys(range(runs), np.arange(len(tokens.lengths))))
        state = new_training(
            self.prepared, task, train, scored={}, options=TrainOptions(batch_size, epochs=1)
        )
        self.plan, self.stack = state.plan, state.stack
        self.plans: dict[torch.dtype, Plan] = {}

    def plan_in(self, dtype: torch.dtype) -> Plan:
        """Return a plan with the fastest forward pass in a precision."""
        if dtype not in self.plans:
            prepared = dataclasses.replace(self.prepared, dtype=dtype)
            forward = prepared.select_forward(self.plan.train.tokens)
            self.plans[dtype] = dataclasses.replace(self.plan, forward=forward)
        return self.plans[dtype]

    def epoch(self, precision: str, wait: Callable[[], object] = lambda: None) -> float:
        """Return the seconds of one epoch of training, from initial parameters.

        Args:
            wait: called before the time begins, for processes that begin together.
        """
        self.stack.params.copy_(self.stack.initial_params)
        self.stack.last_step.fill_(-1)
        plan = self.plan_in(DTYPES[precision])
        state = init_state(plan, self.stack)
        with self.stack.patched(DTYPES[precision]):
            state.graphs = step_graphs(state)
            progress = Progress(plan, shows=False)
            wait()
            return seconds(lambda: train_epoch(state, CheckpointManager(), progress), self.device)


def seconds(work: Callable[[], object], device: torch.device) -> float:
    synchronize(device)
    begin = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - begin


def command_seconds(words: list[str], threads: int | None = None) -> float:
    """Return the wall-clock seconds of a whole command; SystemExit if it fails."""
    environment = os.environ | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
    begin = time.perf_counter()
    result = subprocess.run(words, capture_output=True, text=True, env=environment)
    if result.returncode:
        raise SystemExit(result.stderr.splitlines()[-1])
    return time.perf_counter() - begin


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def flop_of(model: PreTrainedModel, tokens: TokenizedSplit) -> int:
    """Return the minimum of floating point operations in one epoch of one BitFit run.

    Per weight of the encoder's matrices and token there are 4 operations: a multiplication and an
    addition in the forward pass, and in the backward pass. Padding and attention are not counted.
    """
    return 4 * matrix_weights(model) * int(tokens.lengths.sum())


def gemm_rate(precision: str, device: torch.device, size: int = 2048) -> float:
    """Return FLOP/s of a product of square matrices: the median of seven."""
    a, b = (torch.randn(size, size, device=device).to(DTYPES[precision]) for _ in range(2))
    times = [seconds(lambda: a @ b, device) for _ in range(9)][2:]
    return 2 * size**3 / statistics.median(times)


def machine(device: torch.device) -> str:
    """Return the processor, threads and versions as text."""
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor()
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    return f"{versions}, {torch.get_num_threads()} threads, {device.type} {name}".rstrip()


def setup(
    args: argparse.Namespace,
) -> tuple[Task, PreTrainedTokenizerBase, Callable[[], PreTrainedModel], TokenizedSplit, int]:
    """Return (task, tokenizer, function that makes the model, tokens, number of examples).

    Prints a line about the machine and the data.
    """
    (task, data_dir), device = find_task(args), pick_device()
    tokenizer, make_model = load(args, task)
    texts, total = pick_rows(args, task, data_dir)
    if task.is_tagging:
        texts = split_long_sentences(texts, tokenizer, LENGTH)
    print(
        f"{task.name}, {len(texts)} examples per run, batch {args.batch_size}, {args.rounds} "
        f"rounds: median (range), {machine(device)}",
        flush=True,
    )
    return task, tokenizer, make_model, tokenize(texts, tokenizer, LENGTH).to(device), total


def spread(values: Sequence[float], digits: int = 1) -> str:
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


def ratio(pairs: Iterable[tuple[float, float]]) -> str:
    """Return the ratios of the first to the second time of pairs as text."""
    return spread([a / b for a, b in pairs], 2)
