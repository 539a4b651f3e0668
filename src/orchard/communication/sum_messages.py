"""What a coordinator and a site say to each other in one secure sum; ``door.py`` reads it.

Five questions, each of which a site answers once: its keys, shares of its secrets, its masked
vector, whose vectors are in the sum, and at the end what takes the masks off. Bytes are in
hexadecimal, of a stated length, so that what comes is bounded before it is decoded; the masked
vector alone is a body.
"""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct

MAX_MEMBERS = 1000
"""Of one sum: what is said of all of them fits a header."""
_LARGEST_WEIGHT = 1e12

SiteName = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}\Z")]
RunName = Annotated[str, Meta(min_length=1, max_length=128)]
Key = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]
Digest = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]
Share = Annotated[str, Meta(pattern=r"^[0-9a-f]{132}\Z")]
Sealed = Annotated[str, Meta(pattern=r"^[0-9a-f]{320}\Z")]
Signature = Annotated[str, Meta(pattern=r"^([0-9a-f]{2}){1,128}\Z")]
Members = Annotated[list[SiteName], Meta(max_length=MAX_MEMBERS)]


class _Closed(Struct, frozen=True, forbid_unknown_fields=True):
    """What has these fields and no other."""


class Asked(_Closed, frozen=True):
    """What every question of a sum has.

    Attributes:
        run: Names the run.
        site: Who is asked.
        round: Whose updates are added.
        nonce: Of this sum alone.
    """

    run: RunName
    site: SiteName
    round: Annotated[int, Meta(ge=1, le=1_000_000)]
    nonce: Key


class SumKeys(Asked, frozen=True, tag_field="kind", tag="sum_keys"):
    """Asks for public keys of this sum alone.

    Attributes:
        num_members: How many there are at most, who have equal parts of the range.
        threshold: So many must answer to the end.
        max_weight: The largest weight of a name.
    """

    num_members: Annotated[int, Meta(ge=2, le=MAX_MEMBERS)]
    threshold: Annotated[int, Meta(ge=2, le=MAX_MEMBERS)]
    max_weight: Annotated[float, Meta(gt=0, le=_LARGEST_WEIGHT)]


class Keys(_Closed, frozen=True):
    """See ``secure.rules.Advertisement``."""

    mask_key: Key
    share_key: Key
    own_mask: Digest
    signature: Signature


class SumShares(Asked, frozen=True, tag_field="kind", tag="sum_shares"):
    """Asks for shares of a member's secrets, sealed for the others.

    Attributes:
        members: Who takes part, with its keys.
    """

    members: Annotated[dict[SiteName, Keys], Meta(max_length=MAX_MEMBERS)]


class HandedOn(_Closed, frozen=True):
    """See ``secure.rules.Handed``."""

    sealed: Sealed
    digests: tuple[Digest, Digest]


class SumVector(Asked, frozen=True, tag_field="kind", tag="sum_vector"):
    """Asks for the masked vector.

    Attributes:
        sharing: Who shared secrets.
        handed: Neighbor to what it sealed for this member.
    """

    sharing: Members
    handed: Annotated[dict[SiteName, HandedOn], Meta(max_length=MAX_MEMBERS)]


class SumSurvivors(Asked, frozen=True, tag_field="kind", tag="sum_survivors"):
    """Asks to sign whose vectors are in the sum.

    Attributes:
        survivors: Member to what it signed of who shared secrets.
    """

    survivors: Annotated[dict[SiteName, Signature], Meta(max_length=MAX_MEMBERS)]


class SumEnd(Asked, frozen=True, tag_field="kind", tag="sum_end"):
    """Asks for what takes the masks off the sum.

    Attributes:
        confirmed: Member to what it signed of the survivors.
    """

    confirmed: Annotated[dict[SiteName, Signature], Meta(max_length=MAX_MEMBERS)]


SumRequest = SumKeys | SumShares | SumVector | SumSurvivors | SumEnd


class KeysTold(Keys, frozen=True):
    """Answers ``SumKeys``.

    Attributes:
        site: Who answers.
    """

    site: SiteName


class SharesTold(_Closed, frozen=True):
    """Answers ``SumShares``; see ``secure.rules.Shared``.

    Attributes:
        site: Who answers.
        sealed: Neighbor to what only that one can read.
        digests: Holder to the digests of its two shares.
    """

    site: SiteName
    sealed: Annotated[dict[SiteName, Sealed], Meta(max_length=MAX_MEMBERS)]
    digests: Annotated[dict[SiteName, tuple[Digest, Digest]], Meta(max_length=MAX_MEMBERS)]


class VectorTold(_Closed, frozen=True):
    """Answers ``SumVector``; the body is the masked vector, 4 bytes for each number.

    Attributes:
        site: Who answers.
        signature: Of who shared secrets.
        unreadable: Neighbors whose shares were not what they should be.
    """

    site: SiteName
    signature: Signature
    unreadable: Members


class SurvivorsTold(_Closed, frozen=True):
    """Answers ``SumSurvivors``.

    Attributes:
        site: Who answers.
        signature: Of the survivors.
    """

    site: SiteName
    signature: Signature


class EndTold(_Closed, frozen=True):
    """Answers ``SumEnd``; see ``secure.rules.Revealed``.

    Attributes:
        site: Who answers.
        own_masks: Survivor to a share.
        mask_keys: Member who left to a share.
    """

    site: SiteName
    own_masks: Annotated[dict[SiteName, Share], Meta(max_length=MAX_MEMBERS)]
    mask_keys: Annotated[dict[SiteName, Share], Meta(max_length=MAX_MEMBERS)]


SumReply = KeysTold | SharesTold | VectorTold | SurvivorsTold | EndTold
