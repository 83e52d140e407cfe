"""`check_file`: every key of our files is used by the tools they are for, and known traps are seen."""

from __future__ import annotations

import pytest
import tiny
import tiny_transformers
import torch
from layers import config_of
from safetensors.torch import load_file, save_file

from studio.adapters import METHODS, AdapterConfig, AdapterPlan, inject
from studio.adapters.targets import named_targets
from studio.errors import ConfigError
from studio.families import FAMILIES
from studio.families.keys import LDMNames, known_layer
from studio.families.loading import load_base
from studio.formats import write_adapter
from studio.formats.consumers import CONSUMERS, check_file, consumer_named
from studio.formats.state import AdapterState

FILES = tuple(name for name in CONSUMERS if name != "peft")
"""The tools that read single files."""


def used(path, family, models=None):
    return {name: report.used for name, report in check_file(path, family, models).items()}


def by_all(count, **others):
    """The same count for every tool that reads files, but for these."""
    return dict.fromkeys(CONSUMERS, 0) | dict.fromkeys(FILES, count) | others


@pytest.fixture(params=tiny.KINDS)
def case(request, tmp_path):
    family, models, adapters = tiny.random_adapter(request.param)
    return family, models, tiny.state_of(family, adapters), tmp_path / "file"


@pytest.fixture
def sd15(tmp_path):
    family, models, adapters = tiny.random_adapter("sd15")
    path = write_adapter(tiny.state_of(family, adapters), tmp_path / "file")
    return family, models, load_file(path), tmp_path / "other.safetensors"


def test_all_tools_use_every_key_of_a_kohya_file_as_it_is_meant(case):
    family, models, state, path = case
    reports = check_file(write_adapter(state, path), family, models)
    assert list(reports) == list(CONSUMERS)
    for name in FILES:
        report = reports[name]
        assert (report.used, report.unused, report.error) == (report.total, (), 0.0)
        assert report.total == 3 * len(state.tensors) and report.faithful
    assert not reports["peft"].faithful


@pytest.mark.parametrize(("name", "variant"), [("sd", "sd1"), ("sd", "sd2"), ("sdxl", "sdxl")])
def test_files_for_full_size_models_are_checked_without_the_base(name, variant, tmp_path):
    family = FAMILIES[name]
    plan = AdapterPlan(tiny.TARGETS, config=AdapterConfig(rank=1, alpha=1.0))
    adapters = inject(family.prefixes(family.reference(variant)), plan, family.roles)
    tensors = {layer: {key: torch.ones(t.shape) for key, t in a.export().items()} for layer, a in adapters.items()}
    path = write_adapter(AdapterState(name, tensors), tmp_path / "file")
    assert used(path, family) == by_all(3 * len(tensors))


EVERYWHERE = ("attention", "feed-forward", "modulation", "embedders", "output")


def transformer_adapter(name, targets=EVERYWHERE):
    """A random LoRA on a tiny FLUX or SD3 base."""
    family, models = FAMILIES[name], tiny_transformers.models(name)
    plan = AdapterPlan((*targets, "text-encoder", "t5"), config=config_of("lora"))
    adapters = inject(family.prefixes(models), plan, family.roles)
    tensors = adapters.state()
    adapters.detach()
    draw = torch.Generator().manual_seed(3)
    random = {
        layer: {key: one if one.numel() == 1 else torch.randn(one.shape, generator=draw) for key, one in entry.items()}
        for layer, entry in tensors.items()
    }
    return family, models, AdapterState(name, random)


@pytest.mark.parametrize("name", tiny_transformers.FAMILIES)
def test_a_kohya_file_of_a_transformer_is_for_sd_scripts_and_those_that_follow_it(name, tmp_path):
    family, models, state = transformer_adapter(name)
    reports = check_file(write_adapter(state, tmp_path / "file"), family, models)
    for tool in ("comfyui", "forge", "lycoris"):
        assert reports[tool].faithful, tool
    last = "lora_unet_final_layer" if name == "flux" else "nothing"
    assert all(key.startswith(last) for key in reports["sd-scripts"].unused)
    assert reports["diffusers"].used == reports["a1111"].used == reports["peft"].used == 0


@pytest.mark.parametrize("name", tiny_transformers.FAMILIES)
def test_the_other_files_of_a_transformer(name, tmp_path):
    family, models, state = transformer_adapter(name)
    assert check_file(write_adapter(state, tmp_path / "comfyui", "comfyui"), family, models)["comfyui"].faithful
    loaded = {"text_encoder", "text_encoder_2", "transformer"} - ({"text_encoder_2"} if name == "flux" else set())
    of_diffusers = {layer: entry for layer, entry in state.tensors.items() if layer.partition(".")[0] in loaded}
    state = AdapterState(name, of_diffusers)
    reports = check_file(write_adapter(state, tmp_path / "diffusers", "diffusers"), family, models)
    assert reports["diffusers"].faithful
    assert not reports["comfyui"].faithful and "alpha" in reports["comfyui"].notes[0]
    transformer = {layer: entry for layer, entry in of_diffusers.items() if layer.startswith("transformer.")}
    reports = check_file(write_adapter(AdapterState(name, transformer), tmp_path / "own", "lycoris"), family, models)
    assert reports["comfyui"].faithful and reports["lycoris"].faithful
    assert reports["forge"].faithful == (name == "flux")


def test_tools_may_use_what_has_no_form_for_the_layers_of_diffusers(tmp_path):
    """A Kronecker product of 2 x 24 outputs is no such product for each of q, k and v."""
    factors = {"lokr_w1": torch.ones(2, 4), "lokr_w2": torch.ones(24, 4)}
    save_file({f"lora_unet_double_blocks_0_img_attn_qkv.{key}": one for key, one in factors.items()}, tmp_path / "file")
    path = (tmp_path / "file").rename(tmp_path / "file.safetensors")
    reports = check_file(path, FAMILIES["flux"], tiny_transformers.models("flux"))
    assert reports["comfyui"].used == reports["lycoris"].used == 2
    assert reports["comfyui"].error is None and "lokr" in reports["comfyui"].problem


def test_diffusers_loses_the_layers_outside_of_the_blocks_of_flux(tmp_path):
    family, models, state = transformer_adapter("flux", targets=("double-blocks", "embedders"))
    t5 = {layer: entry for layer, entry in state.tensors.items() if not layer.startswith("text_encoder_2")}
    report = check_file(write_adapter(AdapterState("flux", t5), tmp_path / "file"), family, models)["diffusers"]
    assert report.error is not None and report.error > 0.1
    assert report.unused and all("_in_" in key or "_in." in key for key in report.unused)


def test_a_diffusers_file_is_for_diffusers(case):
    family, models, state, path = case
    reports = check_file(write_adapter(state, path, "diffusers"), family, models)
    attention = [name for name in state.tensors if ".attn" in name]
    assert reports["diffusers"].faithful
    assert reports["comfyui"].used == 2 * (len(state.tensors) - len(attention))
    assert all(reports[name].used == 0 for name in ("sd-scripts", "a1111", "forge", "lycoris", "peft"))
    assert "left over" in reports["forge"].notes[0]


def test_a_peft_folder_is_for_peft(case):
    family, models, state, path = case
    reports = check_file(write_adapter(state, path, "peft"), family, models)
    assert reports["peft"].faithful and reports["peft"].total == 2 * len(state.tensors)
    assert all(reports[name].used == 0 for name in FILES)


def test_flattened_text_encoder_names_are_read_by_diffusers_only(sd15):
    family, models, tensors, path = sd15
    save_file({key.replace("lora_te_text_model_", "lora_te_"): tensor for key, tensor in tensors.items()}, path)
    counts, text = used(path, family, models), sum(key.startswith("lora_te_") for key in tensors)
    assert text == 54
    assert counts == by_all(len(tensors) - text, diffusers=len(tensors), forge=0)


def test_comfyui_matches_no_plain_diffusers_attention_key(sd15):
    family, models, _, path = sd15
    module = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    factors = {f"{module}.lora.down.weight": torch.ones(1, 32), f"{module}.lora.up.weight": torch.ones(32, 1)}
    save_file(factors, path)
    assert used(path, family, models) == by_all(0, diffusers=2)


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
    report = check_file(path, family, models)["diffusers"]
    assert report.used == 2 and all("attn1" in key for key in report.unused)
    assert (report.error, report.layer) == (1.0, module)


def test_a_strange_key_makes_some_refuse_the_file_and_others_pass_over_it(sd15):
    family, models, tensors, path = sd15
    save_file(tensors | {"lora_unet_conv_in.hada_w1_a": torch.ones(1)}, path)
    reports = check_file(path, family, models)
    refusing = dict.fromkeys(("diffusers", "a1111", "lycoris", "lycoris-merge"), 0)
    assert {name: report.used for name, report in reports.items()} == by_all(len(tensors), **refusing)
    for report in reports.values():
        assert (report.error is None and "lora_unet_conv_in" in report.problem) or "conv_in" in report.problem


def test_dora_scales_are_dropped_by_diffusers_and_sd_scripts_and_misread_by_others(tmp_path):
    plan = AdapterPlan(("attention",), config=AdapterConfig("dora", 4, 2.0))
    family, models, adapters = tiny.random_adapter("sd15", plan)
    path = write_adapter(tiny.state_of(family, adapters), tmp_path / "file")
    reports = check_file(path, family, models)
    for tool in ("diffusers", "sd-scripts"):
        assert reports[tool].unused and all(key.endswith(".dora_scale") for key in reports[tool].unused)
        assert "dora_scale" in reports[tool].notes[0]
    for tool in ("comfyui", "forge", "a1111"):
        assert reports[tool].unused == ()
    for tool in ("diffusers", "sd-scripts", "comfyui", "forge", "a1111"):
        assert reports[tool].error > 0.01 and reports[tool].layer in adapters.names
    assert reports["lycoris"].faithful
    flat = {key: tensor[:, 0] if key.endswith("dora_scale") else tensor for key, tensor in load_file(path).items()}
    save_file(flat, tmp_path / "flat.safetensors")
    assert used(tmp_path / "flat.safetensors", family, models)["comfyui"] == 0, "it takes one dimension for another"


def test_what_depends_on_the_base_is_not_known_without_it(tmp_path):
    family = FAMILIES["sd"]
    plan = AdapterPlan(("self-attention",), config=AdapterConfig("dora", 1, 1.0))
    adapters = inject(family.prefixes(family.reference("sd1")), plan, family.roles)
    tensors = {layer: {key: torch.ones(t.shape) for key, t in a.export().items()} for layer, a in adapters.items()}
    reports = check_file(write_adapter(AdapterState("sd", tensors), tmp_path / "file"), family)
    assert reports["comfyui"].unused == () and reports["comfyui"].error is None and not reports["comfyui"].faithful
    assert reports["lycoris"].faithful and reports["peft"].error == 1.0


def test_an_attention_block_of_open_clip_is_whole_in_a1111(tmp_path):
    part = AdapterPlan(("re:text_encoder_2.*(q|k|v)_proj",), config=AdapterConfig(rank=4, alpha=2.0))
    family, models, adapters = tiny.random_adapter("sdxl", part)
    reports = check_file(write_adapter(tiny.state_of(family, adapters), tmp_path / "file"), family, models)
    assert reports["a1111"].used == 0 and "OpenCLIP" in reports["a1111"].notes[0]
    assert reports["comfyui"].faithful


def test_tools_have_names_to_ask_for():
    assert consumer_named("ComfyUI") == "comfyui"
    with pytest.raises(ConfigError, match=r"unknown tool 'comfi'. Did you mean comfyui"):
        consumer_named("comfi")


LYCORIS = frozenset({"comfyui", "a1111", "forge", "lycoris", "lycoris-merge"})
READERS = {
    **dict.fromkeys(("lora", "adalora", "deltalora", "qalora"), frozenset(FILES)),  # all of them are written as LoRAs
    **dict.fromkeys(("dora", "tucker", "loha", "lokr", "diff"), LYCORIS),
    "norm": LYCORIS,
    "oft": LYCORIS - {"forge", "lycoris", "lycoris-merge"},  # in LyCORIS, blocks are no larger than their number
    "boft": LYCORIS - {"forge"},
    "bias": {"comfyui", "forge"},
    "ia3": {"a1111"},
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
    assert {name for name, report in reports.items() if not report.unused} == READERS.get(method, set())


def test_layers_of_another_size_do_not_count(sd15):
    family, _, tensors, path = sd15
    save_file(tensors, path)
    assert used(path, family) == by_all(0)


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
