"""Small faults in Python source: a comparison turned, a constant off by one, a guard removed, two arguments swapped.

Left alone, being no faults of function: docstrings, messages, annotations, __repr__, asserts, exports, arguments of
dataclass and cast, and constants below 1e-6 (they guard divisions by zero)."""

import ast
import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

TURNED: dict[type[ast.AST], tuple[type[Any], ...]] = {
    ast.Lt: (ast.LtE, ast.GtE), ast.LtE: (ast.Lt, ast.Gt), ast.Gt: (ast.GtE, ast.LtE), ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,), ast.NotEq: (ast.Eq,), ast.Is: (ast.IsNot,), ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,), ast.NotIn: (ast.In,), ast.And: (ast.Or,), ast.Or: (ast.And,),
    ast.Add: (ast.Sub,), ast.Sub: (ast.Add,), ast.Mult: (ast.Div,), ast.Div: (ast.Mult,), ast.FloorDiv: (ast.Div,),
    ast.Mod: (ast.Mult,), ast.Pow: (ast.Mult,), ast.BitOr: (ast.BitAnd,), ast.BitAnd: (ast.BitOr,)}
NAMES = {a: b for pair in ("min max", "any all", "floor ceil", "sin cos", "log exp", "minimum maximum", "sinh cosh",
                           "zeros_like ones_like") for a, b in (pair.split(), pair.split()[::-1])}
NO_WORK = {"cast", "TypeVar", "dataclass", "warn", "print"}
SYMMETRIC = {"min", "max", "minimum", "maximum", "gcd", "isclose"}


@dataclass(frozen=True)
class Site:
    """A possible fault: a node, what replaces it, the statement around it, and whether it runs in a call rather than at
    the import."""

    old: Any
    new: ast.AST
    statement: Any
    called: bool

    def lines(self) -> list[range]:
        """The node's lines, then its statement's; a block's end with its head."""
        ends = [getattr(node, "test", node).end_lineno for node in (self.old, self.statement)]
        return [range(self.old.lineno, ends[0] + 1), range(self.statement.lineno, ends[1] + 1)]

    def __str__(self) -> str:
        parts = [ast.unparse(ast.fix_missing_locations(copy.deepcopy(node))) for node in (self.old, self.new)]
        return "  ->  ".join(part.split("\n")[0][:100] for part in parts)


class Replace(ast.NodeTransformer):
    def __init__(self, site: Site) -> None:
        self.site = site

    def visit(self, node: ast.AST) -> ast.AST:
        return ast.copy_location(self.site.new, node) if node is self.site.old else self.generic_visit(node)


def mutated(source: str, number: int) -> ast.Module:
    """The tree of source with its number-th fault; line numbers stay."""
    tree = ast.parse(source)
    Replace(list(sites(tree))[number]).visit(tree)
    return ast.fix_missing_locations(tree)


def statements(tree: ast.AST) -> int:
    """Logical lines: statements other than docstrings."""
    return sum(isinstance(node, ast.stmt) and not is_text(getattr(node, "value", None)) for node in ast.walk(tree))


def sites(node: ast.AST, statement: ast.AST | None = None, called: bool = False) -> Iterator[Site]:
    """Every possible fault below node, in the order of the source."""
    match node:
        case ast.Import() | ast.ImportFrom() | ast.Assert() | ast.JoinedStr() | ast.AnnAssign(value=None):
            return
        case ast.FunctionDef(name="__repr__" | "__str__") | ast.If(test=ast.Name(id="TYPE_CHECKING")):
            return
        case ast.Assign(targets=[ast.Name(id="__all__")]):
            return
    statement = node if isinstance(node, ast.stmt) else statement
    for new in faults(node, called):
        yield Site(node, new, statement, called)
    if isinstance(node, ast.Raise) or (isinstance(node, ast.Call) and name(node.func) in NO_WORK):
        return
    for field, value in ast.iter_fields(node):
        if field not in ("annotation", "returns"):
            inside = called or (field == "body" and isinstance(node, ast.FunctionDef | ast.Lambda))
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST) and getattr(child, "arg", None) != "stacklevel":
                    yield from sites(child, statement, inside)


def faults(node: Any, called: bool) -> Iterator[ast.AST]:
    """What may stand in place of node."""
    match node:
        case ast.Compare(ops=ops):
            for i, op in enumerate(ops):
                for turned in TURNED[type(op)]:
                    yield but(node, ops=[*ops[:i], turned(), *ops[i + 1:]])
        case ast.BoolOp(op=op, values=values):
            yield but(node, op=TURNED[type(op)][0]())
            for i in range(len(values)):
                rest = values[:i] + values[i + 1:]
                yield rest[0] if len(rest) == 1 else but(node, values=rest)
        case ast.BinOp(op=op, left=left, right=right) if type(op) in TURNED and not (is_text(left) or is_text(right)):
            yield but(node, op=TURNED[type(op)][0]())
        case ast.UnaryOp(op=ast.Not() | ast.USub(), operand=operand):
            yield operand
        case ast.Constant(value=bool(value)):
            yield ast.Constant(not value)
        case ast.Constant(value=int(value)):
            yield from (ast.Constant(value + 1), ast.Constant(value - 1))
        case ast.Constant(value=float(value)) if value == 0 or value >= 1e-6:
            yield ast.Constant(2 * value or 1.0)
        case ast.If(test=test) | ast.While(test=test) | ast.IfExp(test=test) if not isinstance(test, ast.UnaryOp):
            yield but(node, test=ast.UnaryOp(ast.Not(), test))
        case ast.ListComp() | ast.SetComp() | ast.GeneratorExp() | ast.DictComp():
            if node.generators[0].ifs:
                yield but(node, generators=[but(node.generators[0], ifs=[]), *node.generators[1:]])
        case ast.Call(func=func, args=args, keywords=keywords):
            if name(func) in NAMES:
                other = NAMES[name(func)]
                yield but(node, func=but(func, id=other) if isinstance(func, ast.Name) else but(func, attr=other))
            starred = any(isinstance(arg, ast.Starred) for arg in args[:2])
            if name(func) not in NO_WORK:
                if len(args) > 1 and name(func) not in SYMMETRIC and not starred:
                    yield but(node, args=[args[1], args[0], *args[2:]])
                yield from (but(node, keywords=[k for k in keywords if k is not key]) for key in keywords)
        case ast.Return(value=ast.AST() as value) if not isinstance(value, ast.Constant):
            yield but(node, value=ast.Constant(None))
        case ast.Expr(value=ast.Call()) | ast.AugAssign() | ast.Raise() | ast.Continue() | ast.Break() if called:
            yield ast.Pass()
        case ast.Assign(targets=[ast.Attribute() | ast.Subscript()]):
            yield ast.Pass()


def but(node: Any, **fields: Any) -> Any:
    new = copy.copy(node)
    for field, value in fields.items():
        setattr(new, field, value)
    return new


def name(func: ast.AST) -> str:
    return getattr(func, "id", getattr(func, "attr", ""))


def is_text(node: ast.AST | None) -> bool:
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))
