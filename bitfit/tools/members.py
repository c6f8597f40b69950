"""Saved evaluators that are to be set beside each other: read, named, checked.

The hash of the base model's encoder says which may be.
"""

import os
from pathlib import Path
from typing import NamedTuple

from bitfit.artifacts import saved_evaluator
from bitfit.model.fingerprints import describe_change
from bitfit.model.trainable import term_names
from utils import UserError


class Member(NamedTuple):
    """A saved evaluator as its files have it."""

    name: str  # in tables
    folder: Path
    facts: dict
    tensors: dict  # {parameter name: the values that trained}, and the positions of a random mask


def read(folders):
    """The `Member`s in some folders, or in the `evaluator/` of a run's folder.

    Raises:
        UserError: no evaluator, a damaged one, one that was trained whole, one that is given
            twice, or different base models.
    """
    folders = evaluators_in(folders)
    names = names_of(folders)
    members = [Member(n, f, *saved_evaluator.files(f)) for n, f in zip(names, folders, strict=True)]
    for member in members:
        if member.facts["model_sha256"]:
            what = (
                f"no base model is left to take off; {member.folder / 'model'} is the whole model"
            )
            raise UserError(f"{member.folder} trained everything (full_ft): {what}")
    check_same(members, "base models", lambda m: m.facts["encoder_sha256"], base_of)
    first, *others = members
    for other in others:
        change = describe_change(first.facts, other.facts)
        if change:
            what = f"{first.name} and {other.name} have different base models, whose {change}"
            raise UserError(f"{what}: give evaluators with the same")
    return members


def evaluators_in(folders):
    """Each folder itself, or the evaluator in it; UserError where one is given twice."""
    folders = [evaluator_in(Path(folder)) for folder in folders]
    real = [folder.resolve() for folder in folders]
    for number, folder in enumerate(folders):
        if real[number] in real[:number]:
            raise UserError(f"{folder} is given twice: give each once")
    return folders


def evaluator_in(folder):
    """The folder itself, or the evaluator that a run left in it."""
    if (folder / "results.csv").exists():
        raise UserError(f"{folder} is a sweep: give its runs, {folder}/lr*")
    inner = folder / "evaluator"
    inside = (inner / saved_evaluator.FACTS).exists() and not (
        folder / saved_evaluator.FACTS
    ).exists()
    return Path(os.path.normpath(inner if inside else folder))


def names_of(folders):
    """Their paths, without the first parts that all of them share, and without `evaluator`."""
    paths = [os.path.abspath(folder).removesuffix(f"{os.sep}evaluator") for folder in folders]
    shared = os.path.commonpath(paths)
    return [Path(p).name if p == shared else os.path.relpath(p, shared) for p in paths]


def base_of(member):
    return member.facts["base_name"] + " (random encoder)" * member.facts["random_encoder"]


def method_of(member):
    facts = member.facts
    which = term_names(facts["components"]) or [f"seed {facts['seed']}"]  # it draws a mask
    return f"{facts['fine_tune_type']} ({', '.join(which)})"


def check_same(members, what, key, shown):
    """UserError unless all have the same `key`.

    Args:
        key, shown: functions of a member; what is compared, and what the message says of it.
    """
    first = members[0]
    for other in members[1:]:
        if key(other) != key(first):
            both = " and ".join(f"{member.name} ({shown(member)})" for member in (first, other))
            raise UserError(f"{both} have different {what}: give evaluators with the same")


def check_tasks(members):
    check_same(members, "tasks", task_of, lambda member: task_of(member).folder)


def task_of(member):
    return saved_evaluator.task_of(member.facts)


def check_trained(members):
    """UserError unless the same parameters of the encoder trained, and at the same positions."""

    def key(member):
        positions = {
            n: t.tolist() for n, t in member.tensors.items() if saved_evaluator.POSITIONS in n
        }
        return member.facts["fine_tune_type"], set(member.facts["components"]), positions

    check_same(members, "trained parameters", key, method_of)


def check_biases(members, what):
    for member in members:
        if member.facts["fine_tune_type"] != "bitfit":
            kind = member.facts["fine_tune_type"]
            raise UserError(f"{member.name} is {kind}: only bitfit has bias terms to {what}")
