"""One typed schema per command: the command line, presets, config files, forms and docs all come from it.

Every field has a description with its unit and range; every unknown key is an error.
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from studio import paths
from studio.errors import ConfigError, nearest


def absolute(folder: str) -> str:
    """A folder as an absolute path, so that a run resumes from anywhere; names of other things stay."""
    path = Path(folder).expanduser()
    return str(path.resolve()) if folder and (path.exists() or folder.startswith((".", "~"))) else folder


def _listed(value: Any) -> Any:
    """`a,b` of the command line as ["a", "b"]; a comma within brackets, as in `re:.*q{1,2}`, separates nothing."""
    if not isinstance(value, str):
        return value
    parts, depth = [""], 0
    for sign in value:
        depth += (sign in "([{") - (sign in ")]}")
        if sign == "," and depth <= 0:
            parts.append("")
        else:
            parts[-1] += sign
    return [part.strip() for part in parts if part.strip()]


def _one_or_more(value: Any) -> Any:
    """A single text as a list of one: its commas are its own."""
    return [value] if isinstance(value, str) else value


Names = Annotated[list[str], BeforeValidator(_listed)]
Layout = Literal["kohya", "diffusers", "peft", "comfyui", "lycoris", "onetrainer"]
"""The layouts of adapter files that hold layers."""
Precision = Literal["fp32", "fp16", "bf16"]
"""The numbers in an adapter file."""


class Group(BaseModel):
    """A group of settings: typed, ranged, and closed to unknown keys."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        coerce_numbers_to_str=True,
        use_attribute_docstrings=True,
        defer_build=True,  # validators are compiled when first used: `studio --help` needs none
    )


class ModelConfig(Group):
    source: Annotated[str, AfterValidator(absolute)] = Field("builtin", min_length=1)
    """The base to train on: "builtin", a hub id, a diffusers folder, or a single .safetensors checkpoint."""
    config: Annotated[str, AfterValidator(absolute)] = ""
    """A diffusers folder that lends a single checkpoint file its configurations and tokenizers; empty: the hub's."""
    precision: Literal["auto", "fp32", "fp16", "bf16"] = "auto"
    """Precision of the computation; "auto" is bf16 or fp16 where the GPU has it and fp32 on a CPU."""
    prediction_type: Literal["auto", "epsilon", "v_prediction"] = "auto"
    """What the base predicts; "auto" reads it from the base's scheduler, which a single checkpoint file may lack."""


class DataConfig(Group):
    folder: Annotated[str, AfterValidator(absolute)] = ""
    """Folder of pictures and captions; the built-in base has the demo dataset as its default."""
    resolution: int = Field(512, ge=16, le=4096, multiple_of=8)
    """Picture size in pixels: each bucket has about resolution x resolution of them; memory and time grow so."""
    bucket_step: int = Field(64, ge=8, le=512, multiple_of=8)
    """Bucket widths and heights are multiples of this many pixels."""
    max_aspect: float = Field(2.0, ge=1, le=8)
    """Longest side over shortest side of a bucket; 1 makes every bucket square."""
    flip: bool = False
    """Mirror each picture left to right half of the time: more variety, wrong for lettering and faces."""
    shuffle_captions: bool = False
    """Shuffle the comma-separated parts of a caption at each step."""


class Override(Group):
    """Settings of the layers that one pattern means; None leaves what they have."""

    method: str | None = None
    """As `adapter.method`; the options are then its own."""
    options: dict[str, Any] | None = None
    """As `adapter.options`, instead of them."""
    rank: int | None = Field(None, ge=1, le=1024)
    """As `adapter.rank`; alpha follows it where neither gives one."""
    alpha: float | None = Field(None, gt=0)
    """As `adapter.alpha`."""
    dropout: float | None = Field(None, ge=0, lt=1)
    """As `adapter.dropout`."""
    rslora: bool | None = None
    """As `adapter.rslora`."""
    lr: float | None = Field(None, gt=0, le=10)
    """Learning rate of these layers."""

    @model_validator(mode="before")
    @classmethod
    def _known(cls, values: Any) -> Any:
        if isinstance(values, dict) and (unknown := sorted(values.keys() - cls.model_fields.keys(), key=str)):
            raise ValueError(f"unknown setting '{unknown[0]}'.{nearest(str(unknown[0]), cls.model_fields)}")
        return values


class MethodConfig(Group):
    method: str = "lora"
    """The adapter method: lora, dora, loha, lokr, oft, diff, ..."""
    options: dict[str, Any] = {}
    """The method's own settings, such as lora's init: --set adapter.options.init=pissa."""
    rank: int = Field(16, ge=1, le=1024)
    """Inner width of the adapter: capacity and file size grow with it."""
    alpha: float | None = Field(None, gt=0)
    """The adapter's scale is alpha / rank; without a value, alpha equals the rank of each layer."""
    rank_schedule: dict[int, int] = {}
    """Step -> rank from then on, for LoRA and DoRA: {500: 8, 1000: 16} grows from `rank` and keeps what is learnt."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Probability of dropping each input of the adapter while training."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) instead of alpha / rank."""
    targets: Names = []
    """Layers to adapt: roles ("attention"), globs, or "re:" and a regular expression; empty: the family's default."""
    exclude: Names = []
    """Layers to leave out of `targets`, in the same language."""
    overrides: dict[str, Override] = {}
    """Pattern -> settings that differ there, method and lr too: {"*.to_q": {"rank": 4}}; a later entry wins."""
    train_text_encoder: bool = False
    """Adapt the text encoders too: better for new words, with more memory and time."""


class TrainConfig(Group):
    steps: int = Field(1500, ge=1)
    """Optimizer steps: time grows with them, and past some point the pictures are learnt by heart."""
    batch_size: int = Field(1, ge=1)
    """Pictures a batch, on each device: memory and the time of a step grow with them, and the steps are steadier."""
    gradient_accumulation: int = Field(1, ge=1)
    """Batches added up for one optimizer step: as a larger batch, in time instead of memory."""
    seed: int = Field(0, ge=0)
    """Seed of initialisation, noise, timesteps, crops and order."""
    max_grad_norm: float = Field(1.0, ge=0)
    """Clip the gradient's norm to this; 0 turns clipping off."""
    checkpoint_every: int = Field(500, ge=0)
    """Steps between checkpoints that a run can resume from; 0: only at a stop and at the end."""
    sample_every: int = Field(250, ge=0)
    """Steps between sample pictures; 0: only at the start and at the end."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass: less memory, about a third slower."""


class OptimizerConfig(Group):
    lr: float = Field(1e-4, gt=0, le=10)
    """Learning rate of the adapters: higher learns faster, too high breaks the pictures."""
    text_encoder_lr: float | None = Field(None, gt=0, le=10)
    """Learning rate of the text encoders' adapters; without a value, `lr`."""
    weight_decay: float = Field(0.01, ge=0, le=1)
    """Decoupled weight decay of the adapters' parameters."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    """Decay rates of AdamW's running mean and mean square."""


class ScheduleConfig(Group):
    name: Literal["constant", "constant_with_warmup", "linear", "cosine"] = "constant"
    """How the learning rate changes over the run; linear and cosine end at 0."""
    warmup_steps: int = Field(0, ge=0)
    """Optimizer steps in which the learning rate rises from 0; fewer than `train.steps`."""

    @model_validator(mode="after")
    def _warmup_is_used(self) -> ScheduleConfig:
        if self.name == "constant" and self.warmup_steps:
            raise ValueError("'constant' has no warm-up: use 'constant_with_warmup', or warmup_steps 0")
        return self


class LossConfig(Group):
    min_snr_gamma: float | None = Field(None, gt=0)
    """Min-SNR weighting of timesteps (arXiv:2303.09556), 5 in the paper; without a value, all weigh the same."""
    caption_dropout: float = Field(0.0, ge=0, le=1)
    """Probability of training a picture on the empty caption."""


class SamplesConfig(Group):
    prompts: Annotated[list[str], BeforeValidator(_one_or_more)] = []
    """Prompts of the sample pictures and the before/after sheet; empty: captions of the dataset."""
    steps: int = Field(20, ge=1, le=1000)
    """Sampler steps."""
    guidance: float = Field(7.0, ge=0, le=50)
    """Classifier-free guidance scale; 1 is no guidance."""
    seed: int = Field(0, ge=0)
    """Seed of the first sample picture; the next prompts take the next seeds."""


class OutputConfig(Group):
    folder: str = Field(default_factory=lambda: str(paths.home() / "runs"), min_length=1)
    """Folder that holds the runs; the default is below $STUDIO_HOME, or below the current folder."""
    name: str = Field("", pattern=r"^[^/\\]*$", max_length=100)
    """Name of the run and its file; without a value, the name of the data folder."""
    format: Layout = "kohya"
    """Layout of the saved file: "kohya" loads in most tools."""
    trackers: Annotated[list[Literal["tensorboard", "wandb"]], BeforeValidator(_listed)] = []
    """Services that get the metrics beside the run folder: tensorboard, wandb."""


DEMO_PROMPTS = ("dog face", "rocket", "penguin", "guitar", "hamburger", "sunflower", "octopus", "bicycle")
"""What the demo draws: subjects that are not in its dataset."""


class TrainSDConfig(Group):
    """The settings of `studio train-sd`."""

    model: ModelConfig = Field(default_factory=ModelConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    adapter: MethodConfig = Field(default_factory=MethodConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = Field(default_factory=ScheduleConfig)
    loss: LossConfig = Field(default_factory=LossConfig)
    samples: SamplesConfig = Field(default_factory=SamplesConfig)
    output: OutputConfig = Field(default_factory=OutputConfig)

    @model_validator(mode="before")
    @classmethod
    def _data_and_name(cls, values: Any) -> Any:
        """The demo dataset for the built-in base, and a name for the run."""
        groups = {key: _as_dict(value) for key, value in values.items()}
        data, output, samples = (dict(groups.get(name, {})) for name in ("data", "output", "samples"))
        if not data.get("folder"):
            if not _is_builtin(groups):
                raise ValueError("there are no pictures to train on: give their folder with --data FOLDER")
            data["folder"] = str(paths.assets() / "demo")
            samples.setdefault("prompts", list(DEMO_PROMPTS))
        output["name"] = output.get("name") or Path(str(data["folder"])).resolve().name
        return {**groups, "data": data, "output": output, "samples": samples}

    @model_validator(mode="after")
    def _warmup_ends(self) -> TrainSDConfig:
        warmup, steps = self.schedule.warmup_steps, self.train.steps
        if warmup >= steps:
            raise ValueError(f"schedule.warmup_steps is {warmup}; it must be below train.steps, which is {steps}")
        return self

    @classmethod
    def default_preset(cls, settings: dict[str, Any]) -> str | None:
        """The preset below `settings` when the user names none: the built-in base needs its own."""
        return "builtin-style" if _is_builtin(settings) else None


def check_trackers(names: Iterable[str]) -> None:
    """Raises ConfigError for a service of `output.trackers` whose package is not installed."""
    for name in names:
        try:
            distribution(name)  # no import: wandb leaves folders of its name that Python would take for it
        except PackageNotFoundError:
            raise ConfigError(
                f"output.trackers has '{name}', which is not installed: pip install \"adapter-studio[track]\""
            ) from None


def _as_dict(value: Any) -> Any:
    return value.model_dump(exclude_unset=True) if isinstance(value, BaseModel) else value


def _is_builtin(settings: dict[str, Any]) -> bool:
    return settings.get("model", {}).get("source", "builtin") == "builtin"
