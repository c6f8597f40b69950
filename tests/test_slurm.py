"""The SLURM jobs of the docs, with stand-ins for SLURM's commands."""

import json
import os
import re
import signal
import socket
import subprocess

import paper
import pytest
from conftest import ROOT, TINY_BERT, wait_for
from documentation import TEXT, active_environment

from bitfit import options as flags

STAND_INS = {
    "srun": """trap 'kill -TERM $one $two; wait' TERM
        "$@" & one=$!
        "$@" & two=$!
        wait $one && wait $two""",
    "scontrol": 'if [ $1 = show ]; then echo localhost; else echo "$@" >scontrol.log; fi',
}


def test_the_slurm_job_of_several_machines(quick_python, small, tmp_path):
    """Two torchruns that meet; TERM before the limit, and the job is to be started again."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    flags = f"--model-name {TINY_BERT} {' '.join(small)} --epochs 30 --learning-rate"
    job = SBATCH[1].replace("8", "1").replace("29500", port).replace("mnli", "rte")
    job = job.replace("run_glue.py", str(ROOT / "run_glue.py")).replace("--learning-rate", flags)
    job = job.replace("--seed 0 1 2 3 4", "--seed 0")
    (tmp_path / "job").write_text(job)
    for name, body in STAND_INS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    environment = active_environment()
    path = f"{tmp_path}{os.pathsep}{environment['PATH']}"
    slurm = {"SLURM_JOB_ID": "17", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "x"}
    options = {"cwd": tmp_path, "env": environment | slurm | {"PATH": path}}
    process = subprocess.Popen(["bash", "job"], stderr=subprocess.PIPE, **options)
    wait_for(lambda: [*tmp_path.glob("out/rte/*/checkpoints/*.json")])
    process.send_signal(signal.SIGTERM)
    error = process.communicate(timeout=120)[1].decode()
    assert error.count("to go on: torchrun (with the same flags) run_glue.py --resume") == 1, error
    assert (tmp_path / "scontrol.log").read_text() == "requeue 17\n"
    begun = json.loads((tmp_path / "out/rte/args.json").read_text())
    assert (begun["ranks"], begun["finished"]) == (2, False)


SBATCH = re.findall(r"```sbatch\n(.*?)```", TEXT, re.DOTALL)

ARRAY = {"SLURM_ARRAY_JOB_ID": "16", "SLURM_ARRAY_TASK_ID": "3"}


@pytest.mark.parametrize(
    ("status", "array", "requeued"),
    [(138, {}, "requeue 17\n"), (138, ARRAY, "requeue 16_3\n"), (0, {}, None), (1, ARRAY, None)],
)
@pytest.mark.parametrize("script", ["run_glue.py", "paper.py"])
def test_the_slurm_job(tmp_path, status, array, requeued, script):
    """With a stand-in for SLURM: the flags are ours, only SIGUSR1's status requeues, and of a job
    array one task alone."""
    job, _, study = SBATCH
    if script == "paper.py":  # an array always
        job, array, requeued = study, ARRAY, requeued and "requeue 16_3\n"
    (tmp_path / "job").write_text(job)
    for name, body in {
        "srun": f'printf "%s\\n" "$@" >srun.log; exit {status}',
        "scontrol": 'echo "$@" >scontrol.log',
    }.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "SLURM_JOB_ID": "17"} | array
    result = subprocess.run(["bash", "job"], cwd=tmp_path, env=environment)
    assert result.returncode == status
    log = tmp_path / "scontrol.log"
    assert (log.read_text() if log.exists() else None) == requeued
    words = (tmp_path / "srun.log").read_text().split()
    if script == "run_glue.py":
        assert words[:2] == ["python", "run_glue.py"]
        assert flags.parse_args("", words[2:]).resume
    else:
        assert words[:3] == ["python", "scripts/paper.py", "run"]
        assert paper.parse_args(words[2:]).shard is None
    assert status != 138 or status == 128 + signal.SIGUSR1
