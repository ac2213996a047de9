"""What ships with the package so that everything works offline: a tiny pretrained model, and where to find real text.

    model = embedded.load_model()                  a Llama of 4.3 million parameters, float32
    tokenizer = embedded.load_tokenizer()          byte-level BPE, 2048 tokens
    embedded.corpus.split("asyncio").train         documents that the model never saw
    embedded.adapters_path()                       three small adapters of the model, for those kinds of text

The directory `model_path()` is an ordinary transformers checkpoint; `scripts/pretrain_embedded.py` made it.
Importing this package loads neither torch nor transformers.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from roadie.embedded import corpus

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["adapters_path", "corpus", "load_model", "load_tokenizer", "model_path", "name_here"]


def model_path() -> Path:
    """The directory of the embedded model and its tokenizer, for `from_pretrained`."""
    return Path(__file__).parent / "model"


def adapters_path() -> Path:
    """The directory of the adapters that come with the embedded model, one directory each."""
    return Path(__file__).parent / "adapters"


def name_here(name: str) -> str:
    """The name of a base model on this machine: the embedded model, wherever it lay, is the one of this package."""
    path = model_path()
    return str(path) if Path(name.replace("\\", "/")).parts[-3:] == path.parts[-3:] else name


def load_model() -> PreTrainedModel:
    """A fresh copy of the embedded model: LlamaForCausalLM, float32, in evaluation mode, on the CPU. Needs no network."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model_path(), local_files_only=True)


def load_tokenizer() -> PreTrainedTokenizerBase:
    """The tokenizer of the embedded model; it puts `<s>` before a text and pads on the left. Needs no network."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model_path(), local_files_only=True)
