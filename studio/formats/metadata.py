"""The metadata of an adapter file: kohya's `ss_*`, Stability's `modelspec.*` (1.0.1), and the hashes.

Values are strings, as safetensors wants them. A1111 reads the base's version from
`ss_base_model_version` and `ss_v2`; managers read titles, tags and hashes.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from safetensors.torch import save
from torch import Tensor

from studio.formats.reading import ALPHA, rank_of, text_width
from studio.formats.state import AdapterState

_HASHES = ("sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256")
_FILE_KEYS = ("format", "lora_adapter_metadata")  # of one file, not of the adapter
_ARCHITECTURES = {
    "sd_v1": ("stable-diffusion-v1", 512),
    "sd_v1_v": ("stable-diffusion-v1", 512),
    "sd_v2": ("stable-diffusion-v2-512", 512),
    "sd_v2_v": ("stable-diffusion-v2-768-v", 768),
    "sdxl_base_v1-0": ("stable-diffusion-xl-v1-base", 1024),
}


def as_strings(facts: Mapping[str, Any]) -> dict[str, str]:
    """`ss_*` values as sd-scripts writes them: `str()` of numbers, truths and None, JSON of dicts and lists."""
    return {
        key: json.dumps(value) if isinstance(value, (dict, list, tuple)) else str(value) for key, value in facts.items()
    }


def describing(state: AdapterState) -> dict[str, str]:
    """Metadata that fits the tensors; what the state's own says about anything else is kept.

    A trainer gives `ss_base_model_version` ("sd_v2_v", ...) where the base predicts velocities.
    """
    given = {key: value for key, value in state.metadata.items() if key not in (*_HASHES, *_FILE_KEYS)}
    version = given.get("ss_base_model_version") or _version(state)
    architecture, side = _ARCHITECTURES.get(version, _ARCHITECTURES[_version(state)])
    defaults = {
        "ss_v2": str("_v2" in version),
        "ss_base_model_version": version,
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{architecture}/lora",  # sd-scripts says so of every method
        "modelspec.implementation": _implementation(state.family),
        "modelspec.title": given.get("ss_output_name", "adapter"),
        "modelspec.resolution": f"{side}x{side}",
        "modelspec.date": datetime.now().replace(microsecond=0).isoformat(),
        "modelspec.prediction_type": "v" if version.endswith("_v") else "epsilon",
    }
    return {**defaults, **given, **_network(state)}


def _version(state: AdapterState) -> str:
    if state.family == "sdxl":
        return "sdxl_base_v1-0"
    return "sd_v2" if text_width(state.tensors) == 1024 else "sd_v1"


def _implementation(family: str) -> str:
    """The code whose layer names the kohya file has, as sd-scripts states it."""
    return "https://github.com/Stability-AI/generative-models" if family == "sdxl" else "diffusers"


def _network(state: AdapterState) -> dict[str, str]:
    """What sd-scripts needs to build the network: module, rank, alpha, and arguments of the module."""
    linear: list[tuple[int, float]] = []
    convolutions: list[tuple[int, float]] = []
    for entry in state.tensors.values():
        if (rank := rank_of(entry)) is not None and ALPHA in entry:
            kernel = max((size for tensor in entry.values() for size in tensor.shape[2:]), default=1)
            (convolutions if kernel > 1 else linear).append((rank, float(entry[ALPHA])))
    module, args = _module(state.methods)
    if convolutions:
        args |= {"conv_dim": _common(convolutions, 0), "conv_alpha": _common(convolutions, 1)}
    return {
        "ss_network_module": module,
        "ss_network_dim": _common(linear or convolutions, 0),
        "ss_network_alpha": _common(linear or convolutions, 1),
        "ss_network_args": json.dumps(args),
    }


_LYCORIS = {
    "norm": {"train_norm": "True"},
    "dora": {"algo": "lora", "dora_wd": "True"},
    "tucker": {"algo": "lora", "use_tucker": "True"},
    "diff": {"algo": "full"},
    "oft": {"algo": "diag-oft"},
    **{method: {"algo": method} for method in ("lora", "loha", "lokr", "ia3", "boft")},
}


def _module(methods: Mapping[str, int]) -> tuple[str, dict[str, str]]:
    """(sd-scripts' network module, its arguments): its own for LoRA, LyCORIS's, or ours for what neither has."""
    if set(methods) <= {"lora"}:
        return "networks.lora", {}
    if not set(methods) <= _LYCORIS.keys():
        return "studio.adapters", {"algo": ", ".join(methods)}
    args: dict[str, str] = {}
    for method in reversed(list(methods)):  # the algorithm is that of the most layers
        args |= _LYCORIS[method]
    return "lycoris.kohya", args


def _common(settings: list[tuple[int, float]], place: int) -> str:
    """The one value of all layers, "Dynamic" where they differ, "None" without any."""
    values = {setting[place] for setting in settings}
    return "Dynamic" if len(values) > 1 else f"{values.pop():g}" if values else "None"


def with_hashes(state: AdapterState, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """`describing(state)` with the hashes of a file that holds `tensors`."""
    metadata = describing(state)
    model_hash, legacy_hash = hashes(tensors, metadata)
    return {
        "format": "pt",
        **metadata,
        "modelspec.hash_sha256": f"0x{model_hash}",
        "sshs_model_hash": model_hash,
        "sshs_legacy_hash": legacy_hash,
    }


def hashes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> tuple[str, str]:
    """(`sshs_model_hash`, `sshs_legacy_hash`), as sd-scripts computes them.

    sha256 of the tensor bytes, and the first 8 digits of that of 64 KiB at 1 MiB, both of a file
    whose metadata is only the `ss_*` part: other metadata may change without changing the identity.
    """
    kept = {key: value for key, value in metadata.items() if key.startswith("ss_")}
    content = save({key: tensor.contiguous() for key, tensor in tensors.items()}, kept)
    (header,) = struct.unpack("<Q", content[:8])
    legacy = content[0x100000 : 0x100000 + 0x10000]
    return hashlib.sha256(content[8 + header :]).hexdigest(), hashlib.sha256(legacy).hexdigest()[:8]
