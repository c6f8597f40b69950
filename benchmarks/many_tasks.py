"""Compare predictions of many tasks by one encoder with a full model per task.

    python benchmarks/many_tasks.py --data-dir <GLUE folder> --model-name <folder>

For each number of tasks the same texts are answered in three ways in turn, after a warm-up:
together, as scripts/predict.py does; with one full model per task, in the same program; and with
these models in plain transformers, on padded batches. The clock covers tokenizing, the model and,
except for plain transformers, the formatting of answers. One text for one task is one answer; rates
are answers per second. Tasks are those of GLUE, repeated, with random deltas of BitFit. Memory is
the peak of a separate process that loads and answers one batch, including libraries. Without
--model-name a random encoder of MiniLM-L6's size (22M) is used.
"""

import argparse
import multiprocessing
import re
import tempfile
from contextlib import ExitStack
from pathlib import Path
from statistics import median

import torch
from common import (
    DTYPES,
    LENGTH,
    ROOT,
    find_task,
    loading,
    machine,
    make_parser,
    pick_device,
    pick_rows,
    random_model,
    ratio,
    seconds,
)

from bitfit.data.tasks import TASKS
from bitfit.tools import answers, multi_task
from bitfit.training.result import new_result
from glue_evaluator import GLUEvaluator


def parse_args() -> argparse.Namespace:
    parser = make_parser(__doc__, rows=64)
    parser.set_defaults(task_name="rte", batch_size=32)
    parser.add_argument("--precision", default="fp32", choices=DTYPES)
    parser.add_argument("--tasks", type=int, nargs="+", default=[1, 5, 20])
    return parser.parse_args()


def base_model(args: argparse.Namespace, folder: Path) -> str:
    """Return the folder of the base model; without --model-name, write a random one."""
    if args.model_name:
        return args.model_name
    loading.load_tokenizer(str(ROOT / "examples/tiny_bert")).save_pretrained(folder / "base")
    random_model(args.size).save_pretrained(folder / "base")
    return str(folder / "base")


def write_evaluators(folder: Path, model_name: str, tasks: list[str], count: int) -> list[Path]:
    """Write evaluators with random deltas and return their folders."""
    folders = [folder / str(number) for number in range(count)]
    for first, task in enumerate(tasks[:count]):
        evaluator = GLUEvaluator(task, model_name, None, seed=0, data_dir=ROOT / "examples/glue")
        evaluator.preprocess_dataset("longest", LENGTH, 8, train_size=8)
        evaluator.prepare("bitfit", 1e-3, components=["bias"], verbose=False)
        stack = evaluator.need_prepared().new_stack()
        evaluator = evaluator.with_parts(result=new_result(stack))
        for target in folders[first :: len(tasks)]:
            stack.params += 0.02 * torch.randn_like(stack.params)
            evaluator.save(target)
    return folders


def load(folders: list[Path], precision: str, stack: ExitStack) -> multi_task.MultiTaskPredictor:
    """Load evaluators that can predict until the `ExitStack` ends."""
    many = multi_task.load_predictor(
        multi_task.read_evaluators(folders), pick_device(), DTYPES[precision]
    )
    stack.enter_context(many.stack.patched(DTYPES[precision]))
    return many


def answer(
    loaded: list[multi_task.MultiTaskPredictor], rows: list[tuple[str, ...]], batch_size: int
) -> None:
    for many in loaded:
        for i in range(0, len(rows), batch_size):
            answers.predict_answers(many, rows[i : i + batch_size])


@torch.inference_mode()
def answer_plainly(
    loaded: list[multi_task.MultiTaskPredictor], rows: list[tuple[str, ...]], batch_size: int
) -> None:
    """Predict with plain transformers: one padded batch after another, model after model."""
    for single in loaded:
        model, texts = single.forward.model, len(single.tasks[0].texts)
        for i in range(0, len(rows), batch_size):
            columns = [list(c[:batch_size]) for c in zip(*rows[i : i + batch_size], strict=True)]
            inputs = single.tokenizer(*columns[:texts], truncation=True, max_length=LENGTH,
                                      padding=True, return_tensors="pt")  # fmt: skip
            model(**inputs.to(model.device)).logits.float().cpu()


def peak_gib(groups: list[list[Path]], rows: list[tuple[str, ...]], precision: str) -> float:
    """Return the peak memory of this process after groups of evaluators have predicted."""
    with ExitStack() as stack:
        answer([load(group, precision, stack) for group in groups], rows, len(rows))
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    # Not from getrusage, whose peak of a child process begins with the parent's memory.
    (peak,) = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(peak) / 2**20


def apart(*args: object) -> float:
    """Return `peak_gib` of a new process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(peak_gib, args)


def measure(folders: list[Path], rows: list[tuple[str, ...]], args: argparse.Namespace) -> None:
    """Print one line of the table."""
    singles, size = [[folder] for folder in folders], args.batch_size
    with ExitStack() as stack:
        many = [load(folders, args.precision, stack)]
        single = [load(folder, args.precision, stack) for folder in singles]
        ways = (answer, many), (answer, single), (answer_plainly, single)
        for work, loaded in ways:
            work(loaded, rows[:size], size)
        times = [
            [seconds(lambda: work(loaded, rows, size), pick_device()) for work, loaded in ways]  # noqa: B023
            for _ in range(args.rounds)
        ]
    ours, alone, plain = zip(*times, strict=True)
    rates = [f"{len(folders) * len(rows) / median(way):>9.0f}" for way in (ours, alone, plain)]
    ratios = [f"{ratio(zip(way, ours, strict=True)):>18}" for way in (alone, plain)]
    memory = [apart(groups, rows[:size], args.precision) for groups in ([folders], singles)]
    print(f"{len(folders):>5}", *rates, *ratios, *(f"{gib:>8.2f}" for gib in memory), flush=True)


def main() -> None:
    args = parse_args()
    task, data_dir = find_task(args)
    texts, _ = pick_rows(args, task, data_dir)
    rows = list(zip(*texts.columns, strict=True))
    names = [name for name, other in TASKS.items() if len(other.texts) <= len(task.texts)]
    print(f"{len(rows)} rows of {task.name}, {args.precision}, batch {args.batch_size}, "
          f"{args.rounds} rounds: median (range), {machine(pick_device())}")  # fmt: skip
    print(f"{'tasks':>5} {'together':>9} {'one by one':>10} {'plain':>8} {'ratio: one by one':>18} "
          f"{'ratio: plain':>18} {'GiB':>8} {'one by one':>10}")  # fmt: skip
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model_name = base_model(args, folder)
        folders = write_evaluators(folder, model_name, names, count=max(args.tasks))
        for count in args.tasks:
            measure(folders[:count], rows, args)


if __name__ == "__main__":
    main()
