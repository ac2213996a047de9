"""`TrainingEngine`: many tenants that train on one frozen model, in one forward and backward whoever waits.

    engine = TrainingEngine(model)
    engine.create("a", RoadConfig(target_modules="all-linear"))
    done = engine.forward_backward("a", [TrainingRow(tokens, targets, weights)], "cross_entropy")   # from any thread
    step = engine.optim_step("a", AdamSettings(learning_rate=3e-3))
    engine.run()                    until nothing waits; or `work`, piece by piece, between other things
    done.result().loss, step.result().gradient_norm

Whatever a tenant asks for happens in the order in which it asks; different tenants wait for nobody but the model. `work` does one
thing for whoever is ready: one pass over rows of all of them (`choice`), or one step of AdamW over the stacks of all that ask for
one. Gradients are sums, and add up from call to call until `optim_step`.

**What goes wrong stays with its tenant.** Rows are looked at before they wait. A call whose loss or gradient is not finite fails
with `NotFinite`, and adds nothing; the tenant's parameters, moments and earlier gradients are as they were. Where a pass raises,
the rows of each tenant go alone, and those fail that raise again.

One thread calls `work`; all other methods may be called from any.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

from torch import Tensor

from roadie.adapter import layer_of
from roadie.bank.families import AdaptedLayer
from roadie.bank.trainable import TrainableBank
from roadie.engine.calls import Call, ForwardResult, Join, Leave, Step, StepResult, Task, TrainingSettings
from roadie.engine.lines import Lines, Tenant
from roadie.engine.losses import Loss, Terms, TrainingRow
from roadie.engine.optimiser import AdamSettings
from roadie.engine.tenants import Beginning, Source, TenantState
from roadie.engine.work import TrainingFigures, Worker
from roadie.errors import ConfigError

Result = TypeVar("Result")


class TrainingEngine:
    """See the module. The model's parameters are frozen; it is put into evaluation mode, and belongs to the engine in `work`.

    sum_: sums a tensor over several processes, in place, which all hold these tenants and do the same, each with some of the
    rows; gradients are looked at in `optim_step` then. on_news: called, from any thread, when there is something to do.
    """

    def __init__(
        self,
        model: Any,
        settings: TrainingSettings | None = None,
        *,
        sum_: Callable[[Tensor], object] | None = None,
        on_news: Callable[[], None] = lambda: None,
    ) -> None:
        self.settings = settings or TrainingSettings()
        self.model = model.requires_grad_(False).eval()
        self._lines = Lines(self.settings, on_news)
        self._worker = Worker(self.model, self.settings, self._lines, sum_)
        self._may_be_empty = sum_ is not None
        self._most_positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf

    # What tenants ask for.

    def create(
        self,
        tenant: str,
        source: Source,
        *,
        owner: str | None = None,
        layers: Sequence[AdaptedLayer] | None = None,
    ) -> Future[None]:
        """Begin to train an adapter: from a RoadConfig (or its words), an adapter or its folder, or a `TenantState`.

        owner: who is charged for it, the tenant itself where nobody is named; layers: those of a config that is written already.
        Raises `ConfigError` for a name that is taken and what does not fit the model, as `Beginning.of` does; `QueueFull`.
        """
        begins = Beginning.of(self.model, source, layers)
        self._check_head(begins.layers)
        join = Join(tenant, begins.layers, begins.state)
        step = 0 if begins.state is None else begins.state.step
        self._lines.begin(tenant, Tenant(owner or tenant, begins.config, step), join)
        return join.future

    def forward_backward(
        self,
        tenant: str,
        rows: Sequence[TrainingRow],
        loss: str | Loss,
        settings: Mapping[str, float] | None = None,
        *,
        all_logprobs: bool = False,
    ) -> Future[ForwardResult]:
        """Add the gradient of the loss, summed over rows, to the tenant's; see `roadie.engine.losses`.

        settings: of the loss; all_logprobs: also of tokens without weight. The future raises `NotFinite`.
        Raises `ConfigError` for rows that cannot be used, naming the row, `UnknownTenant`, and `QueueFull` where too much waits.
        """
        return self._call(tenant, rows, loss, settings, all_logprobs, backward=True)

    def forward(
        self,
        tenant: str,
        rows: Sequence[TrainingRow],
        loss: str | Loss,
        settings: Mapping[str, float] | None = None,
        *,
        all_logprobs: bool = True,
    ) -> Future[ForwardResult]:
        """As `forward_backward`, without gradients; a loss that is not finite is no error."""
        return self._call(tenant, rows, loss, settings, all_logprobs, backward=False)

    def optim_step(self, tenant: str, settings: AdamSettings) -> Future[StepResult]:
        """Make a step of AdamW with the gradients since the last one, and forget them.

        The future raises `NotFinite`, and `ConfigError` where there are no gradients; nothing but the gradients has changed then.
        """
        step = Step(tenant, settings)
        self._lines.push(step)
        return step.future

    def state(self, tenant: str) -> Future[TenantState]:
        """Copies of parameters and moments, when it is its turn."""
        return self.when_its_turn(tenant, lambda: self._worker.state(tenant))

    def remove(self, tenant: str) -> Future[None]:
        """Let a tenant go, when it is its turn; nothing more may be asked for."""
        leave = Leave(tenant)
        self._lines.push(leave, is_last=True)
        return leave.future

    def when_its_turn(self, tenant: str, task: Callable[[], Result]) -> Future[Result]:
        """Do something between two passes, when all that this tenant has asked for before is done; it must return soon."""
        asked = Task(tenant, task)
        self._lines.push(asked)
        return asked.future

    @property
    def tenants(self) -> tuple[str, ...]:
        """Who trains."""
        return self._lines.names

    def close(self) -> None:
        """Whatever waits fails with `ShuttingDown`; nothing more may be asked for."""
        self._lines.close()

    # What is done.

    @property
    def bank(self) -> TrainableBank:
        """Parameters, gradients and moments; of the thread that works."""
        return self._worker.bank

    @property
    def figures(self) -> TrainingFigures:
        """What was done."""
        return self._worker.figures

    @property
    def can_train_head(self) -> bool:
        """Whether the layer that gives the logits may be a tenant's: not where the model changes them afterwards."""
        return self._worker.passes.head.is_all

    @property
    def num_waiting(self) -> int:
        """What waits, of all tenants."""
        return self._lines.num_waiting

    @property
    def is_idle(self) -> bool:
        """Whether nothing waits."""
        return self._lines.are_empty

    def run(self) -> None:
        """Work until nothing waits."""
        while self.work():
            pass

    def work(self, max_tokens: int | None = None) -> int:
        """Do one thing for whoever waits; 0 where nobody does, else 1, or the tokens of a pass, padding counted.

        max_tokens: of the pass, where that is to be shorter than the settings say; a row longer than that goes alone.
        """
        return self._worker.work(max_tokens)

    def do_chores(self) -> None:
        """The part of `work` that takes no time to speak of: tenants come and go, copies are taken."""
        self._worker.do_chores()

    # What comes in.

    def _call(
        self,
        tenant: str,
        rows: Sequence[TrainingRow],
        loss: str | Loss,
        settings: Mapping[str, float] | None,
        are_all: bool,
        *,
        backward: bool,
    ) -> Future[ForwardResult]:
        self._lines.check(tenant)
        kind = Loss.parse(loss)
        if not rows and not self._may_be_empty:
            raise ConfigError("got no rows; wanted at least one")
        call = Call(
            tenant, [self._terms(number, row, kind, settings, are_all) for number, row in enumerate(rows)], backward
        )
        self._lines.push(call)
        return call.future

    def _terms(
        self, number: int, row: TrainingRow, loss: Loss, settings: Mapping[str, float] | None, are_all: bool
    ) -> Terms:
        try:
            terms = Terms.of(row, loss, settings, self._worker.passes.vocabulary_size, are_all)
            most = min(self._most_positions, self.settings.max_tokens_per_pass or math.inf)
            if len(terms.tokens) > most:
                raise ConfigError(
                    f"got {len(terms.tokens)} tokens; wanted at most {most:g}; cut it, or raise the limit"
                )
        except ConfigError as error:
            raise ConfigError(f"row {number}: {error}") from None
        return terms

    def _check_head(self, layers: Sequence[AdaptedLayer]) -> None:
        head = self._worker.passes.head
        for layer in layers:
            if not head.is_all and self.model.get_submodule(layer_of(layer.path)) is head.layer:
                raise ConfigError(
                    f"got {layer.path!r}, after which this model changes its logits; wanted other layers; leave it out"
                )
