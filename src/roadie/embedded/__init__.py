"""What makes everything work offline: a tiny pretrained model, and where to find real text.

    model = embedded.load_model()                  a Llama of 4.3 million parameters, float32
    tokenizer = embedded.load_tokenizer()          byte-level BPE, 2048 tokens
    embedded.corpus.split("asyncio").train         documents that the model never saw
    embedded.adapters_path()                       three small adapters of the model, for those kinds of text

The model and its adapters are a distribution of their own, which the extra `demo` brings; in a checkout they lie in
`packages/roadie-embedded-model`, and are found there. Where they are not, `MissingExtra` says what to install.

The directory `model_path()` is an ordinary transformers checkpoint; `scripts/pretrain_embedded.py` made it.
Importing this package loads neither torch nor transformers.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

from roadie.embedded import corpus
from roadie.errors import MissingExtra
from roadie.extras import need

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["NAME", "adapters_path", "corpus", "load_model", "load_tokenizer", "model_path", "name_here"]

NAME = "roadie/embedded/model"
"""What adapters may call the embedded model in their files, since no folder of one machine is true on another."""
_PACKAGE = "roadie_embedded_model"
_IN_A_CHECKOUT = Path(__file__).parents[3] / "packages" / "roadie-embedded-model" / "src" / _PACKAGE


def _folder() -> Path:
    found = importlib.util.find_spec(_PACKAGE)
    if found is not None and found.origin is not None:
        return Path(found.origin).parent
    if not _IN_A_CHECKOUT.is_dir():
        need("demo")
    return _IN_A_CHECKOUT


def model_path() -> Path:
    """The directory of the embedded model and its tokenizer, for `from_pretrained`."""
    return _folder() / "model"


def adapters_path() -> Path:
    """The directory of the adapters that come with the embedded model, one directory each."""
    return _folder() / "adapters"


def name_here(name: str) -> str:
    """The name of a base model on this machine: the embedded model, wherever it lay, is the one here (else `NAME`)."""
    parts = Path(name.replace("\\", "/")).parts
    if parts[-3:] != Path(NAME).parts and parts[-2:] != (_PACKAGE, "model"):
        return name
    try:
        return str(model_path())
    except MissingExtra:
        return NAME


def load_model() -> PreTrainedModel:
    """A fresh copy of the embedded model: LlamaForCausalLM, float32, in evaluation mode, on the CPU. Needs no network."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model_path(), local_files_only=True)


def load_tokenizer() -> PreTrainedTokenizerBase:
    """The tokenizer of the embedded model; it puts `<s>` before a text and pads on the left. Needs no network."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model_path(), local_files_only=True)
