"""Which parts of a model are none of its language model, where it reads pictures or sounds too: towers, and what joins them."""

from __future__ import annotations

from typing import Any

from torch import nn

from roadie.linear.kinds import is_linear

_OF_TOWERS = ("vision_config", "audio_config")
_WHY = "no part of the language model (target_towers adapts it)"


def outside_language(model: Any) -> dict[str, str]:
    """Path -> what to say of the largest parts of `model` with linear layers that are outside of its language model.

    Empty for models of text alone, for those that write none (CLIP), and where the config names no language model.
    """
    language = _language(model)
    found: dict[str, str] = {}
    for path, module in model.named_modules() if language else ():
        is_inside = not path or path.startswith(tuple(f"{part}." for part in found))
        if not is_inside and language.isdisjoint(module.modules()) and any(map(is_linear, module.modules())):
            found[path] = _WHY
    return found


def _language(model: Any) -> set[nn.Module]:
    """The modules of the language model, with the layer that gives the logits; none where all of `model` is one."""
    config = getattr(model, "config", None)
    of_towers = [part for part in (getattr(config, name, None) for name in _OF_TOWERS) if part is not None]
    if not (of_towers or hasattr(config, "text_config")) or not model.can_generate():
        return set()
    language = set(model.get_decoder().modules())
    for module in list(language):
        if any(getattr(module, "config", None) is part for part in of_towers):
            language.difference_update(module.modules())
    return language | {model.get_output_embeddings()}
