"""Requests at the door of an engine: what its model takes, and what a request must keep to."""

from __future__ import annotations

from typing import Any

from roadie.adapter import INPUT_SUFFIX
from roadie.bank.blends import Blend, parse
from roadie.errors import ConfigError, PromptTooLong, QueueFull, RoutingError
from roadie.serving.engine import EngineLimits, EngineSettings, GenerationRequest
from roadie.serving.leases import Key


def limits_of(model: Any, settings: EngineSettings) -> EngineLimits:
    """What requests to an engine of this model and these settings may ask for."""
    config = model.config.get_text_config()
    longest = min(
        settings.max_context_tokens or 2**31,
        getattr(config, "max_position_embeddings", None) or 2**31,
        settings.num_blocks * settings.page_size,
    )
    return EngineLimits(
        max_context_tokens=longest,
        max_running=settings.max_running,
        max_queued=settings.max_queued,
        max_queued_per_tenant=settings.max_queued_per_tenant,
        max_running_per_tenant=settings.max_running_per_tenant,
        num_slots=settings.num_slots,
        vocabulary_size=int(config.vocab_size),
    )


def eos_ids_of(model: Any, tokenizer: Any) -> frozenset[int]:
    """The tokens that end a text, by the generation config, else by the config, and by the tokenizer."""
    found = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    if found is None:
        found = getattr(model.config.get_text_config(), "eos_token_id", None)
    ids = {found} if isinstance(found, int) else set(found or ())
    if tokenizer is not None and getattr(tokenizer, "eos_token_id", None) is not None:
        ids.add(tokenizer.eos_token_id)
    return frozenset(ids)


def last_layer_sites(model: Any) -> frozenset[str]:
    """The layer that gives the logits, and its input, by path; none in a model without."""
    head = model.get_output_embeddings()
    paths = [path for path, module in model.named_modules(remove_duplicate=False) if module is head]
    return frozenset(site for path in paths for site in (path, f"{path}{INPUT_SUFFIX}"))


def key_of(request: GenerationRequest, limits: EngineLimits) -> Key:
    """What a request asks for; raises `ConfigError` for what is no wish, and for blends that cannot be made in these slots."""
    try:
        key = parse(request.adapter)
    except RoutingError as error:
        raise ConfigError(str(error)) from None
    num_needed = len(key.names) + 1 if isinstance(key, Blend) else 1
    if num_needed > limits.num_slots:
        raise ConfigError(
            f"got a blend of {num_needed - 1} adapters; wanted at most {limits.num_slots - 1}: a blend is made of adapters in "
            "slots, and needs one itself"
        )
    return key


def check_length(num_prompt_tokens: int, max_tokens: int, limits: EngineLimits) -> None:
    """Raise `PromptTooLong` for more tokens than the context holds, in the words by which clients of OpenAI's API know it."""
    most, asked = limits.max_context_tokens, num_prompt_tokens + max_tokens
    if asked > most:
        raise PromptTooLong(
            f"This model's maximum context length is {most} tokens. However, you requested {asked} tokens ({num_prompt_tokens} "
            f"in the prompt, {max_tokens} for the completion); wanted at most {most} together; shorten the prompt or ask for less"
        )


def num_read(request: GenerationRequest) -> int:
    """Tokens of a prompt that the model reads: not the last where nothing is generated, since nobody asks what follows it."""
    return max(1, len(request.prompt_ids) - (request.sampling.max_tokens == 0))


def check_request(request: GenerationRequest, limits: EngineLimits, has_tokenizer: bool) -> None:
    """Raise `PromptTooLong`, or `ConfigError` for tokens that are not in the vocabulary or stop strings without a tokenizer."""
    rules, size = request.sampling, limits.vocabulary_size
    check_length(num_read(request), rules.max_tokens, limits)
    if not request.prompt_ids:
        raise ConfigError("got a prompt without tokens; wanted one of the vocabulary at least")
    _check_scoring(request)
    for name, ids in (
        ("the prompt", request.prompt_ids),
        ("logit_bias", rules.logit_bias),
        ("stop_token_ids", rules.stop_token_ids),
        ("scoring", request.scoring.token_ids if request.scoring is not None else ()),
    ):
        unknown = next((token for token in ids if not 0 <= token < size), None)
        if unknown is not None:
            raise ConfigError(
                f"got token {unknown} in {name}, which is not in the vocabulary; wanted tokens from 0 to {size - 1}"
            )
    if rules.stop and not has_tokenizer:
        raise ConfigError("got stop strings for an engine without a tokenizer; wanted stop_token_ids")


def _check_scoring(request: GenerationRequest) -> None:
    scoring, most = request.scoring, len(request.prompt_ids) - 1
    if scoring is None and request.sampling.max_tokens == 0:
        raise ConfigError("got max_tokens=0 for a prompt that is not to be scored; wanted 1 at least, or scoring")
    if scoring is not None and scoring.last is not None and scoring.last > most:
        raise ConfigError(
            f"got the last {scoring.last} tokens to score of a prompt of {most + 1}; wanted at most {most}: nothing precedes "
            "the first"
        )


def check_room(num_queued: int, num_of_tenant: int, tenant: str, limits: EngineLimits, mean_run_s: float) -> None:
    """Raise `QueueFull` where no more may wait, or no more of this tenant. mean_run_s: seconds a request runs."""
    problem = None
    if num_queued >= limits.max_queued:
        problem = f"{limits.max_queued} requests wait already"
    elif num_of_tenant >= limits.max_queued_per_tenant:
        problem = f"{limits.max_queued_per_tenant} requests of {tenant!r} wait already"
    if problem is not None:
        retry_after_s = mean_run_s * (1 + num_queued / limits.max_running)
        raise QueueFull(f"{problem}; come back in {retry_after_s:.0f} s", max(1.0, retry_after_s))
