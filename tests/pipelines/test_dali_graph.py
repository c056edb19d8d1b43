"""The GPU form of the DALI graph, on machines without a GPU: it is built, serialized and checked, but never run.

This is the only file that touches DALI's private API (`_build_graph`, `_ops`, `_op`, `spec`, `_graph_outputs`).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("nvidia.dali")
from nvidia.dali import backend as registry
from nvidia.dali import fn, pipeline_def, types

from pipelines.backends import OUTPUTS
from pipelines.backends.dali import graph
from tests.pipelines.test_dali import RECIPES, SMALL

SPECS = RECIPES | {"small": SMALL}
REGISTERED = {
    "cpu": set(registry.RegisteredCPUOps()),
    "gpu": set(registry.RegisteredGPUOps()),
    "mixed": set(registry.RegisteredMixedOps()),
}
# Around a mean that lies on the GPU the contrast is arithmetic, (x - mean) times the factor + mean - 0.5, and a cast.
# On the CPU it is one operator. The split is that of the factors, of which the samples to be changed keep theirs.
MEAN = [
    "ColorSpaceConversion",
    "reductions__Mean",
    "_ArithmeticGenericOp",
    "_ArithmeticGenericOp",
    "_conditional__Split",
]
CONTRAST = {"gpu": [*MEAN, *["_ArithmeticGenericOp"] * 4, "Cast"], "cpu": [*MEAN, "BrightnessContrast"]}


def _no_source() -> list[Any]:
    raise AssertionError("the graph is not to be run")


def build(recipe: str, device: str, output: str = "uint8") -> Any:
    """Without a device_id: then a GPU graph can be made on any machine."""
    options = {"batch_size": 8, "num_threads": 2, "device_id": None}
    pipeline = graph.make_graph(SPECS[recipe], _no_source, device=device, output=output, **options)
    pipeline._build_graph()
    return pipeline


def operators(pipeline: Any) -> list[tuple[str, str]]:
    """(operator, device) in the order in which the text makes them; names end with a running number."""
    made = sorted(pipeline._ops, key=lambda op: int(op.name.rpartition("_")[2]))
    return [(op._op.schema.Name(), op._op.device) for op in made]


def output_metadata(pipeline: Any) -> list[tuple[Any, ...]]:
    """(device, dimensions, type, layout) of each output, None for what DALI does not infer without running."""
    for op in pipeline._ops:
        op.spec.InferOutputMetadata()
    described = {}
    for op in pipeline._ops:
        for i in range(op.spec.NumOutput()):
            name, *metadata = op.spec.OutputDesc(i)
            described[name] = tuple(metadata)
    return [described[output.name] for output in pipeline._graph_outputs]


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("recipe", SPECS)
def test_every_operator_of_the_gpu_graph_exists_for_its_device(recipe: str, output: str) -> None:
    pipeline = build(recipe, "gpu", output)
    made = operators(pipeline)
    assert [op for op in made if op[0] not in REGISTERED[op[1]]] == []
    assert len(pipeline.serialize()) > 1000
    assert [op for op, device in made if device == "mixed"] == ["decoders__Image"]
    assert all(device == "gpu" for device, *_ in output_metadata(pipeline))


@pytest.mark.parametrize("recipe", SPECS)
def test_the_cpu_and_the_gpu_graph_are_the_same_operators_but_for_the_contrast(recipe: str) -> None:
    on_cpu = [op for op, _ in operators(build(recipe, "cpu"))]
    on_gpu = [op for op, _ in operators(build(recipe, "gpu"))]
    assert _replace(on_gpu, CONTRAST["gpu"], CONTRAST["cpu"]) == on_cpu


def _replace(operators: list[str], old: list[str], new: list[str]) -> list[str]:
    replaced: list[str] = []
    while operators:
        found = operators[: len(old)] == old
        replaced += new if found else operators[:1]
        operators = operators[len(old) if found else 1 :]
    return replaced


@pytest.mark.parametrize("recipe", SPECS)
def test_nothing_in_the_graph_is_random(recipe: str) -> None:
    assert [op for op, _ in operators(build(recipe, "cpu")) if "random" in op.lower()] == []


@pytest.mark.parametrize(("output", "dtype"), [("float32", "FLOAT"), ("float16", "FLOAT16")])
def test_float_outputs_have_the_type_and_layout_that_channels_last_needs(output: str, dtype: str) -> None:
    for device in ("cpu", "gpu"):
        for metadata in output_metadata(build("swav", device, output)):
            assert metadata == (device, 3, getattr(types, dtype), "HWC")


def test_only_the_operations_that_a_spec_can_use_leave_nodes() -> None:
    assert [op for op, _ in operators(build("center", "cpu"))] == [
        *["ExternalSource"] * 3,  # the files, and the two corners of the window
        "decoders__Image",
        "Resize",
    ]
    used = {recipe: {op for op, _ in operators(build(recipe, "cpu"))} for recipe in SPECS}
    assert {recipe for recipe in SPECS if "LookupTable" in used[recipe]} == {"solarize", "small"}
    assert {recipe for recipe in SPECS if "Filter" in used[recipe]} == {"moco_v2", "swav", "clsa", "solarize", "small"}
    assert {recipe for recipe in SPECS if "WarpAffine" in used[recipe]} == {"clsa", "small"}


def test_the_images_of_a_batch_are_decoded_once_for_all_views() -> None:
    assert [op for op, _ in operators(build("swav", "cpu"))].count("decoders__Image") == 1


def test_the_gpu_form_of_the_contrast_gives_the_pixels_of_the_cpu_form(photos: list[Image.Image]) -> None:
    """Its arithmetic, carried out on the CPU."""
    images = np.stack([np.asarray(photo.resize((96, 96))) for photo in photos])
    factors = np.array([0.0, 0.3, 1.0, 1.8], dtype=np.float32)

    @pipeline_def(batch_size=len(images), num_threads=2, device_id=None, prefetch_queue_depth=1)
    def both() -> Any:
        x = fn.external_source(name="images", layout="HWC")
        factor = fn.external_source(name="factors")
        return graph._contrast(x, factor, "cpu"), graph._contrast(x, factor, "gpu")

    pipeline = both()
    pipeline.feed_input("images", images)
    pipeline.feed_input("factors", factors)
    of_cpu, of_gpu = (np.asarray(out.as_array()).astype(int) for out in pipeline.run())
    assert np.abs(of_cpu - of_gpu).max() <= 1
    assert np.abs(of_cpu - of_gpu).mean() < 0.01
