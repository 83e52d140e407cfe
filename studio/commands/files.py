"""`studio convert`: an adapter file in another layout, and with another method that more tools read."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from studio.commands.flags import Json
from studio.errors import ConfigError
from studio.outputs import adapter_file, check_unused
from studio.terminal import emit

if TYPE_CHECKING:
    from studio.algebra import CombinedState
    from studio.formats import AdapterState

FILE_HELP = "A .safetensors file, a peft or diffusers folder, or a hub id."
OUTPUT_HELP = "The new file, or folder for peft. (default NAME-LAYOUT in the current folder)"
TO_HELP = "The layout to write: kohya, diffusers, peft, comfyui, lycoris, onetrainer, or embedding for a lone token."
BAKE_HELP = "Turn every method into a plain LoRA, or into full differences (diff), which most tools read."
RANK_HELP = "With --bake lora: the rank for what is not low-rank itself, and the most for what is."
BASE_HELP = "With --bake: the base, where the file alone does not tell what it changes (LoKr, DoRA, OFT, ...)."
File = Annotated[str, typer.Argument(metavar="FILE", help=FILE_HELP)]


def _default_output(source: str, layout: str) -> Path:
    """Where `convert` writes when no output is named: `demo.safetensors` as `demo-diffusers.safetensors`."""
    return Path(f"{Path(source).name.removesuffix('.safetensors')}-{layout}")


def convert(
    file: File,
    to: Annotated[str, typer.Option(metavar="LAYOUT", help=TO_HELP)],
    output: Annotated[Path | None, typer.Option("--output", "-o", help=OUTPUT_HELP)] = None,
    bake: Annotated[Literal["lora", "diff"] | None, typer.Option(help=BAKE_HELP)] = None,
    rank: Annotated[int | None, typer.Option(help=RANK_HELP, min=1)] = None,
    base: Annotated[str | None, typer.Option(help=BASE_HELP)] = None,
    as_json: Json = False,
) -> None:
    """Write an adapter in another layout; the source stays as it is.

    \b
    studio convert ink.safetensors --to comfyui
    studio convert dora.safetensors --to diffusers --bake lora --rank 32 --base model.safetensors
    """
    from studio.formats import check_format, read_adapter, write_adapter

    check_format(to)
    if (rank and bake != "lora") or (base and not bake):
        raise ConfigError("--rank is for --bake lora, and --base for --bake: add it, or leave them out")
    output = output or _default_output(file, to)
    target = output if to == "peft" else adapter_file(output, to)
    check_unused(target)
    state, lines = read_adapter(file), []
    result: dict[str, Any] = {"format": to}
    if bake:
        state = baked = _baked(state, file, bake, rank, base)
        result |= {"bake": bake, "errors": baked.residuals, "largest_error": max(baked.residuals.values(), default=0.0)}
        lines = [_exactness(baked)]
    written = write_adapter(state, target, to)
    emit({"file": written, **result}, "\n".join([str(written), *lines]), as_json)


def _baked(state: AdapterState, file: str, kind: str, rank: int | None, base: str | None) -> CombinedState:
    from studio.algebra.bake import bake_diff, bake_lora
    from studio.jobs.given import Given, bases_for

    bases = bases_for(base, Given([state], [1.0], [file], [{}]))
    return bake_lora(state, rank, bases) if kind == "lora" else bake_diff(state, bases)


def _exactness(baked: CombinedState) -> str:
    """The largest of the layers' errors, relative to what the layer changes."""
    name, error = max(baked.residuals.items(), key=lambda item: item[1], default=("", 0.0))
    text = f"largest error {error:.2e} of what a layer changes ({name})" if error else "exact: nothing was cut"
    others = sum("diff" not in entry and "lora_up.weight" not in entry for entry in baked.tensors.values())
    return f"{text}; {others} norms and biases stay as they are" if others else text
