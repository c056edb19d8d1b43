"""The model card of a Hugging Face repository, filled from the run and from the results that lie beside it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastssl import __version__
from fastssl.weights.read import described
from fastssl.weights.source import Source
from shard_tools.documents import read_json
from shard_tools.printing import sentence

MAX_RESULT_BYTES = 2**26  # a result names every class, and one of VOC every image


def model_card(source: Source) -> str:
    """Markdown with the hub's YAML head. It names no licence: that is for whoever publishes the weights to choose."""
    settings = source.settings
    method = settings["method"]["name"] if settings else ""
    encoder = described(source.encoder)
    by_whom = f"trained without labels by {method}" if method else "pre-trained"
    parts = [
        _head(method),
        f"# {encoder}{f', {method}' if method else ''}",
        f"The backbone of a {encoder}, {by_whom}, exported by fastssl {__version__} from {source.origin}.",
        *(["## Training", _table(_training(source))] if settings else []),
        *_results(source),
        "## Input",
        _table(_input(source)),
        "## Use",
        USE,
    ]
    return "\n\n".join(parts) + "\n"


USE = """\
```python
import timm

model = timm.create_model("local-dir:FOLDER", pretrained=True, num_classes=0).eval()  # or "hf-hub:USER/NAME"
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
features = model(transform(image).unsqueeze(0))
```"""


def _head(method: str) -> str:
    tags = ["image-feature-extraction", "timm", "self-supervised", *([method] if method else [])]
    listed = "\n".join(f"- {tag}" for tag in tags)
    return f"---\nlibrary_name: timm\npipeline_tag: image-feature-extraction\ntags:\n{listed}\n---"


def _training(source: Source) -> dict[str, object]:
    settings = source.settings
    run, optim, data = settings["run"], settings["optim"], settings["data"]
    return {
        "method": ", ".join(f"{key} {value}" for key, value in settings["method"].items() if not _is_nested(value)),
        "data": f"{Path(data['root']).name}, split {data['split']}",
        "steps": f"{source.step:,} of {run['batch_size']} images; {run['duration']} were planned",
        "optimiser": f"{optim['name']}, {optim['schedule']} lr {optim['lr']:g}, weight decay {optim['weight_decay']:g}",
        "precision, seed": f"{run['precision']}, {run['seed']}",
    }


def _input(source: Source) -> dict[str, object]:
    view = source.view
    return {
        "images": f"{source.encoder.channels} channels, shorter side {view.resize} px, centre crop {view.size} px",
        "mean": ", ".join(f"{value:g}" for value in view.augment.mean),
        "std": ", ".join(f"{value:g}" for value in view.augment.std),
    }


def _results(source: Source) -> list[str]:
    """What fastssl-evaluate found at this very step: its metrics, and below them how each was measured."""
    if source.folder is None:
        return []
    metrics: dict[str, object] = {}
    protocols = []
    for path in sorted((source.folder.parent.parent / "evaluation").glob("*.json")):
        found, protocol = _result(path, source.step)
        metrics |= found
        protocols += protocol
    return ["## Results", _table(metrics), "\n".join(protocols)] if metrics else []


def _result(path: Path, step: int | None) -> tuple[dict[str, object], list[str]]:
    """Metrics and protocol of an evaluation at `step`; nothing of another step. Raises ValueError for what is none."""
    try:
        result = read_json(path, MAX_RESULT_BYTES)
        if not isinstance(result, dict) or result.get("step") != step:
            return {}, []
        metrics = {key: f"{float(value):.4g}" for key, value in result["metrics"].items() if key.count("/") == 1}
        return dict(metrics), [f"- {path.stem}: {sentence(str(result['protocol']))}"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no result of fastssl-evaluate ({error}); remove it") from None


def _table(rows: Mapping[str, object]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows.items())])


def _is_nested(value: Any) -> bool:
    return isinstance(value, dict | list)
