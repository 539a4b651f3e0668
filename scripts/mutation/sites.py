"""Where the source can be changed so that a test should notice, and a sample of such changes."""

from __future__ import annotations

import ast
import random
import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

SOURCE = Path("src/orchard")
ROOMS = ("server", "experts", "strategies", "communication", "client", "models")
"""Each gives 20 of 150 mutants; the rest come from elsewhere."""
LEFT_OUT = ("measurements",)
KINDS = {
    "operator": "operators",
    "comparison": "operators",
    "connective": "operators",
    "not": "operators",
    "number": "constants",
    "truth": "constants",
    "condition": "conditions",
    "call": "removed",
    "raise": "removed",
}
_ARITHMETIC: dict[type[ast.operator], tuple[str, str]] = {
    ast.Add: ("+", "-"),
    ast.Sub: ("-", "+"),
    ast.Mult: ("*", "/"),
    ast.Div: ("/", "*"),
    ast.FloorDiv: ("//", "/"),
    ast.Mod: ("%", "*"),
    ast.Pow: ("**", "*"),
}
_COMPARISONS: dict[type[ast.cmpop], tuple[str, tuple[str, ...]]] = {
    ast.Eq: ("==", ("!=",)),
    ast.NotEq: ("!=", ("==",)),
    ast.Lt: ("<", ("<=", ">=")),
    ast.LtE: ("<=", ("<", ">")),
    ast.Gt: (">", (">=", "<=")),
    ast.GtE: (">=", (">", "<")),
    ast.Is: ("is", ("is not",)),
    ast.IsNot: ("is not", ("is",)),
    ast.In: ("in", ("not in",)),
    ast.NotIn: ("not in", ("in",)),
}


@dataclass(frozen=True)
class Mutant:
    """One change of one place.

    Attributes:
        number: Its place in the sample, from 0.
        file: Relative to the repository.
        line: From 1.
        column: In bytes, from 0.
        what: A key of ``KINDS``.
        old: What the source says there.
        new: What the mutant says.
        text: The source's line, which finds the place again in another version.
        first_line: Of the statement, or of a compound statement's head.
        last_line: Likewise.
        at_import: Whether the place runs when its module is imported, not when a test calls it.
    """

    number: int
    file: str
    line: int
    column: int
    what: str
    old: str
    new: str
    text: str
    first_line: int
    last_line: int
    at_import: bool

    @property
    def room(self) -> str:
        """Return the folder below the package, where it is one of ``ROOMS``."""
        name = Path(self.file).relative_to(SOURCE).parts[0]
        return name if name in ROOMS else "elsewhere"

    def apply(self, source: bytes) -> bytes:
        """Return the changed source.

        Raises:
            ValueError: The source does not say ``old`` there.
        """
        start = sum(map(len, source.splitlines(keepends=True)[: self.line - 1])) + self.column
        end = start + len(self.old.encode())
        if source[start:end] != self.old.encode():
            raise ValueError(
                f"{self.file}:{self.line} must say {self.old}, got {source[start:end]!r}; "
                "locate the sample in this source"
            )
        return source[:start] + self.new.encode() + source[end:]


class _Finder(ast.NodeVisitor):
    """Collects the mutants of one module.

    Left out: annotations, decorators, strings, assertions of our own mistakes (``zip``'s ``strict``
    too), what a raised error is made of, and what only a type checker or a script reads.
    """

    def __init__(self, file: str, source: bytes) -> None:
        self.file, self.source = file, source
        self.lines = source.splitlines(keepends=True)
        self.starts = [0]
        for line in self.lines:
            self.starts.append(self.starts[-1] + len(line))
        self.depth = 0
        self.span: tuple[int, int] | None = None
        self.found: list[Mutant] = []

    def _place(self, line: int, column: int) -> int:
        return self.starts[line - 1] + column

    def _ends(self, node: ast.expr | ast.stmt) -> tuple[int, int]:
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        start = self._place(node.lineno, node.col_offset)
        return start, self._place(node.end_lineno, node.end_col_offset)

    def _add(self, what: str, start: int, end: int, *news: str) -> None:
        line = bisect_right(self.starts, start)
        first, last = self.span or (line, line)
        for new in news:
            self.found.append(
                Mutant(
                    number=0,
                    file=self.file,
                    line=line,
                    column=start - self.starts[line - 1],
                    what=what,
                    old=self.source[start:end].decode(),
                    new=new,
                    text=self.lines[line - 1].decode().strip(),
                    first_line=first,
                    last_line=last,
                    at_import=self.depth == 0,
                )
            )

    def _between(self, left: ast.expr, right: ast.expr, old: str) -> tuple[int, int]:
        """Return where an operator stands, which has a place between its operands alone."""
        start, end = self._ends(left)[1], self._ends(right)[0]
        gap = re.sub(rb"#[^\n]*", lambda m: b" " * len(m.group()), self.source[start:end])
        match = re.search(rb"\s+".join(re.escape(word.encode()) for word in old.split()), gap)
        assert match is not None
        return start + match.start(), start + match.end()

    def visit(self, node: ast.AST) -> None:
        """Visit a node, knowing which lines its statement or its head has."""
        outer = self.span
        is_compound = isinstance(node, ast.stmt) and hasattr(node, "body")
        if (isinstance(node, ast.stmt) and not is_compound) or (
            isinstance(node, ast.expr) and not outer
        ):
            self.span = (node.lineno, node.end_lineno or node.lineno)
        elif is_compound:
            self.span = None
        super().visit(node)
        self.span = outer

    def _body(self, nodes: Sequence[ast.AST], depth: int = 0) -> None:
        self.depth += depth
        for node in nodes:
            self.visit(node)
        self.depth -= depth

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        self._body([n for n in (*node.args.defaults, *node.args.kw_defaults) if n])
        self._body(node.body, depth=1)

    def visit_Lambda(self, node: ast.Lambda) -> None:
        self._body([node.body], depth=1)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self._body(node.body)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        is_alias = isinstance(node.annotation, ast.Name) and node.annotation.id == "TypeAlias"
        if node.value and not is_alias:
            self.visit(node.value)

    def visit_Assert(self, node: ast.Assert) -> None:
        pass

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        pass

    def visit_keyword(self, node: ast.keyword) -> None:
        if node.arg != "strict":
            self.visit(node.value)

    def visit_Raise(self, node: ast.Raise) -> None:
        self._add("raise", *self._ends(node), "pass")

    def visit_Expr(self, node: ast.Expr) -> None:
        if isinstance(node.value, ast.Call):
            self._add("call", *self._ends(node), "pass")
        self.generic_visit(node)

    def _negate(self, test: ast.expr) -> None:
        start, end = self._ends(test)
        self._add("condition", start, end, f"(not ({self.source[start:end].decode()}))")

    def visit_If(self, node: ast.If) -> None:
        names = {n.id for n in ast.walk(node.test) if isinstance(n, ast.Name)}
        if names & {"TYPE_CHECKING", "__name__"}:
            self._body(node.orelse)
        else:
            self._condition(node)

    def _condition(self, node: ast.If | ast.While | ast.IfExp) -> None:
        self.span = self.span or (node.test.lineno, node.test.end_lineno or node.test.lineno)
        self._negate(node.test)
        if not isinstance(node, ast.IfExp):
            self.span = None
        self.generic_visit(node)

    visit_While = visit_IfExp = _condition

    def visit_comprehension(self, node: ast.comprehension) -> None:
        for test in node.ifs:
            self._negate(test)
        self.generic_visit(node)

    def visit_BinOp(self, node: ast.BinOp) -> None:
        sides = (node.left, node.right)
        has_text = any(
            isinstance(side.value, str) if isinstance(side, ast.Constant) else False
            for side in sides
        ) or any(isinstance(side, ast.JoinedStr) for side in sides)
        if type(node.op) in _ARITHMETIC and not has_text:
            old, new = _ARITHMETIC[type(node.op)]
            self._add("operator", *self._between(node.left, node.right, old), new)
        self.generic_visit(node)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        if type(node.op) in _ARITHMETIC:
            old, new = (f"{sign}=" for sign in _ARITHMETIC[type(node.op)])
            self._add("operator", *self._between(node.target, node.value, old), new)
        self.generic_visit(node)

    def visit_Compare(self, node: ast.Compare) -> None:
        for left, op, right in zip(
            (node.left, *node.comparators), node.ops, node.comparators, strict=False
        ):
            old, news = _COMPARISONS[type(op)]
            self._add("comparison", *self._between(left, right, old), *news)
        self.generic_visit(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        old, new = ("and", "or") if isinstance(node.op, ast.And) else ("or", "and")
        for left, right in zip(node.values, node.values[1:], strict=False):
            self._add("connective", *self._between(left, right, old), new)
        self.generic_visit(node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> None:
        if isinstance(node.op, ast.Not):
            start, end = self._ends(node.operand)
            self._add("not", *self._ends(node), f"({self.source[start:end].decode()})")
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        value = node.value
        if isinstance(value, bool):
            self._add("truth", *self._ends(node), repr(not value))
        elif isinstance(value, int | float):
            self._add("number", *self._ends(node), repr(value + 1), repr(value - 1))


def find_mutants(repository: Path, file: str) -> list[Mutant]:
    """Return all mutants of a file, in the order of its text."""
    source = (repository / file).read_bytes()
    finder = _Finder(file, source)
    finder.visit(ast.parse(source))
    return sorted(finder.found, key=lambda m: (m.line, m.column, m.what, m.new))


def _alternating(mutants: Sequence[Mutant], generator: random.Random) -> Iterator[Mutant]:
    """Yield mutants in random order, one kind after another, one for each place."""
    piles: dict[str, list[Mutant]] = {kind: [] for kind in sorted(set(KINDS.values()))}
    for mutant in generator.sample(mutants, len(mutants)):
        piles[KINDS[mutant.what]].append(mutant)
    seen = set()
    while any(piles.values()):
        for pile in piles.values():
            while pile:
                mutant = pile.pop()
                place = (mutant.file, mutant.line, mutant.column)
                if place not in seen:
                    seen.add(place)
                    yield mutant
                    break


def draw_sample(repository: Path, *, size: int, seed: int) -> list[Mutant]:
    """Draw mutants: 2 of 15 from each of ``ROOMS``, the rest from elsewhere."""
    files = sorted(path.relative_to(repository) for path in (repository / SOURCE).rglob("*.py"))
    by_room: dict[str, list[Mutant]] = {room: [] for room in (*ROOMS, "elsewhere")}
    for file in files:
        if file.relative_to(SOURCE).parts[0] not in LEFT_OUT:
            for mutant in find_mutants(repository, file.as_posix()):
                by_room[mutant.room].append(mutant)
    generator = random.Random(seed)
    each = size * 2 // 15
    drawn: list[Mutant] = []
    for room, mutants in by_room.items():
        wanted = each if room in ROOMS else size - each * len(ROOMS)
        ordered = _alternating(mutants, generator)
        drawn += [mutant for mutant, _ in zip(ordered, range(wanted), strict=False)]
    return [replace(mutant, number=number) for number, mutant in enumerate(drawn)]


def locate(mutant: Mutant, repository: Path) -> Mutant | None:
    """Return the same change in another version of the source; None where its line is gone."""
    if not (repository / mutant.file).exists():
        return None

    def key(other: Mutant) -> tuple[str, str, str, str]:
        return other.text, other.what, other.old, other.new

    same = [m for m in find_mutants(repository, mutant.file) if key(m) == key(mutant)]
    if not same:
        return None
    # Of several such places on a line, the one at the nearest column.
    near = min(same, key=lambda m: (abs(m.line - mutant.line), abs(m.column - mutant.column)))
    return replace(near, number=mutant.number)
