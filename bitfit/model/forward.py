"""The forward pass, and trials of a model on a few examples before training.

The trials select the fastest way to batch: packed, padded or equal length. A way is used only if it
gives each example the logits that the example has alone. Models that fail are refused.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from bitfit.data.tokens import TokenizedSplit
from bitfit.model.batching import Batch, gather_inputs, make_batch, make_varlen_batch, to_device
from bitfit.model.loading import first_position, position_embedding, position_limit
from bitfit.model.packed_encoder import PackedEncoder, packed_encoders
from bitfit.model.precision import cast_parameters, without_tf32
from bitfit.model.run_routing import RunRouting, route_chunks, route_rows
from bitfit.model.trainable import in_encoder, is_bias
from utils import UserError, convert_errors, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LOGGER = logging.getLogger("bitfit")


class Forward(NamedTuple):
    """The forward pass of a model: a `Batch` of a split's rows -> logits (B, C) float32."""

    model: torch.nn.Module
    packed_encoder: PackedEncoder | None = None  # runs packed rows; None: rows are padded
    equal_length: bool = False  # batch only rows of equal length, because padding changes logits

    @property
    def batching_kind(self) -> str:
        """How rows are batched: "packed", "padded" or "equal length"."""
        if self.packed_encoder:
            return "packed"
        return "equal length" if self.equal_length else "padded"

    @property
    def uses_varlen(self) -> bool:
        """Whether rows are packed for FlashAttention."""
        return self.packed_encoder is not None and self.packed_encoder.varlen

    def make_batch(self, tokens: TokenizedSplit, rows: np.ndarray) -> Batch:
        """Return the `Batch` of the rows (B,) int64 as arrays."""
        if self.uses_varlen:
            return make_varlen_batch(tokens, rows)[0]
        return make_batch(tokens, rows, self.packed_encoder is not None)

    def make_routed_batch(
        self, tokens: TokenizedSplit, rows: np.ndarray, run_ids: np.ndarray, num_runs: int
    ) -> tuple[Batch, RunRouting]:
        """Return the `Batch` of the rows (B,) of several runs, and its `RunRouting`, as arrays.

        Args:
            run_ids: (B,) int64, the run of each row, rows of a run together.
        """
        packed = self.packed_encoder is not None
        if self.uses_varlen:
            batch, chunk_run_ids = make_varlen_batch(tokens, rows, run_ids, stacked=num_runs > 1)
            return batch, route_chunks(run_ids, num_runs, chunk_run_ids)
        token_run_ids = np.repeat(run_ids, tokens.lengths[rows]) if packed else None
        routing = route_rows(run_ids, num_runs, token_run_ids)
        return make_batch(tokens, rows, packed), routing

    def __call__(self, tokens: TokenizedSplit, batch: Batch) -> torch.Tensor:
        """Return the logits (B, C) of a `Batch` of tensors on the device."""
        inputs = gather_inputs(tokens, batch)
        if self.packed_encoder:
            return self.packed_encoder(self.model, inputs, batch.packed).logits.float()
        return self.model(**inputs).logits.float()

    def logits(self, tokens: TokenizedSplit, rows: np.ndarray) -> torch.Tensor:
        """Return the logits (B, C) of the rows (B,) int64."""
        return self(tokens, to_device(self.make_batch(tokens, rows), tokens.ids.device))


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
    """Return the fastest `Forward` that gives each row the logits that it has alone, and log it.

    Packed rows are tried first, then padded rows, then batches of rows of equal length. Each is
    tried on a few rows in several batches. The model gets the tokenizer's padding token.

    Raises:
        UserError: the model cannot run on the rows or compute in `dtype` (with the message of the
            model's exception), or the logits of a row always depend on the others in a batch.
    """
    set_pad_token(model, tokens.pad_id)
    check_ids(model, model_name, tokens)
    tokens, rows = trial_rows(model, tokens)
    device = tokens.ids.device
    action = f"run on these rows of up to {tokens.lengths[rows[0]]} tokens"
    with trial_head(model), torch.random.fork_rng([device] * (device.type == "cuda")):
        with convert_errors(cannot(model_name, action, "another --model-name")):
            model.train()  # some models check their inputs in training alone (Reformer)
            Forward(model).logits(tokens, rows[1:2])
            model.eval()
            alone = {row: Forward(model).logits(tokens, rows[[i]])[0] for i, row in enumerate(rows)}
        warn_of_constant(model_name, alone, tokens.lengths[rows])
        forward = first_independent(model, model_name, tokens, rows, alone, dtype)
    if dtype != torch.float32:
        errors = convert_errors(cannot(model_name, "compute in bf16", "--precision fp32"))
        with errors, cast_parameters(model, dtype):
            if not all(forward.logits(tokens, rows[[i]]).isfinite().all() for i in range(3)):
                raise ValueError("its logits are not finite")
    return forward


def check_ids(model: "PreTrainedModel", model_name: str | Path, tokens: TokenizedSplit) -> None:
    """Check that the model has embeddings for all tokens and token types.

    Raises:
        UserError: it has not, or an encoder-decoder model would read the wrong token.
    """
    size, last = getattr(model.config.get_text_config(), "vocab_size", None), tokens.ids.max()
    if isinstance(size, int) and last >= size:
        problem = f"a text has token {last}, but the model {model_name} has embeddings for {size}"
        raise UserError(f"{problem} tokens, from 0: give a model that fits its tokenizer")
    types = token_types(model)
    if tokens.types is not None and types and tokens.types.max() >= types:
        problem = f"an example has token type {tokens.types.max()}, but the model {model_name} has "
        raise UserError(
            f"{problem}embeddings for {types} (type_vocab_size in config.json), from 0: "
            "give a model for pairs, or the tokenizer of this model"
        )
    if model.config.is_encoder_decoder:  # the classifier reads a text's last end token
        check_ends(model.config.eos_token_id, model_name, tokens)


def token_types(model: "PreTrainedModel") -> int | None:
    """Return the number of token types that a model has embeddings for, or None."""
    for name, module in model.named_modules():
        if name.endswith("token_type_embeddings") and isinstance(module, torch.nn.Embedding):
            return module.num_embeddings
    return None


def check_ends(eos: object, model_name: str | Path, tokens: TokenizedSplit) -> None:
    """Check that all rows have the same number of end tokens, which encoder-decoder models need.

    Raises:
        UserError: a text contains an end token.
    """
    if not isinstance(eos, int):
        return
    positions = (tokens.ids == eos).nonzero().flatten().cpu().numpy()
    row = np.searchsorted(tokens.starts, positions, "right") - 1
    counts = np.bincount(row, minlength=len(tokens.starts))
    if counts.min() < counts.max():
        problem = f"a text has the token for its end, {eos}, in it ({counts.max()} in a row, "
        problem += f"{counts.min()} in another), and the model {model_name} needs as many in each"
        raise UserError(f"{problem}: change the text, or give another --model-name")


def set_pad_token(model: "PreTrainedModel", pad_id: int) -> None:
    """Set the model's padding token to the tokenizer's: decoders read the last token before it.

    Models that count positions from the padding token (RoBERTa) keep theirs, because it determines
    their positions.
    """
    if not first_position(position_embedding(model)):
        model.config.get_text_config().pad_token_id = pad_id


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
    logits = torch.stack([*alone.values()])
    rounding = 16 * torch.finfo(logits.dtype).eps * logits.abs().max()
    if lengths.min() < lengths.max() and (logits - logits[0]).abs().max() <= rounding:
        LOGGER.warning(
            "the model %s has the same logits for all texts: do its weights fit its config.json "
            "(is_decoder)?", model_name,
        )  # fmt: skip


def first_independent(
    model: "PreTrainedModel",
    model_name: str | Path,
    tokens: TokenizedSplit,
    rows: np.ndarray,
    alone: dict[int, torch.Tensor],
    dtype: torch.dtype,
) -> Forward:
    """Return the first `Forward` that gives rows in batches the logits that they have alone.

    Args:
        alone: {row: (C,) the logits that it has alone}.

    Raises:
        UserError: there is none.
    """
    candidates, problems = forward_candidates(model, tokens, rows, dtype), []
    if not candidates[0][0].packed_encoder:
        problems.append("packed rows need other layers")
    for forward, batches in candidates:
        problem = neighbour_problem(forward, tokens, batches, alone)
        if problem is None:
            reason = f" ({'; '.join(problems)})" if problems and not forward.packed_encoder else ""
            LOGGER.info("rows: %s%s", forward.batching_kind, reason)
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
    encoders = packed_encoders(model, first_position(position_embedding(model)), dtype)
    candidates = [(Forward(model, packed_encoder), packed) for packed_encoder in encoders]
    return [*candidates, (Forward(model), padded), (Forward(model, equal_length=True), equal)]


def neighbour_problem(
    forward: Forward,
    tokens: TokenizedSplit,
    batches: list[np.ndarray],
    alone: dict[int, torch.Tensor],
) -> str | None:
    """Return why `forward` must not be used, or None if its logits equal those of `alone`."""
    logits = torch.stack([*alone.values()])
    spread, largest = (logits - logits.mean(0)).abs().max(), logits.abs().max()
    bound = 1e-4 * spread + 16 * torch.finfo(logits.dtype).eps * largest
    try:
        for batch in batches:
            known = np.flatnonzero(np.isin(batch, [*alone]))
            expected = torch.stack([alone[row] for row in batch[known]])
            logits = forward.logits(tokens, batch)
            if len(logits) < len(batch) or not (logits[known] - expected).abs().max() <= bound:
                return "give other logits"
            if forward.uses_varlen:  # FlashAttention, which is used in training, needs bf16
                with cast_parameters(forward.model, torch.bfloat16):
                    logits = forward.logits(tokens, batch)
                if not (logits[known] - expected).abs().max() <= 0.2 * largest:
                    return "give other logits in bf16"
    except Exception as error:  # of any kind: the next candidate may work
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
    biases = [p for n, p in head if is_bias(n)]
    trial = {p: torch.zeros_like(p) for p in biases[-1:]}
    for _, p in head:
        if p.dim() > 1 and not p.any():
            trial[p] = torch.randn(p.shape, generator=generator).to(p)
    saved = {p: p.data for p in trial}
    try:
        for p, values in trial.items():
            p.data = values
        yield
    finally:
        for p, values in saved.items():
            p.data = values
