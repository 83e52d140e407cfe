"""Which keys of a file each tool would use: the naming rules of diffusers, sd-scripts, ComfyUI and A1111.

The rules were read from the tools and are stated here in our own terms. A rule is a function from a
file and a base to the keys that the tool would apply; a tool that refuses a file uses none of them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from studio.adapters import METHODS, LayerSpec
from studio.families.base import DiffusionFamily, Models
from studio.families.keys import flatten
from studio.formats.peft import SUFFIXES
from studio.formats.reading import ALPHA, DOWN, MAGNITUDE, UP
from studio.formats.subjects import Base, File, Specs, read_file, read_folder, variant


@dataclass(frozen=True)
class ConsumerReport:
    """How many of a file's `total` keys a tool uses, and which it does not."""

    consumer: str
    used: int
    total: int
    unused: tuple[str, ...]


def check_file(path: str | Path, family: DiffusionFamily, models: Models | None = None) -> list[ConsumerReport]:
    """One report for each tool that reads this kind of file: PEFT for a folder, the four others for a file.

    A key counts as used where the tool's names lead it to a layer that it fits, and the tool knows the
    method. `models` is the base that the adapter is for; without it, the family's published full-size one.
    """
    path = Path(path)
    file, rules = (read_folder(path), {"peft": _peft}) if path.is_dir() else (read_file(path), RULES)
    base = Base(family, models or family.reference(variant(file)))
    reports = []
    for consumer, rule in rules.items():
        used = rule(file, base)
        unused = tuple(key for key in file.tensors if key not in used)
        reports.append(ConsumerReport(consumer, len(file.tensors) - len(unused), len(file.tensors), unused))
    return reports


def _pair(up: str, down: str) -> dict[str, str]:
    """The spelling of a LoRA whose factors' keys end so."""
    return {up: UP, down: DOWN, ".alpha": ALPHA, ".dora_scale": MAGNITUDE}


def _spelled(methods: Iterable[str]) -> dict[str, str]:
    """kohya's and LyCORIS's spelling of these methods, which is ours."""
    suffixes = frozenset().union(*(METHODS[name].needed | METHODS[name].optional for name in methods))
    return {f".{suffix}": suffix for suffix in sorted(suffixes)}


_LORA = ("dora", "lora")
_MAGNITUDE = ".lora_magnitude_vector.weight"
_KOHYA_PAIR = _pair(".lora_up.weight", ".lora_down.weight")
_PEFT_PAIR = _pair(".lora_B.weight", ".lora_A.weight")
_DIFFUSERS_PAIR = _pair(".lora.up.weight", ".lora.down.weight")
_PROCESSOR_PAIR = _pair("_lora.up.weight", "_lora.down.weight")
_ENCODER_PAIR = _pair(".lora_linear_layer.up.weight", ".lora_linear_layer.down.weight")
_COMFYUI_PAIRS = (
    *(_PROCESSOR_PAIR, _PEFT_PAIR, _DIFFUSERS_PAIR, _ENCODER_PAIR),
    _pair(".lora_B", ".lora_A"),
    _pair(".lora_B.default.weight", ".lora_A.default.weight"),
)
_COMFYUI_METHODS = ("dora", "tucker", "lora", "loha", "lokr", "oft", "diff", "bias", "norm")
_A1111_METHODS = ("dora", "tucker", "lora", "loha", "ia3", "lokr", "diff", "norm", "oft")


def _flat(prefix: str, layers: Specs) -> Specs:
    return {prefix + flatten(path): spec for path, spec in layers.items()}


def _kohya(file: File, base: Base) -> set[str]:
    """sd-scripts makes LoRA modules inside attention and ResNet blocks and samplers, and passes over other keys.

    For SDXL it has LDM's names, and translates diffusers'. Other methods need other network modules
    than its own for LoRA (LyCORIS's), which are not counted.
    """
    modules = _flat("lora_unet_", base.unet) | (_flat("lora_unet_", base.unet_ldm) if base.is_xl else {})
    outside = re.compile(r"lora_unet_(conv_|time_embed|add_embedding|label_emb|input_blocks_0_|out_)")
    modules = {module: spec for module, spec in modules.items() if not outside.match(module)}
    return file.applied(modules | base.kohya_encoders(), _KOHYA_PAIR, ["lora"])


def _comfyui(file: File, base: Base) -> set[str]:
    """ComfyUI knows a layer by several aliases; attention layers by their dotted name only as `.processor.to_q`.

    The methods are LyCORIS's but IA3. Magnitudes without a second dimension break on layers that are not square.
    """
    modules = _flat("lora_unet_", base.unet) | _flat("lycoris_", base.unet) | _flat("lora_unet_", base.unet_ldm)
    modules |= {f"diffusion_model.{path}": spec for path, spec in base.unet_ldm.items()}
    processors = {_processor(path): spec for path, spec in base.unet.items()}
    modules |= processors | {f"unet.{path}": spec for path, spec in processors.items()}
    for component, prefixes in {"text_encoder": ("lora_te_", "lora_te1_"), "text_encoder_2": ("lora_te2_",)}.items():
        layers = base.encoders.get(component, {})
        modules |= {f"{component}.{path}": spec for path, spec in layers.items()}
        for prefix in prefixes:
            modules |= _flat(prefix, layers)
    if base.is_xl:
        modules["lora_te2_text_projection"] = base.components["text_encoder_2"]["text_projection"]
    used = file.applied(modules, _spelled(_COMFYUI_METHODS), _COMFYUI_METHODS)
    for pair in _COMFYUI_PAIRS:
        used |= file.applied(modules, pair, _LORA)
    return {key for key in used if not (key.endswith(".dora_scale") and file.tensors[key].ndim < 2)}


def _processor(path: str) -> str:
    """The name that attention layers had in diffusers before PEFT: `attn1.processor.to_out` for `attn1.to_out.0`."""
    dotted = path.replace(".to_", ".processor.to_")
    return dotted.removesuffix(".0") if dotted.endswith(".to_out.0") else dotted


def _a1111(file: File, base: Base) -> set[str]:
    """A1111 translates diffusers' flattened names to LDM's, and takes LDM's as they are; kohya's endings only.

    It refuses a file with a layer of its own whose endings are those of no method that it has. IA3's
    gate never acts on the bias there.
    """
    foreign = ("add_embedding", "conv_norm_out")
    translated = {path: spec for path, spec in base.unet.items() if not path.startswith(foreign)}
    modules = _flat("lora_unet_", translated) | _flat("lora_unet_", base.unet_ldm) | base.kohya_encoders()
    suffixes: dict[str, set[str]] = {}
    for module, _, suffix in (key.partition(".") for key in file.tensors):
        suffixes.setdefault(module, set()).add(suffix)
    if not all(_of_one(suffixes[module], _A1111_METHODS) for module in suffixes.keys() & modules.keys()):
        return set()  # "Could not find a module type that would accept those keys"
    used = file.applied(modules, _spelled(_A1111_METHODS), _A1111_METHODS)
    return {key for key in used if not key.endswith(".on_bias")}


def _of_one(suffixes: set[str], methods: Iterable[str]) -> bool:
    """Whether the suffixes are enough for one of the methods; it passes over others."""
    known = (METHODS[name] for name in methods)
    return any(method.owns(frozenset(suffixes & (method.needed | method.optional))) for method in known)


def _diffusers(file: File, base: Base) -> set[str]:
    """diffusers reads kohya's names when all keys have them, and its own otherwise."""
    if all(key.startswith(("lora_te_", "lora_unet_", "lora_te1_", "lora_te2_")) for key in file.tensors):
        return _diffusers_from_kohya(file, base)
    if not all("lora" in key for key in file.tensors):
        return set()  # "Invalid LoRA checkpoint"
    used: set[str] = set()
    for component, layers in base.encoders.items():
        spellings = {f"{component}.{path}": spec for path, spec in _spellings(layers)}
        for pair in (_ENCODER_PAIR, _PEFT_PAIR):
            used |= file.applied(spellings, {**pair, _MAGNITUDE: MAGNITUDE}, _LORA)
    unet = {f"unet.{path}": spec for path, spec in base.unet.items()}
    magnitudes = {_MAGNITUDE: MAGNITUDE, _MAGNITUDE.removesuffix(".weight"): MAGNITUDE}
    used |= file.applied(unet, _PEFT_PAIR | magnitudes, _LORA)
    # the first U-Net key decides for all: with PEFT's endings, keys with diffusers' are not translated
    if "lora_A" not in next((key for key in file.tensors if key.startswith("unet.")), ""):
        processors = {_processor(path): spec for path, spec in unet.items()}
        used |= file.applied(unet, _DIFFUSERS_PAIR | magnitudes, _LORA)
        used |= file.applied(processors, _PROCESSOR_PAIR, ["lora"])
    return used


def _spellings(layers: Specs) -> Iterator[tuple[str, LayerSpec]]:
    """Text-encoder paths with `text_model.` and without, which diffusers makes fit the installed transformers."""
    for path, spec in layers.items():
        yield path, spec
        yield path.removeprefix("text_model."), spec


def _diffusers_from_kohya(file: File, base: Base) -> set[str]:
    if not all(key.endswith(tuple(_KOHYA_PAIR)) for key in file.tensors):
        return set()  # "keys have not been correctly renamed"
    is_mixed = len({bool(_LDM_BLOCK.search(key)) for key in file.tensors if _UNET_BLOCK.search(key)}) > 1
    # block names of LDM are translated for SDXL only, and left out where diffusers' stand beside them
    modules = _flat("lora_unet_", base.unet)
    if base.is_xl and not is_mixed:
        modules |= _flat("lora_unet_", base.unet_ldm)
    for component, layers in base.encoders.items():
        prefixes = ("lora_te2_",) if component == "text_encoder_2" else ("lora_te_", "lora_te1_")
        for prefix in prefixes:
            modules |= _flat(prefix, dict(_spellings(layers)))
    return file.applied(modules, _KOHYA_PAIR, ["lora"]) - _misread_alphas(file)  # it drops `dora_scale`


_LDM_BLOCK = re.compile("input_blocks|middle_block|output_blocks")
_UNET_BLOCK = re.compile("input_blocks|middle_block|output_blocks|down_blocks|mid_block|up_blocks")


def _misread_alphas(file: File) -> set[str]:
    """The alphas that diffusers replaces: where they differ within a component, it gives all layers the most
    frequent one, and its exceptions do not reach attention layers nor text encoders (measured on 0.42.1)."""
    by_prefix: dict[str, dict[str, float]] = {}
    for key, tensor in file.tensors.items():
        if key.endswith(".alpha"):
            by_prefix.setdefault(key.split("_")[1], {})[key] = float(tensor)
    lost = set()
    for own in by_prefix.values():
        common = Counter(own.values()).most_common(1)[0][0]
        lost |= {key for key, alpha in own.items() if alpha != common and re.search(r"_attn\d_to_|^lora_te", key)}
    return lost


def _peft(file: File, base: Base) -> set[str]:
    """PEFT applies the keys whose path is a module of the component; "" where the folder names none."""
    modules: Specs = {}
    for component in {key.partition("/")[0] for key in file.tensors}:
        for layers in [base.components[component]] if component else base.components.values():
            modules |= {f"{component}/base_model.model.{path}": spec for path, spec in _spellings(layers)}
    return file.applied(modules, {f".{suffix}": ours for suffix, ours in SUFFIXES.items()}, _LORA)


RULES = {"diffusers": _diffusers, "kohya sd-scripts": _kohya, "ComfyUI": _comfyui, "A1111": _a1111}
