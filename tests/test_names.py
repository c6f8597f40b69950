"""Names of files and folders that mean something elsewhere: to a terminal, HTML, LaTeX, a plot."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import compare
import deltas
import paper
import predict
import pytest
from conftest import GLUE, ROOT, TINY_BERT, forbid_loading
from pictures import real_pictures

import run_glue
from bitfit import output_paths
from bitfit.artifacts import model_card
from bitfit.results import escape
from glue_evaluator import GLUEvaluator
from utils import UserError

SMALL = ["-d", "cpu", "-e", "1", "--train-size", "8", "--data-dir", str(GLUE)]
MAINS = {
    "run_glue.py": (run_glue.main, ["-t", "rte", "-f", "frozen", "-o", "out", *SMALL, "-m"]),
    "predict.py": (predict.main, []),
    "compare.py": (compare.main, []),
    "deltas.py": (deltas.main, ["show"]),
    "paper.py": (paper.main, ["report", "-o"]),
}
ODD = "<img src=x onerror=alert(1)> _a_&b|c%d$e$f#g{h}~^`i`"  # a model folder


def flags(output, *more, model=TINY_BERT, task="rte", kind="bitfit"):
    return ["-o", str(output), "-t", task, "-f", kind, "-m", str(model), *SMALL, *more]


def refused(main, argv, capsys):
    """The one line with which a program refuses its arguments."""
    capsys.readouterr()
    try:
        status = main(argv)
    except SystemExit as stop:
        status = stop.code
    captured = capsys.readouterr()
    assert status == 2, captured.err
    assert captured.err.count("\n") == 1, captured.err
    assert captured.out == ""
    assert captured.err.isascii()
    return captured.err


@pytest.mark.parametrize("program", MAINS)
@pytest.mark.parametrize("name", ["a\nb", "a\x1b[2Jb", "a\tb", "a\udcffb", "a\rb"])
def test_control_characters_are_refused(program, name, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main, argv = MAINS[program]
    message = refused(main, [*argv, name], capsys)
    assert message.startswith(f"{program}: error: the argument 'a\\")
    assert "has control characters, or bytes that are not UTF-8" in message
    assert os.listdir(tmp_path) == []


def test_bytes_that_are_not_utf8_are_refused(tmp_path):
    command = [sys.executable, "run_glue.py", *flags(tmp_path / "out")]
    result = subprocess.run([*command, b"--model-name=m\xff"], cwd=ROOT, capture_output=True)
    assert result.returncode == 2
    assert result.stderr.count(b"\n") == 1
    assert rb"m\udcff" in result.stderr


def test_in_python_too_a_message_is_one_line(tmp_path):
    with pytest.raises(UserError) as error:
        GLUEvaluator("rte", str(tmp_path / "a\nb"), None, data_dir=GLUE).preprocess_dataset(
            "longest", 16, 8
        )
    assert "a\\nb" in str(error.value)
    assert "\n" not in str(error.value)


# Places that cannot be: noticed before anything is loaded


def dangling(folder):
    (folder / "link").symlink_to("nowhere")
    return folder / "link"


PLACES = {
    "link to nowhere": dangling,
    "below a link to nowhere": lambda folder: dangling(folder) / "below",
    "256 characters": lambda folder: folder / ("n" * 256),
    "256 characters, below": lambda folder: folder / "new" / ("n" * 256) / "below",
    "5000 characters": lambda folder: folder / "/".join(["n" * 99] * 50),
    "loop of links": lambda folder: ((folder / "loop").symlink_to("loop"), folder / "loop")[1],
    "below a file": lambda folder: ((folder / "file").write_text(""), folder / "file" / "x")[1],
}


@pytest.mark.parametrize("place", PLACES)
def test_an_output_path_that_cannot_be(tmp_path, place, capsys, monkeypatch):
    path = str(PLACES[place](tmp_path))
    before = sorted(tmp_path.rglob("*"))
    forbid_loading(monkeypatch)
    assert "--output-path" in refused(run_glue.main, flags(path), capsys)
    assert "--output-path" in refused(run_glue.main, flags(path, "--resume"), capsys)
    assert "--output-path" in refused(deltas.main, ["apply", "e", "-o", path], capsys)
    assert "--output-path" in refused(deltas.main, ["average", "e", "f", "-o", path], capsys)
    plan = ["plan", "-o", path, "--tables", "2", "--models", "nowhere/"]
    assert "--output-path" in refused(paper.main, plan, capsys)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_name_of_255_characters_can_be(tmp_path):
    output_paths.check_writable(tmp_path / ("n" * 255))


@pytest.mark.parametrize("name", ["n" * 256 + ".csv", "folder.csv", "nowhere/x.csv", "x.txt"])
def test_a_file_that_cannot_be(tmp_path, name, capsys):
    (tmp_path / "folder.csv").mkdir()
    argv = ["show", "nowhere", "--csv", str(tmp_path / name)]
    assert "argument --csv" in refused(deltas.main, argv, capsys)


@pytest.mark.parametrize("program", MAINS)
def test_a_name_that_is_too_long_to_read(program, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main, argv = MAINS[program]
    refused(main, [*argv, "n" * 256], capsys)


# Names in what is written


def test_escapes():
    assert escape.markdown("<a> _b_ c_d|`$#") == r"&lt;a&gt; \_b\_ c_d\|\`\$\#"
    assert escape.markdown_code("tiny_bert") == "`tiny_bert`"
    assert escape.latex("a_b&c 1 ± 2 <x>\\") == (
        r"a\_b\&c 1 $\pm$ 2 \textless{}x\textgreater{}\textbackslash{}"
    )
    assert escape.plot("_a$b$") == r" _a\$b\$"


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """Two runs of a model in an oddly named folder, with all that a run can leave."""
    folder = tmp_path_factory.mktemp("odd")
    shutil.copytree(TINY_BERT, folder / ODD)
    output = folder / "$a$ _b"
    argv = flags(output, "--save-evaluator", "--export-model", "-s", "0", "1", model=folder / ODD)
    assert run_glue.main(argv) == 0
    return output


def test_a_card(sweep):
    (text, _) = ((run / "model" / "README.md").read_text() for run in sorted(sweep.glob("lr*")))
    body = text.split("\n---\n", 1)[1].split("## To load it")[0]
    assert "<img" not in body
    assert "# &lt;img src=x onerror=alert(1)&gt; \\_a\\_&amp;b\\|c%d\\$e\\$f\\#g" in body
    card = model_card.title(json.loads((sweep / "lr0.001_seed0/metrics.json").read_text()),
                       {"model_name": f"/{ODD}"})  # fmt: skip
    assert card.startswith("<img")


def texts_of(monkeypatch, module, work):
    """What the pictures of some work show, once they are drawn."""
    from matplotlib.text import Text

    figures = []
    monkeypatch.setattr(module, "save_figure", lambda figure, path: figures.append(figure))
    work()
    with real_pictures():
        for figure in figures:
            figure.canvas.draw()
    return [t for figure in figures for t in figure.findobj(Text)]


def shown_plainly(text):
    """Whether a text of a picture is drawn as it is, without a formula."""
    return not text.get_parse_math() or not re.search(r"(?<!\\)\$", text.get_text())


def test_pictures(sweep, tmp_path, monkeypatch, capsys):
    runs = [str(run) for run in sorted(sweep.glob("lr*"))]
    other = tmp_path / "$x$"
    assert run_glue.main(flags(other, model=TINY_BERT)) == 0
    plot = ["--plot", str(tmp_path / "x.png")]
    texts = texts_of(monkeypatch, compare.plots, lambda: compare.main([*runs, str(other), *plot]))
    assert sum("<img" in text.get_text() for text in texts) >= 1
    assert all(map(shown_plainly, texts))
    members = [str(shutil.copytree(run, tmp_path / name / f"$_{name}$"))
               for run, name in zip(runs, "ab", strict=True)]  # fmt: skip
    argv = ["compare", *members, *plot]
    texts = texts_of(monkeypatch, deltas_reports(), lambda: deltas.main(argv))
    assert sum("_b" in text.get_text() for text in texts) >= 2
    assert all(map(shown_plainly, texts))


def deltas_reports():
    from bitfit.results import plots

    return plots


def test_a_legend_leaves_no_run_out(sweep, tmp_path, monkeypatch):
    """matplotlib's legends leave out labels that begin with an underscore."""
    for name in ("_a", "b"):
        shutil.copytree(sweep / "lr0.001_seed0", tmp_path / name)
        path = tmp_path / name / "metrics.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"model": f"/{name}"}))
    argv = [str(tmp_path / name) for name in ("_a", "b")] + ["--plot", str(tmp_path / "x.png")]
    texts = texts_of(monkeypatch, compare.plots, lambda: compare.main(argv))
    assert any(text.get_text().strip().startswith("_a, bitfit") for text in texts)


def test_a_study(tmp_path, monkeypatch, capsys):
    shutil.copytree(TINY_BERT, tmp_path / ODD)
    study = ["-o", str(tmp_path / "study")]
    plan = ["--tables", "3", "--tasks", "rte", "--rows", "bitfit", "--models", str(tmp_path / ODD)]
    plan += ["--seeds", "0", "1", "--learning-rates", "1e-3", "--epochs", "1", "--train-size", "8"]
    assert paper.main(["plan", *study, *plan, "--data-dir", str(GLUE), "--no-predict-test"]) == 0
    monkeypatch.chdir(ROOT)
    command = capsys.readouterr().out.split("$ python run_glue.py ")[1].strip()
    import shlex

    assert run_glue.main([*shlex.split(command), "-d", "cpu"]) == 0
    assert paper.main(["report", *study]) == 0
    for name in ("tables.md", "tables.tex", "report.html"):
        assert "<img src=x" not in (tmp_path / "study" / name).read_text(), name
    table = (tmp_path / "study/tables.md").read_text()
    assert "## &lt;img src=x onerror=alert(1)&gt; \\_a\\_&amp;b\\|c%d\\$e" in table
    tex = (tmp_path / "study/tables.tex").read_text()
    name = r"\textless{}img src=x onerror=alert(1)\textgreater{} \_a\_\&b\textbar{}c\%d\$e\$f\#g"
    assert f"\n{name}" in tex
    assert all(line.count("&") - line.count(r"\&") == 1 + ("Avg." in tex)
               for line in tex.splitlines() if line.endswith(r"\\"))  # fmt: skip
    metadata = Path(next((tmp_path / "study").rglob("bitfit/rte/args.json")))
    metadata.write_text(
        json.dumps(json.loads(metadata.read_text()) | {"commit": 7, "precision": []})
    )
    assert paper.main(["report", *study]) == 0
    metadata.write_text(
        json.dumps(json.loads(metadata.read_text()) | {"commit": None, "ranks": "many"})
    )
    assert paper.main(["plan", *study]) == 0
