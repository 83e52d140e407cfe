"""What an adapter file holds, in numbers, for `studio inspect`."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from studio.formats import AdapterState, adapter_path, format_of, read_adapter
from studio.formats.reading import ALPHA, rank_of


def describe_adapter(source: str | Path) -> dict[str, Any]:
    """`description` of what is in a file, a folder or a hub repository. Raises ConfigError as `read_adapter` does."""
    path = adapter_path(source)
    return description(read_adapter(path), path, format_of(path))


def description(state: AdapterState, path: Path, format: str) -> dict[str, Any]:
    """A summary that goes into JSON as it is.

    `method` names all methods, the most frequent first; `ranks` and `alphas` count the layers that have one
    by value; `layers` counts them by component; `tokens` holds the number of vectors of each trained token;
    `parameters` leaves alphas out.
    """
    factors = [tensor for entry in state.tensors.values() for suffix, tensor in entry.items() if suffix != ALPHA]
    factors += [vectors for parts in state.embeddings.values() for vectors in parts.values()]
    return {
        "path": str(path),
        "format": format,
        "method": ", ".join(state.methods),
        "family": state.family,
        "layers": dict(Counter(name.partition(".")[0] for name in state.tensors)),
        "ranks": _counts(rank for entry in state.tensors.values() if (rank := rank_of(entry))),
        "alphas": _counts(float(entry[ALPHA]) for entry in state.tensors.values() if ALPHA in entry),
        "tokens": {token: len(next(iter(parts.values()))) for token, parts in state.embeddings.items()},
        "parameters": sum(tensor.numel() for tensor in factors),
        "dtypes": _counts(str(tensor.dtype).removeprefix("torch.") for tensor in factors),
        "bytes": sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) or path.stat().st_size,
        "metadata": dict(state.metadata),
    }


def _counts(values: Any) -> dict[str, int]:
    return {f"{value}": count for value, count in Counter(values).most_common()}
