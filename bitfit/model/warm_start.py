"""Warm start: all runs start from the trained values of a saved evaluator, often of another task.

The values replace those of the base model before anything trains. Deltas stay relative to the base
model, so a saved evaluator also has the values that the warm start set and no run trained.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from bitfit.data.tasks import Task
from bitfit.model.fingerprints import base_error, sha256
from bitfit.model.trainable import Trainable, in_encoder, is_bias
from bitfit.model.weight_checks import label_order, output_names
from utils import LOGGER, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class WarmStart:
    """The values of a saved evaluator, and how a task uses them.

    A loaded evaluator only has the record of the warm start that it was trained from.
    """

    record: dict[str, Any]  # for JSON: folder, task, sha256 of the values, classifier (bool)
    encoder_sha256: str = ""  # of the base model that the values belong to
    values: dict[str, torch.Tensor] = field(default_factory=dict)  # {parameter name: values}
    positions: Trainable = field(default_factory=dict)  # {name: flat positions; None: all}
    order: tuple[int, ...] = ()  # of the source's classes for the task; (): other labels

    def apply(
        self, model: "PreTrainedModel", task: Task, encoder_sha256: str, report: bool
    ) -> dict[str, torch.Tensor]:
        """Write the values into a base model, and return the former values of its biases.

        Raise a UserError if they belong to another base model, or to biases that it lacks. `report`
        logs which values are used.
        """
        folder, names = self.record["folder"], self.used_names(model)
        if encoder_sha256 != self.encoder_sha256:
            raise base_error(folder, model.name_or_path)
        parameters = {name: parameter.data for name, parameter in model.named_parameters()}
        if not parameters.keys() >= {*names}:
            raise UserError(f"{folder} has added biases: give --add-biases too")
        biases = {n: parameters[n].clone() for n in names if in_encoder(model, n) and is_bias(n)}
        for name in names:
            positions, values = self.positions[name], self.values[name]
            if name in output_names(model, task):
                values = values[list(self.order)]
            index = slice(None) if positions is None else torch.from_numpy(positions)
            parameters[name].view(-1)[index] = values.flatten().to(model.device)
        if report:
            parts = "encoder and classifier" if self.order else "the encoder; the labels differ"
            LOGGER.info("start from %s (%s): %s", folder, self.record["task"], parts)
        return biases

    def used_names(self, model: "PreTrainedModel") -> list[str]:
        """Return the names of the values that the model gets."""
        return [name for name in self.values if in_encoder(model, name) or self.order]

    def changed(self, model: "PreTrainedModel", trainable: Trainable) -> Trainable:
        """Return the parameters that differ from the base model after `trainable` has trained."""
        changed = dict(trainable)
        for name in self.used_names(model):
            trained, started = trainable.get(name, np.empty(0, np.int64)), self.positions[name]
            changed[name] = (
                None if trained is None or started is None else np.union1d(trained, started)
            )
        return changed


def make_warm_start(
    metadata: dict[str, Any],
    values: dict[str, torch.Tensor],
    positions: Trainable,
    *,
    folder: str,
    source: Task,
    task: Task,
) -> WarmStart:
    """Return the warm start of a task from an evaluator of a source task, with its `metadata`.

    The classifier is used if both tasks have the same labels, in any order. A task that tags words
    and one that classifies sentences raise a UserError.
    """
    if source.is_tagging != task.is_tagging:
        kinds = "words, not of sentences" if source.is_tagging else "sentences, not of words"
        problem = f"{folder} has a classifier of {kinds} as {task.name} needs"
        raise UserError(f"{problem}: give an evaluator of the same kind as --start-from")
    order = label_order(label_names(source), label_names(task)) or ()
    hashed = (part for name in sorted(values) for part in (name, values[name], positions[name]))
    digest = sha256([*label_names(source), *hashed])
    return WarmStart(
        record={"folder": folder, "task": source.name, "sha256": digest, "classifier": bool(order)},
        encoder_sha256=metadata["encoder_sha256"],
        values=values,
        positions=positions,
        order=tuple(order),
    )


def label_names(task: Task) -> Sequence[str]:
    """Return the names of a task's outputs: its labels, or the range of its scores."""
    return task.labels or ("score from {:g} to {:g}".format(*task.score_range),)
