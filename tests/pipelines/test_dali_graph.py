"""The GPU form of the DALI graph, on machines without a GPU: it is built, serialized and checked, but never run.

This is the only file that touches DALI's private API (`_build_graph`, `_ops`, `_op`, `_init_args`, `_graph_outputs`).
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

pytest.importorskip("nvidia.dali")
from nvidia.dali import backend as registry
from nvidia.dali import types

from pipelines.backends.dali import graph
from pipelines.views import num_views
from tests.pipelines.test_dali import RECIPES, SMALL

SPECS = RECIPES | {"small": SMALL}
REGISTERED = {
    "cpu": set(registry.RegisteredCPUOps()),
    "gpu": set(registry.RegisteredGPUOps()),
    "mixed": set(registry.RegisteredMixedOps()),
}


def _no_source() -> list[Any]:
    raise AssertionError("the graph is not to be run")


def build(recipe: str, device: str) -> Any:
    """Without a device_id: then a GPU graph can be made on any machine."""
    options = {"batch_size": 8, "num_threads": 2, "device_id": None}
    pipeline = graph.make_graph(SPECS[recipe], _no_source, device=device, **options)
    pipeline._build_graph()
    return pipeline


def operators(pipeline: Any) -> list[tuple[str, str]]:
    """(operator, device) in the order in which the text makes them; names end with a running number."""
    made = sorted(pipeline._ops, key=lambda op: int(op.name.rpartition("_")[2]))
    return [(op._op.schema.Name(), op._op.device) for op in made]


@pytest.mark.parametrize("recipe", SPECS)
def test_every_operator_of_the_gpu_graph_exists_for_its_device(recipe: str) -> None:
    pipeline = build(recipe, "gpu")
    made = operators(pipeline)
    assert [op for op in made if op[0] not in REGISTERED[op[1]]] == []
    assert len(pipeline.serialize()) > 1000
    assert [op for op, device in made if device == "mixed"] == ["decoders__Image"]
    assert {op for op, device in made if device == "gpu"} == {"MultiPaste", "Resize"} - (
        {"MultiPaste"} if recipe == "center" else set()
    )
    assert all(output.device == "gpu" for output in pipeline._graph_outputs)


@pytest.mark.parametrize("recipe", SPECS)
def test_the_cpu_and_the_gpu_graph_are_the_same_operators(recipe: str) -> None:
    on_cpu = [op for op, _ in operators(build(recipe, "cpu"))]
    on_gpu = [op for op, _ in operators(build(recipe, "gpu"))]
    assert on_gpu == on_cpu


@pytest.mark.parametrize("recipe", SPECS)
def test_a_view_is_two_operators_and_an_image_is_decoded_once(recipe: str) -> None:
    """And nothing is random: all numbers come from outside."""
    views = num_views(SPECS[recipe])
    made = Counter(op for op, _ in operators(build(recipe, "cpu")))
    cut = 0 if recipe == "center" else views
    assert made.pop("ExternalSource") == 1 + 2 * views + 3 * cut
    assert made == Counter(decoders__Image=1, Resize=views, MultiPaste=cut)


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_the_decoder_is_asked_for_pillows_pixels(device: str) -> None:
    """On a GPU chroma is repeated unless it is asked for libjpeg's interpolation; a CPU interpolates in any case."""
    (decoder,) = (op._op for op in build("small", device)._ops if op._op.schema.Name() == "decoders__Image")
    asked = {name: decoder._init_args[name] for name in ("output_type", "adjust_orientation", "jpeg_fancy_upsampling")}
    assert asked == {"output_type": types.RGB, "adjust_orientation": False, "jpeg_fancy_upsampling": True}
