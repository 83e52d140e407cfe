"""What a file says of itself: of its base, in every family; through conversion; and what a blend says of its inputs."""

from __future__ import annotations

import base64
import json
from io import BytesIO
from pathlib import Path

import pytest
import torch
from PIL import Image

from studio.formats import FORMATS, read_adapter, write_adapter
from studio.formats.metadata import BLEND, OF_ONE_FILE, describing, merged, parsed, thumbnail
from studio.formats.state import AdapterState

LAYER = ("unet.mid_block.attentions.0.proj_in", "sd")
FLUX, SD3 = "transformer.transformer_blocks.{}.attn.to_q", "transformer.transformer_blocks.{}.attn2.to_q"


def lora(rank: int = 2, width: int = 16) -> dict[str, torch.Tensor]:
    down, up = torch.ones(rank, width), torch.ones(width, rank)
    return {"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(1.0)}


def state(family: str = "sd", *names: str, metadata: dict[str, str] | None = None) -> AdapterState:
    names = names or LAYER[:1]
    return AdapterState(family, {name: lora() for name in names}, metadata or {})


@pytest.mark.parametrize(
    ("adapter", "version", "architecture", "module"),
    [
        (state("sd"), "sd_v1", "stable-diffusion-v1", "networks.lora"),
        (state("sdxl"), "sdxl_base_v1-0", "stable-diffusion-xl-v1-base", "networks.lora"),
        (state("flux", FLUX.format(0)), "flux1", "flux-1-dev", "networks.lora_flux"),
        (state("sd3", FLUX.format(23)), "medium", "stable-diffusion-3-medium", "networks.lora_sd3"),
        (state("sd3", SD3.format(0)), "5-medium", "stable-diffusion-3-5-medium", "networks.lora_sd3"),
        (state("sd3", FLUX.format(24)), "5-large", "stable-diffusion-3-5-large", "networks.lora_sd3"),
    ],
)
def test_the_base_is_named_as_sd_scripts_names_it(
    adapter: AdapterState, version: str, architecture: str, module: str
) -> None:
    metadata = describing(adapter)
    assert metadata["ss_base_model_version"] == version
    assert metadata["modelspec.architecture"] == f"{architecture}/lora"
    assert metadata["ss_network_module"] == module
    assert metadata["ss_v2"] == "False"
    flow = adapter.family in ("flux", "sd3")
    assert metadata["modelspec.resolution"] == ("512x512" if adapter.family == "sd" else "1024x1024")
    assert ("modelspec.prediction_type" in metadata) is not flow, "modelspec knows epsilon and v"


def test_what_a_file_says_of_its_base_is_kept() -> None:
    given = {"modelspec.architecture": "flux-1-schnell/lora", "ss_base_model_version": "flux1"}
    assert describing(state("flux", FLUX.format(0), metadata=given)).items() >= given.items()


def test_an_embedding_is_no_lora() -> None:
    for width, version in ((768, "sd_v1"), (1024, "sd_v2")):
        metadata = describing(AdapterState("sd", {}, embeddings={"ink": {"text_encoder": torch.ones(2, width)}}))
        assert metadata["ss_base_model_version"] == version
        assert metadata["modelspec.architecture"].endswith("/textual-inversion")
        assert not any(key.startswith("ss_network") for key in metadata)


@pytest.mark.parametrize("format", [name for name, one in FORMATS.items() if one.has_name(*LAYER)])
def test_metadata_goes_through_every_format(format: str, tmp_path: Path) -> None:
    given = {
        "modelspec.trigger_phrase": "inkstyle",
        "modelspec.thumbnail": "data:image/png;base64,AAAA",
        "modelspec.license": "MIT",
        "ss_tag_frequency": json.dumps({"ink": {"a cat": 3}}),
        "studio.config": "{}",
        BLEND: json.dumps({"method": "linear", "inputs": []}),
        "of another tool": "kept",
    }
    first = write_adapter(state(metadata=given), tmp_path / "first")
    there = write_adapter(read_adapter(first), tmp_path / "there", format)
    back = read_adapter(write_adapter(read_adapter(there), tmp_path / "back")).metadata
    assert back.items() >= given.items()
    kept = {key: value for key, value in read_adapter(first).metadata.items() if key not in OF_ONE_FILE}
    assert {key: value for key, value in back.items() if key not in OF_ONE_FILE} == kept
    assert back["sshs_model_hash"] == read_adapter(first).metadata["sshs_model_hash"], "the same tensors"


# -- blends ----------------------------------------------------------------------------------

INK = {
    "ss_base_model_version": "sdxl_base_v1-0",
    "ss_sd_model_name": "base.safetensors",
    "ss_seed": "7",
    "studio.config": "{}",
    "sshs_model_hash": "aaaa",
    "modelspec.trigger_phrase": "inkstyle, drawing",
    "modelspec.license": "MIT",
    "ss_tag_frequency": json.dumps({"ink": {"cat": 2, "dog": 1}}),
}
CAT = {
    "ss_base_model_version": "sdxl_base_v1-0",
    "ss_sd_model_name": "other.safetensors",
    "sshs_model_hash": "bbbb",
    "modelspec.trigger_phrase": "drawing, sks cat",
    "ss_trigger": "sks",
    "modelspec.thumbnail": "data:image/png;base64,AAAA",
    "modelspec.license": "cc-by-4.0",
    "ss_tag_frequency": json.dumps({"ink": {"cat": 3}, "cats": {"sks": 5}}),
}


def test_a_blend_keeps_what_its_inputs_say_alike_and_joins_the_rest() -> None:
    metadata = merged([INK, CAT], ["ink", "cat"], [0.7, -0.3], "ties", {"density": 0.5})
    assert metadata["ss_base_model_version"] == "sdxl_base_v1-0"
    assert "ss_sd_model_name" not in metadata, "they differ"
    assert "ss_seed" not in metadata and "studio.config" not in metadata, "of one training, which this is not"
    assert metadata["modelspec.trigger_phrase"] == "inkstyle, drawing, sks cat"
    assert metadata["ss_trigger"] == "sks"
    assert metadata["modelspec.thumbnail"] == CAT["modelspec.thumbnail"]
    assert metadata["modelspec.license"] == "ink: MIT; cat: cc-by-4.0"
    assert metadata["modelspec.merged_from"] == "ink, cat"
    assert json.loads(metadata["ss_tag_frequency"]) == {"ink": {"cat": 5, "dog": 1}, "cats": {"sks": 5}}
    assert json.loads(metadata[BLEND]) == {
        "method": "ties",
        "settings": {"density": 0.5},
        "inputs": [
            {"name": "ink", "weight": 0.7, "sshs_model_hash": "aaaa"},
            {"name": "cat", "weight": -0.3, "sshs_model_hash": "bbbb"},
        ],
    }
    assert not metadata.keys() & set(OF_ONE_FILE)


def test_a_blend_of_blends_tells_the_whole_tree(tmp_path: Path) -> None:
    first = merged([INK, CAT], ["ink", "cat"], [0.7, 0.3], "linear")
    file = write_adapter(state(metadata=first), tmp_path / "first")
    second = merged([read_adapter(file).metadata, INK], ["first", "ink"], [1, 0.5], "concat")
    (inner, leaf) = json.loads(second[BLEND])["inputs"]
    assert inner["sshs_model_hash"] == read_adapter(file).metadata["sshs_model_hash"]
    assert inner["blend"] == json.loads(first[BLEND]) and "blend" not in leaf
    assert second["modelspec.license"] == "first: ink: MIT; cat: cc-by-4.0; ink: MIT"


def test_a_lone_input_keeps_everything() -> None:
    metadata = merged([INK], ["ink"], [1.0], "resize", {"rank": 4})
    assert metadata.items() >= {key: value for key, value in INK.items() if key != "sshs_model_hash"}.items()
    assert "sshs_model_hash" not in metadata
    assert json.loads(metadata[BLEND])["settings"] == {"rank": 4}


@pytest.mark.parametrize("broken", ["{", "[1, 2]", "[" * 100_000, '{"a": {"b": "many"}}', '{"a": 3}', "7"])
def test_broken_metadata_adds_nothing_and_stops_nothing(broken: str) -> None:
    odd = {"ss_tag_frequency": broken, BLEND: broken, "modelspec.trigger_phrase": ", ,"}
    metadata = merged([odd, CAT], ["odd", "cat"], [1, 1], "linear")
    assert json.loads(metadata["ss_tag_frequency"]).items() >= {"cats": {"sks": 5}}.items()
    assert metadata["modelspec.trigger_phrase"] == "drawing, sks cat"
    parsed(odd, BLEND)


def test_a_thumbnail_is_small(tmp_path: Path) -> None:
    Image.new("RGBA", (1024, 512), (200, 10, 10, 255)).save(tmp_path / "large.png")
    head, _, content = thumbnail(tmp_path / "large.png").partition(",")
    picture = Image.open(BytesIO(base64.b64decode(content)))
    assert (head, picture.size, picture.format) == ("data:image/jpeg;base64", (256, 128), "JPEG")
