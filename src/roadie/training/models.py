"""Base models: the embedded one by default, else any local or hub causal language model."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from roadie import embedded
from roadie.errors import ConfigError
from roadie.extras import need
from roadie.training.places import check_model_place

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MOST_OF_A_REASON = 400
"""Characters of what a library says."""


@dataclass(frozen=True)
class ModelSource:
    """Which base model, and how much it and its adapters are trusted.

    name: folder or hub repository; None: the one the adapters were trained on, else the embedded one.
    trust_remote_code: run Python code that comes with the model; allow_pickle: read weights that are not safetensors.
    Both are off unless asked for.
    """

    name: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    allow_pickle: bool = False

    @property
    def place(self) -> str:
        """The folder or hub repository to load from."""
        return str(embedded.model_path()) if self.name in (None, "", embedded.NAME) else self.name

    def for_adapters(self, recorded: Iterable[str | None]) -> ModelSource:
        """This source, with a name: where it has none, the base model that adapters name, else the embedded one.

        The embedded model is known by its place inside the package, so that an adapter of it works on every machine.
        Raises `ConfigError` where adapters name different models.
        """
        if self.name is not None:
            return self
        names = sorted({embedded.name_here(name) for name in recorded if name})
        if len(names) > 1:
            raise ConfigError(
                f"got adapters of different base models ({', '.join(names)}); wanted one; name it (--model NAME)"
            )
        return replace(self, name=names[0] if names else self.place)


def as_source(model: str | ModelSource | None) -> ModelSource:
    """`model` as a source: a name is one that is trusted with nothing."""
    return model if isinstance(model, ModelSource) else ModelSource(model)


def load_model(source: ModelSource, dtype: torch.dtype | None = None, *, in_4bit: bool = False) -> PreTrainedModel:
    """The causal language model, in evaluation mode on the CPU; `dtype` None keeps the one it is stored in.

    in_4bit: its linear layers in 4 bits, by bitsandbytes, on the accelerator where there is one; `dtype` computes.
    Raises `ConfigError` where transformers cannot load it.
    """
    from transformers import AutoModelForCausalLM

    quantised = {"quantization_config": _four_bits(dtype)} if in_4bit else {}

    model: PreTrainedModel = _loaded(
        "a causal language model",
        source,
        AutoModelForCausalLM.from_pretrained,
        use_safetensors=None if source.allow_pickle else True,
        dtype="auto" if dtype is None else dtype,
        **quantised,
    )
    return model.eval()


def _four_bits(dtype: torch.dtype | None) -> Any:
    """nf4, computed with in `dtype`; raises `MissingExtra` without bitsandbytes."""
    from transformers import BitsAndBytesConfig

    need("quant", "bitsandbytes")
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype or torch.float32
    )


def load_tokenizer(source: ModelSource) -> PreTrainedTokenizerBase:
    """The model's tokenizer; raises `ConfigError` where transformers cannot load it."""
    from transformers import AutoTokenizer

    tokenizer: PreTrainedTokenizerBase = _loaded("a tokenizer", source, AutoTokenizer.from_pretrained)
    return tokenizer


def context_length(source: ModelSource) -> int | None:
    """The number of tokens the model was made for, None where its config does not say; reads the config only."""
    return _number_in_config(source, "max_position_embeddings")


def hidden_size(source: ModelSource) -> int | None:
    """The number of elements of a hidden state, None where the config does not say; reads the config only."""
    return _number_in_config(source, "hidden_size")


def _number_in_config(source: ModelSource, name: str) -> int | None:
    from transformers import AutoConfig

    config = _loaded("a model", source, AutoConfig.from_pretrained)
    number = getattr(config.get_text_config(), name, None)
    return number if isinstance(number, int) and number > 0 else None


def _loaded(what: str, source: ModelSource, from_pretrained: Callable[..., Any], **more: Any) -> Any:
    """What transformers loads; whatever a folder that holds no such thing makes it raise is a `ConfigError`.

    Memory that runs out is no fault of the folder.
    """
    check_model_place(source.place)
    try:
        return from_pretrained(
            source.place, revision=source.revision, trust_remote_code=source.trust_remote_code, **more
        )
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # broken files raise KeyError, TypeError, SafetensorError, errors of tokenizers and more
        raise _not_loaded(what, source, error) from error


def _not_loaded(what: str, source: ModelSource, error: Exception) -> ConfigError:
    reason = str(error)
    advice = "check the name"
    if not source.trust_remote_code and "trust_remote_code" in reason:
        advice = "it needs Python code of its own, which runs only with trust_remote_code (--trust-remote-code)"
    elif not source.allow_pickle and "safetensors" in reason:
        advice = "weights that are not safetensors are read only with allow_pickle (--allow-pickle)"
    return ConfigError(f"got {source.place!r}; wanted {what}; {advice}. transformers says: {_in_short(error)}")


def _in_short(error: Exception) -> str:
    """An error's text on one line, cut where transformers counts up all kinds of models; with its type where it needs one."""
    text = " ".join(str(error).split())
    if len(text) > MOST_OF_A_REASON:
        text = f"{text[:MOST_OF_A_REASON].rpartition(' ')[0]} ..."
    return text if isinstance(error, (OSError, ValueError)) and text else f"{type(error).__name__}: {text}"


def training_dtype(precision: str) -> torch.dtype:
    """The dtype of a `Recipe.precision`: float32, or bfloat16 where an accelerator supports it.

    Raises `ConfigError` where bfloat16 was asked for and no accelerator supports it.
    """
    if precision == "float32":
        return torch.float32
    if _supports_bfloat16():
        return torch.bfloat16
    if precision == "bfloat16":
        raise ConfigError(
            "got precision='bfloat16' without an accelerator that supports it; wanted one; use 'auto' or 'float32'"
        )
    return torch.float32


def _supports_bfloat16() -> bool:
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(getattr(torch, "xpu", None) and torch.xpu.is_available() and torch.xpu.is_bf16_supported())


def best_device() -> torch.device:
    """The accelerator of this machine, or its CPU."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return accelerator or torch.device("cpu")
