"""Small trainings of tiny models, epoch by epoch."""

import numpy as np
import pytest
import torch
from conftest import GLUE, forward_of, load_model, set_dropout

from bitfit.data import splits
from bitfit.data.tasks import TASKS
from bitfit.data.tokens import Split, tokenize
from bitfit.model import loading
from bitfit.model.precision import DTYPES
from bitfit.model.run import Run
from bitfit.model.run_stack import RunStack
from bitfit.model.token_budget import TokenBudget
from bitfit.model.trainable import select_trainable
from bitfit.training.checkpoints import CheckpointManager
from bitfit.training.loop import train_epoch
from bitfit.training.plan import Plan, TrainOptions
from bitfit.training.progress import Progress
from bitfit.training.state import init_state

COLA = TASKS["cola"]

BUDGET = TokenBudget(2048)

ONE = [Run(1e-3, 0)]


@pytest.fixture(params=["tiny_bert", "tiny_roberta"])
def model_path(request):
    return request.getfixturevalue(request.param)


def tokens_of(model_path, rows=44, task=COLA):
    texts = splits.read_split(task, "train", GLUE).take(range(rows))
    return tokenize(texts, loading.load_tokenizer(model_path), 48)


def new_model(model_path, dropout=0.0, task=COLA):
    model = load_model(model_path, task)
    set_dropout(model, dropout)
    return model


def new_state(model, tokens, trainable, runs=ONE, optimizer="adamw", task=COLA,
              draw=None, token_budget=BUDGET, packed=True, **options):  # fmt: skip
    stack = RunStack(model, trainable, list(runs), draw)
    rows = dict.fromkeys((run.seed for run in runs), np.arange(len(tokens.lengths)))
    forward = forward_of(model, packed)
    train_options = TrainOptions(16, **{"epochs": 9} | options)
    plan = Plan(task, forward, Split(tokens, rows), {}, token_budget, train_options)
    return init_state(plan, stack, optimizer)


def next_epoch(state, precision="fp32"):
    """Train an epoch; the mean losses of the runs, NaN where one is bad."""
    with state.stack.patched(DTYPES[precision]):
        train_epoch(state, CheckpointManager(), Progress(state.plan, shows=False))
    losses = state.loss_sum / state.plan.rows_per_run
    state.loss_sum = torch.zeros_like(losses)
    state.epoch, state.step = state.epoch + 1, 0
    return losses.where(state.stack.last_step < 0, torch.nan).tolist()


def trained(model, tokens, trainable, epochs=2, optimizer="adamw", task=COLA, rate=1e-3, **options):
    torch.manual_seed(0)
    state = new_state(model, tokens, trainable, [Run(rate, 0)], optimizer, task, **options)
    losses = [next_epoch(state)[0] for _ in range(epochs)]
    return state.stack, losses


def choose(model, method):
    if method == "partial":
        return select_trainable(model, "bitfit", ["intermediate.dense.bias"])
    components = ["bias"] if method == "bitfit" else []
    return select_trainable(model, method, components, 3000, np.random.default_rng(0))


GRID = [Run(rate, seed) for rate in (3e-4, 2e-3) for seed in (0, 7)]
