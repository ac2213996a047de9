"""What of vLLM is touched or relied on, by name, and in which versions it was checked.

vLLM has no stable interface for this. So every name stands here, a test looks for all of them, and `missing` says which
are gone before anything is changed.
"""

from __future__ import annotations

import inspect
import os
import re
from pkgutil import resolve_name
from typing import NamedTuple

OLDEST, FIRST_UNKNOWN = (0, 32), (0, 34)
OVERRIDE = "ROADIE_VLLM_ANY_VERSION"


class Symbol(NamedTuple):
    """Something of vLLM: `module`, a dotted `name` in it; arguments that it must take; attributes its code must set."""

    module: str
    name: str
    takes: tuple[str, ...] = ()
    sets: tuple[str, ...] = ()


_LAYERS = "vllm.lora.layers"
_MANAGER = "vllm.lora.model_manager"
_WORKER = "vllm.lora.worker_manager"
_SERVING = "vllm.entrypoints.openai.models.serving"
_REQUEST = ("lora_name", "lora_int_id", "lora_path", "load_inplace", "base_model_name")

# What the plug-in replaces.
TOUCHED = (
    Symbol("vllm.v1.worker.lora_model_runner_mixin", "LRUCacheWorkerLoRAManager"),
    Symbol("vllm.v1.engine.input_processor", "InputProcessor.__init__", takes=("vllm_config",)),
    Symbol("vllm.v1.engine.llm_engine", "LLMEngine.add_request", takes=("lora_request",)),
    Symbol("vllm.v1.engine.llm_engine", "LLMEngine.add_lora", takes=("lora_request",)),
    Symbol("vllm.v1.engine.async_llm", "AsyncLLM.add_request", takes=("lora_request",)),
    Symbol("vllm.v1.engine.async_llm", "AsyncLLM.add_lora", takes=("lora_request",)),
    Symbol(_SERVING, "OpenAIServingModels._check_load_lora_adapter_request", takes=("request",)),
    Symbol(_SERVING, "OpenAIServingModels.unload_lora_adapter", takes=("request",)),
    Symbol(_SERVING, "OpenAIServingModels.resolve_lora", takes=("lora_name",)),
    Symbol("vllm.lora.utils", "_all_lora_classes"),
)

# What its own classes derive from and call.
RELIED_ON = (
    Symbol(_LAYERS, "ColumnParallelLinearWithLoRA.slice_lora_b", takes=("lora_b",)),
    Symbol(_LAYERS, "MergedColumnParallelLinearWithLoRA.slice_lora_b", takes=("lora_b",)),
    Symbol(_LAYERS, "QKVParallelLinearWithLoRA.slice_lora_b", takes=("lora_b",)),
    Symbol(_LAYERS, "MergedQKVParallelLinearWithLoRA.slice_lora_b", takes=("lora_b",)),
    Symbol(_LAYERS, "RowParallelLinearWithLoRA.slice_lora_b", takes=("lora_b",)),
    Symbol(_LAYERS, "ReplicatedLinearWithLoRA.slice_lora_b", takes=("lora_b",)),
    Symbol(_LAYERS, "MergedColumnParallelLinearWithLoRA", sets=("output_slices", "output_sizes", "n_slices")),
    Symbol(_LAYERS, "MergedQKVParallelLinearWithLoRA", sets=("output_slices", "q_shard_id", "kv_shard_id")),
    Symbol(_LAYERS, "QKVParallelLinearWithLoRA", sets=("q_proj_total_size", "kv_proj_total_size")),
    Symbol(f"{_LAYERS}.base_linear", "BaseLinearLayerWithLoRA", sets=("base_layer", "tp_size", "device", "input_size")),
    Symbol(f"{_LAYERS}.base_linear", "BaseLinearLayerWithLoRA._apply_lora_to_output", takes=("x", "output")),
    Symbol(f"{_LAYERS}.base_linear", "BaseLinearLayerWithLoRA.apply", takes=("x", "bias")),
    Symbol(_LAYERS, "RowParallelLinearWithLoRA.slice_lora_a", takes=("lora_a",)),
    Symbol(f"{_LAYERS}.base", "BaseLayerWithLoRA.create_lora_weights", takes=("max_loras", "lora_config")),
    Symbol(f"{_LAYERS}.base", "BaseLayerWithLoRA.set_lora", takes=("index", "lora_a", "lora_b")),
    Symbol(f"{_LAYERS}.base", "BaseLayerWithLoRA.reset_lora", takes=("index",)),
    Symbol(f"{_LAYERS}.base", "BaseLayerWithLoRA.set_mapping", takes=("punica_wrapper",)),
    Symbol("vllm.lora.punica_wrapper.punica_base", "PunicaWrapperBase", sets=("_token_lora_indices",)),
    Symbol("vllm.lora.lora_model", "LoRAModel", takes=("lora_model_id", "rank", "loras")),
    Symbol(
        _MANAGER, "LoRAModelManager", sets=("_registered_adapters", "_active_adapters", "modules", "packed_modules")
    ),
    Symbol(_MANAGER, "LoRAModelManager", sets=("supported_lora_modules", "supports_mm", "mm_mapping", "model")),
    Symbol(_MANAGER, "LoRAModelManager._create_lora_modules"),
    Symbol(_MANAGER, "LoRAModelManager._add_adapter", takes=("lora",)),
    Symbol(_MANAGER, "LoRAModelManager.create_dummy_lora", takes=("lora_id", "rank", "embedding_modules")),
    Symbol(_MANAGER, "LRUCacheLoRAModelManager.activate_adapter", takes=("lora_id",)),
    Symbol(_WORKER, "LRUCacheWorkerLoRAManager", sets=("_adapter_manager",)),
    Symbol(_WORKER, "LRUCacheWorkerLoRAManager.__init__", takes=("vllm_config", "device", "embedding_modules")),
    Symbol(_WORKER, "LRUCacheWorkerLoRAManager._apply_adapters", takes=("lora_requests",)),
    Symbol(_WORKER, "LRUCacheWorkerLoRAManager.add_adapter", takes=("lora_request",)),
    Symbol(_WORKER, "LRUCacheWorkerLoRAManager.create_lora_manager", takes=("model", "vllm_config")),
    Symbol(_WORKER, "WorkerLoRAManager._load_adapter", takes=("lora_request",)),
    Symbol(_WORKER, "WorkerLoRAManager._manager_cls"),
    Symbol("vllm.lora.request", "LoRARequest", takes=_REQUEST),
    Symbol(_SERVING, "OpenAIServingModels", sets=("lora_requests", "lora_id_counter", "base_model_paths")),
    Symbol("vllm.utils.cache", "LRUCache.touch", takes=("key",)),
    Symbol("vllm.model_executor.layers.linear", "LinearBase"),
    Symbol("vllm.model_executor.layers.linear", "ColumnParallelLinear", sets=("skip_bias_add", "output_size")),
    Symbol("vllm.model_executor.models.utils", "PPMissingLayer"),
    Symbol("vllm.exceptions", "VLLMValidationError", takes=("message",)),
    Symbol("vllm.entrypoints.serve", "create_error_response", takes=("message", "err_type", "status_code")),
    Symbol("vllm.config", "VllmConfig.additional_config"),
    Symbol("vllm.envs", "VLLM_LORA_ENABLE_DUAL_STREAM"),
)


def refusal() -> str | None:
    """Why this vLLM is not touched, or None where it may be; a version out of range can be allowed by `OVERRIDE`."""
    problem = _version_problem()
    if problem and not os.environ.get(OVERRIDE):
        return f"{problem}; set {OVERRIDE}=1 to try it all the same"
    gone = missing()
    return f"this vLLM lacks {'; '.join(gone)}; install vllm {_wanted()}" if gone else None


def _version_problem() -> str | None:
    from vllm import __version__ as version

    found = re.match(r"(\d+)\.(\d+)", str(version))
    if found and OLDEST <= (int(found[1]), int(found[2])) < FIRST_UNKNOWN:
        return None
    return f"got vLLM {version}; wanted {_wanted()}, which roadie's plug-in was made for"


def _wanted() -> str:
    oldest, unknown = (".".join(map(str, version)) for version in (OLDEST, FIRST_UNKNOWN))
    return f">={oldest},<{unknown}"


def missing(symbols: tuple[Symbol, ...] = (*TOUCHED, *RELIED_ON)) -> list[str]:
    """What of `symbols` this vLLM does not have, each with what is wrong."""
    problems = ((f"{symbol.module}:{symbol.name}", _problem(symbol)) for symbol in symbols)
    return [f"{name} ({problem})" for name, problem in problems if problem]


def _problem(symbol: Symbol) -> str | None:
    try:
        value = _found(symbol)
    except (ImportError, AttributeError) as error:
        return f"not found: {error}"
    absent = set(symbol.takes) - _parameters(value) if symbol.takes else set()
    if absent:
        return f"takes no {', '.join(sorted(absent))}"
    absent = {name for name in symbol.sets if not _sets(value, name)}
    return f"sets no {', '.join(sorted(absent))}" if absent else None


def _found(symbol: Symbol) -> object:
    value: object = resolve_name(f"{symbol.module}:")
    for part in symbol.name.split("."):
        fields = getattr(value, "__dataclass_fields__", {})
        value = fields[part] if part in fields else getattr(value, part)
    return value


def _parameters(value: object) -> set[str]:
    return set(inspect.signature(value).parameters) if callable(value) else set()


def _sets(value: object, name: str) -> bool:
    """Whether the code of a class, or of one that it derives from, assigns ``self.NAME``."""
    assert isinstance(value, type)
    own = [base for base in value.__mro__ if base.__module__.startswith("vllm.")]
    return any(re.search(rf"\bself\.{name}\b\s*(:[^=\n]+)?(\n\s*)?=", inspect.getsource(base)) for base in own)
