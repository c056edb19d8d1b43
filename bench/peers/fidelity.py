"""How far a peer's pixels are from Pillow's, operation by operation, for the same parameters.

The reference is torchvision's functional interface on Pillow images, with Pillow's GaussianBlur: what the published
results used. A peer decodes the file itself, so that every figure includes its decoder.
"""

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageFilter
from torchvision.transforms import functional as F

NUM_PHOTOS = 12
SIZE = 224  # of the views on which colour and blur are compared

# operation -> the parameters at which it is compared. crop: (top, left, height, width) as fractions, and the size.
PARAMETERS: dict[str, tuple[Any, ...]] = {
    "crop_224": (((0.1, 0.2, 0.7, 0.6), 224), ((0.0, 0.0, 1.0, 1.0), 224), ((0.3, 0.4, 0.5, 0.4), 224)),
    "crop_96": (((0.1, 0.2, 0.3, 0.4), 96), ((0.6, 0.5, 0.25, 0.3), 96), ((0.4, 0.0, 0.3, 0.2), 96)),
    "brightness": (0.6, 1.4, 1.8),
    "contrast": (0.6, 1.4, 1.8),
    "saturation": (0.6, 1.4, 1.8),
    "hue": (-0.2, -0.1, 0.1, 0.2),
    "grayscale": (None,),
    "blur": (0.5, 1.0, 2.0),
}


def errors(
    folder: Path, decode: Callable[[Path], Any], operations: Mapping[str, Callable[[Any, Any], Any]]
) -> dict[str, float]:
    """Mean absolute difference in grey levels (0-255) over photographs and parameters.

    folder      one sub-folder of JPEG files a class; twelve of them are taken, spread evenly
    decode      path -> an image of the peer's kind
    operations  name in `PARAMETERS` -> (image, parameter) -> uint8 (H, W, 3); crops get ((top, left, height, width), S)
                in px. What a peer does not have is left out of the result
    """
    files = sorted(path for path in folder.glob("*/*") if path.suffix.lower() in (".jpg", ".jpeg"))
    photos = files[:: max(1, len(files) // NUM_PHOTOS)][:NUM_PHOTOS]
    if not photos:
        raise ValueError(f"{folder} holds no JPEG files in class folders; give an image folder with some")
    with tempfile.TemporaryDirectory() as views:
        small = [_save_view(photo, Path(views) / f"{i}.jpg") for i, photo in enumerate(photos)]
        return {
            name: float(
                np.mean(
                    [
                        _difference(path, name, _in_pixels(path, parameter), decode, operations[name])
                        for path in (photos if name.startswith("crop") else small)
                        for parameter in PARAMETERS[name]
                    ]
                )
            )
            for name in PARAMETERS
            if name in operations
        }


def pillow(image: Image.Image, name: str, parameter: Any) -> np.ndarray:
    """The reference, uint8 (H, W, 3)."""
    if name.startswith("crop"):
        (top, left, height, width), size = parameter
        changed = F.resized_crop(image, top, left, height, width, [size, size])
    elif name == "blur":
        changed = image.filter(ImageFilter.GaussianBlur(parameter))
    elif name == "grayscale":
        changed = F.to_grayscale(image, 3)
    else:
        changed = getattr(F, f"adjust_{name}")(image, parameter)
    return np.asarray(changed)


def _difference(path: Path, name: str, parameter: Any, decode: Callable, operation: Callable) -> float:
    with Image.open(path) as image:
        wanted = pillow(image.convert("RGB"), name, parameter)
    made = np.asarray(operation(decode(path), parameter))
    assert made.dtype == np.uint8, f"{name} gave {made.dtype}"
    assert made.shape == wanted.shape, f"{name} gave {made.shape}, not {wanted.shape}"
    return float(np.abs(made.astype(np.int16) - wanted).mean())


def _in_pixels(path: Path, parameter: Any) -> Any:
    if not isinstance(parameter, tuple):
        return parameter
    (top, left, height, width), size = parameter
    with Image.open(path) as image:
        w, h = image.size
    return (int(top * h), int(left * w), int(height * h), int(width * w)), size


def _save_view(photo: Path, path: Path) -> Path:
    """A file, because some peers take nothing else. Its loss does not count: Pillow reads the same file."""
    with Image.open(photo) as image:
        view = image.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BILINEAR)
    view.save(path, quality=95, subsampling=0)
    return path
