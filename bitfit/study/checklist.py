"""The reproducibility checklist of ACL Rolling Review (ARR), filled in from a study's files."""

from pathlib import Path

import pandas as pd

from bitfit.files import write_text
from bitfit.results.scores import read_metrics
from bitfit.study import cell_states, cost, report, tables
from bitfit.study.cell_tasks import task_of
from bitfit.study.cells import Cell, Study
from bitfit.versions import installed_version
from utils import UserError

FILE = "checklist.md"
OPEN = "please fill in"
INTRODUCTION = f"Items with `{OPEN}` need your answer. The others come from the study's files."
RESULTS_NOTE = (
    "Mean ± sample standard deviation over the seeds, × 100, on the validation examples. `split` "
    "chooses learning rate and epoch on one half and scores on the other, and the other way "
    "round; the settings are its two choices. A trial is a run at one epoch.\n\n"
)
# The questions of each section of ARR's checklist that no file of a study answers.
QUESTIONS = {
    "A. Every submission": ["A1: the limitations", "A2: the potential risks"],
    "B. Artifacts": [
        "B1: the citations of models, data and code",
        "B2: the licenses or terms of use of models, data and code",
        "B3: whether the use is consistent with the intended use",
        "B4: whether the data contain personal information or offensive content",
        "B5: the languages and domains of the data",
        "B6: which examples were excluded or preprocessed, and how the splits were made",
    ],
    "C. Experiments": [
        "C1: the model and number of the CPUs or GPUs, and their memory",
        "C1: the hours of other runs, such as failed and preliminary ones",
        "C2: how the bounds of the search were chosen, and the values of other methods",
    ],
    "D. and E. People and assistants": [
        "D: instructions, payment, consent and review board, if people annotated data",
        "E: how AI assistants were used",
    ],
}


def check_new(study: Study) -> None:
    """Raise a UserError if there is a checklist, which may have answers of a person."""
    if (study.output / FILE).exists():
        raise UserError(f"--checklist: {study.output / FILE} exists: rename it to keep its answers")


def write_checklist(study: Study) -> Path:
    """Write checklist.md from the files of the cells and the report's tables.csv."""
    texts = {"learning_rate": str, "epoch": str}
    scores = pd.read_csv(study.output / "tables.csv", dtype=texts).fillna(dict.fromkeys(texts, ""))
    settings = pd.DataFrame([cell_settings(study, cell) for cell in study.cells])
    tasks = {cell.task: task_of(cell.args) for cell in study.cells}
    metrics = [f"{task.name}: {', '.join(task.metrics)}" for task in tasks.values()]
    packages = [f"{name} {installed_version(name)}" for name in ("numpy", "scipy", "scikit-learn")]
    machine = [*report.machine(study), f"this report: {', '.join(packages)}"]
    sections = {
        "Parameters, search bounds, seeds and hours (C1, C2)": report.pipes(settings),
        "Budget, hardware and versions (C1, C4)": report.markdown_list(machine),
        "Trials, best settings and results (C2, C3)": RESULTS_NOTE
        + report.pipes(tables.selection_table(scores)),
        "Metrics, of which the first selects (C4)": report.markdown_list(metrics),
        "Sizes and labels of the splits (B6)": report.pipes(report.data_table(study)),
    }
    for section, questions in QUESTIONS.items():
        sections[section] = "\n".join(f"- [ ] {OPEN}: {question}" for question in questions)
    parts = ["# Reproducibility checklist", report.progress(study), INTRODUCTION]
    parts += [f"## {title}\n\n{text}" for title, text in sections.items()]
    write_text(study.output / FILE, "\n\n".join(parts) + "\n")
    return study.output / FILE


def cell_settings(study: Study, cell: Cell) -> dict[str, str]:
    """Return the row of a cell in the table of settings; only a finished cell has all values."""
    measured = dict.fromkeys(("trained parameters", "all parameters", "hours", "devices"), OPEN)
    seconds = cost.training_seconds(study, cell)
    if seconds is not None:
        content = read_metrics(next(iter(cell.folders(study.output).values())))[0]
        metadata = cell_states.read_cell_args(study, cell) or {}
        measured = {
            "trained parameters": f"{content['trained_parameters']:,}",
            "all parameters": f"{content['all_parameters']:,}",
            "hours": f"{seconds / 3600:.3f}",
            "devices": f"{metadata.get('ranks', 1)} × {metadata.get('device')}",
        }
    names = "epochs", "batch_size", "optimizer", "lr_schedule", "warmup_ratio", "max_seq_length"
    return {
        "cell": cell.name, "learning rates": " ".join(f"{rate:g}" for rate in cell.rates),
        "seeds": " ".join(map(str, cell.seeds)), "runs": str(cell.runs),
        "training examples": str(cell.args["train_size"] or "all"),
        **{name.replace("_", " "): str(cell.args[name]) for name in names}, **measured,
    }  # fmt: skip
