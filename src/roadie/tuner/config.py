"""`RoadConfig`: everything that says how a model is adapted, and its file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft.config import PeftConfig
from peft.utils import PeftType

from roadie import checkpoint
from roadie.adapter import DEFAULT_GROUP_SIZE, check_settings, stages_of, stages_or_none
from roadie.checkpoint.replacement import replace_file
from roadie.errors import ConfigError
from roadie.rotation import Variant
from roadie.tuner.registry import register

ALL_LINEAR = "all-linear"
BIAS_CHOICES = ("none", "all", "road_only")


@dataclass
class RoadConfig(PeftConfig):
    """How RoAd adapts a model (arXiv 2409.00119). All fields of PEFT's RoadConfig, with its meanings and defaults, and more.

    Args:
        variant: "road_1" (out_features parameters a layer), "road_2" (twice that) or "road_4" (four times).
        group_size: outputs are paired inside groups of this size, element j with j + group_size/2; even, and a divisor of
            the out_features of every adapted layer (of the shard of each rank under tensor parallelism).
        init_weights: start as the identity (True), or at random values, for tests (False).
        target_modules: names or suffixes of the modules to adapt, a regular expression, or "all-linear": every linear layer but
            the output layer, and but those that cannot be adapted (`roadie.linear`), which the log names; of a model that reads
            pictures or sounds too those of its language model. None takes PEFT's default for the architecture.
        target_towers: "all-linear" means the other parts of such a model too: its towers, and what joins them to the language
            model. Some of them are named by target_modules, or left out by exclude_modules.
        modules_to_save: modules that are trained whole and saved along.
        exclude_modules: names, suffixes or a regular expression of modules to leave out.
        layers_to_transform: index or indices of the layers to adapt, counted in `layers_pattern`; None for all.
        layers_pattern: name of the list of layers, where it is not one of the usual ones.
        bias: which biases are trained too: "none", "all", or "road_only" (those of the adapted layers).
        trainable_token_indices: tokens whose embeddings are trained: indices, or a mapping of embedding layer to indices.
        variant_pattern: regular expression -> variant, where it differs. As in PEFT's `rank_pattern` the expression must
            match the end of a module's path, from a dot on ("down_proj", "layers[.]1[.].*"); the first match counts.
        group_size_pattern: regular expression -> group size, where it differs; matched in the same way.
        adapt_group_size: where a group size does not divide a layer's out_features, use their greatest common divisor
            (if it is even) instead of refusing the layer.
        stages: group sizes of a chain of several rotations, the first applied first, such as [2, 16, 64]; each has parameters
            of its own, of the variant, and starts as the identity. None: one rotation, of group_size, which is not looked at
            where there are stages. Such adapters are saved so that stock PEFT refuses them.
        stages_pattern: regular expression -> stages, where they differ ([64]: one rotation); matched as in variant_pattern.
        input_stages: rotate the input of each layer too, ``z = R_out (W (R_in x) + b)``: the group sizes of R_in, one ([64]) or
            several, which divide in_features; its variant and start are those of the output. None: the output alone.
            Such adapters too are saved so that stock PEFT refuses them.
        input_stages_pattern: regular expression -> input_stages, where they differ ([]: the output alone there).
        target_experts: rotate the stacked experts of mixtures too, which are parameters of three dimensions and no layers: what
            "each" expert gives by a rotation of its own, or what all of a layer give by one ("shared", with as many times fewer
            parameters as there are experts). All experts are meant, whatever target_modules says, but for those in
            exclude_modules or outside of layers_to_transform. None: they are left alone. Patterns match the paths of their sites,
            such as "experts.road_gate_up" and "experts.road_down". Such adapters too are saved so that stock PEFT refuses them.

    Raises `ConfigError` (a ValueError) for values that are not valid. Making one routes PEFT's ROAD to roadie.
    """

    variant: str = "road_1"
    group_size: int = DEFAULT_GROUP_SIZE
    init_weights: bool = True
    target_modules: list[str] | str | None = None
    target_towers: bool = False
    modules_to_save: list[str] | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    bias: str = "none"
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    variant_pattern: dict[str, str] = field(default_factory=dict)
    group_size_pattern: dict[str, int] = field(default_factory=dict)
    adapt_group_size: bool = False
    stages: list[int] | None = None
    stages_pattern: dict[str, list[int]] = field(default_factory=dict)
    input_stages: list[int] | None = None
    input_stages_pattern: dict[str, list[int]] = field(default_factory=dict)
    target_experts: str | None = None

    def __setattr__(self, name: str, value: Any) -> None:
        """Note what is done with a config that was read: PEFT sets inference_mode before it loads the weights beside it.

        Before it makes a new adapter it sets base_model_name_or_path, or nothing.
        """
        super().__setattr__(name, value)
        if name in ("inference_mode", "base_model_name_or_path") and self.__dict__.get("_source") is not None:
            self.__dict__["_is_for_loading"] = name == "inference_mode"

    def __post_init__(self) -> None:
        super().__post_init__()
        register()
        self.peft_type = PeftType.ROAD
        self.variant = Variant.parse(checkpoint.without_prefix(self.variant)).value
        check_settings(vars(self))
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            setattr(self, name, set(value) if isinstance(value, (list, tuple)) else value)
        self._check_layers()
        self._settle_stages()
        if self.bias not in BIAS_CHOICES:
            raise ConfigError(f"got bias={self.bias!r}; wanted one of {', '.join(BIAS_CHOICES)}")

    def _check_layers(self) -> None:
        if self.layers_pattern and self.layers_to_transform is None:
            raise ConfigError(
                "When `layers_pattern` is specified, `layers_to_transform` must also be specified. "
                f"Got layers_pattern={self.layers_pattern!r}; add the indices, or drop the pattern."
            )
        if isinstance(self.target_modules, str) and self.target_modules != ALL_LINEAR:
            for name in ("layers_to_transform", "layers_pattern"):
                if getattr(self, name) is not None:
                    raise ConfigError(
                        f"`{name}` cannot be used when `target_modules` is a str. Got target_modules="
                        f"{self.target_modules!r}; wanted a list of names; or put the layers into the expression."
                    )

    def _settle_stages(self) -> None:
        """Group sizes of chains become lists, and a chain of one the plain adapter that it is."""
        for name in ("stages_pattern", "input_stages_pattern"):
            given = getattr(self, name).items()
            setattr(self, name, {pattern: list(stages_or_none(stages)) for pattern, stages in given})
        self.input_stages = None if self.input_stages is None else list(stages_of(self.input_stages))
        if self.stages is None:
            return
        self.stages = list(stages_of(self.stages))
        if self.group_size_pattern or self.group_size not in (DEFAULT_GROUP_SIZE, self.stages[0]):
            said = f"group_size={self.group_size}" if not self.group_size_pattern else "group_size_pattern"
            raise ConfigError(
                f"got stages={self.stages} and {said}; wanted one of them, because stages say the group sizes; leave the other "
                "out, or use stages_pattern for modules that differ"
            )
        if len(self.stages) == 1:
            self.group_size, self.stages = self.stages[0], None

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Write adapter_config.json into `save_directory`, whole and reproducible byte for byte.

        Keys that PEFT's RoadConfig does not know are written only where they differ from their defaults; the variant is
        then written as "roadie:<variant>", which makes stock PEFT refuse the file instead of loading half its meaning. Warns
        where that is because of stages, or of rotations of inputs.
        """
        directory = Path(save_directory)
        if directory.is_file():
            raise AssertionError(f"Provided path ({directory}) should be a directory, not a file")
        content = self.to_dict()
        if kwargs.get("auto_mapping_dict") is not None:
            content["auto_mapping"] = kwargs["auto_mapping_dict"]
        checkpoint.warn_of_chains(content)
        directory.mkdir(parents=True, exist_ok=True)
        replace_file(directory / checkpoint.CONFIG_NAME, checkpoint.config_text(content))

    def to_dict(self) -> dict[str, Any]:
        """What adapter_config.json holds, as a mapping: extra keys at their defaults left out; see `save_pretrained`."""
        content = super().to_dict()
        if content["modules_to_save"] is not None:  # to which PEFT adds the head of a task each time
            content["modules_to_save"] = list(dict.fromkeys(content["modules_to_save"]))
        if content["target_modules"] != ALL_LINEAR:  # which names the towers' layers by now, for every reader
            content["target_towers"] = False
        extra = {name for name, default in checkpoint.EXTRA_DEFAULTS.items() if content[name] != default}
        content = {name: v for name, v in content.items() if name in extra or name not in checkpoint.EXTRA_DEFAULTS}
        return {**content, "variant": checkpoint.prefix_for(extra) + self.variant} if extra else content

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], subfolder: str | None = None, **kwargs: Any
    ) -> RoadConfig:
        """Read adapter_config.json from a folder or a hub repository.

        The config remembers where it came from, so that loading checks the weights beside it before it touches a model. It will
        also do for a new adapter of any model (`get_peft_model`, `add_adapter`): that one is trained, whatever the file says
        of inference, and belongs to the model that it is added to.
        allow_pickle=True lets PEFT read the weights from a pickle file, which can run code; the default refuses.
        """
        allow_pickle = bool(kwargs.pop("allow_pickle", False))
        config = super().from_pretrained(str(pretrained_model_name_or_path), subfolder=subfolder, **kwargs)
        if isinstance(config, cls):
            hub, _, _ = cls._split_kwargs(kwargs)
            config._source = WeightsSource(
                str(pretrained_model_name_or_path), subfolder, hub, allow_pickle, config.base_model_name_or_path
            )
        return config


@dataclass(frozen=True)
class WeightsSource:
    """Where the weights that belong to a config can be found."""

    name_or_path: str
    subfolder: str | None
    hub_arguments: Mapping[str, Any]
    allow_pickle: bool
    base_model: str | None
