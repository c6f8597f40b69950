"""Kill one training again and again, resume it each time, and compare the end with a quiet one.

    python benchmarks/kill_and_resume.py --kills 25

A process that trains on the toy data gets SIGKILL (or with --signals also SIGTERM, SIGINT and
SIGUSR1) after a random time, and the same command with --resume goes on, until it has been killed
so often; then it runs to its end. Every file it leaves is compared with those of the same command
left alone: weights, predictions and scores bit by bit, all but the seconds. Prints a line for each
case; ends with status 1 if anything differs.

With --ranks the command is started by torchrun, and one of its ranks is killed: torchrun starts all
of them again, three times; then the command is given again.
"""

import argparse
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

CASES = {
    "single": ["--learning-rate", "3e-3", "--seed", "0", "--keep", "best"],
    "stacked": ["--learning-rate", "1e-3", "4e-3", "--seed", "0", "1"],
    "one by one": ["--learning-rate", "1e-3", "4e-3", "--seed", "0", "--fine-tune-type",
                   "rand_uniform", "--keep", "best"],
}  # fmt: skip
FLAGS = [
    "--task-name", "cola", "--data-dir", str(ROOT / "examples/glue"), "--gpu-device", "cpu",
    "--model-name", str(ROOT / "examples/tiny_bert"), "--fine-tune-type", "bitfit",
    "--epochs", "6", "--train-size", "160", "--checkpoint-minutes", "0.002",
    "--save-evaluator", "--predict-test",
]  # fmt: skip
PRELOADED = ["glue_evaluator", "run_glue", "bitfit.results.sweeps", "sklearn.metrics",
             "scipy.stats", "pandas", "seaborn",
             "transformers.models.bert.modeling_bert"]  # fmt: skip


def job(flags: list[str], log: Path) -> NoReturn:
    """The program, in a process of its own that writes to `log`."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    import torch

    import run_glue

    torch.set_num_threads(1)
    sys.exit(run_glue.main(flags))


def start(context: ForkServerContext, flags: list[str], log: Path) -> BaseProcess:
    process = context.Process(target=job, args=(flags, log))
    process.start()
    return process


def left(folder: Path) -> dict[str, Any]:
    """{name: content} of what a finished command left, without what may differ: times, paths."""
    content = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.suffix == ".json":
            facts = json.loads(path.read_text())
            for key in ("seconds", "output_path", "resume"):
                facts.pop(key, None)
            facts.get("best", {}).pop("seconds", None)
            content[name] = facts
        elif path.name == "results.csv":
            rows = [line.split(",") for line in path.read_text().splitlines()]
            times = rows[0].index("seconds")
            content[name] = [row[:times] + row[times + 1 :] for row in rows]
        else:
            content[name] = path.is_file() and path.read_bytes()
    return content


def abuse(case: str, kills: int, signals: list[int], folder: Path, rng: random.Random) -> dict:
    """{"kills", "resumes", "differences"} of one case.

    A training that ends before it was killed so often is compared and begun again.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    quiet, killed, log = folder / "quiet", folder / "killed", folder / "log"
    begin = time.monotonic()
    process = start(context, [*FLAGS, *CASES[case], "--output-path", str(quiet)], log)
    process.join()
    whole = time.monotonic() - begin
    assert process.exitcode == 0, log.read_text()
    flags = [*FLAGS, *CASES[case], "--output-path", str(killed), "--resume"]
    done, resumes = 0, -1  # the first start resumes nothing
    while True:
        process = start(context, flags, log)
        resumes += 1
        if done < kills:
            # Early, so that one training lasts through many kills; sometimes before it begins.
            process.join(whole * rng.uniform(0.08, 0.22))
        else:
            process.join()
        if process.exitcode is None and process.pid:
            os.kill(process.pid, rng.choice(signals))
            done += 1
            process.join()
        elif process.exitcode == 0 and done < kills:  # it was faster: the next training
            differ = differences(left(quiet), left(killed))
            if differ:
                return {"kills": done, "resumes": resumes, "differences": differ}
            for path in sorted(killed.rglob("*"), reverse=True):
                path.rmdir() if path.is_dir() else path.unlink()
        elif process.exitcode != 0:
            raise SystemExit(f"{case}: status {process.exitcode}\n{log.read_text()[-3000:]}")
        else:
            break
    differ = differences(left(quiet), left(killed))
    return {"kills": done, "resumes": resumes, "differences": differ}


def abuse_ranks(
    case: str, kills: int, ranks: int, folder: Path, rng: random.Random
) -> dict[str, Any]:
    """The same with torchrun's ranks, of which one is killed at a time."""
    quiet, killed, log = folder / "quiet", folder / "killed", folder / "log"

    def start(output: Path) -> subprocess.Popen:
        words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
                 str(ranks), "--max-restarts", "3", str(ROOT / "run_glue.py"), *FLAGS]  # fmt: skip
        words += [*CASES[case], "--resume", "--output-path", str(output)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        with open(log, "a") as said:
            return subprocess.Popen(words, env=environment, stdout=said, stderr=said)

    begin = time.monotonic()
    assert start(quiet).wait() == 0, log.read_text()
    whole, done, status = time.monotonic() - begin, 0, None
    while status != 0:
        process, before = start(killed), done
        while (status := process.poll()) is None:
            time.sleep(whole * rng.uniform(0.3, 0.9))
            living = children_of(process.pid) if done < kills else []
            if living:
                os.kill(rng.choice(living), signal.SIGKILL)
                done += 1
        if status and done == before:
            raise SystemExit(f"{case}: status {status}\n{log.read_text()[-3000:]}")
    differ = differences(left(quiet), left(killed))
    return {"kills": done, "resumes": done, "differences": differ}


def children_of(number: int) -> list[int]:
    """The process numbers of a process's children; none where it is gone."""
    try:
        path = Path(f"/proc/{number}/task/{number}/children")
        return [int(child) for child in path.read_text().split()]
    except OSError:
        return []


def differences(expected: dict[str, Any], found: dict[str, Any]) -> list[str]:
    names = sorted(expected.keys() | found.keys())
    return [name for name in names if expected.get(name) != found.get(name)]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=25, help="of each case")
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES)
    parser.add_argument("--signals", action="store_true", help="not SIGKILL alone")
    parser.add_argument("--ranks", type=int, help="of torchrun; one of them is killed")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    signals: list[int] = [signal.SIGKILL]
    if args.signals:
        signals += [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1]
    failed = False
    for case in args.cases:
        with tempfile.TemporaryDirectory() as folder:
            rng = random.Random(args.seed)
            if args.ranks:
                result = abuse_ranks(case, args.kills, args.ranks, Path(folder), rng)
            else:
                result = abuse(case, args.kills, signals, Path(folder), rng)
        failed |= bool(result["differences"])
        found = result["differences"]
        print(
            f"{case}: {result['kills']} kills, {result['resumes']} resumes, "
            f"differences found: {len(found)} {found or ''}",
            flush=True,
        )
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
