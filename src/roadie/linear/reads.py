"""Which weights a model reads outside of the forward of their own layers: told from the source of its classes.

A rotation of a layer's output has no effect, and no gradient, where the model computes with ``self.layer.weight`` instead of
calling ``self.layer``: Mamba's dt_proj, the projections of WavLM and of torch.nn.MultiheadAttention, what fused kernels are
given. The rule reads the methods that a forward can reach, for ``self.<path>.weight`` where it is used as a value:

- its dtype, device or shape, ``isinstance`` and ``is`` are no use of the value, nor is a change in place (``.weight.div_()``);
- a branch that the module's own settings rule out (``if self.pretraining_tp > 1``) is not taken; arguments that have a default
  are taken to have it; whatever else decides, such as ``self.training`` or a kernel that may be there, counts as taken.

What the source does not show, `read_in_a_forward` tells of a read that happens.
"""

from __future__ import annotations

import ast
import inspect
import linecache
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from types import CodeType, FrameType, FunctionType
from typing import Any

from torch import nn

from roadie.linear.guards import defaults_of, truth

_OF_NO_VALUE = frozenset(
    {"dtype", "device", "shape", "ndim", "size", "dim", "numel", "element_size", "is_meta", "is_cuda", "requires_grad"}
    | {"is_floating_point", "layout", "get_device", "grad", "stride", "is_contiguous"}
)
_LOOKS = frozenset({"isinstance", "hasattr", "getattr", "type", "id", "len"})


@dataclass(frozen=True)
class _Read:
    """``self.<path>.weight`` in a method; guards: the tests around it, and what each must be for the read to happen."""

    path: tuple[str | None, ...]  # None: any element of what is before it
    where: str
    guards: tuple[tuple[ast.expr, bool], ...]
    defaults: Mapping[str, Any]

    def can_happen_in(self, module: nn.Module) -> bool:
        return all(truth(test, module, self.defaults) is not (not wanted) for test, wanted in self.guards)


def weight_reads(model: nn.Module) -> dict[str, str]:
    """Path in `model` -> which method computes with the weight of the module there, without calling it.

    Modules of any kind are told, embeddings and convolutions too.
    """
    found: dict[str, str] = {}
    modules = list(model.named_modules(remove_duplicate=False))
    reads = _reads({type(module) for _, module in modules})
    for path, module in modules:
        for read in reads[type(module)]:
            if read.can_happen_in(module):
                for name in _children(module, read.path):
                    found.setdefault(f"{path}.{name}" if path else name, read.where)
    return found


def read_in_a_forward(frame: FrameType | None) -> bool:
    """Whether the code that runs in `frame` is part of a module's forward and uses a weight for its value on this line.

    True also where its source cannot be had. Nothing in PEFT or roadie counts.
    """
    if frame is None or _is_adapters_own(str(frame.f_globals.get("__name__"))):
        return False
    lines = _value_lines(frame.f_code.co_filename)
    return (lines is None or frame.f_lineno in lines) and _is_in_forward(frame)


def _is_in_forward(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code is nn.Module._call_impl.__code__:
            return True
        frame = frame.f_back
    return False


@cache
def _value_lines(filename: str) -> frozenset[int] | None:
    """Lines of a file on which some ``.weight`` is read for its value; None where there is no source."""
    source = "".join(linecache.getlines(filename))
    finder = _Finder("")
    try:
        finder.visit(ast.parse(source))
    except SyntaxError:
        return None
    return frozenset(finder.lines) if source else None


def _is_adapters_own(name: str) -> bool:
    """Whether a module of this name belongs to those who put layers around others, and may look at what is inside."""
    return name.split(".")[0] in ("peft", "roadie")


def _reads(classes: Iterable[type[nn.Module]]) -> dict[type[nn.Module], list[_Read]]:
    """What the methods of classes read that a forward can reach: those whose names it, or what it reaches, mentions."""
    methods = {cls: _methods(cls) for cls in classes}  # type: ignore[arg-type]
    seen: set[str] = set()
    todo = {"forward"}
    while todo:
        seen |= todo
        todo = {
            other
            for own in methods.values()
            for name in todo & own.keys()
            for function in own[name]
            for other in _names(function.__code__)
        } - seen
    return {
        cls: [
            read for name in own.keys() & seen for function in own[name] for read in _reads_in(function, cls.__name__)
        ]
        for cls, own in methods.items()
    }


@cache
def _methods(cls: type[nn.Module]) -> dict[str, tuple[FunctionType, ...]]:
    """The methods of a class by name, with what their decorators wrap; without those that torch.nn.Module has."""
    if _is_adapters_own(cls.__module__):
        return {}
    own = {name: inspect.getattr_static(cls, name) for name in dir(cls)}
    own = {name: found for name, found in own.items() if found is not inspect.getattr_static(nn.Module, name, None)}
    return {name: tuple(_behind(found)) for name, found in own.items()}


@cache
def _reads_in(function: FunctionType, class_name: str) -> tuple[_Read, ...]:
    tree = _tree_of(function.__code__) if "weight" in _names(function.__code__) else None
    if tree is None:
        return ()
    finder = _Finder(f"{class_name}.{function.__name__}")
    finder.visit(tree)
    return tuple(finder.reads)


def _behind(found: Any) -> Iterator[FunctionType]:
    """A function, and those that its decorators wrap."""
    function = getattr(found, "__func__", found)
    if not isinstance(function, FunctionType):
        return
    yield function
    for cell in function.__closure__ or ():
        try:
            inner = cell.cell_contents
        except ValueError:  # not filled yet
            continue
        if inner is not function:
            yield from _behind(inner)


@cache
def _names(code: CodeType) -> frozenset[str]:
    inner = [const for const in code.co_consts if isinstance(const, CodeType)]
    return frozenset(code.co_names).union(*(_names(const) for const in inner))


def _tree_of(code: CodeType) -> ast.AST | None:
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(code)))
    except (OSError, TypeError, SyntaxError):
        return None


class _Finder(ast.NodeVisitor):
    """Finds every use of the value of a ``.weight``, and under which tests it stands."""

    def __init__(self, where: str) -> None:
        self.reads: list[_Read] = []
        self.lines: set[int] = set()
        self._where = where
        self._guards: list[tuple[ast.expr, bool]] = []
        self._defaults: dict[str, Any] = {}

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        outer, self._defaults = self._defaults, defaults_of(node)
        self._visit_block(node.body)
        self._defaults = outer

    def _visit_block(self, statements: Sequence[ast.AST]) -> None:
        """Statements one after the other: what follows an ``if`` that leaves the function runs where its test fails."""
        depth = len(self._guards)
        for statement in statements:
            self.visit(statement)
            if isinstance(statement, ast.If) and isinstance(statement.body[-1], (ast.Return, ast.Raise)):
                self._guards.append((statement.test, False))
        del self._guards[depth:]

    def visit_If(self, node: ast.If) -> None:
        self.visit(node.test)
        self._visit_under(node.test, True, node.body)
        self._visit_under(node.test, False, node.orelse)

    def visit_IfExp(self, node: ast.IfExp) -> None:
        self.visit(node.test)
        self._visit_under(node.test, True, [node.body])
        self._visit_under(node.test, False, [node.orelse])

    def _visit_under(self, test: ast.expr, wanted: bool, body: Sequence[ast.AST]) -> None:
        self._guards.append((test, wanted))
        self._visit_block(body)
        self._guards.pop()

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if _is_weight(node):
            self._found(node)
        elif not (node.attr in _OF_NO_VALUE and _is_weight(node.value)):
            self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        looks = isinstance(node.func, ast.Name) and node.func.id in _LOOKS
        if not _changes_weight(node.func):
            self.visit(node.func)
        for argument in (*node.args, *(keyword.value for keyword in node.keywords)):
            if not (looks and _is_weight(argument)):
                self.visit(argument)

    def visit_Compare(self, node: ast.Compare) -> None:
        looks = all(isinstance(op, (ast.Is, ast.IsNot)) for op in node.ops)
        for operand in (node.left, *node.comparators):
            if not (looks and _is_weight(operand)):
                self.visit(operand)

    def _found(self, node: ast.Attribute) -> None:
        self.lines |= {node.lineno, node.end_lineno or node.lineno}
        path = _path_from_self(node.value)
        if path:
            self.reads.append(_Read(path, self._where, tuple(self._guards), self._defaults))


def _is_weight(node: ast.AST) -> bool:
    """``<something>.weight`` that is read, but not ``self.weight``."""
    is_read = isinstance(node, ast.Attribute) and node.attr == "weight" and isinstance(node.ctx, ast.Load)
    return is_read and not (isinstance(node.value, ast.Name) and node.value.id == "self")  # type: ignore[attr-defined]


def _changes_weight(function: ast.expr) -> bool:
    """``x.weight.mul_``, ``x.weight.data.clamp_``: the weight is changed in place, for the layer that is called then."""
    if not (isinstance(function, ast.Attribute) and function.attr.endswith("_")):
        return False
    node: ast.expr = function.value
    while isinstance(node, ast.Attribute) and not _is_weight(node):
        node = node.value
    return _is_weight(node)


def _path_from_self(node: ast.expr) -> tuple[str | None, ...] | None:
    """("attn", "out_proj") for ``self.attn.out_proj``, ("layers", None) for ``self.layers[i]``; None for anything else."""
    if isinstance(node, ast.Name):
        return () if node.id == "self" else None
    if not isinstance(node, (ast.Attribute, ast.Subscript)):
        return None
    before = _path_from_self(node.value)
    return None if before is None else (*before, node.attr if isinstance(node, ast.Attribute) else None)


def _children(module: nn.Module, path: Sequence[str | None]) -> Iterator[str]:
    """Paths from `module` to the modules that a read's path can mean."""
    if not path:
        yield ""
        return
    first, *rest = path
    children: Iterable[str] = module._modules if first is None else (first,)
    for name in children:
        child = module._modules.get(name)
        if child is not None:
            yield from (f"{name}.{below}" if below else name for below in _children(child, rest))
