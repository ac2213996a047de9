"""Tinker's routes: sessions, models, what is asked of them, and futures; in the SDK's own types.

Whoever asks for what takes a while is given the id of a future, and then asks for its result until it is there.
"""

from __future__ import annotations

import json
import re
import time
import uuid
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from starlette.responses import JSONResponse, Response
from tinker import types

from roadie.errors import ConfigError
from roadie.serving.http.failures import ApiError
from roadie.serving.http.gate import Right, Route
from roadie.train_service.tinker_api import presets, records, wire
from roadie.train_service.tinker_api.records import Sampler, Session
from roadie.train_service.tinker_api.service import TinkerService

API = "/api/v1"
POLL_S = 20.0
"""How long a question for a result waits for it; the SDK gives up after 45 s."""
MAX_BODY_BYTES = 64 << 20
TESTED_SDKS = range(25, 39)
"""The minor versions, of 0, of clients that this server was tried with; it speaks in the types of the newest."""
_MINOR = re.compile(r"0\.(\d{1,4})\.")
LACKING = {
    "create_custom_loss": (
        "POST",
        "losses that it traces; use forward_backward_custom, whose loss the client computes",
    ),
    "copy_weights": ("POST", "projects to copy weights to; checkpoints of one key are all in one place"),
    "retrieve_futures": ("POST", "questions for the futures of a session; ask for each (retrieve_future)"),
    "auth/token": ("POST", "tokens beside keys; send the key"),
    "auth/apikey/me": ("GET DELETE", "accounts; keys are its operator's (roadie api-key)"),
    "audit": ("GET", "audit log; its log says who asked for what"),
    "billing/usage/events": ("GET", "billing; its metrics count tokens"),
    "billing/usage/checkpoints/current": ("GET", "billing; the lists of checkpoints say how large they are"),
    "sessions/search": ("POST", "search; GET sessions lists those of a key"),
    "sessions/{session}/project": ("PUT", "projects; sessions of one key are all in one place"),
    "sessions/{session}/trace_export": ("GET", "traces of sessions"),
}
"""What there is elsewhere, and not here: how it is asked for, and what is to be said."""


async def raw_body(request: Request) -> bytes:
    """The body as it came."""
    return await request.body()


def tenant_of(request: Request) -> str:
    """Who asks."""
    name: str = request.state.caller.name
    return name


Body = Annotated[bytes, Depends(raw_body)]
Tenant = Annotated[str, Depends(tenant_of)]

ERRORS = (404, 507)
"""What a route answers with for what it is asked about (not there, or another key's) or cannot write, beside a gate's errors."""
ROUTES: dict[str, Route] = {
    f"{API}/healthz": Route(Right.NONE),
    f"{API}/forward_backward": Route(
        kinds=("application/x-protobuf",), max_body_bytes=MAX_BODY_BYTES, errors=ERRORS
    ),
    f"{API}/asample": Route(max_body_bytes=MAX_BODY_BYTES, errors=ERRORS),
    f"{API}/telemetry": Route(max_body_bytes=MAX_BODY_BYTES),
    f"{API}/session_heartbeat": Route(errors=(*ERRORS, 410)),
    **{
        f"{API}/{path}": Route(errors=ERRORS)
        for path in (
            "client/config", "client/dynamic_config", "get_server_capabilities", "create_session",
            "create_model", "load_weights", "optim_step", "save_weights", "save_weights_for_sampler",
            "save_weights_external", "create_sampling_session", "join_sampling_session", "retrieve_future",
            "cancel_future", "get_info", "unload_model", *LACKING,
        )
    },
}  # fmt: skip


def make_router(service: TinkerService) -> APIRouter:
    """The routes of a service."""
    router = APIRouter(prefix=API, tags=["tinker"])
    for add in (_add_sessions, _add_models, _add_requests, _add_samplers, _add_futures, _add_refusals):
        add(router, service)
    return router


def _future(id: str, model_id: str | None = None, sequences: list[str] | None = None) -> types.UntypedAPIFuture:
    return types.UntypedAPIFuture(request_id=id, model_id=model_id, sample_sequence_ids=sequences)


def _add_sessions(router: APIRouter, service: TinkerService) -> None:
    @router.get("/healthz")
    def health() -> types.HealthResponse:
        return types.HealthResponse(status="ok")

    @router.post("/client/config")
    def client_config(body: types.ClientConfigRequest) -> types.ClientConfigResponse:
        return types.ClientConfigResponse()

    @router.post("/client/dynamic_config")
    def dynamic_config(body: types.ClientConfigRequest) -> types.ClientDynamicConfigResponse:
        return types.ClientDynamicConfigResponse(sample_cancel_enabled=True)

    @router.get("/get_server_capabilities")
    def capabilities() -> types.GetServerCapabilitiesResponse:
        model = types.SupportedModel(
            model_name=service.base.names[0],
            max_context_length=service.engine.limits.max_context_tokens,
            trainable=True,
            sampleable=True,
        )
        return types.GetServerCapabilitiesResponse(supported_models=[model])

    @router.post("/create_session")
    def create_session(body: types.CreateSessionRequest, tenant: Tenant) -> types.CreateSessionResponse:
        now = time.time()
        words = records.dumped(body.user_metadata)
        session = Session(records.new_id(), tenant, now, now, 0, body.display_name, words)
        service.records.put(session)
        minor = _MINOR.match(body.sdk_version)
        is_tested = minor is not None and int(minor[1]) in TESTED_SDKS
        warning = f"SDK {body.sdk_version[:40]} was not tested with this server; 0.{TESTED_SDKS[0]} to 0.{TESTED_SDKS[-1]} were"
        return types.CreateSessionResponse(session_id=session.id, warning_message=None if is_tested else warning)

    @router.post("/session_heartbeat")
    def heartbeat(body: types.SessionHeartbeatRequest, tenant: Tenant) -> types.SessionHeartbeatResponse:
        session = service.records.require(Session, body.session_id, tenant)
        if session.is_finished:
            raise ApiError(410, "this session has been finished", "gone")
        service.records.change(Session, session.id, durable=False, heard_s=time.time())
        return types.SessionHeartbeatResponse()

    @router.post("/telemetry")
    def telemetry(request: Request) -> types.TelemetryResponse:
        return types.TelemetryResponse(status="accepted")


def _add_models(router: APIRouter, service: TinkerService) -> None:
    @router.post("/create_model")
    def create_model(body: types.CreateModelRequest, tenant: Tenant) -> types.UntypedAPIFuture:
        _check_base(service, body.base_model)
        _check_optimiser(body.optimizer_config)
        id = _run_id(service, body.session_id, body.model_seq_id, tenant)
        if service.records.find(records.Run, id) is None:
            lora, metadata = body.lora_config or types.LoraConfig(rank=32), body.user_metadata or {}
            base = service.base.model
            head = presets.head(base) if service.engine.training.can_train_head else []
            lora = lora.model_copy(update={"train_unembed": lora.train_unembed and bool(head)})
            config = {**presets.road_words(lora, metadata), "target_modules": presets.targets(base, lora, head)}
            now, told = time.time(), json.dumps(metadata)
            record = records.Run(
                id, tenant, body.session_id, now, now, body.base_model, lora.model_dump_json(), json.dumps(config), told
            )
        else:
            record = service.records.require(records.Run, id, tenant)
        return _future(service.runs.create(record), id)

    @router.post("/load_weights")
    def load_weights(body: types.LoadWeightsRequest, raw: Body, tenant: Tenant) -> types.UntypedAPIFuture:
        if body.optimizer_config is not None:
            _check_optimiser(body.optimizer_config)
        if body.model_id is not None:
            return _future(service.runs.ask(body.model_id, tenant, body.seq_id, "load_weights", raw), body.model_id)
        if body.session_id is None or body.model_seq_id is None:
            raise ConfigError(
                "got neither model_id and seq_id nor session_id and model_seq_id; wanted one pair of them"
            )
        return _future(*_create_by_loading(service, body, tenant))

    @router.post("/get_info")
    def get_info(body: types.GetInfoRequest, tenant: Tenant) -> types.GetInfoResponse:
        run = service.records.require(records.Run, body.model_id, tenant)
        name, place = run.base_model, service.base.place
        model = types.ModelData(arch=type(service.base.model).__name__, model_name=name, tokenizer_id=place)
        rank = json.loads(run.lora)["rank"]
        return types.GetInfoResponse(
            type="get_info", model_data=model, model_id=run.id, is_lora=True, lora_rank=rank, model_name=name
        )

    @router.post("/unload_model")
    def unload_model(body: types.UnloadModelRequest, tenant: Tenant) -> types.UntypedAPIFuture:
        return _future(service.runs.unload(body.model_id, tenant), body.model_id)


def _run_id(service: TinkerService, session: str, number: int, tenant: str) -> str:
    """As the SDK makes it itself for a model that begins with weights."""
    if not 0 <= number < 2**53:
        raise ConfigError(f"got model_seq_id={number}; wanted a number from 0")
    return f"{service.records.require(Session, session, tenant).id}:train:{number}"


def _create_by_loading(service: TinkerService, body: types.LoadWeightsRequest, tenant: str) -> tuple[str, str]:
    assert body.session_id is not None
    assert body.model_seq_id is not None
    if body.base_model is not None:
        _check_base(service, body.base_model)
    id = _run_id(service, body.session_id, body.model_seq_id, tenant)
    record = service.records.find(records.Run, id, tenant)
    if record is None:
        found = service.records.checkpoint_at(body.path, tenant)
        kept = service.checkpoints.copy(body.path, tenant, with_optimiser=body.optimizer)
        now, told = time.time(), records.dumped(body.user_metadata)
        name = body.base_model or found.base_model
        record = records.Run(id, tenant, body.session_id, now, now, name, found.lora, "{}", told, kept)
    return service.runs.create(record), id


def _check_base(service: TinkerService, name: str) -> None:
    if name not in service.base.names:
        raise ConfigError(
            f"got base_model {ascii(name)[:200]}; wanted {service.base.names[0]!r}, which this server has"
        )


def _check_optimiser(config: Any) -> None:
    if config.type != "adamw":
        raise ConfigError(f"got the optimiser {config.type[:100]!r}; wanted adamw, the only one here")


def _add_requests(router: APIRouter, service: TinkerService) -> None:
    def ask(model_id: str, seq: int | None, kind: str, raw: bytes, tenant: str) -> types.UntypedAPIFuture:
        return _future(service.runs.ask(model_id, tenant, seq, kind, raw), model_id)

    body = {"requestBody": {"content": {"application/x-protobuf": {"schema": {"type": "string", "format": "binary"}}}}}

    @router.post("/forward_backward", openapi_extra=body)
    def forward_backward(raw: Body, tenant: Tenant) -> types.UntypedAPIFuture:
        request = wire.request_of(raw)
        return ask(request.model_id, request.seq_id, "forward_backward", raw, tenant)

    @router.post("/optim_step")
    def optim_step(body: types.OptimStepRequest, raw: Body, tenant: Tenant) -> types.UntypedAPIFuture:
        return ask(body.model_id, body.seq_id, "optim_step", raw, tenant)

    @router.post("/save_weights")
    def save_weights(body: types.SaveWeightsRequest, raw: Body, tenant: Tenant) -> types.UntypedAPIFuture:
        return ask(body.model_id, body.seq_id, "save_weights", raw, tenant)

    @router.post("/save_weights_for_sampler")
    def save_for_sampler(body: types.SaveWeightsForSamplerRequest, raw: Body, tenant: Tenant) -> types.UntypedAPIFuture:
        return ask(body.model_id, body.seq_id, "save_weights_for_sampler", raw, tenant)

    @router.post("/save_weights_external")
    def save_external(body: types.SaveWeightsExternalRequest, raw: Body, tenant: Tenant) -> types.UntypedAPIFuture:
        return ask(body.model_id, body.seq_id, "save_weights_external", raw, tenant)


def _add_samplers(router: APIRouter, service: TinkerService) -> None:
    @router.post("/create_sampling_session")
    def create_sampling_session(
        body: types.CreateSamplingSessionRequest, tenant: Tenant
    ) -> types.CreateSamplingSessionResponse:
        session = service.records.require(Session, body.session_id, tenant)
        if not 0 <= body.sampling_session_seq_id < 2**53:
            raise ConfigError(f"got sampling_session_seq_id={body.sampling_session_seq_id}; wanted a number from 0")
        id = f"{session.id}:sample:{body.sampling_session_seq_id}"
        if service.records.find(Sampler, id) is None:
            service.records.put(_sampler(service, id, session.id, body.model_path, body.base_model, tenant))
        return types.CreateSamplingSessionResponse(sampling_session_id=id)

    @router.post("/join_sampling_session")
    def join(body: types.JoinSamplingSessionRequest, tenant: Tenant) -> types.JoinSamplingSessionResponse:
        sampler = service.records.require(Sampler, body.sampling_session_id, tenant)
        return types.JoinSamplingSessionResponse(client_counter=service.records.join(sampler.id))

    @router.post("/asample")
    def asample(body: types.SampleRequest, raw: Body, tenant: Tenant) -> types.UntypedAPIFuture:
        if body.sampling_session_id is not None:
            sampler = service.records.require(Sampler, body.sampling_session_id, tenant)
        else:
            key = uuid.uuid5(uuid.NAMESPACE_URL, f"{tenant} {body.model_path} {body.base_model}").hex
            sampler = _sampler(service, f"{key}:sample:0", "", body.model_path, body.base_model, tenant)
            service.records.put(sampler)
        id = service.samplers.ask(body, raw, sampler)
        return _future(id, None, [f"{id}#{number}" for number in range(body.num_samples)])


def _sampler(
    service: TinkerService, id: str, session: str, path: str | None, base_model: str | None, tenant: str
) -> Sampler:
    found = None if path is None else service.records.checkpoint_at(path, tenant)
    if found is None and base_model is None:
        raise ConfigError("got neither model_path nor base_model; wanted one of them")
    if base_model is not None:
        _check_base(service, base_model)
    name = base_model or (found.base_model if found is not None else "")
    return Sampler(id, tenant, session, time.time(), name, None if found is None else found.id, path)


def _add_futures(router: APIRouter, service: TinkerService) -> None:
    @router.post("/retrieve_future")
    async def retrieve_future(body: types.FutureRetrieveRequest, tenant: Tenant) -> Response:
        try:
            result = await service.futures.result(body.request_id, tenant, POLL_S)
        except (KeyError, UnicodeError):
            raise records.unknown("future", body.request_id) from None
        if result is None:
            told = {"type": "try_again", "request_id": body.request_id, "queue_state": "active"}
            return JSONResponse(told, 408)
        return Response(result.content, media_type=result.format)

    @router.post("/cancel_future", status_code=204)
    def cancel_future(body: types.FutureRetrieveRequest, tenant: Tenant) -> None:
        service.samplers.cancel(body.request_id, tenant)


def _add_refusals(router: APIRouter, service: TinkerService) -> None:
    def refusal(name: str, what: str) -> Any:
        def refuse() -> None:
            raise ApiError(400, f"got {name}; this server has no {what}", "unsupported")

        return refuse

    for name, (methods, what) in LACKING.items():
        router.add_api_route(f"/{name}", refusal(name, what), methods=methods.split(), include_in_schema=False)
