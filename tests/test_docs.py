"""README.md and docs/: every command is run by a test, every flag and link exists."""

import re
import shlex
import subprocess

import deltas
import paper
import predict
import pytest
from conftest import ROOT, TINY_BERT
from documentation import PAGES, README, TEXT, active_environment, commands, plain
from torch.distributed import run as torchrun

import run_glue
from bitfit import options as flags

CONDA = ("conda env create", "conda activate")  # conda is not here; see test_environment_yml

HUB = ("hf auth login", "hf upload ")  # nor is the Hub; see test_hub


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

# See test_task_files.py, test_bias_terms.py and test_warm_start_command.py.
ELSEWHERE = {"--task-file", "--list-bias-terms", "--start-from", "--evaluate-only"}
RUN_GLUE = [line for line in RUN_GLUE if not ELSEWHERE & {*line.split()}]


@pytest.mark.parametrize("command", RUN_GLUE)
def test_run_glue_commands(command, small, tmp_path, monkeypatch, modern):
    command = command.replace("answerdotai/ModernBERT-base", str(modern["modernbert"]))
    command = command.replace("minilm", str(TINY_BERT))
    words = shlex.split(command.replace("bert-base-cased", str(TINY_BERT)).split("run_glue.py")[1])
    words[words.index("--output-path") + 1] = str(tmp_path / "out")
    monkeypatch.chdir(ROOT)
    more = ["--epochs", "4"] if "--halving" in words else []
    assert run_glue.main([*words, *small, *more]) == 0
    args = flags.parse_args("", words)
    result = "results.csv" if flags.count_runs(vars(args)) > 1 else "metrics.json"
    assert (tmp_path / "out" / result).exists()


def test_the_torchrun_command(quick_python, small, tmp_path):
    (command,) = plain("torchrun ")
    words = shlex.split(command.replace("bert-base-cased", str(TINY_BERT)))
    words[words.index("--output-path") + 1] = str(tmp_path / "out")
    result = subprocess.run(
        [*words, *small], cwd=ROOT, env=active_environment(), capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert len((tmp_path / "out/results.csv").read_text().splitlines()) == 1 + 4


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


def test_the_python_example(tmp_path, monkeypatch, capsys):
    (block,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    monkeypatch.chdir(ROOT)
    exec(block.replace('"out/', f'"{tmp_path}/out/'), {})
    assert "Accuracy" in capsys.readouterr().out
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
