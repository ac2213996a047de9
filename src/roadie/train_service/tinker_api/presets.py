"""What a LoRA config of the SDK means here: the rank as settings of RoAd, and which layers are trained.

    rank    up to 8           road_1: one angle and one factor for each pair
            9 to 32           road_2: twice the parameters; the SDK's default, 32, is here
            above 32          road_2 with three rotations in a row, of 2, 16 and 64: six times the parameters

    train_attn, train_mlp, train_unembed     linear layers of attention, all other ones, and the layer that gives the logits

`variant`, `group_size` and `stages` in the model's user_metadata go before the rank. Nothing is drawn at random: an adapter
starts as the identity, whatever the seed. The layer that gives the logits is passed over where it shares its weight with the
input's, or where the model changes its logits afterwards.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from tinker.types import LoraConfig

from roadie.engine.targets import ALL_LINEAR, targeted
from roadie.errors import ConfigError

OWN_WORDS = ("variant", "group_size", "stages")
_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
MANY_STAGES = (2, 16, 64)


def road_words(lora: LoraConfig, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of RoAd, without its targets, in the words of adapter_config.json; raises `ConfigError`."""
    if not 1 <= lora.rank <= 4096:
        raise ConfigError(f"got rank={lora.rank}; wanted 1 to 4096")
    words: dict[str, Any] = {"variant": "road_1" if lora.rank <= 8 else "road_2", "adapt_group_size": True}
    told = {name: metadata[name] for name in OWN_WORDS if metadata.get(name) is not None}
    if lora.rank > 32 and not told:
        words["stages"] = list(MANY_STAGES)
    return words | {name: _value(name, value) for name, value in told.items()}


def _value(name: str, value: Any) -> Any:
    if name == "variant":
        return str(value)
    parts = value if isinstance(value, list) else str(value).strip("[]").split(",")
    try:
        sizes = [int(str(part).strip()) for part in parts]
        return sizes if name == "stages" else (sizes if len(sizes) > 1 else sizes[0])
    except (ValueError, IndexError):
        raise ConfigError(
            f"got {name}={str(value)[:100]!r} in user_metadata; wanted whole numbers, as '2,16,64'"
        ) from None


def targets(model: Any, lora: LoraConfig, head: Sequence[str]) -> list[str]:
    """The layers to train, by path; raises `ConfigError` where there are none. head: what `head` gives."""
    paths = list(targeted(model, ALL_LINEAR))
    chosen = [path for path in paths if (lora.train_attn if _ATTENTION.search(path) else lora.train_mlp)]
    chosen += head if lora.train_unembed else []
    if not chosen:
        raise ConfigError(
            "got nothing to train; wanted one at least of train_attn, train_mlp, and train_unembed of a head of its own"
        )
    return chosen


def head(model: Any) -> list[str]:
    """The layer that gives the logits, where it can be trained: none where its weight is the input embeddings'."""
    output, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    if output is None or getattr(output, "weight", None) is getattr(embeddings, "weight", output):
        return []
    return [path for path, module in model.named_modules() if module is output][:1]
