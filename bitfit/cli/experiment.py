"""The work of `run_glue.py`: from its options to a prepared evaluator and a held output folder.

Modules that import torch are imported in the functions, so that a finished folder and bad input
are reported at once.
"""

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import utils
from bitfit import output_paths
from bitfit.artifacts import run_folder
from bitfit.cli.output_folder import flag_values, is_finished, run_metadata
from bitfit.cli.runs import Experiment, train_all_runs
from bitfit.data import task_files
from bitfit.distributed import Ranks, shared_error
from bitfit.model import hub
from bitfit.options import DEFAULT_LEARNING_RATES, RunOptions
from bitfit.parsing import split_repeated
from bitfit.signals import StopSignals
from bitfit.tracking import tracker as tracking
from utils import UserError

if TYPE_CHECKING:
    from bitfit.training.setup import Setup
    from glue_evaluator import GLUEvaluator


def learning_rate_warning(options: RunOptions) -> str | None:
    """Return a warning if all parameters train at the default learning rate, else None."""
    is_default = options.learning_rate is DEFAULT_LEARNING_RATES
    if options.fine_tune_type != "full_ft" or not is_default:
        return None
    return (
        f"full_ft trains at the default learning rate {DEFAULT_LEARNING_RATES[0]:g}; "
        "usual are 1e-5 to 5e-5: give --learning-rate"
    )


def run(options: RunOptions, signals: StopSignals, ranks: Ranks) -> None:
    """Check the output folder, fine-tune all runs, and upload the model if asked to."""
    if options.halving and ranks.size > 1:
        raise shared_error("--halving needs a single process: start it without torchrun")
    start = options.start_from and Path(options.start_from)
    if options.evaluate_only and start:
        options = replace(options, **ranks.run_on_rank0(lambda: run_folder.saved_settings(start)))
    output, task = Path(options.output_path), read_task(options, ranks)
    task_file, push_to = options.task_file, options.push_to_hub
    flags = flag_values(options, task)
    finished = ranks.run_on_rank0(lambda: is_finished(output, flags, options.resume))
    if finished and not push_to:
        return
    if task_file and task and not finished:
        ranks.run_on_rank0(lambda: task_files.check_data_files(task_file, task, options.data_dir))
    if start and not finished:
        ranks.run_on_rank0(lambda: str(run_folder.find_evaluator(start)))
    ranks.run_on_rank0(lambda: tracking.check_connections(options.report_to, output))
    has_files = "files" in task if task else options.data_dir is not None
    all_local = has_files and hub.is_local(options.model_name)
    hub.use_local_copies_when_offline(needs_hub=not all_local or bool(push_to))
    if push_to:
        from bitfit.artifacts import hub as push_hub

        ranks.run_on_rank0(lambda: push_hub.check_push(push_to))
    if not finished:
        fine_tune(options, task=task, signals=signals, ranks=ranks)
    if push_to and ranks.rank == 0:
        utils.print_result(push_hub.push_model(output, push_to))


def read_task(options: RunOptions, ranks: Ranks) -> dict[str, Any] | None:
    """Return the content of --task-file, which rank 0 reads, or None if there is none."""
    path = options.task_file
    if not path:
        return None
    return ranks.run_on_rank0(lambda: task_files.read_task_file(path, options.data_dir))


def fine_tune(
    options: RunOptions, *, task: dict[str, Any] | None, signals: StopSignals, ranks: Ranks
) -> None:
    """Load data and model, hold the output folder, train all runs and write their files."""
    import torch

    output = Path(options.output_path)
    if not options.no_tf32 and torch.cuda.is_available():
        torch.set_float32_matmul_precision("high")
    evaluator = ranks.raise_together(lambda: prepare_evaluator(options, task, ranks))
    fingerprints = evaluator.fingerprints()
    metadata = flag_values(options, task) | run_metadata(evaluator)
    metadata |= fingerprints | {"ranks": ranks.size}
    ranks.require_equal("data or base model", fingerprints)
    with ExitStack() as resources:

        def begin() -> bool:
            """Hold the folder and write args.json, unless another process has finished it."""
            resources.enter_context(output_paths.lock_folder(output))
            finished = is_finished(output, metadata, options.resume, is_mine=True)
            if not finished:
                run_folder.write_args(output, metadata, finished=False)
            return finished

        if not ranks.run_on_rank0(begin):
            tracker = tracking.Tracker(options.report_to, output, metadata)
            resources.enter_context(tracker)
            experiment = Experiment(
                options=options, evaluator=evaluator, output=output, metadata=metadata,
                signals=signals, ranks=ranks, tracker=tracker,
            )  # fmt: skip
            train_all_runs(experiment)


def prepare_evaluator(
    options: RunOptions, task: dict[str, Any] | None, ranks: Ranks
) -> "GLUEvaluator":
    """Return an evaluator with data and model; all errors of the input are raised here."""
    from glue_evaluator import GLUEvaluator, set_seed

    set_seed(options.init_seeds[0])
    folder = options.task_file and task_files.default_data_dir(options.task_file)
    evaluator = GLUEvaluator(
        task_name=task or str(options.task_name),  # one of the two is given
        model_name=options.model_name,
        device=ranks.local_gpu(options.gpu_device),
        seed=options.init_seeds,
        data_seed=options.data_seeds,
        data_dir=options.data_dir or folder,
        precision=options.precision,
        random_encoder=options.random_encoder,
        max_tokens=options.max_tokens,
        model_revision=options.model_revision,
        add_biases=options.add_biases,
    )
    terms = check_bias_terms(options, evaluator.setup)
    evaluator.preprocess_dataset(
        padding="longest", max_sequence_len=options.max_seq_length, batch_size=options.batch_size,
        train_size=options.train_size, test_splits=options.predict_test,
        train_score_rows=options.train_score_rows,
    )  # fmt: skip
    evaluator.prepare(
        fine_tune_type=options.fine_tune_type,
        learning_rate=options.learning_rate,
        optimizer=options.optimizer,
        components=terms,
        mask_size=options.mask_size,
        verbose=options.verbose and ranks.rank == 0,
        start_from=options.start_from,
    )
    check_prepared(options, evaluator)
    return evaluator


def check_prepared(options: RunOptions, evaluator: "GLUEvaluator") -> None:
    """Raise UserError if --evaluate-only has no classifier, or runs of --halving share no pass."""
    if options.halving:
        tokens = evaluator.tokens("train")
        if reason := evaluator.need_prepared().reason_not_stackable(tokens):
            raise UserError(f"--halving needs runs that share a pass, but {reason}: leave it out")
    if options.evaluate_only and evaluator.need_prepared().init_head:
        source, task = options.start_from or options.model_name, evaluator.task.name
        raise UserError(f"--evaluate-only: {source} has no classifier with the labels of {task}: "
                        "there is nothing to score")  # fmt: skip


def check_bias_terms(options: RunOptions, setup: "Setup") -> list[str] | list[list[str]]:
    """Return the bias terms to train; UserError, before data are read, if the model lacks one."""
    from bitfit.model.bias_terms import check_term_sets, model_of_config

    terms = (options.bias_terms or ["all"]) if options.fine_tune_type == "bitfit" else []
    if terms or options.add_biases:
        added, revision = options.add_biases, setup.revision
        model = model_of_config(options.model_name, setup.task, revision=revision, added=added)
        check_term_sets(model, split_repeated(terms or ["all"]))
    return terms
