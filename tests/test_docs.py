"""Every command and every line of Python in README.md and docs/ is run here."""

import glob
import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys

import pandas as pd
import pytest
from conftest import GLUE, ROOT, TINY_BERT, wait_for
from processes import run_script
from torch.distributed import run as torchrun

import run_glue
from bitfit import options as flags
from bitfit.options import TERMS

sys.path.insert(0, str(ROOT / "scripts"))
import compare
import deltas
import paper
import predict

README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = sorted((ROOT / "docs").glob("*.md"))
TEXT = "\n".join([README, *(path.read_text(encoding="utf-8") for path in PAGES)])
SMALL = ["--data-dir", str(GLUE), "--epochs", "1", "--train-size", "16", "--gpu-device", "cpu"]
CONDA = ("conda env create", "conda activate")  # conda is not here; see test_environment_yml
HUB = ("hf auth login", "hf upload ")  # nor is the Hub; see test_hub


def commands():
    """Each command of the bash blocks as one line, without comments."""
    text = "\n".join(re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL)).replace("\\\n", " ")
    lines = (line.split("#")[0].strip() for line in text.splitlines())
    return list(dict.fromkeys(" ".join(line.split()) for line in lines if line))


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
    known = (
        *("python run_glue.py ", "OMP_NUM_THREADS=1 python run_glue.py ", "torchrun "),
        *("bash scripts/demo.sh", "bash scripts/test.sh", "bash scripts/sweep_learning_rates.sh"),
        *(
            "python benchmarks/",
            "bash benchmarks/gpu.sh",
            "python scripts/compare.py ",
            "pip install accelerate",
            *CONDA,
        ),
        *(f"python scripts/deltas.py {name} " for name in deltas.COMMANDS),
        *("python scripts/predict.py ", *HUB),
        *(f"python scripts/paper.py {name} " for name in ("plan", "run", "report", "submit")),
    )
    assert len(RUN_GLUE) >= 10
    assert [command for command in commands() if not command.startswith(known)] == []


RUN_GLUE = plain("python run_glue.py ") + plain("OMP_NUM_THREADS=1 python run_glue.py ")
RUN_GLUE = [line for line in RUN_GLUE if "--task-file" not in line]  # see test_task_files.py


@pytest.mark.parametrize("command", RUN_GLUE)
def test_run_glue_commands(command, tmp_path, monkeypatch):
    words = shlex.split(command.replace("bert-base-cased", str(TINY_BERT)).split("run_glue.py")[1])
    words[words.index("--output-path") + 1] = str(tmp_path / "out")
    monkeypatch.chdir(ROOT)
    assert run_glue.main([*words, *SMALL]) == 0
    args = flags.parse_args("", words)
    result = "results.csv" if len(args.seed) * len(args.learning_rate) > 1 else "metrics.json"
    assert (tmp_path / "out" / result).exists()


def test_the_torchrun_command(tmp_path):
    (command,) = plain("torchrun ")
    words = shlex.split(command.replace("bert-base-cased", str(TINY_BERT)))
    words[words.index("--output-path") + 1] = str(tmp_path / "out")
    result = subprocess.run(
        [*words, *SMALL], cwd=ROOT, env=active_environment(), capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert len((tmp_path / "out/results.csv").read_text().splitlines()) == 1 + 4


STAND_INS = {
    "srun": """trap 'kill -TERM $one $two; wait' TERM
        "$@" & one=$!
        "$@" & two=$!
        wait $one && wait $two""",
    "scontrol": 'if [ $1 = show ]; then echo localhost; else echo "$@" >scontrol.log; fi',
}


def test_the_slurm_job_of_several_machines(tmp_path):
    """Two torchruns that meet; TERM before the limit, and the job is to be started again."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    small = f"--model-name {TINY_BERT} {' '.join(SMALL)} --epochs 30 --learning-rate"
    job = SBATCH[1].replace("8", "1").replace("29500", port).replace("mnli", "rte")
    job = job.replace("run_glue.py", str(ROOT / "run_glue.py")).replace("--learning-rate", small)
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
    assert table.count("CoLA") == 4
    assert (checkout / "out/demo/methods.png").stat().st_size > 10_000
    assert not (checkout / ".venv").exists()  # the active environment was used


def test_the_test_command(checkout):
    result = subprocess.run(
        ["bash", "scripts/test.sh", "tests/test_tasks.py", "-n", "0"],
        cwd=checkout, env=active_environment(), capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    assert " passed" in result.stdout


def test_the_sweep_script(checkout):
    (command,) = plain("bash scripts/sweep_learning_rates.sh")
    small = [*SMALL, "--model-name", str(TINY_BERT), "--learning-rate", "1e-3", "--seed", "0", "1"]
    result = subprocess.run(
        [*command.split(), *small], cwd=checkout, env=active_environment(),
        capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    first = result.stdout.splitlines()[0]
    assert first.startswith("$ python run_glue.py --task-name rte --output-path out/sweep-rte ")
    assert "--learning-rate 1e-4 4e-4 7e-4 1e-3 --seed 0 1 2 3 4 --batch-size 16" in first
    rows = (checkout / "out/sweep-rte/results.csv").read_text().splitlines()
    assert len(rows) == 1 + 2
    nothing = subprocess.run(
        ["bash", "scripts/sweep_learning_rates.sh"], cwd=checkout, capture_output=True, text=True
    )
    assert nothing.returncode == 2
    assert nothing.stderr.startswith("The paper's grid on one task: bash scripts/sweep")


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


@pytest.mark.parametrize("command", plain("python benchmarks/"))
def test_the_benchmarks(command, checkout):
    """Smaller than shown: that they run, not what they measure."""
    small = {
        "kill_and_resume": ["--kills", "1", "--cases", "single"],
        "throughput": ["--rows", "16", "--rounds", "1", "--precision", "fp32"],
        "stacking": ["--rows", "16", "--rounds", "1", "--runs", "2"],
        "peers": ["--rows", "16", "--rounds", "1", "--runs", "2", "--precision", "bf16"],
        "commands": [
            "--train-size",
            "16",
            "--epochs",
            "1",
            "--seeds",
            "0",
            "--learning-rates",
            "1e-3",
        ],
        "gpu": ["--runs", "1", "--steps", "2", "--processes", "1", "--only-times"],
        "many_tasks": ["--rows", "2", "--rounds", "1", "--tasks", "2", "--size", "tiny"],
        "ranks": [],
    }
    more = small[re.search(r"benchmarks/(\w+)\.py", command)[1]]
    script, *words = command.split()[1:]
    if "ranks" in command:  # several torchruns, as in test_ranks.py: its flags are known
        result = run_script(script, *words, "--help")
        assert (result.returncode, result.stderr) == (0, "")
        return
    result = run_script(script, *words, *more, cwd=checkout)
    if "peers" in command and importlib.util.find_spec("accelerate") is None:
        assert result.returncode == 2
        assert result.stderr.splitlines() == [
            "peers.py: error: Trainer needs accelerate: pip install accelerate"
        ]
        return
    assert result.returncode == 0, result.stderr
    assert re.search(
        r"ratio|differences found: 0|times as fast as the released loop", result.stdout
    )


@pytest.mark.parametrize("failing", [None, "gpu.py", "gpu_commands.py"])
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
    assert "gpu.py --size tiny --runs 1 2 --steps 3 --processes 2 --only-checks" in log


def test_compare(checkout, tmp_path, monkeypatch):
    (command,) = plain("python scripts/compare.py ")
    monkeypatch.chdir(ROOT)
    for name, kind in (("rte-bitfit", "bitfit"), ("rte-full", "full_ft")):
        argv = ["-o", str(tmp_path / "out" / name), "-t", "rte", "-f", kind, "-m", str(TINY_BERT)]
        assert run_glue.main([*argv, *SMALL]) == 0
    words = command.split()[2:]
    result = run_script("scripts/compare.py", *words, cwd=tmp_path, draws=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("RTE ") == 2
    assert (tmp_path / "out/methods.png").stat().st_size > 10_000


def test_predict(tmp_path, monkeypatch, capsys):
    (command,) = plain("python scripts/predict.py ")
    for task in ("cola", "rte", "stsb"):
        argv = ["-o", str(tmp_path / "out" / task), "-t", task, "-f", "bitfit", "--save-evaluator"]
        assert run_glue.main([*argv, "-m", str(TINY_BERT), *SMALL]) == 0
    (tmp_path / "texts.tsv").write_text("the glad wug grows\tthe happy wug swells\n")
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    assert predict.main(shlex.split(command)[2:]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    shown = json.loads(re.search(r"```json\n(.*?)```", TEXT, re.DOTALL)[1])
    assert {name: list(answer) for name, answer in json.loads(line).items()} == {
        name: list(answer) for name, answer in shown.items()
    }


def test_the_papers_commands(tmp_path, monkeypatch, capsys):
    """One after the other, on one small cell each."""
    small = ["--models", str(TINY_BERT), "--data-dir", str(GLUE), "--epochs", "1", "--tasks", "rte",
             "--train-size", "16", "--learning-rates", "1e-3", "--seeds", "0", "1", "--rows",
             "bitfit", "--sizes", "16"]  # fmt: skip
    monkeypatch.chdir(tmp_path)
    seen = []
    steps = ("plan", "run", "report", "submit")  # in this order, whichever page has them
    for command in [line for step in steps for line in plain(f"python scripts/paper.py {step} ")]:
        words = shlex.split(command.replace("bert-base-cased", str(TINY_BERT)))[2:]
        words = ["2" if word == "8" else word for word in words]  # ranks
        more = {"plan": small, "run": ["--gpus", "cpu"]}.get(words[0], [])
        status = paper.main([*words, *more])
        assert status == (2 if words[0] == "submit" else 0), command
        seen.append(words[0])
    assert set(seen) == set(steps)
    assert "no predictions for CoLA.tsv" in capsys.readouterr().err
    assert (tmp_path / "out/small/report.html").exists()


@pytest.mark.pictures
def test_the_deltas_commands(tmp_path, monkeypatch):
    """One after the other, on the evaluators of a small sweep."""
    monkeypatch.chdir(tmp_path)
    argv = ["-o", "out/sst2", "-t", "sst2", "-f", "bitfit", "-m", str(TINY_BERT)]
    argv += ["-l", "1e-3", "--seed", "0", "1", "--save-evaluator"]
    assert run_glue.main([*argv, *SMALL]) == 0
    for command in plain("python scripts/deltas.py "):
        globs = (sorted(glob.glob(word)) or [word] for word in shlex.split(command)[2:])
        assert deltas.main([word for words in globs for word in words]) == 0, command
    assert (tmp_path / "out/deltas.png").stat().st_size > 10_000
    assert (tmp_path / "out/soup-model/config.json").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], "nowhere holds no scores of run_glue.py: FileNotFoundError: "),
        (["sweep"], "sweep is a sweep without scored runs: give"),
        (["empty"], "empty holds no scores of run_glue.py: KeyError: 'main_metric'"),
        (["nowhere", "--plot", "x.pdf"], "nowhere holds no scores"),
    ],
)
def test_compare_says_what_is_wrong(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["compare.py", *words])
    for name, file in (("sweep", "results.csv"), ("empty", "metrics.csv")):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text("epoch,split,metric,value\n")
    (tmp_path / "empty/metrics.json").write_text("{}")
    with pytest.raises(SystemExit) as stop:
        compare.main()
    said = capsys.readouterr()
    assert stop.value.code == 2
    assert said.out == ""
    assert said.err.startswith(f"compare.py: error: {message}")
    assert said.err.count("\n") == 1


@pytest.mark.pictures
def test_a_picture_of_many_runs_is_not_cut_off(tmp_path, monkeypatch):
    """Long names and 24 curves of two seeds: nothing is cut off (a warning would be an error)."""
    facts = {
        "task": "rte", "model": "bert", "main_metric": "Accuracy", "fine_tune_type": "bitfit",
        "bias_terms": [*TERMS], "random_encoder": False, "learning_rate": 1e-3, "seconds": {},
        "trained_parameters": 1, "all_parameters": 2, "finished": True,
    }  # fmt: skip
    rows = [(e, s, "Accuracy", e / 9) for e in (1, 2) for s in ("train", "validation")]
    scores = pd.DataFrame(rows, columns=["epoch", "split", "metric", "value"])
    figures = []
    monkeypatch.setattr(compare, "save_figure", lambda figure, path: figures.append(figure))
    runs = [(facts | {"seed": k % 2, "learning_rate": k // 2}, scores) for k in range(48)]
    compare.plot_runs(runs, tmp_path / "x.png")
    figures[0].canvas.draw()
    drawn, canvas = figures[0].get_tightbbox(), figures[0].get_size_inches()
    assert min(drawn.x0, drawn.y0) >= 0
    assert drawn.x1 <= canvas[0]
    assert drawn.y1 <= canvas[1]


def test_environment_yml_installs_the_same_pins():
    text = (ROOT / "environment.yml").read_text()
    assert "name: bitfit_env" in text
    assert "-r requirements.txt" in text
    assert "==" not in text


def test_both_lists_of_requirements_pin_all_versions():
    runtime, development = (
        [line for line in (ROOT / name).read_text().splitlines() if line[0] != "#"]
        for name in ("requirements.txt", "requirements-dev.txt")
    )
    assert development.pop(0) == "-r requirements.txt"
    assert all(re.fullmatch(r"[a-z-]+==[0-9.]+", pin) for pin in runtime + development)
    assert not set(runtime) & set(development)


def test_the_python_example(tmp_path):
    (block,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    script = block.replace('"out/', f'"{tmp_path}/out/')
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert "Accuracy" in result.stdout
    assert (tmp_path / "out/python/RTE.tsv").exists()


def test_every_flag_is_explained():
    """Those that the README and docs name exist, and -h explains all."""
    ours = re.sub(r"#SBATCH.*|python (benchmarks|scripts)/.*", "", TEXT)
    named = set(re.findall(r"`?(--[a-z][a-z0-9-]+)", ours)) - {"--help"}
    parsers = [flags.make_parser(""), predict.make_parser(), *paper.make_parser()[1].values()]
    parsers += deltas.make_parser()[1].values()
    actions = [action for parser in parsers for action in parser._actions]
    known = actions + torchrun.get_args_parser()._actions
    assert named <= {name for action in known for name in action.option_strings}
    assert all(action.help for action in actions)


def anchors(path):
    """Return the anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_link_leads_somewhere():
    for path in (ROOT / "README.md", *PAGES):
        links = re.findall(r"\]\(([^)]+)\)", path.read_text(encoding="utf-8"))
        for link in (link for link in links if "://" not in link):
            name, _, anchor = link.partition("#")
            target = path.parent / name if name else path
            assert target.exists(), (path, link)
            assert not anchor or anchor in anchors(target), (path, link)
    assert len(README.splitlines()) < 150


def test_the_layout_is_that_of_the_tree():
    text = (ROOT / "docs/developing.md").read_text()
    for path in (ROOT / "bitfit").rglob("[a-z]*.py"):
        assert f"{path.name}`" in text, path.name
