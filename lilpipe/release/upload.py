"""Upload of a release to the Hugging Face hub, with ``huggingface_hub``."""

from __future__ import annotations

import os
from pathlib import Path

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HfHubHTTPError

from lilpipe.config.release import HubConfig
from lilpipe.errors import ConfigError


def check_access(config: HubConfig) -> None:
    """Raise ``ConfigError`` if there is no token, or if the hub rejects it, before any work is done."""
    try:
        _api(config).whoami()
    except HfHubHTTPError as error:
        raise ConfigError(
            f"release.hub: the hub rejected the token in {config.token_variable} (HTTP {error.response.status_code}); "
            "set a token with write access"
        ) from error


def upload(directory: Path, config: HubConfig) -> str:
    """Create the repository and the branch if they do not exist, and commit the directory; return the commit's URL.

    Files that the hub has already are not sent again, so a retry continues. The network's errors are retryable.
    """
    api = _api(config)
    api.create_repo(config.repo_id, private=config.private, exist_ok=True)
    if config.revision != "main":
        api.create_branch(config.repo_id, branch=config.revision, exist_ok=True)
    commit = api.upload_folder(
        repo_id=config.repo_id,
        folder_path=directory,
        revision=config.revision,
        commit_message="Upload the model",
    )
    return commit.commit_url


def _api(config: HubConfig) -> HfApi:
    if constants.HF_HUB_OFFLINE:
        raise ConfigError(
            "release.hub.repo_id: HF_HUB_OFFLINE is 1, expected 0 for an upload; run `make pipeline HF_HUB_OFFLINE=0`, "
            "or set release.hub.repo_id = ''"
        )
    token = os.environ.get(config.token_variable)
    if not token:
        raise ConfigError(
            f"release.hub.token_variable: the environment variable {config.token_variable} is not set, expected an "
            "access token with write access; set it, or set release.hub.repo_id = ''"
        )
    return HfApi(endpoint=config.endpoint, token=token)
