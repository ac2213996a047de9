"""What is asked of a family of models: that adapters do there what they mean, or that roadie says why they cannot.

The truth is the plain model with weights ``R W`` and biases ``R b``, R written out as dense matrices; it shares nothing with
roadie's layers, banks and kernels, and its gradients are autograd's.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import peft
import torch
from tests.families.models import ROWS, TOKENS, Family
from tests.laws.reference import dense_rotation
from tests.laws.tuner import layers_of, sites_of
from torch import Tensor, nn

import roadie
from roadie.bank.blends import BASE
from roadie.testing.accuracy import relative_error, unit_roundoff
from roadie.testing.models import randomise
from roadie.tuner.experts import RoadExperts
from roadie.tuner.weight import is_conv1d

VARIANTS = {"first": "road_1", "second": "road_2"}
EXPERTS = {"first": "each", "second": "shared"}

# The models compute in float64, but for their norms, positions and softmaxes, of which many compute in float32 whatever they
# are given. A value passes some fifty such operations, forward and backward, each of which sums some forty numbers: two
# computations of the same thing differ by at most 2000 roundings. A rotation that is missing, or one of another row, is off by
# more than a hundredth.
BOUND = 2000 * unit_roundoff(torch.float32)

NO_CHECKPOINTS = "transformers has no gradient checkpointing there"
NO_TEXT = "the model writes no text, or none in float64"


@dataclass
class Adapted:
    """A model of a family with two adapters, one of each kind of memory in training."""

    family: Family
    model: Any
    truths: dict[str, tuple[Tensor, dict[str, Tensor]]] = field(default_factory=dict)

    @cached_property
    def plain(self) -> Any:
        """The model without adapters, to look at."""
        return self.family.model()

    @classmethod
    def of(cls, family: Family, *, with_experts: bool = False) -> Adapted:
        """All linear layers adapted, by rotations that are far from the identity; stacked experts too, each and shared."""
        model: Any = None
        for name, variant in VARIANTS.items():
            config = roadie.RoadConfig(
                target_modules="all-linear",
                variant=variant,
                group_size=4,
                adapt_group_size=True,
                target_experts=EXPERTS[name] if with_experts else None,
            )
            if model is None:
                model = roadie.get_peft_model(family.model(), config, adapter_name=name, autocast_adapter_dtype=False)
            else:
                model.add_adapter(name, config, autocast_adapter_dtype=False)
        return cls(family, randomise(model.double(), scale=0.2).eval())

    def outputs(self, rows: int = ROWS, length: int = TOKENS, **arguments: Any) -> Tensor:
        """What the model says of a batch."""
        return logits(self.model(**inputs(self.family, rows, length), **arguments))

    def parameters(self, name: str) -> dict[str, nn.Parameter]:
        """theta and alpha of an adapter, by the path of the layer in the plain model and their name."""
        found = {}
        for path, layer in sites_of(self.model).items():
            for kind in ("road_theta", "road_alpha"):
                if name not in layer.road_theta:
                    continue
                found[f"{path.removeprefix('base_model.model.')}.{kind}"] = getattr(layer, kind)[name]
        return found


def inputs(family: Family, rows: int, length: int) -> dict[str, Tensor]:
    """A batch for a family, in float64 where it is made of numbers."""
    batch = family.inputs(rows, length)
    return {key: value.double() if value.is_floating_point() else value for key, value in batch.items()}


def logits(output: Any) -> Tensor:
    """The logits of a model's output."""
    value: Tensor = output.logits if hasattr(output, "logits") else output[0]
    return value


def truth(adapted: Adapted, name: str) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits and gradients (of `loss`) of the plain model whose weights are rotated by dense matrices; computed once."""
    if name not in adapted.truths:
        with torch.enable_grad():
            adapted.truths[name] = _truth(adapted, name)
    return adapted.truths[name]


def _truth(adapted: Adapted, name: str) -> tuple[Tensor, dict[str, Tensor]]:
    plain = adapted.plain
    leaves = {key: value.detach().clone().requires_grad_() for key, value in adapted.parameters(name).items()}
    rotated: dict[str, Tensor] = {}
    for path, layer in sites_of(adapted.model).items():
        path = path.removeprefix("base_model.model.")
        if path + ".road_theta" not in leaves:
            continue
        theta, alpha = leaves[path + ".road_theta"], leaves[path + ".road_alpha"]
        kind = layer.variant[name], layer.group_size[name]
        if isinstance(layer, RoadExperts):
            rotated.update(rotated_experts(plain, path, theta, alpha, *kind))
            continue
        module: Any = plain.get_submodule(path)
        matrix = dense_rotation(theta, alpha, *kind)
        rotated[path + ".weight"] = module.weight @ matrix.mT if is_conv1d(module) else matrix @ module.weight
        if module.bias is not None:
            rotated[path + ".bias"] = matrix @ module.bias
    output = logits(torch.func.functional_call(plain, rotated, (), inputs(adapted.family, ROWS, TOKENS)))
    gradients = torch.autograd.grad(loss(output), list(leaves.values()), allow_unused=True, materialize_grads=True)
    return output.detach(), dict(zip(leaves, gradients, strict=True))


def rotated_experts(
    plain: nn.Module, path: str, theta: Tensor, alpha: Tensor, variant: str, group_size: int
) -> dict[str, Tensor]:
    """The weight, and the bias, of one projection of stacked experts, expert by expert turned by dense matrices."""
    holder, _, site = path.rpartition(".")
    experts: Any = plain.get_submodule(holder)
    name = site.removeprefix("road_").removesuffix("_shared")
    weight, bias = getattr(experts, f"{name}_proj"), getattr(experts, f"{name}_proj_bias", None)
    number = len(weight)
    halves = 2 if name == "gate_up" else 1
    shares = [vector.view(1 if site.endswith("_shared") else number, halves, -1) for vector in (theta, alpha)]
    weights, biases = [], []
    for expert in range(number):
        own = [share[expert % len(share)] for share in shares]
        matrix = torch.block_diag(
            *(dense_rotation(own[0][half], own[1][half], variant, group_size) for half in range(halves))
        )
        if halves == 2 and not getattr(experts, "is_concatenated", True):  # gate 0, up 0, gate 1, up 1, ...
            places = torch.arange(len(matrix)).view(-1, 2).T.flatten().argsort()
            matrix = matrix[places][:, places]
        weights.append(weight[expert] @ matrix.mT if experts.is_transposed else matrix @ weight[expert])
        biases += [] if bias is None else [matrix @ bias[expert]]
    found = {f"{holder}.{name}_proj": torch.stack(weights)}
    return found if bias is None else {**found, f"{holder}.{name}_proj_bias": torch.stack(biases)}


def loss(output: Tensor) -> Tensor:
    """A number in which every logit counts, each by another weight."""
    generator = torch.Generator().manual_seed(2)
    return (output * torch.randn(output.shape, generator=generator, dtype=output.dtype)).sum()


def check_forward(adapted: Adapted) -> None:
    """Logits of each adapter are those of rotated weights."""
    for name in VARIANTS:
        adapted.model.set_adapter(name)
        with torch.no_grad():
            _near(adapted.outputs(), truth(adapted, name)[0], f"logits of {name}")


def check_backward(adapted: Adapted) -> None:
    """Gradients of each adapter are those of rotated weights; all of them together, and no layer's is lost."""
    for name in VARIANTS:
        adapted.model.set_adapter(name)
        _check_gradients(adapted, name, adapted.outputs)


def check_checkpointed(adapted: Adapted) -> None:
    """The same with checkpoints of activations, which run blocks again in backward."""
    if not adapted.model.get_base_model().supports_gradient_checkpointing:
        raise NotImplementedError(NO_CHECKPOINTS)
    adapted.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for module in adapted.model.modules():  # they are made in training only, and nothing is to be dropped
        if getattr(module, "gradient_checkpointing", False):
            module.training = True
    try:
        check_backward(adapted)
    finally:
        adapted.model.gradient_checkpointing_disable()
        adapted.model.eval()


def _check_gradients(adapted: Adapted, name: str, run: Callable[[], Tensor]) -> None:
    parameters = adapted.parameters(name)
    gradients = torch.autograd.grad(loss(run()), list(parameters.values()), allow_unused=True, materialize_grads=True)
    wanted = truth(adapted, name)[1]
    for key, got in zip(parameters, gradients, strict=True):
        assert bool(got.any()) == bool(wanted[key].any()), f"{key}: one of two gradients is zero"
    got, true = (torch.cat([part.flatten() for part in parts]) for parts in (gradients, wanted.values()))
    _near(got, true, f"gradients of {name}")


def check_mixed_rows(adapted: Adapted) -> None:
    """A row of a batch goes through its own adapter, also where the batch has as many rows as tokens."""
    for rows in (ROWS, TOKENS):
        names = [["first", "second", BASE][row % 3] for row in range(rows)]
        with torch.no_grad():
            mixed = adapted.outputs(rows, adapter_names=names)
            for name in VARIANTS:
                adapted.model.set_adapter(name)
                _near_rows(mixed, adapted.outputs(rows), [row for row in range(rows) if names[row] == name], name)
            with adapted.model.disable_adapter():
                _near_rows(mixed, adapted.outputs(rows), [row for row in range(rows) if names[row] == BASE], BASE)


def check_beams(adapted: Adapted) -> None:
    """A row of a batch is continued by its own adapter through beams, of which each row has several."""
    if not adapted.plain.can_generate() or adapted.family.kind == "xlnet":  # which makes inputs in float32 for itself
        raise NotImplementedError(NO_TEXT)
    names = list(VARIANTS)
    prompts = inputs(adapted.family, len(names), TOKENS)["input_ids"]
    mixed = _beams(adapted, prompts, adapter_names=names)
    for row, name in enumerate(names):
        adapted.model.set_adapter(name)
        alone = _beams(adapted, prompts[row : row + 1])
        assert torch.equal(mixed.sequences[row : row + 1], alone.sequences), f"beams of {name}"
        _near(mixed.sequences_scores[row : row + 1], alone.sequences_scores, f"scores of beams of {name}")


def _beams(adapted: Adapted, prompts: Tensor, **arguments: Any) -> Any:
    tokens = {"eos_token_id": None, "pad_token_id": 0, "decoder_start_token_id": 0}
    how = {
        "num_beams": 2,
        "max_new_tokens": 2,
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_scores": True,
    }
    with torch.no_grad():
        return adapted.model.generate(input_ids=prompts, **tokens, **how, **arguments)


def check_merge(adapted: Adapted) -> None:
    """Merged into the weights an adapter says the same, and the base model is what it was after."""
    model = adapted.model
    with torch.no_grad(), model.disable_adapter():
        before = adapted.outputs()
    for name in VARIANTS:
        model.set_adapter(name)
        with torch.no_grad():
            unmerged = adapted.outputs()
            model.merge_adapter()
            _near(adapted.outputs(), unmerged, f"merged {name}")
            model.unmerge_adapter()
            with model.disable_adapter():
                _near(adapted.outputs(), before, f"unmerged {name}")


def check_files(adapted: Adapted) -> None:
    """Saved and loaded into another copy of the model each adapter says the same."""
    first, second = VARIANTS
    how = {"autocast_adapter_dtype": False}
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        adapted.model.save_pretrained(folder)
        again = peft.PeftModel.from_pretrained(adapted.family.model(), f"{folder}/{first}", first, **how)
        again.load_adapter(f"{folder}/{second}", second, **how)
        loaded = Adapted(adapted.family, again.eval())
        for name in VARIANTS:
            for one in (adapted, loaded):
                one.model.set_adapter(name)
            _near(loaded.outputs(), adapted.outputs(), f"loaded {name}")


def _near_rows(got: Tensor, wanted: Tensor, rows: list[int], what: str) -> None:
    assert got.shape == wanted.shape, f"{what}: got {list(got.shape)}; wanted {list(wanted.shape)}"
    _near(got[rows], wanted[rows], f"rows of {what}")


def _near(got: Tensor, wanted: Tensor, what: str) -> None:
    error = relative_error(got, wanted)
    assert error <= BOUND, f"{what}: got an error of {error:.2g}; wanted at most {BOUND:.2g}"


CHECKS: dict[str, Callable[[Adapted], None]] = {
    "forward": check_forward,
    "backward": check_backward,
    "checkpointed": check_checkpointed,
    "mixed rows": check_mixed_rows,
    "beams": check_beams,
    "merge": check_merge,
    "files": check_files,
}


@dataclass(frozen=True)
class Row:
    """What came of a family: how many layers are adapted, the names of linear layers that are not, and a word for each check.

    said: the message for whatever is refused, by check; under "all" where the family cannot be adapted at all.
    """

    adapted: int
    left_out: tuple[str, ...]
    said: dict[str, str]


def row_of(family: Family, *, with_experts: bool = False) -> Row:
    """What each check says of a family; raises AssertionError where something is wrong in silence."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            adapted = Adapted.of(family, with_experts=with_experts)
        except roadie.errors.RoadieError as error:
            return Row(0, (), {"all": str(error)})
        said = {name: _said(check, adapted) for name, check in CHECKS.items()}
        adapted_sites = [layer for layer in sites_of(adapted.model).values() if "first" in layer.road_theta]
        return Row(len(adapted_sites), _left_out(adapted), {k: v for k, v in said.items() if v})


def _said(check: Callable[[Adapted], None], adapted: Adapted) -> str:
    try:
        check(adapted)
    except (roadie.errors.RoadieError, NotImplementedError) as error:
        return str(error)
    return ""


def _left_out(adapted: Adapted) -> tuple[str, ...]:
    plain = adapted.plain
    there = {path.removeprefix("base_model.model.") for path in layers_of(adapted.model)}
    head = plain.get_output_embeddings() if hasattr(plain, "get_output_embeddings") else None
    names = [
        path.rpartition(".")[2]
        for path, module in plain.named_modules()
        if (isinstance(module, nn.Linear) or is_conv1d(module)) and path not in there and module is not head
    ]
    return tuple(sorted(set(names)))
