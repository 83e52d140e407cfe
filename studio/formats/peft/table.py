"""The methods that PEFT has in a form equal to ours: its type, its tensors' names and its settings, in one table.

A form is equal where both give the same dW from the same tensors; the tests measure it by loading in peft.
PEFT has one configuration for all layers of a component: they must have in common what it cannot say of each.
Where PEFT has no scale, ours goes into a factor: the same dW, and alpha = rank when it is read back.

Methods without a row have no equal form. OFT and BOFT turn the outputs here and in LyCORIS, the inputs in peft;
norms and biases are stored whole there, which takes the base; RoAd's variant and SHiRA's rank are settings that
their tensors alone do not tell; peft knows no MoRA and no Tucker form.
"""

from __future__ import annotations

from studio.formats.peft.forms import (
    C3AForm,
    HiRAForm,
    IA3Form,
    LowRankForm,
    MiSSForm,
    OFTv2Form,
    PeftMethod,
    TokensForm,
)
from studio.formats.peft.lycoris import LoHaForm, LoKrForm
from studio.formats.peft.projected import RandLoRAForm, VeRAForm

LOW_RANK = LowRankForm()
PEFT_METHODS: dict[str, PeftMethod] = {
    "lora": LOW_RANK,
    "dora": LOW_RANK,
    "loha": LoHaForm(),
    "lokr": LoKrForm(),
    "ia3": IA3Form(),
    "oftv2": OFTv2Form(),
    "hira": HiRAForm(),
    "miss": MiSSForm(),
    "c3a": C3AForm(),
    "tokens": TokensForm(),
    "vera": VeRAForm(),
    "randlora": RandLoRAForm(),
}
