"""Sentences of words as tokens: the first sub-token of each word, and rows that lose no word."""

from collections.abc import Callable
from itertools import chain, pairwise
from typing import TYPE_CHECKING

import numpy as np

from bitfit.data import readers
from bitfit.data.splits import TextColumns
from utils import LOGGER, UserError

if TYPE_CHECKING:
    from transformers import BatchEncoding, PreTrainedTokenizerBase


def tokens_for_text(tokenizer: "PreTrainedTokenizerBase", max_length: int, pair: bool) -> int:
    """Return the number of a row's tokens that are not special; UserError if there is none."""
    specials = tokenizer.num_special_tokens_to_add(pair=pair)
    if max_length <= specials:
        problem = f"leaves no room for text: this tokenizer adds {specials} special tokens a row"
        raise UserError(f"--max-seq-length {max_length} {problem}; give more")
    return max_length - specials


def first_tokens(rows: "BatchEncoding", counts: np.ndarray) -> np.ndarray:
    """Return the positions of the words' first sub-tokens among the tokens of all rows."""
    begins = counts.cumsum() - counts
    words = [-1 if n is None else begin + n  # -1: a special token
             for row, begin in enumerate(begins) for n in rows.word_ids(row)]  # fmt: skip
    numbers, found = np.unique(words, return_index=True)
    if not np.array_equal(numbers[numbers >= 0], np.arange(counts.sum())):
        raise UserError("this tokenizer loses words of a sentence: give another --model-name")
    return found[numbers >= 0]


def split_long_sentences(
    texts: TextColumns, tokenizer: "PreTrainedTokenizerBase", max_length: int
) -> TextColumns:
    """Return sentences of over `max_length` tokens as several rows, cut evenly between words.

    A single word with more tokens becomes a row, which `tokenize` cuts. A word without a sub-token,
    or a `max_length` without room for words, raises a UserError.
    """
    room = tokens_for_text(tokenizer, max_length, pair=False)
    (sentences,) = texts.columns
    parts = cut_sentences(sentences, tokenizer, room, place=texts.place_word)
    continues = np.array([number > 0 for rows in parts for number in range(len(rows))])
    if continues.any():
        count = sum(len(rows) > 1 for rows in parts)
        LOGGER.info("%d of %d sentences have more than %d tokens and are split into %d rows",
                    count, len(parts), max_length, count + continues.sum())  # fmt: skip
    rows = list(chain.from_iterable(parts))
    return TextColumns((rows,), texts.labels, continues)


def cut_sentences(
    sentences: list[list[str]],
    tokenizer: "PreTrainedTokenizerBase",
    room: int,
    place: Callable[[int, int], str] | None = None,
) -> list[list[list[str]]]:
    """Return the rows of each sentence: lists of words with at most `room` tokens.

    Args:
        place: returns the position of a word for messages; None: its number.
    """
    encoded = tokenizer(sentences, is_split_into_words=True, add_special_tokens=False)
    parts = []
    for number, words in enumerate(sentences):
        ids = encoded.word_ids(number)
        counts = np.bincount(np.array(ids, np.int64), minlength=len(words))
        if not counts.all():
            word = int(np.flatnonzero(counts == 0)[0])
            start = place(number, word) if place else f"sentence {number + 1}, word {word + 1}"
            problem = f"{readers.quote_value(words[word])} has no sub-tokens in this tokenizer"
            raise UserError(f"{start}: {problem}: remove it, or give another --model-name")
        rows = -(-len(ids) // room)
        if rows == 1 or len(words) == 1:
            parts.append([words])
            continue
        row_of_word = (counts.cumsum() - counts) * rows // len(ids)
        cuts = np.flatnonzero(np.diff(row_of_word)) + 1
        ends = [0, *(cuts if len(cuts) else [len(words) - 1]), len(words)]
        pieces = [words[a:b] for a, b in pairwise(ends)]
        parts.append(list(chain.from_iterable(cut_sentences(pieces, tokenizer, room))))
    return parts
