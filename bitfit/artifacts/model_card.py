"""The model card of an exported model, with which the model's folder is ready to publish.

A card contains only values of metrics.json and args.json, and no path of this machine. A class of
huggingface_hub writes the card's metadata.
"""

import json
import os
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitfit import options
from bitfit.artifacts.run_folder import BY_NAME, HARMLESS
from bitfit.data.tasks import Task
from bitfit.files import atomic_file, write_text
from bitfit.model.run import format_seeds
from bitfit.results import escape
from bitfit.results.scores import read_metrics

if TYPE_CHECKING:
    from huggingface_hub import ModelCardData

Metadata = dict[str, Any]  # the content of args.json or metrics.json
HUB_METRICS = {"MCC": "matthews_correlation", "Spearman": "spearmanr", "Pearson": "pearsonr",
                "Macro-F1": "f1", "Entity-F1": "seqeval"}  # fmt: skip
BITFIT = "[BitFit](https://arxiv.org/abs/2106.10199)"
TRAINED = {
    "full_ft": "All parameters were trained",
    "bitfit": f"Its bias terms and the classifier were trained, as in {BITFIT}",
    "frozen": "The classifier alone was trained, on a frozen encoder",
    "rand_uniform": "Encoder parameters drawn at random and the classifier were trained",
    "rand_row_col": "Random rows and columns of its matrices and the classifier were trained",
}
EXAMPLE = """\
from transformers import AutoModelForSequenceClassification, AutoTokenizer

name = "model"  # this folder, or its name on the Hub
tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoModelForSequenceClassification.from_pretrained(name)
logits = model(**tokenizer({texts}, return_tensors="pt")).logits
print({answer})"""
TAGGING_EXAMPLE = """\
from transformers import AutoModelForTokenClassification, AutoTokenizer

name = "model"  # this folder, or its name on the Hub
tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoModelForTokenClassification.from_pretrained(name)
words = ["The", "cat", "sleeps", "."]
inputs = tokenizer(words, is_split_into_words=True, return_tensors="pt")
numbers = model(**inputs).logits[0].argmax(dim=-1).tolist()
first = [inputs.word_ids().index(n) for n in range(len(words))]  # a word's first sub-token
print([model.config.id2label[numbers[position]] for position in first])"""
LICENCE = (
    "<!-- No licence is given yet: add `license: ...` to the lines above. "
    "The terms of the base model and of the data apply. -->"
)


def write_model_card(folder: Path, task: Task, metadata: Metadata) -> None:
    """Write `model/README.md` in a run's folder, the card of its exported model, with figures."""
    metrics, _ = read_metrics(folder)
    names = [f"learning_curves_{metrics['main_metric'].lower()}.png", "bias_term_changes.png"]
    pictures = [folder / name for name in names if (folder / name).exists()]
    for picture in pictures:
        with atomic_file(folder / "model" / picture.name) as temporary:
            shutil.copyfile(picture, temporary)
    lines = [
        LICENCE,
        *paragraphs(task, metrics, metadata, pictures=[picture.name for picture in pictures]),
    ]
    yaml, body = card_metadata(task, metrics, metadata).to_yaml(), "\n\n".join(lines)
    write_text(folder / "model" / "README.md", f"---\n{yaml}\n---\n\n{body}\n")


def card_metadata(task: Task, metrics: Metadata, metadata: Metadata) -> "ModelCardData":
    """Return the card's metadata for the Hub. The license is left to the author."""
    from huggingface_hub import EvalResult, ModelCardData

    glues, scores = is_glue(task, metrics), scores_of(metrics, metadata)
    results = [
        EvalResult(
            task_type="text-classification",
            dataset_type="nyu-mll/glue",
            dataset_name=f"GLUE {task.folder}",
            dataset_config=task.name,
            dataset_split=split,
            metric_type=hub_metric(metric),
            metric_name=metric,
            metric_value=round(value, 4),
        )
        for split, metric, value in scores
        if glues
    ]
    from_hub = metadata["model_commit"] and not metrics["random_encoder"]
    return ModelCardData(
        base_model=metadata["model_name"] if from_hub else None,
        datasets=["nyu-mll/glue"] if glues else None,
        language="en" if glues else None,
        library_name="transformers",
        metrics=list(dict.fromkeys(hub_metric(metric) for metric in task.metrics)),
        model_name=title(metrics, metadata) if results else None,
        eval_results=results or None,
        pipeline_tag="token-classification" if task.is_tagging else "text-classification",
        tags=["bitfit"] if metrics["fine_tune_type"] == "bitfit" else None,
    )


def hub_metric(metric: str) -> str:
    """Return the name of a metric on the Hub."""
    return HUB_METRICS.get(metric, metric.lower())


def is_glue(task: Task, metrics: Metadata) -> bool:
    """Return whether the number of scored examples is that of GLUE."""
    return tuple(metrics["validation_rows"].values()) == task.validation_rows


def scores_of(metrics: Metadata, metadata: Metadata) -> list[tuple[str, str, float]]:
    """Return [(split, metric, value)] of the exported weights; none for a diverged run."""
    scores = {} if metrics["diverged"] else metrics[metadata["keep"]]
    return [
        (split, metric, value)
        for split in metrics["validation_rows"]
        for metric, value in scores.get(split, {}).items()
    ]


def title(metrics: Metadata, metadata: Metadata) -> str:
    base = Path(without_path(metadata["model_name"])).name
    return f"{base}-{metrics['task']}-{metrics['fine_tune_type']}"


def without_path(word: str) -> str:
    """Return the last part of an existing local path; other words unchanged."""
    return os.path.basename(os.path.abspath(word)) if os.path.exists(word) else word


def paragraphs(
    task: Task, metrics: Metadata, metadata: Metadata, pictures: list[str]
) -> Iterator[str]:
    """Yield the paragraphs below the metadata."""
    yield f"# {escape.markdown(title(metrics, metadata))}"
    yield " ".join(sentences(task, metrics, metadata))
    rows = [
        f"| {split} | {metrics['validation_rows'][split]:,} | {metric} | {100 * value:.1f} |"
        for split, metric, value in scores_of(metrics, metadata)
    ]
    if rows:
        yield "\n".join(["| split | examples | metric | × 100 |", "|---|---|---|---|", *rows])
    yield which_weights(metrics, metadata)
    yield "\n".join(f"![{name.removesuffix('.png')}]({name})" for name in pictures)
    yield f"## To load it\n\n```python\n{example(task)}\n```"
    yield f"## How it was made\n\n```\n{command(metadata)}\n```"
    if task.record:
        yield f"The task file:\n\n```json\n{json.dumps(task.record, indent=2)}\n```"
    versions = ", ".join(f"{name} {metadata[name]}" for name in ("torch", "transformers", "python"))
    run = f"Learning rate {metrics['learning_rate']:g}, {format_seeds(metrics)}"
    yield f"{run}, {metadata['precision']} on {metadata['device']}, {versions}."


def sentences(task: Task, metrics: Metadata, metadata: Metadata) -> Iterator[str]:
    """Yield sentences about the base model, the data and the trained parameters."""
    base, commit = without_path(metadata["model_name"]), metadata["model_commit"]
    link = f"[{base}](https://huggingface.co/{base}) (commit {commit})"
    yield link if commit else f"{escape.markdown_code(base)}, a local folder,"
    sample = f"{metadata['train_size']:,} training examples of " if metadata["train_size"] else ""
    yield f"fine-tuned on {sample}{escape.markdown(task.folder)}"
    if is_glue(task, metrics):
        yield "of [GLUE](https://huggingface.co/datasets/nyu-mll/glue)."
    else:
        yield "(a custom task)." if task.record else "(other examples than GLUE's)."
    if metrics["random_encoder"]:
        yield "A control: the encoder began with random weights."
    if start := metrics.get("started_from"):
        values = "encoder and classifier" if start["classifier"] else "encoder"
        task_name = escape.markdown(start["task"])
        yield f"Its {values} started from values that were trained on {task_name}."
    if metrics.get("add_biases"):
        yield "Biases, zero before training, were added to the encoder."
    yield f"{TRAINED[metrics['fine_tune_type']]}:"
    if metrics["bias_terms"] not in ([], ["all"]):
        yield f"{', '.join(metrics['bias_terms'])};"
    count, total = metrics["trained_parameters"], metrics["all_parameters"]
    yield f"{count:,} of {total:,} parameters ({count / total:.2%})."


def which_weights(metrics: Metadata, metadata: Metadata) -> str:
    """Return a sentence about the epoch and run of the scores, and how they were selected."""
    if metrics["diverged"]:
        return f"The training diverged: {metrics['diverged']}. These weights have no scores."
    scored, epochs = metrics[metadata["keep"]]["epoch"], metadata["epochs"]
    runs = options.count_runs(metadata)
    chosen = " --halving selected their learning rate and bias terms by validation scores."
    chosen *= bool(metadata["halving"])
    if metadata["keep"] == "last":
        text = f"The weights are those after the last epoch, {scored}."
        return text + chosen
    of_runs = f" and of {runs} runs" * (runs > 1)
    return (
        f"The weights are those of epoch {scored}, the best of {epochs} epochs{of_runs} by "
        f"{metrics['main_metric']} on the same examples: the scores are optimistic." + chosen
    )


def example(task: Task) -> str:
    """Return Python code that loads the model and predicts one example."""
    if task.is_tagging:
        return TAGGING_EXAMPLE
    texts = ['"The cat sleeps."', '"An animal sleeps."'][: len(task.texts)]
    label = "model.config.id2label[logits.argmax().item()]"
    answer = "logits.item()" if task.is_regression else label
    return EXAMPLE.format(texts=", ".join(texts), answer=answer)


def command(metadata: Metadata) -> str:
    """Return the command with the flags that results depend on, and the commit."""
    ranks, parser = metadata["ranks"], options.make_parser("")
    metadata = metadata | {"model_revision": metadata["model_commit"]}
    left_out = HARMLESS - BY_NAME - {"output_path", "task_file"}
    names = [field.name for field in fields(options.RunOptions) if field.name not in left_out]
    given = {n: metadata[n] for n in names if metadata[n] != parser.get_default(n)}
    words = map(without_path, options.flag_words(given))
    launcher = ["torchrun", "--nproc-per-node", str(ranks)] if ranks > 1 else ["python"]
    return shlex.join([*launcher, "run_glue.py", *words])
