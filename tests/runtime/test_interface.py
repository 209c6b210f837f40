from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers.modeling_outputs import CausalLMOutputWithPast

from shareprefill import share_prefill
from shareprefill.config import RuntimeConfig
from shareprefill.errors import ConfigError, UnsupportedError
from shareprefill.runtime import attachment, family_attention, interface, masks
from shareprefill.runtime.interface import AttentionCall, attached, dense_attention
from shareprefill.runtime.masks import FactMask, bool_mask
from tests.support.families import FAMILIES, build
from tests.support.tiny import tiny_artifact, tiny_llama, token_ids

CLOSE: Any = {"rtol": 1e-4, "atol": 1e-4}
# The keyword under which models take a cache; transformers 5.24 has renamed it.
CACHE = "cache" if hasattr(CausalLMOutputWithPast, "cache") else "past_key_values"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_llama()


@torch.no_grad()
def logits(model: Any, handler: Any = None, **inputs: Any) -> torch.Tensor:
    if handler is None:
        return model(**inputs).logits
    with attached(model, handler):
        return model(**inputs).logits


def padded(lengths: list[int], *, left: bool) -> dict[str, torch.Tensor]:
    width = max(lengths)
    ids, mask = token_ids(len(lengths), width), torch.zeros(len(lengths), width, dtype=torch.int64)
    for row, length in enumerate(lengths):
        mask[row, width - length :] = 1
        if not left:
            mask[row] = mask[row].flip(0)
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("tokens", [1, 2, 63, 130])
def test_dense_handler_gives_the_models_own_logits(model: Any, tokens: int) -> None:
    ids = token_ids(2, tokens)
    torch.testing.assert_close(
        logits(model, dense_attention, input_ids=ids), logits(model, input_ids=ids), **CLOSE
    )


@pytest.mark.parametrize("left", [True, False])
def test_dense_handler_respects_padding(model: Any, left: bool) -> None:
    inputs = padded([5, 40, 33, 1], left=left)
    real = inputs["attention_mask"].bool()
    found, own = logits(model, dense_attention, **inputs), logits(model, **inputs)
    torch.testing.assert_close(found[real], own[real], **CLOSE)


def test_dense_handler_respects_holes_in_the_padding(model: Any) -> None:
    inputs = padded([40, 40], left=True)
    inputs["attention_mask"][0, 7:12] = 0
    real = inputs["attention_mask"].bool()
    found, own = logits(model, dense_attention, **inputs), logits(model, **inputs)
    torch.testing.assert_close(found[real], own[real], **CLOSE)


@pytest.mark.parametrize("window", [3, 24, 200])
def test_dense_handler_respects_sliding_windows(window: int) -> None:
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(1)
    mistral = MistralForCausalLM(
        MistralConfig(
            vocab_size=128,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            sliding_window=window,
            initializer_range=0.3,
        )
    ).eval()
    inputs = padded([100, 57], left=True)
    real = inputs["attention_mask"].bool()
    found, own = logits(mistral, dense_attention, **inputs), logits(mistral, **inputs)
    torch.testing.assert_close(found[real], own[real], **CLOSE)


def test_dense_handler_serves_chunks_and_generation(model: Any) -> None:
    from transformers import DynamicCache

    ids = token_ids(1, 50)
    own = logits(model, input_ids=ids)
    cache = DynamicCache(config=model.config)
    with attached(model, dense_attention), torch.no_grad():
        pieces = [
            model(input_ids=piece, **{CACHE: cache}).logits
            for piece in ids.split([20, 1, 7, 22], dim=1)
        ]
        generated = model.generate(ids, max_new_tokens=5, do_sample=False)
    torch.testing.assert_close(torch.cat(pieces, 1), own, **CLOSE)
    assert torch.equal(generated, model.generate(ids, max_new_tokens=5, do_sample=False))


LENGTHS = [25, 1, 34, 15]


def packed(rows: int = 1) -> dict[str, Any]:
    """Sequences one after the other, as their positions tell."""
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    return {
        "input_ids": token_ids(rows, sum(LENGTHS)),
        "position_ids": positions,
        "use_cache": False,
    }


def apart(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Logits of the packed sequences of one row, each alone."""
    return torch.cat([logits(model, input_ids=piece) for piece in ids.split(LENGTHS, dim=1)], dim=1)


def bounds(*lengths: int) -> torch.Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0).int()


@pytest.mark.parametrize("name", ["llama", "mistral (sliding window)", "gemma2", "llama4_text"])
def test_packed_sequences_are_taken_apart(name: str) -> None:
    model = own_family(name)
    model.set_attn_implementation("eager")
    seen: dict[int, int] = {}

    def handler(call: AttentionCall) -> torch.Tensor:
        seen[call.layer] = len(call.sequences() or ())
        return dense_attention(call)

    inputs = packed(rows=2)
    found, own = logits(model, handler, **inputs), logits(model, **inputs)
    torch.testing.assert_close(found, own, **CLOSE)
    assert not torch.allclose(own, logits(model, input_ids=inputs["input_ids"]), **CLOSE)
    # Chunks that are counted from the start of each sequence stay with transformers' mask.
    expected = {0: 0, 1: 8} if name == "llama4_text" else dict.fromkeys(seen, 8)
    assert seen == expected


@pytest.mark.parametrize("name", ["llama", "gpt_oss"])
def test_varlen_arguments_name_packed_sequences(name: str) -> None:
    model = own_family(name)
    model.set_attn_implementation("eager")
    inputs = {**packed(), "use_cache": True}
    lengths = {"cu_seq_lens_q": bounds(*LENGTHS), "cu_seq_lens_k": bounds(*LENGTHS)}
    longest = {"max_length_q": 34, "max_length_k": 34}
    found = logits(model, dense_attention, **inputs, **lengths, **longest)
    torch.testing.assert_close(found, apart(model, inputs["input_ids"]), **CLOSE)


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"cu_seq_lens_q": bounds(25, 1, 34)}, ConfigError, "ascend from 0 to the number of tok"),
        ({"cu_seq_lens_q": bounds(26, -1, 50)}, ConfigError, "ascend from 0 to the number of tok"),
        ({"cu_seq_lens_q": bounds(25, 50)}, ConfigError, "divide the tokens in different ways"),
        ({"cu_seq_lens_k": bounds(75)}, ConfigError, "cu_seq_lens_k differs"),
        ({"attention_mask": torch.arange(75)[None] > 3}, ConfigError, "leave attention_mask"),
        ({"input_ids": torch.zeros(2, 75).long()}, UnsupportedError, "for one row"),
    ],
)
def test_varlen_arguments_that_do_not_fit_are_refused(
    model: Any, changes: dict[str, Any], error: type[Exception], text: str
) -> None:
    inputs = {**packed(), "cu_seq_lens_q": bounds(*LENGTHS), **changes}
    with pytest.raises(error, match=text):
        logits(model, dense_attention, **inputs)


def test_a_mask_that_is_more_than_packed_is_transformers_own(model: Any) -> None:
    from transformers.masking_utils import causal_mask_function, create_causal_mask

    def other(batch: Any, head: Any, query: Any, key: Any) -> Any:
        return key != 3

    inputs = {
        "attention_mask": None,
        CACHE: None,
        "inputs_embeds": torch.zeros(1, 9, 1),
    }
    with attached(model, dense_attention):
        mask: Any = create_causal_mask(model.config, **inputs, and_mask_function=other)
        assert not isinstance(mask, FactMask)
        assert mask[0, 0].equal(torch.ones(9, 9).tril().bool() & (torch.arange(9) != 3))
        positions = torch.cat([torch.arange(4), torch.arange(5)])[None]
        both: Any = create_causal_mask(
            model.config, **inputs, position_ids=positions, and_mask_function=other
        )
        assert not isinstance(both, FactMask)
        plain = create_causal_mask(model.config, **inputs, position_ids=positions)
        assert isinstance(plain, FactMask)
    assert both[0, 0].sum() < bool_mask(plain.facts, 1, slice(0, 9), slice(0, 9), CPU).sum()
    assert masks._packed_sequences(causal_mask_function) is None


def test_static_cache(model: Any) -> None:
    from transformers import StaticCache

    ids = token_ids(1, 40)
    own = logits(model, input_ids=ids)
    cache = StaticCache(config=model.config, max_cache_len=64)
    found = logits(model, dense_attention, input_ids=ids, **{CACHE: cache})
    torch.testing.assert_close(found, own, **CLOSE)


def test_sequences_cut_the_padding_off(model: Any) -> None:
    seen: list[list[tuple[int, int, int]]] = []

    def handler(call: AttentionCall) -> torch.Tensor:
        sequences = call.sequences()
        assert sequences is not None
        if call.layer == 0:
            seen.append([(s.row, s.query.start, s.query.stop) for s in sequences])
        return dense_attention(call)

    logits(model, handler, **padded([5, 9], left=True))
    logits(model, handler, **padded([5, 9], left=False))
    assert seen == [[(0, 4, 9), (1, 0, 9)], [(0, 0, 5), (1, 0, 9)]]


def test_attention_implementation_is_restored(model: Any) -> None:
    before = model.config._attn_implementation

    def interrupted() -> None:
        with attached(model, dense_attention):
            assert model.config._attn_implementation == "shareprefill"
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert model.config._attn_implementation == before


def test_nested_contexts_use_the_innermost_handler(model: Any) -> None:
    calls: list[str] = []

    def named(name: str) -> Any:
        def handler(call: AttentionCall) -> torch.Tensor:
            calls.append(name)
            return dense_attention(call)

        return handler

    ids = token_ids(1, 8)
    with torch.no_grad(), attached(model, named("outer")):
        with attached(model, named("inner")):
            model(input_ids=ids)
        model(input_ids=ids)
    assert calls == ["inner"] * 3 + ["outer"] * 3


def test_another_implementation_inside_a_session_is_refused(model: Any) -> None:
    before = model.config._attn_implementation
    with attached(model, dense_attention), torch.no_grad():
        model.set_attn_implementation("eager")
        with pytest.raises(UnsupportedError, match="'eager' inside a session.* leave the session"):
            model(input_ids=token_ids(1, 8))
    assert model.config._attn_implementation == before
    logits(model, input_ids=token_ids(1, 8))


def test_gradients_are_refused(model: Any) -> None:
    with (
        attached(model, dense_attention),
        pytest.raises(UnsupportedError, match=r"torch\.no_grad"),
    ):
        model(input_ids=token_ids(1, 8))


@pytest.mark.parametrize("where", ["eager", "sdpa", "configuration", "generate", "gpt2"])
def test_attention_weights_are_refused_and_given_in_a_dense_call(where: str) -> None:
    model = own_family("gpt2") if where == "gpt2" else tiny_llama()
    model.set_attn_implementation("sdpa" if where == "sdpa" else "eager")
    options: dict[str, Any] = {"output_attentions": True}
    if where == "configuration":
        model.config.output_attentions, options = True, {}
    call = model
    if where == "generate":
        call, options["return_dict_in_generate"] = model.generate, True
    ids = token_ids(1, 8, vocabulary=64)
    with share_prefill(model, policy="smoothed") as session, torch.no_grad():
        with pytest.raises(UnsupportedError, match=r"output_attentions.*session\.dense\(\)"):
            call(ids, **options)
        with session.dense():
            found = call(ids, **options).attentions
        model(ids, output_attentions=False)
    with torch.no_grad():
        own = call(ids, **options).attentions
    assert len(found) == len(own)
    torch.testing.assert_close(found, own, rtol=0, atol=0)


def own_family(name: str, **changes: Any) -> Any:
    return build(next(family for family in FAMILIES if family.name == name), **changes)


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss"])
@pytest.mark.parametrize("rows", [1, 7, 1024])
def test_soft_capping_and_sinks_run_with_the_models_own_function(
    name: str, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(family_attention, "_ROWS", rows)
    own = own_family(name)
    # transformers 5.17 takes SDPA for Gemma 2 by itself, which leaves the soft-cap out.
    own.set_attn_implementation("eager")
    reasons: list[str | None] = []

    def handler(call: AttentionCall) -> torch.Tensor:
        reasons.append(call.needs_family)
        assert call.is_shareable == (call.facts is not None and call.facts.window is None)
        return dense_attention(call)

    holes = padded([60, 60], left=True)
    holes["attention_mask"][0, 7:12] = 0
    positions = torch.cat([torch.arange(25), torch.arange(35)])[None]
    packed = {"input_ids": token_ids(1, 60), "position_ids": positions, "use_cache": False}
    left, right = padded([60, 33, 1], left=True), padded([60, 33, 1], left=False)
    for inputs in (left, right, holes, packed, {"input_ids": token_ids(1, 1)}):
        real = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
        found, expected = logits(own, handler, **inputs), logits(own, **inputs)
        torch.testing.assert_close(found[real], expected[real], **CLOSE)
    what = {"gemma2": "logit soft-capping", "gpt_oss": "attention sinks"}
    assert set(reasons) == {what[name]}


def capped(module: Any, query: Any, key: Any, value: Any, mask: Any, **options: Any) -> Any:
    """A family's function that halves the logits beside capping them."""
    logits = query @ key.repeat_interleave(2, 1).transpose(2, 3) * options["scaling"]
    logits = options["softcap"] * torch.tanh(options["halved"] * logits / options["softcap"])
    weights = torch.softmax(logits + mask, -1)
    return (weights @ value.repeat_interleave(2, 1)).transpose(1, 2), None


@pytest.mark.parametrize("softcap", [0.5, 30.0])
@pytest.mark.parametrize("halved", [1.0, 0.5])
def test_options_mean_what_the_familys_function_makes_of_them(
    softcap: float, halved: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    def function(*args: Any, softcap: float, **options: Any) -> Any:
        return capped(*args, softcap=softcap, **options, halved=halved)

    monkeypatch.setattr(family_attention, "_family_function", lambda _: function)
    module = torch.nn.Module()
    query, key, value = torch.randn(1, 4, 9, 8), torch.randn(1, 2, 9, 8), torch.randn(1, 2, 9, 6)
    found = family_attention.known_extras(module, query, key, value, 0.3, {"softcap": softcap})
    assert found == (family_attention.LogitExtras(softcap) if halved == 1.0 else None)


def test_only_soft_caps_and_sinks_of_the_right_kind_are_known() -> None:
    attention = own_family("gpt_oss").model.layers[0].self_attn
    query, key = torch.randn(1, 4, 9, 16), torch.randn(1, 2, 9, 16)

    def known(**options: Any) -> Any:
        return family_attention.known_extras(attention, query, key, key, 0.25, options)

    assert known(s_aux=attention.sinks) == family_attention.LogitExtras(None, attention.sinks)
    # The function takes its module's sinks, whatever is handed to it.
    family_attention._meanings.clear()
    assert known(s_aux=attention.sinks + 3) is None
    assert known(s_aux=attention.sinks[:2]) is None
    assert known(s_aux=attention.sinks, softcap=-1.0) is None
    assert known(s_aux=attention.sinks, is_causal=False) is None
    family_attention._meanings.clear()


def test_own_functions_get_few_rows_of_long_prompts() -> None:
    module, options = torch.nn.Module(), {"softcap": 2.0}
    query, key = torch.empty(1, 32, 9000, 1), torch.empty(1, 8, 131072, 1)
    assert family_attention.rows_at_once(module, query, key, options) == 16
    # What is not known may hold something for every row, so all rows stay together.
    options["position_bias"] = torch.zeros(1)
    assert family_attention.rows_at_once(module, query, key, options) == 9000


def eager_attention_forward(
    module: Any, query: Any, key: Any, value: Any, mask: Any, temperature: float = 1.0, **_: Any
) -> tuple[torch.Tensor, None]:
    """Found as the own function of modules whose class is from this file."""
    if mask is None:
        return torch.zeros_like(value).transpose(1, 2), None
    out = (mask == 0).to(value.dtype) @ value
    return (out * temperature).transpose(1, 2), None


class Module(torch.nn.Module):
    layer_idx = 0


def call_attention(module: Any, **options: Any) -> torch.Tensor:
    query = key = value = torch.ones(1, 2, 5, 4)
    attachment._of_module[module] = (attachment.Attachment(dense_attention),)
    return interface._attention(module, query, key, value, None, **options)[0]


def test_an_option_that_the_own_function_reads_is_handed_to_it() -> None:
    out = call_attention(Module(), temperature=3.0, use_cache=False)
    # The function counts what may be read: causal, from the first key.
    assert out[0, :, 0, 0].tolist() == [3.0, 6.0, 9.0, 12.0, 15.0]
    assert call_attention(Module(), temperature=None)[0, :, 0, 0].tolist() == [1.0] * 5


@pytest.mark.parametrize("option", ["indices", "position_bias", "cache", "s_aux"])
def test_an_option_that_nothing_reads_is_refused(option: str) -> None:
    # Of a file without an own function.
    foreign: Any = torch.nn.Linear(1, 1)
    foreign.layer_idx = 0
    with pytest.raises(UnsupportedError, match="Module uses .* without a session"):
        call_attention(Module(), **{option: torch.zeros(1)})
    with pytest.raises(UnsupportedError, match="Linear uses .* without a session"):
        call_attention(foreign, softcap=1.0)


def test_an_option_beside_sinks_is_refused() -> None:
    attention = own_family("gpt_oss").model.layers[0].self_attn
    assert family_attention.needs_family(attention, {"s_aux": 1.0}) == "attention sinks"
    with pytest.raises(UnsupportedError, match="'position_bias' and attention sinks"):
        family_attention.needs_family(attention, {"s_aux": 1.0, "position_bias": 1.0})


def test_attention_that_is_not_causal_runs_with_the_own_function() -> None:
    assert call_attention(Module(), is_causal=False).abs().sum() == 0
    module = Module()
    module.is_causal = False
    assert call_attention(module).abs().sum() == 0
    assert call_attention(module, is_causal=True).abs().sum() == 5 * 8


def test_a_family_with_its_own_attention_is_refused() -> None:
    from transformers import GPTNeoConfig, GPTNeoForCausalLM

    own = GPTNeoForCausalLM(
        GPTNeoConfig(
            vocab_size=64,
            hidden_size=32,
            num_layers=2,
            num_heads=2,
            attention_types=[[["global"], 2]],
            intermediate_size=48,
        )
    ).eval()
    with pytest.raises(UnsupportedError, match="GPTNeoForCausalLM"):
        logits(own, dense_attention, input_ids=token_ids(1, 8, vocabulary=64))


def test_one_whole_sequence_is_not_copied() -> None:
    """A prefill of one sequence, in chunks or not, takes no second pass over its output."""
    made: list[torch.Tensor] = []

    def attend(sequence: masks.Sequence) -> torch.Tensor:
        made.append(torch.randn(4, sequence.lengths[0], 16))
        return made[-1]

    def put_together(padding: torch.Tensor | None, batch: int) -> torch.Tensor:
        made.clear()
        query, key = torch.randn(batch, 4, 6, 16), torch.randn(batch, 2, 10, 16)
        facts = masks.MaskFacts(4, 0, padding, None)
        mask = FactMask.make((batch, 1, 6, 10), CPU, facts)
        call = AttentionCall(torch.nn.Identity(), 0, query, key, key, mask, 0.25, {})
        sequences = call.sequences()
        assert sequences is not None
        return interface.by_sequence(call, sequences, attend)

    assert put_together(None, 1).data_ptr() == made[0].data_ptr()
    out = put_together(None, 2)
    assert torch.equal(out, torch.stack(made))
    padding = torch.ones(1, 10, dtype=torch.bool)
    padding[:, 8:] = False
    out = put_together(padding, 1)
    assert torch.equal(out[0, :, :4], made[0])
    assert not out[0, :, 4:].any()


REARRANGEMENTS: dict[str, Callable[[torch.Tensor], Any]] = {
    "repeat": lambda mask: mask.repeat(1, 4, 1, 1),
    "expand": lambda mask: mask.expand(-1, 4, -1, -1),
    "and": lambda mask: mask & torch.ones_like(mask).bool(),
    "cut": lambda mask: mask[:, :, -40:, :][..., :40],
    "as logits": lambda mask: torch.zeros(mask.shape).masked_fill(~mask, float("-inf")),
    "through numpy": lambda mask: torch.from_numpy(mask.numpy().copy()),
    "written to": lambda mask: mask.clone().logical_and_(torch.ones(40, 40).tril(-1) == 0),
}


@pytest.mark.parametrize("name", REARRANGEMENTS)
def test_layers_that_compute_with_the_mask_see_no_future(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.llama.modeling_llama import LlamaAttention

    own_forward = LlamaAttention.forward

    def forward(self: Any, hidden_states: Any, *, attention_mask: Any, **options: Any) -> Any:
        mask = REARRANGEMENTS[name](attention_mask)
        return own_forward(self, hidden_states, attention_mask=mask, **options)

    monkeypatch.setattr(LlamaAttention, "forward", forward)
    model = tiny_llama()
    model.set_attn_implementation("sdpa")
    inputs = padded([40, 31], left=True)
    real = inputs["attention_mask"].bool()
    found, own = logits(model, dense_attention, **inputs), logits(model, **inputs)
    torch.testing.assert_close(found[real], own[real], **CLOSE)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_session_gives_masks_in_the_form_of_the_models_implementation(
    implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.llama.modeling_llama import LlamaAttention

    own_forward = LlamaAttention.forward
    seen = set()

    def forward(self: Any, hidden_states: Any, *, attention_mask: Any, **options: Any) -> Any:
        seen.add(attention_mask.dtype)
        if not attention_mask.dtype.is_floating_point:
            attention_mask = torch.zeros(attention_mask.shape).masked_fill(~attention_mask, -1e9)
        penalty = 0.1 * torch.arange(attention_mask.shape[-1])
        return own_forward(self, hidden_states, attention_mask=attention_mask + penalty, **options)

    monkeypatch.setattr(LlamaAttention, "forward", forward)
    model = tiny_llama()
    model.set_attn_implementation(implementation)
    inputs = padded([40, 31], left=True)
    real = inputs["attention_mask"].bool()
    found, own = logits(model, dense_attention, **inputs), logits(model, **inputs)
    torch.testing.assert_close(found[real], own[real], **CLOSE)
    assert seen == {torch.bool if implementation == "sdpa" else torch.float32}


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("cached", ["dynamic", "static", "none"])
@pytest.mark.parametrize("padding", [0, 4])
@pytest.mark.parametrize("difference", [-25, -3, 3])
def test_masks_of_another_length_than_the_keys_do_what_the_model_makes_of_them(
    model: Any, implementation: str, cached: str, padding: int, difference: int
) -> None:
    from transformers import DynamicCache, StaticCache

    model.set_attn_implementation(implementation)
    ids = token_ids(2, 40)
    mask = torch.ones(2, 40 + difference, dtype=torch.int64)
    mask[1, :padding] = 0

    @torch.no_grad()
    def run() -> torch.Tensor | str:
        cache: Any = None
        tokens = ids
        if cached != "none":
            config = model.config
            cache = (
                DynamicCache(config=config)
                if cached == "dynamic"
                else StaticCache(config=config, max_cache_len=64)
            )
            model(ids[:, :20], attention_mask=mask[:, :20], **{CACHE: cache})
            tokens = ids[:, 20:]
        options = {CACHE: cache, "use_cache": cached != "none"}
        try:
            found = model(tokens, attention_mask=mask, **options).logits
            return found if cached != "none" else found[:, padding:]
        except (RuntimeError, IndexError, ConfigError) as error:
            return type(error).__name__

    own = run()
    with attached(model, dense_attention):
        found = run()
    model.set_attn_implementation("sdpa")
    if isinstance(own, str):
        # What the model cannot run, a session refuses with a reason.
        assert found in ("ConfigError", own)
    else:
        assert isinstance(found, torch.Tensor), found
        torch.testing.assert_close(found, own, **CLOSE)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_pass_in_which_no_layer_calls_ours_is_refused(
    compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.llama.modeling_llama import LlamaAttention

    own_forward, model = LlamaAttention.forward, tiny_llama()

    def by_hand(self: Any, hidden_states: Any, **_: Any) -> Any:
        return self.o_proj(self.q_proj(hidden_states)), None

    def hybrid(self: Any, hidden_states: Any, **options: Any) -> Any:
        forward = own_forward if self.layer_idx == 2 else by_hand
        return forward(self, hidden_states, **options)

    run: Any = torch.compile(model, backend="eager") if compiled else model
    monkeypatch.setattr(LlamaAttention, "forward", by_hand)
    ids = token_ids(1, 8)
    with torch.no_grad(), attached(model, dense_attention):
        with pytest.raises(UnsupportedError, match="no layer of LlamaModel called the session's"):
            run(input_ids=ids)
        with pytest.raises(UnsupportedError, match="run the model without a session"):
            model.generate(ids, max_new_tokens=2)
        # What a pass raises by itself is what is seen of it.
        with pytest.raises(IndexError):
            model(input_ids=torch.full((1, 8), 10**6))
    model(input_ids=ids)
    if not compiled:
        monkeypatch.setattr(LlamaAttention, "forward", hybrid)
        own = logits(model, input_ids=ids)
        torch.testing.assert_close(logits(model, dense_attention, input_ids=ids), own, **CLOSE)


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_session_past_which_forward_was_called_says_so_at_its_end(
    elsewhere: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`model.model.forward(...)` goes past torch's hooks, and so past the check of a pass."""
    from transformers.models.llama.modeling_llama import LlamaAttention

    model, ids = tiny_llama(), token_ids(1, 8)
    session = share_prefill(model, tiny_artifact(model), RuntimeConfig(min_tokens=0))

    def directly() -> None:
        with torch.no_grad():
            model.model.forward(input_ids=ids)

    def run() -> None:
        if not elsewhere:
            return directly()
        thread = threading.Thread(target=directly)
        thread.start()
        return thread.join()

    def by_hand(self: Any, hidden_states: Any, **_: Any) -> Any:
        return self.o_proj(self.q_proj(hidden_states)), None

    def interrupted() -> None:
        with session:
            run()
            raise KeyError

    with session:
        run()
    monkeypatch.setattr(LlamaAttention, "forward", by_hand)
    with session:
        pass
    refused = pytest.raises(UnsupportedError, match="no layer of LlamaModel called the session's")
    with refused, session:
        run()
    assert model.config._attn_implementation == "sdpa"
    # What happened in it is what is seen of it.
    with pytest.raises(KeyError):
        interrupted()


CHANGES_OF_MASKS: dict[str, Callable[[Any], Any]] = {
    "only where there is one": lambda mask: None if mask is None else _without_column(mask),
    "taken away": lambda mask: None,
    "always one": lambda mask: _without_column(torch.zeros(2, 1, 40, 40) if mask is None else mask),
    "a copy that is written to": lambda mask: None if mask is None else _hidden_in(mask.clone()),
}


def _without_column(mask: torch.Tensor) -> torch.Tensor:
    return mask & (torch.arange(40) != 3) if mask.dtype == torch.bool else mask + 3 * torch.eye(40)


def _hidden_in(mask: torch.Tensor) -> torch.Tensor:
    hidden = 0 if mask.dtype == torch.bool else -1e9
    return mask.index_fill_(-1, torch.tensor([3]), hidden)


@pytest.mark.parametrize("padding", [0, 9])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("change", CHANGES_OF_MASKS)
def test_layers_that_look_whether_there_is_a_mask_see_what_they_see_without_us(
    change: str, implementation: str, padding: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SDPA gets no mask where it is causal alone, and takes none for causal; eager for open."""
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    own_forward, model = LlamaDecoderLayer.forward, tiny_llama()
    model.set_attn_implementation(implementation)
    made = CHANGES_OF_MASKS[change]

    def forward(self: Any, hidden: Any, attention_mask: Any = None, **options: Any) -> Any:
        return own_forward(self, hidden, attention_mask=made(attention_mask), **options)

    monkeypatch.setattr(LlamaDecoderLayer, "forward", forward)
    mask = torch.ones(2, 40, dtype=torch.int64)
    mask[1, :padding] = 0
    inputs = {"input_ids": token_ids(2, 40), "attention_mask": mask}
    found, own = logits(model, dense_attention, **inputs), logits(model, **inputs)
    torch.testing.assert_close(found[mask.bool()], own[mask.bool()], **CLOSE)


def test_calls_without_a_mask_have_a_causal_one_in_common(model: Any) -> None:
    seen: list[Any] = []

    def watch(call: AttentionCall) -> torch.Tensor:
        seen.append(call.mask)
        return dense_attention(call)

    ids = token_ids(1, 50)
    own = logits(model, input_ids=ids)
    with torch.inference_mode():
        logits(model, watch, input_ids=ids, use_cache=False)
    torch.testing.assert_close(logits(model, watch, input_ids=ids, use_cache=False), own, **CLOSE)
    assert len(seen) == 6
    assert {id(mask) for mask in seen} == {id(seen[0])}
    assert seen[0].facts.is_plain
    # Nobody asked for its numbers, which would stay in memory.
    assert seen[0]._real is None
    logits(model, watch, input_ids=ids[:, :49], use_cache=False)
    assert seen[-1].sizes == (1, 1, 49, 49)
