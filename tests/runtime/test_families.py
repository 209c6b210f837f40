from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version

from shareprefill import share_prefill
from shareprefill.artifact import Policy
from shareprefill.config import RuntimeConfig
from shareprefill.errors import UnsupportedError
from shareprefill.runtime.generation import cache_of
from shareprefill.runtime.layers import LayerKind, layer_uses
from shareprefill.runtime.plan import what_is_read
from tests.support.families import FAMILIES, IMAGE_TOKEN, Family, build, is_installed
from tests.support.sweep import DOCUMENT, every_family, measure, support_of, words
from tests.support.tiny import tiny_artifact, token_ids

EVERYTHING = RuntimeConfig(gamma=1.0, slack=1.0, min_tokens=0, max_density=1.0)
SPARSE = RuntimeConfig(gamma=0.5, min_tokens=0, max_density=1.0)
CLOSE: Any = {"rtol": 1e-4, "atol": 1e-4}
TOKENS = 75
POLICIES = [Policy.PIVOT, Policy.SHARE, Policy.SAMPLED, Policy.VERTICAL_SLASH]

# Which families share every layer, some, or none; the rest of the table is in docs/models.md.
PARTLY = {
    "bamba", "cohere2", "exaone4", "gemma2", "gemma3 (with images)", "gemma3_text", "gemma4_text",
    "gpt_oss", "granitemoehybrid", "jamba", "kimi_linear", "lfm2", "llama4_text", "mimo_v2_flash",
    "minimax", "nemotron_h", "olmo3", "olmo_hybrid", "qwen3_5_text",
    "qwen3_next", "vaultgemma",
}  # fmt: skip
NOT_SHARED = {"deepseek_v4", "mistral (sliding window)"}
REFUSED = {
    "bloom": "computes attention by itself",
    "codegen": "computes attention by itself",
    "deepseek_v32": "indices",
    "falcon": "computes attention by itself",
    "gpt_neo": "computes attention by itself",
    "gptj": "computes attention by itself",
    "granitemoehybrid (all Mamba)": "no layer of .* has softmax attention .* nothing to share",
    "mpt": "computes attention by itself",
    "zamba": "one module serves several layers",
    "zamba2": "one module serves several layers",
}
# Refused until transformers has put their attention behind its interface; the document is older.
SHARED_FROM_5_24 = {"codegen", "gptj"}
if Version(transformers.__version__) >= Version("5.24"):
    REFUSED = {name: why for name, why in REFUSED.items() if name not in SHARED_FROM_5_24}


def named(families: list[Family]) -> Any:
    return pytest.mark.parametrize("family", families, ids=lambda family: family.name)


def installed(family: Family) -> Family:
    if not is_installed(family):
        pytest.skip(f"the installed transformers has no {family.name}")
    return family


@torch.no_grad()
def runs(model: Any) -> dict[str, torch.Tensor]:
    """Logits of a prefill, of the real tokens of a left-padded batch, and of two chunks."""
    # The last token stands for images.
    ids = token_ids(2, TOKENS, vocabulary=IMAGE_TOKEN)
    mask = torch.ones_like(ids)
    mask[1, :31] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    batch = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
    found = {"prefill": model(input_ids=ids).logits, "padded batch": batch[mask.bool()]}
    # Transformers' MiniMax takes a cache for empty whose first layer is linear.
    if model.config.model_type != "minimax":
        first = model(input_ids=ids[:1, :40], use_cache=True)
        second = model(input_ids=ids[:1, 40:], **cache_of(first), use_cache=True)
        found["chunks"] = torch.cat([first.logits, second.logits], 1)
    if hasattr(model.config, "vision_config"):
        found["with an image"] = model(**with_image(model, ids[:1])).logits
    return found


def with_image(model: Any, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """A prompt with an image in it: its tokens see each other in some families."""
    tokens = 4 if model.config.model_type == "gemma3" else 16
    ids = ids.clone()
    ids[:, 20 : 20 + tokens] = IMAGE_TOKEN
    types = (ids == IMAGE_TOKEN).long()
    return {
        "input_ids": ids,
        "pixel_values": torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(0)),
        **({"token_type_ids": types} if tokens == 4 else {}),
    }


def assert_equal_runs(found: dict[str, torch.Tensor], own: dict[str, torch.Tensor]) -> None:
    for name, expected in own.items():
        torch.testing.assert_close(
            found[name], expected, **CLOSE, msg=lambda text, name=name: f"{name}: {text}"
        )


@named([family for family in FAMILIES if family.name not in REFUSED])
def test_logits_are_the_models_own_and_layers_are_what_they_are_said_to_be(family: Family) -> None:
    model = build(installed(family))
    model.set_attn_implementation("eager")
    torch.manual_seed(1)
    own = runs(model)
    shared = [use.index for use in layer_uses(model) if use.kind is LayerKind.SHARED]
    layers = range(model.config.get_text_config().num_hidden_layers)
    policies = [POLICIES if layer in shared else [Policy.DENSE] * 4 for layer in layers]
    artifact = tiny_artifact(model, policies)
    torch.manual_seed(1)
    with share_prefill(model, artifact, what_is_read(artifact, EVERYTHING)) as session:
        assert_equal_runs(runs(model), own)
    assert [layer.layer for layer in session.report().layers] == shared
    torch.manual_seed(1)
    with share_prefill(model, artifact, what_is_read(artifact, SPARSE)) as session:
        sparse = runs(model)
    assert all(bool(logits.isfinite().all()) for logits in sparse.values())
    assert (session.report().density < 1) == bool(shared)
    # What is compared above is sensitive: less attention is seen in it.
    assert torch.allclose(sparse["prefill"], own["prefill"], **CLOSE) != bool(shared)
    expected = "no" if family.name in NOT_SHARED else "partly" if family.name in PARTLY else "yes"
    assert support_of(family).shared == expected


@named([family for family in FAMILIES if family.name in REFUSED])
def test_what_cannot_be_shared_is_refused_with_its_reason(family: Family) -> None:
    model = build(installed(family))
    with pytest.raises(UnsupportedError, match=REFUSED[family.name]):
        layer_uses(model)


@named([family for family in FAMILIES if family.name not in REFUSED])
def test_a_model_without_weights_tells_the_same(family: Family) -> None:
    with torch.device("meta"):
        weightless = build(installed(family)).to(torch.bfloat16)
    assert layer_uses(weightless) == layer_uses(build(family))


def documented() -> dict[str, tuple[str, str, str]]:
    """What docs/models.md says of each family."""
    lines = DOCUMENT.read_text(encoding="utf-8").splitlines()
    return {words(line)[0]: words(line) for line in lines if line.startswith("| ")}


def test_the_document_is_up_to_date() -> None:
    rows = documented()
    for family in FAMILIES:
        row = rows[family.name]
        if is_installed(family) and family.name not in SHARED_FROM_5_24 - REFUSED.keys():
            assert row == words(support_of(family).line), "run python tools/family_table.py"


SAMPLE = {"afmoe", "ctrl", "doge", "granite_swa", "modernbert-decoder", "moshi", "olmoe"}
SAMPLE |= {"openai-gpt", "roformer", "xglm"}


@named([family for family in every_family() if family.name in SAMPLE])
def test_families_that_are_only_named_are_measured(family: Family) -> None:
    """A sample; `python tools/family_table.py` measures all of them."""
    row = measure(family)
    assert not row.is_wrong
    assert row.shared != "not built"
    assert documented()[family.name] == words(row.line)
