"""What torchvision makes of one Pillow image, given drawn numbers: the definition that backends are held to."""

from __future__ import annotations

from PIL import Image, ImageFilter
from torchvision.transforms import functional as F

from pipelines.augment import AugmentSpec
from pipelines.draw import ViewDraws
from pipelines.views import ViewSpec


def view_of(image: Image.Image, spec: ViewSpec, draws: ViewDraws, i: int) -> Image.Image:
    """The view that sample i of `draws` asks for, operation by operation in torchvision's functional form."""
    image = image.convert("RGB")
    if spec.crop == "center":
        image = F.center_crop(F.resize(image, spec.resize), [spec.size, spec.size])
    else:
        top, left, height, width = draws.crop[i].tolist()
        image = F.resized_crop(image, top, left, height, width, [spec.size, spec.size])
    augment = spec.augment
    if augment.grayscale_first and draws.grayscale[i]:
        image = F.rgb_to_grayscale(image, num_output_channels=3)
    if draws.jitter[i]:
        image = _jitter(image, augment, draws, i)
    if not augment.grayscale_first and draws.grayscale[i]:
        image = F.rgb_to_grayscale(image, num_output_channels=3)
    if draws.sigma[i] > 0:
        image = image.filter(ImageFilter.GaussianBlur(radius=float(draws.sigma[i])))
    if draws.solarize[i]:
        image = F.solarize(image, augment.solarize_threshold)
    return F.hflip(image) if draws.flip[i] else image


def _jitter(image: Image.Image, augment: AugmentSpec, draws: ViewDraws, i: int) -> Image.Image:
    """ColorJitter.forward: an operation without strength is left out."""
    for number in draws.order[i].tolist():
        if number == 0 and augment.brightness:
            image = F.adjust_brightness(image, float(draws.brightness[i]))
        elif number == 1 and augment.contrast:
            image = F.adjust_contrast(image, float(draws.contrast[i]))
        elif number == 2 and augment.saturation:
            image = F.adjust_saturation(image, float(draws.saturation[i]))
        elif number == 3 and augment.hue:
            image = F.adjust_hue(image, float(draws.hue[i]))
    return image
