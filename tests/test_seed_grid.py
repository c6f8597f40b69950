"""--init-seed and --data-seed: runs of a grid equal single commands, and draw separately."""

import json
import shutil
import signal

import compare
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import GLUE, TINY_BERT
from interruption import output_contents
from moments import at_step, send
from small_command import flags

import run_glue
from bitfit.model.run import Run
from glue_evaluator import GLUEvaluator

GRID = ["--init-seed", "0", "3", "--data-seed", "0", "5"]
NAMES = ["lr0.001_seed0", "lr0.001_init0_data5", "lr0.001_init3_data0", "lr0.001_init3_data5"]


@pytest.fixture
def without_dropout(tmp_path):
    """The folder of a model without dropout, whose runs in one pass equal single runs."""
    folder = shutil.copytree(TINY_BERT, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config |= dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), 0.0)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def contents(folder):
    """Return the contents of a single command's files that do not depend on the number of runs."""
    args = ("args.json", "metrics.json")
    found = {name: value for name, value in output_contents(folder).items() if name not in args}
    metrics = json.loads((folder / "metrics.json").read_text())
    names = ("learning_rate", "seed", "data_seed", "train_loss", "evaluations")
    return found | {name: metrics.get(name) for name in names}


@pytest.mark.parametrize("kind", ["bitfit", "rand_row_col"])
def test_the_runs_of_a_grid_equal_their_single_commands(tmp_path, without_dropout, kind):
    """In one pass up to rounding, and one after the other bit by bit, with dropout too."""
    model = without_dropout if kind == "bitfit" else TINY_BERT
    more = ["-e", "2", "--save-evaluator"]
    assert run_glue.main(flags(tmp_path / "all", *more, *GRID, kind=kind, model=model)) == 0
    assert {path.name for path in (tmp_path / "all").glob("lr*")} == set(NAMES)
    table = pd.read_csv(tmp_path / "all/results.csv")
    assert table["run"].tolist() == NAMES
    assert table[["init_seed", "data_seed"]].to_numpy().tolist() == [[0, 0], [0, 5], [3, 0], [3, 5]]
    for name, init, data in (NAMES[1], "0", "5"), (NAMES[2], "3", "0"):
        single = tmp_path / name
        seeds = ["--init-seed", init, "--data-seed", data]
        assert run_glue.main(flags(single, *more, *seeds, kind=kind, model=model)) == 0
        together, alone = contents(tmp_path / "all" / name), contents(single)
        assert (alone["seed"], alone["data_seed"]) == (int(init), int(data))
        if kind != "bitfit":
            assert together == alone
        assert together["train_loss"] == pytest.approx(alone["train_loss"], rel=1e-5)
    assert len(set(table["train_loss"].round(6))) == 4
    runs = [compare.read_run(tmp_path / "all" / name) for name in NAMES]
    assert runs[1].row["seed"] == "init seed 0, data seed 5"
    assert ", 4 seed pairs)" in " ".join(compare.group_label(runs, []).split())
    label = " ".join(compare.group_label(runs[1:2], []).split())
    assert label.endswith(", init seed 0, data seed 5)")
    assert compare.group_label(runs[:1], []).endswith(", seed 0)")


@pytest.mark.parametrize("kind", ["bitfit", "rand_uniform"])
def test_equal_seeds_are_one_seed(tmp_path, kind):
    more = ["--save-evaluator", "--predict-test"]
    assert run_glue.main(flags(tmp_path / "one", *more, "--seed", "3", kind=kind)) == 0
    two = flags(tmp_path / "two", *more, "--init-seed", "3", "--data-seed", "3", kind=kind)
    assert run_glue.main(two) == 0
    assert output_contents(tmp_path / "one") == output_contents(tmp_path / "two")


@pytest.mark.parametrize(
    ("more", "names"),
    [
        (["--init-seed", "0", "2"], ["lr0.001_seed0", "lr0.001_init2_data0"]),
        (["--data-seed", "0", "2"], ["lr0.001_seed0", "lr0.001_init0_data2"]),
    ],
)
def test_the_other_seed_is_0(tmp_path, more, names):
    assert run_glue.main(flags(tmp_path / "out", *more)) == 0
    assert pd.read_csv(tmp_path / "out/results.csv")["run"].tolist() == names


def test_terms_and_seeds_span_one_grid(tmp_path, capsys):
    terms = ["--bias-terms", "all", "--bias-terms", "none"]
    assert run_glue.main(flags(tmp_path / "out", *GRID, *terms)) == 0
    table = pd.read_csv(tmp_path / "out/results.csv")
    assert table["run"].tolist() == [f"{name}_{term}" for term in ("all", "none") for name in NAMES]
    variance = pd.read_csv(tmp_path / "out/seed_variance.csv")
    assert variance["bias_terms"].tolist() == ["all"] * 3 + ["none"] * 3
    assert "percent of the variance" in capsys.readouterr().out


def new_evaluator(kind="bitfit", **seeds):
    evaluator = GLUEvaluator("rte", str(TINY_BERT), None, data_dir=GLUE, **seeds)
    evaluator.preprocess_dataset("longest", 48, 8, train_size=24)
    evaluator.prepare(kind, 1e-3, components=["bias"] * (kind == "bitfit"), verbose=False)
    return evaluator


def initial_params(evaluator):
    return dict(zip(evaluator.runs, evaluator.need_prepared().new_stack().params, strict=True))


def test_the_init_seed_draws_the_classifier_and_the_data_seed_the_rows():
    evaluator = new_evaluator(seed=[0, 3], data_seed=[0, 5])
    runs = [Run(1e-3, 0), Run(1e-3, 0, 5), Run(1e-3, 3, 0), Run(1e-3, 3, 5)]
    assert evaluator.runs == runs
    params, rows = initial_params(evaluator), {}
    for run in runs:
        split = evaluator.need_loaded().dataset.split("train")
        rows[run] = split.tokens.labels_of(split.rows_of_seed[run.effective_data_seed])
        alone = new_evaluator(seed=run.seed, data_seed=run.effective_data_seed)
        assert torch.equal(initial_params(alone)[run], params[run])
    assert torch.equal(params[runs[0]], params[runs[1]])
    assert torch.equal(params[runs[2]], params[runs[3]])
    assert not torch.equal(params[runs[0]], params[runs[2]])
    assert np.array_equal(rows[runs[0]], rows[runs[2]])
    assert not np.array_equal(rows[runs[0]], rows[runs[1]])


def test_the_init_seed_draws_the_random_mask():
    masks = [
        new_evaluator("rand_uniform", seed=seed, data_seed=data_seed).masks
        for seed, data_seed in ((0, 0), (0, 1), (1, 0))
    ]
    name = next(name for name in masks[0] if name.endswith("word_embeddings.weight"))
    assert torch.equal(masks[0][name], masks[1][name])
    assert not torch.equal(masks[0][name], masks[2][name])


def test_the_data_seed_draws_order_and_dropout(tmp_path):
    """A warm start from the same task leaves nothing to initialize: the init seed has no effect."""
    source = tmp_path / "source"
    assert run_glue.main(flags(source, "--save-evaluator")) == 0
    tables = []
    for init, data in (("0", "2"), ("1", "2"), ("0", "3")):
        out = tmp_path / f"{init}-{data}"
        seeds = ["--init-seed", init, "--data-seed", data]
        assert run_glue.main(flags(out, "--start-from", str(source), *seeds)) == 0
        tables.append((out / "validation_logits.safetensors").read_bytes())
    assert tables[0] == tables[1]
    assert tables[0] != tables[2]


def test_an_interrupted_grid_resumes(tmp_path, capsys):
    more = ["-e", "3", "--save-evaluator", *GRID]
    assert run_glue.main(flags(tmp_path / "quiet", *more)) == 0
    with at_step(4, send(signal.SIGTERM)):
        assert run_glue.main(flags(tmp_path / "out", *more)) == 128 + signal.SIGTERM
    other = [*more[:-1], "6", "--resume"]
    assert run_glue.main(flags(tmp_path / "out", *other)) == 2
    assert "--data-seed was 0 5 and is now 0 6" in capsys.readouterr().err
    assert run_glue.main(flags(tmp_path / "out", *more, "--resume")) == 0
    assert output_contents(tmp_path / "quiet") == output_contents(tmp_path / "out")


def test_a_saved_evaluator_keeps_both_seeds(tmp_path):
    out = tmp_path / "out"
    seeds = ["--init-seed", "0", "--data-seed", "5"]
    assert run_glue.main(flags(out, *seeds, "--save-evaluator", "--export-model")) == 0
    card = (out / "model/README.md").read_text()
    assert f" {' '.join(seeds)} " in card
    assert "Learning rate 0.001, init seed 0, data seed 5, fp32" in card
    loaded = GLUEvaluator.load(out / "evaluator", None)
    assert loaded.runs == [Run(1e-3, 0, 5)]
    assert loaded.caption.endswith("learning rate 0.001, init seed 0, data seed 5")
    loaded.save(tmp_path / "again")
    folders = out / "evaluator", tmp_path / "again"
    metadata = [json.loads((folder / "evaluator.json").read_text()) for folder in folders]
    assert metadata[0] == metadata[1]
    words = ["-t", "rte", "-m", str(TINY_BERT), "--data-dir", str(GLUE), "--gpu-device", "cpu"]
    words += ["-o", str(tmp_path / "scored"), "--start-from", str(out), "--evaluate-only"]
    assert run_glue.main(words) == 0
    scored = json.loads((tmp_path / "scored/metrics.json").read_text())
    assert (scored["seed"], scored["data_seed"]) == (0, 5)
