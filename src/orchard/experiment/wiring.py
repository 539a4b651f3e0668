"""A communication section becomes a channel."""

from __future__ import annotations

from orchard.communication.channel import Channel
from orchard.communication.quantization import Int8
from orchard.communication.sparsification import TopK
from orchard.communication.stages import DTYPES, Cast, Stage
from orchard.experiment.methods import check_strategy, has_part
from orchard.recipe.options import Recipe


def check_communication(recipe: Recipe) -> None:
    """Check that a method stands what its updates lose on the way.

    Raises:
        ValueError: An option is out of range, or updates lose too much for SCAFFOLD.
    """
    build_channel(recipe)
    options = recipe.communication
    if not has_part(check_strategy(recipe.strategy.name), "control"):
        return
    if options.top_k:
        raise ValueError(
            f"communication.top_k must be 0 with scaffold, got {options.top_k}; the server's "
            "control variate would miss most of what the clients' own have moved"
        )
    if options.dtype != "float32" and not options.feedback:
        raise ValueError(
            f"communication.feedback must be true with scaffold and {options.dtype}, got false; "
            "the server's control variate would drift away from the clients' own"
        )


def build_channel(recipe: Recipe) -> Channel:
    """Return the way between server and clients."""
    options = recipe.communication
    is_int8 = options.dtype == "int8"
    whole = Cast(DTYPES["bfloat16" if is_int8 else options.dtype])
    values: Stage = Int8() if is_int8 else whole
    # The server's control variate is a sum over rounds, in which bfloat16's errors add up too.
    has_sums = has_part(check_strategy(recipe.strategy.name), "control")
    loses = is_int8 or options.top_k > 0 or (has_sums and options.dtype == "bfloat16")
    return Channel(
        uplink=(TopK(options.top_k), values) if options.top_k else (values,),
        downlink=(whole,),
        differences=(values,) if options.downlink == "differences" else None,
        has_feedback=options.feedback and loses,
    )
