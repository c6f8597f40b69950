"""The GLUE server's zip: the eleven files of one model and method, checked before packing."""

import zipfile

import numpy as np

from bitfit.data.tasks import TASKS
from bitfit.model.run_stack import Run
from bitfit.study import ledger, results
from bitfit.study.cells import absolute, slug
from utils import UserError, whole_file

# The server's files: rows, and the most frequent training label (STS-B: the mean score).
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


def write(study, model, row, path, placeholder=False):
    """Write the zip; returns the list of its files, in words.

    Of each task the winner is chosen by validation scores alone: at the last epoch, whose weights
    predict, the learning rate with the best mean over the seeds, and of its seeds the best.

    Raises:
        UserError: files are missing (and `placeholder` is not set), or not as the server wants.
    """
    name = slug(absolute(model))
    winners = {
        cell.task: winner(study, cell)
        for cell in study.cells
        if (slug(cell.model), cell.row, cell.size) == (name, row, None)
    }
    if not winners:
        known = sorted(
            {f"{slug(cell.model)} {cell.row}" for cell in study.cells if cell.size is None}
        )
        raise UserError(f"nothing is planned for {model} {row}; there is: {', '.join(known)}")
    texts, said, missing, wrong = {}, [], [], []
    for name, (rows, majority) in SERVER.items():
        source = winners.get(OWNER[name].name)
        if source and (source / name).exists():
            texts[name] = (source / name).read_text(encoding="utf-8")
            wrong += problems(name, texts[name], rows)
            said.append(f"{name}: {source.relative_to(study.output)}")
        else:
            missing.append(name)
            texts[name] = "index\tprediction\n" + "".join(f"{i}\t{majority}\n" for i in range(rows))
            said.append(f"{name}: NOT PREDICTED, {majority!r} for every row")
    if missing and not placeholder:
        what = "run their cells with test predictions, or give --placeholder-missing"
        raise UserError(f"no predictions for {', '.join(missing)}: {what}")
    if wrong:
        raise UserError(f"the server would not take this: {'; '.join(wrong)}")
    with whole_file(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        for name, text in texts.items():
            archive.writestr(zipfile.ZipInfo(name), text, zipfile.ZIP_DEFLATED)
    return said


def winner(study, cell):
    """The folder of a done cell's best run, or None."""
    found = results.read(study, cell) if ledger.state_of(study, cell) == "done" else None
    if found is None:
        return None
    split = found.task.validation_splits[0]
    selected = results.select(found, split)["last"]
    if not selected.choices:
        return None
    seed = cell.seeds[int(np.nanargmax(selected.values))]
    run = Run(cell.rates[selected.choices[0].rate], seed)
    return cell.folders(study.output)[run]


def problems(name, text, rows):
    """What the server would refuse in a file: [in words]"""
    lines, task = text.removesuffix("\n").split("\n"), OWNER[name]
    if lines[0] != "index\tprediction":
        return [f"{name} has no header"]
    pairs = [line.split("\t") for line in lines[1:]]
    if len(pairs) != rows:
        return [f"{name} has {len(pairs)} rows, not {rows}"]
    if [pair[0] for pair in pairs] != list(map(str, range(rows))):
        return [f"{name} is not numbered from 0"]
    for index, word in pairs:
        if not is_answer(task, word):
            return [f"{name} says {word!r} at {index}"]
    return []


def is_answer(task, word):
    if not task.is_regression:
        return word in task.written_labels
    try:
        return 0 <= float(word) <= 5
    except ValueError:
        return False
