"""Toy GLUE: the nine tasks and AX in the toy language, in GLUE's TSV layouts.

`write_glue(folder, seed)` draws every split from the seed. The labels follow from the rules
of toy_language.py; each label is given to as many rows, and no row is in two splits.
"""

import random
from collections.abc import Callable, Sequence
from pathlib import Path

import toy_language as toy

Texts = tuple[str, ...]  # one sentence or two
Label = int | str

SPLIT_ROWS = {"train": 800, "dev": 240, "test": 100, "AX": 60}
NLI_LABELS = ("entailment", "neutral", "contradiction")
RTE_LABELS = ("entailment", "not_entailment")
STSB_LABELS = tuple(f"{score}.000" for score in range(6))
# MNLI's mismatched splits speak of nouns that its training split never names.
MATCHED_NOUNS = toy.KINDS["animal"] + toy.KINDS["person"]
MISMATCHED_NOUNS = toy.KINDS["plant"] + toy.KINDS["tool"]


def cola_texts(rng: random.Random, acceptable: int, nouns: Sequence[str]) -> tuple[str]:
    """Return a sentence whose verb agrees with its subject or not.

    The place's noun has the other number than the subject, and may stand before or after it,
    so that neither the words alone nor the noun next to the verb tell the label.
    """
    fact = toy.draw_fact(rng, nouns)
    preposition, noun, _ = toy.draw_place(rng, toy.other_noun(rng, fact["noun"], nouns))
    fact["place"] = (preposition, noun, not fact["plural"])
    return (toy.sentence(fact, agrees=bool(acceptable)),)


def sst2_texts(rng: random.Random, good: int, nouns: Sequence[str]) -> tuple[str]:
    """Return a review of the asked opinion, with fewer negations than pre-training saw."""
    return (toy.review(rng, bool(good), negated_share=0.1),)


def mrpc_texts(rng: random.Random, same: int, nouns: Sequence[str]) -> tuple[str, str]:
    """Return two sentences of the same meaning, or of meanings that differ in one slot."""
    fact = toy.draw_fact(rng, nouns)
    slot = rng.choice(("noun", "place", "word"))
    second = fact if same else toy.changed(rng, fact, slot, nouns)
    return toy.sentence(fact), toy.sentence(toy.paraphrase(rng, second))


def qqp_texts(rng: random.Random, same: int, nouns: Sequence[str]) -> tuple[str, str]:
    """Return two questions that ask the same, or different questions."""
    fact, asked = toy.draw_question(rng, nouns)
    second = fact | {"word": toy.synonym(fact["word"])}
    if not same:
        slots = ("word",) if asked == "who" else ("word", "noun")
        second = toy.changed(rng, second, rng.choice(slots), nouns)
    return toy.question(fact, asked), toy.question(second, asked)


def stsb_texts(rng: random.Random, score: str, nouns: Sequence[str]) -> tuple[str, str]:
    """Return two sentences of five slots; the score counts the slots with the same meaning."""
    fact = toy.draw_fact(rng, nouns, toy.DEEDS)
    fact["adjective"] = fact["adjective"] or rng.choice(toy.words_of(toy.STATES))
    fact["place"] = fact["place"] or toy.draw_place(rng, rng.choice(nouns))
    second = fact
    slots = ("noun", "adjective", "place", "word", "object")
    for slot in rng.sample(slots, 5 - int(float(score))):
        second = toy.changed(rng, second, slot, nouns)
    return toy.sentence(fact), toy.sentence(toy.paraphrase(rng, second))


def mnli_texts(rng: random.Random, label: str, nouns: Sequence[str]) -> tuple[str, str]:
    """Return a premise and a hypothesis that follows, may hold, or cannot hold."""
    fact = toy.draw_fact(rng, nouns)
    if label == "entailment":
        second = toy.entailed(rng, fact)
    elif label == "contradiction":
        second = toy.contradicted(rng, fact)
    else:
        slot = rng.choice(("adjective", "place", "word"))
        second = toy.entailed(rng, toy.changed(rng, fact, slot, nouns), keep=slot)
    return toy.sentence(fact), toy.sentence(second)


def rte_texts(rng: random.Random, label: str, nouns: Sequence[str]) -> tuple[str, str]:
    """Return a premise and a hypothesis that follows or not."""
    if label == "not_entailment":
        label = rng.choice(NLI_LABELS[1:])
    return mnli_texts(rng, label, nouns)


def qnli_texts(rng: random.Random, label: str, nouns: Sequence[str]) -> tuple[str, str]:
    """Return a question and a sentence that answers it or one about something else."""
    fact, asked = toy.draw_question(rng, nouns)
    answer = toy.paraphrase(rng, fact)
    if label == "not_entailment":
        slots = ("word",) if asked == "who" else ("word", "noun")
        answer = toy.changed(rng, fact, rng.choice(slots), nouns)
        answer = toy.paraphrase(rng, answer)
    return toy.question(fact, asked), toy.sentence(answer)


def wnli_texts(rng: random.Random, resolved: int, nouns: Sequence[str]) -> tuple[str, str]:
    """Return a sentence with a pronoun, and the sentence with the right or the wrong noun."""
    return toy.pronoun_pair(rng, nouns, bool(resolved))


# Per task: how its texts are drawn, the labels, the columns that hold the texts, and all
# columns of its labelled files and of its test files.
_STSB = "index,genre,filename,year,old_index,source1,source2,sentence1,sentence2"
_MNLI = (
    "index,promptID,pairID,genre,sentence1_binary_parse,sentence2_binary_parse,"
    "sentence1_parse,sentence2_parse,sentence1,sentence2"
)
_MRPC = "#1 ID,#2 ID,#1 String,#2 String"
_PAIR = "sentence1,sentence2"
TASKS: dict[str, tuple[Callable[..., Texts], Sequence[Label], str, str, str]] = {
    "CoLA": (cola_texts, (0, 1), "sentence", "source,label,mark,sentence", "index,sentence"),
    "SST-2": (sst2_texts, (0, 1), "sentence", "sentence,label", "index,sentence"),
    "MRPC": (mrpc_texts, (0, 1), "#1 String,#2 String", f"Quality,{_MRPC}", f"index,{_MRPC}"),
    "QQP": (
        qqp_texts,
        (0, 1),
        "question1,question2",
        "id,qid1,qid2,question1,question2,is_duplicate",
        "id,question1,question2",
    ),
    "STS-B": (stsb_texts, STSB_LABELS, _PAIR, f"{_STSB},score", _STSB),
    "MNLI": (mnli_texts, NLI_LABELS, _PAIR, f"{_MNLI},label1,gold_label", _MNLI),
    "QNLI": (
        qnli_texts,
        RTE_LABELS,
        "question,sentence",
        "index,question,sentence,label",
        "index,question,sentence",
    ),
    "RTE": (rte_texts, RTE_LABELS, _PAIR, f"index,{_PAIR},label", f"index,{_PAIR}"),
    "WNLI": (wnli_texts, (0, 1), _PAIR, f"index,{_PAIR},label", f"index,{_PAIR}"),
}
LABEL_COLUMNS = {"label", "Quality", "is_duplicate", "score", "gold_label"} | {
    f"label{rater}" for rater in range(1, 6)
}
NUMBER_COLUMNS = {"index", "id", "qid1", "qid2", "#1 ID", "#2 ID", "promptID", "pairID"}
FILLER = {"mark": "", "source": "toy", "genre": "toy"}  # any other column holds "-"


def sample_training_rows(
    rng: random.Random, task: str, count: int, seen: set[Texts], nouns: Sequence[str] = toy.NOUNS
) -> list[tuple[Texts, Label]]:
    """Return texts and label of the rows of a split: new texts, with labels in equal parts."""
    texts_of, labels = TASKS[task][:2]
    rows: list[tuple[Texts, Label]] = []
    while len(rows) < count:
        label = labels[len(rows) % len(labels)]
        texts = texts_of(rng, label, nouns)
        if texts not in seen and len(set(texts)) == len(texts):
            seen.add(texts)
            rows.append((texts, label))
    rng.shuffle(rows)
    return rows


def file_columns(task: str, split: str) -> list[str]:
    """Return the column names of a split's file."""
    labelled, unlabelled = TASKS[task][3:]
    if split.startswith("test"):
        return unlabelled.split(",")
    if task == "MNLI" and split.startswith("dev"):  # five raters where training has one
        labelled = labelled.replace("label1", "label1,label2,label3,label4,label5")
    return labelled.split(",")


def row_fields(task: str, columns: list[str], number: int, texts: Texts, label: Label) -> list[str]:
    """Return the fields of a row in the order of the columns."""
    fields = dict.fromkeys(NUMBER_COLUMNS, str(number)) | dict.fromkeys(LABEL_COLUMNS, str(label))
    fields |= FILLER | dict(zip(TASKS[task][2].split(","), texts, strict=True))
    return [fields.get(column, "-") for column in columns]


def write_rows(
    path: Path,
    columns: list[str],
    rows: list[list[str]],
    header: bool = True,
    encoding: str = "utf-8",
) -> None:
    """Write a TSV file without quotes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ["\t".join(fields) for fields in ([columns] if header else []) + rows]
    path.write_text("\n".join(lines) + "\n", encoding=encoding, newline="\n")


def write_split(folder: Path, rng: random.Random, task: str, split: str, seen: set[Texts]) -> None:
    """Draw one split of a task and write the file."""
    nouns = {"MNLI": MATCHED_NOUNS}.get(task, toy.NOUNS)
    nouns = MISMATCHED_NOUNS if split.endswith("mismatched") else nouns
    drawn = sample_training_rows(rng, task, SPLIT_ROWS[split.split("_")[0]], seen, nouns)
    columns = file_columns(task, split)
    rows = [row_fields(task, columns, i, texts, label) for i, (texts, label) in enumerate(drawn)]
    header = task != "CoLA" or split == "test"  # GLUE's labelled CoLA files have none
    encoding = "utf-8-sig" if task == "MRPC" else "utf-8"  # GLUE's MRPC starts with a mark
    write_rows(folder / task / f"{split}.tsv", columns, rows, header, encoding)


def write_glue(folder: Path, seed: int) -> None:
    """Write all tasks below the folder, with a separate random generator for each task."""
    for task in TASKS:
        rng = random.Random(f"{task} {seed}")
        seen: set[Texts] = set()
        splits: tuple[str, ...] = ("train", "dev", "test")
        if task == "MNLI":
            splits = ("train", "dev_matched", "dev_mismatched", "test_matched", "test_mismatched")
        for split in splits:
            write_split(folder, rng, task, split, seen)
        if task == "MNLI":  # AX is a test set for models trained on MNLI
            drawn = sample_training_rows(rng, task, SPLIT_ROWS["AX"], seen, MATCHED_NOUNS)
            rows = [[str(i), *texts] for i, (texts, _) in enumerate(drawn)]
            write_rows(folder / "AX" / "AX.tsv", ["index", "sentence1", "sentence2"], rows)
