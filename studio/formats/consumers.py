"""Which keys of a file each tool would use: the naming rules of diffusers, sd-scripts, ComfyUI and A1111.

The rules were read from the tools and are stated here in our own terms, on names alone; a rule is a
function from the file's keys to those that the tool would apply to a layer. A tool that refuses a
file as a whole uses none of its keys.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from studio.adapters.inject import named_layers
from studio.families.base import DiffusionFamily, Models
from studio.families.keys import LDMNames, flatten
from studio.formats import peft
from studio.formats.files import load_keys, opened


@dataclass(frozen=True)
class ConsumerReport:
    """How many of a file's `total` keys a tool uses, and which it does not."""

    consumer: str
    used: int
    total: int
    unused: tuple[str, ...]


def check_file(path: str | Path, family: DiffusionFamily, models: Models | None = None) -> list[ConsumerReport]:
    """One report for each tool that reads this kind of file: PEFT for a folder, the four others for a file.

    `models` is the base that the adapter is for; without it, the family's published full-size one.
    """
    path = Path(path)
    alphas: dict[str, float] = {}
    if path.is_dir():
        folders = peft.folders(path).items()
        keys = [f"{component}/{key}" for component, folder in folders for key in load_keys(folder / peft.WEIGHTS)]
        rules = {"peft": _peft}
    else:
        keys = load_keys(path)
        alphas = _alphas(path, keys)
        rules = {"diffusers": _diffusers, "kohya sd-scripts": _kohya, "ComfyUI": _comfyui, "A1111": _a1111}
    layers = Layers(family, models or family.reference(_variant(keys)), alphas)
    reports = []
    for consumer, rule in rules.items():
        used = rule(keys, layers)
        unused = tuple(key for key in keys if key not in used)
        reports.append(ConsumerReport(consumer, len(keys) - len(unused), len(keys), unused))
    return reports


def _alphas(path: Path, keys: Iterable[str]) -> dict[str, float]:
    with opened(path) as file:
        return {key: float(file.get_tensor(key)) for key in keys if key.endswith(".alpha")}


def _variant(keys: Iterable[str]) -> str:
    """Stable Diffusion 2's text encoder has 23 layers, 1's has 12; the U-Nets have the same names."""
    return "sd2" if any(re.search(r"te(xt_encoder)?[_.].*layers[_.](1[2-9]|2\d)[_.]", key) for key in keys) else "sd1"


class Layers:
    """The layers of a base, by component and path, and the LDM names of its U-Net; the file's alphas beside them."""

    def __init__(self, family: DiffusionFamily, models: Models, alphas: Mapping[str, float]) -> None:
        self.alphas = alphas
        self.names = list(named_layers(family.prefixes(models)))
        self.ldm = LDMNames(models.parts["unet"].config)
        self.is_xl = "text_encoder_2" in family.components

    def of(self, component: str) -> list[str]:
        """Paths below a component."""
        return [name.removeprefix(f"{component}.") for name in self.names if name.startswith(f"{component}.")]

    @cached_property
    def unet(self) -> list[str]:
        return self.of("unet")

    @cached_property
    def unet_ldm(self) -> list[str]:
        return [ldm for path in self.unet if (ldm := self.ldm.to_ldm(path)) is not None]

    def encoder_layers(self, component: str) -> list[str]:
        """The attention and MLP layers of a text encoder: embeddings and projections have no names in most tools."""
        return [path for path in self.of(component) if ".layers." in path]


# (up, down) endings of a LoRA; the module is what stands before
_KOHYA_PAIR = (".lora_up.weight", ".lora_down.weight")
_PEFT_PAIR = (".lora_B.weight", ".lora_A.weight")
_COMFY_PAIRS = (
    _KOHYA_PAIR,
    ("_lora.up.weight", "_lora.down.weight"),
    _PEFT_PAIR,
    (".lora.up.weight", ".lora.down.weight"),
    (".lora_B", ".lora_A"),
    (".lora_linear_layer.up.weight", ".lora_linear_layer.down.weight"),
    (".lora_B.default.weight", ".lora_A.default.weight"),
)


def _applied(keys: Sequence[str], modules: Iterable[str], pairs: Iterable[tuple[str, str]]) -> set[str]:
    """The keys of `modules` that have both factors of a pair, with their alpha and dora_scale."""
    present = set(keys)
    used: set[str] = set()
    for module in modules:
        for up, down in pairs:
            if {module + up, module + down} <= present:
                used |= present & {module + up, module + down, f"{module}.alpha", f"{module}.dora_scale"}
                break
    return used


def _encoder_prefixes(layers: Layers) -> dict[str, str]:
    """kohya's prefix -> component."""
    if layers.is_xl:
        return {"lora_te1_": "text_encoder", "lora_te2_": "text_encoder_2"}
    return {"lora_te_": "text_encoder"}


def _kohya(keys: Sequence[str], layers: Layers) -> set[str]:
    """sd-scripts makes its modules inside attention and ResNet blocks and samplers, and passes over other keys.

    For SDXL it has LDM's names, and translates diffusers'.
    """
    inside = [path for path in layers.unet if re.search(r"attentions|resnets|samplers", path)]
    modules = [f"lora_unet_{flatten(path)}" for path in inside]
    if layers.is_xl:
        modules += [f"lora_unet_{flatten(ldm)}" for path in inside if (ldm := layers.ldm.to_ldm(path))]
    for prefix, component in _encoder_prefixes(layers).items():
        modules += [prefix + flatten(path) for path in layers.encoder_layers(component)]
    return _applied(keys, modules, [_KOHYA_PAIR]) - {key for key in keys if key.endswith("dora_scale")}


def _comfyui(keys: Sequence[str], layers: Layers) -> set[str]:
    """ComfyUI knows a layer by several aliases; attention layers by their dotted name only as `.processor.to_q`."""
    modules = [f"lora_unet_{flatten(path)}" for path in layers.unet_ldm]
    modules += [f"diffusion_model.{path}" for path in layers.unet_ldm]
    for path in layers.unet:
        dotted = _processor(path)
        modules += [f"lora_unet_{flatten(path)}", f"lycoris_{flatten(path)}", dotted, f"unet.{dotted}"]
    for component, prefixes in (("text_encoder", ("lora_te_", "lora_te1_")), ("text_encoder_2", ("lora_te2_",))):
        for path in layers.encoder_layers(component):
            modules += [f"{component}.{path}", *(prefix + flatten(path) for prefix in prefixes)]
    if layers.is_xl:
        modules.append("lora_te2_text_projection")
    return _applied(keys, modules, _COMFY_PAIRS)


def _a1111(keys: Sequence[str], layers: Layers) -> set[str]:
    """A1111 translates diffusers' flattened names to LDM's, and takes LDM's as they are; kohya's endings only."""
    modules = [f"lora_unet_{flatten(path)}" for path in layers.unet if not path.startswith("add_embedding")]
    modules += [f"lora_unet_{flatten(path)}" for path in layers.unet_ldm]
    for prefix, component in _encoder_prefixes(layers).items():
        modules += [prefix + flatten(path) for path in layers.encoder_layers(component)]
    return _applied(keys, modules, [_KOHYA_PAIR])


def _diffusers(keys: Sequence[str], layers: Layers) -> set[str]:
    """diffusers reads kohya's names when all keys have them, and its own otherwise."""
    if all(key.startswith(("lora_te_", "lora_unet_", "lora_te1_", "lora_te2_")) for key in keys):
        return _diffusers_from_kohya(keys, layers)
    if not all("lora" in key for key in keys):
        return set()  # "Invalid LoRA checkpoint"
    used: set[str] = set()
    text_pairs = [(".lora_linear_layer.up.weight", ".lora_linear_layer.down.weight"), _PEFT_PAIR]
    for component in ("text_encoder", "text_encoder_2"):
        for path in layers.encoder_layers(component):
            spellings = [f"{component}.{path}", f"{component}.{path.removeprefix('text_model.')}"]
            used |= _applied(keys, spellings, text_pairs)
    used |= _applied(keys, [f"unet.{path}" for path in layers.unet], [_PEFT_PAIR])
    # the first U-Net key decides for all: with PEFT's endings, keys with diffusers' are not translated
    if "lora_A" not in next((key for key in keys if key.startswith("unet.")), ""):
        used |= _applied(keys, [f"unet.{path}" for path in layers.unet], [(".lora.up.weight", ".lora.down.weight")])
        processors = [f"unet.{_processor(path)}" for path in layers.unet]
        used |= _applied(keys, processors, [("_lora.up.weight", "_lora.down.weight")])
    return used


def _processor(path: str) -> str:
    """The name that attention layers had in diffusers before PEFT: `attn1.processor.to_out` for `attn1.to_out.0`."""
    dotted = path.replace(".to_", ".processor.to_")
    return dotted.removesuffix(".0") if dotted.endswith(".to_out.0") else dotted


def _diffusers_from_kohya(keys: Sequence[str], layers: Layers) -> set[str]:
    known = (*_KOHYA_PAIR, ".alpha", ".dora_scale")
    if not all(key.endswith(known) for key in keys):
        return set()  # "keys have not been correctly renamed"
    is_ldm = any(re.search("input_blocks|middle_block|output_blocks", key) for key in keys)
    if is_ldm and layers.is_xl:
        # LDM's names are translated for SDXL only, and then all block names have to be LDM's
        if any(re.search("down_blocks|mid_block|up_blocks", key) for key in keys):
            keys = [key for key in keys if not re.search("input_blocks|middle_block|output_blocks", key)]
        modules = [f"lora_unet_{flatten(path)}" for path in (*layers.unet_ldm, *layers.unet)]
    else:
        modules = [f"lora_unet_{flatten(path)}" for path in layers.unet]
    for prefix, component in {**_encoder_prefixes(layers), "lora_te1_": "text_encoder"}.items():
        for path in layers.encoder_layers(component):
            modules += [prefix + flatten(path), prefix + flatten(path.removeprefix("text_model."))]
    lost = {key for key in keys if key.endswith("dora_scale")} | _misread_alphas(layers.alphas)
    return _applied(keys, modules, [_KOHYA_PAIR]) - lost


def _misread_alphas(alphas: Mapping[str, float]) -> set[str]:
    """The alphas that diffusers replaces: where they differ within a component, it gives all layers the most
    frequent one, and its exceptions do not reach attention layers nor text encoders (measured on 0.42.1)."""
    by_prefix: dict[str, dict[str, float]] = {}
    for key, alpha in alphas.items():
        by_prefix.setdefault(key.split("_")[1], {})[key] = alpha
    lost = set()
    for own in by_prefix.values():
        common = Counter(own.values()).most_common(1)[0][0]
        lost |= {key for key, alpha in own.items() if alpha != common and re.search(r"_attn\d_to_|^lora_te", key)}
    return lost


def _peft(keys: Sequence[str], layers: Layers) -> set[str]:
    """Keys are `component/key` here; PEFT applies those whose path is a module of the component."""
    modules = []
    for component in {key.partition("/")[0] for key in keys}:
        for path in layers.of(component) if component else [name.partition(".")[2] for name in layers.names]:
            modules.append(f"{component}/base_model.model.{path}")
            modules.append(f"{component}/base_model.model.{path.removeprefix('text_model.')}")
    return _applied(keys, modules, [_PEFT_PAIR])
