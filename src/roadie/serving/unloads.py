"""Adapters that are to go, and go when the last request that uses them has ended."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future

from roadie.errors import AdapterBusy, RoadieError, ShuttingDown
from roadie.serving.active import ActiveRequest
from roadie.serving.engine import AdapterStatus, Unload
from roadie.serving.residency import Residency


class Unloads:
    """See the module; its methods are called under the engine's condition. cancel: ends a request at the next step."""

    def __init__(self, residency: Residency, cancel: Callable[[str], object]) -> None:
        self._residency, self._cancel = residency, cancel
        self._waiting: dict[str, Future[AdapterStatus]] = {}

    def begin(self, name: str, how: Unload, active: Mapping[str, ActiveRequest]) -> Future[AdapterStatus]:
        """See `Engine.unload_adapter`; active: all requests that are not over."""
        done: Future[AdapterStatus] = Future()
        try:
            users = [each for each in active.values() if name in each.names]
            if users and how is Unload.REFUSE:
                raise AdapterBusy(
                    f"got adapter {name!r}, which {len(users)} requests use; wait for them, or cancel them"
                )
            self._residency.begin_unload(name)
            if how is Unload.CANCEL:
                for each in users:
                    self._cancel(each.id)
            self._waiting[name] = done
            self.finish(active)
        except RoadieError as error:
            done.set_exception(error)
        return done

    def finish(self, active: Mapping[str, ActiveRequest]) -> None:
        """Let adapters go that were waiting for their last request."""
        if not self._waiting:
            return
        used = {name for each in active.values() for name in each.names}
        for name in [name for name in self._waiting if name not in used]:
            done = self._waiting.pop(name)
            self._residency.run(lambda name=name: self._residency.end_unload(name)).add_done_callback(  # type: ignore[misc]
                lambda result, done=done: _pass_on(result, done)  # type: ignore[misc]
            )

    def take_all(self) -> list[Future[AdapterStatus]]:
        """Those that wait, who are to be told that nothing comes of it."""
        waiting, self._waiting = self._waiting, {}
        return list(waiting.values())


def _pass_on(result: Future[AdapterStatus], done: Future[AdapterStatus]) -> None:
    error = result.exception() if not result.cancelled() else ShuttingDown("the engine has stopped")
    if error is not None:
        done.set_exception(error)
    else:
        done.set_result(result.result())
