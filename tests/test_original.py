"""The original code's names of FLUX and SD3, against sd-scripts' own lists and diffusers' converters."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch
from diffusers.loaders.single_file_utils import (
    convert_flux_transformer_checkpoint_to_diffusers,
    convert_sd3_transformer_checkpoint_to_diffusers,
)
from safetensors.torch import save_file

from studio.adapters import AdapterConfig, AdapterPlan, inject, named_targets
from studio.errors import ConfigError
from studio.families import FAMILIES
from studio.families.flux import VARIANTS as FLUX_VARIANTS
from studio.families.keys import flatten, known_layer, unflatten
from studio.families.loading import load_base
from studio.families.sd3 import VARIANTS as SD3_VARIANTS
from studio.formats import kohya, read_adapter, write_adapter
from studio.formats.original import DENOISERS, from_original, layer_names, original_name, to_original
from studio.formats.state import AdapterState

GOLDEN = Path(__file__).with_name("golden")
ALL = ("attention", "feed-forward", "modulation", "embedders")
VARIANTS = [
    *(("flux", variant) for variant in FLUX_VARIANTS),
    *(("sd3", variant) for variant in SD3_VARIANTS),
    *(("sd", "sd1"), ("sd", "sd2"), ("sdxl", "sdxl")),
]


def fresh_state(family, variant, targets):
    """New adapters of rank 4 and alpha 2 on a published model: names and shapes, of zeros."""
    models = family.reference(variant)
    adapters = inject(
        family.prefixes(models), AdapterPlan(targets, config=AdapterConfig(rank=4, alpha=2.0)), family.roles
    )
    entries = {
        name: {end: torch.zeros(one.shape) if one.is_meta else one for end, one in adapter.export().items()}
        for name, adapter in adapters.items()
    }
    return AdapterState(family.name, entries)


@pytest.mark.parametrize(
    ("golden", "family", "variant", "targets"),
    [
        ("flux1_linear", "flux", "flux1-dev", FAMILIES["flux"].default_targets),
        ("flux1_all", "flux", "flux1-dev", (*ALL, "text-encoder", "t5")),
        ("sd3_linear", "sd3", "sd3-medium", FAMILIES["sd3"].default_targets),
        ("sd35_all", "sd3", "sd35-medium", (*ALL, "output")),
    ],
)
def test_full_size_transformers_export_the_keys_and_shapes_that_sd_scripts_writes(golden, family, variant, targets):
    state = fresh_state(FAMILIES[family], variant, targets)
    tensors = kohya.encode(state)
    shapes = {key: list(tensor.shape) for key, tensor in tensors.items()}
    assert shapes == json.loads(gzip.decompress((GOLDEN / f"{golden}.json.gz").read_bytes()))
    again = kohya.decode(tensors, {}, "file")
    assert again.family == family and again.tensors.keys() == state.tensors.keys()
    assert all(
        torch.equal(again.tensors[name][key], one) for name in state.tensors for key, one in state.tensors[name].items()
    )


@pytest.mark.parametrize(("name", "variant"), VARIANTS)
def test_every_layer_of_published_models_has_names_that_lead_back(name, variant):
    family = FAMILIES[name]
    layers = list(named_targets(family.prefixes(family.reference(variant))))
    originals = {layer: original_name(layer, name) for layer in layers}
    assert all(known_layer(layer) for layer in layers) and None not in originals.values()
    assert all(layer in layer_names(original, name) for layer, original in originals.items())
    paths = [layer.partition(".")[2] for layer in layers]
    assert [unflatten(flatten(path)) for path in paths] == paths
    modules = {layer: kohya.module_name(layer, name) for layer in layers}
    assert all(layer in kohya.layers_of(module, name) for layer, module in modules.items())
    assert len(set(modules.values())) == len(set(originals.values()))


@pytest.mark.parametrize(("name", "variant"), VARIANTS)
def test_published_models_have_roles_for_what_is_trained_by_default(name, variant):
    family = FAMILIES[name]
    targets = named_targets(family.prefixes(family.reference(variant)))
    denoiser = DENOISERS[name]
    roles = (*family.default_targets, *(role for role in ("embedders", "output") if role in family.roles))
    chosen = fresh_state(family, variant, roles).tensors.keys()
    if denoiser == "transformer":  # all its matrices
        assert chosen == {
            layer for layer, one in targets.items() if layer.startswith("transformer.") and one.spec.kind != "norm"
        }
    assert all(layer.startswith(f"{denoiser}.") for layer in chosen)


# -- diffusers' converters -------------------------------------------------------------------


def published_part(family, variant, kept):
    """Random full differences on the transformer's layers whose path `kept` takes, two columns of each matrix."""
    models = FAMILIES[family].reference(variant)
    generator = torch.Generator().manual_seed(0)
    entries = {}
    for path, layer in models.parts["transformer"].named_modules():
        if "weight" not in layer._parameters or not layer._parameters or layer.weight is None or not kept(path):
            continue
        shape = layer.weight.shape[:1] + tuple(min(size, 2) for size in layer.weight.shape[1:])
        names = ("diff", "diff_b") if layer.weight.ndim > 1 else ("w_norm", "b_norm")
        entry = {names[0]: torch.randn(shape, generator=generator)}
        if getattr(layer, "bias", None) is not None:
            entry[names[1]] = torch.randn(shape[:1], generator=generator)
        entries[f"transformer.{path}"] = entry
    return entries


def as_weights(entries, norm="weight"):
    """Full differences as the tensors of a checkpoint."""
    names = {"diff": "weight", "diff_b": "bias", "w_norm": norm, "b_norm": "bias"}
    return {f"{path}.{names[suffix]}": tensor for path, entry in entries.items() for suffix, tensor in entry.items()}


def test_flux_names_are_those_of_diffusers_converter():
    entries = published_part("flux", "flux1-dev", lambda path: "_blocks." not in path or "_blocks.0." in path)
    originals = {path: entry for (_, path), entry in to_original(entries, "flux").items()}
    converted = convert_flux_transformer_checkpoint_to_diffusers(as_weights(originals, norm="scale"))
    wanted = as_weights({name.removeprefix("transformer."): entry for name, entry in entries.items()})
    assert converted.keys() == wanted.keys()
    assert all(torch.equal(converted[key], tensor) for key, tensor in wanted.items())


@pytest.mark.parametrize("variant", ["sd3-medium", "sd35-medium"])
def test_sd3_names_are_those_of_diffusers_converter(variant):
    """The first two blocks and the last, as a model of three: the converter counts the blocks."""
    numbers = {"0": "0", "1": "1", "23": "2"}
    entries = {}
    parts = published_part("sd3", variant, lambda path: "_blocks." not in path or path.split(".")[1] in numbers)
    for name, entry in parts.items():
        head, mark, rest = name.partition("transformer_blocks.")
        number, _, path = rest.partition(".")
        entries[f"{head}{mark}{numbers[number]}.{path}" if mark else name] = entry
    widened = {name: as_square(entry, 1536) if "norm1_context" in name else entry for name, entry in entries.items()}
    originals = {path: entry for (_, path), entry in to_original(widened, "sd3").items()}
    checkpoint = {key: tensor[:, :2] if tensor.ndim == 2 else tensor for key, tensor in as_weights(originals).items()}
    converted = convert_sd3_transformer_checkpoint_to_diffusers({**checkpoint, "pos_embed": torch.zeros(1)})
    del converted["pos_embed.pos_embed"]
    wanted = as_weights({name.removeprefix("transformer."): entry for name, entry in entries.items()})
    assert converted.keys() == wanted.keys()
    assert all(torch.equal(converted[key], tensor) for key, tensor in wanted.items())


def as_square(entry, inputs):
    """With all input columns: only they tell a modulation of two vectors from one of six."""
    return {**entry, "diff": torch.nn.functional.pad(entry["diff"], (0, inputs - 2))}


# -- files -----------------------------------------------------------------------------------


def lora(outputs, inputs, rank=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        "lora_down.weight": torch.randn(rank, inputs, generator=generator),
        "lora_up.weight": torch.randn(outputs, rank, generator=generator),
        "alpha": torch.tensor(2.0),
    }


def keys(module, entry):
    return {f"{module}.{suffix}": tensor for suffix, tensor in entry.items()}


def test_transformers_may_have_diffusers_names_after_kohyas_prefix(tmp_path):
    tensors = keys("lora_unet_single_transformer_blocks_3_proj_mlp", lora(64, 16))
    save_file(tensors, tmp_path / "file.safetensors")
    state = read_adapter(tmp_path / "file.safetensors")
    assert state.family == "flux" and list(state.tensors) == ["transformer.single_transformer_blocks.3.proj_mlp"]


def test_a_layer_under_two_names_is_refused(tmp_path):
    tensors = keys("lora_unet_single_blocks_3_linear2", lora(16, 80))
    tensors |= keys("lora_unet_single_transformer_blocks_3_proj_out", lora(16, 80, seed=1))
    save_file(tensors, tmp_path / "file.safetensors")
    with pytest.raises(ConfigError, match=r"1 layers under two names: .*blocks\.3\.proj_out"):
        read_adapter(tmp_path / "file.safetensors")


def test_files_of_sd_scripts_with_split_qkv_keep_the_rank_of_each_part(tmp_path):
    """They hold the parts' `lora_down` stacked and their `lora_up` in blocks; alpha is read as of the whole."""
    parts = [lora(size, 16, seed=seed) for seed, size in enumerate((16, 16, 16, 64))]
    stacked = torch.cat([part["lora_down.weight"] for part in parts])
    blocks = torch.block_diag(*[part["lora_up.weight"] for part in parts])
    whole = {"lora_down.weight": stacked, "lora_up.weight": blocks, "alpha": torch.tensor(8.0)}
    save_file(keys("lora_unet_single_blocks_0_linear1", whole), tmp_path / "file.safetensors")
    state = read_adapter(tmp_path / "file.safetensors")
    names = [
        f"transformer.single_transformer_blocks.0.{end}" for end in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
    ]
    assert list(state.tensors) == names
    for name, part in zip(names, parts, strict=True):
        assert all(torch.equal(state.tensors[name][suffix], tensor) for suffix, tensor in part.items())
    again = kohya.encode(read_adapter(write_adapter(state, tmp_path / "again")))
    assert all(torch.equal(again[f"lora_unet_single_blocks_0_linear1.{suffix}"], one) for suffix, one in whole.items())


def test_only_the_last_block_of_sd3_has_its_text_modulation_turned():
    h = 16
    for number, vectors in ((0, 6), (1, 2)):
        entry = lora(vectors * h, h)
        ((_, turned),) = to_original(
            {f"transformer.transformer_blocks.{number}.norm1_context.linear": entry}, "sd3"
        ).items()
        up = entry["lora_up.weight"]
        assert torch.equal(turned["lora_up.weight"], up.roll(h, 0) if vectors == 2 else up)
    gate = {"weight": torch.ones(2 * h), "on_input": torch.tensor(0)}
    with pytest.raises(ConfigError, match="do not show whether it is the last block's"):
        to_original({"transformer.transformer_blocks.1.norm1_context.linear": gate}, "sd3")


def test_what_cannot_be_cut_or_put_together_says_what_to_do(tmp_path):
    lokr = {"lokr_w1": torch.ones(8, 4), "lokr_w2": torch.ones(6, 4)}
    save_file(keys("lora_unet_double_blocks_0_img_attn_qkv", lokr), tmp_path / "file.safetensors")
    with pytest.raises(
        ConfigError, match=r"img_attn\.qkv is .*to_q, .*lokr_w1 \(8, 4\) does not divide .*studio extract"
    ):
        read_adapter(tmp_path / "file.safetensors")
    names = [f"transformer.transformer_blocks.0.attn.to_{part}" for part in "qkv"]
    entries = {name: {"lokr_w1": torch.ones(4, 4), "lokr_w2": torch.randn(4, 4)} for name in names}
    with pytest.raises(ConfigError, match=r"cannot hold .*lokr_w2 of lokr differ .*(use one of the formats|bake)"):
        write_adapter(AdapterState("flux", entries), tmp_path / "new")
    with pytest.raises(ConfigError, match=r"unet\.conv_in has no name in the original code of 'flux'"):
        to_original({"unet.conv_in": lora(4, 4)}, "flux")
    with pytest.raises(ConfigError, match=r"transformer\.double_blocks\.0\.qkv is no layer"):
        from_original({("transformer", "double_blocks.0.qkv"): lora(4, 4)}, "flux")


@pytest.mark.parametrize(
    ("names", "metadata", "family"),
    [
        (["lora_te1_text_model_encoder_layers_0_mlp_fc1"], {}, "sdxl"),
        (["lora_te1_text_model_encoder_layers_0_mlp_fc1"], {"ss_base_model_version": "flux1"}, "flux"),
        (["lora_te3_encoder_block_0_layer_0_SelfAttention_q"], {}, "flux"),
        (
            ["lora_te2_text_model_encoder_layers_0_mlp_fc1", "lora_te3_encoder_block_0_layer_0_SelfAttention_q"],
            {},
            "sd3",
        ),
        (["lora_unet_joint_blocks_0_x_block_mlp_fc1"], {"ss_base_model_version": "sdxl_base_v1-0"}, "sd3"),
    ],
)
def test_the_family_is_told_by_the_modules_and_the_metadata(names, metadata, family, tmp_path):
    tensors = {key: one for name in names for key, one in keys(name, lora(8, 8)).items()}
    save_file(tensors, tmp_path / "file.safetensors", metadata)
    assert read_adapter(tmp_path / "file.safetensors").family == family


@pytest.mark.parametrize(("kind", "family"), [("FluxPipeline", "flux"), ("StableDiffusion3Pipeline", "sd3")])
def test_a_base_of_names_alone_is_refused_for_training_before_it_is_loaded(kind, family, tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": kind}))
    with pytest.raises(
        ConfigError, match=rf"of the family '{family}', which is not supported yet for training .* sd, sdxl"
    ):
        load_base(str(tmp_path))
    with pytest.raises(ConfigError, match="unknown model 'flux-dev'.*Did you mean flux1-dev"):
        FAMILIES["flux"].reference("flux-dev")
