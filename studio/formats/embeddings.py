"""Textual inversions: trained vectors that stand for a word of the prompt (Gal et al. 2022, arXiv:2208.01618).

A file of its own holds one token, under the names of the encoders (`clip_l`, `clip_g`, `t5xxl`: sd-scripts,
OneTrainer, ComfyUI), as a lone tensor (`emb_params` of sd-scripts; diffusers gives it the token's name), or as
`string_to_param` of A1111's pickle. But for diffusers', the token is the file's name, in every tool.

Adapters carry them along as `bundle_emb.<token>.<name of the vectors>`, which A1111, ComfyUI and OneTrainer read.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from studio.errors import ConfigError
from studio.formats.files import load_tensors, save_tensors
from studio.formats.metadata import with_hashes
from studio.formats.reading import Entries, family_of_version
from studio.formats.state import AdapterState

ENCODERS: dict[str, dict[str, str]] = {
    "sd": {"clip_l": "text_encoder"},
    "sdxl": {"clip_l": "text_encoder", "clip_g": "text_encoder_2"},
    "flux": {"clip_l": "text_encoder", "t5xxl": "text_encoder_2"},
    "sd3": {"clip_l": "text_encoder", "clip_g": "text_encoder_2", "t5xxl": "text_encoder_3"},
}
"""Family -> name of an encoder in these files -> its component. Stable Diffusion 2's goes by `clip_l` too."""

BUNDLE = "bundle_emb."
_OTHER_NAMES = {
    **{"t5": "t5xxl", "emb_params": "clip_l"},
    **{"emp_params": "clip_l", "string_to_param.*": "clip_l"},  # OneTrainer's (sic) and A1111's
}
_NAMES = {*_OTHER_NAMES, *(name for names in ENCODERS.values() for name in names)}
_BESIDES = "string_to_token."  # A1111's number of a token, which nothing needs
_MOST = 256
"""More vectors than this stand for no word: an encoder reads 77 (CLIP) to 512 (T5) tokens in all."""

Vectors = Mapping[str, Mapping[str, Tensor]]
"""token -> name of the encoder in the file -> (vectors, width)."""


def recognises(keys: Iterable[str]) -> bool:
    """Whether a file with these keys may be of this format: known names alone, or one tensor of any name."""
    keys = [key for key in keys if not key.startswith(_BESIDES)]
    return len(keys) == 1 or (bool(keys) and all(key in _NAMES or key.startswith(BUNDLE) for key in keys))


def has_name(name: str, family: str) -> bool:
    """Whether the format can hold this layer of this family: the table of a text encoder's tokens."""
    return name.startswith("text_encoder") and name.endswith((".token_embedding", ".shared"))


def objection(layers: Entries, family: str) -> str:
    """What the format cannot hold of these layers: any method but trained tokens."""
    others = [name for name, entry in layers.items() if "token_rows" not in entry]
    return f"an adapter of a layer ({others[0]})" if others else ""


def read(path: Path) -> AdapterState:
    """Reads a file with one token, or several in the form of bundles. Raises ConfigError where it is neither."""
    tensors, metadata = load_tensors(path)
    tensors, vectors = split_bundle({key: one for key, one in tensors.items() if not key.startswith(_BESIDES)})
    if tensors:
        token = path.stem
        if len(tensors) == 1 and not tensors.keys() <= _NAMES:
            (token,) = tensors  # as diffusers has it
            tensors = {"emb_params": tensors[token]}
        vectors = {**vectors, **_checked({token: tensors})}
    family = _family({name for parts in vectors.values() for name in parts}, metadata, path)
    return with_bundle(AdapterState(family, {}, metadata), vectors)


def _family(names: set[str], metadata: Mapping[str, str], path: Path) -> str:
    """The family that the metadata states where its encoders fit, or the smallest one that has them."""
    stated = family_of_version(metadata)
    families = sorted(ENCODERS, key=lambda family: (family != stated, len(ENCODERS[family])))
    found = next((family for family in families if names <= ENCODERS[family].keys()), None)
    if found is None:
        raise ConfigError(f"{path} has vectors for encoders that no family here has together: {', '.join(names)}")
    return found


def write(state: AdapterState, path: Path) -> None:
    """Writes one token, which must be the file's name: that is what tools call it by.

    Trained tokens of a table (the method `tokens`) become the vectors of one token of that name.
    """
    state = from_rows(state, path.stem)
    if list(state.embeddings) != [path.stem]:
        names = ", ".join(state.embeddings) or "none"
        raise ConfigError(
            f"a textual inversion holds one token, and its file's name is the token's in most tools; these are the "
            f"tokens: {names}. Write '{next(iter(state.embeddings), path.stem)}.safetensors', or an adapter in the "
            "format 'kohya', which may hold several"
        )
    tensors = _by_encoder(state)[path.stem]
    if state.family == "sd":  # A1111, ComfyUI and sd-scripts read a lone tensor of any name, diffusers calls it by that
        tensors = {path.stem: tensors["clip_l"]}
    save_tensors(path, tensors, with_hashes(state, tensors))


def from_rows(state: AdapterState, token: str) -> AdapterState:
    """The state with its trained rows of token tables (`token_rows`, in the order of their ids) as one `token`.

    In a prompt the token then stands for these rows one after the other, without the vocabulary's words for them.
    """
    rows = {name: entry["token_rows"] for name, entry in state.tensors.items() if has_name(name, state.family)}
    if not rows:
        return state
    others = {name: entry for name, entry in state.tensors.items() if name not in rows}
    vectors = {name.partition(".")[0]: one for name, one in rows.items()}
    of_layers = ("ss_network_", "modelspec.architecture")
    metadata = {key: value for key, value in state.metadata.items() if others or not key.startswith(of_layers)}
    return replace(state, tensors=others, metadata=metadata, embeddings={**state.embeddings, token: vectors})


# -- in the files of adapters ----------------------------------------------------------------


def split_bundle(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Vectors]:
    """(the tensors of layers, the vectors of tokens) in the keys of a file; `with_bundle` takes the second.

    Raises ConfigError for vectors of an unknown name, and for shapes that are none.
    """
    rest: dict[str, Tensor] = {}
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        if key.startswith(BUNDLE):
            token, _, name = key.removeprefix(BUNDLE).partition(".")
            found.setdefault(token, {})[name] = tensor
        else:
            rest[key] = tensor
    return rest, _checked(found)


def _checked(found: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    """Under the encoders' names, and as (vectors, width)."""
    checked: dict[str, dict[str, Tensor]] = {}
    for token, parts in found.items():
        own = checked.setdefault(token, {})
        for key, tensor in parts.items():
            name = _OTHER_NAMES.get(key, key)
            if name.endswith("_out"):
                raise ConfigError(
                    f"token '{token}': {key} is added to what the encoder gives out, which only OneTrainer does"
                )
            if name not in ENCODERS["sd3"] or name in own or not token:
                raise ConfigError(f"token '{token}': '{key}' is not the name of an encoder's vectors, or comes twice")
            vectors = tensor[None] if tensor.ndim == 1 else tensor
            if vectors.ndim != 2 or len(vectors) > _MOST or not vectors.is_floating_point():
                raise ConfigError(
                    f"token '{token}': {key} is {tuple(tensor.shape)} of {tensor.dtype}; a textual inversion has up to "
                    f"{_MOST} vectors in floating point"
                )
            own[name] = vectors
    return checked


def with_bundle(state: AdapterState, vectors: Vectors) -> AdapterState:
    """The state with the tokens that `split_bundle` found. Raises ConfigError for encoders its family has not."""
    encoders = ENCODERS[state.family]
    for token, parts in vectors.items():
        if strange := parts.keys() - encoders.keys():
            raise ConfigError(f"token '{token}' has vectors for {', '.join(strange)}, which {state.family} has not")
    embeddings = {token: {encoders[name]: one for name, one in parts.items()} for token, parts in vectors.items()}
    return replace(state, embeddings=embeddings)


def bundled(state: AdapterState) -> dict[str, Tensor]:
    """The file keys of the state's tokens. Raises ConfigError for a token with a dot, which tools would cut there."""
    if dotted := [token for token in state.embeddings if "." in token]:
        raise ConfigError(f"the token '{dotted[0]}' has a dot in it, where tools would cut it: give it another name")
    return {
        f"{BUNDLE}{token}.{encoder}": vectors
        for token, parts in _by_encoder(state).items()
        for encoder, vectors in parts.items()
    }


def _by_encoder(state: AdapterState) -> dict[str, dict[str, Tensor]]:
    """token -> name of the encoder -> (vectors, width), the inverse of what `with_bundle` does."""
    names = {component: name for name, component in ENCODERS[state.family].items()}
    return {token: {names[part]: one for part, one in parts.items()} for token, parts in state.embeddings.items()}
