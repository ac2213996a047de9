"""The process that takes requests: adapters are checked and loaded before a request that needs them is passed on.

A worker that meets a bad adapter in the middle of a step takes the engine down with it. Loading by call is safe: a worker
that will not have an adapter says so, and why. So the first request for an adapter loads it by call.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import logging
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.entrypoints.serve import create_error_response
from vllm.exceptions import VLLMValidationError
from vllm.lora.request import LoRARequest
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.input_processor import InputProcessor
from vllm.v1.engine.llm_engine import LLMEngine

from roadie.errors import RoadieError
from roadie.vllm.admission import Admissions, explained, refused
from roadie.vllm.limits import check_supported
from roadie.vllm.resolver import weights_in
from roadie.vllm.settings import KEY, settings_of
from roadie.vllm.store import AdapterStore

log = logging.getLogger("vllm.roadie")  # in vLLM's own log
_ATTRIBUTE = "roadie_admissions"


def admissions_of(engine: Any) -> Admissions | None:
    """The admissions of an engine (or of its client); None where it is not for RoAd."""
    return getattr(getattr(engine, "input_processor", None), _ATTRIBUTE, None)


def begin(input_processor: Any, vllm_config: Any) -> None:
    """Make an engine that is being built an engine for RoAd, if its config asks for it."""
    settings = settings_of(vllm_config.additional_config)
    if settings is None:
        return
    check_supported(vllm_config)
    vllm_config.additional_config = {**vllm_config.additional_config, KEY: settings.as_config()}
    setattr(input_processor, _ATTRIBUTE, Admissions(AdapterStore(settings.store), settings.adapters))
    log.info("This engine serves RoAd adapters: %s", settings)


def load(engine: Any, request: Any) -> Any:
    """The engine's request for a user's, once the workers have the adapter; raises what they raise, and changes nothing then."""
    admissions = admissions_of(engine)
    if admissions is None or request is None:
        return request
    known = admissions.known(request)
    if known is not None:
        return known
    admitted = admissions.admit(request)
    if not admissions.is_loaded(admitted):
        try:
            taken = engine.engine_core.add_lora(admitted)
        except Exception as error:
            raise explained(error) from None
        if not taken:
            engine.engine_core.remove_lora(admitted.lora_int_id)  # from the workers that did
            raise refused(request, admitted)
    admissions.settle(request, admitted)
    return admitted


async def load_async(engine: Any, request: Any) -> Any:
    """As `load`, without holding up the event loop."""
    admissions = admissions_of(engine)
    if admissions is None or request is None:
        return request
    known = admissions.known(request)
    if known is not None:
        return known
    admitted = await asyncio.to_thread(admissions.admit, request)
    if not admissions.is_loaded(admitted):
        try:
            taken = await engine.engine_core.add_lora_async(admitted)
        except Exception as error:
            raise explained(error) from None
        if not taken:
            await engine.engine_core.remove_lora_async(admitted.lora_int_id)  # from the workers that did
            raise refused(request, admitted)
    admissions.settle(request, admitted)
    return admitted


def touch() -> None:
    """Put our steps before vLLM's: engines that are not for RoAd go on as before."""
    _replace(InputProcessor, "__init__", _init)
    _replace(LLMEngine, "add_request", _add_request)
    _replace(LLMEngine, "add_lora", _add_lora)
    _replace(AsyncLLM, "add_request", _add_request_async)
    _replace(AsyncLLM, "add_lora", _add_lora_async)
    _replace(OpenAIServingModels, "_check_load_lora_adapter_request", _check_load)
    _replace(OpenAIServingModels, "unload_lora_adapter", _unload)
    _replace(OpenAIServingModels, "resolve_lora", _resolve)


def _replace(owner: type, name: str, ours: Callable[..., Any]) -> None:
    """From now on `ours`, which is given what was there before, is called in its place."""
    original = getattr(owner, name)

    @functools.wraps(original)
    def replaced(*args: Any, **kwargs: Any) -> Any:
        return ours(original, *args, **kwargs)

    setattr(owner, name, replaced)


_signature = functools.cache(inspect.signature)


def _init(original: Any, processor: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
    begin(processor, vllm_config)
    original(processor, vllm_config, *args, **kwargs)


def _add_request(original: Any, engine: Any, *args: Any, **kwargs: Any) -> Any:
    call = _signature(original).bind(engine, *args, **kwargs)
    call.arguments["lora_request"] = load(engine, call.arguments.get("lora_request"))
    return original(*call.args, **call.kwargs)


async def _add_request_async(original: Any, engine: Any, *args: Any, **kwargs: Any) -> Any:
    call = _signature(original).bind(engine, *args, **kwargs)
    try:
        call.arguments["lora_request"] = await load_async(engine, call.arguments.get("lora_request"))
    except RoadieError as error:  # any other exception would be the engine's failure, without a reason
        raise VLLMValidationError(str(error)) from error
    return await original(*call.args, **call.kwargs)


def _add_lora(original: Any, engine: Any, lora_request: Any) -> Any:
    answer = original(engine, load(engine, lora_request))
    _has_been_loaded(engine, lora_request)
    return answer


async def _add_lora_async(original: Any, engine: Any, lora_request: Any) -> Any:
    answer = await original(engine, await load_async(engine, lora_request))
    _has_been_loaded(engine, lora_request)
    return answer


def _has_been_loaded(engine: Any, request: Any) -> None:
    """A server passes on the request that it loaded in place with every prompt: it is not to be read again for each."""
    if admissions_of(engine) is not None:
        request.load_inplace = False


def _candidate(models: Any, request: Any) -> Any:
    """What the server is about to make of a request to load; its number does not matter, the content gets its own."""
    known = models.lora_requests.get(request.lora_name)
    return LoRARequest(
        lora_name=request.lora_name,
        lora_int_id=known.lora_int_id if known is not None else 1,
        lora_path=request.lora_path,
        load_inplace=True,
    )


async def _check_load(original: Any, models: Any, request: Any) -> Any:
    """A server asked to load an adapter that will not do answers 400, where vLLM would say 500."""
    refusal = await original(models, request)
    if refusal is not None or admissions_of(models.engine_client) is None:
        return refusal
    try:
        await load_async(models.engine_client, _candidate(models, request))
    except Exception as error:
        return _refusal(request.lora_name, error)
    return None


def _refusal(name: str, error: Exception) -> Any:
    return create_error_response(
        message=f"The adapter '{name}' was refused: {error}",
        err_type="InvalidUserInput",
        status_code=HTTPStatus.BAD_REQUEST,
    )


async def _resolve(original: Any, models: Any, lora_name: str) -> Any:
    """A server asked for a name that is not loaded: an adapter of the folder, or a blend, or what vLLM's resolvers make of it.

    A resolver of vLLM's could not say why an adapter will not do.
    """
    admissions = admissions_of(models.engine_client)
    if admissions is None or lora_name in models.lora_requests:
        return await original(models, lora_name)
    try:
        path = admissions.path_of(lora_name, [base.name for base in models.base_model_paths])
        if path is None:
            return await original(models, lora_name)
        request = LoRARequest(lora_name=lora_name, lora_int_id=models.lora_id_counter.inc(1), lora_path=path)
        await load_async(models.engine_client, request)
    except Exception as error:
        return _refusal(lora_name, error)
    models.lora_requests[lora_name] = request
    for name, other in list(models.lora_requests.items()):
        if weights_in(other.lora_path) and name not in admissions.blends:
            del models.lora_requests[name]
    return request


async def _unload(original: Any, models: Any, request: Any) -> Any:
    answer = await original(models, request)
    admissions = admissions_of(models.engine_client)
    if isinstance(answer, str) and admissions is not None:  # an error is another kind of answer
        await asyncio.to_thread(admissions.unload, request.lora_name)
    return answer
