"""A site's side of secure sums: its update stays here, and leaves under masks alone.

Masks and their secrets are in this process's memory and nowhere else. Before anything of a sum
leaves, its nonce is on disk: a site that was killed in the middle has left that sum, cannot come
back to it, and takes part in the next one with new masks. What was asked and answered once is
answered again with the same bytes where the same is asked again, as after a lost reply, and refused
where anything else is.

Two sums of one round with different members would show by their difference what the members of one
alone sent. So a site that has told its shares in a round takes part again in that round with the
same survivors only.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from orchard.communication.audit import AuditLog, content_digest
from orchard.communication.messages import Update
from orchard.communication.refusals import Code
from orchard.communication.sum_messages import (
    SumEnd,
    SumKeys,
    SumRequest,
    SumShares,
    SumSurvivors,
    SumVector,
)
from orchard.deployment.consent import Refusal, SiteSettings
from orchard.experiment.run_folder import folder_name
from orchard.recipe.options import Recipe
from orchard.results import write_json

if TYPE_CHECKING:
    from orchard.secure.fixed_point import Vector
    from orchard.secure.member import Member
    from orchard.secure.signing import Roster, SigningKey

MAX_SUMS = 64
"""Sums that a site begins in one round: who begins anew until an order of neighbors suits him has
so many draws."""
_SUMS = "sums"


@dataclass(frozen=True)
class Waiting:
    """An update that was trained and not sent.

    Attributes:
        update: Whole.
        shapes: Of the global tree.
        tree_digest: Of the values that it was trained from.
        recipe_digest: Of the coordinator's recipe.
        bound: The largest absolute value that may be in it.
        least: Fewest members of a sum.
        num_neighbors: See ``secure.rules.Rules``.
    """

    update: Update
    shapes: Mapping[str, tuple[int, ...]]
    tree_digest: str
    recipe_digest: str
    bound: float
    least: int
    num_neighbors: int


@dataclass
class _Sum:
    """One sum, as this site is in it."""

    nonce: str
    member: Member
    vector: Vector
    answers: dict[str, tuple[str, Mapping[str, Any], bytes]] = field(default_factory=dict)


@dataclass(frozen=True)
class _Noted:
    """What is on disk of a run's newest round.

    Attributes:
        round: The round.
        nonces: Of the sums that were begun in it.
        survivors: Digest of whose updates are in the sum that this site told its shares of.
    """

    round: int = 0
    nonces: tuple[str, ...] = ()
    survivors: str = ""


class SiteSums:
    """The sums that one site is in: one at a time for each run."""

    def __init__(self, settings: SiteSettings, audit: AuditLog) -> None:
        """Be in none."""
        self._settings, self._audit = settings, audit
        self._waiting: dict[str, Waiting] = {}
        self._sums: dict[str, _Sum] = {}

    def check(self, recipe: Recipe) -> None:
        """Refuse a run that the owner's rules do not allow, before anything is trained.

        Raises:
            Refusal: The owner wants sums and it has none, or there are no keys for them.
        """
        floor = self._settings.consent.secure_least
        if not recipe.privacy.secure_aggregation:
            if floor:
                raise Refusal(
                    Code.SECRECY,
                    f"privacy.secure_aggregation must be true with --secure-least {floor}, got "
                    "false; the site's updates are not sent one by one",
                    option="privacy.secure_aggregation",
                )
            return
        signing, roster = self._keys
        assert signing
        if len(roster) < (fewest := max(floor, recipe.privacy.secure_least)):
            raise Refusal(
                Code.SECRECY,
                f"--peers must hold the keys of at least {fewest - 1} other sites, got "
                f"{len(roster) - 1}; the sum of fewer than {fewest} shows too much",
                option="privacy.secure_least",
            )

    def keep(self, run: str, waiting: Waiting) -> None:
        """Keep an update until it is asked for under masks; an older one is dropped."""
        self._waiting[run] = waiting

    def answer(self, request: SumRequest) -> tuple[Mapping[str, Any], bytes]:
        """Answer one question of a sum; the same one again with the same bytes.

        Raises:
            Refusal: The sum could show this site's own update, or this site is not in it any more.
        """
        run, kind = request.run, type(request).__name__
        asked = hashlib.sha256(repr(request).encode()).hexdigest()
        current = self._sums.get(run)
        if current and current.nonce == request.nonce and kind in current.answers:
            before, reply, body = current.answers[kind]
            if before != asked:
                raise Refusal(Code.SECRECY, f"{kind} must be asked once in a sum, got it anew")
            return reply, body
        try:
            own, body = self._answer(request, current)
        except Refusal:
            raise
        except ValueError as error:  # of what the coordinator passes on, or of the rules
            raise Refusal(Code.SECRECY, str(error)) from error
        reply = {"site": self._settings.name, **own}
        self._sums[run].answers[kind] = asked, reply, body
        self._audit.write(
            "summed",
            run=run,
            round=request.round,
            nonce=request.nonce,
            step=request.__struct_config__.tag,
            bytes=len(body),
            sha256=content_digest(body or json.dumps(reply).encode()),
        )
        return reply, body

    def _answer(self, request: SumRequest, current: _Sum | None) -> tuple[Mapping[str, Any], bytes]:
        if isinstance(request, SumKeys):
            return self._begin(request), b""
        if current is None or current.nonce != request.nonce:
            if request.run not in self._waiting:
                self._not_trained(request.round)
            raise Refusal(
                Code.LEFT_SUM,
                f"sum must be the one that this site is in, got {request.nonce[:12]}; it was "
                "restarted, or began another",
            )
        from orchard.engine import secret_words as words

        member = current.member
        if isinstance(request, SumShares):
            members = {name: words.read_keys(name, own) for name, own in request.members.items()}
            return words.shares_as_json(member.share(members)), b""
        if isinstance(request, SumVector):
            handed = words.read_handed(request.handed)
            masked = member.mask(request.sharing, handed, current.vector)
            current.vector = current.vector[:0]
            told = {"signature": masked.signature.hex(), "unreadable": list(masked.unreadable)}
            return told, words.vector_as_bytes(masked.vector)
        if isinstance(request, SumSurvivors):
            survivors = words.unhexed(request.survivors)
            self._check_survivors(request, survivors)
            return {"signature": member.confirm(survivors).hex()}, b""
        assert isinstance(request, SumEnd)
        revealed = member.reveal(words.unhexed(request.confirmed))
        # Before a share leaves: whose updates may be told apart is known after any restart.
        noted = self._noted(request.run)
        self._write(request.run, replace(noted, survivors=_digest_of(member.survivors)))
        return words.revealed_as_json(revealed), b""

    def _begin(self, request: SumKeys) -> Mapping[str, Any]:
        """Take part in a sum, the only one of its run from now on."""
        from orchard.engine import secret_words as words
        from orchard.secure.member import Member
        from orchard.secure.rules import Rules

        waiting = self._waiting.get(request.run)
        if waiting is None or waiting.update.round_number != request.round:
            self._not_trained(request.round)
        self._note_begin(request)
        try:
            written = words.written_as(waiting.shapes, waiting.bound, request)
            # Who has more examples than the coordinator's owner accepts counts for fewer.
            own = {name: min(w, request.max_weight) for name, w in waiting.update.weight.items()}
            vector = written.encode(waiting.update.delta, own)
        except ValueError as error:
            raise Refusal(Code.BEYOND_BOUND, str(error), option="privacy.secure_bound") from error
        terms = words.Terms(
            run=request.run,
            recipe_digest=waiting.recipe_digest,
            round_number=request.round,
            tree_digest=waiting.tree_digest,
            nonce=request.nonce,
            threshold=request.threshold,
            written=written,
            num_neighbors=waiting.num_neighbors,
        )
        least = max(waiting.least, self._settings.consent.secure_least)
        try:
            rules = Rules(least, request.threshold, waiting.num_neighbors)
        except ValueError as error:
            raise Refusal(Code.SECRECY, str(error), option="privacy.secure_neighbors") from error
        rules.check(request.num_members, "members of a sum")
        signing, roster = self._keys
        member = Member(self._settings.name, signing, roster, rules, terms.session())
        self._sums[request.run] = _Sum(request.nonce, member, vector)
        return words.keys_as_json(member.advertise())

    @staticmethod
    def _not_trained(number: int) -> NoReturn:
        raise Refusal(
            Code.NOT_TRAINED,
            f"an update of round {number} must be there, got none; it is trained again",
        )

    def _note_begin(self, request: SumKeys) -> None:
        """Write down that a sum is begun, before anything of it leaves."""
        noted = self._noted(request.run)
        if request.round < noted.round:
            raise Refusal(
                Code.SECRECY,
                f"sums must be of round {noted.round} or a later one, got {request.round}",
            )
        if request.round > noted.round:
            noted = _Noted(request.round)
        if request.nonce in noted.nonces:
            raise Refusal(
                Code.LEFT_SUM, f"sum {request.nonce[:12]} was begun before; this site has left it"
            )
        if len(noted.nonces) >= MAX_SUMS:
            raise Refusal(
                Code.SECRECY, f"sums of one round must be at most {MAX_SUMS}, got another"
            )
        self._sums.pop(request.run, None)
        self._write(request.run, replace(noted, nonces=(*noted.nonces, request.nonce)))

    def _check_survivors(self, request: SumSurvivors, survivors: Mapping[str, bytes]) -> None:
        before = self._noted(request.run).survivors
        if before and before != _digest_of(survivors):
            raise Refusal(
                Code.SECRECY,
                f"survivors of round {request.round} must be those of the sum that this site told "
                "its shares of, got others; the difference of both sums would show updates",
            )

    @cached_property
    def _keys(self) -> tuple[SigningKey, Roster]:
        """This site's key, and those of the sites that it sums with."""
        consent = self._settings.consent
        if not consent.signing_key or not consent.peers:
            raise Refusal(
                Code.SECRECY,
                "--keys and --peers must be given where updates are added in secret, got none: "
                "they say who this site is, and whose updates its own may be added to",
                option="--peers",
            )
        from orchard.deployment.peers import read_peers, read_signing_key

        try:
            own = read_signing_key(Path(consent.signing_key))
            return own, read_peers(Path(consent.peers), name=self._settings.name, own=own)
        except (ValueError, OSError) as error:
            raise Refusal(Code.SECRECY, str(error), option="--peers") from error

    def _path(self, run: str) -> Path:
        return self._settings.store / _SUMS / f"{folder_name(run)}.json"

    def _noted(self, run: str) -> _Noted:
        path = self._path(run)
        values = json.loads(path.read_text()) if path.exists() else {}
        return _Noted(**{**values, "nonces": tuple(values.get("nonces", ()))})

    def _write(self, run: str, noted: _Noted) -> None:
        path = self._path(run)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, asdict(noted))


def _digest_of(names: Mapping[str, bytes] | frozenset[str]) -> str:
    return hashlib.sha256(json.dumps(sorted(names)).encode()).hexdigest()
