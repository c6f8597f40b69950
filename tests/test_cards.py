"""Model cards: read back by the Hub's own classes, held against the run that they are of."""

import io
import json
import re
import shlex
from contextlib import redirect_stdout

import pytest
from conftest import COMMITS, GLUE, ROOT, TINY_BERT
from huggingface_hub import ModelCard, repocard_data

import run_glue
from bitfit.artifacts import model_card
from bitfit.data.tasks import TASKS
from bitfit.options import parse_args

OPTIONS = ["--epochs", "2", "--train-size", "16", "-l", "1e-3", "3e-3", "--keep", "best"]
OPTIONS += ["--bias-terms", "query", "value", "--warmup-ratio", "0.1", "--export-model"]


def read(folder):
    """(metadata, text) as the Hub's client reads them; they are the file, to the letter."""
    path = folder / "model" / "README.md"
    card = ModelCard.load(path)
    assert str(card) == path.read_text(encoding="utf-8")
    return card.data, card.text


@pytest.fixture(scope="module")
def made(hub_home, tmp_path_factory):
    """Two runs of a model on the Hub; the folder of the one that was exported, and the flags."""
    output = tmp_path_factory.mktemp("of the machine") / "out"
    argv = ["-o", str(output), "-t", "rte", "-f", "bitfit", "-m", "org/tiny", *OPTIONS]
    argv += ["--data-dir", str(GLUE), "--gpu-device", "cpu", "--checkpoint-every", "0"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub_home / "hub"))
        assert run_glue.main(argv) == 0
    (model,) = output.glob("*/model")
    return model.parent, argv


def test_the_card_of_a_run(made):
    folder, _ = made
    data, text = read(folder)
    assert data.to_dict() == {
        "base_model": "org/tiny", "library_name": "transformers", "metrics": ["accuracy"],
        "pipeline_tag": "text-classification", "tags": ["bitfit"],
    }  # fmt: skip
    metrics = json.loads((folder / "metrics.json").read_text())
    score, epoch = metrics["best"]["validation"]["Accuracy"], metrics["best"]["epoch"]
    assert f"| validation | 240 | Accuracy | {100 * score:.1f} |" in text
    assert f"epoch {epoch}, the best of 2 epochs and of 2 runs by Accuracy" in text
    halved = json.loads((folder.parent / "args.json").read_text()) | {"halving": [1]}
    assert "optimistic. --halving selected" in model_card.which_weights(metrics, halved)
    assert (
        f"(commit {COMMITS['main']}) fine-tuned on 16 training examples of RTE (other examples"
        in text
    )
    assert f"query, value; {metrics['trained_parameters']:,} of 475,266 parameters" in text
    assert text.startswith("\n<!-- No licence is given yet")
    for picture in re.findall(r"!\[.*\]\((.*)\)", text):
        assert (folder / "model" / picture).read_bytes() == (folder / picture).read_bytes()
    assert text.count("![") == 2


def test_a_published_folder_names_no_path_of_this_machine(made):
    folder, _ = made
    paths = [str(ROOT).encode(), str(folder.parent.parent).encode(), b"of the machine"]
    for file in (folder / "model").iterdir():
        assert not any(path in file.read_bytes() for path in paths), file.name


def test_the_command_on_the_card_is_the_one_that_was_given(made):
    folder, argv = made
    block = re.search(r"```\n(python run_glue.py .*)\n```", read(folder)[1])[1]
    shown, given = (vars(parse_args("", words)) for words in (shlex.split(block)[2:], argv))
    assert shown.pop("model_revision") == COMMITS["main"]
    assert (shown["output_path"], shown["data_dir"], shown["precision"]) == ("out", "glue", "fp32")
    differ = {name for name in shown if shown[name] != given[name]}
    assert differ == {"output_path", "data_dir", "precision", "gpu_device", "checkpoint_every"}


def test_the_python_on_the_card_runs(made, monkeypatch):
    folder, _ = made
    monkeypatch.chdir(folder)
    printed = io.StringIO()
    with redirect_stdout(printed):
        exec(re.search(r"```python\n(.*?)```", read(folder)[1], re.DOTALL)[1], {})
    assert printed.getvalue().strip() in TASKS["rte"].labels


@pytest.fixture
def card(made, tmp_path):
    """A card of the same run, had it been of another task, or otherwise."""

    def make(task="rte", rows=None, scores=None, model=None, **changed):
        splits = TASKS[task].validation_splits
        metrics, metadata = (
            json.loads((made[0] / f"{n}.json").read_text()) for n in ("metrics", "args")
        )
        metadata |= {"learning_rate": [1e-3], "seed": [0], "keep": "last", "train_size": None}
        metrics |= {"task": task, "main_metric": TASKS[task].metrics[0]}
        metrics["validation_rows"] = dict(
            zip(splits, rows or TASKS[task].validation_rows, strict=True)
        )
        metrics["last"] = {"epoch": 2, **dict.fromkeys(splits, scores or {"Accuracy": 0.5})}
        metrics |= {name: value for name, value in changed.items() if name in metrics}
        metadata |= {name: value for name, value in changed.items() if name in metadata}
        (tmp_path / "metrics.json").write_text(json.dumps(metrics))
        (tmp_path / "metrics.csv").write_text("epoch,split,metric,value\n")
        (tmp_path / "model").mkdir()
        model_card.write_model_card(tmp_path, TASKS[task], metadata)
        return read(tmp_path)

    return make


SCORES = {
    "cola": ({"MCC": 0.61234567}, {"matthews_correlation": 0.6123}),
    "mnli": ({"Accuracy": 0.8}, {"accuracy": 0.8}),
    "mrpc": ({"F1": 0.9, "Accuracy": 0.85}, {"f1": 0.9, "accuracy": 0.85}),
    "stsb": ({"Spearman": 0.88, "Pearson": 0.89}, {"spearmanr": 0.88, "pearsonr": 0.89}),
}


@pytest.mark.parametrize("task", SCORES)
def test_scores_on_glues_own_rows_are_told_as_such(card, task):
    scores, named = SCORES[task]
    data, text = card(task, scores=scores)
    assert data["datasets"] == ["nyu-mll/glue"]
    assert data["language"] == "en"
    assert data["metrics"] == list(named)
    assert data["model_name"] == f"tiny-{task}-bitfit"
    told = [
        (r.dataset_config, r.dataset_split, r.metric_type, r.metric_value)
        for r in data.eval_results
    ]
    splits = TASKS[task].validation_splits
    assert told == [(task, split, *item) for split in splits for item in named.items()]
    assert {(r.task_type, r.dataset_type) for r in data.eval_results} == {
        ("text-classification", "nyu-mll/glue")
    }
    index = data.to_dict()["model-index"]
    assert repocard_data.model_index_to_eval_results(index)[1] == data.eval_results
    assert f"fine-tuned on {TASKS[task].folder} of [GLUE]" in text
    assert "The weights are those after the last epoch, 2." in text


def test_one_row_more_is_not_glue(card):
    data, text = card(rows=[278])
    assert "model-index" not in data.to_dict()
    assert data["datasets"] is data["language"] is None
    assert "RTE (other examples than GLUE's)." in text
    assert "| validation | 278 | Accuracy | 50.0 |" in text


def test_a_random_encoder_has_no_base_model(card):
    data, text = card(random_encoder=True)
    assert data["base_model"] is None
    assert "the encoder began with random weights" in text


def test_a_local_folder_is_named_without_its_path(card):
    data, text = card(model_name=str(TINY_BERT), model_commit=None)
    assert data["base_model"] is None
    assert "`tiny_bert`, a local folder, fine-tuned on RTE" in text
    assert "--model-name tiny_bert" in text
    assert "--model-revision" not in text


def test_a_run_that_diverged_has_no_scores(card):
    data, text = card(diverged="the loss was not finite at epoch 2, step 1", last={})
    assert "model-index" not in data.to_dict()
    assert "The training diverged: the loss was not finite at epoch 2, step 1." in text
    assert "|" not in text


@pytest.mark.parametrize("kind", ["full_ft", "frozen", "rand_uniform", "rand_row_col"])
def test_only_bitfit_is_called_so(card, kind):
    data, text = card(fine_tune_type=kind, bias_terms=[])
    assert data["tags"] is None
    assert model_card.TRAINED[kind] in text
    assert f"# tiny-rte-{kind}" in text


def test_several_ranks_stand_in_the_command(card):
    assert "torchrun --nproc-per-node 2 run_glue.py " in card(ranks=2)[1]
