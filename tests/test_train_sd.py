"""The trainer on tiny pipelines: exact resume, one process or two, what a run leaves behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from studio.config import TrainSDConfig
from studio.errors import ConfigError, StudioError
from studio.runs import Run
from trainers import sd
from trainers.checkpoint import STATE, load_checkpoint


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STUDIO_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(5):
        Image.new("RGB", (64 + 16 * (i % 2), 64), (40 * i, 90, 200 - 30 * i)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"a cat, number {i}")
    return folder


def config(pictures: Path, tmp_path: Path, kind: str = "sd15", **groups) -> TrainSDConfig:
    settings = {
        "model": {"source": str(tiny.folder(kind))},
        "data": {"folder": str(pictures), "resolution": 64, "bucket_step": 16, "flip": True},
        "adapter": {
            "rank": 4, "alpha": 2.0, "dropout": 0.1,
            "targets": ["attention", "convolutions"], "train_text_encoder": True,
        },
        "train": {"steps": 4, "batch_size": 2, "checkpoint_every": 2, "sample_every": 0},
        "optimizer": {"lr": 1e-3, "text_encoder_lr": 1e-4},
        "schedule": {"name": "cosine", "warmup_steps": 1},
        "loss": {"min_snr_gamma": 5, "caption_dropout": 0.2},
        "samples": {"prompts": ["a cat"], "steps": 1},
        "output": {"folder": str(tmp_path / "runs"), "name": "cats"},
    }  # fmt: skip
    merged = {name: {**settings.get(name, {}), **groups.get(name, {})} for name in settings}
    return TrainSDConfig.model_validate(merged)


def trained(settings: TrainSDConfig, run: Run | None = None) -> sd.TrainResult:
    run = run or Run.create(settings.output.folder, settings.output.name, settings)
    with run.session():
        return sd.train(settings, run)


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_a_run_leaves_a_checked_file_and_pictures(kind: str, pictures: Path, tmp_path: Path) -> None:
    result = trained(config(pictures, tmp_path, kind))
    assert result.file and result.sheet and result.loss_plot
    assert Image.open(result.sheet).width > 300
    assert [(check.used, check.unused) for check in result.checks] == [(check.total, ()) for check in result.checks]
    with safe_open(result.file, "pt") as file:
        metadata = file.metadata()
        values = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    idle = [key for key, tensor in values.items() if tensor.abs().max() == 0]
    # SDXL reads its first encoder before the last layer, which kohya's key list has all the same
    assert all("lora_te1_text_model_encoder_layers_2_" in key for key in idle), idle
    assert metadata["ss_output_name"] == "cats" and metadata["ss_steps"] == "4"
    told, given = json.loads(metadata["studio.config"]), config(pictures, tmp_path, kind).model_dump(mode="json")
    assert str(tmp_path) not in str(metadata), "a file that is passed on names no folders of this machine"
    paths = {"data": "folder", "model": "source", "output": "folder"}
    for group, settings in given.items():
        assert told[group] == {**settings, **({paths[group]: told[group][paths[group]]} if group in paths else {})}
    TrainSDConfig.model_validate(told)
    losses = Run.open(result.run_folder).metrics()
    assert [line["step"] for line in losses] == [1, 2, 3, 4]
    assert losses[0]["lr"] == 1e-3 and losses[0]["lr(0.0001)"] == 1e-4, "each rate under its own name"
    assert len(list((result.run_folder / "samples").glob("step-*/00.png"))) == 2


@pytest.mark.parametrize(
    "adapter",
    [
        {},
        {"rank_schedule": {2: 6, 3: 8}},
        {"method": "adalora", "options": {"patience": 1}},
        {"method": "deltalora", "options": {"start_step": 1}, "dropout": 0},
        {"method": "lora", "overrides": {"*conv1": {"method": "loha"}, "*attn1.to_q": {"method": "dora"}}},
    ],
)
def test_a_stopped_run_resumes_to_the_same_bits(adapter: dict, pictures: Path, tmp_path: Path) -> None:
    settings = config(pictures, tmp_path, adapter=adapter)
    straight = trained(settings)
    run = Run.create(settings.output.folder, settings.output.name, settings)
    run.on_status.append(lambda status: status.step == 3 and (run.control / "stop").touch())
    stopped = trained(settings, run)
    assert stopped.file is None and run.status.state == "stopped" and run.status.step == 3
    resumed = trained(settings, Run.open(run.folder))
    assert straight.file and resumed.file
    first, second = load_file(straight.file), load_file(resumed.file)
    assert first.keys() == second.keys()
    assert first["lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_k.lora_down.weight"].any()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert Run.open(straight.run_folder).metrics() == Run.open(run.folder).metrics()


@pytest.mark.parametrize("left", ["nothing", "half a preview"])
def test_a_run_killed_while_it_drew_its_last_samples_still_ends_whole(
    left: str, pictures: Path, tmp_path: Path
) -> None:
    settings = config(pictures, tmp_path)
    run = Run.create(settings.output.folder, settings.output.name, settings)
    whole = trained(settings, run)
    assert whole.sheet
    expected = whole.sheet.read_bytes()
    last = run.samples / "step-000004"
    last.rename(run.samples / ".part")
    if left == "half a preview":
        next((run.samples / ".part").iterdir()).unlink()
    whole.sheet.unlink()
    resumed = trained(settings, Run.open(run.folder))
    assert resumed.sheet and resumed.sheet.read_bytes() == expected
    assert [folder.name for folder in sorted(run.samples.iterdir())] == ["step-000000", "step-000004"]


def test_a_stop_while_pictures_are_encoded_trains_nothing(pictures: Path, tmp_path: Path) -> None:
    settings = config(pictures, tmp_path)
    run = Run.create(settings.output.folder, settings.output.name, settings)
    run.on_status.append(lambda status: "(1/" in status.message and (run.control / "stop").touch())
    assert trained(settings, run).file is None
    assert (run.status.state, run.status.step) == ("stopped", 0)
    assert not list(run.samples.iterdir())


def test_the_rate_of_text_encoders_goes_to_text_encoders_only(pictures: Path, tmp_path: Path) -> None:
    def rates(**adapter) -> dict[str, float | None]:
        task = sd.build_task(config(pictures, tmp_path, adapter=adapter), torch.device("cpu"))
        return {name: one.config.lr for name, one in task.adapters.items()}

    for adapter in (
        {"train_text_encoder": True},
        {"targets": ["attention", "text-encoder"], "train_text_encoder": False},
        {"train_text_encoder": True, "overrides": {"text-encoder": {"rank": 2}}},
    ):
        for name, rate in rates(**adapter).items():
            assert rate == (1e-4 if name.startswith("text_encoder") else None)
    with pytest.raises(ConfigError, match="no text encoder is adapted"):
        rates(train_text_encoder=False)


def test_an_override_of_rank_brings_its_alpha(pictures: Path, tmp_path: Path) -> None:
    overrides = {"attention": {"rank": 2}}
    settings = config(pictures, tmp_path, adapter={"alpha": None, "overrides": overrides})
    task = sd.build_task(settings, torch.device("cpu"))
    assert {(one.config.rank, one.config.scale) for _, one in task.adapters.items()} == {(2, 1.0), (4, 1.0)}


def test_methods_and_their_options_reach_their_layers(pictures: Path, tmp_path: Path) -> None:
    def methods(**adapter) -> dict[str, set[str]]:
        task = sd.build_task(config(pictures, tmp_path, adapter=adapter), torch.device("cpu"))
        found: dict[str, set[str]] = {}
        for name, one in task.adapters.items():
            found.setdefault(one.method, set()).add(f"{name.rpartition('.')[2]} {dict(one.config.options)}")
        return found

    overrides = {"convolutions": {"method": "loha"}, "*.to_q": {"options": {"init": "gaussian"}}}
    found = methods(options={"init": "pissa"}, overrides=overrides)
    assert {name.split()[0] for name in found["loha"]} >= {"conv1", "conv2"}
    assert all(name.endswith("{}") for name in found["loha"]), "pissa is LoRA's"
    assert "to_q {'init': 'gaussian'}" in found["lora"] and "to_k {'init': 'pissa'}" in found["lora"]
    for adapter, message in (
        ({"method": "lroa"}, "unknown method 'lroa'. Did you mean .*lora"),
        ({"options": {"inti": "pissa"}}, "no option 'inti'. Did you mean init"),
        ({"overrides": {"attention": {"method": "loha", "options": {"init": "pissa"}}}}, "'loha' has no option 'init'"),
    ):
        with pytest.raises(ConfigError, match=message):
            sd.build_task(config(pictures, tmp_path, adapter=adapter, model={"source": "./nowhere"}))
    with pytest.raises(ConfigError, match="cannot hold the method 'loha': use one of the formats"):
        sd.build_task(config(pictures, tmp_path, adapter={"method": "loha"}, output={"format": "diffusers"}))


def test_a_damaged_checkpoint_is_passed_over(pictures: Path, tmp_path: Path) -> None:
    settings = config(pictures, tmp_path)
    run = Run.create(settings.output.folder, settings.output.name, settings)
    straight = trained(settings, run)
    newest = run.checkpoints / "step-000004" / STATE
    newest.write_bytes(newest.read_bytes()[:1000])
    saved = load_checkpoint(run.checkpoints)
    assert saved is not None and saved["step"] == 2
    resumed = trained(settings, Run.open(run.folder))
    assert straight.file and resumed.file
    assert all(torch.equal(a, load_file(resumed.file)[key]) for key, a in load_file(straight.file).items())


def test_accumulated_batches_weigh_every_sample_alike(pictures: Path, tmp_path: Path) -> None:
    """An epoch of five pictures in batches of 2 ends with a short one; its sample must not count double."""
    from trainers.loop import Batches

    task = sd.build_task(config(pictures, tmp_path), torch.device("cpu"))
    for processes in (1, 2, 3):
        settings = config(pictures, tmp_path, train={"gradient_accumulation": 3}).train
        shares = [Batches(task, settings, process, processes).of_step(0) for process in range(processes)]
        total = sum(weight * len(items) for share in shares for items, weight in share) / processes
        assert total == pytest.approx(1.0)
        counted = {weight for share in shares for items, weight in share if weight}
        assert len(counted) == 1


def test_two_processes_equal_one(pictures: Path, tmp_path: Path) -> None:
    def run(processes: int, name: str) -> dict[str, torch.Tensor]:
        settings = config(pictures, tmp_path, train={"steps": 2, "batch_size": 4 // processes, "checkpoint_every": 0})
        file = tmp_path / f"{name}.json"
        output = {**settings.output.model_dump(), "folder": str(tmp_path / name)}
        file.write_text(json.dumps({**settings.model_dump(mode="json"), "output": output}))
        # what `accelerate launch` runs for several processes; on a CPU it would start only one
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        arguments = [*(launch if processes > 1 else []), "-m", "studio", "train-sd", "--config", str(file)]
        done = subprocess.run([sys.executable, *arguments], env=os.environ, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        return load_file(next((tmp_path / name).glob("*/cats.safetensors")))

    one, two = run(1, "one"), run(2, "two")
    for key, tensor in one.items():
        assert (tensor - two[key]).abs().max() <= 1e-6 + 1e-4 * tensor.abs().max(), key


def test_a_rate_that_diverges_is_one_clear_error(pictures: Path, tmp_path: Path) -> None:
    settings = config(pictures, tmp_path, optimizer={"lr": 10.0}, train={"max_grad_norm": 0, "steps": 30})
    run = Run.create(settings.output.folder, settings.output.name, settings)
    task = sd.build_task(settings, torch.device("cpu"))
    with torch.no_grad():
        for parameter in task.adapters.parameters():
            parameter.fill_(float("nan"))
    from accelerate import Accelerator

    from trainers.loop import fit

    with pytest.raises(StudioError, match="lower the learning rate"):
        fit(task, run, Accelerator(cpu=True), settings.train, settings.optimizer, settings.schedule)


def test_the_plan_says_what_a_run_would_do(pictures: Path, tmp_path: Path) -> None:
    plan = sd.plan(config(pictures, tmp_path))
    assert (plan.pictures, plan.left_out, plan.steps) == (5, {}, 4)
    assert plan.epochs == pytest.approx(4 / 3), "five pictures are three batches of at most two"
    assert {row.targets for row in plan.adapter.rows} == {("attention",), ("convolutions",), ("text-encoder",)}
    assert {row.overrides for row in plan.adapter.rows} == {(), ("text_encoder*",)}, "their own rate"
    assert plan.seconds > 0 and plan.sample_seconds > 0 and plan.fits
    assert 0 < plan.memory_bytes < plan.memory_free_bytes and 0 < plan.disk_bytes < plan.disk_free_bytes
    assert not (tmp_path / "runs").exists()
    with pytest.raises(ConfigError, match="attnetion"):
        sd.plan(config(pictures, tmp_path, adapter={"targets": ["attnetion"]}))
