"""Weight files of other projects, and checkpoints of our own format."""

from __future__ import annotations

import io
import json
import os
import pickle
import pickletools
import struct
import zipfile
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from safetensors.torch import save as save_safetensors

from fastssl.nn.encoder import build_encoder
from tests.faults.hostile import ESCAPE, EVALUATE, EXPORT, Call, Kind, Payload, Place, Trial, npz, object_npy, tar
from tests.shard_tools.builders import plant


def small_state() -> dict[str, torch.Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build_encoder("resnet10", "small", 0.25).state_dict()


def weights(place: Place) -> Kind:
    """Weight files of other projects, given to fastssl-export and fastssl-evaluate."""
    state = small_state()
    files: dict[str, bytes] = {
        "zip: code.pt": torch_file(Payload(place.shell)),
        "zip: code beside tensors.pth.tar": torch_file({"state_dict": state, "epoch": Payload(place.shell)}),
        "zip: eval.pt": torch_file(Call(eval, place.python)),
        "zip: exec.pt": torch_file(Call(exec, place.python)),
        "zip: a numpy scalar.pt": torch_file({"state_dict": state, "best": np.float64(1)}),
        "zip: a numpy array of objects.pt": torch_file({"a": np.array([Payload(place.shell)], dtype=object)}),
        "zip: torch.load inside.pt": torch_file(Call(torch.load, "x")),
        "zip: a module.pt": torch_file(torch.nn.Linear(1, 1)),
        "legacy: code.pt": legacy_file(Payload(place.shell)),
        "legacy: code beside tensors.pth": legacy_file({"state_dict": state, "epoch": Payload(place.shell)}),
        "legacy: 10^12 numbers.pt": legacy_claim(10**12),
        "legacy: 10^9 numbers.pt": legacy_claim(10**9),
        "legacy: 10^8 numbers.pt": legacy_claim(10**8),
        "a tar of old torch.pth.tar": old_torch_tar(place),
        "plain pickle.pth": pickle.dumps(Payload(place.shell)),
        "plain pickle.pkl": pickle.dumps(Payload(place.shell)),
        "pickle of protocol 0.pt": pickle.dumps(Payload(place.shell), protocol=0),
        "joblib-like.pt": zlib.compress(pickle.dumps(Payload(place.shell))),
        "npz.pt": npz(place.shell),
        "npy.pt": object_npy(place.shell),
        "zip bomb.pt": zip_bomb({"state_dict": state}),
        "zip of 20,000 members.pt": zip_of_many(),
        "zip with overlapping members.pt": overlapping_zip({"state_dict": state}),
        "TorchScript.pt": script_file(place.python),
        "tensor repeated 10^9 times.pt": torch_file(
            {"conv1.weight": torch.zeros(1).expand(64, 3, 7, 7), "layer1.0.conv1.weight": torch.zeros(1).expand(10**9)}
        ),
        "tensor of 10^12.pt": torch_file({**state, "layer1.0.conv1.weight": torch.zeros(1).expand(10**6, 10**6, 1, 1)}),
        "width 10^6.pt": torch_file({**state, "conv1.weight": torch.zeros(1).expand(64 * 10**6, 3, 3, 3)}),
        "10^9 channels.pt": torch_file({**state, "conv1.weight": torch.zeros(1).expand(16, 10**9, 3, 3)}),
        "deep nest.pt": torch_file(_nested(400, state)),
        "10^5 names.pt": torch_file({"state_dict": {f"x{i}": torch.zeros(()) for i in range(3000)}}),
        "names of control characters.pt": torch_file(
            {"state_dict": {f"{ESCAPE}{i}": torch.zeros(1) for i in range(3)}}
        ),
        "names of numbers.pt": torch_file({"state_dict": {7: torch.zeros(1), (1, 2): torch.zeros(1)}}),
        "complex tensors.pt": torch_file(
            {k: v.to(torch.complex64) if v.is_floating_point() else v for k, v in state.items()}
        ),
        "sparse tensors.pt": torch_file({"conv1.weight": torch.eye(3).to_sparse()}),
        "a list.pt": torch_file([1, 2]),
        "empty.pt": b"",
        "text.pt": place.python.encode(),
        "safetensors: 10^12 bytes of header.safetensors": struct.pack("<Q", 10**12) + b"{}",
        "safetensors: 2^64 bytes of header.safetensors": b"\xff" * 8 + b"{}",
        "safetensors: overlapping.safetensors": safe({"a": _span(0, 8), "b": _span(4, 12)}, 12),
        "safetensors: beyond the end.safetensors": safe({"a": _span(0, 4 * 10**12)}, 8),
        "safetensors: backwards.safetensors": safe({"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}}, 8),
        "safetensors: negative.safetensors": safe({"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}, 8),
        "safetensors: shape overflows.safetensors": safe(
            {"a": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 8]}}, 8
        ),
        "safetensors: unknown type.safetensors": safe(
            {"a": {"dtype": place.python, "shape": [2], "data_offsets": [0, 8]}}, 8
        ),
        "safetensors: not JSON.safetensors": struct.pack("<Q", 64) + place.python.encode()[:64].ljust(64),
        "safetensors: deep.safetensors": struct.pack("<Q", 10**6) + b"[" * 10**6,
        "safetensors: a pickle.safetensors": pickle.dumps(Payload(place.shell)),
        "safetensors: empty.safetensors": b"",
        **{
            f"safetensors: note {name}.safetensors": save_safetensors(dict(state), {"fastssl_encoder": note})
            for name, note in _notes(place).items()
        },
    }
    hostile = []
    for number, (name, content) in enumerate(files.items()):
        folder = plant(place.root / f"{number}", {name: content})
        may = name.startswith(("names of numbers", "10^5 names"))
        out = str(place.out / f"{number}.safetensors")
        hostile.append(Trial(name, EXPORT, ("safetensors", str(folder / name), out), may))
    dcp = place.folder("dcp")
    plant(dcp, {".metadata": pickle.dumps(Payload(place.shell)), "__0_0.distcp": bytes(100)})
    hostile.append(
        Trial("folder of torch.distributed.checkpoint", EXPORT, ("torchvision", str(dcp), str(place.out / "dcp.pth")))
    )
    shards = ("data.root=nowhere",)
    hostile.append(Trial("the same, evaluated", EVALUATE, (f"checkpoint={dcp}", *shards, "evaluator=knn")))
    hub = plant(
        place.root / "hub",
        {"model.safetensors": b"", "config.json": place.python.encode(), "modeling.py": place.python.encode()},
    )
    hostile.append(Trial("folder of the hub with code", EXPORT, ("timm", str(hub), str(place.out / "hub"))))
    with (place.root / "zeros.pt").open("wb") as file:
        file.truncate(2**40)
    hostile.append(
        Trial(
            "1 TiB of zeros.pt", EXPORT, ("safetensors", str(place.root / "zeros.pt"), str(place.out / "z.safetensors"))
        )
    )
    with (place.root / "zeros.safetensors").open("wb") as file:
        file.truncate(2**40)
    hostile.append(
        Trial(
            "1 TiB of zeros.safetensors",
            EXPORT,
            ("safetensors", str(place.root / "zeros.safetensors"), str(place.out / "z.safetensors")),
        )
    )
    os.mkfifo(place.root / "pipe.pt")
    hostile.append(
        Trial("a fifo.pt", EXPORT, ("safetensors", str(place.root / "pipe.pt"), str(place.out / "z.safetensors")))
    )
    (place.root / "honest.pt").write_bytes(torch_file({"state_dict": state}))
    honest = ("safetensors", str(place.root / "honest.pt"), str(place.out / "honest.safetensors"), "--overwrite")
    return Kind(Trial("honest", EXPORT, honest), hostile, cpu_s=0.5)  # names of timm's thousand models are compared


def _nested(levels: int, inner: Any) -> Any:
    for _ in range(levels):
        inner = {"model": inner}
    return inner


def _notes(place: Place) -> dict[str, str]:
    return {
        "code": place.python,
        "deep": "[" * 100_000,
        "not a group": "[1]",
        "NaN": '{"width": NaN}',
        "width 10^18": '{"name": "resnet10", "width": 1e18}',
        "width 10^4": '{"name": "resnet10", "width": 1e4}',
        "channels 10^12": '{"name": "resnet10", "channels": 1000000000000}',
        "conv": '{"name": "conv", "conv": {"side": 1000000, "layers": [[1000000, 3, 1]], "features": 1000000}}',
        "hub": '{"name": "timm/hf-hub:a/b"}',
        "file": f'{{"name": "timm/{place.canary}"}}',
        "target": '{"_target_": "os.system"}',
        "digits": '{"width": ' + "9" * 10**6 + "}",
    }


def torch_file(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def legacy_file(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


def legacy_claim(numbers: int) -> bytes:
    """torch.save's old format, whose pickle names a storage of so many floats in a file of a kilobyte."""
    buffer = io.BytesIO()
    torch.save({"conv1.weight": torch.zeros(16)}, buffer, _use_new_zipfile_serialization=False)
    content = buffer.getvalue()
    claim = pickle.dumps(numbers, protocol=2)[2:-1]
    at = content.index(b"K\x10Nt")  # BININT1 16, None, TUPLE: the end of the persistent id
    return content[:at] + claim + content[at + 2 :]


def old_torch_tar(place: Place) -> bytes:
    """The format before 0.1.10: a tar that torch would unpack to a temporary folder."""
    code = pickle.dumps(Payload(place.shell))
    return tar([("storages", code), ("tensors", code), ("pickle", code), ("../../canary", b"x")])


def zip_bomb(value: Any) -> bytes:
    """A file of torch.save with one storage more, 200 MB of zeros, compressed; a tensor refers to it."""
    source = zipfile.ZipFile(io.BytesIO(torch_file({**value, "x": torch.zeros(1000)})))
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as target:
        for info in source.infolist():
            content = source.read(info)
            if len(content) == 4000:
                target.writestr(info.filename, bytes(2 * 10**8), zipfile.ZIP_DEFLATED, 1)
            else:
                target.writestr(info.filename, content)
    return buffer.getvalue()


def zip_of_many() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as target:
        for number in range(20_000):
            target.writestr(f"archive/data/{number}", b"")
    return buffer.getvalue()


def overlapping_zip(value: Any) -> bytes:
    """All members of the directory point to the first one's bytes, each as a storage of the whole file."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as target:
        target.writestr("archive/data.pkl", pickletools.optimize(pickle.dumps({})))
        target.writestr("archive/data/0", bytes(10**6))
        first = target.getinfo("archive/data/0")
        for number in range(1, 500):
            copy = zipfile.ZipInfo(f"archive/data/{number}")
            copy.header_offset, copy.file_size, copy.compress_size, copy.CRC = (
                first.header_offset,
                10**6,
                10**6,
                first.CRC,
            )
            target.filelist.append(copy)
    return buffer.getvalue()


def script_file(code: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as target:
        target.writestr("archive/data.pkl", pickle.dumps({}))
        target.writestr("archive/constants.pkl", pickle.dumps(()))
        target.writestr("archive/code/__torch__.py", code)
        target.writestr("archive/version", "3\n")
    return buffer.getvalue()


def _span(first: int, last: int) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [(last - first) // 4], "data_offsets": [first, last]}


def safe(head: dict[str, Any], num_bytes: int) -> bytes:
    text = json.dumps(head).encode()
    return struct.pack("<Q", len(text)) + text + bytes(num_bytes)


def checkpoints(place: Place) -> Kind:
    """Checkpoint folders in our own format, from someone else; the hashes are right, as an attacker would have them."""
    good = {
        "encoder": {"name": "resnet10", "stem": "small", "width": 0.25, "channels": 3, "conv": None},
        "data": {"root": "x", "split": "train", "mean": [0.5] * 3, "std": [0.5] * 3},
        "views": {"q": {"size": 32}},
    }
    model = torch_file({f"backbone.{k}": v for k, v in small_state().items()})
    rest = {"training.pt": torch_file({}), "rank-0.pt": torch_file({})}
    meta = {"format": 1, "step": 3, "world": 1, "backbone_prefix": "backbone.", "config": good}
    encoders: dict[str, Any] = {
        "_target_": {"_target_": "os.system"},
        "a list": [1],
        "text": place.python,
        "null": None,
        "more keys": {**good["encoder"], "x": 1},
        "width 10^18": {**good["encoder"], "width": 1e18},
        "width 10^4": {**good["encoder"], "width": 1e4},
        "width NaN": {**good["encoder"], "width": float("nan")},
        "channels 10^12": {**good["encoder"], "channels": 10**12},
        "name a path": {**good["encoder"], "name": f"timm/{place.canary}"},
        "name of the hub": {"name": "timm/hf-hub:a/b"},
        "name of control characters": {**good["encoder"], "name": ESCAPE},
        "name a list": {**good["encoder"], "name": []},
    }
    metas: dict[str, Any] = {f"encoder {k}": {**meta, "config": {**good, "encoder": v}} for k, v in encoders.items()}
    metas |= {
        "config text": {**meta, "config": place.python},
        "config a list": {**meta, "config": []},
        "no config": {k: v for k, v in meta.items() if k != "config"},
        "step text": {**meta, "step": ESCAPE},
        "step a list": {**meta, "step": []},
        "prefix a number": {**meta, "backbone_prefix": 7},
        "data a list": {**meta, "config": {**good, "data": []}},
        "mean of text": {**meta, "config": {**good, "data": {**good["data"], "mean": "abc"}}},
        "mean of a million": {**meta, "config": {**good, "data": {**good["data"], "mean": [0.0] * 10**6}}},
        "std zero": {**meta, "config": {**good, "data": {**good["data"], "std": [0, 0, 0]}}},
        "views a list": {**meta, "config": {**good, "views": [7]}},
        "view of 10^9 px": {**meta, "config": {**good, "views": {"q": {"size": 10**9}}}},
        "views text": {**meta, "config": {**good, "views": {"q": ESCAPE}}},
        "a list": [1, 2],
        "a number": 7,
        "format text": {**meta, "format": ESCAPE},
    }
    texts = {name: json.dumps(value) for name, value in metas.items()}
    texts |= {
        "deep": "[" * 10**6,
        "10^6 digits": '{"format": ' + "9" * 10**6 + "}",
        "code": place.python,
        "doubled keys": '{"format":1,"format":1}',
        "YAML": f"!!python/object/apply:os.system ['{place.shell}']",
    }
    hostile = []

    def add(name: str, files: Mapping[str, bytes], may: bool = False) -> None:
        run = place.root / f"run-{len(hostile)}"
        plant(run / "checkpoints/step-00000003", files)
        (run / "checkpoints/LAST").write_text("step-00000003\n")
        out = str(place.out / f"{run.name}.safetensors")
        hostile.append(Trial(name, EXPORT, ("safetensors", str(run), out), may))

    for name, text in texts.items():
        add(
            f"meta.json: {name}",
            summed({"model.pt": model, **rest, "meta.json": text.encode()}),
            name
            in (
                "std zero",
                "step a list",
                "step text",
                "mean of a million",
                "mean of text",
                "view of 10^9 px",
                "encoder more keys",
            ),
        )
    payloads = {
        "code": torch_file(Payload(place.shell)),
        "legacy code": legacy_file(Payload(place.shell)),
        "pickle": pickle.dumps(Payload(place.shell)),
        "zip bomb": zip_bomb({}),
        "10^12 numbers": legacy_claim(10**12),
        "10^8 numbers": legacy_claim(10**8),
        "text": place.python.encode(),
        "empty": b"",
        "a list": torch_file([1]),
        "a repeated tensor": torch_file({"backbone.conv1.weight": torch.zeros(1).expand(10**9)}),
        "numbers": torch_file({"backbone.conv1.weight": 7}),
        "names of numbers": torch_file({7: 8}),
    }
    honest_meta = json.dumps(meta).encode()
    for name, content in payloads.items():
        add(f"model.pt: {name}", summed({"model.pt": content, **rest, "meta.json": honest_meta}))
    whole = summed({"model.pt": model, **rest, "meta.json": honest_meta})
    sums = whole["SHA256SUMS"]
    for name, content in {
        "above": sums + b"0" * 64 + b"  ../../../../canary\n",
        "absolute": sums + b"0" * 64 + f"  {place.canary}\n".encode(),
        "device": sums + b"0" * 64 + b"  /dev/zero\n",
        "control characters": sums + b"0" * 64 + f"  {ESCAPE}\n".encode(),
        "not UTF-8": sums + b"\xff\xfe",
        "empty": b"",
        "10^5 names": sums + (b"0" * 64 + b"  x\n") * 10**5,
        "a pickle": pickle.dumps(Payload(place.shell)),
        "zero byte": sums + b"0" * 64 + b"  a\0b\n",
    }.items():
        add(f"SHA256SUMS: {name}", {**whole, "SHA256SUMS": content})
    for name in ("meta.json", "model.pt", "SHA256SUMS"):
        add(f"{name} of 1 TiB of zeros", whole)
        with next(place.root.glob(f"run-{len(hostile) - 1}/checkpoints/*/{name}")).open("wb") as file:
            file.truncate(2**40)
    add("LAST leads away", whole, may=True)
    last = place.root / f"run-{len(hostile) - 1}/checkpoints/LAST"
    last.write_text("../../../canary\n")
    honest = place.root / "honest"
    plant(honest / "checkpoints/step-00000003", whole)
    honest_arguments = ("safetensors", str(honest), str(place.out / "ours.safetensors"), "--overwrite")
    return Kind(Trial("honest", EXPORT, honest_arguments), hostile, cpu_s=0.5)


def summed(files: Mapping[str, bytes]) -> dict[str, bytes]:
    import hashlib

    sums = "".join(f"{hashlib.sha256(content).hexdigest()}  {name}\n" for name, content in sorted(files.items()))
    return {**files, "SHA256SUMS": sums.encode()}
