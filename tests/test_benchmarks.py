"""The benchmarks that the docs show, with small sizes: they run; nothing is measured."""

import importlib.util
import os
import re
import subprocess

import pytest
from conftest import ROOT
from documentation import plain
from quick_python import run_script

SMALL = {
    "kill_and_resume": ["--kills", "1", "--cases", "single"],
    "throughput": ["--rows", "16", "--rounds", "1", "--precision", "fp32"],
    "scoring": ["--rows", "16", "--runs", "2", "--size", "tiny"],
    "stacking": ["--rows", "16", "--rounds", "1", "--runs", "2"],
    "peers": [
        "--rows",
        "16",
        "--rounds",
        "1",
        "--runs",
        "2",
        "--precision",
        "bf16",
        "--size",
        "tiny",
    ],
    "commands": ["--train-size", "16", "--seeds", "0", "--learning-rates", "1e-3"],
    "gpu_times": ["--runs", "1", "--steps", "2", "--processes", "1"],
    "many_tasks": ["--rows", "2", "--rounds", "1", "--tasks", "2", "--size", "tiny"],
    "ranks": ["--train-size", "16", "--cases", "one bitfit"],
}


@pytest.mark.parametrize("command", plain("python benchmarks/"))
def test_the_benchmarks(command, checkout, quick_python):
    """Smaller than shown: that they run, not what they measure."""
    more = SMALL[re.search(r"benchmarks/(\w+)\.py", command)[1]]
    script, *words = command.split()[1:]
    if "--ranks" in command:  # it takes long; test_ranks.py kills a rank
        result = run_script(script, *words, "--help")
        assert (result.returncode, result.stderr) == (0, "")
        return
    result = run_script(script, *words, *more, cwd=checkout)
    if (
        "peers.py" in command
        and "vmap" not in command
        and importlib.util.find_spec("accelerate") is None
    ):
        assert result.returncode == 2
        assert result.stderr.splitlines() == [
            "peers.py: error: Trainer needs accelerate: pip install accelerate"
        ]
        return
    assert result.returncode == 0, result.stderr
    assert re.search(
        r"ratio|differences found: 0|times as fast as the released loop", result.stdout
    )


@pytest.mark.parametrize(
    "failing", [None, "gpu_checks.py", "gpu_times.py", "gpu_commands.py", "gpu_sweep.py"]
)
def test_the_gpu_script_ends_with_a_table_of_all_checks(failing, tmp_path):
    """With a stand-in for Python: the checks themselves have tests of their own."""
    (tmp_path / "python3").write_text(f"""#!/bin/bash
        case "$1" in *.py) echo "ok   $(basename $1) $*";; esac
        case "$1" in *{failing}) echo "FAIL something: 1.0"; exit 1;; esac""")
    (tmp_path / "python3").chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "OUT": str(tmp_path / "out")}
    (command,) = plain("bash benchmarks/gpu.sh")
    result = subprocess.run(
        [*command.split(), "small"], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    table = result.stdout.split("end\n")[1].splitlines()
    assert len([line for line in table if line.startswith("ok   ")]) == 4
    assert (result.returncode, table[-1].startswith("FAILED")) == (
        int(bool(failing)),
        bool(failing),
    )
    log = (tmp_path / "out/log.txt").read_text()
    assert "gpu_times.py --size tiny --runs 1 2 --steps 3 --processes 2" in log
