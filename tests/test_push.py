"""`studio push` against a hub on this machine: what is sent, what the card says, and what stops it."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fake_hub
import pytest
import tiny
import torch
from PIL import Image, PngImagePlugin

from studio import cli
from studio.adapters import AdapterConfig, AdapterPlan
from studio.formats import write_adapter
from studio.formats.card import Publication, Sample, model_card
from studio.formats.describe import describe_adapter
from studio.formats.metadata import merged
from studio.formats.state import AdapterState

METADATA = {
    "modelspec.title": "Ink",
    "modelspec.trigger_phrase": "inkstyle, drawing",
    "ss_learning_rate": "0.0001",
    "ss_steps": "1500",
    "ss_min_snr_gamma": "None",
}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[fake_hub.FakeHub]:
    with fake_hub.running(fake_hub.FakeHub()) as one:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", one.url)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setenv("HF_TOKEN", fake_hub.TOKEN)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.chdir(tmp_path)
        yield one


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A LoRA of a published base's shapes, which every tool reads."""
    return write_adapter(AdapterState("sd", tensors(), METADATA), tmp_path / "ink")


def tensors(layer: str = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q") -> dict[str, Any]:
    down, up = torch.ones(2, 320), torch.ones(320, 2)
    return {layer: {"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(1.0)}}


def studio(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["studio", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return int(end.value.code or 0)


def picture(path: Path, prompt: str) -> Path:
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", f"{prompt} <lora:ink:1>\nSteps: 20, Sampler: Euler, CFG scale: 7, Seed: 1")
    Image.new("RGB", (64, 64), "navy").save(path, pnginfo=info)
    return path


def front_matter(card: str) -> dict[str, Any]:
    from huggingface_hub import ModelCard

    return ModelCard(card).data.to_dict()


def test_what_is_sent_is_the_file_the_card_and_the_samples(
    hub: fake_hub.FakeHub,
    file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    sample = picture(tmp_path / "sample.png", "a | lighthouse")
    arguments = ("--private", "--license", "cc-by-4.0", "--sample", sample, "--message", "First")
    assert studio(monkeypatch, "push", file, "anna/ink", *arguments, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["url"] == f"{hub.url}/anna/ink" and hub.private == {"anna/ink"} and hub.messages == ["First"]
    sent = hub.repos["anna/ink"]
    assert sorted(sent) == sorted(told["files"]) == ["README.md", "images/00.png", "ink.safetensors"]
    assert sent["ink.safetensors"] == file.read_bytes() and sent["images/00.png"] == sample.read_bytes()
    data = front_matter(sent["README.md"].decode())
    assert data["base_model"] == "stable-diffusion-v1-5/stable-diffusion-v1-5"
    assert (data["license"], data["library_name"]) == ("cc-by-4.0", "diffusers")
    assert data["instance_prompt"] == "inkstyle, drawing"
    assert data["widget"] == [{"text": "a | lighthouse", "output": {"url": "images/00.png"}}]
    assert {"text-to-image", "lora", "stable-diffusion"} <= set(data["tags"])


def test_a_dry_run_sends_nothing_and_writes_what_it_would_send(
    hub: fake_hub.FakeHub,
    file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    assert studio(monkeypatch, "push", file, "anna/ink", "--dry-run") == 0
    said = capsys.readouterr().out
    assert "--license" in caplog.text and not hub.repos
    folder = tmp_path / "ink-hub"
    card = (folder / "README.md").read_text()
    assert card in said and (folder / "ink.safetensors").read_bytes() == file.read_bytes()
    assert "license" not in front_matter(card)
    assert studio(monkeypatch, "push", file, "anna/ink", "--dry-run") == 2, "the folder is there"


def test_a_card_that_is_there_is_not_replaced_unasked(
    hub: fake_hub.FakeHub, file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.repos["anna/ink"] = {"README.md": b"written by hand"}
    assert studio(monkeypatch, "push", file, "anna/ink") == 2
    assert "--card replace" in capsys.readouterr().err and len(hub.repos["anna/ink"]) == 1
    assert studio(monkeypatch, "push", file, "anna/ink", "--card", "keep") == 0
    assert hub.repos["anna/ink"] == {"README.md": b"written by hand", "ink.safetensors": file.read_bytes()}
    assert studio(monkeypatch, "push", file, "anna/ink", "--card", "replace") == 0
    assert b"# Ink" in hub.repos["anna/ink"]["README.md"]


def test_nothing_private_goes_to_a_public_repository(
    hub: fake_hub.FakeHub, file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.repos["anna/ink"] = {}
    assert studio(monkeypatch, "push", file, "anna/ink", "--private") == 2
    assert "public" in capsys.readouterr().err and not hub.repos["anna/ink"]


@pytest.mark.parametrize(
    ("repo", "change", "code", "message"),
    [
        ("anna/ink", {"token": ""}, 2, "hf auth login"),
        ("anna/ink", {"token": "hf_of_someone_else"}, 2, "not valid"),
        ("bert/ink", {}, 2, "write permission"),
        ("anna/ink", {"refused": '"license" must be one of'}, 1, '"license" must be one of'),
        ("anna/ink", {"lost": True}, 1, "upload to 'anna/ink' failed"),
        ("ink", {}, 2, "write USER/ink"),
        ("anna/ink/deep", {}, 2, "no repository"),
        ("anna/ink", {"url": "http://127.0.0.1:9"}, 1, "cannot be reached"),
        ("anna/ink", {"offline": True}, 1, "HF_HUB_OFFLINE"),
    ],
)
def test_what_stops_a_push_is_said_in_a_sentence(
    hub: fake_hub.FakeHub,
    file: Path,
    repo: str,
    change: dict[str, Any],
    code: int,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if "token" in change:
        monkeypatch.setenv("HF_TOKEN", change["token"])
    if "url" in change:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", change["url"])
    if "offline" in change:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        monkeypatch.setattr("huggingface_hub.constants.is_offline_mode", lambda: True)
    hub.refused, hub.lost = change.get("refused", ""), change.get("lost", False)
    assert studio(monkeypatch, "push", file, repo, "--license", "mit") == code
    said = " ".join(capsys.readouterr().err.split())
    assert message in said and "Traceback" not in said and "The details are in" not in said
    assert not any("ink.safetensors" in files for files in hub.repos.values())


def test_a_sample_must_be_a_picture(
    hub: fake_hub.FakeHub, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "notes.png").write_text("no picture")
    assert studio(monkeypatch, "push", file, "anna/ink", "--sample", tmp_path / "notes.png") == 2
    assert studio(monkeypatch, "push", file, "anna/ink", "--sample", tmp_path / "missing.png") == 2
    assert not hub.repos


# -- the card --------------------------------------------------------------------------------


def card_of(file: Path, tools: tuple[str, ...] = ("diffusers", "comfyui", "a1111", "forge"), **changes: Any) -> str:
    name = file.name if file.is_file() else ""
    return str(model_card(Publication("anna/ink", name, describe_adapter(file), tools, **changes)))


def test_the_card_tells_settings_triggers_and_where_to_put_the_file(file: Path) -> None:
    card = card_of(file)
    assert "- `inkstyle`\n- `drawing`" in card
    assert "| Steps | 1500 |" in card and "| Rank | 2 |" in card and "Min-SNR" not in card
    assert "`ComfyUI/models/loras`" in card and "`<lora:ink:1>`" in card and "LoraLoaderModelOnly" in card
    assert "ComfyUI" not in card_of(file, tools=("diffusers",)), "a tool that cannot use it is not named"


def test_the_card_of_a_blend_tells_its_tree(tmp_path: Path) -> None:
    inner = merged([{"sshs_model_hash": "a" * 64}, {}], ["ink", "cat"], [0.7, -0.3], "ties", {"density": 0.5})
    outer = merged([inner, METADATA], ["both", "more"], [1, 0.5], "concat")
    card = card_of(write_adapter(AdapterState("sd", tensors(), outer), tmp_path / "blend"))
    tree = card[card.index("- `concat`") :].splitlines()
    assert tree[:5] == [
        "- `concat` of:",
        "  - 1 × `both`",
        "    - `ties` (density 0.5) of:",
        "      - 0.7 × `ink`, `aaaaaaaaaaaa`",
        "      - -0.3 × `cat`",
    ]


@pytest.mark.parametrize("licence", ["apache-2.0", "My own licence: ask me"])
def test_a_licence_that_the_hub_does_not_know_is_a_name(file: Path, licence: str) -> None:
    data = front_matter(card_of(file, licence=licence))
    known = licence == "apache-2.0"
    assert data["license"] == (licence if known else "other")
    assert data.get("license_name") == (None if known else "my-own-licence-ask-me")


def test_the_base_is_the_one_trained_on(tmp_path: Path) -> None:
    def base(**metadata: str) -> str | None:
        file = write_adapter(AdapterState("sd", tensors(), metadata), tmp_path / "one")
        return front_matter(card_of(file)).get("base_model")

    assert base(ss_sd_model_name="anna/paper") == "anna/paper"
    assert base(ss_sd_model_name="model.safetensors") == "stable-diffusion-v1-5/stable-diffusion-v1-5"
    assert base(**{"studio.config": json.dumps({"model": {"source": "anna/ink"}})}) == "anna/ink"
    assert base(**{"studio.config": json.dumps({"model": {"source": "builtin"}})}) is None
    own = write_adapter(
        AdapterState("sd", tensors(), {"studio.config": '{"model": {"source": "builtin"}}'}), tmp_path / "b"
    )
    assert "ComfyUI" not in card_of(own) and "--model builtin" in card_of(own), "nobody else has that base"
    assert base(ss_sd_model_name="builtin") is None, "a blend says no more than that"
    assert base(**{"studio.config": "7", "studio.blend": "[1]"}) == "stable-diffusion-v1-5/stable-diffusion-v1-5"


def test_the_card_of_trained_tokens_says_what_to_write(tmp_path: Path) -> None:
    vectors = {"text_encoder": torch.ones(2, 768)}
    state = AdapterState("sd", {}, {}, embeddings={"inkstyle": vectors})
    card = card_of(write_adapter(state, tmp_path / "inkstyle", "embedding"), tools=())
    assert "textual-inversion" in front_matter(card)["tags"] and "lora" not in front_matter(card)["tags"]
    assert "`embedding:inkstyle`" in card and "- `inkstyle`" in card and "load_textual_inversion" in card


def snippet(card: str) -> str:
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    return code


@pytest.mark.parametrize(("kind", "format"), [("sd15", "kohya"), ("sdxl", "kohya"), ("sd15", "peft"), ("sdxl", "peft")])
def test_the_snippet_for_diffusers_runs_and_acts(kind: str, format: str, tmp_path: Path) -> None:
    """As written, but for the names of repositories and the device."""
    plan = AdapterPlan(("attention", "text-encoder"), config=AdapterConfig(rank=4))
    family, _, adapters = tiny.random_adapter(kind, plan)
    file = write_adapter(tiny.state_of(family, adapters), tmp_path / "ink", format)
    card = card_of(file, tools=("diffusers", "peft"), samples=[Sample("images/00.png", 'a "cat" \\ and\n a dog')])
    code = snippet(card).replace('"anna/ink"', repr(str(file.parent if file.is_file() else file)))
    base = front_matter(card)["base_model"]
    code = (
        code.replace(f'"{base}"', repr(str(tiny.folder(kind)))).replace('"cuda"', '"cpu"').replace("float16", "float32")
    )
    code = code.replace(").images", ", num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images")
    names: dict[str, Any] = {}
    exec(code, names)
    with_adapter = names["image"]
    bare = "\n".join(line for line in code.splitlines() if not re.search(r"load_lora_weights|PeftModel", line))
    exec(bare, names)
    assert with_adapter.tobytes() != names["image"].tobytes()
