"""Damage to files of tensors: blind bytes, and changes that know what a header, a tensor, JSON or a pickle is.

All of it is decided by the generator given: the same seed, the same file.
"""

from __future__ import annotations

import io
import json
import math
import zipfile
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

Mutation = Callable[[bytes, Random], bytes]
Header = list[tuple[str, Any]]

DTYPES = ("F64", "F32", "F16", "BF16", "I64", "I32", "I8", "U8", "U64", "BOOL", "F8_E4M3", "F8_E5M2", "C64", "F4", "X")
SIZES = (0, 1, 2, 3, 7, 4096, 2**31, 2**40, 2**62, 2**63, 2**64, -1, -(2**40), 0.5, 1e300, None, "4")
JUNK = (
    None,
    True,
    -1,
    0,
    2**70,
    1e308,
    float("nan"),
    "",
    "x",
    "\u20ac\U0001f600",
    [],
    [[]],
    {},
    {"a": {}},
    "(((.*)*)*)*!",
)


def mutated(path: Path, target: Path, random: Random, donors: list[bytes]) -> str:
    """Writes a damaged copy of the file, and says how it was damaged."""
    content = path.read_bytes()
    table = PICKLED if path.suffix in (".pt", ".bin") else JSON if path.suffix == ".json" else SAFETENSORS
    name = random.choice(list(table))
    for _ in range(random.choice((1, 1, 1, 3))):
        content = table[name](content or b"\0", random)
    if random.random() < 0.05:
        name, content = f"{name}, spliced", _spliced(content, random, random.choice(donors))
    target.write_bytes(content)
    return name


# -- bytes -----------------------------------------------------------------------------------


def flipped(content: bytes, random: Random) -> bytes:
    """Some bytes anywhere, most of them in the first kilobytes, where the structure is."""
    changed = bytearray(content)
    for _ in range(random.choice((1, 2, 8, 64))):
        reach = len(changed) if random.random() < 0.5 else min(len(changed), 2048)
        changed[random.randrange(reach)] = random.randrange(256)
    return bytes(changed)


def truncated(content: bytes, random: Random) -> bytes:
    return content[: random.randrange(len(content))]


def lengthened(content: bytes, random: Random) -> bytes:
    return content + random.randbytes(random.choice((1, 8, 1000)))


def cut(content: bytes, random: Random) -> bytes:
    start = random.randrange(len(content))
    return content[:start] + content[start + random.randrange(200) :]


def _spliced(content: bytes, random: Random, donor: bytes) -> bytes:
    start, length = random.randrange(len(donor)), random.randrange(1, 4096)
    place = random.randrange(len(content) + 1)
    part = donor[start : start + length]
    return content[:place] + part + content[place + random.choice((0, len(part))) :]


BYTES: dict[str, Mutation] = {"flipped": flipped, "truncated": truncated, "lengthened": lengthened, "cut": cut}


# -- safetensors -----------------------------------------------------------------------------


def parts(content: bytes) -> tuple[Header, bytes]:
    """(name -> entry in order, the data)."""
    length = int.from_bytes(content[:8], "little")
    return list(json.loads(content[8 : 8 + length]).items()), content[8 + length :]


def whole(header: Header, data: bytes) -> bytes:
    """The inverse of `parts`; names may come twice."""
    text = "{" + ",".join(f"{json.dumps(name)}:{json.dumps(entry)}" for name, entry in header) + "}"
    encoded = text.encode("utf-8", "surrogatepass")
    return len(encoded).to_bytes(8, "little") + encoded + data


def _of_header(edit: Callable[[Header, Random], None]) -> Mutation:
    """A mutation that edits the header; content whose header an earlier one destroyed stays as it is."""

    def mutation(content: bytes, random: Random) -> bytes:
        try:
            header, data = parts(content)
            edit(header, random)
        except (ValueError, KeyError, IndexError, TypeError, AttributeError):
            return content
        return whole(header, data)

    return mutation


def _entry(header: Header, random: Random) -> dict[str, Any]:
    return random.choice([entry for name, entry in header if name != "__metadata__"])


def dtype(header: Header, random: Random) -> None:
    _entry(header, random)["dtype"] = random.choice(DTYPES)


def shape(header: Header, random: Random) -> None:
    sizes = _entry(header, random)["shape"]
    match random.randrange(5):
        case 0:
            sizes.insert(random.randrange(len(sizes) + 1), random.choice(SIZES))
        case 1:
            sizes[random.randrange(len(sizes))] = random.choice(SIZES)
        case 2:  # the same number of values
            sizes.reverse()
        case 3:
            sizes.extend([1] * random.choice((1, 3, 70)))
        case 4:
            sizes[:] = [sizes[0] * sizes[1], *sizes[2:]]


def offsets(header: Header, random: Random) -> None:
    entry = _entry(header, random)
    shift = random.choice((-8, -1, 1, 4, 2**20, 2**63))
    match random.randrange(4):
        case 0:
            entry["data_offsets"] = [place + shift for place in entry["data_offsets"]]
        case 1:
            entry["data_offsets"][1] += shift
        case 2:  # those of another: an overlap
            entry["data_offsets"] = list(_entry(header, random)["data_offsets"])
        case 3:
            entry["data_offsets"].reverse()


def renamed(header: Header, random: Random) -> None:
    place = random.randrange(len(header))
    name, entry = header[place]
    start = random.randrange(len(name))
    letters = random.choice(("", "x", ".", "_0", "\x00", "\ud800", "/../", name, "bundle_emb.", "lora_unet_"))
    header[place] = (name[:start] + letters + name[start + random.randrange(3) :], entry)


def swapped(header: Header, random: Random) -> None:
    """Two tensors under each other's names: all valid, and of other shapes."""
    one, other = random.sample([place for place, (name, _) in enumerate(header) if name != "__metadata__"], 2)
    (first, a), (second, b) = header[one], header[other]
    header[one], header[other] = (first, b), (second, a)


def twice(header: Header, random: Random) -> None:
    name, entry = random.choice(header)
    header.insert(random.randrange(len(header) + 1), (name, dict(entry)))


def described(header: Header, random: Random) -> None:
    """Metadata of other types, of other texts, or as damaged JSON."""
    metadata = dict(header).get("__metadata__", {})
    if header and header[0][0] == "__metadata__":
        header.pop(0)
    key = random.choice([*metadata, *METADATA])
    match random.randrange(5):
        case 0:
            metadata[key] = json.dumps(random.choice(JUNK))
        case 1:
            metadata[key] = random.choice(
                ("[" * 100_000, '{"a":' * 5000, "9" * 5000, "-", "{", "1e999", "\x00", "None")
            )
        case 2:
            metadata[key] = random.choice(JUNK)  # no string: the header is wrong
        case 3:
            metadata[key] = _of_json(metadata.get(key, "{}").encode(), random).decode("utf-8", "replace")
        case 4:
            metadata[key] = random.choice(("sdxl_base_v1-0", "flux1", "medium", "sd_v2", "zzz"))
    header.insert(0, ("__metadata__", metadata))


METADATA = (
    *("lora_adapter_metadata", "studio.config", "studio.blend", "ss_network_args", "ss_tag_frequency"),
    *("ss_base_model_version", "ss_network_dim", "modelspec.thumbnail", "modelspec.trigger_phrase", "ss_output_name"),
    *("modelspec.resolution", "sshs_model_hash", "ss_v2", "format", "name"),
)


def dropped(content: bytes, random: Random) -> bytes:
    """One tensor is not there, and the file is valid."""
    return _rebuilt(content, random, lambda one, data: None)


def recast(content: bytes, random: Random) -> bytes:
    """One tensor of another type and other values, and the file is valid."""
    kind = random.choice(("F64", "F16", "BF16", "I64", "I32", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "C64"))
    size = {"F64": 8, "I64": 8, "C64": 8, "I32": 4, "F16": 2, "BF16": 2}.get(kind, 1)

    def change(entry: dict[str, Any], data: bytes) -> bytes:
        entry["dtype"], values = kind, len(data) // 4
        return bytes(random.choice((0, 1, 60)) for _ in range(values * size))

    return _rebuilt(content, random, change)


def revalued(content: bytes, random: Random) -> bytes:
    """One tensor with values that are not finite, or huge, tiny or zero, and the file is valid."""
    value = random.choice((b"\x00\x00\xc0\x7f", b"\x00\x00\x80\xff", b"\xff\xff\x7f\x7f", b"\x01\0\0\0", bytes(4)))

    def change(entry: dict[str, Any], data: bytes) -> bytes:
        place = random.randrange(0, len(data), 4)
        return value * (len(data) // 4) if random.random() < 0.5 else data[:place] + value + data[place + 4 :]

    return _rebuilt(content, random, change)


def resized(content: bytes, random: Random) -> bytes:
    """One tensor with another size in one dimension, and the file is valid."""

    def change(entry: dict[str, Any], data: bytes) -> bytes:
        sizes = entry["shape"]
        if sizes:
            sizes[random.randrange(len(sizes))] = random.choice((0, 1, 2, 3, 5, 16, 100))
        return bytes(math.prod(sizes) * (8 if entry["dtype"] == "I64" else 4))

    return _rebuilt(content, random, change)


def _rebuilt(content: bytes, random: Random, change: Callable[[dict[str, Any], bytes], bytes | None]) -> bytes:
    """The file with one tensor changed (None: left out) and all offsets as they must be."""
    try:
        header, data = parts(content)
        names = [name for name, _ in header if name != "__metadata__"]
        chosen = random.choice(names)
        made: Header = []
        body = b""
        for name, entry in header:
            if name != "__metadata__":
                own: bytes | None = data[slice(*entry["data_offsets"])]
                if name == chosen:
                    own = change(entry, own or b"")
                if own is None:
                    continue
                entry["data_offsets"] = [len(body), len(body) + len(own)]
                body += own
            made.append((name, entry))
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        return content
    return whole(made, body)


SAFETENSORS: dict[str, Mutation] = {
    **BYTES,
    **{edit.__name__: _of_header(edit) for edit in (dtype, shape, offsets, renamed, swapped, twice, described)},
    **{edit.__name__: edit for edit in (dropped, recast, revalued, resized)},
}


# -- JSON ------------------------------------------------------------------------------------


def _of_json(content: bytes, random: Random) -> bytes:
    """One value, or one name, of an object replaced by junk; other content is flipped."""
    try:
        tree = json.loads(content)
        key = random.choice(list(tree))
        own = tree[key]
    except (ValueError, IndexError, TypeError, KeyError, RecursionError):
        return flipped(content, random) if content else b"{"
    if isinstance(own, dict) and own and random.random() < 0.5:
        tree = {**tree, key: {random.choice([*own, "(((.*)*)*)*!", "(", "x"]): random.choice(JUNK)}}
    elif random.random() < 0.2:
        tree = {name: value for name, value in tree.items() if name != key}
    elif random.random() < 0.2:
        tree = random.choice(JUNK)
    else:
        tree = {**tree, key: random.choice(JUNK)}
    return json.dumps(tree).encode()


JSON: dict[str, Mutation] = {**BYTES, "junk": _of_json}


# -- pickles ---------------------------------------------------------------------------------


def _of_program(content: bytes, random: Random) -> bytes:
    """The archive with a damaged pickle, or other sizes of its records, and valid checksums."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            records = {record.filename: archive.read(record) for record in archive.infolist()}
    except Exception:  # an earlier mutation destroyed it
        return content
    name = random.choice([name for name in records if name.endswith("data.pkl") or "/data/" in name])
    records[name] = random.choice((flipped, cut, truncated, lengthened))(records[name], random) or b"."
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", random.choice((zipfile.ZIP_STORED,) * 4 + (zipfile.ZIP_DEFLATED,))) as archive:
        for name, record in records.items():
            archive.writestr(name, record)
    return out.getvalue()


PICKLED: dict[str, Mutation] = {**BYTES, "program": _of_program, "program again": _of_program}
