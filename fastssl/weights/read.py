"""Backbones out of the files that other projects publish: which layout a file has is seen from its keys.

    MoCo v1, v2, CLSA, Un-Mix on MoCo       state_dict > module.encoder_q.*   without encoder_k, queue, fc
    MoCo's and Un-Mix's code for CIFAR      state_dict > encoder_q.net.N.*    N counts the children of a ResNet
    SwAV, Un-Mix on SwAV, DeepCluster-v2    module.*, flat or in state_dict   without projection_head, prototypes
    VISSL                                   classy_state_dict > base_model > model > trunk > _feature_blocks.*
    solo-learn, lightly                     state_dict > backbone.*           names or numbers
    torchvision, timm                       plain names

A prefix is stripped from the front of a key, never out of its middle. Every tensor of the backbone must be in the file,
in its shape: a backbone with a random layer still evaluates, only badly. Nothing here unpickles objects, and nothing is
made larger than the file: no member of a zip may be compressed, no tensor repeat its numbers, and an encoder is built
only when the file's tensors have its shapes.
"""

from __future__ import annotations

import dataclasses
import json
import pickle
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck

from fastssl.checkpoint_files import is_uncompressed
from fastssl.config import convert
from fastssl.nn.encoder import RESNETS, build_encoder
from fastssl.settings import EncoderConfig

NESTS = ("classy_state_dict", "base_model", "trunk", "state_dict", "model_state", "model_state_dict", "model")
WRAPPERS = (
    "module.", "_orig_mod.", "encoder_q.", "backbone.", "trunk.", "_feature_blocks.", "encoder.", "net.", "model.",
)  # fmt: skip
# What a ResNet's children with parameters are called, in their order; nn.Sequential gives them numbers instead.
CHILDREN = ("conv1", "bn1", "layer1", "layer2", "layer3", "layer4", "fc")
MAX_NESTS, MAX_WRAPPERS = 8, 16  # VISSL's files have 4 nests; the deepest of known wrappers are 3
COUNTER = "num_batches_tracked"  # of no use to a momentum of batch norm that is set; old files do not have it


class WeightsError(ValueError):
    """A file without a backbone that fits; the message says what it holds and what to do."""


@dataclass(frozen=True)
class Weights:
    """tensors by torchvision's or timm's names, float32; layout such as "MoCo, state_dict > module.encoder_q.*".

    left_out    keys of the file that are no part of its backbone: heads, the key encoder, the queue
    encoder     as far as keys and shapes, or our own note in the file, tell it
    caution     a sentence on what the file cannot tell, or ""
    """

    tensors: dict[str, Tensor]
    layout: str
    left_out: tuple[str, ...]
    encoder: EncoderConfig | None
    caution: str = ""


def load_backbone(path: Path, encoder: EncoderConfig | None = None) -> tuple[nn.Module, EncoderConfig, Weights]:
    """The backbone of a published file, on the CPU, in eval mode.

    encoder     None: as the file's shapes tell, which they do for ResNets
    Raises WeightsError if there is none, or if it is not that encoder.
    """
    weights = read(path, _shapes_of(encoder, path) if encoder else ())
    encoder = _agreed(path, encoder, weights.encoder)
    _check(path, weights, _shapes_of(encoder, path), encoder)
    backbone = build_encoder(**dataclasses.asdict(encoder))
    own = backbone.state_dict()
    backbone.load_state_dict({**own, **weights.tensors})  # `own` for counters that the file may lack
    return backbone.eval(), encoder, weights


def read(path: Path, expected: Collection[str] = ()) -> Weights:
    """What a file holds of a backbone, by the backbone's own names.

    expected    those names, if they are known: needed for anything but ResNets
    Raises WeightsError if the file cannot be read, or holds no tensors.
    """
    content, note = _content(path)
    expected = _shapes_of(note, path) if note else expected
    nests, tensors = _descend(path, content)
    names = {key: key for key in tensors}  # the name that is left after stripping -> the key of the file
    wrappers: list[str] = []
    while not _plain(names, expected):
        numbered = _named_by_position(names)
        if numbered:
            names = numbered
            continue
        wrapper = next((w for w in WRAPPERS if any(name.startswith(w) for name in names)), None)
        if wrapper is None:
            break
        wrappers.append(wrapper)
        if len(wrappers) > MAX_WRAPPERS:
            raise WeightsError(f"{path} has names in more than {MAX_WRAPPERS} wrappers; save the model's state_dict")
        names = {name.removeprefix(wrapper): key for name, key in names.items() if name.startswith(wrapper)}
    encoder = note or _encoder(names, tensors)
    own = _own_names(names, expected or (_shapes_of(encoder, path) if encoder else ()))
    return Weights(
        tensors={own_name: _float32(tensors[key]) for own_name, key in own.items()},
        layout="fastssl" if note else _layout(tensors, nests, wrappers),
        left_out=tuple(sorted(set(tensors) - set(own.values()))),
        encoder=encoder,
        caution=_caution(names, wrappers, encoder),
    )


def _content(path: Path) -> tuple[Mapping[str, Any], EncoderConfig | None]:
    """The file as it is, and the encoder that our own export notes in a .safetensors file."""
    if not path.is_file():
        raise WeightsError(f"there is no file {path}; give a weight file, a run, or a checkpoint folder")
    if path.suffix == ".safetensors":
        return _safetensors(path)
    if path.suffix == ".pkl":
        raise WeightsError(f"{path} is a pickle, which can run code when read; give the file that it was made from")
    with path.open("rb") as file:
        if not is_uncompressed(file):
            raise WeightsError(f"{path} is a compressed zip, as no file of torch.save is; fetch it again")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise WeightsError(_refused(path, str(error))) from error
    except Exception as error:  # whatever a damaged or forged pickle makes torch's reader hit
        raise WeightsError(f"{path} is damaged or not a file of torch.save; fetch it again") from error
    if not isinstance(content, Mapping):
        raise WeightsError(f"{path} holds a {type(content).__name__} instead of tensors by name; save a state_dict")
    return content, None


def _safetensors(path: Path) -> tuple[Mapping[str, Any], EncoderConfig | None]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            note = (file.metadata() or {}).get("fastssl_encoder")
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118, it is no mapping
    except (SafetensorError, OSError, OverflowError, MemoryError) as error:
        raise WeightsError(f"{path} is damaged or not a safetensors file; fetch it again") from error
    return tensors, _noted(path, note) if note else None


def _noted(path: Path, note: str) -> EncoderConfig:
    try:
        document = json.loads(note)
    except (ValueError, RecursionError):
        document = None
    if not isinstance(document, dict):
        raise WeightsError(f"the note on the encoder in {path} is damaged; fetch it again")
    return convert(EncoderConfig, document, "encoder")


def _refused(path: Path, error: str) -> str:
    found = re.search(r"GLOBAL (\S+)", error)
    if not found:
        return f"{path} is damaged or not a file of torch.save; fetch it again"
    return (
        f"{path} holds Python objects ({found[1]}), which are not loaded because they can run code; if you trust its "
        f"source, write its tensors to another file once: "
        f"""python -c "import torch; f = torch.load('{path.name}', 'cpu', weights_only=False); """
        f"""torch.save(f.get('state_dict', f), 'tensors.pth')\""""
    )


def _descend(path: Path, content: Mapping[str, Any]) -> tuple[list[str], dict[str, Tensor]]:
    """Keys on the way to the state_dict, and its tensors; in a checkpoint it stands beside other things."""
    node, nests = content, []
    while nest := next((key for key in NESTS if isinstance(node.get(key), Mapping)), None):
        node = node[nest]
        nests.append(nest)
        if len(nests) > MAX_NESTS:  # a pickle may hold itself
            raise WeightsError(
                f"{path} holds its tensors more than {MAX_NESTS} levels deep; save the model's state_dict"
            )
    tensors = {key: value for key, value in node.items() if isinstance(key, str) and isinstance(value, Tensor)}
    for key, value in tensors.items():
        if value.layout != torch.strided or value.is_quantized or value.is_complex():
            raise WeightsError(f"{path}: {key[:80]!r} is no plain tensor of real numbers; save the model's state_dict")
    if not tensors:
        found = ", ".join(repr(key)[:80] for key in list(content)[:8]) or "nothing"
        raise WeightsError(
            f"{path} holds no tensors where they are looked for; at its top are {found}; save the model's state_dict"
        )
    return nests, tensors


def _float32(tensor: Tensor) -> Tensor:
    """Halves and doubles as float32; what repeats its numbers, which `_check` refuses, as it is: it may claim 10^12."""
    if not tensor.is_floating_point() or _num_bytes(tensor) > tensor.untyped_storage().nbytes():
        return tensor
    return tensor.float().contiguous()


def _num_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _plain(names: Collection[str], expected: Collection[str]) -> bool:
    """Whether nothing is left to strip."""
    if expected:
        return all(name in names for name in expected if not name.endswith(COUNTER))
    return "conv1.weight" in names


def _named_by_position(names: Mapping[str, str]) -> dict[str, str]:
    """Names of a ResNet whose children are numbered, or {} if they are not.

    Numbers differ: a ReLU and a max-pool count too, where they are children. The order does not.
    """
    numbers = sorted({int(head) for head in (name.partition(".")[0] for name in names) if head.isdecimal()})
    if not 6 <= len(numbers) <= len(CHILDREN):
        return {}
    called = dict(zip(map(str, numbers), CHILDREN))
    found = {}
    for name, key in names.items():
        head, _, rest = name.partition(".")
        parts = ["downsample" if part == "shortcut" else part for part in rest.split(".")]
        found[".".join([called.get(head, head), *parts])] = key
    return found if "conv1.weight" in found else {}


def _own_names(names: Mapping[str, str], expected: Collection[str]) -> dict[str, str]:
    """Those of the backbone, and whatever else stands inside its modules, which then does not fit."""
    modules = {name.partition(".")[0] for name in expected}
    return {name: key for name, key in names.items() if not modules or name.partition(".")[0] in modules}


def _encoder(names: Mapping[str, str], tensors: Mapping[str, Tensor]) -> EncoderConfig | None:
    """The ResNet that keys and shapes show, or None. A 3x3 stem is taken for CIFAR's, of stride 1."""
    first = tensors.get(names.get("conv1.weight", ""))
    if first is None or first.ndim != 4 or first.shape[-1] not in (3, 7):
        return None
    blocks = tuple(len(set(_blocks(names, stage))) for stage in (1, 2, 3, 4))
    bottleneck = "layer1.0.conv3.weight" in names
    for name, (block, layers) in RESNETS.items():
        if layers == blocks and (block is Bottleneck) == bottleneck:
            stem = "imagenet" if first.shape[-1] == 7 else "cifar"
            return EncoderConfig(name, stem, first.shape[0] / 64, first.shape[1])  # type: ignore[arg-type]
    return None


def _blocks(names: Collection[str], stage: int) -> Iterator[str]:
    return (name.split(".")[1] for name in names if name.startswith(f"layer{stage}."))


def _shapes_of(encoder: EncoderConfig, path: Path) -> Mapping[str, Tensor]:
    """The backbone's tensors without their numbers. Raises WeightsError for an encoder of impossible sizes."""
    try:
        with torch.device("meta"):
            return build_encoder(**dataclasses.asdict(encoder)).state_dict()
    except (RuntimeError, TypeError, OverflowError) as error:
        raise WeightsError(
            f"the encoder of {path} has impossible sizes, {described(encoder)}; fetch it again"
        ) from error


def _layout(keys: Collection[str], nests: list[str], wrappers: list[str]) -> str:
    heads = {part for key in keys for part in key.split(".")[:2]}
    if "encoder_q." in wrappers:
        whose = "MoCo"
    elif "classy_state_dict" in nests or "_feature_blocks." in wrappers:
        whose = "VISSL"
    elif "backbone." in wrappers:
        whose = "solo-learn or lightly"
    elif {"projection_head", "prototypes"} & heads:
        whose = "SwAV"
    else:
        whose = "torchvision or timm"
    return f"{whose}, {' > '.join([*nests, ''.join([*wrappers, '*'])])}"


def _caution(names: Mapping[str, str], wrappers: list[str], encoder: EncoderConfig | None) -> str:
    by_name = any(key.endswith("backbone.conv1.weight") for key in names.values())
    if by_name and "backbone." in wrappers and encoder and encoder.stem == "cifar":
        return "solo-learn pads its 3x3 stem by 2 px and this encoder does by 1, so features of such a file differ"
    return ""


def _agreed(path: Path, told: EncoderConfig | None, found: EncoderConfig | None) -> EncoderConfig:
    """The encoder that the user and the file agree on; the stem's stride is not to be seen in a file."""
    if told is None:
        if found is None:
            raise WeightsError(
                f"the keys of {path} show no ResNet; name its encoder, such as timm/vit_small_patch16_224"
            )
        return found
    if found and {told.stem, found.stem} <= {"small", "cifar"}:
        found = dataclasses.replace(found, stem=told.stem)
    if found and not told.name.startswith("timm/") and told != found:
        raise WeightsError(f"{path} holds {described(found)}, but the encoder is {described(told)}; leave encoder out")
    return told


def described(encoder: EncoderConfig) -> str:
    """Such as "resnet50", or "resnet18 with a cifar stem and width 2"."""
    usual = EncoderConfig(encoder.name)
    more = [f"a {encoder.stem} stem"] if encoder.stem != usual.stem else []
    more += [f"width {encoder.width:g}"] if encoder.width != usual.width else []
    more += [f"{encoder.channels} channels"] if encoder.channels != usual.channels else []
    return encoder.name + (f" with {' and '.join(more)}" if more else "")


def _check(path: Path, weights: Weights, own: Mapping[str, Tensor], encoder: EncoderConfig) -> None:
    """Raises WeightsError naming the tensors that are missing, left over, or of another shape."""
    where = f"{path} ({weights.layout}) does not fit encoder {described(encoder)}"
    remedy = "name the encoder that the file was trained with"
    missing = [key for key in own if key not in weights.tensors and not key.endswith(COUNTER)]
    if missing:
        raise WeightsError(f"{where}: it lacks {_some(missing)}; {remedy}")
    unexpected = [key for key in weights.tensors if key not in own]
    if unexpected:
        raise WeightsError(f"{where}: it also has {_some(unexpected)}; {remedy}")
    for key, value in weights.tensors.items():
        if value.shape != own[key].shape:
            theirs, ours = ("x".join(map(str, shape)) or "a scalar" for shape in (value.shape, own[key].shape))
            raise WeightsError(f"{where}: {key} is {theirs} in the file and {ours} in the encoder; {remedy}")
    for key, value in weights.tensors.items():
        if _num_bytes(value) > value.untyped_storage().nbytes():
            raise WeightsError(f"{path}: {key} repeats its numbers, to claim more than the file holds; fetch it again")


def _some(keys: Collection[str], most: int = 4) -> str:
    shown = ", ".join(key if len(key) <= 80 else key[:77] + "..." for key in list(keys)[:most])
    return shown + (f" and {len(keys) - most} more" if len(keys) > most else "")


def left_out(weights: Weights) -> str:
    """The modules whose tensors were left out, each with their number, in one line."""
    counts: dict[str, int] = {}
    for key in weights.left_out:
        parts = key.removeprefix("module.").split(".")
        head = parts[0] if parts[0] not in ("encoder_q", "backbone", "net") else ".".join(parts[:2])
        counts[head] = counts.get(head, 0) + 1
    shown = [f"{head[:40]} ({count})" for head, count in sorted(counts.items())]
    return ", ".join([*shown[:20], *([f"{len(shown) - 20} more"] if len(shown) > 20 else [])]) or "nothing"
