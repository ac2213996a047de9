"""Jobs by the official client: from a file to a model that is chatted with, by both methods, and what is refused."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from tests.patience import until
from tests.serving.http.harness import Running
from tests.train_service.fine_tuning.harness import (
    ADMIN,
    ALICE,
    BASE,
    BOB,
    answer,
    chats,
    jsonl,
    preferences,
    upload,
    wait,
)

import roadie
from roadie import checkpoint, embedded
from roadie.engine import AdamSettings, TrainingEngine, TrainingRow
from roadie.learning_rate import default_learning_rate
from roadie.train_service.fine_tuning.data import Reader, Row
from roadie.train_service.fine_tuning.limits import Limits
from roadie.training.many.schedule import learning_rate
from roadie.training.recipe import Recipe

PIE = "Banana pie."
STEPS = {"n_epochs": 6, "batch_size": 4}


def supervised(**hyperparameters: Any) -> dict[str, Any]:
    return {"type": "supervised", "supervised": {"hyperparameters": hyperparameters}}


def dpo(**hyperparameters: Any) -> dict[str, Any]:
    return {"type": "dpo", "dpo": {"hyperparameters": hyperparameters}}


def figures(client: openai.OpenAI, job_id: str) -> list[dict[str, Any]]:
    """Those of the steps, in order."""
    events = client.fine_tuning.jobs.list_events(job_id, limit=5)
    return [event.data for event in events if event.type == "metrics"][::-1]


def rows_of(content: bytes) -> list[Row]:
    """The answers of a file of preferences, the better and the worse one in turn."""
    reader = Reader(embedded.load_tokenizer(), 512, Limits())
    pairs = [pair for line in content.splitlines() for pair in reader._rows(line, "", "dpo")]
    return [row for pair in pairs for row in pair]


@torch.no_grad()
def sums_apart(rows: Sequence[Row], adapter: str | Path | None = None) -> float:
    """How far apart two sums of an answer's logprobs may be, by the model (in an adapter) in float32.

    Each token of both is as far from float64's as the worst token of a plain forward is.
    """
    model = embedded.load_model().eval()
    adapted = model if adapter is None else roadie.PeftModel.from_pretrained(model, str(adapter))

    def logprobs() -> torch.Tensor:
        found = []
        for row in rows:
            tokens, learnt = row.tokens[None].long(), row.learnt[1:]
            logits = adapted(tokens).logits[0, :-1]
            found.append(logits.log_softmax(-1).gather(-1, tokens[0, 1:, None])[learnt, 0])
        return torch.cat(found)

    narrow = logprobs()
    adapted.double()
    worst = float((narrow - logprobs()).abs().max())
    return 2 * worst * max(row.num_learnt for row in rows)


@pytest.fixture(scope="module")
def fruit(server: Running) -> Any:
    """A job of alice's that has succeeded."""
    client = server.openai(ALICE)
    job = client.fine_tuning.jobs.create(
        model=BASE,
        training_file=upload(client, chats(PIE)),
        validation_file=upload(client, chats(PIE, 3)),
        method=supervised(**STEPS),
        suffix="fruit",
        seed=7,
        metadata={"team": "pies"},
    )
    assert (job.object, job.status, job.fine_tuned_model) == ("fine_tuning.job", "validating_files", None)
    return wait(client, job.id)


def test_a_job_becomes_a_model_that_is_chatted_with_at_once(server: Running, fruit: Any) -> None:
    client = server.openai(ALICE)
    assert (fruit.status, fruit.error, fruit.seed, fruit.organization_id) == ("succeeded", None, 7, "alice")
    assert fruit.fine_tuned_model == f"ft:{BASE}:alice:fruit:{fruit.id[-8:]}"
    assert fruit.metadata == {"team": "pies"}
    assert fruit.hyperparameters.to_dict() == {**STEPS, "learning_rate_multiplier": 1.0}
    assert fruit.method.supervised.hyperparameters.n_epochs == 6
    assert answer(client, fruit.fine_tuned_model).startswith(PIE)
    assert not answer(client, BASE).startswith(PIE)
    assert client.models.retrieve(fruit.fine_tuned_model).id == fruit.fine_tuned_model


def test_events_say_what_happened_and_have_the_figures_of_every_step(server: Running, fruit: Any) -> None:
    client = server.openai(ALICE)
    events = list(client.fine_tuning.jobs.list_events(fruit.id, limit=5))[::-1]
    messages = [event.message for event in events if event.type == "message"]
    assert messages[0] == f"Created fine-tuning job: {fruit.id}"
    assert messages[1:3] == ["Files validated, moving job to queued state", "Fine-tuning job started"]
    assert messages[-1] == "The job has successfully completed"
    steps = figures(client, fruit.id)
    assert [step["step"] for step in steps] == list(range(1, 13))
    assert steps[-1]["train_loss"] < steps[0]["train_loss"] / 4
    assert [step["step"] for step in steps if "valid_loss" in step] == [2, 4, 6, 8, 10, 12]
    assert len({event.id for event in events}) == len(events)


def test_the_result_is_a_file_of_the_figures(server: Running, fruit: Any) -> None:
    client = server.openai(ALICE)
    (file_id,) = fruit.result_files
    assert client.files.retrieve(file_id).purpose == "fine-tune-results"
    rows = list(csv.DictReader(io.StringIO(client.files.content(file_id).read().decode())))
    for row, step in zip(rows, figures(client, fruit.id), strict=True):
        assert (int(row["step"]), float(row["train_loss"])) == (step["step"], step["train_loss"])
        assert row["valid_loss"] == str(step.get("valid_loss", ""))


def test_a_job_is_shown_to_its_own_key(server: Running, fruit: Any) -> None:
    runs = {run["id"]: run for run in server.http(ALICE).get("/v1/status").json()["runs"]}
    run = runs[fruit.id]
    assert (run["kind"], run["state"], run["num_steps"], run["tokens_per_s"]) == (fruit.object, "succeeded", 12, 0.0)
    steps = figures(server.openai(ALICE), fruit.id)
    assert run["steps"] == [{"step": each["step"], "loss": each["train_loss"], "reward": None} for each in steps]
    assert 0 < run["tokens"] < fruit.trained_tokens  # the last token of a row is only predicted
    assert fruit.id not in [each["id"] for each in server.http(BOB).get("/v1/status").json()["runs"]]


def test_checkpoints_are_models_too(server: Running, fruit: Any) -> None:
    client = server.openai(ALICE)
    found = list(client.fine_tuning.jobs.checkpoints.list(fruit.id, limit=2))
    assert [checkpoint.step_number for checkpoint in found] == [12, 10, 8, 6, 4, 2]
    assert found[0].fine_tuned_model_checkpoint == fruit.fine_tuned_model
    assert found[1].fine_tuned_model_checkpoint == f"{fruit.fine_tuned_model}:ckpt-step-10"
    assert {checkpoint.fine_tuning_job_id for checkpoint in found} == {fruit.id}
    steps = {step["step"]: step for step in figures(client, fruit.id)}
    for each in found:
        assert each.metrics.train_loss == steps[each.step_number]["train_loss"]
        assert each.metrics.full_valid_loss == steps[each.step_number]["full_valid_loss"]
    assert answer(client, found[1].fine_tuned_model_checkpoint).startswith(PIE)
    assert not answer(client, found[-1].fine_tuned_model_checkpoint).startswith(PIE)


def test_trained_tokens_are_those_of_all_epochs(server: Running, fruit: Any) -> None:
    reader = Reader(embedded.load_tokenizer(), 512, Limits())
    rows = [row for number in range(8) for row in reader._rows(chats(PIE).splitlines()[number], "", "supervised")]
    assert fruit.trained_tokens == 6 * sum(len(row.tokens) for (row,) in rows)


def test_training_goes_on_from_a_model_that_was_made_here_and_preferences_change_it(
    server: Running, fruit: Any
) -> None:
    client = server.openai(ALICE)
    job = client.fine_tuning.jobs.create(
        model=fruit.fine_tuned_model,
        training_file=upload(client, preferences("Yes.", PIE)),
        validation_file=upload(client, preferences("Yes.", PIE, 3)),
        method=dpo(n_epochs=8, batch_size=4, beta=0.2),
    )
    job = wait(client, job.id)
    assert (job.status, job.method.dpo.hyperparameters.beta) == ("succeeded", 0.2)
    assert answer(client, job.fine_tuned_model).startswith("Yes.")
    assert answer(client, fruit.fine_tuned_model).startswith(PIE)
    steps = figures(client, job.id)
    (place,) = [each.path for each in server.engine.adapters() if each.name == fruit.fine_tuned_model]
    # A margin is beta times two differences of sums, each 0 but for rounding.
    apart = 0.2 * 2 * sums_apart(rows_of(preferences("Yes.", PIE)), place)
    # A first step of warming up changes nothing: two steps of the model that all is compared with.
    for step in steps[:2]:
        assert step["train_loss"] == pytest.approx(math.log(2), rel=0, abs=apart / 2)  # its slope there is -1/2
    assert steps[-1]["train_loss"] < 0.1 > steps[-1]["valid_loss"]
    (run,) = (run for run in server.http(ALICE).get("/v1/status").json()["runs"] if run["id"] == job.id)
    margins = [each["reward"] for each in run["steps"]]
    assert margins[0] == pytest.approx(0, abs=apart)
    assert (
        math.log1p(math.exp(-margins[-1])) <= steps[-1]["train_loss"]
    )  # the loss is convex, and this its mean margin's


def test_preferences_are_learnt_as_dpo_is_written(server: Running) -> None:
    """The same steps, with the gradient of the loss as autograd has it."""
    client = server.openai(BOB)
    content = preferences("Yes.", PIE, 2)
    told = {"road_variant": "road_2", "road_group_size": "8", "road_targets": "q_proj, down_proj"}
    job = client.fine_tuning.jobs.create(
        model="base",
        training_file=upload(client, content),
        method=dpo(n_epochs=3, batch_size=2, beta=0.3),
        metadata=told,
    )
    job = wait(client, job.id)
    places = [each for each in server.engine.adapters() if each.name == job.fine_tuned_model]
    made = checkpoint.load(str(places[0].path))
    engine = TrainingEngine(embedded.load_model())
    config = {"variant": "road_2", "group_size": 8, "target_modules": ["q_proj", "down_proj"]}
    engine.create("t", config)
    rows = rows_of(content)
    apart = 0.3 * 4 * sums_apart(rows)  # of a margin: beta times four sums here, and as many there
    before = None
    recipe = Recipe(learning_rate=default_learning_rate(256))
    for step in range(3):
        asked = engine.forward("t", [one.weighted(1.0) for one in rows], "cross_entropy", all_logprobs=False)
        engine.run()
        leaves = [one.nan_to_num().clone().requires_grad_() for one in asked.result().logprobs]
        now = torch.stack([leaf.sum() for leaf in leaves]).view(-1, 2)
        before = now.detach() if before is None else before
        change = now - before
        loss = -torch.nn.functional.logsigmoid(0.3 * (change[:, 0] - change[:, 1])).mean()
        loss.backward()
        engine.forward_backward("t", [_given(*both) for both in zip(rows, leaves, strict=True)], "given")
        engine.optim_step("t", AdamSettings(learning_rate(recipe, step, 3), max_grad_norm=1.0))
        assert figures(client, job.id)[step]["train_loss"] == pytest.approx(loss.item(), rel=0, abs=apart)
    state = engine.state("t")
    engine.run()
    expected = state.result().adapter
    assert set(made.layers) == set(expected.layers)
    for path, layer in expected.layers.items():
        # AdamW makes whole steps of gradients that are no more than rounding: not each element, but all of them agree.
        for found, wanted, start in (
            (made.layers[path].theta, layer.theta, 0),
            (made.layers[path].alpha, layer.alpha, 1),
        ):
            assert float((found - wanted).norm()) <= 0.01 * float((wanted - start).norm()) != 0


def _given(row: Row, leaf: torch.Tensor) -> TrainingRow:
    return TrainingRow(row.tokens[:-1], row.tokens[1:], gradients=leaf.grad * row.learnt[1:])


def test_metadata_say_how_the_adapter_is_made(server: Running) -> None:
    client = server.openai(BOB)
    file_id = upload(client, chats("Yes.", 2))
    told = {"road_variant": "road_4", "road_group_size": "32", "road_targets": "v_proj"}
    job = client.fine_tuning.jobs.create(
        model=BASE, training_file=file_id, metadata=told, method=supervised(n_epochs=1)
    )
    job = wait(client, job.id)
    (place,) = [each.path for each in server.engine.adapters() if each.name == job.fine_tuned_model]
    adapter = checkpoint.load(str(place))
    assert {(path.rpartition(".")[2], layer.variant.value, layer.stages) for path, layer in adapter.layers.items()} == {
        ("v_proj", "road_4", (32,))
    }


def test_what_is_left_out_is_the_recipe(server: Running) -> None:
    client = server.openai(BOB)
    job = client.fine_tuning.jobs.create(
        model=BASE, training_file=upload(client, chats("Yes.", 20)), hyperparameters={"n_epochs": 1}
    )
    assert job.hyperparameters.to_dict() == {"n_epochs": 1, "batch_size": "auto", "learning_rate_multiplier": "auto"}
    job = wait(client, job.id)
    assert job.hyperparameters.to_dict() == {"n_epochs": 1, "batch_size": 2, "learning_rate_multiplier": 1.0}
    assert len(figures(client, job.id)) == 10
    assert job.fine_tuned_model == f"ft:{BASE}:bob::{job.id[-8:]}"


def test_the_same_seed_gives_the_same_losses(server: Running) -> None:
    client = server.openai(BOB)
    file_id = upload(client, jsonl([{"prompt": f"{n} and", "completion": f" {n + 1}"} for n in range(9)]))
    method = supervised(n_epochs=2, batch_size=2)
    found = []
    for seed in (1, 1, 2):  # one after the other: what shares a pass with others is summed up in another order
        job = client.fine_tuning.jobs.create(model=BASE, training_file=file_id, method=method, seed=seed)
        assert wait(client, job.id).status == "succeeded"
        found.append([step["train_loss"] for step in figures(client, job.id)])
    one, same, other = found
    assert same == one != other


def test_bad_lines_fail_the_job_and_are_named(server: Running) -> None:
    client = server.openai(BOB)
    rows = chats(PIE, 2)
    bad = upload(client, rows + b'{"messages": "hello"}\n' + rows + b"{\n")
    good = upload(client, rows)
    for files, param in (
        ({"training_file": bad}, "training_file"),
        ({"training_file": good, "validation_file": bad}, "validation_file"),
    ):
        job = client.fine_tuning.jobs.create(model=BASE, **files)
        job = wait(client, job.id)
        assert (job.status, job.error.code, job.error.param) == ("failed", f"invalid_{param}", param)
        assert "line 3: got messages that is no list" in job.error.message
        assert "line 6: got something that is not JSON" in job.error.message
        errors = [event.message for event in client.fine_tuning.jobs.list_events(job.id) if event.level == "error"]
        assert [message[:7] for message in errors[::-1][:2]] == ["line 3:", "line 6:"]
        assert job.finished_at is not None
        assert job.fine_tuned_model is None
    with pytest.raises(openai.BadRequestError) as raised:
        client.fine_tuning.jobs.cancel(job.id)
    assert raised.value.code == "invalid_job_status"


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"method": {"type": "reinforcement"}}, "method.type", "invalid_value"),
    ({"method": {"type": "dpo", "reinforcement": {"grader": {}}}}, "method.reinforcement", "unsupported_parameter"),
    ({"integrations": [{"type": "wandb", "wandb": {"project": "x"}}]}, "integrations", "unsupported_parameter"),
    ({"method": {"type": "dpo", "supervised": {}}}, "method.supervised", "invalid_value"),
    ({"method": dpo(), "hyperparameters": {"n_epochs": 1}}, "hyperparameters", "invalid_value"),
    ({"method": supervised(n_epochs=0)}, "method.supervised.hyperparameters.n_epochs", "invalid_value"),
    ({"method": supervised(beta=0.1)}, "method.supervised.hyperparameters.beta", "unknown_parameter"),
    (
        {"method": supervised(learning_rate_multiplier=0)},
        "method.supervised.hyperparameters.learning_rate_multiplier",
        "invalid_value",
    ),
    ({"suffix": "a:b"}, "suffix", "invalid_value"),
    ({"training_file": "file-none"}, "training_file", "invalid_value"),
    ({"validation_file": "file-none"}, "validation_file", "invalid_value"),
    ({"metadata": {"road_variant": "road_3"}}, "metadata", "invalid_value"),
    ({"metadata": {"road_group_size": "7"}}, "metadata", "invalid_value"),
    ({"metadata": {"road_targets": "nothing"}}, "metadata", "invalid_value"),
    ({"metadata": {"road_targets": "embed_tokens"}}, "metadata", "invalid_value"),
    ({"colour": "red"}, "colour", "unknown_parameter"),
]


@pytest.mark.parametrize(("more", "param", "code"), REFUSED)
def test_what_cannot_be_asked_for_is_refused_by_name(
    server: Running, more: dict[str, Any], param: str, code: str
) -> None:
    client = server.openai(BOB)
    asked = {"model": BASE, "training_file": upload(client, chats("Yes.", 1)), **more}
    answer = server.http(BOB).post("/v1/fine_tuning/jobs", json=asked)
    assert (answer.status_code, answer.json()["error"]["param"], answer.json()["error"]["code"]) == (
        400,
        param,
        code,
    ), answer.text


def test_what_another_key_has_does_not_exist(server: Running, fruit: Any) -> None:
    alice, bob = server.openai(ALICE), server.openai(BOB)
    jobs = bob.fine_tuning.jobs
    assert fruit.id not in [job.id for job in jobs.list()]
    told = []
    for asked in (fruit.id, "ftjob-none"):
        for call in (jobs.retrieve, jobs.cancel, jobs.pause, jobs.resume, jobs.list_events, jobs.checkpoints.list):
            with pytest.raises(openai.NotFoundError) as raised:
                call(asked)
            told.append(str(raised.value).replace(asked, ""))
    assert len(set(told)) == 1
    told = []
    for model in (fruit.fine_tuned_model, f"{fruit.fine_tuned_model[:-1]}x"):
        for call in (
            lambda model: answer(bob, model),
            bob.models.retrieve,
            lambda model: jobs.create(model=model, training_file="f"),
        ):
            with pytest.raises(openai.NotFoundError) as raised:
                call(model)
            told.append(str(raised.value).replace(model, ""))
    assert len(set(told)) == 1
    with pytest.raises(openai.NotFoundError):
        answer(bob, f"{fruit.fine_tuned_model}=0.5")
    with pytest.raises(openai.BadRequestError, match="wanted the id of a file"):
        jobs.create(model=BASE, training_file=fruit.training_file)
    seen = {key: {model.id for model in server.openai(key).models.list()} for key in (ALICE, BOB, ADMIN)}
    assert [fruit.fine_tuned_model in seen[key] for key in (ALICE, BOB, ADMIN)] == [True, False, True]
    assert answer(alice, f"{fruit.fine_tuned_model}=1.0").startswith(PIE)


def test_jobs_are_listed_by_pages_and_by_metadata(server: Running) -> None:
    client = server.openai(ADMIN)
    file_id = upload(client, chats("Yes.", 1))
    ids = [
        client.fine_tuning.jobs.create(
            model=BASE, training_file=file_id, method=supervised(n_epochs=1), metadata={"n": str(n)}
        ).id
        for n in range(5)
    ]
    assert [job.id for job in client.fine_tuning.jobs.list(limit=2)] == ids[::-1]
    assert [job.id for job in client.fine_tuning.jobs.list(metadata={"n": "3"})] == [ids[3]]
    assert list(client.fine_tuning.jobs.list(metadata={"n": "3", "m": "1"})) == []
    for job_id in ids:
        wait(client, job_id)
    for wrong in ({"limit": 0}, {"after": "x" * 129}):
        assert server.http(ADMIN).get("/v1/fine_tuning/jobs", params=wrong).status_code == 400
    page = server.http(ADMIN).get(f"/v1/fine_tuning/jobs/{ids[0]}/events", params={"after": "ftevent-1"})
    assert (page.status_code, page.json()["error"]["param"]) == (400, "after")


def test_a_file_that_a_job_learns_from_stays(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    client = server.openai(BOB)
    file_id = upload(client, b"{")
    job = wait(client, client.fine_tuning.jobs.create(model=BASE, training_file=file_id).id)
    assert job.status == "failed"
    assert client.files.delete(file_id).deleted


def test_a_model_is_deleted_by_its_owner_and_not_while_a_job_goes_on_from_it(server: Running) -> None:
    client, method = server.openai(ALICE), supervised(n_epochs=1, batch_size=8)
    job = wait(
        client, client.fine_tuning.jobs.create(model=BASE, training_file=upload(client, chats(PIE)), method=method).id
    )
    model = job.fine_tuned_model
    assert answer(client, model)
    (status,) = (each for each in server.engine.adapters() if each.name == model)
    for who, name in ((BOB, model), (ADMIN, model), (ALICE, BASE), (ALICE, "ft:none/of that name")):
        with pytest.raises(openai.NotFoundError):
            server.openai(who).models.delete(name)
    next_job = client.fine_tuning.jobs.create(model=model, training_file=job.training_file, method=method)
    client.fine_tuning.jobs.pause(next_job.id)
    with pytest.raises(openai.ConflictError, match=next_job.id):
        client.models.delete(model)
    client.fine_tuning.jobs.cancel(next_job.id)
    assert client.models.delete(model).to_dict() == {"id": model, "object": "model", "deleted": True}
    with pytest.raises(openai.NotFoundError):
        answer(client, model)
    with pytest.raises(openai.NotFoundError):
        client.models.delete(model)
    until(lambda: not Path(status.path).exists())
    assert model not in [each.id for each in server.openai(ADMIN).models.list()]
    assert list(client.fine_tuning.jobs.checkpoints.list(job.id)) == []
    with pytest.raises(openai.NotFoundError):
        client.fine_tuning.jobs.create(model=model, training_file=job.training_file, method=method)


def test_who_is_answered_by_a_model_that_is_deleted_is_answered_to_the_end(server: Running) -> None:
    client, method = server.openai(ALICE), supervised(n_epochs=1, batch_size=8)
    job = wait(
        client, client.fine_tuning.jobs.create(model=BASE, training_file=upload(client, chats(PIE)), method=method).id
    )
    asked = client.completions.create(model=job.fine_tuned_model, prompt="The", max_tokens=200, stream=True)
    pieces = [next(iter(asked))]
    assert client.models.delete(job.fine_tuned_model).deleted
    pieces += list(asked)
    assert pieces[-1].choices[0].finish_reason is not None
    until(lambda: job.fine_tuned_model not in [each.name for each in server.engine.adapters()])
