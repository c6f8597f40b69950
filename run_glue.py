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


def pick_device(choice):
    """--gpu-device -> GPU number or None for the CPU."""
    import torch

    if choice is None:
        return 0 if torch.cuda.is_available() else None
    return None if choice == "cpu" else choice


def prepare(args, device):
    """Read data and model and choose what trains; everything that can be wrong is found here."""
    from glue_evaluator import GLUEvaluator, set_seed

    set_seed(args.seed[0])
    evaluator = GLUEvaluator(
        args.task_name, args.model_name, device, args.seed, args.data_dir, args.precision,
        args.random_encoder, args.max_tokens,
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
    evaluator.prepare(
        args.fine_tune_type,
        learning_rate,
        args.optimizer,
        components,
        args.mask_size,
        verbose,
        seed,
    )


def run(args, signals):
    output = Path(args.output_path)
    if outputs.is_finished(output, vars(args), args.resume):
        return
    all_local = args.data_dir is not None and Path(args.model_name).is_dir()
    utils.use_local_copies_when_offline(needs_hub=not all_local)
    import torch

    if not args.no_tf32 and torch.cuda.is_available():
        torch.set_float32_matmul_precision("high")
    evaluator = prepare(args, pick_device(args.gpu_device))
    facts = outputs.facts_of(args, evaluator)
    with outputs.held(output):
        if outputs.is_finished(output, facts, args.resume):  # another process may have been faster
            return
        outputs.begin(output, facts)
        train_all(args, evaluator, output, facts, signals)


def train_all(args, evaluator, output, facts, signals):
    """Train the runs, in one pass where they can share it, else one after the other; report."""
    from bitfit import sweeps
    from bitfit.checkpoints import Saver

    folders = outputs.folders_of(output, evaluator.runs)
    for runs in evaluator.passes():
        together = {run: folders[run] for run in runs}
        home = output if len(together) == len(folders) else folders[runs[0]]
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
        best = sweeps.best_run(*sweeps.read(folders), evaluator.task)
        for number, run in enumerate(runs):
            evaluator.select(number)
            leave(args, evaluator, folders[run], args.keep == "last" or run.name == best)
        if args.keep == "best":
            sweeps.drop_beaten(folders, best)
        chosen = evaluator.fingerprints()["chosen_sha256"]
        for run in runs:
            outputs.finish(folders[run], facts | {"chosen_sha256": chosen} | run._asdict())
    if len(folders) == 1:
        print(evaluator.score_table())
        return
    print(sweeps.report(output, evaluator.task, folders, evaluator.method_caption))
    outputs.finish(output, facts)


def leave(args, evaluator, folder, results):
    """What the selected run leaves beside its metrics; `results`: also what was asked for."""
    if evaluator.trains_only_biases:
        evaluator.plot_terms_changes(folder / "bias_term_changes")
    if results and args.save_evaluator:
        evaluator.save(folder / "evaluator")
    if results and args.export_model:
        evaluator.export_model(folder / "model")
    if results and args.predict_test:
        evaluator.export_model_test_set_predictions(folder)


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
