from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from shareprefill import share_prefill
from shareprefill.artifact import Policy
from shareprefill.config import RuntimeConfig
from shareprefill.errors import ConfigError, DataError, ModelError
from shareprefill.models import load_model, load_tokenizer, max_length, position_table
from shareprefill.runtime import generation
from shareprefill.runtime.generation import cache_of, chunk_tokens, generate, prefill
from shareprefill.testing import LargestTensor
from tests.support.checkpoint import save_checkpoint
from tests.support.tiny import tiny_artifact, tiny_llama, token_ids

CLOSE: Any = {"rtol": 1e-4, "atol": 1e-4}
EVERYTHING = RuntimeConfig(gamma=1.0, slack=1.0, min_tokens=0, max_density=1.0)
POLICIES = [[Policy.PIVOT, Policy.SHARE, Policy.SAMPLED, Policy.VERTICAL_SLASH]] * 3


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_llama()


@pytest.mark.parametrize("chunk", [None, 0, 7, 64, 100, 150, 151])
def test_a_prefill_in_chunks_is_one_prefill(model: Any, chunk: int | None) -> None:
    ids = token_ids(150)
    with torch.no_grad():
        own = model(input_ids=ids[None]).logits[:, -1:]
    before = model.config._attn_implementation
    step = prefill(model, ids, chunk)
    torch.testing.assert_close(step.logits, own, **CLOSE)
    (cache,) = cache_of(step).values()
    assert cache.get_seq_length() == 150
    assert model.config._attn_implementation == before
    with share_prefill(model, tiny_artifact(model, POLICIES), EVERYTHING) as session:
        torch.testing.assert_close(prefill(model, ids, chunk).logits, own, **CLOSE)
    assert session.report().prefills == {7: 0, 64: 3, 100: 2}.get(chunk or 0, 1)


def test_dense_chunks_make_no_mask_of_all_keys(model: Any) -> None:
    ids = token_ids(3000)
    with LargestTensor() as largest:
        prefill(model, ids, 1500)
    # One head's logits of a piece would be 1500 x 3000; SDPA's own are not counted.
    assert largest.elements < 1500 * 3000


def test_generation_with_chunks(tmp_path: Path) -> None:
    name = str(save_checkpoint(tmp_path / "model"))
    network, tokenizer = load_model(name, device="cpu"), load_tokenizer(name)
    ids = torch.tensor(tokenizer("Some words, and then some more of them. " * 9).input_ids)
    whole, pieces = (
        generate(network, tokenizer, ids, max_new_tokens=6, prefill_chunk=chunk)
        for chunk in (None, 30)
    )
    assert pieces.text == whole.text
    torch.testing.assert_close(pieces.hidden, whole.hidden, **CLOSE)


def test_chunks_are_as_large_as_memory_allows(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = 100_000
    assert chunk_tokens(model, tokens) == 0
    cache, a_token = generation._bytes_of(model, tokens)
    # Three layers, two KV heads of 16, float32, and one layer more while it grows.
    assert cache == 4 * 2 * 2 * 16 * 4 * tokens
    monkeypatch.setattr(generation, "_device", lambda _: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 5000)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 3000)

    def chunk_with(room: float) -> int:
        free = (cache + room * a_token) / 0.85 - 2000
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (int(free) + 1, 0))
        return chunk_tokens(model, tokens)

    assert chunk_with(tokens + 100) == 0
    # Two pieces of one size, instead of a large and a small one.
    assert chunk_with(tokens - 100) == 25 * 2048
    assert chunk_with(30_000) == 13 * 2048
    assert chunk_with(2048) == 2048
    with pytest.raises(ConfigError, match="100000 tokens need .* GiB are free on cuda: shorten"):
        chunk_with(2000)


def out_of_memory_above(model: Any, most: int) -> Any:
    """Makes forward passes of more tokens fail, from the second layer on."""

    def hook(_module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        if inputs[0].shape[1] > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    return model.model.layers[1].mlp.register_forward_pre_hook(
        lambda module, inputs: hook(module, inputs)
    )


def test_a_prefill_that_does_not_fit_runs_in_smaller_chunks(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shareprefill.runtime.generation._CHUNK", 32)
    ids = token_ids(1, 150)[0]
    expected = prefill(model, ids, 0).logits
    handle = out_of_memory_above(model, 40)
    try:
        # 150, 75 and 38 tokens at a time.
        torch.testing.assert_close(prefill(model, ids).logits, expected, rtol=1e-4, atol=1e-4)
        with pytest.raises(ConfigError, match=r"150 tokens \(CUDA out of memory\): .*lower"):
            prefill(model, ids, 100)
    finally:
        handle.remove()
    handle = out_of_memory_above(model, 10)
    try:
        with pytest.raises(ConfigError, match=r"150 tokens \(CUDA out of memory\): shorten it, or"):
            prefill(model, ids)
    finally:
        handle.remove()


@pytest.mark.gpu
def test_a_gpu_out_of_memory() -> None:
    """Of 64K tokens the feed-forward layers alone take 8 GiB at once."""
    big = tiny_llama(intermediate_size=16384, max_position_embeddings=2**17).cuda()
    ids = token_ids(1, 2**16)[0]
    expected = prefill(big, ids, 4096).logits
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    torch.cuda.set_per_process_memory_fraction(min(1.0, 4 * 2**30 / total))
    try:
        with pytest.raises(ConfigError, match=r"65536 tokens \(CUDA out of memory"):
            prefill(big, ids, 0)
        found = prefill(big, ids).logits
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert free > 4 * 2**30
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("chunk", [0, 16])
def test_nothing_of_transformers_is_used_that_is_to_go(
    model: Any, chunk: int, caplog: pytest.LogCaptureFixture
) -> None:
    class Numbers:
        def decode(self, tokens: list[int], **_: Any) -> str:
            return " ".join(map(str, tokens))

    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            generate(model, Numbers(), token_ids(40), max_new_tokens=4, prefill_chunk=chunk)
    finally:
        logger.removeHandler(caplog.handler)
    assert not [message for message in caplog.messages if "deprecated" in message]


SMALL: dict[str, Any] = {"vocab_size": 40, "bos_token_id": 0, "eos_token_id": None}
GPT2 = {"n_positions": 30, "n_embd": 16, "n_layer": 1, "n_head": 2}
BART: dict[str, Any] = {"d_model": 16, "decoder_layers": 1, "decoder_attention_heads": 2}
BART |= {"max_position_embeddings": 30, "encoder_layers": 1, "is_decoder": True}
PLAIN: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
PLAIN |= {"max_position_embeddings": 30, "intermediate_size": 16}
TABLES: dict[str, tuple[str, str, dict[str, Any], int]] = {
    "gpt2": ("GPT2", "GPT2LMHeadModel", GPT2, 30),
    "gpt-bigcode": ("GPTBigCode", "GPTBigCodeForCausalLM", GPT2, 30),
    "gpt-neo": (
        "GPTNeo",
        "GPTNeoForCausalLM",
        {**PLAIN, "num_layers": 1, "num_heads": 2, "attention_types": [[["global"], 1]]},
        30,
    ),
    "opt": ("OPT", "OPTForCausalLM", {**PLAIN, "ffn_dim": 16, "word_embed_proj_dim": 16}, 30),
    "biogpt": ("BioGpt", "BioGptForCausalLM", PLAIN, 30),
    "bart": ("Bart", "BartForCausalLM", BART, 30),
    "pegasus": ("Pegasus", "PegasusForCausalLM", BART, 30),
    "bert": ("Bert", "BertLMHeadModel", {**PLAIN, "is_decoder": True}, 30),
    "roberta": ("Roberta", "RobertaForCausalLM", {**PLAIN, "is_decoder": True}, 28),
    "gpt-j": ("GPTJ", "GPTJForCausalLM", {**GPT2, "rotary_dim": 4}, 30),
    "codegen": ("CodeGen", "CodeGenForCausalLM", {**GPT2, "n_head": 4, "rotary_dim": 4}, 30),
    "ctrl": ("CTRL", "CTRLLMHeadModel", {**GPT2, "dff": 16}, 30),
}


@pytest.mark.parametrize("family", TABLES)
def test_a_table_of_positions_ends_where_it_is_said_to(family: str) -> None:
    config, name, sizes, limit = TABLES[family]
    options = {**SMALL, "pad_token_id": 1, **sizes}
    network = getattr(transformers, name)(getattr(transformers, f"{config}Config")(**options))
    network.eval()
    assert position_table(network) == limit
    assert max_length(network) == limit
    with torch.no_grad():
        network(input_ids=torch.full((1, limit), 5))
        with pytest.raises((IndexError, RuntimeError)):
            network(input_ids=torch.full((1, limit + 1), 5))


class _Letters:
    def decode(self, tokens: list[int], **_: Any) -> str:
        return "x" * len(tokens)


def test_prompt_and_new_tokens_beyond_the_positions_are_refused_before_the_prefill() -> None:
    network = transformers.GPT2LMHeadModel(transformers.GPT2Config(**SMALL, **GPT2)).eval()
    # The last new token is never read, so it needs no position.
    found = generate(network, _Letters(), torch.full((21,), 5), max_new_tokens=10)
    assert (found.prompt_tokens, found.new_tokens) == (21, 10)
    network.forward = None
    for tokens, new, way_out in (
        (22, 10, r"shorten the prompt to 21 or lower --max-new-tokens .* to 9"),
        (40, 10, r"shorten the prompt to 21$"),
        (5, 100, r"lower --max-new-tokens .* to 26$"),
        (40, 100, r"shorten both"),
    ):
        with pytest.raises(ConfigError, match=f"the model has a table of 30: {way_out}"):
            generate(network, _Letters(), torch.full((tokens,), 5), max_new_tokens=new)


def test_rotary_positions_have_no_end(model: Any) -> None:
    small = tiny_llama(max_position_embeddings=64)
    assert position_table(small) is None
    found = generate(small, _Letters(), token_ids(60), max_new_tokens=10)
    assert found.new_tokens == 10
    bloom = {"hidden_size": 16, "n_layer": 1, "n_head": 2, "vocab_size": 40}
    assert position_table(transformers.BloomForCausalLM(transformers.BloomConfig(**bloom))) is None


def test_predictions_that_are_no_numbers_are_no_answer(tmp_path: Path) -> None:
    """A NaN's place in the vocabulary was taken for the answer."""
    broken, tokenizer = tiny_llama(), load_tokenizer(str(save_checkpoint(tmp_path)))
    broken.get_output_embeddings().weight.data[5] = torch.nan
    with pytest.raises(ModelError, match="predictions are not finite, so there is no answer"):
        generate(broken, tokenizer, token_ids(20), max_new_tokens=2)


def test_no_prompt_and_no_new_tokens_are_refused(model: Any) -> None:
    with pytest.raises(DataError, match="the prompt has no tokens"):
        generate(model, _Letters(), token_ids(0), max_new_tokens=3)
    for number in (0, -1):
        with pytest.raises(ConfigError, match=f"max_new_tokens = {number} is not allowed"):
            generate(model, _Letters(), token_ids(9), max_new_tokens=number)
