"""Find biases that do not affect the logits, such as the key's, which softmax cancels.

The true gradient of such a bias is zero. Adam scales the rounding noise up to full steps, above
all in bf16, so that the bias seems to learn. The biases are found by computation and not by name,
because with relative positions the logits may depend on the key's bias.
"""

from collections.abc import Collection
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch

from bitfit.data.tokens import TokenizedSplit
from bitfit.model.forward import Forward
from bitfit.model.precision import cast_parameters, replaced_data, without_tf32
from bitfit.model.trainable import in_encoder, layer_and_name

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

ROWS, TOKENS = 2, 32  # the number of rows to compute with, and the maximum tokens of a row
ROUNDING = 1e-3  # a sum is zero up to this share of the sum of absolute terms
NOISE = 0.1  # standard deviation of random shifts: attention may be uniform in a new model


def find_zero_gradients(
    model: "PreTrainedModel", trained: Collection[str], tokens: TokenizedSplit
) -> dict[str, list[list[int]]]:
    """Return {bias: [[start, stop], ...]}, the ranges of trained biases with zero gradient.

    The gradient of a bias is a sum over tokens. It counts as zero if its terms cancel in several
    rows and for random values of the other biases, and if random shifts of all such biases leave
    the logits unchanged.

    Args:
        model: a float32 classifier. It is left unchanged, in evaluation mode.
    """
    tokens = tokens._replace(lengths=np.minimum(tokens.lengths, TOKENS))
    order, count = np.argsort(tokens.lengths, kind="stable"), len(tokens.lengths)
    rows = [order[[count * (ROWS + i) // (2 * ROWS)]] for i in range(ROWS)]  # of the longer half
    model.eval()
    # Rounding of float64 is far below any gradient, but some models cannot compute in it.
    for dtype in (torch.float64, torch.float32):
        rng = torch.Generator().manual_seed(0)
        try:
            with without_tf32(), cast_parameters(model, dtype):
                masks = cancelled_in_all(model, trained, tokens, rows=rows, rng=rng)
                if masks and logits_change(
                    model, trained, masks, tokens=tokens, rows=rows, rng=rng
                ):
                    masks = {}
            return {name: ranges(mask) for name, mask in masks.items()}
        except Exception:  # of any kind: `select_forward` reports the problems of a model
            continue
    return {}


def cancelled_in_all(
    model: "PreTrainedModel",
    trained: Collection[str],
    tokens: TokenizedSplit,
    rows: list[np.ndarray],
    rng: torch.Generator,
) -> dict[str, torch.Tensor]:
    """Return {bias: (size,) bool}, True for attention heads whose gradients cancel in all rows."""
    sizes = {name: model.get_parameter(name).shape for name in trained if in_encoder(model, name)}
    biases = [n for n, shape in sizes.items() if n.endswith(".bias") and len(shape) == 1]
    masks = {name: torch.ones(sizes[name], dtype=torch.bool) for name in biases}
    for row in rows:
        with shifted(model, trained, rng):
            sums = gradient_sums(model, biases, tokens, row=row, rng=rng)
        for name, mask in masks.items():
            total, size = sums.get(name, (torch.ones(()), torch.zeros(())))
            mask &= ((total.abs() <= ROUNDING * size) & (size > 0)).cpu()
    # A single gradient may be small by chance, but not those of a whole attention head.
    masks = {name: whole_parts(mask, head_size(model.config)) for name, mask in masks.items()}
    return {name: mask for name, mask in masks.items() if mask.any()}


def head_size(config: "PreTrainedConfig") -> int | None:
    """Return the width of an attention head, or None."""
    try:
        return config.hidden_size // config.num_attention_heads
    except (AttributeError, TypeError, ZeroDivisionError):
        return None


def whole_parts(mask: torch.Tensor, width: int | None) -> torch.Tensor:
    """Return a mask (size,) of the parts of `width` entries that are all True.

    A mask whose size is not a multiple of `width` is one part.
    """
    parts = mask.view(-1, width if width and len(mask) % width == 0 else len(mask))
    return parts.all(1, keepdim=True).expand_as(parts).flatten()


def shifted(
    model: "PreTrainedModel",
    names: Collection[str],
    rng: torch.Generator,
    masks: dict[str, torch.Tensor] | None = None,
) -> AbstractContextManager[None]:
    """Add random values to parameters, or to their entries in `masks`, within the context."""
    mask_of = {model.get_parameter(name): 1 if masks is None else masks[name] for name in names}

    def shift(parameter: torch.nn.Parameter) -> torch.Tensor:
        noise = NOISE * torch.randn(parameter.shape, generator=rng) * mask_of[parameter]
        return parameter.data + noise.to(parameter)

    return replaced_data(mask_of, shift)


Sums = dict[str, tuple[torch.Tensor, torch.Tensor]]  # {bias: (sum, sum of absolutes)}, (size,)


def watch_output(
    sums: Sums, name: str, module: torch.nn.Module, inputs: object, output: torch.Tensor | tuple
) -> None:
    """Add the gradient of a module's output to the sums of its bias, as a forward hook."""
    output = output[0] if isinstance(output, tuple) else output
    axis = 1 if isinstance(module, torch.nn.Conv1d) else -1  # of the features

    def add(gradient: torch.Tensor) -> None:
        gradient = gradient.movedim(axis, -1).flatten(0, -2)
        signed, absolute = sums.get(name, (0, 0))  # not 0 if the module is called more than once
        sums[name] = signed + gradient.sum(0), absolute + gradient.abs().sum(0)

    if output.shape[axis] == len(module.bias) and output.requires_grad:
        output.register_hook(add)


def gradient_sums(
    model: "PreTrainedModel",
    biases: list[str],
    tokens: TokenizedSplit,
    row: np.ndarray,
    rng: torch.Generator,
) -> Sums:
    """Return {bias: (sum, sum of absolute values)} of the gradients of the tokens of a row (1,).

    These are the gradients of the output of the bias's module. A bias that is not added to that
    output has no entry, or gradients that do not cancel.
    """
    sums: Sums = {}
    with ExitStack() as on_exit, torch.enable_grad():
        for parameter in model.parameters():
            on_exit.callback(parameter.requires_grad_, parameter.requires_grad)
            parameter.requires_grad_(parameter.dim() == 1)
        for name in biases:
            module = model.get_submodule(name.rpartition(".")[0])
            hook = module.register_forward_hook(partial(watch_output, sums, name))
            on_exit.callback(hook.remove)
        logits = Forward(model).logits(tokens, row)
        direction = torch.randn(logits.shape, generator=rng).to(logits)
        wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
        torch.autograd.grad((logits * direction).sum(), wanted, allow_unused=True)
    if not logits.isfinite().all():
        raise ValueError("the logits are not finite")
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
    """Return whether shifts of the biases in `masks` change the logits by more than rounding."""
    forward = Forward(model)
    with shifted(model, trained, rng):
        before = torch.cat([forward.logits(tokens, row) for row in rows])
        with shifted(model, list(masks), rng, masks=masks):
            after = torch.cat([forward.logits(tokens, row) for row in rows])
    spread = (before - before.mean(0)).abs().max()
    rounding = 4 * torch.finfo(before.dtype).eps * before.abs().max()
    return not (after - before).abs().max() < 1e-3 * spread + rounding


def ranges(mask: torch.Tensor) -> list[list[int]]:
    """Return [[start, stop], ...], the ranges where a mask (size,) is True."""
    edges = np.flatnonzero(np.diff(mask.numpy().astype(np.int8), prepend=0, append=0))
    return edges.reshape(-1, 2).tolist()


def format_zero_gradients(found: dict[str, list[list[int]]], model: "PreTrainedModel") -> str:
    """Return the bias terms as text: "k_lin.bias", or "32 of 96 numbers of c_attn.bias"."""
    counts: dict[str, tuple[int, int]] = {}
    for name, spans in found.items():
        fixed, size = counts.get(term := layer_and_name(name)[1], (0, 0))
        fixed += sum(stop - start for start, stop in spans)
        counts[term] = fixed, size + model.get_parameter(name).numel()
    return ", ".join(
        term if fixed == size else f"{fixed:,} of {size:,} numbers of {term}"
        for term, (fixed, size) in counts.items()
    )
