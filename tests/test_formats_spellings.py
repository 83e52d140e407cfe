"""The names that other tools write and read: LyCORIS, OneTrainer, ComfyUI's generic form, diffusers old and new."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import tiny_transformers
import torch
from layers import close, randomise
from safetensors.torch import load_file, save_file
from torch import Tensor

from studio.adapters import AdapterConfig, AdapterPlan, AdapterSet, inject
from studio.errors import ConfigError
from studio.families import FAMILIES
from studio.families.loading import load_base
from studio.formats import FORMATS, format_of, read_adapter, write_adapter
from studio.formats.state import AdapterState

UNET = AdapterPlan(("attention", "convolutions", "text-encoder"), config=AdapterConfig(rank=4, alpha=2.0))
TRANSFORMER = AdapterPlan(("attention", "feed-forward", "text-encoder"), config=AdapterConfig(rank=4, alpha=2.0))


def adapters_of(family: str, plan: AdapterPlan = TRANSFORMER) -> AdapterSet:
    """On a tiny transformer and its text encoders, attached, with random factors; T5 is left out."""
    adapters = inject(FAMILIES[family].prefixes(tiny_transformers.models(family)), plan, FAMILIES[family].roles)
    randomise(adapters)
    return adapters


def detached(family: str, plan: AdapterPlan = TRANSFORMER) -> AdapterState:
    adapters = adapters_of(family, plan)
    state = AdapterState(family, adapters.state())
    adapters.detach()
    return state


@pytest.fixture(scope="module")
def sd() -> AdapterState:
    family, _, adapters = tiny.random_adapter("sd15", UNET)
    return tiny.state_of(family, adapters)


def respelled(path: Path, spell: Callable[[str], str], keep: Callable[[str], bool] = lambda key: True) -> Path:
    """The file with other keys, and without metadata."""
    tensors = {spell(key): tensor for key, tensor in load_file(path).items() if keep(key)}
    save_file(tensors, path.with_name("other.safetensors"))
    return path.with_name("other.safetensors")


def same(one: AdapterState, other: AdapterState, alpha: bool = True) -> bool:
    """Equal tensors; without `alpha`, all others."""

    def values(state: AdapterState) -> dict[tuple[str, str], list]:
        return {
            (name, suffix): tensor.tolist()
            for name, entry in state.tensors.items()
            for suffix, tensor in entry.items()
            if alpha or suffix != "alpha"
        }

    return one.family == other.family and values(one) == values(other)


# -- LyCORIS ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sd", "flux", "sd3"])
def test_lycoris_writes_the_same_names(name, tmp_path):
    from lycoris import LycorisNetwork, create_lycoris

    if name == "sd":
        family, models = load_base(str(tiny.folder("sd15")))
        component = "unet"
    else:
        family, models, component = FAMILIES[name], tiny_transformers.models(name), "transformer"
    plan = AdapterPlan(("attention", "feed-forward"), config=AdapterConfig(rank=4, alpha=2.0))
    adapters = inject({component: models.parts[component]}, plan, family.roles)
    state = AdapterState(family.name, adapters.state())
    adapters.detach()
    names = [layer.removeprefix(f"{component}.") for layer in state.tensors]
    LycorisNetwork.apply_preset({"target_module": [], "target_name": names})
    network = create_lycoris(copy.deepcopy(models.parts[component]), linear_dim=4, linear_alpha=2.0, algo="lora")
    network.apply_to()
    ours = load_file(write_adapter(state, tmp_path / "file", "lycoris"))
    theirs = network.state_dict()
    assert {key: tuple(one.shape) for key, one in ours.items()} == {
        key: tuple(one.shape) for key, one in theirs.items()
    }


# -- diffusers -------------------------------------------------------------------------------

PROCESSORS = {".to_out.0.lora.": ".processor.to_out_lora."} | {
    f".to_{part}.lora.": f".processor.to_{part}_lora." for part in "qkv"
}


def as_processor(key: str) -> str:
    """The name of an attention layer in diffusers before PEFT."""
    for new, old in PROCESSORS.items():
        key = key.replace(new, old)
    return key


def test_diffusers_files_of_the_time_of_attention_processors_are_read(sd, tmp_path):
    path = write_adapter(sd, tmp_path / "file", "diffusers")
    attention = {name: entry for name, entry in sd.tensors.items() if ".attn" in name}
    with_prefix = respelled(path, as_processor, lambda key: ".attn" in key)
    assert any(".processor.to_out_lora.down.weight" in key for key in load_file(with_prefix))
    assert same(replace(sd, tensors=attention), read_adapter(with_prefix), alpha=False)
    bare = respelled(path, lambda key: as_processor(key).removeprefix("unet."), lambda key: ".attn" in key)
    assert format_of(bare) == "diffusers"
    assert same(replace(sd, tensors=attention), read_adapter(bare), alpha=False)
    assert all(entry["alpha"] == 4 for entry in read_adapter(bare).tensors.values()), "without alpha, it is the rank"


@pytest.mark.parametrize("form", ["{}.lora_A.default.weight", "{}.lora_A.weight", "base {}.lora_A.weight"])
def test_state_dicts_of_models_under_peft_are_read_below_their_component(form, sd, tmp_path):
    def spell(key: str) -> str:
        component, _, rest = key.partition(".")
        path, _, factor = rest.replace(".lora_linear_layer.", ".lora.").rpartition(".lora.")
        letter = "A" if factor.startswith("down") else "B"
        prefix = "base_model.model." if form.startswith("base") else ""
        return f"{component}.{prefix}" + form.removeprefix("base ").format(path).replace("lora_A", f"lora_{letter}")

    other = respelled(write_adapter(sd, tmp_path / "file", "diffusers"), spell)
    assert format_of(other) == "diffusers"
    assert same(sd, read_adapter(other), alpha=False)


def test_alphas_in_keys_are_believed_before_the_metadata(tmp_path):
    state = detached("flux")
    tensors = load_file(write_adapter(state, tmp_path / "file", "diffusers"))
    alphas = {f"{name}.alpha": entry["alpha"] for name, entry in state.tensors.items()}
    save_file({**tensors, **alphas}, tmp_path / "other.safetensors")
    assert same(state, read_adapter(tmp_path / "other.safetensors"))


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("name", tiny_transformers.FAMILIES)
def test_diffusers_computes_the_same_with_our_file(name, method, tmp_path):
    import diffusers

    overrides = {"feed-forward": {"rank": 2, "alpha": 3.0}}
    plan = AdapterPlan(("attention", "feed-forward"), config=AdapterConfig(method, 4, 2.0), overrides=overrides)
    adapters, models = adapters_of(name, plan), tiny_transformers.models(name)
    ours = tiny_transformers.predict(name, models)
    state = AdapterState(name, adapters.state())
    adapters.detach()
    assert not close(tiny_transformers.predict(name, models), ours)
    path = write_adapter(state, tmp_path / "file", "diffusers")
    pipeline = getattr(diffusers, {"flux": "FluxPipeline", "sd3": "StableDiffusion3Pipeline"}[name])
    tensors, *_, metadata = pipeline.lora_state_dict(str(path), return_lora_metadata=True)
    transformer = copy.deepcopy(models.parts["transformer"])
    alphas = {"network_alphas": None} if name == "flux" else {}
    pipeline.load_lora_into_transformer(tensors, transformer=transformer, metadata=metadata, **alphas)
    theirs = tiny_transformers.predict(name, replace(models, parts={"transformer": transformer}))
    assert close(theirs, ours)


def test_diffusers_has_no_place_for_a_t5(tmp_path):
    state = detached("flux", AdapterPlan(("t5",), config=AdapterConfig(rank=4)))
    with pytest.raises(ConfigError, match=r"has no names for .*text_encoder_2\.encoder"):
        write_adapter(state, tmp_path / "file", "diffusers")


# -- ComfyUI ---------------------------------------------------------------------------------

COMFYUI = {
    "generic": (".lora_A.weight", ".lora_B.weight"),
    "kohya": (".lora_down.weight", ".lora_up.weight"),
    "processor": ("_lora.down.weight", "_lora.up.weight"),
    "diffusers": (".lora.down.weight", ".lora.up.weight"),
    "mochi": (".lora_A", ".lora_B"),
    "transformers": (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
    "raw": (".lora_A.default.weight", ".lora_B.default.weight"),
}


@pytest.mark.parametrize("spelling", COMFYUI)
@pytest.mark.parametrize("family", ["sd", "flux", "sd3"])
def test_every_spelling_that_comfyui_reads_is_read(family, spelling, sd, tmp_path):
    state = sd if family == "sd" else detached(family)
    path, (down, up) = write_adapter(state, tmp_path / "file", "comfyui"), COMFYUI[spelling]
    other = respelled(path, lambda key: key.replace(".lora_A.weight", down).replace(".lora_B.weight", up))
    assert format_of(other) == "comfyui"
    assert same(state, read_adapter(other))


def test_comfyui_files_have_the_names_of_its_checkpoints(sd, tmp_path):
    keys = load_file(write_adapter(sd, tmp_path / "file", "comfyui")).keys()
    assert "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.lora_A.weight" in keys
    assert "text_encoders.clip_l.transformer.text_model.encoder.layers.0.self_attn.q_proj.alpha" in keys
    keys = load_file(write_adapter(detached("flux"), tmp_path / "flux", "comfyui")).keys()
    assert "diffusion_model.double_blocks.0.img_attn.qkv.lora_B.weight" in keys
    assert "diffusion_model.single_blocks.1.linear1.lora_A.weight" in keys
    keys = load_file(write_adapter(detached("sd3"), tmp_path / "sd3", "comfyui")).keys()
    assert "text_encoders.clip_g.transformer.text_model.encoder.layers.0.mlp.fc1.lora_A.weight" in keys
    assert "diffusion_model.joint_blocks.0.x_block.attn.qkv.lora_A.weight" in keys


# -- OneTrainer ------------------------------------------------------------------------------


def test_onetrainer_counts_the_text_encoders(tmp_path):
    plan = AdapterPlan(("attention", "text-encoder", "t5"), config=AdapterConfig(rank=4, alpha=2.0))
    prefixes = {"flux": {"transformer", "te1", "te2"}, "sd3": {"transformer", "te1", "te2", "te3"}}
    for family, expected in prefixes.items():
        path = write_adapter(detached(family, plan), tmp_path / family, "onetrainer")
        keys = load_file(path).keys()
        assert {key.split("_")[1] for key in keys} == expected
        assert format_of(path) == "onetrainer"
    assert "lora_transformer_transformer_blocks_0_attn_to_q.lora_down.weight" in keys


def test_onetrainer_marks_scaled_rotations(tmp_path):
    state = detached("flux", AdapterPlan(("attention",), config=AdapterConfig("oftv2", options={"block_size": 8})))
    scaled: dict[str, Tensor] = {}
    for key, tensor in load_file(write_adapter(state, tmp_path / "file", "onetrainer")).items():
        module, _, suffix = key.partition(".")
        if suffix == "oft_R.weight":
            scaled |= {key: 2 * 7**0.5 * tensor, f"{module}.oft_R.scaled_oft": torch.tensor(True)}
    save_file(scaled, tmp_path / "scaled.safetensors")
    for name, entry in read_adapter(tmp_path / "scaled.safetensors").tensors.items():
        assert close(entry["oft_R.weight"], state.tensors[name]["oft_R.weight"])


# -- which format a file has ------------------------------------------------------------------


def test_a_kohya_file_with_names_of_diffusers_is_kohyas(sd, tmp_path):
    for format in ("kohya", "onetrainer"):
        assert format_of(write_adapter(sd, tmp_path / format, format)) == "kohya"


@pytest.mark.parametrize("targets", [("to_k", "to_v"), ("to_k", "to_v", "q_proj")])
@pytest.mark.parametrize("variant", ["sd1", "sd2", "sdxl", "flux1-dev", "sd3-medium"])
def test_keys_and_shapes_alone_tell_the_family(variant, targets, tmp_path):
    family = FAMILIES[{"sd1": "sd", "sd2": "sd", "flux1-dev": "flux", "sd3-medium": "sd3"}.get(variant, variant)]
    plan = AdapterPlan(targets, config=AdapterConfig(rank=1))
    adapters = inject(family.prefixes(family.reference(variant)), plan, family.roles)
    shapes = {name: {key: one.shape for key, one in adapter.export().items()} for name, adapter in adapters.items()}
    entries = {name: {key: torch.rand(shape) for key, shape in own.items()} for name, own in shapes.items()}
    for format in ("kohya", "comfyui", "lycoris", "onetrainer", "diffusers"):
        held = {name: own for name, own in entries.items() if FORMATS[format].has_name(name, family.name)}
        path = write_adapter(AdapterState(family.name, held), tmp_path / format, format)
        tensors = load_file(path)
        save_file(tensors, path)  # without metadata
        again = read_adapter(path)
        assert (again.family, again.tensors.keys()) == (family.name, held.keys()), format
        if format == "comfyui" and "q_proj" in targets and family.name == "sd":
            clip = "clip_h" if variant == "sd2" else "clip_l"
            assert any(key.startswith(f"text_encoders.{clip}.transformer.") for key in tensors)


def test_an_unknown_key_is_refused_by_every_format(sd, tmp_path):
    prefixes = {"diffusers": "unet.", "comfyui": "diffusion_model.", "lycoris": "lycoris_", "kohya": "lora_unet_"}
    for format, prefix in prefixes.items():
        tensors = load_file(write_adapter(sd, tmp_path / format, format))
        strange = {f"{prefix}nowhere_{index}.lora_down.weight": torch.ones(2, 2) for index in range(6)}
        save_file({**tensors, **strange}, tmp_path / "other.safetensors")
        with pytest.raises(ConfigError, match=r"^6 of the \d+ keys.*nowhere_0.*nowhere_4") as caught:
            read_adapter(tmp_path / "other.safetensors")
        assert "nowhere_5" not in str(caught.value)


def test_metadata_of_no_use_are_refused(sd, tmp_path):
    tensors = load_file(write_adapter(sd, tmp_path / "file", "diffusers"))
    for text, message in (("[1]", "no JSON object"), ("{", "not JSON")):
        save_file(tensors, tmp_path / "other.safetensors", {"lora_adapter_metadata": text})
        with pytest.raises(ConfigError, match=message):
            read_adapter(tmp_path / "other.safetensors")
    for config in ({"unet.lora_alpha": "x"}, {"unet.alpha_pattern": {"(a+)+": 1}}, {"unet.alpha_pattern": [1]}):
        save_file(tensors, tmp_path / "other.safetensors", {"lora_adapter_metadata": json.dumps(config)})
        with pytest.raises(ConfigError, match="alpha"):
            read_adapter(tmp_path / "other.safetensors")
