"""A Hugging Face classifier for a task, from the Hub or a folder, and the errors on the way."""

import hashlib
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError

from bitfit.data import batch_of, gather, to_device, varlen_batch
from bitfit.fingerprints import fingerprints_of
from bitfit.packing import Packer, packers_of
from bitfit.predict import computing_in, full_float32
from bitfit.stacked import rows_in_chunks, rows_of
from bitfit.trainable import head_names, in_encoder, is_bias
from utils import UserError, blaming, one_line, whole_folder

ENCODER_SEED = 0  # for encoder weights that no checkpoint gives: the same in every run
VOCABULARY_FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "*.model")


def load_tokenizer(model_name, revision=None):
    """The model's own fast tokenizer.

    Args:
        revision: as from `hub.resolve`; likewise below.

    Raises:
        UserError: nothing there, no tokenizer files, no padding token.
    """
    import transformers

    folder = Path(model_name)
    if folder.is_dir() and not any(any(folder.glob(pattern)) for pattern in VOCABULARY_FILES):
        # transformers would make an empty vocabulary without a word
        raise UserError(f"the model folder {folder} has no tokenizer: save one there with "
                        "`AutoTokenizer.from_pretrained(...).save_pretrained(folder)`")  # fmt: skip
    with blaming(lambda error: cannot_load(model_name, error, revision)):
        tokenizer = transformers.AutoTokenizer.from_pretrained(model_name, revision=revision)
    if tokenizer.pad_token_id is None:
        raise UserError(f"the tokenizer of {model_name} has no padding token: BERT's family does")
    return tokenizer


def load(model_name, task, random_encoder=False, revision=None):
    """(a float32 classifier on the CPU, whether its head is still to be drawn)

    Args:
        random_encoder: leave the checkpoint's weights unused: the encoder is drawn at random.

    Raises:
        UserError: nothing there, no weights, or weights of another architecture.
    """
    from transformers import AutoModelForSequenceClassification as Auto

    with (
        blaming(lambda error: cannot_load(model_name, error, revision)),
        torch.random.fork_rng(devices=[]),
    ):
        config = load_config(model_name, task, revision)
        torch.manual_seed(ENCODER_SEED)
        if random_encoder:
            return Auto.from_config(config, dtype=torch.float32), True
        model, info = Auto.from_pretrained(
            model_name,
            revision=revision,
            config=config,
            dtype=torch.float32,
            use_safetensors=True,  # never unpickle
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    absent = info["missing_keys"] | {name for name, *_ in info["mismatched_keys"]}
    check_encoder(model, model_name, absent)
    return model, not absent.isdisjoint(head_names(model))


def load_config(model_name, task, revision=None):
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    numbers = dict(enumerate(task.labels)) or {0: "score"}
    return transformers.AutoConfig.from_pretrained(
        model_name,
        revision=revision,
        num_labels=task.num_labels,
        id2label=numbers,
        label2id={name: number for number, name in numbers.items()},
        problem_type="regression" if task.is_regression else "single_label_classification",
    )


def check_encoder(model, model_name, absent):
    """A pooler may be absent (MLM checkpoints have none); any other encoder weight may not."""
    absent = sorted(n for n in absent if in_encoder(model, n) and ".pooler." not in n)
    if absent:
        what = "it is not a checkpoint of the architecture in its config.json"
        lacks = f"lacks {len(absent)} encoder weights (the first: {absent[0]})"
        raise UserError(f"{model_name} {lacks}: {what}")


def cannot_load(model_name, error, revision=None):
    name = str(model_name)
    local = name.startswith((".", "/", "~")) or name.count("/") > 1
    if not Path(name).is_dir() and (local or ("/" in name and Path(name).parent.is_dir())):
        return UserError(f"there is no model folder {name}: check --model-name")
    name += f" at revision {revision}" if revision else ""
    return UserError(
        f"cannot load the model {name}: {one_line(error)}; give a name on the Hub (network "
        "or cache needed) or a folder with config.json, model.safetensors and tokenizer files: "
        "--model-name <folder>"
    )


@torch.no_grad()
def draw_head(model, seed):
    """The classifier's start: normal weights as in BERT, biases 0, from the run's own seed.

    They are sampled on the CPU, so that a head starts alike on every device.
    """
    rng = torch.Generator().manual_seed(seed % 2**63)
    std = getattr(model.config, "initializer_range", 0.02)
    heads = set(head_names(model))
    for name, parameter in model.named_parameters():
        if name in heads and parameter.dim() > 1:
            sample = torch.empty(parameter.shape, dtype=parameter.dtype)
            parameter.copy_(sample.normal_(std=std, generator=rng))
        elif name in heads and is_bias(name):
            parameter.zero_()


def check_length(model_name, task, max_length, revision=None):
    """Refuse rows that are longer than the model, before weights are loaded and rows tokenized."""
    from transformers import AutoModelForSequenceClassification as Auto

    with blaming(lambda error: cannot_load(model_name, error, revision)):
        config = load_config(model_name, task, revision)
    try:
        with torch.device("meta"):
            limit = position_limit(Auto.from_config(config))
    except Exception:  # not all can be made without weights; `find_forward` tries the longest row
        return
    if limit is not None and max_length > limit:
        what = f"is above the model's {limit} positions: give at most {limit}"
        raise UserError(f"--max-seq-length {max_length} {what}")


def position_limit(model):
    """The longest row the position embeddings allow, or None."""
    embedding = position_embedding(model)
    return None if embedding is None else embedding.num_embeddings - first_position(embedding)


def position_embedding(model):
    for name, module in model.named_modules():
        if name.endswith(".position_embeddings") and isinstance(module, torch.nn.Embedding):
            return module
    return None


def first_position(embedding):
    """RoBERTa counts positions from padding_idx + 1."""
    return 0 if getattr(embedding, "padding_idx", None) is None else embedding.padding_idx + 1


def fingerprint(model, head=False):
    """SHA-256 over the encoder's (and the head's) names and values: which model it is."""
    return sha256(
        value
        for name, parameter in model.named_parameters()
        if head or in_encoder(model, name)
        for value in (name, parameter.detach())
    )


def base_fingerprints(model_name, task, tokenizer, revision=None):
    """Return the `fingerprints_of` a base model, before its weights are loaded."""
    with blaming(lambda error: cannot_load(model_name, error, revision)):
        config = load_config(model_name, task, revision)
    return fingerprints_of(config, tokenizer)


def sha256(values):
    """SHA-256 over texts, arrays, tensors and Nones, their kinds, shapes and lengths included."""
    digest = hashlib.sha256()
    for value in values:
        if torch.is_tensor(value):
            value = value.cpu().contiguous().numpy()
        if isinstance(value, str):
            value = np.frombuffer(value.encode(), np.uint8)
        kind = "none" if value is None else f"{value.dtype} {value.shape}"
        digest.update(f"[{kind}]".encode())
        digest.update(b"" if value is None else np.ascontiguousarray(value))
    return digest.hexdigest()


class Forward(NamedTuple):
    """The one forward pass: a `Batch` of a split's rows -> logits (B, C) in float32."""

    model: torch.nn.Module
    packer: Packer | None = None  # how it runs on packed rows; None: on padded ones

    @property
    def is_varlen(self):
        """Whether rows are packed for the kernels of `varlen`."""
        return self.packer is not None and self.packer.varlen

    def batch(self, tokens, rows):
        """The `Batch` of some rows as this forward pass takes it, arrays on the host."""
        if self.is_varlen:
            return varlen_batch(tokens, rows)[0]
        return batch_of(tokens, rows, self.packer is not None)

    def routed_batch(self, tokens, rows, owner, runs):
        """(`Batch`, `stacked.Rows`) of rows of several runs: arrays on the host.

        Args:
            owner: (B,) the run of each row, out of `runs`; those of one run together.
        """
        packed = self.packer is not None
        if self.is_varlen:
            batch, chunks = varlen_batch(tokens, rows, owner, runs > 1)
            return batch, rows_in_chunks(owner, runs, chunks)
        token_owner = np.repeat(owner, tokens.lengths[rows]) if packed else None
        return batch_of(tokens, rows, packed), rows_of(owner, runs, token_owner)

    def __call__(self, tokens, batch):
        inputs = gather(tokens, batch)
        if self.packer:
            return self.packer(self.model, inputs, batch.packing).logits.float()
        return self.model(**inputs).logits.float()

    def rows(self, tokens, rows):
        """The same for row numbers (B,) on the host."""
        return self(tokens, to_device(self.batch(tokens, rows), tokens.ids.device))


@torch.no_grad()
@full_float32()
def find_forward(model, model_name, tokens, dtype=torch.float32):
    """The `Forward` of a model: on packed rows, if those give what padded ones give.

    Tried on the longest, the shortest and a middling row.

    Raises:
        UserError: the model cannot run on the rows, or compute in `dtype`, in its own words.
    """
    order, device = np.argsort(tokens.lengths, kind="stable"), tokens.ids.device
    rows = order[[-1, 0, len(order) // 2]]
    # Packed, they are more tokens than a row of this model may have.
    times = 1 + (position_limit(model) or 512) // tokens.lengths[rows].sum()
    plain = Forward(model)

    def cannot(what, instead):
        return lambda error: UserError(
            f"the model {model_name} cannot {what}: {type(error).__name__}: {one_line(error)}; "
            f"give {instead}"
        )

    def same(packed):
        try:
            logits = packed.rows(tokens, np.tile(rows, times)).view(times, *expected.shape)
        except Exception:  # whatever it is: padded rows will do
            return False
        spread = (expected - expected.mean(0)).abs().max()
        rounding = 4 * torch.finfo(expected.dtype).eps * expected.abs().max()
        return (logits - expected).abs().max() < 1e-4 * spread + rounding

    what = f"run on these rows of up to {tokens.lengths[rows[0]]} tokens"
    packers = packers_of(model, first_position(position_embedding(model)))
    with without_last_bias(model):
        with (
            blaming(cannot(what, "another --model-name")),
            torch.random.fork_rng([device] if device.type == "cuda" else []),
        ):
            model.train()  # some are strict in training alone (Reformer)
            plain.rows(tokens, rows[1:2])
            model.eval()
            expected = plain.rows(tokens, rows)
        found = next((f for p in packers if same(f := Forward(model, p))), plain)
    if dtype != torch.float32:
        with blaming(cannot("compute in bf16", "--precision fp32")), computing_in(model, dtype):
            if not found.rows(tokens, rows).isfinite().all():
                raise ValueError("its logits are not finite")
    return found


@contextmanager
def without_last_bias(model):
    """Within: the bias behind the last product is 0; in its sums small differences would drown."""
    last = [p for n, p in model.named_parameters() if is_bias(n) and not in_encoder(model, n)][-1:]
    own = [p.data for p in last]
    try:
        for p in last:
            p.data = torch.zeros_like(p)
        yield
    finally:
        for p, data in zip(last, own, strict=True):
            p.data = data


def write_model(model, tokenizer, folder):
    """Write a whole Hugging Face folder.

    Raises:
        OSError: it could not be written.
    """
    with whole_folder(folder) as temporary:
        try:
            model.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
        except SafetensorError as error:
            raise OSError(f"{folder}: {error}") from None
