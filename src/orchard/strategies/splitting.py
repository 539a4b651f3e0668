"""Names that are trained, divided by pattern: what is sent, what a client keeps, what stays.

FedPer (Arivazhagan et al., 2019, arXiv:1912.00818) keeps a model's last layers, FedRep (Collins et
al., 2021, arXiv:2102.07078) trains what it keeps and what it sends in turn, FedSA-LoRA (Guo et al.,
2024, arXiv:2410.01463) sends the factors A of all adapters and keeps the factors B. In words:

1. A name that a pattern of ``kept`` fits is trained and kept; another that a pattern of ``shared``
   fits is trained and sent; any other is neither, and stays as it is in the base.
2. The server holds what is sent, and nothing else.
3. In turn: the first steps of a round move only what is kept, the others only what is sent.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from orchard.client.client import Client
from orchard.communication.messages import Task
from orchard.data.encoded import Encoded
from orchard.server.optimizers import ServerOptimizer, Slots
from orchard.strategies.strategy import Plan, Strategy
from orchard.trees import Tree


@dataclass(frozen=True)
class Split:
    """Patterns of names, in which ``*`` stands for any text.

    Attributes:
        shared: Of what is sent; empty = all that ``kept`` does not name.
        kept: Of what a client keeps; they win.
    """

    shared: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()

    def keeps(self, name: str) -> bool:
        """Say whether a client keeps a name."""
        return _fits(name, self.kept)

    def shares(self, name: str) -> bool:
        """Say whether a name is sent."""
        return not self.keeps(name) and (not self.shared or _fits(name, self.shared))

    def check(self, names: Collection[str]) -> None:
        """Check that every pattern fits a name, and that something is sent.

        Raises:
            ValueError: One fits none, or nothing is sent.
        """
        example = next(iter(names))
        for option, patterns in (("shared", self.shared), ("kept", self.kept)):
            for pattern in patterns:
                if not any(fnmatchcase(name, pattern) for name in names):
                    raise ValueError(
                        f"strategy.{option} must fit names of what is trained, got {pattern}, "
                        f"which fits none; they are such as {example}"
                    )
        if not any(self.shares(name) for name in names):
            raise ValueError(
                "strategy.shared and strategy.kept must leave something to send, got none of "
                f"{len(names)} names; strategy.name = local keeps all"
            )


def _fits(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


@dataclass(frozen=True)
class OnlyShared:
    """A server optimizer of the names that are sent alone.

    Attributes:
        inner: Moves them.
        split: Says which they are.
    """

    inner: ServerOptimizer
    split: Split

    def start(self, adapters: Tree) -> tuple[Tree, Slots]:
        """Begin with what is sent."""
        return self.inner.start({n: t for n, t in adapters.items() if self.split.shares(n)})

    def step(self, shared: Tree, delta: Tree, slots: Slots) -> tuple[Tree, Slots]:
        """Move as ``inner`` does."""
        return self.inner.step(shared, delta, slots)


def split_names(strategy: Strategy, split: Split) -> Strategy:
    """Let clients of ``strategy`` send and keep what ``split`` says of what they would send."""

    @contextmanager
    def prepare(client: Client, task: Task) -> Iterator[Plan]:
        with strategy.prepare(client, task) as plan:
            yield replace(
                plan,
                shared=tuple(name for name in plan.shared if split.shares(name)),
                personal=(*plan.personal, *filter(split.keeps, plan.shared)),
            )

    return replace(strategy, prepare=prepare, optimizer=OnlyShared(strategy.optimizer, split))


def in_turn(strategy: Strategy, *, kept_steps: int) -> Strategy:
    """Let a round's first steps move what clients of ``strategy`` keep, the others what they send.

    Args:
        strategy: Whose clients keep something.
        kept_steps: So many steps move what is kept.
    """

    @contextmanager
    def prepare(client: Client, task: Task) -> Iterator[Plan]:
        with strategy.prepare(client, task) as plan:
            yield replace(plan, hold_still=_turns(plan, kept_steps))

    return replace(strategy, prepare=prepare)


def _turns(plan: Plan, kept_steps: int) -> Callable[[Sequence[Sequence[Encoded]]], set[str]]:
    num_steps = 0

    def hold_still(batches: Sequence[Sequence[Encoded]]) -> set[str]:
        nonlocal num_steps
        num_steps += 1
        held = set(plan.hold_still(batches)) if plan.hold_still else set()
        return held | set(plan.shared if num_steps <= kept_steps else plan.personal)

    return hold_still
