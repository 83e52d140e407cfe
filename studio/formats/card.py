"""The model card of an adapter on the hub: what it is, how to use it where, and how it was made.

Everything in it is read off the file. How to use it is said for the tools alone that use all of it.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from studio.formats.metadata import BLEND, LICENCE, TRIGGERS, parsed

if TYPE_CHECKING:
    from huggingface_hub import ModelCard

_PUBLISHED = {  # sd-scripts' version of the base -> a hub id that diffusers loads
    "sd_v1": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "sdxl_base_v1-0": "stabilityai/stable-diffusion-xl-base-1.0",
    "medium": "stabilityai/stable-diffusion-3-medium-diffusers",
    "5-medium": "stabilityai/stable-diffusion-3.5-medium",
    "5-large": "stabilityai/stable-diffusion-3.5-large",
    "flux1": "black-forest-labs/FLUX.1-dev",
}
_TAGS = {"sd": "stable-diffusion", "sdxl": "stable-diffusion-xl", "sd3": "stable-diffusion-3", "flux": "flux"}
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_SETTINGS = {  # what stands in the table -> the metadata that says it
    "Steps": "ss_steps",
    "Batch size": "ss_total_batch_size",
    "Pictures": "ss_num_train_images",
    "Resolution": "ss_resolution",
    "Learning rate": "ss_learning_rate",
    "Learning rate, text encoder": "ss_text_encoder_lr",
    "Schedule": "ss_lr_scheduler",
    "Optimizer": "ss_optimizer",
    "Caption dropout": "ss_caption_dropout_rate",
    "Min-SNR gamma": "ss_min_snr_gamma",
    "Precision": "ss_mixed_precision",
    "Seed": "ss_seed",
}


@dataclass(frozen=True)
class Sample:
    """A picture that the adapter made: its path in the repository, and its prompt where that is known."""

    path: str
    prompt: str = ""


@dataclass(frozen=True)
class Publication:
    """An adapter on its way to the hub.

    `repo` is "user/name"; `file` the name in it, "" for a PEFT folder; `facts` those of `describe_adapter`;
    `base` a hub id, or "" for the one that the metadata tell; `licence` likewise; `tools` the names (of
    `studio.formats.consumers`) of those that use the whole file.
    """

    repo: str
    file: str
    facts: Mapping[str, Any]
    tools: Collection[str]
    base: str = ""
    licence: str = ""
    samples: Sequence[Sample] = ()

    @property
    def metadata(self) -> Mapping[str, str]:
        return self.facts["metadata"]

    @property
    def title(self) -> str:
        return self.metadata.get("modelspec.title") or self.repo.partition("/")[2]

    @property
    def base_id(self) -> str:
        """The hub id of the base: the given one, the one trained on, or else the published one of its kind; or ""."""
        named = (self.base, trained_on(self.metadata), self.metadata.get("ss_sd_model_name", ""))
        if known := next((name for name in named if _HUB_ID.fullmatch(name)), None):
            return known
        if self.for_builtin:
            return ""
        schnell = "flux-1-schnell" in self.metadata.get("modelspec.architecture", "")
        version = self.metadata.get("ss_base_model_version", "")
        return "black-forest-labs/FLUX.1-schnell" if schnell else _PUBLISHED.get(version, "")

    @property
    def for_builtin(self) -> bool:
        """Whether the base is the one that comes with the studio, which other tools do not have."""
        return not self.base and base_of(self.metadata) == "builtin"

    @property
    def triggers(self) -> list[str]:
        """Trained tokens and trigger words, each once."""
        words = [_line(word) for key in TRIGGERS for word in self.metadata.get(key, "").split(",")]
        return list(dict.fromkeys(filter(None, [*self.facts["tokens"], *words])))

    @property
    def terms(self) -> str:
        """The licence: the given one, or what the file says of it."""
        return self.licence or self.metadata.get(LICENCE, "")

    @property
    def prompt(self) -> str:
        """A prompt that shows the adapter."""
        drawn = next((sample.prompt for sample in self.samples if sample.prompt), "")
        return drawn or ", ".join(self.triggers) or "a lighthouse at dusk"


def trained_on(metadata: Mapping[str, str]) -> str:
    """What the training settings of a file of ours call the base, or ""."""
    settings = parsed(metadata, "studio.config")
    model = settings.get("model") if isinstance(settings, dict) else None
    return str(model.get("source", "")) if isinstance(model, dict) else ""


def base_of(metadata: Mapping[str, str]) -> str:
    """What a file of ours calls the base; a blend has no settings of a training, but the name its parts agree on."""
    return trained_on(metadata) or metadata.get("ss_sd_model_name", "")


def model_card(publication: Publication) -> ModelCard:
    """The card: its metadata in YAML, and the page."""
    from huggingface_hub import ModelCard, ModelCardData

    data = ModelCardData(ignore_metadata_errors=True, **_card_data(publication))
    sections = [
        f"# {publication.title}",
        _summary(publication),
        _gallery(publication),
        _section("Trigger words", "\n".join(f"- `{word}`" for word in publication.triggers)),
        _section("Use", "\n\n".join(_usage(publication))),
        _section("Settings", _table(publication)),
        _section("How it was made", "\n\n".join(_provenance(publication))),
        _section("Licence", publication.terms),
    ]
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(filter(None, sections)) + "\n")


def _card_data(publication: Publication) -> dict[str, Any]:
    methods = publication.facts["method"].split(", ") if publication.facts["layers"] else ["textual-inversion"]
    kind = ["lora"] if publication.facts["layers"] and "lora" not in methods else []  # what the hub files all under
    tags = ["text-to-image", *methods, *kind, "adapter-studio"]
    data: dict[str, Any] = {
        "base_model": publication.base_id or None,
        "base_model_relation": "adapter" if publication.base_id else None,
        "library_name": "diffusers" if "diffusers" in publication.tools and not publication.for_builtin else None,
        "pipeline_tag": "text-to-image",
        "tags": [*tags, _TAGS[publication.facts["family"]]],
        "instance_prompt": ", ".join(publication.triggers) or None,
        "widget": [{"text": sample.prompt or "-", "output": {"url": sample.path}} for sample in publication.samples],
        **_licence_data(publication.terms),
    }
    return {key: value for key, value in data.items() if value}


def _licence_data(terms: str) -> dict[str, str]:
    """The hub knows licences by identifiers such as "apache-2.0"; any other text is a name."""
    if not terms or re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", terms):
        return {"license": terms}
    return {"license": "other", "license_name": re.sub(r"[^a-z0-9.]+", "-", terms.lower()).strip("-")[:96]}


def _section(title: str, text: str) -> str:
    return f"## {title}\n\n{text}" if text else ""


_NAMES = {"": "textual inversion", "lora": "LoRA", "dora": "DoRA", "loha": "LoHa", "lokr": "LoKr"}


def _summary(publication: Publication) -> str:
    facts = publication.facts
    method = _NAMES.get(facts["method"], facts["method"])
    base = publication.base_id
    link = f"[{base}](https://huggingface.co/{base})" if base else "adapter-studio's built-in base and no other"
    if not base and not publication.for_builtin:
        link = publication.metadata.get("ss_sd_model_name") or f"a base of the family `{facts['family']}`"
    description = publication.metadata.get("modelspec.description", "")
    return "\n\n".join(filter(None, [f"{_article(method)} {method} for {link}.", description]))


def _article(word: str) -> str:
    return "An" if word[:1] in "aeio" else "A"


def _gallery(publication: Publication) -> str:
    shown = [
        f"![]({sample.path})" + (f"\n*{_line(sample.prompt)}*" if sample.prompt else "")
        for sample in publication.samples
    ]
    return "\n\n".join(shown)


def _line(text: str) -> str:
    return " ".join(text.split())


def _cell(text: str) -> str:
    return _line(text).replace("|", "\\|")


# -- how to use it ---------------------------------------------------------------------------


def _usage(publication: Publication) -> Iterator[str]:
    """One paragraph a tool, for those that use the whole file."""
    file = publication.file
    if not publication.facts["layers"]:
        yield from _usage_of_tokens(publication)
        return
    tools = () if publication.for_builtin else publication.tools
    stem = file.removesuffix(".safetensors")
    if "comfyui" in tools:
        has_encoders = any(name.startswith("text_encoder") for name in publication.facts["layers"])
        node = "`LoraLoader`" if has_encoders else "`LoraLoaderModelOnly` (it does not change the text encoder)"
        yield f"**ComfyUI**: put `{file}` into `ComfyUI/models/loras` and load it with the node {node}."
    webuis = [name for tool, name in (("a1111", "A1111"), ("forge", "Forge")) if tool in tools]
    if webuis:
        yield (
            f"**{' and '.join(webuis)}**: put `{file}` into `models/Lora` and write `<lora:{stem}:1>` into the prompt."
        )
    if file and "diffusers" in tools:
        yield f"**diffusers**:\n\n{_code(_with_diffusers(publication))}"
    if not file and "peft" in tools:
        yield f"**diffusers with PEFT**:\n\n{_code(_with_peft(publication))}"
    source = f"{publication.repo}/{file}" if file else publication.repo
    base = publication.base_id or ("builtin" if publication.for_builtin else "BASE")
    command = shlex.join(["studio", "generate", publication.prompt, "--model", base, "--lora", source])
    yield f"**adapter-studio**:\n\n```\n{command}\n```"


def _usage_of_tokens(publication: Publication) -> Iterator[str]:
    """Of a file with trained tokens alone, which all tools read, and most call by its name."""
    stem = publication.file.removesuffix(".safetensors")
    yield (
        f"**ComfyUI**: put `{publication.file}` into `ComfyUI/models/embeddings` and write `embedding:{stem}` into "
        "the prompt."
    )
    yield f"**A1111 and Forge**: put `{publication.file}` into `embeddings` and write `{stem}` into the prompt."
    if publication.facts["family"] == "sd":  # with several encoders, diffusers takes one at a time
        (token, *_) = publication.facts["tokens"]
        arguments = f'"{publication.repo}", weight_name={_quoted(publication.file)}, token={_quoted(token)}'
        yield f"**diffusers**:\n\n{_code(_pipeline(publication, f'pipeline.load_textual_inversion({arguments})'))}"


def _code(text: str) -> str:
    return f"```python\n{text}\n```"


_PIPELINE = """\
import torch
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("{base}", torch_dtype=torch.{dtype}).to("cuda")
{load}
image = pipeline({prompt}).images[0]"""


def _with_diffusers(publication: Publication) -> str:
    load = f'pipeline.load_lora_weights("{publication.repo}", weight_name={_quoted(publication.file)})'
    return _pipeline(publication, load)


def _with_peft(publication: Publication) -> str:
    loads = [
        f'pipeline.{part} = PeftModel.from_pretrained(pipeline.{part}, "{publication.repo}", subfolder="{part}")'
        for part in publication.facts["layers"]
    ]
    return _pipeline(publication, "\n".join(loads)).replace("Pipeline\n", "Pipeline\nfrom peft import PeftModel\n", 1)


def _pipeline(publication: Publication, load: str) -> str:
    dtype = "float16" if publication.facts["family"] in ("sd", "sdxl") else "bfloat16"  # FLUX and SD3 overflow fp16
    return _PIPELINE.format(
        base=publication.base_id or "BASE", dtype=dtype, load=load, prompt=_quoted(publication.prompt)
    )


def _quoted(text: str) -> str:
    """A Python literal between double quotes."""
    return json.dumps(text, ensure_ascii=False)


# -- how it was made -------------------------------------------------------------------------


def _table(publication: Publication) -> str:
    facts, metadata = publication.facts, publication.metadata
    rows = {
        "Method": facts["method"],
        "Rank": _counted(facts["ranks"]),
        "Alpha": _counted(facts["alphas"]),
        "Layers": ", ".join(f"{count} in `{name}`" for name, count in facts["layers"].items()),
        "Parameters": f"{facts['parameters']:,}",
        **{name: metadata.get(key, "") for name, key in _SETTINGS.items()},
    }
    shown = [f"| {name} | {_cell(value)} |" for name, value in rows.items() if value not in ("", "None")]
    return "\n".join(["| | |", "|---|---|", *shown])


def _counted(counts: Mapping[str, int]) -> str:
    """ "16", or "16 (64 layers), 8 (2 layers)" where layers differ."""
    values = {value.removesuffix(".0"): count for value, count in counts.items()}
    return ", ".join(values) if len(values) == 1 else ", ".join(f"{one} ({n} layers)" for one, n in values.items())


def _provenance(publication: Publication) -> Iterator[str]:
    """Paragraphs: what it was blended from, how to train it again, and the hash that names it."""
    metadata, file = publication.metadata, publication.file or "FOLDER"
    blend = parsed(metadata, BLEND)
    if isinstance(blend, dict):
        yield "\n".join(_made(blend, 0))
    if trained_on(metadata):
        command = shlex.join(["studio", "train-sd", "--config", file])
        yield f"Its training settings are in the file; `{command}` trains it again."
    if content := metadata.get("sshs_model_hash"):
        yield f"SHA-256 of its tensors: `{content}`"


_DEEPEST = 8  # levels of blends of blends that the card still tells


def _made(blend: Mapping[str, Any], depth: int) -> Iterator[str]:
    """The tree of a blend as a nested list; what is not of its form, in a file from elsewhere, is left out."""
    settings = blend.get("settings")
    told = ", ".join(f"{key} {value}" for key, value in settings.items()) if isinstance(settings, dict) else ""
    yield f"{'  ' * depth}- `{blend.get('method')}`{f' ({told})' if told else ''} of:"
    inputs = blend.get("inputs")
    for one in inputs if isinstance(inputs, list) else ():
        if not isinstance(one, dict):
            continue
        content = f", `{str(one['sshs_model_hash'])[:12]}`" if one.get("sshs_model_hash") else ""
        yield f"{'  ' * (depth + 1)}- {one.get('weight')} × `{one.get('name')}`{content}"
        inner = one.get("blend")
        if isinstance(inner, dict) and depth < _DEEPEST:
            yield from _made(inner, depth + 2)
