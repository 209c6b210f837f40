"""How a head's blocks are chosen: one policy a file, all behind one interface (`base`).

Attention sinks take the same share of all masses of a row: they change no choice, and no policy
looks at them.
"""

from __future__ import annotations

from collections.abc import Callable

from shareprefill.runtime.policies.antidiagonal import Antidiagonal
from shareprefill.runtime.policies.base import LayerInputs, Selection, SelectionPolicy
from shareprefill.runtime.policies.decompose import Decompose
from shareprefill.runtime.policies.dense import Dense
from shareprefill.runtime.policies.flash import Flash
from shareprefill.runtime.policies.flex import Flex
from shareprefill.runtime.policies.oracle import Oracle
from shareprefill.runtime.policies.pooled import Pooled
from shareprefill.runtime.policies.sampled import Sampled
from shareprefill.runtime.policies.smoothed import Level, Smoothed
from shareprefill.runtime.policies.streaming import Streaming
from shareprefill.runtime.policies.vertical_slash import VerticalSlash

POLICIES: dict[str, Callable[..., SelectionPolicy]] = {
    "antidiagonal": Antidiagonal,
    "decompose": Decompose,
    "dense": Dense,
    "flash": Flash,
    "flex": Flex,
    "level": Level,
    "oracle": Oracle,
    "pooled": Pooled,
    "sampled": Sampled,
    "smoothed": Smoothed,
    "streaming": Streaming,
    "vertical-slash": VerticalSlash,
}
"""Name of every selection policy, and what makes it (keyword arguments are its parameters)."""

__all__ = ["POLICIES", "LayerInputs", "Selection", "SelectionPolicy"]
