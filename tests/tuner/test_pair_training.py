"""train_only: whatever trains the model, other pairs keep every bit; nothing is left behind."""

from __future__ import annotations

import subprocess
import sys

import peft
import pytest
import torch
from tests.laws.models import linear_chain
from tests.patience import HANG_S
from torch import nn
from transformers import Trainer, TrainingArguments

import roadie
from roadie.errors import ConfigError
from roadie.share import Share
from roadie.subspaces import trained_places
from roadie.testing import stock_peft, tiny_llama
from roadie.testing.models import randomise

VARIANTS = ("road_1", "road_2", "road_4")
OPTIMISERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.5),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.5),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05, weight_decay=0.5),
    "foreach": lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.5, foreach=True),
}


def chain(variant="road_2", **settings):
    config = roadie.RoadConfig(variant=variant, group_size=4, target_modules=["first", "second"], **settings)
    return randomise(roadie.get_peft_model(linear_chain(6, 16, 8), config))


def steps(model: nn.Module, rule: torch.optim.Optimizer, count: int = 3) -> None:
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    for _ in range(count):
        model(x).square().sum().backward()
        rule.step()
        rule.zero_grad()


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if ".road_" in name and p.requires_grad}


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if ".road_" in name}


def places(model: nn.Module, name: str, pairs: Share | torch.Tensor) -> torch.Tensor:
    path, _, rest = name.rpartition(".road_")
    layer, adapter = model.get_submodule(path), rest.partition(".")[2]
    return trained_places(pairs, layer.variant[adapter], layer.out_features, layer.group_size[adapter])


@pytest.mark.parametrize("optimiser", OPTIMISERS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_other_pairs_keep_every_bit_and_the_chosen_ones_move(variant, optimiser):
    model, share = chain(variant), Share(2, 2, "interleaved")
    rule = OPTIMISERS[optimiser](list(trained(model).values()))
    steps(model, rule)  # moments for every place
    before = values(model)
    with roadie.train_only(model, str(share)) as count:
        steps(model, rule)
    after = values(model)
    assert count == sum(int(places(model, name, share).sum()) for name in before)
    for name in before:
        inside = places(model, name, share)
        assert torch.equal(after[name][~inside], before[name][~inside])
        assert (after[name] != before[name])[inside].all()
    steps(model, rule, 1)
    assert all((values(model)[name] != after[name]).all() for name in after), "the block is over"


def test_the_chosen_pairs_move_as_if_the_others_were_not_there():
    """Gradients that clipping sees: against a model whose other pairs are cut by hand."""
    share, found = Share(1, 2), {}
    for kind in ("block", "by hand"):
        model = chain("road_1")
        parameters = trained(model)
        rule = torch.optim.AdamW(parameters.values(), lr=0.05, weight_decay=0.0)
        x = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
        with roadie.train_only(model, "1/2" if kind == "block" else "1/1"):
            for _ in range(3):
                model(x).square().sum().backward()
                for name, parameter in parameters.items():
                    if kind == "by hand":
                        parameter.grad *= places(model, name, share)
                torch.nn.utils.clip_grad_norm_(parameters.values(), 0.1)
                rule.step()
                rule.zero_grad()
        found[kind] = values(model)
    assert all(torch.equal(found["block"][name], found["by hand"][name]) for name in found["block"])


def test_masks_by_layer_and_layers_without_one():
    model = chain("road_1")
    rule = OPTIMISERS["adamw"](list(trained(model).values()))
    before, mask = values(model), torch.tensor([True, False, False, True, False, False, False, True])
    with roadie.train_only(model, {"first": mask}) as count:
        steps(model, rule)
    assert count == 2 * 3
    for name, after in values(model).items():
        moved = after != before[name]
        assert torch.equal(moved, mask) if ".first." in name else not moved.any()


def test_each_row_of_a_mixed_batch_moves_its_own_share_of_its_own_adapter():
    model = chain(target := "road_2")
    model.add_adapter("b", roadie.RoadConfig(variant=target, group_size=4, target_modules=["first", "second"]))
    randomise(model, adapter="b")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".road_" in name)
    before = values(model)
    rule = OPTIMISERS["adamw"](list(trained(model).values()))
    x = torch.randn(4, 6)
    with roadie.train_only(model, "1/2", "default"), roadie.train_only(model, "2/2", "b"):
        for names in (["default", "b", "b", "default"], ["b"] * 4):
            model(x, adapter_names=names).square().sum().backward()
            rule.step()
            rule.zero_grad()
    for name, after in values(model).items():
        inside = places(model, name, Share(1 if name.endswith(".default") else 2, 2))
        assert torch.equal(after[~inside], before[name][~inside])
        assert (after != before[name])[inside].all()


def test_trainer_trains_a_share_and_stock_peft_loads_it(tmp_path):
    config = roadie.RoadConfig(group_size=16, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    model = roadie.get_peft_model(tiny_llama(), config)
    rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(3, 100, (8, 12))]
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "work"),
        max_steps=4,
        per_device_train_batch_size=2,
        learning_rate=0.05,
        weight_decay=0.3,
        max_grad_norm=0.5,
        save_steps=2,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    with roadie.train_only(model, "1/2"):
        Trainer(model=model, args=arguments, train_dataset=rows).train()
    start = {name: torch.zeros_like(p) if "theta" in name else torch.ones_like(p) for name, p in values(model).items()}
    for name, after in values(model).items():
        inside = places(model, name, Share(1, 2))
        assert torch.equal(after[~inside], start[name][~inside])
        assert (after != start[name])[inside].all()
    model.save_pretrained(str(tmp_path / "half"))
    batch = torch.arange(3, 30).unsqueeze(0)
    with stock_peft():
        stock = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "half").eval()
    with torch.no_grad():
        expected = model.eval()(batch).logits
        assert torch.allclose(stock(batch).logits, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def test_a_trainer_that_goes_on_from_a_checkpoint_is_the_one_that_did_not_stop(tmp_path):
    found = []
    for resumes in (False, True):
        config = roadie.RoadConfig(group_size=16, target_modules=["q_proj"], task_type="CAUSAL_LM")
        model = roadie.get_peft_model(tiny_llama(), config)
        generator = torch.Generator().manual_seed(0)
        rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(3, 100, (8, 12), generator=generator)]
        arguments = TrainingArguments(
            output_dir=str(tmp_path / "work"),
            max_steps=4,
            per_device_train_batch_size=2,
            learning_rate=0.05,
            weight_decay=0.3,
            save_steps=2,
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        )
        with roadie.train_only(model, "2/2"):
            trainer = Trainer(model=model, args=arguments, train_dataset=rows)
            trainer.train(resume_from_checkpoint=str(tmp_path / "work" / "checkpoint-2") if resumes else None)
        found.append(values(model))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


REPLICA = """
import sys
import torch
import torch.distributed
from torch.nn.parallel import DistributedDataParallel

import roadie
from roadie.testing.models import randomise
from tests.laws.models import linear_chain

rank, folder = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
config = roadie.RoadConfig(group_size=4, target_modules=["first", "second"])
model = randomise(roadie.get_peft_model(linear_chain(6, 16, 8), config))
before = {name: p.detach().clone() for name, p in model.named_parameters()}
rule = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05, weight_decay=0.5)
with roadie.train_only(model, "1/2"):
    replica = DistributedDataParallel(model)
    for step in range(3):
        generator = torch.Generator().manual_seed(10 * rank + step)
        replica(torch.randn(5, 6, generator=generator)).square().sum().backward()
        rule.step()
        rule.zero_grad()
after = {name: p.detach().clone() for name, p in model.named_parameters()}
torch.save({"before": before, "after": after}, f"{folder}/{rank}.pt")
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.long
def test_copies_in_two_processes_train_the_same_share(tmp_path):
    processes = [subprocess.Popen([sys.executable, "-c", REPLICA, str(rank), str(tmp_path)]) for rank in range(2)]
    assert [process.wait(timeout=HANG_S) for process in processes] == [0, 0]
    one, other = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    model, share = chain("road_1"), Share(1, 2)
    trained_names = list(trained(model))
    for name, after in one["after"].items():
        assert torch.equal(after, other["after"][name])
        moved = after != one["before"][name]
        if name in trained_names:
            assert torch.equal(moved, places(model, name, share))
        else:
            assert not moved.any()


def test_a_block_that_no_gradient_comes_to_is_said(caplog):
    model = chain()
    elsewhere = nn.Parameter(torch.ones(1))
    rule = torch.optim.SGD([elsewhere], lr=0.1)
    with roadie.train_only(model, "1/2"):
        elsewhere.sum().backward()
        rule.step()
    assert "1 steps of an optimiser, and no gradient came" in caplog.text
    caplog.clear()
    with roadie.train_only(model, "1/2"):
        steps(model, OPTIMISERS["sgd"](list(trained(model).values())), 1)
    with roadie.train_only(model, "1/2"):
        pass
    assert not caplog.text


def test_nothing_is_left_behind_by_a_block_that_raises():
    from torch.optim import optimizer

    model = chain()
    hooks = dict(optimizer._global_optimizer_post_hooks)

    def use():
        with roadie.train_only(model, "1/2"):
            assert len(optimizer._global_optimizer_post_hooks) == len(hooks) + 1
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        use()
    assert dict(optimizer._global_optimizer_post_hooks) == hooks
    assert not any(parameter._backward_hooks for parameter in trained(model).values())


def test_moving_the_model_inside_the_block_is_followed():
    model = chain()
    with roadie.train_only(model, "1/2"):
        model.to(torch.bfloat16)
        before = values(model)
        rule = OPTIMISERS["sgd"](list(trained(model).values()))
        model(torch.randn(2, 6, dtype=torch.bfloat16)).square().sum().backward()
        rule.step()
    for name, after in values(model).items():
        assert after.dtype == torch.bfloat16
        inside = places(model, name, Share(1, 2))
        assert torch.equal(after[~inside], before[name][~inside])


@pytest.mark.parametrize(
    ("pairs", "name", "said"),
    [
        ("3/2", None, "got share 3/2"),
        ("1/2", "missing", r"got adapter 'missing'; wanted one of \['default'\]"),
        (
            {"nowhere": torch.ones(8, dtype=torch.bool)},
            None,
            "got a mask for 'nowhere'; wanted adapted layers, such as 'first'",
        ),
        ({"first": torch.ones(9, dtype=torch.bool)}, None, r"layer first: got a mask torch.bool \(9,\)"),
        ({"first": torch.zeros(8, dtype=torch.bool)}, None, "got pairs=masks, which no layer of adapter 'default' has"),
        ("1/99", None, "got pairs='1/99', which no layer of adapter 'default' has"),
    ],
)
def test_what_cannot_be_is_refused_with_nothing_changed(pairs, name, said):
    model = chain()
    with pytest.raises(ConfigError, match=said), roadie.train_only(model, pairs, name):
        raise AssertionError
    assert not any(parameter._backward_hooks for parameter in trained(model).values())


def test_several_active_adapters_are_asked_which():
    model = chain()
    model.add_adapter("b", roadie.RoadConfig(group_size=4, target_modules=["first"]))
    model.base_model.set_adapter(["default", "b"])
    with (
        pytest.raises(ConfigError, match=r"got the active adapters \['b', 'default'\]"),
        roadie.train_only(model, "1/2"),
    ):
        raise AssertionError
