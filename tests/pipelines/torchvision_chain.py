"""What torchvision makes of one Pillow image, given drawn numbers: the definition that backends are held to.

The strong draws are FixMatch's list of fourteen, with the magnitudes written out as CLSA's authors use them.
"""

from __future__ import annotations

from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from torchvision.transforms import functional as F

from pipelines.augment import AugmentSpec
from pipelines.draw import ViewDraws
from pipelines.views import ViewSpec

# By level 1..9.
ENHANCE = (0.14, 0.23, 0.32, 0.41, 0.50, 0.59, 0.68, 0.77, 0.86)
BITS = (4, 4, 5, 5, 6, 6, 6, 7, 7)
DEGREES = (3, 6, 9, 12, 15, 18, 21, 24, 27)
SHEAR = (0.03, 0.06, 0.09, 0.12, 0.15, 0.18, 0.21, 0.24, 0.27)
THRESHOLD = (231, 205, 180, 154, 128, 103, 77, 52, 26)
TRANSLATE_PX = {  # by side of the view
    24: (0, 1, 2, 2, 3, 4, 5, 5, 6),
    32: (0, 1, 2, 3, 4, 5, 6, 7, 8),
    96: (2, 5, 8, 11, 14, 17, 20, 23, 25),
    224: (6, 13, 20, 26, 33, 40, 47, 53, 60),
}


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
    if draws.flip[i]:
        image = F.hflip(image)
    for operation, level, sign in zip(draws.strong_operation[i], draws.strong_level[i], draws.strong_sign[i]):
        image = strong_of(image, int(operation), int(level), int(sign)) if operation >= 0 else image
    return image


def strong_of(image: Image.Image, operation: int, level: int, sign: int) -> Image.Image:
    """The operation with that place in FixMatch's list, by Pillow."""

    def affine(*matrix: float) -> Image.Image:
        return image.transform(image.size, Image.Transform.AFFINE, matrix)

    v = level - 1
    names = "AutoContrast Brightness Color Contrast Equalize Identity Posterize Rotate Sharpness ShearX ShearY Solarize"
    name = [*names.split(), "TranslateX", "TranslateY"][operation]
    if name in ("Brightness", "Color", "Contrast", "Sharpness"):
        return getattr(ImageEnhance, name)(image).enhance(ENHANCE[v])
    if name == "AutoContrast":
        return ImageOps.autocontrast(image)
    if name == "Equalize":
        return ImageOps.equalize(image)
    if name == "Posterize":
        return ImageOps.posterize(image, BITS[v])
    if name == "Solarize":
        return ImageOps.solarize(image, THRESHOLD[v])
    if name == "Rotate":
        return image.rotate(sign * DEGREES[v])
    if name == "ShearX":
        return affine(1, sign * SHEAR[v], 0, 0, 1, 0)
    if name == "ShearY":
        return affine(1, 0, 0, sign * SHEAR[v], 1, 0)
    if name == "TranslateX":
        return affine(1, 0, sign * TRANSLATE_PX[image.width][v], 0, 1, 0)
    if name == "TranslateY":
        return affine(1, 0, 0, 0, 1, sign * TRANSLATE_PX[image.height][v])
    return image


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
