"""The zip file for the GLUE server: the eleven files of one model and method, checked first."""

import zipfile
from pathlib import Path

import numpy as np

from bitfit.data.tasks import TASKS
from bitfit.files import atomic_file
from bitfit.model.run import Run
from bitfit.study import cell_states, results
from bitfit.study.cells import Cell, Study, absolute_folder, slug
from utils import UserError

# {file: (number of examples, most frequent training label, or for STS-B the mean score)}
SERVER = {
    "CoLA.tsv": (1063, "1"),
    "SST-2.tsv": (1821, "1"),
    "MRPC.tsv": (1725, "1"),
    "STS-B.tsv": (1379, "2.7"),
    "QQP.tsv": (390965, "0"),
    "MNLI-m.tsv": (9796, "entailment"),
    "MNLI-mm.tsv": (9847, "entailment"),
    "QNLI.tsv": (5463, "entailment"),
    "RTE.tsv": (3000, "entailment"),
    "WNLI.tsv": (146, "0"),
    "AX.tsv": (1104, "entailment"),
}
OWNER = {name: task for task in TASKS.values() for name in task.server_files.values()}


def write_submission(
    study: Study, model: str, row: str, path: Path, placeholder: bool = False
) -> list[str]:
    """Write the zip file and return one line of text for each file in the zip.

    For each task, the validation scores of the last epoch choose the run: first the learning rate
    with the best mean over seeds, then the best of its seeds.

    Raises:
        UserError: files are missing without `placeholder`, or one has not the server's examples.
    """
    winners = best_run_folders(study, model, row)
    texts, lines, missing, problems = {}, [], [], []
    for name, (rows, majority) in SERVER.items():
        source = winners.get(OWNER[name].name)
        if source and (source / name).exists():
            texts[name] = (source / name).read_text(encoding="utf-8")
            index = [line.split("\t")[0] for line in texts[name].splitlines()]
            if index != ["index", *map(str, range(rows))]:
                problems.append(f"{name} does not have {rows} predictions in order")
            lines.append(f"{name}: {source.relative_to(study.output)}")
        else:
            missing.append(name)
            texts[name] = "index\tprediction\n" + "".join(f"{i}\t{majority}\n" for i in range(rows))
            lines.append(f"{name}: NOT PREDICTED, {majority!r} for every example")
    if missing and not placeholder:
        advice = "run their cells with test predictions, or give --placeholder-missing"
        raise UserError(f"no predictions for {', '.join(missing)}: {advice}")
    if len(missing) == len(SERVER):
        raise UserError(f"{row} has no predictions at all: `plan` gives them to full_ft and bitfit")
    if problems:
        advice = "the server has the test examples of GLUE's own files"
        raise UserError(f"the server would reject this: {'; '.join(problems)}: {advice}")
    with atomic_file(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        for name, text in texts.items():
            archive.writestr(zipfile.ZipInfo(name), text, zipfile.ZIP_DEFLATED)
    return lines


def best_run_folders(study: Study, model: str, row: str) -> dict[str, Path | None]:
    """Return {task: folder of the best run}; UserError if no cell is planned for the row."""
    name = slug(absolute_folder(model))
    folders = {
        cell.task: best_run_folder(study, cell)
        for cell in sorted(study.cells, key=lambda cell: not cell.start)  # the last one counts
        if (slug(cell.model), cell.row, cell.size) == (name, row, None)
    }
    if not folders:
        known = {f"{slug(cell.model)} {cell.row}" for cell in study.cells if cell.size is None}
        planned = ", ".join(sorted(known))
        raise UserError(f"no cells are planned for {model} {row}; planned: {planned}")
    return folders


def best_run_folder(study: Study, cell: Cell) -> Path | None:
    """Return the folder of the best run of a finished cell, or None."""
    is_done = cell_states.cell_state(study, cell) == "done"
    if not is_done or not (found := results.read_results(study, cell)):
        return None
    split = found.task.validation_splits[0]
    selected = results.select(found, split)["last"]
    if not selected.choices:
        return None
    seed = cell.seeds[int(np.nanargmax(selected.values))]
    run = Run(cell.rates[selected.choices[0].rate], seed)
    return cell.folders(study.output)[run]
