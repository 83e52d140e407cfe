"""Blending two LoRAs of SDXL's size: `python -m benchmarks.algebra [--quick] [--json FILE]`.

Two files with all 722 layers of SDXL's U-Net that sd-scripts trains, of rank 32 and 64 with random factors, in
fp32, fp16 and bf16, are read and blended into a file of the same dtype: exactly, and to rank 32 by SVD. Each
blend runs in a process of its own, on as many threads as torch takes. Times are the shortest of three; memory is
the peak of resident memory above the start, with the files that are read, over the size of the two files.

peft and kohya form every matrix in full, and would take long: one layer of each shape is measured, and counted
as often as SDXL has it, in fp32. kohya's way is that of `svd_merge_lora.py`: the summed matrices of all layers,
kept at once, then `torch.linalg.svd` of each. Prints JSON; ends with 1 where a target is missed.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.report import end
from studio.seeds import sample_generator

RANKS, WEIGHTS, RANK = (32, 64), [0.7, 0.5], 32
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
GIB = 1 << 30
Shapes = Mapping[str, tuple[int, ...]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    parser.add_argument("--quick", action="store_true", help="every 40th layer, no bounds: does it all run?")
    options = parser.parse_args()
    shapes = sdxl_shapes()
    if options.quick:
        shapes = dict(list(shapes.items())[::40])
    result = {
        "layers": len(shapes),
        "ranks": RANKS,
        "threads": torch.get_num_threads(),
        **ours(shapes),
        **theirs(shapes),
    }
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    bounds = {}
    for name in () if options.quick else DTYPES:
        bounds |= {f"concat_{name}_s": 2, f"svd_{name}_s": 20, f"concat_{name}_memory": 3, f"svd_{name}_memory": 3}
    end(result, at_least={}, at_most=bounds)


def sdxl_shapes() -> Shapes:
    """Layer -> shape of its weight, of what sd-scripts trains without convolutions: all in the transformers."""
    from studio.adapters import named_targets
    from studio.families import FAMILIES

    family = FAMILIES["sdxl"]
    unet = {"unet": family.prefixes(family.reference())["unet"]}
    layers = {name: target for name, target in named_targets(unet).items() if target.spec.kind == "linear"}
    return {name: target.spec.weight_shape for name, target in layers.items() if ".attentions." in name}


# -- ours ------------------------------------------------------------------------------------


def ours(shapes: Shapes) -> dict[str, float]:
    """The figures of the blends by name."""
    figures = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, dtype in DTYPES.items():
            files = [_file(Path(folder), shapes, rank, dtype) for rank in RANKS]
            size = sum(file.stat().st_size for file in files)
            figures[f"files_{name}_gib"] = round(size / GIB, 3)
            stored = None if dtype == torch.float32 else dtype
            cases = {"concat": {"dtype": stored}, "svd": {"rank": RANK, "dtype": stored}}
            if stored is not None:
                cases["concat_to_fp32"] = {}
            for case, settings in cases.items():
                seconds, peak = _in_a_process(_blend, files, settings)
                figures[f"{case}_{name}_s"] = round(seconds, 2)
                figures[f"{case}_{name}_memory"] = round(peak / size, 2)
            for file in files:
                file.unlink()
    return figures


def _file(folder: Path, shapes: Shapes, rank: int, dtype: torch.dtype) -> Path:
    """A kohya file with random factors."""
    from studio.formats import AdapterState, write_adapter

    tensors = {name: _entry(name, shape, rank, dtype) for name, shape in shapes.items()}
    return write_adapter(AdapterState("sdxl", tensors), folder / f"rank-{rank}")


def _entry(name: str, shape: tuple[int, ...], rank: int, dtype: torch.dtype) -> dict[str, Tensor]:
    generator = sample_generator("algebra", name, rank)
    down, up = torch.randn(rank, shape[1], generator=generator), torch.randn(shape[0], rank, generator=generator)
    factors = {"lora_down.weight": down / shape[1] ** 0.5, "lora_up.weight": up / 100}
    return {**{key: factor.to(dtype) for key, factor in factors.items()}, "alpha": torch.tensor(rank / 2)}


def _in_a_process(function: Callable[..., Any], *arguments: Any) -> Any:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def _blend(files: list[Path], settings: Mapping[str, Any]) -> tuple[float, int]:
    """(seconds of the blend, bytes of memory above the start)."""
    import psutil

    from studio.algebra import blend
    from studio.formats import read_adapter

    start = psutil.Process().memory_info().rss
    states = [read_adapter(file) for file in files]
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        blend(states, WEIGHTS, **settings)
        seconds.append(time.perf_counter() - began)
    return min(seconds), _peak() - start


def _peak() -> int:
    """The most resident memory of this process so far, in bytes (Linux; `ru_maxrss` is the parent's there too)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


# -- peft's and kohya's way --------------------------------------------------------------------


@torch.no_grad()
def theirs(shapes: Shapes) -> dict[str, float]:
    """The figures of the other tools' way, in fp32, from one layer of each shape."""
    ways = {"peft_svd_s": _peft_svd, "peft_concat_s": _peft_concat, "kohya_svd_s": _kohya}
    totals = dict.fromkeys(ways, 0.0)
    for shape, count in Counter(shapes.values()).items():
        entries = [_entry("layer", shape, rank, torch.float32) for rank in RANKS]
        for name, way in ways.items():
            totals[name] += count * way(shape, entries)
    full = sum(4 * shape[0] * shape[1] for shape in shapes.values()) / GIB
    return {**{name: round(total, 1) for name, total in totals.items()}, "kohya_full_matrices_gib": round(full, 2)}


def _peft_svd(shape: tuple[int, ...], entries: list[dict[str, Tensor]]) -> float:
    return _with_peft(shape, entries, combination_type="svd", svd_rank=RANK)


def _peft_concat(shape: tuple[int, ...], entries: list[dict[str, Tensor]]) -> float:
    return _with_peft(shape, entries, combination_type="cat")


def _with_peft(shape: tuple[int, ...], entries: list[dict[str, Tensor]], **settings: Any) -> float:
    from peft import LoraConfig, get_peft_model

    configs = [LoraConfig(r=rank, lora_alpha=rank // 2, target_modules=["0"]) for rank in RANKS]
    model = get_peft_model(nn.Sequential(nn.Linear(shape[1], shape[0], bias=False)), configs[0], "0")
    model.add_adapter("1", configs[1])
    for name, entry in zip(("0", "1"), entries, strict=True):
        layer = model.base_model.model[0]
        layer.lora_A[name].weight.copy_(entry["lora_down.weight"])
        layer.lora_B[name].weight.copy_(entry["lora_up.weight"])
    began = time.perf_counter()
    model.add_weighted_adapter(["0", "1"], WEIGHTS, "sum", **settings)
    return time.perf_counter() - began


def _kohya(shape: tuple[int, ...], entries: list[dict[str, Tensor]]) -> float:
    began = time.perf_counter()
    total = torch.zeros(shape)
    for entry, weight in zip(entries, WEIGHTS, strict=True):
        up, down = entry["lora_up.weight"], entry["lora_down.weight"]
        total = total + weight * (up @ down) * (entry["alpha"] / len(down))
    up, values, down = torch.linalg.svd(total)
    _ = up[:, :RANK] @ torch.diag(values[:RANK]), down[:RANK]
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
