"""Multiple-choice rows in the form of the paper's data, taken apart: so that the answer's own words can be learnt and compared.

    instruction   "... the correct answer to the question: Q\\n\\nAnswer1: A Answer2: B\\n\\nAnswer format: answer1/answer2"
                  or "... with true or false, question: Q\\n\\nAnswer format: true/false"
    answer        "answer2", or "true"

A model of a hundred million parameters does not learn the numbers of answers in a short training, but their words.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from roadie.errors import ConfigError

QUESTION = re.compile(r"question: (?P<question>.*?)\n\n(?P<rest>.*)", re.DOTALL)
NUMBERED = re.compile(r"(?:Answer|Option|Solution)\d: *(.*?)\s*(?=(?:Answer|Option|Solution)\d: |\n\n|$)", re.DOTALL)
WORDS = ("true", "false")


def taken_apart(row: Mapping[str, Any]) -> dict[str, Any]:
    """The question, the words of the right answer, and those of all answers in order; `ConfigError` for rows of another form."""
    found = QUESTION.search(row["instruction"])
    choices = list(WORDS) if row["answer"] in WORDS else NUMBERED.findall(found["rest"]) if found else []
    place = WORDS.index(row["answer"]) if row["answer"] in WORDS else _number(row["answer"]) - 1
    if found is None or not 0 <= place < len(choices):
        raise ConfigError(
            f"got the instruction {row['instruction'][:200]!r} with the answer {row['answer']!r}; wanted a question with "
            "numbered answers, or with true or false; leave out form: multiple-choice"
        )
    return {"question": found["question"].strip(), "right": choices[place], "choices": choices}


def of_dataset(rows: Any) -> Any:
    """A `datasets.Dataset` of such rows as one with the three columns."""
    return rows.map(taken_apart, remove_columns=rows.column_names, load_from_cache_file=False)


def _number(answer: str) -> int:
    digits = answer[-1:]
    return int(digits) if digits.isdigit() else 0
