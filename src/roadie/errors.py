"""The exceptions of roadie, in one tree.

    Exception
    └── RoadieError
        ├── ConfigError       (ValueError)    a setting, or a config that does not fit the model
        │   └── MissingExtra  (ModuleNotFoundError)  a package that is installed only where it is wanted
        ├── UnsupportedLayer  (TypeError, ValueError)  a targeted module that RoAd cannot adapt
        ├── AdapterError      (ValueError)    adapter parameters of the wrong shape, size or value
        ├── RoutingError      (ValueError)    the rows of a batch and the adapters asked for do not fit
        ├── BankFull          (RuntimeError)  every slot of a bank is pinned or being read
        ├── MergeError        (ValueError)    a merge or unmerge that was refused; nothing was changed
        ├── CheckpointError   (ValueError)    an adapter file that is missing, corrupt, foreign or unsafe
        │   └── UnsafeCheckpointError         a pickle file, which could run code when read
        ├── KernelError       (RuntimeError)  a kernel that was asked for cannot run here, or was given what it cannot use
        ├── InPlaceError      (RuntimeError)  backward needs a layer's output, and it was changed in place
        ├── RegistrationError (RuntimeError)  roadie and PEFT's own RoAd were mixed up
        ├── NotFinite         (ArithmeticError) a loss or a gradient that is not finite; nothing was changed
        ├── UnknownTenant     (LookupError)   nobody of that name trains
        └── ServingError      (RuntimeError)  a serving engine refused a request, or cannot run
            ├── QueueFull                     too many requests wait; come back after `retry_after_s`
            ├── UnknownAdapter (LookupError)  no adapter of that name is known
            ├── AdapterBusy                   an adapter that requests use was to be unloaded
            ├── PromptTooLong (ValueError)    prompt and completion do not fit into the context
            ├── ShuttingDown                  the engine takes no more requests, or has none running
            ├── StateNotWritten               what was to be remembered could not be written; nothing has changed
            └── EngineFailed                  a step of the engine raised; it is not running any more

    UserWarning
    └── LearningRateWarning                   updates of an adapter are so small that it learns next to nothing

Every exception also derives from the built-in exception that stock PEFT raises in the same situation, so that
``except ValueError`` keeps working. Messages say what was got, what was wanted and what to do. A note of each (PEP 678), which
tracebacks show from Python 3.11 on and messages do not have, names its section in the documentation.
"""

from __future__ import annotations

from typing import Any, TypeVar

HELP = "docs/troubleshooting.md"
"""Where each class has a section, whose anchor is its name in lower case."""

_Error = TypeVar("_Error", bound="RoadieError")

TOLD_BY_ANOTHER_PROCESS = "told_by_another_process"
"""Attribute that is true of an error which another process raised, and reports."""


class RoadieError(Exception):
    """Base class of everything roadie raises on purpose."""

    def __new__(cls: type[_Error], *args: Any, **kwargs: Any) -> _Error:
        error = super().__new__(cls, *args, **kwargs)
        documented = next(each for each in cls.__mro__ if each.__module__ == __name__)
        vars(error)["__notes__"] = [f"More: {HELP}#{documented.__name__.lower()}"]
        return error


class ConfigError(RoadieError, ValueError):
    """A setting is not valid, or a config does not fit the model it is applied to."""


class MissingExtra(ConfigError, ModuleNotFoundError):
    """A package is not installed that only a part of roadie needs; the message names the extra that brings it."""


class UnsupportedLayer(RoadieError, TypeError, ValueError):
    """A targeted module is of a kind that RoAd cannot adapt."""


class AdapterError(RoadieError, ValueError):
    """Adapter parameters have the wrong shape, size or values."""


class RoutingError(RoadieError, ValueError):
    """The rows of a batch and the adapters asked for do not fit together."""


class BankFull(RoadieError, RuntimeError):
    """Every slot of a bank is pinned or being read, so that nothing can be admitted."""


class MergeError(RoadieError, ValueError):
    """A merge or unmerge was refused; no weight was changed."""


class CheckpointError(RoadieError, ValueError):
    """An adapter file is missing, corrupt, truncated, foreign, or holds values that cannot be used."""


class UnsafeCheckpointError(CheckpointError):
    """An adapter file is a pickle, which can run code when it is read."""


class RegistrationError(RoadieError, RuntimeError):
    """Classes of roadie were used where PEFT's own RoAd was asked for, or the other way round."""


class KernelError(RoadieError, RuntimeError):
    """A kernel that was asked for cannot run here, or was given tensors it cannot use."""


class InPlaceError(RoadieError, RuntimeError):
    """Backward needs the output of an adapted layer, and another operation has changed it in place."""


class NotFinite(RoadieError, ArithmeticError):
    """A loss, or the gradient of an adapter, is not finite; the adapter and its gradients are as they were before."""

    def __init__(self, message: str, loss: float | None = None, gradient_norm: float | None = None) -> None:
        super().__init__(message)
        self.loss, self.gradient_norm = loss, gradient_norm


class UnknownTenant(RoadieError, LookupError):
    """Nobody of that name trains."""


class ServingError(RoadieError, RuntimeError):
    """A serving engine refused a request, or cannot run here."""


class QueueFull(ServingError):
    """Too many requests wait, of all tenants or of one; `retry_after_s` is a guess at when to come back, in seconds."""

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class UnknownAdapter(ServingError, LookupError):
    """No adapter of that name is loaded, and none is in the folder of adapters."""


class AdapterBusy(ServingError):
    """An adapter was to be unloaded while requests use it."""


class PromptTooLong(ServingError, ValueError):
    """The tokens of a prompt, and of its completion, are more than the context or the cache holds."""


class ShuttingDown(ServingError):
    """The engine takes no more requests, or stopped before this one ended."""


class EngineFailed(ServingError):
    """A step of the engine raised; requests that were live have failed, and no more are taken."""


class StateNotWritten(ServingError, CheckpointError):
    """The state of a registry could not be written (a full disk); nothing has changed."""


class LearningRateWarning(UserWarning):
    """Training turns the angles of an adapter so slowly that it learns next to nothing; said once for a training."""
