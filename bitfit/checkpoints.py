"""What is kept of a trained evaluator: facts in JSON, what trained in safetensors.

`evaluator.json` says which base model, task and settings; `delta.safetensors` holds only the
values that trained (about 0.4 MB for BitFit on bert-base). The hash of the base model's encoder
guards the delta: it is never put on another one. Full fine-tuning keeps the whole model instead.
"""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from bitfit.runs import Record, Run, Stack
from bitfit.tasks import TASKS
from bitfit.trainable import FINE_TUNE_TYPES, trainable
from utils import UserError, one_line, whole_file, whole_folder, write_text

FORMAT = 1
FACTS = "evaluator.json"
DELTA = "delta.safetensors"
POSITIONS = ":positions"  # suffix of the tensor that says which entries a random mask chose


def text(value):
    return isinstance(value, str) and "\0" not in value


def whole_number(low):
    return lambda value: type(value) is int and low <= value < 2**63


def number(value):
    return type(value) in (int, float)


def known(values):
    return lambda value: isinstance(value, str) and value in values


def absent_or(check):
    return lambda value: value is None or check(value)


def list_of(check):
    return lambda value: isinstance(value, list) and all(map(check, value))


def flag(value):
    return isinstance(value, bool)


KINDS = {  # the evaluator's attributes that are saved, and what a file may say of them
    "task_name": known(TASKS),
    "model_name": text,
    "data_dir": absent_or(text),
    "base_name": text,
    "fine_tune_type": known(FINE_TUNE_TYPES),
    "components": list_of(text),
    "precision": known(("fp32", "bf16")),
    "random_encoder": flag,
    "max_sequence_len": whole_number(1),
    "pad_to_max": flag,
    "batch_size": whole_number(1),
    "train_size": absent_or(whole_number(1)),
    "encoder_sha256": text,
}
RUN_KINDS = {  # the same of its record
    "learning_rate": number,
    "seed": whole_number(-(2**63)),  # torch.initial_seed() may be negative
    "epochs": list_of(whole_number(1)),
    "evaluations": lambda value: isinstance(value, dict),
    "train_loss": list_of(number),
}


def scores_fit(facts):
    """Whether there is a number for each split, metric and scored epoch of the task."""
    task, scores = TASKS[facts["task_name"]], facts["evaluations"]
    expected = ("train", *task.validation_splits) if facts["epochs"] else ()
    return set(scores) == set(expected) and all(
        isinstance(of_split, dict)
        and set(of_split) == set(task.metrics)
        and all(list_of(number)(v) and len(v) == len(facts["epochs"]) for v in of_split.values())
        for of_split in scores.values()
    )


BUILT_FROM = ("task_name", "model_name", "seed", "data_dir", "precision", "random_encoder")


def save_evaluator(evaluator, folder):
    """Write what trained, then the facts: a folder that has facts is complete."""
    folder.mkdir(parents=True, exist_ok=True)
    facts = {"format": FORMAT} | {name: getattr(evaluator, name) for name in KINDS}
    record = evaluator.record
    facts |= {name: value for name, value in vars(record).items() if name in RUN_KINDS}
    facts |= record.run._asdict()
    for name in ("model_name", "data_dir"):
        if facts[name] is not None and Path(facts[name]).is_dir():
            facts[name] = str(Path(facts[name]).resolve())
    if evaluator.fine_tune_type == "full_ft":
        evaluator.export_model(folder / "model")
    else:
        write_tensors(folder / DELTA, delta(evaluator.stack, evaluator.selected))
    write_text(folder / FACTS, json.dumps(facts, indent=2) + "\n")


def write_tensors(path, tensors):
    """Write a whole safetensors file.

    Raises:
        OSError: it could not be written.
    """
    with whole_file(path) as temporary:
        try:
            save_file(tensors, temporary)
        except SafetensorError as error:
            raise OSError(f"{path}: {error}") from None


def write_model(model, tokenizer, folder):
    """Write a whole Hugging Face folder.

    Raises:
        OSError: it could not be written.
    """
    with whole_folder(folder) as temporary:
        try:
            model.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
        except SafetensorError as error:
            raise OSError(f"{folder}: {error}") from None


def delta(stack, run):
    """{name: trained values} and, for a random mask, {name + ":positions": flat positions}."""
    values = {n: t.cpu().contiguous() for n, t in stack.named_values(run).items()}
    return values | {n + POSITIONS: p.cpu() for n, p in stack.positions.items()}


def load_evaluator(make, folder, gpu_device, model_name=None, data_dir=None):
    """What `GLUEvaluator.load` does; `make` is that class.

    Raises:
        UserError: damaged files, or a base model that is not the one of the delta.
    """
    facts = load_facts(folder)
    whole_model = facts["fine_tune_type"] == "full_ft"
    random_encoder = facts["random_encoder"]
    if whole_model:
        model_name, facts["random_encoder"] = folder / "model", False
    facts["model_name"] = str(model_name or facts["model_name"])
    facts["data_dir"] = data_dir or facts["data_dir"]
    evaluator = make(device=gpu_device, **{name: facts[name] for name in BUILT_FROM})
    for name in KINDS.keys() - set(BUILT_FROM) - {"encoder_sha256"}:
        setattr(evaluator, name, facts[name])
    evaluator.runs = [Run(facts["learning_rate"], facts["seed"])]
    measured = {name: facts[name] for name in ("epochs", "evaluations", "train_loss")}
    evaluator.records, evaluator.selected = [Record(evaluator.runs[0], **measured)], 0
    evaluator._load_model()
    evaluator.random_encoder = random_encoder
    if whole_model:
        evaluator.chosen, values = trainable(evaluator.model, True), None
    elif evaluator.encoder_sha256 == facts["encoder_sha256"]:
        evaluator.chosen, values = load_delta(folder, evaluator.model)
        values = values[None].to(evaluator.torch_device)
    else:
        raise UserError(
            f"{folder} was trained on another base model than {evaluator.model_name}: "
            "give the one it was trained on as model_name"
        )
    evaluator.stack = Stack(evaluator.model, evaluator.chosen, evaluator.runs)
    evaluator.stack.release(values)
    return evaluator


def load_facts(folder):
    """The facts of a saved evaluator.

    Raises:
        UserError: no such file, not JSON, another format, or a fact of the wrong type.
    """
    path = Path(folder) / FACTS
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"there is no saved evaluator in {folder}: {FACTS} is missing") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {one_line(error)}") from None
    if not isinstance(facts, dict) or facts.get("format") != FORMAT:
        raise UserError(f"{path} is not an evaluator of format {FORMAT}: save it again")
    kinds = KINDS | RUN_KINDS
    wrong = [name for name, fits in kinds.items() if name not in facts or not fits(facts[name])]
    if not wrong and not scores_fit(facts):
        wrong = ["evaluations"]
    if wrong:
        raise UserError(f"{path}: {wrong[0]!r} is missing or wrong: save the evaluator again")
    return facts


def load_delta(folder, model):
    """(chosen, values): what trained, as for `Stack`, and one run's flat values (n,).

    Raises:
        UserError: a torn file, or tensors that do not fit the model.
    """
    path = Path(folder) / DELTA
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read: {one_line(error)}") from None
    chosen, values = {}, []
    for name, parameter in model.named_parameters():
        if name in tensors:
            positions, value = tensors.pop(name + POSITIONS, None), tensors.pop(name)
            if not fits(parameter, positions, value):
                raise UserError(f"{path}: {name} does not fit this model: the file is damaged")
            chosen[name] = None if positions is None else positions.numpy()
            values.append(value.flatten())
    if tensors or not values:
        unknown = ", ".join(sorted(tensors)) or "no tensor"
        raise UserError(f"{path} holds {unknown}, which is not of this model")
    return chosen, torch.cat(values)


def fits(parameter, positions, value):
    """Whether saved values, and positions if any, can belong to a parameter."""
    shape = parameter.shape if positions is None else positions.shape
    if value.shape != shape or value.dtype != torch.float32 or positions is None:
        return value.shape == shape and value.dtype == torch.float32
    if positions.dtype != torch.int64 or positions.dim() != 1 or not len(positions):
        return False
    increasing = bool((positions.diff() > 0).all())
    return increasing and bool(positions[0] >= 0) and bool(positions[-1] < parameter.numel())
