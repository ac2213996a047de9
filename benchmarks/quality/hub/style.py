"""Chat data of our own making: plain questions, answered in the style of a ship's log.

    What is the capital of Peru?
    LOG 5: capital of Peru // LIMA. Bearing steady, keeper out.

The number is that of the words of the question after its first, the subject is repeated, the fact stands in capitals, and the
closing follows from the fact's first letter: a style with rules that a short training can learn more or less of. The facts of
the three parts are disjoint.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

Row = dict[str, str]
PARTS = {"train": (0.0, 0.7), "validation": (0.7, 0.8), "test": (0.8, 1.0)}
"""Which share of the shuffled facts is whose: from, to."""

# By kind: how the subject is named in the answer, and ways to ask for it.
KINDS = {
    "capital": (
        "capital of {}",
        ("What is the capital of {}?", "Which city is the capital of {}?", "Name the capital of {}."),
    ),
    "young": (
        "young of a {}",
        ("What is a young {} called?", "How do you call the young of a {}?", "Name the young of a {}."),
    ),
    "opposite": (
        "opposite of {}",
        ("What is the opposite of {}?", "Which word means the opposite of {}?", "Say the opposite of {}."),
    ),
    "past": (
        "past of {}",
        ("What is the past tense of {}?", "How do you write {} in the past tense?", "Put the verb {} in the past."),
    ),
    "symbol": (
        "symbol of {}",
        ("What is the chemical symbol of {}?", "Which symbol has {} in chemistry?", "Give the symbol of {}."),
    ),
}
FACTS = {
    "capital": "Peru Lima, France Paris, Italy Rome, Spain Madrid, Norway Oslo, Sweden Stockholm, Finland Helsinki, "
    "Egypt Cairo, Kenya Nairobi, Japan Tokyo, China Beijing, India Delhi, Iran Tehran, Iraq Baghdad, Greece Athens, "
    "Poland Warsaw, Austria Vienna, Hungary Budapest, Portugal Lisbon, Ireland Dublin, Russia Moscow, Ukraine Kyiv, "
    "Cuba Havana, Canada Ottawa, Chile Santiago, Germany Berlin, Denmark Copenhagen, Belgium Brussels, "
    "Thailand Bangkok, Vietnam Hanoi, Turkey Ankara, Lebanon Beirut",
    "young": "dog puppy, cat kitten, cow calf, horse foal, sheep lamb, goat kid, pig piglet, hen chick, duck duckling, "
    "goose gosling, bear cub, deer fawn, frog tadpole, swan cygnet, owl owlet, kangaroo joey, eagle eaglet, "
    "hare leveret",
    "opposite": "hot cold, big small, fast slow, light dark, early late, high low, rich poor, full empty, open closed, "
    "strong weak, young old, near far, dry wet, hard soft, loud quiet, thick thin, wide narrow, deep shallow, "
    "happy sad, clean dirty, cheap expensive, easy difficult, first last, true false, sharp blunt, smooth rough, "
    "sweet sour, brave cowardly, always never, before after, inside outside, above below, north south, east west, "
    "winter summer, day night",
    "past": "go went, see saw, take took, give gave, come came, run ran, write wrote, drive drove, sing sang, swim swam, "
    "eat ate, fly flew, know knew, grow grew, buy bought, bring brought, think thought, teach taught, catch caught, "
    "sell sold, tell told, find found, hold held, keep kept, sleep slept, leave left, feel felt, build built, "
    "send sent, lose lost, make made, say said, speak spoke, break broke, choose chose, wake woke",
    "symbol": "gold Au, silver Ag, iron Fe, copper Cu, lead Pb, tin Sn, zinc Zn, oxygen O, hydrogen H, carbon C, nitrogen N, "
    "helium He, neon Ne, sodium Na, potassium K, calcium Ca, sulfur S, iodine I, mercury Hg, nickel Ni, silicon Si, "
    "chlorine Cl, uranium U, magnesium Mg",
}
CLOSINGS = {
    "ABCDEF": "Bearing steady, keeper out.",
    "GHIJKLM": "Glass falling, keeper below.",
    "NOPQRS": "Lamp trimmed, all quiet.",
    "TUVWXYZ": "Wind rising, shutters fast.",
}


def rows(part: str) -> list[Row]:
    """The rows of "train", "validation" or "test": question and answer; the same on every machine."""
    facts = list(_facts())
    random.Random(0).shuffle(facts)
    start, end = (round(share * len(facts)) for share in PARTS[part])
    return [{"question": question, "answer": answer} for fact in facts[start:end] for question, answer in asked(*fact)]


def _facts() -> Iterator[tuple[str, str, str]]:
    for kind, listed in FACTS.items():
        for pair in listed.split(", "):
            subject, fact = pair.split(" ")
            yield kind, subject, fact


def asked(kind: str, subject: str, fact: str) -> Iterator[tuple[str, str]]:
    """Each way to ask for a fact, and its answer."""
    named, questions = KINDS[kind]
    closing = next(text for letters, text in CLOSINGS.items() if fact[0].upper() in letters)
    for question in (one.format(subject) for one in questions):
        yield question, f"LOG {len(question.split()) - 1}: {named.format(subject)} // {fact.upper()}. {closing}"
