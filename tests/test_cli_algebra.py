"""`studio blend`, `resize`, `extract` and `merge`: a saved blend reproduces the preview."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import tiny
import torch
from layers import config_of, randomise
from PIL import Image
from torch import Tensor
from typer.testing import CliRunner

from studio.adapters import AdapterPlan, inject
from studio.algebra import BLENDS
from studio.algebra.bases import open_base
from studio.algebra.change import Layer, change_of
from studio.algebra.views import base_views
from studio.cli import app
from studio.commands.algebra import METHOD_HELP
from studio.config import Layout
from studio.diffusion.lora import loras, parse_lora
from studio.errors import ConfigError
from studio.families.loading import load_base
from studio.formats import FORMATS, read_adapter, write_adapter
from studio.formats.metadata import BLEND
from studio.formats.state import AdapterState

PARTS = {
    "ink": ("lora", ("attention", "text-encoder")),
    "wash": ("loha", ("cross-attention", "feed-forward", "convolutions")),
    "grain": ("dora", ("self-attention", "projections", "text-encoder")),
}
MIX = ["ink.safetensors:0.8", "wash.safetensors:-0.3", "grain.safetensors:0.6"]


@pytest.fixture(scope="module", params=["sd15", "sdxl"])
def files(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base, "base", and a LoRA, a LoHa and a DoRA on overlapping layers, every value random."""
    return folder_of(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder_of("sd15", tmp_path_factory.mktemp("small"))


def folder_of(kind: str, place: Path) -> Path:
    shutil.copytree(tiny.folder(kind), place / "base")
    family, models = load_base(str(place / "base"))
    for seed, (name, (method, targets)) in enumerate(PARTS.items()):
        adapters = inject(family.prefixes(models), AdapterPlan(targets, config=config_of(method)), family.roles)
        magnitudes = {id(one): one.detach().clone() for one in adapters.parameters()}
        randomise(adapters, seed)
        for key, parameter in adapters.named_parameters():
            if key.endswith("dora_scale"):  # near the norms, as a trained one is
                parameter.data = magnitudes[id(parameter)] * (1 + 0.2 * parameter.data)
        write_adapter(AdapterState(family.name, adapters.state(), {"ss_output_name": name}), place / name)
        adapters.detach()
    return place


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch):
    """Runs a command in a folder: its JSON, or its text."""

    def call(folder: Path, *arguments: Any, as_json: bool = True) -> Any:
        monkeypatch.chdir(folder)
        texts = [str(one) for one in arguments]
        result = CliRunner().invoke(app, [*texts, "--json"] if as_json else texts, catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout) if as_json else result.stdout

    return call


def predicted(base: str, adapters: Sequence[str]) -> Tensor:
    family, models = load_base(base)
    with loras(family, models, [parse_lora(one) for one in adapters]):
        return tiny.predict(family, models)


def test_a_saved_blend_reproduces_the_preview(files: Path, run, tmp_path: Path) -> None:
    made = run(files, "blend", *MIX, "--base", "base", "-o", tmp_path / "mix")
    preview, base = predicted("base", MIX), predicted("base", [])
    saved = predicted("base", [str(tmp_path / "mix.safetensors")])
    assert (preview - base).abs().max() > 0.3
    assert (saved - preview).abs().max() <= 1e-5 * preview.abs().max()
    assert made["residual"] == 0 and made["energy_kept"] == 1
    assert [
        one["name"] for one in json.loads(read_adapter(tmp_path / "mix.safetensors").metadata[BLEND])["inputs"]
    ] == [
        "ink",
        "wash",
        "grain",
    ]


def deltas(base: Path, state: AdapterState) -> dict[str, Tensor]:
    views = base_views(open_base(base), state.tensors)
    return {
        name: change_of(entry, Layer.of(name, views[name], [entry])).dense().double()
        for name, entry in state.tensors.items()
    }


def test_a_blend_of_a_smaller_rank_is_off_by_what_it_states(files: Path, run, tmp_path: Path) -> None:
    run(files, "blend", *MIX, "--base", "base", "-o", tmp_path / "exact")
    made = run(files, "blend", *MIX, "--base", "base", "--rank", 4, "-o", tmp_path / "short")
    exact, short = (deltas(files / "base", read_adapter(tmp_path / f"{one}.safetensors")) for one in ("exact", "short"))
    assert exact.keys() == short.keys() and set(made["ranks"].values()) <= {1, 2, 3, 4}
    for name, sought in exact.items():
        off = float((sought - short[name].reshape(sought.shape)).norm() / sought.norm())
        assert made["residuals"][name] == pytest.approx(off, abs=1e-5), name
    shortened = [name for name, share in made["residuals"].items() if share]
    whole = sum(float(exact[name].square().sum()) for name in shortened)
    off = sum(float((exact[name] - short[name].reshape(exact[name].shape)).square().sum()) for name in shortened)
    assert 0.05 < made["residual"] == pytest.approx((off / whole) ** 0.5, abs=1e-4)


def test_the_blend_draws_the_picture_of_its_parts(files: Path, run, tmp_path: Path) -> None:
    run(files, "blend", *MIX, "--base", "base", "-o", tmp_path / "mix.safetensors")
    drawing = ("generate", "a cat", "--model", "base", "--steps", 3, "--seed", 5, "--guidance", 3)
    parts = [text for one in MIX for text in ("--lora", one)]
    pictures = []
    for place, given in enumerate((parts, ["--lora", tmp_path / "mix.safetensors"], [])):
        drawn = run(files, *drawing, *given, "--output-dir", tmp_path / str(place))
        pictures.append(np.asarray(Image.open(drawn["pictures"][0]["file"])).astype(int))
    assert np.abs(pictures[0] - pictures[1]).max() <= 1
    assert np.abs(pictures[0] - pictures[2]).max() > 5


def test_adding_subtracting_and_interpolating(small: Path, run, tmp_path: Path) -> None:
    run(small, "blend", "ink.safetensors", "ink.safetensors:-1", "-o", tmp_path / "nothing")
    run(small, "blend", "ink.safetensors:0.3", "ink.safetensors:0.7", "--rank", 4, "-o", tmp_path / "ink")
    base, ink = predicted("base", []), predicted("base", ["ink.safetensors"])
    assert torch.allclose(predicted("base", [str(tmp_path / "nothing.safetensors")]), base, atol=1e-5)
    assert torch.allclose(predicted("base", [str(tmp_path / "ink.safetensors")]), ink, atol=1e-5)


def test_strengths_of_blocks_are_for_one_adapter_or_for_all(small: Path, run, tmp_path: Path) -> None:
    strengths = ("--strength", "text-encoder=0.5", "--strength", "ink:unet.up_blocks.*=0")
    run(small, "blend", *MIX[:2], "--base", "base", *strengths, "-o", tmp_path / "mix")
    family, models = load_base("base")
    with loras(family, models, [parse_lora(one) for one in MIX[:2]]) as applied:
        applied[0].adapters.set_strength(0.8, {"text_encoder*": 0.5, "unet.up_blocks.*": 0.0})
        wanted = tiny.predict(family, models)
    assert torch.allclose(predicted("base", [str(tmp_path / "mix.safetensors")]), wanted, atol=2e-5)


@pytest.mark.parametrize("method", BLENDS)
def test_every_way_to_blend_is_there(method: str, small: Path, run, tmp_path: Path) -> None:
    assert set(re.findall(r"[a-z-]+", METHOD_HELP)) - {"or"} == set(BLENDS)
    settings = ["--set", "density=0.4"] if "density" in BLENDS[method].settings else []
    made = run(
        small,
        "blend",
        "ink.safetensors:0.8",
        "ink.safetensors:0.4",
        "--method",
        method,
        *settings,
        "-o",
        tmp_path / "a",
    )
    metadata = json.loads(read_adapter(tmp_path / "a.safetensors").metadata[BLEND])
    assert metadata["method"] == method and made["layers"] > 0
    assert not settings or metadata["settings"]["density"] == 0.4


def test_analysis_in_text_json_and_a_picture(small: Path, run, tmp_path: Path) -> None:
    asked = ("blend", *MIX, "--base", "base", "--analyze")
    found = run(small, *asked, "--picture", tmp_path / "fight.png")["analysis"]
    assert [(pair["first"], pair["second"]) for pair in found["pairs"]] == [
        ("ink", "wash"),
        ("ink", "grain"),
        ("wash", "grain"),
    ]
    assert all(0 <= one["score"] <= 1 for pair in found["pairs"] for one in [pair["whole"], *pair["blocks"]])
    assert Image.open(tmp_path / "fight.png").format == "PNG" and not list(small.glob("*.png"))
    text = run(small, *asked, as_json=False)
    assert "ink with wash" in text and "try         ink:" in text and text.count("\n") == 8


def test_a_learned_blend_is_an_ordinary_file(small: Path, run, tmp_path: Path) -> None:
    learning = ("--learn", "--base", "base", "--prompts", "a cat", "--prompts", "a dog|two dogs", "--learn-steps", 3)
    made = run(small, "blend", "ink.safetensors:0.5", "ink.safetensors:0.4", *learning, "-o", tmp_path / "learned")
    assert len(made["learned"]["after"]) == 2 and made["residual"] == 0
    state = read_adapter(tmp_path / "learned.safetensors")
    assert set(state.methods) == {"lora"}
    assert json.loads(state.metadata[BLEND])["settings"]["prompts"] == [["a cat"], ["a dog", "two dogs"]]


def test_resize_merge_and_extract(small: Path, run, tmp_path: Path) -> None:
    shorter = run(small, "resize", "ink.safetensors", "--rank", 2, "-o", tmp_path / "two")
    assert set(shorter["ranks"].values()) == {2} and 0 < shorter["residual"] < 1
    merged = run(small, "merge", "base", "--lora", "ink.safetensors:0.5", "--lora", MIX[2], "-o", tmp_path / "merged")
    wanted = predicted("base", ["ink.safetensors:0.5", MIX[2]])
    assert merged["layers"] == len(merged["lost"]) > 0
    assert torch.allclose(predicted(str(tmp_path / "merged"), []), wanted, atol=2e-5)
    made = run(small, "extract", "base", tmp_path / "merged", "-o", tmp_path / "back")
    assert made["layers"] == merged["layers"]
    assert torch.allclose(predicted("base", [str(tmp_path / "back.safetensors")]), wanted, atol=2e-5)
    single = run(small, "merge", "base", "--lora", "ink.safetensors", "--single-file", "-o", tmp_path / "one")
    assert single["file"] == str(tmp_path / "one.safetensors") and Path(single["file"]).is_file()
    for asked in (
        ("resize", "ink.safetensors", "--energy", 0.9, "-o", tmp_path / "a"),
        ("merge", "base", "--lora", "ink.safetensors", "-o", tmp_path / "b"),
        ("extract", "base", tmp_path / "merged", "--rank", 2, "-o", tmp_path / "c"),
    ):
        assert str(tmp_path) in run(small, *asked, as_json=False)


def test_layouts_are_those_that_hold_layers(small: Path, run, tmp_path: Path) -> None:
    assert set(get_args(Layout)) == set(FORMATS) - {"embedding"}
    for layout in get_args(Layout):
        made = run(small, "blend", "ink.safetensors", "-o", tmp_path / layout, "--format", layout)
        assert read_adapter(made["file"]).tensors.keys() == read_adapter("ink.safetensors").tensors.keys()


def test_the_commands_of_the_readme_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    family, models = load_base("builtin")
    for seed, name in enumerate(("ink", "wash")):
        plan = AdapterPlan(("cross-attention",), config=config_of("lora"))
        adapters = inject(family.prefixes(models), plan, family.roles)
        randomise(adapters, seed)
        write_adapter(AdapterState(family.name, adapters.state()), name)
        adapters.detach()
    section = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8").partition("## Blending")[2]
    commands = [shlex.split(line, comments=True) for line in section.split("```")[1].strip().splitlines()]
    for _, *arguments in commands:
        fewer = ["--learn-steps", "1"] if "--learn" in arguments else []
        assert CliRunner().invoke(app, [*arguments, *fewer], catch_exceptions=False).exit_code == 0
    assert len(commands) >= 6 and Path("inked", "model_index.json").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["blend", "ink.safetensors"], "give a file to write with -o"),
        (["blend", "ink.safetensors", "-o", "ink"], r"'ink\.safetensors' exists already"),
        (["blend", "ink.safetensors", "-o", "x", "--format", "peft", "--analyze"], "give two or more"),
        (["blend", "ink.safetensors", "-o", "base", "--format", "peft"], "'base' exists already"),
        (["resize", "ink.safetensors", "--rank", "2", "-o", "ink.safetensors"], "exists already"),
        (["extract", "base", "base", "-o", "ink"], "exists already"),
        (["merge", "base", "--lora", "ink.safetensors", "-o", "base"], "exists already"),
        (["blend", *MIX, "-o", "x"], "what loha in wash changes is known only with the base: name it with --base"),
        (["blend", "ink.safetensors", "-o", "x", "--method", "tie"], "unknown blend 'tie'.*ties"),
        (["blend", "ink.safetensors", "-o", "x", "--method", "ties", "--set", "densty=1"], "Did you mean density"),
        (["blend", "ink.safetensors", "-o", "x", "--set", "density"], "write KEY=VALUE"),
        (["blend", "ink.safetensors", "-o", "x", "--strength", "text-encoder"], "write PATTERN=NUMBER"),
        (["blend", "ink.safetensors", "-o", "x", "--strength", "unet.nope.*=1"], "matches none"),
        (["blend", "ink.safetensors", "-o", "x", "--prompts", "a cat"], "--prompts needs --learn"),
        (["blend", "ink.safetensors", "-o", "x", "--picture", "a.png"], "--picture needs --analyze"),
        (["resize", "ink.safetensors", "-o", "x"], "give a rank"),
        (["extract", "base", "base", "-o", "x"], "changes nothing"),
    ],
)
def test_bad_usage_is_one_clear_error_and_writes_nothing(
    arguments: list[str], message: str, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(small)
    before = sorted(path.name for path in small.iterdir())
    with pytest.raises(ConfigError, match=message):
        CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert sorted(path.name for path in small.iterdir()) == before
