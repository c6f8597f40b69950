"""What a run says while it trains, and what it says of itself."""

import io
import os
import re
import shlex
import subprocess
import sys
from types import SimpleNamespace

import pytest
from conftest import GLUE, ROOT, TINY_BERT
from quick_python import run_script
from test_train import new_model, new_state, tokens_of

import run_glue
from bitfit import options
from bitfit.data.tasks import TASKS
from bitfit.distributed import SINGLE_PROCESS
from bitfit.model.trainable import select_trainable
from bitfit.training import loop, progress
from bitfit.training.checkpoints import CheckpointManager
from bitfit.training.plan import Plan, TrainOptions

FLAGS = ["-t", "rte", "-f", "bitfit", "-m", str(TINY_BERT), "--data-dir", str(GLUE), "-s", "0", "1",
         "--epochs", "2", "--train-size", "24", "--gpu-device", "cpu"]  # fmt: skip


def test_a_log_file_gets_a_line_now_and_then(tmp_path, monkeypatch, caplog, capfd):
    """Standard error is no terminal here: no bar, and nothing that only a terminal understands."""
    monkeypatch.setattr(progress, "LOG_SECONDS", 0)
    monkeypatch.setattr(loop, "READ_LOSS_SECONDS", 0)
    with caplog.at_level("INFO", "bitfit"):
        assert run_glue.main(["-o", str(tmp_path / "out"), *FLAGS]) == 0
    lines = [text for text in caplog.messages if " left" in text]
    assert len(lines) == 2 * 3  # a line for each step, as often as it looked
    form = r"epoch {}/2  loss \d\.\d{{3}}  {}step {}/3  \d+ ex/s  \d\d:\d\d left"
    assert re.fullmatch(form.format(1, "", 1), lines[0])
    assert re.fullmatch(form.format(2, r"best \d+\.\d  ", 3), lines[-1])
    assert lines[-1].endswith("00:00 left")
    message = "".join(capfd.readouterr())
    assert "\r" not in message and "\x1b" not in message


class SlowClock:
    """A clock that goes on by 0.04 seconds whenever it is read."""

    seconds = 0.0

    def __call__(self):
        self.seconds += 0.04
        return self.seconds


def test_short_epochs_are_looked_at_too(tiny_bert):
    """The time between two looks is longer than an epoch of three steps."""
    model = new_model(tiny_bert)
    state = new_state(model, tokens_of(tiny_bert), select_trainable(model, "frozen"))
    bar = progress.Progress(state.plan, shows=False, clock=SlowClock())
    looks = []
    for _ in range(8):
        before = bar.read_at
        with state.stack.patched():
            loop.train_epoch(state, CheckpointManager(), bar)
        state.epoch, state.step = state.epoch + 1, 0
        looks.append(bar.read_at > before)
    assert any(looks) and not all(looks)


def test_lines_are_minutes_apart(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(loop, "READ_LOSS_SECONDS", 0)
    with caplog.at_level("INFO", "bitfit"):
        assert run_glue.main(["-o", str(tmp_path / "out"), *FLAGS]) == 0
    assert not [text for text in caplog.messages if " left" in text]


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("shows", [True, False])
def test_a_terminal_gets_a_bar(monkeypatch, shows):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    split = SimpleNamespace(rows_of_seed={0: range(50)})
    plan = Plan(TASKS["rte"], None, split, {}, None, TrainOptions(10, 4), group=SINGLE_PROCESS)
    scores = [("a", 1, "validation", "Accuracy", 0.5), ("b", 1, "validation", "Accuracy", 0.625),
              ("b", 1, "train", "Accuracy", 0.9)]  # fmt: skip
    state = SimpleNamespace(plan=plan, epoch=1, step=2, scores=scores)
    bar = progress.Progress(plan, runs=3, done=150, shows=shows)
    with bar.shown():
        bar.show(state, loss=0.25)
        bar.update(60)
        bar.bar.refresh()
    last = terminal.getvalue().split("\r")[-1]
    if shows:
        assert "rte, 3 runs:  35%" in last and " 210/600 [" in last
        assert "epoch=2/4, loss=0.250, best=62.5]" in last
    else:
        assert terminal.getvalue() == ""


def test_quiet_says_the_results_alone(quick_python, tmp_path):
    result = run_script("run_glue.py", "-o", str(tmp_path / "out"), *FLAGS, "--quiet")
    assert (result.returncode, result.stderr) == (0, "")
    assert "best of 2 trials" in result.stdout


def test_versions(capsys):
    with pytest.raises(SystemExit) as stop:
        run_glue.main(["--version"])
    assert stop.value.code == 0
    output = capsys.readouterr().out
    assert re.fullmatch(r"run_glue.py: commit \w+, torch [\d.+a-z]+, transformers .*\n", output)


def test_the_examples_of_the_help_are_good():
    help_text = options.make_parser("").format_help()
    examples = re.findall(r"^  python run_glue.py (.*)$", help_text, re.MULTILINE)
    assert len(examples) == 5
    assert all(options.parse_args("", shlex.split(words)) for words in examples)
    assert max(map(len, help_text.splitlines())) <= 100


def test_a_shell_completes_words(tmp_path):
    """As bash asks, through argcomplete."""
    pytest.importorskip("argcomplete")
    line, told = "run_glue.py --fine-tune-type rand_u", tmp_path / "told"
    asked = {"_ARGCOMPLETE": "1", "COMP_LINE": line, "COMP_POINT": str(len(line)),
             "_ARGCOMPLETE_STDOUT_FILENAME": str(told), "COMP_TYPE": "9"}  # fmt: skip
    subprocess.run([sys.executable, "run_glue.py"], cwd=ROOT, env=os.environ | asked)
    assert told.read_text().split() == ["rand_uniform"]
    assert "PYTHON_ARGCOMPLETE_OK" in (ROOT / "run_glue.py").read_text()[:1024]
