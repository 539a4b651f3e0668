"""What a client says of the experts that it grafts."""

from __future__ import annotations

from orchard.experts.graft_search import LayerSearch
from orchard.strategies.flex import _share


def test_what_a_set_misses_is_a_share_of_the_layers_output() -> None:
    assert _share(LayerSearch(output_norm=4.0, sets={}), 1.0) == 0.25
    # A layer without any output misses nothing of it.
    assert _share(LayerSearch(output_norm=0.0, sets={}), 0.0) == 0.0
