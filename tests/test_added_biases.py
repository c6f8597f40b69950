"""--add-biases through every program: commands, evaluators, deltas, predictions and studies."""

import json

import deltas
import numpy as np
import paper
import pytest
import torch
import transformers
from conftest import GLUE
from safetensors.torch import load_file
from small_command import flags

import run_glue
from bitfit.results.scores import read_metrics
from bitfit.study import cells
from bitfit.tools import multi_task
from glue_evaluator import GLUEvaluator
from utils import UserError

BIAS = "model.layers.1.mlp.Wi.bias"
RATE = "lr0.01_seed"


def command(output, model, *more, kind="bitfit"):
    """Run a small command with added biases, without dropout."""
    more = ("--learning-rate", "1e-2", *more)
    return run_glue.main(flags(output, "--add-biases", *more, kind=kind, model=model))


@pytest.fixture(scope="module")
def sweep(modern, tmp_path_factory):
    """The folder of a sweep of two seeds on the ModernBERT-shaped model."""
    output = tmp_path_factory.mktemp("sweep") / "out"
    files = ("--save-evaluator", "--export-model", "--predict-test")
    assert command(output, modern["modernbert"], "-s", "0", "1", *files) == 0
    return output


@pytest.fixture(scope="module")
def evaluators(sweep):
    return [sweep / f"{RATE}{seed}" / "evaluator" for seed in (0, 1)]


PAIRS = [("a film", "good"), ("a small film is good, and long", "it is bad"), ("no", "no")]


def prepared(model, *seeds, kind="bitfit", components=("bias",), **options):
    evaluator = GLUEvaluator("rte", str(model), None, list(seeds), GLUE, **options)
    evaluator.preprocess_dataset("longest", 128, 8, train_size=24)
    evaluator.prepare(kind, 1e-2, components=components, verbose=False)
    return evaluator


@pytest.mark.parametrize("kind", ["modernbert", "eurobert"])
def test_before_training_the_logits_are_those_of_the_base_model(modern, kind):
    """As predicted, with the classifier of the seed; and the base model's fingerprint stays."""
    with_biases = prepared(modern[kind], 3, add_biases=True)
    base = prepared(modern[kind], 3, kind="frozen", components=())
    for evaluator in (with_biases, base):
        evaluator.prepared.new_stack().load_run(0)
    np.testing.assert_array_equal(with_biases.predict("validation"), base.predict("validation"))
    assert with_biases.prepared.encoder_sha256 == base.prepared.encoder_sha256
    assert len(with_biases.prepared.trainable) > len(base.prepared.trainable)


def test_the_files_of_a_sweep(sweep, modern, evaluators):
    """Runs share a pass; the delta has the biases; the exported folder is plain transformers."""
    assert read_metrics(sweep / f"{RATE}0")[0]["runs_in_one_pass"] == 2
    args = json.loads((sweep / "args.json").read_text())
    assert args["add_biases"] is True
    delta = load_file(evaluators[0] / "delta.safetensors")
    assert delta[BIAS].abs().max() > 1e-3
    assert not any(name.endswith(".weight") for name in delta if name.startswith("model."))
    loaded, info = transformers.AutoModelForSequenceClassification.from_pretrained(
        sweep / f"{RATE}0" / "model", output_loading_info=True
    )
    assert not any(info.values())
    assert loaded.config.mlp_bias
    assert loaded.config.norm_bias
    assert loaded.config.attention_bias
    for name, values in delta.items():
        assert torch.equal(loaded.get_parameter(name), values)
    card = (sweep / f"{RATE}0" / "model" / "README.md").read_text()
    assert "Biases, zero before training, were added to the encoder." in card
    assert "--add-biases" in card
    table = (sweep / f"{RATE}0" / "bias_term_changes.csv").read_text()
    assert "\nmlp.Wi.bias," in table


def test_one_line_says_which_biases_were_added(modern, caplog):
    with caplog.at_level("INFO", "bitfit"):
        prepared(modern["eurobert"], 0, add_biases=True)
    lines = [line for line in caplog.messages if line.startswith("added biases: ")]
    assert lines == [
        "added biases: 14 tensors with 576 zeros (mlp.down_proj, mlp.gate_proj, mlp.up_proj, "
        "self_attn.k_proj, self_attn.o_proj, self_attn.q_proj, self_attn.v_proj), switched on in "
        "the config by attention_bias, mlp_bias"
    ]


@pytest.mark.parametrize("kind", ["modernbert", "eurobert"])
def test_runs_in_one_pass_equal_single_runs(modern, kind):
    """Each row gets the biases of its run; no dropout in this model."""
    together = prepared(modern[kind], 0, 1, add_biases=True)
    assert together.prepared.reason_not_stackable(together.tokens("train")) is None
    together.train_and_evaluate(2)
    for number in (0, 1):
        alone = prepared(modern[kind], number, add_biases=True)
        alone.train_and_evaluate(2)
        together.select(number)
        assert together.record.train_loss == pytest.approx(alone.record.train_loss, rel=1e-4)
        assert np.abs(together.predict("validation") - alone.predict("validation")).max() < 1e-3


@pytest.mark.parametrize("kind", ["modernbert", "eurobert"])
def test_runs_of_frozen_score_like_each_alone(modern, tmp_path, kind):
    """EuroBERT's classifier computes all tokens before it pools."""
    together = prepared(modern[kind], 0, 1, kind="frozen", components=())
    together.train_and_evaluate(1)
    for number in (0, 1):
        alone = prepared(modern[kind], number, kind="frozen", components=())
        alone.train_and_evaluate(1)
        together.select(number)
        assert together.evaluations == alone.evaluations
        alone.save(tmp_path / str(number))
    folders = [tmp_path / "0", tmp_path / "1"]
    check_shared_logits(folders)


def check_shared_logits(folders):
    """Compare the logits of evaluators that predict in one pass with those of each alone."""
    many = multi_task.load_predictor(multi_task.read_evaluators(folders), torch.device("cpu"))
    with many.stack.patched():
        answers = multi_task.predict_logits(many, PAIRS)
    for folder, logits in zip(folders, answers, strict=True):
        check_plain_logits(folder, logits)


def check_plain_logits(folder, logits):
    """Compare logits of PAIRS with those of a loaded evaluator's model, one row at a time."""
    alone = GLUEvaluator.load(folder, None)
    for row, expected in zip(PAIRS, logits, strict=True):
        inputs = alone.loaded.tokenizer(*row, return_tensors="pt")
        with torch.no_grad():
            found = alone.model.eval()(**inputs).logits[0].numpy()
        assert np.abs(found - expected).max() < 1e-4


def test_a_loaded_evaluator_has_its_biases(sweep, evaluators, tmp_path):
    """Saved again it is the same; trained again it starts from zeros."""
    loaded = GLUEvaluator.load(evaluators[1], None)
    assert "modernbert (added biases), bitfit (all)" in loaded.caption
    plain = transformers.AutoModelForSequenceClassification.from_pretrained(
        sweep / f"{RATE}1" / "model"
    )
    for (name, a), (_, b) in zip(
        loaded.model.named_parameters(), plain.named_parameters(), strict=True
    ):
        assert torch.equal(a, b), name
    loaded.save(tmp_path / "again")
    for name in ("evaluator.json", "delta.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (evaluators[1] / name).read_bytes()
    loaded.prepare("bitfit", 1e-2, components=["intermediate"], verbose=False)
    assert not loaded.model.get_parameter(BIAS).any()
    assert loaded.prepared.method.components == ("mlp.Wi.bias",)


def test_resume_needs_the_flag(sweep, modern, capsys, caplog):
    words = ["-s", "0", "1", "--save-evaluator", "--export-model", "--predict-test", "--resume"]
    assert command(sweep, modern["modernbert"], *words) == 0
    assert "is finished: there is nothing to resume" in capsys.readouterr().out
    without = flags(sweep, "-l", "1e-2", *words, model=modern["modernbert"])
    assert run_glue.main(without) == 2
    assert "--add-biases was True and is now False" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["full_ft", "rand_uniform"])
def test_other_fine_tune_types(modern, tmp_path, kind):
    """A whole model has its biases in its config, and loading adds none."""
    output = tmp_path / "out"
    assert command(output, modern["modernbert"], "--save-evaluator", kind=kind) == 0
    loaded = GLUEvaluator.load(output / "evaluator", None)
    assert loaded.model.config.mlp_bias
    last = read_metrics(output)[0]["last"]["validation"]
    assert loaded.evaluate("validation") == pytest.approx(last)
    loaded.save(tmp_path / "again")
    again = GLUEvaluator.load(tmp_path / "again", None)
    np.testing.assert_array_equal(again.predict("validation"), loaded.predict("validation"))
    if kind == "rand_uniform":  # by default as many values as bitfit trains
        drawn = sum(mask.sum() for mask in loaded.masks.values())
        assert drawn == 736


def test_a_random_mask_without_biases_needs_a_size(modern, tmp_path, capsys):
    argv = flags(tmp_path / "out", kind="rand_uniform", model=modern["modernbert"])
    assert run_glue.main(argv) == 2
    assert "the default size of the mask: give --mask-size" in capsys.readouterr().err


def test_deltas(evaluators, sweep, tmp_path, capsys):
    """Each command of deltas.py."""
    assert deltas.main(["show", str(evaluators[0])]) == 0
    assert "\nmlp.Wi " in capsys.readouterr().out
    assert deltas.main(["compare", *map(str, evaluators)]) == 0
    assert "modernbert (added biases), bitfit (all)" in capsys.readouterr().out
    average = ["average", *map(str, evaluators), "-o", str(tmp_path / "mean"), "-d", "cpu"]
    assert deltas.main(average) == 0
    mean = load_file(tmp_path / "mean" / "delta.safetensors")[BIAS]
    both = [load_file(folder / "delta.safetensors")[BIAS] for folder in evaluators]
    assert torch.allclose(mean, (both[0] + both[1]) / 2)
    apply = ["apply", str(evaluators[0]), "--scale", "0.5", "-o", str(tmp_path / "model")]
    assert deltas.main(apply) == 0
    half = load_file(tmp_path / "model" / "model.safetensors")[BIAS]
    assert torch.allclose(half, both[0] / 2)


def test_several_evaluators_answer_together(evaluators, modern, tmp_path):
    """Evaluators with and without added biases share the base model."""
    frozen = flags(tmp_path / "frozen", "--save-evaluator", kind="frozen",
                   model=modern["modernbert"])  # fmt: skip
    assert run_glue.main(frozen) == 0
    folders = [*evaluators, tmp_path / "frozen" / "evaluator"]
    check_shared_logits(folders)


def test_a_warm_start_needs_the_flag(evaluators, modern):
    evaluator = prepared(modern["modernbert"], 0, kind="frozen", components=())
    with pytest.raises(UserError, match="has added biases: give --add-biases too"):
        evaluator.prepare("frozen", 1e-2, verbose=False, start_from=evaluators[0])


def plan(output, model, *rows):
    words = ["plan", "-o", str(output), "--tables", "3", "--tasks", "rte", "--models", str(model)]
    words += ["--data-dir", str(GLUE), "--train-size", "24", "--epochs", "1", "--seeds", "0"]
    return paper.main([*words, "--add-biases", "--rows", *rows])


def test_a_study(modern, tmp_path, capsys):
    """Rows that train biases have the flag; b_v is a row of models with a value projection."""
    rows = ("full_ft", "bitfit", "b_v", "frozen", "rand_uniform", "rand_row_col")
    assert plan(tmp_path / "study", modern["eurobert"], *rows) == 0
    study = cells.read_study(tmp_path / "study")
    added = {cell.row for cell in study.cells if "--add-biases" in cell.flags}
    assert added == {"full_ft", "bitfit", "b_v", "rand_uniform"}
    (cell,) = (cell for cell in study.cells if cell.row == "b_v")
    assert cell.args["bias_terms"] == ["value"]
    assert run_glue.main(cell.command(study.output, "-d", "cpu")[2:]) == 0
    metrics = next((study.output / cell.name).rglob("metrics.json"))
    assert json.loads(metrics.read_text())["bias_terms"] == ["self_attn.v_proj"]
    assert paper.main(["report", "-o", str(study.output)]) == 0
    assert "b_v" in capsys.readouterr().out


def test_a_row_that_a_model_has_no_biases_for(modern, tmp_path, capsys):
    """Refused when the study is planned."""
    assert plan(tmp_path / "study", modern["modernbert"], "bitfit", "b_v") == 2
    message = capsys.readouterr().err
    assert "--bias-terms value: this modernbert model has no such bias" in message
    assert message.count("\n") == 1
