"""Damaged adapter files: each ends in a StudioError or in a correct read, in little memory and little time.

    python -m tests.fuzz_files --mutations 10000

takes valid files of every method, format and family, and damages them one at a time (`mutations`). What can
still be read is checked against safetensors' own reading, and then goes everywhere that a file goes: description,
rules of other tools, conversion, blends, a model.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

if __package__:
    sys.path.insert(0, str(Path(__file__).parent))  # the helpers here import each other by their plain names

import mutations
import tiny
import torch
from layers import config_of, randomise
from safetensors.torch import load_file

from studio.adapters import METHODS, AdapterPlan, WeightView, attach_adapters, inject, named_targets
from studio.algebra import combine
from studio.errors import ConfigError, StudioError
from studio.families import FAMILIES
from studio.families.base import Models
from studio.families.loading import load_base
from studio.formats import FORMATS, AdapterState, format_of, read_adapter, write_adapter
from studio.formats.consumers import check_file
from studio.formats.describe import describe_adapter

SECONDS = 20
"""What a file may take at most, all uses of it together."""
SPARE = 16 << 20
"""Bytes that reading may take besides twice the file's size."""
LAYERS = (
    "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
    "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k",
    "unet.down_blocks.0.resnets.0.conv1",
    "unet.down_blocks.0.resnets.0.norm1",
    "text_encoder.text_model.encoder.layers.0.mlp.fc1",
    "text_encoder.text_model.embeddings.token_embedding",
)
TRANSFORMERS = {
    "flux": (
        *(f"transformer.transformer_blocks.0.attn.to_{one}" for one in "qkv"),
        *(
            f"transformer.single_transformer_blocks.1.{one}"
            for one in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
        ),
        "text_encoder.text_model.encoder.layers.0.mlp.fc1",
    ),
    "sd3": tuple(f"transformer.transformer_blocks.0.attn.to_{one}" for one in "qkv"),
}


# -- valid files -----------------------------------------------------------------------------


def corpus(folder: Path) -> list[Path]:
    """Valid files and folders, as small as they can be."""
    found = []
    for name, state in _states().items():
        for format in FORMATS:
            with suppress(ConfigError):
                found.append(write_adapter(state, folder / format / name, format))
    found += _pickles(folder)
    return found


def _states() -> dict[str, AdapterState]:
    metadata = {"ss_output_name": "tiny", "ss_tag_frequency": '{"a": {"ink": 3}}', "modelspec.trigger_phrase": "ink"}
    states = {name: AdapterState("sd", tensors, metadata) for name, tensors in _of_methods().items()}
    generator = torch.Generator().manual_seed(3)
    for family, names in TRANSFORMERS.items():
        tensors = {
            name: {
                "lora_down.weight": torch.randn(2, 8, generator=generator),
                "lora_up.weight": torch.randn(8, 2, generator=generator),
                "alpha": torch.tensor(1.0),
            }
            for name in names
        }
        states[family] = AdapterState(family, tensors, metadata)
    vectors = {"text_encoder": torch.randn(2, 16, generator=generator)}
    both = {**vectors, "text_encoder_2": torch.randn(2, 16, generator=generator)}
    states["ink"] = AdapterState("sd", {}, {}, embeddings={"ink": vectors})
    states["style"] = AdapterState("sdxl", {}, {}, embeddings={"style": both})
    states["bundle"] = AdapterState("sd", states["lora"].tensors, metadata, embeddings={"ink": vectors, "<b>": vectors})
    return states


def _of_methods() -> dict[str, Any]:
    """Method -> the entries of an adapter on those of the tiny base's layers that can have it."""
    family, models = base()
    targets = named_targets(family.prefixes(models))
    found = {}
    for method in METHODS:
        names = []
        for name in LAYERS:
            with suppress(ConfigError):
                METHODS[method].check(targets[name].spec, config_of(method, rank=2))
                names.append(name)
        plan = AdapterPlan(tuple(names), config=config_of(method, rank=2))
        adapters = inject(family.prefixes(models), plan, family.roles)
        randomise(adapters)
        found[method] = adapters.state()
        adapters.detach()
    return found


def _pickles(folder: Path) -> list[Path]:
    """What people have as pickles: A1111's embeddings, diffusers' and sd-scripts', and a LoRA."""
    vectors = torch.randn(2, 16, generator=torch.Generator().manual_seed(4))
    lora = load_file(folder / "kohya" / "lora.safetensors")
    trees = {
        "a1111.pt": {"string_to_token": {"*": 265}, "string_to_param": {"*": vectors}, "name": "a1111", "step": 5},
        "learned.bin": {"<cat>": torch.nn.Parameter(vectors)},
        "kohya.pt": {"emb_params": vectors},
        "lora.pt": lora,
    }
    for name, tree in trees.items():
        torch.save(tree, folder / name)
    return [folder / name for name in trees]


@cache
def base() -> tuple[Any, Models]:
    """The tiny Stable Diffusion, which the files are for."""
    return load_base(str(tiny.folder("sd15")))


@cache
def reference(family: str) -> tuple[Any, Models]:
    """A family and a base of it: the tiny one, or the published one without weights."""
    return base() if family == "sd" else (FAMILIES[family], FAMILIES[family].reference())


# -- one damaged file ------------------------------------------------------------------------


def examine(path: Path, random: Random, share: float) -> str:
    """ "refused" or "read"; raises whatever else a use of the file raises, AssertionError for a wrong read.

    `share` is the probability of each use of a file that can be read.
    """
    try:
        with frugal(path):
            state = read_adapter(path)
            describe_adapter(path)
    except StudioError:
        return "refused"
    check_values(state, path)
    for use in USES:
        if random.random() < share:
            with suppress(StudioError):
                use(state, path, random)
    return "read"


def check_values(state: AdapterState, path: Path) -> None:
    """The state is finite, and has every tensor of the file: written again, they are the same bytes."""
    for entry in (*state.tensors.values(), *state.embeddings.values()):
        assert all(tensor.double().isfinite().all() for tensor in entry.values()), "values that are not finite"
    if path.suffix in (".pt", ".bin"):
        return
    with tempfile.TemporaryDirectory() as folder:
        try:
            again = write_adapter(state, Path(folder) / path.name, format_of(path))
        except StudioError:
            return
        found, given = _by_key(again), _by_key(path)
        assert len(found) >= len(given), f"{len(given) - len(found)} tensors are lost"
        changed = [key for key in found.keys() & given.keys() if found[key] != given[key]]
        assert not changed or _same_changes(again, path), f"other bytes at {changed[:3]}"


def _same_changes(one: Path, other: Path) -> bool:
    """Whether two files have LoRAs of the same dW: ranks that do nothing are cut off where layers are fused."""
    first, second = _changes(one), _changes(other)
    return first.keys() == second.keys() and all(torch.allclose(first[key], second[key]) for key in first)


def _changes(path: Path) -> dict[str, torch.Tensor]:
    """Module -> dW of a LoRA, in kohya's spelling or ComfyUI's."""
    file, found = load_file(path), {}
    for down_name, up_name in ((".lora_down.weight", ".lora_up.weight"), (".lora_A.weight", ".lora_B.weight")):
        for module in [key.removesuffix(down_name) for key in file if key.endswith(down_name)]:
            down, up = file[module + down_name].float(), file[module + up_name].float()
            found[module] = float(file[f"{module}.alpha"]) / len(down) * up @ down
    return found


def _by_key(path: Path) -> dict[str, bytes]:
    """The bytes of each tensor of a file, or of a folder's files."""
    files = sorted(path.rglob("*.safetensors")) if path.is_dir() else [path]
    return {
        f"{file.relative_to(path).parent}/{key}": tensor.flatten().view(torch.uint8).numpy().tobytes()
        for file in files
        for key, tensor in load_file(file).items()
    }


def _convert(state: AdapterState, path: Path, random: Random) -> None:
    with tempfile.TemporaryDirectory() as folder:
        read_adapter(write_adapter(state, Path(folder) / path.name, random.choice(list(FORMATS))))


def _check(state: AdapterState, path: Path, random: Random) -> None:
    check_file(path, *reference(state.family))


def _combine(state: AdapterState, path: Path, random: Random) -> None:
    family, models = base()
    targets = named_targets(family.prefixes(models))
    bases = {name: WeightView(targets[name]) for name in state.tensors if name in targets}
    combine([state, state], [1.0, -0.5], random.choice((None, 1, 3)), random.choice((None, bases)))


def _attach(state: AdapterState, path: Path, random: Random) -> None:
    family, models = base()
    adapters = attach_adapters(family.prefixes(models), state.tensors)
    try:
        tiny.predict(family, models)
    finally:
        adapters.detach()


USES: list[Callable[[AdapterState, Path, Random], None]] = [_convert, _check, _combine, _attach]


@contextmanager
def frugal(path: Path) -> Iterator[None]:
    """Raises AssertionError where the block takes more memory than twice the file's size and `SPARE` bytes."""
    status = Path("/proc/self/status")
    if not status.exists():
        yield
        return
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) or path.stat().st_size
    ctypes.CDLL(None).malloc_trim(0)  # what earlier files left must not hide what this one takes
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = _kilobytes(status, "VmRSS")
    try:
        yield
    finally:  # of a file that is refused too
        taken = (_kilobytes(status, "VmHWM") - before) << 10
        assert taken <= 2 * size + SPARE, f"reading {size} bytes took {taken}"


def _kilobytes(status: Path, field: str) -> int:
    return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(field))


# -- many ------------------------------------------------------------------------------------


def damage(files: list[Path], donors: list[bytes], work: Path, random: Random) -> tuple[Path, str]:
    """A damaged copy of one of the files, and what it is."""
    source = random.choice(files)
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    target = work / source.name
    if source.is_dir():
        shutil.copytree(source, target)
        chosen = random.choice(sorted(file for file in source.rglob("*") if file.is_file()))
    else:
        chosen = source
    place = target / chosen.relative_to(source) if source.is_dir() else target
    how = mutations.mutated(chosen, place, random, donors)
    return target, f"{chosen.parent.name}/{chosen.name}, {how}"


def fuzz(seed: int, numbers: range, share: float = 0.5, keep: Path | None = None) -> tuple[Counter[str], list[str]]:
    """(how many were refused and read, the failures) of the mutations of these numbers.

    Each number is printed to stderr before its turn: where the process dies, the last one did it.
    """
    failures, counts = [], Counter[str]()
    with tempfile.TemporaryDirectory() as folder:
        files = corpus(Path(folder) / "valid")
        donors = [
            file.read_bytes()
            for path in files
            for file in (path.rglob("*") if path.is_dir() else [path])
            if file.is_file()
        ]
        for file in files:
            assert examine(file, Random(0), share=0) == "read", f"{file} is valid"
        for number in numbers:
            print(number, file=sys.stderr, flush=True)
            random = Random(f"{seed} {number}")
            path, what = damage(files, donors, Path(folder) / "damaged", random)
            try:
                with limited():
                    counts[examine(path, random, share)] += 1
            except Exception as problem:
                place = traceback.extract_tb(problem.__traceback__)[-1]
                failures.append(
                    f"{number} ({what}): {type(problem).__name__}: {str(problem)[:200]} [{place.name} {place.lineno}]"
                )
                if keep:
                    shutil.copytree(path.parent, keep / str(number), dirs_exist_ok=True)
    return counts, failures


@contextmanager
def limited(seconds: int = SECONDS) -> Iterator[None]:
    """Raises TimeoutError where the block takes longer."""

    def ring(signal: int, frame: Any) -> None:
        raise TimeoutError(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def main() -> int:
    """Runs the mutations in processes of a thousand, so that one that dies is one failure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mutations", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="the number of the first mutation")
    parser.add_argument("--keep", type=Path, help="a folder for the files that failed")
    given = parser.parse_args()
    if given.mutations <= CHUNK:
        counts, failures = fuzz(given.seed, range(given.first, given.first + given.mutations), keep=given.keep)
        print(json.dumps({"counts": counts, "failures": failures}))
        return bool(failures)
    counts, failures = Counter[str](), []
    for first in range(given.first, given.first + given.mutations, CHUNK):
        command = [sys.executable, "-m", "tests.fuzz_files", "--seed", str(given.seed), "--first", str(first)]
        command += ["--mutations", str(min(CHUNK, given.first + given.mutations - first))]
        command += ["--keep", str(given.keep)] if given.keep else []
        run = subprocess.run(command, capture_output=True, text=True)
        try:
            result = json.loads(run.stdout.splitlines()[-1])
        except (ValueError, IndexError):
            said = [line for line in run.stderr.splitlines() if not line.isdigit()]
            last = next((line for line in reversed(run.stderr.splitlines()) if line.isdigit()), "none")
            result = {"counts": {}, "failures": [f"{last}: the process died ({run.returncode})", *said[-20:]]}
        counts.update(result["counts"])
        failures += result["failures"]
        print(f"{first + CHUNK - given.first}: {dict(counts)}", *result["failures"], sep="\n", flush=True)
    return bool(failures)


CHUNK = 1000

if __name__ == "__main__":
    sys.exit(main())
