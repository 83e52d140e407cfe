"""The metadata of an adapter file: kohya's `ss_*`, Stability's `modelspec.*` (1.0.1), and the hashes.

Values are strings, as safetensors wants them. A1111 reads the base's version from
`ss_base_model_version` and `ss_v2`; managers read titles, tags and hashes. `describing` fits a file's
metadata to its tensors, `merged` makes that of a blend out of its inputs'.
"""

from __future__ import annotations

import base64
import hashlib
import json
import struct
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from io import BytesIO
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from studio.formats.files import apart
from studio.formats.reading import ALPHA, rank_of, text_width
from studio.formats.state import AdapterState

OF_ONE_FILE = ("format", "lora_adapter_metadata", "sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256")
"""What fits the tensors of one file alone, and so never passes on to another."""
_ARCHITECTURES = {  # sd-scripts' version of the base -> (modelspec's name of it, its pixels a side)
    "sd_v1": ("stable-diffusion-v1", 512),
    "sd_v1_v": ("stable-diffusion-v1", 512),
    "sd_v2": ("stable-diffusion-v2-512", 512),
    "sd_v2_v": ("stable-diffusion-v2-768-v", 768),
    "sdxl_base_v1-0": ("stable-diffusion-xl-v1-base", 1024),
    "medium": ("stable-diffusion-3-medium", 1024),
    "5-medium": ("stable-diffusion-3-5-medium", 1024),
    "5-large": ("stable-diffusion-3-5-large", 1024),
    "flux1": ("flux-1-dev", 1024),  # schnell has the same layers: who trained on it says so
}
_IMPLEMENTATIONS = {  # whose layer names the kohya file has, as sd-scripts states it
    "sd": "diffusers",
    "sdxl": "https://github.com/Stability-AI/generative-models",
    "sd3": "diffusers",
    "flux": "https://github.com/black-forest-labs/flux",
}
_FLOWS = ("sd3", "flux")  # they predict a flow, for which modelspec has no word


def as_strings(facts: Mapping[str, Any]) -> dict[str, str]:
    """`ss_*` values as sd-scripts writes them: `str()` of numbers, truths and None, JSON of dicts and lists."""
    return {
        key: json.dumps(value) if isinstance(value, (dict, list, tuple)) else str(value) for key, value in facts.items()
    }


def describing(state: AdapterState) -> dict[str, str]:
    """Metadata that fits the tensors; what the state's own says about anything else is kept.

    A trainer gives `ss_base_model_version` ("sd_v2_v", ...) where the base predicts velocities.
    """
    given = {key: value for key, value in state.metadata.items() if key not in OF_ONE_FILE}
    version = given.get("ss_base_model_version") or base_version(state)
    architecture, side = _ARCHITECTURES.get(version, _ARCHITECTURES[base_version(state)])
    kind = "lora" if state.tensors else "textual-inversion"  # sd-scripts says "lora" of every method
    defaults = {
        "ss_v2": str("_v2" in version),
        "ss_base_model_version": version,
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{architecture}/{kind}",
        "modelspec.implementation": _IMPLEMENTATIONS[state.family],
        "modelspec.title": given.get("ss_output_name", "adapter"),
        "modelspec.resolution": f"{side}x{side}",
        "modelspec.date": datetime.now().replace(microsecond=0).isoformat(),
    }
    if state.family not in _FLOWS:
        defaults["modelspec.prediction_type"] = "v" if version.endswith("_v") else "epsilon"
    return {**defaults, **given, **(_network(state) if state.tensors else {})}


def base_version(state: AdapterState) -> str:
    """sd-scripts' version of the base, as far as the layers tell."""
    if state.family == "sd":
        widths = {vectors.shape[-1] for parts in state.embeddings.values() for vectors in parts.values()}
        return "sd_v2" if text_width(state.tensors) == 1024 or 1024 in widths else "sd_v1"
    return {"sdxl": "sdxl_base_v1-0", "flux": "flux1"}.get(state.family) or _version_of_sd3(state.tensors)


def _version_of_sd3(names: Iterable[str]) -> str:
    """Only 3.5 large has more than 24 blocks, and only 3.5 medium a second attention in some of them."""
    blocks = [name for name in names if name.startswith("transformer.transformer_blocks.")]
    if any(int(name.split(".")[2]) >= 24 for name in blocks):
        return "5-large"
    return "5-medium" if any(".attn2." in name for name in blocks) else "medium"


def _network(state: AdapterState) -> dict[str, str]:
    """What sd-scripts needs to build the network: module, rank, alpha, and arguments of the module."""
    linear: list[tuple[int, float]] = []
    convolutions: list[tuple[int, float]] = []
    for entry in state.tensors.values():
        if (rank := rank_of(entry)) is not None and ALPHA in entry:
            kernel = max((size for tensor in entry.values() for size in tensor.shape[2:]), default=1)
            (convolutions if kernel > 1 else linear).append((rank, float(entry[ALPHA])))
    module, args = _module(state.methods, state.family)
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


_LORA_MODULES = {"sd3": "networks.lora_sd3", "flux": "networks.lora_flux"}


def _module(methods: Mapping[str, int], family: str) -> tuple[str, dict[str, str]]:
    """(sd-scripts' network module, its arguments): its own for LoRA, LyCORIS's, or ours for what neither has."""
    if set(methods) <= {"lora"}:
        return _LORA_MODULES.get(family, "networks.lora"), {}
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
    content = save(apart(tensors), kept)
    (header,) = struct.unpack("<Q", content[:8])
    legacy = content[0x100000 : 0x100000 + 0x10000]
    return hashlib.sha256(content[8 + header :]).hexdigest(), hashlib.sha256(legacy).hexdigest()[:8]


def thumbnail(picture: Path) -> str:
    """A picture as `modelspec.thumbnail` holds it: a JPEG of at most 256 x 256 pixels as a data URL."""
    from PIL import Image

    content = BytesIO()
    with Image.open(picture) as image:
        small = image.convert("RGB")
    small.thumbnail((256, 256))
    small.save(content, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(content.getvalue()).decode()}"


# -- of several adapters ---------------------------------------------------------------------

BLEND = "studio.blend"
"""The provenance of a file made of others, in JSON: `method`, `settings`, and the `inputs`, each with its `name`,
`weight`, `sshs_model_hash` and, where it was made of others too, its own `blend`."""
TRIGGERS = ("modelspec.trigger_phrase", "ss_trigger_words", "ss_trigger")
"""Where files keep the words that call what they learnt."""
LICENCE, THUMBNAIL = "modelspec.license", "modelspec.thumbnail"
_JOINED = (*TRIGGERS, "modelspec.tags", "modelspec.author", "modelspec.usage_hint")
_OF_THE_BASE = (
    *("ss_base_model_version", "ss_v2", "ss_model_type", "ss_sd_model_name", "ss_sd_model_hash"),
    *("ss_new_sd_model_hash", "ss_vae_name", "ss_vae_hash", "ss_new_vae_hash", "ss_clip_skip"),
    *("modelspec.architecture", "modelspec.implementation", "modelspec.prediction_type", "modelspec.resolution"),
    *("modelspec.encoder_layer", LICENCE, "modelspec.sai_model_spec"),
)


def merged(
    metadata: Sequence[Mapping[str, str]],
    names: Sequence[str],
    weights: Sequence[float],
    method: str,
    settings: Mapping[str, Any] | None = None,
) -> dict[str, str]:
    """The metadata of a file that `method` ("linear", "ties", "resize", ...) makes of others.

    `metadata`, `names` (of files) and `weights` have one entry for each input. Kept: what all say alike of the
    base; the first one's thumbnail; trigger words, tags, authors and hints, joined; tag frequencies, summed;
    licences, with whose they are where they differ. All of that and everything else is kept of a lone input,
    which is the same adapter still. `studio.blend` says what was made of what, with `settings`.
    """
    facts = [{key: value for key, value in one.items() if key not in OF_ONE_FILE} for one in metadata]
    first = facts[0]
    kept = first if len(facts) == 1 else _in_common(facts, names)
    inputs = [_input(*one) for one in zip(metadata, names, weights, strict=True)]
    made = {"method": method, "settings": dict(settings or {}), "inputs": inputs}
    return {**kept, "modelspec.merged_from": ", ".join(names), BLEND: json.dumps(made)}


def _in_common(facts: Sequence[Mapping[str, str]], names: Sequence[str]) -> dict[str, str]:
    first = facts[0]
    kept = {
        key: first[key] for key in _OF_THE_BASE if key in first and all(one.get(key) == first[key] for one in facts)
    }
    for key in _JOINED:
        parts = [part.strip() for one in facts for part in one.get(key, "").split(",")]
        if joined := ", ".join(dict.fromkeys(part for part in parts if part)):
            kept[key] = joined
    if thumbnails := [one[THUMBNAIL] for one in facts if one.get(THUMBNAIL)]:
        kept[THUMBNAIL] = thumbnails[0]
    if tags := _summed([parsed(one, "ss_tag_frequency") for one in facts]):
        kept["ss_tag_frequency"] = json.dumps(tags)
    licences = {name: one[LICENCE] for name, one in zip(names, facts, strict=True) if LICENCE in one}
    if licences and LICENCE not in kept:
        kept[LICENCE] = "; ".join(f"{name}: {licence}" for name, licence in licences.items())
    return kept


def _summed(frequencies: Iterable[Any]) -> dict[str, dict[str, int]]:
    """folder -> tag -> count, over files; what is no such table adds nothing."""
    total: dict[str, Counter[str]] = defaultdict(Counter)
    for folders in frequencies:
        for folder, tags in folders.items() if isinstance(folders, dict) else ():
            counts = tags.items() if isinstance(tags, dict) else ()
            total[folder].update({tag: count for tag, count in counts if isinstance(count, int)})
    return {folder: dict(tags.most_common()) for folder, tags in total.items()}


def _input(metadata: Mapping[str, str], name: str, weight: float) -> dict[str, Any]:
    found = {"name": name, "weight": weight, "sshs_model_hash": metadata.get("sshs_model_hash")}
    blend = parsed(metadata, BLEND)
    return {key: value for key, value in (*found.items(), ("blend", blend)) if value is not None}


def parsed(metadata: Mapping[str, str], key: str) -> Any:
    """The JSON value of a key; None where it is missing or, in a file of unknown origin, no JSON."""
    try:
        return json.loads(metadata[key])
    except (KeyError, ValueError, RecursionError):
        return None
