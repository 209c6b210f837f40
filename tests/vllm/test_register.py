import enum
import sys
from types import ModuleType

import pytest

from shareprefill.errors import ConfigError
from shareprefill.vllm import register


class Backends(enum.Enum):
    CUSTOM = None
    CPU_ATTN = "cpu"
    FLASH_ATTN = "flash"
    TRITON_ATTN = "triton"


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What is registered with a vLLM of which only its registry is there, on a GPU."""
    found: dict[str, str] = {}
    platform = ModuleType("platform")
    platform.is_cpu = lambda: False  # pyright: ignore[reportAttributeAccessIssue]
    parts = {
        "vllm.platforms": {"current_platform": platform},
        "vllm.v1.attention.backends.registry": {
            "AttentionBackendEnum": Backends,
            "register_backend": lambda backend, path: found.__setitem__(backend.name, path),
        },
    }
    for name, values in parts.items():
        *parents, _ = name.split(".")
        for number in range(len(parents)):
            parent = ".".join(parents[: number + 1])
            monkeypatch.setitem(sys.modules, parent, ModuleType(parent))
        module = ModuleType(name)
        vars(module).update(values)
        monkeypatch.setitem(sys.modules, name, module)
    for name in ("ARTIFACT", "POLICY", "REQUEST_SWITCH", "INNER_BACKEND"):
        monkeypatch.delenv(f"SHAREPREFILL_{name}", raising=False)
    return found


FLASH = "shareprefill.vllm.flash.SharePrefillFlashBackend"


def test_on_a_gpu_only_custom_is_taken(registered: dict[str, str]):
    register()
    assert registered == {"CUSTOM": FLASH}


@pytest.mark.parametrize(
    ("name", "value"), [("ARTIFACT", "a.st"), ("POLICY", "pooled"), ("REQUEST_SWITCH", "off")]
)
def test_an_environment_that_asks_for_us_needs_no_option(
    registered: dict[str, str], monkeypatch: pytest.MonkeyPatch, name: str, value: str
):
    monkeypatch.setenv(f"SHAREPREFILL_{name}", value)
    register()
    assert registered == {"CUSTOM": FLASH, "FLASH_ATTN": FLASH}


def test_on_a_cpu_its_own_name_is_taken(registered: dict[str, str]):
    sys.modules["vllm.platforms"].current_platform.is_cpu = lambda: True
    register()
    path = "shareprefill.vllm.cpu.SharePrefillCPUBackend"
    assert registered == {"CUSTOM": path, "CPU_ATTN": path}


def test_an_inner_backend_is_named_or_refused(
    registered: dict[str, str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("SHAREPREFILL_INNER_BACKEND", "TRITON_ATTN")
    register()
    assert registered == {"CUSTOM": "shareprefill.vllm.triton.SharePrefillTritonBackend"}
    monkeypatch.setenv("SHAREPREFILL_INNER_BACKEND", "FLASHINFER")
    with pytest.raises(ConfigError, match="'FLASHINFER' is not allowed.*TRITON_ATTN"):
        register()
