"""Exports that hold the network itself, not only its tensors: torch.export's program and ONNX.

Both take any number of images at once, (B, C, S, S) normalised floats of the side S that the encoder is tested with,
and give (B, F) features. TorchScript is not written: PyTorch deprecated it in favour of torch.export.
"""

from __future__ import annotations

import io

import torch
from torch import Tensor

from fastssl.weights.source import Source


def torch_export_file(source: Source) -> bytes:
    """A program for `torch.export.load(FILE).module()`."""
    program = torch.export.export(source.backbone, (_example(source),), dynamic_shapes=_shapes())
    file = io.BytesIO()
    torch.export.save(program, file)
    return file.getvalue()


def onnx_file(source: Source) -> bytes:
    """A model with input "images" and output "features". Raises ValueError without the packages of the extra."""
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ValueError("format onnx needs more packages: pip install 'fastssl-train[export]'") from error
    program = torch.onnx.export(
        source.backbone, (_example(source),), dynamo=True, dynamic_shapes=_shapes(), input_names=["images"],
        output_names=["features"], verbose=False,
    )  # fmt: skip
    assert program is not None
    return program.model_proto.SerializeToString()


def _example(source: Source) -> Tensor:
    """Two images, for a batch of one would be taken for a batch that is always one."""
    side = source.view.size
    return torch.zeros(2, source.encoder.channels, side, side)


def _shapes() -> tuple[dict[int, torch.export.Dim]]:
    return ({0: torch.export.Dim("batch")},)
