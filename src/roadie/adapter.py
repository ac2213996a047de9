"""The adapter value: the parameters of every adapted layer, frozen, as they travel between the parts of roadie.

An `Adapter` is what one adapter file says, without the file: per layer (theta, alpha, variant, stages), the
config as it was read, and whatever else the file carried (weights of `modules_to_save`, trained biases). Nothing here
touches a disk or a model: `roadie.checkpoint` makes adapters of files, the tuner makes models of adapters.

**Which variant and group sizes a layer has** is decided by `resolve_layer`, for files and for models alike. The keys
of `variant_pattern`, `group_size_pattern` and `stages_pattern` are regular expressions matched against the end of the
module path, at a dot: ``(.*\\.)?(key)$``. The first key that matches, in the mapping's order, wins; otherwise `variant`,
`group_size` and `stages` hold. A layer that neither `stages_pattern` nor `stages` speaks of has one rotation, of its group
size. With `adapt_group_size` a group size that does not divide the layer's outputs D becomes gcd(D, group_size).

**The input of a layer is one more site.** Where the input of the layer at P is rotated too, ``z = R_out (W (R_in x) + b)``, R_in
is an entry of its own at the path ``P.road_input``, whose D is the layer's in_features. Its variant is that of the layer at P;
its group sizes come from `input_stages_pattern` and `input_stages`, whose patterns are matched against P. Where they say nothing,
the input is not rotated.

**Stacked experts are rotated at one site a projection.** Where transformers holds the experts of a mixture at P in parameters
of three dimensions, the sites are ``P.road_gate_up`` (``P.road_up`` where there is no gate) and ``P.road_down``, whose D is that
of all experts together: the rotations of the experts lie end to end, in each that of the gate before that of up. Where the
experts share one rotation, the sites have ``_shared`` at their ends, and D is that of one expert. `target_experts` says which;
the other settings hold as for layers, and inputs are not rotated.

Shapes: ``D`` out features of a layer, ``K`` stages (1 in a plain adapter), ``n = K parameter_size(variant, D)`` elements of
theta and of alpha.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, final

import torch
from torch import Tensor

from roadie.errors import AdapterError, ConfigError
from roadie.rotation import Rotation, Variant, chain_from_parameters, check_group_size, parameter_size

DEFAULT_VARIANT = "road_1"
DEFAULT_GROUP_SIZE = 64
INPUT_SUFFIX = ".road_input"
PEFT_PREFIX = "base_model.model."
"""Where the base model is in a PeftModel, and in the names of tensors in its files."""
EACH, SHARED = "each", "shared"
"""What `target_experts` may say: a rotation for each of the stacked experts of a layer, or one for all of them."""
_SITE_OF_EXPERTS = re.compile(r"(?:.*\.)?road_(?:gate_up|up|down)(_shared)?", re.DOTALL)
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

MAX_NAME_LENGTH = 128
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]*")

# "__base__" names the base model in a mixed batch. The others are parts of PEFT's state-dict keys: when PEFT saves one
# of several adapters it drops every key that has another adapter's name between two dots or at the end.
RESERVED_NAMES = frozenset(
    {"__base__", "base_layer", "bias", "model", "modules_to_save", "original_module", "token_adapter", "weight"}
    | {"road_alpha", "road_input", "road_theta"}
    | {f"road_{name}{end}" for name in ("gate_up", "up", "down") for end in ("", "_shared")}
)


@dataclass(frozen=True, eq=False, init=False)
class LayerParameters:
    """The RoAd parameters of one layer: of a chain of rotations, which in a plain adapter has one stage.

    theta (radians), alpha: ``[n]`` each, of one floating dtype and on one device; variant: a `Variant` or its name;
    group_size: positive, even, divides D; or such group sizes of the stages of a chain, the first applied first, whose
    parameters then lie end to end (kept as `stages`). Values are not looked at (they may live on the meta device).
    Raises `AdapterError` where the tensors do not fit, `ConfigError` for an unknown variant or a bad group size.
    """

    theta: Tensor
    alpha: Tensor
    variant: Variant
    stages: tuple[int, ...]

    def __init__(self, theta: Tensor, alpha: Tensor, variant: str | Variant, group_size: int | Sequence[int]) -> None:
        object.__setattr__(self, "theta", theta)
        object.__setattr__(self, "alpha", alpha)
        object.__setattr__(self, "variant", Variant.parse(variant))
        object.__setattr__(self, "stages", stages_of(group_size))
        _check_tensors(theta, alpha)
        _check_fits_groups(self)

    @property
    def group_size(self) -> int:
        """The group size of the one rotation; raises `AdapterError` where there are several (see `stages`)."""
        if len(self.stages) != 1:
            raise AdapterError(
                f"got a layer with several rotations in a row (group sizes {', '.join(map(str, self.stages))}) where one is "
                "wanted; use an adapter trained without stages, or merge this one into its base model"
            )
        return self.stages[0]

    @property
    def out_features(self) -> int:
        """D, the number of outputs of the layer."""
        return out_features_of(self.variant, self.theta.numel(), len(self.stages))

    @property
    def rotation(self) -> Rotation:
        """The one rotation these parameters stand for, ``[D]``, in float32 or wider; computed at every use.

        Raises `AdapterError` where there are several: see `rotations`.
        """
        _ = self.group_size
        return self.rotations[0]

    @property
    def rotations(self) -> tuple[Rotation, ...]:
        """The rotations these parameters stand for, the first applied first, as in `rotation`."""
        return chain_from_parameters(self.theta, self.alpha, self.variant, self.stages)

    @property
    def num_parameters(self) -> int:
        """Elements of theta and alpha together."""
        return self.theta.numel() + self.alpha.numel()

    @property
    def nbytes(self) -> int:
        """Bytes of theta and alpha together."""
        return self.theta.nbytes + self.alpha.nbytes


@final
@dataclass(frozen=True, eq=False)
class Adapter:
    """One adapter: the RoAd parameters of each adapted layer, its config, and the other tensors of its file.

    layers: module path in the base model ("model.layers.0.self_attn.q_proj") -> `LayerParameters`, at least one; a rotation of
    the layer's input is at that path with `INPUT_SUFFIX` at the end;
    config: the keys of adapter_config.json, unknown ones included, the variant without roadie's prefix;
    other: tensor name in the file -> tensor, kept as it is (weights of `modules_to_save`, trained biases).
    The mappings are copied and read-only; the tensors are shared, not copied. Pickles and deep copies.
    Raises `AdapterError` where a key or a value is not of these kinds.
    """

    layers: Mapping[str, LayerParameters]
    config: Mapping[str, Any] = field(default_factory=dict)
    other: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_entries("layers", self.layers, LayerParameters)
        _check_entries("config", self.config, object)
        _check_entries("other", self.other, Tensor)
        _check_module_paths(self.layers)
        object.__setattr__(self, "layers", MappingProxyType(dict(self.layers)))
        object.__setattr__(self, "config", MappingProxyType(copy.deepcopy(dict(self.config))))
        object.__setattr__(self, "other", MappingProxyType(dict(self.other)))

    def __reduce__(self) -> tuple[Any, ...]:
        # A mappingproxy can be neither pickled nor deep-copied, and adapters travel between processes.
        return Adapter, (dict(self.layers), dict(self.config), dict(self.other))

    @property
    def variants(self) -> tuple[Variant, ...]:
        """The variants that occur, each once, in the order of their names."""
        return tuple(sorted({layer.variant for layer in self.layers.values()}))

    @property
    def group_sizes(self) -> tuple[int, ...]:
        """The group sizes that occur, each once, ascending."""
        return tuple(sorted({size for layer in self.layers.values() for size in layer.stages}))

    @property
    def stages(self) -> tuple[tuple[int, ...], ...]:
        """The chains that outputs of layers have, by their group sizes, each once; ``((64,),)`` in a plain adapter."""
        return tuple(sorted({layer.stages for path, layer in self.layers.items() if not is_input(path)}))

    @property
    def input_stages(self) -> tuple[tuple[int, ...], ...]:
        """As `stages`, of the inputs of layers; empty where no input is rotated."""
        return tuple(sorted({layer.stages for path, layer in self.layers.items() if is_input(path)}))

    @property
    def out_features(self) -> Mapping[str, int]:
        """Module path -> D, which is the in_features of the layer where the path is that of an input."""
        return MappingProxyType({path: layer.out_features for path, layer in self.layers.items()})

    @property
    def base_model_name(self) -> str | None:
        """Name or path of the base model the config speaks of; None where it says nothing."""
        return self.config.get("base_model_name_or_path") or None

    @property
    def num_parameters(self) -> int:
        """Elements of theta and alpha over all layers; `other` is not counted."""
        return sum(layer.num_parameters for layer in self.layers.values())

    @property
    def nbytes(self) -> int:
        """Bytes of every tensor held, `other` included."""
        return sum(layer.nbytes for layer in self.layers.values()) + sum(t.nbytes for t in self.other.values())


def is_input(path: str) -> bool:
    """Whether `path` is that of the input of a layer, and not of a layer."""
    return path.endswith(INPUT_SUFFIX)


def layer_of(path: str) -> str:
    """The path of the layer whose input is at `path`; `path` itself where it is that of a layer."""
    return path.removesuffix(INPUT_SUFFIX)


def expert_site(projection: str, kind: str) -> str:
    """The last part of the path of a site of stacked experts; kind: `EACH` or `SHARED`."""
    return f"road_{projection}" + ("_shared" if kind == SHARED else "")


def experts_kind(path: str) -> str | None:
    """`EACH` or `SHARED` for the path of a site of stacked experts; None for any other."""
    match = _SITE_OF_EXPERTS.fullmatch(path)
    return None if match is None else SHARED if match[1] else EACH


def stages_of(group_size: int | Sequence[int]) -> tuple[int, ...]:
    """The group sizes of a chain's stages, given as they are or, for a single one, as a number; raises `ConfigError`."""
    stages: Any = (group_size,) if isinstance(group_size, int) else group_size
    if isinstance(stages, str) or not isinstance(stages, Sequence) or not stages:
        raise ConfigError(
            f"got stages {_shortened(group_size)}; wanted the group sizes of one or more rotations in a row, such as [2, 16, 64]"
        )
    for size in stages:
        check_group_size(size)
    return tuple(stages)


def refuse_chains(adapter: Adapter, where: str) -> None:
    """Raise `AdapterError`, naming the layer, where `adapter` has a chain of several stages, which `where` does not take."""
    for path, layer in adapter.layers.items():
        if len(layer.stages) > 1:
            raise AdapterError(
                f"{where}: got several rotations in a row (stages {list(layer.stages)}) in layer {path}; wanted one rotation a "
                "layer; use an adapter trained without stages, serve this one with AdapterBank or `roadie serve`, or merge it "
                "into its base model"
            )


def refuse_experts(paths: Iterable[str], where: str) -> None:
    """Raise `AdapterError`, naming the site, where one of `paths` is of stacked experts, which `where` does not take."""
    path = next((path for path in paths if experts_kind(path) is not None), None)
    if path is not None:
        raise AdapterError(
            f"{where}: got a rotation of stacked experts, {path}; wanted rotations of layers alone; use an adapter trained "
            "without target_experts, serve this one with AdapterBank or `roadie serve`, or merge it into its base model"
        )


def out_features_of(variant: str | Variant, size: int, num_stages: int = 1) -> int:
    """D of a layer whose theta has `size` elements for `num_stages` rotations; the inverse of `rotation.parameter_size`.

    Raises `AdapterError` where no D has that size.
    """
    variant = Variant.parse(variant)
    out_features, rest = divmod(2 * size, num_stages * parameter_size(variant, 2))
    if rest or out_features <= 0:
        in_a_row = f" with {num_stages} rotations in a row" if num_stages > 1 else ""
        multiple = "even " if rest and num_stages == 1 else ""
        raise AdapterError(
            f"got theta of {size} elements; wanted a positive {multiple}number for {variant.value}{in_a_row}; "
            f"check the variant {'and the stages ' if in_a_row else ''}of the adapter"
        )
    return out_features


def resolve_layer(config: Mapping[str, Any], module_path: str, width: int) -> tuple[Variant, tuple[int, ...]]:
    """The variant and the group sizes that `config` gives to the layer, or the input of one, at `module_path`.

    width: the layer's outputs, or its in_features for an input. One group size for each stage, one in a plain
    adapter. Raises `ConfigError`, naming the module, for an unknown variant, a bad pattern, a group size that does not divide
    `width` (with `adapt_group_size`: where `width` is odd), and an input that `config` does not rotate.
    """
    return resolve_variant(config, module_path), resolve_stages(config, module_path, width)


def resolve_variant(config: Mapping[str, Any], module_path: str) -> Variant:
    """The variant that `config` gives to the layer at `module_path`; the first half of `resolve_layer`."""
    try:
        return Variant.parse(_setting_of(config, "variant", layer_of(module_path), DEFAULT_VARIANT))
    except ConfigError as error:
        raise ConfigError(f"{error} Module: {module_path}.") from None


def resolve_stages(config: Mapping[str, Any], module_path: str, width: int) -> tuple[int, ...]:
    """The group sizes that `config` gives to the layer at `module_path`; the second half of `resolve_layer`."""
    try:
        stages = stages_at(config, module_path)
        return fitted_stages(stages, width, bool(config.get("adapt_group_size")), of_input=is_input(module_path))
    except ConfigError as error:
        raise ConfigError(f"{error} Module: {module_path}.") from None


def stages_at(config: Mapping[str, Any], module_path: str) -> tuple[int, ...]:
    """The group sizes that `config` names for the layer, or the input, at `module_path`, whatever its width is.

    Raises `ConfigError` where it names none: for an input that is not rotated.
    """
    if is_input(module_path):
        return _input_stages_at(config, module_path)
    stages = _setting_of(config, "stages", module_path, None)
    if stages is None:
        stages = _setting_of(config, "group_size", module_path, DEFAULT_GROUP_SIZE)
    return stages_of(stages)


def _input_stages_at(config: Mapping[str, Any], module_path: str) -> tuple[int, ...]:
    if not rotates_input(config, module_path):
        raise ConfigError(
            "got a rotation of a layer's input where the config gives none; wanted input_stages, or input_stages_pattern for "
            "this layer; set one of them, or leave the rotation out."
        )
    return stages_of(_setting_of(config, "input_stages", layer_of(module_path), None))


def rotates_input(config: Mapping[str, Any], module_path: str) -> bool:
    """Whether `config` gives the layer at `module_path` a rotation of its input; stacked experts never have one."""
    stages = _setting_of(config, "input_stages", layer_of(module_path), None)
    return stages is not None and stages != [] and stages != () and experts_kind(module_path) is None


def fitted_stages(stages: Sequence[int], width: int, adapt: bool, *, of_input: bool = False) -> tuple[int, ...]:
    """Group sizes for a layer of so many outputs, or inputs: as they are where they divide `width`, else with `adapt` the gcd.

    Raises `ConfigError` where one does not fit.
    """
    return tuple(_fitted(size, width, adapt, "in_features" if of_input else "out_features") for size in stages)


def _fitted(group_size: int, width: int, adapt: bool, name: str) -> int:
    if adapt and math.gcd(width, group_size) % 2 == 0:
        return math.gcd(width, group_size)
    check_group_size(group_size, width, name)
    return group_size


def check_adapter_name(name: str, module_paths: Iterable[str] = ()) -> None:
    """Raise `ConfigError` unless `name` can name an adapter of a model with modules at `module_paths`.

    A name has 1 to 128 characters A-Z a-z 0-9 _ -, does not start with a hyphen, and is neither one of
    `RESERVED_NAMES` nor a part (between dots) of one of `module_paths`: PEFT tells the adapters of a model apart by
    the parts of their state-dict keys, and would drop the tensors of such modules when it saves another adapter.
    """
    if not isinstance(name, str) or len(name) > MAX_NAME_LENGTH or not _NAME.fullmatch(name):
        raise ConfigError(
            f"got adapter name {_shortened(name)}; wanted 1 to {MAX_NAME_LENGTH} characters A-Z a-z 0-9 _ - that "
            "do not start with a hyphen; dots and slashes would be taken for parts of a module path; try 'my_adapter'"
        )
    if name in RESERVED_NAMES:
        free = f"my_{name.strip('_')}"
        raise ConfigError(f"got adapter name {name!r}, which is reserved; wanted another name; try {free!r}")
    clash = next((path for path in module_paths if name in path.split(".")), None)
    if clash is not None:
        raise ConfigError(
            f"got adapter name {name!r}, which is a part of the module path {clash}; wanted a name that no module has, "
            f"because saving tells adapters apart by such parts; try 'adapter_{name}'"
        )


def stages_or_none(stages: Any) -> tuple[int, ...]:
    """As `stages_of`, but an empty list says that there is no rotation."""
    return () if isinstance(stages, (list, tuple)) and not stages else stages_of(stages)


_PATTERNS: Mapping[str, Callable[[Any], object]] = {
    "variant_pattern": Variant.parse,
    "group_size_pattern": check_group_size,
    "stages_pattern": stages_of,
    "input_stages_pattern": stages_or_none,
}


def check_settings(config: Mapping[str, Any]) -> None:
    """Raise `ConfigError`, naming the key, unless the keys that `resolve_layer` reads hold the right kinds of value."""
    Variant.parse(config.get("variant", DEFAULT_VARIANT))
    check_group_size(config.get("group_size", DEFAULT_GROUP_SIZE))
    for key in ("adapt_group_size", "target_towers"):
        if not isinstance(config.get(key, False), bool):
            raise ConfigError(f"got {key} {_shortened(config[key])}; wanted True or False.")
    if config.get("target_experts") not in (None, EACH, SHARED):
        raise ConfigError(
            f"got target_experts {_shortened(config['target_experts'])}; wanted 'each', 'shared' or None."
        )
    for key in ("stages", "input_stages"):
        if config.get(key) is not None:
            stages_of(config[key])
    for key, check in _PATTERNS.items():
        for pattern, value in _patterns_of(config, key).items():
            matches_end(pattern, "", key)
            check(value)


def _setting_of(config: Mapping[str, Any], key: str, module_path: str, default: object) -> Any:
    for pattern, value in _patterns_of(config, f"{key}_pattern").items():
        if matches_end(pattern, module_path, f"{key}_pattern"):
            return value
    return config.get(key, default)


def _patterns_of(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    patterns = config.get(key)
    if patterns is None:
        return {}
    if not isinstance(patterns, Mapping) or not all(isinstance(pattern, str) for pattern in patterns):
        raise ConfigError(f"got {key} {_shortened(patterns)}; wanted a mapping from regular expressions to values.")
    return patterns


def matches_end(pattern: str, module_path: str, key: str) -> bool:
    """Whether `pattern`, of the setting `key`, matches the end of `module_path`, at a dot; as PEFT matches its patterns."""
    try:
        return re.match(rf"(.*\.)?({pattern})$", module_path) is not None
    except (re.error, OverflowError, RecursionError) as error:
        got = f"got {key} {_shortened(pattern)}, a key of {key}, which is not a regular expression"
        raise ConfigError(f"{got} ({error}); wanted one.") from None


def _check_tensors(theta: Tensor, alpha: Tensor) -> None:
    if not isinstance(theta, Tensor) or not isinstance(alpha, Tensor):
        raise AdapterError(f"got theta {type(theta).__name__} and alpha {type(alpha).__name__}; wanted tensors")
    if theta.dim() != 1 or theta.shape != alpha.shape:
        raise AdapterError(
            f"got theta {tuple(theta.shape)} and alpha {tuple(alpha.shape)}; wanted one dimension and equal sizes"
        )
    if theta.dtype != alpha.dtype or theta.dtype not in DTYPES:
        raise AdapterError(
            f"got theta {theta.dtype} and alpha {alpha.dtype}; wanted one dtype, of "
            f"{', '.join(str(dtype) for dtype in DTYPES)}; convert both with .to()"
        )
    if theta.device != alpha.device:
        raise AdapterError(f"got theta on {theta.device} and alpha on {alpha.device}; wanted one device; use .to()")


def _check_fits_groups(layer: LayerParameters) -> None:
    out_features = layer.out_features
    for group_size in layer.stages:
        if out_features % group_size:
            raise AdapterError(
                f"got {layer.theta.numel()} parameters, {out_features} outputs as {layer.variant.value}; wanted a multiple "
                f"of group_size={group_size}; check the variant and the group size of the adapter"
            )


def _check_entries(name: str, mapping: object, kind: type) -> None:
    if not isinstance(mapping, Mapping):
        raise AdapterError(f"got {name} of type {type(mapping).__name__}; wanted a mapping with str keys")
    for key, value in mapping.items():
        if not isinstance(key, str) or not isinstance(value, kind):
            got = f"got {name}[{_shortened(key)}] of type {type(value).__name__}"
            raise AdapterError(f"{got}; wanted str keys and {kind.__name__} values")


def _check_module_paths(layers: Mapping[str, LayerParameters]) -> None:
    if not layers:
        raise AdapterError("got an adapter without layers; wanted at least one adapted layer")
    for path in layers:
        if not all(path.split(".")):
            raise AdapterError(f"got module path {_shortened(path)}; wanted non-empty names joined by dots")


def _shortened(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
