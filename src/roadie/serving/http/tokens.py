"""`POST /tokenize` and `POST /detokenize`, as vLLM has them: what a prompt is to the model, and what tokens say."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from roadie.serving.http.answers import Detokenized, Tokenized
from roadie.serving.http.bodies import DetokenizeBody, TokenizeBody
from roadie.serving.http.conversation import form_of, own_chat_of
from roadie.serving.http.failures import ApiError
from roadie.serving.http.naming import BASE
from roadie.serving.http.offers import offer_of
from roadie.serving.http.service import service_of

router = APIRouter()


@router.post("/tokenize", response_model=Tokenized, tags=["tokens"], summary="Tokens of a prompt")
async def tokenize(body: TokenizeBody, request: Request) -> Any:
    """Tokens of a text, or of a conversation as the model would get it."""
    service = service_of(request)
    call = service.begin("tok", body.model or BASE, None, request)
    chat = body.chat
    if chat is None:
        ids = await service.prompts.encode(body.prompt or "", special=body.add_special_tokens is not False)
    else:
        chat.check()
        own = own_chat_of(call, service)
        offer_of(chat, None if own is None else own.template, service)
        ids = await service.prompts.encode_chat(chat.messages, form_of(chat, own))
    texts = [service.prompts.pieces.text_of(token) for token in ids] if body.return_token_strs else None
    most = service.engine.limits.max_context_tokens
    return {"count": len(ids), "max_model_len": most, "tokens": list(ids), "token_strs": texts}


@router.post("/detokenize", response_model=Detokenized, tags=["tokens"], summary="The text of tokens")
async def detokenize(body: DetokenizeBody, request: Request) -> Any:
    """The text of tokens, special ones included."""
    service = service_of(request)
    service.begin("tok", body.model or BASE, None, request)
    size = service.engine.limits.vocabulary_size
    wrong = next((token for token in body.tokens if token >= size), None)
    if wrong is not None:
        message = f"got token {wrong}, which is not in the vocabulary; wanted tokens from 0 to {size - 1}"
        raise ApiError(400, message, "invalid_value", param="tokens")
    return {"prompt": service.prompts.decode(body.tokens, special=True)}
