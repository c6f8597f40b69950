"""Every command and every line of Python in README.md is run here."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys

import pytest
from conftest import GLUE, ROOT, TINY_BERT

import run_glue
from bitfit import flags

README = (ROOT / "README.md").read_text(encoding="utf-8")
SMALL = ["--data-dir", str(GLUE), "--epochs", "1", "--train-size", "16", "--gpu-device", "cpu"]
CONDA = ("conda env create", "conda activate")  # conda is not here; see test_environment_yml


def commands():
    """Each command of the bash blocks as one line, without comments."""
    text = "\n".join(re.findall(r"```bash\n(.*?)```", README, re.DOTALL)).replace("\\\n", " ")
    lines = (line.split("#")[0].strip() for line in text.splitlines())
    return [" ".join(line.split()) for line in lines if line]


def plain(prefix):
    return [command for command in commands() if command.startswith(prefix)]


def active_environment():
    """As if this Python's environment had been activated."""
    path = os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"]
    return os.environ | {"VIRTUAL_ENV": sys.prefix, "PATH": path}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the project to run scripts in, so that nobody's out/ is touched."""
    folder = tmp_path_factory.mktemp("checkout") / "bitfit"
    left_out = shutil.ignore_patterns(".git", ".venv", "out", "__pycache__", ".*_cache")
    shutil.copytree(ROOT, folder, ignore=left_out)
    return folder


def test_every_command_is_known_to_these_tests():
    scripts = (
        "bash scripts/demo.sh",
        "bash scripts/test.sh",
        "bash scripts/sweep_learning_rates.sh",
    )
    known = ("python run_glue.py ", *scripts, *CONDA)
    assert len(plain("python run_glue.py ")) >= 7
    assert [command for command in commands() if not command.startswith(known)] == []


@pytest.mark.parametrize("command", plain("python run_glue.py "))
def test_run_glue_commands(command, tmp_path, monkeypatch):
    words = shlex.split(command.replace("bert-base-cased", str(TINY_BERT)))[2:]
    words[words.index("--output-path") + 1] = str(tmp_path / "out")
    monkeypatch.chdir(ROOT)
    assert run_glue.main([*words, *SMALL]) == 0
    result = "results.csv" if "sweep" in command else "metrics.json"
    assert (tmp_path / "out" / result).exists()


def test_the_demo(checkout):
    result = subprocess.run(
        ["bash", "scripts/demo.sh", "--epochs", "1", "--train-size", "16"],
        cwd=checkout, env=active_environment(), capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    printed = [line for line in result.stdout.splitlines() if line.startswith("$ python ")]
    assert len(printed) == 5
    assert "--epochs 1 --train-size 16" in printed[0]
    table = result.stdout.split(printed[-1])[1].split()
    assert table.count("cola") == 4
    assert not (checkout / ".venv").exists()  # the active environment was used


def test_the_test_command(checkout):
    result = subprocess.run(
        ["bash", "scripts/test.sh", "tests/test_tasks.py"],
        cwd=checkout, env=active_environment(), capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    assert " passed" in result.stdout


def test_the_sweep_script(checkout):
    (command,) = plain("bash scripts/sweep_learning_rates.sh")
    small = [*SMALL, "--model-name", str(TINY_BERT), "--learning-rate", "1e-3", "4e-3"]
    result = subprocess.run(
        [*command.split(), *small], cwd=checkout, env=active_environment(),
        capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    first = result.stdout.splitlines()[0]
    assert first.startswith("$ python run_glue.py --task-name rte --output-path out/sweep-rte ")
    assert "--learning-rate 1e-4 4e-4 7e-4 1e-3 --seed 0 1 2 3 4 --batch-size 16" in first
    rows = (checkout / "out/sweep-rte/results.csv").read_text().splitlines()
    assert len(rows) == 1 + 2 * 5
    nothing = subprocess.run(
        ["bash", "scripts/sweep_learning_rates.sh"], cwd=checkout, capture_output=True, text=True
    )
    assert nothing.returncode == 2
    assert nothing.stderr.startswith("The paper's grid on one task: bash scripts/sweep")


@pytest.mark.parametrize(("status", "requeued"), [(138, True), (0, False), (1, False)])
def test_the_slurm_job(tmp_path, status, requeued):
    """With a stand-in for SLURM: the flags are ours, and only SIGUSR1's status requeues."""
    (job,) = re.findall(r"```sbatch\n(.*?)```", README, re.DOTALL)
    (tmp_path / "job").write_text(job)
    for name, body in {
        "srun": f'printf "%s\\n" "$@" >srun.log; exit {status}',
        "scontrol": 'echo "$@" >scontrol.log',
    }.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    result = subprocess.run(
        ["bash", "job"], cwd=tmp_path, env=os.environ | {"PATH": path, "SLURM_JOB_ID": "17"}
    )
    assert result.returncode == status
    assert (tmp_path / "scontrol.log").exists() == requeued
    words = (tmp_path / "srun.log").read_text().split()
    assert words[:2] == ["python", "run_glue.py"]
    assert flags.parse_args("", words[2:]).resume
    assert status != 138 or status == 128 + signal.SIGUSR1


def test_compare_says_what_is_wrong(checkout):
    script = [sys.executable, "scripts/compare.py"]
    result = subprocess.run([*script, "nowhere"], cwd=checkout, capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr.startswith("compare.py: error: nowhere holds no results of run_glue.py")


def test_environment_yml_installs_the_same_pins():
    text = (ROOT / "environment.yml").read_text()
    assert "name: bitfit_env" in text
    assert "-r requirements.txt" in text
    assert "==" not in text
    pins = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if line[0] != "#"]
    assert all(re.fullmatch(r"[a-z-]+==[0-9.]+", pin) for pin in pins)


def test_the_python_example(tmp_path):
    (block,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    script = block.replace('"out/', f'"{tmp_path}/out/')
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert "Accuracy" in result.stdout
    assert (tmp_path / "out/python/RTE.tsv").exists()


def test_every_flag_is_explained():
    """Those the README names exist, and -h explains all."""
    ours = re.sub(r"#SBATCH.*|`python benchmarks.*?`", "", README)
    named = set(re.findall(r"`?(--[a-z][a-z0-9-]+)", ours)) - {"--help"}
    parser = flags.make_parser("")
    known = {name for action in parser._actions for name in action.option_strings}
    assert named <= known
    assert all(action.help for action in parser._actions)
