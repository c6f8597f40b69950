"""The forward pass of a model, and checks of the token numbers that it gets."""

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from bitfit.data.tokens import TokenizedSplit
from bitfit.model.batching import Batch, gather_inputs, make_batch, make_varlen_batch, to_device
from bitfit.model.loading import find_embedding, position_limit
from bitfit.model.packed_encoder import PackedEncoder
from bitfit.model.run_routing import RunRouting, route_rows
from utils import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Forward(NamedTuple):
    """The forward pass of a model: a `Batch` of a split's rows -> logits (B, C) float32.

    A token classifier gives logits of all tokens: (1, N, C) packed, or (B, T, C) padded.
    """

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
        """Return `Batch` and `RunRouting` of rows (B,) with `run_ids` (B,), grouped by run."""
        packed = self.packed_encoder is not None
        if self.uses_varlen:
            batch, chunk_run_ids = make_varlen_batch(tokens, rows, run_ids, stacked=num_runs > 1)
            return batch, route_rows(run_ids, num_runs, chunk_run_ids=chunk_run_ids)
        token_run_ids = np.repeat(run_ids, tokens.lengths[rows]) if packed else None
        routing = route_rows(run_ids, num_runs, token_run_ids)
        return make_batch(tokens, rows, packed), routing

    def __call__(self, tokens: TokenizedSplit, batch: Batch) -> torch.Tensor:
        """Return the logits in the shape of `Batch.label_index`, for tensors on the device."""
        inputs = gather_inputs(tokens, batch)
        if self.packed_encoder and batch.packed:
            return self.packed_encoder(self.model, inputs, batch.packed).logits.float()
        return self.model(**inputs).logits.float()

    def logits(self, tokens: TokenizedSplit, rows: np.ndarray) -> torch.Tensor:
        """Return the logits (B, C) of the rows (B,) int64, or (words, C) of all their words."""
        batch = self.make_batch(tokens, rows)
        return select_labels(self(tokens, to_device(batch, tokens.ids.device)), batch)


def select_labels(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Return the logits (labels, C) or (K, labels, C) of a `Batch` of arrays: of rows or words."""
    index = batch.label_index
    if index.ndim == 1:
        return logits
    words = to_device(np.flatnonzero(index >= 0), logits.device)
    return logits.reshape(-1, index.size, logits.shape[-1])[:, words].squeeze(0)


def check_ids(model: "PreTrainedModel", model_name: str | Path, tokens: TokenizedSplit) -> None:
    """Raise UserError if the model lacks embeddings, or an encoder-decoder reads wrong tokens."""
    size, last = getattr(model.config.get_text_config(), "vocab_size", None), tokens.ids.max()
    if isinstance(size, int) and last >= size:
        problem = f"a text has token {last}, but the model {model_name} has embeddings for {size}"
        raise UserError(f"{problem} tokens, from 0: give the tokenizer of this model, or save "
                        "it after `model.resize_token_embeddings(len(tokenizer))`")  # fmt: skip
    longest, limit = tokens.lengths.max(), position_limit(model)
    if limit is not None and longest > limit:
        problem = f"an example has {longest} tokens, but the model {model_name} has {limit}"
        raise UserError(f"{problem} positions: give --max-seq-length {limit}")
    embedding = find_embedding(model, "token_type_embeddings")
    types = 0 if embedding is None else embedding.num_embeddings
    if tokens.types is not None and types and tokens.types.max() >= types:
        problem = f"an example has token type {tokens.types.max()}, but the model {model_name} has "
        raise UserError(
            f"{problem}embeddings for {types} (type_vocab_size in config.json), from 0: "
            "give a model for pairs, or the tokenizer of this model"
        )
    if model.config.is_encoder_decoder:  # The classifier reads a text's last end token.
        check_ends(model.config.eos_token_id, model_name, tokens)


def check_ends(eos: object, model_name: str | Path, tokens: TokenizedSplit) -> None:
    """Raise UserError unless all rows have the same number of end tokens."""
    ends = np.concatenate([[0], (tokens.ids == eos).cpu().numpy().cumsum()])
    counts = ends[tokens.starts + tokens.lengths] - ends[tokens.starts]
    if counts.min() < counts.max():
        problem = f"a text contains the end token, {eos} ({counts.max()} in one example, "
        problem += f"{counts.min()} in another), and the model {model_name} needs equal numbers"
        raise UserError(f"{problem}: change the text, or give another --model-name")
