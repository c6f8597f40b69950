"""A Hugging Face classifier for a task, from the Hub or a folder, and the errors on the way."""

import logging
from collections.abc import Collection
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

from bitfit.data.tasks import Task
from bitfit.files import atomic_folder
from bitfit.model import file_checks, tokenizer_checks, weight_checks
from bitfit.model.file_checks import cannot_load
from bitfit.model.fingerprints import fingerprints_of
from bitfit.model.trainable import head_names, is_bias
from utils import UserError, convert_errors

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

LOGGER = logging.getLogger("bitfit")
ENCODER_SEED = 0  # for encoder weights that no checkpoint gives: the same in every run


def load_tokenizer(
    model_name: str | Path, revision: str | None = None
) -> "PreTrainedTokenizerBase":
    """The model's own fast tokenizer.

    Args:
        revision: as from `hub.resolve_revision`; likewise below.

    Raises:
        UserError: nothing there, no tokenizer files, or a tokenizer that does not fit the model.
    """
    import transformers

    folder = Path(model_name)
    with convert_errors(lambda error: cannot_load(model_name, error, revision)):
        file_checks.check_files(model_name, revision)
        if folder.is_dir() and not any(any(folder.glob(p)) for p in file_checks.VOCABULARY_FILES):
            # transformers would make an empty vocabulary without a word
            advice = "`AutoTokenizer.from_pretrained(...).save_pretrained(folder)`"
            raise UserError(f"the model folder {folder} has no tokenizer: save one with {advice}")
        config, raw = read_config(model_name, revision)
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            model_name, revision=revision, trust_remote_code=False
        )
        if lacks_token_types(tokenizer, config):
            names = ["input_ids", "token_type_ids", "attention_mask"]
            tokenizer.model_input_names = tokenizer.init_kwargs["model_input_names"] = names
        tokenizer("a \u2603")  # some vocabularies can be loaded, but lack their unknown token
        tokenizer_checks.warn_of_file(tokenizer, model_name, revision)
    tokenizer_checks.check_tokenizer(tokenizer, config, model_name)
    file_checks.warn_of_shadow(model_name)
    if "auto_map" in raw or "auto_map" in tokenizer.init_kwargs:
        what = "its own code (auto_map) was not run, transformers' %s is used"
        LOGGER.warning(f"%s: custom code is not supported: {what}", model_name, config.model_type)
    return tokenizer


def lacks_token_types(tokenizer: "PreTrainedTokenizerBase", config: "PreTrainedConfig") -> bool:
    """Whether a tokenizer leaves out the token types of pairs that the model has embeddings for.

    The class for any tokenizer.json gave them until transformers 5.
    """
    import transformers

    generic = type(tokenizer) is transformers.PreTrainedTokenizerFast
    types = getattr(config.get_text_config(), "type_vocab_size", None) or 0
    return generic and "model_input_names" not in tokenizer.init_kwargs and types > 1


def load_model(
    model_name: str | Path,
    task: Task,
    random_encoder: bool = False,
    revision: str | None = None,
    report: bool = False,
) -> tuple["PreTrainedModel", frozenset[str]]:
    """(a float32 classifier on the CPU, the names of its head's parameters to initialize)

    Args:
        random_encoder: leave the checkpoint's weights unused: the encoder is drawn at random.
        report: log which weights of the checkpoint are used.

    Raises:
        UserError: nothing there, no weights, or weights that config.json does not describe.
    """
    from transformers import AutoModelForSequenceClassification as Auto

    error_of = partial(cannot_load, model_name, revision=revision)
    with convert_errors(error_of), torch.random.fork_rng(devices=[]):
        config = load_config(model_name, task, revision)
        torch.manual_seed(ENCODER_SEED)
        if random_encoder:
            model = build_model(config, dtype=torch.float32)
            return model, frozenset(head_names(model))
        model, info = Auto.from_pretrained(  # use_safetensors: nothing is unpickled
            model_name, revision=revision, config=config, dtype=torch.float32,
            use_safetensors=True, ignore_mismatched_sizes=True, output_loading_info=True,
            trust_remote_code=False,
        )  # fmt: skip
    weight_checks.check_weights(model, model_name, info)
    weight_checks.check_dtypes(model_name, revision)
    absent = info["missing_keys"] | {name for name, *_ in info["mismatched_keys"]}
    raw = read_config(model_name, revision)[1]
    initialized, outputs = weight_checks.start_head(model, task, absent, raw)
    weight_checks.check_finite(model, model_name, initialized)
    if report:
        weight_checks.report(model, model_name, info, absent, initialized, outputs)
    return model, frozenset(initialized)


def build_model(config: "PreTrainedConfig", **more: object) -> "PreTrainedModel":
    """A model with random weights, or on the device `meta` without any."""
    from transformers import AutoModelForSequenceClassification as Auto

    return Auto.from_config(config, trust_remote_code=False, **more)


def load_config(
    model_name: str | Path, task: Task, revision: str | None = None
) -> "PreTrainedConfig":
    """The config of a classifier for a task."""
    numbers = dict(enumerate(task.labels)) or {0: "score"}
    return read_config(
        model_name,
        revision,
        num_labels=task.num_labels,
        id2label=numbers,
        label2id={name: number for number, name in numbers.items()},
        problem_type="regression" if task.is_regression else "single_label_classification",
    )[0]


def read_config(
    model_name: str | Path, revision: str | None = None, **changes: object
) -> tuple["PreTrainedConfig", dict[str, Any]]:
    """(the config, the dictionary in config.json), for code within `convert_errors`."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    file_checks.check_files(model_name, revision)
    config = transformers.AutoConfig.from_pretrained(
        model_name, revision=revision, trust_remote_code=False, **changes
    )
    raw, _ = transformers.PreTrainedConfig.get_config_dict(model_name, revision=revision)
    file_checks.check_config(config, raw, model_name)
    # Settings of whoever saved the model; they change how logits are returned and memory is saved.
    config.return_dict, config.gradient_checkpointing = True, False
    return config, raw


@torch.no_grad()
def init_head(model: "PreTrainedModel", seed: int, names: Collection[str] | None = None) -> None:
    """The classifier's start: normal weights as in BERT, biases 0, from the run's own seed.

    They are sampled on the CPU, so that a head starts alike on every device.

    Args:
        names: of the parameters to draw; None: the whole classifier.
    """
    rng = torch.Generator().manual_seed(seed % 2**63)
    std = getattr(model.config, "initializer_range", 0.02)
    heads = set(head_names(model) if names is None else names)
    for name, parameter in model.named_parameters():
        if name in heads and parameter.dim() > 1:
            sample = torch.empty(parameter.shape, dtype=parameter.dtype)
            parameter.copy_(sample.normal_(std=std, generator=rng))
        elif name in heads and is_bias(name):
            parameter.zero_()


def check_max_length(
    model_name: str | Path, task: Task, max_length: int, revision: str | None = None
) -> None:
    """Refuse rows that are longer than the model, before weights are loaded and rows tokenized."""
    with convert_errors(lambda error: cannot_load(model_name, error, revision)):
        config = load_config(model_name, task, revision)
    try:
        with torch.device("meta"):
            limit = position_limit(build_model(config))
    except Exception:  # not all can be made without weights; `select_forward` tries the longest row
        return
    if limit is not None and max_length > limit:
        what = f"is above the model's {limit} positions: give at most {limit}"
        raise UserError(f"--max-seq-length {max_length} {what}")


def position_limit(model: "PreTrainedModel") -> int | None:
    """The longest row the position embeddings allow, or None."""
    embedding = position_embedding(model)
    return None if embedding is None else embedding.num_embeddings - first_position(embedding)


def position_embedding(model: "PreTrainedModel") -> torch.nn.Embedding | None:
    for name, module in model.named_modules():
        if name.endswith(".position_embeddings") and isinstance(module, torch.nn.Embedding):
            return module
    return None


def first_position(embedding: torch.nn.Module | None) -> int:
    """RoBERTa counts positions from padding_idx + 1."""
    padding = getattr(embedding, "padding_idx", None)
    return 0 if padding is None else padding + 1


def base_fingerprints(
    model_name: str | Path,
    task: Task,
    tokenizer: "PreTrainedTokenizerBase",
    revision: str | None = None,
) -> dict[str, dict]:
    """Return the `fingerprints_of` a base model, before its weights are loaded."""
    with convert_errors(lambda error: cannot_load(model_name, error, revision)):
        config = load_config(model_name, task, revision)
    return fingerprints_of(config, tokenizer)


def write_model(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", folder: str | Path
) -> None:
    """Write a whole Hugging Face folder.

    Raises:
        OSError: it could not be written.
    """
    with atomic_folder(folder) as temporary:
        try:
            model.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
        except SafetensorError as error:
            raise OSError(f"{folder}: {error}") from None
