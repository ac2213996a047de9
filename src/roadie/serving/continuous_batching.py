"""The one module that holds transformers' continuous batching by its private parts.

transformers packs the tokens of all running requests into one row ``[1, T]``, with paged attention. It knows neither adapters
nor a way of sampling a request, so this module drives its loop itself, a step at a time, in the caller's thread, with something
of its own in the model's place:

    slot of a token      the slot of its request, put in force around the forward (`AdapterBank.rows`)
    logits               those of scored tokens of prompts are computed, too
    next token           chosen by the caller; transformers, which takes the likeliest, is given logits that say which
    prefix sharing       transformers hashes tokens only; here the tokens of a first block have the request's salt among them

Everything is set on objects that belong to one `ContinuousBatch`; no class and no module of transformers is changed. What is
held is listed in `CONTRACT`; `check_contract` names what has moved. Why: docs/decisions/0012.

Legend: T tokens of a step, N requests that get a token, K rows of logits that are kept, V vocabulary.
"""

from __future__ import annotations

import inspect
import math
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import count
from types import SimpleNamespace
from typing import Any, TypeAlias

import torch
import transformers
from torch import Tensor

from roadie.bank import AdapterBank
from roadie.errors import ServingError
from roadie.serving.engine import EngineSettings

OLDEST_TESTED, NEWEST_TESTED = (5, 17), (5, 23)
"""Of transformers; versions between them are taken where they keep the contract."""

Part: TypeAlias = "tuple[str, str, tuple[str, ...]]"
CONTRACT: tuple[Part, ...] = (
    ("continuous_api", "ContinuousBatchingManager._create_batch_processor", ("self",)),
    ("continuous_api", "ContinuousBatchingManager._generation_loop_body", ("self", "batch_processor", "bootstrapping")),
    ("requests", "RequestState", ("request_id", "initial_tokens", "position_offset")),
    ("requests", "FutureRequestState", ("self", "state", "has_new_token", "complete_blocks", "query_length")),
    ("scheduler", "Scheduler", ("cache", "safety_margin", "max_requests_per_batch")),
    ("cache", "PagedAttentionCache.search_prefix_match", ("self", "request_id", "prompt_ids")),
)
"""Module, name, and the parameters that are used: of functions all of them in order, of classes some of their fields."""

CONTRACT_OF_BLOCKS: tuple[tuple[Part, ...], ...] = (
    (
        ("cache", "PagedAttentionCache.compute_free_capacity", ("self", "relative")),
        ("cache_allocators.cache_allocator", "BlockLedger.evict_cached_blocks", ("self",)),
    ),
    (("cache", "PagedAttentionCache.get_num_free_blocks", ("self",)),),  # 5.17
)
"""How a cache counts its free blocks, and lets prefixes go: one of these."""

ATTENTION = frozenset({"full_attention", "sliding_attention"})
"""The kinds of layers that a paged cache holds."""

FREE_SHARE_WANTED = 0.15
"""transformers starts one prompt at a time below this share of free blocks; prefixes make room, so many at a time."""


def contract_problems() -> list[str]:
    """What of `CONTRACT` this transformers does not have, in words."""
    try:
        from transformers.generation import continuous_batching as package
    except ImportError as error:
        return [f"transformers.generation.continuous_batching is not there ({error})"]
    of_blocks = [_problems(package, contract) for contract in CONTRACT_OF_BLOCKS]
    return _problems(package, CONTRACT) + min(of_blocks, key=len)


def _problems(package: Any, contract: Sequence[Part]) -> list[str]:
    return [problem for entry in contract if (problem := _problem(package, *entry))]


def _problem(package: Any, module: str, name: str, wanted: tuple[str, ...]) -> str | None:
    where, found = f"{package.__name__}.{module}.{name}", package
    try:
        for part in f"{module}.{name}".split("."):
            found = getattr(found, part)
        names = tuple(inspect.signature(found.__init__ if name == "FutureRequestState" else found).parameters)
    except AttributeError as error:
        return f"{where} is not there ({error})"
    is_met = set(wanted) <= set(names) if inspect.isclass(found) and "self" not in wanted else names == wanted
    return None if is_met else f"{where} takes ({', '.join(names)}) instead of ({', '.join(wanted)})"


def check_contract(allow_unknown_version: bool = False) -> None:
    """Raise `ServingError` where this transformers is not a tested one, or where what is held of it has moved."""
    version = transformers.__version__
    wanted = " to ".join(".".join(map(str, each)) for each in (OLDEST_TESTED, NEWEST_TESTED))
    if not OLDEST_TESTED <= _first_two(version) <= NEWEST_TESTED and not allow_unknown_version:
        raise ServingError(
            f"got transformers {version}, with which the server was not tested; wanted {wanted}; install one of these, or allow "
            "unknown versions (--allow-unknown-version, EngineSettings.allow_unknown_version)"
        )
    problems = contract_problems()
    if problems:
        raise ServingError(
            f"got transformers {version}, in which {'; '.join(problems[:4])}; wanted the continuous batching of {wanted}; "
            "install one of these"
        )


def check_model(model: Any) -> None:
    """Raise `ServingError` for a model that keeps something else of a token than keys and values of one width a head."""
    config, kind = model.config.get_text_config(decoder=True), type(model).__name__
    others = sorted(set(getattr(config, "layer_types", None) or ()) - ATTENTION)
    if others:
        raise ServingError(
            f"got a {kind} with layers of {', '.join(others)}, for which transformers' continuous batching has no cache; wanted "
            f"{' and '.join(sorted(ATTENTION))} alone; AdapterBank and generate take this model"
        )
    if getattr(config, "kv_lora_rank", None) is None:
        return
    keys, values = config.qk_nope_head_dim + config.qk_rope_head_dim, config.v_head_dim
    if not keys == values == config.head_dim:
        raise ServingError(
            f"got a {kind} whose latent attention has keys of {keys} and values of {values} a head, which transformers' "
            f"continuous batching keeps as heads of {config.head_dim}; wanted one width; AdapterBank and generate take this model"
        )


def _first_two(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


Choose = Callable[[Sequence[str], Tensor], Sequence[int]]
"""(ids of N requests, their logits float32 [N, V]) -> the next token of each."""
Score = Callable[[str, int, Tensor], None]
"""Told of a request the logits [K, V], in the model's dtype, of K places of its prompt one after another, from this one on."""


@dataclass(frozen=True)
class Packed:
    """What a request is to this module: its slot (-1: the base model), and a salt for its blocks, a number below 2^64.

    scored: the places of its prompt whose logits are told; they are computed, and not taken from another request's blocks.
    """

    slot: int
    salt: int
    scored: range = range(0)


class ContinuousBatch:
    """Requests that run together; all methods are called by one thread."""

    def __init__(self, model: Any, bank: AdapterBank, settings: EngineSettings, choose: Choose, score: Score) -> None:
        check_contract(settings.allow_unknown_version)
        check_model(model)
        self._model, self._bank, self._choose, self._score = model, bank, choose, score
        self._computing = threading.Lock()
        self._keeps_all = "logits_to_keep" not in inspect.signature(model.forward).parameters
        self._was_training, self._attention = bool(model.training), model.config._attn_implementation
        self._manager = model.init_continuous_batching(_greedy(), continuous_batching_config=_config(settings))
        self._processor = self._manager.batch_processor = self._manager._create_batch_processor()
        self._manager.current_batch, self._manager.model = 0, _InPlaceOfModel(self._compute)
        self._cache = self._processor.cache
        self._blocks = blocks_of(self._cache)
        self._requests: dict[str, _Request] = {}  # by the ids that transformers has of them
        self._ids: dict[str, str] = {}  # and these by the caller's
        self._numbers = count()
        self._has_computed = False
        self._rows: tuple[tuple[int, ...], ExitStack] | None = None
        if self._cache.use_prefix_sharing:
            salt_prefixes(self._cache, self._requests, settings.page_size)

    def close(self) -> None:
        """Give the model back as it was."""
        self._leave_rows()
        self._manager.destroy()
        self._manager.model = None  # a cycle, which would keep the cache alive
        self._attend_by(self._attention)
        self._model.train(self._was_training)

    @contextmanager
    def lent(self) -> Iterator[None]:
        """Within the block the model is as it was, for somebody else to use; requests and their blocks stay."""
        self._leave_rows()
        paged = self._model.config._attn_implementation
        self._attend_by(self._attention)
        try:
            yield
        finally:
            self._attend_by(paged)

    def _attend_by(self, implementation: str) -> None:
        if self._model.config._attn_implementation != implementation:
            self._model.set_attn_implementation(implementation)

    def add(self, request_id: str, token_ids: Sequence[int], packed: Packed) -> None:
        """A request joins at the next step."""
        own = self._ids[request_id] = str(next(self._numbers))
        self._requests[own] = _Request(request_id, packed)
        self._manager.add_request(list(token_ids), request_id=own)

    def remove(self, request_id: str) -> None:
        """A request leaves, wherever it is; its blocks are free at the next step, or kept for others with the same prefix."""
        own = self._ids.pop(request_id)
        self._manager.cancel_request(own)
        self._processor.scheduler.block_new_requests = False  # transformers does so where it ends a request itself
        del self._requests[own]
        if not self._requests:
            self._turn()  # nobody is left to compute for, so that it only lets go

    def step(self) -> bool:
        """One forward for whoever fits; tells scores, and calls `choose` for those that get a token. Whether there was one."""
        self._has_computed = False
        self._turn()
        return self._has_computed

    def _turn(self) -> None:
        """Who has come and who has gone, and a forward where there is somebody."""
        self._manager._generation_loop_body(self._processor, bootstrapping=False)

    def _compute(self, *, logits_to_keep: Tensor, **inputs: Any) -> Tensor:
        """The forward of a step; ``[1, N, ...]`` with the largest number of each row where its next token is."""
        self._has_computed = True
        batch = self._processor.inputs_and_outputs.requests_in_batch
        requests = [self._requests[each.state.request_id] for each in batch]
        for each, request in zip(batch, requests, strict=True):
            if not isinstance(each.state.initial_tokens, Salted):
                each.state.initial_tokens = Salted(each.state.initial_tokens, request.packed.salt)
        self._enter_rows(
            tuple((request.packed.slot, each.query_length) for each, request in zip(batch, requests, strict=True))
        )
        choosing = [request.id for each, request in zip(batch, requests, strict=True) if each.has_new_token]
        parts = _scored_parts(batch, requests)
        logits = self._logits(logits_to_keep[: len(choosing)], [row for part in parts for row in part.rows], inputs)
        begin = len(choosing)
        for part in parts:
            self._score(part.request_id, part.place, logits[begin : begin + len(part.rows)])
            begin += len(part.rows)
        chosen = self._choose(choosing, logits[: len(choosing)].float()) if choosing else ()
        return _saying(chosen, logits.device)

    def _logits(self, last: Tensor, scored: Sequence[int], inputs: dict[str, Any]) -> Tensor:
        """``[K, V]``, of these rows of the step."""
        rows = torch.cat([last, last.new_tensor(scored)]) if scored else last
        with self._computing:
            keeps_all = self._keeps_all
            logits: Tensor = self._model(**inputs, **({} if keeps_all else {"logits_to_keep": rows})).logits
        return logits[0, rows] if keeps_all else logits[0]

    def keep_all_logits(self) -> None:
        """Let the model compute the logits of every token: for adapters of its last layer, which need a slot a token.

        From any thread; not before a step that began without is over, so that its last layer is not adapted meanwhile.
        """
        with self._computing:
            self._keeps_all = True

    def cached_tokens(self, request_id: str) -> int:
        """How many tokens of a prompt were found in the cache."""
        return self._requests[self._ids[request_id]].num_cached

    @property
    def num_blocks(self) -> int:
        """Blocks of the cache."""
        return int(self._cache.num_blocks)

    @property
    def num_blocks_free(self) -> int:
        """Blocks that no request uses, those with a prefix that may be used again included."""
        return self._blocks.num_free

    def _enter_rows(self, parts: tuple[tuple[int, int], ...]) -> None:
        """Put a slot a token in force; it stays so until other tokens come, so that layers know that nothing changed."""
        slots = tuple(slot for slot, count in parts for _ in range(count))
        if self._rows is not None and self._rows[0] == slots:
            return
        self._leave_rows()
        if all(slot < 0 for slot in slots):
            return
        stack = ExitStack()
        tensor = torch.tensor([slots], dtype=torch.int64, device=self._model.device)
        stack.enter_context(torch.no_grad())
        stack.enter_context(self._bank.rows(tensor))
        self._rows = (slots, stack)

    def _leave_rows(self) -> None:
        if self._rows is not None:
            self._rows[1].close()
            self._rows = None


@dataclass
class _Request:
    """id: the caller's. num_cached: tokens of its prompt that were found in the cache."""

    id: str
    packed: Packed
    num_cached: int = 0


@dataclass(frozen=True)
class _Part:
    """Places of a prompt, one after another, from `place` on, and the tokens of the step that they are."""

    request_id: str
    place: int
    rows: range


def _scored_parts(batch: Sequence[Any], requests: Sequence[_Request]) -> list[_Part]:
    """What is to be told of a step, in its order."""
    parts, begin = [], 0
    for each, request in zip(batch, requests, strict=True):
        scored, end = request.packed.scored, each.state.position_offset
        first, last = max(scored.start, end - each.query_length), min(scored.stop, end)
        if first < last:
            row = begin + first - (end - each.query_length)
            parts.append(_Part(request.id, first, range(row, row + last - first)))
        begin += each.query_length
    return parts


class _InPlaceOfModel:
    """What transformers calls instead of the model."""

    def __init__(self, compute: Callable[..., Tensor]) -> None:
        self._compute = compute

    def _supports_logits_to_keep(self) -> bool:
        """It is told which rows are wanted, and what it gives is taken for their logits."""
        return True

    def __call__(self, **inputs: Any) -> SimpleNamespace:
        return SimpleNamespace(logits=self._compute(**inputs))


def _saying(chosen: Sequence[int], device: torch.device) -> Tensor:
    """Logits ``[1, N, ...]`` whose largest are at these tokens; one row that nobody reads, where there are none."""
    said = list(chosen) or [0]
    tokens = torch.tensor(said, device=device)[None, :, None]
    return torch.zeros(1, len(said), max(said) + 1, device=device).scatter_(-1, tokens, 1.0)


def _greedy() -> Any:
    """Nothing of transformers' own sampling or stopping: both are the caller's."""
    return transformers.GenerationConfig(do_sample=False, eos_token_id=-1, max_new_tokens=2**30)


def _config(settings: EngineSettings) -> Any:
    from transformers import ContinuousBatchingConfig

    page_size = "page_size" if "page_size" in ContinuousBatchingConfig.__dataclass_fields__ else "block_size"  # 5.17
    return ContinuousBatchingConfig(
        num_blocks=settings.num_blocks,
        max_batch_tokens=settings.max_batch_tokens,
        max_requests_per_batch=settings.max_running,
        allow_block_sharing=settings.share_prefixes,
        use_async_batching=False,  # slots and samples belong to the step that is being prepared
        use_cuda_graph=False,
        safety_margin=FREE_SHARE_WANTED,
        seed=0,
        **{page_size: settings.page_size},
    )


def salt_prefixes(cache: Any, requests: Mapping[str, _Request], page_size: int) -> None:
    """Let blocks be shared only between requests of equal salt: a first block's hash is of it, too, and the others follow.

    Places whose logits are wanted are not taken from blocks, nor the last token of a prompt.
    """
    search = cache.search_prefix_match

    def search_prefix_match(request_id: str, prompt_ids: list[int]) -> int:
        request = requests[request_id]
        scored = request.packed.scored
        most = scored.start if scored else len(prompt_ids) - 1
        salted = Salted(prompt_ids[: most // page_size * page_size + 1], request.packed.salt)
        request.num_cached = num_found = int(search(request_id, salted))
        if num_found and not salted.is_told:
            raise ServingError(
                f"got blocks of the cache that were looked up without their salt, by transformers {transformers.__version__}; "
                "wanted a version that was tested, or EngineSettings.share_prefixes=False"
            )
        return num_found

    cache.search_prefix_match = search_prefix_match


class Salted(list[int]):
    """The tokens of a request for transformers to hash: a part that begins with the first one has a salt in it.

    salt: a number below 2^64, as four numbers below 2^16. is_told: whether such a part was taken. Tokens may be added.
    """

    def __init__(self, token_ids: Sequence[int], salt: int) -> None:
        super().__init__(token_ids)
        self._salt = salt
        self.is_told = False

    def __getitem__(self, place: Any) -> Any:
        part = super().__getitem__(place)
        if not isinstance(place, slice) or place.start != 0:
            return part
        self.is_told = True
        return [*part, *(self._salt >> shift & 0xFFFF for shift in (0, 16, 32, 48))]

    def __add__(self, more: Any) -> Salted:  # type: ignore[override]
        return Salted([*self, *more], self._salt)


class _Sectors:
    """The blocks of a cache whose prefixes may be evicted by hand: the oldest go, some at a time, not all at once."""

    def __init__(self, cache: Any) -> None:
        self._cache = cache
        for ledger in self._ledgers:
            ledger.evict_cached_blocks = partial(_evict_oldest, ledger, math.ceil(FREE_SHARE_WANTED * cache.num_blocks))

    @property
    def _ledgers(self) -> list[Any]:
        return [allocator.ledger for allocator in self._cache.cache_allocators.values()]

    @property
    def num_free(self) -> int:
        """Blocks that no request uses."""
        cache, unused = self._cache, self._cache.compute_free_capacity(relative=False)
        for allocator in cache.cache_allocators.values():
            unused += len(allocator.ledger.cached_blocks) * allocator.bytes_per_block
        return int(unused * cache.num_blocks // (cache.num_sectors * cache.bytes_per_sector))


def _evict_oldest(ledger: Any, num_blocks: int) -> list[int]:
    """Forget the prefixes that have been unused longest, and say which blocks had them."""
    evicted = list(ledger.cached_blocks)[:num_blocks]
    for block in evicted:
        ledger.cached_blocks.pop(block)
        ledger.hash_to_block.pop(ledger.block_to_hash.pop(block))
    return evicted


@dataclass(frozen=True)
class _Blocks:
    """The blocks of a cache that takes them from prefixes where it needs them."""

    cache: Any

    @property
    def num_free(self) -> int:
        """Blocks that no request uses."""
        return int(self.cache.get_num_free_blocks())


def blocks_of(cache: Any) -> _Sectors | _Blocks:
    """How this transformers counts blocks."""
    return _Sectors(cache) if hasattr(cache, "compute_free_capacity") else _Blocks(cache)
