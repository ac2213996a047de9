"""vLLM's throughput with 64 RoAd adapters, with 64 LoRA adapters, and without any; in vLLM's own environment (make test-vllm).

    python -m benchmarks.vllm_throughput                    a Llama of 160M random parameters, on whatever vLLM runs on here
    python -m benchmarks.vllm_throughput --rounds 2 --quick  two rounds of a small one, to see that it runs

Three engines stand side by side, each in processes of its own and none of them compiled (with LoRA, vLLM does not compile on
CPUs). In each round every engine serves the same 64 prompts, one after the other, so that drift hits all alike. Adapters are
loaded before. Prints the ratios, and writes ``benchmarks/results/<machine>/vllm-<commit>.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks import record
from benchmarks.machine import commit, cores, machine_name, now, processor
from benchmarks.statistics import median_ratio
from roadie.rotation import parameter_size
from roadie.vllm import engine_arguments

NUM_ADAPTERS, LORA_RANK = 64, 8
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Load:
    """What each engine serves in a round: one request an adapter, all submitted at once."""

    prompt_tokens: int = 16
    new_tokens: int = 32


def llama(folder: Path, *, small: bool) -> dict[str, tuple[int, int]]:
    """Writes a random Llama of 160M parameters; gives (inputs, outputs) of its linear layers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12}
    if small:
        sizes |= {"intermediate_size": 1024, "num_hidden_layers": 2}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=32000, max_position_embeddings=256))
    model.save_pretrained(folder)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.0f} million parameters")
    named = model.named_modules()
    return {path: (m.in_features, m.out_features) for path, m in named if path.rpartition(".")[2] in TARGETS}


def write_road(folder: Path, layers: dict[str, tuple[int, int]], seed: int) -> None:
    """A random adapter: road_1, groups of 64, all linear layers."""
    generator, tensors = torch.Generator().manual_seed(seed), {}
    for path, (_, outputs) in layers.items():
        size = parameter_size("road_1", outputs)
        tensors[f"base_model.model.{path}.road_theta"] = torch.randn(size, generator=generator) * 0.1
        tensors[f"base_model.model.{path}.road_alpha"] = torch.ones(size)
    _write(folder, {"peft_type": "ROAD", "variant": "road_1", "group_size": 64}, tensors)


def write_lora(folder: Path, layers: dict[str, tuple[int, int]], seed: int) -> None:
    """A random adapter: LoRA of rank 8, all linear layers."""
    generator, tensors = torch.Generator().manual_seed(seed), {}
    for path, (inputs, outputs) in layers.items():
        tensors[f"base_model.model.{path}.lora_A.weight"] = torch.randn(LORA_RANK, inputs, generator=generator) * 0.02
        tensors[f"base_model.model.{path}.lora_B.weight"] = torch.randn(outputs, LORA_RANK, generator=generator) * 0.02
    _write(folder, {"peft_type": "LORA", "r": LORA_RANK, "lora_alpha": LORA_RANK, "bias": "none"}, tensors)


def _write(folder: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    folder.mkdir(parents=True)
    config = {**config, "target_modules": list(TARGETS), "task_type": "CAUSAL_LM", "inference_mode": True}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def engine(base: Path, load: Load, **more: Any) -> Any:
    """A running engine of the model, in float32 on a CPU and bfloat16 on a GPU."""
    from vllm import LLM

    dtype = "bfloat16" if torch.cuda.is_available() else "float32"
    return LLM(
        model=str(base),
        dtype=dtype,
        skip_tokenizer_init=True,
        enforce_eager=True,
        enable_prefix_caching=False,
        max_model_len=max(64, load.prompt_tokens + load.new_tokens),
        max_num_seqs=NUM_ADAPTERS,
        **more,
    )


def requests(folder: Path) -> list[Any]:
    from vllm.lora.request import LoRARequest

    return [LoRARequest(path.name, i + 1, str(path)) for i, path in enumerate(sorted(folder.iterdir()))]


def runner(llm: Any, adapters: Sequence[Any], load: Load) -> Callable[[], float]:
    """A function that serves one round and gives its seconds; the adapters are loaded now."""
    from vllm import SamplingParams

    for adapter in adapters:
        llm.llm_engine.add_lora(adapter)
    prompts = [
        {"prompt_token_ids": [(7 * i + j) % 31000 + 1 for j in range(load.prompt_tokens)]} for i in range(NUM_ADAPTERS)
    ]
    sampling = SamplingParams(temperature=0, max_tokens=load.new_tokens, ignore_eos=True, detokenize=False)

    def serve() -> float:
        start = time.perf_counter()
        outputs = llm.generate(prompts, sampling, lora_request=list(adapters) or None, use_tqdm=False)
        seconds = time.perf_counter() - start
        assert all(len(output.outputs[0].token_ids) == load.new_tokens for output in outputs)
        return seconds

    return serve


def measured(base: Path, adapters: Path, load: Load, num_rounds: int) -> dict[str, list[float]]:
    """Seconds of each round, by what was served."""
    plain = engine(base, load)
    road = engine(base, load, **engine_arguments(NUM_ADAPTERS))
    lora = engine(base, load, enable_lora=True, max_loras=NUM_ADAPTERS, max_lora_rank=LORA_RANK)
    runs = {
        "base": runner(plain, (), load),
        "roadie, 64 adapters": runner(road, requests(adapters / "road"), load),
        "roadie, base rows": runner(road, (), load),
        "LoRA r=8, 64 adapters": runner(lora, requests(adapters / "lora"), load),
        "LoRA r=8, base rows": runner(lora, (), load),
    }
    for run in runs.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(num_rounds):
        for name, run in runs.items():
            seconds[name].append(run())
    return seconds


def shown(seconds: dict[str, list[float]], load: Load) -> dict[str, dict[str, Any]]:
    """Throughput of each, and its ratio to the base's, round by round; printed on the way."""
    entries, tokens = {}, NUM_ADAPTERS * load.new_tokens
    for name, times in seconds.items():
        ratio = median_ratio(seconds["base"], times)
        entries[name] = {"seconds": times, "tokens_per_s": tokens / sorted(times)[len(times) // 2], "of_base": ratio}
        print(
            f"{name:24} {entries[name]['tokens_per_s']:8.1f} tokens/s, {ratio['value']:.3f} of the base"
            f" ({ratio['low']:.3f} to {ratio['high']:.3f})"
        )
    of_lora = median_ratio(seconds["LoRA r=8, 64 adapters"], seconds["roadie, 64 adapters"])
    print(f"64 RoAd adapters against 64 of LoRA: {of_lora['value']:.2f} times the throughput")
    entries["roadie, 64 adapters"]["of_lora"] = of_lora
    return entries


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="a small model; no record")
    arguments = parser.parse_args()
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    load = Load()
    with tempfile.TemporaryDirectory() as folder:
        base, adapters = Path(folder) / "base", Path(folder) / "adapters"
        layers = llama(base, small=arguments.quick)
        for i in range(NUM_ADAPTERS):
            write_road(adapters / "road" / f"road-{i:02}", layers, i)
            write_lora(adapters / "lora" / f"lora-{i:02}", layers, i)
        entries = shown(measured(base, adapters, load, arguments.rounds), load)
    if arguments.quick:
        return
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else processor()
    name = machine_name("cuda" if torch.cuda.is_available() else "cpu")
    made = {
        "benchmark": "vllm_throughput",
        "date": now(),
        **commit(),
        "device": device,
        "cores": cores(),
        "versions": {library: version(library) for library in ("torch", "transformers")} | {"vllm": _vllm_version()},
        "load": {**asdict(load), "requests": NUM_ADAPTERS, "model": "Llama, 160M random parameters"},
        "entries": entries,
    }
    print(record.write(made, record.RESULTS / name / f"vllm-{made['commit']}.json"))


def _vllm_version() -> str:
    import vllm

    return str(vllm.__version__)


if __name__ == "__main__":
    main()
