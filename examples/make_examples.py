"""Make the example data of this project: a toy GLUE and a tiny BERT pre-trained on its language.

    python examples/make_examples.py --seed 0 --output-path examples

writes `glue/` (see toy_glue.py), `tagging/` (see toy_tagging.py) and `tiny_bert/`, a BERT of three
layers pre-trained from scratch as the original was, by masked language modelling and next-sentence
prediction, on text drawn from toy_language.py. Nothing is downloaded; it takes about three minutes.
"""

import argparse
import random
import string
from collections.abc import Sequence
from pathlib import Path

import torch
import toy_language as toy
from toy_glue import write_glue
from toy_tagging import write_tagging
from tqdm import trange
from transformers import BatchEncoding, BertConfig, BertForPreTraining, BertTokenizerFast

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
BATCH_SIZE = 64
LEARNING_RATE = 2e-3
MASKED_SHARE = 0.2  # BERT masks 0.15; the toy language's sentences are short
IGNORED = -100  # the label that cross_entropy skips


def make_tokenizer() -> BertTokenizerFast:
    """Return BERT's tokenizer with the words of the language, and characters for other words."""
    characters = [*string.ascii_lowercase, *string.digits]
    pieces = [*string.punctuation, *characters, *("##" + character for character in characters)]
    tokens = list(dict.fromkeys([*SPECIAL_TOKENS, *toy.vocabulary(), *pieces]))
    vocabulary = {token: number for number, token in enumerate(tokens)}
    return BertTokenizerFast(vocab=vocabulary, do_lower_case=True, model_max_length=128)


def make_model(tokenizer: BertTokenizerFast) -> BertForPreTraining:
    """Return a tiny BERT with random weights."""
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=256,
        max_position_embeddings=128,
        pad_token_id=tokenizer.pad_token_id,
    )
    return BertForPreTraining(config)


# Stories for pre-training: two sentences of which the second continues the first.


def restating_story(rng: random.Random, nouns: Sequence[str]) -> tuple[str, str]:
    """Return a fact and a fact that follows from it."""
    fact = toy.draw_fact(rng, nouns)
    return toy.sentence(fact), toy.sentence(toy.entailed(rng, fact))


def question_story(rng: random.Random, nouns: Sequence[str]) -> tuple[str, str]:
    """Return a question, and the answer or the question in other words."""
    fact, asked = toy.draw_question(rng, nouns)
    again = fact | {"word": toy.synonym(fact["word"])} if rng.random() < 0.5 else fact
    if rng.random() < 0.3:
        return toy.question(fact, asked), toy.question(again, asked)
    return toy.question(fact, asked), toy.sentence(again)


def review_story(rng: random.Random, nouns: Sequence[str]) -> tuple[str, str]:
    """Return two reviews with the same opinion, about any nouns."""
    good = rng.random() < 0.5
    return toy.review(rng, good), toy.review(rng, good)


STORIES = (*[restating_story] * 3, question_story, review_story, toy.pronoun_pair)


def draw_pair(rng: random.Random) -> tuple[str, str, int]:
    """Return a pair of sentences and 0 if they are one story, 1 if the second is of another one.

    Both stories are of one sort and about the same three nouns, so that telling them apart
    takes more than the words they share.
    """
    story, nouns = rng.choice(STORIES), rng.sample(toy.NOUNS, 3)
    first, second = story(rng, nouns)
    other = rng.random() < 0.5
    if other:
        second = story(rng, nouns)[1]
    return first, second, int(other)


def draw_single(rng: random.Random) -> str:
    """Return a single text: a review, a fact, or two facts joined."""
    if rng.random() < 0.15:
        return toy.review(rng, rng.random() < 0.5)
    facts = [toy.draw_fact(rng) for _ in range(rng.choice((1, 2)))]
    return " and ".join(toy.sentence(fact) for fact in facts)


def draw_batch(
    rng: random.Random, tokenizer: BertTokenizerFast, single: bool
) -> tuple[BatchEncoding, list[int]]:
    """Return encoded sentences or pairs, and the next-sentence labels of pairs."""
    if single:
        texts = [draw_single(rng) for _ in range(BATCH_SIZE)]
        return tokenizer(texts, padding=True, return_tensors="pt"), [IGNORED] * BATCH_SIZE
    pairs = [draw_pair(rng) for _ in range(BATCH_SIZE)]
    first, second, labels = (list(column) for column in zip(*pairs, strict=True))
    return tokenizer(first, second, padding=True, return_tensors="pt"), labels


def mask(ids: torch.Tensor, tokenizer: BertTokenizerFast) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the corrupted ids, and as labels the tokens to restore.

    Of the chosen tokens 90 % become [MASK] and 10 % stay. BERT also puts in random words;
    they are left out because a toy sentence has few words to spare.
    """
    chosen = (ids >= len(SPECIAL_TOKENS)) & (torch.rand(ids.shape) < MASKED_SHARE)
    hidden = chosen & (torch.rand(ids.shape) < 0.9)
    labels = ids.masked_fill(~chosen, IGNORED)
    return ids.masked_fill(hidden, tokenizer.mask_token_id), labels


def losses(
    model: BertForPreTraining,
    tokenizer: BertTokenizerFast,
    encoded: BatchEncoding,
    next_labels: list[int],
) -> torch.Tensor:
    """Return the masked-word loss plus the next-sentence loss of a batch."""
    encoded["input_ids"], labels = mask(encoded["input_ids"], tokenizer)
    output = model(**encoded)
    masked = torch.nn.functional.cross_entropy(
        output.prediction_logits.flatten(0, 1), labels.flatten()
    )
    if next_labels[0] == IGNORED:
        return masked
    targets = torch.tensor(next_labels)
    return masked + torch.nn.functional.cross_entropy(output.seq_relationship_logits, targets)


def pretrain(
    model: BertForPreTraining, tokenizer: BertTokenizerFast, rng: random.Random, steps: int
) -> None:
    """Train the model on text that is drawn at every step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=LEARNING_RATE, total_steps=steps, pct_start=0.08
    )
    model.eval()  # no dropout: no text comes twice, so there is nothing to overfit
    bar = trange(steps, desc="pre-training", disable=None)
    for step in bar:
        loss = losses(model, tokenizer, *draw_batch(rng, tokenizer, single=step % 3 == 0))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)


def main() -> None:
    """Read the command line and write both examples."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output-path", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=2000, help="of pre-training")
    arguments = parser.parse_args()
    write_glue(arguments.output_path / "glue", arguments.seed)
    write_tagging(arguments.output_path / "tagging", arguments.seed)
    torch.set_num_threads(1)  # so that sums come out the same on any number of cores
    torch.manual_seed(arguments.seed)
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    pretrain(model, tokenizer, random.Random(f"text {arguments.seed}"), arguments.steps)
    model.save_pretrained(arguments.output_path / "tiny_bert")
    tokenizer.save_pretrained(arguments.output_path / "tiny_bert")


if __name__ == "__main__":
    main()
