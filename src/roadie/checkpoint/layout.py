"""What the files, keys and tensors of a checkpoint are called."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
MAX_CONFIG_BYTES = 1 << 20

VARIANT_PREFIX = "roadie:"
CHAIN_PREFIX = "roadie-stages:"  # readers that know VARIANT_PREFIX alone must refuse chains of several stages
INPUT_PREFIX = "roadie-inputs:"  # and those that know these two, rotations of inputs
EXPERTS_PREFIX = "roadie-experts:"  # and those that know these three, rotations of stacked experts
PREFIXES = (VARIANT_PREFIX, CHAIN_PREFIX, INPUT_PREFIX, EXPERTS_PREFIX)
EXTRA_DEFAULTS: Mapping[str, Any] = {
    "adapt_group_size": False,
    "bias": "none",
    "exclude_modules": None,
    "group_size_pattern": {},
    "input_stages": None,
    "input_stages_pattern": {},
    "layers_pattern": None,
    "layers_to_transform": None,
    "stages": None,
    "stages_pattern": {},
    "target_experts": None,
    "target_towers": False,
    "trainable_token_indices": None,
    "variant_pattern": {},
}

CHAIN_KEYS = ("stages", "stages_pattern")
INPUT_KEYS = ("input_stages", "input_stages_pattern")
EXPERTS_KEY = "target_experts"

PARAMETER = re.compile(r"base_model\.model\.(?P<module>.+)\.road_(?P<part>theta|alpha)", re.DOTALL)
# As they stand in a model's own state dict: without the prefix, or with the adapter's name at the end.
STRAY = re.compile(r"(.*\.)?road_(theta|alpha)(\.[^.]*)?", re.DOTALL)


def without_prefix(variant: Any) -> Any:
    """A variant's name as it stands in a file, without roadie's prefix; anything else as it is."""
    if not isinstance(variant, str):
        return variant
    return next((variant.removeprefix(prefix) for prefix in PREFIXES if variant.startswith(prefix)), variant)


def prefix_for(keys: Collection[str]) -> str:
    """What stands before the variant of a config with these keys; nothing where stock PEFT understands all of them."""
    if EXPERTS_KEY in keys:
        return EXPERTS_PREFIX
    if any(key in keys for key in INPUT_KEYS):
        return INPUT_PREFIX
    if any(key in keys for key in CHAIN_KEYS):
        return CHAIN_PREFIX
    return VARIANT_PREFIX if any(key in keys for key in EXTRA_DEFAULTS) else ""


def parameter_name(module: str, part: str) -> str:
    """The name in the file of `part` ("theta" or "alpha") of the layer at the path `module`."""
    return f"base_model.model.{module}.road_{part}"
