"""The one module that holds transformers' continuous batching by its private parts.

transformers packs the tokens of all running requests into one row ``[1, T]``, with paged attention. It knows neither adapters
nor a way of sampling a request, so this module takes its scheduler, cache and runner apart and drives them itself, a step at a
time, in the caller's thread:

    slot of a token      the slot of its request, put in force around the forward (`AdapterBank.rows`)
    logits               the runner calls `_Forward` for the model, which keeps those of scored tokens of prompts, too
    next token           `ModelRunner._sample` of this one runner is replaced by the caller's choice
    prefix sharing       transformers hashes tokens only; here the hash of a first block begins with the request's salt

Everything is set on objects that belong to one `ContinuousBatch`; no class and no module of transformers is changed. What is
held is listed in `CONTRACT`; `check_contract` names what has moved. Why: docs/decisions/0012.

Legend: T tokens of a step, N requests that get a token, K rows of logits that are kept, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from torch import Tensor

from roadie.bank import AdapterBank
from roadie.errors import ServingError
from roadie.serving.engine import EngineSettings

TESTED_VERSIONS = ("5.23",)

CONTRACT: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("continuous_api", "ContinuousBatchingManager._create_batch_processor", ("self",)),
    ("continuous_api", "ContinuousBatchProcessor.prepare_next_batch", ("self",)),
    ("continuous_api", "ContinuousBatchProcessor._generation_step", ("self", "model")),
    ("continuous_api", "ContinuousBatchProcessor.update_batch", ("self",)),
    ("model_runner", "ModelRunner._sample", ("self", "scores", "output_ids")),
    ("scheduler", "Scheduler.add_waiting_request", ("self", "state")),
    ("scheduler", "Scheduler.finish_request", ("self", "request_id")),
    ("scheduler", "Scheduler.set_request_cancellation", ("self", "request_id")),
    ("scheduler", "Scheduler.clear_cancelled_requests", ("self",)),
    ("cache", "PagedAttentionCache.search_prefix_match", ("self", "request_id", "prompt_ids")),
    ("cache", "PagedAttentionCache.compute_free_capacity", ("self", "relative")),
    (
        "cache_allocators.cache_allocator",
        "CacheAllocator.mark_complete_blocks",
        ("self", "request_id", "token_ids", "new_new_blocks"),
    ),
    ("cache_allocators.cache_pool", "CachePool.free_blocks", ("self", "index", "block_ids")),
    ("requests", "RequestState", ("request_id", "initial_tokens", "max_new_tokens", "eos_token_id")),
    ("requests", "FutureRequestState", ("self", "state", "has_new_token", "complete_blocks", "query_length")),
)
"""Module, name, and the parameters that are used: of functions all of them in order, of dataclasses some of their fields."""

FREE_SHARE_WANTED = 0.15
"""transformers starts one prompt at a time below this share of free blocks; kept by letting the oldest unused prefixes go."""


def contract_problems() -> list[str]:
    """What of `CONTRACT` this transformers does not have, in words."""
    try:
        from transformers.generation import continuous_batching as package
    except ImportError as error:
        return [f"transformers.generation.continuous_batching is not there ({error})"]
    return [problem for entry in CONTRACT if (problem := _problem(package, *entry))]


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
    is_tested = any(version == tested or version.startswith(f"{tested}.") for tested in TESTED_VERSIONS)
    if not is_tested and not allow_unknown_version:
        raise ServingError(
            f"got transformers {version}, with which the server was not tested; wanted {', '.join(TESTED_VERSIONS)}; install "
            "one of these, or allow unknown versions (EngineSettings.allow_unknown_version)"
        )
    problems = contract_problems()
    if problems:
        raise ServingError(
            f"got transformers {version}, in which {'; '.join(problems[:4])}; wanted the continuous batching of "
            f"{', '.join(TESTED_VERSIONS)}; install one of these"
        )


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
        from transformers.generation.continuous_batching import requests

        self._new_state = requests.RequestState
        self._model, self._bank, self._choose, self._score = model, bank, choose, score
        self._forward = _Forward(model)
        self._was_training = bool(model.training)
        self._manager = model.init_continuous_batching(_greedy(), _config(settings))
        self._processor = self._manager._create_batch_processor()
        self._runner, self._cache = self._processor.model_runner, self._processor.cache
        self._scheduler = self._processor.scheduler
        self._packed: dict[str, Packed] = {}
        self._cached_tokens: dict[str, int] = {}
        self._choosing: list[str] = []
        self._rows: tuple[tuple[int, ...], ExitStack] | None = None
        self._runner._sample = self._sample
        if self._cache.use_prefix_sharing:
            salt_prefixes(self._cache, self._packed, self._cached_tokens.setdefault)

    def close(self) -> None:
        """Give the model back as it was."""
        self._leave_rows()
        manager = self._manager
        if manager._original_attn_impl is not None:
            self._model.set_attn_implementation(manager._original_attn_impl)
            manager._original_attn_impl = None
        manager.destroy()
        self._model.train(self._was_training)
        del self._runner._sample  # a cycle, which would keep the cache alive

    @contextmanager
    def lent(self) -> Iterator[None]:
        """Within the block the model is as it was, for somebody else to use; requests and their blocks stay."""
        self._leave_rows()
        paged, own = self._model.config._attn_implementation, self._manager._original_attn_impl
        if own is not None:
            self._model.set_attn_implementation(own)
        try:
            yield
        finally:
            if own is not None:
                self._model.set_attn_implementation(paged)

    def add(self, request_id: str, token_ids: Sequence[int], packed: Packed) -> None:
        """A request joins at the next step."""
        self._packed[request_id] = packed
        state = self._new_state(
            request_id=request_id, initial_tokens=list(token_ids), max_new_tokens=None, eos_token_id=None
        )
        self._scheduler.add_waiting_request(state)

    def remove(self, request_id: str) -> None:
        """A request leaves, wherever it is; its blocks are free, or kept for others with the same prefix."""
        self._scheduler.set_request_cancellation(request_id)
        self._scheduler.clear_cancelled_requests()
        self._scheduler.block_new_requests = False  # transformers does so where it ends a request itself
        self._packed.pop(request_id, None)
        self._cached_tokens.pop(request_id, None)

    def step(self) -> bool:
        """One forward for whoever fits; calls `choose` for those that get a token. Whether there was anything to do."""
        if self._cache.use_prefix_sharing:
            free_oldest_prefixes(self._cache, FREE_SHARE_WANTED)
        if not self._processor.prepare_next_batch():
            return False
        batch = self._processor.inputs_and_outputs.requests_in_batch
        self._choosing = [each.state.request_id for each in batch if each.has_new_token]
        self._enter_rows(tuple((self._packed[each.state.request_id].slot, each.query_length) for each in batch))
        self._forward.parts = self._scored_parts(batch)
        self._processor._generation_step(self._forward)
        self._processor.update_batch()
        return True

    def _scored_parts(self, batch: Sequence[Any]) -> list[_Part]:
        """What is to be told of this step, in its order."""
        parts, begin = [], 0
        for each in batch:
            scored, end = self._packed[each.state.request_id].scored, each.state.position_offset
            first, last = max(scored.start, end - each.query_length), min(scored.stop, end)
            if first < last:
                row = begin + first - (end - each.query_length)
                parts.append(_Part(each.state.request_id, first, range(row, row + last - first)))
            begin += each.query_length
        return parts

    def keep_all_logits(self) -> None:
        """Let the model compute the logits of every token: for adapters of its last layer, which need a slot a token."""
        self._forward.keeps_all = True

    def cached_tokens(self, request_id: str) -> int:
        """How many tokens of a prompt were found in the cache."""
        return self._cached_tokens.get(request_id, 0)

    @property
    def num_blocks(self) -> int:
        """Blocks of the cache."""
        return int(self._cache.num_blocks)

    @property
    def num_blocks_free(self) -> int:
        """Blocks that no request uses, those with a prefix that may be used again included."""
        allocators = self._cache.cache_allocators.values()
        unused = self._cache.compute_free_capacity(relative=False)
        unused += sum(len(each.ledger.cached_blocks) * each.bytes_per_block for each in allocators)
        return int(unused * self.num_blocks // (self._cache.num_sectors * self._cache.bytes_per_sector))

    def _sample(self, scores: Tensor, output_ids: Tensor) -> None:
        """scores: ``[1, at least N, V]``, the first N in use."""
        for part, logits in self._forward.scored():
            self._score(part.request_id, part.place, logits)
        if not self._choosing:
            return
        chosen = self._choose(self._choosing, scores[0, : len(self._choosing)])
        output_ids[0, : len(chosen)] = torch.tensor(chosen, dtype=output_ids.dtype, device=output_ids.device)

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


@dataclass(frozen=True)
class _Part:
    """Places of a prompt, one after another, from `place` on, and the tokens of the step that they are."""

    request_id: str
    place: int
    rows: range


class _Forward:
    """The model as the runner calls it. It computes the logits of `parts` beside those that the runner asks for."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self.keeps_all = "logits_to_keep" not in inspect.signature(model.forward).parameters
        self.parts: list[_Part] = []
        self._logits: Tensor | None = None

    def _supports_logits_to_keep(self) -> bool:
        """For the runner: it names the rows that it wants, and takes what it is given for their logits."""
        return True

    def __call__(self, *, logits_to_keep: Tensor, **inputs: Any) -> SimpleNamespace:
        scored = [row for part in self.parts for row in part.rows]
        rows = torch.cat([logits_to_keep, logits_to_keep.new_tensor(scored)]) if scored else logits_to_keep
        kept = {} if self.keeps_all else {"logits_to_keep": rows}
        logits = self._model(**inputs, **kept).logits
        logits = logits[:, rows] if self.keeps_all else logits
        self._logits = logits[0, len(logits_to_keep) :]
        return SimpleNamespace(logits=logits[:, : len(logits_to_keep)])

    def scored(self) -> Iterator[tuple[_Part, Tensor]]:
        """The logits of each part, once."""
        logits, self._logits = self._logits, None
        for part in self.parts:
            assert logits is not None
            yield part, logits[: len(part.rows)]
            logits = logits[len(part.rows) :]


def _greedy() -> Any:
    """Nothing of transformers' own sampling or stopping: both are the caller's."""
    return transformers.GenerationConfig(do_sample=False, eos_token_id=-1, max_new_tokens=2**30)


def _config(settings: EngineSettings) -> Any:
    from transformers import ContinuousBatchingConfig

    return ContinuousBatchingConfig(
        page_size=settings.page_size,
        num_blocks=settings.num_blocks,
        max_batch_tokens=settings.max_batch_tokens,
        max_requests_per_batch=settings.max_running,
        allow_block_sharing=settings.share_prefixes,
        use_async_batching=False,  # slots and samples belong to the step that is being prepared
        use_cuda_graph=False,
        safety_margin=FREE_SHARE_WANTED,
        seed=0,
    )


def salt_prefixes(cache: Any, packed: Mapping[str, Packed], on_match: Callable[[str, int], Any]) -> None:
    """Let blocks be shared only between requests of equal salt: a first block's hash is of it, too, and the others follow.

    Places whose logits are wanted are not taken from blocks. on_match: told how many tokens of which request's prompt were found.
    """
    search = cache.search_prefix_match

    def search_prefix_match(request_id: str, prompt_ids: list[int]) -> int:
        request = packed[request_id]
        searched = prompt_ids[: request.scored.start + 1] if request.scored else prompt_ids
        salted = Salted(searched, request.salt)
        num_found = int(search(request_id, salted))
        if num_found and not salted.is_told:
            raise ServingError(
                "got blocks of the cache that were looked up without their salt; this transformers is none to use"
            )
        on_match(request_id, num_found)
        return num_found

    cache.search_prefix_match = search_prefix_match
    for allocator in cache.cache_allocators.values():
        allocator.mark_complete_blocks = _salting(allocator.mark_complete_blocks, packed)


def _salting(mark: Callable[[str, list[int], int], None], packed: Mapping[str, Packed]) -> Callable[..., None]:
    def mark_complete_blocks(request_id: str, token_ids: list[int], new_new_blocks: int) -> None:
        mark(request_id, Salted(token_ids, packed[request_id].salt), new_new_blocks)

    return mark_complete_blocks


class Salted(list[int]):
    """The tokens of a request for transformers to hash: a part that begins with the first one has a salt in it.

    salt: a number below 2^64, as four numbers below 2^16. is_told: whether such a part was taken.
    """

    def __init__(self, token_ids: Sequence[int], salt: int) -> None:
        super().__init__(token_ids)
        self._salt = [salt >> shift & 0xFFFF for shift in (0, 16, 32, 48)]
        self.is_told = False

    def __getitem__(self, place: Any) -> Any:
        part = super().__getitem__(place)
        if not isinstance(place, slice) or place.start:
            return part
        self.is_told = True
        return [*part, *self._salt]


def free_oldest_prefixes(cache: Any, share: float) -> None:
    """Forget the prefixes that have been unused longest, until `share` of the cache is free; transformers forgets them all."""
    missing = (share - cache.compute_free_capacity()) * cache.num_sectors * cache.bytes_per_sector
    for allocator in cache.cache_allocators.values():
        ledger = allocator.ledger
        while missing > 0 and ledger.cached_blocks:
            block = next(iter(ledger.cached_blocks))
            ledger.cached_blocks.pop(block)
            ledger.hash_to_block.pop(ledger.block_to_hash.pop(block))
            allocator.pool.free_blocks(allocator.index, [block])
            missing -= allocator.bytes_per_block
