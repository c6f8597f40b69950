"""Sentences of words as tokens: words, their first sub-tokens and their labels stay together."""

import logging
import random

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY_BERT
from seqeval.metrics import f1_score
from transformers import AutoTokenizer

from bitfit.data import task_files, tokens, word_tokens
from bitfit.data.splits import TextColumns, read_split, word_positions
from bitfit.data.tasks import compact, predictions, score
from bitfit.model import loading
from utils import UserError

TAGGING = ROOT / "examples" / "tagging"
TOY = TAGGING / "toy-phrases.json"


def make_texts(sentences, labels=None):
    return TextColumns((sentences,), labels, np.zeros(len(sentences), bool))


def random_sentences(rng, count=60):
    """Words of one to twelve sub-tokens (characters) of the tiny BERT."""
    return [
        ["".join(rng.choices("abcxyz", k=rng.choice((1, 2, 3, 12)))) for _ in range(length)]
        for length in (rng.randint(1, 30) for _ in range(count))
    ]


@pytest.fixture(scope="module", params=["BERT", "RoBERTa", "no class"])
def tokenizer(request, tiny_roberta, tmp_path_factory):
    if request.param == "BERT":
        return loading.load_tokenizer(TINY_BERT, for_words=True)
    if request.param == "RoBERTa":
        return loading.load_tokenizer(tiny_roberta, for_words=True)
    folder = tmp_path_factory.mktemp("generic")  # transformers' class for tokenizer.json
    AutoTokenizer.from_pretrained(tiny_roberta).save_pretrained(folder)
    config = (folder / "tokenizer_config.json").read_text()
    config = config.replace('"RobertaTokenizer"', '"PreTrainedTokenizerFast"')
    (folder / "tokenizer_config.json").write_text(config)
    (folder / "config.json").write_text('{"model_type": "roberta", "vocab_size": 400}')
    return loading.load_tokenizer(folder, for_words=True)


@pytest.mark.parametrize("max_length", [4, 7, 16, 128])
def test_no_word_is_lost_and_every_row_fits(tokenizer, max_length):
    rng = random.Random(max_length)
    sentences = random_sentences(rng)
    words = [word for sentence in sentences for word in sentence]
    labels = np.array([len(word) for word in words])
    texts = make_texts(sentences, labels)
    rows = word_tokens.split_long_sentences(texts, tokenizer, max_length)
    tokenized = tokens.tokenize(rows, tokenizer, max_length)
    assert tokenized.lengths.max() <= max_length
    assert tokenized.word_counts.sum() == len(words)
    assert tokenized.labels.tolist() == labels.tolist()
    every = np.arange(len(tokenized.lengths))
    assert tokenized.sentences_of(every).tolist() == texts.word_counts.tolist()
    firsts = [
        tokenizer([[word]], is_split_into_words=True, add_special_tokens=False) for word in words
    ]
    assert tokenized.ids[tokenized.word_index].tolist() == [of["input_ids"][0][0] for of in firsts]


def test_the_words_of_a_row_are_the_tokenizers(tokenizer):
    """Against word_ids() of each sentence alone."""
    sentences = random_sentences(random.Random(1), 20)
    tokenized = tokens.tokenize(make_texts(sentences), tokenizer, 512)
    begin = word = 0
    for sentence in sentences:
        encoded = tokenizer(sentence, is_split_into_words=True)
        for number in range(len(sentence)):
            assert tokenized.word_index[word] == begin + encoded.word_ids().index(number)
            word += 1
        begin += len(encoded["input_ids"])


def test_words_are_read_like_words_of_a_text(tokenizer, tmp_path):
    """Also by the saved copy of the tokenizer, in the folder of an exported model."""
    tokenizer.save_pretrained(tmp_path)
    text = "the film isn't good, in 2023"
    for read in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        ids = read(text.split(), is_split_into_words=True)["input_ids"]
        assert ids == tokenizer(text)["input_ids"]
        if "\u0120" in "".join(tokenizer.get_vocab()):
            assert read.convert_ids_to_tokens(ids)[1].startswith("\u0120")


def test_long_sentences_are_cut_evenly(caplog):
    tokenizer = loading.load_tokenizer(TINY_BERT, for_words=True)
    sentences = [["the"] * 31, ["the"] * 30, ["wug", "q" * 40, "wug"]]
    with caplog.at_level(logging.INFO, "bitfit"):
        rows = word_tokens.split_long_sentences(make_texts(sentences), tokenizer, 12)
    assert rows.word_counts.tolist() == [8, 8, 8, 7, 10, 10, 10, 1, 1, 1]
    assert rows.continues.tolist() == [False, True, True, True] + [False, True, True] * 2
    assert "3 of 3 sentences have more than 12 tokens and are split into 10 rows" in caplog.text


def test_words_without_sub_tokens_are_refused_with_their_line(tmp_path):
    (tmp_path / "a.conll").write_text("the N\n\nwug N\n\u00ad V\n")
    files = {"train": "a.conll", "validation": "a.conll"}
    record = {"name": "x", "words": 1, "tags": 2, "metrics": ["Accuracy"], "files": files}
    task, folder = task_files.resolve_task(record, str(tmp_path))
    tokenizer = loading.load_tokenizer(TINY_BERT, for_words=True)
    dataset = make_dataset(task, folder, tokenizer)
    with pytest.raises(UserError, match=r"a\.conll:4: '\\xad' has no sub-tokens"):
        dataset.split("train")
    with pytest.raises(UserError, match="sentence 2, word 1: '' has no sub-tokens"):
        word_tokens.split_long_sentences(make_texts([["the"], [""]]), tokenizer, 12)
    with pytest.raises(UserError, match="--max-seq-length 2 leaves no room for text"):
        word_tokens.split_long_sentences(make_texts([["the"]]), tokenizer, 2)


def make_dataset(task, folder, tokenizer, max_length=12, train_size=None):
    return tokens.Dataset(task, folder, tokenizer, max_length, [0, 1], train_size,
                          torch.device("cpu"))  # fmt: skip


def test_every_seed_trains_on_as_many_rows():
    """Rows are drawn after long sentences are split; words and labels go with them."""
    task, folder = task_files.resolve_task(TOY)
    tokenizer = loading.load_tokenizer(TINY_BERT, for_words=True)
    whole = make_dataset(task, folder, tokenizer, 8).split("train").tokens
    assert whole.continues.any()
    drawn = make_dataset(task, folder, tokenizer, 8, train_size=40)
    split = drawn.split("train")
    for seed, rows in split.rows_of_seed.items():
        assert len(rows) == 40
        generator = tokens.make_generator(seed, "training rows")
        of_whole = generator.permutation(len(whole.lengths))[:40]
        assert split.tokens.labels_of(rows).tolist() == whole.labels_of(of_whole).tolist()
        firsts = [t.ids[t.word_index[word_positions(t.word_counts, r)]].tolist()
                  for t, r in ((split.tokens, rows), (whole, of_whole))]  # fmt: skip
        assert firsts[0] == firsts[1]


def test_sentences_that_also_occur_in_training_are_counted(caplog):
    task, folder = task_files.resolve_task(TOY)
    dataset = make_dataset(task, folder, loading.load_tokenizer(TINY_BERT, for_words=True), 64)
    dataset.row_hashes = {n: dataset.split(n) and dataset.row_hashes[n] for n in ("train", "test")}
    with caplog.at_level(logging.INFO, "bitfit"):
        dataset.report_overlap()
    assert "no training example occurs in test" in caplog.text
    dataset.row_hashes["test"] = dataset.row_hashes["train"][:5]
    dataset.report_overlap()
    assert "5 also occur in test" in caplog.text


def test_concatenated_rows_keep_their_words():
    tokenizer = loading.load_tokenizer(TINY_BERT, for_words=True)
    sentences = random_sentences(random.Random(2), 9)
    parts = [
        tokens.tokenize(make_texts(of), tokenizer, 512) for of in (sentences[:4], sentences[4:])
    ]
    whole = tokens.tokenize(make_texts(sentences), tokenizer, 512)
    joined = tokens.concatenate(parts)
    assert joined.word_index.tolist() == whole.word_index.tolist()
    assert joined.word_counts.tolist() == whole.word_counts.tolist()
    assert torch.equal(joined.ids, whole.ids)


def test_the_hash_of_the_data_depends_on_the_words():
    tokenizer = loading.load_tokenizer(TINY_BERT, for_words=True)
    one, two = (tokens.tokenize(make_texts(s), tokenizer, 9) for s in ([["a", "b"]], [["ab"]]))
    equal = [np.array_equal(a, b) for a, b in zip(one.hashed(), two.hashed(), strict=True)]
    assert not all(equal)
    assert len(two._replace(word_index=None).hashed()) == 5


def test_scores_of_tags():
    """Accuracy by counting; entity F1 is seqeval's of whole sentences, in any order of rows."""
    task, folder = task_files.resolve_task(TOY)
    tokenizer = loading.load_tokenizer(TINY_BERT, for_words=True)
    rng = np.random.default_rng(0)
    tokenized = make_dataset(task, folder, tokenizer, 6).split("validation").tokens
    rows = np.arange(len(tokenized.lengths))
    labels = tokenized.labels_of(rows)
    logits = rng.normal(size=(len(labels), task.num_labels)).astype(np.float32)
    logits[np.arange(len(labels)), labels] += 2
    found = score(task, logits, labels, tokenized.sentences_of(rows))
    predicted = predictions(task, logits)
    assert found["Accuracy"] == pytest.approx((predicted == labels).mean())
    ends = read_split(task, "validation", folder).word_counts.cumsum()[:-1]
    names = np.array(task.labels)
    gold, guessed = ([p.tolist() for p in np.split(names[v], ends)] for v in (labels, predicted))
    assert found["Entity-F1"] == pytest.approx(f1_score(gold, guessed))
    assert 0.2 < found["Entity-F1"] < 0.95
    assert predictions(task, compact(task, logits)).tolist() == predicted.tolist()


def test_entities_end_with_their_sentence():
    task, _ = task_files.resolve_task(TOY)
    labels = np.array([task.labels.index(tag) for tag in ("B-AGENT", "I-AGENT", "O")])
    wrong = np.array([task.labels.index(tag) for tag in ("B-AGENT", "I-AGENT", "B-AGENT")])
    logits = np.eye(task.num_labels)
    assert score(task, logits[wrong], labels, np.array([3]))["Entity-F1"] == pytest.approx(2 / 3)
    assert score(task, logits[labels], labels, np.array([1, 2]))["Entity-F1"] == 1
    nothing = np.array([task.labels.index("O")] * 3)
    assert score(task, logits[nothing], nothing, np.array([3]))["Entity-F1"] == 0


def test_a_split_is_described_by_its_sentences_words_and_tags():
    task, folder = task_files.resolve_task(TOY)
    dataset = make_dataset(task, folder, loading.load_tokenizer(TINY_BERT, for_words=True), 12)
    texts, tokenized = read_split(task, "train", folder), dataset.split("train").tokens
    described = tokens.describe_split(task, tokenized)
    tags = described.pop("tags")
    assert described == {
        "sentences": 400,
        "rows": len(tokenized.lengths),
        "words": len(texts.labels),
    }
    assert tags == {tag: int((texts.labels == k).sum()) for k, tag in enumerate(task.labels)}
    test = tokens.describe_split(task, dataset.split("test").tokens)
    assert test["sentences"] == 60
    assert "tags" not in test


@pytest.mark.parametrize(("words", "is_cut"), [(["the"] * 6, False), (["q" * 40], True)])
def test_only_a_word_longer_than_a_row_is_reported_as_cut(words, is_cut, caplog):
    """Other rows of the maximum length are not cut: long sentences are split."""
    tokenizer = loading.load_tokenizer(TINY_BERT, for_words=True)
    texts = word_tokens.split_long_sentences(make_texts([words]), tokenizer, 8)
    with caplog.at_level("INFO", "bitfit"):
        found = tokens.tokenize(texts, tokenizer, 8)
    assert found.lengths.tolist() == [8]
    assert ("longer ones are cut" in caplog.text) == is_cut
