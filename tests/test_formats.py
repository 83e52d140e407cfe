"""Adapter files: the exact keys of full-size models, round trips, strictness, metadata."""

from __future__ import annotations

import gzip
import hashlib
import json
from contextlib import suppress
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import pytest
import tiny
import torch
from layers import close, config_of, randomise
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from studio.adapters import METHODS, AdapterConfig, AdapterPlan, attach_adapters, inject, named_targets
from studio.errors import ConfigError
from studio.families import FAMILIES
from studio.families.loading import load_base
from studio.formats import FORMATS, kohya, read_adapter, write_adapter
from studio.formats.consumers import check_file
from studio.formats.describe import describe_adapter
from studio.formats.state import AdapterState

GOLDEN = Path(__file__).with_name("golden")
MIXED = AdapterPlan(
    tiny.TARGETS,
    config=AdapterConfig(rank=4, alpha=2.0),
    overrides={"cross-attention": {"rank": 5, "alpha": 0.75}, "text-encoder": {"rank": 2}},
)


@pytest.mark.parametrize("name", ["sd15_linear", "sd15_conv", "sdxl_linear", "sdxl_conv"])
def test_full_size_models_export_the_keys_and_shapes_that_sd_scripts_writes(name):
    family = FAMILIES["sdxl" if "sdxl" in name else "sd"]
    targets = (*family.default_targets, "text-encoder", *(["convolutions"] if "conv" in name else []))
    plan = AdapterPlan(targets, config=AdapterConfig(rank=4, alpha=2.0))
    adapters = inject(family.prefixes(family.reference()), plan, family.roles)
    state = AdapterState(family.name, {layer: adapter.export() for layer, adapter in adapters.items()})
    shapes = {key: list(tensor.shape) for key, tensor in kohya.encode(state).items()}
    assert shapes == json.loads(gzip.decompress((GOLDEN / f"{name}.json.gz").read_bytes()))


@pytest.fixture(scope="module", params=["sd15", "sdxl"])
def state(request):
    family, _, adapters = tiny.random_adapter(request.param, MIXED)
    return tiny.state_of(family, adapters)


# a linear layer, convolutions, norms and an embedding, inside the blocks and outside
PLACES = (
    *("attn2.to_k", "ff.net.2", "resnets.0.conv1", "conv_shortcut", "conv_in", "conv_norm_out", "attentions.0.norm"),
    *("transformer_blocks.0.norm2", "resnets.0.norm1", "fc1", "layer_norm1", "final_layer_norm", "token_embedding"),
)


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_every_layer_norm_and_embedding_has_a_name_of_its_own(kind):
    family, models = load_base(str(tiny.folder(kind)))
    modules = {name: kohya.module_name(name, family.name) for name in named_targets(family.prefixes(models))}
    assert len(set(modules.values())) == len(modules)
    assert {name: kohya.layers_of(module, family.name) for name, module in modules.items()} == {
        name: (name,) for name in modules
    }


@pytest.fixture(scope="module")
def base():
    return load_base(str(tiny.folder("sd15")))


@pytest.mark.parametrize("method", METHODS)
def test_every_method_comes_back_from_a_kohya_file_on_every_layer_that_it_adapts(method, base, tmp_path):
    family, models = base
    config, names = config_of(method), []
    for name, target in named_targets(family.prefixes(models)).items():
        with suppress(ConfigError):
            METHODS[method].check(target.spec, config)
            names += [name] if name.endswith(PLACES) else []
    adapters = inject(family.prefixes(models), AdapterPlan(tuple(names), config=config), {})
    randomise(adapters)
    state = AdapterState(family.name, adapters.state())
    again = read_adapter(write_adapter(state, tmp_path / "file"))
    assert_same(state, again)
    ours = tiny.predict(family, models)
    adapters.detach()
    assert not close(tiny.predict(family, models), ours)
    loaded = attach_adapters(family.prefixes(models), again.tensors)
    assert close(tiny.predict(family, models), ours)
    loaded.detach()


def test_a_file_may_hold_several_methods(tmp_path):
    overrides = {"convolutions": {"method": "tucker"}, "re:.*norm.*": {"method": "norm"}}
    plan = AdapterPlan((*tiny.TARGETS, "re:unet.*norm.*"), config=AdapterConfig(rank=4, alpha=2.0), overrides=overrides)
    family, models, adapters = tiny.random_adapter("sd15", plan)
    path = write_adapter(tiny.state_of(family, adapters), tmp_path / "file")
    state, total = read_adapter(path), len(adapters.names)
    assert set(state.methods) == {"lora", "tucker", "norm"} and sum(state.methods.values()) == total
    summary = describe_adapter(path)
    assert summary["method"].startswith("lora, ") and set(summary["ranks"]) == {"4"}
    assert summary["metadata"]["ss_network_module"] == "lycoris.kohya"
    args = json.loads(summary["metadata"]["ss_network_args"])
    assert args["algo"] == "lora" and args["use_tucker"] == args["train_norm"] == "True" and args["conv_dim"] == "4"
    unused = {consumer: report.unused for consumer, report in check_file(path, family, models).items()}
    assert unused["comfyui"] == ()
    assert all("conv_norm_out" in key for key in unused["a1111"])
    for tool in ("sd-scripts", "diffusers"):
        assert len(unused[tool]) == len(load_file(path)), "it refuses a file with factors that it does not know"
    for format in ("peft", "diffusers"):
        with pytest.raises(ConfigError, match=f"'{format}' cannot hold the method '(norm|tucker)': use"):
            write_adapter(state, tmp_path / "other", format)


def test_formats_of_peft_hold_dora_but_not_beside_lora(tmp_path):
    def state(config: AdapterConfig, **overrides: dict) -> AdapterState:
        plan = AdapterPlan(tiny.TARGETS, config=config, overrides=overrides)
        family, _, adapters = tiny.random_adapter("sd15", plan)
        return tiny.state_of(family, adapters)

    dora = state(AdapterConfig("dora", 4, 2.0))
    beside = state(AdapterConfig("dora", 4, 2.0), attention={"method": "lora"})
    on_inputs = state(AdapterConfig("dora", 4, 2.0, options={"norm_axis": "in"}))
    for format in ("peft", "diffusers"):
        assert_same(dora, read_adapter(write_adapter(dora, tmp_path / format, format)))
        with pytest.raises(ConfigError, match=r"'lora' and 'dora' in one component \(unet\)"):
            write_adapter(beside, tmp_path / "other", format)
        with pytest.raises(ConfigError, match="magnitude for each input channel"):
            write_adapter(on_inputs, tmp_path / "other", format)


def assert_same(one: AdapterState, other: AdapterState) -> None:
    assert one.family == other.family
    assert one.tensors.keys() == other.tensors.keys()
    for name, entry in one.tensors.items():
        assert entry.keys() == other.tensors[name].keys(), name
        for suffix, tensor in entry.items():
            assert torch.equal(tensor, other.tensors[name][suffix]), (name, suffix)


@pytest.mark.parametrize("format", ["kohya", "diffusers", "peft", "comfyui"])
def test_round_trip(state, format, tmp_path):
    path = write_adapter(state, tmp_path / "file.safetensors", format)
    again = read_adapter(path)
    assert_same(state, again)
    assert describe_adapter(path)["format"] == format
    assert again.metadata["ss_seed"] == "1" and again.metadata["ss_output_name"] == "tiny"


def test_every_format_after_the_other_keeps_the_bytes(state, tmp_path):
    first = write_adapter(state, tmp_path / "first", "kohya")
    here = read_adapter(first)
    for format in ("peft", "diffusers", "kohya"):
        here = read_adapter(write_adapter(here, tmp_path / format, format))
    last = load_file(tmp_path / "kohya.safetensors")
    assert {key: tensor.numpy().tobytes() for key, tensor in load_file(first).items()} == {
        key: tensor.numpy().tobytes() for key, tensor in last.items()
    }


@pytest.mark.parametrize("plan", [MIXED, replace(MIXED, config=AdapterConfig("dora", 4, 2.0))], ids=["lora", "dora"])
def test_peft_loads_its_folders(plan, tmp_path):
    from peft import PeftModel

    family, models, adapters = tiny.random_adapter("sdxl", plan)
    ours = tiny.predict(family, models)
    folder = write_adapter(tiny.state_of(family, adapters), tmp_path / "adapter", "peft")
    adapters.detach()
    for component in family.components:
        models.parts[component] = PeftModel.from_pretrained(models.parts[component], folder, subfolder=component)
    assert (tiny.predict(family, models) - ours).abs().max() <= 1e-5


def test_a_lone_peft_folder_tells_its_component_by_its_keys(state, tmp_path):
    folder = write_adapter(state, tmp_path / "adapter", "peft")
    unet = {name: entry for name, entry in state.tensors.items() if name.startswith("unet.")}
    assert read_adapter(folder / "unet").tensors.keys() == unet.keys()


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_sdxl_files_with_diffusers_names_and_flattened_text_encoders_are_read(kind, tmp_path):
    family, _, adapters = tiny.random_adapter(kind)
    state = tiny.state_of(family, adapters)
    tensors = {}
    for name, entry in state.tensors.items():
        component, _, path = name.partition(".")
        module = kohya.PREFIXES[family.name][component] + path.removeprefix("text_model.").replace(".", "_")
        tensors |= {f"{module}.{suffix}": tensor for suffix, tensor in entry.items()}
    save_file(tensors, tmp_path / "other.safetensors")
    assert_same(state, read_adapter(tmp_path / "other.safetensors"))


def test_a_missing_alpha_is_the_rank(state, tmp_path):
    tensors = {key: tensor for key, tensor in kohya.encode(state).items() if not key.endswith(".alpha")}
    save_file(tensors, tmp_path / "file.safetensors")
    for entry in read_adapter(tmp_path / "file.safetensors").tensors.values():
        assert entry["alpha"] == entry["lora_down.weight"].shape[0]


def write_with(state: AdapterState, path: Path, extra: dict[str, torch.Tensor], without: str = "") -> Path:
    tensors = {key: tensor for key, tensor in kohya.encode(state).items() if key != without}
    save_file(tensors | extra, path)
    return path


def test_unknown_keys_are_refused_by_name_and_number(state, tmp_path):
    extra = {f"lora_unet_nowhere_{index}.lora_up.weight": torch.ones(1) for index in range(7)}
    with pytest.raises(ConfigError, match=r"^7 of the \d+ keys in .*nowhere_0.*nowhere_4") as caught:
        read_adapter(write_with(state, tmp_path / "file.safetensors", extra))
    assert "nowhere_5" not in str(caught.value)


def test_tensors_of_two_methods_on_one_layer_are_refused(state, tmp_path):
    module = next(iter(kohya.encode(state))).partition(".")[0]
    with pytest.raises(ConfigError, match=r"1 of the \d+ layers .* no method: .*: lora with hada_w1_a"):
        read_adapter(write_with(state, tmp_path / "file.safetensors", {f"{module}.hada_w1_a": torch.ones(1)}))


def test_a_layer_with_less_than_its_method_needs_is_refused(tmp_path):
    halves = {f"lora_unet_conv_in.hada_w1_{part}": torch.ones(1) for part in "ab"}
    save_file(halves, tmp_path / "file.safetensors")
    with pytest.raises(ConfigError, match=r"unet\.conv_in: loha without hada_w2_a, hada_w2_b"):
        read_adapter(tmp_path / "file.safetensors")


def test_half_a_layer_is_refused(state, tmp_path):
    key = next(key for key in kohya.encode(state) if key.endswith("lora_up.weight"))
    with pytest.raises(ConfigError, match=r"1 of the .* lack one of their two factors"):
        read_adapter(write_with(state, tmp_path / "file.safetensors", {}, without=key))


def test_layers_without_a_name_are_refused_on_writing(state, tmp_path):
    name, entry = next((name, entry) for name, entry in state.tensors.items() if name.startswith("unet."))
    strange = replace(state, tensors={name: entry, "unet.elsewhere": entry})
    for format in FORMATS:
        with pytest.raises(ConfigError, match=r"unet\.elsewhere"):
            write_adapter(strange, tmp_path / "file", format)
    assert list(tmp_path.iterdir()) == []


def test_wrong_sources_get_one_clear_error(state, tmp_path):
    (tmp_path / "text.safetensors").write_text("no tensors")
    (tmp_path / "two").mkdir()
    for name in ("a", "b"):
        write_adapter(state, tmp_path / "two" / name)
    save_file({"weight": torch.ones(1), "bias": torch.ones(1)}, tmp_path / "model.safetensors")
    cases = {
        tmp_path / "missing.safetensors": r"there is no adapter at .*missing\.safetensors",
        tmp_path / "text.safetensors": "cannot be read",
        tmp_path / "two": r"it holds a\.safetensors, b\.safetensors",
        tmp_path / "model.safetensors": "no adapter in a format known here",
    }
    for source, message in cases.items():
        with pytest.raises(ConfigError, match=message):
            read_adapter(source)
    with pytest.raises(ConfigError, match="Did you mean kohya"):
        write_adapter(state, tmp_path / "file", "kohia")


def sd_scripts_hashes(path: Path) -> tuple[str, str]:
    """The two hashes computed on a file whose metadata is only the `ss_*` part, as sd-scripts documents them."""
    with safe_open(path, framework="pt") as file:
        kept = {key: value for key, value in file.metadata().items() if key.startswith("ss_")}
    bare = path.with_name("bare.safetensors")
    save_file(load_file(path), bare, kept)
    content = BytesIO(bare.read_bytes())
    length = int.from_bytes(content.read(8), "little")
    content.seek(8 + length)
    whole = hashlib.sha256(content.read()).hexdigest()
    content.seek(0x100000)
    return whole, hashlib.sha256(content.read(0x10000)).hexdigest()[:8]


def test_metadata_tells_other_tools_what_they_ask_for(state, tmp_path):
    path = write_adapter(state, tmp_path / "file")
    metadata = describe_adapter(path)["metadata"]
    is_xl = state.family == "sdxl"
    assert metadata["ss_base_model_version"] == ("sdxl_base_v1-0" if is_xl else "sd_v1")
    assert metadata["ss_v2"] == "False"
    assert metadata["ss_network_module"] == "networks.lora"
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == ("Dynamic", "Dynamic")
    assert json.loads(metadata["ss_network_args"]) == {"conv_dim": "4", "conv_alpha": "2"}
    assert metadata["modelspec.architecture"] == (
        "stable-diffusion-xl-v1-base/lora" if is_xl else "stable-diffusion-v1/lora"
    )
    must = ("sai_model_spec", "architecture", "implementation", "title", "resolution", "date", "hash_sha256")
    assert all(metadata[f"modelspec.{field}"] for field in must)
    whole, legacy = sd_scripts_hashes(path)
    assert (metadata["sshs_model_hash"], metadata["sshs_legacy_hash"]) == (whole, legacy)


def test_a_v_prediction_base_is_named_as_one(state, tmp_path):
    given = replace(state, family="sd", metadata={"ss_base_model_version": "sd_v2_v", "modelspec.title": "Ink"})
    if state.family == "sdxl":
        given = replace(given, family="sdxl", metadata={"modelspec.prediction_type": "v", "modelspec.title": "Ink"})
    metadata = describe_adapter(write_adapter(given, tmp_path / "file"))["metadata"]
    assert metadata["modelspec.prediction_type"] == "v" and metadata["modelspec.title"] == "Ink"
    if state.family == "sd":
        assert metadata["ss_v2"] == "True"
        assert metadata["modelspec.architecture"] == "stable-diffusion-v2-768-v/lora"


def test_a_description_counts_layers_ranks_and_alphas(state, tmp_path):
    summary = describe_adapter(write_adapter(state, tmp_path / "file"))
    assert (summary["method"], summary["family"], summary["format"]) == ("lora", state.family, "kohya")
    assert sum(summary["layers"].values()) == len(state.tensors)
    assert set(summary["ranks"]) == {"4", "5", "2"} and set(summary["alphas"]) == {"2.0", "0.75"}
    json.dumps(summary)
