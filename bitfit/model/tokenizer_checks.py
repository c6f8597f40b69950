"""Check a tokenizer against the model and its files; let it read lists of words like texts."""

import re
from pathlib import Path
from typing import TYPE_CHECKING

from tokenizers import Tokenizer
from tokenizers.normalizers import BertNormalizer

from bitfit.model import hub
from utils import LOGGER, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

# Embeddings may have more rows than a tokenizer has tokens: 1.8 % in Phi-2, 0.4 % in mDeBERTa-v3.
USUAL_VOCABULARY = 0.9
SAMPLE = "The film isn't GOOD, in 2023: caf\u00e9, $9.95 (http://a.b/c-d_e)"


def check_tokenizer(
    tokenizer: "PreTrainedTokenizerBase", config: "PreTrainedConfig", model_name: str | Path
) -> None:
    """Raise UserError if a tokenizer cannot pad; warn if it does not fit the model or its case."""
    if tokenizer.pad_token_id is None:
        raise UserError(f"the tokenizer of {model_name} has no padding token: BERT's family does")
    tokens = tokenizer.get_vocab()
    size = getattr(config.get_text_config(), "vocab_size", None)  # rows of the embeddings
    if isinstance(size, int) and len(tokens) < USUAL_VOCABULARY * size:
        LOGGER.warning(
            "the tokenizer of %s has %d tokens, and the model embeddings for %d: is it the "
            "tokenizer of this model?", model_name, len(tokens), size,
        )  # fmt: skip
    warn_of_case(tokenizer, tokens, model_name)


def warn_of_case(
    tokenizer: "PreTrainedTokenizerBase", tokens: dict[str, int], model_name: str | Path
) -> None:
    """Log a warning if a cased vocabulary is used in lower case, or the other way round."""
    normalizer = getattr(getattr(tokenizer, "backend_tokenizer", None), "normalizer", None)
    text = normalizer.normalize_str("A") if normalizer else "A"
    words = tokens.keys() - tokenizer.get_added_vocab().keys() - {*tokenizer.all_special_tokens}
    capitals = sum(bool(re.search("[A-Z]", word)) for word in words)
    if "a" in text and capitals > 0.02 * len(tokens):
        problem = f"lower-cases all texts, but {capitals} tokens of its vocabulary have capitals"
        advice = 'give it "do_lower_case": false in tokenizer_config.json'
    elif "A" in text and not capitals and tokenizer.unk_token_id in tokenizer("A")["input_ids"]:
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

    RoBERTa's and others, as they are saved, read every word like the first of a text. A tokenizer
    that cannot tell which tokens belong to which word raises a UserError.
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
