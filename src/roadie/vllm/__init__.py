"""vLLM serves RoAd adapters: a plug-in, per request, many in one batch, without a fork.

    vllm serve MODEL --enable-lora --max-loras 64 --additional-config '{"roadie": true}'

    LLM(MODEL, **roadie.vllm.engine_arguments(64)).generate(prompts, lora_request=LoRARequest("legal", 1, "path/to/legal"))

vLLM finds `register` by its entry point (group ``vllm.general_plugins``) and calls it in every process. Engines that
were not asked for it by ``additional_config`` stay as they are, LoRA included.

How it works: vLLM's LoRA machinery carries a slot per token to the workers (`_token_lora_indices`, -1 for the base). An
engine for RoAd has layers of its own over vLLM's LoRA layers, which rotate what the base layer returns, and what it is
given where adapters do that: one operation of `roadie.kernels` each, each row by the rotations of its slot.
"""

from __future__ import annotations

from roadie.vllm.settings import KEY, Settings, engine_arguments

__all__ = ["KEY", "Settings", "engine_arguments", "register"]


def register() -> None:
    """Make vLLM able to serve RoAd adapters, in this process; what vLLM's entry point calls. Never raises.

    Where vLLM's version is not supported or a part of it has moved, nothing is changed, an error is logged, and
    RoAd adapters are refused with that reason.
    """
    from roadie.vllm.plugin import install

    install()
