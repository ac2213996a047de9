"""What backward keeps of a rotation, and how it stays what it was: one rule for every step of autograd that rotates.

One tensor is kept, and somebody else holds it too: the input comes from somebody, the output goes to somebody. Whoever changes it
in place before backward must not reach the gradient in silence. torch counts the changes of what it saved, but checks the count
only of what it stored itself. Under hooks for saved tensors nobody does: activation checkpointing without re-entry hands back
what a second forward saved, whatever that forward did to it afterwards; `save_on_cpu` hands back the same memory on a CPU.

    Keep.INPUT, Keep.OUTPUT   a change is noticed, and refused
    Keep.COPY                 the output, in a lazy copy: a change does not reach it

**A lazy copy** (copy on write) is the same memory until somebody asks to write to the tensor it was made of, or for its address;
then that one moves to new memory. So nothing is copied, and no memory used, for a model that only reads what it is given.

**The mark.** A storage that was saved remembers it, with its lazy copy if it has one, in an attribute that lives as long as the
memory. So a second forward leaves marks of its own, and memory without a mark is a copy that a hook made, at a time
when it was right. What was counted before and after can be compared, because a second forward counts as the first did.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from roadie.errors import InPlaceError


class Keep(str, Enum):
    """What backward remembers of a rotation's forward: one tensor, in its own dtype; COPY is the output too."""

    INPUT = "input"
    OUTPUT = "output"
    COPY = "copy"


PLAIN = (Tensor, torch.nn.Parameter)

# Where torch's own tests run every operation on lazy copies.
writes_to: Callable[[Tensor], int] = attrgetter("_version")
"""How many writes to a tensor torch has counted."""
HAVE_LAZY_COPIES = ("cpu", "cuda") if hasattr(Tensor, "_lazy_clone") and hasattr(torch._C, "_data_address") else ()
_memory_of: Callable[[Tensor], int] = getattr(
    torch._C, "_data_address", lambda tensor: tensor.untyped_storage().data_ptr()
)
"""Where the memory of a tensor begins; asked without a wish to write, which would move it away from its lazy copy."""
_MARK = "roadie_kept"
_CHANGED = "one of the variables needed for gradient computation has been modified by an inplace operation"

IN_PLACE_ADVICE = (
    "backward needs the output of this adapted layer, and a later operation has changed it in place (such as "
    "ReLU(inplace=True), or y += r); let the layer keep what nobody can change instead: set_kept_for_backward('auto') of the "
    "RoadModel, or set_kept_for_backward('input') (model.base_model.set_kept_for_backward('input') of a PeftModel), or "
    "keep='copy' or 'input' of roadie.kernels"
)


def settled(keep: Keep, x: Tensor) -> Keep:
    """`keep` for a rotation of x, with what stands for COPY where there are no lazy copies.

    That is INPUT, which nobody changes as a rule; under a compiler OUTPUT, since in its graphs there are values only.
    """
    if keep is not Keep.COPY:
        return keep
    if torch.compiler.is_compiling():
        return Keep.OUTPUT
    return keep if type(x) in PLAIN and x.device.type in HAVE_LAZY_COPIES else Keep.INPUT


def to_save(ctx: Any, x: Tensor, z: Tensor, keep: Keep, *, into_x: bool = False) -> Tensor:
    """What a step of autograd that made z of x is to save; it is asked for again by `saved_tensors`.

    into_x: z is x, which the step calls dirty. A COPY has z's memory and a count of its own; who can be differentiated twice
    returns it beside z, so that it has a history.
    """
    if keep is Keep.COPY:
        kept = z.data
        setattr(kept.untyped_storage(), _MARK, _lazy_copy(kept))
        return kept
    kept = x if keep is Keep.INPUT else z
    watch(ctx, kept, 1 if into_x else 0)
    return kept


def watch(ctx: Any, kept: Tensor, coming: int = 0) -> None:
    """Remember how often kept has been changed in place, with the changes to come before it is saved."""
    ctx.version = None
    if type(kept) not in PLAIN or kept.is_inference():  # a tracer's, or refused by torch
        return
    ctx.version = writes_to(kept) + coming
    storage = kept.untyped_storage()
    if not hasattr(storage, _MARK):
        setattr(storage, _MARK, None)


def remember_for_tracers(ctx: Any, *saved: Tensor | None) -> None:
    """Where a compiler traces forward and backward, remember what is saved as values, which no later operation changes.

    Used for what is changed in place in the graph, where both values are needed; else the compiler leaves the clones out.
    """
    if torch.compiler.is_compiling() and type(saved[0]) not in PLAIN:
        ctx.traced = tuple(None if tensor is None else tensor.clone() for tensor in saved)


def _lazy_copy(tensor: Tensor) -> Tensor:
    try:
        return tensor.detach()._lazy_clone()
    except RuntimeError:  # memory that is not torch's own, such as numpy's
        return tensor.detach().clone()


def saved_tensors(ctx: Any) -> tuple[Any, ...]:
    """`ctx.saved_tensors`, the first of which is what `to_save` gave, or None: as it was when it was saved.

    Raises `InPlaceError` where an output has been changed in place, RuntimeError, as torch does, for an input.
    """
    try:
        kept, *others = ctx.saved_tensors
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
        if hasattr(ctx, "traced"):
            return ctx.traced
        if ctx.keep_output:
            raise InPlaceError(f"{error} What happened: {IN_PLACE_ADVICE}.") from None
        raise
    return None if kept is None else _as_it_was(ctx, kept), *others


def _as_it_was(ctx: Any, kept: Tensor) -> Tensor:
    if type(kept) not in PLAIN:
        return kept
    storage = kept.untyped_storage()
    if not hasattr(storage, _MARK):
        return kept
    copy: Tensor | None = getattr(storage, _MARK)
    if ctx.keep_output and copy is not None:
        if _memory_of(copy) == _memory_of(kept):
            return kept
        # Where gradients are differentiated again, with the history of what it was made of.
        return copy + (kept - kept.detach()) if torch.is_grad_enabled() else copy
    if ctx.version is not None and writes_to(kept) > ctx.version:
        raise _refusal(ctx.keep_output)
    return kept


def address(tensor: Tensor) -> int:
    """Where a tensor is; asked as its memory is."""
    return _memory_of(tensor) + int(tensor.storage_offset()) * tensor.itemsize


def _refusal(is_output: bool) -> RuntimeError:
    if is_output:
        return InPlaceError(f"{_CHANGED}. What happened: {IN_PLACE_ADVICE}.")
    return RuntimeError(f"{_CHANGED}: what a rotation was given, and keeps for backward")


@contextmanager
def without_lazy_copy(kept: Tensor) -> Iterator[None]:
    """Within the block kernels may ask for the address of kept, for which torch would move it away from its lazy copy."""
    storage = kept.untyped_storage()
    if getattr(storage, _MARK, None) is None:
        yield
        return
    setattr(storage, _MARK, None)
    try:
        yield
    finally:
        setattr(storage, _MARK, _lazy_copy(kept))
