"""The Hugging Face hub: what a repository holds, before and by a download."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from iq_export.errors import ModelError
from iq_export.run.assets import read_object


@dataclass(frozen=True)
class HubModel:
    """A repository as seen from outside: its config.json, and bytes by file name.

    `sizes` is empty where only the cache of an earlier download could be asked.
    """

    config: dict[str, Any] | None
    sizes: Mapping[str, int]


def look_at(name: str, revision: str | None) -> HubModel | None:
    """Fetch config.json and the list of files of `name`; None if the hub cannot be reached.

    Raises ModelError if there is no such model, it may not be read or its config.json is damaged.
    """
    import huggingface_hub
    from huggingface_hub import errors

    with _explained(name, revision):
        try:
            path = huggingface_hub.hf_hub_download(name, "config.json", revision=revision)
            config = read_object(Path(path))
        except errors.LocalEntryNotFoundError:
            return None
        except errors.EntryNotFoundError:
            config = None
        except unreachable() as error:
            if isinstance(error, errors.HfHubHTTPError) and not _is_server_trouble(error):
                raise
            return None
        try:
            info = huggingface_hub.HfApi().model_info(name, revision=revision, files_metadata=True)
        except unreachable():
            return HubModel(config, {})
        sizes = {entry.rfilename: entry.size or 0 for entry in info.siblings or ()}
    return HubModel(config, sizes)


def download(name: str, revision: str | None, patterns: Sequence[str]) -> Path:
    """The folder of a repository's files that match `patterns`, downloaded or in the cache.

    Raises ModelError if the model cannot be had (unknown, gated, hub unreachable).
    """
    import huggingface_hub

    with _explained(name, revision):
        return Path(
            huggingface_hub.snapshot_download(
                name, revision=revision, allow_patterns=list(patterns)
            )
        )


def transport_errors() -> tuple[type[Exception], ...]:
    """What the hub client's HTTP library raises; which library it is depends on its version."""
    clients = [sys.modules.get(name) for name in ("httpx2", "httpx", "requests")]
    found = [
        getattr(client, name)
        for client in clients
        for name in ("HTTPError", "RequestException")
        if hasattr(client, name)
    ]
    return (ConnectionError, TimeoutError, *found)


def unreachable() -> tuple[type[Exception], ...]:
    """What a hub that does not answer, or a machine without a network, ends in."""
    from huggingface_hub import errors

    return (errors.LocalEntryNotFoundError, errors.HfHubHTTPError, *transport_errors())


def _is_server_trouble(error: Any) -> bool:
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status is None or status >= 500


@contextlib.contextmanager
def _explained(name: str, revision: str | None) -> Iterator[None]:
    """Turn what the hub's client raises into one ModelError."""
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError as error:
        raise ModelError(
            f"{name} is gated: accept its licence on https://huggingface.co/{name} and log in with "
            "`hf auth login`."
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise ModelError(
            f"There is no model '{name}' on the Hugging Face hub, or it is private: check the "
            "name, or log in with `hf auth login`."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ModelError(f"{name} has no revision '{revision}'.") from error
    except errors.HFValidationError as error:
        raise ModelError(f"'{name}' is not a valid hub id.") from error
    except unreachable() as error:
        raise ModelError(
            f"The Hugging Face hub cannot be reached for '{name}': download the model elsewhere "
            "and give its folder, or set HF_ENDPOINT to a mirror."
        ) from error
