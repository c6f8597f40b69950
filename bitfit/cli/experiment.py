"""The work of `run_glue.py`: from its options to a prepared evaluator and a held output folder.

Modules that import torch are imported in the functions, so that a finished folder and bad input
are reported at once.
"""

from argparse import Namespace
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import utils
from bitfit import output_paths
from bitfit.artifacts import run_folder
from bitfit.cli.output_folder import is_finished, run_metadata
from bitfit.cli.runs import Experiment, train_all_runs
from bitfit.data import task_files
from bitfit.distributed import Ranks
from bitfit.model import hub
from bitfit.signals import StopSignals
from bitfit.tracking import tracker as tracking

if TYPE_CHECKING:
    from glue_evaluator import GLUEvaluator


def run(args: Namespace, signals: StopSignals, ranks: Ranks) -> None:
    """Check the output folder, fine-tune all runs, and upload the model if asked to."""
    output, flags = Path(args.output_path), vars(args)
    has_files = args.data_dir is not None
    if args.task_file:
        args.task = ranks.run_on_rank0(
            lambda: task_files.read_task_file(args.task_file, args.data_dir)
        )
        has_files = "files" in args.task
    finished = ranks.run_on_rank0(lambda: is_finished(output, flags, args.resume))
    if finished and not args.push_to_hub:
        return
    if args.task_file and not finished:
        ranks.run_on_rank0(
            lambda: task_files.check_data_files(args.task_file, args.task, args.data_dir)
        )
    ranks.run_on_rank0(lambda: tracking.check_connections(args.report_to, output))
    all_local = has_files and hub.is_local(args.model_name)
    hub.use_local_copies_when_offline(needs_hub=not all_local or args.push_to_hub)
    if args.push_to_hub:
        from bitfit.artifacts import hub as push_hub

        ranks.run_on_rank0(lambda: push_hub.check_push(args.push_to_hub))
    if not finished:
        fine_tune(args, output, signals, ranks)
    if args.push_to_hub and ranks.rank == 0:
        utils.print_result(push_hub.push_model(output, args.push_to_hub))


def fine_tune(args: Namespace, output: Path, signals: StopSignals, ranks: Ranks) -> None:
    """Load data and model, hold the output folder, train all runs and write their files."""
    import torch

    if not args.no_tf32 and torch.cuda.is_available():
        torch.set_float32_matmul_precision("high")
    evaluator = ranks.raise_together(lambda: prepare_evaluator(args, ranks))
    fingerprints = evaluator.fingerprints()
    metadata = run_metadata(args, evaluator, fingerprints) | {"ranks": ranks.size}
    ranks.require_equal("data or base model", fingerprints)
    with ExitStack() as resources:

        def begin() -> bool:
            """Hold the folder and write args.json, unless another process has finished it."""
            resources.enter_context(output_paths.lock_folder(output))
            finished = is_finished(output, metadata, args.resume, is_mine=True)
            if not finished:
                run_folder.write_args(output, metadata, finished=False)
            return finished

        if not ranks.run_on_rank0(begin):
            tracker = tracking.Tracker(args.report_to, output, metadata)
            resources.enter_context(tracker)
            experiment = Experiment(
                args=args, evaluator=evaluator, output=output, metadata=metadata,
                signals=signals, ranks=ranks, tracker=tracker,
            )  # fmt: skip
            train_all_runs(experiment)


def prepare_evaluator(args: Namespace, ranks: Ranks) -> "GLUEvaluator":
    """Return an evaluator with data and model; all errors of the input are raised here."""
    from glue_evaluator import GLUEvaluator, set_seed

    set_seed(args.seed[0])
    task, data_dir = args.task_name, args.data_dir
    if args.task_file:
        task, data_dir = args.task, data_dir or task_files.default_data_dir(args.task_file)
    evaluator = GLUEvaluator(
        task,
        args.model_name,
        ranks.local_gpu(args.gpu_device),
        seed=args.seed,
        data_dir=data_dir,
        precision=args.precision,
        random_encoder=args.random_encoder,
        max_tokens=args.max_tokens,
        model_revision=args.model_revision,
    )
    evaluator.preprocess_dataset(
        "longest",
        args.max_seq_length,
        args.batch_size,
        train_size=args.train_size,
        test_splits=args.predict_test,
    )
    terms = (args.bias_terms or ["all"]) if args.fine_tune_type == "bitfit" else []
    evaluator.prepare(
        args.fine_tune_type,
        args.learning_rate,
        optimizer=args.optimizer,
        components=evaluator.convert_to_actual_components(terms),
        mask_size=args.mask_size,
        verbose=args.verbose and ranks.rank == 0,
    )
    return evaluator
