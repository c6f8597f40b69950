"""Toy tagging: sentences of the toy language with parts of speech and phrases, in CoNLL columns.

`write_tagging(folder, seed)` draws every split from the seed. The phrases depend on the word order:
the same noun is an agent before the verb, an object behind it, and a part of a place after a
preposition. Some agents have invented names, which the tokenizer splits into characters.
"""

import json
import random
from pathlib import Path

import toy_language as toy

Tagged = list[tuple[str, str, str]]  # words with part of speech and phrase
SPLIT_SENTENCES = {"train": 400, "dev": 120, "test": 60}
CLASSES = {  # part of speech: words
    "DET": ["the"],
    "NOUN": [form for noun in (*toy.NOUNS, *toy.KINDS) for form in (noun, toy.with_s(noun))],
    "ADJ": toy.words_of(toy.STATES),
    "VERB": [f for v in toy.words_of(toy.ACTIONS + toy.DEEDS) for f in (v, toy.with_s(v))],
    "ADP": list(toy.PLACES),
    "AUX": ["is", "are", "does", "do"],
    "PART": ["not"],
    "PUNCT": ["."],
}
CLASS_OF = {word: name for name, words in CLASSES.items() for word in words}
TASKS = {  # name: (number of the column with the tags, metrics)
    "toy-pos": (2, ["Accuracy", "Macro-F1"]),
    "toy-phrases": (3, ["Entity-F1", "Accuracy"]),
}


def draw_name(rng: random.Random) -> str:
    """Return an invented name of two syllables."""
    return "".join(rng.choice("bdklmnt") + rng.choice("aiou") for _ in range(2)).capitalize()


def tag_phrase(text: str, phrase: str = "") -> Tagged:
    """Return words with their part of speech and, unless it is empty, an IOB tag of the phrase."""
    words = text.split()
    tags = [f"{'B' if n == 0 else 'I'}-{phrase}" if phrase else "O" for n in range(len(words))]
    return [(w, CLASS_OF.get(w, "PROPN"), tag) for w, tag in zip(words, tags, strict=True)]


def draw_sentence(rng: random.Random) -> Tagged:
    """Return a random fact as a tagged sentence."""
    fact = toy.draw_fact(rng)
    if rng.random() < 0.15:
        fact["plural"], agent = False, draw_name(rng)
    else:
        agent = toy.name(fact["noun"], fact["plural"], fact["adjective"])
    parts = [tag_phrase(agent, "AGENT"), tag_phrase(toy.place_words(fact), "PLACE")]
    if fact["fronted"]:
        parts.reverse()
    parts.append(tag_phrase(toy.predicate(fact | {"object": None}, fact["plural"])))
    if fact["object"]:
        parts.append(tag_phrase(toy.name(*fact["object"]), "OBJECT"))
    return [word for part in (*parts, tag_phrase(".")) for word in part]


def write_tagging(folder: Path, seed: int) -> None:
    """Write the splits and two task files; no sentence occurs twice, and test has no tags."""
    rng, seen = random.Random(f"tagging {seed}"), set()
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in SPLIT_SENTENCES.items():
        lines: list[str] = []
        while count:
            sentence = draw_sentence(rng)
            words = tuple(word for word, *_ in sentence)
            if words not in seen:
                seen.add(words)
                rows = [(word,) for word in words] if split == "test" else sentence
                lines += [*("\t".join(row) for row in rows), ""]
                count -= 1
        (folder / f"{split}.conll").write_text("\n".join(lines) + "\n", "utf-8", newline="\n")
    for name, (column, metrics) in TASKS.items():
        files = {"train": "train.conll", "validation": "dev.conll", "test": "test.conll"}
        record = {"name": name, "words": 1, "tags": column, "metrics": metrics, "files": files}
        text = json.dumps(record, indent=2) + "\n"
        (folder / f"{name}.json").write_text(text, "utf-8", newline="\n")
