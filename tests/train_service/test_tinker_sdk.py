"""The official SDK, unmodified, against a server: training, sampling, checkpoints, lists."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.patience import HANG_S, until
from tests.serving.http.harness import Running
from tests.train_service.tinker_server import ALICE, BOB, NAME, PLACE, client, datum, serving, tinker

from roadie import checkpoint, embedded
from roadie.errors import ConfigError
from roadie.serving import EngineSettings

presets = pytest.importorskip("roadie.train_service.tinker_api.presets")

ZEN = ["Beautiful is better than ugly.", "Explicit is better than implicit.", "Simple is better than complex."]
TOKENS = [embedded.load_tokenizer()(text)["input_ids"] for text in ZEN]
STEP = tinker.AdamParams(
    learning_rate=2e-2, eps=1e-3
)  # with the SDK's 1e-12 rounding decides the sign of some first steps


def new(service: Any, **words: Any) -> Any:
    return service.create_lora_training_client(base_model=PLACE, **{"rank": 8, **words}).result(HANG_S)


def learn(training: Any, tokens: list[list[int]], steps: int) -> list[float]:
    """The loss before each step."""
    losses = []
    for _ in range(steps):
        asked = training.forward_backward([datum(each) for each in tokens], "cross_entropy")
        step = training.optim_step(STEP)
        losses.append(asked.result(HANG_S).metrics["loss:sum"])
        assert step.result(HANG_S).metrics["optim/gradient_norm"] > 0
    return losses


def sample(sampler: Any, tokens: list[int], **params: Any) -> Any:
    rules = tinker.SamplingParams(**{"max_tokens": 6, "temperature": 0.0, **params})
    return sampler.sample(tinker.ModelInput.from_ints(tokens), 1, rules).result(HANG_S)


@pytest.fixture(scope="module")
def trained(service: Any) -> Any:
    """A model that has learned a sentence, and nothing else after that."""
    training = new(service)
    learn(training, TOKENS[:1], 6)
    return training


def test_hello_world(service: Any) -> None:
    training = new(service)
    tokenizer = training.get_tokenizer()
    losses = learn(training, TOKENS[:1], 8)
    assert losses[-1] < 0.5 * losses[0]
    sampler = training.save_weights_and_get_sampling_client().result(HANG_S)
    said = sample(sampler, tokenizer("Beautiful is better")["input_ids"]).sequences[0]
    assert tokenizer.decode(said.tokens).startswith(" than ugly.")
    assert sampler.get_tokenizer()("a")["input_ids"] == tokenizer("a")["input_ids"]
    info = training.get_info()
    assert (info.model_name, info.lora_rank, info.is_lora) == (PLACE, 8, True)
    (model,) = service.get_server_capabilities().supported_models
    assert (model.model_name, model.trainable, model.sampleable, model.max_context_length) == (NAME, True, True, 512)


def test_a_loss_and_logprobs_are_those_of_the_model(service: Any) -> None:
    model = embedded.load_model()
    rows = [datum(TOKENS[0]), datum(TOKENS[1], weights=[0.0, *[2.0] * (len(TOKENS[1]) - 2)])]
    found = new(service).forward(rows, "cross_entropy").result(HANG_S)
    loss = 0.0
    for tokens, row, output in zip(TOKENS, rows, found.loss_fn_outputs, strict=False):
        logits = model(torch.tensor([tokens[:-1]])).logits[0].log_softmax(-1)
        wanted = logits.gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]
        assert torch.allclose(output["logprobs"].to_torch(), wanted, atol=1e-4)
        loss -= float((row.loss_fn_inputs["weights"].to_torch() * wanted).sum())
    assert found.metrics["loss:sum"] == pytest.approx(loss, rel=1e-5)


def test_many_rows_in_chunks_are_one_gradient(service: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client sends the first chunk last."""
    whole, parts = new(service), new(service)
    before = learn(whole, TOKENS * 2, 2)
    config = parts.holder._client_config.model_copy(update={"fwdbwd_max_chunk_len": 2})
    monkeypatch.setattr(parts.holder, "_client_config", config)
    after = learn(parts, TOKENS * 2, 2)
    assert after == pytest.approx(before, rel=1e-4)


def test_a_loss_of_ones_own(service: Any) -> None:
    training, reference = new(service), new(service)

    def loss(data: Any, logprobs: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
        return -sum(row.sum() for row in logprobs), {"rows": float(len(data))}

    found = training.forward_backward_custom([datum(TOKENS[0])], loss).result(HANG_S)
    training.optim_step(STEP).result(HANG_S)
    assert found.metrics["rows"] == 1.0
    assert found.metrics["loss:sum"] == pytest.approx(learn(reference, TOKENS[:1], 1)[0], rel=1e-5)
    after = [one.forward([datum(TOKENS[0])], "cross_entropy").result(HANG_S) for one in (training, reference)]
    assert after[0].metrics["loss:sum"] == pytest.approx(after[1].metrics["loss:sum"], rel=1e-4)


@pytest.mark.parametrize("loss", ["importance_sampling", "cispo"])
def test_a_reward_rises(service: Any, loss: str) -> None:
    """Of 8 samples of one token, those of one half of the vocabulary are worth something."""
    training = new(service, seed=3)
    prompt, rewards = TOKENS[0][:3], []
    for step in range(12):
        sampler = training.save_weights_and_get_sampling_client().result(HANG_S)
        rules = tinker.SamplingParams(max_tokens=1, temperature=1.0, seed=100 * step)
        group = sampler.sample(tinker.ModelInput.from_ints(prompt), 8, rules).result(HANG_S)
        worth = [float(each.tokens[0] < 400) for each in group.sequences]
        mean = sum(worth) / len(worth)
        rewards.append(mean)
        rows = []
        for reward, each in zip(worth, group.sequences, strict=True):
            pad = [0.0] * (len(prompt) - 1)
            values = {"logprobs": [*pad, *each.logprobs], "advantages": [*pad, reward - mean]}
            one = datum([*prompt, *each.tokens], **values)
            del one.loss_fn_inputs["weights"]
            rows.append(one)
        training.forward_backward(rows, loss)
        training.optim_step(STEP).result(HANG_S)
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.2
    assert sum(rewards[-3:]) / 3 > 0.8


def test_a_run_is_shown_to_its_own_key(service: Any, server: Running) -> None:
    training = new(service)
    losses = []
    for reward in (0.25, 0.5):
        asked = training.forward_backward([datum(each) for each in TOKENS], "cross_entropy", {"reward": reward})
        training.optim_step(STEP).result(HANG_S)
        losses.append(asked.result(HANG_S).metrics["loss:sum"])
    training.forward([datum(TOKENS[0])], "cross_entropy").result(HANG_S)
    run = server.http(ALICE).get("/v1/status").json()["runs"][0]
    assert (run["id"], run["kind"], run["state"]) == (training.model_id, "training_run", "running")
    steps = [{"step": step + 1, "loss": losses[step], "reward": (0.25, 0.5)[step]} for step in range(2)]
    assert run["steps"] == [pytest.approx(step) for step in steps]
    assert run["tokens"] == 2 * sum(len(each) - 1 for each in TOKENS)
    assert run["tokens_per_s"] > 0
    assert server.http(BOB).get("/v1/status").json()["runs"] == []
    with pytest.raises(tinker.RequestFailedError, match="reward=nan; wanted a finite number"):
        training.forward_backward([datum(TOKENS[0])], "cross_entropy", {"reward": float("nan")}).result(HANG_S)


def test_samples_are_what_was_asked_for(trained: Any) -> None:
    sampler = trained.save_weights_and_get_sampling_client().result(HANG_S)
    prompt = TOKENS[0][:3]
    two = [
        sampler.sample(
            tinker.ModelInput.from_ints(prompt),
            3,
            tinker.SamplingParams(max_tokens=5, temperature=3.0, seed=5, top_k=50, top_p=0.95),
            include_prompt_logprobs=True,
            topk_prompt_logprobs=3,
            topk_sample_logprobs=2,
        ).result(HANG_S)
        for _ in range(2)
    ]
    first, second = two
    assert [each.tokens for each in first.sequences] == [each.tokens for each in second.sequences]
    assert len({tuple(each.tokens) for each in first.sequences}) > 1
    for each in first.sequences:
        assert len(each.logprobs) == len(each.tokens) == len(each.topk_logprobs)
        assert all(len(top) == 2 for top in each.topk_logprobs)
    assert len({each.sequence_id for each in first.sequences}) == 3
    assert first.prompt_logprobs[0] is first.topk_prompt_logprobs[0] is None
    own = trained.forward([datum(prompt)], "cross_entropy").result(HANG_S).loss_fn_outputs[0]["logprobs"].tolist()
    assert first.prompt_logprobs[1:] == pytest.approx(own, abs=1e-4)
    last = sampler.compute_logprobs(tinker.ModelInput.from_ints(prompt), prompt_logprobs_last_n=1).result(HANG_S)
    assert last == [None, None, pytest.approx(own[-1], abs=1e-4)]


def test_what_stops_a_sample(trained: Any) -> None:
    sampler = trained.save_weights_and_get_sampling_client().result(HANG_S)
    prompt, rest = TOKENS[0][:5], TOKENS[0][5:]
    assert sample(sampler, prompt).sequences[0].tokens[: len(rest)] == rest[:6]
    for stop in ([rest[1]], embedded.load_tokenizer().decode(rest[1:2]), [embedded.load_tokenizer().decode(rest[1:2])]):
        said = sample(sampler, prompt, stop=stop).sequences[0]
        assert (said.tokens, said.stop_reason) == (rest[:2], "stop"), stop
    assert sample(sampler, prompt, stop=[], max_tokens=20).sequences[0].stop_reason == "length"


def test_a_snapshot_stays_and_what_is_in_flight_moves(service: Any) -> None:
    training = new(service)
    prompt = TOKENS[0][:4]
    score = lambda sampler: sampler.compute_logprobs(tinker.ModelInput.from_ints(TOKENS[0])).result(HANG_S)  # noqa: E731
    base = service.create_sampling_client(base_model=NAME).result(HANG_S)
    snapshot, inflight = (
        training.save_weights_and_get_sampling_client(kind=kind).result(HANG_S) for kind in ("snapshot", "inflight")
    )
    before = score(base)
    assert score(snapshot)[1:] == pytest.approx(before[1:], abs=1e-4)
    learn(training, TOKENS[:1], 4)
    other = training.save_weights_and_get_sampling_client(kind="inflight").result(HANG_S)
    assert score(snapshot)[1:] == pytest.approx(before[1:], abs=1e-4)
    assert score(inflight) == score(other)
    assert sum(score(inflight)[1:]) > sum(before[1:]) + 5
    assert sample(base, prompt).sequences[0].tokens != sample(inflight, prompt).sequences[0].tokens


def test_a_checkpoint_and_what_goes_on_from_it(service: Any) -> None:
    """With the optimiser's state the next step is the same; without it, another."""
    training = new(service)
    learn(training, TOKENS, 3)
    path = training.save_state("three").result(HANG_S).path
    wanted = learn(training, TOKENS, 3)
    whole = service.create_training_client_from_state_with_optimizer(path).result(HANG_S)
    assert learn(whole, TOKENS, 3) == pytest.approx(wanted, rel=1e-4)
    weights = service.create_training_client_from_state(path).result(HANG_S)
    found = learn(weights, TOKENS, 3)
    assert found[0] == pytest.approx(wanted[0], rel=1e-4)
    assert found[2] != pytest.approx(wanted[2], rel=1e-3)
    legacy = new(service)
    with pytest.warns(FutureWarning):
        assert legacy.load_state_with_optimizer(path).result(HANG_S).path == path
    assert learn(legacy, TOKENS, 3) == pytest.approx(wanted, rel=1e-4)
    with pytest.warns(FutureWarning), pytest.raises(tinker.RequestFailedError, match="as the first one"):
        legacy.load_state(path).result(HANG_S)


def test_samplers_of_saved_weights(service: Any, trained: Any) -> None:
    saved = trained.save_weights_for_sampler("mine").result(HANG_S)
    assert saved.path == f"tinker://{trained.model_id}/sampler_weights/mine"
    state = trained.save_state("state").result(HANG_S).path
    own = trained.save_weights_and_get_sampling_client().result(HANG_S)
    for path in (saved.path, state):
        sampler = service.create_sampling_client(model_path=path).result(HANG_S)
        assert sampler.get_base_model() == PLACE
        assert sample(sampler, TOKENS[0][:4]).sequences[0].tokens == sample(own, TOKENS[0][:4]).sequences[0].tokens
    with pytest.raises(tinker.RequestFailedError, match="which a checkpoint of this run has"):
        trained.save_weights_for_sampler("mine").result(HANG_S)


def test_lists_expiry_deleting_and_downloads(service: Any, server: Running, tmp_path: Path) -> None:
    training = new(service, user_metadata={"what": "zen"})
    rest = tinker.RestClient(base_url=server.url, api_key=ALICE)
    learn(training, TOKENS[:1], 1)
    path = training.save_state("first", ttl_seconds=7200, user_metadata={"a": "b"}).result(HANG_S).path
    sampled = training.save_weights_for_sampler("second").result(HANG_S).path
    external = training.save_weights_external("third").result(HANG_S).path
    run = rest.get_training_run(training.model_id).result(HANG_S)
    assert (run.user_metadata, run.lora_rank, run.last_checkpoint.tinker_path) == ({"what": "zen"}, 8, path)
    assert training.model_id in [
        each.training_run_id for each in rest.list_training_runs(1000).result(HANG_S).training_runs
    ]
    listed = {each.tinker_path: each for each in rest.list_checkpoints(training.model_id).result(HANG_S).checkpoints}
    assert set(listed) == {path, sampled, external}
    assert [listed[each].checkpoint_type for each in (path, sampled, external)] == ["training", "sampler", "external"]
    assert listed[path].user_metadata == {"a": "b"}
    assert listed[path].size_bytes > 1000
    assert listed[path].expires_at is not None
    assert listed[sampled].expires_at is None
    rest.set_checkpoint_ttl_from_tinker_path(path, None).result(HANG_S)
    assert rest.get_training_run(training.model_id).result(HANG_S).last_checkpoint.expires_at is None
    about = rest.get_weights_info_by_tinker_path(path).result(HANG_S)
    assert (about.base_model, about.lora_rank, about.train_unembed, about.train_mlp) == (PLACE, 8, True, True)

    urls = rest.get_external_weights_urls(external).result(HANG_S).urls
    for name, url in urls.items():
        (tmp_path / name).write_bytes(server.http().get(url).content)
    assert len(checkpoint.load(tmp_path).layers) > 10
    wrong = next(iter(urls.values()))[:-1] + "x"
    assert server.http().get(wrong).status_code == 404
    checkpoints = f"/api/v1/training_runs/{training.model_id}/checkpoints"
    archive = server.http(ALICE).get(f"{checkpoints}/weights/first/archive").content
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        assert {"adapter_config.json", "adapter_model.safetensors", "optimiser.safetensors"} == set(tar.getnames())

    rest.delete_checkpoint_from_tinker_path(path).result(HANG_S)
    assert len(rest.list_checkpoints(training.model_id).result(HANG_S).checkpoints) == 2
    with pytest.raises(tinker.NotFoundError):
        service.create_training_client_from_state(path).result(HANG_S)
    with pytest.raises(tinker.BadRequestError, match="shows checkpoints to their own key"):
        rest.publish_checkpoint_from_tinker_path(sampled).result(HANG_S)


def test_what_is_trained_is_as_it_was_asked(service: Any, server: Running, tmp_path: Path) -> None:
    kinds = {
        "rank 8": ({"rank": 8}, {"road_1"}, {(64,)}),
        "rank 32": ({"rank": 32}, {"road_2"}, {(64,)}),
        "rank 64": ({"rank": 64}, {"road_2"}, {(2, 16, 64)}),
        "told": ({"user_metadata": {"variant": "road_4", "stages": "4,32"}}, {"road_4"}, {(4, 32)}),
        "size": ({"user_metadata": {"group_size": "16"}}, {"road_1"}, {(16,)}),
        "attention": ({"train_mlp": False, "train_unembed": False}, {"road_1"}, {(64,)}),
    }
    for name, (words, variants, stages) in kinds.items():
        training = new(service, **words)
        learn(training, TOKENS[:1], 1)
        adapter = saved_adapter(training, server, tmp_path / name)
        assert {layer.variant.value for layer in adapter.layers.values()} == variants, name
        assert {layer.stages for layer in adapter.layers.values()} == stages, name
        assert ("lm_head" in adapter.layers) is (name != "attention")
        assert any("mlp" in path for path in adapter.layers) is (name != "attention")
    for wrong in ({"variant": "lora"}, {"group_size": "7"}, {"stages": "a"}):
        with pytest.raises(tinker.BadRequestError, match="got"):
            new(service, user_metadata=wrong)


def saved_adapter(training: Any, server: Running, folder: Path) -> Any:
    training.save_state("adapter").result(HANG_S)
    url = f"/api/v1/training_runs/{training.model_id}/checkpoints/weights/adapter/archive"
    with tarfile.open(fileobj=io.BytesIO(server.http(ALICE).get(url).content)) as tar:
        tar.extractall(folder, filter="data")
    return checkpoint.load(folder)


def test_what_is_refused_is_said_by_name(service: Any) -> None:
    training = new(service)
    with pytest.raises(tinker.RequestFailedError, match="stable_reinforce"):
        training.forward_backward([datum(TOKENS[0])], "stable_reinforce").result(HANG_S)
    with pytest.raises(tinker.RequestFailedError, match="dimuon"):
        training.optim_step(tinker.types.DimuonParams(learning_rate=1e-3)).result(HANG_S)
    with pytest.raises(tinker.RequestFailedError, match="got no gradients"):
        training.optim_step(STEP).result(HANG_S)
    with pytest.raises(tinker.BadRequestError, match="dimuon"):
        new(service, optimizer=tinker.types.DimuonOptimizerConfig())
    with pytest.raises(tinker.BadRequestError, match="got base_model"):
        service.create_lora_training_client(base_model="another").result(HANG_S)
    with pytest.raises(tinker.RequestFailedError, match="datum 0: got masks"):
        training.forward_backward(
            [datum(TOKENS[0], masks=tinker.TensorData.from_numpy(torch.ones(3).numpy()))], "ppo"
        ).result(HANG_S)
    assert learn(training, TOKENS[:1], 1)[0] > 0  # it goes on


def test_a_head_that_shares_its_weight_is_passed_over() -> None:
    model = embedded.load_model()
    assert presets.head(model) == ["lm_head"]
    model.lm_head.weight = model.get_input_embeddings().weight
    assert presets.head(model) == []
    with pytest.raises(ConfigError, match="got nothing to train"):
        presets.targets(model, tinker.types.LoraConfig(rank=8, train_mlp=False, train_attn=False), presets.head(model))


def test_room_for_no_more_samples_is_waited_for(tmp_path: Path) -> None:
    """The SDK asks again where the server has no room (429), also for several samples of which some had room."""
    settings = EngineSettings(num_slots=4, num_blocks=128, max_running=2, max_queued=4, max_queued_per_tenant=4)
    with serving(tmp_path, settings=settings) as server, client(server) as service:
        sampler = service.create_sampling_client(base_model=NAME).result(HANG_S)
        rules = tinker.SamplingParams(max_tokens=20, temperature=0.0, stop=[])
        asked = [sampler.sample(tinker.ModelInput.from_ints(tokens), 3, rules) for tokens in TOKENS * 2]
        said = [each.result(HANG_S).sequences for each in asked]
    for sequences in said:
        assert len({tuple(each.tokens) for each in sequences}) == 1
        assert [len(each.tokens) for each in sequences] == [20] * 3
    assert [each[0].tokens for each in said[:3]] == [each[0].tokens for each in said[3:]]


def test_abandoned_samples_stop(trained: Any, server: Running) -> None:
    sampler = trained.save_weights_and_get_sampling_client().result(HANG_S)
    rules = tinker.SamplingParams(max_tokens=500, temperature=1.0, stop=[])
    asked = sampler.sample(tinker.ModelInput.from_ints(TOKENS[0][:2]), 1, rules)
    asked.future().cancel()
    statistics = server.engine.statistics
    until(lambda: statistics().num_running == 0)
