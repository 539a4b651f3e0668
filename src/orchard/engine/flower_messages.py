"""How a request and its reply travel in Flower's records.

A request is a JSON header and a body of bytes, which is one whole encoded message: Flower cuts it
into chunks, and stores one that goes to many sites once. This module imports no model code: a
ClientApp process loads it for every message.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

_HEADER, _BODY, _STYPE = "header", "body", "orchard.message"


def pack(header: Mapping[str, Any], body: bytes) -> RecordDict:
    """Return the records that carry a header and a body."""
    records = RecordDict({_HEADER: ConfigRecord({"json": json.dumps(header, allow_nan=False)})})
    if body:
        records[_BODY] = ArrayRecord({"message": Array("uint8", (len(body),), _STYPE, body)})
    return records


def unpack(records: RecordDict) -> tuple[dict[str, Any], bytes]:
    """Return the header and body that records carry.

    Raises:
        ValueError: The records are of another app.
    """
    try:
        header = json.loads(str(records.config_records[_HEADER]["json"]))
        body = b""
        if _BODY in records:
            array = records.array_records[_BODY]["message"]
            if array.stype != _STYPE:
                raise ValueError(array.stype)
            body = array.data
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"records must be a message of orchard, got others ({error}); check that both sides "
            "run the same version"
        ) from error
    if not isinstance(header, dict):
        raise ValueError("header must be a JSON object, got another type; check who sent it")
    return header, body
