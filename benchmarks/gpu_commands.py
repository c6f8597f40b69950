"""Check whole commands on a GPU: fine-tune types, sweeps, resuming, ranks.

    python benchmarks/gpu_commands.py
    python benchmarks/gpu_commands.py --jobs 2   # on a CPU, as a trial

The commands train the tiny BERT on the toy data, several at once. Their losses are compared with
those of the same command on the CPU, or of another command. Ends with status 1 if a check fails.
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

from common import ROOT, pick_device

Outcome = tuple[bool, str]  # whether a check passed, and its message
TYPES = ("bitfit", "frozen", "full_ft", "rand_uniform", "rand_row_col")
TOY = ["--task-name", "cola", "--data-dir", str(ROOT / "examples/glue"), "--train-size", "64",
       "--batch-size", "8", "--quiet"]  # fmt: skip
TAGGING = ["--task-file", str(ROOT / "examples/tagging/toy-pos.json"), *TOY[4:]]
SEEDS = ["--seed", "0", "1"]
SETS = ["--bias-terms", "all", "--bias-terms", "query", "intermediate", "--bias-terms", "none"]
SWEEP = [*TOY, "--fine-tune-type", "bitfit", "--learning-rate", "1e-3", "3e-3", "--seed", "0", "1",
         "2", "--epochs", "6"]  # fmt: skip


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--jobs", type=int, default=13, help="commands at once")
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


def save_evaluator(model: str, folder: Path) -> str:
    """Train an evaluator on the CPU and return its folder."""
    flags = ["--fine-tune-type", "bitfit", "--learning-rate", "1e-3", "--epochs", "2"]
    run_glue(folder / "start", *TOY, "--model-name", model, *flags, "--gpu-device", "cpu",
             "--save-evaluator")  # fmt: skip
    return str(folder / "start")


def check_sweep(name: str, flags: Sequence[str], precision: str, folder: Path) -> Outcome:
    """Compare the runs of a sweep with the CPU in float32."""
    flags = [*flags, "--fine-tune-type", "bitfit", "--learning-rate", "5e-4", "1e-3",
             "--epochs", "3"]  # fmt: skip
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
    """Stop a sweep with halving after its first checkpoint, resume it, and compare bit by bit."""
    flags = [*SWEEP, "--model-name", str(ROOT / "examples/tiny_bert"), "--halving", "3"]
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
        toy, modernbert = [*TOY, "--model-name", model], write_modernbert(folder)
        separate = ["--init-seed", "0", "1", "--data-seed", "0", "1", "--train-score-rows", "16"]
        sweeps = {
            "tagging": [*TAGGING, "--model-name", model, *SEEDS],
            "added biases": [*TOY, "--model-name", modernbert, "--add-biases", *SEEDS],
            "sets of bias terms": [*toy, *SETS, *SEEDS],
            "separate seeds": [*toy, *separate],
            "a warm start": [*toy, *SEEDS, "--start-from", save_evaluator(model, folder)],
        }
        for precision in ("fp32", "bf16"):
            for name, flags in sweeps.items():
                job = pool.submit(check_sweep, name, flags, precision, folder)
                jobs[f"{name} in {precision}"] = job
        # Not in bf16, where rounding decides between settings that score nearly the same.
        halving = [*sweeps["sets of bias terms"], "--halving", "1", "2"]
        jobs["halving"] = pool.submit(check_sweep, "halving", halving, "fp32", folder)
        jobs["a sweep in micro-batches"] = pool.submit(check_micro_batches, model, folder)
        jobs["halving stopped and resumed"] = pool.submit(check_resume, folder)
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


def main() -> int:
    args = parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    with tempfile.TemporaryDirectory() as folder:
        return int(check(args, Path(folder)))


if __name__ == "__main__":
    sys.exit(main())
