"""What to evaluate, and the pass over all adapters; lm-eval is imported where it is used."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from roadie.errors import ConfigError
from roadie.extras import need
from roadie.serving.engine import AdapterWish, Engine


@dataclass(frozen=True)
class Tasks:
    """What to evaluate. names: of lm-eval's tasks, or of those in the folders `include`. num_fewshot: None: the task's own.

    limit: so many documents of each task; None: all. chat: put prompts into the tokenizer's chat template.
    """

    names: tuple[str, ...]
    include: tuple[Path, ...] = ()
    num_fewshot: int | None = None
    limit: int | None = None
    chat: bool = False


def evaluate(
    engine: Engine,
    tokenizer: Any,
    adapters: Mapping[str, AdapterWish] | Sequence[str],
    tasks: Tasks,
    on_answer: Callable[[int], None] = lambda num_answers: None,
) -> dict[str, dict[str, Any]]:
    """lm-eval's results of each adapter. adapters: their names, or names for wishes (None: the base model).

    on_answer: told how many answers have come. Raises `ConfigError` for tasks that are not there, `MissingExtra`, and what
    `Engine.submit` raises.
    """
    wishes = adapters if isinstance(adapters, Mapping) else {name: name for name in adapters}
    if not wishes:
        raise ConfigError("got no adapter to evaluate; wanted one at least, or the base model")
    need("eval")
    from lm_eval.tasks import TaskManager

    from roadie.evaluation.harness import AdapterLM, Crowd

    manager = TaskManager(include_path=[str(folder) for folder in tasks.include] or None)
    _check_tasks(manager, tasks)
    crowd = Crowd(engine, tokenizer, wishes, on_answer)
    return {name: _results(AdapterLM(crowd, name), manager, tasks) for name in wishes}


def _check_tasks(manager: Any, tasks: Tasks) -> None:
    unknown = [name for name in tasks.names if not manager.match_tasks([name])]
    if unknown or not tasks.names:
        raise ConfigError(
            f"got {unknown[0]!r} as a task; wanted one of lm-eval's, or of a folder that is included"
            if unknown
            else "got no task; wanted the names of some of lm-eval's"
        )


def _results(model: Any, manager: Any, tasks: Tasks) -> dict[str, Any]:
    from lm_eval import simple_evaluate

    results: dict[str, Any] = simple_evaluate(
        model,
        tasks=list(tasks.names),
        num_fewshot=tasks.num_fewshot,
        limit=tasks.limit,
        apply_chat_template=tasks.chat,
        task_manager=manager,
        log_samples=False,
    )
    return results
