# PYTHON_ARGCOMPLETE_OK
"""Fine-tune and score a BERT-family model on a GLUE task, bias terms only (BitFit) or otherwise.

    python run_glue.py --output-path out/rte --task-name rte --fine-tune-type bitfit

Flags in, checks, a GLUEvaluator, files out. Bad input ends with status 2 and one line.
"""

from bitfit import early

if __name__ == "__main__":
    early.catch_signals("run_glue.py")

import logging
import shlex
import sys
from contextlib import ExitStack, suppress
from pathlib import Path

import utils
from bitfit.artifacts import run_folder
from bitfit.cli import exit_status
from bitfit.data import task_files
from bitfit.distributed import Ranks
from bitfit.model import hub
from bitfit.options import parse_args
from bitfit.tracking import tracker as tracking
from utils import Diverged, Lost, UserError


def prepare(args, ranks):
    """Read data and model and choose what trains; everything that can be wrong is found here."""
    from glue_evaluator import GLUEvaluator, set_seed

    set_seed(args.seed[0])
    task, data_dir = args.task_name, args.data_dir
    if args.task_file:
        task, data_dir = args.task, data_dir or task_files.home_of(args.task_file)
    evaluator = GLUEvaluator(
        task, args.model_name, ranks.gpu(args.gpu_device), args.seed, data_dir, args.precision,
        args.random_encoder, args.max_tokens, args.model_revision,
    )  # fmt: skip
    evaluator.preprocess_dataset(
        "longest", args.max_seq_length, args.batch_size, args.train_size, args.predict_test
    )
    choose(evaluator, args, verbose=args.verbose and ranks.rank == 0)
    return evaluator


def choose(evaluator, args, runs=None, verbose=False):
    """Load the model and choose what trains, for all runs or some."""
    terms = (args.bias_terms or ["all"]) if args.fine_tune_type == "bitfit" else []
    components = evaluator.convert_to_actual_components(terms)
    kind, size = args.fine_tune_type, args.mask_size
    evaluator.prepare(kind, args.learning_rate, args.optimizer, components, size, verbose, runs)


def run(args, signals, ranks):
    output, flags = Path(args.output_path), vars(args)
    has_files = args.data_dir is not None
    if args.task_file:
        args.task = ranks.first_does(lambda: task_files.read(args.task_file, args.data_dir))
        has_files = "files" in args.task
    finished = ranks.first_does(lambda: run_folder.is_finished(output, flags, args.resume))
    if finished and not args.push_to_hub:
        return
    if args.task_file and not finished:
        ranks.first_does(lambda: task_files.check_files(args.task_file, args.task, args.data_dir))
    ranks.first_does(lambda: tracking.connect(args.report_to, output))
    all_local = has_files and Path(args.model_name).is_dir()
    hub.use_local_copies_when_offline(needs_hub=not all_local or args.push_to_hub)
    if args.push_to_hub:
        from bitfit.artifacts import hub as push_hub

        ranks.first_does(lambda: push_hub.check_push(args.push_to_hub))
    if not finished:
        fine_tune(args, output, signals, ranks)
    if args.push_to_hub and ranks.rank == 0:
        utils.print_result(push_hub.push(output, args.push_to_hub))


def fine_tune(args, output, signals, ranks):
    """All from the data and the model to what the runs leave."""
    import torch

    if not args.no_tf32 and torch.cuda.is_available():
        torch.set_float32_matmul_precision("high")
    evaluator = ranks.checked(lambda: prepare(args, ranks))
    facts = run_folder.facts_of(args, evaluator) | {"ranks": ranks.size}
    ranks.check_same("data or base model", evaluator.fingerprints())
    with ExitStack() as held:

        def begin():
            held.enter_context(run_folder.held(output))
            # Another process may have been faster.
            finished = run_folder.is_finished(output, facts, args.resume)
            if not finished:
                run_folder.write_args(output, facts, finished=False)
            return finished

        if not ranks.first_does(begin):
            tracker = held.enter_context(tracking.Tracker(args.report_to, output, facts))
            train_all(args, evaluator, output, facts, signals, ranks, tracker)


def train_all(args, evaluator, output, facts, signals, ranks, tracker):
    """Train the runs, in one pass where they can share it, else one after the other; report."""
    from bitfit.results import sweeps

    folders = run_folder.folders_of(output, evaluator.runs)
    alone = ranks.size == 1 or (evaluator.torch_device.type == "cuda" and args.gpu_device is None)
    if ranks.rank > 0:
        utils.LOGGER.setLevel(logging.WARNING)  # until now each had the same to say
    share, group = ranks.share(evaluator.runs, on_own_gpus=alone)
    evaluator.group = group._replace(speaks=group.speaks and not args.quiet)
    for runs in evaluator.passes(share):
        home = output if len(runs) == len(folders) else folders[runs[0]]
        unfinished = unfinished_of(runs, folders, evaluator.group)
        if unfinished and evaluator.runs != runs:
            choose(evaluator, args, runs)
        if unfinished:
            train(args, evaluator, unfinished, home, signals, tracker, single=len(folders) == 1)
            shared = {run: folders[run] for run in share}
            settle(args, evaluator, unfinished, shared, facts, tracker)
        if group.rank == 0:
            run_folder.drop_checkpoints(home)
    ranks.end()
    if ranks.rank > 0:
        return
    if output in folders.values():
        utils.print_result(evaluator.score_table())
    else:
        if args.keep == "best":
            best = sweeps.best_run(*sweeps.read(folders), evaluator.task)
            sweeps.drop_beaten(folders, best)
        table = sweeps.report(output, evaluator.task, folders, evaluator.method_caption)
        tracker.results("sweep", output, table)
        run_folder.write_args(output, facts, finished=True)
        utils.print_result(table)


def unfinished_of(runs, folders, group):
    """Return {run: its folder} of those whose files are not complete, alike on all ranks."""
    finished = [group.rank == 0 and run_folder.is_done(folders[run]) for run in runs]
    finished = group.most(*finished)
    return {run: folders[run] for run, done in zip(runs, finished, strict=True) if not done}


def train(args, evaluator, folders, home, signals, tracker, single):
    """Train some runs together; Diverged only where there is no other.

    Args:
        folders: {run: its folder} of those that are to write files.
        home: where their checkpoints are.
    """
    from bitfit.training.checkpoints import Saver

    checkpoints, group = home / run_folder.CHECKPOINTS, evaluator.group
    saver = Saver(checkpoints, args.checkpoint_every, args.checkpoint_minutes, signals, group)
    try:
        evaluator.train_and_evaluate(
            args.epochs, folders if group.rank == 0 else {}, args.evaluation_frequency,
            args.lr_schedule, args.warmup_ratio, args.keep, saver,
            tracker, curves=False,
        )  # fmt: skip
    except Diverged as error:
        if single and group.rank == 0:
            write_curves(evaluator, home)
        if single:
            raise
        who = evaluator.runs[0].name if len(evaluator.runs) == 1 else "no run is left"
        utils.LOGGER.warning("%s: %s", who, error)


def settle(args, evaluator, unfinished, folders, facts, tracker):
    """Write what trained runs leave beside their metrics, and mark each as soon as it has all.

    With --keep best only the best so far leaves what was asked for.

    Args:
        unfinished: {run: its folder} of those just trained whose files are not complete.
        folders: {run: its folder} of all that this rank trains.
    """
    from bitfit.results import sweeps

    evaluator.group.wait()  # of its ranks one has written the metrics, and now writes the rest
    writes = evaluator.group.rank == 0
    best = sweeps.best_run(*sweeps.read(folders), evaluator.task)
    facts = facts | {"chosen_sha256": evaluator.chosen_sha256()}
    facts |= {"trained_by": list(evaluator.group.members)}
    # The best first: it has its files whatever becomes of the others after an interruption.
    for number, run in sorted(enumerate(evaluator.runs), key=lambda item: item[1].name != best):
        if run not in unfinished:
            continue
        evaluator.select(number)
        # All ranks of a run go on alike, whatever each of them sees of the files.
        (kept,) = evaluator.group.most(writes and (args.keep != "best" or run.name == best))
        write_run(args, evaluator, folders[run], facts, tracker, kept)
        if writes and args.keep == "best":
            sweeps.drop_beaten(folders, best)
        if writes:
            run_folder.write_args(folders[run], facts | run._asdict(), finished=True)


def write_run(args, evaluator, folder, facts, tracker, kept):
    """Write the files of the selected run; its ranks predict together, and one of them writes.

    Args:
        kept: whether it also leaves what was asked for: evaluator, model, predictions.
    """
    from bitfit.artifacts import model_card

    writes, record = evaluator.group.rank == 0, evaluator.record
    if writes:
        write_curves(evaluator, folder)
    if writes and evaluator.trains_only_biases:
        evaluator.plot_terms_changes(folder / "bias_term_changes")
    if writes:
        tracker.results(record.run.name, folder, evaluator.score_table(), record.diverged)
    if writes and kept and args.save_evaluator:
        evaluator.save(folder / "evaluator")
    if writes and kept and args.export_model:
        evaluator.export_model(folder / "model")
        model_card.write(folder, evaluator.task, facts)
    if kept and args.predict_test:
        evaluator.export_model_test_set_predictions(folder)


def write_curves(evaluator, folder):
    """Write the learning curves of the selected run; one that diverged at once has none."""
    if evaluator.evaluations:
        evaluator.plot_learning_curves(folder)


def main(argv=None):
    args, ranks = parse_args(__doc__.splitlines()[0], argv), Ranks()
    words = sys.argv[1:] if argv is None else argv
    words = shlex.join(["run_glue.py", *words, *["--resume"] * (not args.resume)])
    resume = f"{ranks.launcher} {words}"
    level = logging.WARNING if args.quiet else logging.INFO
    utils.setup_logging(*[logging.ERROR, f"rank {ranks.rank}: "] if ranks.rank else [level])
    kept = "what was saved before is kept; when that is mended, go on with"

    def tell(line, error, status):
        told = (
            isinstance(error, (Diverged, Lost)) or status > 128 or getattr(error, "shared", False)
        )
        if ranks.rank and not told:
            utils.LOGGER.error(line.partition(": ")[2])
        ranks.tell(line, at_once=status > 128)

    return exit_status.end_of(
        "run_glue.py", lambda signals: run(args, signals, ranks), f"; to go on: {resume}",
        f"; {kept}: {resume}", " (a lower --max-tokens needs less)", tell,
        lambda: is_finished(args),
    )  # fmt: skip


def is_finished(args):
    """Whether the output folder says that nothing is left to do."""
    with suppress(UserError):
        return not args.push_to_hub and run_folder.is_done(Path(args.output_path))


if __name__ == "__main__":
    early.leave(main())
