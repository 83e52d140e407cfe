"""Tiny random models of many architectures, each with a function that runs it; the real classes, no downloads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tiny
import tiny_text
import torch
from torch import Tensor, nn

Built = tuple[Any, Callable[[Any], Tensor]]


def _random(model: nn.Module, *shape: int) -> Tensor:
    """An input in the model's dtype."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(next(model.parameters()))


def _ids() -> Tensor:
    return torch.randint(1, tiny_text.VOCABULARY - 2, (2, 6), generator=torch.Generator().manual_seed(0))


# -- denoisers --------------------------------------------------------------------------------


def unet() -> Built:
    return tiny.unet(
        "sd15"
    ), lambda model: model(_random(model, 2, 4, 8, 8), torch.tensor([3, 500]), _random(model, 2, 7, 16)).sample


def flux() -> Built:
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=24,
        axes_dims_rope=(4, 4, 8),
    )
    return (
        model,
        lambda model: (
            model(
                hidden_states=_random(model, 2, 16, 4),
                encoder_hidden_states=_random(model, 2, 5, 24),
                pooled_projections=_random(model, 2, 24),
                timestep=torch.tensor([0.3, 0.5]),
                img_ids=_random(model, 16, 3),
                txt_ids=torch.zeros(5, 3),
            ).sample
        ),
    )


def sd3() -> Built:
    from diffusers import SD3Transformer2DModel

    model = SD3Transformer2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_projection_dim=16,
        joint_attention_dim=24,
        pooled_projection_dim=24,
        dual_attention_layers=(0,),
    )
    return (
        model,
        lambda model: (
            model(
                hidden_states=_random(model, 2, 4, 8, 8),
                encoder_hidden_states=_random(model, 2, 5, 24),
                pooled_projections=_random(model, 2, 24),
                timestep=torch.tensor([3, 500]),
            ).sample
        ),
    )


def pixart() -> Built:
    from diffusers import PixArtTransformer2DModel

    model = PixArtTransformer2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        cross_attention_dim=16,
        caption_channels=24,
        use_additional_conditions=False,
    )
    return (
        model,
        lambda model: (
            model(
                _random(model, 2, 4, 8, 8),
                encoder_hidden_states=_random(model, 2, 5, 24),
                timestep=torch.tensor([3, 500]),
                added_cond_kwargs={"resolution": None, "aspect_ratio": None},
            ).sample
        ),
    )


# -- text -------------------------------------------------------------------------------------


def clip() -> Built:
    return tiny.text_encoder(projection=True), lambda model: model(_ids()).text_embeds


def t5_encoder() -> Built:
    from transformers import T5EncoderModel

    return T5EncoderModel(tiny_text.t5().config), lambda model: model(_ids()).last_hidden_state


def text_model(name: str) -> Callable[[], Built]:
    return lambda: (tiny_text.build(name), lambda model: model(**tiny_text.batch(name)).logits)


# -- mixtures of experts ----------------------------------------------------------------------

MIXTURE = {
    "vocab_size": tiny_text.VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_experts_per_tok": 2,
}


def mixtral() -> Built:
    """Experts (E, out, in)."""
    from transformers import MixtralConfig, MixtralForCausalLM

    return MixtralForCausalLM(MixtralConfig(**MIXTURE, num_local_experts=4)), lambda model: model(_ids()).logits


def qwen3_moe() -> Built:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(**MIXTURE, num_experts=4, moe_intermediate_size=8, head_dim=8)
    return Qwen3MoeForCausalLM(config), lambda model: model(_ids()).logits


def gpt_oss() -> Built:
    """Experts (E, in, out), with biases (E, out)."""
    from transformers import GptOssConfig, GptOssForCausalLM

    config = GptOssConfig(**MIXTURE, num_local_experts=4, head_dim=8)
    return GptOssForCausalLM(config), lambda model: model(_ids()).logits


# -- vision -----------------------------------------------------------------------------------


class Encoder(nn.Module):
    """`nn.MultiheadAttention` computes with `in_proj_weight` and `out_proj.weight` itself."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x))


def torch_attention() -> Built:
    return Encoder(), lambda model: model(_random(model, 2, 5, 16))


PICTURE_IDS = torch.tensor([[1, 39, 39, 39, 39, 5, 6], [1, 39, 39, 39, 39, 7, 8]])  # 39: a patch


def llava() -> Built:
    return (
        tiny_text.llava(),
        lambda model: (
            model(
                input_ids=PICTURE_IDS,
                pixel_values=_random(model, 2, 3, 8, 8),
                attention_mask=torch.ones_like(PICTURE_IDS),
            ).logits
        ),
    )


def idefics3() -> Built:
    """SmolVLM's architecture."""
    from transformers import Idefics3Config, Idefics3ForConditionalGeneration

    vision = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 8,
        "patch_size": 2,
    }
    config = Idefics3Config(
        text_config=tiny_text.llama().config, vision_config=vision, image_token_id=39, scale_factor=2
    )
    return (
        Idefics3ForConditionalGeneration(config),
        lambda model: (
            model(
                input_ids=PICTURE_IDS,
                pixel_values=_random(model, 2, 1, 3, 8, 8),
                attention_mask=torch.ones_like(PICTURE_IDS),
            ).logits
        ),
    )


ARCHITECTURES: dict[str, Callable[[], Built]] = {
    "unet": unet,
    "flux": flux,
    "sd3": sd3,
    "pixart": pixart,
    "clip": clip,
    "t5 encoder": t5_encoder,
    "llama": text_model("llama"),
    "gpt2": text_model("gpt2"),
    "t5": text_model("t5"),
    "bert": text_model("bert-cls"),
    "mixtral": mixtral,
    "qwen3 moe": qwen3_moe,
    "gpt-oss": gpt_oss,
    "torch attention": torch_attention,
    "llava": llava,
    "idefics3": idefics3,
}


def build(name: str) -> Built:
    """A frozen model in evaluation mode without a zero in it, and what runs it: (model) -> its output."""
    with torch.random.fork_rng():
        model, run = ARCHITECTURES[name]()
    return tiny.fill(model, 1), run
