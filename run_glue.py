"""Fine-tune and score a BERT-family model on a GLUE task, bias terms only (BitFit) or otherwise.

    python run_glue.py --output-path out/rte --task-name rte --fine-tune-type bitfit

Flags in, checks, a GLUEvaluator, files out. Bad input ends with status 2 and one line.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import utils
from bitfit.flags import parse_args
from utils import Diverged, UserError


def check_output_path(path):
    """The output folder must be new or empty, and its place writable."""
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise UserError(f"--output-path {path} is a file: give a folder")
    if path.is_dir() and any(path.iterdir()):
        raise UserError(
            f"--output-path {path} is not empty: give a new folder, nothing is replaced"
        )
    nearest = next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise UserError(f"--output-path {path} cannot be made in {nearest}: give another place")


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
        "commit": commit(),
    }


def write_args(folder, facts):
    folder.mkdir(parents=True, exist_ok=True)
    utils.write_text(folder / "args.json", json.dumps(facts, indent=2) + "\n")


def train(args, evaluator, folder):
    """Train the evaluator's runs; their metrics and curves go to `folder`."""
    evaluator.train_and_evaluate(
        args.epochs,
        folder,
        args.evaluation_frequency,
        args.lr_schedule,
        args.warmup_ratio,
        args.keep,
    )


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


def run(args):
    check_output_path(args.output_path)
    all_local = args.data_dir is not None and Path(args.model_name).is_dir()
    utils.use_local_copies_when_offline(needs_hub=not all_local)
    import torch

    if not args.no_tf32 and torch.cuda.is_available():
        torch.set_float32_matmul_precision("high")
    evaluator = prepare(args, pick_device(args.gpu_device))
    output, facts = Path(args.output_path), facts_of(args, evaluator)
    if len(evaluator.runs) == 1:
        write_args(output, facts | evaluator.runs[0]._asdict())
        train(args, evaluator, output)
        leave(args, evaluator, output)
        print(evaluator.score_table())
    else:
        write_args(output, facts)
        sweep(args, evaluator, output, facts)


def sweep(args, evaluator, output, facts):
    """Several runs: in one pass where they can share it, else one after the other."""
    from bitfit import sweeps

    runs, reason = evaluator.runs, evaluator.why_not_stackable()
    how = f"one after the other: {reason}" if reason else "in one pass"
    utils.LOGGER.info("%d runs %s", len(runs), how)
    for part in [[one] for one in runs] if reason else [runs]:
        if reason:
            choose(evaluator, args, verbose=False, run=part[0])
        try:
            train(args, evaluator, output / part[0].name if reason else output)
        except Diverged as error:
            utils.LOGGER.warning("%s: %s", part[0].name if reason else "no run is left", error)
        best = sweeps.best_of(sweeps.read_results(output, runs))
        for number, one in enumerate(part):
            folder = output / one.name
            write_args(folder, facts | one._asdict())
            evaluator.select(number)
            beaten = args.keep == "best" and (best is None or sweeps.name_of(best) != one.name)
            leave(args, evaluator, folder, results=not beaten)
        if args.keep == "best":
            sweeps.drop_beaten(output, runs, best)
    print(sweeps.report(output, evaluator.task, runs, evaluator.method_caption))


def main(argv=None):
    args = parse_args(__doc__.splitlines()[0], argv)
    utils.setup_logging()
    try:
        run(args)
    except UserError as error:
        sys.stderr.write(f"run_glue.py: error: {error}\n")
        return 2
    except Diverged as error:
        sys.stderr.write(f"run_glue.py: stopped: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
