"""What a checkpoint holds; how training goes on from one is tested in test_resume.py."""

import pytest
import torch
import transformers
from conftest import TINY_BERT, load_model

from bitfit.data.tasks import TASKS
from bitfit.data.tokens import Split
from bitfit.model.run import Run
from bitfit.model.run_stack import RunStack
from bitfit.model.token_budget import TokenBudget
from bitfit.model.trainable import select_trainable
from bitfit.training.checkpoints import CheckpointManager, list_checkpoints
from bitfit.training.loop import optimizer_step
from bitfit.training.plan import Plan, TrainOptions
from bitfit.training.state import init_state
from utils import CorruptFile


def new_state(runs, model, keep="last"):
    stack = RunStack(model, select_trainable(model, "bitfit", ["bias"]), runs)
    rows = {run.seed: [0] for run in runs}
    options = TrainOptions(8, 2, keep=keep)
    return init_state(
        Plan(TASKS["rte"], None, Split(None, rows), {}, TokenBudget(9), options), stack
    )


def some_steps(state):
    """Change all that changes."""
    state.rates.fill_(1e-3)
    state.stack.grads.normal_()
    with state.stack.patched():
        optimizer_step(state)
    state.best.normal_()
    state.stack.last_step[1] = 3
    state.loss_sum += 0.5
    state.epoch, state.step, state.seconds = 3, 5, 1.5
    state.plan.token_budget.max_tokens = 7
    state.records[0].train_loss.append(0.7)
    state.records[1].diverged = "somewhere"
    state.scores.append((state.stack.runs[0].name, 3, "validation", "Accuracy", 0.5))


def test_all_that_changes_comes_back():
    runs = [Run(1e-3, 0), Run(1e-3, 1)]
    state, fresh = (new_state(runs, load_model(TINY_BERT, TASKS["rte"]), "best") for _ in range(2))
    some_steps(state)
    torch.manual_seed(5)
    metadata, tensors = state.state_dict()
    expected = torch.rand(3)
    fresh.load_state_dict(metadata, {name: tensor.clone() for name, tensor in tensors.items()})
    assert torch.equal(torch.rand(3), expected)
    again, again_tensors = fresh.state_dict()
    assert again == metadata
    for name in tensors.keys() - {"random.0"}:
        assert torch.equal(again_tensors[name], tensors[name]), name
    assert sum(name.startswith("optimizer.") for name in tensors) == 3
    before = state.stack.params.clone()
    for one in (state, fresh):  # and the next step is the same
        one.stack.grads.fill_(0.1)
        one.rates.fill_(1e-3)
        with one.stack.patched():
            optimizer_step(one)
    assert not torch.equal(state.stack.params, before)
    assert torch.equal(state.stack.params, fresh.stack.params)


def test_other_runs_are_refused():
    model = load_model(TINY_BERT, TASKS["rte"])
    metadata, tensors = new_state([Run(1e-3, 0), Run(1e-3, 1)], model).state_dict()
    with pytest.raises(CorruptFile, match="it is of other runs or another model"):
        new_state([Run(1e-3, 0), Run(2e-3, 1)], model).load_state_dict(metadata, tensors)


def test_twenty_runs_of_bert_base_fit_in_30_megabytes(tmp_path):
    """The words do not train: a small vocabulary is enough for the size."""
    config = transformers.BertConfig(vocab_size=30, num_labels=2)
    model = transformers.BertForSequenceClassification(config)
    state = new_state([Run(1e-3, seed) for seed in range(20)], model)
    with state.stack.patched():
        optimizer_step(state)
    CheckpointManager(tmp_path).save(state)
    size = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert 3 * 20 * 4 * 104_450 < size < 30e6


def test_after_so_many_minutes_one_checkpoint_is_written(tmp_path):
    """And not another one after each step from then on."""
    state = new_state([Run(1e-3, 0)], load_model(TINY_BERT, TASKS["rte"]))
    now, folder = [0.0], tmp_path / "checkpoints"
    manager = CheckpointManager(folder, every=0, minutes=1, clock=lambda: now[0])
    written = []
    for waited in (0, 59, 2, 0, 59, 2):
        now[0] += waited
        state.step += 1
        manager.after_step(state)
        written.append(list_checkpoints(folder) if folder.exists() else [])
    assert written == [[], [], [1], [1], [1], [1, 2]]
