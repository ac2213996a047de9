"""What the files, keys and tensors of a checkpoint are called."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
MAX_CONFIG_BYTES = 1 << 20

VARIANT_PREFIX = "roadie:"
EXTRA_DEFAULTS: Mapping[str, Any] = {
    "adapt_group_size": False,
    "bias": "none",
    "exclude_modules": None,
    "group_size_pattern": {},
    "layers_pattern": None,
    "layers_to_transform": None,
    "trainable_token_indices": None,
    "variant_pattern": {},
}

PARAMETER = re.compile(r"base_model\.model\.(?P<module>.+)\.road_(?P<part>theta|alpha)", re.DOTALL)
# As they stand in a model's own state dict: without the prefix, or with the adapter's name at the end.
STRAY = re.compile(r"(.*\.)?road_(theta|alpha)(\.[^.]*)?", re.DOTALL)


def parameter_name(module: str, part: str) -> str:
    """The name in the file of `part` ("theta" or "alpha") of the layer at the path `module`."""
    return f"base_model.model.{module}.road_{part}"
