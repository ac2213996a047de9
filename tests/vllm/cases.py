"""A random Llama, adapters of every kind for it, and what float64 and PEFT say about the tokens that vLLM gives."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from roadie.testing.models import randomise, tiny_llama
from roadie.testing.rival import is_stock, stock_peft

VOCABULARY = 2048  # that of the embedded model's tokenizer
SIZES = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 256,
    "attention_bias": True,
    "mlp_bias": True,
    "initializer_range": 0.1,  # wide enough that tokens depend on what came before
}
ATTENTION, MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
EVERYWHERE = (*ATTENTION, *MLP)
# name -> variant, group size, targets: all variants, group sizes and kinds of target, packed layers whole and in part
KINDS: dict[str, tuple[str, int, tuple[str, ...]]] = {
    "all-1": ("road_1", 64, EVERYWHERE),
    "all-2": ("road_2", 64, EVERYWHERE),
    "all-4": ("road_4", 64, EVERYWHERE),
    "halves-1": ("road_1", 32, EVERYWHERE),
    "pairs-2": ("road_2", 2, EVERYWHERE),
    "sixteens-4": ("road_4", 16, ATTENTION),
    "q-1": ("road_1", 64, ("q_proj",)),
    "k-2": ("road_2", 64, ("k_proj",)),
    "v-4": ("road_4", 32, ("v_proj",)),
    "qv-1": ("road_1", 16, ("q_proj", "v_proj")),
    "o-2": ("road_2", 64, ("o_proj",)),
    "gate-4": ("road_4", 64, ("gate_proj",)),
    "up-1": ("road_1", 8, ("up_proj",)),
    "down-2": ("road_2", 64, ("down_proj",)),
    "mlp-4": ("road_4", 4, MLP),
}


def base_model(dtype: torch.dtype = torch.float32) -> Any:
    """The base: two layers, and biases everywhere, none of them 0."""
    model = tiny_llama(**SIZES)
    generator = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    return model.to(dtype).eval()


def deeper_model() -> Any:
    """As the base, with a layer more."""
    return tiny_llama(**SIZES, num_hidden_layers=3)


def write_base(folder: Path) -> Path:
    from roadie import embedded

    base_model().save_pretrained(folder)
    embedded.load_tokenizer().save_pretrained(folder)
    return folder


def write_adapter(
    folder: Path, variant: str, group_size: int, targets: Sequence[str], *, seed: int = 0, base: Any = None, **more: Any
) -> Path:
    """An adapter with random parameters, written by PEFT's own RoAd."""
    import peft

    with stock_peft() as config:
        model = peft.get_peft_model(
            base or base_model(),
            config(variant=variant, group_size=group_size, target_modules=list(targets), task_type="CAUSAL_LM", **more),
        )
        assert is_stock(model)
        randomise(model, seed=seed, scale=0.5).save_pretrained(folder)
    return folder


def write_kinds(folder: Path) -> dict[str, Path]:
    return {name: write_adapter(folder / name, *kind, seed=i) for i, (name, kind) in enumerate(KINDS.items())}


def write_many(folder: Path, number: int, targets: Sequence[str] = EVERYWHERE) -> list[Path]:
    """`number` different adapters of all variants, in PEFT's format; PEFT itself would take minutes."""
    from safetensors.torch import save_file

    from roadie.rotation import Variant, parameter_size

    outputs = {
        path: module.out_features for path, module in base_model().named_modules() if path.rpartition(".")[2] in targets
    }
    paths = []
    for i in range(number):
        generator = torch.Generator().manual_seed(1000 + i)
        variant, group_size = list(Variant)[i % 3], (64, 32, 2)[i // 3 % 3]
        tensors = {}
        for path, width in outputs.items():
            size, key = parameter_size(variant, width), f"base_model.model.{path}.road"
            tensors[f"{key}_theta"] = torch.randn(size, generator=generator) * 0.5
            tensors[f"{key}_alpha"] = 1 + torch.randn(size, generator=generator) * 0.5
        config = {"variant": variant.value, "group_size": group_size, "target_modules": list(targets)}
        paths.append(folder / f"many-{i:04}")
        paths[-1].mkdir(parents=True)
        text = json.dumps({"peft_type": "ROAD", **config, "task_type": "CAUSAL_LM", "inference_mode": True})
        (paths[-1] / "adapter_config.json").write_text(text)
        save_file(tensors, paths[-1] / "adapter_model.safetensors", metadata={"format": "pt"})
    return paths


def write_chains(folder: Path) -> list[Path]:
    """Adapters that PEFT's own RoAd does not know: rotations in a row, of inputs, of both, and of some layers alone."""
    configs: dict[str, dict[str, Any]] = {
        "row": {"stages": [2, 16, 64]},
        "inputs": {"group_size": 32, "input_stages": [64]},
        "both": {"stages": [64, 4], "input_stages": [8, 64], "variant": "road_2"},
        "some": {
            "group_size": 16,
            "stages_pattern": {"k_proj": [16, 16]},
            "input_stages_pattern": {"[vo]_proj": [2, 32]},
        },
    }
    for seed, (name, config) in enumerate(configs.items()):
        save_random(folder / name, config, seed=seed, scale=0.3)
    return [folder / name for name in configs]


def save_random(folder: Path, config: Mapping[str, Any], *, seed: int, scale: float) -> Path:
    """An adapter of all linear layers whose angles, and factors around 1, are spread by `scale`, written by roadie."""
    from roadie import checkpoint
    from roadie.adapter import INPUT_SUFFIX, Adapter, LayerParameters, resolve_layer, rotates_input
    from roadie.rotation import parameter_size

    generator, layers = torch.Generator().manual_seed(seed), {}
    config = {"peft_type": "ROAD", "variant": "road_1", "target_modules": list(EVERYWHERE), **config}
    for path, module in base_model().named_modules():
        if path.rpartition(".")[2] in EVERYWHERE:
            sites = {path: module.out_features}
            if rotates_input(config, path):
                sites[f"{path}{INPUT_SUFFIX}"] = module.in_features
            for site, width in sites.items():
                variant, stages = resolve_layer(config, site, width)
                size = len(stages) * parameter_size(variant, width)
                theta, alpha = torch.randn(2, size, generator=generator) * scale
                layers[site] = LayerParameters(theta, 1 + alpha.clamp(-0.9, 0.9), variant, stages)
    checkpoint.save(Adapter(layers, config), folder)
    return folder


@dataclass(frozen=True)
class Generated:
    """One answer of vLLM's, and the adapter that was asked for (None: the base), or those of a blend with their weights."""

    adapter: Path | tuple[tuple[Path, float], ...] | None
    prompt: tuple[int, ...]
    tokens: tuple[int, ...]


@dataclass
class Verdict:
    """How tokens compare with float64's favourites: `ties` are others within the rounding bound, `wrong` all others."""

    tokens: int = 0
    ties: int = 0
    wrong: int = 0
    like_base: int = 0  # answers that the base would have given too
    answers: int = 0

    def __str__(self) -> str:
        return (
            f"{self.tokens} tokens of {self.answers} answers: {self.wrong} wrong, {self.ties} ties; "
            f"{self.like_base} answers are the base's too"
        )


def judged(answers: Sequence[Generated]) -> Verdict:
    """Each token against the logits of PEFT's own RoAd, in float64, given the same prefix.

    A token may be another one than the favourite where its logit is closer to the favourite's than twice the largest error
    that a plain float32 forward of transformers makes on the same sequence: each of the two logits may be off by that.
    """
    verdict = Verdict()
    by_adapter: dict[Any, list[Generated]] = {}
    for answer in answers:
        by_adapter.setdefault(answer.adapter, []).append(answer)
    base = base_model(torch.float64)
    for adapter, group in by_adapter.items():
        exact, plain = adapted(adapter, torch.float64), adapted(adapter, torch.float32)
        for answer in group:
            _judge(verdict, answer, _logits(exact, answer), _logits(plain, answer))
            verdict.like_base += _favourites(_logits(base, answer)) == list(answer.tokens)
    return verdict


def judged_by_bank(answers: Sequence[Generated]) -> Verdict:
    """As `judged`, by roadie's own bank: for more adapters than PEFT loads in a test's time, and what PEFT does not know."""
    from roadie.bank import AdapterBank

    wishes = [_weights(answer.adapter) for answer in answers]
    adapters = sorted({path for wish in wishes for path in wish})
    verdict, banks = Verdict(), []
    for dtype in (torch.float64, torch.float32):
        banks.append(AdapterBank(base_model(dtype), slots=len(adapters) + 1, dtype=dtype))
        for adapter in adapters:
            banks[-1].admit(adapter.name, adapter)
    for answer, wish in zip(answers, wishes, strict=True):
        rows = [{path.name: weight for path, weight in wish.items()}]
        logits = []
        for bank in banks:
            with bank.rows(rows):
                logits.append(_logits(bank.model, answer))
        _judge(verdict, answer, *logits)
        with banks[0].rows([None]):
            verdict.like_base += _favourites(_logits(banks[0].model, answer)) == list(answer.tokens)
    return verdict


def _weights(adapter: Any) -> dict[Path, float]:
    return {} if adapter is None else {adapter: 1.0} if isinstance(adapter, Path) else dict(adapter)


def adapted(adapter: Path | None, dtype: torch.dtype) -> Any:
    """The base with an adapter, by PEFT alone."""
    import peft

    base = base_model(dtype)
    if adapter is None:
        return base
    with stock_peft():
        model = peft.PeftModel.from_pretrained(base, adapter, autocast_adapter_dtype=False)
        assert is_stock(model)
        return model.to(dtype).eval()


def _logits(model: Any, answer: Generated) -> torch.Tensor:
    """``[tokens, vocabulary]``, float64: what came before each of the answer's tokens decides its row."""
    sequence = torch.tensor([[*answer.prompt, *answer.tokens]])
    with torch.no_grad():
        return model(sequence).logits[0, len(answer.prompt) - 1 : -1].double()


def _favourites(logits: torch.Tensor) -> list[int]:
    return logits.argmax(-1).tolist()


def _judge(verdict: Verdict, answer: Generated, exact: torch.Tensor, plain: torch.Tensor) -> None:
    bound = 2 * (exact - plain).abs().max().item()
    verdict.answers += 1
    for row, token in zip(exact, answer.tokens, strict=True):
        behind = (row.max() - row[token]).item()
        verdict.tokens += 1
        verdict.ties += 0 < behind <= bound
        verdict.wrong += behind > bound


def engine_settings(
    base: Path, num_slots: int | None, *, road: Mapping[str, Any] | None = None, **more: Any
) -> dict[str, Any]:
    """Arguments of `vllm.LLM` for the random Llama, in float32, on a CPU; num_slots None: an engine that is not for RoAd."""
    import roadie.vllm

    for_road = {} if num_slots is None else roadie.vllm.engine_arguments(num_slots, **(road or {}))
    return {
        "model": str(base),
        "dtype": "float32",
        "skip_tokenizer_init": True,
        "max_model_len": 128,
        "enforce_eager": True,
        "block_size": 32,
        "seed": 0,
        "disable_log_stats": False,
        **for_road,
        **more,
    }


@contextmanager
def engine(base: Path, num_slots: int | None, **more: Any) -> Iterator[Any]:
    """A running `vllm.LLM`, shut down at the end."""
    from vllm import LLM

    llm = LLM(**engine_settings(base, num_slots, **more))
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()


class Requests:
    """LoRARequests by path: the same number for the same adapter, as users of vLLM number them."""

    def __init__(self) -> None:
        self._numbers: dict[Path, int] = {}

    def __call__(self, adapter: Path | None, **more: Any) -> Any:
        from vllm.lora.request import LoRARequest

        if adapter is None:
            return None
        number = self._numbers.setdefault(adapter, len(self._numbers) + 1)
        return LoRARequest(adapter.name, number, str(adapter), **more)


def greedy(tokens: int) -> Any:
    from vllm import SamplingParams

    return SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)


def generate(llm: Any, requests: Requests, wanted: Sequence[Path | None], *, tokens: int = 12) -> list[Generated]:
    """One call of vLLM, one prompt for each of `wanted`, greedy."""
    prompts = [prompt(i) for i in range(len(wanted))]
    outputs = llm.generate(
        [{"prompt_token_ids": list(each)} for each in prompts],
        greedy(tokens),
        lora_request=[requests(adapter) for adapter in wanted],
        use_tqdm=False,
    )
    return [
        Generated(adapter, each, tuple(output.outputs[0].token_ids))
        for adapter, each, output in zip(wanted, prompts, outputs, strict=True)
    ]


def prompt(seed: int) -> tuple[int, ...]:
    """5 to 40 tokens."""
    generator = torch.Generator().manual_seed(seed)
    length = int(torch.randint(5, 41, (), generator=generator))
    return tuple(torch.randint(1, VOCABULARY, (length,), generator=generator).tolist())


def mixture(kinds: Mapping[str, Path], repeats: int) -> list[Path | None]:
    """Each adapter and the base, `repeats` times, in an order that neither groups nor sorts them."""
    return [*kinds.values(), None] * repeats
