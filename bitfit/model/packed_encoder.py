"""Run an unmodified transformers model on packed rows.

The model's attention is replaced by `packing.bucketed_attention` or by FlashAttention. After the
last attention only the first token of each row is computed, because the classifiers of this family
read no other token; for token classifiers all are computed. `select_forward` compares the logits of
a model with and without packing. A model that needs other tokens, or computes attention without
transformers' interface, is refused here and runs on padded rows.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch

from bitfit.model import attention
from bitfit.model.loading import first_position
from bitfit.model.packing import (
    AttentionLayout,
    PackedBatch,
    attention_layout,
    bucketed_attention,
)

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle
    from transformers import PreTrainedModel
    from transformers.modeling_outputs import BaseModelOutput, SequenceClassifierOutput


class PackedEncoder(NamedTuple):
    """How to run one model on packed rows."""

    layers: torch.nn.Module | None  # runs the layers; None: the classifier reads all tokens
    last_layer: frozenset[torch.nn.Module]  # modules that may see only first tokens
    after_attention: torch.nn.Module | None  # the module after the attention in the last layer
    heads: int
    first_position: int  # RoBERTa counts from padding_idx + 1
    varlen: bool = False  # whether FlashAttention computes the attention

    def __call__(
        self,
        model: "PreTrainedModel",
        inputs: dict[str, torch.Tensor],
        packed: PackedBatch | attention.VarlenBatch,
    ) -> "SequenceClassifierOutput":
        """Return the model's output for `inputs` (1, N); the model itself is left as it was."""
        from transformers import AttentionInterface

        attend: Callable = bucketed_attention
        layout: AttentionLayout | attention.VarlenLayout
        if isinstance(packed, attention.VarlenBatch):
            attend = attention.varlen_attention
            layout = attention.VarlenLayout(packed, self.last_layer)
        else:
            layout = attention_layout(packed, self.heads, self.last_layer)
        AttentionInterface.register("packed", attend)
        positions = packed.position_ids[None] + self.first_position
        implementation = model.config._attn_implementation
        hook = self.select_first_tokens(packed.first_token)
        try:
            model.config._attn_implementation = "packed"
            return model(**inputs, position_ids=positions, layout=layout)
        finally:
            if hook:
                hook.remove()
            model.config._attn_implementation = implementation

    def select_first_tokens(self, first_token: torch.Tensor) -> "RemovableHandle | None":
        """Let only first tokens be computed after the last attention, until the hook is removed."""

        def select(x: torch.Tensor) -> torch.Tensor:  # (1, N, d) -> (R, 1, d)
            return x.squeeze(0).index_select(0, first_token)[:, None]

        def select_output(_: object, args: object, output: "BaseModelOutput") -> "BaseModelOutput":
            output.last_hidden_state = select(output.last_hidden_state)
            return output

        if self.after_attention:
            after = self.after_attention
            return after.register_forward_pre_hook(lambda _, args: tuple(map(select, args)))
        return self.layers.register_forward_hook(select_output) if self.layers else None


def packed_encoders(
    model: "PreTrainedModel",
    dtype: torch.dtype = torch.float32,
    reads_all_tokens: bool = False,
) -> list[PackedEncoder]:
    """Return the `PackedEncoder`s to try on a model, the fastest first.

    There is none for layers with windows. After the last attention no token reads another. Unless
    the classifier `reads_all_tokens`, it reads first tokens alone: for the other tokens three
    quarters of the last layer's arithmetic can be skipped.
    """
    config, base = model.config, model.base_model
    windows = any(getattr(config, name, None) for name in ("sliding_window", "local_attention"))
    lists = [(len(m), n) for n, m in base.named_modules() if isinstance(m, torch.nn.ModuleList)]
    heads = getattr(config, "num_attention_heads", None)
    if windows or not lists or not isinstance(heads, int):
        return []
    name = max(lists, key=lambda item: item[0])[1]
    layers, last = base.get_submodule(name.rpartition(".")[0]), base.get_submodule(name)[-1]
    names = ("attention.output", "sa_layer_norm")
    after = [module for name, module in last.named_modules() if name in names]
    parts = [(layers, frozenset(last.modules()), module) for module in after]
    parts.append((layers, frozenset(), None))
    if reads_all_tokens:
        parts = [(None, frozenset(), None)]
    size = getattr(config, "hidden_size", 0) // heads
    device = next(model.parameters()).device
    fused = attention.supports_flash_attention(size, device, dtype)
    return [
        PackedEncoder(*part, heads, first_position(model), kind)
        for kind in ((True, False) if fused else (False,))
        for part in parts
    ]
