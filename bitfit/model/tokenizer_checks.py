"""Check a tokenizer against the model, the vocabulary and the tokenizer's file."""

import inspect
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from tokenizers import Tokenizer
from tokenizers.normalizers import BertNormalizer

from bitfit.model import hub
from utils import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

LOGGER = logging.getLogger("bitfit")
# Embeddings may have more rows than a tokenizer has tokens: 1.8 % in Phi-2, 0.4 % in mDeBERTa-v3.
USUAL_VOCABULARY = 0.9
SAMPLE = "The film isn't GOOD, in 2023: caf\u00e9, $9.95 (http://a.b/c-d_e)"


def check_tokenizer(
    tokenizer: "PreTrainedTokenizerBase", config: "PreTrainedConfig", model_name: str | Path
) -> None:
    """Check a tokenizer against the model's embeddings, and its vocabulary against its casing.

    Raises:
        UserError: there is no padding token, or tokens have no embeddings.
    """
    if tokenizer.pad_token_id is None:
        raise UserError(f"the tokenizer of {model_name} has no padding token: BERT's family does")
    tokens = tokenizer.get_vocab()
    size = getattr(config.get_text_config(), "vocab_size", None)  # rows of the embeddings
    if not isinstance(size, int):
        return
    beyond = [token for token in tokens if tokens[token] >= size]
    if beyond and not added_by_class(beyond, tokenizer, size):
        last = max(beyond, key=tokens.get)
        raise UserError(
            f"the tokenizer of {model_name} goes up to token {tokens[last]} ({last!r}), but the "
            f"model has embeddings for {size} tokens, from 0 (vocab_size in config.json): give "
            "the tokenizer of this model, or save the model after "
            "`model.resize_token_embeddings(len(tokenizer))`"
        )
    if len(tokens) < USUAL_VOCABULARY * size:
        LOGGER.warning(
            "the tokenizer of %s has %d tokens, and the model embeddings for %d: is it the "
            "tokenizer of this model?", model_name, len(tokens), size,
        )  # fmt: skip
    warn_of_case(tokenizer, tokens, model_name)


def added_by_class(beyond: list[str], tokenizer: "PreTrainedTokenizerBase", size: int) -> bool:
    """Return whether transformers' class added all tokens in `beyond`, and never uses them.

    The class of Qwen2 adds `<|endoftext|>` to every vocabulary, whatever the model's files hold.
    """
    parameters = inspect.signature(type(tokenizer).__init__).parameters.values()
    defaults = {str(parameter.default) for parameter in parameters}
    ids = tokenizer("a", "A \u2603 \ufdd0")["input_ids"]
    return defaults.issuperset(beyond) and max(*ids, tokenizer.pad_token_id) < size


def warn_of_case(
    tokenizer: "PreTrainedTokenizerBase", tokens: dict[str, int], model_name: str | Path
) -> None:
    """Log a warning if a cased vocabulary is used in lower case, or the other way round."""
    normalizer = getattr(getattr(tokenizer, "backend_tokenizer", None), "normalizer", None)
    text = normalizer.normalize_str("A") if normalizer else "A"
    special = set(tokenizer.get_added_vocab()) | set(tokenizer.all_special_tokens)
    words = [token for token in tokens if token not in special]
    if any("\u0120" in word for word in words):
        # Byte-level vocabularies write a space as this capital, and contain all 256 bytes.
        words = [word for word in (w.replace("\u0120", "") for w in words) if len(word) > 1]
    capitals = sum(word != word.lower() for word in words)
    if "a" in text and capitals > 0.02 * len(tokens):
        problem = f"lower-cases all texts, but {capitals} tokens of its vocabulary have capitals"
        advice = 'give it "do_lower_case": false in tokenizer_config.json'
    elif "A" in text and not capitals and unknown(tokenizer, "A"):
        problem = "keeps capitals, but no token of its vocabulary has any: they become unknown"
        advice = 'give it "do_lower_case": true in tokenizer_config.json'
    else:
        return
    LOGGER.warning("the tokenizer of %s %s: %s", model_name, problem, advice)


def warn_of_file(
    tokenizer: "PreTrainedTokenizerBase", model_name: str | Path, revision: str | None = None
) -> None:
    """Log a warning if transformers tokenizes a text in another way than tokenizer.json describes.

    Most classes of transformers read only the vocabulary from the file. If both normalize as BERT
    does, tokenizer_config.json decides on lower-casing and accents.
    """
    path = hub.find_file(model_name, "tokenizer.json", revision)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if path is None or backend is None:
        return
    file = Tokenizer.from_file(str(path))
    file.no_truncation()
    file.no_padding()
    if isinstance(file.normalizer, BertNormalizer):
        file.normalizer = backend.normalizer or file.normalizer
    if file.encode(SAMPLE, add_special_tokens=False).ids != tokenizer.encode(
        SAMPLE, add_special_tokens=False
    ):
        LOGGER.warning(
            "transformers' %s takes the vocabulary alone from tokenizer.json of %s and reads texts "
            'otherwise than the file says; with "tokenizer_class": "PreTrainedTokenizerFast" in '
            "tokenizer_config.json most models follow the file",
            type(tokenizer).__name__, model_name,
        )  # fmt: skip


def read_words_like_text(tokenizer: "PreTrainedTokenizerBase", model_name: str | Path) -> None:
    """Let a tokenizer read each word of a list like a word after a blank.

    RoBERTa's and others, as they are saved, read every word like the first of a text.

    Raises:
        UserError: the tokenizer cannot tell which tokens belong to which word.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        problem = "is written in Python and does not say which tokens belong to a word"
        raise UserError(f"the tokenizer of {model_name} {problem}: tagging needs a fast tokenizer")
    if backend.pre_tokenizer is not None and not reads_words_like_text(tokenizer):
        content = backend.to_str().replace('"add_prefix_space":false', '"add_prefix_space":true')
        content = content.replace('"prepend_scheme":"first"', '"prepend_scheme":"always"')
        backend.pre_tokenizer = Tokenizer.from_str(content).pre_tokenizer
        tokenizer.add_prefix_space = True  # for its saved copy
    if not reads_words_like_text(tokenizer):
        problem = "reads words in another way than texts: the results may be worse"
        LOGGER.warning("the tokenizer of %s %s", model_name, problem)


def reads_words_like_text(tokenizer: "PreTrainedTokenizerBase") -> bool:
    words = tokenizer(SAMPLE.split(), is_split_into_words=True, add_special_tokens=False)
    return words["input_ids"] == tokenizer(SAMPLE, add_special_tokens=False)["input_ids"]


def unknown(tokenizer: "PreTrainedTokenizerBase", text: str) -> bool:
    return tokenizer.unk_token_id in tokenizer(text, add_special_tokens=False)["input_ids"]
