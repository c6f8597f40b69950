"""Train the runs of a command, write their files and report them.

Modules that import torch are imported in the functions.
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import utils
from bitfit.artifacts import run_folder
from bitfit.distributed import Group, Ranks
from bitfit.options import RunOptions
from bitfit.signals import StopSignals
from bitfit.tracking import tracker as tracking
from utils import Diverged

if TYPE_CHECKING:
    from bitfit.model.run import Run
    from glue_evaluator import GLUEvaluator

Folders = dict["Run", Path]  # {run: folder of the run's files}


@dataclass(frozen=True)
class Experiment:
    """One command after its data and model have been loaded and its output folder is held."""

    options: RunOptions
    evaluator: "GLUEvaluator"
    output: Path
    metadata: dict[str, Any]  # the content of args.json
    signals: StopSignals
    ranks: Ranks
    tracker: tracking.Tracker


def train_all_runs(experiment: Experiment) -> None:
    """Train all runs in one pass if they can share it, else one after the other; report them."""
    options, evaluator, ranks = experiment.options, experiment.evaluator, experiment.ranks
    folders = run_folder.run_folders(experiment.output, evaluator.runs)
    on_gpus = evaluator.setup.device.type == "cuda" and options.gpu_device is None
    if ranks.rank > 0:
        utils.LOGGER.setLevel(logging.WARNING)  # Rank 0 logs the lines that all ranks share.
    share, group = ranks.make_group(evaluator.runs, on_own_gpus=ranks.size == 1 or on_gpus)
    evaluator.join_group(group._replace(shows_progress=group.shows_progress and not options.quiet))
    for runs in evaluator.passes(share):
        home = experiment.output if len(runs) == len(folders) else folders[runs[0]]
        unfinished = unfinished_runs(runs, folders, evaluator.group)
        if unfinished and evaluator.runs != runs:
            evaluator.prepare_runs(runs)
        if unfinished and options.evaluate_only:
            evaluator.evaluate_only(unfinished if evaluator.group.rank == 0 else {})
        elif unfinished:
            train(experiment, unfinished, home, single=len(folders) == 1)
        if unfinished:
            export_runs(experiment, unfinished, {run: folders[run] for run in share})
        if group.rank == 0:
            run_folder.remove_checkpoints(home)
    ranks.shutdown()
    if ranks.rank == 0:
        report(experiment, folders)


def unfinished_runs(runs: list["Run"], folders: Folders, group: Group) -> Folders:
    """Return the folders of the runs whose files are not complete, the same on all ranks."""
    finished = [group.rank == 0 and run_folder.is_run_finished(folders[run]) for run in runs]
    on_any_rank = group.all_reduce_max(*finished)
    return {run: folders[run] for run, done in zip(runs, on_any_rank, strict=True) if not done}


def train(experiment: Experiment, folders: Folders, home: Path, single: bool) -> None:
    """Train some runs together and write their metrics.

    Args:
        folders: {run: folder} of the runs that write files.
        home: the folder of the checkpoints.
        single: whether the command has no other run.

    Raises:
        Diverged: the only run of the command diverged.
    """
    from bitfit.training.checkpoints import CheckpointManager

    options, evaluator, group = experiment.options, experiment.evaluator, experiment.evaluator.group
    checkpoints = CheckpointManager(
        home / run_folder.CHECKPOINTS,
        every=options.checkpoint_every,
        minutes=options.checkpoint_minutes,
        signals=experiment.signals, group=group,
    )  # fmt: skip
    try:
        evaluator.train_and_evaluate(
            num_epochs=options.epochs,
            output_path=folders if group.rank == 0 else {},
            evaluation_frequency=options.evaluation_frequency,
            lr_schedule=options.lr_schedule,
            warmup_ratio=options.warmup_ratio,
            keep=options.keep,
            halving=options.halving or (),
            checkpoints=checkpoints,
            tracker=experiment.tracker,
            curves=False,
        )
    except Diverged as error:
        if single and group.rank == 0:
            plot_curves(evaluator, home)
        if single:
            raise
        name = evaluator.runs[0].name if len(evaluator.runs) == 1 else "no run is left"
        utils.LOGGER.warning("%s: %s", name, error)


def export_runs(experiment: Experiment, unfinished: Folders, folders: Folders) -> None:
    """Write the files of trained runs beside the metrics, and mark the runs as finished.

    With --keep best only the best run so far has an evaluator, a model and predictions.

    Args:
        unfinished: {run: folder} of the runs just trained whose files are not complete.
        folders: {run: folder} of all runs that this rank trains.
    """
    from bitfit.results import sweeps

    options, evaluator = experiment.options, experiment.evaluator
    evaluator.group.barrier()  # rank 0 has written the metrics, and writes the rest
    writes = evaluator.group.rank == 0
    best = sweeps.best_run(*sweeps.read_sweep(folders), evaluator.task)
    # The best run is first, so that it is complete if a signal interrupts the others.
    for number, run in sorted(enumerate(evaluator.runs), key=lambda item: item[1].name != best):
        if run not in unfinished:
            continue
        evaluator.select(number)
        # Rank 0 decides for all ranks of the run, which may see different files.
        (kept,) = evaluator.group.all_reduce_max(
            writes and not evaluator.record.stopped and (options.keep != "best" or run.name == best)
        )
        metadata = metadata_of_run(experiment, run)
        export_run(experiment, folders[run], metadata, kept=bool(kept))
        if writes and options.keep == "best":
            sweeps.remove_beaten_exports(folders, best)
        if writes:
            of_run = run.fields | {"data_seed": run.data_seed, "init_seed": None}  # in `seed`
            run_folder.write_args(folders[run], metadata | of_run, finished=True)


def metadata_of_run(experiment: Experiment, run: "Run") -> dict[str, Any]:
    """Return args.json of a run, with the bias terms of the run if the command has several sets."""
    prepared = experiment.evaluator.need_prepared().for_run(run)
    metadata, trained = dict(experiment.metadata), prepared.trainable_fingerprints()
    if "zero_gradient" not in trained:
        metadata.pop("zero_gradient", None)
    if run.terms is not None:
        kind = prepared.method.fine_tune_type
        terms = run.terms.split() if kind == "bitfit" else None
        metadata |= {"fine_tune_type": kind, "bias_terms": terms}
    return metadata | trained | {"trained_by": list(experiment.evaluator.group.ranks)}


def export_run(experiment: Experiment, folder: Path, metadata: dict[str, Any], kept: bool) -> None:
    """Write the files of the selected run: the ranks predict together, and rank 0 writes.

    Args:
        kept: whether to write the evaluator, the model and the predictions that flags request.
    """
    from bitfit.artifacts import model_card

    options, evaluator = experiment.options, experiment.evaluator
    writes, record = evaluator.group.rank == 0, evaluator.record
    if writes and not options.evaluate_only:
        plot_curves(evaluator, folder)
    if writes and evaluator.need_prepared().for_run(record.run).trains_only_biases:
        evaluator.plot_terms_changes(folder / "bias_term_changes")
    if writes:
        table = "\n".join(filter(None, (evaluator.score_table(), record.stopped)))
        experiment.tracker.log_results(record.run.name, folder, table, diverged=record.diverged)
    if writes and kept and options.save_evaluator:
        evaluator.save(folder / "evaluator")
    if writes and kept and options.export_model:
        evaluator.export_model(folder / "model")
        # The best run was chosen among the runs of all sets of bias terms.
        card = experiment.metadata if options.keep == "best" else metadata
        model_card.write_model_card(folder, evaluator.task, card)
    if kept and options.predict_test:
        evaluator.export_model_test_set_predictions(folder)


def plot_curves(evaluator: "GLUEvaluator", folder: Path) -> None:
    """Plot the learning curves of the selected run, if it was scored before it diverged."""
    if evaluator.evaluations:
        evaluator.plot_learning_curves(folder)


def report(experiment: Experiment, folders: Folders) -> None:
    """Print the scores of the only run, or write and print the report of a sweep."""
    from bitfit.results import sweeps

    options, evaluator, output = experiment.options, experiment.evaluator, experiment.output
    if output in folders.values():
        utils.print_result(evaluator.score_table())
        return
    if options.keep == "best":
        best = sweeps.best_run(*sweeps.read_sweep(folders), evaluator.task)
        sweeps.remove_beaten_exports(folders, best)
    caption = evaluator.setup.caption(evaluator.need_prepared().method)
    table = sweeps.write_report(output, evaluator.task, folders, caption=caption)
    experiment.tracker.log_results("sweep", output, table)
    run_folder.write_args(output, experiment.metadata, finished=True)
    utils.print_result(table)
