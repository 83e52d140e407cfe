"""Merging into bases on disk: as the adapters act, in both forms, and nothing else changes by a byte."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import pytest
import tiny
import tiny_transformers
import torch
from layers import config_of, randomise
from safetensors.torch import load_file, save_file

from studio.adapters import METHODS, AdapterPlan, AdapterSet, inject
from studio.algebra.bases import open_base, write_base
from studio.algebra.merge import Ingredient, merge
from studio.errors import ConfigError
from studio.families import FAMILIES, ModelFamily
from studio.families.base import Models
from studio.families.loading import load_base
from studio.formats.in_place import TensorFile
from studio.formats.metadata import BLEND
from studio.formats.state import AdapterState

STRENGTH = 0.7


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Kind -> a tiny diffusers folder; diffusers tells SDXL's text encoders in a single file apart by their width."""
    place = tmp_path_factory.mktemp("bases")
    pipeline = tiny.pipeline("sdxl")
    for seed, (name, width) in enumerate({"text_encoder": 8, "text_encoder_2": 24}.items()):
        encoder = getattr(pipeline, name)
        config = copy.deepcopy(encoder.config)
        config.hidden_size = width
        with torch.random.fork_rng():
            pipeline.register_modules(**{name: tiny.fill(type(encoder)(config), seed)})
    pipeline.save_pretrained(place / "sdxl")
    return {"sd15": tiny.folder("sd15"), "sd2": tiny.folder("sd2"), "sdxl": place / "sdxl"}


def adapted(source: Path, method: str = "lora", targets: tuple[str, ...] = tiny.TARGETS, seed: int = 1):
    """(family, models, an attached adapter of random values, its state)."""
    family, models = load_base(str(source))
    adapters = inject(family.prefixes(models), AdapterPlan(targets, config=config_of(method)), family.roles)
    randomise(adapters, seed)
    return family, models, adapters, AdapterState(family.name, adapters.state(), {"ss_output_name": "ink"})


def near(left: torch.Tensor, right: torch.Tensor) -> bool:
    return bool((left - right).abs().max() <= 1e-5 * right.abs().max().clamp(min=1))


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_a_merged_base_predicts_what_the_adapters_do_in_every_form(kind: str, bases, tmp_path: Path) -> None:
    source, config = bases[kind], str(bases[kind])
    family, models, adapters, state = adapted(source, "lora")
    base = tiny.predict(family, models)
    adapters.set_strength(STRENGTH)
    wanted = tiny.predict(family, models)
    assert (wanted - base).abs().max() > 0.1
    write_base(open_base(source), tmp_path / "base.safetensors", None, {"format": "pt"})
    for number, (start, name) in enumerate([(source, "out"), (source, "a.safetensors"), ("base.safetensors", "out")]):
        target = tmp_path / f"{number}{name}"
        made = merge(str(tmp_path / start), [Ingredient("ink", state, STRENGTH)], target, config)
        assert made.path == target and set(made.lost) == set(state.tensors) and max(made.lost.values()) < 1e-5
        assert near(tiny.predict(*load_base(str(target), config=config)), wanted)


def weights(family: ModelFamily, models: Models) -> dict[str, torch.Tensor]:
    return {
        f"{prefix}.{name}": tensor
        for prefix, module in family.prefixes(models).items()
        for name, tensor in module.state_dict().items()
    }


TARGETS = {"tokens": ("token_embedding",), "norm": ("re:unet.*norm[12]",)}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_merges_as_in_the_model(method: str, bases, tmp_path: Path) -> None:
    family, models, adapters, state = adapted(bases["sd15"], method, TARGETS.get(method, ("cross-attention",)))
    adapters.set_strength(STRENGTH)
    adapters.merge()
    merge(str(bases["sd15"]), [Ingredient("ink", state, STRENGTH)], tmp_path / "out")
    base, found = open_base(bases["sd15"]), open_base(tmp_path / "out")
    changed = set()
    for name, tensor in weights(family, models).items():
        (place,), (before,) = found.places(name), base.places(name)
        assert near(place.read(), tensor), name
        if not torch.equal(place.read(), before.read()):
            changed.add(name.rpartition(".")[0])
    assert changed == set(state.tensors)


def test_a_single_file_keeps_its_keys_order_dtypes_and_metadata(bases, tmp_path: Path) -> None:
    source, target = tmp_path / "base.safetensors", tmp_path / "out.safetensors"
    write_base(open_base(bases["sdxl"]), source, None, {})
    half = {key: tensor.half() for key, tensor in load_file(source).items()}
    half["model_ema.decay"] = torch.tensor(1, dtype=torch.int32)  # what merging has no business with
    save_file(half, source, {"modelspec.title": "mine", "sshs_model_hash": "0", "format": "pt"})
    *_, state = adapted(bases["sdxl"], "lora", ("attention", "text-encoder"))
    made = merge(str(source), [Ingredient("ink", state, 0.01)], target)
    before, after = TensorFile(source), TensorFile(target)
    assert list(before) == list(after)
    assert after.metadata["modelspec.title"] == "mine" and "sshs_model_hash" not in after.metadata
    assert json.loads(after.metadata[BLEND])["inputs"][0] == {"name": "ink", "weight": 0.01}
    untouched = load_file(target)
    changed = {key for key, tensor in half.items() if not torch.equal(untouched[key], tensor)}
    assert {key: tensor.dtype for key, tensor in untouched.items()} == {key: one.dtype for key, one in half.items()}
    stacked = {key for key in half if key.endswith("attn.in_proj_weight")}
    assert stacked <= changed and all(key.endswith("_weight") or key.endswith(".weight") for key in changed)
    assert len(changed) == len(state.tensors) - 2 * len(stacked)
    assert 0 < made.mean_loss < 0.2 and made.mean_loss <= next(iter(made.lost.values()))


def test_what_no_adapter_touches_keeps_its_bytes(bases, tmp_path: Path) -> None:
    source = tmp_path / "base"
    shutil.copytree(bases["sd15"], source)
    (source / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"the same weights, as a pickle")
    (source / "whole.safetensors").write_bytes(b"the same weights in a single file")
    *_, state = adapted(source, "lora", ("attention",))
    merge(str(source), [Ingredient("ink", state)], tmp_path / "out")
    files = {path.relative_to(source) for path in source.rglob("*") if path.is_file()}
    kept = {path.relative_to(tmp_path / "out") for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert files - kept == {Path("unet/diffusion_pytorch_model.bin"), Path("whole.safetensors")}
    changed = {file for file in kept if (source / file).read_bytes() != (tmp_path / "out" / file).read_bytes()}
    assert changed == {Path("unet/diffusion_pytorch_model.safetensors")}


def test_every_variant_and_shard_of_the_weights_is_merged(bases, tmp_path: Path) -> None:
    source = tmp_path / "base"
    shutil.copytree(bases["sd15"], source)
    whole = source / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(whole)
    whole.unlink()
    for place, keys in enumerate((list(tensors)[:100], list(tensors)[100:])):
        shard = source / "unet" / f"diffusion_pytorch_model-{place + 1:05}-of-00002.safetensors"
        save_file({key: tensors[key] for key in keys}, shard)
    variant = source / "unet" / "diffusion_pytorch_model.fp16.safetensors"
    save_file({key: tensor.half() for key, tensor in tensors.items()}, variant)
    _, models, adapters, state = adapted(bases["sd15"], "lora", ("attention",))
    adapters.merge()
    merge(str(source), [Ingredient("ink", state)], tmp_path / "out")
    merged, found = models.parts["unet"].state_dict(), open_base(tmp_path / "out")
    for name in tensors:
        plain, half = (place.read() for place in found.places(f"unet.{name}"))
        assert near(plain, merged[name]) and half.dtype == torch.float16
        assert (half - merged[name]).abs().max() <= 1e-3 * merged[name].abs().max()  # rounded before and after


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_a_single_file_holds_every_tensor_of_the_folder(kind: str, bases, tmp_path: Path) -> None:
    source = tmp_path / "base"
    shutil.copytree(bases[kind], source)
    if kind == "sd2":  # whose text encoder is OpenCLIP's
        config = source / "text_encoder" / "config.json"
        config.write_text(config.read_text().replace("quick_gelu", "gelu"))
    folder, target = open_base(source), tmp_path / "base.safetensors"
    write_base(folder, target, None, {})
    single, seen = open_base(target), set()
    for component in ("unet", "text_encoder", "text_encoder_2"):
        for file in (source / component).glob("*.safetensors"):
            for key in load_file(file):
                (place,), (wanted,) = single.places(f"{component}.{key}"), folder.places(f"{component}.{key}")
                assert torch.equal(place.read(), wanted.read()), key
                seen.add(place.key)
    assert all(key.startswith("first_stage_model.") for key in set(load_file(target)) - seen)
    assert any("in_proj" in key for key in seen) == (kind != "sd15")


def test_several_adapters_and_strengths_by_block(bases, tmp_path: Path) -> None:
    family, models, first, ink = adapted(bases["sd15"], "lora", ("attention", "text-encoder"))
    second: AdapterSet = inject(
        family.prefixes(models), AdapterPlan(("cross-attention",), config=config_of("loha")), family.roles
    )
    randomise(second, 2)
    wash = AdapterState("sd", second.state())
    first.set_strength(0.8, {"text_encoder*": 0.5, "unet.up_blocks*": 0.0})
    second.set_strength(-0.3)
    ingredients = [
        Ingredient("ink", ink, 0.8, {"text-encoder": 0.5, "unet.up_blocks.*": 0.0}),
        Ingredient("wash", wash, -0.3),
    ]
    merge(str(bases["sd15"]), ingredients, tmp_path / "out")
    assert near(tiny.predict(*load_base(str(tmp_path / "out"))), tiny.predict(family, models))


@pytest.mark.parametrize("name", tiny_transformers.FAMILIES)
def test_transformers_merge_in_a_folder(name: str, tmp_path: Path) -> None:
    models, family = tiny_transformers.models(name), FAMILIES[name]
    pipeline = {"flux": "FluxPipeline", "sd3": "StableDiffusion3Pipeline"}[name]
    index = {"_class_name": pipeline, **{part: ["diffusers", "any"] for part in models.parts}}
    for part, module in models.parts.items():
        module.save_pretrained(tmp_path / "base" / part)
    (tmp_path / "base" / "model_index.json").write_text(json.dumps(index))
    plan = AdapterPlan(family.default_targets, config=config_of("lora"))
    adapters = inject(family.prefixes(models), plan, family.roles)
    randomise(adapters, 1)
    state = AdapterState(name, adapters.state())
    merge(str(tmp_path / "base"), [Ingredient("ink", state, STRENGTH)], tmp_path / "out")
    adapters.set_strength(STRENGTH)
    found = open_base(tmp_path / "out")
    with adapters.merged():
        for key, tensor in weights(family, models).items():
            for place in found.places(key):
                assert near(place.read(), tensor), key
    adapters.detach()
    key = {"flux": "double_blocks.0.img_attn.qkv.weight", "sd3": "joint_blocks.0.x_block.attn.qkv.weight"}[name]
    save_file({f"model.diffusion_model.{key}": torch.ones(3, 1)}, tmp_path / "single.safetensors")
    with pytest.raises(ConfigError, match="give a diffusers folder instead"):
        merge(str(tmp_path / "single.safetensors"), [Ingredient("ink", state)], tmp_path / "no")
    with pytest.raises(ConfigError, match=f"no single file for the family '{name}'"):
        merge(str(tmp_path / "base"), [Ingredient("ink", state)], tmp_path / "no.safetensors")


def entry(**tensors: torch.Tensor) -> AdapterState:
    return AdapterState("sd", {"unet.conv_in": {name.replace("__", "."): one for name, one in tensors.items()}})


def test_what_cannot_be_merged_is_one_clear_error_and_leaves_nothing(bases, tmp_path: Path) -> None:
    source = tmp_path / "half"
    shutil.copytree(bases["sd15"], source)
    file = source / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = {key: tensor.half() for key, tensor in load_file(file).items()}
    del tensors["conv_in.bias"]
    save_file(tensors, file)
    weight = tensors["conv_in.weight"].float()
    lora = adapted(bases["sd15"])[3]
    one = torch.ones(1, 16)
    problems = {
        "is for sdxl, the base is sd": AdapterState("sdxl", lora.tensors),
        r"1 of its 1 layers are not in .*unet\.no": AdapterState("sd", {"unet.no": {}}),
        r"trained tokens \(<ink>\)": AdapterState("sd", {}, embeddings={"<ink>": {"text_encoder": one}}),
        r"unet\.conv_in: merged, it has values beyond torch\.float16": entry(diff=weight + 1e6),
        r"unet\.conv_in: the file's diff_b .* this layer has no bias": entry(diff=weight, diff_b=torch.ones(16)),
    }
    for message, state in problems.items():
        with pytest.raises(ConfigError, match=message):
            merge(str(source), [Ingredient("ink", state)], tmp_path / "out")
    with pytest.raises(ConfigError, match="matches none"):
        merge(str(source), [Ingredient("ink", lora, 1.0, {"unet.noblock.*": 0.5})], tmp_path / "out")
    with pytest.raises(ConfigError, match="exists already"):
        merge(str(source), [Ingredient("ink", lora)], source)
    assert [path.name for path in tmp_path.iterdir()] == ["half"]


def test_a_packed_weight_is_refused(bases, tmp_path: Path) -> None:
    source, target = tmp_path / "base.safetensors", tmp_path / "out.safetensors"
    write_base(open_base(bases["sd15"]), source, None, {})
    tensors, key = load_file(source), "model.diffusion_model.input_blocks.0.0"
    state = entry(diff=tensors[f"{key}.weight"])
    save_file({**tensors, f"{key}.scale_weight": torch.ones(())}, source)
    with pytest.raises(ConfigError, match=r"is quantised .*scale_weight"):
        merge(str(source), [Ingredient("ink", state)], target)
    save_file({**tensors, f"{key}.weight": tensors[f"{key}.weight"].to(torch.int8)}, source)
    with pytest.raises(ConfigError, match="stored as I8"):
        merge(str(source), [Ingredient("ink", state)], target)
