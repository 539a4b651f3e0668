"""What is said in a secure sum between sites, from the keys of a member to messages and back.

What its members must agree on is in the sum's session, which all that they sign has in it: a
coordinator who tells two of them different terms has no sum. With other weights or another bound
the updates of some would vanish in the sum and leave one; with another global tree a site would
train what tells of it alone (Pasquini et al., 2022, Eluding Secure Aggregation in Federated
Learning via Model Inconsistency).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from orchard.communication.sum_messages import (
    EndTold,
    HandedOn,
    Keys,
    KeysTold,
    SharesTold,
    SumKeys,
    VectorTold,
)
from orchard.secure.fixed_point import FixedPoint, Vector
from orchard.secure.rules import Advertisement, Handed, Masked, Revealed, Shared


@dataclass(frozen=True)
class Terms:
    """What all members of one sum must agree on.

    Attributes:
        run: Names the run.
        recipe_digest: Of its recipe, which has the bound and the number of neighbors.
        round_number: Whose updates are added.
        tree_digest: Of the global tree that they were trained from.
        nonce: Of this sum alone, in hexadecimal.
        threshold: So many members must answer to the end.
        written: How updates are written.
        num_neighbors: With how many others each masks; 0 = with all.
    """

    run: str
    recipe_digest: str
    round_number: int
    tree_digest: str
    nonce: str
    threshold: int
    written: FixedPoint
    num_neighbors: int

    def session(self) -> bytes:
        """Return 32 bytes that are other ones where any of it is."""
        own = self.written
        shapes = [[name, *own.shapes[name]] for name in own.names]
        parts = [
            *("orchard secure sum", self.run, self.recipe_digest, self.round_number),
            *(self.tree_digest, self.nonce, self.threshold, self.num_neighbors),
            *(own.num_members, float(own.max_weight).hex(), float(own.bound).hex()),
            hashlib.sha256(json.dumps(shapes).encode()).hexdigest(),
        ]
        return hashlib.sha256(json.dumps(parts).encode()).digest()

    def asked(self) -> dict[str, Any]:
        """Return what the question for keys says of the terms."""
        return {
            "num_members": self.written.num_members,
            "threshold": self.threshold,
            "max_weight": float(self.written.max_weight),
        }


def written_as(shapes: Mapping[str, tuple[int, ...]], bound: float, own: SumKeys) -> FixedPoint:
    """Return how updates are written by the terms of a question.

    Raises:
        ValueError: There is no such way.
    """
    return FixedPoint(shapes, bound, own.max_weight, own.num_members)


def keys_as_json(own: Advertisement) -> dict[str, str]:
    """Return a member's keys as they are sent."""
    return {
        "mask_key": own.mask_key.hex(),
        "share_key": own.share_key.hex(),
        "own_mask": own.own_mask.hex(),
        "signature": own.signature.hex(),
    }


def read_keys(name: str, own: Keys | KeysTold) -> Advertisement:
    """Return a member's keys."""
    hexed = (own.mask_key, own.share_key, own.own_mask, own.signature)
    return Advertisement(name, *map(bytes.fromhex, hexed))


def shares_as_json(own: Shared) -> dict[str, Any]:
    """Return a member's sealed shares as they are sent."""
    return {
        "sealed": hexed(own.sealed),
        "digests": {name: [part.hex() for part in both] for name, both in own.digests.items()},
    }


def read_shares(own: SharesTold) -> Shared:
    """Return a member's sealed shares."""
    digests = {name: _pair(both) for name, both in own.digests.items()}
    return Shared(own.site, unhexed(own.sealed), digests)


def handed_as_json(handed: Mapping[str, Handed]) -> dict[str, Any]:
    """Return what neighbors sealed for a member as it is passed on."""
    return {
        name: {"sealed": own.sealed.hex(), "digests": [part.hex() for part in own.digests]}
        for name, own in handed.items()
    }


def read_handed(handed: Mapping[str, HandedOn]) -> dict[str, Handed]:
    """Return what neighbors sealed for a member."""
    return {
        name: Handed(bytes.fromhex(own.sealed), _pair(own.digests)) for name, own in handed.items()
    }


def vector_as_bytes(vector: Vector) -> bytes:
    """Return a vector as it is sent: 4 bytes for each number, the lowest first."""
    return vector.astype("<u4").tobytes()


def read_vector(own: VectorTold, body: bytes, *, length: int) -> Masked:
    """Return a member's masked vector.

    Raises:
        ValueError: The body has not 4 bytes for each number.
    """
    if len(body) != 4 * length:
        raise ValueError(
            f"masked vector must have {4 * length} bytes, 4 for each of {length} numbers, got "
            f"{len(body)}"
        )
    vector = np.frombuffer(body, dtype="<u4").astype(np.uint32)
    return Masked(own.site, vector, bytes.fromhex(own.signature), tuple(own.unreadable))


def revealed_as_json(own: Revealed) -> dict[str, Any]:
    """Return what a member tells at the end as it is sent."""
    return {"own_masks": hexed(own.own_masks), "mask_keys": hexed(own.mask_keys)}


def read_revealed(own: EndTold) -> Revealed:
    """Return what a member tells at the end."""
    return Revealed(own.site, unhexed(own.own_masks), unhexed(own.mask_keys))


def unhexed(texts: Mapping[str, str]) -> dict[str, bytes]:
    """Return bytes that were sent in hexadecimal."""
    return {name: bytes.fromhex(text) for name, text in texts.items()}


def hexed(contents: Mapping[str, bytes]) -> dict[str, str]:
    """Return bytes as they are sent."""
    return {name: content.hex() for name, content in contents.items()}


def _pair(both: tuple[str, str]) -> tuple[bytes, bytes]:
    return bytes.fromhex(both[0]), bytes.fromhex(both[1])
