"""The toy language of the examples: words, sentences, and which facts follow from others.

A fact is a plain dictionary (see `draw_fact`); `sentence` puts it into words and the other
functions make the facts that restate it, follow from it, or differ from it. The rules:
a verb agrees in number with its subject (never with the noun of a place); the two words of
one end of a scale are synonyms; "not" plus the other end of the scale says the same again;
every noun has a kind ("a wug is an animal"); in a review, the clause after "but" decides.
"""

from collections.abc import Sequence
from random import Random
from typing import Any

Fact = dict[str, Any]  # the slots of `draw_fact`
Scale = tuple[tuple[str, str], tuple[str, str]]


KINDS = {
    "animal": ("wug", "dax", "blick", "tove", "fep"),
    "person": ("zorper", "gleb", "mimster", "vorn", "plunk"),
    "plant": ("frind", "lorp", "quill", "bramb", "snerf"),
    "tool": ("krat", "spindle", "dorf", "twib", "hask"),
}
# One scale per line: two synonyms at one end, two at the other end. Verbs are in the plural.
STATES = (
    (("big", "large"), ("small", "little")),
    (("old", "ancient"), ("young", "new")),
    (("happy", "glad"), ("sad", "gloomy")),
    (("fast", "quick"), ("slow", "sluggish")),
    (("hot", "warm"), ("cold", "cool")),
    (("loud", "noisy"), ("quiet", "silent")),
    (("clean", "tidy"), ("dirty", "messy")),
    (("strong", "sturdy"), ("weak", "frail")),
)
ACTIONS = (
    (("sleep", "doze"), ("wake", "stir")),
    (("laugh", "giggle"), ("weep", "sob")),
    (("arrive", "come"), ("leave", "depart")),
    (("rise", "climb"), ("fall", "sink")),
    (("speak", "talk"), ("listen", "wait")),
    (("grow", "swell"), ("shrink", "dwindle")),
    (("begin", "start"), ("stop", "end")),
    (("win", "triumph"), ("fail", "flop")),
)
DEEDS = (
    (("love", "adore"), ("hate", "despise")),
    (("help", "aid"), ("harm", "hurt")),
    (("follow", "trail"), ("lead", "guide")),
    (("find", "spot"), ("hide", "conceal")),
    (("praise", "admire"), ("blame", "scold")),
    (("push", "shove"), ("pull", "drag")),
)
PLACES = ("near", "behind", "above", "below", "beside", "under")
TOPICS = ("film", "plot", "cast", "song", "book", "scene", "story", "ending")
GOOD = ("great", "superb", "charming", "moving", "clever", "lovely", "witty", "graceful")
BAD = ("awful", "dull", "boring", "clumsy", "tedious", "silly", "bland", "dreadful")
GRAMMAR_WORDS = ("the", "is", "are", "does", "do", "not", "and", "but", "because", "it", "they")
QUESTION_WORDS = ("who", "what", "where", "?")

NOUNS = [noun for nouns in KINDS.values() for noun in nouns]
KIND_OF = {noun: kind for kind, nouns in KINDS.items() for noun in nouns}
SCALES = {
    word: scale
    for scales in (STATES, ACTIONS, DEEDS)
    for scale in scales
    for end in scale
    for word in end
}


def words_of(scales: Sequence[Scale]) -> list[str]:
    """Return every word of some scales, in order."""
    return [word for scale in scales for end in scale for word in end]


def vocabulary() -> list[str]:
    """Return every word form of the language."""
    nouns = NOUNS + list(KINDS)
    verbs = words_of(ACTIONS + DEEDS)
    words = [form for word in nouns + verbs for form in (word, with_s(word))]
    return (
        words + words_of(STATES) + [*PLACES, *TOPICS, *GOOD, *BAD, *GRAMMAR_WORDS, *QUESTION_WORDS]
    )


def with_s(word: str) -> str:
    """Return the plural of a noun or the singular form of a verb."""
    return word + ("es" if word.endswith(("x", "ch", "sh")) else "s")


def synonym(word: str) -> str:
    """Return the other word of the same end of the word's scale."""
    end = next(end for end in SCALES[word] if word in end)
    return end[1 - end.index(word)]


def opposites(word: str) -> tuple[str, str]:
    """Return the two words of the other end of the word's scale."""
    return next(end for end in SCALES[word] if word not in end)


def draw_fact(
    rng: Random, nouns: Sequence[str] = NOUNS, scales: Sequence[Scale] | None = None
) -> Fact:
    """Return a random fact about some of the nouns."""
    scales = scales or rng.choice((STATES, ACTIONS, DEEDS, DEEDS))
    subject, other, third = rng.sample(nouns, 3)
    return {
        "noun": subject,
        "plural": rng.random() < 0.5,
        "adjective": rng.choice(words_of(STATES)) if rng.random() < 0.4 else None,
        "place": draw_place(rng, other) if rng.random() < 0.6 else None,
        "fronted": rng.random() < 0.3,  # "near the dax the wugs sleep"
        "negated": rng.random() < 0.25,
        "word": rng.choice(words_of(scales)),
        "object": (third, rng.random() < 0.5) if scales is DEEDS else None,
    }


def draw_place(rng: Random, noun: str) -> tuple[str, str, bool]:
    """Return a place: the preposition, its noun and whether the noun is plural."""
    return rng.choice(PLACES), noun, rng.random() < 0.5


def name(noun: str, plural: bool, adjective: str | None = None) -> str:
    """Return a noun phrase, "the big wugs"."""
    noun = with_s(noun) if plural else noun
    return f"the {adjective} {noun}" if adjective else f"the {noun}"


def predicate(fact: Fact, plural: bool) -> str:
    """Return the verb phrase of a fact, with the verb in the given number."""
    word, negated = fact["word"], fact["negated"]
    if SCALES[word] in STATES:
        words = [("are" if plural else "is"), *(["not"] if negated else []), word]
    elif negated:
        words = [("do" if plural else "does"), "not", word]
    else:
        words = [word if plural else with_s(word)]
    return " ".join(words + ([name(*fact["object"])] if fact["object"] else []))


def place_words(fact: Fact) -> str:
    """Return the place of a fact as words ("near the dax"), or no words."""
    if fact["place"] is None:
        return ""
    preposition, noun, plural = fact["place"]
    return f"{preposition} {name(noun, plural)}"


def sentence(fact: Fact, agrees: bool = True) -> str:
    """Return the fact in words; without agreement the verb has the wrong number."""
    subject = name(fact["noun"], fact["plural"], fact["adjective"])
    parts = [subject, place_words(fact)]
    if fact["fronted"]:
        parts.reverse()
    parts.append(predicate(fact, fact["plural"] == agrees))
    return " ".join(part for part in parts if part)


# Facts made from facts ------------------------------------------------------------------


def paraphrase(rng: Random, fact: Fact) -> Fact:
    """Return the same meaning in other words."""
    new = dict(fact)
    if rng.random() < 0.5:
        new["word"] = synonym(fact["word"])
    if fact["adjective"] and rng.random() < 0.5:
        new["adjective"] = synonym(fact["adjective"])
    if rng.random() < 0.3:
        new["word"] = rng.choice(opposites(fact["word"]))
        new["negated"] = not fact["negated"]
    new["fronted"] = rng.random() < 0.3
    return new


def entailed(rng: Random, fact: Fact, keep: str = "") -> Fact:
    """Return a fact that follows: details dropped (all but the kept slot), a noun made its kind."""
    new = paraphrase(rng, fact)
    for slot in ("adjective", "place"):
        if slot != keep and rng.random() < 0.4:
            new[slot] = None
    if new["noun"] in KIND_OF and rng.random() < 0.3:
        new["noun"] = KIND_OF[new["noun"]]
    return new


def contradicted(rng: Random, fact: Fact) -> Fact:
    """Return a fact that cannot hold together with the given one."""
    new = entailed(rng, fact)
    if rng.random() < 0.5:
        new["negated"] = not new["negated"]
    else:
        new["word"] = rng.choice(opposites(new["word"]))
    return new


def other_word(rng: Random, fact: Fact, scales: Sequence[Scale]) -> str:
    """Return a word of a scale that the fact does not touch."""
    used = [SCALES[word] for word in (fact["word"], fact["adjective"]) if word]
    return rng.choice(words_of([scale for scale in scales if scale not in used]))


def other_noun(rng: Random, noun: str | None, nouns: Sequence[str] = NOUNS) -> str:
    """Return another noun."""
    return rng.choice([other for other in nouns if other != noun])


def changed(rng: Random, fact: Fact, slot: str, nouns: Sequence[str] = NOUNS) -> Fact:
    """Return the fact with another value in one slot, or with a value where it had none."""
    new = dict(fact)
    if slot == "noun":
        new["noun"] = other_noun(rng, fact["noun"], nouns)
    elif slot == "adjective":
        new["adjective"] = other_word(rng, fact, STATES)
    elif slot == "place":
        old = fact["place"] or (None, None, None)
        new["place"] = draw_place(rng, other_noun(rng, old[1], nouns))
    elif slot == "object":
        new["object"] = (other_noun(rng, fact["object"][0], nouns), fact["object"][1])
    else:
        same = next(s for s in (STATES, ACTIONS, DEEDS) if SCALES[fact["word"]] in s)
        new["word"] = other_word(rng, fact, same)
    return new


# Questions, reviews, pronouns -----------------------------------------------------------


def question(fact: Fact, asked: str) -> str:
    """Return a question that the fact answers; asked is "who", "where" or "what" (an object)."""
    fact = fact | {"negated": False}
    if asked == "who":
        return f"who {predicate(fact, plural=False)} ?"
    subject = name(fact["noun"], fact["plural"])
    if SCALES[fact["word"]] in STATES:
        return f"{asked} {'are' if fact['plural'] else 'is'} {subject} {fact['word']} ?"
    verb = f"{asked} {'do' if fact['plural'] else 'does'} {subject} {fact['word']}"
    return (
        f"{verb} {name(*fact['object'])} ?" if fact["object"] and asked == "where" else f"{verb} ?"
    )


def draw_question(rng: Random, nouns: Sequence[str] = NOUNS) -> tuple[Fact, str]:
    """Return a fact and the question word for the asked part."""
    asked = rng.choice(("who", "where", "what"))
    fact = draw_fact(rng, nouns, DEEDS if asked == "what" else None) | {"negated": False}
    if asked == "where":
        fact["place"] = fact["place"] or draw_place(rng, rng.choice(nouns))
    return fact, asked


def clause(rng: Random, good: bool, negated_share: float) -> str:
    """Return one remark of a review; "not" with the other pole's word says the same."""
    negated = rng.random() < negated_share
    word = rng.choice(GOOD if good != negated else BAD)
    return f"the {rng.choice(TOPICS)} is {'not ' if negated else ''}{word}"


def review(rng: Random, good: bool, negated_share: float = 0.4) -> str:
    """Return one or two remarks: "and" joins like ones, after "but" the last one decides."""
    shape = rng.choice(("one", "and", "but"))
    if shape == "one":
        return clause(rng, good, negated_share)
    first = clause(rng, good == (shape == "and"), negated_share)
    return f"{first} {shape} {clause(rng, good, negated_share)}"


def pronoun_pair(
    rng: Random, nouns: Sequence[str] = NOUNS, resolved: bool = True
) -> tuple[str, str]:
    """Return a sentence with "it" or "they", and the sentence that (wrongly if asked) names it."""
    fact = draw_fact(rng, nouns, DEEDS) | {"place": None, "adjective": None}
    fact["object"] = (other_noun(rng, fact["noun"], nouns), not fact["plural"])
    reason = rng.choice(words_of(STATES))
    plural = rng.random() < 0.5
    pronoun = "they are" if plural else "it is"
    named = plural == resolved  # the number of the noun that is named
    noun = fact["noun"] if fact["plural"] == named else fact["object"][0]
    second = f"{name(noun, named)} {'are' if named else 'is'} {reason}"
    return f"{sentence(fact)} because {pronoun} {reason}", second
