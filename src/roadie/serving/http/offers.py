"""Which tools a chat offers to the model, and whether the model can have any."""

from __future__ import annotations

import json
from typing import Any

from roadie.serving.grammars import Constraint, Kind
from roadie.serving.http.bodies import ChatBody
from roadie.serving.http.failures import ApiError, lacking
from roadie.serving.http.service import Service
from roadie.serving.http.tools import STYLES, Offer, knows_tools, specials, style_of, takes_one_call


def offer_of(body: ChatBody, own_template: str | None, service: Service) -> Offer | None:
    """The tools that may be called; None: there are none. Raises `ApiError` where the model knows of no tools.

    own_template: that of the adapter, where it is used.
    """
    fields = _fields_about_tools(body)
    if not fields:
        return None
    template = service.prompts.template_for_tools(own_template)
    if not knows_tools(template):
        raise lacking(fields[0], "tools: the model's chat template knows none")
    if not body.offered:
        if body.must_call:
            raise ApiError(400, "got tool_choice without tools; wanted some", "invalid_value", param="tool_choice")
        return None
    style = service.settings.tool_format or style_of(template)
    if style is None:
        raise lacking(
            "tools", "tools for this model: nobody knows how its template writes calls (roadie serve --tool-format)"
        )
    named = body.named_tool
    parameters = {tool.function.name: tool.function.parameters for tool in body.offered}
    if named is not None:
        return Offer(STYLES[style], {named: parameters[named]}, is_forced=True, most=1)
    most = 1 if body.parallel_tool_calls is False or takes_one_call(template) else None
    return Offer(STYLES[style], parameters, body.must_call, most)


def _fields_about_tools(body: ChatBody) -> list[str]:
    """What of a request is about tools, by name."""
    fields = {"tools": bool(body.offered), "tool_choice": body.must_call}
    for place, message in enumerate(body.messages):
        fields[f"messages.{place}.tool_calls"] = bool(message.tool_calls)
        fields[f"messages.{place}.role"] = message.role == "tool"
    return [name for name, is_asked in fields.items() if is_asked]


def asked_of(body: ChatBody, offer: Offer | None, service: Service) -> tuple[str, Constraint] | None:
    """What the answer must be, and the field that says so. Raises `ApiError` for what cannot be had together.

    Beside tools that may be called, an answer that is to be JSON is that, or calls alone; where one must be called, it is calls.
    """
    asked = body.constraint()
    if offer is None or (asked is None and not offer.is_forced):
        return asked
    field, schema = ("tools", None) if asked is None or offer.is_forced else (asked[0], _schema_of(*asked))
    return field, offer.constraint(specials(offer.style, service.prompts.special_ids), schema)


def _schema_of(field: str, constraint: Constraint) -> dict[str, Any]:
    """The JSON schema of a constraint, to stand beside calls in one grammar."""
    try:
        schema = json.loads(constraint.source) if constraint.kind is Kind.JSON else None
    except (ValueError, RecursionError):
        schema = None
    if not isinstance(schema, dict):
        message = f"got {field} beside tools that may be called; wanted a JSON schema, or tool_choice 'none'"
        raise ApiError(400, message, "invalid_value", param=field)
    return schema
