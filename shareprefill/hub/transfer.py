"""Artifacts to and from repositories of the hub."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from shareprefill.artifact import Artifact, load_with_bytes
from shareprefill.errors import ArtifactError, ConfigError, DataError
from shareprefill.files import atomic_write_bytes, locked_output, printable
from shareprefill.hub.card import model_card
from shareprefill.safetensors_reader import MAX_DATA, MAX_HEADER

if TYPE_CHECKING:
    from huggingface_hub.hf_api import ModelInfo

CARD = "README.md"
SUFFIX = ".st"
LARGEST = MAX_DATA + MAX_HEADER + 8
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_FILE = re.compile(r"[A-Za-z0-9][\w.-]{0,199}\.st", re.ASCII)


@dataclass(frozen=True)
class Upload:
    """What `push` wrote, or would write.

    Attributes:
        repository: The repository's id.
        file: The artifact's name there.
        card: The text of its README.md.
        address: Of the commit; None: nothing was written.
    """

    repository: str
    file: str
    card: str
    address: str | None


def push(
    path: str | Path,
    repository: str,
    *,
    file: str | None = None,
    private: bool = False,
    force: bool = False,
    dry_run: bool = False,
    endpoint: str | None = None,
) -> Upload:
    """Puts an artifact and a model card about it into a repository, in one commit.

    The repository is made where it is missing. The token is huggingface_hub's own (`hf auth login`
    or HF_TOKEN).

    Args:
        path: The artifact; it is checked before anything is sent.
        repository: `organisation/name`.
        file: The artifact's name there; its own by default.
        private: Make a missing repository private; one that is there and public is refused.
        force: Replace a file of that name, and the README.md that is there.
        dry_run: Make the card, and send nothing.
        endpoint: The hub's address; None: huggingface_hub's default, or HF_ENDPOINT.

    Raises:
        ArtifactError: the file is no artifact.
        ConfigError: the repository or the name is no such thing.
        DataError: the repository has such a file already, cannot be written, or not be reached.
    """
    path = Path(path)
    file = path.name if file is None else file
    _check_names(repository, file)
    artifact, data = load_with_bytes(path)
    card = model_card(artifact, file, repository)
    if dry_run:
        return Upload(repository, file, card, None)
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi(endpoint=endpoint)
    with _hub_errors(repository):
        api.create_repo(repository, private=private, exist_ok=True)
        there = api.model_info(repository)
        if private and there.private is False:
            raise DataError(
                f"{repository} is there and public: leave out --private, or make it private first"
            )
        found = sorted({file, CARD} & set(_files(there)))
        if found and not force:
            raise DataError(
                f"{repository} has {' and '.join(found)} already: use --force to replace, or "
                "another repository"
            )
        commit = api.create_commit(
            repository,
            [
                CommitOperationAdd(file, data),
                CommitOperationAdd(CARD, card.encode()),
            ],
            commit_message=f"Add {file}",
            # Refused by the hub if somebody wrote there meanwhile.
            parent_commit=there.sha,
        )
    return Upload(repository, file, card, commit.commit_url)


def pull(
    repository: str,
    out: str | Path | None = None,
    *,
    file: str | None = None,
    revision: str | None = None,
    force: bool = False,
    endpoint: str | None = None,
) -> tuple[Artifact, Path]:
    """Gets an artifact from a repository; it is checked before it gets its name.

    Args:
        repository: `organisation/name`.
        out: The file to write; None: the artifact's name, in the current folder.
        file: The artifact's name in the repository; None: the only one there.
        revision: A branch, tag or commit; None: the main branch.
        force: Replace a file that is there.
        endpoint: As for `push`.

    Returns:
        The artifact, and where it was written.

    Raises:
        ArtifactError: what the repository holds is no artifact; nothing is written.
        ConfigError: the repository or the name is no such thing.
        DataError: there is no such repository or file, several could be meant, a file stands in
            the way, or the hub cannot be reached.
    """
    from huggingface_hub import HfApi

    _check_names(repository, file)
    api = HfApi(endpoint=endpoint)
    with _hub_errors(repository):
        there = api.model_info(repository, revision=revision, files_metadata=True)
        sizes = _files(there)
    name = _choose(repository, sizes, file)
    target = Path(name if out is None else out)
    with locked_output(target):
        if target.exists() and not force:
            raise DataError(f"{printable(target)} exists: use --force to replace it, or --out")
        if (sizes[name] or 0) > LARGEST:
            raise ArtifactError(
                f"{name} of {repository} has {sizes[name]} bytes, more than an artifact may have "
                f"({LARGEST})"
            )
        with _hub_errors(repository):
            # Into the hub's cache, which outlives a kill; the commit that was looked at, whatever
            # is pushed meanwhile.
            found = api.hf_hub_download(repository, name, revision=there.sha)
            try:
                artifact, data = load_with_bytes(found)
            except ArtifactError:
                # The copy in the cache may be damaged, which is not looked at again otherwise.
                found = api.hf_hub_download(
                    repository, name, revision=there.sha, force_download=True
                )
                artifact, data = load_with_bytes(found)
        atomic_write_bytes(target, data)
    return artifact, target


def _choose(repository: str, sizes: dict[str, int | None], file: str | None) -> str:
    artifacts = sorted(name for name in sizes if _FILE.fullmatch(name))
    if file is None and len(artifacts) == 1:
        return artifacts[0]
    if file in artifacts:
        return file
    listed = printable(", ".join(artifacts)) or "no artifact"
    wanted = "name one with --file" if file is None else f"not {printable(file)}"
    raise DataError(f"{repository} holds {listed}: {wanted}")


def _files(repository: ModelInfo) -> dict[str, int | None]:
    return {sibling.rfilename: sibling.size for sibling in repository.siblings or ()}


def _check_names(repository: str, file: str | None) -> None:
    if not _REPOSITORY.fullmatch(repository):
        raise ConfigError(
            f"repository = {printable(repository)!r} is not allowed: give organisation/name"
        )
    if file is not None and not _FILE.fullmatch(file):
        raise ConfigError(
            f"file = {printable(file)!r} is not allowed: give a plain name that ends in {SUFFIX}, "
            "without spaces or folders"
        )


@contextmanager
def _hub_errors(repository: str) -> Iterator[None]:
    """Says what a failed request means, and what to do."""
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    # The HTTP library, and with it the class of its errors, differs among the hub's versions.
    http_error: type[Exception] = HfHubHTTPError.__bases__[0]
    login = "log in with hf auth login, or check the name"
    try:
        yield
    except GatedRepoError as error:
        raise DataError(f"{repository} asks for its owner's consent: ask for it there") from error
    except RepositoryNotFoundError as error:
        raise DataError(
            f"there is no repository {repository} that you may read: {login}"
        ) from error
    except LocalEntryNotFoundError as error:
        # What it says is that the cache lacks the file; why the hub did not give it is its cause.
        raise _unreachable(repository, error.__cause__ or error) from error
    except (RevisionNotFoundError, EntryNotFoundError) as error:
        raise DataError(f"{repository} has no such revision or file: check --revision") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        advice = login if status in (401, 403) else _reason(error)
        raise DataError(
            f"the hub refused a request for {repository} ({status}): {advice}"
        ) from error
    except (OSError, http_error) as error:
        if isinstance(error, OSError) and error.filename is not None:
            raise DataError(
                f"the hub's cache cannot be used ({_reason(error)}): make room there, or choose "
                "another folder with HF_HOME"
            ) from error
        raise _unreachable(repository, error) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"what answered for {repository} is no hub ({_reason(error)}): check HF_ENDPOINT, and "
            "whether a proxy or a sign-in page answers in its place"
        ) from error


def _unreachable(repository: str, error: BaseException) -> DataError:
    return DataError(
        f"the hub cannot be reached for {repository} ({_reason(error)}): check the connection, "
        "and HF_ENDPOINT"
    )


def _reason(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return printable(lines[0].rstrip(". "), 160)
