"""How a request and its reply travel in Flower's records.

A request is a JSON header and a body of bytes, which is one whole encoded message. A large one is
an array, which Flower cuts into chunks, and stores once where it goes to many sites. A small one
stands beside its header: every object of a message is a question to the SuperLink at each end, and
a message is three of them then instead of six. This module imports no model code:
who only carries messages needs none.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from orchard.communication.door import read_header_text
from orchard.communication.readable import readable

_HEADER, _BODY, _STYPE = "header", "body", "orchard.message"
_SMALL_BYTES = 1 << 18


def pack(header: Mapping[str, Any], body: bytes) -> RecordDict:
    """Return the records that carry a header and a body."""
    text = json.dumps(header, allow_nan=False)
    if 0 < len(body) <= _SMALL_BYTES:
        return RecordDict({_HEADER: ConfigRecord({"json": text, _BODY: bytes(body)})})
    records = RecordDict({_HEADER: ConfigRecord({"json": text})})
    if body:
        records[_BODY] = ArrayRecord({"message": Array("uint8", (len(body),), _STYPE, body)})
    return records


def unpack(records: RecordDict) -> tuple[dict[str, Any], bytes]:
    """Return the header and body that records carry.

    Raises:
        ValueError: The records are of another app.
    """
    try:
        text = records.config_records[_HEADER]["json"]
        if not isinstance(text, str):
            raise TypeError("a header that is no text")
        body = records.config_records[_HEADER].get(_BODY, b"")
        if not isinstance(body, bytes):
            raise TypeError("a body that is no bytes")
        if _BODY in records:
            array = records.array_records[_BODY]["message"]
            if array.stype != _STYPE:
                raise ValueError("arrays of another kind")
            body = array.data
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"records must be a message of orchard, got others ({readable(str(error))}); check "
            "that both sides run the same version"
        ) from error
    return read_header_text(text), body
