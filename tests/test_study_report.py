"""The study's results, report and submission, from a small study that was run."""

import html
import json
import re
import shutil
import zipfile
from types import SimpleNamespace

import numpy as np
import pandas as pd
import paper
import pytest
from conftest import GLUE, TINY_BERT

import run_glue
from bitfit.data.tasks import TASKS
from bitfit.results import sweeps
from bitfit.results.scores import read_metrics
from bitfit.study import (
    cell_states,
    cells,
    figures,
    published,
    report,
    results,
    statistics,
    submit,
    tables,
)
from bitfit.study.cell_tasks import task_of
from utils import UserError

MODEL = str(TINY_BERT)


@pytest.fixture(scope="module")
def made(few_glue, tmp_path_factory):
    """Two rows on two tasks, one more row on one, and a train-size curve."""
    output = tmp_path_factory.mktemp("study") / "toy"
    common = ["--models", MODEL, "--data-dir", str(few_glue), "--epochs", "3", "--seeds", "0", "1",
              "2"]  # fmt: skip
    rates = ["--learning-rates", "1e-3,3e-3", "full_ft=1e-4,3e-4"]
    table = ["--tables", "3", "--tasks", "cola", "mnli", "--rows", "bitfit", "full_ft",
             "--train-size", "60"]  # fmt: skip
    more = ["--tables", "3", "--tasks", "cola", "--rows", "b_m2+b_q", "--train-size", "60"]
    curve = ["--figures", "2", "--tasks", "cola", "--sizes", "20", "40"]
    for words in (table, more, curve):
        assert paper.main(["plan", "--output-path", str(output), *common, *rates, *words]) == 0
    study = cells.read_study(output)
    for cell in study.cells:
        assert run_glue.main(cell.command(output)[2:]) == 0
    return study


@pytest.fixture(scope="module")
def entries(made):
    return results.read_entries(made)


@pytest.fixture
def study(made, tmp_path):
    """A copy, to write into."""
    shutil.copytree(made.output, tmp_path / "toy")
    return made._replace(output=tmp_path / "toy")


def test_last_and_best_are_those_of_the_sweep(made, entries):
    for (_, row, column, size), entry in entries.items():
        if column == "MNLI-mm":
            continue
        folder = made.output / entry.results.cell.name
        table = pd.read_csv(folder / "results.csv").groupby("learning_rate")
        for selection in ("last", "best"):
            expected = table[selection].mean().max()
            found = 100 * entry.selected[selection].values.mean()
            assert found == pytest.approx(expected, abs=0.01), (row, column, size, selection)


def test_the_split_is_scored_where_it_was_not_chosen(entries):
    entry = entries[MODEL, "bitfit", "CoLA", None]
    one, two = entry.selected["split"].choices
    assert not set(one.rows) & set(two.rows)
    assert len(one.rows) + len(two.rows) == len(entry.results.labels["validation"])


def test_the_frame_has_all_columns_and_selections(entries):
    frame = results.score_frame(entries)
    assert set(frame["column"]) == {"CoLA", "MNLI-m", "MNLI-mm"}
    assert (frame.groupby(["row", "column", "train_size"], dropna=False).size() == 3).all()
    assert set(frame["seeds"]) == {3}
    assert set(frame["trials"]) == {2 * 3 * 3}
    assert frame["published"].isna().all()
    assert (frame["low"] <= frame["mean"]).all()


def test_differences_are_paired_and_pooled(entries):
    frame = results.comparisons(entries, np.random.default_rng(0), resamples=50)
    pairs = frame[(frame["a"] == "bitfit") & (frame["b"] == "full_ft")].set_index("column")
    assert list(pairs.index) == ["MNLI-m", "MNLI-mm", "CoLA", "all"]
    one, two = (
        entries[MODEL, row, "CoLA", None].selected["split"] for row in ("bitfit", "full_ft")
    )
    assert pairs["difference"]["CoLA"] == pytest.approx(100 * (one.values - two.values).mean())
    mnli = pairs["difference"][["MNLI-m", "MNLI-mm"]].mean()
    assert pairs["difference"]["all"] == pytest.approx((mnli + pairs["difference"]["CoLA"]) / 2)
    assert list(pairs["least_p"]) == [statistics.least_p(n) for n in (3, 3, 3, 6)]
    assert (frame["p_holm"] >= frame["p"]).all()
    assert (frame["low"] <= frame["high"]).all()


def entry_of(task, column, right):
    """An entry of one rate, epoch and ten rows, of which seeds know all or none: right (S,)."""
    split = next(
        s for s, columns in results.table_columns(TASKS[task]).items() if columns == column
    )
    logits = np.zeros((1, len(right), 1, 10, TASKS[task].num_labels), np.float32)
    logits[0, :, 0, :, 0] = np.where(right, 1, -1)[:, None]
    flags = {"task_name": task, "task_file": None}
    cell = SimpleNamespace(args=flags, seeds=list(range(len(right))), rates=[1e-3])
    made = results.Results(cell, "done", {split: logits}, {split: np.zeros(10, int)}, None)
    return results.Entry(column, made, split, results.select(made, split))


def test_columns_of_the_same_runs_are_resampled_together():
    """On MNLI each seed knows one of the two sets, so that the mean of both is the same for all."""
    known = {"MNLI-m": [1, 0, 1, 0], "MNLI-mm": [0, 1, 0, 1], "SST-2": [1, 1, 1, 1]}
    entries = {}
    for column, right in known.items():
        task = "sst2" if column == "SST-2" else "mnli"
        other = right if column == "SST-2" else [0] * 4
        entries["m", "bitfit", column, None] = entry_of(task, column, right)
        entries["m", "full_ft", column, None] = entry_of(task, column, other)
    frame = results.comparisons(entries, np.random.default_rng(0), 500).set_index("column")
    assert frame.loc["MNLI-m", "high"] > 90
    assert frame.loc["all", ["difference", "low", "high"]].tolist() == pytest.approx([25] * 3)
    # Pooled rows are corrected among themselves.
    assert frame.loc["all", "p_holm"] == frame.loc["all", "p"] < 0.2
    columns = frame.drop(index="all")
    assert columns["p_holm"].tolist() == statistics.holm(columns["p"]).tolist()


def test_the_gap_is_that_of_the_metrics(made, entries):
    gaps = results.train_gaps(entries).set_index(["row", "column"])
    entry = entries[MODEL, "full_ft", "CoLA", None]
    rate = entry.results.cell.rates[entry.selected["last"].choices[0].rate]
    metadata = [
        read_metrics(folder)[0]
        for run, folder in entry.results.cell.folders(made.output).items()
        if run.learning_rate == rate
    ]
    expected = [f["last"]["train"]["MCC"] - f["last"]["validation"]["MCC"] for f in metadata]
    assert gaps.loc[("full_ft", "CoLA"), "gap"] == pytest.approx(100 * np.mean(expected))


def test_warnings_about_the_search_are_those_of_the_sweeps(made, entries):
    """Each command of the study prints them, about its learning rates and epochs."""
    expected = set()
    for cell in made.cells:
        frames = sweeps.read_sweep(cell.folders(made.output))
        groups = sweeps.scores_by_learning_rate(*frames, task_of(cell.args))
        expected |= {(cell.name, warning) for warning in sweeps.sweep_warnings(groups)}
    found = list(results.search_warnings(entries).itertuples(index=False, name=None))
    assert len(found) == len(expected) and set(found) == expected
    assert {warning.split()[1] for _, warning in expected} == {"best", "scores"}  # both kinds


def test_trials_are_counted_in_whole_numbers(made, entries):
    found = figures.all_figures(made, entries)
    (axes,) = next(figure for name, (figure, _) in found.items() if name.startswith("trials")).axes
    assert axes.get_xscale() == "log"
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1", "2", "5", "10"]
    assert "bitfit (18 trials)" in [line.get_label() for line in axes.get_lines()]


@pytest.mark.pictures
def test_no_text_of_a_figure_is_cut_off(made, entries):
    one_task = {key: entry for key, entry in entries.items() if key[2] == "CoLA"}
    for name, (figure, _) in figures.all_figures(made, one_task).items():
        figure.canvas.draw()
        drawn, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
        assert 0 <= drawn.x0 < drawn.x1 <= width and 0 <= drawn.y0 < drawn.y1 <= height, name


def test_figure_1_is_the_mean_over_the_seeds(made, entries):
    entry = entries[MODEL, "bitfit", "CoLA", None]
    rate = entry.results.cell.rates[entry.selected["last"].choices[0].rate]
    found = results.bias_changes(made, entry)
    assert found
    changes, seeds = found
    assert seeds == 3
    tables = [pd.read_csv(made.output / entry.results.cell.name / f"lr{rate}_seed{seed}" /
                          "bias_term_changes.csv", index_col="term")
              for seed in range(3)]  # fmt: skip
    expected = np.mean([table.loc[changes.index].to_numpy() for table in tables], axis=0)
    assert np.allclose(changes.to_numpy(), expected, equal_nan=True)
    assert list(changes.index[changes.isna().all(axis=1)]) == ["attention.self.key.bias"]
    assert changes.sum(axis=1).is_monotonic_decreasing


def test_the_report_is_whole(study, capsys):
    shown = report.write_report(study, resamples=20, formats=["svg"], halvings=[1])
    for text in ("BitFit", "Full-FT", "seeds needed", "P(a > b)", "resampled is how"):
        assert text in shown
    page = (study.output / "report.html").read_text(encoding="utf-8")
    assert f"{len(study.cells)} of {len(study.cells)} cells are done." in page
    assert "Partial" not in page
    assert not re.search(r"(src|href)=['\"](?!data:)", page)  # needs nothing else
    pictures = set(figures.all_figures(study, results.read_entries(study)))
    files = {path.name for path in (study.output / "figures").iterdir()}
    assert files == {name + suffix for name in pictures for suffix in (".png", ".svg")}
    assert page.count("<img ") == len(pictures)
    for kind in ("figure1", "figure2", "gap", "curves", "trials"):
        assert any(name.startswith(kind) for name in pictures), kind
    commands = re.findall("<pre>(.*?)</pre>", page)
    shown_commands = [html.unescape(re.sub("</?span>", "", command)) for command in commands]
    assert shown_commands == [cell.shell(study.output) for cell in study.cells]
    assert all("<span>--learning-rate</span>" in command for command in commands)  # is not broken
    for text in (published.NOTE, "60 training examples", "<th>P(a &gt; b)</th>", "<th>lost</th>"):
        assert text in page
    halved = pd.read_csv(study.output / "halving.csv")
    assert halved["methods"].notna().sum() == len(study.cells) + 1
    assert (
        halved["saved"].round(4).eq(0.3333).all()
    )  # one of two rates stops after one of three epochs
    assert "| BitFit |" in (study.output / "tables.md").read_text()
    latex = (study.output / "tables.tex").read_text()
    assert latex.count(r"\begin{tabular}") == latex.count(r"\end{tabular}") == 1
    frame = pd.read_csv(study.output / "tables.csv")
    assert set(frame["selection"]) == {"last", "best", "split"}
    assert len(pd.read_csv(study.output / "power.csv").groupby(["a", "b"])) == 3
    # A report without halving does not leave the numbers of this one.
    assert "resampled is how" not in report.write_report(study, resamples=20)
    assert not (study.output / "halving.csv").exists()


def test_published_numbers_stand_beside_ours(entries, monkeypatch):
    """Where all rows were trained on; the paper trained on all."""
    rows = {"bitfit": (99.9, 0.1), "full_ft": (0.0, 200.0)}
    numbers = {("tiny_bert", row, "CoLA"): of for row, of in rows.items()}
    monkeypatch.setattr(results, "PUBLISHED", numbers)
    kept = {k: e for k, e in entries.items() if k[1] in rows and k[2:] == ("CoLA", None)}
    table = tables.headline_tables(results.score_frame(kept))["tiny_bert"]
    assert "(" not in table["CoLA (MCC)"]["BitFit"]
    for key, entry in kept.items():
        flags = [f for f in entry.results.cell.flags if f not in ("--train-size", "60")]
        copied = entry.results._replace(cell=entry.results.cell._replace(flags=flags))
        kept[key] = entry._replace(results=copied)
    table = tables.headline_tables(results.score_frame(kept))["tiny_bert"]
    assert table["CoLA (MCC)"]["BitFit"].endswith("(99.9 ± 0.1)!")
    assert table["CoLA (MCC)"]["Full-FT"].endswith("(0.0 ± 200.0)")


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_runs_that_diverged_count_nowhere(study):
    """Neither in the headline nor in pictures; a cell in which all did has no score."""
    by_name = {cell.name.split("/", 1)[1]: cell for cell in study.cells}
    for run, folder in by_name["bitfit/cola"].folders(study.output).items():
        if run.seed == 2:
            edit(folder / "metrics.json", diverged="the loss was not finite")
            (folder / "bias_term_changes.csv").write_text("term,1,2\nquery,,\n")
    for folder in by_name["full_ft/cola"].folders(study.output).values():
        edit(folder / "metrics.json", diverged="the loss was not finite")
    found = results.read_entries(study)
    assert np.isnan(found[MODEL, "full_ft", "CoLA", None].selected["best"].values).all()
    moved = results.bias_changes(study, found[MODEL, "bitfit", "CoLA", None])
    assert moved
    changes, seeds = moved
    assert seeds == 2
    assert changes.notna().sum().tolist() == [7, 7, 7]  # all but the key's, which is fixed
    report.write_report(study, resamples=10)
    table = (study.output / "tables.md").read_text()
    assert "(2 of 3 seeds)" in table
    assert "no run counts" in table
    differences = pd.read_csv(study.output / "differences.csv")
    assert "CoLA" not in set(differences.query("b == 'full_ft'")["column"])


def test_what_is_of_another_command_is_left_out(study):
    cell = next(c for c in study.cells if c.name.endswith("/full_ft/cola"))
    edit(study.output / cell.name / "args.json", epochs=7)
    report.write_report(study, resamples=10)
    assert (
        f"Left out, of another command: {cell.name}." in (study.output / "report.html").read_text()
    )
    assert (MODEL, "full_ft", "CoLA", None) not in results.read_entries(study)


def test_a_study_of_figure_2_alone(study):
    curve = [cell for cell in study.cells if cell.size]
    report.write_report(study._replace(cells=curve), resamples=10)
    page = (study.output / "report.html").read_text()
    assert page.count("<img ") == 1
    assert "Figure 2" in page


def test_a_damaged_file_is_named(study):
    path = next(study.output.rglob("validation_logits.safetensors"))
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match="cannot be read"):
        report.write_report(study)


@pytest.mark.parametrize("name", ["validation_logits.safetensors", "metrics.json"])
def test_a_file_of_a_finished_run_that_is_gone_is_named(study, name):
    """Without it the run would count as one that diverged."""
    folder = next(c for c in study.cells if c.name.endswith("/bitfit/cola")).folders(study.output)
    path = [*folder.values()][-1] / name
    path.unlink()
    with pytest.raises(UserError, match=f"cannot be read: No such file or directory: .*{name}"):
        report.write_report(study)


def test_a_partial_study_reports_what_there_is(study):
    by_name = {cell.name.split("/", 1)[1]: cell for cell in study.cells}
    shutil.rmtree(cell_states.cell_folder(study, by_name["full_ft/mnli"]))
    unfinished = cell_states.cell_folder(study, by_name["bitfit/cola"])
    (unfinished / "args.json").unlink()
    shutil.rmtree(unfinished / "lr0.003_seed2")
    report.write_report(study, resamples=10)
    page = (study.output / "report.html").read_text()
    assert "Partial." in page
    assert " ..." in (study.output / "tables.md").read_text()


def test_a_study_without_scores_says_so(study):
    for cell in study.cells:
        shutil.rmtree(cell_states.cell_folder(study, cell))
    with pytest.raises(UserError, match="no scores yet"):
        report.write_report(study)


@pytest.fixture
def server(monkeypatch):
    """The server's files, if it had the toy test sets."""
    toy = {}
    for name, (_, majority) in submit.SERVER.items():
        task = submit.OWNER[name]
        split = next(s for s, file in task.server_files.items() if file == name)
        path = GLUE / ("AX" if name == "AX.tsv" else task.folder) / f"{task.splits[split]}.tsv"
        toy[name] = (path.read_text(encoding="utf-8").count("\n") - 1, majority)
    monkeypatch.setattr(submit, "SERVER", toy)


def test_submission_of_the_winners(study, server, tmp_path):
    path = tmp_path / "all.zip"
    with pytest.raises(UserError, match=r"no predictions for SST-2\.tsv, MRPC\.tsv") as error:
        submit.write_submission(study, MODEL, "bitfit", path)
    assert "CoLA.tsv" not in str(error.value)
    assert not path.exists()
    message = submit.write_submission(study, MODEL, "bitfit", path, placeholder=True)
    assert len(message) == 11
    assert sum("NOT PREDICTED" in line for line in message) == 7
    with zipfile.ZipFile(path) as archive:
        assert archive.namelist() == list(submit.SERVER)
        kept = archive.read("CoLA.tsv").decode()
    cell = next(c for c in study.cells if c.name.endswith("/bitfit/cola"))
    table = pd.read_csv(study.output / cell.name / "results.csv")
    rate = table.groupby("learning_rate")["last"].mean().idxmax()
    best = table[table["learning_rate"] == rate].set_index("run")["last"].idxmax()
    assert kept == (study.output / cell.name / best / "CoLA.tsv").read_text()


@pytest.mark.parametrize(
    "damage",
    [
        lambda lines: lines[:-1],
        lambda lines: ["nothing", *lines[1:]],
        lambda lines: [lines[0], lines[2], lines[1], *lines[3:]],
    ],
)
def test_what_the_server_would_refuse(study, server, tmp_path, damage):
    """It is other than the server's test set, in the order of the test set."""
    cell = next(c for c in study.cells if c.name.endswith("/bitfit/mnli"))
    for path in (study.output / cell.name).glob("*/MNLI-m.tsv"):
        path.write_text("\n".join(damage(path.read_text().splitlines())) + "\n")
    rows, _ = submit.SERVER["MNLI-m.tsv"]
    with pytest.raises(UserError, match=rf"MNLI-m\.tsv does not have {rows} predictions in order"):
        submit.write_submission(study, MODEL, "bitfit", tmp_path / "all.zip", placeholder=True)
    assert not (tmp_path / "all.zip").exists()


def test_a_submission_without_a_prediction_is_refused(study, server, tmp_path):
    with pytest.raises(UserError, match=r"b_m2\+b_q has no predictions at all: `plan` gives"):
        submit.write_submission(study, MODEL, "b_m2+b_q", tmp_path / "all.zip", placeholder=True)
    assert not (tmp_path / "all.zip").exists()


def test_nothing_planned_is_named(study, tmp_path):
    with pytest.raises(UserError, match="b_m2"):
        submit.write_submission(study, MODEL, "frozen", tmp_path / "all.zip")
