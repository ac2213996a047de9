"""Whose turn it is where one model samples and trains: shares of time, and a latest first token.

Where both wait, a second of sampling earns training share / (1 - share) seconds, and a pass of training spends what it takes; it
is training's turn while it has something to spend. So the shares hold over any time that is long against a pass. Where one of
them does not wait, the other has all the time, and nothing is earned or spent. Who asks, hears the answer and asks again
leaves gaps: sampling counts as waiting until it has been idle for a moment (`IDLE_AFTER_S`), and training that has spent more
than it earned holds still for so long.

A pass cannot be interrupted. Where a first token is to come by a time, training has no turn that could make one late, and passes
are as short as that needs: as many tokens as are computed, at the rate of earlier passes, in what is left of the time after a
step of sampling. That goes before the share.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from roadie.errors import ConfigError

FIRST_TOKENS = 256
"""Of the first pass where a first token has a latest time: nobody knows yet how long a token takes."""
MOST_OWED_S = 5.0
"""What training can have to spend: what it could not have for the sake of first tokens does not come all at once."""
IDLE_AFTER_S = 0.1
_RECENT = 0.2  # how much the last pass, or step, counts in a mean


@dataclass(frozen=True)
class TurnSettings:
    """How time is shared; raises `ConfigError` for values out of range.

    training_share: of the time, where both wait; 0: training has turns only where nobody samples, 1: the other way round.
    latest_first_token_s: how long a request may wait for its first token for the sake of training; None: as long as it takes.
    """

    training_share: float = 0.5
    latest_first_token_s: float | None = None

    def __post_init__(self) -> None:
        for name, most in (("training_share", 1.0), ("latest_first_token_s", 3600.0)):
            value = getattr(self, name)
            if value is None and name == "latest_first_token_s":
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= most:
                raise ConfigError(f"got {name}={value!r}; wanted a number from 0 to {most:g}")


class Turns:
    """See the module; of one thread. owed_s: what training has to spend."""

    def __init__(self, settings: TurnSettings, clock: Callable[[], float] = time.monotonic) -> None:
        self.settings, self._clock = settings, clock
        self._sampled_s = -IDLE_AFTER_S
        self.owed_s = 0.0
        self._step_s = 0.0
        self._tokens_per_s: float | None = None

    @property
    def has_just_sampled(self) -> bool:
        """Whether sampling counts as waiting though no request runs."""
        return self._clock() < self._sampled_s + IDLE_AFTER_S

    @property
    def pause_s(self) -> float:
        """How long training is to hold still where no request runs."""
        return max(0.0, self._sampled_s + IDLE_AFTER_S - self._clock()) if self.owed_s < 0 else 0.0

    def is_trainings(self, waited_s: float | None) -> bool:
        """Whose turn it is, where both wait; waited_s: for a first token, of who has waited longest; None where nobody does."""
        share = self.settings.training_share
        if self._left_s(waited_s) <= 0 and waited_s is not None:
            return False
        return share > 0 and (share == 1 or self.owed_s > 0)

    def max_tokens(self, waited_s: float | None) -> int | None:
        """Of the pass that comes next; None for as many as there are. At least one."""
        if self.settings.latest_first_token_s is None:
            return None
        if self._tokens_per_s is None:
            return FIRST_TOKENS
        return max(1, int(self._tokens_per_s * self._left_s(waited_s)))

    def _left_s(self, waited_s: float | None) -> float:
        """For a pass, before the first token of who has waited so long, or of who comes right after it has begun, is late."""
        latest = self.settings.latest_first_token_s
        return float("inf") if latest is None else latest - self._step_s - (waited_s or 0.0)

    def sampled(self, seconds: float, *, training_waits: bool) -> None:
        """A step of sampling has taken so long."""
        self._sampled_s = self._clock()
        self._step_s = max(seconds, self._step_s + _RECENT * (seconds - self._step_s))
        share = self.settings.training_share
        if training_waits and share < 1:
            self.owed_s = min(MOST_OWED_S, self.owed_s + seconds * share / (1 - share))

    def trained(self, seconds: float, num_tokens: int, *, sampling_waits: bool) -> None:
        """A turn of training has taken so long; num_tokens: of its pass, 0 where it was none."""
        if num_tokens:
            rate = num_tokens / max(seconds, 1e-9)
            before = rate if self._tokens_per_s is None else self._tokens_per_s
            self._tokens_per_s = before + _RECENT * (rate - before)
        self.owed_s = self.owed_s - seconds if sampling_waits else 0.0
