"""Many tasks in one pass over one encoder, beside each evaluator alone."""

import io
import json
import signal
import subprocess
import sys

import numpy as np
import predict
import pytest
import torch
import transformers
from conftest import GLUE, ROOT, TINY_BERT
from scipy.special import softmax

from bitfit.data.glue_files import tsv_names
from bitfit.data.tasks import TASKS
from bitfit.model import fingerprints, loading
from bitfit.tools import answers, multi_task
from bitfit.training.result import new_result
from glue_evaluator import GLUEvaluator
from utils import UserError

CPU = torch.device("cpu")
ROWS = [
    ("the glad wug grows", "the happy wug does not swell"),
    ("a film", "the film is great and the plot is superb " * 9),
    ("the young frind behind the zorpers pulls the fep " * 5, "feps"),
    ("a", "b"),
    ("under the mimsters the glad animal aids the snerfs", "the animals trail the dax"),
]
BITFIT = ("bitfit", ["bias"])


def save(folder, task, model=TINY_BERT, kind=BITFIT, length=64, **options):
    """A saved evaluator whose values differ from the base model's by chance, not by training."""
    evaluator = GLUEvaluator(task, str(model), None, 0, GLUE, **options)
    evaluator.preprocess_dataset("longest", length, 8, train_size=8)
    evaluator.prepare(kind[0], 1e-3, components=kind[1], verbose=False)
    stack = evaluator.prepared.new_stack()
    noise = torch.Generator().manual_seed(len(str(folder)) + len(task))
    stack.params += 0.2 * torch.randn(stack.params.shape, generator=noise)
    stack.load_run(0)
    evaluator.with_parts(result=new_result(stack)).save(folder)
    return str(folder)


def alone(folder, data_dir, rows=ROWS):
    """The logits that the evaluator gives by itself, from a test file of its task."""
    evaluator = GLUEvaluator.load(folder, None, data_dir=str(data_dir))
    task = evaluator.task
    split = next(iter(task.server_files))
    path = data_dir / tsv_names(task, split)[0]
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [task.tsv_columns, *(row[: len(task.texts)] for row in rows)]
    path.write_text("".join("\t".join(line) + "\n" for line in lines), encoding="utf-8")
    return evaluator.predict(split)


def load(*folders, **options):
    return multi_task.load_predictor(multi_task.read_evaluators(folders), CPU, **options)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """{name: folder} of evaluators on the toy BERT: 1, 2 and 3 classes, one text and two."""
    base = tmp_path_factory.mktemp("evaluators")
    folders = {
        "cola": save(base / "cola", "cola", length=16),
        "mnli": save(base / "mnli", "mnli"),
        "stsb": save(base / "stsb", "stsb", kind=("bitfit", ["attention.self.query.bias"])),
        "sst2": save(base / "sst2", "sst2", kind=("frozen", [])),
        "sst2 again": save(base / "sst2-again", "sst2"),
        "rte frozen": save(base / "rte-frozen", "rte", kind=("frozen", [])),
        "full_ft": save(base / "full", "qqp", kind=("full_ft", [])),
        "rand_uniform": save(base / "random", "qqp", kind=("rand_uniform", [])),
    }
    folders["random encoder"] = save(base / "drawn", "qnli", random_encoder=True)
    return folders


@pytest.fixture(scope="module")
def lines(tmp_path_factory):
    path = tmp_path_factory.mktemp("lines") / "in.tsv"
    path.write_text("".join("\t".join(row) + "\n" for row in ROWS))
    return str(path)


def check_like_each_alone(folders, tmp_path, max_tokens=None):
    many = load(*folders, max_tokens=max_tokens)
    with many.stack.patched():
        logits, told = multi_task.predict_logits(many, ROWS), answers.predict_answers(many, ROWS)
    for folder, name, task, found in zip(folders, many.names, many.tasks, logits, strict=True):
        expected = alone(folder, tmp_path)
        assert found.shape == (len(ROWS), task.num_labels)
        assert np.abs(found - expected).max() < 1e-5, name
        assert np.ptp(expected, axis=0).max() > 1e-3  # the rows can be told apart
        for row, answer in zip(expected, (each[name] for each in told), strict=True):
            if task.is_regression:
                assert answer == {"score": pytest.approx(min(max(row[0], 0), 5), abs=2e-5)}
                continue
            assert answer["label"] == task.labels[row.argmax()]
            assert list(answer["probabilities"]) == list(task.labels)
            shares = list(answer["probabilities"].values())
            assert shares == pytest.approx(softmax(row), abs=1e-5)
    return many


@pytest.mark.parametrize("max_tokens", [None, 40])
def test_each_answers_as_alone(saved, tmp_path, max_tokens):
    """Whether all go through the model at once, or in passes of few tokens."""
    folders = [saved[name] for name in ("cola", "mnli", "stsb", "sst2")]
    many = check_like_each_alone(folders, tmp_path, max_tokens)
    assert many.forward.packed_encoder
    assert not many.stack.shares_encoder
    assert [task.num_labels for task in many.tasks] == [2, 3, 1, 2]


@pytest.mark.parametrize("name", ["cola", "full_ft", "rand_uniform", "random encoder"])
def test_one_evaluator_of_any_kind(saved, tmp_path, name):
    check_like_each_alone([saved[name]], tmp_path)


def test_padded_rows_and_another_head(tmp_path, tiny_roberta):
    """RoFormer's rows cannot be packed; RoBERTa's head is two layers."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(TINY_BERT)
    config = transformers.RoFormerConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=160, initializer_range=0.2,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.AutoModel.from_config(config).save_pretrained(tmp_path / "roformer")
    tokenizer.save_pretrained(tmp_path / "roformer")
    for model, packed in ((tmp_path / "roformer", False), (tiny_roberta, True)):
        tasks = ("stsb", "cola", "mnli")
        folders = [save(tmp_path / f"{packed}-{task}", task, model) for task in tasks]
        many = check_like_each_alone(folders, tmp_path)
        assert bool(many.forward.packed_encoder) == packed


def test_a_checkpoint_without_pooler_serves_any_number_of_classes(tmp_path):
    """Its pooler is drawn, and must come out the same beside a head of another width."""
    transformers.BertForMaskedLM.from_pretrained(TINY_BERT).save_pretrained(tmp_path / "mlm")
    transformers.AutoTokenizer.from_pretrained(TINY_BERT).save_pretrained(tmp_path / "mlm")
    folders = [save(tmp_path / task, task, tmp_path / "mlm") for task in ("stsb", "mnli")]
    check_like_each_alone(folders, tmp_path)


def test_where_heads_alone_trained_the_encoder_runs_once(saved, tmp_path):
    alike = save(tmp_path / "qnli", "qnli", kind=("frozen", []))  # reads what RTE's reads
    folders = [saved["sst2"], saved["rte frozen"], alike]
    many = check_like_each_alone(folders, tmp_path)
    assert many.stack.shares_encoder
    seen = []
    many.forward.model.base_model.register_forward_pre_hook(
        lambda module, args: seen.append(args[0].numel())
    )
    with many.stack.patched():
        multi_task.predict_logits(many, ROWS)
    assert sum(seen) == sum(map(len, many.tokenizer([a for a, _ in ROWS])["input_ids"])) + sum(
        map(len, many.tokenizer(*zip(*ROWS, strict=True), truncation=True, max_length=64).input_ids)
    )


def test_one_model_is_loaded_and_its_own_values_are_untouched(saved, monkeypatch):
    loads, load_one = [], loading.load_model

    def load_and_count(*args, **options):
        loads.append(args)
        return load_one(*args, **options)

    monkeypatch.setattr(loading, "load_model", load_and_count)
    many = load(*(saved[name] for name in ("cola", "mnli", "stsb")))
    assert len(loads) == 1
    base, _ = load_one(str(TINY_BERT), TASKS["mnli"])
    assert fingerprints.fingerprint(many.forward.model) == fingerprints.fingerprint(base)


def test_names(saved):
    assert load(saved["cola"], saved["sst2"]).names == ["cola", "sst2"]
    twice = [saved["cola"], saved["sst2"], saved["sst2 again"]]
    assert load(*twice).names == twice


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["cola", "cola"], "cola is given twice: give each once"),
        (["cola", "full_ft"], r"full \(full_ft\) changed weight matrices, which the others sha"),
        (
            ["rand_uniform", "cola"],
            r"random \(rand_uniform\) changed weight matrices, .*: gi",
        ),
        (
            ["cola", "random encoder"],
            r"cola \(tiny_bert\) and drawn \(tiny_bert \(random encoder\)\) have different base",
        ),
    ],
)
def test_what_cannot_answer_together(saved, names, message):
    with pytest.raises(UserError, match=message):
        multi_task.read_evaluators([saved[name] for name in names])


def test_the_folder_of_a_run_does_for_its_evaluator(saved, tmp_path):
    (tmp_path / "evaluator").symlink_to(saved["cola"])
    (found,) = multi_task.read_evaluators([tmp_path])
    assert found.folder == tmp_path / "evaluator"
    assert found.metadata["task_name"] == "cola"
    with pytest.raises(UserError, match=r"cola is given twice"):  # by another name
        multi_task.read_evaluators([tmp_path, saved["cola"]])


def test_a_model_that_cannot_be_shared_is_said_so(saved, monkeypatch):
    monkeypatch.setattr(
        "bitfit.model.forward_trials.reason_not_stackable",
        lambda *args: "it goes around its modules",
    )
    load(saved["cola"])
    with pytest.raises(UserError, match="cannot answer together: it goes around its modules; give"):
        load(saved["cola"], saved["mnli"])


def main(capsys, *argv):
    """(status, the objects on standard output, standard error) of the command."""
    status = predict.main([*argv, "-d", "cpu"])
    captured = capsys.readouterr()
    return status, [json.loads(line) for line in captured.out.splitlines()], captured.err


def test_the_command(saved, lines, capsys):
    """Batches change nothing, and a shorter limit does."""
    folders = [saved["cola"], saved["mnli"], saved["stsb"]]

    def shares(answers):
        return np.array([list(answer["mnli"]["probabilities"].values()) for answer in answers])

    status, told, error = main(capsys, *folders, "--input", lines)
    assert (status, error) == (0, "")
    assert [list(each) for each in told] == [["cola", "mnli", "stsb"]] * len(ROWS)
    _, others, _ = main(capsys, *folders, "-i", lines, "--batch-size", "2")
    assert np.allclose(shares(told), shares(others), rtol=0, atol=1e-5)
    _, cut, _ = main(capsys, *folders, "-i", lines, "--max-seq-length", "12")
    moved = np.abs(shares(told) - shares(cut)).max(axis=1)
    assert moved[1] > 1e-4  # a long line
    assert moved[3] < 1e-5  # a short one


@pytest.mark.parametrize(
    ("names", "text", "answered", "message"),
    [
        (
            ["cola", "stsb"],
            b"a\tb\nc\td\nalone\n",
            2,
            "1 texts with tabs between them, but stsb re",
        ),
        (
            ["cola", "stsb"],
            b"a\tb\nc\td\n1\t2\t3\n",
            2,
            "3 texts with tabs between them, but stsb re",
        ),
        (
            ["cola", "sst2"],
            b"a\nb\nc\td\n",
            2,
            "2 texts with tabs between them, but no evaluator reads",
        ),
        (["cola"], b"a\nb\n \n", 2, "an empty text; give a text in every line"),
        (["stsb"], b"a\tb\nc\td\ne\t\n", 2, "an empty text; give a text in every line"),
        (["cola"], b"a\nb\n\xff\n", 2, "not UTF-8 text; convert the input to UTF-8"),
    ],
)
def test_a_bad_line_ends_it_after_those_before(
    saved, tmp_path, capsys, names, text, answered, message
):
    (tmp_path / "in").write_bytes(text)
    folders = [saved[name] for name in names]
    status, told, error = main(capsys, *folders, "-i", str(tmp_path / "in"))
    assert (status, len(told)) == (2, answered)
    assert error.startswith(f"predict.py: error: {tmp_path / 'in'}:3: {message}")
    assert error.count("\n") == 1


def test_lines_of_any_system(saved, capsys, monkeypatch):
    """A byte order mark, Windows' line ends and a missing last one are no text."""
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xef\xbb\xbfa film\r\na film")))
    status, told, _ = main(capsys, saved["cola"])
    assert status == 0
    assert told[0] == told[1]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"")))
    assert main(capsys, saved["cola"]) == (0, [], "")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"a film\rthe film\r", "in:1: a zero byte or carriage return"),
        (b"a\nb\rc\n", "in:2: a zero byte or carriage return within a line"),
        (
            "a film\nthe film\n".encode("utf-16-le"),
            "in:1: a zero byte or carriage return",
        ),
    ],
)
def test_lines_that_are_not_what_they_seem(saved, data, message):
    """Read as UTF-8 lines they would be answered as others, or as fewer."""
    with pytest.raises(UserError, match=message):
        list(answers.read_batches(load(saved["cola"]), io.BytesIO(data), 1, "in"))


def test_a_byte_order_mark_within_the_lines_is_text(saved):
    lines = [b"\xef\xbb\xbfa\n", b"\xef\xbb\xbfb\n"]
    ((first, second),) = answers.read_batches(load(saved["cola"]), lines, 9, "in")
    assert (first, second) == (("a",), ("\ufeffb",))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{cola}", "-i", "nowhere"], "cannot read --input nowhere: No such file or directory"),
        (["{cola}", "-i", "."], "cannot read --input .: Is a directory"),
        (["nowhere", "-i", "{lines}"], "there is no saved evaluator in nowhere: train with"),
        (["{cola}", "-i", "{lines}", "--model-name", "./no"], "there is no model folder ./no"),
        (["{cola}", "-i", "{lines}", "--max-seq-length", "999"], "an example has 146 tokens, but"),
        (["{cola}", "-i", "{lines}", "--max-seq-length", "2"], "--max-seq-length 2 leaves no room"),
    ],
)
def test_bad_input(saved, lines, capsys, words, message):
    status, told, error = main(capsys, *(word.format(**saved, lines=lines) for word in words))
    assert (status, told) == (2, [])
    assert error.startswith(f"predict.py: error: {message}")
    assert error.count("\n") == 1


@pytest.mark.parametrize("words", [[], ["x", "--batch-size", "0"], ["x", "--precision", "fp8"]])
def test_bad_flags(words, capsys):
    with pytest.raises(SystemExit) as stop:
        predict.main(words)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("predict.py: error: ")
    assert error.count("\n") == 1


def test_another_base_model_under_the_same_name(saved, lines, tmp_path, capsys):
    model = transformers.BertModel.from_pretrained(TINY_BERT)
    with torch.no_grad():
        model.encoder.layer[0].output.dense.weight[0, 0] += 1e-3
    model.save_pretrained(tmp_path)
    transformers.AutoTokenizer.from_pretrained(TINY_BERT).save_pretrained(tmp_path)
    status, _, error = main(capsys, saved["cola"], "-i", lines, "-m", str(tmp_path))
    assert status == 2
    assert "was trained on another base model than" in error
    assert "give the one it was trained on as --model-name" in error


def started(*words, **options):
    """The command as a process of its own, and its streams."""
    command = [sys.executable, str(ROOT / "scripts/predict.py"), *words, "-d", "cpu"]
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options
    )


def test_it_answers_as_lines_come_and_ends_without_a_traceback(quick_python, saved):
    """What is asked is answered before the input ends; an interrupt is one line, and a reader that
    has seen enough is none."""
    both = [started(saved["cola"], saved["sst2"], "--batch-size", "1") for _ in range(2)]
    for process in both:
        for text in (b"a film\n", b"the plot\n"):
            process.stdin.write(text)
            process.stdin.flush()
            assert list(json.loads(process.stdout.readline())) == ["cola", "sst2"]
    interrupted, unread = both
    interrupted.send_signal(signal.SIGINT)
    unread.stdout.close()  # as `| head -2` does
    unread.stdin.write(b"the film\n")
    unread.stdin.flush()
    message = b"predict.py: stopped: SIGINT\n"
    for process, number, line in (
        (interrupted, signal.SIGINT, message), (unread, signal.SIGPIPE, b""),
    ):  # fmt: skip
        assert process.wait(timeout=60) == -number
        assert process.stderr.read() == line
        for stream in (process.stdin, process.stdout, process.stderr):
            stream.close()


def test_help_needs_no_torch():
    script = "import sys, predict; predict.make_parser(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], cwd=ROOT / "scripts", check=True)
