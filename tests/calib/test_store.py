from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from shareprefill.calib.capture import PromptMaps
from shareprefill.calib.store import INDEX, MapStore, newest_calibration
from shareprefill.config import CalibrateConfig
from shareprefill.errors import ConfigError, DataError
from shareprefill.models import Fingerprint, ModelGeometry

CONFIG = CalibrateConfig(model="m", samples=3, length=512, block_size=64)
MODEL = Fingerprint("llama", ModelGeometry(2, 4, 2, 16), "0" * 64)


def maps() -> PromptMaps:
    return PromptMaps((0, 1), {"full": torch.rand(2, 4, 8, 8).half().tril()})


def filled(folder: Path, prompts: int = 3) -> MapStore:
    store = MapStore.begin(folder, CONFIG, MODEL, resume=True)
    for number in range(prompts):
        ids = torch.arange(number + 1)
        store.add("needle", ids, f"digest{number}", maps())
    return store


def test_what_was_added_is_read_back(tmp_path: Path) -> None:
    store = MapStore.begin(tmp_path, CONFIG, MODEL, resume=True)
    added = [maps() for _ in range(3)]
    for number, one in enumerate(added):
        assert not store.complete
        store.add("needle", torch.arange(number + 1), "digest", one)
    opened = MapStore.open(tmp_path)
    opened.verify()
    assert opened.complete
    assert (opened.config, opened.fingerprint, opened.layers) == (CONFIG, MODEL, (0, 1))
    assert [record.tokens for record in opened.prompts] == [1, 2, 3]
    for number, one in enumerate(added):
        assert torch.equal(opened.load(number, "full")["full"], one.tensors["full"])


@pytest.mark.parametrize(
    ("layers", "heads", "tokens"), [(32, 32, 131_072), (80, 64, 32_768), (108, 48, 65_536)]
)
def test_prompts_of_real_sizes_take_at_most_300_mb(
    tmp_path: Path, layers: int, heads: int, tokens: int
) -> None:
    """As the shard of one layer says, of an 8B and a 70B shape and one at the limit."""
    config = CalibrateConfig(model="m", length=tokens, map_blocks=512)
    model = Fingerprint("llama", ModelGeometry(layers, heads, 8, 128), "0" * 64)
    store = MapStore.begin(tmp_path, config, model, resume=True)
    n = -(-tokens // store.map_block(tokens))
    names = ["full", *(f"rows{rows}" for rows in config.rows)]
    tensors = {name: torch.zeros(1, heads, n, n, dtype=torch.float16) for name in names}
    tensors |= {"vertical": torch.zeros(1, heads, n).half()}
    tensors |= {"slash": torch.zeros(1, heads, n + 1).half()}
    tensors |= {"lines": torch.zeros(4, 8, 8, dtype=torch.float64)}
    of_heads = ("effect_change", "effect_lost", "step_change", "step_lost", "fp8_error")
    tensors |= {name: torch.zeros(1, heads) for name in of_heads}
    tensors |= {"effect_divergence": torch.zeros(1)}
    store.add("needle", torch.zeros(tokens, dtype=torch.int64), "digest", PromptMaps((0,), tensors))
    data = (tmp_path / store.prompts[0].file).read_bytes()
    assert len(data) - 8 - int.from_bytes(data[:8], "little") == store.prompt_bytes(tokens, 1)
    assert store.prompt_bytes(tokens, layers) <= 300_000_000
    # No smaller than it must be.
    assert n > 64


def test_resuming_keeps_what_is_there(tmp_path: Path) -> None:
    filled(tmp_path, prompts=2)
    assert len(MapStore.begin(tmp_path, CONFIG, MODEL, resume=True).prompts) == 2
    assert len(MapStore.begin(tmp_path, CONFIG, MODEL, resume=False).prompts) == 0
    assert not list(tmp_path.glob("*.safetensors"))


def test_resuming_takes_what_is_now_known_of_the_same_model(tmp_path: Path) -> None:
    filled(tmp_path, prompts=2)
    more = replace(MODEL, sketch="0c" * 128, checkpoint="0d" * 32)
    # What was captured may be of other positions, as no digest of the whole model was kept.
    known = replace(more, attention={"sliding_window": 8})
    begun = MapStore.begin(tmp_path, CONFIG, known, resume=True, digest="")
    assert begun.fingerprint.attention is None
    assert len(MapStore.begin(tmp_path, CONFIG, more, resume=True, digest="0e" * 32).prompts) == 2
    found = MapStore.open(tmp_path)
    assert asdict(found.fingerprint) == asdict(more)
    assert len(found.prompts) == 2
    MapStore.begin(tmp_path, CONFIG, known, resume=True, digest="0e" * 32)
    assert MapStore.open(tmp_path).fingerprint.attention == known.attention
    other = replace(known, attention={"sliding_window": 9})
    with pytest.raises(ConfigError, match="sliding_window 8 there, 9 now.; use --fresh"):
        MapStore.begin(tmp_path, CONFIG, other, resume=True, digest="0f" * 32)
    with pytest.raises(ConfigError, match="other ones elsewhere.*0e0e0e.* there, 0f0f0f.* now"):
        MapStore.begin(tmp_path, CONFIG, more, resume=True, digest="0f" * 32)


def test_resuming_removes_what_the_index_does_not_name(tmp_path: Path) -> None:
    store = filled(tmp_path, prompts=2)
    for name in ("maps-00002.safetensors", "codes.safetensors"):
        (tmp_path / name).write_bytes(b"")
    MapStore.begin(tmp_path, CONFIG, MODEL, resume=True).verify()
    kept = sorted(p.name for p in tmp_path.glob("*.safetensors"))
    assert kept == ["codes.safetensors", *(record.file for record in store.prompts)]


@pytest.mark.parametrize("resume", [True, False])
def test_a_start_deletes_no_file_of_others(tmp_path: Path, resume: bool) -> None:
    """Such as the weights of the model, in whose folder a calibration is begun."""
    others = {"model.safetensors", "model-00001-of-00002.safetensors", "maps-of-mine.safetensors"}
    for name in others:
        (tmp_path / name).write_bytes(b"weights")
    store = MapStore.begin(tmp_path, CONFIG, MODEL, resume=resume)
    store.add("needle", torch.arange(1), "digest", maps())
    MapStore.begin(tmp_path, CONFIG, MODEL, resume=resume)
    assert others <= {path.name for path in tmp_path.glob("*.safetensors")}


def test_a_fresh_start_killed_at_its_first_deletion_can_be_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled(tmp_path)
    unlink = Path.unlink

    def kill(path: Path, missing_ok: bool = False) -> None:
        unlink(path, missing_ok)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", kill)
        with pytest.raises(KeyboardInterrupt):
            MapStore.begin(tmp_path, CONFIG, MODEL, resume=False)
    resumed = MapStore.begin(tmp_path, CONFIG, MODEL, resume=True)
    resumed.verify()
    assert (resumed.prompts, list(tmp_path.glob("maps-*"))) == ([], [])


def test_another_configuration_is_refused_with_both_named(tmp_path: Path) -> None:
    filled(tmp_path)
    with pytest.raises(ConfigError, match="length 512 there, 1024 now"):
        MapStore.begin(tmp_path, replace(CONFIG, length=1024), MODEL, resume=True)
    other = replace(MODEL, geometry=ModelGeometry(3, 4, 2, 16))
    with pytest.raises(ConfigError, match=r"of 2 layers.*weights 000.* there; .*of 3 layers"):
        MapStore.begin(tmp_path, CONFIG, other, resume=True)
    assert len(MapStore.open(tmp_path).prompts) == 3


def test_a_damaged_shard_is_found(tmp_path: Path) -> None:
    store = filled(tmp_path)
    shard = tmp_path / store.prompts[1].file
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(DataError, match="maps-00001.*checksum"):
        MapStore.open(tmp_path).verify()
    shard.write_bytes(content[:100])
    with pytest.raises(DataError, match="maps-00001.*cannot be read"):
        store.load(1)
    shard.unlink()
    with pytest.raises(DataError, match="maps-00001.*cannot be read"):
        store.verify()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read"),
        ("[]", "damaged"),
        ("{}", "damaged"),
        ('{"format_version": 99}', "format version 99"),
        ("[" * 100_000, "cannot be read"),
    ],
)
def test_a_damaged_index_is_refused(tmp_path: Path, content: str, message: str) -> None:
    filled(tmp_path)
    (tmp_path / INDEX).write_text(content)
    with pytest.raises(DataError, match=message):
        MapStore.open(tmp_path)


def test_an_unknown_option_in_the_index_is_refused(tmp_path: Path) -> None:
    filled(tmp_path)
    index = json.loads((tmp_path / INDEX).read_text())
    index["config"]["colour"] = "red"
    del index["checksum"]  # as earlier versions wrote it
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(DataError, match="colour"):
        MapStore.open(tmp_path)


def test_an_index_that_was_changed_is_refused(tmp_path: Path) -> None:
    filled(tmp_path)
    whole = (tmp_path / INDEX).read_text()
    for old, new in (('"block_size": 64', '"block_size": 32'), ('"tokens": 2', '"tokens": "2"')):
        assert whole.count(old) == 1
        (tmp_path / INDEX).write_text(whole.replace(old, new))
        with pytest.raises(DataError, match=r"is damaged \(its checksum is another.*--fresh"):
            MapStore.open(tmp_path)


def test_no_calibration(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no calibration"):
        MapStore.open(tmp_path)
    with pytest.raises(DataError, match="holds no calibration"):
        newest_calibration(tmp_path)


def test_the_newest_calibration_is_found(tmp_path: Path) -> None:
    for name in ("a", "b"):
        filled(tmp_path / name / "calibration")
    first, second = tmp_path / "a" / "calibration", tmp_path / "b" / "calibration"
    assert newest_calibration(tmp_path) == second
    stamp = (second / INDEX).stat().st_mtime_ns + 10**9
    import os

    os.utime(first / INDEX, ns=(stamp, stamp))
    assert newest_calibration(tmp_path) == first


@pytest.mark.parametrize(
    ("layers", "heads", "tokens", "blocks"),
    [(30, 9, 8192, 64), (32, 32, 131_072, 128), (80, 64, 32_768, 86), (2, 2, 131_072, 128)],
    ids=["135M at 8K", "8B at 128K", "70B at 32K", "few heads"],
)
def test_the_maps_of_a_prompt_take_at_most_300_megabytes(
    tmp_path: Path, layers: int, heads: int, tokens: int, blocks: int
) -> None:
    config = CalibrateConfig(model="m", length=tokens)
    made_for = Fingerprint("llama", ModelGeometry(layers, heads, heads, 16), "0" * 64)
    store = MapStore(tmp_path, config, made_for, [])
    kept = -(-tokens // store.map_block(tokens))
    assert kept == blocks
    kinds = 1 + len(config.rows)
    assert layers * heads * kinds * kept * (kept + 1) / 2 * 2 <= 300e6


def test_maps_take_half_the_disk_of_squares(tmp_path: Path) -> None:
    store = filled(tmp_path)
    assert (tmp_path / store.prompts[0].file).stat().st_size < 2 * 4 * 8 * 8 * 2
