"""Sending files to a repository of the Hugging Face hub, in one commit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from studio.errors import ConfigError, StudioError

CARD = "README.md"
ExistingCard = Literal["stop", "keep", "replace"]
"""What to do with a card that the repository has: send nothing, send all but the card, or all."""
_REFUSALS = {  # HTTP status -> what it means here
    401: "the token is not valid any more. Make a new one with `hf auth login`",
    403: "the token may not write there: it needs write permission for this user or organisation",
}


def check_repo(repo: str) -> None:
    """Raises ConfigError for what is no "user/name" that the hub takes."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as problem:
        raise ConfigError(f"'{repo}' is no repository of the hub: {problem}") from problem
    if "/" not in repo:
        raise ConfigError(f"'{repo}' says not whose repository: write USER/{repo}, with your name or an organisation's")


def upload(
    repo: str, contents: Mapping[str, Path | bytes], private: bool, existing_card: ExistingCard, message: str
) -> str:
    """Commits `contents` (path in the repository -> file here, or its bytes); returns the page's address.

    The repository is made where there is none yet. Nothing is sent where it is public and `private` is asked for,
    or where it has a card that may not be replaced. Raises ConfigError for these, without a token, and for what
    the token may not do; StudioError where the hub cannot be reached or refuses the files.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, get_token

    if get_token() is None:
        raise ConfigError("there is no token for the hub: log in with `hf auth login`, or put one into HF_TOKEN")
    api = HfApi()
    with _explained(repo):
        url = api.create_repo(repo, private=private or None, exist_ok=True)
        there = api.model_info(repo)
        if private and not there.private:
            raise ConfigError(
                f"'{repo}' exists and is public, so --private cannot hold: make it private in its settings on the hub, "
                "or choose another name"
            )
        if any(file.rfilename == CARD for file in there.siblings or ()):
            contents = _beside_a_card(contents, existing_card)
        operations = [
            CommitOperationAdd(path, content if isinstance(content, bytes) else str(content))
            for path, content in contents.items()
        ]
        api.create_commit(repo, operations, commit_message=message)
    return str(url)


def _beside_a_card(contents: Mapping[str, Path | bytes], policy: ExistingCard) -> Mapping[str, Path | bytes]:
    """What is sent to a repository that has a card, perhaps written by hand."""
    if policy == "stop":
        raise ConfigError(
            "the repository has a card already: --card replace puts the new one there, --card keep leaves it"
        )
    return contents if policy == "replace" else {path: one for path, one in contents.items() if path != CARD}


@contextmanager
def _explained(repo: str) -> Iterator[None]:
    """The failures of the hub's client as ours."""
    from huggingface_hub.errors import HfHubHTTPError, HTTPError

    try:
        yield
    except HfHubHTTPError as problem:
        status = problem.response.status_code
        if status in _REFUSALS:
            raise ConfigError(f"the hub refused '{repo}': {_REFUSALS[status]}") from problem
        reason = problem.server_message or str(problem).strip().splitlines()[0]
        raise StudioError(f"the hub refused '{repo}' ({status}): {reason}") from problem
    except (HTTPError, ConnectionError) as problem:
        raise StudioError(
            f"the hub cannot be reached ({problem}): check the connection, and HF_HUB_OFFLINE"
        ) from problem
    except ValueError as problem:  # the card's metadata, which the hub looks through first
        raise StudioError(f"the hub refused '{repo}': {problem}") from problem
    except RuntimeError as problem:  # of the storage behind the hub, whose own error is the cause
        raise StudioError(f"the upload to '{repo}' failed: {problem.__cause__ or problem}") from problem
