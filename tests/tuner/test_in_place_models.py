"""Models whose code changes an adapted layer's output in place are trained as any other, however backward gets what it saved."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytest
import torch
import transformers
from tests.laws.bounds import assert_within
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu

import roadie
from roadie.errors import InPlaceError
from roadie.testing import randomise
from roadie.testing.accuracy import assert_same_bits, unit_roundoff
from roadie.tuner import RoadLayer

SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def falcon(hidden_dropout: float) -> nn.Module:
    """``mlp_output += attention_output``."""
    return transformers.FalconForCausalLM(transformers.FalconConfig(**SMALL, **IDS, hidden_dropout=hidden_dropout))


def led() -> nn.Module:
    """``query_vectors /= math.sqrt(head_dim)``."""
    halves = {f"{half}_{name}": size for half in ("encoder", "decoder") for name, size in _HALF.items()}
    return transformers.LEDForConditionalGeneration(
        transformers.LEDConfig(
            vocab_size=64,
            d_model=32,
            **halves,
            **IDS,
            attention_window=4,
            decoder_start_token_id=2,
            max_encoder_position_embeddings=64,
            max_decoder_position_embeddings=64,
        )
    )


_HALF = {"layers": 1, "attention_heads": 4, "ffn_dim": 64}


def longformer() -> nn.Module:
    """The same, for tokens with global attention too."""
    config = transformers.LongformerConfig(
        **SMALL, **IDS, intermediate_size=64, attention_window=4, max_position_embeddings=64
    )
    return transformers.LongformerForMaskedLM(config)


def deberta() -> nn.Module:
    """``pos_query_layer /= scale``, of a view of the layer's output."""
    config = transformers.DebertaConfig(
        **SMALL, intermediate_size=64, relative_attention=True, max_position_embeddings=64, pos_att_type=["c2p", "p2c"]
    )
    return transformers.DebertaForMaskedLM(config)


def llama4() -> nn.Module:
    """``out.add_(routed_out)``, of what the shared expert returned."""
    config = transformers.Llama4TextConfig(
        **SMALL,
        **IDS,
        intermediate_size=64,
        intermediate_size_mlp=64,
        num_key_value_heads=2,
        num_local_experts=2,
        head_dim=8,
        moe_layers=[0, 1],
    )
    return transformers.Llama4ForCausalLM(config)


def tokens(batch: int = 3, length: int = 8) -> Tensor:
    return torch.randint(3, 60, (batch, length), generator=torch.Generator().manual_seed(batch))


def globally_attended() -> Tensor:
    return (torch.arange(8) == 0).long().repeat(3, 1)


FAMILIES: dict[str, tuple[Callable[[], nn.Module], dict[str, Tensor]]] = {
    "Falcon": (lambda: falcon(0.0), {}),
    "Falcon with dropout": (lambda: falcon(0.1), {}),
    "LED": (led, {"decoder_input_ids": tokens(3, 4)}),
    "Longformer": (longformer, {"global_attention_mask": globally_attended()}),
    "DeBERTa": (deberta, {}),
    "Llama 4": (llama4, {}),
}
TARGETS = {"Llama 4": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]}
every_family = pytest.mark.parametrize("family", FAMILIES)
SAVING = ["by torch", "on the CPU", "recomputed", "recomputed with re-entry", "recomputed, on the CPU"]


def adapted(family: str, kept: str) -> Any:
    torch.manual_seed(0)
    config = roadie.RoadConfig(group_size=4, target_modules=TARGETS.get(family, "all-linear"))
    model = randomise(roadie.get_peft_model(FAMILIES[family][0]().double(), config), scale=0.3)
    model.base_model.set_kept_for_backward(kept)
    return model.train()


def gradients(model: Any, family: str, saving: str) -> dict[str, Tensor]:
    if saving.startswith("recomputed"):
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": saving == "recomputed with re-entry"})
    hooks: AbstractContextManager[Any] = save_on_cpu() if saving.endswith("on the CPU") else nullcontext()
    torch.manual_seed(1)  # of dropout
    with hooks:
        model(input_ids=tokens(), **FAMILIES[family][1]).logits.pow(2).mean().backward()
    return {name: p.grad for name, p in sorted(model.named_parameters()) if "road_" in name and p.grad is not None}


@contextmanager
def sizes_of_terms(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """``sum of |g| |z|`` by layer: what bounds the terms of a layer's gradients, whose g and z are those of its outputs."""
    sizes: dict[str, Tensor] = {}

    def seen(path: str, z: Tensor) -> None:
        norm = z.detach().norm()
        z.register_hook(lambda g: sizes.__setitem__(path, sizes.get(path, torch.zeros(())) + norm * g.norm()))

    layers = {path: layer for path, layer in model.named_modules() if isinstance(layer, RoadLayer)}
    handles = [layer.register_forward_hook(lambda _, __, z, path=path: seen(path, z)) for path, layer in layers.items()]
    yield sizes
    for handle in handles:
        handle.remove()


def assert_right(got: dict[str, Tensor], family: str) -> None:
    """Equal to the gradients with inputs kept and nothing recomputed.

    A term of a gradient is g z or g (J z), over alpha for dL/dalpha; a dozen roundings go into it, and one for each of the
    tokens that are summed; by Cauchy and Schwarz the terms of a layer sum up to ``|g| |z|`` at most.
    """
    reference = adapted(family, "input")
    with sizes_of_terms(reference) as sizes:
        wanted = gradients(reference, family, "by torch")
    assert list(got) == list(wanted)
    alphas = [p.detach().abs().min() for name, p in reference.named_parameters() if "road_alpha" in name]
    roundings = 2 * (tokens().numel() + 12) * unit_roundoff(torch.float64) / float(min(1.0, *alphas))
    for name, gradient in got.items():
        bound = roundings * sizes[name.partition(".road_")[0]]
        assert_within(gradient, wanted[name], bound.expand_as(gradient), name)


@pytest.mark.slow
@pytest.mark.parametrize("saving", SAVING)
@every_family
def test_gradients_are_those_of_kept_inputs(family: str, saving: str) -> None:
    assert_right(gradients(adapted(family, "auto"), family, saving), family)


@pytest.mark.slow
@pytest.mark.parametrize("saving", SAVING)
@every_family
def test_an_output_that_was_asked_for_is_not_changed_in_silence(family: str, saving: str) -> None:
    model = adapted(family, "output")
    if saving in ("recomputed", "recomputed, on the CPU") and family in ("Falcon", "Llama 4"):
        assert_right(gradients(model, family, saving), family)  # a second forward ends before it comes to the change
        return
    with pytest.raises(InPlaceError, match="set_kept_for_backward"):
        gradients(model, family, saving)


@pytest.mark.parametrize("saving", SAVING[1:])
@pytest.mark.parametrize("kept", ["auto", "output", "input"])
def test_a_model_that_changes_nothing_in_place_is_not_refused(kept: str, saving: str) -> None:
    """The same computation, so the same bits."""

    def run(saving: str) -> dict[str, Tensor]:
        model = roadie.testing.tiny_llama(num_hidden_layers=2, attention_dropout=0.1, use_cache=False)
        model = randomise(roadie.get_peft_model(model, roadie.RoadConfig(group_size=4, target_modules="all-linear")))
        model.base_model.set_kept_for_backward(kept)
        return gradients(model.train(), "Falcon", saving)

    wanted, got = run("by torch"), run(saving)
    assert wanted
    for name, gradient in got.items():
        assert_same_bits(gradient, wanted[name], name)
