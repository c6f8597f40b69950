"""Whatever bytes lie in a file: a result or the one clear error, never another exception.

Nothing here is a pickle, so nothing can run code; the loaders are given random bytes, random
tables and random JSON in place of their files.
"""

import json
import shutil

import compare
import numpy as np
import pytest
from conftest import GLUE, TINY_BERT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import run_glue
from bitfit import options
from bitfit.artifacts import run_folder
from bitfit.artifacts.run_folder import read_args
from bitfit.data.splits import read_split
from bitfit.data.tasks import TASKS
from bitfit.model.run import Run
from bitfit.results import sweeps
from bitfit.training import store
from glue_evaluator import GLUEvaluator
from utils import CorruptFile, UserError

many = settings(
    max_examples=150, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
few = settings(many, max_examples=40)

cells = st.one_of(
    st.sampled_from(
        ["0", "1", "2", "entailment", "neutral", "3.5", "nan", "inf", "1e999", "-1", ""]
    ),
    st.text(max_size=12),
)
lines = st.lists(cells, max_size=12).map("\t".join)
tables = st.lists(lines, max_size=8).map("\n".join)
headed = st.tuples(
    st.sampled_from(["sentence\tlabel", "index\tsentence1\tsentence2\tlabel"]), tables
)
contents = st.one_of(
    st.binary(max_size=300),
    tables.map(lambda text: text.encode(errors="surrogatepass")),
    headed.map(lambda pair: "\n".join(pair).encode(errors="surrogatepass")),
)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=4)
    | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)  # fmt: skip


def check_texts(texts, task):
    assert len(texts) > 0
    assert all(isinstance(word, str) for column in texts.columns for word in column)
    if texts.labels is not None:
        assert len(texts.labels) == len(texts)
        assert np.isfinite(texts.labels).all()
        assert task.is_regression or set(texts.labels) <= set(range(task.num_labels))


@pytest.mark.parametrize("task", ["cola", "sst2", "rte", "stsb", "mrpc"])
@many
@given(content=contents)
def test_tsv(tmp_path, task, content):
    task = TASKS[task]
    folder = tmp_path / task.folder
    folder.mkdir(exist_ok=True)
    (folder / "train.tsv").write_bytes(content)
    try:
        check_texts(read_split(task, "train", tmp_path), task)
    except UserError as error:
        assert "\n" not in str(error)


@few
@given(content=st.binary(max_size=300))
def test_parquet(tmp_path, content):
    folder = tmp_path / "rte"
    folder.mkdir(exist_ok=True)
    (folder / "train-00000-of-00001.parquet").write_bytes(content)
    with pytest.raises(UserError) as error:
        read_split(TASKS["rte"], "train", tmp_path)
    assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    evaluator = GLUEvaluator("rte", TINY_BERT, None, seed=0, data_dir=GLUE)
    evaluator.preprocess_dataset("longest", 64, 8, train_size=8)
    evaluator.training_preparation(1e-3, "adamw", False, verbose=False)
    evaluator.train_and_evaluate(1)
    evaluator.save(folder)
    return folder


def load(folder):
    try:
        GLUEvaluator.load(folder, None).score_table()
    except UserError as error:
        assert "\n" not in str(error)


@few
@given(content=st.binary(max_size=200))
def test_evaluator_of_any_bytes(saved, tmp_path, content):
    for name in ("evaluator.json", "delta.safetensors"):
        shutil.copytree(saved, tmp_path / "e", dirs_exist_ok=True)
        (tmp_path / "e" / name).write_bytes(content)
        load(tmp_path / "e")


@few
@given(data=st.data())
def test_evaluator_of_any_facts(saved, tmp_path, data):
    """One fact after the other is anything JSON can say: an edited file is refused."""
    metadata = json.loads((saved / "evaluator.json").read_text())
    name, value = data.draw(st.sampled_from(sorted(metadata))), data.draw(values)
    shutil.copytree(saved, tmp_path / "e", dirs_exist_ok=True)
    (tmp_path / "e" / "evaluator.json").write_text(store.dump(metadata | {name: value}))
    if store.dump(metadata) == store.dump(metadata | {name: value}):
        return load(tmp_path / "e")
    with pytest.raises(UserError) as error:
        GLUEvaluator.load(tmp_path / "e", None)
    assert "\n" not in str(error.value)


@many
@given(content=st.binary(max_size=200) | values.map(lambda v: json.dumps(v).encode()))
def test_checkpoint_and_args(tmp_path, content):
    (tmp_path / "000001.json").write_bytes(content)
    (tmp_path / "000001.safetensors").write_bytes(content)
    with pytest.raises(CorruptFile) as error:
        store.read_entry(tmp_path / "000001.json")
    assert "\n" not in str(error.value)
    (tmp_path / "args.json").write_bytes(content)
    with pytest.raises(UserError):
        read_args(tmp_path)


ARGV = ["-t", "rte", "-m", str(TINY_BERT), "--data-dir", str(GLUE), "-f", "bitfit", "-d", "cpu",
        "-e", "1", "--train-size", "8"]  # fmt: skip
NOT_OURS: list = [None, [], ["x"], {}, "many\n", "x" * 10**5, True, -1, 10**400, 1e999, 0.5,
                  [[]]]  # fmt: skip
edits = values | st.sampled_from(NOT_OURS)


@pytest.fixture(scope="module")
def a_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "out"
    assert run_glue.main(["-o", str(folder), *ARGV]) == 0
    return folder


def assert_one_line(error):
    assert "\n" not in str(error)
    assert len(str(error)) < 2500


@many
@given(data=st.data(), finished=st.booleans())
def test_resuming_with_any_facts(a_run, tmp_path, data, finished):
    metadata = json.loads((a_run / "args.json").read_text()) | {"finished": finished}
    name, value = data.draw(st.sampled_from(sorted(metadata))), data.draw(edits)
    command = vars(options.parse_args("", ["-o", str(tmp_path), *ARGV, "--resume"]))
    loaded = {name: fact for name, fact in metadata.items() if name not in command}
    (tmp_path / "args.json").write_text(json.dumps(metadata | {name: value}))
    for known in (command, loaded | command | {"precision": "fp32", "max_tokens": 2048}):
        try:
            assert run_folder.check_resumable(tmp_path, known)[0] in (True, False)
        except UserError as error:
            assert_one_line(error)


@many
@given(data=st.data())
def test_scores_with_any_facts(a_run, tmp_path, data):
    content = json.loads((a_run / "metrics.json").read_text())
    name, value = data.draw(st.sampled_from(sorted(content))), data.draw(edits)
    shutil.copyfile(a_run / "metrics.csv", tmp_path / "metrics.csv")
    (tmp_path / "metrics.json").write_text(json.dumps(content | {name: value}))
    for read in (compare.read_run, lambda folder: sweeps.read_sweep({Run(1e-3, 0): folder})):
        try:
            read(tmp_path)
        except UserError as error:
            assert_one_line(error)


@many
@given(content=contents)
def test_any_table_of_scores(a_run, tmp_path, content):
    shutil.copyfile(a_run / "metrics.json", tmp_path / "metrics.json")
    (tmp_path / "metrics.csv").write_bytes(content)
    for read in (compare.read_run, lambda folder: sweeps.read_sweep({Run(1e-3, 0): folder})):
        with pytest.raises(UserError) as error:
            read(tmp_path)
        assert_one_line(error.value)
