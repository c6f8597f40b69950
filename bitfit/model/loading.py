"""Load and save a Hugging Face classifier and its tokenizer, from the Hub or a folder."""

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

from bitfit.data.tasks import Task
from bitfit.files import atomic_folder
from bitfit.model import file_checks, tokenizer_checks, weight_checks
from bitfit.model.file_checks import convert_load_errors
from bitfit.model.trainable import head_names, is_bias
from utils import LOGGER, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

ENCODER_SEED = 0  # for encoder weights that the checkpoint lacks: the same in every run


def load_tokenizer(
    model_name: str | Path, revision: str | None = None, for_words: bool = False
) -> "PreTrainedTokenizerBase":
    """Return the fast tokenizer of a model; UserError if there is none, or it does not fit.

    Args:
        revision: from `hub.resolve_revision`, in the functions below too.
        for_words: texts are lists of words, as in tagging.
    """
    import transformers

    config, raw = read_config(model_name, revision)
    folder = Path(model_name)
    if folder.is_dir() and not any(any(folder.glob(p)) for p in file_checks.VOCABULARY_FILES):
        # transformers would silently use an empty vocabulary.
        advice = "`AutoTokenizer.from_pretrained(...).save_pretrained(folder)`"
        raise UserError(f"the model folder {folder} has no tokenizer: save one with {advice}")
    with convert_load_errors(model_name, revision):
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            model_name, revision=revision, trust_remote_code=False
        )
        add_token_types(tokenizer, config)
        tokenizer("a \u2603")  # fails for vocabularies that lack their unknown token
        tokenizer_checks.warn_of_file(tokenizer, model_name, revision)
    if for_words:
        tokenizer_checks.read_words_like_text(tokenizer, model_name)
    tokenizer_checks.check_tokenizer(tokenizer, config, model_name)
    if "auto_map" in raw or "auto_map" in tokenizer.init_kwargs:
        LOGGER.warning(
            "%s: custom code is not supported: the code in its folder (auto_map) was not run, "
            "transformers' %s is used", model_name, config.model_type,
        )  # fmt: skip
    return tokenizer


def add_token_types(tokenizer: "PreTrainedTokenizerBase", config: "PreTrainedConfig") -> None:
    """Let a tokenizer return token types if it omits them and the model has embeddings for them.

    The generic class for tokenizer.json returned them until transformers 5.
    """
    import transformers

    generic = type(tokenizer) is transformers.PreTrainedTokenizerFast
    types = getattr(config.get_text_config(), "type_vocab_size", None) or 0
    if generic and "model_input_names" not in tokenizer.init_kwargs and types > 1:
        names = ["input_ids", "token_type_ids", "attention_mask"]
        tokenizer.model_input_names = tokenizer.init_kwargs["model_input_names"] = names


def load_model(
    model_name: str | Path,
    task: Task,
    random_encoder: bool = False,
    revision: str | None = None,
    report: bool = False,
) -> tuple["PreTrainedModel", frozenset[str]]:
    """Load a float32 classifier on the CPU; UserError if its weights do not fit config.json.

    Args:
        random_encoder: initialize the encoder at random instead of loading the checkpoint.
        report: log which weights of the checkpoint are used.

    Returns:
        (model, names of the classifier's parameters that are left to initialize)
    """
    config = load_config(model_name, task, revision)
    with convert_load_errors(model_name, revision), torch.random.fork_rng(devices=[]):
        torch.manual_seed(ENCODER_SEED)
        if random_encoder:
            model = build_model(config, task, dtype=torch.float32)
            return model, frozenset(head_names(model))
        # Only safetensors files are read, because unpickling can run code.
        model, info = auto_class(task).from_pretrained(
            model_name, revision=revision, config=config, dtype=torch.float32,
            use_safetensors=True, ignore_mismatched_sizes=True, output_loading_info=True,
            trust_remote_code=False,
        )  # fmt: skip
    absent = weight_checks.check_weights(model, model_name, info)
    raw = read_config(model_name, revision)[1]
    initialized, outputs = weight_checks.align_head(model, task, absent, raw=raw)
    weight_checks.check_finite(model, model_name, initialized)
    if report:
        weight_checks.log_weights_used(
            model, model_name, info, absent=absent, initialized=initialized, outputs=outputs
        )
    return model, frozenset(initialized)


def auto_class(task: Task) -> Any:  # noqa: ANN401 (a class of transformers)
    """Return the class that loads the classifiers of a task: of texts or of words."""
    import transformers

    if task.is_tagging:
        return transformers.AutoModelForTokenClassification
    return transformers.AutoModelForSequenceClassification


def build_model(config: "PreTrainedConfig", task: Task, **more: object) -> "PreTrainedModel":
    """Return a classifier with random weights; `more` are arguments of `from_config`."""
    return auto_class(task).from_config(config, trust_remote_code=False, **more)


def load_config(
    model_name: str | Path, task: Task, revision: str | None = None
) -> "PreTrainedConfig":
    """Return the config of a classifier for a task; UserError if its architecture cannot tag."""
    from transformers import MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING

    numbers = dict(enumerate(task.labels)) or {0: "score"}
    kind = "regression" if task.is_regression else "single_label_classification"
    config, _ = read_config(
        model_name,
        revision,
        num_labels=task.num_labels,
        id2label=numbers,
        label2id={name: number for number, name in numbers.items()},
        problem_type=None if task.is_tagging else kind,
    )
    if task.is_tagging and type(config) not in MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING:
        problem = f"transformers has no token classifier of the architecture {config.model_type}"
        raise UserError(f"cannot tag words with the model {model_name}: {problem}: give another")
    return config


def read_config(
    model_name: str | Path, revision: str | None = None, **changes: object
) -> tuple["PreTrainedConfig", dict[str, Any]]:
    """Return (config, the dictionary in config.json); UserError if they would be misread."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with convert_load_errors(model_name, revision):
        file_checks.check_files(model_name, revision)
        config = transformers.AutoConfig.from_pretrained(
            model_name, revision=revision, trust_remote_code=False, **changes
        )
        raw, _ = transformers.PreTrainedConfig.get_config_dict(model_name, revision=revision)
    if isinstance(raw.get("quantization_config"), dict):
        problem = "its weights are quantized (quantization_config): give the float model"
        raise UserError(f"cannot load the model {model_name}: {problem}")
    # A saved model may have other settings, which change the outputs and the use of memory.
    config.return_dict, config.gradient_checkpointing = True, False
    return config, raw


@torch.no_grad()
def init_head(model: "PreTrainedModel", seed: int, names: Collection[str] | None = None) -> None:
    """Initialize the classifier, or only `names`, from a run's seed: random weights, zero biases.

    The weights are normal as in BERT and sampled on the CPU, so they are the same on every device.
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


def position_limit(model: "PreTrainedModel") -> int | None:
    """Return the maximum length that the position embeddings allow, or None."""
    embedding = find_embedding(model, ".position_embeddings")
    return None if embedding is None else embedding.num_embeddings - first_position(model)


def find_embedding(model: "PreTrainedModel", end: str) -> torch.nn.Embedding | None:
    """Return the embedding whose name has this end, or None."""
    for name, module in model.named_modules():
        if name.endswith(end) and isinstance(module, torch.nn.Embedding):
            return module
    return None


def first_position(model: "PreTrainedModel") -> int:
    """Return the position of a row's first token: padding_idx + 1 in RoBERTa, else 0."""
    padding = getattr(find_embedding(model, ".position_embeddings"), "padding_idx", None)
    return 0 if padding is None else padding + 1


def write_model(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", folder: str | Path
) -> None:
    """Write model and tokenizer as a Hugging Face folder, atomically; OSError if that fails."""
    with atomic_folder(folder) as temporary:
        try:
            model.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
        except SafetensorError as error:
            raise OSError(f"{folder}: {error}") from None
