"""From two checkpoints on the disk: what was planted is found, and what does not fit is refused, or reported."""

from __future__ import annotations

import json
import math
from pathlib import Path

import peft
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from roadie import checkpoint, fit
from roadie.adapter import Adapter
from roadie.errors import AdapterError, CheckpointError, ConfigError, UnsafeCheckpointError
from roadie.rotation import Rotation, from_parameters, parameter_size, rotate_weight, to_blocks
from roadie.testing import stock_peft

G = 4
LAYERS = {"m.layers.0.q": (8, 16), "m.layers.10.q": (8, 16), "m.layers.2.up": (24, 16)}


def tensors(dtype: torch.dtype = torch.float32, bias: bool = True) -> dict[str, Tensor]:
    made = {"m.embed_tokens.weight": torch.randn(32, 16), "m.norm.weight": torch.ones(16)}
    for path, shape in LAYERS.items():
        made[f"{path}.weight"] = torch.randn(shape)
        if bias:
            made[f"{path}.bias"] = torch.randn(shape[0])
    return {name: tensor.to(dtype) for name, tensor in made.items()}


def turns(variant: str = "road_2") -> dict[str, Rotation]:
    found = {}
    for path, (outputs, _) in LAYERS.items():
        size = parameter_size(variant, outputs)
        theta, alpha = 0.3 * torch.randn(2, size, dtype=torch.float64)
        found[path] = from_parameters(theta, 1 + alpha, variant, G)
    return found


def turned(base: dict[str, Tensor], rotations: dict[str, Rotation]) -> dict[str, Tensor]:
    """R W and R b, computed in float64 and rounded once."""
    return {
        name: rotate_weight(tensor.double(), rotations[name.rpartition(".")[0]]).to(tensor.dtype)
        if name.rpartition(".")[0] in rotations
        else tensor
        for name, tensor in base.items()
    }


def fitted(*arguments: object, **settings: object) -> fit.Fit:
    return fit.from_checkpoints(*arguments, **{"group_size": G, **settings})  # type: ignore[arg-type]


def worst(adapter: Adapter, rotations: dict[str, Rotation]) -> float:
    return max(
        float((getattr(adapter.layers[path].rotation, part) - getattr(rotation, part)).abs().max())
        for path, rotation in rotations.items()
        for part in ("direct", "cross")
    )


@pytest.mark.parametrize("variant", ["road_1", "road_2", "road_4"])
@pytest.mark.parametrize("shards", [(1, 1), (3, 2)])
def test_what_was_planted_is_found(write, variant, shards) -> None:
    base, rotations = tensors(), turns(variant)
    folders = write("base", base, shards[0]), write("tuned", turned(base, rotations), shards[1])
    found = fitted(*folders, variant=variant)
    assert worst(found.adapter, rotations) < 1e-6
    assert list(found.adapter.layers) == sorted(LAYERS, key=lambda path: int(path.split(".")[2]))
    assert found.adapter.variants == (variant,)
    for report in found.layers.values():
        assert report.share_explained > 1 - 1e-12
        assert report.kept
        before = torch.cat((base[f"{report.path}.weight"], base[f"{report.path}.bias"][:, None]), 1).double()
        change = rotate_weight(before, rotations[report.path]) - before
        assert report.norm == pytest.approx(float(before.norm()), rel=1e-12)
        assert report.change == pytest.approx(float(change.norm()), rel=1e-6)
        assert report.parameters == 2 * parameter_size(variant, report.outputs)
    assert found.not_fitted == ()
    assert found.share_explained == pytest.approx(1, abs=1e-12)


def test_bfloat16_is_found_as_well_as_it_is_stored(write) -> None:
    """Each row of R W is off by half an ulp, 2^-9 of each element at most; the block by that over the smallest singular value."""
    base, rotations = tensors(torch.bfloat16), turns()
    tuned = turned(base, rotations)
    found = fitted(write("base", base), write("tuned", tuned))
    for path, rotation in rotations.items():
        rows = torch.cat((base[f"{path}.weight"], base[f"{path}.bias"][:, None]), 1).double()
        after = rotate_weight(rows, rotation)
        blocks = to_blocks(found.adapter.layers[path].rotation).double() - to_blocks(rotation)
        half = G // 2
        for k, block in enumerate(blocks):
            i = k // half * G + k % half
            smallest = torch.linalg.svdvals(rows[[i, i + half]])[1]
            rounding = 2.0**-9 * after[[i, i + half]].norm(dim=1)
            # And float32, in which the parameters are stored.
            bound = rounding / smallest + 4 * torch.finfo(torch.float32).eps
            assert bool((block.norm(dim=1) <= bound).all())


def test_dtypes_may_differ_and_float64_is_kept(write) -> None:
    base, rotations = tensors(), turns()
    wide = {name: tensor.double() for name, tensor in base.items()}
    tuned = turned(wide, rotations)
    found = fitted(write("base", base), write("tuned", tuned))
    assert {layer.theta.dtype for layer in found.adapter.layers.values()} == {torch.float64}
    assert worst(found.adapter, rotations) < 1e-13
    assert found.not_fitted == ()  # the same numbers in another dtype are no change


def test_parameters_are_saved_and_loaded_by_stock_peft(write, tmp_path) -> None:
    """Base and tuned Llama on the disk -> adapter -> PEFT's own RoAd gives the tuned model's logits."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes, attention_bias=True)).eval()
    model.save_pretrained(tmp_path / "base", max_shard_size="40KB")
    ids = torch.arange(12)[None]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "proj.weight" in name or "proj.bias" in name:
                torch.manual_seed(len(name.rpartition(".")[0]))
                theta, alpha = 0.3 * torch.randn(2, len(parameter))
                parameter.copy_(rotate_weight(parameter, from_parameters(theta, 1 + alpha, "road_2", 32)))
        wanted = model(ids).logits
    model.save_pretrained(tmp_path / "tuned", max_shard_size="60KB")
    assert (tmp_path / "base" / "model.safetensors.index.json").exists()
    found = fit.from_checkpoints(tmp_path / "base", tmp_path / "tuned", group_size=32)
    checkpoint.save(found.adapter, tmp_path / "adapter")
    assert found.adapter.config["task_type"] == "CAUSAL_LM"
    assert found.adapter.config["target_modules"] == [
        f"{name}_proj" for name in ("down", "gate", "k", "o", "q", "up", "v")
    ]
    assert found.not_fitted == ()
    with stock_peft():
        loaded = peft.PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(tmp_path / "base"), str(tmp_path / "adapter")
        ).eval()
    with torch.no_grad():
        assert float((loaded(ids).logits - wanted).abs().max()) < 1e-5 * float(wanted.abs().max())
    assert [path for path, _ in loaded.named_modules() if path.endswith("road_theta")] != []


def test_of_a_full_change_the_rest_is_reported(write) -> None:
    base = tensors(bias=False)
    tuned = {name: tensor + 0.1 * torch.randn_like(tensor) for name, tensor in base.items()}
    found = fitted(write("base", base), write("tuned", tuned))
    for path, report in found.layers.items():
        before, after = (each[f"{path}.weight"].double() for each in (base, tuned))
        left = after - rotate_weight(before, found.adapter.layers[path].rotation)
        share = 1 - float(left.norm() / (after - before).norm()) ** 2
        assert report.share_explained == pytest.approx(share, rel=1e-5)
        assert 0 < share < 0.5
    others = {each.name: each for each in found.not_fitted}
    assert set(others) == {"m.embed_tokens.weight", "m.norm.weight"}
    change = float((tuned["m.norm.weight"] - base["m.norm.weight"]).double().norm())
    assert others["m.norm.weight"].change == pytest.approx(change, rel=1e-6)
    assert others["m.norm.weight"].reason is fit.Reason.NOT_A_TARGET
    explained = sum(r.change**2 - r.error**2 for r in found.layers.values())
    whole = sum(r.change**2 for r in found.layers.values())
    assert found.share_explained == pytest.approx(explained / whole)
    assert found.share_of_everything == pytest.approx(explained / (whole + sum(o.change**2 for o in others.values())))
    json.dumps(found.to_mapping(), allow_nan=False)


def test_layers_are_left_out_where_nothing_or_little_is_explained(write) -> None:
    base, rotations = tensors(), turns()
    del rotations["m.layers.0.q"]
    tuned = turned(base, rotations)
    tuned["m.layers.2.up.weight"] += 3 * torch.randn(24, 16)
    found = fitted(write("base", base), write("tuned", tuned), minimum_share=0.9)
    assert list(found.adapter.layers) == ["m.layers.10.q"]
    assert [report.kept for report in found.layers.values()] == [False, False, True]
    assert found.layers["m.layers.0.q"].share_explained == 0
    assert found.layers["m.layers.0.q"].change == 0
    assert found.adapter.config["target_modules"] == ["m.layers.10.q"]


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["q"], {"m.layers.0.q", "m.layers.10.q"}),
        (["m.layers.2.up"], {"m.layers.2.up"}),
        (r".*layers\.(0|2)\..*", {"m.layers.0.q", "m.layers.2.up"}),
        ("all-linear", set(LAYERS)),
    ],
)
def test_targets(write, targets, expected) -> None:
    base = tensors()
    found = fitted(write("base", base), write("tuned", turned(base, turns())), target_modules=targets)
    assert set(found.adapter.layers) == expected
    untouched = set(LAYERS) - expected
    assert {each.name for each in found.not_fitted} == {f"{p}.{part}" for p in untouched for part in ("weight", "bias")}


@pytest.mark.parametrize(
    "name",
    ["lm_head", "transformer.wte", "transformer.wpe", "shared", "embeddings.word_embeddings", "embed_tokens", "bert.emb",
     "block.0.relative_attention_bias", "model.embed_positions", "embed_out", "score_of_words"],
)  # fmt: skip
def test_embeddings_and_heads_are_never_fitted(write, name) -> None:
    base = {"x.0.proj.weight": torch.randn(8, 4), f"{name}.weight": torch.randn(12, 4)}
    tuned = {key: 2 * tensor for key, tensor in base.items()}
    config = {"vocab_size": 12}
    found = fitted(write("base", base, config=config), write("tuned", tuned))
    assert list(found.layers) == ["x.0.proj"]
    assert [each.name for each in found.not_fitted] == [f"{name}.weight"]


def test_layers_in_blocks_may_be_as_wide_as_the_vocabulary(write) -> None:
    base = {"x.0.shared_expert.weight": torch.randn(12, 4)}
    folders = (
        write("base", base, config={"vocab_size": 12}),
        write("tuned", {"x.0.shared_expert.weight": torch.randn(12, 4)}),
    )
    assert list(fitted(*folders).layers) == ["x.0.shared_expert"]


def test_conv1d_is_read_across(write) -> None:
    weight, bias, rotation = torch.randn(6, 8), torch.randn(8), turns()["m.layers.0.q"]
    base = {"h.0.attn.c_attn.weight": weight, "h.0.attn.c_attn.bias": bias}
    tuned = {
        "h.0.attn.c_attn.weight": rotate_weight(weight.double(), rotation, dim=1).float(),
        "h.0.attn.c_attn.bias": rotate_weight(bias.double(), rotation).float(),
    }
    folders = write("base", base, config={"model_type": "gpt2"}), write("tuned", tuned)
    assert worst(fitted(*folders).adapter, {"h.0.attn.c_attn": rotation}) < 1e-6
    place = {"h.0.attn.c_attn": fit.Place("transformer.h.0.attn.c_attn", transposed=True)}
    named = fitted(*folders, places=place)
    assert worst(named.adapter, {"transformer.h.0.attn.c_attn": rotation}) < 1e-6


def test_tied_copies_are_no_change(write) -> None:
    """One model stores the tied output head, the other does not."""
    base, rotations = tensors(), turns()
    tuned = turned(base, rotations) | {"lm_head.weight": base["m.embed_tokens.weight"].clone()}
    assert fitted(write("base", base), write("tuned", tuned)).not_fitted == ()
    assert fitted(write("base2", tuned | base), write("tuned2", turned(base, rotations))).not_fitted == ()
    tuned["lm_head.weight"] = tuned["lm_head.weight"] + 1
    (other,) = fitted(write("base3", base), write("tuned3", tuned)).not_fitted
    assert (other.name, other.reason, other.change) == ("lm_head.weight", fit.Reason.ADDED, None)


def test_other_tensors_may_be_missing_extra_or_of_another_shape(write) -> None:
    base, rotations = tensors(), turns()
    tuned = turned(base, rotations)
    del tuned["m.norm.weight"]
    tuned |= {"m.layers.0.k.bias": torch.ones(3), "m.embed_tokens.weight": torch.randn(33, 16)}
    found = fitted(write("base", base), write("tuned", tuned))
    assert {each.name: each.reason for each in found.not_fitted} == {
        "m.norm.weight": fit.Reason.REMOVED,
        "m.layers.0.k.bias": fit.Reason.ADDED,
        "m.embed_tokens.weight": fit.Reason.SHAPE,
    }
    assert worst(found.adapter, rotations) < 1e-6


def test_masks_that_are_infinite_are_no_change(write) -> None:
    base = tensors() | {"m.layers.0.mask": torch.full((4, 4), -math.inf)}
    tuned = turned(base, turns())
    assert fitted(write("base", base), write("tuned", tuned)).not_fitted == ()
    tuned["m.layers.0.mask"] = torch.zeros(4, 4)
    (other,) = fitted(write("base2", base), write("tuned2", tuned)).not_fitted
    assert other.change is None


@pytest.mark.parametrize("where", ["base", "tuned"])
@pytest.mark.parametrize("name", ["m.layers.0.q.weight", "m.layers.2.up.bias"])
def test_numbers_that_are_not_finite_are_refused(write, where, name) -> None:
    base = tensors()
    both = {"base": base, "tuned": turned(base, turns())}
    both[where][name] = both[where][name].clone(memory_format=torch.contiguous_format)
    both[where][name].view(-1)[3] = math.nan
    with pytest.raises(CheckpointError, match=rf"{where}.*{name}: got 1 values that are not finite"):
        fitted(write("base", both["base"]), write("tuned", both["tuned"]))


def test_targeted_tensors_must_be_there_and_alike(write) -> None:
    base = tensors()
    tuned = turned(base, turns())
    for number, (change, text) in enumerate(
        [
            ({"m.layers.0.q.weight": None}, "m.layers.0.q.weight: got no such tensor"),
            ({"m.layers.0.q.bias": None}, "m.layers.0.q.bias: got no such tensor"),
            ({"m.layers.0.q.weight": torch.randn(8, 15)}, r"got shape \[8, 15\]; wanted \[8, 16\]"),
            ({"m.layers.0.q.weight": torch.ones(8, 16, dtype=torch.uint8)}, "dtype U8; wanted one of BF16"),
        ]
    ):
        changed = {key: tensor for key, tensor in {**tuned, **change}.items() if tensor is not None}
        with pytest.raises(CheckpointError, match=text):
            fitted(write(f"base{number}", base), write(f"tuned{number}", changed))


def test_nothing_to_fit_is_refused(write) -> None:
    base = tensors()
    same = write("base", base), write("tuned", base)
    with pytest.raises(AdapterError, match="do not differ"):
        fitted(*same)
    noise = {name: tensor + torch.randn_like(tensor) for name, tensor in base.items()}
    with pytest.raises(AdapterError, match=r"minimum_share=99\.00%"):
        fitted(same[0], write("noise", noise), minimum_share=0.99)
    with pytest.raises(ConfigError, match=r"'nothing'.*such as \['q', 'up'\]"):
        fitted(*same, target_modules=["nothing"])


@pytest.mark.parametrize(
    ("settings", "error", "text"),
    [
        ({"group_size": 3}, ConfigError, "divisible by 2"),
        ({"group_size": 16}, ConfigError, "m.layers"),
        ({"variant": "road_3"}, ConfigError, "road_1"),
        ({"ridge": -1.0}, ConfigError, "ridge"),
        ({"minimum_share": 1.0}, ConfigError, "minimum_share"),
        ({"target_modules": "("}, ConfigError, "regular expression"),
        ({"target_modules": []}, ConfigError, "names of linear layers"),
        ({"colour": "blue"}, TypeError, "colour"),
    ],
)
def test_settings_that_do_not_fit_are_refused(write, settings, error, text) -> None:
    base = tensors()
    with pytest.raises(error, match=text):
        fitted(write("base", base), write("tuned", turned(base, turns())), **settings)


def test_group_sizes_may_adapt(write) -> None:
    base = tensors()
    found = fitted(write("base", base), write("tuned", turned(base, turns())), group_size=16, adapt_group_size=True)
    assert found.adapter.group_sizes == (8,)
    assert found.adapter.config["adapt_group_size"] is True


def test_folders_that_hold_no_model_are_refused(write, tmp_path) -> None:
    good = write("good", tensors())
    empty, pickled, adapter, broken = (tmp_path / name for name in ("empty", "pickled", "adapter", "broken"))
    for folder in (empty, pickled, adapter, broken):
        folder.mkdir()
    (pickled / "pytorch_model.bin").write_bytes(b"PK")
    (adapter / "adapter_config.json").write_text("{}")
    (broken / "model.safetensors").write_bytes(b"12345678901234567890")
    for folder, error, text in (
        (empty, CheckpointError, "got neither"),
        (tmp_path / "none", CheckpointError, "no such folder"),
        (pickled, UnsafeCheckpointError, r"pytorch_model\.bin"),
        (adapter, CheckpointError, "from_lora"),
        (broken, CheckpointError, "corrupt or truncated"),
    ):
        with pytest.raises(error, match=text):
            fitted(good, folder)
        with pytest.raises(error, match=text):
            fitted(folder, good)


@pytest.mark.parametrize(
    ("index", "text"),
    [
        ("no json", "not JSON"),
        ("[]", "a JSON list"),
        ('{"weight_map": []}', "tensor name -> file name"),
        ('{"weight_map": {"a.weight": "../model.safetensors"}}', "file beside the index"),
        ('{"weight_map": {"a.weight": "model.bin"}}', "no safetensors"),
        ('{"weight_map": {"a.weight": "gone.safetensors"}}', "no such file"),
        ('{"weight_map": {"m.norm.weight": "model.safetensors", "b": "model.safetensors"}}', "b: got 1 tensors"),
    ],
)
def test_indexes_that_lie_are_refused(write, index, text) -> None:
    folder = write("lies", tensors())
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointError, match=text):
        fitted(write("good", tensors()), folder)


def test_a_file_may_be_named(write) -> None:
    base, rotations = tensors(), turns()
    files = [write(name, each) / "model.safetensors" for name, each in (("a", base), ("b", turned(base, rotations)))]
    assert worst(fitted(*files).adapter, rotations) < 1e-6


def test_every_layer_is_told_of(write) -> None:
    base, told = tensors(), []
    found = fitted(write("base", base), write("tuned", turned(base, turns())), on_layer=told.append)
    assert {report.path: report for report in told} == dict(found.layers)
    assert found.adapter.base_model_name.endswith("base")


def test_nothing_is_written(write, tmp_path: Path) -> None:
    base = tensors()
    folders = write("base", base), write("tuned", turned(base, turns()))
    before = sorted(path.as_posix() for path in tmp_path.rglob("*"))
    fitted(*folders)
    assert sorted(path.as_posix() for path in tmp_path.rglob("*")) == before
