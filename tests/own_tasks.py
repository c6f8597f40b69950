"""Task files of the docs with made-up data, and small tables in every file format."""

import json
import re

import numpy as np
import pandas as pd
import pytest
from conftest import GLUE, ROOT, TINY_BERT

from bitfit.data import task_files

PAGE = (ROOT / "docs/own-tasks.md").read_text(encoding="utf-8")

SHOWN = [json.loads(block) for block in re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL)]

BOOLQ, CB, SNLI, ON_HUB = SHOWN

SMALL = ["--model-name", str(TINY_BERT), "--gpu-device", "cpu", "--epochs", "1"]

WORDS = (GLUE / "RTE/dev.tsv").read_text(encoding="utf-8").split()


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def made_up(folder, record, labels, rows=24):
    """Rows in SuperGLUE's layout: texts, `idx`, and but for the test split `label`."""
    rng = np.random.default_rng(0)
    for split, name in record["files"].items():
        made = []
        for idx in range(rows):
            row = {text: " ".join(rng.choice(WORDS, 9)) for text in record["texts"]} | {"idx": idx}
            made.append(row | ({} if split == "test" else {"label": labels[idx % len(labels)]}))
        write_rows(folder / name, made)


@pytest.fixture
def superglue(tmp_path):
    """The folder of the docs: both records, and rows made up for them."""
    folder = tmp_path / "superglue"
    made_up(folder, BOOLQ, [True, False, True])
    made_up(folder, CB, ["contradiction", "entailment", "neutral"])
    for record in (BOOLQ, CB):
        (folder / f"{record['name']}.json").write_text(json.dumps(record))
    return folder


def flags(output, file, *more, kind="bitfit"):
    return ["-o", str(output), "--task-file", str(file), "-f", kind, *SMALL, *more]


def predicted(path):
    table = pd.read_csv(path, sep="\t", dtype=str, keep_default_na=False)
    assert list(table.columns) == ["index", "prediction"]
    assert table["index"].tolist() == [str(i) for i in range(len(table))]
    return table["prediction"]


def frames(folder, frame):
    """The same table in each format; what GLUE's TSV cannot hold is not in it."""
    frame.to_csv(
        folder / "x.tsv", sep="\t", index=False, quoting=3, escapechar=None, quotechar="\0"
    )
    frame.to_csv(folder / "x.csv", index=False)
    frame.to_parquet(folder / "x.parquet")
    write_rows(folder / "x.jsonl", frame.to_dict("records"))


def task_with(**changes):
    """The Task of a record with one text, its files in `x.<ending>` but for the changes."""
    record = {"name": "own", "texts": ["text"], "labels": [0, 1], "metrics": ["Accuracy"],
              "files": {"train": "x.jsonl", "validation": "x.jsonl"}} | changes  # fmt: skip
    record = {key: value for key, value in record.items() if value is not None}
    return task_files.task_of(task_files.validate_record(record, "x"))


NO_GOLD = {"labels": ["no", "yes"], "exclude_labels": ["-", -1, None, ""]}
