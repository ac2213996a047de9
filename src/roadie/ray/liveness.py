"""Whether another process of the cluster lives."""

from __future__ import annotations

import asyncio
from typing import Any

from ray.exceptions import ActorDiedError, ActorUnavailableError, RayActorError

PING_S = 1.0


async def has_died(actor: Any) -> bool:
    """Whether Ray knows that an actor is dead; one that is slow to answer is not. actor: None: nothing is known."""
    if actor is None:
        return False
    try:
        await asyncio.wait_for(_ready(actor), PING_S)
    except asyncio.TimeoutError:
        return False
    except ActorUnavailableError:
        return False
    except (ActorDiedError, RayActorError):
        return True
    return False


async def _ready(actor: Any) -> None:
    await actor.__ray_ready__.remote()
