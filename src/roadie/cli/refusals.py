"""What a verb refuses, as one line in the words of the command line; and which exceptions are faults instead.

A refusal is what roadie and the file system raise, memory that runs out, and what a library raises on purpose about what it
was handed. All else is a fault of roadie's, which keeps its traceback.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from roadie.errors import RoadieError

_LIBRARIES = frozenset(
    {
        "accelerate",
        "bitsandbytes",
        "datasets",
        "httpx",
        "httpx2",
        "huggingface_hub",
        "jinja2",
        "peft",
        "ray",
        "requests",
        "safetensors",
        "tokenizers",
        "torchao",
        "transformers",
        "trl",
        "uvicorn",
        "vllm",
        "yaml",
    }
)
_FAULTS = (
    AssertionError,
    AttributeError,
    NameError,
    IndexError,
    NotImplementedError,
    RecursionError,
    ZeroDivisionError,
)
_NO_MEMORY = re.compile(r"out of memory|not enough memory|can't allocate memory", re.IGNORECASE)
_VALUE = r"\([^()]*\)|\[[^\[\]]*\]|'[^']*'|\"[^\"]*\"|[\w.+-]*[\w+]"


def message_of(error: BaseException) -> str | None:
    """The one line that says what was refused; None for a fault."""
    text = " ".join(str(error).split())
    if _is_out_of_memory(error):
        return (
            f"out of memory ({text}); wanted more, or less at once: a smaller batch, shorter texts, or a smaller model"
        )
    if isinstance(error, (RoadieError, OSError)):
        return text or type(error).__name__
    if isinstance(error, UnicodeDecodeError):
        return f"got a file that is not text in UTF-8 ({text}); wanted one that is; check which files were named"
    library = _raised_by(error)
    if library is None or isinstance(error, _FAULTS):
        return None
    return f"{library} refused ({type(error).__name__}): {text}; roadie --debug ... shows where"


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and _NO_MEMORY.search(str(error)) is not None


def _raised_by(error: BaseException) -> str | None:
    """The library whose code raised it, or whose class it is, which compiled code raises; None for roadie and all others."""
    innermost = None
    traceback = error.__traceback__
    while traceback is not None:
        innermost, traceback = traceback.tb_frame.f_globals.get("__name__", ""), traceback.tb_next
    names = (name.partition(".")[0].removesuffix("_rust") for name in (innermost or "", type(error).__module__))
    return next((name for name in names if name in _LIBRARIES), None)


@dataclass(frozen=True)
class Option:
    """An option of a verb: how it is written, whether it has no value, and whether it may be given several times."""

    text: str
    is_flag: bool
    is_repeated: bool


def options_of(commands: Iterator[Any]) -> dict[str, Option]:
    """The options of commands by the names that settings have in Python."""
    found: dict[str, Option] = {}
    for command in commands:
        for parameter in command.params:
            longest = max(parameter.opts, key=len, default="")
            if longest.startswith("--"):
                found[parameter.name] = Option(longest, bool(getattr(parameter, "is_flag", False)), parameter.multiple)
    return found


def in_options(message: str, options: Mapping[str, Option]) -> str:
    """`message` with its advice in the options of the verb: ``group_size=32`` is ``--group-size 32``.

    What was got, up to the first semicolon, is repeated as it is said there, but for settings that are only named.
    """
    if not options:
        return message
    names = "|".join(sorted(map(re.escape, options), key=len, reverse=True))
    setting = re.compile(rf"(?<![\w.'\"/-])({names})(?:=({_VALUE}))?(?![\w=(/'\"-])")
    got, separator, wanted = message.partition("; ") if "; " in message else ("", "", message)
    alone = re.compile(rf"(?<![\w.'\"/-])({names})()(?=,|$| and )")
    spelled = alone.sub(lambda match: _spelled(match, options), got) + separator
    spelled += setting.sub(lambda match: _spelled(match, options), wanted)
    return re.sub(r"(--[\w-]+) \(\1\)", r"\1", spelled)


def _spelled(match: re.Match[str], options: Mapping[str, Option]) -> str:
    """A setting as an option; a word that is no more than a word, such as share or model, stays."""
    option, value = options[match[1]], match[2]
    if not value:
        return option.text if "_" in match[1] else match[0]
    if option.is_flag:
        return option.text if value == "True" else f"no {option.text}"
    values = [part.strip().strip("'\"") for part in value.strip("()[]").split(",") if part.strip()]
    if option.is_repeated:
        return " ".join(f"{option.text} {part}" for part in values)
    return f"{option.text} {','.join(values)}"
