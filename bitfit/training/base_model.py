"""The base model of a training: its weights, the biases that are added, and a warm start."""

import logging
from functools import partial
from typing import TYPE_CHECKING, Any

from bitfit.model import fingerprints, loading
from bitfit.model.added_biases import add_biases
from bitfit.model.warm_start import WarmStart
from bitfit.training.setup import Setup

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LOGGER = logging.getLogger("bitfit")


def load_base(setup: Setup, report: bool = False) -> tuple["PreTrainedModel", dict[str, Any]]:
    """Return the base model on the device, and fields of `PreparedModel` that depend on it.

    Args:
        report: log which weights of the checkpoint are used.
    """
    model, initialized = loading.load_model(
        setup.model_name, setup.task, setup.random_encoder, revision=setup.revision, report=report
    )
    draw = partial(loading.init_head, names=initialized) if initialized else None
    fields = {"encoder_sha256": fingerprints.fingerprint(model), "init_head": draw}
    if setup.add_biases:
        add_biases(model, report)
    return model.to(setup.device), fields


def apply_warm_start(
    model: "PreTrainedModel", start: WarmStart, setup: Setup, fields: dict[str, Any], log: bool
) -> dict[str, Any]:
    """Write the values of a warm start into a base model, and return fields of `PreparedModel`.

    Args:
        fields: from `load_base`.
    """
    biases = start.apply(model, setup.task, fields["encoder_sha256"])
    if log:
        parts = "encoder and classifier" if start.order else "the encoder; the labels differ"
        LOGGER.info("start from %s (%s): %s", start.record["folder"], start.record["task"], parts)
    return {"base_biases": biases} | ({"init_head": None} if start.order else {})
