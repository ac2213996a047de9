"""A folder of adapters: a request for a name that is not loaded looks there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vllm.lora.request import LoRARequest
from vllm.lora.resolver import LoRAResolver, LoRAResolverRegistry

from roadie import checkpoint
from roadie.errors import ConfigError
from roadie.vllm.settings import KEY

NAME = "roadie"


class FolderResolver(LoRAResolver):
    """Adapters are folders right inside `folder`, known by their names."""

    def __init__(self, folder: str) -> None:
        self._folder = Path(folder)

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> Any:
        """A request for the RoAd adapter of that name, or None; vLLM gives it a number of its own.

        A name is never a path: it stands for a folder right inside, also where that is a link to elsewhere.
        """
        if not lora_name or lora_name.startswith(".") or any(sign in lora_name for sign in '/\\\0"'):
            return None
        path = self._folder / lora_name
        if not (path / checkpoint.CONFIG_NAME).is_file():
            return None
        return LoRARequest(lora_name=lora_name, lora_int_id=1, lora_path=str(path))


def look_in(folder: str) -> None:
    """From now on, servers of this process look for unknown names in `folder`; raises `ConfigError` where it is none."""
    if not Path(folder).is_dir():
        raise ConfigError(f"got {KEY}.adapters={folder!r}; wanted a folder; make it, or correct the path")
    LoRAResolverRegistry.register_resolver(NAME, FolderResolver(folder))
