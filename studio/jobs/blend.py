"""The algebra of adapters as jobs: blend, analyze, resize, extract and merge, into the library."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, Field

from studio.config import Group, Layout, Names, Precision, absolute
from studio.jobs.draw import AdapterUse
from studio.jobs.result import Result
from studio.outputs import adapter_file, check_unused
from studio.runs import Run
from studio.workspace import Workspace

if TYPE_CHECKING:
    from studio.algebra import CombinedState
    from studio.jobs.given import Given

Place = Annotated[str, AfterValidator(absolute)]
Share = Annotated[float, Field(gt=0, le=1)]


class FileConfig(Group):
    """The file that a job makes."""

    name: str = Field(min_length=1, max_length=100, pattern=r"^[^/\\.][^/\\]*$")
    """Its name, without the ending."""
    place: Literal["library", "job"] = "library"
    """In the library, or only in the job's folder, to be looked at first."""
    format: Layout = "kohya"
    """Layout of the file: "kohya" loads in most tools."""
    precision: Precision = "fp32"
    """Numbers in the file; fp32 rounds nothing."""


class AnalyzeConfig(Group):
    """Whether adapters will fight."""

    adapters: list[AdapterUse] = Field(min_length=2)
    """Two adapters or more, with their strengths."""
    base: Place = ""
    """The base that they are for, which methods other than LoRA need."""


class BlendConfig(Group):
    """One adapter out of several."""

    adapters: list[AdapterUse] = Field(min_length=1)
    """The adapters, with their strengths."""
    file: FileConfig
    method: str = "linear"
    """linear, slerp, magnitude-prune, ties, dare, dare-ties, della or breadcrumbs."""
    settings: dict[str, Any] = {}
    """The method's own: {"density": 0.3}."""
    rank: int | None = Field(None, ge=1)
    """Rank of every layer at most; without it, the result is exact."""
    energy: Share | None = None
    """Keep this share of what each layer changes, with the smallest rank that does."""
    seed: int = Field(0, ge=0)
    """Seed of random masks."""
    base: Place = ""
    """The base that they are for, which methods other than LoRA need."""


class ResizeConfig(Group):
    """A smaller adapter."""

    source: Place = Field(min_length=1)
    """The adapter."""
    file: FileConfig
    rank: int | None = Field(None, ge=1)
    """Rank of every layer at most."""
    energy: Share | None = None
    """Keep this share of what each layer changes, with the smallest rank that does."""
    sv_ratio: float | None = Field(None, gt=1)
    """Keep singular values of at least the largest divided by this."""
    frobenius: Share | None = None
    """Keep this share of each layer's Frobenius norm."""
    base: Place = ""
    """The base that it is for, which methods other than LoRA need."""


class ExtractConfig(Group):
    """An adapter out of two checkpoints."""

    base: Place = Field(min_length=1)
    """The model that the other was trained from."""
    tuned: Place = Field(min_length=1)
    """The fine-tuned model, in the same form."""
    file: FileConfig
    rank: int | None = Field(32, ge=1)
    """Rank of the LoRA; without any, full differences."""
    energy: Share | None = None
    """Keep this share of what each layer changes, with the smallest rank that does."""
    targets: Names = []
    """Layers to look at; empty: all."""
    norms: bool = False
    """Take changed norms too."""
    biases: bool = False
    """Take changed biases too."""
    min_diff: float = Field(0.0, ge=0)
    """Take no tensor that changes by less everywhere."""


class MergeConfig(Group):
    """A base with adapters put into it for good."""

    base: Place = "builtin"
    """The base."""
    config: Place = ""
    """A diffusers folder that lends a single checkpoint file its configurations and tokenizers."""
    adapters: list[AdapterUse] = Field(min_length=1)
    """The adapters, with their strengths."""
    name: str = Field(min_length=1, max_length=100, pattern=r"^[^/\\.][^/\\]*$")
    """Name of the new base, below `library/bases`."""
    single_file: bool = False
    """Write one .safetensors checkpoint instead of a diffusers folder."""


def blend(config: BlendConfig, run: Run) -> Result:
    """Blends into a file; the facts are the figures of its report."""
    from studio.algebra import blend as make
    from studio.devices import stored_dtype
    from studio.jobs.given import bases_for

    run.update_status(message="reading the adapters")
    given = _given(config.adapters)
    bases = bases_for(config.base or None, given)
    run.update_status(message="blending")
    made = make(
        given.states,
        given.weights,
        config.method,
        rank=config.rank,
        energy=config.energy,
        strengths=given.strengths,
        bases=bases,
        names=given.names,
        seed=config.seed,
        dtype=stored_dtype(config.file.precision),
        **config.settings,
    )
    return _written(made, config.file, run)


def analyze(config: AnalyzeConfig, run: Run) -> Result:
    """A heat map of every pair of adapters, block by block; the facts are the whole `Analysis`."""
    from studio.algebra.analyze import analyze as compare
    from studio.algebra.heatmap import heatmap
    from studio.jobs.given import bases_for

    run.update_status(message="comparing the adapters")
    given = _given(config.adapters)
    bases = bases_for(config.base or None, given)
    found = compare(given.states, given.weights, strengths=given.strengths, bases=bases, names=given.names)
    picture = run.folder / "heatmap.png"
    heatmap(found).save(picture, "PNG")
    return Result([picture], asdict(found))


def resize(config: ResizeConfig, run: Run) -> Result:
    """Cuts an adapter down into a file; the facts are the figures of its report."""
    from studio.algebra import resize as make
    from studio.devices import stored_dtype
    from studio.jobs.given import bases_for

    run.update_status(message="resizing")
    given = _given([AdapterUse(source=config.source)])
    made = make(
        given.states[0],
        config.rank,
        energy=config.energy,
        sv_ratio=config.sv_ratio,
        frobenius=config.frobenius,
        bases=bases_for(config.base or None, given),
        name=given.names[0],
        dtype=stored_dtype(config.file.precision),
    )
    return _written(made, config.file, run)


def extract(config: ExtractConfig, run: Run) -> Result:
    """Takes the difference of two checkpoints into a file; the facts are the figures of its report."""
    from studio.algebra import extract as make
    from studio.algebra.extract import checkpoints
    from studio.devices import stored_dtype

    run.update_status(message="comparing the checkpoints")
    made = make(
        *checkpoints(config.base, config.tuned),
        config.rank,
        energy=config.energy,
        targets=config.targets,
        norms=config.norms,
        biases=config.biases,
        min_diff=config.min_diff,
        names=(config.base, config.tuned),
        dtype=stored_dtype(config.file.precision),
    )
    return _written(made, config.file, run)


def merge(config: MergeConfig, run: Run) -> Result:
    """Writes a base with the adapters in its weights; the facts say what its precision lost of them."""
    from studio.algebra.merge import Ingredient
    from studio.algebra.merge import merge as make

    run.update_status(message="merging")
    given = _given(config.adapters)
    parts = zip(given.names, given.states, given.weights, given.strengths, strict=True)
    target = _workspace(run).library / "bases" / f"{config.name}{'.safetensors' if config.single_file else ''}"
    target.parent.mkdir(parents=True, exist_ok=True)
    made = make(config.base, [Ingredient(*part) for part in parts], target, config.config or None)
    return Result([made.path], {"mean_lost": made.mean_loss, "lost": made.lost})


def _workspace(run: Run) -> Workspace:
    return Workspace(run.folder.parent.parent)


def _given(uses: list[AdapterUse]) -> Given:
    from studio.diffusion.lora import lora_name
    from studio.formats import read_adapter
    from studio.jobs.given import Given

    states = [read_adapter(use.source) for use in uses]
    names = [lora_name(use.source) for use in uses]
    return Given(states, [use.strength for use in uses], names, [dict(use.blocks) for use in uses])


def _written(made: CombinedState, file: FileConfig, run: Run) -> Result:
    from studio.formats import write_adapter

    folder = _workspace(run).library if file.place == "library" else run.folder
    path = adapter_file(folder / file.name, file.format)
    check_unused(path)
    folder.mkdir(parents=True, exist_ok=True)
    written = write_adapter(made, path, file.format)
    return Result([written], {"layers": len(made.tensors), **made.report.figures()})
