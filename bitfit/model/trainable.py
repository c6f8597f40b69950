"""Select the trainable parameters: bias terms, the classifier, all parameters or random masks.

The selection is {parameter name: None for all of it, or the flat positions that train}. It is used
to freeze, count, optimize, save and plot. Names are compared exactly, never as substrings.
"""

import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from bitfit.options import FINE_TUNE_TYPES, TERMS
from utils import UserError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

Trainable = dict[str, np.ndarray | None]  # {parameter name: None for all of it, or positions}
ALL_BIASES = "bias"  # the released code's name for `all`
# Some models have biases outside Linear and LayerNorm modules: q_bias and v_bias (DeBERTa),
# r_w_bias, r_r_bias and r_s_bias (XLNet, Funnel), in_proj_bias, bias_ih_l0, pos_bias_u.
BIAS = re.compile(r"(\w+_)?bias(_[kuv]|_[ih]h_l\d+\w*)?")
# Tables that attention adds by the distance of two tokens are position embeddings, not biases.
POSITION_TABLE = re.compile(r"(\w+_)?(position|attention)_bias")
# The paper's sizes of the random mask (table 3); other models train as many values as bitfit.
MASK_SIZES = {"bert-base": 100_000, "bert-large": 280_000, "roberta-base": 105_000}


def terms_to_components(terms: Sequence[str]) -> list[str]:
    """Convert terms of `--bias-terms` to names in a layer, all to "bias"; UserError if unknown."""
    unknown = [term for term in terms if term != "all" and term not in TERMS]
    if unknown:
        raise UserError(f"unknown bias term {unknown[0]!r}; known: {', '.join(TERMS)}, all")
    return [ALL_BIASES if term == "all" else TERMS[term][0] for term in terms]


def components_to_terms(components: Sequence[str]) -> list[str]:
    """Convert relative names to terms of `--bias-terms`: the paper's, else without `.bias`."""
    terms = {name: term for term, (name, _) in TERMS.items()} | {ALL_BIASES: "all"}
    return [terms.get(name, name.removesuffix(".bias")) for name in components]


def layer_and_name(name: str) -> tuple[int | None, str]:
    """Split a name into its layer and the rest; outside of layers return (None, name).

    "bert.encoder.layer.3.output.dense.bias" gives (3, "output.dense.bias").
    """
    found = re.match(r"(?:.*?\.)?(\d+)\.(.*)", name)
    return (int(found[1]), found[2]) if found else (None, name)


def relative_name(model: "PreTrainedModel", name: str) -> str:
    """Return a parameter's name relative to its layer, or outside of layers to the encoder."""
    layer, rest = layer_and_name(name)
    return name.removeprefix(f"{model.base_model_prefix}.") if layer is None else rest


def in_encoder(model: "PreTrainedModel", name: str) -> bool:
    """Return whether a parameter belongs to the encoder and not to the classifier."""
    return name.startswith(model.base_model_prefix + ".")


def matrix_weights(model: "PreTrainedModel") -> int:
    """Return the number of weights in the encoder's matrices, without embeddings."""
    return sum(
        p.numel()
        for n, p in model.named_parameters()
        if in_encoder(model, n) and p.dim() > 1 and not is_bias(n) and ".embeddings." not in n
    )


def is_bias(name: str) -> bool:
    """Return whether a parameter is a bias, by its name's last part: some have two dimensions."""
    last = name.rsplit(".", 1)[-1]
    return bool(BIAS.fullmatch(last)) and not POSITION_TABLE.fullmatch(last)


def head_names(model: "PreTrainedModel") -> list[str]:
    """Return the names of the classifier's parameters."""
    return [n for n, _ in model.named_parameters() if not in_encoder(model, n)]


def encoder_biases(model: "PreTrainedModel") -> dict[str, str]:
    """Return {name: relative name} of all biases of the encoder."""
    names = (n for n, _ in model.named_parameters() if in_encoder(model, n) and is_bias(n))
    return {name: relative_name(model, name) for name in names}


def bitfit_names(model: "PreTrainedModel", components: Sequence[str]) -> list[str]:
    """Return the names of the components' biases, the pooler's bias and the whole classifier."""
    trainable = {
        name
        for name, kind in encoder_biases(model).items()
        if ALL_BIASES in components or kind in components or name.endswith(".pooler.dense.bias")
    }
    trainable.update(head_names(model))
    return [n for n, _ in model.named_parameters() if n in trainable]


def default_mask_size(model: "PreTrainedModel") -> int:
    """Return the paper's size for its three models, else the size that bitfit trains."""
    for name, size in MASK_SIZES.items():
        if re.fullmatch(rf"(.*/)?{name}(-(un)?cased)?/?", model.config.name_or_path):
            return size
    if not encoder_biases(model):
        raise UserError(f"this {model.config.model_type} model has no biases, whose number is the "
                        "default size of the mask: give --mask-size")  # fmt: skip
    parameters = dict(model.named_parameters())
    trainable = bitfit_names(model, [ALL_BIASES])
    return sum(parameters[n].numel() for n in trainable if in_encoder(model, n))


def draw_uniform_mask(
    model: "PreTrainedModel", mask_size: int, rng: np.random.Generator
) -> Trainable:
    """Draw `mask_size` distinct positions, uniform over the encoder; UserError if it has fewer."""
    encoder = [(n, p.numel()) for n, p in model.named_parameters() if in_encoder(model, n)]
    ends = np.cumsum([size for _, size in encoder])
    if not 1 <= mask_size <= ends[-1]:
        raise UserError(f"--mask-size {mask_size}: the encoder has {ends[-1]} parameters to draw")
    drawn = np.sort(rng.choice(ends[-1], size=mask_size, replace=False, shuffle=False))
    parts = np.split(drawn, np.searchsorted(drawn, ends[:-1]))
    trainable: Trainable = {
        name: part - (end - size)
        for (name, size), end, part in zip(encoder, ends, parts, strict=True)
        if len(part)
    }
    return trainable | dict.fromkeys(head_names(model))


def draw_row_column_mask(model: "PreTrainedModel", rng: np.random.Generator) -> Trainable:
    """Draw one column, or rows with as many values, of each matrix of the layers and the pooler.

    For a matrix (out, in) with out >= in, a fair coin decides between a column and out // in
    distinct rows, as in the released code. A wider matrix always gives a column. LayerNorm gains
    train fully (table 3 of the paper).
    """
    trainable: Trainable = {}
    for name, parameter in model.named_parameters():
        inside = layer_and_name(name)[0] is not None or ".pooler." in name
        if not inside or not in_encoder(model, name) or is_bias(name):
            continue
        if parameter.dim() == 1:
            trainable[name] = None
        elif parameter.dim() == 2:
            rows, columns = parameter.shape
            trainable[name] = draw_row_or_column(rows, columns, rng)
    return trainable | dict.fromkeys(head_names(model))


def draw_row_or_column(rows: int, columns: int, rng: np.random.Generator) -> np.ndarray:
    """Draw the sorted flat positions of one column or of rows // columns distinct rows."""
    if rows < columns or not rng.integers(2):
        return np.arange(rows) * columns + rng.integers(columns)
    picked = np.sort(rng.choice(rows, size=rows // columns, replace=False))
    return (picked[:, None] * columns + np.arange(columns)).ravel()


# {fine-tune type: function that selects}. --evaluate-only of a plain model has the type none.
SELECTORS: dict[str, Callable[..., Trainable]] = {
    "full_ft": lambda model, **_: dict.fromkeys(n for n, _ in model.named_parameters()),
    "bitfit": lambda model, components, **_: dict.fromkeys(bitfit_names(model, components)),
    "frozen": lambda model, **_: dict.fromkeys(head_names(model)),
    "none": lambda model, **_: dict.fromkeys(head_names(model)),
    "rand_uniform": lambda model, mask_size, rng, **_: draw_uniform_mask(
        model, mask_size or default_mask_size(model), rng
    ),
    "rand_row_col": lambda model, rng, **_: draw_row_column_mask(model, rng),
}


def select_trainable(
    model: "PreTrainedModel",
    kind: str,
    components: Sequence[str] = (),
    mask_size: int | None = None,
    rng: np.random.Generator | None = None,
) -> Trainable:
    """Return {parameter name: None for all of it, or flat positions} of a fine-tune type.

    Raise a UserError if the type is unknown, the model has no classifier, or the mask is too large.

    Args:
        kind: one of FINE_TUNE_TYPES.
        components: for bitfit, names relative to a layer, or "bias" for all.
        mask_size: for rand_uniform; None: `default_mask_size`.
        rng: NumPy generator, for the random masks.
    """
    if kind not in SELECTORS:
        raise UserError(f"unknown fine-tune type {kind!r}; known: {', '.join(FINE_TUNE_TYPES)}")
    if bool(components) != (kind == "bitfit"):
        raise UserError(f"bitfit needs components, and no other type takes any: {kind} got "
                        f"{', '.join(components) or 'none'}")  # fmt: skip
    if not head_names(model):
        raise UserError(
            f"this {model.config.model_type} model has no classifier beside its encoder"
        )
    return SELECTORS[kind](model, components=components, mask_size=mask_size, rng=rng)


def trains_matrices(model: "PreTrainedModel", trainable: Trainable) -> bool:
    """Return whether matrices of the encoder train, fully or in part."""
    inside = [n for n in trainable if in_encoder(model, n) and not is_bias(n)]
    return any(model.get_parameter(n).dim() > 1 for n in inside)


def trains_all(model: "PreTrainedModel", trainable: Trainable) -> bool:
    """Return whether all parameters train fully."""
    return all(n in trainable and trainable[n] is None for n, _ in model.named_parameters())


def trains_only_biases(model: "PreTrainedModel", trainable: Trainable) -> bool:
    """Return whether whole biases are the only trained parameters of the encoder."""
    inside = [n for n in trainable if in_encoder(model, n)]
    return bool(inside) and all(is_bias(n) and trainable[n] is None for n in inside)


def dense_masks(model: "PreTrainedModel", trainable: Trainable) -> dict[str, "torch.Tensor"]:
    """Return {name: bool tensor of its shape} of the parameters that train in part."""
    import torch

    masks = {}
    for name, parameter in model.named_parameters():
        if trainable.get(name) is not None:
            masks[name] = torch.zeros(parameter.shape, dtype=torch.bool)
            masks[name].view(-1)[torch.from_numpy(trainable[name])] = True
    return masks


def count_trainable(model: "PreTrainedModel", trainable: Trainable) -> int:
    """Return the number of trained values."""
    sizes = {n: p.numel() for n, p in model.named_parameters()}
    return sum(
        sizes[n] if positions is None else len(positions) for n, positions in trainable.items()
    )


def trainable_table(model: "PreTrainedModel", trainable: Trainable) -> str:
    """Return a table of the trained tensors and their shapes, with total and share, as text."""
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
    total = count_trainable(model, trainable)
    num_parameters = sum(p.numel() for p in model.parameters())
    width = max(map(len, trainable))
    lines = [
        f"{n:<{width}}  {shapes[n]}" + ("" if p is None else f"  {len(p):,} of them")
        for n, p in trainable.items()
    ]
    share = f"{total:,} of {num_parameters:,} parameters train ({total / num_parameters:.3%})"
    return "\n".join(["Trained tensors", *lines, share])
