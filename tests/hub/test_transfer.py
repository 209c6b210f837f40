from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from shareprefill.artifact import artifact_bytes, load_artifact, save_artifact
from shareprefill.errors import ArtifactError, ConfigError, DataError
from shareprefill.hub.transfer import LARGEST, pull, push
from tests.support.hub import FakeHub, fake_hub
from tests.support.tiny import tiny_artifact, tiny_llama


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A hub; an artifact `a.st` in the current, otherwise empty folder."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    save_artifact(tiny_artifact(tiny_llama()), "a.st")
    with fake_hub() as running:
        yield running


def files() -> set[str]:
    return {path.name for path in Path().iterdir()}


def test_what_is_pushed_is_pulled_to_the_byte(hub: FakeHub) -> None:
    data = Path("a.st").read_bytes()
    upload = push("a.st", "me/patterns", endpoint=hub.address)
    assert upload.address == f"{hub.address}/me/patterns/commit/{hub.sha('me/patterns')}"
    assert hub.repositories["me/patterns"] == {"a.st": data, "README.md": upload.card.encode()}
    Path("a.st").unlink()
    artifact, path = pull("me/patterns", endpoint=hub.address)
    assert (path, path.read_bytes()) == (Path("a.st"), data)
    assert artifact_bytes(artifact) == data
    # The commit that was listed is the one that is fetched.
    assert hub.requests[-1] == f"GET /me/patterns/resolve/{hub.sha('me/patterns')}/a.st"
    assert files() == {"a.st"}


def test_nothing_is_overwritten_without_force(hub: FakeHub) -> None:
    push("a.st", "me/patterns", endpoint=hub.address)
    before = dict(hub.repositories["me/patterns"])
    save_artifact(replace(tiny_artifact(tiny_llama()), model="other"), "b.st")
    with pytest.raises(DataError, match=r"has README.md and a.st already: use --force"):
        push("b.st", "me/patterns", file="a.st", endpoint=hub.address)
    with pytest.raises(DataError, match=r"has README.md already"):
        push("b.st", "me/patterns", endpoint=hub.address)
    assert hub.repositories["me/patterns"] == before
    push("b.st", "me/patterns", file="a.st", force=True, endpoint=hub.address)
    assert hub.repositories["me/patterns"]["a.st"] == Path("b.st").read_bytes()
    old = Path("a.st").read_bytes()
    with pytest.raises(DataError, match=r"a.st exists: use --force"):
        pull("me/patterns", endpoint=hub.address)
    assert Path("a.st").read_bytes() == old
    pull("me/patterns", force=True, endpoint=hub.address)
    assert load_artifact("a.st").model == "other"


def test_a_dry_run_sends_nothing(hub: FakeHub) -> None:
    upload = push("a.st", "me/patterns", dry_run=True, endpoint=hub.address)
    assert (upload.address, hub.requests) == (None, [])
    assert upload.card.startswith("---\n")


def test_what_the_loader_refuses_gets_no_name(hub: FakeHub) -> None:
    good = Path("a.st").read_bytes()
    hub.repositories["me/patterns"] = {
        "a.st": good,
        "cut.st": good[:-1],
        "edited.st": good[:-1] + bytes([good[-1] ^ 1]),
        "page.st": b"<html>not an artifact</html>",
    }
    for name in ("cut.st", "edited.st", "page.st"):
        with pytest.raises(ArtifactError, match="is not usable"):
            pull("me/patterns", file=name, endpoint=hub.address)
        with pytest.raises(ArtifactError, match="is not usable"):
            pull("me/patterns", "a.st", file=name, force=True, endpoint=hub.address)
    assert files() == {"a.st"}
    assert Path("a.st").read_bytes() == good


def test_a_huge_file_is_not_fetched(hub: FakeHub) -> None:
    hub.repositories["me/patterns"] = {"big.st": b""}
    hub.sizes["big.st"] = LARGEST + 1
    with pytest.raises(ArtifactError, match=f"has {LARGEST + 1} bytes, more than"):
        pull("me/patterns", endpoint=hub.address)
    assert not any("resolve" in request for request in hub.requests)


def test_which_file_is_pulled(hub: FakeHub) -> None:
    good = Path("a.st").read_bytes()
    hub.repositories["me/patterns"] = {
        "b.st": good,
        "README.md": b"",
        "../c.st": b"",
        "d/e.st": b"",
    }
    assert pull("me/patterns", endpoint=hub.address)[1] == Path("b.st")
    hub.repositories["me/patterns"]["f.st"] = good
    with pytest.raises(DataError, match=r"holds b.st, f.st: name one with --file"):
        pull("me/patterns", "g.st", endpoint=hub.address)
    with pytest.raises(DataError, match=r"holds b.st, f.st: not h.st"):
        pull("me/patterns", "g.st", file="h.st", endpoint=hub.address)
    hub.repositories["me/patterns"] = {"\x1b.st": good}
    with pytest.raises(DataError, match=r"holds no artifact: name one"):
        pull("me/patterns", "g.st", endpoint=hub.address)
    assert files() == {"a.st", "b.st"}


def test_requests_that_fail(hub: FakeHub) -> None:
    with pytest.raises(DataError, match="no repository me/none that you may read: log in"):
        pull("me/none", endpoint=hub.address)
    hub.repositories["me/patterns"] = {"a.st": b""}
    with pytest.raises(DataError, match="no such revision or file: check --revision"):
        pull("me/patterns", revision="v9", endpoint=hub.address)
    hub.refuse = 403
    with pytest.raises(DataError, match=r"refused a request for me/x \(403\): log in"):
        push("a.st", "me/x", endpoint=hub.address)


@pytest.mark.parametrize("value", [b"<html>sign in</html>", [], {"name": "me/x"}, b""])
def test_answers_of_something_else(value: object, hub: FakeHub) -> None:
    """Such as a proxy's, or the page of a network that wants a sign-in."""
    hub.answers["/api/models"] = (200, value)
    with pytest.raises(DataError, match=r"answered for me/x is no hub .*check HF_ENDPOINT"):
        pull("me/x", endpoint=hub.address)
    with pytest.raises(DataError, match=r"answered for me/x is no hub .*check HF_ENDPOINT"):
        push("a.st", "me/x", endpoint=hub.address)
    assert files() == {"a.st"}


def test_a_file_that_the_hub_does_not_give(hub: FakeHub) -> None:
    hub.repositories["me/patterns"] = {"a.st": Path("a.st").read_bytes()}
    hub.answers["/me/patterns/resolve"] = (200, b"an answer without the hub's headers")
    with pytest.raises(DataError, match="cannot be reached for me/patterns"):
        pull("me/patterns", "b.st", endpoint=hub.address)
    assert files() == {"a.st"}


def test_a_damaged_copy_in_the_cache_is_fetched_again(hub: FakeHub, tmp_path: Path) -> None:
    good = Path("a.st").read_bytes()
    hub.repositories["me/patterns"] = {"a.st": good}
    pull("me/patterns", "b.st", endpoint=hub.address)
    blobs = [path for path in (tmp_path / "cache").rglob("blobs/*") if path.is_file()]
    assert len(blobs) == 1
    blobs[0].write_bytes(good[:100])
    pull("me/patterns", "c.st", endpoint=hub.address)
    assert Path("c.st").read_bytes() == good


def test_a_cache_that_cannot_be_used(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repositories["me/patterns"] = {"a.st": Path("a.st").read_bytes()}
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "file"))
    with pytest.raises(DataError, match=r"cache cannot be used .*HF_HOME"):
        pull("me/patterns", "b.st", endpoint=hub.address)


def test_a_public_repository_does_not_get_what_is_to_be_private(hub: FakeHub) -> None:
    hub.repositories["me/patterns"] = {}
    hub.public.add("me/patterns")
    with pytest.raises(DataError, match="me/patterns is there and public: leave out --private"):
        push("a.st", "me/patterns", private=True, endpoint=hub.address)
    assert hub.repositories["me/patterns"] == {}
    push("a.st", "me/patterns", endpoint=hub.address)


def test_what_was_checked_is_pushed(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not what another process writes there meanwhile."""
    good = Path("a.st").read_bytes()

    def replaced(*given: object) -> str:
        Path("a.st").write_bytes(b"another file")
        return "card"

    monkeypatch.setattr("shareprefill.hub.transfer.model_card", replaced)
    push("a.st", "me/patterns", endpoint=hub.address)
    assert hub.repositories["me/patterns"]["a.st"] == good


def test_a_hub_that_is_not_there(hub: FakeHub) -> None:
    # Port 9 of the loopback: nothing listens.
    with pytest.raises(DataError, match=r"cannot be reached for me/x \(.*check the connection"):
        pull("me/x", endpoint="http://127.0.0.1:9")


@pytest.mark.parametrize("name", ["patterns", "a/b/c", "../b", "a/b c", "", "a/\n"])
def test_bad_repositories(name: str, hub: FakeHub) -> None:
    with pytest.raises(ConfigError, match="give organisation/name"):
        push("a.st", name, endpoint=hub.address)
    with pytest.raises(ConfigError, match="give organisation/name"):
        pull(name, endpoint=hub.address)
    assert hub.requests == []


@pytest.mark.parametrize("name", ["a", "../a.st", "b/a.st", ".st", "README.md", "a\n.st"])
def test_bad_names_of_files(name: str, hub: FakeHub) -> None:
    with pytest.raises(ConfigError, match="give a plain name that ends in .st"):
        push("a.st", "me/patterns", file=name, endpoint=hub.address)
    with pytest.raises(ConfigError, match="give a plain name that ends in .st"):
        pull("me/patterns", file=name, endpoint=hub.address)


def test_what_is_no_artifact_is_not_pushed(hub: FakeHub) -> None:
    Path("bad.st").write_bytes(b"{}")
    for name, problem in (("bad.st", "is not usable"), ("none.st", "does not exist")):
        with pytest.raises(ArtifactError, match=problem):
            push(name, "me/patterns", endpoint=hub.address)
    assert hub.requests == []
