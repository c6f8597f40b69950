"""Find biases that cannot change the logits, such as the key's: softmax cancels a common shift.

Their true gradient is zero. Adam scales the rounding noise up to whole steps, in bf16 above all,
so that such a bias seems to learn. They are found by computing with the model, not by name: with
relative positions the logits may well depend on the key's bias.
"""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch

from bitfit.data.tokens import TokenizedSplit
from bitfit.model.forward import Forward
from bitfit.model.precision import cast_parameters, without_tf32
from bitfit.model.trainable import in_encoder, layer_and_name

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

ROWS, TOKENS = 2, 32  # the trial computes with so many rows, and so many tokens of each
ROUNDING = 1e-3  # what rounding may leave of a sum whose terms cancel, as a share of their sizes
NOISE = 0.1  # standard deviation of the shifts, for attention may be uniform in a new model


def find_zero_gradients(
    model: "PreTrainedModel", trained: Collection[str], tokens: TokenizedSplit
) -> dict[str, list[list[int]]]:
    """Return {name: [[start, stop], ...]}: where the gradients of trained biases are always zero.

    The gradient of a bias is a sum over tokens. It counts as zero if its terms cancel, whatever
    the row and the other biases, and if a random shift of all such biases keeps the logits.

    Args:
        model: a float32 classifier; it is left as it was, but in evaluation mode.
        trained: names of the parameters that train.
        tokens: the `bitfit.data.tokens.TokenizedSplit` of a split.
    """
    tokens = tokens._replace(lengths=np.minimum(tokens.lengths, TOKENS))
    order, count = np.argsort(tokens.lengths, kind="stable"), len(tokens.lengths)
    rows = [order[[count * (ROWS + i) // (2 * ROWS)]] for i in range(ROWS)]  # of the longer half
    model.eval()
    # In float64 rounding is far below any gradient; a model that cannot compute in it is next.
    for dtype in (torch.float64, torch.float32):
        rng = torch.Generator().manual_seed(0)
        try:
            with without_tf32(), cast_parameters(model, dtype):
                masks = cancelled_in_all(model, trained, tokens, rows, rng)
                if masks and logits_change(model, trained, masks, tokens, rows, rng):
                    masks = {}
            return {name: ranges(mask) for name, mask in masks.items()}
        except Exception:  # of any kind: `select_forward` reports what is wrong with a model
            continue
    return {}


def cancelled_in_all(
    model: "PreTrainedModel",
    trained: Collection[str],
    tokens: TokenizedSplit,
    rows: list[np.ndarray],
    rng: torch.Generator,
) -> dict[str, torch.Tensor]:
    """{name: (size,) bool}, True in the parts of biases whose gradients cancel in all rows."""
    sizes = {name: model.get_parameter(name).shape for name in trained if in_encoder(model, name)}
    biases = [n for n, shape in sizes.items() if n.endswith(".bias") and len(shape) == 1]
    masks = {name: torch.ones(sizes[name], dtype=torch.bool) for name in biases}
    for row in rows:
        with shifted(model, trained, rng):
            sums = gradient_sums(model, biases, tokens, row, rng)
        for name, mask in masks.items():
            total, size = sums.get(name, (torch.ones(()), torch.zeros(())))
            mask &= ((total.abs() <= ROUNDING * size) & (size > 0)).cpu()
    # One number may be small by chance, and those of a whole head may not.
    masks = {name: whole_parts(mask, head_size(model.config)) for name, mask in masks.items()}
    return {name: mask for name, mask in masks.items() if mask.any()}


def head_size(config: "PreTrainedConfig") -> int | None:
    """The width of an attention head, or None."""
    try:
        return config.hidden_size // config.num_attention_heads
    except (AttributeError, TypeError, ZeroDivisionError):
        return None


def whole_parts(mask: torch.Tensor, width: int | None) -> torch.Tensor:
    """A mask (size,) where all of its part of so many is True; of other sizes it is one part."""
    parts = mask.view(-1, width if width and len(mask) % width == 0 else len(mask))
    return parts.all(1, keepdim=True).expand_as(parts).flatten()


@contextmanager
def shifted(
    model: "PreTrainedModel",
    names: Collection[str],
    rng: torch.Generator,
    masks: dict[str, torch.Tensor] | None = None,
) -> Iterator[None]:
    """Within: random values are added to parameters, or to those of their values in masks."""
    parameters = [model.get_parameter(name) for name in names]
    data = [parameter.data for parameter in parameters]
    try:
        for name, parameter in zip(names, parameters, strict=True):
            noise = NOISE * torch.randn(parameter.shape, generator=rng)
            noise = noise if masks is None else noise * masks[name]
            parameter.data = parameter.data + noise.to(parameter)
        yield
    finally:
        for parameter, values in zip(parameters, data, strict=True):
            parameter.data = values


Sums = dict[str, tuple[torch.Tensor, torch.Tensor]]  # {bias: (sum, sum of sizes)}, (size,) each


def add_gradient(sums: Sums, name: str, axis: int, gradient: torch.Tensor) -> None:
    """Add a gradient of a module's output, whose features are on `axis`, to the sums of a bias."""
    gradient = gradient.movedim(axis, -1).flatten(0, -2)
    signed, absolute = gradient.sum(0), gradient.abs().sum(0)
    if name in sums:  # a module that is called again
        signed, absolute = sums[name][0] + signed, sums[name][1] + absolute
    sums[name] = signed, absolute


def watch_output(
    sums: Sums, name: str, module: torch.nn.Module, inputs: object, output: torch.Tensor | tuple
) -> None:
    """Let the gradient of a module's output be added to the sums of its bias (a forward hook)."""
    output = output[0] if isinstance(output, tuple) else output
    axis = 1 if isinstance(module, torch.nn.Conv1d) else -1
    if output.shape[axis] == len(module.bias) and output.requires_grad:
        output.register_hook(partial(add_gradient, sums, name, axis))


def gradient_sums(
    model: "PreTrainedModel",
    biases: list[str],
    tokens: TokenizedSplit,
    row: np.ndarray,
    rng: torch.Generator,
) -> Sums:
    """{name: (sum, sum of sizes)} of a bias's gradients from the tokens of a row, (size,) each.

    They are those of its module's output, to which it is added; one that is not has none here, or
    gradients that do not cancel.
    """
    sums: Sums = {}
    handles, flags = [], [(p, p.requires_grad) for p in model.parameters()]

    try:
        for parameter, _ in flags:
            parameter.requires_grad_(parameter.dim() == 1)
        for name in biases:
            module = model.get_submodule(name.rpartition(".")[0])
            handles.append(module.register_forward_hook(partial(watch_output, sums, name)))
        with torch.enable_grad():
            logits = Forward(model).logits(tokens, row)
            direction = torch.randn(logits.shape, generator=rng).to(logits)
            wanted = [p for p, _ in flags if p.requires_grad]
            torch.autograd.grad((logits * direction).sum(), wanted, allow_unused=True)
        if not logits.isfinite().all():
            raise ValueError("the logits are not finite")
    finally:
        for handle in handles:
            handle.remove()
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
    return sums


@torch.no_grad()
def logits_change(
    model: "PreTrainedModel",
    trained: Collection[str],
    masks: dict[str, torch.Tensor],
    tokens: TokenizedSplit,
    rows: list[np.ndarray],
    rng: torch.Generator,
) -> bool:
    """Whether a shift of the biases in masks changes any row's logits by more than rounding."""
    forward = Forward(model)
    with shifted(model, trained, rng):
        before = torch.cat([forward.logits(tokens, row) for row in rows])
        with shifted(model, list(masks), rng, masks):
            after = torch.cat([forward.logits(tokens, row) for row in rows])
    spread = (before - before.mean(0)).abs().max()
    rounding = 4 * torch.finfo(before.dtype).eps * before.abs().max()
    return not (after - before).abs().max() < 1e-3 * spread + rounding


def ranges(mask: torch.Tensor) -> list[list[int]]:
    """[[start, stop], ...] where a mask (size,) is True."""
    edges = np.flatnonzero(np.diff(mask.numpy().astype(np.int8), prepend=0, append=0))
    return edges.reshape(-1, 2).tolist()


def format_zero_gradients(found: dict[str, list[list[int]]], model: "PreTrainedModel") -> str:
    """The bias terms found, as text: "k_lin.bias", or "32 of 96 numbers of c_attn.bias"."""
    numbers: dict[str, tuple[int, int]] = {}
    for name, spans in found.items():
        fixed, size = numbers.get(term := layer_and_name(name)[1], (0, 0))
        fixed += sum(stop - start for start, stop in spans)
        numbers[term] = fixed, size + model.get_parameter(name).numel()
    return ", ".join(
        term if fixed == size else f"{fixed:,} of {size:,} numbers of {term}"
        for term, (fixed, size) in numbers.items()
    )
