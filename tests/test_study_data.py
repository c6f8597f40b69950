"""The report's table of the data, from the args.json of cells."""

import json

from bitfit.study import cell_states, report


def test_the_report_has_the_size_and_labels_of_each_split(study):
    splits = {
        "train": {"examples": 24, "labels": {"entailment": 11, "not_entailment": 13}},
        "validation": {"examples": 2, "scores": {"mean": 2.5, "min": 0.0, "max": 5.0}},
        "test": {"sentences": 2, "rows": 3, "words": 9},
    }
    for cell in study.cells:
        folder = cell_states.cell_folder(study, cell)
        folder.mkdir(parents=True)
        (folder / "args.json").write_text(json.dumps({"splits": splits}))
    table = report.data_table(study)
    assert table.to_numpy().tolist() == [
        ["rte", "train", "examples 24", "entailment 11, not_entailment 13"],
        ["rte", "validation", "examples 2", "mean 2.5, min 0.0, max 5.0"],
        ["rte", "test", "sentences 2, rows 3, words 9", ""],
    ]
    assert "entailment 11, not_entailment 13" in report.html_table(table)
    args = {"splits": splits, "train_size": 12}
    (folder / "args.json").write_text(json.dumps(args))
    splits_of_sample = report.data_table(study)["split"]
    assert splits_of_sample.tolist()[-1] == "train (drawn by any seed)"
    (folder / "args.json").write_text(json.dumps({"splits": {"train": 3}}))
    assert len(report.data_table(study)) == 4


def test_cells_of_earlier_versions_have_no_such_table(study):
    assert report.data_table(study).empty
