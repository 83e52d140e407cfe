"""Files that are damaged, absurd or meant to harm: refused with the reason, or read correctly, and never run."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import zipfile
from pathlib import Path
from random import Random
from typing import Any

import fuzz_files
import mutations
import pytest
import torch
from fuzz_files import frugal
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from studio.errors import ConfigError
from studio.formats import read_adapter, write_adapter
from studio.formats.describe import describe_adapter
from studio.formats.state import AdapterState

MODULE = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
LAYER = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


def lora(rank: int = 2) -> dict[str, Tensor]:
    """The tensors of a valid kohya file of one layer."""
    generator = torch.Generator().manual_seed(0)
    return {
        f"{MODULE}.lora_down.weight": torch.randn(rank, 16, generator=generator),
        f"{MODULE}.lora_up.weight": torch.randn(16, rank, generator=generator),
        f"{MODULE}.alpha": torch.tensor(1.0),
    }


def state() -> AdapterState:
    """The same as a state."""
    return AdapterState("sd", {LAYER: {key.removeprefix(f"{MODULE}."): tensor for key, tensor in lora().items()}})


def refused(path: Path) -> str:
    """The message with which the file is refused, in little memory."""
    with frugal(path), pytest.raises(ConfigError) as problem:
        read_adapter(path)
    return str(problem.value)


def test_a_thousand_damaged_files_end_well() -> None:
    counts, failures = fuzz_files.fuzz(0, range(1000), share=0.1)
    assert not failures
    assert counts["refused"] > 500 and counts["read"] > 100, "the damage must be worth something"


def test_the_fuzzer_sees_what_it_looks_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader that raises something else, loses a tensor, or takes too much memory, does not pass."""
    path = write_adapter(state(), tmp_path / "file")
    assert fuzz_files.examine(path, Random(0), 1.0) == "read"
    wrong = state()
    wrong.tensors[LAYER]["lora_up.weight"][0, 0] += 1  # type: ignore[index]
    for read in (lambda path: 1 / 0, lambda path: wrong, lambda path: (torch.ones(1 << 23).sum(), state())[1]):
        monkeypatch.setattr(fuzz_files, "read_adapter", read)
        with pytest.raises((ZeroDivisionError, AssertionError)):
            fuzz_files.examine(path, Random(0), 0)


# -- headers ---------------------------------------------------------------------------------


def _entries(**changes: Any) -> mutations.Header:
    """A header of two tensors of 8 bytes, with another value for a field of the second."""
    return [
        (f"{MODULE}.lora_up.weight", {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}),
        (f"{MODULE}.lora_down.weight", {"dtype": "F32", "shape": [2], "data_offsets": [8, 16], **changes}),
    ]


HEADERS: dict[str, tuple[mutations.Header, str]] = {
    "overlapping": (_entries(data_offsets=[4, 12]), "cannot be read"),
    "reversed": (_entries(data_offsets=[16, 8]), "cannot be read"),
    "beyond the end": (_entries(data_offsets=[8, 1 << 40], shape=[1 << 38]), "cannot be read"),
    "giant shape": (_entries(shape=[1 << 62, 1 << 62]), "cannot be read"),
    "negative shape": (_entries(shape=[-2]), "cannot be read"),
    "unknown dtype": (_entries(dtype="F3"), "cannot be read"),
    "twice": ([_entries()[0], _entries()[0], _entries()[1]], f"{MODULE}.lora_up.weight"),
    "empty": ([_entries()[0], ("b", {"dtype": "F32", "shape": [0, 1 << 40], "data_offsets": [8, 8]})], "b (float32)"),
    "no names": ([], "no adapter"),
    "metadata of numbers": ([("__metadata__", {"a": 1}), *_entries()], "cannot be read"),
}


@pytest.mark.parametrize("what", HEADERS)
def test_headers_that_lie(what: str, tmp_path: Path) -> None:
    header, message = HEADERS[what]
    path = tmp_path / "file.safetensors"
    data = bytes(8 if what == "empty" else 0 if what == "no names" else 16)
    path.write_bytes(mutations.whole(header, data))
    assert message in refused(path)


def test_a_name_that_comes_twice_is_refused_where_it_is_valid(tmp_path: Path) -> None:
    """Two entries of one name for the same bytes: safetensors takes the last."""
    path = tmp_path / "file.safetensors"
    entry = _entries()[0]
    again = (entry[0], {**entry[1], "dtype": "I32"})
    path.write_bytes(mutations.whole([entry, again], bytes(8)))
    assert load_file(path)[entry[0]].dtype in (torch.int32, torch.float32)
    assert "twice" in refused(path) and entry[0] in refused(path)


@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 100, -1])
def test_truncated_files(length: int, tmp_path: Path) -> None:
    whole = write_adapter(state(), tmp_path / "whole").read_bytes()
    (tmp_path / "part.safetensors").write_bytes(whole[:length])
    assert "part.safetensors" in refused(tmp_path / "part.safetensors")


@pytest.mark.parametrize("announced", [1 << 25, 1 << 40, (1 << 64) - 1])
def test_absurd_headers(announced: int, tmp_path: Path) -> None:
    path = tmp_path / "file.safetensors"
    path.write_bytes(struct.pack("<Q", announced) + b"{" * 1000)
    assert "header" in refused(path)


def test_more_tensors_and_metadata_than_the_file_can_have(tmp_path: Path) -> None:
    """Both would take many times the file's size in memory once they are parsed."""
    path = tmp_path / "file.safetensors"
    entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    path.write_bytes(mutations.whole([(str(number), entry) for number in range(50_000)], b""))
    assert "too many tensors" in refused(path)
    path.write_bytes(mutations.whole([("__metadata__", {"a": "\U0001f600" * (1 << 20)})], b""))
    assert "header" in refused(path)
    emoji = [("__metadata__", {"a": "\U0001f600" + "x" * (3 << 20)}), *_entries()]
    path.write_bytes(mutations.whole(emoji, bytes(16)))
    assert "malformed" in refused(path)


@pytest.mark.parametrize("ending", [".safetensors", ".pt"])
def test_a_large_file_takes_little_more_than_its_size(ending: str, tmp_path: Path) -> None:
    tensors = {
        f"{MODULE}.lora_down.weight": torch.ones(1 << 9, 1 << 14),
        f"{MODULE}.lora_up.weight": torch.ones(16, 1 << 9),
    }
    path = tmp_path / f"file{ending}"
    (save_file if ending == ".safetensors" else torch.save)(tensors, path)
    del tensors
    with frugal(path):
        assert read_adapter(path).tensors[LAYER]["lora_down.weight"].shape == (1 << 9, 1 << 14)
    os.truncate(path, path.stat().st_size - 5)
    assert "cannot be read" in refused(path) or "no archive" in refused(path) or "archive of tensors" in refused(path)


# -- tensors ---------------------------------------------------------------------------------


def with_tensor(suffix: str, tensor: Tensor) -> dict[str, Tensor]:
    return {**lora(), f"{MODULE}.{suffix}": tensor}


BAD_TENSORS: dict[str, tuple[dict[str, Tensor], str]] = {
    "NaN": (with_tensor("lora_up.weight", torch.full((16, 2), torch.nan)), "not finite (NaN or infinite)"),
    "one infinity": (with_tensor("lora_up.weight", torch.eye(16, 2).log().half()), "take an earlier checkpoint"),
    "NaN alpha": (with_tensor("alpha", torch.tensor(torch.nan)), f"{MODULE}.alpha"),
    "huge alpha": (with_tensor("alpha", torch.tensor(1e30)), "alpha"),
    "two alphas": (with_tensor("alpha", torch.ones(2)), "alpha of the shape (2,)"),
    "integers": (with_tensor("lora_up.weight", torch.ones(16, 2, dtype=torch.int32)), "torch.int32"),
    "truths": (with_tensor("lora_up.weight", torch.ones(16, 2, dtype=torch.bool)), "torch.bool"),
    "complex": (with_tensor("lora_up.weight", torch.ones(16, 2, dtype=torch.complex64)), "complex64"),
    "fp8": (with_tensor("lora_up.weight", torch.ones(16, 2).to(torch.float8_e4m3fn)), "float8_e4m3fn"),
    "other ranks": (with_tensor("lora_up.weight", torch.ones(16, 3)), "different ranks"),
    "a vector": (with_tensor("lora_up.weight", torch.ones(16)), "lora_up.weight has the shape (16,)"),
    "many dimensions": (with_tensor("lora_up.weight", torch.ones(16, 2, *[1] * 60)), "has the shape"),
    "no elements": (with_tensor("lora_up.weight", torch.ones(16, 0)), "are empty"),
    "one factor": ({f"{MODULE}.lora_up.weight": torch.ones(16, 2)}, "lack one of their two factors"),
    "a layer twice": (
        {
            **{f"lora_te_encoder_layers_0_mlp_fc1{key.removeprefix(MODULE)}": one for key, one in lora().items()},
            **{
                f"lora_te_text_model_encoder_layers_0_mlp_fc1{key.removeprefix(MODULE)}": one
                for key, one in lora().items()
            },
        },
        "twice",
    ),
}


@pytest.mark.parametrize("what", BAD_TENSORS)
def test_tensors_that_no_adapter_has(what: str, tmp_path: Path) -> None:
    tensors, message = BAD_TENSORS[what]
    save_file(tensors, tmp_path / "file.safetensors")
    assert message in refused(tmp_path / "file.safetensors")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_every_floating_point_dtype_of_adapters_is_read_as_it_is(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = {key: tensor.to(dtype) for key, tensor in lora().items()}
    save_file(tensors, tmp_path / "file.safetensors")
    entry = read_adapter(tmp_path / "file.safetensors").tensors[LAYER]
    assert all(torch.equal(tensors[f"{MODULE}.{suffix}"], tensor) for suffix, tensor in entry.items())


# -- JSON ------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["[", "[" * 100_000, "null", "[]", '{"unet.r": "x", "unet.lora_alpha": []}', "1e999"])
@pytest.mark.parametrize("key", ["lora_adapter_metadata", "studio.config", "ss_tag_frequency", "ss_network_args"])
def test_metadata_of_garbage(key: str, value: str, tmp_path: Path) -> None:
    """Refused where it decides something, and kept as it is where it does not."""
    path = write_adapter(state(), tmp_path / "file", "diffusers" if key.startswith("lora") else "kohya")
    save_file(load_file(path), path, {key: value})
    try:
        found = read_adapter(path)
    except ConfigError as problem:
        assert key == "lora_adapter_metadata" and ("lora_alpha" in str(problem) or key in str(problem))
    else:
        assert describe_adapter(path)["metadata"] is not None and found.metadata.get(key, value) == value


CONFIGS = [
    *("[]", "null", "[" * 100_000, '{"peft_type": ["LORA"]}', '{"peft_type": "LORA", "lora_alpha": "x"}'),
    *('{"peft_type": "LORA", "lora_alpha": NaN}', '{"peft_type": "LORA", "alpha_pattern": [1]}'),
    *('{"peft_type": "LORA", "alpha_pattern": {"(": 1}}', '{"peft_type": "VERA", "r": 1000000000}'),
    '{"peft_type": "LORA", "alpha_pattern": {"(((([a-z_0-9.]*)*)*)*)!": 3}}',
]


@pytest.mark.parametrize("config", CONFIGS, ids=range(len(CONFIGS)))
def test_peft_configurations_of_garbage(config: str, tmp_path: Path) -> None:
    """Types, numbers that are none, and patterns that would search for ever."""
    path = write_adapter(state(), tmp_path / "folder", "peft")
    (path / "unet" / "adapter_config.json").write_text(config)
    with fuzz_files.limited(5):
        assert "unet" in refused(path) or LAYER in refused(path)


# -- pickles ---------------------------------------------------------------------------------


class Harmful:
    """What runs a command once it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("ending", [".pt", ".bin", ".ckpt", ".pth"])
def test_code_in_a_pickle_never_runs(ending: str, tmp_path: Path) -> None:
    proof = tmp_path / "it-ran"
    for save in (torch.save, lambda tree, path: path.write_bytes(pickle.dumps(tree))):
        path = tmp_path / f"file{ending}"
        save({**lora(), "more": Harmful(proof)}, path)
        refused(path)
    assert not proof.exists()
    pickle.loads(path.read_bytes())
    assert proof.exists(), "the file must be harmful"


@pytest.mark.parametrize("ending", [".pt", ".bin", ".ckpt"])
def test_tensors_in_a_pickle_are_read(ending: str, tmp_path: Path) -> None:
    torch.save({key: nn.Parameter(tensor) for key, tensor in lora().items()}, tmp_path / f"file{ending}")
    entry = read_adapter(tmp_path / f"file{ending}").tensors[LAYER]
    assert all(torch.equal(tensor, state().tensors[LAYER][suffix]) for suffix, tensor in entry.items())
    assert not any(tensor.requires_grad for tensor in entry.values())


def test_a_folder_of_older_peft_is_read(tmp_path: Path) -> None:
    path = write_adapter(state(), tmp_path / "folder", "peft")
    weights = path / "unet" / "adapter_model.safetensors"
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()
    assert torch.equal(read_adapter(path).tensors[LAYER]["lora_up.weight"], state().tensors[LAYER]["lora_up.weight"])


def _archive(program: bytes, compression: int = zipfile.ZIP_STORED, data: bytes = b"") -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", compression) as archive:
        archive.writestr("archive/data.pkl", program)
        archive.writestr("archive/data/0", data)
        archive.writestr("archive/version", b"3\n")
    return content.getvalue()


def _saved(tree: Any, **options: Any) -> bytes:
    content = io.BytesIO()
    torch.save(tree, content, **options)
    return content.getvalue()


_SHARED = {str(number): torch.ones(1) for number in range(300)}
PICKLES: dict[str, tuple[bytes, str]] = {
    "a bomb": (_archive(b"\x80\x02}.", zipfile.ZIP_DEFLATED, bytes(1 << 28)), "unpacks to more"),
    "stretched": (_saved({"a": torch.ones(1).expand(1 << 20, 1 << 20)}), "unpacks to more"),
    "shared": (_saved({str(number): _SHARED for number in range(300)}), "unpacks to more"),
    "views": (_saved({str(n): v for v in [torch.ones(1 << 18)] for n in range(1000)}), "unpacks to more"),
    "many steps": (_archive(b"\x80\x02" + b"]" * (1 << 19) + b"."), "steps"),
    "deep": (_archive(b"\x80\x02" + b"(" * 200_000 + b"t" * 200_000 + b"."), "cannot be read"),
    "a giant": (_archive(b"\x80\x02c__builtin__\nbytearray\nJ\xff\xff\xff\x7f\x85R."), "more than tensors"),
    "a giant tensor": (_archive(b"\x80\x02ctorch\nFloatTensor\nJ\xff\xff\xff\x7f\x85R."), "more than tensors"),
    "a module": (_saved({"string_to_param": nn.ParameterDict({"*": torch.ones(2)})}), "ParameterDict"),
    "before torch 1.6": (_saved(lora(), _use_new_zipfile_serialization=False), "save it as .safetensors"),
    "a list": (_saved([torch.ones(2)]), "a list"),
    "no archive": (b"PK\x05\x06" + bytes(18), "archive of tensors"),
    "nothing": (b"", "cannot be read"),
}


@pytest.mark.parametrize("what", PICKLES)
def test_pickles_that_would_take_the_memory(what: str, tmp_path: Path) -> None:
    content, message = PICKLES[what]
    (tmp_path / "file.pt").write_bytes(content)
    assert message in refused(tmp_path / "file.pt")


def test_other_kinds_of_files_are_refused(tmp_path: Path) -> None:
    for name in ("file.gguf", "file", "file.json"):
        (tmp_path / name).write_text(json.dumps({"a": 1}))
        assert ".safetensors" in refused(tmp_path / name)
