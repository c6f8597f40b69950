import numpy as np
import pandas as pd
import pytest
from conftest import GLUE

from bitfit.sources import read_split
from bitfit.tasks import TASKS
from utils import UserError

RTE = TASKS["rte"]
HEADER = "index\tsentence1\tsentence2\tlabel\n"


def write(folder, name, data):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_every_task_reads_from_the_toy_folders(task):
    for split in ("train", *task.splits):
        texts = read_split(task, split, GLUE)
        assert len(texts) >= 50
        assert len(texts.columns) == len(task.texts)
        labelled = split == "train" or split.startswith("validation")
        assert (texts.labels is not None) == labelled
        if labelled and not task.is_regression:
            assert set(texts.labels) == set(range(task.num_labels))


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_parquet_gives_the_same_as_tsv(task, tmp_path):
    for split in ("train", *task.splits):
        texts = read_split(task, split, GLUE)
        config, stem = ("ax", "test") if split == "ax" else (task.name, split)
        frame = pd.DataFrame(dict(zip(task.texts, texts.columns, strict=True)))
        frame["label"] = -1 if texts.labels is None else texts.labels
        (tmp_path / config).mkdir(exist_ok=True)
        half = len(frame) // 2
        frame[:half].to_parquet(tmp_path / config / f"{stem}-00000-of-00002.parquet")
        frame[half:].to_parquet(tmp_path / config / f"{stem}-00001-of-00002.parquet")
        again = read_split(task, split, tmp_path)
        assert again.columns == texts.columns
        if texts.labels is not None:
            assert np.array_equal(again.labels, texts.labels)


def test_text_that_must_simply_work(tmp_path):
    rows = [
        '0\tHe said "no.\t""\tentailment',
        "1\t\t\tnot_entailment",
        "2\temoji \U0001f600 é\tline\u2028separator\x85 and \x0b\tentailment",
    ]
    data = "\ufeff" + HEADER.replace("\n", "\r\n") + "\r\n".join(rows) + "\r\n"
    write(tmp_path, "RTE/train.tsv", data)
    texts = read_split(RTE, "train", tmp_path)
    first, second = texts.columns
    assert first == ['He said "no.', "", "emoji \U0001f600 é"]
    assert second == ['""', "", "line\u2028separator\x85 and \x0b"]
    assert texts.labels.tolist() == [0, 1, 0]


def test_tabs_inside_parquet_text(tmp_path):
    frame = pd.DataFrame({"sentence": ["a\tb\nc"], "label": [1]})
    (tmp_path / "cola").mkdir()
    frame.to_parquet(tmp_path / "cola" / "train-00000-of-00001.parquet")
    assert read_split(TASKS["cola"], "train", tmp_path).columns == (["a\tb\nc"],)


def test_mrpc_under_its_first_name(tmp_path):
    header = "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n"
    write(tmp_path, "MRPC/msr_paraphrase_train.txt", header + "1\t5\t6\ta\tb\n")
    assert read_split(TASKS["mrpc"], "train", tmp_path).columns == (["a"], ["b"])


def test_qqp_skips_broken_rows(tmp_path, caplog):
    header = "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n"
    write(tmp_path, "QQP/train.tsv", header + "1\t2\t3\ta\tb\t1\n4\t5\t6\n7\t8\t9\tc\td\t0\n")
    texts = read_split(TASKS["qqp"], "train", tmp_path)
    assert texts.labels.tolist() == [1, 0]
    assert "1 broken rows are left out" in caplog.text


def test_the_diagnostic_set_is_optional(tmp_path):
    assert read_split(TASKS["mnli"], "ax", tmp_path) is None
    write(tmp_path, "diagnostic/diagnostic.tsv", "index\tsentence1\tsentence2\n0\ta\tb\n")
    assert read_split(TASKS["mnli"], "ax", tmp_path).columns == (["a"], ["b"])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (HEADER + "0\ta\tb\tentailment\n1\ta\tentailment\n", r"train.tsv:3: 3 columns where 4"),
        (HEADER + "0\ta\tb\tentails\n", r"train.tsv:2: unknown label 'entails'; expected entail"),
        (HEADER, "train split of rte is empty"),
        ("", r"train.tsv:1: no column 'sentence1'"),
        ("index\tsentence1\tlabel\n", r"train.tsv:1: no column 'sentence2'"),
        (HEADER.encode() + b"0\ta\tb\tentailment\n1\tcaf\xe9\tb\tx\n", "train.tsv:3: not UTF-8"),
        (HEADER.encode("utf-16"), "train.tsv:1: not UTF-8"),
    ],
)  # fmt: skip
def test_broken_tsv(tmp_path, data, message):
    write(tmp_path, "RTE/train.tsv", data)
    with pytest.raises(UserError, match=message):
        read_split(RTE, "train", tmp_path)


@pytest.mark.parametrize("word", ["", "x", "nan", "-0.1", "5.1", "inf"])
def test_scores_outside_stsb(tmp_path, word):
    header = "index\tsentence1\tsentence2\tscore\n"
    write(tmp_path, "STS-B/train.tsv", f"{header}0\ta\tb\t{word}\n")
    with pytest.raises(UserError, match=r"train.tsv:2: unknown label .* a score from 0 to 5"):
        read_split(TASKS["stsb"], "train", tmp_path)


def test_missing_folder_and_split(tmp_path):
    with pytest.raises(UserError, match="no data folder"):
        read_split(RTE, "train", tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"expected RTE/dev.tsv or rte/validation-\*.parquet"):
        read_split(RTE, "validation", tmp_path)


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        ({"sentence": ["a"]}, "no column 'label'"),
        ({"sentence": ["a", None], "label": [0, 1]}, "row 1 has no text"),
        ({"sentence": ["a"], "label": [2]}, "row 0: unknown label 2"),
        ({"sentence": ["a"], "label": [0.5]}, "row 0: unknown label 0.5"),
        ({"sentence": ["a"], "label": [float("nan")]}, "row 0: unknown label nan"),
        ({"sentence": ["a"], "label": ["1"]}, "row 0: unknown label '1'"),
    ],
)
def test_broken_parquet(tmp_path, frame, message):
    (tmp_path / "cola").mkdir()
    pd.DataFrame(frame).to_parquet(tmp_path / "cola" / "train-00000-of-00001.parquet")
    with pytest.raises(UserError, match=message):
        read_split(TASKS["cola"], "train", tmp_path)


def test_torn_parquet(tmp_path):
    write(tmp_path, "cola/train-00000-of-00001.parquet", b"PAR1 torn")
    with pytest.raises(UserError, match="not a readable Parquet file"):
        read_split(TASKS["cola"], "train", tmp_path)


def test_no_network_names_the_way_out():
    with pytest.raises(UserError, match="--data-dir <folder> and --model-name <folder>"):
        read_split(RTE, "train")
