"""The switch of each request: `extra_args={"shareprefill": "off"}`, or a policy.

A step's metadata says nothing of requests' parameters, but vLLM tells logits processors from
outside which requests come and where they stand. This one changes no logits; it keeps the
switches by their requests' places: a row of the batch, or with Model Runner V2 a slot in its table.
"""

# vLLM lives in an environment of its own: it is not there where types are checked.
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

from __future__ import annotations

from typing import Any

from torch import Tensor
from vllm import SamplingParams
from vllm.v1.sample import logits_processor as v1
from vllm.v1.sample.logits_processor.builtin import process_dict_updates

from shareprefill.errors import ConfigError, UnsupportedError
from shareprefill.vllm.options import (
    NAME,
    OFF,
    SWITCH_VARIABLE,
    check_switch,
    refuse_misspelt,
    switch_is_on,
)

try:
    from vllm.v1.worker.gpu.sample import logits_processor as v2
except ImportError:  # vLLM 0.24: its second model runner has none.
    v2 = None

_INTERFACES: tuple[type, ...] = (v1.LogitsProcessor, *(() if v2 is None else (v2.LogitsProcessor,)))


class RequestSwitch(*_INTERFACES):
    """Keeps the switches of an engine's core, by the interfaces of both model runners.

    It is made before the model's layers are, so an engine that cannot be served fails here.
    """

    def __init__(self, vllm_config: Any, *_states: Any) -> None:
        from shareprefill.vllm.engine import core_of

        core = core_of(vllm_config)
        self._switches: dict[int, str] = {} if core is None else core.switches
        # A rank of a pipeline may hold no attention.
        is_whole = vllm_config.parallel_config.pipeline_parallel_size == 1
        self._uncalled = core if is_whole else None

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Refuses a request whose switch is not known, before it is queued.

        One that is switched off reads no cached prefix: sparse prefills may have left it.

        Raises:
            ValueError: as vLLM expects it, for an answer with status 400.
        """
        switch = _switch_of(sampling_params)
        if switch is not None and not switch_is_on():
            raise ValueError(
                f"extra_args[{NAME!r}] is set, and this engine has no switch for single requests "
                f"({SWITCH_VARIABLE}=off)"
            )
        try:
            refuse_misspelt("the key of extra_args", sampling_params.extra_args or ())
            check_switch(switch)
        except ConfigError as error:
            raise ValueError(str(error)) from error
        if switch == OFF:
            sampling_params.skip_reading_prefix_cache = True

    def apply(self, logits: Tensor, *_context: Any) -> Tensor:
        """Logits as they are."""
        return logits

    def is_argmax_invariant(self) -> bool:
        """True: V1 need not call `apply` for greedy requests."""
        return True

    def update_state(self, batch_update: Any) -> None:
        """V1: follows a change of the batch, before a step's metadata is made."""
        self._require_calls()
        process_dict_updates(self._switches, batch_update, lambda params, *_: _switch_of(params))

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        """V2: a request takes a slot over. False: its logits stay as they are."""
        self._require_calls()
        self._switches.pop(req_idx, None)
        switch = _switch_of(sampling_params)
        if switch is not None:
            self._switches[req_idx] = switch
        return False

    def _require_calls(self) -> None:
        """Refuses requests, once the model is loaded, where a backend of its own is all it has.

        Raises:
            UnsupportedError: no layer calls us.
        """
        core, self._uncalled = self._uncalled, None
        if core is not None and not core.is_called:
            raise UnsupportedError(
                "shareprefill would compute nothing in this engine: no layer of the model takes "
                "the backend that --attention-backend names; run it without shareprefill"
            )


def _switch_of(params: SamplingParams) -> str | None:
    return (params.extra_args or {}).get(NAME)
