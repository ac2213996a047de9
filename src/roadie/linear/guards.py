"""What the test of an ``if`` comes to in a module, as far as the module's own settings say.

Settings are plain attributes, of the module and of what it holds (``self.config.slices > 1``); arguments of a method that have a
plain default are taken to have it. Everything else is unknown, such as ``self.training``, which changes.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

_CHANGES = frozenset({"training", "gradient_checkpointing"})  # attributes that are switched while a model lives
_PLAIN = (bool, int, float, str, type(None))
_COMPARISONS: Mapping[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Is: operator.is_,
    ast.IsNot: operator.is_not,
}
_UNKNOWN = object()


def defaults_of(function: ast.FunctionDef) -> dict[str, Any]:
    """The arguments with plain defaults that the function does not set anew."""
    arguments = function.args
    positional = [*arguments.posonlyargs, *arguments.args]
    pairs = list(zip(reversed(positional), reversed(arguments.defaults), strict=False))
    pairs += [(a, d) for a, d in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True) if d is not None]
    written = {n.id for n in ast.walk(function) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    return {a.arg: d.value for a, d in pairs if isinstance(d, ast.Constant) and a.arg not in written}


def truth(test: ast.expr, module: nn.Module, defaults: Mapping[str, Any]) -> bool | None:
    """What a test comes to in `module`, as far as its settings and the defaults say; None: that cannot be told."""
    if isinstance(test, ast.BoolOp):
        parts = {truth(part, module, defaults) for part in test.values}
        decides = isinstance(test.op, ast.Or)  # one true part decides an "or", one false part an "and"
        if decides in parts:
            return decides
        return None if None in parts else not decides
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        opposite = truth(test.operand, module, defaults)
        return None if opposite is None else not opposite
    value = _value(test, module, defaults)
    return bool(value) if isinstance(value, _PLAIN) else None


def _value(node: ast.expr, module: nn.Module, defaults: Mapping[str, Any]) -> Any:
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.Name):
        return module if node.id == "self" else defaults.get(node.id, _UNKNOWN)
    if isinstance(node, ast.Attribute):
        of = _value(node.value, module, defaults)
        return _UNKNOWN if of is _UNKNOWN or node.attr in _CHANGES else _attribute(of, node.attr)
    if isinstance(node, ast.Compare) and len(node.ops) == 1:
        return _compared(node, module, defaults)
    if isinstance(node, ast.Call):
        return _has_attribute(node, module, defaults)
    return _UNKNOWN


def _compared(node: ast.Compare, module: nn.Module, defaults: Mapping[str, Any]) -> Any:
    left, right = (_value(each, module, defaults) for each in (node.left, node.comparators[0]))
    compare = _COMPARISONS.get(type(node.ops[0]))
    is_identity = compare in (operator.is_, operator.is_not)
    if compare is None or left is _UNKNOWN or right is _UNKNOWN:
        return _UNKNOWN
    if not is_identity and not (isinstance(left, _PLAIN) and isinstance(right, _PLAIN)):
        return _UNKNOWN
    try:
        return compare(left, right)
    except TypeError:
        return _UNKNOWN


def _has_attribute(node: ast.Call, module: nn.Module, defaults: Mapping[str, Any]) -> Any:
    if not (isinstance(node.func, ast.Name) and node.func.id == "hasattr" and len(node.args) == 2):
        return _UNKNOWN
    of, name = (_value(argument, module, defaults) for argument in node.args)
    known = of is not _UNKNOWN and isinstance(name, str)
    return _attribute(of, name) is not _UNKNOWN if known else _UNKNOWN


def _attribute(of: Any, name: str) -> Any:
    try:
        return getattr(of, name, _UNKNOWN)
    except Exception:  # of a property, which may do anything
        return _UNKNOWN
