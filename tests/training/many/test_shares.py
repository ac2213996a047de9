"""Jobs of shares: each sample moves the pairs of its own share and no other, and learns what it would learn alone."""

from __future__ import annotations

import copy
import runpy
from pathlib import Path

import pytest
import torch
from tests.gradients import collect_gradients
from transformers import AutoModelForCausalLM

import roadie
from roadie import checkpoint
from roadie.bank.families import AdaptedLayer
from roadie.bank.trainable import TrainableBank
from roadie.errors import ConfigError
from roadie.rotation import Variant
from roadie.share import Share
from roadie.subspaces import join, places_of_share, restrict
from roadie.training.encoding import collate
from roadie.training.many import Job, Observer, Plan, RunSettings, train_many
from roadie.training.many.data import load_data
from roadie.training.many.schedule import learning_rate
from roadie.training.models import ModelSource, load_tokenizer

SHARED = runpy.run_path(str(Path(__file__).parent / "conftest.py"))
losses, OF_LOSSES = SHARED["losses"], SHARED["OF_LOSSES"]
SHARES = ("1/2", "2/2", "2/3 interleaved", None)
TURNS = {"variant": ("road_1", "road_2", "road_4"), "weight_decay": (0.3, 0.0), "max_grad_norm": (0.05, 0.0, 1.0)}


@pytest.fixture
def jobs(some_jobs):
    """Every share with every variant, some with decay and clipping: 12 jobs of 4 steps."""
    made = some_jobs(12, targets=["q_proj", "down_proj"], steps=4, group_size=16, schedule="constant")
    for number, job in enumerate(made):
        job["share"] = SHARES[number % 4]
        job |= {key: values[number % len(values)] for key, values in TURNS.items()}
    return made


def test_parameters_outside_of_the_share_keep_every_bit_and_those_inside_move(jobs, tiny_path):
    train_many(jobs, model=str(tiny_path))
    for job in jobs:
        share = Share.parse(job["share"] or "1/1")
        for path, layer in checkpoint.load(job["output"]).layers.items():
            inside = places_of_share(share, layer)
            assert torch.equal(layer.theta[~inside], torch.zeros(int((~inside).sum()))), (job["name"], path)
            assert torch.equal(layer.alpha[~inside], torch.ones(int((~inside).sum()))), (job["name"], path)
            moved = (layer.theta != 0) | (layer.alpha != 1)
            assert (moved & inside).sum() > inside.sum() / 4  # road_4 has places without a gradient at the start


def test_a_share_among_many_is_a_share_alone(jobs, tiny_path):
    """Against a plain loop with torch's AdamW, in which gradients are cut and values put back by hand."""
    result = train_many(jobs, model=str(tiny_path))
    for job in jobs:
        expected, tensors = alone(job, tiny_path)
        found = losses(result, job["name"])
        assert max(abs(a - b) / b for a, b in zip(found, expected, strict=True)) <= OF_LOSSES
        for path, layer in checkpoint.load(job["output"]).layers.items():
            wanted = tensors[f"base_model.model.{path}.road_theta.default"]
            assert torch.allclose(layer.theta, wanted, atol=2e-3 * job["learning_rate"] * job["steps"]), path


def alone(settings: dict, base: Path) -> tuple[list[float], dict[str, torch.Tensor]]:
    job = Job.from_mapping(settings)
    recipe, data = job.recipe, load_data(job, load_tokenizer(ModelSource(str(base))), None)
    config = roadie.RoadConfig(
        variant=recipe.variant, group_size=recipe.group_size, target_modules=list(recipe.target_modules)
    )
    model = roadie.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).eval()
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    outside = {name: ~inside(model, name, recipe) for name in parameters}
    start = {name: p.detach().clone() for name, p in parameters.items()}
    rule = torch.optim.AdamW(parameters.values(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    found = []
    for step in range(recipe.max_steps):
        rule.param_groups[0]["lr"] = learning_rate(recipe, step, recipe.max_steps)
        loss = model(**collate(data.rows(step))).loss
        loss.backward()
        for name, parameter in parameters.items():
            parameter.grad[outside[name]] = 0.0
        if recipe.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(parameters.values(), recipe.max_grad_norm)
        rule.step()
        rule.zero_grad()
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter[outside[name]] = start[name][outside[name]]
        found.append(loss.item())
    return found, {name: tensor for name, tensor in model.state_dict().items() if ".road_" in name}


def inside(model: torch.nn.Module, name: str, recipe) -> torch.Tensor:
    """The places of the share, written out for each variant: nothing of roadie's rule is used but the pairs of a share."""
    layer = model.get_submodule(name.rpartition(".road_")[0])
    half = recipe.group_size // 2
    pairs = set(Share.parse(recipe.share or "1/1").pairs(layer.out_features // 2))
    outputs = range(layer.out_features)
    pair_of = [output // recipe.group_size * half + output % half for output in outputs]
    if recipe.variant == "road_1":
        places = [pair in pairs for pair in range(layer.out_features // 2)]
    elif recipe.variant == "road_2":
        places = [pair_of[output] in pairs for output in outputs]
    else:
        groups = [outputs[begin : begin + recipe.group_size] for begin in outputs[:: recipe.group_size]]
        places = [pair_of[output] in pairs for group in groups for _ in range(2) for output in group]
    return torch.tensor(places)


@pytest.mark.parametrize("variant", list(Variant))
def test_gradients_of_a_mixed_batch_stay_in_the_share_of_their_row(variant):
    """One batch: rows of both halves, of everything, and of nothing; equal parameters, so that only the share differs."""
    shares = {"a": Share(1, 2), "b": Share(2, 2), "all": None}
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 16), torch.nn.Tanh(), torch.nn.Linear(16, 16)).requires_grad_(False)
    bank = TrainableBank(torch.device("cpu"))
    bank.join({name: [AdaptedLayer(path, 16, variant, (4,), share) for path in "02"] for name, share in shares.items()})
    assert [family.names for family in bank.families] == [["a"], ["b"], ["all"]]
    for family in bank.families:
        for stack in family.stacks:
            generator = torch.Generator().manual_seed(1)
            stack.parameters.add_(torch.randn(stack.parameters.shape, generator=generator), alpha=0.3)
    x = torch.randn(1, 3, 5).expand(4, 3, 5)
    bank.make_tables()
    with bank.attached(model, ["0", "2"]), bank.routed(torch.tensor([0, 1, 2, -1])):
        model(x).square().sum().backward()
    squares = torch.cat(collect_gradients(bank))
    a, b, whole = ([stack.gradients[:, :, 0] for stack in family.stacks] for family in bank.families)
    for of_a, of_b, of_all in zip(a, b, whole, strict=True):
        masked = of_all.clone()
        places = bank.families[0].stacks[0].trained
        masked[..., ~places] = 0.0
        assert torch.equal(of_a, masked)
        assert torch.equal(of_b, of_all - masked)
        assert of_a.abs().max() > 0
        assert of_b.abs().max() > 0
    assert torch.allclose(squares, torch.stack([sum(g.square().sum() for g in part) for part in (a, b, whole)]))


def test_a_gradient_outside_of_the_share_that_is_not_finite_harms_nothing():
    layer = AdaptedLayer("0", 8, Variant.ROAD_1, (4,), Share(1, 2))
    bank = TrainableBank(torch.device("cpu"))
    bank.join({"a": [layer]})
    bank.make_tables()
    (table,) = bank._tables.values()
    table.chain[0].direct.grad = torch.tensor([[1.0, 1.0, 1.0, 1.0, torch.nan, 1.0, torch.inf, 1.0]])
    table.chain[0].cross.grad = torch.zeros(1, 8)
    (squares,) = collect_gradients(bank)
    assert squares.item() == 8.0  # two pairs, alpha alone: (1 + 1)^2 each


def test_an_interrupted_run_of_shares_goes_on_to_the_same_bits(some_jobs, tiny_path, tmp_path):
    class Stop(Observer):
        steps = 0

        def on_step(self, reports, seconds):
            self.steps += 1
            if self.steps == 5:
                raise KeyboardInterrupt

    changes = {"weight_decay": 0.1, "targets": "all-linear"}
    made = {
        name: [
            {**job, "share": share} for job, share in zip(some_jobs(4, tmp_path / name, **changes), SHARES, strict=True)
        ]
        for name in ("whole", "cut")
    }
    often = RunSettings(checkpoint_steps=3)
    whole = train_many(made["whole"], model=str(tiny_path), settings=often)
    with pytest.raises(KeyboardInterrupt):
        train_many(made["cut"], model=str(tiny_path), settings=often, observers=[Stop()])
    resumed = train_many(made["cut"], model=str(tiny_path), settings=often, resume=True)
    assert resumed.steps == 5
    for job in whole.jobs:
        files = [(Path(one.output) / "adapter_model.safetensors").read_bytes() for one in (job, resumed[job.name])]
        assert files[0] == files[1]


def test_a_run_does_not_go_on_with_another_share(some_jobs, tiny_path):
    class Stop(Observer):
        def on_step(self, reports, seconds):
            raise KeyboardInterrupt

    (job,) = some_jobs(1, share="1/2")
    with pytest.raises(KeyboardInterrupt):
        train_many([job], model=str(tiny_path), observers=[Stop()])
    with pytest.raises(ConfigError, match=r"got other settings than the interrupted run .*job0"):
        train_many([{**job, "share": "2/2"}], model=str(tiny_path), resume=True)


def test_halves_of_one_run_join_to_one_adapter(some_jobs, tiny_path):
    a, b = some_jobs(2, variant="road_2", targets="all-linear")
    train_many([{**a, "share": "1/2"}, {**b, "share": "2/2"}], model=str(tiny_path))
    halves = [checkpoint.load(job["output"]) for job in (a, b)]
    both = join(halves)
    for share, half in zip(("1/2", "2/2"), halves, strict=True):
        for path, layer in restrict(both, share).layers.items():
            assert torch.equal(layer.theta, half.layers[path].theta)
            assert torch.equal(layer.alpha, half.layers[path].alpha)
    batch = torch.arange(3, 40).unsqueeze(0)
    bank = roadie.AdapterBank(AutoModelForCausalLM.from_pretrained(tiny_path).eval(), slots=4)
    bank.admit("both", both)
    for name, half in zip("ab", halves, strict=True):
        bank.admit(name, half)
    with torch.no_grad(), bank.rows(["both", {"a": 1, "b": 1}, "a"]):
        joined, blended, one = bank.model(batch.expand(3, -1)).logits
    assert torch.allclose(joined, blended, atol=1e-4)  # exp of a sum of logarithms, in float64, rounded to float32
    assert not torch.allclose(joined, one, atol=1e-3)


def test_the_jobs_file_says_shares(tmp_path):
    (tmp_path / "jobs.yaml").write_text(
        "defaults: {data: x.txt, output: '{name}', share: 1/2}\n"
        "jobs:\n  - {name: a}\n  - {name: b, share: 2/2 interleaved}\n  - {name: c, share: null}\n"
    )
    plan = roadie.training.many.read_jobs(tmp_path / "jobs.yaml")
    assert [job.recipe.share for job in plan.jobs] == ["1/2", "2/2 interleaved", None]
    for job in plan.jobs:
        assert Job.from_mapping(copy.deepcopy(job.to_mapping())) == job


@pytest.mark.parametrize("share", ["3/2", 0.5, "half", "1/2 mirrored", True, ""])
def test_what_is_no_share_is_refused_by_name(share):
    with pytest.raises(ConfigError, match="job 'a': got share"):
        Plan.from_mapping({"jobs": [{"name": "a", "data": "x.txt", "output": "o", "share": share}]})


def test_a_share_without_a_pair_is_refused(some_jobs, tiny_path):
    (job,) = some_jobs(1, share="1/1000", targets=["q_proj"])
    with pytest.raises(ConfigError, match=r"job 'job0': got share='1/1000', which has no pair .*\(32\)"):
        train_many([job], model=str(tiny_path))
