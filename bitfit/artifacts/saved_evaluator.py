"""A trained evaluator on disk: evaluator.json, and what trained in delta.safetensors; the logits
that a training keeps.

The delta holds only the values that trained (about 0.4 MB for BitFit on bert-base). The hash of
the base model's encoder guards it: it is never put on another one. Where everything trained, the
whole model is kept instead, in `model/`.
"""

from functools import cache
from pathlib import Path

import torch

from bitfit.data import task_files
from bitfit.files import atomic_file
from bitfit.model import fingerprints as models
from bitfit.model import hub, trainable
from bitfit.model.fingerprints import describe_change
from bitfit.model.run_stack import Run, RunStack
from bitfit.results.scores import scores_frame
from bitfit.training import store
from bitfit.training.loop import Record, evaluations
from utils import LOGGER, CorruptFile, UserError

FACTS = "evaluator.json"
LOGITS = "validation_logits.safetensors"
POSITIONS = ":positions"  # suffix of the tensor that says which entries a random mask chose
BUILT_FROM = ("task_name", "model_name", "seed", "data_dir", "precision", "random_encoder")
DATA = ("max_sequence_len", "batch_size", "train_size")
READ = (".json", ".txt", ".model", ".jinja")  # endings of what transformers reads beside weights
SETTINGS = ("base_name", "fine_tune_type", "components", "model_commit")


def write_logits(folder, state, k):
    """validation_logits.safetensors of run number k: what selection and tests need later.

    For each validation split its logits (evaluations, rows, C) and `<split>.labels` (rows,).
    """
    tensors, done = {}, evaluations(state)
    for split, logits in state.logits.items() if done else ():
        tensors[split] = torch.from_numpy(logits[:done, k].copy())
        tensors[f"{split}.labels"] = state.plan.scored[split].tokens.labels.cpu()
    if tensors:
        with atomic_file(folder / LOGITS) as temporary:
            store.save(tensors, temporary)


def write(evaluator, folder):
    """Write the selected run; the folder is an evaluator when its facts are there."""
    folder.mkdir(parents=True, exist_ok=True)
    run = evaluator.record.run
    names = ("encoder_sha256", *DATA, *SETTINGS, *(name for name in BUILT_FROM if name != "seed"))
    facts = {name: getattr(evaluator, name) for name in names}
    for name in ("model_name", "data_dir"):
        if facts[name] is not None and Path(facts[name]).is_dir():
            facts[name] = str(Path(facts[name]).resolve())
    facts |= {"task": evaluator.task.record} if evaluator.task.record else {}
    facts |= run._asdict() | {"train_loss": evaluator.record.train_loss}
    scores = evaluator.scores[evaluator.scores["run"] == run.name]
    facts |= {"scores": scores.to_numpy().tolist(), "model_sha256": None}
    facts |= {n: v for n in ("averaged", "zero_gradient") if (v := getattr(evaluator, n))}
    tensors = {}
    if trainable.trains_all(evaluator.model, evaluator.trainable):
        evaluator.export_model(folder / "model")
        facts["model_sha256"] = models.fingerprint(evaluator.model, head=True)
        facts["model_files"] = file_hashes(folder / "model")
    else:
        facts |= evaluator.base_fingerprints
        values = evaluator.stack.named_params(evaluator.selected)
        tensors = {name: value.cpu().contiguous() for name, value in values.items()}
        tensors |= {n + POSITIONS: p.cpu() for n, p in evaluator.stack.positions.items()}
    store.write(folder / FACTS, facts, tensors, "delta.safetensors")


def files(folder, model_name=None):
    """(facts, tensors) of a saved evaluator; "model_name" and "model_revision": where its base is.

    Raises:
        UserError: there is none, or its files are damaged.
    """
    if not (folder / FACTS).exists():
        raise UserError(f"there is no saved evaluator in {folder}: {FACTS} is missing")
    try:
        facts, tensors = store.read(folder / FACTS)
    except CorruptFile as error:
        raise UserError(f"{error}; train and save it again") from None
    commit = facts.setdefault("model_commit", None)  # the first of these files did not say it
    facts["model_name"] = str(model_name or facts["model_name"])
    if facts["model_sha256"]:
        facts["model_name"] = str(folder / "model")
    if ("model_files" if facts["model_sha256"] else "model_config") not in facts:
        warn_unverified(folder)
    elif facts["model_sha256"]:
        check_files(folder, facts)
    moved = model_name or hub.is_local(facts["model_name"])
    facts["model_revision"] = None if moved else commit
    return facts, tensors


def file_hashes(folder):
    """{name: SHA-256} of the files of a model's folder, without its weights."""
    found = [path for path in sorted(folder.glob("*")) if path.suffix in READ and path.is_file()]
    return {path.name: store.file_sha256(path) for path in found}


def check_files(folder, facts):
    """UserError where a file beside the weights of a whole model is not as it was written."""
    written, found = facts["model_files"], file_hashes(folder / "model")
    for name in sorted(written.keys() | found.keys()):
        if written.get(name) != found.get(name):
            what = "is not as it was written" if name in written else "was not written with it"
            what = what if name in found else "is missing"
            raise UserError(f"{folder / 'model' / name} {what}: train and save it again")


def check_base(folder, facts, fingerprints):
    """UserError unless a model's fingerprints are those of the base model that was trained.

    Of a whole model `check_files` verifies the files that config and tokenizer are read from.
    """
    change = describe_change(facts, fingerprints)
    if change:
        raise another_base(folder, facts, f": its {change}")


def another_base(folder, facts, why=""):
    what = f"{folder} was trained on another base model than {facts['model_name']}{why}"
    return UserError(f"{what}: give the one it was trained on as model_name")


@cache
def warn_unverified(folder):
    """Log one line, once for each folder."""
    LOGGER.warning("%s was saved by an earlier version of this program: the config and the "
                   "tokenizer of its model cannot be verified", folder)  # fmt: skip


def task_of(facts):
    """The `Task` of a saved evaluator; UserError where it is none that is known."""
    return task_files.resolve_task(facts.get("task", facts["task_name"]))[0]


def read(make, folder, gpu_device, model_name=None, data_dir=None):
    """What `GLUEvaluator.load` does; `make` is that class.

    Raises:
        UserError: damaged files, or a base model that is not the one of the delta.
    """
    facts, tensors = files(folder, model_name)
    facts["data_dir"] = data_dir or facts["data_dir"]
    built = {name: facts[name] for name in (*BUILT_FROM, "model_revision")}
    built["task_name"] = facts.get("task", facts["task_name"])  # the record of a task of one's own
    evaluator = make(device=gpu_device, **built)
    evaluator._set_data(*(facts[name] for name in DATA))
    for name in SETTINGS:
        setattr(evaluator, name, facts[name])
    evaluator.runs = [Run(facts["learning_rate"], facts["seed"])]
    evaluator.records, evaluator.selected = [Record(evaluator.runs[0], facts["train_loss"])], 0
    evaluator.scores = scores_frame(facts["scores"])
    evaluator.averaged = facts.get("averaged", [])
    check_base(folder, facts, evaluator.base_fingerprints)
    evaluator.zero_gradient = facts.get("zero_gradient", {})
    evaluator._load_model(facts["random_encoder"] and not facts["model_sha256"])
    evaluator.trainable = read_trainable(
        evaluator.model, evaluator.encoder_sha256, facts, tensors, folder
    )
    evaluator.stack = RunStack(evaluator.model, evaluator.trainable, evaluator.runs)
    for name, (a, b) in evaluator.stack.slices.items() if tensors else ():
        evaluator.stack.params[0, a:b] = tensors[name].flatten()
    evaluator.stack.load_run(0)
    return evaluator


def read_trainable(model, encoder_sha256, facts, tensors, folder):
    """What trained, as for `RunStack`; the model must be the one that it trained on."""
    if facts["model_sha256"]:
        if models.fingerprint(model, head=True) != facts["model_sha256"]:
            what = f"{folder / 'model'} is not as it was written: train and save it again"
            raise UserError(what)
    elif encoder_sha256 != facts["encoder_sha256"]:
        raise another_base(folder, facts)
    positions = {n: tensors.get(n + POSITIONS) for n, _ in model.named_parameters()}
    return {
        name: None if own is None else own.numpy()
        for name, own in positions.items()
        if name in tensors or not tensors
    }
