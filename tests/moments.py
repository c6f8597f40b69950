"""Do something at a chosen moment of a training, without knowledge of the program's functions."""

import os
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from unittest import mock

from torch import OutOfMemoryError
from torch.nn import Embedding
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_pre_hook


def send(*signals):
    """Return a function that sends signals to this process."""

    def action():
        for number in signals:
            os.kill(os.getpid(), number)

    return action


@contextmanager
def at_step(number, action):
    """Call `action()` in step `number` (from 1), after its backward pass."""
    steps = count(1)

    def hook(optimizer, args, options):
        if next(steps) == number:
            action()

    handle = register_optimizer_step_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def at_passes(action, evaluation=False):
    """Call `action(number, ids)` in each forward pass of a model that trains, numbered from 1.

    Args:
        evaluation: whether passes in evaluation mode count too.
        action: may raise, or return a factor for the word embeddings; NaN gives a loss of NaN.
            `ids` are the token ids of the pass.
    """
    passes = count(1)

    def hook(module, args, output):
        words = isinstance(module, Embedding) and module.num_embeddings > 200  # not positions
        counts = words and (module.training or evaluation)
        factor = action(next(passes), *args) if counts else None
        return None if factor is None else output * factor

    handle = register_module_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def limited_memory(tokens):
    """Run out of memory in each pass of more than so many tokens."""

    def fail(number, ids):
        if ids.numel() > tokens:
            raise OutOfMemoryError("no room")

    with at_passes(fail, evaluation=True):
        yield


def raises(error):
    """Return a function that raises an exception."""

    def action(*args, **options):
        raise error

    return action


@contextmanager
def at_evaluation(number, action):
    """Call `action()` at the start of evaluation `number` (from 1) of a model that is trained."""
    evaluations, was_training = count(1), False

    def hook(module, args):
        nonlocal was_training
        starts, was_training = was_training and not module.training, module.training
        if starts and next(evaluations) == number:
            action()

    handle = register_module_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def at_file(pattern, number, action):
    """Call `action()` when file `number` (from 1) that matches a pattern is complete.

    The file has its temporary name then.
    """
    replace, files = os.replace, count(1)

    def watched(source, target):
        if Path(target).match(pattern) and next(files) == number:
            action()
        replace(source, target)

    with mock.patch("os.replace", watched):
        yield
