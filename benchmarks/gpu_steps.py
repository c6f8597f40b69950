"""Training steps of a random BERT on random tokens, for gpu_checks.py and gpu_times.py."""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from common import (
    DTYPES,
    LENGTH,
    SIZES,
    Ours,
    machine,
    pick_device,
    random_model,
)

from bitfit.data.tasks import TASKS
from bitfit.data.tokens import TokenizedSplit
from bitfit.training.loop import step_graphs, train_step
from bitfit.training.state import TrainState, init_state

LENGTHS = {"CoLA": (11.4, 4, 47), "RTE": (66, 12, LENGTH)}  # mean, least, most


def make_parser(description: str) -> argparse.ArgumentParser:
    """Return a parser with the flags that both programs have."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--size", default="bert-base", choices=SIZES)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--precision", default="bf16", choices=DTYPES)
    return parser


def start(args: argparse.Namespace) -> torch.device:
    """Choose and print the device, and set the precision of matrix products as run_glue.py does."""
    device = pick_device()
    torch.set_float32_matmul_precision("high")
    print(f"{args.size}, {args.precision}, {machine(device)}", flush=True)
    return device


def random_tokens(kind: str, rows: int, device: torch.device) -> TokenizedSplit:
    """Return examples of random tokens with the lengths of a task (gamma-distributed)."""
    mean, least, most = LENGTHS[kind]
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.gamma(6, mean / 6, rows), least, most).astype(np.int64)
    ids = torch.from_numpy(rng.integers(5, 400, lengths.sum()).astype(np.int32))
    labels = torch.from_numpy(rng.integers(0, 2, rows))
    starts = lengths.cumsum() - lengths
    return TokenizedSplit(ids, None, starts, labels=labels, lengths=lengths, pad_id=0).to(device)


def make_runs(
    args: argparse.Namespace,
    tokens: TokenizedSplit,
    runs: int,
    method: str = "bitfit",
    size: str | None = None,
) -> Ours:
    """Return K runs of a random model."""
    model = random_model(size or args.size).to(tokens.ids.device)
    return Ours(model, tokens, TASKS["cola"], batch_size=args.batch_size, runs=runs, method=method)


@contextmanager
def training(ours: Ours, dtype: torch.dtype, graphs: bool = True) -> Iterator[TrainState]:
    """Yield the `TrainState` of a training, for `steps`."""
    state = init_state(ours.plan_in(dtype), ours.stack)
    ours.plan.forward.model.train()
    with ours.stack.patched(dtype):
        state.graphs = step_graphs(state) if graphs else None
        yield state


def steps(state: TrainState, count: int) -> None:
    """Take `count` steps; two calls continue as one longer call would."""
    plan, runs = state.plan, state.stack.runs
    orders = np.stack([plan.order(run, 0) for run in runs])
    for _ in range(count):
        first = state.step * plan.batch_size
        train_step(state, np.arange(len(runs)), orders[:, first : first + plan.batch_size])
        state.step = (state.step + 1) % plan.steps_per_epoch


def trained(ours: Ours, dtype: torch.dtype, count: int, graphs: bool = True) -> TrainState:
    """Return the `TrainState` after so many steps."""
    with training(ours, dtype, graphs) as state:
        steps(state, count)
    return state
