"""Fetches models from a hub and finds the commit that a name means. Torch-free.

Every rank and task asks. The first one on a node fetches under a lock; the others wait, then find all files. A fetch
that was cut off goes on where it ended, and until it is done its snapshot counts as incomplete.
"""

from __future__ import annotations

import errno
import logging
import os
import re
from pathlib import Path
from typing import Any

from filelock import FileLock
from huggingface_hub import HfApi, constants, get_session, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from dist_ft.config import Config
from dist_ft.errors import DistFtError, HubUnreachableError, ModelError

logger = logging.getLogger(__name__)

_WANTED = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
# Weights a second time: other programs' formats in folders, and Mistral's own beside the index.
_UNWANTED = ["*/*.json", "*/*.safetensors", "*/*.model", "*/*.txt", "consolidated*.safetensors"]
_ANSWER_LIMIT_S = 10.0
_NOT_LOCAL = "is neither a directory, nor an embedded model (smollm2-135m-instruct, smollm2-135m-half, tiny-random)"


def resolve(config: Config) -> str:
    """Return the commit that `model.revision` means now, or the cached one if no hub answers.

    Raises:
        ModelError: The hub has no such model or revision, or does not say.
    """
    model = config.model
    if model.commit is not None:
        return model.commit
    _limit_waiting()
    try:
        return str(HfApi().resolve_revision(model.name, revision=model.revision).resolved)
    except Exception as error:  # the hub raises many types, and not all of them are its own
        raise explain(error, config, ModelError) from error


def fetch(config: Config) -> Path:
    """Return the directory of the model's files at its commit, fetched on first use.

    Raises:
        ModelError: They are not here, and the hub does not hand them out.
        HubUnreachableError: They are not here, and the hub breaks off or does not answer.
    """
    commit = resolve(config)
    try:
        try:
            return _snapshot(config, commit, local_files_only=True)
        except LocalEntryNotFoundError:
            _limit_waiting()
            logger.info("fetching %s at %s, or waiting for another process that does", config.model.name, commit)
            directory = Path(constants.HF_HUB_CACHE) / ".locks"
            directory.mkdir(parents=True, exist_ok=True)
            with FileLock(directory / f"dist-ft--{config.model.name.replace('/', '--')}.lock"):
                return _snapshot(config, commit, local_files_only=False)
    except Exception as error:
        raise explain(error, config, HubUnreachableError) from error


def explain(error: Exception, config: Config, unreachable: type[DistFtError]) -> DistFtError:
    """Return an error that says in one line, without a secret, what a user can do.

    It is an `unreachable` error if the reason is not known.
    """
    name, revision = config.model.name, config.model.commit or config.model.revision or constants.DEFAULT_REVISION
    key, hub, cache = f"model.name={name}", _shown(constants.ENDPOINT), constants.HF_HUB_CACHE
    token = "HF_TOKEN is set, but has no access" if os.environ.get("HF_TOKEN") else "HF_TOKEN is not set"
    match error:
        case GatedRepoError():
            return ModelError(
                f"{key} is gated ({token}): accept its licence at {hub}/{name}, and set HF_TOKEN to a token of that "
                "account in the environment of every machine"
            )
        case RepositoryNotFoundError():
            return ModelError(
                f"{key} {_NOT_LOCAL}, nor a model of {hub} that you may read ({token}); check the spelling, or set "
                "HF_TOKEN for a private one"
            )
        case RevisionNotFoundError():
            asked = "commit" if config.model.commit else "revision"
            return ModelError(f"model.{asked}={revision}: {name} has no such branch, tag or commit at {hub}")
        case HFValidationError():
            return ModelError(f"{key} {_NOT_LOCAL}, nor written like a hub id (`owner/name`)")
        case HfHubHTTPError() if error.response.status_code in (401, 403):
            return ModelError(f"{key}: {hub} refuses the request ({token}); check the token in HF_TOKEN")
        case OSError() if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return ModelError(f"{key}: no space left in {cache}; free some, or set HF_HOME to a larger disk")
        case OSError() if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            return ModelError(f"{key}: {cache} is not writable; set HF_HOME to a directory that is")
    if constants.is_offline_mode():
        return ModelError(
            f"{key}: HF_HUB_OFFLINE is set, and the cache {cache} does not hold {revision} of it whole; fetch it where "
            f"there is a network (hf download {name}) and point HF_HOME at it, or unset HF_HUB_OFFLINE"
        )
    reason = next((line for line in map(str.strip, str(error).splitlines()) if line), "no answer")
    return unreachable(
        f"{key}: {hub} cannot be read ({type(error).__name__}: {_shown(reason)}), and the cache {cache} does not hold "
        f"{revision} of it whole; try again, or fetch it elsewhere (hf download {name}) and set HF_HUB_OFFLINE=1"
    )


def _snapshot(config: Config, commit: str, local_files_only: bool) -> Path:
    code = ["*.py"] if config.model.trust_remote_code else []
    return Path(
        snapshot_download(
            config.model.name,
            revision=commit,
            allow_patterns=[*_WANTED, *code],
            ignore_patterns=_UNWANTED,
            local_files_only=local_files_only,
        )
    )


def _limit_waiting() -> None:
    """Set a limit on how long the hub's client waits for an answer; by itself it limits only files."""
    hooks = get_session().event_hooks["request"]
    if _limit not in hooks:
        hooks.append(_limit)


def _limit(request: Any) -> None:
    limits = request.extensions.get("timeout", {})
    if not any(limits.values()):
        request.extensions["timeout"] = dict.fromkeys(("connect", "read", "write", "pool"), _ANSWER_LIMIT_S)


def _shown(text: str) -> str:
    """Return a text without the user info of its URLs."""
    return re.sub(r"//[^/@\s]+@", "//", text)
