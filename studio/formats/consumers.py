"""Which keys of a file each tool would use: the naming rules of diffusers, sd-scripts, ComfyUI and A1111.

The rules were read from the tools and are stated here in our own terms. A rule is a function from a
file and a base to the keys that the tool would apply; a tool that refuses a file uses none of them.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from studio.adapters import describe
from studio.adapters.targets import named_layers
from studio.families.base import DiffusionFamily, Models
from studio.families.keys import LDMNames, flatten
from studio.formats import peft
from studio.formats.files import opened


@dataclass(frozen=True)
class ConsumerReport:
    """How many of a file's `total` keys a tool uses, and which it does not."""

    consumer: str
    used: int
    total: int
    unused: tuple[str, ...]


def check_file(path: str | Path, family: DiffusionFamily, models: Models | None = None) -> list[ConsumerReport]:
    """One report for each tool that reads this kind of file: PEFT for a folder, the four others for a file.

    A key counts as used where the tool's names lead it to a layer of its shape. `models` is the base
    that the adapter is for; without it, the family's published full-size one.
    """
    path = Path(path)
    file, rules = (_folder(path), {"peft": _peft}) if path.is_dir() else (_file(path), RULES)
    base = Base(family, models or family.reference(_variant(file)))
    reports = []
    for consumer, rule in rules.items():
        used = rule(file, base)
        unused = tuple(key for key in file.shapes if key not in used)
        reports.append(ConsumerReport(consumer, len(file.shapes) - len(unused), len(file.shapes), unused))
    return reports


@dataclass(frozen=True)
class File:
    """Shapes by key, in the file's order, and the values of the `.alpha` keys."""

    shapes: Mapping[str, tuple[int, ...]]
    alphas: Mapping[str, float]


def _file(path: Path) -> File:
    with opened(path) as file:
        keys = list(file.keys())
        shapes = {key: tuple(file.get_slice(key).get_shape()) for key in keys}
        return File(shapes, {key: float(file.get_tensor(key)) for key in keys if key.endswith(".alpha")})


def _folder(path: Path) -> File:
    """A PEFT adapter as one file, its keys after "component/"."""
    shapes: dict[str, tuple[int, ...]] = {}
    for component, folder in peft.folders(path).items():
        shapes |= {f"{component}/{key}": shape for key, shape in _file(folder / peft.WEIGHTS).shapes.items()}
    return File(shapes, {})


def _variant(file: File) -> str:
    """Stable Diffusion 2's U-Net reads text of width 1024, and its text encoder has 23 layers, 1's 12."""
    for key, shape in file.shapes.items():
        if re.search(r"attn2[._]to_[kv]\b.*(down|lora_A)", key):
            return "sd2" if shape[1] == 1024 else "sd1"
    return "sd2" if any(re.search(r"encoder[._]layers[._](1[2-9]|2\d)[._]", key) for key in file.shapes) else "sd1"


Shapes = dict[str, tuple[int, ...]]  # a name -> the weight shape of the layer it means


class Base:
    """The layers of a base by component: path -> weight shape."""

    def __init__(self, family: DiffusionFamily, models: Models) -> None:
        self.components: dict[str, Shapes] = {component: {} for component in family.components}
        for name, layer in named_layers(family.prefixes(models)).items():
            component, _, path = name.partition(".")
            self.components[component][path] = describe(layer).weight_shape  # type: ignore[union-attr]
        self.unet = self.components["unet"]
        names = LDMNames(models.parts["unet"].config)
        self.unet_ldm = {ldm: shape for path, shape in self.unet.items() if (ldm := names.to_ldm(path)) is not None}
        self.is_xl = "text_encoder_2" in self.components
        # the layers that tools have names for: not the embeddings, nor the projection
        self.encoders = {
            component: {path: shape for path, shape in layers.items() if ".layers." in path}
            for component, layers in self.components.items()
            if component != "unet"
        }

    def kohya_encoders(self) -> Shapes:
        """The text encoders' layers by their kohya names."""
        numbers = {"text_encoder": "1" if self.is_xl else "", "text_encoder_2": "2"}
        return {
            f"lora_te{numbers[component]}_{flatten(path)}": shape
            for component, layers in self.encoders.items()
            for path, shape in layers.items()
        }


# (up, down) endings of a LoRA; the module is what stands before
_KOHYA_PAIR = (".lora_up.weight", ".lora_down.weight")
_PEFT_PAIR = (".lora_B.weight", ".lora_A.weight")
_DIFFUSERS_PAIR = (".lora.up.weight", ".lora.down.weight")
_PROCESSOR_PAIR = ("_lora.up.weight", "_lora.down.weight")
_ENCODER_PAIR = (".lora_linear_layer.up.weight", ".lora_linear_layer.down.weight")
_COMFYUI_PAIRS = (
    *(_KOHYA_PAIR, _PROCESSOR_PAIR, _PEFT_PAIR, _DIFFUSERS_PAIR, _ENCODER_PAIR),
    (".lora_B", ".lora_A"),
    (".lora_B.default.weight", ".lora_A.default.weight"),
)


def _applied(file: File, modules: Shapes, *pairs: tuple[str, str]) -> set[str]:
    """The keys of `modules` that have both factors of a pair, of fitting shapes, with alpha and dora_scale."""
    used: set[str] = set()
    for module, shape in modules.items():
        for up, down in pairs:
            if _fits(file.shapes.get(module + up), file.shapes.get(module + down), shape):
                used |= file.shapes.keys() & {module + up, module + down, f"{module}.alpha", f"{module}.dora_scale"}
    return used


def _fits(up: tuple[int, ...] | None, down: tuple[int, ...] | None, weight: tuple[int, ...]) -> bool:
    if not up or not down:
        return False
    rank = down[0]
    return math.prod(up) == weight[0] * rank and math.prod(down) == rank * math.prod(weight[1:])


def _flat(prefix: str, layers: Shapes) -> Shapes:
    return {prefix + flatten(path): shape for path, shape in layers.items()}


def _kohya(file: File, base: Base) -> set[str]:
    """sd-scripts makes its modules inside attention and ResNet blocks and samplers, and passes over other keys.

    For SDXL it has LDM's names, and translates diffusers'.
    """
    modules = _flat("lora_unet_", base.unet) | (_flat("lora_unet_", base.unet_ldm) if base.is_xl else {})
    outside = re.compile(r"lora_unet_(conv_|time_embed|add_embedding|label_emb|input_blocks_0_|out_)")
    modules = {module: shape for module, shape in modules.items() if not outside.match(module)}
    return _applied(file, modules | base.kohya_encoders(), _KOHYA_PAIR) - _dora_scales(file)


def _dora_scales(file: File) -> set[str]:
    return {key for key in file.shapes if key.endswith(".dora_scale")}


def _comfyui(file: File, base: Base) -> set[str]:
    """ComfyUI knows a layer by several aliases; attention layers by their dotted name only as `.processor.to_q`."""
    modules = _flat("lora_unet_", base.unet) | _flat("lycoris_", base.unet) | _flat("lora_unet_", base.unet_ldm)
    modules |= {f"diffusion_model.{path}": shape for path, shape in base.unet_ldm.items()}
    processors = {_processor(path): shape for path, shape in base.unet.items()}
    modules |= processors | {f"unet.{path}": shape for path, shape in processors.items()}
    for component, prefixes in {"text_encoder": ("lora_te_", "lora_te1_"), "text_encoder_2": ("lora_te2_",)}.items():
        layers = base.encoders.get(component, {})
        modules |= {f"{component}.{path}": shape for path, shape in layers.items()}
        for prefix in prefixes:
            modules |= _flat(prefix, layers)
    if base.is_xl:
        modules["lora_te2_text_projection"] = base.components["text_encoder_2"]["text_projection"]
    return _applied(file, modules, *_COMFYUI_PAIRS)


def _processor(path: str) -> str:
    """The name that attention layers had in diffusers before PEFT: `attn1.processor.to_out` for `attn1.to_out.0`."""
    dotted = path.replace(".to_", ".processor.to_")
    return dotted.removesuffix(".0") if dotted.endswith(".to_out.0") else dotted


def _a1111(file: File, base: Base) -> set[str]:
    """A1111 translates diffusers' flattened names to LDM's, and takes LDM's as they are; kohya's endings only."""
    translated = {path: shape for path, shape in base.unet.items() if not path.startswith("add_embedding")}
    modules = _flat("lora_unet_", translated) | _flat("lora_unet_", base.unet_ldm) | base.kohya_encoders()
    return _applied(file, modules, _KOHYA_PAIR)


def _diffusers(file: File, base: Base) -> set[str]:
    """diffusers reads kohya's names when all keys have them, and its own otherwise."""
    if all(key.startswith(("lora_te_", "lora_unet_", "lora_te1_", "lora_te2_")) for key in file.shapes):
        return _diffusers_from_kohya(file, base)
    if not all("lora" in key for key in file.shapes):
        return set()  # "Invalid LoRA checkpoint"
    used: set[str] = set()
    for component, layers in base.encoders.items():
        spellings = {f"{component}.{path}": shape for path, shape in _spellings(layers)}
        used |= _applied(file, spellings, _ENCODER_PAIR, _PEFT_PAIR)
    unet = {f"unet.{path}": shape for path, shape in base.unet.items()}
    used |= _applied(file, unet, _PEFT_PAIR)
    # the first U-Net key decides for all: with PEFT's endings, keys with diffusers' are not translated
    if "lora_A" not in next((key for key in file.shapes if key.startswith("unet.")), ""):
        processors = {_processor(path): shape for path, shape in unet.items()}
        used |= _applied(file, unet, _DIFFUSERS_PAIR) | _applied(file, processors, _PROCESSOR_PAIR)
    return used


def _spellings(layers: Shapes) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Text-encoder paths with `text_model.` and without, which diffusers makes fit the installed transformers."""
    for path, shape in layers.items():
        yield path, shape
        yield path.removeprefix("text_model."), shape


def _diffusers_from_kohya(file: File, base: Base) -> set[str]:
    if not all(key.endswith((*_KOHYA_PAIR, ".alpha", ".dora_scale")) for key in file.shapes):
        return set()  # "keys have not been correctly renamed"
    is_mixed = len({bool(_LDM_BLOCK.search(key)) for key in file.shapes if _UNET_BLOCK.search(key)}) > 1
    # block names of LDM are translated for SDXL only, and left out where diffusers' stand beside them
    modules = _flat("lora_unet_", base.unet)
    if base.is_xl and not is_mixed:
        modules |= _flat("lora_unet_", base.unet_ldm)
    for component, layers in base.encoders.items():
        prefixes = ("lora_te2_",) if component == "text_encoder_2" else ("lora_te_", "lora_te1_")
        for prefix in prefixes:
            modules |= _flat(prefix, dict(_spellings(layers)))
    return _applied(file, modules, _KOHYA_PAIR) - _dora_scales(file) - _misread_alphas(file)


_LDM_BLOCK = re.compile("input_blocks|middle_block|output_blocks")
_UNET_BLOCK = re.compile("input_blocks|middle_block|output_blocks|down_blocks|mid_block|up_blocks")


def _misread_alphas(file: File) -> set[str]:
    """The alphas that diffusers replaces: where they differ within a component, it gives all layers the most
    frequent one, and its exceptions do not reach attention layers nor text encoders (measured on 0.42.1)."""
    by_prefix: dict[str, dict[str, float]] = {}
    for key, alpha in file.alphas.items():
        by_prefix.setdefault(key.split("_")[1], {})[key] = alpha
    lost = set()
    for own in by_prefix.values():
        common = Counter(own.values()).most_common(1)[0][0]
        lost |= {key for key, alpha in own.items() if alpha != common and re.search(r"_attn\d_to_|^lora_te", key)}
    return lost


def _peft(file: File, base: Base) -> set[str]:
    """PEFT applies the keys whose path is a module of the component; "" where the folder names none."""
    modules: Shapes = {}
    for component in {key.partition("/")[0] for key in file.shapes}:
        for layers in [base.components[component]] if component else base.components.values():
            modules |= {f"{component}/base_model.model.{path}": shape for path, shape in _spellings(layers)}
    return _applied(file, modules, _PEFT_PAIR)


RULES = {"diffusers": _diffusers, "kohya sd-scripts": _kohya, "ComfyUI": _comfyui, "A1111": _a1111}
