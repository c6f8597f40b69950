"""A Hugging Face classifier for a task, from the Hub or a folder, and the errors on the way."""

import hashlib
from pathlib import Path

import torch

from bitfit.trainable import head_names, in_encoder, is_bias
from utils import UserError, is_fault, one_line

ENCODER_SEED = 0  # for encoder weights that no checkpoint gives: the same in every run
VOCABULARY_FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "*.model")


def load_tokenizer(model_name):
    """The model's own fast tokenizer.

    Raises:
        UserError: nothing there, no tokenizer files, no padding token.
    """
    import transformers

    folder = Path(model_name)
    if folder.is_dir() and not any(any(folder.glob(pattern)) for pattern in VOCABULARY_FILES):
        # transformers would make an empty vocabulary without a word
        raise UserError(f"the model folder {folder} has no tokenizer: save one there with "
                        "`AutoTokenizer.from_pretrained(...).save_pretrained(folder)`")  # fmt: skip
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(model_name)
    except Exception as error:
        if is_fault(error):
            raise
        raise cannot_load(model_name, error) from None
    if tokenizer.pad_token_id is None:
        raise UserError(f"the tokenizer of {model_name} has no padding token: BERT's family does")
    return tokenizer


def load_model(model_name, task, seed, random_encoder=False):
    """A float32 classifier on the CPU; the head is drawn from `seed` unless the checkpoint has it.

    Args, Raises: as `load`.
    """
    model, needs_head = load(model_name, task, random_encoder)
    if needs_head:
        draw_head(model, seed)
    return model


def load(model_name, task, random_encoder=False):
    """(a float32 classifier on the CPU, whether its head is still to be drawn)

    Args:
        random_encoder: leave the checkpoint's weights unused: the encoder is drawn at random.

    Raises:
        UserError: nothing there, no weights, or weights of another architecture.
    """
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    numbers = dict(enumerate(task.labels)) or {0: "score"}
    try:
        config = transformers.AutoConfig.from_pretrained(
            model_name,
            num_labels=task.num_labels,
            id2label=numbers,
            label2id={name: number for number, name in numbers.items()},
            problem_type="regression" if task.is_regression else "single_label_classification",
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(ENCODER_SEED)
            model, info = build(transformers, model_name, config, random_encoder)
    except Exception as error:
        if is_fault(error):
            raise
        raise cannot_load(model_name, error) from None
    absent = info["missing_keys"] | {name for name, *_ in info["mismatched_keys"]}
    check_encoder(model, model_name, absent)
    return model, random_encoder or not absent.isdisjoint(head_names(model))


def build(transformers, model_name, config, random_encoder):
    auto = transformers.AutoModelForSequenceClassification
    if random_encoder:
        model = auto.from_config(config, dtype=torch.float32)
        return model, {"missing_keys": set(), "mismatched_keys": []}
    return auto.from_pretrained(
        model_name,
        config=config,
        dtype=torch.float32,
        use_safetensors=True,  # never unpickle
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )


def check_encoder(model, model_name, absent):
    """A pooler may be absent (MLM checkpoints have none); any other encoder weight may not."""
    absent = sorted(n for n in absent if in_encoder(model, n) and ".pooler." not in n)
    if absent:
        raise UserError(
            f"{model_name} lacks {len(absent)} encoder weights (the first: {absent[0]}): "
            "it is not a checkpoint of the architecture in its config.json"
        )


def cannot_load(model_name, error):
    if isinstance(error, UserError):
        return error
    name = str(model_name)
    if not Path(name).is_dir() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        return UserError(f"there is no model folder {name}: check --model-name")
    return UserError(
        f"cannot load the model {name}: {one_line(error)}; give a name on the Hub (network "
        "or cache needed) or a folder with config.json, model.safetensors and tokenizer files: "
        "--model-name <folder>"
    )


def draw_head(model, seed):
    """The classifier's start: normal weights as in BERT, biases 0, from the run's own seed."""
    rng = torch.Generator().manual_seed(seed % 2**63)
    std = getattr(model.config, "initializer_range", 0.02)
    heads = set(head_names(model))
    for name, parameter in model.named_parameters():
        if name in heads and parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=std, generator=rng)
        elif name in heads and is_bias(name):
            torch.nn.init.zeros_(parameter)


def position_limit(model):
    """The longest row the position embeddings allow, or None."""
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, torch.nn.Embedding):
            # RoBERTa counts positions from padding_idx + 1
            skipped = 0 if module.padding_idx is None else module.padding_idx + 1
            return module.num_embeddings - skipped
    return None


def check_length(model, max_length):
    limit = position_limit(model)
    if limit is not None and max_length > limit:
        raise UserError(
            f"--max-seq-length {max_length} is above the model's {limit} positions: "
            f"give at most {limit}"
        )


def fingerprint(model):
    """SHA-256 over the encoder's names and values: which base model a delta belongs to."""
    encoder = ((n, p.detach()) for n, p in model.named_parameters() if in_encoder(model, n))
    return sha256(value for pair in encoder for value in pair)


def sha256(values):
    """SHA-256 over texts, arrays, tensors and Nones."""
    digest = hashlib.sha256()
    for value in values:
        if torch.is_tensor(value):
            value = value.cpu().contiguous().numpy()
        digest.update(
            value.encode() if isinstance(value, str) else b"-" if value is None else value
        )
    return digest.hexdigest()


def takes_full_mask(model):
    """Whether a (B, 1, T, T) mask may be given in place of (B, T).

    transformers would make the same one itself, but first asks the device whether any row is
    padded, and waits. A model with windowed attention makes several masks, so it gets the plain.
    """
    config = model.config
    windowed = any(getattr(config, n, None) for n in ("sliding_window", "local_attention"))
    return config._attn_implementation == "sdpa" and not windowed
