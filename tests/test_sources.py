import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import GLUE

from bitfit.data.splits import find_split, read_split
from bitfit.data.tasks import TASKS
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


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            "1\ta\n0\tb\n",
            "test.tsv:2: 'index' is '1', but 0 is expected: give all rows in order",
        ),
        ("0\ta\n1\tb\n3\tc\n", "test.tsv:4: 'index' is '3', but 2 is expected"),
        ("1\ta\n2\tb\n", "test.tsv:2: 'index' is '1', but 0 is expected"),
    ],
)
def test_rows_that_are_numbered_otherwise_are_not_predicted(tmp_path, rows, message):
    write(tmp_path, "CoLA/test.tsv", "index\tsentence\n" + rows)
    with pytest.raises(UserError, match=message):
        read_split(TASKS["cola"], "test", tmp_path)


def test_the_numbers_of_rows_go_on_from_file_to_file(tmp_path):
    (tmp_path / "cola").mkdir()

    def read(numbers):
        for part, idx in enumerate(numbers):
            name = f"test-{part:05}-of-{len(numbers):05}.parquet"
            frame = pd.DataFrame({"sentence": ["a"] * len(idx), "label": -1, "idx": idx})
            frame.to_parquet(tmp_path / "cola" / name)
        return read_split(TASKS["cola"], "test", tmp_path)

    assert read([[0, 1], [2]]).columns == (["a"] * 3,)
    with pytest.raises(UserError, match="row index 0: 'idx' is 0, but 2 is expected"):
        read([[0, 1], [0]])


def test_a_carriage_return_among_other_line_ends_is_told(tmp_path, caplog):
    write(tmp_path, "CoLA/test.tsv", "sentence\na\rb\nc\nd\re\n")
    assert len(read_split(TASKS["cola"], "test", tmp_path)) == 3
    assert "test.tsv:2: a carriage return within a row; 2 rows have one" in caplog.text


def test_in_a_file_of_one_column_its_name_may_be_a_text(tmp_path):
    write(tmp_path, "CoLA/test.tsv", "sentence\na\nsentence\nb\n")
    assert len(read_split(TASKS["cola"], "test", tmp_path)) == 3


@pytest.mark.parametrize("name", ["CoLA/train.tsv", "cola/train-00000-of-00001.parquet"])
def test_a_pointer_of_git_lfs_in_place_of_data(tmp_path, name):
    write(tmp_path, name, "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(UserError, match="a git-lfs pointer, not the file: run `git lfs pull`"):
        read_split(TASKS["cola"], "train", tmp_path)


MRPC_HEADER = "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n"


def original_mrpc(folder, dev, train="1\t5\t6\ta\tb\n0\t5\t7\tc\td\n1\t8\t6\te\tf\n"):
    if dev is not None:
        write(folder, "MRPC/dev.tsv", MRPC_HEADER + dev)
    write(folder, "MRPC/msr_paraphrase_train.txt", "\ufeff" + MRPC_HEADER + train)
    return read_split(TASKS["mrpc"], "train", folder)


def test_mrpcs_original_training_file_without_the_rows_of_dev(tmp_path, caplog):
    """Both IDs tell; a row that has only one of them stays."""
    texts = original_mrpc(tmp_path, dev="0\t5\t7\tc\td\n")
    assert texts.columns == (["a", "e"], ["b", "f"])
    assert texts.labels.tolist() == [1, 1]
    message = "msr_paraphrase_train.txt: 1 of 3 rows are left out, because dev.tsv has them"
    assert message in caplog.text


@pytest.mark.parametrize(
    ("dev", "message"),
    [
        (None, r"contains the validation rows too, which only .*dev.tsv tells"),
        ("0\t0\t1\tc\td\n", r"train.txt has no rows with the IDs of 1 rows of .*dev.tsv"),
        ("0\t7\t5\tc\td\n", r"train.txt has no rows with the IDs of 1 rows of .*dev.tsv"),
    ],
)
def test_mrpcs_dev_rows_that_cannot_be_told(tmp_path, dev, message):
    with pytest.raises(UserError, match=message):
        original_mrpc(tmp_path, dev)


def test_mrpcs_other_training_file_is_read_as_it_is(tmp_path, caplog):
    write(tmp_path, "MRPC/train.tsv", MRPC_HEADER + "1\t8\t6\te\tf\n")
    assert len(original_mrpc(tmp_path, dev=None)) == 1
    write(tmp_path, "MRPC/msr_paraphrase_test.txt", MRPC_HEADER + "1\t8\t6\te\tf\n")
    assert read_split(TASKS["mrpc"], "test", tmp_path).columns == (["e"], ["f"])
    assert caplog.text == ""


QQP_HEADER = "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n"


def test_qqps_training_file_has_broken_rows(tmp_path, caplog):
    write(tmp_path, "QQP/train.tsv", QQP_HEADER + "1\t2\t3\ta\tb\t1\n4\t5\t6\n7\t8\t9\tc\td\t0\n")
    texts = read_split(TASKS["qqp"], "train", tmp_path)
    assert texts.labels.tolist() == [1, 0]
    message = "train.tsv: 1 of 3 rows do not have 6 fields and are left out"
    assert message in caplog.text


@pytest.mark.parametrize("broken", ["4\t5", "4\ta\tb\tc", "", "4\ta\tb\tc\td\te\tf"])
def test_no_row_of_a_split_that_is_predicted_is_left_out(tmp_path, broken):
    """Each later prediction would get the index of the row before."""
    write(tmp_path, "QQP/test.tsv", f"id\tquestion1\tquestion2\n1\ta\tb\n{broken}\n5\tc\td\n")
    with pytest.raises(UserError, match=r"test.tsv:3: \d columns where 3 are expected"):
        read_split(TASKS["qqp"], "test", tmp_path)
    write(tmp_path, "QQP/dev.tsv", f"{QQP_HEADER}1\t2\t3\ta\tb\t1\n{broken}\n")
    with pytest.raises(UserError, match=r"dev.tsv:3: \d columns where 6 are expected"):
        read_split(TASKS["qqp"], "validation", tmp_path)


def test_files_put_together_with_their_headers(tmp_path):
    """In a test split, which has no labels, the second header would be read as texts."""
    part = "index\tsentence1\tsentence2\n0\ta\tb\n"
    write(tmp_path, "RTE/test.tsv", part + part)
    with pytest.raises(UserError, match=r"test.tsv:3: the header line occurs again"):
        read_split(RTE, "test", tmp_path)


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("last", [True, False])
def test_all_line_ends(tmp_path, end, last):
    rows = HEADER.replace("\n", end) + f"0\ta\tb\tentailment{end}1\tc\td\tx" + end * last
    write(tmp_path, "RTE/train.tsv", rows)
    with pytest.raises(
        UserError, match=r"train.tsv:3: unknown label 'x'; expected entailment, not"
    ):
        read_split(RTE, "train", tmp_path)
    write(tmp_path, "RTE/train.tsv", rows.replace("\tx", "\tentailment"))
    assert read_split(RTE, "train", tmp_path).columns == (["a", "c"], ["b", "d"])


def test_the_diagnostic_set_is_optional(tmp_path):
    assert find_split(TASKS["mnli"], "ax", tmp_path) is None
    write(tmp_path, "diagnostic/diagnostic.tsv", "index\tsentence1\tsentence2\n0\ta\tb\n")
    assert read_split(TASKS["mnli"], "ax", tmp_path).columns == (["a"], ["b"])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (HEADER + "0\ta\tb\tentailment\n1\ta\tentailment\n", r"train.tsv:3: 3 columns where 4"),
        (HEADER + "0\ta\tb\tentails\n", r"train.tsv:2: unknown label 'entails'; expected entail"),
        (HEADER, "train split of rte is empty"),
        ("", "train split of rte is empty"),
        ("index\tlabel\tsentence1\tsentence2\tlabel\n", "train.tsv:1: the column 'label' occurs"),
        (HEADER + "0\ta\tb\tentailment\t\n", r"train.tsv:2: 5 columns where 4"),
        (HEADER + "0\ta\tb\tentailment\n1\ta\tb", r"train.tsv:3: 3 columns where 4"),
        (HEADER.encode("utf-16-le") * 2, "train.tsv:1: not text, there is a zero byte"),
        (b"\xef\xbb\xbf" + HEADER.encode() + b"\xff", "train.tsv:2: not UTF-8"),
        (HEADER + "0\ta\tb\t" + "x" * 9999, r"unknown label 'x{75}...'; expected"),
        ("\t".join(map(str, range(99))), "no column 'sentence1' among 0, .*, 19 and 79 more$"),
        ("\x1b[31m\t \u202e\n", r"among '\\x1b\[31m', ' \\u202e'$"),
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
        (
            {"sentence": ["a", None], "label": [0, 1]},
            "row index 1: no text in column 'sentence', but None",
        ),
        ({"sentence": ["a"], "label": [2]}, "row index 0: unknown label '2'; expected 0, 1"),
        ({"sentence": ["a"], "label": [0.5]}, "row index 0: unknown label '0.5'"),
        ({"sentence": ["a"], "label": [float("nan")]}, "row index 0: unknown label None"),
        ({"sentence": ["a"], "label": ["yes"]}, "row index 0: unknown label 'yes'"),
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


def parquet(folder, name, rows=1):
    path = folder / "cola" / name
    path.parent.mkdir(exist_ok=True)
    pd.DataFrame({"sentence": [name] * rows, "label": [0] * rows}).to_parquet(path)


@pytest.mark.parametrize(
    "names",
    [
        ["-00000-of-00002"],
        ["-00001-of-00002"],
        ["-00000-of-00003", "-00002-of-00003"],
        ["-00000-of-00001", "-00000-of-00001-0123abcd"],
        ["-00000-of-00001", "-0-of-1"],
        ["-00000-of-00001", "-00000-of-00001 (copy)"],
        ["-00000-of-00001", "-00000-of-00002", "-00001-of-00002"],
        ["-00000-of-00001", "-00001-of-00001"],
        ["-part1"],
    ],
)
def test_files_of_a_split_that_are_missing_or_there_twice(tmp_path, names):
    for name in names:
        parquet(tmp_path, f"train{name}.parquet")
    with pytest.raises(
        UserError, match=r"cola: the files of train are .*; expected all of"
    ) as error:
        read_split(TASKS["cola"], "train", tmp_path)
    assert all(f"train{name}.parquet" in str(error.value) for name in names)


def test_files_of_a_split_in_their_order(tmp_path):
    names = [f"train-{i}-of-11-0af3.parquet" for i in range(11)]
    for name in names:
        parquet(tmp_path, name, rows=2)
    expected = [name for name in names for _ in range(2)]
    assert read_split(TASKS["cola"], "train", tmp_path).columns == (expected,)
    bad = pd.DataFrame({"sentence": ["a", None], "label": [0, 1]})
    bad.to_parquet(tmp_path / "cola" / names[9])  # its own rows are counted
    with pytest.raises(UserError, match=f"{names[9]}: row index 1: no text"):
        read_split(TASKS["cola"], "train", tmp_path)


def test_a_column_twice_in_parquet(tmp_path):
    columns = [pa.array(["a"]), pa.array([0]), pa.array(["b"])]
    (tmp_path / "cola").mkdir()
    table = pa.table(columns, names=["sentence", "label", "sentence"])
    pq.write_table(table, tmp_path / "cola/train-00000-of-00001.parquet")
    with pytest.raises(UserError, match=r"parquet: the column 'sentence' occurs twice"):
        read_split(TASKS["cola"], "train", tmp_path)


def test_qqps_blank_questions(tmp_path, caplog):
    """GLUE's own training file has two, and trains on them."""
    rows = "1\t2\t3\ta\t\t1\n4\t5\t6\tb\tc\t0\n7\t8\t9\t\u200b \td\t0\n"
    write(tmp_path, "QQP/train.tsv", QQP_HEADER + rows)
    assert read_split(TASKS["qqp"], "train", tmp_path).columns[1] == ["", "c", "d"]
    assert "train.tsv:2: a blank text in column 'question2'; 2 of 3 rows have one" in caplog.text
