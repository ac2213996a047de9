"""What a config targets: layers that cannot be adapted, and names that match nothing."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import peft
import pytest
import torch
import transformers
from tests.laws.models import linear_chain
from torch import Tensor, nn
from torch.nn import functional as F

import roadie
from roadie.errors import UnsupportedLayer
from roadie.testing import randomise, tiny_llama

IDS = torch.tensor([[5, 9, 12, 3, 8, 1], [4, 4, 17, 21, 2, 6]])
SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "pad_token_id": 0}
MOE = {"intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4}


def _mamba() -> Any:
    config = transformers.MambaConfig(**SMALL, state_size=8, time_step_rank=4, use_mambapy=False)
    return transformers.MambaForCausalLM(config)


def _falcon_mamba() -> Any:
    return transformers.FalconMambaForCausalLM(transformers.FalconMambaConfig(**SMALL, state_size=8, time_step_rank=4))


def _mamba2() -> Any:
    sizes = {"state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 4}
    return transformers.Mamba2ForCausalLM(transformers.Mamba2Config(**SMALL, **sizes))


def _wavlm() -> Any:
    conv = {"conv_dim": (16, 16), "conv_stride": (4, 4), "conv_kernel": (8, 8), "num_feat_extract_layers": 2}
    sizes = {"num_attention_heads": 4, "intermediate_size": 64, "num_labels": 4, "classifier_proj_size": 16}
    positions = {"num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2}
    config = transformers.WavLMConfig(**{**SMALL, "vocab_size": 32}, **conv, **sizes, **positions)
    return transformers.WavLMForSequenceClassification(config)


def _phimoe() -> Any:
    return transformers.PhimoeForCausalLM(transformers.PhimoeConfig(**SMALL, **MOE))


def _llama4() -> Any:
    config = transformers.Llama4TextConfig(**SMALL, **MOE, intermediate_size_mlp=64, head_dim=8)
    return transformers.Llama4ForCausalLM(config)


FAMILIES = {
    "mamba": (_mamba, "dt_proj", {"in_proj"}),
    "falcon_mamba": (_falcon_mamba, "dt_proj", {"in_proj"}),
    "mamba2": (_mamba2, "out_proj", {"in_proj"}),
    "wavlm": (
        _wavlm,
        "q_proj",
        {"intermediate_dense", "output_dense", "projection", "gru_rel_pos_linear", "projector", "classifier"},
    ),
    "phimoe": (_phimoe, "router", {"q_proj", "k_proj", "v_proj", "o_proj"}),
    "llama4": (
        _llama4,
        "router",
        {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
    ),
}


@pytest.fixture(params=FAMILIES)
def family(request: Any) -> Any:
    make, refused, adapted = FAMILIES[request.param]
    torch.manual_seed(0)
    return make().eval(), refused, adapted


def _logits(model: Any) -> Tensor:
    if hasattr(model, "wavlm") or "WavLM" in type(model.get_base_model()).__name__:
        return model(input_values=torch.randn(2, 400, generator=torch.Generator().manual_seed(0))).logits
    return model(input_ids=IDS).logits


def test_all_linear_adapts_what_is_called_and_says_what_it_leaves_out(family: Any, caplog: Any) -> None:
    base, refused, adapted = family
    model = roadie.get_peft_model(base, roadie.RoadConfig(target_modules="all-linear", group_size=2)).eval()
    model.base_model.set_kept_for_backward("input")  # Llama 4 changes an output in place
    randomise(model, scale=0.1)
    layers = {path.rpartition(".")[2] for path, m in model.named_modules() if isinstance(m, roadie.Linear)}
    assert layers == adapted
    (said,) = [record.getMessage() for record in caplog.records if record.name == "roadie"]
    assert refused in said
    output = _logits(model)
    output.pow(2).mean().backward()
    without = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not without
    with torch.no_grad():
        model.merge_adapter()
        merged = _logits(model)
    # Two products of float32 where there was one, layer by layer: hundreds of roundings of 2^-24 at most.
    assert (merged - output).abs().max() < 1000 * 2**-24 * output.abs().max()
    assert refused not in model.peft_config["default"].target_modules


def test_naming_what_is_left_out_is_refused_and_changes_nothing(family: Any) -> None:
    base, refused, adapted = family
    before = [(name, id(module)) for name, module in base.named_modules()]
    names = [refused, min(adapted)]
    with pytest.raises(UnsupportedLayer, match=rf"Target module .* is not supported\. At '.*{refused}'"):
        roadie.get_peft_model(base, roadie.RoadConfig(target_modules=names, group_size=2))
    assert [(name, id(module)) for name, module in base.named_modules()] == before
    assert not hasattr(base, "peft_config")
    roadie.get_peft_model(base, roadie.RoadConfig(target_modules=names, exclude_modules=[refused], group_size=2))


def test_all_linear_leaves_out_a_layer_whose_outputs_cannot_be_paired(caplog: Any) -> None:
    block = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    model = roadie.get_peft_model(block, roadie.RoadConfig(target_modules="all-linear", group_size=2))
    assert [path for path, m in model.named_modules() if isinstance(m, roadie.Linear)] == ["base_model.model.0"]
    assert "1: an odd number of outputs (1) cannot be paired" in caplog.text


def test_a_model_in_which_nothing_can_be_adapted_is_refused() -> None:
    with pytest.raises(ValueError, match="none of whose linear layers"):
        roadie.get_peft_model(nn.TransformerEncoderLayer(8, 2, 16), roadie.RoadConfig(target_modules="all-linear"))


def _applied(layer: nn.Module, x: Tensor) -> Tensor:
    """Reads a weight where no rule looks: the layer is an argument."""
    if layer.weight.dtype != x.dtype or layer.weight.shape[1] != x.shape[-1]:
        raise TypeError
    return F.linear(
        x,
        layer.weight,
    )


class _Hidden(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor, read: bool = True) -> Tensor:
        x = self.first(x)
        return _applied(self.second, x) if read else self.second(x) if self.second.weight.is_cuda is False else x


@pytest.fixture
def hidden() -> Any:
    model = roadie.get_peft_model(_Hidden(), roadie.RoadConfig(target_modules=["first", "second"], group_size=2))
    return randomise(model).eval()


def _warnings_of(call: Any) -> Iterator[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(warning.message) for warning in caught if "computes with the weight" in str(warning.message)]


def test_a_read_that_no_rule_finds_is_told_of_once_with_the_layer_and_the_place(hidden: Any) -> None:
    x = torch.randn(2, 8)
    (said,) = _warnings_of(lambda: (hidden(x), hidden(x)))
    assert "test_targets.py" in said
    assert "of second, which" in said
    hidden.base_model.model.second._told_of_reads = False
    assert len(_warnings_of(lambda: hidden(x, adapter_names=["default", "__base__"]))) == 1


def test_reads_that_change_nothing_are_not_told_of(hidden: Any) -> None:
    x, layer = torch.randn(2, 8), hidden.base_model.model.second
    assert not _warnings_of(lambda: hidden(x, read=False))  # called; its device was looked at
    assert not _warnings_of(lambda: layer.weight.clone())  # no forward runs
    with hidden.disable_adapter():
        assert not _warnings_of(lambda: hidden(x))
    hidden.merge_adapter()
    assert not _warnings_of(lambda: hidden(x))
    hidden.unmerge_adapter()
    hidden.add_adapter("other", roadie.RoadConfig(target_modules=["first"], group_size=2))
    hidden.set_adapter("other")
    assert not _warnings_of(lambda: hidden(x))


def test_models_that_look_at_dtypes_train_save_and_load_without_a_word(tmp_path: Any) -> None:
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0}
    t5 = transformers.T5ForConditionalGeneration(transformers.T5Config(vocab_size=64, **sizes))

    def work() -> None:
        model = roadie.get_peft_model(t5, roadie.RoadConfig(target_modules=["q", "wi", "wo"], group_size=2))
        model(input_ids=IDS, labels=IDS).loss.backward()
        model.save_pretrained(tmp_path)
        model.load_adapter(tmp_path, "again")
        model.resize_token_embeddings(70)
        model.merge_and_unload()

    assert not _warnings_of(work)


def test_a_compiled_model_may_look_at_a_dtype() -> None:
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "dropout_rate": 0.0}
    t5 = transformers.T5EncoderModel(transformers.T5Config(vocab_size=64, **sizes))
    model = randomise(roadie.get_peft_model(t5, roadie.RoadConfig(target_modules=["wi", "wo"], group_size=2)))
    block, x = model.base_model.model.encoder.block[0].layer[1].eval(), torch.randn(2, 3, 16)
    with torch.no_grad():
        assert torch.equal(torch.compile(block, fullgraph=True, backend="eager")(x), block(x))


def test_lora_beside_road_leaves_out_and_refuses_the_same_layers(caplog: Any) -> None:
    def model() -> Any:
        return roadie.get_peft_model(_mamba(), roadie.RoadConfig(target_modules=["in_proj"], group_size=2))

    both = roadie.add_lora(model(), peft.LoraConfig(r=2, target_modules="all-linear"), "low")
    lora = {path.rpartition(".lora_A")[0] for path, _ in both.named_parameters() if ".lora_A." in path}
    assert {path.rpartition(".")[2] for path in lora} == {"in_proj"}
    assert "dt_proj" in caplog.text
    other = model()
    before = [(name, id(module)) for name, module in other.named_modules()]
    with pytest.raises(UnsupportedLayer, match=r"LoRA beside RoAd, at 'backbone\.layers\.0\.mixer\.dt_proj'"):
        roadie.add_lora(other, peft.LoraConfig(r=2, target_modules=["in_proj", "dt_proj"]), "low")
    assert [(name, id(module)) for name, module in other.named_modules()] == before


def test_a_layer_that_gives_a_tuple_after_all_says_so() -> None:
    chain = linear_chain(8, 8, 8)
    model = roadie.get_peft_model(chain, roadie.RoadConfig(target_modules=["second"], group_size=2))
    layer = model.base_model.model.second.base_layer
    layer.forward = lambda x: (x, x)
    with pytest.raises(UnsupportedLayer, match="second: got a tuple of 2 from Linear; wanted a tensor"):
        model(torch.randn(2, 8))


def _said(model: Any, **settings: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        roadie.get_peft_model(model, roadie.RoadConfig(**settings))
    return [str(warning.message) for warning in caught if issubclass(warning.category, RuntimeWarning)]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (
            {"target_modules": ["q_proj", "v_prj"]},
            r"target_modules were ignored: 'v_prj' matches no module \(nearest: v_proj",
        ),
        ({"target_modules": ["q_proj", "mlp.up_prj"]}, r"'mlp.up_prj' .*nearest: mlp.up_proj"),
        ({"exclude_modules": ["k_proj", "kv_proj"]}, "exclude_modules were ignored: 'kv_proj' matches no module"),
        ({"modules_to_save": ["lm_head", "lm_hed"]}, "modules_to_save were ignored: 'lm_hed' matches no module"),
        ({"layers_to_transform": [1, 7]}, r"layers_to_transform do not exist .*: \[7\]. There are layers 0 to 1"),
        (
            {"layers_to_transform": [1], "layers_pattern": ["layers", "blocks"]},
            "layers_pattern matches nothing .*: 'blocks'",
        ),
    ],
)
def test_what_of_a_config_matches_nothing_is_named(settings: dict[str, Any], says: str) -> None:
    with pytest.warns(RuntimeWarning, match=says):
        roadie.get_peft_model(tiny_llama(), roadie.RoadConfig(**{"target_modules": ["q_proj", "k_proj"], **settings}))


def test_names_that_experts_had_elsewhere_are_told() -> None:
    mixtral = transformers.MixtralForCausalLM(transformers.MixtralConfig(**SMALL, **MOE))
    (said,) = _said(mixtral, target_modules=["q_proj", "w1", "w2"], group_size=2)
    assert "'w1' matches no module; 'w2' matches no module." in said
    assert "The experts of this model are parameters (model.layers.0.mlp.experts." in said


def test_names_of_experts_that_are_parameters_are_told() -> None:
    config = transformers.Qwen2MoeConfig(
        **SMALL, **{**MOE, "num_experts": 4}, moe_intermediate_size=16, shared_expert_intermediate_size=16
    )
    names = ["q_proj", "gate_proj", "down_proj", "gate_up_proj"]
    (said,) = _said(transformers.Qwen2MoeForCausalLM(config), target_modules=names, group_size=2)
    assert (
        "'gate_up_proj' is no module, but a parameter of many experts (model.layers.0.mlp.experts.gate_up_proj)" in said
    )
    assert "'down_proj' also names a parameter of many experts" in said
    assert "'gate_proj'" not in said


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj"], "task_type": "SEQ_CLS"},  # PEFT adds "classifier" and "score" itself
        {"target_modules": r".*\.(q|k)_proj"},
        {"target_modules": "all-linear"},
        {"target_modules": None},
        {"target_modules": ["q_proj"], "exclude_modules": ["k_proj"], "layers_to_transform": 1},
        {"target_modules": ["q_proj"], "modules_to_save": ["head"]},  # PEFT looks at ends of names here
    ],
    ids=str,
)
def test_what_matches_is_not_spoken_of(settings: dict[str, Any], caplog: Any) -> None:
    model = tiny_llama()
    if settings.get("task_type"):
        model = transformers.LlamaForSequenceClassification(model.config)
    assert not _said(model, group_size=2, **settings)
    assert not caplog.records


@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.parametrize("targets", [["q_proj"], "all-linear"], ids=str)
@pytest.mark.parametrize(("layers", "pattern"), [(1, None), ([1], "layers"), ([1], ["layers"])], ids=str)
def test_layers_are_found_in_whole_models_and_in_bare_ones(bare: bool, targets: Any, layers: Any, pattern: Any) -> None:
    model = tiny_llama().model if bare else tiny_llama()
    config = roadie.RoadConfig(target_modules=targets, layers_to_transform=layers, layers_pattern=pattern)
    adapted = roadie.get_peft_model(model, config)
    paths = {path for path, module in adapted.base_model.model.named_modules() if isinstance(module, roadie.Linear)}
    assert len(paths) == (1 if targets == ["q_proj"] else 7)
    assert all("layers.1." in path for path in paths)


def test_the_layer_is_the_first_number_of_a_path() -> None:
    """Also in a bare model, where it stands at the start of the path, and the experts are numbered too."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])

    bare = nn.ModuleDict({"layers": nn.ModuleList([Block(), Block()])})
    config = roadie.RoadConfig(target_modules=["1"], layers_to_transform=[0], group_size=2)
    adapted = roadie.get_peft_model(bare, config)
    paths = {path for path, module in adapted.base_model.model.named_modules() if isinstance(module, roadie.Linear)}
    assert paths == {"layers.0.experts.1"}
