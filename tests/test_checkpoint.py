"""Adapter files: bit for bit, refused with a reason, replaced as a whole."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from roadie import checkpoint
from roadie.adapter import Adapter, LayerParameters
from roadie.checkpoint import CONFIG_NAME, EXTRA_DEFAULTS, WEIGHTS_NAME, replacement
from roadie.errors import CheckpointError, ConfigError, UnsafeCheckpointError
from roadie.rotation import Variant, parameter_size

VARIANTS = tuple(variant.value for variant in Variant)
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
THETA = "base_model.model.a.q.road_theta"


def layer(variant="road_1", out_features=8, group_size=4, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    theta, alpha = torch.randn(2, parameter_size(variant, out_features), generator=generator).to(dtype).unbind()
    return LayerParameters(theta, alpha, variant, group_size)


def small(seed=0, group_size=4, **config):
    layers = {path: layer("road_1", 8, group_size, seed=seed + i) for i, path in enumerate(("a.q", "a.v"))}
    return Adapter(layers, {"group_size": group_size, "variant": "road_1", **config})


def bits(tensor):
    return tensor.dtype, tuple(tensor.shape), tensor.flatten().view(torch.uint8).tolist()


def contents(adapter):
    """Everything an adapter holds, comparable with ==."""
    layers = {
        path: (bits(one.theta), bits(one.alpha), one.variant, one.group_size) for path, one in adapter.layers.items()
    }
    return layers, dict(adapter.config), {name: bits(tensor) for name, tensor in adapter.other.items()}


def files(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


@pytest.fixture
def folder(tmp_path):
    """A good checkpoint, to be spoiled."""
    checkpoint.save(small(), tmp_path / "adapter")
    return tmp_path / "adapter"


def tensors_of(folder):
    return safetensors.torch.load_file(folder / WEIGHTS_NAME)


def write_tensors(folder, tensors):
    safetensors.torch.save_file(tensors, folder / WEIGHTS_NAME, {"format": "pt"})


def edit_config(folder, **changes):
    config = json.loads((folder / CONFIG_NAME).read_text())
    (folder / CONFIG_NAME).write_text(json.dumps({**config, **changes}))


# Any tensor that a file may hold, as raw bytes: NaNs with payloads, negative zeros and integers are kept too.
@st.composite
def any_tensors(draw, dtypes=(*DTYPES, torch.int64, torch.uint8, torch.bool, torch.int8)):
    dtype = draw(st.sampled_from(dtypes))
    if dtype is torch.bool:
        return torch.tensor(draw(st.lists(st.booleans(), max_size=4)))
    shape = draw(st.lists(st.integers(0, 3), max_size=2))
    count = torch.Size(shape).numel() * torch.empty(0, dtype=dtype).element_size()
    raw = draw(st.binary(min_size=count, max_size=count))
    return torch.frombuffer(bytearray(raw), dtype=dtype).reshape(shape) if count else torch.empty(shape, dtype=dtype)


@st.composite
def any_parameters(draw, size, dtype):
    values = st.floats(width=16, allow_nan=False, allow_infinity=False)
    return torch.tensor(draw(st.lists(values, min_size=size, max_size=size)), dtype=torch.float64).to(dtype)


NAMES = st.text(st.characters(codec="utf-8", exclude_characters="."), min_size=1, max_size=5)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@st.composite
def adapters(draw):
    paths = draw(st.lists(st.lists(NAMES, min_size=1, max_size=3).map(".".join), min_size=1, max_size=3, unique=True))
    variant, group_size = draw(st.sampled_from(VARIANTS)), draw(st.sampled_from((2, 4, 16, 64)))
    layers = {}
    for path in paths:
        size, dtype = parameter_size(variant, group_size * draw(st.integers(1, 2))), draw(st.sampled_from(DTYPES))
        layers[path] = LayerParameters(
            draw(any_parameters(size, dtype)), draw(any_parameters(size, dtype)), variant, group_size
        )
    unknown = draw(st.dictionaries(st.text(max_size=5).map("x_{}".format), JSON, max_size=3))
    other = draw(st.dictionaries(NAMES.map("base_model.model.{}.weight".format), any_tensors(), max_size=3))
    return Adapter(layers, {**unknown, "peft_type": "ROAD", "variant": variant, "group_size": group_size}, other)


@settings(suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(adapter=adapters())
def test_save_then_load_gives_the_same_bits_and_save_again_the_same_bytes(adapter, tmp_path):
    shutil.rmtree(tmp_path)
    checkpoint.save(adapter, tmp_path / "one")
    loaded = checkpoint.load(tmp_path / "one")
    assert contents(loaded) == contents(adapter)
    checkpoint.save(loaded, tmp_path / "two")
    assert files(tmp_path / "one") == files(tmp_path / "two")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_dtype_and_variant_keeps_its_bits(variant, dtype, tmp_path):
    adapter = Adapter({"a": layer(variant, 32, 16, dtype)}, {"peft_type": "ROAD", "variant": variant, "group_size": 16})
    checkpoint.save(adapter, tmp_path)
    assert contents(checkpoint.load(tmp_path)) == contents(adapter)


def test_layers_that_differ_are_described_by_patterns_whose_order_survives(tmp_path):
    # Sorted, ".*v" would come first and give a.v.v the wrong variant.
    config = {
        "group_size": 8,
        "adapt_group_size": True,
        "variant_pattern": {"v.v": "road_2", ".*v": "road_4"},
        "group_size_pattern": {"q": 2},
    }
    layers = {
        "a.q": layer("road_1", 6, 2),
        "a.v": layer("road_4", 16, 8),
        "a.v.v": layer("road_2", 8, 8),
        "a.k": layer("road_1", 12, 4),
    }
    checkpoint.save(Adapter(layers, config), tmp_path)
    assert contents(checkpoint.load(tmp_path))[0] == contents(Adapter(layers))[0]


def test_parameters_that_share_memory_or_are_being_trained_are_saved(tmp_path):
    table = torch.randn(8, requires_grad=True)
    adapter = Adapter(
        {"a": LayerParameters(table[::2], table[::2], "road_1", 2), "b": LayerParameters(table, table, "road_1", 2)},
        {"peft_type": "ROAD", "variant": "road_1", "group_size": 2},
        {"t": table.reshape(2, 4).T},
    )
    checkpoint.save(adapter, tmp_path)
    loaded = checkpoint.load(tmp_path)
    assert torch.equal(loaded.layers["a"].alpha, table.detach()[::2])
    assert torch.equal(loaded.other["t"], table.detach().reshape(2, 4).T)


def test_a_loaded_adapter_does_not_change_with_its_file(folder):
    loaded = checkpoint.load(folder)
    before = contents(loaded)
    with (folder / WEIGHTS_NAME).open("rb+") as stream:
        stream.seek(-16, os.SEEK_END)
        stream.write(b"\xff" * 16)
    assert contents(loaded) == before


def test_the_weights_file_has_the_mode_the_umask_gives(folder):
    assert (folder / WEIGHTS_NAME).stat().st_mode == (folder / CONFIG_NAME).stat().st_mode


def test_saving_leaves_other_files_alone_and_nothing_behind(folder):
    (folder / "README.md").write_text("card")
    checkpoint.save(small(1), folder)
    checkpoint.save(small(1, group_size=8), folder)
    assert sorted(files(folder)) == ["README.md", CONFIG_NAME, WEIGHTS_NAME]
    assert (folder / "README.md").read_text() == "card"


@pytest.mark.slow
def test_reading_and_writing_need_neither_peft_nor_transformers():
    code = "import sys; from roadie import checkpoint; sys.exit(bool({'peft', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# The config.


def test_the_text_is_laid_out_as_pefts():
    config = {
        "variant": "road_2",
        "peft_type": "ROAD",
        "target_modules": {"v_proj", "q_proj", "k_proj"},
        "modules_to_save": ["z", "a"],
        "auto_mapping": {"z": "1", "base": None},
        "name": "é",
    }
    assert checkpoint.config_text(config) == (
        '{\n  "auto_mapping": {\n    "base": null,\n    "z": "1"\n  },\n  "modules_to_save": [\n    "z",\n    "a"\n  ],\n'
        '  "name": "\\u00e9",\n  "peft_type": "ROAD",\n'
        '  "target_modules": [\n    "k_proj",\n    "q_proj",\n    "v_proj"\n  ],\n'
        '  "variant": "road_2"\n}'
    )


@pytest.mark.parametrize("hash_seed", ["0", "1", "2"])
@pytest.mark.slow
def test_the_text_does_not_depend_on_the_order_of_sets(hash_seed):
    code = (
        "from roadie.checkpoint import config_text as t; print(t({'target_modules': {'a', 'b', 'c', 'd', 'e', 'f'}}))"
    )
    env = {**os.environ, "PYTHONHASHSEED": hash_seed}
    text = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, env=env).stdout
    assert json.loads(text)["target_modules"] == list("abcdef")


EXTRAS = {
    "adapt_group_size": True,
    "bias": "road_only",
    "exclude_modules": {"b", "a"},
    "group_size_pattern": {"q": 2},
    "input_stages": [64],
    "input_stages_pattern": {"q": [2, 64], "k": []},
    "layers_pattern": "h",
    "layers_to_transform": 0,
    "stages": [16, 2, 64],
    "stages_pattern": {"q": [2, 64], "k": [16]},
    "target_experts": "shared",
    "target_towers": True,
    "trainable_token_indices": [3],
    "variant_pattern": {"q": "road_2"},
}


@pytest.mark.parametrize("key", sorted(EXTRA_DEFAULTS))
def test_an_extra_setting_marks_the_variant_and_a_default_one_is_not_written(key, tmp_path):
    plain = {"peft_type": "ROAD", "variant": "road_2"}
    assert checkpoint.config_text({**plain, key: EXTRA_DEFAULTS[key]}) == checkpoint.config_text(plain)
    text = checkpoint.config_text({**plain, key: EXTRAS[key]})
    kind = "-experts" if "experts" in key else "-inputs" if "input" in key else "-stages" if "stages" in key else ""
    prefix = f"roadie{kind}:"
    assert json.loads(text)["variant"] == prefix + "road_2"
    (tmp_path / CONFIG_NAME).write_text(text)
    config = checkpoint.read_config(tmp_path)
    assert config["variant"] == "road_2"
    assert config[key] == (sorted(EXTRAS[key]) if isinstance(EXTRAS[key], set) else EXTRAS[key])
    assert checkpoint.config_text(config) == text


def test_an_extra_setting_marks_a_variant_that_was_left_at_its_default():
    assert json.loads(checkpoint.config_text({"bias": "all"}))["variant"] == "roadie:road_1"


@pytest.mark.parametrize("value", [object(), float("nan"), {"a": torch.zeros(1)}])
def test_a_config_that_is_not_json_is_refused(value):
    with pytest.raises(ConfigError, match="JSON cannot hold"):
        checkpoint.config_text({"x": value})


# Refusals: each names the file, the key where there is one, what it got, what it wants and what to do.


def drop(folder, name):
    tensors = tensors_of(folder)
    del tensors[name]
    write_tensors(folder, tensors)


def put(folder, name, tensor):
    write_tensors(folder, {**tensors_of(folder), name: tensor})


def rename_all(folder, rename):
    write_tensors(folder, {rename(name): tensor for name, tensor in tensors_of(folder).items()})


def write(folder, name, content):
    (folder / name).write_bytes(content)


def cut(folder, size):
    write(folder, WEIGHTS_NAME, (folder / WEIGHTS_NAME).read_bytes()[:size])


def header_length(folder, length):
    write(folder, WEIGHTS_NAME, struct.pack("<Q", length) + (folder / WEIGHTS_NAME).read_bytes()[8:])


def spoiled(value):
    tensor = torch.ones(4)
    tensor[2] = value
    return tensor


FAULTS = {
    "config missing": (lambda f: (f / CONFIG_NAME).unlink(), CONFIG_NAME, "got no such file"),
    "config a folder": (lambda f: ((f / CONFIG_NAME).unlink(), (f / CONFIG_NAME).mkdir()), CONFIG_NAME, "no such file"),
    "config empty": (lambda f: write(f, CONFIG_NAME, b""), CONFIG_NAME, "not JSON"),
    "config truncated": (lambda f: write(f, CONFIG_NAME, b'{"peft_type": "RO'), CONFIG_NAME, "not JSON"),
    "config not UTF-8": (lambda f: write(f, CONFIG_NAME, b'{"a": "\xff"}'), CONFIG_NAME, "not JSON"),
    "config a list": (lambda f: write(f, CONFIG_NAME, b"[]"), CONFIG_NAME, "a JSON list"),
    "config deep": (lambda f: write(f, CONFIG_NAME, b"[" * 200_000), CONFIG_NAME, "not JSON"),
    "config with NaN": (lambda f: edit_config(f, x=float("nan")), CONFIG_NAME, "NaN is not JSON"),
    "config with 1e999": (lambda f: write(f, CONFIG_NAME, b'{"x": 1e999}'), CONFIG_NAME, "too large a number"),
    "config with a key twice": (
        lambda f: write(f, CONFIG_NAME, b'{"peft_type": "ROAD", "group_size": 4, "group_size": 8}'),
        CONFIG_NAME,
        "a key stands twice",
    ),
    "config too large": (lambda f: edit_config(f, x="a" * (1 << 20)), CONFIG_NAME, "more than 1 MiB"),
    "another method": (lambda f: edit_config(f, peft_type="LORA"), "peft_type", "got 'LORA'; wanted 'ROAD'"),
    "no method": (lambda f: write(f, CONFIG_NAME, b"{}"), "peft_type", "got None; wanted 'ROAD'"),
    "unknown variant": (lambda f: edit_config(f, variant="road_3"), CONFIG_NAME, "Invalid variant road_3"),
    "foreign prefix": (lambda f: edit_config(f, variant="roadie2:road_1"), CONFIG_NAME, "Invalid variant roadie2"),
    "variant not text": (lambda f: edit_config(f, variant=1), CONFIG_NAME, "Invalid variant 1"),
    "odd group size": (lambda f: edit_config(f, group_size=3), CONFIG_NAME, "divisible by 2.*3"),
    "bad pattern": (lambda f: edit_config(f, variant_pattern={"(": "road_1"}), CONFIG_NAME, "not a regular expression"),
    "group size too large": (lambda f: edit_config(f, group_size=16), THETA, r"group_size \(16\).*out_features=8.*a.q"),
    "another variant": (lambda f: edit_config(f, variant="road_2", group_size=8), THETA, "out_features=4.*a.q"),
    "group size of one layer": (
        lambda f: edit_config(f, group_size_pattern={"q": 6}),
        THETA,
        r"group_size \(6\).*out_features=8.*a.q",
    ),
    "variant of one layer": (
        lambda f: edit_config(f, group_size=8, variant_pattern={"q": "road_4"}),
        THETA,
        "out_features=2.*a.q",
    ),
    "odd outputs": (
        lambda f: (
            edit_config(f, variant="road_2", adapt_group_size=True),
            put(f, THETA, torch.ones(5)),
            put(f, THETA.replace("theta", "alpha"), torch.ones(5)),
        ),
        THETA,
        "out_features=5",
    ),
    "weights missing": (lambda f: (f / WEIGHTS_NAME).unlink(), WEIGHTS_NAME, "got no such file"),
    "weights empty": (lambda f: cut(f, 0), WEIGHTS_NAME, "corrupt or truncated"),
    "weights cut in the length": (lambda f: cut(f, 5), WEIGHTS_NAME, "corrupt or truncated"),
    "weights cut in the header": (lambda f: cut(f, 40), WEIGHTS_NAME, "corrupt or truncated"),
    "weights cut in the last tensor": (lambda f: cut(f, -1), WEIGHTS_NAME, "corrupt or truncated"),
    "bytes at the end": (
        lambda f: write(f, WEIGHTS_NAME, (f / WEIGHTS_NAME).read_bytes() + b"\0"),
        WEIGHTS_NAME,
        "corrupt or truncated",
    ),
    "header longer than the file": (lambda f: header_length(f, 100_000), WEIGHTS_NAME, "corrupt or truncated"),
    "header of an exabyte": (lambda f: header_length(f, 1 << 60), WEIGHTS_NAME, "corrupt or truncated"),
    "header not JSON": (
        lambda f: write(f, WEIGHTS_NAME, struct.pack("<Q", 8) + b"{{{{{{{{"),
        WEIGHTS_NAME,
        "corrupt or truncated",
    ),
    "git-lfs pointer": (
        lambda f: write(f, WEIGHTS_NAME, b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n"),
        WEIGHTS_NAME,
        "pointer of git-lfs.*git lfs pull",
    ),
    "no RoAd tensors": (lambda f: write_tensors(f, {"x": torch.ones(1)}), WEIGHTS_NAME, "no RoAd parameters"),
    "no tensors": (lambda f: write_tensors(f, {}), WEIGHTS_NAME, "no RoAd parameters"),
    "theta missing": (lambda f: drop(f, THETA), THETA, "nothing, but a road_alpha"),
    "alpha missing": (
        lambda f: drop(f, THETA.replace("theta", "alpha")),
        THETA.replace("theta", "alpha"),
        "nothing, but a road_theta",
    ),
    "names without the prefix": (
        lambda f: rename_all(f, lambda name: name.removeprefix("base_model.model.")),
        "a.q.road_alpha",
        "name that PEFT does not write",
    ),
    "names with the adapter": (
        lambda f: rename_all(f, "{}.default".format),
        "road_alpha.default",
        "name that PEFT does not write.*without the adapter's name",
    ),
    "theta of another size": (lambda f: put(f, THETA, torch.ones(6)), THETA, "equal sizes"),
    "theta with two dimensions": (lambda f: put(f, THETA, torch.ones(2, 2)), THETA, "one dimension"),
    "theta of another dtype": (lambda f: put(f, THETA, torch.ones(4).half()), THETA, "one dtype"),
    "integers": (
        lambda f: (
            put(f, THETA, torch.ones(4).int()),
            put(f, THETA.replace("theta", "alpha"), torch.ones(4).int()),
        ),
        THETA,
        "one dtype",
    ),
    "NaN": (lambda f: put(f, THETA, spoiled(float("nan"))), THETA, "1 of 4 values not finite"),
    "infinite alpha": (
        lambda f: put(f, THETA.replace("theta", "alpha"), spoiled(float("-inf"))),
        THETA.replace("theta", "alpha"),
        "1 of 4 values not finite",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_file_is_refused_with_its_name_its_key_and_what_to_do(fault, folder):
    spoil, key, says = FAULTS[fault]
    spoil(folder)
    with pytest.raises(CheckpointError, match=says) as refused:
        checkpoint.load(folder)
    message = str(refused.value)
    assert str(folder) in message
    assert key in message
    assert message.lower().count("got") >= 1
    assert type(refused.value) is CheckpointError


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"no such file.*check the path"):
        checkpoint.load(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="no such file"):
        checkpoint.load(tmp_path / "file")
    with pytest.raises(CheckpointError, match="cannot be read"):
        checkpoint.locate_weights(tmp_path / "nowhere")


def test_weights_above_a_limit_are_refused_before_they_are_opened(folder, monkeypatch):
    size = (folder / WEIGHTS_NAME).stat().st_size
    checkpoint.load(folder, max_weights_bytes=size)
    monkeypatch.setattr(checkpoint, "read_tensors", lambda weights: pytest.fail("opened"))
    with pytest.raises(CheckpointError, match=f"got {size} bytes; wanted at most {size - 1} bytes"):
        checkpoint.load(folder, max_weights_bytes=size - 1)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300)
@given(data=st.data())
def test_no_damage_to_the_bytes_raises_anything_but_a_refusal(data, folder):
    name = data.draw(st.sampled_from((CONFIG_NAME, WEIGHTS_NAME)))
    good = (folder / name).read_bytes()
    spoilt = bytearray(good)
    for _ in range(data.draw(st.integers(1, 3))):
        spoilt[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
    write(folder, name, bytes(spoilt[: data.draw(st.integers(0, len(good))) or None]))
    try:
        loaded = checkpoint.load(folder)
    except CheckpointError:
        loaded = None
    finally:
        write(folder, name, good)
    assert loaded is None or set(loaded.layers)


class Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, sprung):
        self.sprung = sprung

    def __reduce__(self):
        return open, (str(self.sprung), "w")


@pytest.mark.parametrize("name", ["adapter_model.bin", "weights.pt", "adapter.pkl", "model.ckpt"])
def test_a_folder_with_only_pickles_is_refused_and_nothing_is_run(name, folder, tmp_path):
    (folder / WEIGHTS_NAME).unlink()
    write(folder, name, pickle.dumps(Trap(tmp_path / "sprung")))
    with pytest.raises(UnsafeCheckpointError, match=f"{name}.*can run any code.*weights_only=True.*{WEIGHTS_NAME}"):
        checkpoint.load(folder)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("legacy", [True, False])
def test_a_pickle_under_another_name_is_refused_as_one(legacy, folder, tmp_path):
    torch.save({"x": Trap(tmp_path / "sprung")}, folder / WEIGHTS_NAME, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(UnsafeCheckpointError, match="a pickle under the name of a safetensors file"):
        checkpoint.load(folder)
    assert not (tmp_path / "sprung").exists()


def test_a_pickle_beside_safetensors_is_not_looked_at(folder, tmp_path):
    write(folder, "adapter_model.bin", pickle.dumps(Trap(tmp_path / "sprung")))
    assert set(checkpoint.load(folder).layers) == {"a.q", "a.v"}
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    ("adapter", "says"),
    [
        (small(peft_type="LORA"), "peft_type: got 'LORA'"),
        (Adapter({"a": layer(group_size=2)}, {"group_size": 4}), "group_size=4; wanted .*group_size=2"),
        (Adapter({"a": layer("road_2")}, {"group_size": 4}), "gives road_1.*wanted .*road_2"),
        (Adapter({"a": layer()}, {"group_size": 16}), "divisible by group_size"),
        (
            Adapter({"a": LayerParameters(spoiled(float("nan")), torch.ones(4), "road_1", 4)}, {"group_size": 4}),
            "not finite",
        ),
        (Adapter({"a": layer()}, {"group_size": 4}, {THETA: torch.ones(4)}), "a name that has a meaning"),
        (Adapter({"a": layer()}, {"group_size": 4}, {"__metadata__": torch.ones(4)}), "a name that has a meaning"),
        (small(x="a" * (1 << 20)), "more than 1 MiB"),
    ],
)
def test_what_could_not_be_loaded_again_is_not_saved(adapter, says, folder):
    before = files(folder)
    with pytest.raises(CheckpointError, match=says):
        checkpoint.save(adapter, folder)
    assert files(folder) == before


def test_verify_accepts_the_layers_of_the_model():
    checkpoint.verify(small(), {"a.q": 8, "a.v": 8})


@pytest.mark.parametrize(
    ("wanted", "says"),
    [
        ({"a.q": 8}, "a.v: not in the model"),
        ({"a.q": 8, "a.v": 8, "a.k": 8}, "a.k: missing"),
        ({"a.q": 8, "a.v": 12}, "a.v: 8 outputs as road_1, the model has 12;"),
        ({"a.q": 8, "a.v": 4}, r"a.v: 8 outputs as road_1, the model has 4 \(its size fits road_2\)"),
        ({f"x{i}": 8 for i in range(5)}, "x0: missing; x1: missing; x2: missing and 4 more"),
    ],
)
def test_verify_names_what_does_not_fit(wanted, says):
    with pytest.raises(CheckpointError, match=says) as refused:
        checkpoint.verify(small(base_model_name_or_path="some/model"), wanted, source="here")
    assert str(refused.value).startswith("here: got ")
    assert "use the base model of the adapter (some/model)" in str(refused.value)


# Replacing as a whole. A system call is one of the calls by which a save changes the disk or waits for it.

CALLS = ("replace", "fsync")
NEW_CONFIGS = {"same config": {"seed": 9}, "other config": {"seed": 9, "group_size": 8}}


class Interruption(BaseException):
    """Stands for a crash, or for a key pressed."""


def interrupt(monkeypatch, at, *, for_good):
    """Raise before the `at`-th system call of a save; for_good: also at every later one, as if the machine were off."""
    count = 0

    def counted(call):
        def instead(*args, **kwargs):
            nonlocal count
            count += 1
            if count == at or (for_good and count > at):
                raise Interruption
            return call(*args, **kwargs)

        return instead

    for name in CALLS:
        monkeypatch.setattr(os, name, counted(getattr(os, name)))
    if for_good:
        monkeypatch.setattr(shutil, "rmtree", counted(shutil.rmtree))
        monkeypatch.setattr(Path, "rmdir", counted(Path.rmdir))
    return lambda: count


def number_of_calls(folder, adapter):
    with pytest.MonkeyPatch.context() as patch:
        count = interrupt(patch, -1, for_good=False)
        checkpoint.save(adapter, folder)
        return count()


def interrupted_save(adapter, folder, at, *, for_good):
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, at, for_good=for_good)
        with pytest.raises(Interruption):
            checkpoint.save(adapter, folder)


@pytest.mark.parametrize("change", NEW_CONFIGS)
def test_a_crash_leaves_a_whole_checkpoint_or_one_that_is_refused_and_can_be_completed_either_way(change, tmp_path):
    old, new = small(), small(**NEW_CONFIGS[change])
    checkpoint.save(old, tmp_path / "count")
    calls = number_of_calls(tmp_path / "count", new)
    checkpoint.save(old, tmp_path / "old")
    checkpoint.save(new, tmp_path / "new")
    whole = {"old": files(tmp_path / "old"), "new": files(tmp_path / "new")}
    seen = []
    for at in range(1, calls + 1):
        folder = tmp_path / f"crash_{at}"
        checkpoint.save(old, folder)
        interrupted_save(new, folder, at, for_good=True)
        left = files_only(folder)
        seen.append(next((which for which, data in whole.items() if data == left), "refused"))
        if seen[-1] != "refused":
            checkpoint.load(folder)
            continue
        with pytest.raises(CheckpointError, match=r"a save was interrupted.*to finish it.*to go back"):
            checkpoint.load(folder)
        staging = next(folder.glob(".roadie-save-*"))
        for which, source in (("new", staging), ("old", staging / "previous")):
            repaired = tmp_path / f"{which}_{at}"
            shutil.copytree(folder, repaired)
            for file in files_only(source):
                os.replace(repaired / source.relative_to(folder) / file, repaired / file)
            assert files_only(repaired) == whole[which]
    assert seen == sorted(seen, key=["old", "refused", "new"].index)
    assert {"old", "new"} <= set(seen)
    assert ("refused" in seen) == (change == "other config")


def files_only(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize("change", NEW_CONFIGS)
def test_an_exception_leaves_a_whole_checkpoint_and_no_other_files(change, tmp_path):
    old, new = small(), small(**NEW_CONFIGS[change])
    checkpoint.save(new, tmp_path / "new")
    checkpoint.save(old, tmp_path / "old")
    before, after = files(tmp_path / "old"), files(tmp_path / "new")
    calls = number_of_calls(tmp_path / "new", old)
    for at in range(1, calls + 1):
        interrupted_save(new, tmp_path / "old", at, for_good=False)
        assert files(tmp_path / "old") in ((before, after) if change == "same config" else (before,))
        checkpoint.save(old, tmp_path / "old")
    assert calls >= 5


@pytest.mark.skipif(sys.platform == "win32", reason="folders cannot be fsynced there")
@pytest.mark.parametrize("change", NEW_CONFIGS)
def test_the_files_are_on_the_disk_before_the_renames_and_each_rename_before_the_next(change, folder, monkeypatch):
    trace = []

    def traced(name, call):
        def instead(*args):
            trace.append(name)
            return call(*args)

        return instead

    for name in CALLS:
        monkeypatch.setattr(os, name, traced(name, getattr(os, name)))
    checkpoint.save(small(**NEW_CONFIGS[change]), folder)
    renames = 1 if change == "same config" else 4
    assert trace == ["fsync"] * 3 + ["replace", "fsync"] * renames


def test_an_exception_in_a_first_save_leaves_nothing(tmp_path):
    calls = number_of_calls(tmp_path / "count", small())
    for at in range(1, calls + 1):
        interrupted_save(small(), tmp_path / "adapter", at, for_good=False)
        assert not (tmp_path / "adapter").exists()


def test_old_files_that_cannot_be_put_back_are_kept(folder, monkeypatch):
    before = files(folder)
    fail_from = 2  # the first file has been moved out; nothing can be moved any more
    count = 0
    replace = os.replace

    def failing(source, target):
        nonlocal count
        count += 1
        if count >= fail_from:
            raise OSError(5, "the disk is gone")
        replace(source, target)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(CheckpointError, match="the disk is gone"):
        checkpoint.save(small(group_size=8), folder)
    kept = next(folder.glob(".roadie-save-*")) / "previous"
    assert {**files_only(folder), **files_only(kept)} == before


@pytest.mark.parametrize("change", NEW_CONFIGS)
def test_a_reader_never_sees_one_file_of_each(change, folder, monkeypatch):
    old, new = small(), small(**NEW_CONFIGS[change])
    allowed = [contents(checkpoint.load(folder))]
    checkpoint.save(new, folder)
    allowed.append(contents(checkpoint.load(folder)))
    checkpoint.save(old, folder)
    seen = []
    replace = os.replace

    def and_look(source, target):
        replace(source, target)
        try:
            seen.append(allowed.index(contents(checkpoint.load(folder))))
        except CheckpointError:
            seen.append(None)

    monkeypatch.setattr(os, "replace", and_look)
    checkpoint.save(new, folder)
    assert seen == ([1] if change == "same config" else [None, None, None, 1])


def test_a_save_between_the_two_readings_is_noticed(folder, monkeypatch):
    read = checkpoint.read_tensors

    def save_then_read(weights):
        checkpoint.save(small(9, group_size=8), folder)
        return read(weights)

    monkeypatch.setattr(checkpoint, "read_tensors", save_then_read)
    with pytest.raises(CheckpointError, match=r"changed meanwhile.*load it again"):
        checkpoint.load(folder)


@pytest.mark.skipif(sys.platform == "win32", reason="limits of file sizes are POSIX")
@pytest.mark.parametrize("change", NEW_CONFIGS)
def test_a_full_disk_is_an_error_that_leaves_the_old_checkpoint(change, folder):
    import resource

    before = files(folder)
    big = Adapter(
        dict(small(**NEW_CONFIGS[change]).layers), small(**NEW_CONFIGS[change]).config, {"w": torch.ones(99_999)}
    )
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(CheckpointError, match=r"could not be written.*free space.*stays whole"):
            checkpoint.save(big, folder)
        with pytest.raises(CheckpointError, match="could not be written"):
            checkpoint.save(big, folder / "new")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert files(folder) == before


def test_a_path_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CheckpointError, match="could not be written"):
        checkpoint.save(small(), tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_the_folder_is_made_with_its_parents(tmp_path):
    checkpoint.save(small(), tmp_path / "a" / "b")
    assert sorted(files(tmp_path / "a" / "b")) == [CONFIG_NAME, WEIGHTS_NAME]


def test_the_temporary_folder_is_beside_the_files_it_will_replace(folder, monkeypatch):
    # A rename is atomic only within one file system.
    staged = []
    monkeypatch.setattr(replacement, "_install", lambda staging, target: staged.append((staging.parent, target)))
    checkpoint.save(small(), folder)
    assert staged == [(folder, folder)]


# Rotations of inputs: tensors and config say the same, or the file is refused.

INPUT = "a.q.road_input"


def with_input(**config):
    """q has 8 outputs and 16 inputs, and rotates both; v has 8 outputs."""
    plain, of_input = small(), [layer("road_1", 16, 4, seed=seed) for seed in (5, 6)]
    theta, alpha = (torch.cat(vectors) for vectors in zip(*[(one.theta, one.alpha) for one in of_input], strict=True))
    layers = {**plain.layers, INPUT: LayerParameters(theta, alpha, "road_1", (4, 16))}
    return Adapter(layers, {**plain.config, "input_stages_pattern": {"q": [4, 16]}, **config})


def saved(adapter, folder):
    with pytest.warns(UserWarning, match=r"rotations of inputs \(input_stages\), which .* roadie alone loads it"):
        checkpoint.save(adapter, folder)
    return folder


def test_rotations_of_inputs_are_saved_under_the_path_of_the_input_and_loaded_bit_for_bit(tmp_path):
    adapter = with_input()
    names = safetensors.torch.load_file(saved(adapter, tmp_path) / WEIGHTS_NAME)
    assert {f"base_model.model.{INPUT}.road_theta", f"base_model.model.{INPUT}.road_alpha"} < set(names)
    assert json.loads((tmp_path / CONFIG_NAME).read_text())["variant"] == "roadie-inputs:road_1"
    again = checkpoint.load(tmp_path)
    assert (again.stages, again.input_stages) == (((4,),), ((4, 16),))
    for path, one in adapter.layers.items():
        assert bits(again.layers[path].theta) == bits(one.theta)
        assert bits(again.layers[path].alpha) == bits(one.alpha)
    before = files(tmp_path)
    assert files(saved(again, tmp_path)) == before


def test_both_kinds_of_extension_are_named_where_both_are_there(tmp_path):
    says = r"several rotations in a row \(stages\) and rotations of inputs .* train without stages and input_stages"
    with pytest.warns(UserWarning, match=says):
        checkpoint.save(with_input(stages_pattern={"k": [2, 4]}), tmp_path)


def config_changed(folder, **changes):
    file = folder / CONFIG_NAME
    file.write_text(checkpoint.config_text({**checkpoint.read_config(folder), **changes}))


def test_inputs_that_the_config_does_not_rotate_are_refused(tmp_path):
    config_changed(saved(with_input(), tmp_path), input_stages_pattern={})
    says = (
        "a.q.road_input.road_theta: got a rotation of a layer's input where the config gives none; wanted input_stages"
    )
    with pytest.raises(CheckpointError, match=says):
        checkpoint.load(tmp_path)


def test_inputs_that_the_config_rotates_and_the_file_does_not_have_are_refused(tmp_path):
    config_changed(saved(with_input(), tmp_path), input_stages_pattern={"q": [4, 16], "v": [2]})
    says = "a.v.road_input.road_theta: got nothing, and a config with input_stages for this layer; wanted both tensors"
    with pytest.raises(CheckpointError, match=says):
        checkpoint.load(tmp_path)
    config_changed(tmp_path, input_stages_pattern={"q": [4, 16], "v": []}, input_stages=[2])
    assert set(checkpoint.load(tmp_path).layers) == set(with_input().layers)


def test_an_input_of_a_layer_that_is_not_there_is_refused(tmp_path):
    adapter = with_input()
    lonely = Adapter({path: one for path, one in adapter.layers.items() if path != "a.q"}, adapter.config)
    with pytest.raises(CheckpointError, match=r"got a rotation of its input, and nothing for layer a\.q; wanted"):
        checkpoint.save(lonely, tmp_path)
    tensors = safetensors.torch.load_file(saved(adapter, tmp_path) / WEIGHTS_NAME)
    left = {name: tensor for name, tensor in tensors.items() if ".q.road_t" not in name and ".q.road_a" not in name}
    safetensors.torch.save_file(left, tmp_path / WEIGHTS_NAME, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"got a rotation of its input, and nothing for layer a\.q; wanted"):
        checkpoint.load(tmp_path)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"input_stages_pattern": {"q": [16, 4]}},
            r"got a config that gives road_1, stages=\[16, 4\]; wanted what the layer",
        ),
        ({"input_stages_pattern": {}}, "config gives none"),
        ({"input_stages": [2]}, r"a\.v\.road_input\.road_theta: got nothing"),
    ],
)
def test_a_config_that_says_something_else_of_inputs_is_not_saved(changes, says, tmp_path):
    with pytest.raises(CheckpointError, match=says):
        checkpoint.save(with_input(**changes), tmp_path)
    assert not list(tmp_path.iterdir())
