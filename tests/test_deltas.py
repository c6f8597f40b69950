"""Deltas shown, compared, averaged and applied, beside plain NumPy and plain transformers."""

import itertools
import json
import os
import sys
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from conftest import GLUE, TINY_BERT
from deltas import main
from interruption import output_contents
from pictures import real_pictures
from processes import exit_status, start_process
from safetensors.numpy import load_file

from bitfit.tools import deltas, saved_evaluators
from glue_evaluator import GLUEvaluator

KINDS = {  # folder: (task, seeds, fine-tune type, components, random encoder)
    "rte": ("rte", [0, 1, 2], "bitfit", ["bias"], False),
    "sst2": ("sst2", [0], "bitfit", ["bias"], False),
    "query": ("rte", [0], "bitfit", ["attention.self.query.bias"], False),
    "random": ("rte", [0], "bitfit", ["bias"], True),
    "frozen": ("mnli", [0, 1], "frozen", [], False),
    "mask0": ("rte", [0], "rand_uniform", [], False),
    "mask1": ("rte", [1], "rand_uniform", [], False),
    "full": ("rte", [0], "full_ft", [], False),
}


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """Runs' folders as run_glue.py leaves them: rte/seed0 and so on."""
    folder = tmp_path_factory.mktemp("out")
    for name, (task, seeds, kind, components, random_encoder) in KINDS.items():
        evaluator = GLUEvaluator(task, str(TINY_BERT), None, seeds, GLUE, None, random_encoder)
        evaluator.preprocess_dataset("longest", 64, 8, train_size=24)
        evaluator.prepare(kind, 5e-3, "adamw", components, 2000, verbose=False)
        evaluator.train_and_evaluate(1)
        for number, seed in enumerate(seeds):
            evaluator.select(number)
            output = folder / name / f"seed{seed}" if len(seeds) > 1 else folder / name
            evaluator.save(output / "evaluator")
            if kind == "bitfit":
                with real_pictures() if name == "rte" else nullcontext():
                    evaluator.plot_terms_changes(output / "bias_term_changes")
    return folder


@pytest.fixture
def here(out, tmp_path, monkeypatch):
    """A folder of this test's own, in which `out` leads to those runs."""
    (tmp_path / "out").symlink_to(out)
    monkeypatch.chdir(tmp_path)
    return tmp_path


ZERO = "zero_gradient"
SEEDS = [f"out/rte/seed{seed}" for seed in range(3)]


def values_of(folder):
    return load_file(Path(folder) / "evaluator/delta.safetensors")


def base_values():
    model = transformers.AutoModel.from_pretrained(TINY_BERT)
    return {f"bert.{name}": p.detach().numpy() for name, p in model.named_parameters()}


def die_at_call(number, folder, argv):
    """Run the command, and end it without a word before file `number` gets its name, from 1."""
    os.chdir(folder)
    calls = itertools.count(1)

    def dying(plain):
        def call(*args):
            if next(calls) == number:
                os._exit(9)
            plain(*args)

        return call

    os.replace, os.rename = dying(os.replace), dying(os.rename)
    sys.exit(main(argv))


@pytest.mark.parametrize("words", [["average", *SEEDS], ["apply", SEEDS[0]]])
@pytest.mark.parametrize("exists", [False, True])
def test_a_killed_command_can_be_given_again(here, words, exists):
    """It is killed between any two of its files."""
    if exists:
        Path("made").mkdir()
    for number in (1, 2, 4, 1_000):
        folder = str(Path.cwd())
        process = start_process(die_at_call, number, folder, [*words, "-o", "made"])
        process.join()
        if process.exitcode == 0:
            break
        assert process.exitcode == 9
        assert not list(Path().glob("made/*"))
    assert process.exitcode == 0
    assert sorted(path.name for path in Path().iterdir()) == ["made", "out"]
    assert main([*words, "-o", "expected"]) == 0
    assert output_contents(Path("made")) == output_contents(Path("expected"))


def change(folder):
    """The encoder's delta as one vector, in the plainest way."""
    base, values = base_values(), values_of(folder)
    names = [name for name in values if name in base]
    assert set(names) == {name for name in base if name.endswith("bias")}
    return np.concatenate([np.float64(values[name]) - base[name] for name in names])


@pytest.mark.pictures
def test_compare_is_what_plain_numpy_says(here, capsys):
    folders = [*SEEDS, "out/sst2"]
    words = ["--csv", "pairs.csv", "--plot", "pairs.png"]
    assert main(["compare", *folders, *words]) == 0
    table = pd.read_csv("pairs.csv")
    assert len(table) == 6
    plain = {name: change(name) for name in folders}
    for row in table.itertuples():
        a, b = plain[f"out/{row.first}"], plain[f"out/{row.second}"]
        lengths = np.linalg.norm(a), np.linalg.norm(b)
        assert np.isclose(row.cosine, a @ b / lengths[0] / lengths[1])
        assert np.isclose(row.distance, np.linalg.norm(a - b) / np.mean(lengths))
        assert np.allclose((row.first_length, row.second_length), lengths)
    shown = capsys.readouterr().out
    assert shown.startswith("How 4 saved evaluators changed the encoder of tiny_bert, bitfit (all)")
    assert "\n4 sst2 " in shown
    assert (here / "pairs.png").stat().st_size > 10_000


def test_known_directions(here):
    """A delta beside its double, its opposite and none at all."""
    (member,) = saved_evaluators.read_evaluators(SEEDS[:1])
    evaluator = GLUEvaluator.load(member.folder, None)
    start = evaluator.result.stack.named_params(0, evaluator.result.stack.initial_params)
    scaled = [
        member._replace(
            name=str(factor),
            tensors={n: start[n] + factor * (t - start[n]) for n, t in member.tensors.items()},
        )
        for factor in (1, 2, -1, 0)
    ]
    found = deltas.compare_deltas(scaled, evaluator)
    assert np.allclose(found.cosine.loc["1"], [1, 1, -1, np.nan], atol=1e-5, equal_nan=True)
    assert np.allclose(found.distance.loc["1"], [0, 2 / 3, 2, 2], atol=1e-5)
    assert found.norms["0"] == 0
    deltas.comparison_heatmap(found, "a caption").canvas.draw()


@pytest.mark.pictures
def test_show_is_what_the_training_plotted(here, capsys):
    assert main(["show", "out/rte/seed1", "--csv", "a.csv", "--plot", "a.png"]) == 0
    assert Path("a.csv").read_text() == Path("out/rte/seed1/bias_term_changes.csv").read_text()
    assert Path("a.png").read_bytes() == Path("out/rte/seed1/bias_term_changes.png").read_bytes()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("RTE, tiny_bert, bitfit (all), learning rate 0.005, seed 1: mean")
    shown = {words[0]: words[1:] for words in map(str.split, lines[2:])}
    name = "bert.encoder.layer.1.attention.output.dense.bias"
    moved = np.abs(values_of("out/rte/seed1")[name] - base_values()[name]).mean()
    assert shown["attention_output"][1] == f"{moved:.5f}"
    row = np.array(shown["attention_output"], np.float64)
    assert np.isclose(row[-1], row[:-1].mean(), atol=2e-5)
    assert "bert.pooler.dense.bias" in shown
    assert not any("classifier" in line for line in lines)


def test_an_average_is_an_evaluator_with_the_mean(here, capsys):
    assert main(["average", *SEEDS, "-o", "soup", "--gpu-device", "cpu"]) == 0
    shown = capsys.readouterr().out.splitlines()
    each = [values_of(folder) for folder in SEEDS]
    mean = load_file("soup/delta.safetensors")
    assert mean.keys() == each[0].keys()
    assert "classifier.weight" in mean
    for name, values in mean.items():
        assert np.allclose(values, np.mean([run[name] for run in each], axis=0), atol=1e-7)
    loaded = GLUEvaluator.load("soup", None)
    table = pd.read_csv("soup/members.csv")
    scores = table.pop("validation Accuracy").tolist()
    saved = [GLUEvaluator.load(f"{folder}/evaluator", None) for folder in SEEDS]
    assert scores[:3] == [run.evaluations["validation"]["Accuracy"][-1] for run in saved]
    assert scores[3] == loaded.evaluate("validation")["Accuracy"]
    assert loaded.evaluations == {"validation": {"Accuracy": [scores[3]]}}
    assert table["name"].tolist() == ["seed0", "seed1", "seed2", "average"]
    assert loaded.caption == "RTE, tiny_bert, bitfit (all), average of 3"
    assert shown[-1] == (
        f"validation Accuracy: average {100 * scores[3]:.1f}; its members "
        f"{100 * np.mean(scores[:3]):.1f} on average, {100 * max(scores[:3]):.1f} the best"
    )
    assert json.loads(Path("soup/evaluator.json").read_text())["train_loss"] == []  # of none
    loaded.save(here / "again")
    assert GLUEvaluator.load(here / "again", None).result.averaged == loaded.result.averaged
    assert [part["weight"] for part in loaded.result.averaged] == pytest.approx([1 / 3] * 3)
    assert [Path(part["folder"]).samefile(f"{f}/evaluator") for part, f in zip(
        loaded.result.averaged, SEEDS, strict=True)] == [True] * 3  # fmt: skip


def test_an_average_with_one_whose_key_moved(here):
    """Evaluators from before biases without a gradient were kept fixed."""
    found = saved_evaluators.read_evaluators(SEEDS[:2])
    old = found[1]._replace(metadata={k: v for k, v in found[1].metadata.items() if k != ZERO})
    evaluator = GLUEvaluator.load(found[0].folder, None)
    average, _ = deltas.average_evaluators(found, [1, 1], evaluator)
    assert len(average.prepared.zero_gradient) == 3
    average, _ = deltas.average_evaluators([found[0], old], [1, 1], evaluator)
    assert average.prepared.zero_gradient == {}


def test_the_order_of_bias_terms_is_no_difference():
    query, value = "attention.self.query.bias", "attention.self.value.bias"
    metadata = {"fine_tune_type": "bitfit", "seed": 0}
    pair = [saved_evaluators.SavedEvaluator("a", Path("a"), metadata | {"components": terms}, {})
            for terms in ([query, value], [value, query])]  # fmt: skip
    saved_evaluators.check_same_trainable(pair)
    other = pair[0]._replace(metadata=metadata | {"components": [query]})
    with pytest.raises(saved_evaluators.UserError, match="different trained parameters"):
        saved_evaluators.check_same_trainable([pair[0], other])


def test_weights(here):
    assert main(["average", *SEEDS, "-o", "one", "--weights", "0", "7", "0"]) == 0
    alone, single = load_file("one/delta.safetensors"), values_of(SEEDS[1])
    assert all(np.array_equal(alone[name], single[name]) for name in single)
    table = pd.read_csv("one/members.csv", index_col="name")["validation Accuracy"]
    assert table["average"] == table["seed1"]
    assert main(["average", "one", SEEDS[0], "-o", "two", "--weights", "1", "3"]) == 0
    mixed, other = load_file("two/delta.safetensors"), values_of(SEEDS[0])
    assert all(np.allclose(mixed[n], (single[n] + 3 * other[n]) / 4, atol=1e-7) for n in single)
    table = pd.read_csv("two/members.csv", dtype=str, keep_default_na=False)
    assert table["seed"].tolist() == ["", "0", ""]  # an average has no seed of its own
    assert table["weight"].tolist() == ["0.25", "0.75", "1.0"]


def test_an_average_of_classifiers_scored_on_two_splits(here):
    assert main(["average", "out/frozen/seed0", "out/frozen/seed1", "-o", "soup"]) == 0
    table = pd.read_csv("soup/members.csv")
    scored = GLUEvaluator.load("soup", None)
    for split in ("validation_matched", "validation_mismatched"):
        assert table[f"{split} Accuracy"].iloc[-1] == scored.evaluate(split)["Accuracy"]


@pytest.mark.parametrize("scale", [0, 0.5, 1, 2])
def test_apply_is_base_and_delta(here, scale):
    words = [] if scale == 1 else ["--scale", str(scale)]
    assert main(["apply", SEEDS[0], "-o", "model", *words]) == 0
    made = transformers.AutoModelForSequenceClassification.from_pretrained("model")
    values, base = values_of(SEEDS[0]), base_values()
    for name, parameter in made.named_parameters():
        trained, start = values.get(name), base.get(name)
        expected = trained if start is None else start
        if start is not None and trained is not None:
            expected = start + scale * (trained - start)
        assert np.allclose(parameter.detach(), expected, atol=1e-6), name
        exact = {0: start, 1: trained}.get(scale)
        assert exact is None or np.array_equal(parameter.detach(), exact) or start is None


def test_an_applied_delta_predicts_as_the_evaluator(here):
    assert main(["apply", "out/rte/seed0", "-o", "model"]) == 0
    model = transformers.AutoModelForSequenceClassification.from_pretrained("model").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained("model")
    evaluator = GLUEvaluator.load("out/rte/seed0/evaluator", None)
    rows = [line.split("\t") for line in (GLUE / "RTE/test.tsv").read_text().splitlines()[1:9]]
    inputs = tokenizer([r[1] for r in rows], [r[2] for r in rows], padding=True, truncation=True,
                       max_length=64, return_tensors="pt")  # fmt: skip
    with torch.no_grad():
        assert np.allclose(model(**inputs).logits, evaluator.predict("test")[:8], atol=1e-5)


def test_a_random_mask_is_scaled_where_it_lies(here):
    assert main(["apply", "out/mask0", "-o", "model", "--scale", "0.5"]) == 0
    made = transformers.AutoModel.from_pretrained("model").state_dict()
    values, base = values_of("out/mask0"), base_values()
    for name, start in base.items():
        expected = start.copy().ravel()
        if name in values:
            at = values[f"{name}:positions"]
            expected[at] += 0.5 * (values[name] - expected[at])
        exported = made[name.removeprefix("bert.")].numpy().ravel()
        assert np.allclose(exported, expected, atol=1e-6), name


def test_a_moved_base_model_and_moved_data(here):
    (here / "base").symlink_to(TINY_BERT)
    words = ["--model-name", "base", "--data-dir", str(GLUE)]
    assert main(["average", *SEEDS[:2], "-o", "soup", *words]) == 0
    metadata = json.loads((here / "soup/evaluator.json").read_text())
    assert metadata["model_name"] == str(TINY_BERT)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("show nowhere", "there is no saved evaluator in nowhere: train with --save-evaluator"),
        ("show sweep", "there is no saved evaluator in sweep: train with --save-evaluator"),
        ("show torn", "torn/evaluator.json is damaged: the checksum of delta.safetensors is wrong"),
        ("show out/full", "out/full/evaluator trained everything (full_ft), so it has no delta"),
        ("show out/frozen/seed0", "seed0 is frozen: only bitfit has bias terms to show"),
        ("show out/rte/seed0 --plot x.bmp", "argument --plot: 'x.bmp' is not a .png, .pdf or "),
        ("show out/rte/seed0 --csv no/x.csv", "argument --csv: 'no/x.csv' is not a .csv file in a"),
        ("show out/rte/seed0 -m used", "used has no config.json: give another --model-name"),
        ("compare out/rte/seed0", "give two folders or more"),
        ("compare out/rte/seed0 out/rte/seed0/evaluator", "seed0/evaluator is given twice: give"),
        ("compare out/rte/seed0 out/mask0", "mask0 is rand_uniform: only bitfit has bias terms"),
        ("compare out/rte/seed0 out/full", "out/full/evaluator trained everything (full_ft)"),
        ("compare out/sst2 out/query", "sst2 (bitfit (all)) and query (bitfit (query)) have "
         "different trained parameters: give evaluators with the same"),
        ("compare out/sst2 out/random", "sst2 (tiny_bert) and random (tiny_bert (random encoder)) "
         "have different base models: give evaluators with the same"),
        ("average out/rte/seed0 out/sst2 -o new", "rte/seed0 (RTE) and sst2 (SST-2) have different "
         "tasks: give evaluators with the same"),
        ("average out/rte/seed0 out/query -o new", "have different trained parameters"),
        ("average out/mask0 out/mask1 -o new", "mask0 (rand_uniform (seed 0)) and mask1 "
         "(rand_uniform (seed 1)) have different trained parameters"),
        ("average out/rte/seed0 out/rte/seed1 -o used", "--output-path used is not empty: give a"),
        ("average out/rte/seed0 out/rte/seed1 -o used/x", "--output-path used/x is a file: give a"),
        ("average out/rte/seed0 out/rte/seed1 -o new --weights 1", "--weights: 1 for 2 folders"),
        ("average out/rte/seed0 out/rte/seed1 -o new --weights 0 0", "--weights: their sum is 0"),
        ("apply out/rte/seed0 -o new --scale 1e300", "argument --scale: '1e300' is not a number"),
        ("average out/rte/seed0 out/rte/seed1 -o new --weights 1 -1", "argument --weights: '-1' is "
         "not a number at least 0"),
        ("average out/rte/seed0 out/rte/seed1 -o new --data-dir nodata", "nodata"),
        ("apply out/rte/seed0 -o used", "--output-path used is not empty"),
        ("apply out/full -o new", "out/full/evaluator/model is the whole model"),
        ("apply out/frozen/seed0 -o new --scale 2", "--scale: seed0 did not change the "),
        ("apply out/rte/seed0 -o new --model-name other", "out/rte/seed0/evaluator was trained on "
         "another base model than other"),
    ],
)  # fmt: skip
def test_what_is_refused(here, capsys, command, message):
    for name, file in (("sweep", "results.csv"), ("used", "x")):
        (here / name).mkdir()
        (here / name / file).touch()
    (here / "torn").mkdir()
    for name in ("evaluator.json", "delta.safetensors"):
        data = (here / "out/rte/seed0/evaluator" / name).read_bytes()
        (here / "torn" / name).write_bytes(data[:-1] if name[0] == "d" else data)
    if "other" in command:
        config = transformers.AutoConfig.from_pretrained(TINY_BERT)
        transformers.BertModel(config).save_pretrained("other")
        transformers.AutoTokenizer.from_pretrained(TINY_BERT).save_pretrained("other")
    before = sorted(here.rglob("*"))
    status = exit_status(main, command.split())
    captured = capsys.readouterr()
    assert status == 2
    assert message in captured.err
    assert captured.err.startswith("deltas.py")
    assert captured.err.count("\n") == 1
    assert captured.out == ""
    assert sorted(here.rglob("*")) == before


def test_names():
    for given, expected in {
        ("a/b/evaluator", "a/c/evaluator"): ["b", "c"],
        ("a/b", "a/b/c", "d"): ["a/b", "a/b/c", "d"],
        ("a/b", "a/b/c"): ["b", "c"],
        ("x/seed0/evaluator",): ["seed0"],
        ("out/sst2", "out/sst20"): ["sst2", "sst20"],
    }.items():
        assert saved_evaluators.short_names([Path(folder) for folder in given]) == expected


@pytest.mark.pictures
@pytest.mark.parametrize("count", [2, 9])
def test_nothing_of_the_heatmap_is_cut_off(count):
    names = [f"a-task-of-some-length/lr0.0005_seed{number}" for number in range(count)]
    table = pd.DataFrame(np.ones((count, count)), names, names)
    comparison = deltas.Comparison(pd.Series(np.ones(count), names), table, table)
    figure = deltas.comparison_heatmap(comparison, "How 9 saved evaluators changed " * 6)
    figure.canvas.draw()
    drawn, canvas = figure.get_tightbbox(), figure.get_size_inches()
    assert min(drawn.x0, drawn.y0) >= 0
    assert drawn.x1 <= canvas[0]
    assert drawn.y1 <= canvas[1]
