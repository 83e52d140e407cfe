"""`check_file`: every key of our files is used by the tools they are for, and known traps are seen."""

from __future__ import annotations

import pytest
import tiny
import torch
from layers import config_of
from safetensors.torch import load_file, save_file

from studio.adapters import METHODS, AdapterConfig, AdapterPlan, inject, named_targets
from studio.families import FAMILIES
from studio.families.keys import LDMNames, known_layer
from studio.families.loading import load_base
from studio.formats import write_adapter
from studio.formats.consumers import check_file
from studio.formats.state import AdapterState

TOOLS = ("diffusers", "kohya sd-scripts", "ComfyUI", "A1111")


def used(path, family, models=None):
    return {report.consumer: report.used for report in check_file(path, family, models)}


@pytest.fixture(params=tiny.KINDS)
def case(request, tmp_path):
    family, models, adapters = tiny.random_adapter(request.param)
    return family, models, tiny.state_of(family, adapters), tmp_path / "file"


@pytest.fixture
def sd15(tmp_path):
    family, models, adapters = tiny.random_adapter("sd15")
    path = write_adapter(tiny.state_of(family, adapters), tmp_path / "file")
    return family, models, load_file(path), tmp_path / "other.safetensors"


def test_all_tools_use_every_key_of_a_kohya_file(case):
    family, models, state, path = case
    reports = check_file(write_adapter(state, path), family, models)
    assert [report.consumer for report in reports] == list(TOOLS)
    for report in reports:
        assert (report.used, report.unused) == (report.total, ())
        assert report.total == 3 * len(state.tensors)


@pytest.mark.parametrize(("name", "variant"), [("sd", "sd1"), ("sd", "sd2"), ("sdxl", "sdxl")])
def test_files_for_full_size_models_are_checked_without_the_base(name, variant, tmp_path):
    family = FAMILIES[name]
    plan = AdapterPlan(tiny.TARGETS, config=AdapterConfig(rank=1, alpha=1.0))
    adapters = inject(family.prefixes(family.reference(variant)), plan, family.roles)
    tensors = {layer: {key: torch.ones(t.shape) for key, t in a.export().items()} for layer, a in adapters.items()}
    path = write_adapter(AdapterState(name, tensors), tmp_path / "file")
    assert used(path, family) == dict.fromkeys(TOOLS, 3 * len(tensors))


def test_a_diffusers_file_is_for_diffusers(case):
    family, models, state, path = case
    counts = used(write_adapter(state, path, "diffusers"), family, models)
    attention = [name for name in state.tensors if ".attn" in name]
    assert counts["diffusers"] == 2 * len(state.tensors)
    assert counts["ComfyUI"] == 2 * (len(state.tensors) - len(attention))
    assert counts["kohya sd-scripts"] == counts["A1111"] == 0


def test_a_peft_folder_is_for_peft(case):
    family, models, state, path = case
    assert used(write_adapter(state, path, "peft"), family, models) == {"peft": 2 * len(state.tensors)}


def test_flattened_text_encoder_names_are_read_by_diffusers_only(sd15):
    family, models, tensors, path = sd15
    save_file({key.replace("lora_te_text_model_", "lora_te_"): tensor for key, tensor in tensors.items()}, path)
    counts, text = used(path, family, models), sum(key.startswith("lora_te_") for key in tensors)
    assert text == 54
    assert counts == dict.fromkeys(TOOLS, len(tensors) - text) | {"diffusers": len(tensors)}


def test_comfyui_matches_no_plain_diffusers_attention_key(sd15):
    family, models, _, path = sd15
    module = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    factors = {f"{module}.lora.down.weight": torch.ones(1, 32), f"{module}.lora.up.weight": torch.ones(32, 1)}
    save_file(factors, path)
    assert used(path, family, models) == dict.fromkeys(TOOLS, 0) | {"diffusers": 2}


def test_a_mixed_diffusers_file_loses_its_attention(sd15):
    family, models, _, path = sd15
    module = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    mixed = {
        "unet.conv_in.lora_A.weight": torch.ones(1, 4, 3, 3),
        "unet.conv_in.lora_B.weight": torch.ones(16, 1, 1, 1),
        f"{module}.lora.down.weight": torch.ones(1, 32),
        f"{module}.lora.up.weight": torch.ones(32, 1),
    }
    save_file(mixed, path)
    report = next(report for report in check_file(path, family, models) if report.consumer == "diffusers")
    assert report.used == 2 and all("attn1" in key for key in report.unused)


def test_a_strange_key_makes_diffusers_and_a1111_refuse_the_file_and_others_pass_over_it(sd15):
    family, models, tensors, path = sd15
    save_file(tensors | {"lora_unet_conv_in.hada_w1_a": torch.ones(1)}, path)
    assert used(path, family, models) == dict.fromkeys(TOOLS, len(tensors)) | {"diffusers": 0, "A1111": 0}


def test_dora_scales_are_dropped_by_diffusers_and_kohya(sd15):
    family, models, tensors, path = sd15
    up = next(key for key, tensor in tensors.items() if "lora_up" in key and tensor.ndim == 2)
    scale = f"{up.partition('.')[0]}.dora_scale"
    save_file(tensors | {scale: torch.ones(len(tensors[up]), 1)}, path)
    counts = used(path, family, models)
    assert counts["diffusers"] == counts["kohya sd-scripts"] == len(tensors)
    assert counts["ComfyUI"] == counts["A1111"] == len(tensors) + 1
    save_file(tensors | {scale: torch.ones(len(tensors[up]))}, path)
    assert used(path, family, models)["ComfyUI"] == len(tensors), "it would take one dimension for another"


LYCORIS = frozenset({"ComfyUI", "A1111"})
READERS = {
    **dict.fromkeys(("lora", "adalora", "deltalora", "qalora"), frozenset(TOOLS)),  # all of them are written as LoRAs
    **dict.fromkeys(("dora", "tucker", "loha", "lokr", "oft", "boft", "diff", "norm"), LYCORIS),
    "bias": {"ComfyUI"},
    "ia3": {"A1111"},
}


@pytest.mark.parametrize("method", METHODS)
def test_the_check_says_which_tools_read_a_method(method, tmp_path):
    family, models = load_base(str(tiny.folder("sd15")))
    places = (".attn2.to_k", ".resnets.1.conv1", ".norm2", ".token_embedding")
    if method == "ia3":
        places = places[:1]  # none gates a bias
    elif method != "tokens":
        places = places[:3]  # none has a name for embeddings
    targets = named_targets(family.prefixes(models)).items()
    names = [name for name, one in targets if name.endswith(places) and METHODS[method].supports(one.spec)]
    config = config_of(method)
    adapters = inject(family.prefixes(models), AdapterPlan(tuple(names), config=config), {})
    path = write_adapter(AdapterState("sd", adapters.state()), tmp_path / "file")
    reports = check_file(path, family, models)
    assert {report.consumer for report in reports if not report.unused} == READERS.get(method, set())


def test_layers_of_another_size_do_not_count(sd15):
    family, _, tensors, path = sd15
    save_file(tensors, path)
    assert used(path, family) == dict.fromkeys(TOOLS, 0)


@pytest.mark.parametrize(("name", "variant"), [("sd", "sd1"), ("sdxl", "sdxl")])
def test_ldm_names_are_invertible_for_every_layer(name, variant):
    family = FAMILIES[name]
    models = family.reference(variant)
    names = LDMNames(models.parts["unet"].config)
    paths = [path for path, module in models.parts["unet"].named_modules() if known_layer(f"unet.{path}")]
    ldm = [names.to_ldm(path) for path in paths]
    assert None not in ldm and len(set(ldm)) == len(paths)
    assert [names.to_diffusers(path) for path in ldm] == paths
    assert len(paths) > 280


def test_ldm_names_of_stable_diffusion_1():
    names = LDMNames(FAMILIES["sd"].reference().parts["unet"].config)
    for diffusers, ldm in {
        "down_blocks.0.attentions.1.proj_in": "input_blocks.2.1.proj_in",
        "down_blocks.2.downsamplers.0.conv": "input_blocks.9.0.op",
        "down_blocks.3.resnets.1.conv2": "input_blocks.11.0.out_layers.3",
        "mid_block.resnets.1.time_emb_proj": "middle_block.2.emb_layers.1",
        "up_blocks.0.upsamplers.0.conv": "output_blocks.2.1.conv",
        "up_blocks.1.upsamplers.0.conv": "output_blocks.5.2.conv",
        "up_blocks.3.resnets.2.conv_shortcut": "output_blocks.11.0.skip_connection",
    }.items():
        assert names.to_ldm(diffusers) == ldm
