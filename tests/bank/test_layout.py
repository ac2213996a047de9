"""Rows of models whose layers do not have them in front: right where all tokens lie flat, refused where nobody can tell."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import roadie
from roadie.bank.families import AdaptedLayer
from roadie.bank.trainable import TrainableBank
from roadie.errors import RoutingError
from roadie.rotation import Variant
from roadie.testing import randomise, tiny_llama

NAMES = ["a", "b"]
SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 0}
MOE = {"num_key_value_heads": 2, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}


def _opt() -> Any:
    return transformers.OPTForCausalLM(transformers.OPTConfig(**SMALL, ffn_dim=64, word_embed_proj_dim=32, dropout=0.0))


def _qwen2_moe() -> Any:
    config = transformers.Qwen2MoeConfig(**SMALL, **MOE, intermediate_size=64, shared_expert_intermediate_size=64)
    return transformers.Qwen2MoeForCausalLM(config)


def _qwen3_next() -> Any:
    linear = {
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    }
    kinds = {"layer_types": ["linear_attention", "full_attention"], "intermediate_size": 64}
    config = transformers.Qwen3NextConfig(**SMALL, **MOE, **linear, **kinds, shared_expert_intermediate_size=64)
    return transformers.Qwen3NextForCausalLM(config)


FLAT: dict[str, tuple[Callable[[], Any], Any]] = {
    "opt": (_opt, "all-linear"),
    "qwen2_moe": (_qwen2_moe, ["gate_proj", "down_proj", "v_proj"]),
    "qwen3_next": (_qwen3_next, ["gate_proj", "down_proj", "v_proj"]),
}


def _config(targets: Any) -> roadie.RoadConfig:
    return roadie.RoadConfig(group_size=4, target_modules=targets)


def _adapted(base: Any, targets: Any) -> Any:
    model = roadie.get_peft_model(base, _config(targets), adapter_name=NAMES[0])
    for name in NAMES[1:]:
        model.add_adapter(name, _config(targets))
    for seed, name in enumerate(NAMES):
        randomise(model, seed=seed, adapter=name)
    return model.eval()


def _model(family: str) -> Any:
    make, targets = FLAT[family]
    torch.manual_seed(0)
    return _adapted(make(), targets)


def _prompts(rows: int, tokens: int) -> Tensor:
    return torch.randint(1, 60, (rows, tokens), generator=torch.Generator().manual_seed(rows * 100 + tokens))


def _alone(model: Any, wish: str | None, call: Callable[[], Tensor]) -> Tensor:
    if wish is None:
        with model.disable_adapter():
            return call()
    active = model.active_adapter
    model.set_adapter(wish)
    try:
        return call()
    finally:
        model.set_adapter(active)


def _by_row(model: Any, wishes: list[str | None], call: Callable[[], Tensor]) -> Tensor:
    """Each row of a batch from a run of the whole batch through its adapter alone."""
    runs = {wish: _alone(model, wish, call) for wish in dict.fromkeys(wishes)}
    return torch.stack([runs[wish][row] for row, wish in enumerate(wishes)])


def _slots(wishes: list[str | None]) -> Tensor:
    return torch.tensor([-1 if wish is None else NAMES.index(wish) for wish in wishes])


def _bank_of(model: Any) -> roadie.AdapterBank:
    """The same adapters in a bank, on the base model without PEFT."""
    base = copy.deepcopy(model).unload()
    bank = roadie.AdapterBank(base, slots=4)
    for name in NAMES:
        bank.admit(name, (model, name))
    return bank


def _ways(
    model: Any, bank: roadie.AdapterBank, wishes: list[str | None], tokens: int
) -> list[tuple[Any, AbstractContextManager[None]]]:
    """Every way to say which rows use what: who is called, and within what."""
    slots, in_bank = _slots(wishes), bank.slots(wishes)
    of_tokens, in_bank_of_tokens = (each[:, None].expand(-1, tokens).contiguous() for each in (slots, in_bank))
    return [
        (model, roadie.rows(model, ["__base__" if wish is None else wish for wish in wishes])),
        (model, roadie.rows(model, slots)),
        (model, roadie.rows(model, of_tokens)),
        (bank.model, bank.rows(in_bank)),
        (bank.model, bank.rows(in_bank_of_tokens)),
    ]


def _close(got: Tensor, wanted: Tensor, apart: Tensor) -> None:
    """A row in another adapter is off by about `apart`; the order of sums moves a thousand times less."""
    assert got.shape == wanted.shape
    assert float((got - wanted).abs().max()) < 1e-3 * float(apart.abs().max())


@pytest.mark.parametrize("tokens", [6, 3, 1])  # 3: as many as rows
@pytest.mark.parametrize("family", list(FLAT))
def test_flat_tokens_get_the_adapter_of_their_row(family: str, tokens: int) -> None:
    model, wishes, prompts = _model(family), ["a", None, "b"], _prompts(3, tokens)
    bank = _bank_of(model)

    def call() -> Tensor:
        with torch.no_grad():
            logits: Tensor = model(input_ids=prompts).logits
        return logits

    wanted, apart = _by_row(model, wishes, call), _alone(model, "a", call) - _alone(model, "b", call)
    for called, rows in _ways(model, bank, wishes, tokens):
        with rows, torch.no_grad():
            got = called(input_ids=prompts).logits
        _close(got, wanted, apart)
    got = model(input_ids=prompts, adapter_names=["a", "__base__", "b"]).logits
    _close(got.detach(), wanted, apart)


@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}])
def test_flat_tokens_in_generation(settings: dict[str, Any]) -> None:
    model, wishes = _model("opt"), ["b", None, "a"]
    prompts, mask = _prompts(3, 5), torch.ones(3, 5, dtype=torch.int64)
    prompts[0, :2] = mask[0, :2] = 0  # padded on the left
    copies = settings.get("num_return_sequences", 1)

    def call(**extra: Any) -> Tensor:
        torch.manual_seed(0)
        made = {"max_new_tokens": 5, "eos_token_id": None, **settings, **extra}
        tokens: Tensor = model.generate(input_ids=prompts, attention_mask=mask, **made)
        return tokens.unflatten(0, (3, copies))

    wanted = _by_row(model, wishes, call)
    assert not torch.equal(wanted, _alone(model, None, call))
    assert torch.equal(call(adapter_names=["b", "__base__", "a"]), wanted)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_flat_tokens_train_their_own_adapter(checkpointing: bool) -> None:
    model, prompts = _model("opt").double(), _prompts(3, 5)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("road_" in name)
    wanted = _gradients_row_by_row(model, prompts, ["a", "b", "a"])
    model.train()
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    with roadie.rows(model, ["a", "b", "a"]):
        losses = [_loss(model, rows) for rows in (prompts, _prompts(3, 2))]  # of other lengths, and then one backward
        (losses[0] + 0 * losses[1]).backward()
    for name, gradient in _gradients(model).items():
        # Of float64, whose sums are of some hundred terms; another row's adapter changes a gradient as much as it is.
        assert float((gradient - wanted[name]).abs().max()) <= 1e-10 * float(wanted[name].abs().max()), name


def _loss(model: Any, prompts: Tensor) -> Tensor:
    loss: Tensor = model(input_ids=prompts).logits.double().square().sum()
    return loss


def _gradients(model: Any) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def _gradients_row_by_row(model: Any, prompts: Tensor, wishes: list[str]) -> dict[str, Tensor]:
    for row, wish in enumerate(wishes):
        with roadie.rows(model, [wish]):
            _loss(model, prompts[row : row + 1]).backward()
    found = _gradients(model)
    model.zero_grad()
    return found


class Toy(nn.Module):
    """Embeddings, something in between, and a layer that is not adapted."""

    def __init__(self, middle: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.middle, self.out = nn.Embedding(64, 16), middle, nn.Linear(16, 64)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.out(self.middle(self.embed(input_ids)))


class SequenceFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(x.transpose(0, 1)).transpose(0, 1)


class Flat(nn.Module):
    """Tokens flat, but column by column: the first tokens of all rows, then the second ones."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x.transpose(0, 1).reshape(-1, 16))
        return y.view(x.shape[1], x.shape[0], 16).transpose(0, 1)


class Experts(nn.Module):
    """Each expert is given the tokens of even or odd rows' ids, the last ones first: as many as rows, or all, by chance."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.add_module(name, nn.ModuleList([nn.Linear(16, 16), nn.Linear(16, 16)]))
        self.router: Callable[[int], list[list[int]]] = lambda count: [list(range(count))[::-1], []]

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, 16)
        result = torch.zeros_like(flat)
        for expert, tokens in zip(getattr(self, self.name), self.router(len(flat)), strict=True):
            if tokens:
                result[tokens] = expert(flat[tokens])
        return result.view_as(x)


class RowByRow(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(x.view(-1, 16)).view(x.shape)


def test_flat_tokens_compiled() -> None:
    model, prompts, wishes = _adapted(Toy(RowByRow()), ["up"]), _prompts(3, 6), ["a", None, "b"]
    compiled = torch.compile(model, backend="eager")

    def call() -> Tensor:
        with torch.no_grad():
            logits: Tensor = model(prompts)
        return logits

    wanted, apart = _by_row(model, wishes, call), _alone(model, "a", call) - _alone(model, "b", call)
    for slots in (_slots(wishes), _slots(wishes)[:, None].expand(3, 6).contiguous()):
        with roadie.rows(compiled, slots), torch.no_grad():
            _close(compiled(prompts), wanted, apart)


def _whole(model: nn.Module) -> Callable[[Tensor], Tensor]:
    return torch.compile(model, backend="eager")


def _in_place(model: nn.Module) -> Callable[[Tensor], Tensor]:
    model.compile(backend="eager")
    return model


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [_whole, _in_place])
@pytest.mark.parametrize("middle", [SequenceFirst, Flat])
def test_rows_that_are_not_in_front_are_refused_where_the_model_is_compiled(
    middle: Callable[[], nn.Module], compiled: Callable[[nn.Module], Any]
) -> None:
    """As many tokens as rows: sizes alone would take it."""
    model, prompts = _adapted(Toy(middle()), ["up"]), _prompts(4, 4)
    called = compiled(model)
    for _ in range(2):
        with torch.no_grad(), roadie.rows(called, _slots(["a", None, "b", "a"])), pytest.raises(RoutingError):
            called(prompts)


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [_whole, _in_place])
def test_as_many_tokens_as_rows_in_a_compiled_model_with_rows_in_front(compiled: Callable[[nn.Module], Any]) -> None:
    model, prompts, wishes = _adapted(tiny_llama(), ["q_proj", "down_proj"]), _prompts(4, 4), ["a", None, "b", "a"]

    def call() -> Tensor:
        with torch.no_grad():
            logits: Tensor = model(prompts).logits
        return logits

    wanted, apart = _by_row(model, wishes, call), _alone(model, "a", call) - _alone(model, "b", call)
    called = compiled(model)
    with roadie.rows(called, _slots(wishes)), torch.no_grad():
        _close(called(prompts).logits, wanted, apart)


def _refused(base: nn.Module, targets: list[str], rows: int, tokens: int) -> None:
    """All ways of rows refuse the model, and plain batches still run."""
    model = _adapted(base, targets)
    bank = _bank_of(model)
    prompts = _prompts(rows, tokens)
    wishes: list[str | None] = [NAMES[row % 2] for row in range(rows)]
    for called, context in _ways(model, bank, wishes, tokens):
        with torch.no_grad(), context, pytest.raises(RoutingError):
            called(prompts)
    with roadie.rows(model, _slots(wishes)), pytest.raises(RoutingError):
        model(prompts)  # with gradient
    with pytest.raises(RoutingError):
        model(prompts, adapter_names=wishes)
    assert model(prompts).shape == (rows, tokens, 64)


@pytest.mark.parametrize("tokens", [4, 3])
def test_the_sequence_in_front_is_refused(tokens: int) -> None:
    _refused(Toy(SequenceFirst()), ["up"], 4, tokens)


def test_tokens_that_are_flat_column_by_column_are_refused() -> None:
    _refused(Toy(Flat()), ["up"], 2, 3)


@pytest.mark.parametrize("name", ["experts", "parts"])
@pytest.mark.parametrize("chosen", ["as many as rows", "all", "others"])
def test_experts_are_refused_whatever_number_of_tokens_they_get(name: str, chosen: str) -> None:
    """Also where the numbers are those of rows, or of all tokens, by chance."""
    experts = Experts(name)
    if chosen != "all":
        count = 3 if chosen == "as many as rows" else 2
        experts.router = lambda tokens: [list(range(tokens))[:count][::-1], list(range(tokens))[count:]]
    _refused(Toy(experts), ["0", "1"], 3, 2)


@pytest.mark.parametrize("rows", [6, 4])
def test_xlnet_is_refused_with_any_number_of_rows(rows: int) -> None:
    torch.manual_seed(0)
    settings = {"vocab_size": 64, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64, "pad_token_id": 0}
    _refused(_Logits(transformers.XLNetLMHeadModel(transformers.XLNetConfig(**settings))), ["layer_1"], rows, 6)


class _Logits(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.inner = model

    def forward(self, input_ids: Tensor) -> Tensor:
        logits: Tensor = self.inner(input_ids=input_ids).logits
        return logits


def test_the_queries_of_longformer_are_refused() -> None:
    """Its attention has the sequence in front, and nothing else has."""
    torch.manual_seed(0)
    config = transformers.LongformerConfig(
        **SMALL, intermediate_size=64, attention_window=4, max_position_embeddings=32
    )
    _refused(_Logits(transformers.LongformerForMaskedLM(config)), ["query"], 8, 8)


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], "all-linear"])
def test_as_many_tokens_as_rows_in_a_model_with_rows_in_front(targets: Any) -> None:
    """The first mixed batch of all has them; the model is run once more for it, and leaves no trace."""
    model, wishes = _adapted(tiny_llama(attention_dropout=0.3), targets), ["a", "b", None, "a"]
    prompts = _prompts(4, 4)

    def call() -> Tensor:
        with torch.no_grad():
            logits: Tensor = model(input_ids=prompts).logits
        return logits

    wanted, apart = _by_row(model, wishes, call), _alone(model, "a", call) - _alone(model, "b", call)
    calls: list[int] = []
    model.get_base_model().model.layers[0].self_attn.q_proj.base_layer.register_forward_hook(
        lambda *_: calls.append(1) and None
    )
    state = torch.get_rng_state()
    for _ in range(3):
        with roadie.rows(model, _slots(wishes)):
            _close(call(), wanted, apart)
    assert len(calls) == 4
    assert torch.equal(torch.get_rng_state(), state)
    assert not model.training
    model.train()
    with roadie.rows(model, _slots(wishes)):
        model(input_ids=prompts)
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("names", [["__base__"], ["a"], ["a", "__base__", "b", "a", "a"]])
@pytest.mark.parametrize("targets", [["q_proj"], ["nowhere"]])
def test_a_wrong_number_of_names_is_refused_whoever_is_named(names: list[str], targets: list[str]) -> None:
    model = _adapted(tiny_llama(), ["q_proj"])
    if targets == ["nowhere"]:
        for layer in model.get_base_model().model.layers:
            layer.self_attn.q_proj.delete_adapter("a")
            layer.self_attn.q_proj.delete_adapter("b")
        names = ["__base__"] * len(names)
    prompts = _prompts(3, 4)
    start = (
        f"Length of `adapter_names` should be the same as the number of inputs, but got {len(names)} and 3 respectively"
    )
    with pytest.raises(ValueError, match=start):
        model(input_ids=prompts, adapter_names=names)
    with pytest.raises(ValueError, match=start):
        model.generate(input_ids=prompts, adapter_names=names, max_new_tokens=2)
    with roadie.rows(model, names), pytest.raises(RoutingError, match=start):
        model(input_ids=prompts)
    bank = roadie.AdapterBank(tiny_llama(), slots=2)
    with bank.rows([None] * len(names)), pytest.raises(RoutingError, match=start):
        bank.model(input_ids=prompts)
    layer = _adapted(tiny_llama(), ["q_proj"]).get_base_model().model.layers[0].self_attn.q_proj
    with pytest.raises(ValueError, match=start):
        layer(torch.zeros(3, 4, 64), adapter_names=["__base__"] * len(names))


def test_adapters_that_are_trained_together_see_flat_tokens_row_by_row() -> None:
    torch.manual_seed(0)
    model, prompts = _opt().eval(), _prompts(3, 4)
    path = "model.decoder.layers.0.fc1"
    bank = TrainableBank(torch.device("cpu"))
    layer = AdaptedLayer(path, 64, Variant.ROAD_1, (4,))
    bank.join({"a": [layer], "b": [layer]})
    for stack in bank.families[0].stacks:
        stack.parameters.copy_(stack.parameters + 0.3 * torch.randn(stack.parameters.shape))
    bank.make_tables()
    with bank.attached(model, [path]), torch.no_grad():
        alone = {}
        for slot in (-1, 0, 1):
            with bank.routed(torch.full((3,), slot)):
                alone[slot] = model(input_ids=prompts).logits
        with bank.routed(torch.tensor([1, -1, 0])):
            got = model(input_ids=prompts).logits
    _close(got, torch.stack([alone[1][0], alone[-1][1], alone[0][2]]), alone[0] - alone[1])
