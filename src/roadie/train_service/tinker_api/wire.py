"""Protobuf on the wire: a forward or forward_backward to rows of the engine, results to what the SDK decodes.

Arrays are bytes in the machine's order, little-endian: tokens int32, logprobs float32. A tensor is dense, or sparse by rows
(CSR) with 0 in the places that are not listed. The logprobs of all rows of a result are one array with offsets in bytes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import fields
from itertools import groupby
from typing import Any

import torch
from google.protobuf.message import DecodeError
from tinker.proto import tinker_public_pb2 as pb
from torch import Tensor

from roadie.engine import ForwardResult, TrainingRow
from roadie.errors import ConfigError
from roadie.serving.engine import FinishReason, Output, TokenLogprob
from roadie.serving.http.failures import ApiError

MAX_VALUES = 1 << 26
"""Numbers of one tensor: a sparse one may claim any size."""
NO_LOGPROB = -99999.0
"""Of a place in a table of the most likely tokens where there is none, beside the token 0."""

_DTYPES = {
    pb.DTYPE_FLOAT32: torch.float32,
    pb.DTYPE_INT64: torch.int64,
    pb.DTYPE_INT32: torch.int32,
    pb.DTYPE_BFLOAT16: torch.bfloat16,
}
_FIELDS = {each.name for each in fields(TrainingRow)} - {"tokens", "targets", "gradients"}


def request_of(body: bytes) -> pb.ForwardBackwardRequest:
    """What came; raises `ApiError` (400) for bytes that are no such message."""
    try:
        return pb.ForwardBackwardRequest.FromString(body)
    except DecodeError:
        raise ApiError(
            400, "got bytes that are no ForwardBackwardRequest; wanted protobuf", "invalid_protobuf"
        ) from None


def rows_of(request: pb.ForwardBackwardRequest) -> list[TrainingRow]:
    """The rows of a request; raises `ConfigError`, naming the row, for what is not text, or no tensor."""
    rows = []
    for number, datum in enumerate(request.data):
        try:
            rows.append(_row(datum))
        except ConfigError as error:
            raise ConfigError(f"datum {number}: {error}") from None
    return rows


def loss_settings(request: pb.ForwardBackwardRequest) -> tuple[dict[str, float], float | None]:
    """What the loss is told, and the reward, which is for who watches; raises `ConfigError` for words."""
    found: dict[str, float] = dict(request.loss_fn_config)
    for name, value in request.loss_fn_config_v2.items():
        if value.WhichOneof("value") == "text":
            raise ConfigError(f"got {name}={value.text[:100]!r} for the loss; wanted a number")
        found[name] = value.number
    reward = found.pop("reward", None)
    if reward is not None and not math.isfinite(reward):
        raise ConfigError(f"got reward={reward}; wanted a finite number")
    return found, reward


def _row(datum: pb.Datum) -> TrainingRow:
    tensors = {name: _tensor(name, tensor) for name, tensor in datum.loss_fn_inputs.items()}
    unknown = sorted(set(tensors) - _FIELDS - {"target_tokens"})
    if unknown or "target_tokens" not in tensors:
        got = f"{', '.join(unknown)}, which no loss here uses" if unknown else "no target_tokens"
        raise ConfigError(f"got {got}; wanted target_tokens and some of {', '.join(sorted(_FIELDS))}")
    targets = tensors.pop("target_tokens")
    return TrainingRow(_tokens(datum), targets, **tensors)


def _tokens(datum: pb.Datum) -> Tensor:
    kinds = {chunk.WhichOneof("chunk") for chunk in datum.model_input}
    if kinds - {"encoded_text"}:
        raise ConfigError(f"got a {min(map(str, kinds - {'encoded_text'}))} as input; wanted tokens alone")
    return _numbers("tokens", b"".join(chunk.encoded_text.tokens for chunk in datum.model_input), torch.int32)


def _numbers(name: str, data: bytes, dtype: torch.dtype) -> Tensor:
    if len(data) % dtype.itemsize:
        raise ConfigError(f"got {len(data)} bytes of {name}; wanted a multiple of {dtype.itemsize}")
    return torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.empty(0, dtype=dtype)


def _tensor(name: str, message: pb.Tensor) -> Tensor:
    dtype, shape = _DTYPES.get(message.dtype), tuple(message.shape)
    if dtype is None or any(size < 0 for size in shape) or math.prod(shape) > MAX_VALUES:
        raise ConfigError(f"got {name} of dtype {message.dtype} and shape {shape}; wanted a tensor of a known dtype")
    if message.HasField("sparse_csr"):
        return _from_sparse(name, message.sparse_csr, dtype, shape)
    values = _numbers(name, message.dense, dtype)
    if shape and math.prod(shape) != len(values):
        raise ConfigError(f"got {len(values)} values of {name} for shape {shape}; wanted as many as fit")
    return values.reshape(shape) if shape else values


def _from_sparse(name: str, csr: pb.SparseCsr, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
    values = _numbers(name, csr.values, dtype)
    begins = _numbers(name, csr.crow_indices, torch.int64)
    columns = _numbers(name, csr.col_indices, torch.int64)
    counts = begins.diff()
    is_whole = len(shape) == 2 and len(begins) == shape[0] + 1 and int(begins[0]) == 0 and len(values) == len(columns)
    is_whole = is_whole and int(begins[-1]) == len(values) and bool((counts >= 0).all())
    if not is_whole or not bool(((columns >= 0) & (columns < shape[1])).all()):
        raise ConfigError(f"got {name} that is sparse and not by rows of shape {tuple(shape)}; wanted CSR")
    dense = torch.zeros(tuple(shape), dtype=dtype)
    dense[torch.repeat_interleave(torch.arange(shape[0]), counts), columns] = values
    return dense


# Results.


def forward_bytes(result: ForwardResult) -> bytes:
    """A `ForwardBackwardOutput`: the logprobs of each row's targets, and the sum of the loss."""
    message = pb.ForwardBackwardOutput(loss_fn_output_type="ArrayRecord", metrics={"loss:sum": result.loss})
    for trailing, rows in groupby(result.logprobs, key=lambda row: tuple(row.shape[1:])):
        logprobs = [row.contiguous().float() for row in rows]
        offsets = torch.tensor([0, *(row.numel() * 4 for row in logprobs)]).cumsum(0)
        record = message.loss_fn_outputs.add(type_tag="ArrayRecord", num_datums=len(logprobs))
        record.fields["logprobs"].CopyFrom(
            pb.BatchedTensor(
                data=b"".join(row.numpy().tobytes() for row in logprobs),
                offsets=offsets.numpy().tobytes(),
                dtype=pb.DTYPE_FLOAT32,
                trailing_shape=trailing,
            )
        )
    return message.SerializeToString()


class PromptWish:
    """What is to be told of a prompt of so many tokens. logprobs: whether of its own; num_top: likely tokens at each."""

    def __init__(self, num_tokens: int, *, logprobs: bool, num_top: int) -> None:
        self.num_tokens, self.logprobs, self.num_top = num_tokens, logprobs, num_top

    def put(self, found: Sequence[TokenLogprob], message: pb.SampleResponse) -> None:
        """Into the answer; of the tokens before the first that was scored there is nothing."""
        none: list[TokenLogprob | None] = [None] * (self.num_tokens - len(found))
        whole = [*none, *found]
        if self.logprobs:
            values = [math.nan if each is None else each.logprob for each in whole]
            message.prompt_logprobs = _bytes(values, torch.float32)
        if self.num_top:
            message.topk_prompt_logprobs.CopyFrom(_top(whole, self.num_top))


def sample_bytes(samples: Sequence[Sequence[Output]], num_top: int, prompt: PromptWish | None) -> bytes:
    """A `SampleResponse`. samples: the outputs of each, in order; num_top: likely tokens at each sampled one; prompt: of it."""
    message = pb.SampleResponse()
    for outputs in samples:
        tokens = [token for output in outputs for token in output.token_ids]
        found = [each for output in outputs for each in output.logprobs]
        is_stopped = outputs[-1].finish is FinishReason.STOP
        sequence = message.sequences.add(
            stop_reason=pb.STOP_REASON_STOP if is_stopped else pb.STOP_REASON_LENGTH,
            tokens=_bytes(tokens, torch.int32),
            logprobs=_bytes([each.logprob for each in found], torch.float32),
        )
        if num_top:
            sequence.topk_sampled_logprobs.CopyFrom(_top(found, num_top))
    usage = samples[0][-1].usage
    message.prompt_cache_hit_tokens = 0 if usage is None else usage.cached_tokens
    if prompt is not None:
        prompt.put([each for output in samples[0] for each in output.prompt_logprobs], message)
    return message.SerializeToString()


def _top(found: Sequence[TokenLogprob | None], num_top: int) -> pb.TopkLogprobs:
    rows = []
    for each in found:
        top = [] if each is None else list(each.top[:num_top])
        rows.append(top + [(0, NO_LOGPROB)] * (num_top - len(top)))
    return pb.TopkLogprobs(
        token_ids=_bytes([token for row in rows for token, _ in row], torch.int32),
        logprobs=_bytes([logprob for row in rows for _, logprob in row], torch.float32),
        k=num_top,
        length=len(rows),
    )


def _bytes(values: Sequence[Any], dtype: torch.dtype) -> bytes:
    return torch.tensor(values, dtype=dtype).numpy().tobytes()
