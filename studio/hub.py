"""What the Hugging Face hub's failures mean, in a sentence."""

from __future__ import annotations

from collections.abc import Iterator

from safetensors import SafetensorError


def load_errors() -> tuple[type[Exception], ...]:
    """What the hub's client, and diffusers behind it, raise for a part that cannot be had or is damaged."""
    from huggingface_hub.errors import HTTPError  # of whichever HTTP library the client uses; not always an OSError

    return (OSError, ValueError, SafetensorError, HTTPError)


def hub_reason(problem: Exception) -> str:
    """Why the hub did not give something: that it cannot be reached, or the first line of what it answered."""
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalEntryNotFoundError

    for cause in _chain(problem):
        if isinstance(cause, HfHubHTTPError):
            break  # an answer
        if isinstance(cause, LocalEntryNotFoundError | ConnectionError | HTTPError):
            return (
                "the hub cannot be reached. Check the connection; what was downloaded before can be used with "
                "HF_HUB_OFFLINE=1 in the environment."
            )
    return (str(problem).strip() or type(problem).__name__).splitlines()[0]


def _chain(problem: BaseException | None) -> Iterator[BaseException]:
    """A problem and what led to it: diffusers puts its own errors before the hub client's."""
    while problem is not None:
        yield problem
        problem = problem.__cause__ or problem.__context__
