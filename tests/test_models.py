from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)

from shareprefill import models
from shareprefill.errors import ConfigError, ModelError, UnsupportedError
from shareprefill.models import (
    ModelGeometry,
    attention_layers,
    attention_settings,
    fingerprint,
    geometry,
    load_config,
    load_model,
    load_tokenizer,
    max_length,
    model_digest,
    model_slug,
    resolve_model,
    settings_that_differ,
)

SIZES: dict[str, Any] = {
    "vocab_size": 48,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 333,
}


def tiny_llama(seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**{**SIZES, **changes}))


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    words = {word: number for number, word in enumerate(["<unk>", "a", "needle", "hay"])}
    backend = Tokenizer(WordLevel(words, unk_token="<unk>"))  # noqa: S106
    backend.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")  # noqa: S106


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_llama(dtype=torch.bfloat16).bfloat16().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def broken(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "broken"))


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def offline(*_: object, **__: object) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", offline)


def test_model_and_tokenizer_load(saved: Path) -> None:
    model = load_model(str(saved), device="cpu")
    assert not model.training
    assert model.dtype == torch.float32
    assert model.device.type == "cpu"
    tokens = load_tokenizer(str(saved))("a needle")["input_ids"]
    assert tokens == [1, 2]
    assert model(torch.tensor([tokens])).logits.shape == (1, 2, 48)


def test_attention_weights_that_a_configuration_asks_for_are_not_kept(broken: Path) -> None:
    _rewrite_config(broken, output_attentions=True)
    model = load_model(str(broken), device="cpu")
    with torch.no_grad():
        assert model(input_ids=torch.ones(1, 4, dtype=torch.long)).attentions is None


def test_loading_restores_what_transformers_logs(saved: Path) -> None:
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    load_model(str(saved), device="cpu")
    with pytest.raises(ModelError):
        load_tokenizer(str(saved.parent))
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


@pytest.mark.parametrize("tied", [False, True])
def test_tied_embeddings_are_no_missing_weights(tied: bool, tmp_path: Path) -> None:
    tiny_llama(tie_word_embeddings=tied).save_pretrained(tmp_path / "m")
    load_model(str(tmp_path / "m"), device="cpu")


def test_dtypes_and_devices(saved: Path) -> None:
    assert load_model(str(saved), device="cpu", dtype="bfloat16").dtype == torch.bfloat16
    with pytest.raises(ConfigError, match="dtype = 'int8' is not allowed"):
        load_model(str(saved), dtype="int8")
    with pytest.raises(ConfigError, match="device = 'gpu' is not allowed"):
        load_model(str(saved), device="gpu")
    with pytest.raises(ModelError, match=r"no device cuda:99: .*--device cpu"):
        load_model(str(saved), device="cuda:99")


def test_names_resolve(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_model(str(saved)) == str(saved)
    assert resolve_model("organisation/model-1.5") == "organisation/model-1.5"
    assert Path(resolve_model("sp-tiny")).parts[-3:] == ("shareprefill", "assets", "sp-tiny")
    monkeypatch.setenv("HOME", str(saved.parent))
    assert resolve_model("~/tiny") == str(saved)
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelError, match="is a file: name the folder"):
        resolve_model(str(tmp_path / "file"))
    for name in ("./none", "../none", "/none/of/it", "a/b/c", "", "a\0b", "-x", "x\x1b[2J"):
        with pytest.raises(ModelError, match="there is no model folder") as caught:
            load_model(name)
        assert str(caught.value).isprintable()


def test_slugs_are_safe_folder_names(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert model_slug("sp-tiny") == "sp-tiny"
    assert model_slug("organisation/Model-1.5") == "organisation--Model-1.5"
    assert model_slug(str(saved)) == model_slug(f"{saved}/") == "tiny"
    monkeypatch.chdir(saved)
    assert model_slug(".") == "tiny"
    assert model_slug("../../\x1b[2J x") == "2J-x"
    assert model_slug("///") == "model"


@pytest.mark.usefixtures("no_network")
def test_unreachable_hub_is_reported_at_once() -> None:
    with pytest.raises(ModelError, match=r"is no folder, and the hub cannot be reached \(no route"):
        load_model("organisation/none-such")
    with pytest.raises(ModelError, match="hub cannot be reached"):
        load_tokenizer("organisation/none-such")


def test_missing_builtin_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models.resources, "files", lambda _: tmp_path)
    with pytest.raises(ModelError, match="built-in model sp-tiny is not in this installation"):
        load_model("sp-tiny")


def _rewrite_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def _rewrite_tokenizer(folder: Path, **changes: Any) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps({**tokenizer, **changes}))


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda m: (m / "config.json").unlink(), "no model that transformers can load.*config.jso"),
        (lambda m: (m / "config.json").write_text("{"), "not a valid JSON file"),
        (lambda m: _rewrite_config(m, model_type="none"), "model type `none`"),
        (lambda m: _rewrite_config(m, hidden_size="x"), "no model that transformers can load"),
        (lambda m: (m / "config.json").write_text("[]"), "no model that transformers can load"),
        (lambda m: _rewrite_config(m, model_type=[]), "no model that transformers .*unhashable"),
        (lambda m: _rewrite_config(m, dtype="x"), "no model that transformers .*no attribute"),
        (lambda m: _rewrite_config(m, head_dim=0), "weights of .* are missing or damaged .*power"),
        (lambda m: _rewrite_config(m, hidden_size=60), "weights of .* are missing or damaged"),
        (lambda m: _rewrite_config(m, num_hidden_layers=4), "lack 9 weights, model.layers.3"),
        (lambda m: (m / "model.safetensors").unlink(), "weights of .* are missing .*no file named"),
        (lambda m: _cut(m / "model.safetensors"), "weights of .* are missing or damaged"),
        (lambda m: (m / "model.safetensors").write_bytes(b""), "are missing or damaged .*header"),
    ],
)
def test_damaged_models_are_refused(
    damage: Callable[[Path], object], message: str, broken: Path
) -> None:
    damage(broken)
    with pytest.raises(ModelError, match=message) as caught:
        load_model(str(broken), device="cpu")
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "damage",
    [
        lambda m: [(m / name).unlink() for name in ("tokenizer.json", "tokenizer_config.json")],
        lambda m: (m / "tokenizer.json").unlink(),
        lambda m: (m / "tokenizer.json").write_text("{"),
        lambda m: (m / "tokenizer.json").write_text('{"a": 1}'),
        lambda m: (m / "tokenizer_config.json").write_text("{"),
        # tokenizers raises the bare class Exception for these.
        lambda m: (m / "tokenizer.json").write_text('{"version": 5}'),
        lambda m: _rewrite_tokenizer(m, version="9"),
        lambda m: _rewrite_tokenizer(m, pre_tokenizer={"type": "none"}),
        lambda m: _rewrite_tokenizer(m, added_tokens=5),
    ],
)
def test_damaged_tokenizers_are_refused(damage: Callable[[Path], object], broken: Path) -> None:
    damage(broken)
    with pytest.raises(ModelError, match=r"tokenizer of .* is missing or damaged \("):
        load_tokenizer(str(broken))


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("T5", {"d_model": 16, "d_ff": 16, "d_kv": 8, "num_layers": 1, "num_heads": 2}),
        ("Bart", {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1}),
        ("Bert", {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}),
        ("ViT", {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}),
    ],
)
def test_models_that_are_no_causal_decoders_are_refused(
    name: str, sizes: dict[str, int], tmp_path: Path
) -> None:
    config = getattr(transformers, f"{name}Config")(**sizes)
    suffix = {"T5": "ForConditionalGeneration", "Bert": "ForMaskedLM"}.get(name, "Model")
    getattr(transformers, name + suffix)(config).save_pretrained(tmp_path / "m")
    with pytest.raises(ModelError, match=f"no causal decoder .its type is {name.lower()}"):
        load_model(str(tmp_path / "m"), device="cpu")


def test_code_of_a_repository_is_not_run_unasked(broken: Path) -> None:
    (broken / "hostile.py").write_text("raise SystemExit('ran')")
    _rewrite_config(broken, model_type="own", auto_map={"AutoConfig": "hostile.Config"})
    with pytest.raises(ModelError, match="contains custom code"):
        load_model(str(broken), device="cpu")


def _family(name: str, **changes: Any) -> Any:
    sizes = {**SIZES, **changes}
    config = getattr(transformers, f"{name}Config")(**sizes)
    return getattr(transformers, f"{name}ForCausalLM")(config)


def test_geometry_of_several_families() -> None:
    assert geometry(tiny_llama()) == ModelGeometry(3, 6, 2, 8)
    assert geometry(_family("Qwen3", head_dim=16)) == ModelGeometry(3, 6, 2, 16)
    assert geometry(_family("GPTNeoX", num_key_value_heads=6)) == ModelGeometry(3, 6, 6, 8)
    assert geometry(_family("Phi3", pad_token_id=0)) == ModelGeometry(3, 6, 2, 8)
    gpt2 = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_embd=48, n_layer=2, n_head=6, vocab_size=48, n_positions=77)
    )
    assert geometry(gpt2) == ModelGeometry(2, 6, 6, 8)
    assert max_length(gpt2) == 77
    assert max_length(tiny_llama().config) == 333


def test_attention_layers_come_in_order() -> None:
    model = tiny_llama()
    layers = attention_layers(model)
    assert [layer.index for layer in layers] == [0, 1, 2]
    assert all(
        layer.module is model.model.layers[layer.index].self_attn for layer in reversed(layers)
    )


def test_unlike_layers_and_no_attention_are_unsupported() -> None:
    model = tiny_llama()
    model.model.layers[1].self_attn.head_dim = 16
    with pytest.raises(UnsupportedError, match="llama model differ from layer to layer"):
        geometry(model)
    mamba = transformers.MambaForCausalLM(
        transformers.MambaConfig(hidden_size=16, num_hidden_layers=1, vocab_size=16, state_size=4)
    )
    with pytest.raises(UnsupportedError, match=r"no layer of this Mamba.* has softmax attention"):
        geometry(mamba)
    model = tiny_llama()
    model.model.layers[2].self_attn.layer_idx = 1
    with pytest.raises(UnsupportedError, match="layer 1 has several attention modules"):
        attention_layers(model)


def test_fingerprint_does_not_depend_on_the_dtype_loaded(saved: Path) -> None:
    prints = {
        dtype: fingerprint(load_model(str(saved), device="cpu", dtype=dtype))
        for dtype in ("float32", "bfloat16", "float16")
    }
    assert len(set(prints.values())) == 1
    found = prints["float32"]
    assert found.model_type == "llama"
    assert found.geometry == ModelGeometry(3, 6, 2, 8)
    assert len(found.weights) == 64


def test_fingerprint_of_tiny_weights_does_not_depend_on_the_dtype() -> None:
    model = tiny_llama().bfloat16()
    with torch.no_grad():
        for layer in attention_layers(model):
            for parameter in layer.module.parameters():
                parameter.copy_(torch.randn_like(parameter) * 2.0 ** torch.randint(-26, 2, (1,)))
    expected = fingerprint(model)
    assert fingerprint(model.to(torch.float16)) == expected


def test_fingerprint_tells_attention_weights_apart_and_nothing_else() -> None:
    model = tiny_llama()
    expected = fingerprint(model)
    assert fingerprint(tiny_llama()) == expected
    assert fingerprint(tiny_llama(seed=1)).weights != expected.weights
    with torch.no_grad():
        model.lm_head.weight += 1
        model.model.layers[0].mlp.up_proj.weight += 1
    assert fingerprint(model) == expected
    with torch.no_grad():
        model.model.layers[2].self_attn.k_proj.weight[0, 0] += 1
    assert fingerprint(model).weights != expected.weights
    first, last = model.model.layers[0], tiny_llama().model.layers[2]
    swapped = tiny_llama()
    swapped.model.layers[0].self_attn.load_state_dict(last.self_attn.state_dict())
    swapped.model.layers[2].self_attn.load_state_dict(first.self_attn.state_dict())
    assert fingerprint(swapped).weights != expected.weights


@torch.no_grad()
def test_the_digest_of_a_model_is_of_all_that_its_results_come_from(saved: Path) -> None:
    model: Any = load_model(str(saved), device="cpu")
    whole = model_digest(model)
    assert model_digest(load_model(str(saved), device="cpu", dtype="bfloat16")) == whole
    model.config._name_or_path = "another"
    assert model_digest(model) == whole
    model.generation_config.eos_token_id = 7
    found = {whole, model_digest(model)}
    model.config.rope_parameters = {**model.config.rope_parameters, "rope_theta": 5.0}
    found.add(model_digest(model))
    # The last value of a weight of more values than are sampled, and one of a norm.
    for weight in (model.lm_head.weight, model.model.norm.weight):
        weight.view(-1)[-1] += 1
        found.add(model_digest(model))
    assert len(found) == 5


def test_rope_is_the_same_however_a_configuration_writes_it() -> None:
    new = {"rope_type": "yarn", "rope_theta": 5e5, "factor": 4.0}
    new["original_max_position_embeddings"] = 2048
    written = LlamaConfig(rope_parameters=dict(new))
    old = LlamaConfig.from_dict(
        {"rope_theta": 500000, "rope_scaling": {"type": "yarn", "factor": 4}}
    )
    # As classes out of a model's repository have it.
    foreign = PreTrainedConfig(rotary_emb_base=5e5, rotary_pct=0.5)
    foreign.rope_parameters = {"type": "yarn", "factor": 4.0, "mscale": None}
    assert attention_settings(written) == {"rope_parameters": new}
    assert settings_that_differ(attention_settings(written), attention_settings(old)) == ""
    assert attention_settings(foreign)["rope_parameters"] == {
        "rope_type": "yarn", "rope_theta": 5e5, "factor": 4.0, "partial_rotary_factor": 0.5
    }  # fmt: skip


def test_settings_of_attention_are_those_that_change_it() -> None:
    plain = attention_settings(LlamaConfig())
    assert plain == {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
    same = LlamaConfig(max_position_embeddings=9, use_cache=False, eos_token_id=7)
    assert attention_settings(same) == plain
    gemma = attention_settings(transformers.Gemma3TextConfig(num_hidden_layers=6))
    assert gemma["rope_parameters"]["full_attention"]["rope_theta"] == 1e6
    assert gemma["layer_types"][4:] == ["sliding_attention", "full_attention"]
    assert gemma["sliding_window"] == 4096
    whole = transformers.Gemma3Config()
    assert attention_settings(whole) == attention_settings(whole.text_config)
    capped = transformers.Gemma2Config(attn_logit_softcapping=30.0, num_hidden_layers=6)
    changed = settings_that_differ(
        attention_settings(transformers.Gemma2Config(num_hidden_layers=6)),
        attention_settings(capped),
    )
    assert changed == "attn_logit_softcapping 50.0 there, 30.0 now"
    # Off in one version of a library, unknown to another.
    off = transformers.Qwen2Config(use_sliding_window=False, sliding_window=64)
    assert "sliding_window" not in attention_settings(off)
    # ALiBi of MPT lies in a configuration of its own.
    nested: Any = transformers.MptConfig()
    nested.sliding_window = 64
    assert attention_settings(nested)["alibi"] is True
    assert attention_settings(nested)["sliding_window"] == 64


def test_a_digest_samples_large_weights_from_end_to_end() -> None:
    values = torch.zeros(100_000)
    few = models._sampled(values)
    assert len(few) == 16 * 4096
    for place in (0, -1, (100_000 - 4096) * 8 // 15):
        changed = values.clone()
        changed[place] = 1
        assert not torch.equal(models._sampled(changed), few)


def test_fingerprint_refuses_weights_that_are_not_in_memory() -> None:
    with pytest.raises(UnsupportedError, match="layer 0 are not in memory"):
        fingerprint(tiny_llama().to("meta"))


@pytest.mark.gpu
def test_fingerprint_is_the_same_on_a_gpu(saved: Path) -> None:
    assert fingerprint(load_model(str(saved), device="cuda")) == fingerprint(
        load_model(str(saved), device="cpu")
    )


def test_a_configuration_is_loaded_without_weights(broken: Path) -> None:
    (broken / "model.safetensors").unlink()
    assert load_config(str(broken)).model_type == "llama"
    _rewrite_config(broken, model_type="t5")
    with pytest.raises(ModelError, match="no causal decoder"):
        load_config(str(broken))


def test_what_interrupts_loading_is_not_taken_for_damage(
    broken: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoTokenizer

    class OurOwnError(Exception):
        pass

    for kind in (KeyboardInterrupt, OurOwnError):

        def fail(*_: object, kind: type[BaseException] = kind, **__: object) -> None:
            raise kind

        monkeypatch.setattr(AutoTokenizer, "from_pretrained", fail)
        with pytest.raises(kind):
            load_tokenizer(str(broken))


@pytest.mark.parametrize(("trusted", "safe"), [(False, True), (True, None)])
def test_weights_of_the_hub_come_from_safetensors_alone(
    monkeypatch: pytest.MonkeyPatch, trusted: bool, safe: bool | None
) -> None:
    from transformers import AutoModelForCausalLM

    class StopHereError(Exception):
        pass

    asked: dict[str, Any] = {}

    def from_pretrained(place: str, **options: Any) -> None:
        asked.update(options, place=place)
        raise StopHereError

    monkeypatch.setattr(models, "_only_cached", lambda name: False)
    monkeypatch.setattr(models, "_load_config", lambda *_: None)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", from_pretrained)
    with pytest.raises(StopHereError):
        load_model("organisation/model", trust_remote_code=trusted)
    assert asked["place"] == "organisation/model"
    assert asked.get("use_safetensors") is safe
