"""Where the rows of a batch lie in what a layer gives, and where nobody can tell.

    [B, T, D], [B, D]    the rows in front: a slot a row fits as it is
    [B * T, D]           tokens after one another, row by row: OPT's fc1 and fc2, shared experts
    [T, B, D]            the sequence in front (XLNet, the queries of Longformer)
    [n, D]               some of the tokens (an expert among many)

The last two are refused: their rows are not those of the batch. Sizes do not always tell the four apart: T may be B, and n may be
B or B T. Where they do not, the model is run once more, on the first row of the call alone and without gradient, and what comes
out of each of its modules then says what the module is given (`Sight`); that is remembered for good, so that it happens once
for a model. A compiled model is looked at so before its first call, in eager mode; in its graphs sizes decide only where that has
shown that they do (`Calls.is_sure`), and elsewhere the graph breaks for the question, or the rows are refused.

Legend: B rows, T tokens of a row, D features, n tokens, S slots.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from enum import Enum
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from roadie.errors import RoutingError
from roadie.linear import is_linear

logger = logging.getLogger("roadie")

INPUTS = ("input_ids", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds", "input_features", "input_values")
"""Arguments of a model that have a row in front, and then its tokens."""
_LEFT_OUT = ("past_key_values", "labels", "cache_position", "position_ids", "use_cache")
"""Arguments that the run on one row does without: what it would change, and what has no row in front."""
_PAGES = "cache"
"""The argument of packed calls that holds keys and values in pages; flat tokens of their one row can only be its tokens."""
_OF_SHARED = ("device_mesh", "_is_flat_param", "ds_id")
"""What parameters have of which other processes hold parts: FSDP2 and tensor parallelism, FSDP1, ZeRO-3."""
SAME = 1e-2
"""How far apart squared lengths of one token may be in two batches, of the largest: a few roundings in bfloat16 (2^-9)."""


class Kind(Enum):
    """What a module is given: rows in front, all tokens flat and in order, or anything else."""

    ROWS = "rows"
    TOKENS = "tokens"
    OTHER = "other"


class Call(NamedTuple):
    """One call of a model, as long as it may be needed."""

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


_kinds: WeakKeyDictionary[nn.Module, Kind] = WeakKeyDictionary()
_are_sure: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
"""Models that were looked at -> whether each of their linear layers has the rows in front, or all tokens flat."""
_cannot_be_run: WeakSet[nn.Module] = WeakSet()
routings_in_force: ContextVar[tuple[Any, ...]] = ContextVar("roadie_routings", default=())
"""Where the calling thread has put rows in force: they do not hold while the model is run on one row."""


class Calls:
    """The calls of a model while rows are in force: how many tokens they had, and the last one.

    num_rows: B; expansion: how many consecutive rows generation makes of one; is_compiled: whether a part of `model` is, None
    where that is not known yet. is_sure: whether sizes tell what each layer of a compiled `model` is given.
    """

    def __init__(
        self, num_rows: int, expansion: int = 1, model: nn.Module | None = None, is_compiled: bool | None = None
    ) -> None:
        self.num_rows, self.expansion, self.is_compiled = num_rows, expansion, is_compiled
        self.is_sure = is_compiled is not False and model is not None and _are_sure.get(_core(model), False)
        self.tokens: set[int] = set()
        self._last: Call | None = None
        self._has_looked = False

    def note(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The model is called with these arguments now; raises `RoutingError` where they have another number of rows."""
        given = _inputs(args, kwargs)
        if not given:
            return
        rows, first = self.num_rows, given[0]  # several texts a row: [B, n, T]
        if len(first) not in (rows, rows * self.expansion) and first.shape[:2].numel() != rows:
            raise RoutingError(
                wrong_number(rows, len(first)) + "Wanted adapters or slots, one for each row of the input."
            )
        self._last = Call(model, args, kwargs)
        for x in given:
            if x.dim() > (2 if x.is_floating_point() else 1):
                self.tokens.add(x.shape[1])

    def check(self, y: Tensor, site: nn.Module, slots: Tensor) -> None:
        """Raise `RoutingError` unless `site`, which gives y, or is given it, has the rows in front, or all tokens flat."""
        if y.dim() == 2 and not self.tokens and self._is_flat(len(y), Kind.ROWS, slots):
            return  # rows without tokens
        kind = self.kind_of(site)
        if not (kind is Kind.ROWS if y.dim() > 2 else self._is_flat(len(y), kind, slots)):
            raise RoutingError((_OTHER if kind else _CANNOT_TELL).format(shape=tuple(y.shape)))

    def _is_flat(self, num_parts: int, kind: Kind | None, slots: Tensor) -> bool:
        """Whether so many parts can be all rows, or all tokens, for a layer of this kind."""
        rows = slots.shape[0]
        is_of_rows = slots.dim() == 1 and num_parts in (rows, rows * self.expansion)
        per_row = 1 if is_of_rows else num_parts // (rows * self.expansion)
        is_of_tokens = slots.dim() > 1 or per_row in self.tokens
        if kind is None:
            return is_of_rows or is_of_tokens
        return is_of_rows if kind is Kind.ROWS else is_of_tokens and kind is Kind.TOKENS

    def kind_of(self, site: nn.Module) -> Kind | None:
        """What a layer is given; None where that is not known. The model may be run on one row to find out, once."""
        kind, call = _kinds.get(site), self._last
        if kind is None and call is not None and self._look(call) and site in set(call.model.modules()):
            _kinds.setdefault(site, Kind.OTHER)  # the first row did not come by
        return _kinds.get(site)

    def look(self, model: nn.Module) -> None:
        """`model` is called now; where a part of it is compiled, find out whether sizes tell what its layers are given."""
        if self.is_sure or self._has_looked or max(self.tokens, default=1) == 1:
            return
        if self.is_compiled is None:
            self.is_compiled = has_compiled_part(model)
        if not self.is_compiled:
            return
        if _core(model) not in _are_sure and self._last is not None:
            self._look(self._last)
        self.is_sure = _are_sure.get(_core(model), False)

    def _look(self, call: Call) -> bool:
        """Run the model on one row, once; whether that has told what is given whatever comes by."""
        if self._has_looked:
            return False
        self._has_looked = True
        found = _kinds_in(call._replace(model=plain(call.model)), self.tokens)
        if found is None:
            return False
        _kinds.update(found)
        if max(self.tokens, default=1) == 1:
            return False
        linear = filter(is_linear, call.model.modules())
        _are_sure[_core(call.model)] = all(_kinds.get(layer) in (Kind.ROWS, Kind.TOKENS) for layer in linear)
        return True


def wrong_number(wanted: int, got: int) -> str:
    """How PEFT begins to say that the number of adapters is wrong."""
    return f"Length of `adapter_names` should be the same as the number of inputs, but got {wanted} and {got} respectively. "


_CANNOT_TELL = (
    "got rows for a layer that gives {shape}, of which it is not known whether it has the rows in front, or all tokens flat, so "
    "that tokens could get the adapters of other rows; wanted a model that can be looked at: call the model itself within the "
    "rows, and no part of it, and a compiled one once before it is compiled; or pad the batch to another number of tokens"
)
_OTHER = (
    "got rows for a layer that gives {shape}: the sequence in front, or some of the tokens and not all (an expert among many), "
    "so that nobody can say which row each part is of; wanted the rows in front, or all tokens flat; leave the layer out of the "
    "adapters, or run the rows of each adapter as a batch of their own"
)


def by_size(slots: Tensor, expansion: int, y: Tensor) -> Tensor | None:
    """The slots in the shape of y's first dimensions, as far as sizes tell; None where they do not fit."""
    if y.dim() > slots.dim() and y.shape[: slots.dim()] == slots.shape:
        return slots
    if slots.dim() == 1 and expansion > 1 and y.dim() > 1 and y.shape[0] == len(slots) * expansion:
        return slots.repeat_interleave(expansion)
    if y.dim() != 2:
        return None
    if slots.dim() == 2 and y.shape[0] == slots.numel():
        return slots.flatten()
    rows = len(slots) * expansion
    if slots.dim() == 1 and rows and y.shape[0] and y.shape[0] % rows == 0:
        return slots.repeat_interleave(y.shape[0] // len(slots))
    return None


def is_doubtful(y: Tensor, slots: Tensor) -> bool:
    """Whether y could be something else of the same size."""
    if y.dim() > 2:
        return y.shape[0] == y.shape[1] > 1
    return y.dim() == 2 and len(slots) > 1


def before_calls(module: nn.Module, note: Callable[..., None]) -> Callable[[], None]:
    """From now on note(module, args, kwargs) comes before each call, in eager mode; gives what ends that."""
    compiled = module._compiled_call_impl  # of module.compile(), whose graph has the hooks inside
    if compiled is None:
        return module.register_forward_pre_hook(note, with_kwargs=True).remove

    def noted(*args: Any, **kwargs: Any) -> Any:
        note(module, args, kwargs)
        return compiled(*args, **kwargs)

    module._compiled_call_impl = noted
    return lambda: setattr(module, "_compiled_call_impl", compiled)


def has_compiled_part(model: nn.Module) -> bool:
    """Whether a model was given to torch.compile, or a module in it."""
    return any(m._compiled_call_impl is not None or plain(m) is not m for m in model.modules())


def _core(model: nn.Module) -> nn.Module:
    """The model inside all wrappers, of PEFT and of torch.compile."""
    return plain(wrapped(plain(model))[-1])


def plain(module: nn.Module) -> nn.Module:
    """What torch.compile made a compiled module of, or the module itself."""
    inner = module._modules.get("_orig_mod")
    return module if inner is None else inner


def wrapped(model: nn.Module) -> list[nn.Module]:
    """A model and what it hands its calls on to: of a PeftModel the tuner, and the model that this one holds."""
    parts = [model]
    for name in ("base_model", "model"):
        inner = None if hasattr(type(parts[-1]), "base_model_prefix") else parts[-1]._modules.get(name)
        parts += [] if inner is None else [inner]
    return parts


class Sight:
    """What comes out of the modules of a model that is given few rows: by module, the leading dimensions of each call.

    prints: of what has one leading dimension, the squared length of each part, ``[n]``: enough to know it again.
    """

    def __init__(self) -> None:
        self.leads: dict[nn.Module, list[tuple[int, ...]]] = {}
        self.prints: dict[nn.Module, Tensor] = {}

    @classmethod
    def of(cls, call: Call, pick: Callable[[Tensor], Tensor]) -> Sight | None:
        """Run the model on what `pick` makes of each tensor that has the rows in front; None where that is not possible."""
        shared = (hasattr(parameter, name) for parameter in call.model.parameters() for name in _OF_SHARED)
        if call.model in _cannot_be_run or any(shared) or _PAGES in call.kwargs:
            return None  # other processes would have to run theirs too, and pages that others read would be written to
        seen, num_rows, thread = cls(), len(_inputs(call.args, call.kwargs)[0]), threading.get_ident()
        kwargs = {name: value for name, value in call.kwargs.items() if name not in _LEFT_OUT}

        def hook(module: nn.Module, _: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) and output else output
            if threading.get_ident() == thread and isinstance(first, Tensor):
                seen.leads.setdefault(module, []).append(tuple(first.shape[:-1]))
                if first.dim() == 2:
                    seen.prints[module] = first.float().square().sum(-1)

        handle = register_module_forward_hook(hook)
        try:
            with _undisturbed(call.model):
                call.model(*_picked(call.args, num_rows, pick), **_picked(kwargs, num_rows, pick))
        except Exception as error:  # whatever a model says to a single row, the call itself goes on
            logger.debug("a %s cannot be run on one row: %r", type(call.model).__name__, error)
            _cannot_be_run.add(call.model)
            return None
        finally:
            handle.remove()
        return seen


def _kinds_in(call: Call, tokens: set[int]) -> dict[nn.Module, Kind] | None:
    """What each module is given in a call with so many tokens, as far as it can be told; None where the model cannot be run.

    With a single token only what sees some of the tokens can be told from the rest.
    """
    seen = Sight.of(call, lambda tensor: tensor[:1])
    if seen is None:
        return None
    kinds = {}
    if max(tokens, default=1) > 1:
        for module, leads in seen.leads.items():
            each = {_kind(lead, tokens) for lead in leads}
            kinds[module] = each.pop() if len(each) == 1 else Kind.OTHER
    for module in call.model.modules():
        if isinstance(module, (nn.ModuleList, nn.ModuleDict)) and _chooses(module, seen):
            kinds.update(dict.fromkeys(module.modules(), Kind.OTHER))
    flat = [module for module, kind in kinds.items() if kind is Kind.TOKENS]
    if flat:
        pair = Sight.of(call, _with_reverse)
        kinds.update((module, Kind.OTHER) for module in flat if pair is None or not _goes_by_row(seen, pair, module))
    return kinds


def _kind(lead: tuple[int, ...], tokens: set[int]) -> Kind:
    """What a module is given that makes these leading dimensions of a single row."""
    if lead[:1] == (1,):
        return Kind.ROWS
    return Kind.TOKENS if len(lead) == 1 and lead[0] in tokens else Kind.OTHER


def _chooses(members: nn.Module, seen: Sight) -> bool:
    """Whether the members of a list are given flat tokens, and not the same ones one after the other: experts."""
    leads = [seen.leads.get(member, []) for member in members.children()]
    return any(len(lead) == 1 for each in leads for lead in each) and any(each != leads[0][:1] for each in leads)


def _with_reverse(tensor: Tensor) -> Tensor:
    """The first row, and its tokens backwards as a second one."""
    first = tensor[:1]
    return torch.cat((first, first.flip(1) if first.dim() > 1 else first))


def _goes_by_row(one: Sight, pair: Sight, module: nn.Module) -> bool:
    """Whether flat tokens of two rows are those of the first, then those of the second; not the first of each, then the next."""
    alone, both = one.prints[module], pair.prints.get(module)
    if both is None or len(both) != 2 * len(alone):
        return False
    by_row, by_token = ((found - alone).abs().max() for found in (both[: len(alone)], both[::2]))
    return bool(by_row <= by_token) or bool(by_row < SAME * alone.abs().max())


def _inputs(args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """What has the rows of a call in front, and then, mostly, the tokens of each."""
    found = [value for value in (*args, *map(kwargs.get, INPUTS)) if isinstance(value, Tensor) and value.dim() > 0]
    return found or [value for value in kwargs.values() if isinstance(value, Tensor) and value.dim() > 1][:1]


def _picked(value: Any, num_rows: int, pick: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return pick(value) if value.dim() > 0 and len(value) == num_rows else value
    if isinstance(value, Mapping):
        parts = {name: _picked(part, num_rows, pick) for name, part in value.items()}
        return parts if type(value) is dict else type(value)(**parts)
    if type(value) in (tuple, list):
        return type(value)(_picked(part, num_rows, pick) for part in value)
    return value


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Within the block no rows are in force, nothing is trained, and nothing is drawn that would have been drawn later."""
    modes = [(module, module.training) for module in model.modules()]
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    with ExitStack() as stack:
        for routing in routings_in_force.get():
            stack.enter_context(routing.chosen(None))
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.random.fork_rng(devices=sorted(devices, key=str)))
        try:
            for module, _ in modes:
                module.training = False
            yield
        finally:
            for module, mode in modes:
                module.training = mode
