"""What to train and how: one frozen value whose defaults are the recipe of the RoAd paper.

Liao & Monz 2024 (arXiv 2409.00119, section 4 and appendix): all linear layers, AdamW without weight decay, a linear
schedule with a warm-up of 10 %, learning rate 3e-3 for LLaMA (about ten times a LoRA learning rate), batches of 32,
6 epochs (commonsense), texts of at most 512 tokens, no dropout, bfloat16. Three values are not the paper's: gradients
are clipped at 1.0 (transformers' default), bfloat16 is used only where an accelerator supports it, and the learning
rate follows the width of the model and the data (`default_learning_rate`), which gives the paper's at the width of LLaMA-7B.

This module imports nothing heavy, so that the command line can show the defaults in its help.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from roadie.errors import ConfigError
from roadie.learning_rate import default_learning_rate
from roadie.share import Share

VARIANTS = ("road_1", "road_2", "road_4")
SCHEDULES = ("linear", "cosine", "constant")
PRECISIONS = ("auto", "float32", "bfloat16")
METHODS = ("sft", "dpo")
DEFAULT_BETA = 0.1
TARGET_EXPERTS = ("each", "shared", None)
ALL_LINEAR = "all-linear"
_OF_ADAPTER = (
    *("variant", "group_size", "adapt_group_size", "stages", "input_stages"),
    *("target_modules", "target_experts", "exclude_modules"),
)


@dataclass(frozen=True)
class Recipe:
    """A training run's settings; raises `ConfigError` where one is not valid.

    method: "sft" learns what the rows say; "dpo" learns which of two answers is preferred, by TRL (extra "trl").
    beta: of DPO: how much a change of an answer's likelihood counts; None: 0.1 with dpo.
    variant, group_size, target_modules, target_experts, exclude_modules: as in `roadie.RoadConfig`; "all-linear" leaves out the
        output layer.
    adapt_group_size: where a layer's outputs are no multiple of `group_size`, use their greatest common divisor;
        otherwise such a layer is an error.
    stages: group sizes of the stages of a chain, such as (2, 16, 64), instead of one of `group_size`; None: one.
    input_stages: group sizes of the chain of each layer's input, one, (64,), or several; None: outputs alone.
    share: the pairs of every layer that are trained, as text for `roadie.share.Share`: "1/2", "1/2 interleaved"; None: all.
    learning_rate: peak; None: `default_learning_rate` of model and data; warmup_ratio: share of the steps; weight_decay,
        max_grad_norm: as in AdamW and Trainer.
    epochs: passes over the data, may be a fraction; max_steps: optimizer steps, replaces epochs where given.
    batch_size: examples an optimizer step; micro_batch_size: examples a forward pass (None: all of them).
    max_length: tokens an example, cut down to what the model supports.
    precision: "auto" is bfloat16 on an accelerator that supports it and float32 elsewhere.
    eval_share: share of the data held out for evaluation, in [0, 1); checkpoint_steps: steps between checkpoints (and
        evaluations); None: one an epoch.
    patience: evaluations in a row that may pass without a better held-out loss before the training ends; None: no end.
    packing: examples are laid into rows of max_length tokens, in which none sees another; batch_size then counts rows.
    load_in_4bit: the base model in 4 bits (bitsandbytes, nf4), prepared as PEFT prepares such models for training.
    gradient_checkpointing: recompute activations in backward; seed: of data order and held-out split.
    """

    method: str = "sft"
    beta: float | None = None
    variant: str = "road_1"
    group_size: int = 64
    adapt_group_size: bool = False
    stages: tuple[int, ...] | None = None
    input_stages: tuple[int, ...] | None = None
    target_modules: str | tuple[str, ...] = ALL_LINEAR
    target_experts: str | None = None
    exclude_modules: str | tuple[str, ...] | None = None
    share: str | None = None
    learning_rate: float | None = None
    weight_decay: float = 0.0
    schedule: str = "linear"
    warmup_ratio: float = 0.1
    max_grad_norm: float = 1.0
    epochs: float = 6
    max_steps: int | None = None
    batch_size: int = 32
    micro_batch_size: int | None = None
    max_length: int = 512
    precision: str = "auto"
    eval_share: float = 0.0
    checkpoint_steps: int | None = None
    patience: int | None = None
    packing: bool = False
    load_in_4bit: bool = False
    gradient_checkpointing: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        _check_choices(self)
        _check_numbers(self)
        _check_method(self)
        if self.method == "dpo" and self.beta is None:
            object.__setattr__(self, "beta", DEFAULT_BETA)
        object.__setattr__(self, "target_modules", _checked_names("target_modules", self.target_modules))
        if self.exclude_modules is not None:
            object.__setattr__(self, "exclude_modules", _checked_names("exclude_modules", self.exclude_modules))
        if self.share is not None:
            object.__setattr__(self, "share", str(Share.parse(self.share)))
        if self.stages is not None:
            object.__setattr__(self, "stages", _checked_stages(self))
        if self.input_stages is not None:
            object.__setattr__(self, "input_stages", _checked_sizes(self, "input_stages", "try input_stages=(64,)"))

    @classmethod
    def from_mapping(cls, settings: Mapping[str, Any]) -> Recipe:
        """The recipe with these settings and the defaults for the rest; unknown keys raise `ConfigError`."""
        check_known(settings, [field.name for field in fields(cls)])
        return cls(**settings)

    def to_mapping(self) -> dict[str, Any]:
        """All settings as JSON can hold them; `from_mapping` gives the same recipe back."""
        settings = asdict(self)
        for name in ("target_modules", "exclude_modules", "stages", "input_stages"):
            if isinstance(settings[name], tuple):
                settings[name] = list(settings[name])
        return settings

    @property
    def of_adapter(self) -> dict[str, Any]:
        """The settings that `roadie.RoadConfig` has too, as a config file has them."""
        settings = self.to_mapping()
        return {name: settings[name] for name in _OF_ADAPTER}

    def for_width(self, hidden_size: int | None, rows: int | None = None) -> Recipe:
        """The recipe with a learning rate: its own, or else the default for models of this width.

        rows: of the data a batch is taken from; None: so many that the rate does not depend on them.
        """
        if self.learning_rate is not None:
            return self
        passes = self.max_steps * self.batch_size / rows if self.max_steps and rows else self.epochs
        return replace(self, learning_rate=default_learning_rate(hidden_size, rows, passes, self.batch_size))

    @property
    def peak_rate(self) -> float:
        """The learning rate; raises `ConfigError` where it is left to the model, see `for_width`."""
        if self.learning_rate is None:
            raise ConfigError(
                "got learning_rate=None without a model; wanted a rate; use Recipe.for_width(hidden_size)"
            )
        return self.learning_rate

    def accumulation_steps(self, devices: int = 1) -> int:
        """Forward passes an optimizer step on so many devices; raises `ConfigError` where the batch does not divide."""
        per_pass = (self.micro_batch_size or self.per_device_batch_size(devices)) * devices
        if self.batch_size % per_pass:
            raise ConfigError(
                f"got batch_size={self.batch_size} for {devices} device(s) of {per_pass // devices} examples each; "
                f"wanted a multiple of {per_pass}; change batch_size or micro_batch_size"
            )
        return self.batch_size // per_pass

    def per_device_batch_size(self, devices: int = 1) -> int:
        """Examples a forward pass on each of `devices`."""
        return self.micro_batch_size or max(1, self.batch_size // devices)


def check_known(
    settings: Iterable[object], known: Collection[str], *, of: str = "", advice: str = "remove or rename it"
) -> None:
    """Raise `ConfigError`, which begins with `of`, for keys that are not `known`."""
    unknown = [str(key) for key in settings if key not in known]
    if unknown:
        question = nearest(unknown[0], known) if len(unknown) == 1 else ""
        raise ConfigError(
            f"{of}got unknown setting {', '.join(unknown)}{question}; wanted some of {', '.join(known)}; {advice}"
        )


def nearest(name: str, known: Iterable[str]) -> str:
    """A question with the known name that is most like `name`, to be put into a message; "" where none is like it."""
    found = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {found[0]}?" if found else ""


def _check_choices(recipe: Recipe) -> None:
    for name, choices in (
        ("method", METHODS),
        ("variant", VARIANTS),
        ("target_experts", TARGET_EXPERTS),
        ("schedule", SCHEDULES),
        ("precision", PRECISIONS),
    ):
        value = getattr(recipe, name)
        if value not in choices:
            raise _refused(name, value, f"one of {', '.join(map(str, choices))}", f"try {name}={choices[0]!r}")


def _check_numbers(recipe: Recipe) -> None:
    _whole("group_size", recipe.group_size, 2, "try group_size=64")
    if recipe.group_size % 2:
        raise _refused("group_size", recipe.group_size, "an even number", "try group_size=64")
    _whole("batch_size", recipe.batch_size, 1, "the paper used 32")
    _whole("max_length", recipe.max_length, 2, "the paper used 512")
    for name in ("max_steps", "micro_batch_size", "checkpoint_steps", "patience"):
        _whole(name, getattr(recipe, name), 1, f"try {name}=8, or leave it out", optional=True)
    _whole("seed", recipe.seed, 0, "try seed=0")
    for name in ("adapt_group_size", "packing", "load_in_4bit", "gradient_checkpointing"):
        if not isinstance(getattr(recipe, name), bool):
            raise _refused(name, getattr(recipe, name), "True or False", f"try {name}=True")
    if recipe.learning_rate is not None:
        advice = "the paper used 3e-3 for LLaMA; None: by the model's width and the data"
        _between("learning_rate", recipe.learning_rate, 0.0, 1.0, open_low=True, advice=advice)
    _between("weight_decay", recipe.weight_decay, 0.0, 1.0, advice="the paper used 0")
    _between("warmup_ratio", recipe.warmup_ratio, 0.0, 1.0, advice="the paper used 0.1")
    _between("eval_share", recipe.eval_share, 0.0, 1.0, advice="try eval_share=0.1, or 0 for no held-out part")
    _between("max_grad_norm", recipe.max_grad_norm, 0.0, float("inf"), advice="1.0 is usual, 0 switches clipping off")
    _between("epochs", recipe.epochs, 0.0, 1e6, open_low=True, advice="the paper used 6 to 20")
    recipe.accumulation_steps()


def _check_method(recipe: Recipe) -> None:
    """Raise where a setting means nothing with the method."""
    if recipe.beta is not None:
        if recipe.method != "dpo":
            raise _refused("beta", recipe.beta, "none with method='sft', which has no beta", "train with method='dpo'")
        _between("beta", recipe.beta, 0.0, float("inf"), open_low=True, advice="0.1 is usual")
    if recipe.packing and recipe.method == "dpo":
        raise _refused("packing", True, "none with method='dpo', whose rows are pairs of answers", "leave it out")


def _checked_stages(recipe: Recipe) -> tuple[int, ...]:
    stages = _checked_sizes(recipe, "stages", "try stages=(2, 16, 64)")
    if recipe.group_size not in (64, stages[0]):
        raise _refused("group_size", recipe.group_size, "none with stages, which say the group sizes", "leave one out")
    return stages


def _checked_sizes(recipe: Recipe, name: str, advice: str) -> tuple[int, ...]:
    sizes: object = getattr(recipe, name)
    if not isinstance(sizes, (list, tuple)) or not sizes:
        raise _refused(name, sizes, "the group sizes of rotations in a row", advice)
    for size in sizes:
        _whole(name, size, 2, advice)
        if size % 2:
            raise _refused(name, sizes, "even numbers", advice)
    if recipe.share is not None:
        raise _refused(
            "share",
            recipe.share,
            f"none with {name}",
            "pairs are shared out within one rotation of the output; leave one out",
        )
    return tuple(sizes)


def _checked_names(setting: str, targets: object) -> str | tuple[str, ...]:
    words = f"{ALL_LINEAR!r}, a" if setting == "target_modules" else "a"
    advice = f"use {words} regular expression, or a list such as ['q_proj', 'v_proj']"
    if isinstance(targets, str):
        names: Sequence[object] = (targets,)
    elif isinstance(targets, Sequence):
        names = tuple(targets)
    else:
        raise _refused(setting, targets, "module names", advice)
    if not names or not all(isinstance(name, str) and name for name in names):
        raise _refused(setting, targets, "module names", advice)
    return targets if isinstance(targets, str) else tuple(str(name) for name in names)


def _whole(name: str, value: object, least: int, advice: str, *, optional: bool = False) -> None:
    if optional and value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise _refused(name, value, f"a whole number of at least {least}", advice)


def _between(name: str, value: object, low: float, high: float, *, open_low: bool = False, advice: str) -> None:
    """Raise unless low <= value < high (low < value where `open_low`); not-a-number is refused too."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not low <= float(value) < high or (open_low and value == low):  # type: ignore[arg-type]
        limits = f"{'above' if open_low else 'at least'} {low:g}" + (
            f" and below {high:g}" if high != float("inf") else ""
        )
        raise _refused(name, value, f"a number {limits}", advice)


def _refused(name: str, got: object, wanted: str, advice: str) -> ConfigError:
    return ConfigError(f"got {name}={got!r}; wanted {wanted}; {advice}")
