"""`studio blend`, `resize`, `extract` and `merge`: adapters out of adapters, out of checkpoints, and into a base."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from studio.commands.algebra_text import analysis_text, exactness, learnt_text, merge_text, summary
from studio.commands.flags import Json
from studio.config import Layout, Precision
from studio.errors import ConfigError
from studio.jobs.given import Given, bases_for, read_given
from studio.outputs import adapter_file, check_unused
from studio.terminal import emit

if TYPE_CHECKING:
    from studio.algebra import CombinedState
    from studio.algebra.analyze import Analysis
    from studio.jobs.given import Bases

METHOD_HELP = "linear, slerp, magnitude-prune, ties, dare, dare-ties, della or breadcrumbs."
BASE_HELP = "The base that they are for: builtin, a folder, a .safetensors checkpoint or a hub id."
NEEDS_BASE = "Needed for LoHa, LoKr, DoRA and all else whose change the file alone does not tell."
CONFIG_HELP = "A diffusers folder that lends a single checkpoint file its configurations and tokenizers."
RANK_HELP = "Give every layer this rank at most; without it, the result is exact."
ENERGY_HELP = "Keep this share of what each layer changes (0.95), with the smallest rank that does."
STRENGTH_HELP = "A further factor for some layers: a role, a block or a layer. NAME:PATTERN=F is for one adapter."

Adapters = Annotated[list[str], typer.Argument(metavar="FILE[:WEIGHT]...", help="Adapters with their weights.")]
File = Annotated[str, typer.Argument(metavar="FILE", help="A .safetensors file, a peft folder, or a hub id.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="The new file, or folder.")]
Rank = Annotated[int | None, typer.Option(help=RANK_HELP, min=1)]
Energy = Annotated[float | None, typer.Option(help=ENERGY_HELP)]
Base = Annotated[str | None, typer.Option(help=f"{BASE_HELP} {NEEDS_BASE}")]
Format = Annotated[Layout, typer.Option("--format", help="Layout of the file.")]
Dtype = Annotated[Precision, typer.Option(help="Numbers in the file; fp32 rounds nothing.")]
Strengths = Annotated[list[str] | None, typer.Option("--strength", metavar="PATTERN=F", help=STRENGTH_HELP)]


def blend(
    adapters: Adapters,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="The new file; none with --analyze.")] = None,
    method: Annotated[str, typer.Option(help=METHOD_HELP)] = "linear",
    sets: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A setting of the method: density=0.3.")
    ] = None,
    rank: Rank = None,
    energy: Energy = None,
    strength: Strengths = None,
    analyze: Annotated[bool, typer.Option("--analyze", help="Say whether they will fight, and what to do.")] = False,
    picture: Annotated[Path | None, typer.Option(help="With --analyze: a heat map of blocks, as a PNG.")] = None,
    learn: Annotated[
        bool, typer.Option("--learn", help="Fit the blend to prompts, so that each effect stays.")
    ] = False,
    prompts: Annotated[
        list[str] | None, typer.Option(help='With --learn: once for each adapter, in their order; "one|another".')
    ] = None,
    learn_steps: Annotated[int, typer.Option(help="Steps of --learn.", min=1)] = 100,
    base: Base = None,
    base_config: Annotated[str | None, typer.Option(help=CONFIG_HELP)] = None,
    seed: Annotated[int, typer.Option(help="Seed of random masks and of --learn.", min=0)] = 0,
    layout: Format = "kohya",
    dtype: Dtype = "fp32",
    as_json: Json = False,
) -> None:
    """Make one adapter out of several, on what they really do to the weights.

    \b
    Add:          studio blend ink.safetensors:0.8 wash.safetensors:0.5 -o mix.safetensors
    Subtract:     studio blend ink.safetensors wash.safetensors:-0.5 -o less.safetensors
    Interpolate:  studio blend ink.safetensors:0.7 wash.safetensors:0.3 -o between.safetensors
    Will it work: studio blend ink.safetensors wash.safetensors --analyze --picture fight.png

    Applied at 1.0, the file does what its parts do together at their weights, whatever their methods and ranks.
    """
    if output is None and not analyze:
        raise ConfigError("give a file to write with -o, or ask for --analyze alone")
    if bool(prompts) != learn or (learn and not base) or (picture and not analyze):
        raise ConfigError("--learn needs --base and --prompts, --prompts needs --learn, and --picture needs --analyze")
    if learn and (method != "linear" or sets):
        raise ConfigError("--learn finds the coefficients by itself: it takes no --method and no --set")
    for path in ([adapter_file(output, layout)] if output else []) + ([picture] if picture else []):
        check_unused(path)
    given = read_given(adapters, strength or [])
    bases = bases_for(base, given)
    result: dict[str, Any] = {"adapters": list(zip(given.names, given.weights, strict=True))}
    lines: list[str] = []
    if analyze:
        result["analysis"] = found = _analysis(given, bases, picture)
        lines += analysis_text(found, picture)
    if output:
        from studio.devices import stored_dtype

        cut = {"rank": rank, "energy": energy, "dtype": stored_dtype(dtype)}
        if learn:
            made, result["learned"] = _learnt(
                given, bases, base or "", base_config, prompts or [], learn_steps, seed, cut
            )
            lines += learnt_text(given.names, result["learned"])
        else:
            made = _blended(given, bases, method, sets or [], seed, cut)
        result |= _written(made, output, layout)
        lines += [*summary(made, result, given.recipe), *exactness(made)]
    emit(result, "\n".join(lines), as_json)


def resize(
    file: File,
    output: Output,
    rank: Rank = None,
    energy: Energy = None,
    sv_ratio: Annotated[float | None, typer.Option(help="Keep singular values of at least the largest / this.")] = None,
    frobenius: Annotated[float | None, typer.Option(help="Keep this share of each layer's Frobenius norm.")] = None,
    base: Base = None,
    layout: Format = "kohya",
    dtype: Dtype = "fp32",
    as_json: Json = False,
) -> None:
    """Make an adapter smaller: the best LoRA of a rank, or of the smallest ranks that keep enough.

    \b
    studio resize big.safetensors --rank 16 -o small.safetensors
    studio resize big.safetensors --energy 0.95 -o small.safetensors
    """
    from studio.algebra import resize as make
    from studio.devices import stored_dtype

    check_unused(adapter_file(output, layout))
    given = read_given([file], [])
    made = make(
        given.states[0],
        rank,
        energy=energy,
        sv_ratio=sv_ratio,
        frobenius=frobenius,
        bases=bases_for(base, given),
        name=given.names[0],
        dtype=stored_dtype(dtype),
    )
    result = _written(made, output, layout)
    emit(result, "\n".join([*summary(made, result, file), *exactness(made)]), as_json)


def extract(
    base: Annotated[str, typer.Argument(metavar="BASE", help="The model that it was trained from.")],
    tuned: Annotated[str, typer.Argument(metavar="TUNED", help="The fine-tuned model, in the same form.")],
    output: Output,
    rank: Annotated[int | None, typer.Option(help="Rank of the LoRA; without any, full differences.", min=1)] = None,
    energy: Energy = None,
    targets: Annotated[
        list[str] | None, typer.Option(help="Layers to look at, as in train-sd; repeat for more.")
    ] = None,
    norms: Annotated[bool, typer.Option("--norms", help="Take changed norms too.")] = False,
    biases: Annotated[bool, typer.Option("--biases", help="Take changed biases too.")] = False,
    min_diff: Annotated[float, typer.Option(help="Take no tensor that changes by less everywhere.", min=0)] = 0.0,
    layout: Format = "kohya",
    dtype: Dtype = "fp32",
    as_json: Json = False,
) -> None:
    """Make an adapter out of two checkpoints: what TUNED has and BASE has not.

    \b
    studio extract base.safetensors tuned.safetensors --rank 32 -o tuned-lora.safetensors
    """
    from studio.algebra import extract as make
    from studio.algebra.extract import checkpoints
    from studio.devices import stored_dtype

    check_unused(adapter_file(output, layout))
    made = make(
        *checkpoints(base, tuned),
        rank,
        energy=energy,
        targets=targets or (),
        norms=norms,
        biases=biases,
        min_diff=min_diff,
        names=(base, tuned),
        dtype=stored_dtype(dtype),
    )
    result = _written(made, output, layout)
    emit(result, "\n".join([*summary(made, result, f"{tuned} - {base}"), *exactness(made)]), as_json)


def merge(
    base: Annotated[str, typer.Argument(metavar="BASE", help=BASE_HELP)],
    lora: Annotated[list[str], typer.Option(metavar="FILE[:strength]", help="An adapter; repeat for more.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The new base: a folder, or a .safetensors file.")],
    single_file: Annotated[bool, typer.Option("--single-file", help="Write one .safetensors checkpoint.")] = False,
    strength: Strengths = None,
    base_config: Annotated[str | None, typer.Option(help=CONFIG_HELP)] = None,
    as_json: Json = False,
) -> None:
    """Put adapters into a base for good, and save it: a model that needs no adapter any more.

    \b
    studio merge builtin --lora ink.safetensors:0.8 -o inked
    studio merge model.safetensors --lora ink.safetensors --lora wash.safetensors:0.5 -o merged.safetensors
    """
    from studio.algebra.merge import Ingredient
    from studio.algebra.merge import merge as make

    if single_file and output.suffix != ".safetensors":
        output = output.with_name(f"{output.name}.safetensors")
    check_unused(output)
    given = read_given(lora, strength or [])
    parts = zip(given.names, given.states, given.weights, given.strengths, strict=True)
    made = make(base, [Ingredient(*part) for part in parts], output, base_config)
    result = {"file": output, "layers": len(made.lost), "mean_lost": made.mean_loss, "lost": made.lost}
    emit(result, "\n".join(merge_text(made, f"{base} + {given.recipe}")), as_json)


# -- what they share -------------------------------------------------------------------------


def _settings(texts: Sequence[str]) -> dict[str, Any]:
    """KEY=VALUE texts; numbers and truths as such."""
    import yaml

    pairs = [text.partition("=") for text in texts]
    if wrong := [key for key, sign, _ in pairs if not sign]:
        raise ConfigError(f"--set {wrong[0]}: write KEY=VALUE")
    return {key: yaml.safe_load(value) for key, _, value in pairs}


def _blended(
    given: Given, bases: Bases, method: str, sets: Sequence[str], seed: int, cut: Mapping[str, Any]
) -> CombinedState:
    from studio.algebra import blend as make

    return make(
        given.states,
        given.weights,
        method,
        strengths=given.strengths,
        bases=bases,
        names=given.names,
        seed=seed,
        **cut,
        **_settings(sets),
    )


def _learnt(
    given: Given,
    bases: Bases,
    base: str,
    config: str | None,
    prompts: Sequence[str],
    steps: int,
    seed: int,
    cut: Mapping[str, Any],
) -> tuple[CombinedState, dict[str, Any]]:
    """(the blend with learned coefficients, what each adapter loses of its effect before and after)."""
    from studio.algebra import blend as make
    from studio.algebra.learned import prepared
    from studio.devices import best_device
    from studio.families.loading import load_base
    from studio.formats.metadata import merged
    from studio.progress import show_steps
    from trainers.blend import learn_blend

    ready = prepared(given.states, given.weights, given.strengths, bases)
    family, models = load_base(base, config=config)
    for part in models.parts.values():
        part.to(best_device())
    asked = [[one.strip() for one in text.split("|")] for text in prompts]
    with show_steps("learning") as progress:
        learnt = learn_blend(family, models, ready, asked, steps=steps, seed=seed, progress=progress)
    made = make(learnt.states, [1.0] * len(learnt.states), **cut)
    facts = {"prompts": asked, "steps": steps, "seed": seed, "strengths": given.strengths}
    metadata = merged([state.metadata for state in given.states], given.names, given.weights, "learned", facts)
    return replace(made, metadata=metadata), {"before": learnt.before, "after": learnt.after}


def _analysis(given: Given, bases: Bases, picture: Path | None) -> Analysis:
    from studio.algebra.analyze import analyze
    from studio.algebra.heatmap import heatmap

    found = analyze(given.states, given.weights, strengths=given.strengths, bases=bases, names=given.names)
    if picture:
        picture.parent.mkdir(parents=True, exist_ok=True)
        heatmap(found).save(picture, "PNG")
    return found


def _written(made: CombinedState, output: Path, layout: str) -> dict[str, Any]:
    """Writes the file: where it is, what it holds, and the figures of its report."""
    from studio.formats import write_adapter

    file = write_adapter(made, output, layout)
    files = [file] if file.is_file() else [one for one in file.rglob("*") if one.is_file()]
    return {
        "file": file,
        "format": layout,
        "layers": len(made.tensors),
        "bytes": sum(one.stat().st_size for one in files),
        **made.report.figures(),
    }
