"""Downloads from the Hugging Face hub, and their failures in one line.

Files arrive in the hub's own cache, so a second call needs no network. What a file holds is not
known here.
"""

import warnings
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from runtime.errors import UserError


def download_file(
    name: str, file: str, *, subfolder: str | None = None, revision: str | None = None
) -> Path:
    """Download one file of a repository.

    Raises:
        Exception: as huggingface_hub raises it; see `explain_failures`.
    """
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(name, file, subfolder=subfolder, revision=revision))


def download_optional_file(name: str, file: str, *, revision: str | None = None) -> Path | None:
    """Download one file of a repository; None if the repository has no such file.

    Raises:
        Exception: as huggingface_hub raises it; see `explain_failures`.
    """
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        return download_file(name, file, revision=revision)
    except LocalEntryNotFoundError:  # a subclass of the next one: the hub is out of reach
        raise
    except EntryNotFoundError:
        return None


def download_matching(name: str, patterns: Sequence[str]) -> Path:
    """Download the files of a repository that match one of the patterns; returns their folder.

    Raises:
        Exception: as huggingface_hub raises it; see `explain_failures`.
    """
    import huggingface_hub

    return Path(huggingface_hub.snapshot_download(name, allow_patterns=list(patterns)))


def download_config(
    name: str, subfolder: str | None, revision: str | None, *, file: str
) -> tuple[dict[str, Any], str | None, str | None]:
    """Download a network's config through diffusers, which counts downloads by it.

    A pipeline's repository has no config of its own: its network lies in `subfolder`, if there may
    be one.

    Returns:
        The config, its commit, and the subfolder it lies in, None for the repository's root.
    """
    from huggingface_hub.errors import EntryNotFoundError

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of diffusers, at its import and of what it calls
        from diffusers.configuration_utils import ConfigMixin

        class Config(ConfigMixin):
            config_name = file

        def load(place: str | None) -> Any:
            return Config.load_config(
                name, subfolder=place, revision=revision, return_commit_hash=True
            )

        try:
            config, commit = load(None)
            return config, commit, None
        except OSError as error:
            is_absent = any(isinstance(x, EntryNotFoundError) for x in _iterate_causes(error))
            if not (subfolder and is_absent):
                raise
        config, commit = load(subfolder)
        return config, commit, subfolder


def find_cached(name: str, file: str, revision: str | None) -> Path | None:
    """Return a file's path in the hub's cache, if it was downloaded before."""
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(name, file, revision=revision)
    return Path(cached) if isinstance(cached, str) else None


def is_recorded_absent(name: str, file: str, revision: str | None) -> bool:
    """Return True if the hub once answered that the repository has no such file."""
    from huggingface_hub import _CACHED_NO_EXIST, try_to_load_from_cache

    return try_to_load_from_cache(name, file, revision=revision) is _CACHED_NO_EXIST


@contextmanager
def explain_failures(
    name: str, *, required: str, revision: str | None = None, purpose: str = ""
) -> Generator[None]:
    """Turn what the hub's client and diffusers raise into a `UserError` of one line.

    Args:
        required: the files that the repository must hold.
        purpose: what the repository is opened for, such as "Inception".
    """
    from huggingface_hub import errors

    reasons = {
        errors.GatedRepoError: "its owner asks who uses it; accept the terms on "
        f"https://huggingface.co/{name}, then run `hf auth login`",
        errors.RepositoryNotFoundError: "it is neither a local path nor a public model of the "
        "hub; for a private one, run `hf auth login`",
        errors.RevisionNotFoundError: f"the hub has no revision '{revision}' of it",
        errors.LocalEntryNotFoundError: "it is not a local path, not complete in the hub's "
        f"cache, and the hub is out of reach; once online, run `hf download {name}`",
        errors.EntryNotFoundError: f"it holds no {required}",
        errors.HFValidationError: "it is neither a local path nor a valid id of the hub",
    }
    subject = f"cannot load {purpose} '{name}'" if purpose else f"cannot load '{name}'"
    try:
        yield
    except Exception as error:  # the hub's client also raises the kinds of its transport
        causes = list(_iterate_causes(error))
        for cause in causes:
            for kind, reason in reasons.items():
                if isinstance(cause, kind):
                    raise UserError(f"{subject}: {reason}") from error
        root = causes[-1]
        reason = str(root).strip().partition("\n")[0] or type(root).__name__
        raise UserError(f"{subject}: {reason}") from error


def _iterate_causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
