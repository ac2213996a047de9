"""Tenants in one pass are what each is alone; what goes wrong in one stays there."""

from __future__ import annotations

import math
from concurrent.futures import Future

import pytest
import torch
from tests.engine.tenants import KINDS, LOSSES, config, engine, filled, gradients, parameters, row
from torch.nn.functional import log_softmax

import roadie
from roadie.engine import AdamSettings, TrainingRow, optimiser
from roadie.engine.losses import Loss, Terms, token_losses
from roadie.errors import ConfigError, NotFinite, QueueFull, ShuttingDown, UnknownTenant
from roadie.testing import tiny_llama
from roadie.testing.accuracy import unit_roundoff

STEP = AdamSettings(1e-2)
OF_A_GRADIENT = (2**9 + 2**12) * unit_roundoff(torch.float32)
"""How far a gradient in another order of sums may be, of its norm; tests/distributed has the same model and the derivation."""


class Bodies:
    """Counts the calls of a model's body, and the hidden states that its output embeddings are given with a gradient to come."""

    def __init__(self, model):
        self.calls, self.scored = [], 0
        model.model.register_forward_hook(lambda *given: self.calls.append(given[2].last_hidden_state.shape))
        model.lm_head.register_forward_hook(lambda module, inputs, output: self._count(output))

    def _count(self, logits):
        self.scored += logits.shape[:-1].numel() if logits.requires_grad else 0


def alone(name: str, number: int, rows: list[TrainingRow], loss: str) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss, and gradients by parameter, of a PEFT model of its own in float64, with the parameters of the tenant."""
    made = engine()
    made.create(name, config(number))
    filled(made, name)
    state = made.state(name)
    made.run()
    model = roadie.get_peft_model(tiny_llama().double(), config(number)).eval()
    layers = state.result().adapter.layers
    own = dict(model.named_parameters())
    names = {
        f"{path}.{part}": f"base_model.model.{path}.road_{part}.default"
        for path in layers
        for part in ("theta", "alpha")
    }
    with torch.no_grad():
        for path, layer in layers.items():
            for part in ("theta", "alpha"):
                own[names[f"{path}.{part}"]].copy_(getattr(layer, part))
    total = torch.zeros((), dtype=torch.float64)
    for one in rows:
        terms = Terms.of(one, Loss(loss))
        lp = log_softmax(model(input_ids=terms.tokens[None]).logits[0], -1)[terms.positions].gather(1, terms.targets)
        rows_of = torch.zeros(len(lp), dtype=torch.int64)
        total = total + token_losses(terms.loss, lp, terms.values.double(), rows_of, 1).sum()
    total.backward()
    return total.item(), {name: own[theirs].grad for name, theirs in names.items()}


def by_layer(made, name: str) -> dict[str, torch.Tensor]:
    """The gradients of a tenant, by layer and parameter."""
    family, found = made.bank.family_of(name), {}
    for stack, of_stack in zip(family.stacks, gradients(made, name), strict=True):
        for path, pair in zip(stack.paths, of_stack, strict=True):
            found |= {f"{path}.theta": pair[0], f"{path}.alpha": pair[1]}
    return found


def rows_of(number: int) -> list[TrainingRow]:
    loss = LOSSES[number % len(LOSSES)]
    return [row(10 * number + each, 5 + (3 * number + each) % 8, loss) for each in range(1 + number % 3)]


def test_tenants_of_all_kinds_and_losses_in_one_pass_are_what_each_is_alone():
    made = engine()
    bodies = Bodies(made.model)
    names = [f"t{number}" for number in range(14)]
    for number, name in enumerate(names):
        made.create(name, config(number))
    filled(made, *names)
    results = {
        name: made.forward_backward(name, rows_of(number), LOSSES[number % len(LOSSES)])
        for number, name in enumerate(names)
    }
    made.run()
    assert len(bodies.calls) == 1
    terms = [Terms.of(one, Loss(LOSSES[number % len(LOSSES)])) for number in range(14) for one in rows_of(number)]
    assert bodies.scored == sum(len(each.positions) for each in terms) < sum(len(each.tokens) for each in terms)
    for number, name in enumerate(names):
        loss, expected = alone(name, number, rows_of(number), LOSSES[number % len(LOSSES)])
        assert results[name].result().loss == pytest.approx(loss, rel=1e-4, abs=1e-4)
        assert sum(results[name].result().losses) == pytest.approx(loss, rel=1e-4, abs=1e-4)
        found = by_layer(made, name)
        assert found.keys() == expected.keys()
        norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in expected.values()))
        assert norm > 0
        for key, gradient in expected.items():
            assert float((found[key].double() - gradient).norm()) <= OF_A_GRADIENT * norm, (name, key)


def test_logprobs_come_in_the_shape_of_the_targets_where_there_is_a_weight():
    made = engine()
    made.create("a", config(0))
    one = TrainingRow([3, 4, 5, 6], [4, 5, 6, 7], [0.0, 1.0, 0.0, 2.0])
    several = TrainingRow([3, 4], [[4, 5, 6], [7, 8, 9]], [[0.5, 0.5, 0.0], [0.0, 0.0, 0.0]])
    some = made.forward("a", [one, several], "cross_entropy", all_logprobs=False)
    whole = made.forward("a", [one, several], "cross_entropy")
    made.run()
    with torch.no_grad():
        expected = log_softmax(made.model(input_ids=torch.tensor([[3, 4, 5, 6]])).logits[0], -1)
    expected = expected[torch.arange(4), torch.tensor([4, 5, 6, 7])]
    found = whole.result().logprobs
    assert (found[0].shape, found[0].dtype, found[1].shape) == ((4,), torch.float32, (2, 3))
    assert torch.allclose(found[0], expected, atol=1e-5)
    assert some.result().logprobs[0].isnan().tolist() == [True, False, True, False]
    assert some.result().logprobs[1].isnan().tolist() == [[False] * 3, [True] * 3]
    assert some.result().loss == pytest.approx(whole.result().loss)
    with pytest.raises(ConfigError, match="no gradients since the last step"):
        finished(made, made.optim_step("a", STEP))


def finished(made, future: Future):
    made.run()
    return future.result()


def test_the_gradient_of_a_loss_that_the_caller_computes():
    made = engine()
    for name in ("ours", "theirs"):
        made.create(name, config(1))
    filled(made, "ours")
    made.bank.family_of("ours").put("theirs", made.bank.family_of("ours").state("ours"))
    rows = [row(1, 7), row(2, 5)]
    made.forward_backward("ours", rows, "cross_entropy")
    logprobs = finished(made, made.forward("theirs", rows, "cross_entropy")).logprobs
    leaves = [lp.clone().requires_grad_() for lp in logprobs]
    loss = -sum((lp * one.weights).sum() for lp, one in zip(leaves, rows, strict=True))
    loss.backward()
    given = [TrainingRow(one.tokens, one.targets, gradients=lp.grad) for one, lp in zip(rows, leaves, strict=True)]
    made.forward_backward("theirs", given, "given")
    made.run()
    for ours, theirs in zip(gradients(made, "ours"), gradients(made, "theirs"), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("max_tokens", [12, 24, 60])
def test_a_call_of_several_passes_is_one_of_a_single_pass(max_tokens):
    whole, parts = engine(), engine(max_tokens_per_pass=max_tokens, logits_bytes=4 * 128 * 3)
    rows = [row(seed, 4 + seed) for seed in range(8)]
    for made in (whole, parts):
        made.create("a", config(0))
        made.create("b", config(2))
        filled(made, "a", "b")
    bodies = Bodies(parts.model)
    results = {}
    for made in (whole, parts):
        results[made] = [made.forward_backward(name, rows, "cross_entropy") for name in "ab"]
        made.run()
    assert len(bodies.calls) > 1
    assert all(shape[0] * shape[1] <= max_tokens for shape in bodies.calls)
    for name, of_whole, of_parts in zip("ab", results[whole], results[parts], strict=True):
        assert of_parts.result().loss == pytest.approx(of_whole.result().loss, rel=1e-6)
        for one, other in zip(gradients(whole, name), gradients(parts, name), strict=True):
            assert float((one - other).norm()) <= OF_A_GRADIENT * float(one.norm())


def test_gradients_add_up_until_a_step_and_only_until_then():
    made = engine()
    for name in "ab":
        made.create(name, config(0))
    made.forward_backward("a", [row(1, 6), row(2, 6)], "cross_entropy")
    for seed in (1, 2):
        made.forward_backward("b", [row(seed, 6)], "cross_entropy")
    made.run()
    norm = math.sqrt(sum(float(one.square().sum()) for one in gradients(made, "a")))
    for one, other in zip(gradients(made, "a"), gradients(made, "b"), strict=True):
        assert float((one - other).norm()) <= OF_A_GRADIENT * norm
    step = finished(made, made.optim_step("a", STEP))
    assert (step.step, step.gradient_norm) == (1, pytest.approx(norm, rel=1e-6))
    assert not any(one.any() for one in gradients(made, "a"))
    assert all(one.any() for one in gradients(made, "b"))
    assert torch.equal(parameters(made, "b")[0][:, 1], torch.ones_like(parameters(made, "b")[0][:, 1]))


def test_who_comes_and_goes_between_a_gradient_and_its_step_takes_nothing_away():
    made = engine()
    for name in ("before", "a"):
        made.create(name, config(0))
    made.forward_backward("a", [row(1, 6)], "cross_entropy")
    made.run()
    expected = [one.clone() for one in gradients(made, "a")]
    made.create("after", config(0))
    made.remove("before")
    made.run()
    assert all(torch.equal(one, other) for one, other in zip(gradients(made, "a"), expected, strict=True))
    norm = math.sqrt(sum(float(one.square().sum()) for one in expected))
    assert finished(made, made.optim_step("a", STEP)).gradient_norm == pytest.approx(norm, rel=1e-6) != 0


def test_a_pass_of_as_many_rows_as_tokens_is_a_pass_of_its_rows(caplog):
    """The model is run on one row first, to see where the rows lie: what comes of that is nobody's."""
    made = engine()
    alone = []
    for number in range(4):
        made.create(f"t{number}", config(0))
        alone.append(finished(made, made.forward(f"t{number}", [row(number, 4)], "cross_entropy")).loss)
    together = [made.forward(f"t{number}", [row(number, 4)], "cross_entropy") for number in range(4)]
    made.run()
    assert not caplog.records  # or else each tenant's rows would have gone alone
    assert [each.result().loss for each in together] == pytest.approx(alone, rel=1e-5)


# What goes wrong.


def spoilt(made, name: str) -> None:
    made.run()
    family = made.bank.family_of(name)
    family.stacks[0].parameters[:, :, family.names.index(name)] = float("nan")


@pytest.mark.parametrize("kinds", [(0, 5), (0, 2)])
def test_what_is_not_finite_fails_its_call_and_leaves_the_others_bit_for_bit(kinds):
    made, other = engine(), engine()
    for each in (made, other):
        for name, kind in zip("ab", kinds, strict=True):
            each.create(name, config(kind))
        filled(each, "a", "b")
    spoilt(made, "b")
    for _ in range(2):
        for each in (made, other):
            good = each.forward_backward("a", [row(1, 6)], "cross_entropy")
            bad = each.forward_backward("b", [row(2, 6)], "cross_entropy")
            each.optim_step("a", STEP)
            each.run()
            assert math.isfinite(good.result().loss)
            if each is made:
                with pytest.raises(NotFinite, match=r"got loss nan and gradient norm nan; wanted finite"):
                    bad.result()
    assert all(map(torch.equal, parameters(made, "a"), parameters(other, "a")))
    assert not any(one.any() for one in gradients(made, "b"))
    with pytest.raises(ConfigError, match="no gradients"):
        finished(made, made.optim_step("b", STEP))


def test_a_call_that_is_not_finite_keeps_earlier_gradients_also_when_it_takes_several_passes():
    made = engine(max_tokens_per_pass=8)
    made.create("a", config(1))
    made.forward_backward("a", [row(1, 6)], "cross_entropy")
    made.run()
    before, state = gradients(made, "a"), made.bank.family_of("a").state("a")
    bad = made.forward_backward("a", [row(3, 6), row(2, 5)], "cross_entropy")
    assert made.work() == 6
    spoilt_now = made.bank.family_of("a").stacks[0].parameters
    spoilt_now.fill_(float("nan"))
    made.run()
    with pytest.raises(NotFinite):
        bad.result()
    assert all(map(torch.equal, before, gradients(made, "a")))
    made.bank.family_of("a").put("a", state)
    assert finished(made, made.optim_step("a", STEP)).step == 1


def test_rows_that_make_the_model_raise_fail_alone(monkeypatch):
    made = engine()
    for name in "abc":
        made.create(name, config(0))
    made.run()
    forward = made.model.model.forward

    def raising(*args, **kwargs):
        if (kwargs["input_ids"] == 77).any():
            raise MemoryError("too much of 77")
        return forward(*args, **kwargs)

    monkeypatch.setattr(made.model.model, "forward", raising)
    rows = {"a": row(1, 6), "b": TrainingRow([3, 77, 5], [77, 5, 6]), "c": row(2, 6)}
    futures = {name: made.forward_backward(name, [one], "cross_entropy") for name, one in rows.items()}
    made.run()
    assert isinstance(futures["b"].exception(), MemoryError)
    assert all(math.isfinite(futures[name].result().loss) for name in "ac")
    assert not any(one.any() for one in gradients(made, "b"))
    assert all(one.any() for name in "ac" for one in gradients(made, name))


def test_a_step_or_a_beginning_that_raises_is_told_and_others_go_on(monkeypatch):
    made = engine()
    for name, kind in (("a", 0), ("b", 1)):
        made.create(name, config(kind))
    made.run()
    step, join = optimiser.step, made.bank.join

    def no_step(family, *arguments):
        if "b" in family.names:
            raise MemoryError("no room for b")
        return step(family, *arguments)

    def no_join(newcomers):
        join(newcomers)
        raise MemoryError("no room for more")

    monkeypatch.setattr(optimiser, "step", no_step)
    calls = [made.forward_backward(name, [row(1, 6)], "cross_entropy") for name in "ab"]
    steps = [made.optim_step(name, STEP) for name in "ab"]
    made.run()
    assert all(call.result().loss > 0 for call in calls)
    assert steps[0].result().step == 1
    assert isinstance(steps[1].exception(), MemoryError)
    monkeypatch.setattr(made.bank, "join", no_join)
    late, waiting = made.create("c", config(0)), made.forward_backward("c", [row(1, 6)], "cross_entropy")
    made.run()
    assert isinstance(late.exception(), MemoryError)
    assert isinstance(waiting.exception(), MemoryError)
    assert made.tenants == ("a", "b")
    assert sorted(made.bank.names) == ["a", "b"]


def test_a_flood_waits_for_itself():
    made = engine(max_tokens_per_pass=24)
    for name in ("flood", "few"):
        made.create(name, config(0))
    made.run()
    flood = made.forward_backward("flood", [row(seed, 6) for seed in range(40)], "cross_entropy")
    made.work()
    few = made.forward_backward("few", [row(seed, 6) for seed in range(4)], "cross_entropy")
    for _ in range(2):
        made.work()
    assert few.done()
    assert not flood.done()
    made.run()
    assert len(flood.result().losses) == 40


def test_rows_that_would_be_mostly_padding_wait_for_the_next_pass():
    model = tiny_llama(max_position_embeddings=1024)
    made, bodies = engine(model), Bodies(model)
    for name in ("long", "short"):
        made.create(name, config(0))
    made.run()
    bodies.calls.clear()
    made.forward_backward("long", [row(1, 700)], "cross_entropy")
    made.forward_backward("short", [row(2, 9), row(3, 8)], "cross_entropy")
    made.run()
    assert [tuple(shape[:2]) for shape in bodies.calls] == [(1, 700), (2, 9)]


@pytest.mark.parametrize(
    ("ask", "error", "message"),
    [
        (lambda made: made.create("a", config(0)), ConfigError, "got tenant 'a', who trains already"),
        (lambda made: made.create("b", roadie.RoadConfig(target_modules=["nothing"])), ConfigError, "no module of the"),
        (lambda made: made.create("b", {"bias": "all"}), ConfigError, "got bias='all'; wanted rotations alone"),
        (lambda made: made.create("b", {"modules_to_save": ["x"]}), ConfigError, "got modules_to_save="),
        (lambda made: made.forward_backward("b", [row(1, 3)], "ppo"), UnknownTenant, "got tenant 'b', who does not"),
        (lambda made: made.forward_backward("a", [], "ppo"), ConfigError, "got no rows"),
        (lambda made: made.forward_backward("a", [row(1, 3)], "sft"), ConfigError, "got loss 'sft'"),
        (lambda made: made.forward_backward("a", [row(1, 3)], "ppo"), ConfigError, "row 0: got no advantages"),
        (
            lambda made: made.forward_backward("a", [row(1, 3), row(2, 129)], "cross_entropy"),
            ConfigError,
            "row 1: got 129 tokens; wanted at most 128",
        ),
        (
            lambda made: made.forward_backward("a", [row(1, 3, vocabulary=500)], "cross_entropy"),
            ConfigError,
            r"row 0: got t\w+ \d+; wanted 0 to 127",
        ),
    ],
)
def test_what_cannot_be_done_is_said_at_once(ask, error, message):
    made = engine()
    made.create("a", config(0))
    with pytest.raises(error, match=message):
        ask(made)
    made.run()
    assert made.tenants == ("a",)


def test_limits_of_a_tenant_are_its_own():
    made = engine(max_calls_per_tenant=2, max_tokens_per_tenant=20, max_tenants=2)
    for name in "ab":
        made.create(name, config(0))
    with pytest.raises(QueueFull, match="2 tenants train already"):
        made.create("c", config(0))
    made.run()
    made.forward_backward("a", [row(1, 12)], "cross_entropy")
    with pytest.raises(QueueFull, match="12 tokens of this tenant wait"):
        made.forward_backward("a", [row(1, 12)], "cross_entropy")
    made.forward_backward("a", [row(1, 8)], "cross_entropy")
    with pytest.raises(QueueFull, match="2 calls of this tenant wait"):
        made.forward_backward("a", [row(1, 1)], "cross_entropy")
    assert made.forward_backward("b", [row(1, 12)], "cross_entropy")
    made.run()
    assert made.forward_backward("a", [row(1, 12)], "cross_entropy")


def test_tenants_leave_in_their_turn_and_calls_may_be_cancelled():
    made = engine()
    made.create("a", config(0))
    last = made.forward_backward("a", [row(1, 5)], "cross_entropy")
    cancelled = made.forward_backward("a", [row(2, 5)], "cross_entropy")
    left = made.remove("a")
    assert cancelled.cancel()
    with pytest.raises(UnknownTenant):
        made.optim_step("a", STEP)
    made.run()
    assert last.result().loss > 0
    assert left.result() is None
    assert (made.tenants, made.bank.names, made.figures.num_passes) == ((), [], 1)
    made.create("a", config(1))
    waiting = made.optim_step("a", STEP)
    made.close()
    assert isinstance(waiting.exception(), ShuttingDown)
    with pytest.raises(ShuttingDown):
        made.create("b", config(0))


def test_nothing_is_left_of_a_pass_in_the_model():
    made = engine()
    made.create("a", config(0))
    filled(made, "a")
    made.forward_backward("a", [row(1, 5)], "cross_entropy")
    made.run()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in made.model.modules())
    assert all(parameter.grad is None for parameter in made.model.parameters())
    ids = torch.tensor([[3, 4, 5]])
    assert torch.equal(made.model(input_ids=ids).logits, tiny_llama().eval()(input_ids=ids).logits)


def test_losses_fall_for_all_kinds_at_rates_of_their_own():
    made = engine()
    for number in range(len(KINDS)):
        made.create(f"t{number}", config(number))
    losses: list[list[float]] = []
    for _ in range(12):
        futures = [
            made.forward_backward(f"t{number}", [row(number, 10)], "cross_entropy") for number in range(len(KINDS))
        ]
        steps = [made.optim_step(f"t{number}", AdamSettings(0.02 * (1 + number % 2))) for number in range(len(KINDS))]
        made.run()
        losses.append([future.result().loss for future in futures])
        assert len({step.result().step for step in steps}) == 1
    assert all(last < first for first, last in zip(losses[0], losses[-1], strict=True))
