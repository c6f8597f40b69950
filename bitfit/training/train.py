"""From a prepared model to its training result."""

from collections.abc import Callable
from pathlib import Path

import torch

from bitfit.data.tasks import Task
from bitfit.data.tokens import Split
from bitfit.distributed import SINGLE_PROCESS, Group
from bitfit.model.run import Run
from bitfit.model.token_budget import free_gpu_bytes
from bitfit.results.scores import scores_frame
from bitfit.tracking.tracker import OFF, Tracker
from bitfit.training.checkpoints import CheckpointManager
from bitfit.training.loop import evaluate, record_epoch, step_graphs, train_epoch
from bitfit.training.memory import fit_token_budget_to_memory
from bitfit.training.plan import Plan, TrainOptions
from bitfit.training.prepare import PreparedModel
from bitfit.training.progress import Progress
from bitfit.training.result import TrainingResult
from bitfit.training.setup import LoadedData
from bitfit.training.state import TrainState, init_state
from utils import LOGGER, CorruptFile, UserError, make_generator, set_seed


def new_training(
    prepared: PreparedModel,
    task: Task,
    train: Split,
    scored: dict[str, Split],
    options: TrainOptions,
    group: Group = SINGLE_PROCESS,
) -> TrainState:
    """Return the state of a training before its first step.

    Args:
        scored: the splits to evaluate on; empty: none.
        group: the processes that train together.
    """
    plan = Plan(
        task=task, forward=prepared.forward, train=train, scored=scored,
        token_budget=prepared.token_budget, options=options, group=group,
    )  # fmt: skip
    return init_state(plan, prepared.new_stack(), prepared.method.optimizer)


def start_training(
    prepared: PreparedModel, data: LoadedData, options: TrainOptions, group: Group
) -> TrainState:
    """Seed dropout and return the state before the first step; UserError if it cannot train."""
    train, runs = data.dataset.split("train"), prepared.runs
    options.check(candidates=len({run.candidate for run in runs}))
    reason = prepared.reason_not_stackable(train.tokens) if len(runs) > 1 else None
    if reason:
        raise UserError(f"{len(runs)} runs cannot train in one pass, {reason}: "
                        "prepare and train one after the other")  # fmt: skip
    seed = runs[0].effective_data_seed
    if group.rank:  # The ranks compute different rows, so they need different dropout masks.
        seed = int(make_generator(seed, f"dropout of rank {group.rank}").integers(2**63))
    set_seed(seed)
    scored = data.dataset.scored()
    state = new_training(
        prepared, data.dataset.task, train, scored=scored, options=options, group=group
    )
    LOGGER.info("%s", describe_training(prepared, state))
    return state


def describe_training(prepared: PreparedModel, state: TrainState) -> str:
    """Return one line with the model, the device and the amounts that train."""
    plan, (runs, size) = state.plan, state.stack.params.shape
    precision = "bf16" if prepared.dtype == torch.bfloat16 else "fp32"
    of_runs = f"{runs} runs in one pass" if runs > 1 else prepared.runs[0].caption
    of_seed = plan.scored["train"].rows_of_seed if "train" in plan.scored else {}
    count = len(next(iter(of_seed.values()), ()))
    scored = f" ({count:,} of them scored)" * (count < plan.rows_per_run)
    return (
        f"{Path(prepared.model_name).name} on {state.stack.params.device} in {precision}, "
        f"{plan.forward.batching_kind} examples; {plan.rows_per_run:,} training examples{scored}, "
        f"{size:,} trainable parameters; {of_runs}"
    )


def train(
    state: TrainState,
    result: TrainingResult,
    *,
    dtype: torch.dtype,
    checkpoints: CheckpointManager,
    tracker: Tracker,
    folders: dict[Run, Path],
    write: Callable[[], None],
) -> str | None:
    """Train all runs, from the newest checkpoint if there is one.

    Args:
        result: receives the scores and records, also if the training is interrupted.
        folders: {run: folder} of the runs that write files, for the trackers.
        write: writes the result's files; called after each evaluation and at the end.

    Returns:
        None, or a message if all runs have diverged.
    """
    checkpoints.load(state)
    tracker.open_runs(state, folders)

    def take_and_write_scores() -> None:
        take_scores(state, result)
        write()

    try:
        with state.stack.patched(dtype), checkpoints.signals.deferred():
            diverged = fit(state, take_and_write_scores, checkpoints, tracker=tracker)
    finally:
        if state.best is not None:
            state.stack.set_params(state.best)
        take_scores(state, result)
    write()
    return diverged


def take_scores(state: TrainState, result: TrainingResult) -> None:
    """Put the scores and records so far into the result."""
    result.records, result.scores = state.records, scores_frame(state.scores)


def fit(
    state: TrainState,
    write: Callable[[], None],
    checkpoints: CheckpointManager,
    tracker: Tracker = OFF,
) -> str | None:
    """Train the remaining epochs; evaluate every `evaluation_frequency` epochs and after the last.

    Args:
        write: called after each evaluation.
        checkpoints: writes the checkpoints, and raises Stopped after a signal.
        tracker: gets losses and scores.

    Returns:
        None, or a message if all runs have diverged.
    """
    plan, runs = state.plan, len(state.records)
    done = runs * plan.examples_before(state.epoch, state.step)
    progress = Progress(plan, runs, done, shows=plan.group.shows_progress)
    if plan.token_budget.device.type == "cuda":
        fit_token_budget_to_memory(state, free_gpu_bytes(plan.token_budget.device))
    state.graphs = step_graphs(state)
    with progress.shown():
        while state.epoch < plan.epochs:
            train_epoch(state, checkpoints, progress, tracker=tracker)
            if not plan.group.replicas_equal(state.stack.params):
                raise CorruptFile(f"ranks {plan.group.ranks} hold different values")
            ended = state.epoch + 1
            due = ended % plan.evaluation_frequency == 0 or ended == plan.epochs
            scores = evaluate(state, checkpoints) if due else []
            record_epoch(state, scores)
            tracker.log_scores(state, scores)
            state.loss_sum.zero_()
            state.epoch, state.step, state.seconds = ended, 0, 0.0
            if scores:
                write()
            if not len(state.stack.active_runs()):
                return divergence_message(state)
            checkpoints.after_epoch(state, last=ended == plan.epochs)
    return None


def divergence_message(state: TrainState) -> str:
    """Return the message for a training whose runs, as far as not stopped, have all diverged."""
    left = [record for record in state.records if not record.stopped]
    message = f"all {len(left)} runs diverged" if len(left) > 1 else left[0].diverged
    return (f"{message}; training stopped there: try a lower --learning-rate, or "
            "--lr-schedule linear with --warmup-ratio")  # fmt: skip
