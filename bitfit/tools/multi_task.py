"""Many tasks answered by one encoder: several saved evaluators in one stacked pass.

Evaluators of one base model are the rows of a `RunStack`, as the runs of a sweep are: each text is
a row of every evaluator, and each token gets the biases of its own. Heads differ in their number of
classes: here all are as wide as the widest, and each task's logits are cut to its own.
"""

from typing import Any, NamedTuple

import numpy as np
import torch

from bitfit.artifacts import saved_evaluator
from bitfit.data.splits import Texts
from bitfit.data.tokens import concatenate, tokenize
from bitfit.model import fingerprints as models_fingerprints
from bitfit.model import forward as models_forward
from bitfit.model import hub, loading
from bitfit.model.batching import MAX_TOKENS, split_into_micro_batches, to_device
from bitfit.model.predict import predict
from bitfit.model.run_stack import Run, RunStack, reason_not_stackable
from bitfit.model.token_budget import TokenBudget
from bitfit.tools.members import evaluators_in
from utils import UserError

TRIAL = tuple(" ".join(["a small film is good,"] * n) for n in (1, 4, 16))  # the model is tried on


class Many(NamedTuple):
    """Evaluators that answer together."""

    names: list  # of each, as its answers are called
    tasks: list  # the `Task` of each
    lengths: list  # of each, the most tokens of a row
    tokenizer: Any
    forward: models_forward.Forward
    stack: RunStack  # the values of each
    token_budget: TokenBudget


def read(folders, model_name=None):
    """[(folder, facts, tensors)] of saved evaluators that can answer together.

    Raises:
        UserError: a folder that holds none or is given twice; no common base model; one of several
            that changed the encoder's matrices.
    """
    found = [
        (folder, *saved_evaluator.files(folder, model_name)) for folder in evaluators_in(folders)
    ]
    first, base, _ = found[0]
    for folder, facts, tensors in found:
        own = facts["model_sha256"] or any(
            name.endswith(saved_evaluator.POSITIONS) for name in tensors
        )
        if own and len(found) > 1:
            what = f"{folder} has weight matrices of its own ({facts['fine_tune_type']})"
            raise UserError(f"{what}, where others share the base model's: give it alone")
        if facts["encoder_sha256"] != base["encoder_sha256"]:
            bases = f"{folder} ({facts['base_name']}) and {first} ({base['base_name']})"
            raise UserError(f"{bases} were trained on different base models: give those of one")
    return found


def load(found, device, dtype=torch.float32, max_length=None, max_tokens=None):
    """The `Many` of what `read` gives; its answers are asked for within `stack.patched(dtype)`.

    Args:
        max_length: rows are cut to so many tokens; None: each evaluator's own limit.
        max_tokens: the most tokens in one pass; None: the device's default.

    Raises:
        UserError: the base model is not there, is another, or cannot be shared.
    """
    base = found[0][1]
    name, tasks = base["model_name"], [saved_evaluator.task_of(own) for _, own, _ in found]
    lengths = [max_length or facts["max_sequence_len"] for _, facts, _ in found]
    widest = max(tasks, key=lambda task: task.num_labels)
    revision, _ = hub.resolve(name, base["model_revision"])
    tokenizer = loading.load_tokenizer(name, revision)
    fingerprints = loading.base_fingerprints(name, widest, tokenizer, revision)
    for folder, facts, _ in found:
        saved_evaluator.check_base(folder, facts, fingerprints)
    loading.check_length(name, widest, max(lengths), revision)
    drawn = base["random_encoder"] and not base["model_sha256"]
    model, _ = loading.load(name, widest, drawn, revision)
    encoder, chosen = models_fingerprints.fingerprint(model), {}
    for folder, facts, tensors in found:
        chosen |= saved_evaluator.chosen(model, encoder, facts, tensors, folder)
    model.to(device)
    trial = tokenize(Texts((list(TRIAL),), None), tokenizer, max(lengths)).to(device)
    forward = models_forward.select_forward(model, name, trial, dtype)
    reason = reason_not_stackable(forward, chosen, trial) if len(found) > 1 else None
    if reason:
        raise UserError(f"these evaluators cannot answer together: {reason}; give one at a time")
    runs = [Run(facts["learning_rate"], facts["seed"]) for _, facts, _ in found]
    stack = RunStack(model, chosen, runs)
    for row, (_, _, tensors) in zip(stack.params, found, strict=True):
        fill(row, stack, tensors)
    budget = TokenBudget(max_tokens or MAX_TOKENS[device.type], device)
    names = names_of([folder for folder, *_ in found], tasks)
    return Many(names, tasks, lengths, tokenizer, forward, stack, budget)


def names_of(folders, tasks):
    """Their tasks' names, or the folders' where a task is there twice."""
    names = [task.name for task in tasks]
    return names if len(set(names)) == len(names) else [str(folder) for folder in folders]


def fill(row, stack, tensors):
    """Put a delta into its row (n,) of a stack; what it did not train stays the base model's.

    Of a head with fewer classes than the stack's, the others keep values that nobody reads.
    """
    for name, (a, _) in stack.slices.items():
        if name in tensors:
            own = tensors[name].flatten()
            row[a : a + len(own)] = own


def logits_of(many, rows):
    """[(B, C) float32 of each evaluator] for B rows of texts, within `many.stack.patched`.

    Where only heads trained, the encoder runs once for all.
    """
    tokens, read_by = tokens_of(many, rows)
    model = many.forward.model
    models_forward.check_ids(model, model.name_or_path, tokens)
    tokens = tokens.to(many.stack.params.device)
    if many.stack.shares_encoder and len(many.tasks) > 1:
        with many.stack.routing():
            every = predict(many.forward, tokens, many.token_budget)  # (K, all rows, C)
        together = np.take_along_axis(every, read_by[..., None], axis=1)
    else:
        together = many.token_budget.retry_on_oom(lambda: stacked_logits(many, tokens, read_by))
    return [own[:, : task.num_labels] for own, task in zip(together, many.tasks, strict=True)]


@torch.inference_mode()
def stacked_logits(many, tokens, read_by):
    """(K, B, C) on the host: what each of K evaluators says of the rows (K, B) that it reads."""
    many.forward.model.eval()
    runs, packed = len(read_by), many.forward.packed_encoder is not None
    owner, flat = np.repeat(np.arange(runs), read_by.shape[1]), read_by.ravel()
    lengths = tokens.lengths[flat]
    parts, outputs = (
        split_into_micro_batches(
            lengths, many.token_budget.max_tokens, packed, many.forward.equal_length
        ),
        [],
    )
    for part in parts:
        pair = many.forward.make_routed_batch(tokens, flat[part], owner[part], runs)
        batch, own = to_device(pair, tokens.ids.device)
        with many.stack.routing(own):
            outputs.append(many.forward(tokens, batch))
    together = torch.cat(outputs)
    logits = np.empty(together.shape, np.float32)
    logits[np.concatenate(parts)] = together.cpu().numpy()
    return logits.reshape(*read_by.shape, -1)


def tokens_of(many, rows):
    """(`Tokens` of B rows in each way that an evaluator reads them, (K, B) which are whose).

    A way is a number of texts and a limit of length; evaluators that read alike share them.
    """
    ways = [(len(task.texts), n) for task, n in zip(many.tasks, many.lengths, strict=True)]
    distinct = list(dict.fromkeys(ways))
    parts = []
    for texts, length in distinct:
        columns = tuple(map(list, zip(*(row[:texts] for row in rows), strict=True)))
        parts.append(tokenize(Texts(columns, None), many.tokenizer, length))
    begins = len(rows) * np.array([distinct.index(way) for way in ways])
    return concatenate(parts), begins[:, None] + np.arange(len(rows))
