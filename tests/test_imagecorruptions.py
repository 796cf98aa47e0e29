"""Corruptions of large images beside imagecorruptions, another implementation of ImageNet-C, given the same draws."""

import importlib.util
import os
import sys
import types
from functools import partial

import numpy
import pytest
import torch
from PIL import Image
from scipy import ndimage
from sklearn.datasets import load_sample_image

from zoo.corruptions.corruption import CORRUPTIONS, SEVERITIES, corrupted
from zoo.corruptions.helpers import normal, zoomed_lengths
from zoo.corruptions.spatter import canny
from zoo.corruptions.weather import FROST
from zoo.corruptions.weather import _photograph as photograph_of_frost
from zoo.randomness import key_of, uniform

cv2, filters = pytest.importorskip("cv2"), pytest.importorskip("skimage.filters")
spec = importlib.util.find_spec("imagecorruptions")
if spec is None:
    pytest.skip("imagecorruptions is not installed", allow_module_level=True)

SIDE = 96
# Snow is enlarged to just as many pixels: of more, the library keeps the top left, not the middle as published.
SNOW_SIDE = 180
KEYS = torch.tensor([7])
every_severity = pytest.mark.parametrize("severity", SEVERITIES)


class Numpy:
    """numpy as the library knows it, with random numbers that are told it: a list, one for each call."""

    float_ = numpy.float64

    def __init__(self, draws):
        self.draws = list(draws)
        self.random = types.SimpleNamespace(uniform=self.next, normal=self.next, randint=self.next)

    def next(self, *_, **__):
        return self.draws.pop(0)

    def __getattr__(self, name):
        return getattr(numpy, name)


@pytest.fixture
def library(monkeypatch):
    """The library's module, which asks for what numpy 2, setuptools 81 and scikit-image 0.23 no longer have."""
    (folder,) = spec.submodule_search_locations
    resources = types.ModuleType("pkg_resources")
    resources.resource_filename = lambda package, name: os.path.join(folder, name)
    monkeypatch.setitem(sys.modules, "pkg_resources", resources)
    coordinates = types.ModuleType("scipy.ndimage.interpolation")
    coordinates.map_coordinates = ndimage.map_coordinates
    monkeypatch.setitem(sys.modules, "scipy.ndimage.interpolation", coordinates)
    found = importlib.util.spec_from_file_location("published", os.path.join(folder, "corruptions.py"))
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)

    def gaussian(image, sigma, multichannel=False, **settings):
        return filters.gaussian(image, sigma, channel_axis=-1 if multichannel else None, **settings)

    module.gaussian = gaussian
    return module


def photograph(side=SIDE):
    pixels = numpy.asarray(Image.fromarray(load_sample_image("china.jpg")).resize((320, 214)))
    return pixels[5 : 5 + side, 40 : 40 + side].copy()


def both(library, name, severity, draws=(), side=SIDE):
    """Return the library's image and ours as floats (H, W, C), before either is rounded down."""
    image = photograph(side)
    library.np = Numpy(draws)
    theirs = numpy.asarray(getattr(library, name)(Image.fromarray(image), severity), dtype=float)
    assert not library.np.draws
    levels = torch.from_numpy(image).permute(2, 0, 1)[None].double().contiguous()
    row = CORRUPTIONS[name]
    ours = row.function(levels, KEYS, row.large[severity - 1]).clamp(0, 255)[0].permute(1, 2, 0).numpy()
    return theirs, ours


@every_severity
@pytest.mark.parametrize(
    "name",
    [
        "defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate", "jpeg_compression", "gaussian_blur",
        "saturate",
    ],
)  # fmt: skip
def test_what_draws_nothing_is_the_librarys(name, severity, library):
    theirs, ours = both(library, name, severity)
    assert abs(theirs - ours).max() < 1e-3


def draws_of(keys, name, setting):
    """Yield what the library is told to draw, so that it draws as we do."""
    if name in ("gaussian_noise", "speckle_noise"):
        yield setting * normal(keys, 3 * SIDE**2).view(3, SIDE, SIDE).permute(1, 2, 0).numpy()
    elif name == "motion_blur":
        yield 90 * uniform(keys, 1).item() - 45
    elif name == "glass_blur":
        _, reach, times = setting
        moves = (uniform(keys, 2 * times * (SIDE - 2 * reach) ** 2) * 2 * reach).long() - reach
        # They go through the image backwards, and draw the column first.
        for part in moves.view(times, -1, 2).flip(1, 2):
            yield from part.numpy()
    elif name == "snow":
        mean, deviation, factor, *_ = setting
        kept = zoomed_lengths(SNOW_SIDE, factor)[0]
        noise, first = numpy.zeros((SNOW_SIDE, SNOW_SIDE)), (SNOW_SIDE - kept) // 2
        drawn = normal(key_of(keys, 1), kept**2).view(kept, kept).numpy()
        noise[first : first + kept, first : first + kept] = mean + deviation * drawn
        yield noise
        yield 90 * uniform(key_of(keys, 2), 1).item() - 135
    elif name == "fog":
        flat, size, width = 2 * uniform(keys, 128**2)[0].numpy() - 1, 1, 100.0
        while size < 128:
            for _ in range(3):
                yield width * flat[: size**2].reshape(size, size)
                flat = flat[size**2 :]
            size, width = 2 * size, width / setting[1]
    else:
        yield setting[0] + setting[1] * normal(keys, SIDE**2).view(SIDE, SIDE).numpy()


@every_severity
@pytest.mark.parametrize(
    "name", ["gaussian_noise", "speckle_noise", "motion_blur", "glass_blur", "snow", "fog", "spatter"]
)
def test_what_draws_is_the_librarys_given_the_same_draws(name, severity, library):
    draws = draws_of(KEYS, name, CORRUPTIONS[name].large[severity - 1])
    theirs, ours = both(library, name, severity, draws, SNOW_SIDE if name == "snow" else SIDE)
    # What ImageMagick blurs has whole levels, and snow is added twice; the library rounds later. Through glass it loses
    # whole levels to the rounding of floats.
    allowed = {"motion_blur": 0.51, "snow": 2.01, "glass_blur": 0.5}
    assert abs(theirs - ours).max() < allowed.get(name, 1e-3) and abs(theirs - ours).mean() < 0.6


def test_photographs_of_frost_are_shrunk_as_by_opencv():
    (folder,) = spec.submodule_search_locations
    for name in FROST:
        original = cv2.imread(os.path.join(folder, "frost", name))
        for shrunk, divisor in ((original, 1), (cv2.resize(original, (0, 0), fx=0.2, fy=0.2), 5)):
            ours = photograph_of_frost(name, divisor, 8, 8).permute(1, 2, 0).numpy()[..., ::-1].astype(int)
            # JPEGs are decoded by another library.
            assert ours.shape == shrunk.shape and abs(ours - shrunk).max() <= (0 if name.endswith("png") else 3)


def test_edges_are_opencvs():
    generator = numpy.random.default_rng(0)
    noise = ndimage.gaussian_filter(generator.normal(size=(4, 60, 50)), (0, 2, 2))
    layers = numpy.where(noise > 0.1, 255 * noise.clip(0, 0.6) / 0.6, 0).astype(numpy.uint8)
    layers = numpy.concatenate([layers, generator.integers(0, 256, (2, 60, 50), dtype=numpy.uint8)])
    found = canny(layers, 50, 150)
    for layer, edges in zip(layers, found, strict=True):
        theirs = cv2.Canny(layer, 50, 150) > 0
        assert (theirs == edges).all() and theirs.any()


@pytest.mark.parametrize("name", ["shot_noise", "impulse_noise", "frost"])
@every_severity
def test_what_draws_is_spread_as_the_librarys(name, severity, library, monkeypatch):
    numpy.random.seed(severity)
    image, count = photograph(), 12
    random_noise = library.sk.util.random_noise
    library.np, random_noise.__globals__["np"] = numpy, numpy
    # It draws by a generator of its own, which would be another one in every run.
    seeded = partial(random_noise, rng=numpy.random.default_rng(severity))
    monkeypatch.setattr(library.sk.util, "random_noise", seeded)
    theirs = numpy.stack(
        [numpy.uint8(getattr(library, name)(Image.fromarray(image), severity)) for _ in range(count)]
    ).astype(float)
    images = torch.from_numpy(image).permute(2, 0, 1)
    ours = corrupted(images.expand(count, *images.shape), name, severity, torch.arange(count))
    ours = ours.permute(0, 2, 3, 1).double().numpy()
    near = 0.2 if name == "frost" else 0.04
    assert abs(ours.mean() / theirs.mean() - 1) < near and abs(ours.std() / theirs.std() - 1) < near
    assert abs(abs(ours - image).mean() / abs(theirs - image).mean() - 1) < near


@every_severity
@pytest.mark.parametrize("side", [32, SIDE])
def test_elastic_transforms_are_those_of_opencv_and_scipy(side, severity):
    image = numpy.asarray(Image.fromarray(photograph()).resize((side, side)), dtype=numpy.float32) / 255
    row = CORRUPTIONS["elastic_transform"]
    setting = (row.small if side <= 64 else row.large)[severity - 1]
    scale, sigma, jitter = (side * share for share in setting)
    draws = 2 * uniform(KEYS, 6 + 2 * side**2)[0].numpy() - 1
    third = side // 3
    points = numpy.float32([[third, third], [third, -third], [-third, -third]]) + side // 2
    moved = points + numpy.float32(jitter * draws[:6].reshape(3, 2))
    affine = cv2.getAffineTransform(points, moved)
    warped = cv2.warpAffine(image, affine, (side, side), borderMode=cv2.BORDER_REFLECT_101)
    right, down = (
        scale * filters.gaussian(field, sigma, mode="reflect", truncate=3) for field in draws[6:].reshape(2, side, side)
    )
    rows, columns = numpy.mgrid[:side, :side]
    theirs = numpy.stack(
        [
            ndimage.map_coordinates(warped[..., channel], (rows + down, columns + right), order=1, mode="reflect")
            for channel in range(3)
        ],
        axis=2,
    )
    levels = torch.from_numpy(image).permute(2, 0, 1)[None].double().contiguous() * 255
    ours = row.function(levels, KEYS, setting)[0].permute(1, 2, 0).numpy()
    difference = abs(255 * theirs - ours)
    assert difference.max() < 0.01
