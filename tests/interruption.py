"""Kill trainings, resume them, and compare their files with those of an undisturbed training.

`benchmarks/kill_and_resume.py` does it more often.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from processes import ROOT, run_program, start_process

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


def output_contents(folder):
    """Return {name: content} of the files of a finished command, without times and paths."""
    content = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.suffix == ".json":
            metadata = json.loads(path.read_text())
            for key in ("seconds", "output_path", "resume"):
                metadata.pop(key, None)
            metadata.get("best", {}).pop("seconds", None)
            content[name] = metadata
        elif path.name == "results.csv":
            rows = [line.split(",") for line in path.read_text().splitlines()]
            times = rows[0].index("seconds")
            content[name] = [row[:times] + row[times + 1 :] for row in rows]
        else:
            content[name] = path.is_file() and path.read_bytes()
    return content


def kill_repeatedly(case, kills, signals, folder, rng):
    """Kill a training `kills` times, resume it each time, and compare it with an undisturbed one.

    A training that ends before it was killed so often is compared and begun again.

    Returns:
        {"kills": number, "resumes": number, "differences": [names of files that differ]}
    """
    quiet, killed, log = folder / "quiet", folder / "killed", folder / "log"
    begin = time.monotonic()
    process = start_process(run_program, [*FLAGS, *CASES[case], "--output-path", str(quiet)], log)
    process.join()
    whole = time.monotonic() - begin
    assert process.exitcode == 0, log.read_text()
    flags = [*FLAGS, *CASES[case], "--output-path", str(killed), "--resume"]
    done, resumes = 0, -1  # the first start resumes nothing
    while True:
        process = start_process(run_program, flags, log)
        resumes += 1
        if done < kills:
            # Early, so that one training lasts through many kills; sometimes before it begins.
            process.join(whole * rng.uniform(0.08, 0.22))
        else:
            process.join()
        if process.exitcode is None:
            os.kill(process.pid, rng.choice(signals))
            done += 1
            process.join()
        elif process.exitcode == 0 and done < kills:  # it was faster: the next training
            differ = differences(output_contents(quiet), output_contents(killed))
            if differ:
                return {"kills": done, "resumes": resumes, "differences": differ}
            for path in sorted(killed.rglob("*"), reverse=True):
                path.rmdir() if path.is_dir() else path.unlink()
        elif process.exitcode != 0:
            raise SystemExit(f"{case}: status {process.exitcode}\n{log.read_text()[-3000:]}")
        else:
            break
    differ = differences(output_contents(quiet), output_contents(killed))
    return {"kills": done, "resumes": resumes, "differences": differ}


def kill_ranks_repeatedly(case, kills, ranks, folder, rng):
    """Do the same with the ranks of torchrun; one rank is killed at a time."""
    quiet, killed, log = folder / "quiet", folder / "killed", folder / "log"

    def start(output):
        words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
                 str(ranks), "--max-restarts", "3", str(ROOT / "run_glue.py"), *FLAGS]  # fmt: skip
        words += [*CASES[case], "--resume", "--output-path", str(output)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        with open(log, "a") as output:
            return subprocess.Popen(words, env=environment, stdout=output, stderr=output)

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
    differ = differences(output_contents(quiet), output_contents(killed))
    return {"kills": done, "resumes": done, "differences": differ}


def children_of(number):
    """Return the process numbers of a process's children; none if the process has ended."""
    try:
        path = Path(f"/proc/{number}/task/{number}/children")
        return [int(child) for child in path.read_text().split()]
    except OSError:
        return []


def differences(expected, found):
    """Return the names of files that differ between two results of `output_contents`."""
    names = sorted(expected.keys() | found.keys())
    return [name for name in names if expected.get(name) != found.get(name)]
