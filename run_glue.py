"""Fine-tune and score a BERT-family model on a GLUE task, bias terms only (BitFit) or otherwise.

    python run_glue.py --output-path out/rte --task-name rte --fine-tune-type bitfit

Flags in, checks, a GLUEvaluator, files out. Bad input ends with status 2 and one line.
"""

import os
import shlex
import signal
import sys
from pathlib import Path

import utils
from bitfit import outputs
from bitfit.flags import parse_args
from utils import Damaged, Diverged, Stopped, UserError


def prepare(args):
    """Read data and model and choose what trains; everything that can be wrong is found here."""
    from glue_evaluator import GLUEvaluator, set_seed

    set_seed(args.seed[0])
    evaluator = GLUEvaluator(
        args.task_name, args.model_name, utils.gpu_of(args.gpu_device), args.seed, args.data_dir,
        args.precision, args.random_encoder, args.max_tokens,
    )  # fmt: skip
    evaluator.preprocess_dataset(
        "longest", args.max_seq_length, args.batch_size, args.train_size, args.predict_test
    )
    choose(evaluator, args, args.learning_rate, verbose=args.verbose)
    return evaluator


def choose(evaluator, args, learning_rate, seed=None, verbose=False):
    """Load the model and choose what trains, for all runs or one."""
    terms = (args.bias_terms or ["all"]) if args.fine_tune_type == "bitfit" else []
    components = evaluator.convert_to_actual_components(terms)
    kind, size = args.fine_tune_type, args.mask_size
    evaluator.prepare(kind, learning_rate, args.optimizer, components, size, verbose, seed)


def run(args, signals):
    output = Path(args.output_path)
    if outputs.is_finished(output, vars(args), args.resume):
        return
    all_local = args.data_dir is not None and Path(args.model_name).is_dir()
    utils.use_local_copies_when_offline(needs_hub=not all_local)
    import torch

    if not args.no_tf32 and torch.cuda.is_available():
        torch.set_float32_matmul_precision("high")
    evaluator = prepare(args)
    facts = outputs.facts_of(args, evaluator)
    with outputs.held(output):
        if outputs.is_finished(output, facts, args.resume):  # another process may have been faster
            return
        outputs.write_args(output, facts, finished=False)
        train_all(args, evaluator, output, facts, signals)


def train_all(args, evaluator, output, facts, signals):
    """Train the runs, in one pass where they can share it, else one after the other; report."""
    from bitfit import sweeps
    from bitfit.checkpoints import Saver

    folders = outputs.folders_of(output, evaluator.runs)
    for runs in evaluator.passes():
        together = {run: folders[run] for run in runs}
        home = output if together == folders else folders[runs[0]]
        if home != output and outputs.is_done(home):
            continue
        if evaluator.runs != runs:
            choose(evaluator, args, runs[0].learning_rate, runs[0].seed)
        checkpoints = home / outputs.CHECKPOINTS
        saver = Saver(checkpoints, args.checkpoint_every, args.checkpoint_minutes, signals)
        try:
            evaluator.train_and_evaluate(
                args.epochs, together, args.evaluation_frequency, args.lr_schedule,
                args.warmup_ratio, args.keep, saver,
            )  # fmt: skip
        except Diverged as error:
            if len(folders) == 1:
                raise
            who = runs[0].name if len(runs) == 1 else "no run is left"
            utils.LOGGER.warning("%s: %s", who, error)
        settle(args, evaluator, runs, folders, facts)
    if output in folders.values():
        print(evaluator.score_table())
    else:
        print(sweeps.report(output, evaluator.task, folders, evaluator.method_caption))
        outputs.write_args(output, facts, finished=True)


def settle(args, evaluator, runs, folders, facts):
    """What trained runs leave beside their metrics; with --keep best only the best so far leaves
    what was asked for."""
    from bitfit import sweeps

    best = sweeps.best_run(*sweeps.read(folders), evaluator.task)
    for number, run in enumerate(runs):
        evaluator.select(number)
        folder = folders[run]
        if evaluator.trains_only_biases:
            evaluator.plot_terms_changes(folder / "bias_term_changes")
        if args.keep == "best" and run.name != best:
            continue
        if args.save_evaluator:
            evaluator.save(folder / "evaluator")
        if args.export_model:
            evaluator.export_model(folder / "model")
        if args.predict_test:
            evaluator.export_model_test_set_predictions(folder)
    if args.keep == "best":
        sweeps.drop_beaten(folders, best)
    chosen = {"chosen_sha256": evaluator.fingerprints()["chosen_sha256"]}
    for run in runs:
        outputs.write_args(folders[run], facts | chosen | run._asdict(), finished=True)


def main(argv=None):
    args = parse_args(__doc__.splitlines()[0], argv)
    words = sys.argv[1:] if argv is None else argv
    resume = shlex.join(["python", "run_glue.py", *words, *["--resume"] * (not args.resume)])
    utils.setup_logging()
    try:
        with utils.Signals() as signals:
            run(args, signals)
    except UserError as error:
        return end(2, "error", error)
    except Diverged as error:
        return end(1, "stopped", error)
    except Stopped as error:
        return end(128 + error.number, "stopped", f"{error}; to go on: {resume}")
    except KeyboardInterrupt:
        return end(130, "stopped", f"at once; to go on: {resume}")
    except (Damaged, OSError, MemoryError, RuntimeError) as error:
        out_of_memory = utils.is_out_of_memory(error)
        if isinstance(error, RuntimeError) and not out_of_memory:
            raise
        what = "out of memory (a lower --max-tokens needs less): " * out_of_memory
        return end(1, "stopped", f"{what}{utils.one_line(error)}; what was saved before is kept; "
                   f"when that is mended, go on with: {resume}")  # fmt: skip
    return 0


def end(status, what, message):
    sys.stderr.write(f"run_glue.py: {what}: {message}\n")
    return status


if __name__ == "__main__":
    status = main()
    if status == 128 + signal.SIGINT:  # die of it, so that a shell loop around this ends too
        sys.stdout.flush()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    sys.exit(status)
