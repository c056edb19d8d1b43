"""Views of stamps in NumPy, pixel by pixel, typed from the description: turn, window, stretch, mask."""

import math

import numpy as np


def turned(image, degrees):
    """(H, W) turned counter-clockwise about its centre, bilinear, with zeros around it; y goes down."""
    height, width = image.shape
    result = np.zeros((height, width))
    for y in range(height):
        for x in range(width):
            result[y, x] = turned_pixel(image, degrees, y, x)
    return result


def turned_pixel(image, degrees, y, x):
    """The pixel (y, x) of the turned image; y and x may lie outside of it."""
    height, width = image.shape
    # up and right of the centre, as in a drawing; turning back by the angle finds where the light came from
    right, up = x - (width - 1) / 2, (height - 1) / 2 - y
    radius, angle = math.hypot(right, up), math.atan2(up, right) - math.radians(degrees)
    from_x = (width - 1) / 2 + radius * math.cos(angle)
    from_y = (height - 1) / 2 - radius * math.sin(angle)
    value = 0.0
    for near_y in (math.floor(from_y), math.floor(from_y) + 1):
        for near_x in (math.floor(from_x), math.floor(from_x) + 1):
            if 0 <= near_y < height and 0 <= near_x < width:
                value += image[near_y, near_x] * (1 - abs(from_y - near_y)) * (1 - abs(from_x - near_x))
    return value


def window(stamp, degrees, top, left, size):
    """(C, H, W) -> (C, size, size)"""
    return np.array(
        [[[turned_pixel(band, degrees, top + i, left + j) for j in range(size)] for i in range(size)] for band in stamp]
    )


def log_stretch(pixels, floor):
    result = np.empty(pixels.shape)
    for place, value in np.ndenumerate(pixels):
        result[place] = math.log10(value if value > 0 else floor)
    return result


def positive(pixels):
    return np.array([1.0 if value > 0 else 0.0 for value in pixels.ravel()]).reshape(pixels.shape)
