"""Check and time whole commands on a GPU: fine-tune types, sweeps, resuming, ranks.

    python benchmarks/gpu_commands.py
    python benchmarks/gpu_commands.py --size tiny --rows 64 --seeds 2   # on a CPU, as a trial

The checks train the tiny BERT on the toy data, several commands at once, and compare their losses
with a CPU's or with each other's. The times are those of one sweep of a random bert-base on rows of
RTE's number and lengths, beside one command that trains one of its runs with Hugging Face Trainer
and scores it as often. Ends with status 1 if a check fails.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from common import ROOT, SIZES, examples, pick_device, random_model, train_biases

Outcome = tuple[bool, str]  # whether a check passed, and its message
TYPES = ("bitfit", "frozen", "full_ft", "rand_uniform", "rand_row_col")
TOY = ["--task-name", "cola", "--data-dir", str(ROOT / "examples/glue"), "--train-size", "64",
       "--batch-size", "8", "--quiet"]  # fmt: skip
TAGGING = ["--task-file", str(ROOT / "examples/tagging/toy-pos.json"), *TOY[4:]]
SWEEP = [*TOY, "--fine-tune-type", "bitfit", "--learning-rate", "1e-3", "3e-3", "--seed", "0", "1",
         "2", "--epochs", "6"]  # fmt: skip


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--size", default="bert-base", choices=SIZES)
    parser.add_argument("--rows", type=int, default=2490, help="training rows of the timed sweep")
    parser.add_argument("--seeds", type=int, default=20, help="runs of the timed sweep")
    parser.add_argument("--epochs", default="2")
    parser.add_argument("--jobs", type=int, default=13, help="commands at once")
    parts = parser.add_mutually_exclusive_group()
    parts.add_argument("--only-checks", action="store_true")
    parts.add_argument("--only-times", action="store_true")
    parser.add_argument("--trainer", nargs=2, help=argparse.SUPPRESS)  # model and data: one run
    return parser.parse_args()


def run_glue(
    output: Path, *flags: str, launcher: Sequence[str] = (sys.executable,), threads: int | None = 1
) -> None:
    """Run a command to its end; RuntimeError with its last words where it fails."""
    words = [*launcher, str(ROOT / "run_glue.py"), "--output-path", str(output), *flags]
    environment = os.environ | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
    result = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, env=environment)
    if result.returncode:
        raise RuntimeError(f"status {result.returncode}: {result.stderr.strip()[-300:]}")


def losses(output: Path) -> dict[Path, list[float]]:
    """Return {folder: training loss per epoch} of the runs in an output folder."""
    found = sorted(output.rglob("metrics.json"))
    return {
        path.parent.relative_to(output): json.loads(path.read_text())["train_loss"]
        for path in found
    }


def difference(path: Path, other: Path) -> float:
    """Return the largest difference of two output folders' losses, relative to the loss."""
    a, b = losses(path), losses(other)
    if a.keys() != b.keys() or not a:
        raise RuntimeError(f"{path} has the runs {list(a)}, {other} {list(b)}")
    pairs = [(x, y) for run in a for x, y in zip(a[run], b[run], strict=True)]
    return max(abs(x - y) / abs(y) for x, y in pairs)


def without_dropout(folder: Path) -> str:
    """Write a copy of the tiny BERT without dropout, so that two devices give the same losses."""
    model = folder / "without_dropout"
    shutil.copytree(ROOT / "examples/tiny_bert", model)
    config = json.loads((model / "config.json").read_text())
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (model / "config.json").write_text(json.dumps(config))
    return str(model)


def check_type(method: str, precision: str, model: str, folder: Path) -> Outcome:
    """Compare a fine-tune type with the CPU in float32; bf16 rounds the loss of a batch to 1e-2."""
    flags = [*TOY, "--model-name", model, "--fine-tune-type", method, "--epochs", "3",
             "--learning-rate", "1e-4" if method == "full_ft" else "1e-3"]  # fmt: skip
    gpu, cpu = folder / f"{method}-{precision}", folder / f"{method}-{precision}-cpu"
    more = ["--precision", precision, "--no-tf32", "--save-evaluator", "--predict-test"]
    run_glue(gpu, *flags, *more)
    run_glue(cpu, *flags, "--precision", "fp32", "--gpu-device", "cpu")
    if not (gpu / "evaluator/evaluator.json").exists() or not (gpu / "CoLA.tsv").exists():
        raise RuntimeError("its evaluator or its predictions are missing")
    off = difference(gpu, cpu)
    return off < (2e-3 if precision == "fp32" else 3e-2), f"losses differ by {off:.1e}"


def write_modernbert(folder: Path) -> str:
    """Write a random ModernBERT, which has no biases and no dropout, with the tiny tokenizer."""
    import torch
    import transformers

    transformers.logging.disable_progress_bar()
    model = folder / "modernbert"
    tokenizer = transformers.AutoTokenizer.from_pretrained(ROOT / "examples/tiny_bert")
    config = transformers.ModernBertConfig(
        vocab_size=len(tokenizer), hidden_size=64, num_hidden_layers=3, num_attention_heads=2,
        intermediate_size=96, max_position_embeddings=128, local_attention=16,
        pad_token_id=tokenizer.pad_token_id, cls_token_id=tokenizer.cls_token_id,
        sep_token_id=tokenizer.sep_token_id, bos_token_id=tokenizer.cls_token_id,
        eos_token_id=tokenizer.sep_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.ModernBertForMaskedLM(config).save_pretrained(model)
    tokenizer.save_pretrained(model)
    return str(model)


def check_sweep(name: str, flags: Sequence[str], precision: str, folder: Path) -> Outcome:
    """Compare the runs of a sweep with the CPU in float32."""
    flags = [*flags, "--fine-tune-type", "bitfit", "--learning-rate", "5e-4", "1e-3",
             "--seed", "0", "1", "--epochs", "3"]  # fmt: skip
    gpu, cpu = folder / f"{name}-{precision}", folder / f"{name}-{precision}-cpu"
    run_glue(gpu, *flags, "--precision", precision, "--no-tf32", "--predict-test")
    run_glue(cpu, *flags, "--precision", "fp32", "--gpu-device", "cpu")
    off = difference(gpu, cpu)
    return off < (2e-3 if precision == "fp32" else 3e-2), f"losses differ by {off:.1e}"


def check_predict(folder: Path) -> Outcome:
    """Predict a sentence with a saved evaluator."""
    script = str(ROOT / "scripts/predict.py")
    words = [sys.executable, script, str(folder / "bitfit-bf16/evaluator"), "--input", "-"]
    result = subprocess.run(words, input="a small film\n", capture_output=True, text=True, cwd=ROOT)
    return result.returncode == 0, result.stdout.strip() or result.stderr.strip()[-300:]


def check_micro_batches(model: str, folder: Path) -> Outcome:
    """Compare a sweep in small micro-batches with the same sweep in one."""
    for name, more in (("whole", []), ("small", ["--max-tokens", "200"])):
        run_glue(folder / name, *SWEEP, "--model-name", model, "--precision", "fp32", *more)
    off = difference(folder / "small", folder / "whole")
    return off < 2e-3, f"losses differ by {off:.1e}"


def check_resume(folder: Path) -> Outcome:
    """Stop a sweep by SIGTERM after its first checkpoint, resume it, and compare bit by bit."""
    flags = [*SWEEP, "--model-name", str(ROOT / "examples/tiny_bert")]
    run_glue(folder / "quiet", *flags)
    words = [sys.executable, str(ROOT / "run_glue.py"), "--output-path", str(folder / "killed")]
    process = subprocess.Popen([*words, *flags], cwd=ROOT, stderr=subprocess.DEVNULL)
    while process.poll() is None and not list((folder / "killed/checkpoints").glob("*.json")):
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    try:
        status = process.wait(timeout=120)
    finally:
        process.kill()
    run_glue(folder / "killed", *flags, "--resume")
    off = difference(folder / "killed", folder / "quiet")
    return status == 143 and off == 0, f"status {status}, losses differ by {off:.1e}"


def check_ranks(model: str, folder: Path) -> Outcome:
    """Divide one run among two ranks on this GPU."""
    flags = [*TOY, "--model-name", model, "--fine-tune-type", "bitfit", "--epochs", "2",
             "--learning-rate", "1e-3", "--precision", "fp32", "--no-tf32"]  # fmt: skip
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    device = ["--gpu-device", "0"] if pick_device().type == "cuda" else []
    run_glue(folder / "ranks", *flags, *device, launcher=[*launcher, "2"])
    run_glue(folder / "rank", *flags)
    off = difference(folder / "ranks", folder / "rank")
    return off < 2e-3, f"losses differ by {off:.1e}"


def check(args: argparse.Namespace, folder: Path) -> bool:
    """Run all checks, several at once, and return whether any failed."""
    model, failed = without_dropout(folder), False
    with ThreadPoolExecutor(args.jobs) as pool:
        jobs = {
            f"{method} in {precision}": pool.submit(check_type, method, precision, model, folder)
            for method in TYPES
            for precision in ("fp32", "bf16")
        }
        tagging = [*TAGGING, "--model-name", model]
        added = [*TOY, "--model-name", write_modernbert(folder), "--add-biases"]
        for precision in ("fp32", "bf16"):
            for name, flags in (("tagging", tagging), ("added biases", added)):
                job = pool.submit(check_sweep, name, flags, precision, folder)
                jobs[f"{name} in {precision}"] = job
        jobs["a sweep in micro-batches"] = pool.submit(check_micro_batches, model, folder)
        jobs["a sweep stopped and resumed"] = pool.submit(check_resume, folder)
        jobs["two ranks"] = pool.submit(check_ranks, model, folder)
        names = {job: name for name, job in jobs.items()}
        for job in as_completed(names):
            failed |= not report(names[job], job.result)
    return failed | (not report("predict.py", lambda: check_predict(folder)))


def report(name: str, work: Callable[[], Outcome]) -> bool:
    """Print what a check found, and return whether it passed."""
    try:
        passed, message = work()
    except Exception as error:  # the other checks go on
        passed, message = False, f"{type(error).__name__}: {error}"
    print(f"{'ok  ' if passed else 'FAIL'} {name}: {message}", flush=True)
    return passed


def write_data(args: argparse.Namespace, folder: Path) -> tuple[str, str]:
    """Write a random model and rows of RTE's lengths; returns (model folder, data folder)."""
    import numpy as np
    import transformers

    transformers.logging.disable_progress_bar()
    source = str(ROOT / "examples/tiny_bert")
    model, data = folder / args.size, folder / "data"
    random_model(args.size).save_pretrained(model)
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    tokenizer.save_pretrained(model)
    words = [word for word in tokenizer.get_vocab() if word.isalpha()]
    rng = np.random.default_rng(0)
    (data / "RTE").mkdir(parents=True)
    for split, rows in (("train", args.rows), ("dev", max(16, args.rows // 9))):
        lines = ["index\tsentence1\tsentence2\tlabel"]
        for row in range(rows):
            length = int(np.clip(rng.gamma(6, 66 / 6), 12, 128)) - 3
            texts = [" ".join(rng.choice(words, size)) for size in (length - 5, 5)]
            lines.append("\t".join([str(row), *texts, ("entailment", "not_entailment")[row % 2]]))
        (data / "RTE" / f"{split}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(model), str(data)


def train_with_trainer(args: argparse.Namespace) -> None:
    """Do the work of one command with Trainer: load, train one run, score it after each epoch."""
    import numpy as np
    import transformers
    from peers import arguments

    from bitfit.data import splits
    from bitfit.data.tasks import TASKS
    from bitfit.data.tokens import tokenize
    from bitfit.model import loading

    model_folder, data = args.trainer
    tokenizer = loading.load_tokenizer(model_folder)
    train, dev = (
        examples(tokenize(splits.read_split(TASKS["rte"], split, data), tokenizer, 128))
        for split in ("train", "validation")
    )
    model, _ = loading.load_model(model_folder, TASKS["rte"])
    with tempfile.TemporaryDirectory() as folder:
        settings = arguments(16, "bf16", folder, pick_device())
        settings.num_train_epochs, settings.eval_strategy = float(args.epochs), "epoch"
        settings.per_device_eval_batch_size = 128
        trainer = transformers.Trainer(
            model=train_biases(model), args=settings, train_dataset=train, eval_dataset=dev,
            data_collator=transformers.DataCollatorWithPadding(tokenizer),
            compute_metrics=lambda output: {
                "accuracy": np.mean(output.predictions.argmax(-1) == output.label_ids)
            },
        )  # fmt: skip
        trainer.train()


def measure(args: argparse.Namespace, folder: Path) -> None:
    """Time a sweep as one command, one of its runs, and one run with Trainer."""
    model, data = write_data(args, folder)
    flags = ["--task-name", "rte", "--data-dir", data, "--model-name", model, "--fine-tune-type",
             "bitfit", "--learning-rate", "1e-4", "--epochs", args.epochs, "--batch-size", "16",
             "--quiet"]  # fmt: skip
    seconds = {}
    for runs in (args.seeds, 1):
        begin = time.perf_counter()
        run_glue(folder / f"sweep{runs}", *flags, "--seed", *map(str, range(runs)), threads=None)
        seconds[runs] = time.perf_counter() - begin
        path = next((folder / f"sweep{runs}").rglob("metrics.json"))
        share = json.loads(path.read_text())["seconds"]
        print(f"{args.size}, {args.rows} rows, {args.epochs} epochs, {runs} runs: "
              f"{seconds[runs]:.1f} s as a whole command; of it, for each run: {share}",
              flush=True)  # fmt: skip
    words = [sys.executable, __file__, "--trainer", model, data, "--epochs", args.epochs]
    begin = time.perf_counter()
    result = subprocess.run(words, capture_output=True, text=True, cwd=ROOT)
    trainer = time.perf_counter() - begin
    if result.returncode:
        print(f"Trainer is left out: {result.stderr.strip().splitlines()[-1]}")
        return
    print(f"Trainer, 1 run: {trainer:.1f} s as a whole command. So {args.seeds} of them take "
          f"{args.seeds * trainer / seconds[args.seeds]:.1f} times as long as one sweep, and one "
          f"{trainer / seconds[1]:.1f} times as long as one run")  # fmt: skip


def main() -> int:
    args = parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if args.trainer:
        train_with_trainer(args)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        failed = not args.only_times and check(args, Path(folder))
        if not args.only_checks:
            measure(args, Path(folder))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
