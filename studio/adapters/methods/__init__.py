"""The methods, one file each: a new one is a file here and a line below."""

from studio.adapters.methods.adalora import AdaLoRA
from studio.adapters.methods.boft import BOFT
from studio.adapters.methods.c3a import C3A
from studio.adapters.methods.deltalora import DeltaLoRA
from studio.adapters.methods.dora import DoRA
from studio.adapters.methods.full import BiasTuning, Full, NormTuning
from studio.adapters.methods.hira import HiRA
from studio.adapters.methods.ia3 import IA3
from studio.adapters.methods.loha import LoHa
from studio.adapters.methods.lokr import LoKr
from studio.adapters.methods.lora import LoRA
from studio.adapters.methods.miss import MiSS
from studio.adapters.methods.mora import MoRA
from studio.adapters.methods.oft import OFT
from studio.adapters.methods.oftv2 import OFTv2
from studio.adapters.methods.qalora import QALoRA
from studio.adapters.methods.randlora import RandLoRA
from studio.adapters.methods.road import RoAd
from studio.adapters.methods.shira import SHiRA
from studio.adapters.methods.tokens import TrainableTokens
from studio.adapters.methods.tucker import Tucker
from studio.adapters.methods.vera import VeRA
