"""Methods without a dW: trainable vectors that a transformers model reads beside its input.

Prompt tuning (arXiv:2104.08691, `prompt_tuning.py`): [P; E(x)] in place of E(x), where P is (tokens,
width) and E the word embedding. P-tuning (`ptuning.py`) computes P with a small network; prefix tuning
(`prefix.py`) gives keys and values to every layer instead.

A method acts by pre-hooks on the model's text decoder (for an encoder-decoder, on both halves) that
change its arguments; the weights are never touched, so there is nothing to merge.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, NoReturn, Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from studio.adapters.attachment import forget_traces
from studio.errors import ConfigError, nearest
from studio.seeds import sample_generator

INITS = ("random", "vocabulary", "text")


@dataclass(frozen=True)
class PromptConfig:
    """The settings of one prompt.

    `method` is a name in `PROMPT_METHODS`; `tokens` >= 1, the length of the prompt. `init`, for
    "prompt" and "prefix": "random"; "vocabulary", words drawn from the vocabulary; or "text", the
    words `token_ids`, repeated or cut to `tokens`. Words train far better than "random".
    `projection`, for "prefix": the prefix is computed by an MLP while training. `encoder`, for
    "p-tuning": "mlp" or "lstm". `encoder_hidden` >= 1 is the hidden width of that MLP or LSTM, None
    meaning its input width. `lr` overrides the run's learning rate.

    Raises ConfigError for a value out of range, and for a setting that the method does not read.
    """

    method: str = "prompt"
    tokens: int = 20
    init: str = "random"
    token_ids: tuple[int, ...] = ()
    projection: bool = False
    encoder: str = "mlp"
    encoder_hidden: int | None = None
    lr: float | None = None

    def __post_init__(self) -> None:
        if self.method not in PROMPT_METHODS:
            raise ConfigError(f"unknown prompt method '{self.method}'.{nearest(self.method, PROMPT_METHODS)}")
        if self.tokens < 1:
            raise ConfigError(f"tokens is {self.tokens}; it must be 1 or more")
        if self.init not in INITS:
            raise ConfigError(f"init is '{self.init}'; it must be one of {', '.join(INITS)}")
        if bool(self.token_ids) != (self.init == "text"):
            raise ConfigError(
                f"init is '{self.init}' with {len(self.token_ids)} token_ids; 'text', and only it, has them"
            )
        if self.encoder not in ("mlp", "lstm"):
            raise ConfigError(f"encoder is '{self.encoder}'; it must be 'mlp' or 'lstm'")
        if self.encoder_hidden is not None and self.encoder_hidden < 1:
            raise ConfigError(f"encoder_hidden is {self.encoder_hidden}; it must be 1 or more, or None")
        method = PROMPT_METHODS[self.method]
        for setting in fields(self):
            unread = setting.name not in ("method", "tokens", "lr", *method.settings)
            if unread and getattr(self, setting.name) != setting.default:
                raise ConfigError(f"{setting.name} is set, but the method '{self.method}' has no such setting")
        method.check(self)


@dataclass(frozen=True)
class TextModel:
    """The parts of a transformers model that a prompt acts on; `encoder` is None but for an encoder-decoder."""

    encoder: nn.Module | None
    decoder: nn.Module

    @property
    def reader(self) -> nn.Module:
        """The part that reads the input ids."""
        return self.decoder if self.encoder is None else self.encoder

    @property
    def width(self) -> int:
        """The width of a word embedding."""
        return self.reader.get_input_embeddings().weight.shape[1]

    def embed(self, ids: Tensor) -> Tensor:
        """The word embeddings of `ids`, any shape: (*ids.shape, width)."""
        embedding = self.reader.get_input_embeddings()
        return embedding(ids.to(embedding.weight.device))

    @classmethod
    def of(cls, model: nn.Module) -> TextModel:
        """The parts of `model`; raises ConfigError where it is no text model of transformers."""
        config = getattr(model, "config", None)
        if config is None or not hasattr(model, "get_decoder"):
            raise ConfigError(f"a prompt needs a text model of transformers, and {type(model).__name__} is none")
        encoder = model.get_encoder() if getattr(config, "is_encoder_decoder", False) else None
        parts = cls(encoder, model.get_decoder())
        if "inputs_embeds" not in inspect.signature(parts.reader.forward).parameters:
            raise ConfigError(
                f"{type(parts.reader).__name__} takes no inputs_embeds, so no prompt can precede its input"
            )
        if model.can_generate() and "past_key_values" not in inspect.signature(parts.decoder.forward).parameters:
            raise ConfigError(
                f"{type(parts.decoder).__name__} has no key-value cache to tell the beginning of a text from its "
                "continuation: adapt its layers instead"
            )
        return parts


PROMPT_METHODS: dict[str, type[Prompt]] = {}


class Prompt(nn.Module):
    """A prompt: `encoder(embedding)`. The encoder is the identity, unless the method trains one.

    `method` is its name, `settings` what it reads of `PromptConfig` besides tokens and lr.
    """

    method: ClassVar[str]
    settings: ClassVar[tuple[str, ...]]

    def __init__(self, parts: TextModel, config: PromptConfig) -> None:
        super().__init__()
        self.config = config
        self.enabled = True
        self.calls = 0
        self.embedding = nn.Parameter(torch.zeros(config.tokens, self.width(parts)))
        self.encoder: nn.Module = nn.Identity()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.method in PROMPT_METHODS:
            raise TypeError(f"prompt method '{cls.method}' is registered twice")
        PROMPT_METHODS[cls.method] = cls

    @classmethod
    def check(cls, config: PromptConfig) -> None:
        """Raises ConfigError for settings that contradict each other."""

    @staticmethod
    def width(parts: TextModel) -> int:
        """The width of the prompt in a file."""
        raise NotImplementedError

    def forward(self) -> Tensor:
        """The prompt as a file holds it, (tokens, width)."""
        return self.encoder(self.embedding)

    def reset(self, parts: TextModel, generator: torch.Generator) -> None:
        """Initialises the prompt, and the encoder that it trains with, from `generator`."""
        raise NotImplementedError

    def hook(self, parts: TextModel) -> list[RemovableHandle]:
        """Puts the method's hooks on the model; one `PromptHook` sits on the decoder."""
        raise NotImplementedError


class PromptHook:
    """A pre-hook that changes the arguments of a module. An object, so that a deep copy of the model copies it."""

    def __init__(self, prompt: Prompt, module: nn.Module) -> None:
        self.prompt = prompt
        self.names = tuple(inspect.signature(module.forward).parameters)

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[()], dict[str, Any]] | None:
        if not self.prompt.enabled:
            return None
        named = dict(zip(self.names, args, strict=False)) | kwargs
        self.change(module, named)
        return (), named

    def change(self, module: nn.Module, inputs: dict[str, Any]) -> None:
        """Changes `inputs`, parameter name -> argument, in place."""
        raise NotImplementedError

    def register(self, module: nn.Module) -> RemovableHandle:
        return module.register_forward_pre_hook(self, with_kwargs=True)


def cached_length(inputs: Mapping[str, Any]) -> int:
    """How many positions the key-value cache among `inputs` holds; raises ConfigError for a static cache."""
    cache = inputs.get("past_key_values")
    if getattr(cache, "is_compileable", False):
        raise ConfigError("a static key-value cache has no room for a prompt: use a dynamic cache")
    return 0 if cache is None else cache.get_seq_length()


def lengthen_mask(inputs: dict[str, Any], name: str, tokens: int) -> None:
    """Puts `tokens` ones before the mask `name` of `inputs`, (batch, length), where there is one."""
    mask = inputs.get(name)
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        raise ConfigError(f"a prompt needs an {name} of shape (batch, length), or none, not one made for every layer")
    inputs[name] = torch.cat((mask.new_ones(mask.shape[0], tokens), mask), dim=1)


def initial_ids(config: PromptConfig, vocabulary: int, generator: torch.Generator) -> Tensor:
    """The words that the inits "vocabulary" and "text" begin with, (tokens,)."""
    if config.init == "vocabulary":
        return torch.randint(vocabulary, (config.tokens,), generator=generator)
    outside = [i for i in config.token_ids if not 0 <= i < vocabulary]
    if outside:
        raise ConfigError(f"token_ids holds {outside[0]}; the model's vocabulary ends at {vocabulary - 1}")
    repeats = -(-config.tokens // len(config.token_ids))
    return torch.tensor(config.token_ids * repeats)[: config.tokens]


def reset_encoder(encoder: nn.Module, generator: torch.Generator) -> None:
    """Draws torch's own initialisation of Linear and LSTM, U(-1 / sqrt(n), 1 / sqrt(n)), from `generator`."""
    for layer in encoder.modules():
        if isinstance(layer, nn.Linear | nn.LSTM):
            bound = (layer.hidden_size if isinstance(layer, nn.LSTM) else layer.in_features) ** -0.5
            for parameter in layer.parameters():
                nn.init.uniform_(parameter, -bound, bound, generator=generator)


class PromptSet(nn.Module):
    """One prompt on one model, with the face of an `AdapterSet`. Its state dict holds the encoder too."""

    def __init__(self, parts: TextModel, prompt: Prompt) -> None:
        super().__init__()
        self.parts = parts
        self.prompt = prompt
        self.names = [""]
        self._hooks: list[RemovableHandle] = []

    def items(self) -> Iterator[tuple[str, Prompt]]:
        """("", the prompt): it belongs to the whole model."""
        yield "", self.prompt

    # -- acting on the model ------------------------------------------------------------------

    def attach(self) -> Self:
        """Makes the prompt act. Returns itself; raises ConfigError while another prompt is on."""
        if self._hooks:
            raise RuntimeError("the prompt is attached already")
        if self.enabled:
            self._refuse_second()
        self._hooks = self.prompt.hook(self.parts)
        forget_traces()
        return self

    def detach(self) -> None:
        """Takes the hooks off; the model is again what it was."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        forget_traces()

    def _refuse_second(self) -> None:
        for hook in self.parts.decoder._forward_pre_hooks.values():
            if isinstance(hook, PromptHook) and hook.prompt is not self.prompt and hook.prompt.enabled:
                raise ConfigError("another prompt acts on this model: switch it off, or detach it, first")

    @property
    def enabled(self) -> bool:
        """Whether the prompt acts; switching it on raises ConfigError while another prompt is on."""
        return self.prompt.enabled

    @enabled.setter
    def enabled(self, enabled: bool) -> None:
        if enabled and self._hooks:
            self._refuse_second()
        self.prompt.enabled = enabled

    def set_strength(self, strength: float, blocks: Mapping[str, float] | None = None) -> None:
        """1 switches the prompt on, 0 off; raises ConfigError for another strength, and for `blocks`."""
        if strength not in (0, 1) or blocks:
            raise ConfigError(f"a prompt has strength 0 (off) or 1 (on), for the whole model: not {blocks or strength}")
        self.enabled = strength == 1

    def merge(self) -> NoReturn:
        """Raises ConfigError: a prompt is no change of a weight."""
        raise ConfigError(f"the method '{self.prompt.method}' has no dW, cannot be merged: keep it attached")

    unmerge = merged = merge

    def set_keys(self, keys: Iterable[int]) -> None:
        """Nothing: a prompt has no dropout."""

    def check_used(self, run: Callable[[], Any]) -> None:
        """Calls `run` (one forward pass) and raises ConfigError when the prompt took no part in it."""
        before = self.prompt.calls
        with torch.no_grad():
            run()
        if self.prompt.calls == before:
            raise ConfigError(
                f"a forward pass does not call {type(self.parts.reader).__name__}, so the prompt would not train: "
                "attach it to the model that is run"
            )

    # -- training -----------------------------------------------------------------------------

    def penalty(self) -> None:
        """None: no prompt method has a loss term of its own."""

    def after_step(self, step: int, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Nothing is due after an optimizer step."""

    def parameter_groups(self, lr: float) -> list[dict[str, Any]]:
        """One optimizer group, named for the metrics as in `AdapterSet.parameter_groups`."""
        rate = lr if self.prompt.config.lr is None else self.prompt.config.lr
        name = "lr" if rate == lr else f"lr({rate:g})"
        return [{"params": list(self.prompt.parameters()), "lr": rate, "name": name}]

    # -- files --------------------------------------------------------------------------------

    @torch.no_grad()
    def state(self) -> dict[str, dict[str, Tensor]]:
        """{"": {"prompt_embeddings": (tokens, width)}}: the computed prompt in peft's form, on the CPU."""
        return {"": {"prompt_embeddings": self.prompt().detach().cpu().clone()}}


def attach_prompt(model: nn.Module, config: PromptConfig, seed: int = 0) -> PromptSet:
    """A new prompt in fp32, attached to a transformers model. Freezing the base is the caller's.

    Raises ConfigError for a model that cannot have it, and while another prompt is on.
    """
    parts = TextModel.of(model)
    prompt = PROMPT_METHODS[config.method](parts, config)
    prompt.reset(parts, sample_generator(seed, "prompt"))
    return PromptSet(parts, prompt.to(parts.reader.device)).attach()


def load_prompt(model: nn.Module, method: str, tensors: Mapping[str, Mapping[str, Tensor]]) -> PromptSet:
    """The prompt of a file, attached: `tensors` as in `PromptSet.state`. It has no encoder any more.

    Raises ConfigError for a file without a prompt, and for a prompt that is not as wide as the model needs.
    """
    parts = TextModel.of(model)
    values = tensors.get("", {}).get("prompt_embeddings")
    if values is None:
        raise ConfigError("the file holds no prompt_embeddings, so it is no prompt")
    config = PromptConfig(method, tokens=len(values))
    prompt = PROMPT_METHODS[method](parts, config)
    if values.shape != prompt.embedding.shape:
        raise ConfigError(
            f"the prompt is {tuple(values.shape)}, but '{method}' needs {tuple(prompt.embedding.shape)} on this model. "
            "The file is for another base or method."
        )
    prompt.embedding.data.copy_(values)
    prompt_set = PromptSet(parts, prompt.to(parts.reader.device)).attach()
    prompt_set.eval()
    return prompt_set
