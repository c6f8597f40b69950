"""Trials of a model on a few examples before training.

The trials select the fastest way to batch: packed, padded or equal length. A way is used only if it
gives each example the logits that the example has alone. Models that fail are refused. A trial with
two runs finds out whether several runs can share a pass.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING

import numpy as np
import torch

from bitfit.data.tokens import TokenizedSplit
from bitfit.model.batching import count_labels, to_device
from bitfit.model.forward import Forward, check_ids
from bitfit.model.loading import first_position, position_limit
from bitfit.model.packed_encoder import packed_encoders
from bitfit.model.precision import cast_parameters, replaced_data, without_tf32
from bitfit.model.run import Run
from bitfit.model.run_stack import RunStack
from bitfit.model.trainable import Trainable, in_encoder, is_bias, trains_matrices
from utils import LOGGER, UserError, convert_errors, first_line, is_out_of_memory

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def cannot(model_name: str | Path, action: str, instead: str) -> Callable[[Exception], UserError]:
    """Return a function that converts an exception of a model into a `UserError`."""
    return lambda error: UserError(
        f"the model {model_name} cannot {action}: {type(error).__name__}: {first_line(error)}; "
        f"give {instead}"
    )


@torch.no_grad()
@without_tf32()
def select_forward(
    model: "PreTrainedModel",
    model_name: str | Path,
    tokens: TokenizedSplit,
    dtype: torch.dtype = torch.float32,
) -> Forward:
    """Return the fastest `Forward` that gives each row the logits that it has alone.

    Packed rows are tried first, then padded rows, then batches of rows of equal length, on a few
    rows in several batches. The model gets the tokenizer's padding token.

    Raises:
        UserError: the model cannot run on the rows or compute in `dtype` (with the message of the
            model's exception), or the logits of a row always depend on the others in a batch.
    """
    # Decoders read the token before the padding. RoBERTa counts positions from its padding token.
    if not first_position(model):
        model.config.get_text_config().pad_token_id = tokens.pad_id
    check_ids(model, model_name, tokens)
    tokens, rows = trial_rows(model, tokens)
    device = tokens.ids.device
    action = f"run on examples of up to {tokens.lengths[rows[0]]} tokens"
    with trial_head(model), torch.random.fork_rng([device] * (device.type == "cuda")):
        with convert_errors(cannot(model_name, action, "another --model-name")):
            model.train()  # Some models check their inputs only in training (Reformer).
            Forward(model).logits(tokens, rows[1:2])
            model.eval()
            alone = {row: Forward(model).logits(tokens, rows[[i]]) for i, row in enumerate(rows)}
        warn_of_constant(model_name, alone, tokens.lengths[rows])
        candidates = forward_candidates(model, tokens, rows, dtype=dtype)
        forward = first_independent(candidates, model_name, tokens, alone=alone)
    if dtype != torch.float32:
        errors = convert_errors(cannot(model_name, "compute in bf16", "--precision fp32"))
        with errors, cast_parameters(model, dtype):
            if not all(forward.logits(tokens, rows[[i]]).isfinite().all() for i in range(3)):
                raise ValueError("its logits are not finite")
    return forward


def trial_rows(
    model: "PreTrainedModel", tokens: TokenizedSplit
) -> tuple[TokenizedSplit, np.ndarray]:
    """Return the numbers of three or four rows to try a model on, and the tokens.

    The rows are the longest, the shortest, one of median length and, if there is one, a row with
    a token that the model may take for padding. If all rows have the same length, half a row is
    added to the tokens as the shortest.
    """
    paddings = {getattr(module, "padding_idx", None) for module in model.modules()}
    paddings = torch.tensor([tokens.pad_id, *(paddings - {None})], device=tokens.ids.device)
    is_padding = torch.isin(tokens.ids, paddings.to(tokens.ids.dtype))
    positions = is_padding.nonzero().flatten()[:1].tolist()
    with_padding = np.searchsorted(tokens.starts, positions, "right") - 1
    starts, lengths = tokens.starts, tokens.lengths
    if lengths.min() == lengths.max() > 1:
        half = lengths[0] // 2  # the second half, because some models read the last token
        starts = np.append(starts, starts[0] + lengths[0] - half)
        lengths = np.append(lengths, half)
    order = np.argsort(lengths, kind="stable")
    rows = np.concatenate([order[[-1, 0, len(order) // 2]], with_padding])
    return tokens._replace(starts=starts, lengths=lengths), rows


def warn_of_constant(
    model_name: str | Path, alone: dict[int, torch.Tensor], lengths: np.ndarray
) -> None:
    """Log a warning if rows of different lengths all have the same logits, up to rounding."""
    logits = torch.cat([*alone.values()])
    rounding = 16 * torch.finfo(logits.dtype).eps * logits.abs().max()
    if lengths.min() < lengths.max() and (logits - logits[0]).abs().max() <= rounding:
        LOGGER.warning(
            "the model %s has the same logits for all texts: do its weights fit its config.json "
            "(is_decoder)?", model_name,
        )  # fmt: skip


def first_independent(
    candidates: list[tuple[Forward, list[np.ndarray]]],
    model_name: str | Path,
    tokens: TokenizedSplit,
    alone: dict[int, torch.Tensor],
) -> Forward:
    """Return the first `Forward` that gives rows their logits `alone`; UserError if none does.

    Args:
        alone: {row: (labels, C) logits of a batch with this row alone}.
    """
    is_packed = candidates[0][0].packed_encoder is not None
    problems = [] if is_packed else ["packed rows need other layers"]
    for forward, batches in candidates:
        problem = neighbour_problem(forward, tokens, batches, alone=alone)
        if problem is None:
            if problems and not forward.packed_encoder:
                LOGGER.info("examples are %s (%s)", forward.batching_kind, "; ".join(problems))
            return forward
        if (problem := f"{forward.batching_kind} rows {problem}") not in problems:
            problems.append(problem)
    raise UserError(
        f"the model {model_name} gives a row other logits in a batch than alone "
        f"({'; '.join(problems)}); give another --model-name"
    )


def forward_candidates(
    model: "PreTrainedModel", tokens: TokenizedSplit, rows: np.ndarray, dtype: torch.dtype
) -> list[tuple[Forward, list[np.ndarray]]]:
    """Return (`Forward`, batches of row numbers to try it on), the fastest first."""
    # The packed batch has more tokens than a row of this model may have.
    times = 1 + (position_limit(model) or 512) // tokens.lengths[rows].sum()
    packed = [np.tile(rows, times), rows[1:2]]
    padded = [rows, rows[::-1].copy(), rows[1:], rows[[2, 1]]]
    equal = [np.append(np.flatnonzero(tokens.lengths == tokens.lengths[r])[:2], r) for r in rows]
    encoders = packed_encoders(model, dtype, reads_all_tokens=tokens.word_index is not None)
    candidates = [(Forward(model, packed_encoder), packed) for packed_encoder in encoders]
    return [*candidates, (Forward(model), padded), (Forward(model, equal_length=True), equal)]


def neighbour_problem(
    forward: Forward,
    tokens: TokenizedSplit,
    batches: list[np.ndarray],
    alone: dict[int, torch.Tensor],
) -> str | None:
    """Return why `forward` must not be used, or None if its logits equal those of `alone`."""
    logits = torch.cat([*alone.values()])
    spread, largest = (logits - logits.mean(0)).abs().max(), logits.abs().max()
    bound = 1e-4 * spread + 16 * torch.finfo(logits.dtype).eps * largest

    def differs(batch: np.ndarray, bound: torch.Tensor) -> bool:
        counts, logits = count_labels(tokens, batch).tolist(), forward.logits(tokens, batch)
        if len(logits) < sum(counts):
            return True
        by_row = zip(logits.split(counts), batch, strict=True)
        differences = [logits - alone[row] for logits, row in by_row if row in alone]
        return not torch.cat(differences).abs().max() <= bound

    try:
        for batch in batches:
            if differs(batch, bound):
                return "give other logits"
            if forward.uses_varlen:  # FlashAttention, which is used in training, needs bf16
                with cast_parameters(forward.model, torch.bfloat16):
                    if differs(batch, 0.2 * largest):
                        return "give other logits in bf16"
    except Exception as error:  # The next candidate may work.
        return f"raise {type(error).__name__}: {shorten(first_line(error), 100)}"
    return None


@contextmanager
def trial_head(model: "PreTrainedModel") -> Iterator[None]:
    """Give the classifier parameters that hide no difference between two encoder outputs.

    The last bias is 0, because rounding would hide small differences beside a large bias. A matrix
    of zeros becomes random. On exit the parameters are as before.
    """
    head = [(n, p) for n, p in model.named_parameters() if not in_encoder(model, n)]
    generator = torch.Generator().manual_seed(0)
    last_bias = [p for n, p in head if is_bias(n)][-1:]
    zeros = [p for _, p in head if p.dim() > 1 and not p.any()]
    with (
        replaced_data(last_bias, torch.zeros_like),
        replaced_data(zeros, lambda p: torch.randn(p.shape, generator=generator).to(p)),
    ):
        yield


def reason_not_stackable(
    forward: Forward, trainable: Trainable, tokens: TokenizedSplit
) -> str | None:
    """Return why several runs cannot share a forward pass of this model, or None if they can."""
    model = forward.model
    if any(positions is not None for positions in trainable.values()):
        return "each run trains other randomly chosen parameters"
    if trains_matrices(model, trainable):
        return "the encoder's matrices train, so that no run can share them"
    for name in trainable:
        module = model.get_submodule(name.rpartition(".")[0])
        if type(module) not in (torch.nn.Linear, torch.nn.LayerNorm):
            return f"{name} belongs to a {type(module).__name__}, not to a Linear or LayerNorm"
    if stacked_logits_differ(forward, trainable, tokens):
        return "this model does not compute with its Linear and LayerNorm modules alone"
    return None


@torch.no_grad()
def stacked_logits_differ(forward: Forward, trainable: Trainable, tokens: TokenizedSplit) -> bool:
    """Return whether a stack of two runs gives other logits than each run alone, on two rows.

    An example is a model that reads the biases of its modules without calling the modules.
    """
    forward.model.eval()
    stack = RunStack(forward.model, trainable, [Run(0.0, 0), Run(0.0, 1)])
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(stack.params.shape, generator=generator)
    stack.params += 0.1 * noise.to(stack.params.device)
    distinct = 1 if forward.equal_length else len(tokens.lengths)
    routed = forward.make_routed_batch(tokens, np.arange(2) % distinct, np.arange(2), num_runs=2)
    batch, routing = to_device(routed, stack.params.device)
    run_ids = routing.run_ids_of(batch.label_index)
    try:
        with without_tf32(), stack.patched():
            with stack.routing(routing):
                together = forward(tokens, batch)
            for run in range(2):
                stack.load_run(run)
                alone = forward(tokens, batch)
                mask = (run_ids == run) & (batch.label_index >= 0)
                off = (together - alone)[mask].abs().max()
                if not off < 2e-3 * together.abs().max():
                    return True
            return False
    except RuntimeError as error:  # for example shapes that do not match
        if is_out_of_memory(error):
            raise
        return True
    finally:
        stack.set_params(stack.initial_params)
