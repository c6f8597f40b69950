import json
import stat
from collections.abc import Callable

import numpy as np
import pytest
import torch
import transformers
from conftest import GLUE
from moments import at_evaluation, raises
from pictures import real_pictures
from safetensors.numpy import load_file

from bitfit.data import splits
from bitfit.data.tasks import TASKS, compact
from glue_evaluator import GLUEvaluator, set_seed
from utils import UserError

KINDS = {
    "full_ft": (True, None),
    "bitfit": (False, ["bias"]),
    "frozen": (False, []),
    "rand_uniform": (True, None),
    "rand_row_col": (True, None),
}


def prepared(folder, kind="bitfit", task="rte", rows=40, seed=0, **options):
    evaluator = GLUEvaluator(task, folder, None, seed=seed, data_dir=GLUE, **options)
    evaluator.preprocess_dataset("longest", 64, 8, train_size=rows)
    encoder_trainable, components = KINDS[kind]
    evaluator.training_preparation(1e-3, "adamw", encoder_trainable, components, verbose=False)
    if kind == "rand_uniform":
        evaluator.set_uniform_mask(2000)
    if kind == "rand_row_col":
        evaluator.set_row_and_column_random_mask()
    return evaluator


def trained_values(evaluator):
    return {n: p.detach().clone() for n, p in evaluator.model.named_parameters()}


def equal(first, second):
    return all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("model", "precision"), [("tiny_bert", "fp32"), ("tiny_roberta", "fp32"), ("tiny_bert", "bf16")]
)
@pytest.mark.parametrize("kind", KINDS)
def test_save_load_same_everything(request, tmp_path, model, kind, precision):
    evaluator = prepared(request.getfixturevalue(model), kind, precision=precision)
    evaluator.train_and_evaluate(1, tmp_path)
    evaluator.save(tmp_path / "evaluator")
    loaded = GLUEvaluator.load(tmp_path / "evaluator", None)
    assert np.array_equal(loaded.predict("test"), evaluator.predict("test"))
    assert loaded.evaluate("validation") == evaluator.evaluate("validation")
    assert loaded.evaluations == evaluator.evaluations
    assert loaded.score_table() == evaluator.score_table()
    assert list(loaded.plot_learning_curves()) == ["Accuracy"]
    for folder, one in (("a", evaluator), ("b", loaded)):
        one.export_model_test_set_predictions(tmp_path / folder)
    assert (tmp_path / "a/RTE.tsv").read_text() == (tmp_path / "b/RTE.tsv").read_text()
    if kind == "bitfit":
        assert equal(trained_values(evaluator), trained_values(loaded))
        with real_pictures():
            loaded.plot_terms_changes(tmp_path / "changes")
        assert (tmp_path / "changes.png").stat().st_size > 10_000
    masks = {n: int(m.sum()) for n, m in evaluator.masks.items()}
    assert masks == {n: int(m.sum()) for n, m in loaded.masks.items()}
    assert sum(masks.values()) == 2000 or kind != "rand_uniform"
    assert not list(tmp_path.rglob("*.tmp*"))


def test_a_delta_is_small_and_stays_with_its_base(tmp_path, tiny_bert):
    evaluator = prepared(tiny_bert)
    evaluator.train_and_evaluate(1)
    evaluator.save(tmp_path / "e")
    trained = sum(len(v.flatten()) for v in evaluator.result.stack.named_params().values())
    assert (tmp_path / "e/delta.safetensors").stat().st_size < 4 * trained + 8000
    model = transformers.BertModel.from_pretrained(tiny_bert)
    with torch.no_grad():
        model.encoder.layer[0].output.dense.weight[0, 0] += 1e-3
    model.save_pretrained(tmp_path / "other")
    evaluator.loaded.tokenizer.save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match="was trained on another base model"):
        GLUEvaluator.load(tmp_path / "e", None, model_name=tmp_path / "other")


def test_the_same_numbers_again(tiny_bert):
    runs = []
    for _ in range(2):
        evaluator = prepared(tiny_bert)
        evaluator.train_and_evaluate(2)
        runs.append((trained_values(evaluator), evaluator.evaluations, evaluator.record.train_loss))
    assert equal(runs[0][0], runs[1][0])
    assert runs[0][1:] == runs[1][1:]


@pytest.mark.parametrize("kind", KINDS)
def test_how_often_is_evaluated_changes_nothing_trained(tiny_bert, kind):
    runs = {}
    for frequency in (1, 2, 5):
        evaluator = prepared(tiny_bert, kind)
        evaluator.train_and_evaluate(3, evaluation_frequency=frequency)
        runs[frequency] = evaluator
    epochs = {
        f: evaluator.result.scores["epoch"].unique().tolist() for f, evaluator in runs.items()
    }
    assert epochs == {1: [1, 2, 3], 2: [2, 3], 5: [3]}  # the last is never skipped
    assert equal(trained_values(runs[1]), trained_values(runs[5]))
    assert equal(trained_values(runs[1]), trained_values(runs[2]))


def test_seeds_matter_and_set_seed_is_the_default(tiny_bert):
    first = prepared(tiny_bert, seed=1)
    set_seed(1)
    second, third = prepared(tiny_bert, seed=None), prepared(tiny_bert, seed=2)
    for evaluator in (first, second, third):
        evaluator.train_and_evaluate(1)
    assert equal(trained_values(first), trained_values(second))
    assert not torch.equal(first.result.stack.params, third.result.stack.params)
    assert first.setup.seeds == second.setup.seeds == [1]


def test_keep_best(tmp_path, tiny_bert):
    """The values are those after the best evaluation, which is not the last."""
    evaluator = prepared(tiny_bert)
    evaluator.train_and_evaluate(4, tmp_path, keep="best")
    scores = evaluator.evaluations["validation"]["Accuracy"]
    best = int(np.argmax(scores))
    assert best < 3, scores
    logits = load_file(tmp_path / "validation_logits.safetensors")["validation"]
    assert np.array_equal(compact(TASKS["rte"], evaluator.predict("validation")), logits[best])
    assert not np.array_equal(logits[best], logits[-1])
    name = "classifier.weight"
    assert torch.equal(
        evaluator.result.stack.named_params()[name], evaluator.model.classifier.weight
    )


def test_exported_model_is_plain(tmp_path, tiny_bert):
    evaluator = prepared(tiny_bert, task="mnli")
    evaluator.train_and_evaluate(1)
    evaluator.export_model(tmp_path)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    assert model.config.id2label == dict(enumerate(TASKS["mnli"].labels))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    texts = [line.split("\t") for line in (GLUE / "AX/AX.tsv").read_text().splitlines()[1:]]
    inputs = tokenizer([t[1] for t in texts], [t[2] for t in texts], padding=True,
                       truncation=True, max_length=64, return_tensors="pt")  # fmt: skip
    with torch.no_grad():
        logits = model(**inputs).logits.numpy()
    assert np.allclose(logits, evaluator.predict("ax"), atol=1e-5)


@pytest.mark.parametrize("task", TASKS)
def test_prediction_files_of_every_task(tmp_path, task, tiny_bert):
    evaluator = prepared(tiny_bert, task=task)
    evaluator.train_and_evaluate(1)
    written = evaluator.export_model_test_set_predictions(tmp_path)
    assert [path.name for path in written] == list(TASKS[task].server_files.values())
    for split, path in zip(TASKS[task].server_files, written, strict=True):
        header, *lines = path.read_text().splitlines()
        assert header == "index\tprediction"
        indices, words = zip(*(line.split("\t") for line in lines), strict=True)
        assert list(indices) == [str(i) for i in range(len(evaluator.tokens(split).lengths))]
        logits = evaluator.predict(split)
        if task == "stsb":
            assert np.allclose(np.float64(words), logits[:, 0].clip(0, 5), atol=1e-4)
        else:
            expected = [TASKS[task].written_labels[i] for i in logits.argmax(1)]
            assert list(words) == expected


def test_padding_as_the_released_code_did_gives_the_same_logits(tiny_bert):
    """There every row was padded to the full length; here to the longest of its batch."""
    evaluator = prepared(tiny_bert)
    texts = splits.read_split(TASKS["rte"], "validation", GLUE)
    inputs = evaluator.loaded.tokenizer(*texts.columns, padding="max_length", truncation=True,
                                 max_length=64, return_tensors="pt")  # fmt: skip
    with torch.no_grad():
        logits = evaluator.model.eval()(**inputs).logits.numpy()
    assert np.allclose(evaluator.predict("validation"), logits, atol=1e-5)
    with pytest.raises(UserError, match="padding 'left': give 'longest' or 'max_length'"):
        evaluator.preprocess_dataset("left", 64, 8)


def test_verbose_lists_what_trains(tiny_bert, capsys):
    evaluator = GLUEvaluator("rte", tiny_bert, None, seed=0, data_dir=GLUE)
    evaluator.preprocess_dataset("longest", 64, 8)
    evaluator.training_preparation(1e-3, "adamw", False, ["attention.self.query.bias"])
    shown = capsys.readouterr().out
    assert "bert.encoder.layer.0.attention.self.query.bias" in shown
    assert "key" not in shown
    assert "parameters train" in shown


def test_a_wrong_order_of_calls_is_one_clear_error(tiny_bert):
    evaluator = GLUEvaluator("rte", tiny_bert, None, data_dir=GLUE)
    calls: list[tuple[Callable[[], object], str]] = [
        (lambda: evaluator.training_preparation(1e-3, "adamw", False), "preprocess_dataset"),
        (lambda: evaluator.train_and_evaluate(1), "training_preparation"),
        (lambda: evaluator.set_uniform_mask(5), "training_preparation"),
        (lambda: evaluator.predict("test"), "training_preparation"),
        (lambda: evaluator.save("x"), "train_and_evaluate"),
        (evaluator.plot_learning_curves, "train_and_evaluate"),
    ]
    for call, first in calls:
        with pytest.raises(UserError, match=f"call {first} first"):
            call()
    frozen = prepared(tiny_bert, "frozen")
    with pytest.raises(UserError, match="a random mask needs"):
        frozen.set_row_and_column_random_mask()
    frozen.train_and_evaluate(1)
    with pytest.raises(UserError, match="has been trained"):
        frozen.train_and_evaluate(1)
    with pytest.raises(UserError, match="only bitfit"):
        frozen.plot_terms_changes()
    with pytest.raises(UserError, match="'test' has no labels"):
        frozen.evaluate("test")
    with pytest.raises(UserError, match="given twice"):
        frozen.training_preparation([1e-3, 1e-3], "adamw", False)
    for wrong in ({"lr_schedule": "cosine"}, {"keep": "all"}, {"evaluation_frequency": 0}):
        with pytest.raises(UserError):
            prepared(tiny_bert).train_and_evaluate(1, **wrong)
    with pytest.raises(UserError, match="unknown precision 'fp16'"):
        GLUEvaluator("rte", tiny_bert, None, precision="fp16")
    with pytest.raises(UserError, match="unknown task 'xyz'"):
        GLUEvaluator("xyz", tiny_bert, None)


def test_an_exported_model_leaves_the_rest_of_the_folder_alone(tmp_path, tiny_bert):
    evaluator = prepared(tiny_bert)
    (tmp_path / "notes.txt").write_text("mine")
    for _ in range(2):
        evaluator.export_model(tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    mode = stat.S_IMODE((tmp_path / "notes.txt").stat().st_mode)
    assert stat.S_IMODE((tmp_path / "model.safetensors").stat().st_mode) == mode
    assert not list(tmp_path.glob(".*"))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    from conftest import TINY_BERT

    folder = tmp_path_factory.mktemp("saved") / "evaluator"
    evaluator = prepared(str(TINY_BERT), "rand_uniform")
    evaluator.train_and_evaluate(1)
    evaluator.save(folder)
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f.clear(), "is damaged: 'format'; train and save it again"),
        (
            lambda f: f.update(format=1),
            "written by another version of this program .format 1, not 4.; train",
        ),
        (lambda f: f.pop("seed"), "its checksum is wrong"),
        (lambda f: f.update(task_name="sst2"), "its checksum is wrong"),
        (lambda f: f.update(encoder_sha256="0"), "its checksum is wrong"),
    ],
)
def test_edited_facts(saved, tmp_path, change, message):
    metadata = json.loads((saved / "evaluator.json").read_text())
    change(metadata)
    (tmp_path / "evaluator.json").write_text(json.dumps(metadata))
    with pytest.raises(UserError, match=message):
        GLUEvaluator.load(tmp_path, None)


def test_a_mask_that_meets_every_parameter_is_saved_too(tmp_path, tiny_bert):
    evaluator = prepared(tiny_bert)
    evaluator.training_preparation(1e-3, "adamw", True, verbose=False)
    evaluator.set_uniform_mask(20_000)
    assert all(
        name in evaluator.prepared.trainable for name, _ in evaluator.model.named_parameters()
    )
    evaluator.train_and_evaluate(1)
    evaluator.save(tmp_path)
    loaded = GLUEvaluator.load(tmp_path, None)
    assert np.array_equal(loaded.predict("validation"), evaluator.predict("validation"))
    with pytest.raises(UserError, match="a random mask needs training_preparation"):
        loaded.set_uniform_mask(5)


def test_what_prepare_refuses(tiny_bert):
    evaluator = prepared(tiny_bert)
    for arguments, message in {
        ("bitfat", 1e-3): "unknown fine-tune type 'bitfat'; known: full_ft, bitfit",
        ("bitfit", 1e-3): "bitfit needs components, and no other type takes any: bitfit got none",
        ("full_ft", 1e-3, "adamw", ("bias",)): "no other type takes any: full_ft got bias",
    }.items():
        with pytest.raises(UserError, match=message):
            evaluator.prepare(*arguments, verbose=False)
        with pytest.raises(UserError, match="call training_preparation first"):
            evaluator.train_and_evaluate(1)  # not what was prepared before


def test_what_was_measured_outlives_an_interruption(tiny_bert):
    evaluator = prepared(tiny_bert)
    with pytest.raises(KeyboardInterrupt), at_evaluation(1, raises(KeyboardInterrupt)):
        evaluator.train_and_evaluate(3, evaluation_frequency=3)
    assert len(evaluator.record.train_loss) == 2


def test_a_changed_weight_of_a_whole_model_is_found_out(tmp_path, tiny_bert):
    evaluator = prepared(tiny_bert, "full_ft")
    evaluator.train_and_evaluate(1)
    evaluator.save(tmp_path)
    GLUEvaluator.load(tmp_path, None)
    model = evaluator.model
    with torch.no_grad():
        model.classifier.weight[0, 0] += 1e-3
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match="model is not as it was written: train and save"):
        GLUEvaluator.load(tmp_path, None)


@pytest.mark.parametrize("cut", [0, 4, 100, 5000])
def test_torn_files(saved, tmp_path, cut):
    for name in ("evaluator.json", "delta.safetensors"):
        (tmp_path / name).write_bytes((saved / name).read_bytes())
    (tmp_path / "delta.safetensors").write_bytes((saved / "delta.safetensors").read_bytes()[:cut])
    with pytest.raises(UserError, match="is damaged: "):
        GLUEvaluator.load(tmp_path, None)
    (tmp_path / "evaluator.json").write_bytes((saved / "evaluator.json").read_bytes()[: cut % 90])
    with pytest.raises(UserError, match="is damaged: "):
        GLUEvaluator.load(tmp_path, None)
    with pytest.raises(UserError, match="there is no saved evaluator"):
        GLUEvaluator.load(tmp_path / "nowhere", None)
