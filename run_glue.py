"""Fine-tune and score a BERT-family model on a GLUE task, bias terms only (BitFit) or otherwise.

    python run_glue.py --output-path out/rte --task-name rte --fine-tune-type bitfit

Flags in, checks, a GLUEvaluator, files out. Bad input ends with status 2 and one line.
"""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import utils
from bitfit.flags import check_same, parse_args
from utils import CheckpointError, Diverged, Stopped, UserError

CHECKPOINTS = "checkpoints"


def check_output_path(path, resume=False):
    """The output folder must be new or empty, and its place writable.

    Returns:
        With `resume` the args.json of the interrupted run; None if there is nothing to resume.
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise UserError(f"--output-path {path} is a file: give a folder")
    if path.is_dir() and any(inside.name != ".lock" for inside in path.iterdir()):
        if resume:
            return read_args(path)
        raise UserError(
            f"--output-path {path} is not empty: give a new folder, nothing is replaced; or "
            "--resume to go on with what was interrupted there"
        )
    nearest = next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise UserError(f"--output-path {path} cannot be made in {nearest}: give another place")
    return None


def read_args(folder):
    """The args.json in a folder.

    Raises:
        UserError: it is not there or not ours.
    """
    try:
        facts = json.loads((folder / "args.json").read_text(encoding="utf-8"))
        if not (isinstance(facts["finished"], bool) and isinstance(facts["precision"], str)):
            raise ValueError("it is not of run_glue.py")
        return facts
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise UserError(
            f"--resume: {folder} holds no run that could go on (args.json: {error}); give a new "
            "folder"
        ) from None


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
        args.task_name,
        args.model_name,
        device,
        seed=args.seed,
        data_dir=args.data_dir,
        precision=args.precision,
        random_encoder=args.random_encoder,
        max_tokens=args.max_tokens,
    )
    evaluator.preprocess_dataset(
        "longest", args.max_seq_length, args.batch_size, args.train_size, args.predict_test
    )
    choose(evaluator, args, args.verbose)
    return evaluator


def choose(evaluator, args, verbose, run=None):
    """Load the model and choose what trains, for all runs or one."""
    masked = args.fine_tune_type in ("rand_uniform", "rand_row_col")
    terms = (args.bias_terms or ["all"]) if args.fine_tune_type == "bitfit" else []
    evaluator.training_preparation(
        run.learning_rate if run else args.learning_rate,
        args.optimizer,
        masked or args.fine_tune_type == "full_ft",
        evaluator.convert_to_actual_components(terms),
        verbose and not masked,
        seed=run.seed if run else None,
    )
    evaluator.verbose = verbose  # a mask is what trains: list that alone
    if args.fine_tune_type == "rand_uniform":
        evaluator.set_uniform_mask(args.mask_size)
    elif args.fine_tune_type == "rand_row_col":
        evaluator.set_row_and_column_random_mask()


def commit():
    """The checkout's commit, or None where there is no git."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return result.stdout.strip() or None


def facts_of(args, evaluator):
    """What args.json holds: all flags, and what else the numbers depend on."""
    import datasets
    import torch
    import transformers

    on_gpu = evaluator.torch_device.type == "cuda"
    return vars(args) | {
        "precision": evaluator.precision,
        "max_tokens": evaluator.limit.tokens,
        "device": torch.cuda.get_device_name(evaluator.torch_device) if on_gpu else "cpu",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "datasets": datasets.__version__,
        "python": sys.version.split()[0],
        "threads": torch.get_num_threads(),
        "commit": commit(),
        **evaluator.fingerprints(),
    }


def write_args(folder, facts, finished):
    folder.mkdir(exist_ok=True)
    text = json.dumps(facts | {"finished": finished}, indent=2) + "\n"
    utils.write_text(folder / "args.json", text)


def train(args, evaluator, folder, signals):
    """Train the evaluator's runs; their metrics and curves go to `folder`."""
    from bitfit.resume import Saver

    saver = Saver(folder / CHECKPOINTS, args.checkpoint_every, args.checkpoint_minutes, signals)
    evaluator.train_and_evaluate(
        args.epochs,
        folder,
        args.evaluation_frequency,
        args.lr_schedule,
        args.warmup_ratio,
        args.keep,
        saver,
    )


def finish(folder, facts):
    """Nothing is left to do for this folder: say so in args.json, drop the checkpoints."""
    write_args(folder, facts, finished=True)
    shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)


def leave(args, evaluator, folder, results=True):
    """What the selected run leaves beside its metrics; `results`: also what was asked for."""
    if args.fine_tune_type == "bitfit":
        evaluator.plot_terms_changes(folder / "bias_term_changes")
    if not results:
        return
    if args.save_evaluator:
        evaluator.save(folder / "evaluator")
    if args.export_model:
        evaluator.export_model(folder / "model")
    if args.predict_test:
        evaluator.export_model_test_set_predictions(folder)


def run(args, signals):
    old = check_output_path(args.output_path, args.resume)
    if old and is_finished(args, old, vars(args)):
        return
    all_local = args.data_dir is not None and Path(args.model_name).is_dir()
    utils.use_local_copies_when_offline(needs_hub=not all_local)
    import torch

    if not args.no_tf32 and torch.cuda.is_available():
        torch.set_float32_matmul_precision("high")
    evaluator = prepare(args, pick_device(args.gpu_device))
    output, facts = Path(args.output_path), facts_of(args, evaluator)
    output.mkdir(parents=True, exist_ok=True)
    with utils.lock(output):
        old = check_output_path(args.output_path, args.resume)  # another may have been faster
        if old and is_finished(args, old, facts):
            return
        utils.remove_temporaries(output)
        work = single if len(evaluator.runs) == 1 else sweep
        work(args, evaluator, output, facts, signals)


def is_finished(args, old, new):
    """Whether the run to resume needs nothing more; refuses where it is another one."""
    check_same(old, new | {"precision": new["precision"] or old["precision"]})
    if old["finished"]:
        shutil.rmtree(Path(args.output_path) / CHECKPOINTS, ignore_errors=True)
        print(f"{args.output_path} is finished: there is nothing to resume")
    return old["finished"]


def single(args, evaluator, output, facts, signals):
    facts |= evaluator.runs[0]._asdict()
    write_args(output, facts, finished=False)
    train(args, evaluator, output, signals)
    leave(args, evaluator, output)
    finish(output, facts)
    print(evaluator.score_table())


def sweep(args, evaluator, output, facts, signals):
    """Several runs: in one pass where they can share it, else one after the other."""
    from bitfit import sweeps

    write_args(output, facts, finished=False)
    runs, reason = evaluator.runs, evaluator.why_not_stackable()
    how = f"one after the other: {reason}" if reason else "in one pass"
    utils.LOGGER.info("%d runs %s", len(runs), how)
    for part in [[one] for one in runs] if reason else [runs]:
        folder = output / part[0].name if reason else output
        if reason and (folder / "args.json").exists() and read_args(folder)["finished"]:
            continue
        if reason:
            choose(evaluator, args, verbose=False, run=part[0])
        own = facts | {"chosen_sha256": evaluator.fingerprints()["chosen_sha256"]}
        try:
            train(args, evaluator, folder, signals)
        except Diverged as error:
            utils.LOGGER.warning("%s: %s", part[0].name if reason else "no run is left", error)
        best = sweeps.best_of(sweeps.read_results(output, runs))
        for number, one in enumerate(part):
            evaluator.select(number)
            beaten = args.keep == "best" and (best is None or sweeps.name_of(best) != one.name)
            leave(args, evaluator, output / one.name, results=not beaten)
        if args.keep == "best":
            sweeps.drop_beaten(output, runs, best)
        for one in part:
            finish(output / one.name, own | one._asdict())
    print(sweeps.report(output, evaluator.task, runs, evaluator.method_caption))
    finish(output, facts)


def resume_command(argv):
    words = sys.argv[1:] if argv is None else argv
    return shlex.join(["python", "run_glue.py", *words, *["--resume"] * ("--resume" not in words)])


def main(argv=None):
    args = parse_args(__doc__.splitlines()[0], argv)
    utils.setup_logging()
    try:
        with utils.Signals() as signals:
            run(args, signals)
    except UserError as error:
        return end(2, "error", error)
    except Diverged as error:
        return end(1, "stopped", error)
    except Stopped as error:
        return end(128 + error.number, "stopped", f"{error}; to go on: {resume_command(argv)}")
    except KeyboardInterrupt:
        return end(130, "stopped", f"at once; to go on: {resume_command(argv)}")
    except (CheckpointError, OSError, MemoryError, RuntimeError) as error:
        out_of_memory = utils.is_out_of_memory(error)
        if isinstance(error, RuntimeError) and not out_of_memory:
            raise
        what = "out of memory (a lower --max-tokens needs less): " * out_of_memory
        return end(1, "stopped", f"{what}{utils.one_line(error)}; what was saved before is kept; "
                   f"when that is mended, go on with: {resume_command(argv)}")  # fmt: skip
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
