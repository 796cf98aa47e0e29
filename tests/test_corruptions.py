"""Corruptions of images: the published ones, whatever the batch, and as strong as their severity says."""

import importlib.util
import io
import math

import numpy
import pytest
import torch
from PIL import Image
from scipy import ndimage
from sklearn.datasets import load_digits, load_sample_image

from zoo.corruptions import kinds as corruption_kinds
from zoo.corruptions import weather as corruption_weather
from zoo.corruptions.corruption import CORRUPTIONS, SEVERITIES, corrupted, parse_corruption
from zoo.corruptions.helpers import antialiased_disk, normal
from zoo.corruptions.kinds import scaled_brightness, scaled_contrast

WITHOUT_DRAWS = {
    "defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate", "jpeg_compression", "gaussian_blur", "saturate",
}  # fmt: skip
# The published settings of these are not ordered by how far they take an image from the clean one.
UNORDERED = {"glass_blur", "frost", "elastic_transform", "spatter", "saturate"}
needs_photographs = pytest.mark.skipif(
    importlib.util.find_spec("imagecorruptions") is None, reason="the photographs of frost are not installed"
)
names = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=needs_photographs) if name == "frost" else name for name in CORRUPTIONS]
)


def photograph(height, width, channels=3):
    picture = Image.fromarray(load_sample_image("china.jpg")).convert("RGB" if channels == 3 else "L")
    # A part as high as wide, so that no scale is stretched.
    side = 400 / max(height, width)
    box = (120, 20, 120 + side * width, 20 + side * height)
    pixels = numpy.atleast_3d(numpy.asarray(picture.resize((width, height), Image.Resampling.BOX, box)))
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)


def repeated(image, count):
    return image.expand(count, *image.shape), torch.arange(count)


def setting_of(name, side, severity):
    row = CORRUPTIONS[name]
    return (row.small if side <= 64 else row.large)[severity - 1]


def test_the_fifteen_and_the_four_come_in_the_published_order():
    spare = ["speckle_noise", "gaussian_blur", "spatter", "saturate"]
    assert list(CORRUPTIONS)[15:] == spare == [name for name, row in CORRUPTIONS.items() if row.spare]
    assert all(len(row.small) == len(row.large) == 5 for row in CORRUPTIONS.values())


@pytest.mark.parametrize(
    ("name", "severity", "small", "large"),
    [
        ("gaussian_noise", 1, 0.04, 0.08),
        ("shot_noise", 5, 50, 3),
        ("impulse_noise", 4, 0.05, 0.17),
        ("glass_blur", 3, (0.4, 1, 1), (1, 2, 3)),
        ("motion_blur", 5, (9, 2.5), (20, 15)),
        ("snow", 2, (0.1, 0.2, 1, 0.5, 10, 4, 0.9), (0.2, 0.3, 2, 0.5, 12, 4, 0.7)),
        ("fog", 3, (0.75, 2.5), (2.5, 1.7)),
        ("contrast", 5, 0.15, 0.05),
        ("jpeg_compression", 1, 80, 25),
        ("saturate", 5, (2.5, 0.2), (20, 0.2)),
    ],
)
def test_settings_are_the_published_ones(name, severity, small, large):
    assert (CORRUPTIONS[name].small[severity - 1], CORRUPTIONS[name].large[severity - 1]) == (small, large)


@names
@pytest.mark.parametrize("shape", [(32, 32, 3), (28, 28, 1), (8, 8, 1), (24, 41, 3), (80, 66, 3), (70, 90, 1)])
def test_images_of_any_size_keep_their_shape_and_follow_from_their_keys_alone(name, shape):
    images, _ = repeated(photograph(*shape), 3)
    keys = torch.tensor([0, 5, 3])
    images = torch.stack([images[0], images[1].flip(2), images[2]])
    original = images.clone()
    for severity in (1, 5):
        result = corrupted(images, name, severity, keys)
        assert result.shape == images.shape and result.dtype == torch.uint8 and torch.equal(images, original)
        assert torch.equal(result.flip(0), corrupted(images.flip(0), name, severity, keys.flip(0)))
        assert torch.equal(result[1:2], corrupted(images[1:2], name, severity, keys[1:2]))
    # Grey images have no colours to saturate.
    unchanged = name == "saturate" and shape[2] == 1
    assert torch.equal(result, images) == unchanged
    if name in WITHOUT_DRAWS:
        assert torch.equal(result[0], result[2])
    elif min(shape[:2]) > 8:
        assert not torch.equal(result[0], result[2])


@pytest.mark.parametrize("name", [name for name in CORRUPTIONS if name not in UNORDERED])
@pytest.mark.parametrize("side", [32, 80])
def test_severer_is_further_from_the_clean_image(name, side):
    images, keys = repeated(photograph(side, side), 12)
    corrupt = CORRUPTIONS[name].function
    # The same draws at all severities.
    found = [
        (corrupt(images.double().contiguous(), keys, setting_of(name, side, severity)).clamp(0, 255) - images)
        .abs()
        .mean()
        .item()
        for severity in SEVERITIES
    ]
    assert found == sorted(found) and found[0] > 0


def test_large_batches_are_corrupted_in_parts():
    images, keys = repeated(photograph(32, 32), 1500)
    result = corrupted(images, "contrast", 2, keys)
    assert len(result) == 1500 and torch.equal(result, result[:1].expand(1500, -1, -1, -1))
    noisy = corrupted(images, "impulse_noise", 2, keys)
    assert torch.equal(noisy[1490:], corrupted(images[1490:], "impulse_noise", 2, keys[1490:]))
    assert corrupted(images[:0], "fog", 1, keys[:0]).shape == (0, 3, 32, 32)


@pytest.mark.parametrize("side", [32, 80])
@pytest.mark.parametrize("severity", SEVERITIES)
def test_noise_is_as_strong_as_its_setting(side, severity):
    def noisy(name, level, setting):
        images = torch.full((4, 3, side, side), level, dtype=torch.float64)
        return CORRUPTIONS[name].function(images, torch.arange(4), setting)

    for name, level, factor in (("gaussian_noise", 128, 255), ("speckle_noise", 60, 60)):
        deviation = setting_of(name, side, severity)
        change = noisy(name, level, deviation) - level
        assert abs(change.std() / (factor * deviation) - 1) < 0.03 and abs(change.mean()) < 0.03 * factor * deviation
    share = setting_of("impulse_noise", side, severity) / 2
    noise = noisy("impulse_noise", 100, 2 * share)
    for level in (0, 255):
        assert abs((noise == level).double().mean() - share) < 4 * (share / noise.numel()) ** 0.5
    photons = setting_of("shot_noise", side, severity)
    counts = noisy("shot_noise", 90, photons) * photons / 255
    assert (counts - counts.round()).abs().max() < 1e-9
    mean = photons * 90 / 255
    assert abs(counts.mean() - mean) < 4 * (mean / counts.numel()) ** 0.5 and abs(counts.var() / mean - 1) < 0.07


def test_photons_are_poisson_at_every_level():
    photons, keys = 3, torch.arange(400)
    images = torch.arange(256, dtype=torch.float64).view(1, 1, 16, 16).expand(400, 1, 16, 16)
    counts = (corruption_kinds.shot_noise(images, keys, photons) * photons / 255).flatten(1)
    means = photons * torch.arange(256) / 255
    assert (counts[:, 0] == 0).all() and (counts.mean(0) - means).abs().max() < 4.5 * (3 / 400) ** 0.5
    dark = (counts == 0).double().mean(0)
    assert ((dark - (-means).exp()).abs() < 4.5 / (4 * 400) ** 0.5).all()


def test_normal_draws_are_normal():
    draws = normal(torch.arange(50), 2001)
    assert draws.shape == (50, 2001) and torch.equal(draws[3:4], normal(torch.tensor([3]), 2001))
    edges = torch.linspace(-3, 3, 25, dtype=torch.float64)
    below = (draws.flatten().unsqueeze(1) < edges).double().mean(0)
    assert (below - torch.special.ndtr(edges)).abs().max() < 0.005
    assert abs(torch.corrcoef(torch.stack([draws[:, :1000].flatten(), draws[:, 1001:].flatten()]))[0, 1]) < 0.02


@pytest.mark.parametrize(
    "name", ["gaussian_blur", "defocus_blur", "glass_blur", "motion_blur", "zoom_blur", "pixelate", "elastic_transform"]
)
@pytest.mark.parametrize("severity", SEVERITIES)
def test_a_constant_image_has_nothing_to_blur(name, severity):
    images = torch.tensor([0, 77, 255], dtype=torch.uint8).view(3, 1, 1, 1).expand(3, 1, 40, 33)
    assert torch.equal(corrupted(images, name, severity, torch.arange(3)), images)


def test_kernels_out_of_focus_are_disks():
    for radius, sigma in CORRUPTIONS["defocus_blur"].small + CORRUPTIONS["defocus_blur"].large[:3]:
        kernel = antialiased_disk(radius, sigma)
        assert abs(kernel.sum() - 1) < 1e-12 and abs(kernel - kernel.T).max() < 1e-15 > abs(kernel - kernel[::-1]).max()
    assert numpy.allclose(antialiased_disk(3, 0.1)[[4, 4, 4], [4, 7, 8]], [1 / 29, 1 / 29, 0])


def test_contrast_keeps_the_mean_and_curves_are_straight():
    image = photograph(32, 32)[None]
    changed = corrupted(image, "contrast", 4, torch.zeros(1, dtype=torch.int64)).double()
    expected = (image.double() - image.double().mean((2, 3), keepdim=True)) * 0.3
    # Rounding down takes half a level on average.
    assert (changed.mean((2, 3)) + 0.5 - image.double().mean((2, 3))).abs().max() < 0.05
    assert (changed + 0.5 - image.double().mean((2, 3), keepdim=True) - expected).abs().max() < 0.51
    floats = image / 255
    assert torch.allclose(scaled_contrast(floats, 1), floats) and torch.equal(scaled_brightness(floats, 1), floats)
    assert scaled_contrast(floats, 0).std((2, 3)).max() < 1e-6
    assert scaled_contrast(floats, 9).aminmax() == (0, 1)
    assert torch.equal(scaled_brightness(floats, 2), (2 * floats).clamp(max=1))
    assert not scaled_brightness(floats, 0).any()


def test_brightness_and_saturation_change_nothing_else_of_hsv():
    from matplotlib.colors import hsv_to_rgb, rgb_to_hsv

    image = photograph(32, 32)
    # Black, a grey and a pure colour are where formulas divide by zero.
    image[:, 0, :3] = torch.tensor([[0, 90, 200], [0, 90, 0], [0, 90, 0]], dtype=torch.uint8)
    hsv = rgb_to_hsv(image.permute(1, 2, 0).numpy() / 255)
    for name, changes in (("brightness", lambda s, v: (s, v + 0.3)), ("saturate", lambda s, v: (2.5 * s + 0.2, v))):
        hue, saturation, value = hsv[..., 0], *(part.clip(0, 1) for part in changes(hsv[..., 1], hsv[..., 2]))
        expected = 255 * hsv_to_rgb(numpy.stack([hue, saturation, value], axis=2))
        changed = corrupted(image[None], name, 5, torch.zeros(1, dtype=torch.int64))[0].permute(1, 2, 0).numpy()
        assert abs(changed + 0.5 - expected).max() < 0.5001
    grey = photograph(32, 32, 1)[None]
    brighter = corrupted(grey, "brightness", 1, torch.zeros(1, dtype=torch.int64))
    assert torch.equal(brighter, (grey + 0.05 * 255).clamp(max=255).byte())


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("side", "quality"), [(32, 40), (80, 7)])
def test_jpeg_is_pillows(channels, side, quality):
    image, file = photograph(side, side, channels), io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy().squeeze()).save(file, "JPEG", quality=quality)
    expected = torch.from_numpy(numpy.atleast_3d(numpy.array(Image.open(file)))).permute(2, 0, 1)
    assert torch.equal(corrupted(image[None], "jpeg_compression", 5, torch.zeros(1, dtype=torch.int64))[0], expected)


def test_pixels_are_blocks_of_their_mean():
    image = photograph(80, 120, 1)
    blocks = corrupted(image[None], "pixelate", 5, torch.zeros(1, dtype=torch.int64))[0, 0]
    mean = image[0].double().view(20, 4, 30, 4).mean((1, 3))
    assert (blocks.view(20, 4, 30, 4) - mean[:, None, :, None]).abs().max() <= 1


@pytest.mark.parametrize("side", [32, 80])
@pytest.mark.parametrize("name", ["snow", pytest.param("frost", marks=needs_photographs), "brightness"])
def test_weather_brightens_dark_images(name, side):
    images, keys = repeated((photograph(side, side) / 3).byte(), 10)
    for severity in SEVERITIES:
        after = corrupted(images, name, severity, keys).double().mean((1, 2, 3))
        assert after.min() > images.double().mean()


@pytest.mark.parametrize("side", [32, 128])
@pytest.mark.parametrize("severity", SEVERITIES)
def test_fog_keeps_the_largest_level_and_darkens_where_it_is_thin(side, severity):
    strength = 255 * setting_of("fog", side, severity)[0]
    foggy = corrupted(torch.full((3, 3, side, side), 120, dtype=torch.uint8), "fog", severity, torch.arange(3))
    assert foggy.amax((1, 2, 3)).tolist() == [120] * 3 and torch.equal(foggy[:, 0], foggy[:, 2])
    assert foggy.amin((1, 2, 3)).tolist() == [int(120**2 / (120 + strength))] * 3


def test_plasma_is_a_fractal_in_its_range():
    heights = corruption_weather.plasma(torch.arange(200), 32, 3)
    assert heights.shape == (200, 32, 32) and (heights.amin((1, 2)) == 0).all() and (heights.amax((1, 2)) == 1).all()
    near, far = ((heights - heights.roll(lag, 2)).abs().mean() for lag in (1, 16))
    rough = corruption_weather.plasma(torch.arange(200), 32, 1.4)
    assert near < far / 5 and (rough - rough.roll(1, 2)).abs().mean() > 2 * near
    assert heights.std(0).min() > 0.05


@needs_photographs
@pytest.mark.parametrize("size", [(32, 32), (63, 90), (64, 64), (64, 300)])
def test_frost_is_a_random_piece_of_one_of_five_photographs(size):
    keys, black = torch.arange(40), torch.zeros(40, 3, *size, dtype=torch.float64)
    pieces = corruption_weather.frost(black, keys, (0, 1, 5)).byte()
    photographs = [corruption_weather._photograph(name, 5, *size) for name in corruption_weather.FROST]
    drawn = []
    for piece in pieces:
        places = [picture.unfold(1, size[0], 1).unfold(2, size[1], 1).transpose(0, 2) for picture in photographs]
        corners = [windows[..., 0, 0].transpose(0, 1) == piece[:, 0, 0] for windows in places]
        found = [
            (number, *place)
            for number, (windows, alike) in enumerate(zip(places, corners, strict=True))
            for place in alike.all(2).nonzero().tolist()
            if torch.equal(windows[place[1], place[0]], piece)
        ]
        drawn.append(found[0])
    # The second and the third photograph are one and the same.
    assert {number for number, *_ in drawn} == {0, 1, 3, 4} and len(set(drawn)) >= 20


@pytest.mark.parametrize("severity", SEVERITIES)
def test_zoom_is_scipys_trimmed_in_the_middle(severity):
    image, (stop, step) = photograph(32, 32), CORRUPTIONS["zoom_blur"].small[severity - 1]
    levels = image.double().numpy()
    zooms, total = numpy.arange(1, stop, step), levels.copy()
    for factor in zooms:
        kept = math.ceil(32 / factor)
        first = (32 - kept) // 2
        large = ndimage.zoom(levels[:, first : first + kept, first : first + kept], (1, factor, factor), order=1)
        trim = (large.shape[1] - 32) // 2
        total += large[:, trim : trim + 32, trim : trim + 32]
    ours = corrupted(image[None], "zoom_blur", severity, torch.zeros(1, dtype=torch.int64))[0].numpy()
    assert abs(ours + 0.5 - total / (len(zooms) + 1)).max() < 0.50001


def test_frost_without_its_photographs_is_told_with_the_cure(monkeypatch):
    monkeypatch.setattr(corruption_weather.importlib.util, "find_spec", lambda name: None)
    corruption_weather._photograph.cache_clear()
    with pytest.raises(ImportError, match=r'pip install "decoupled-zoo\[corruptions\]"'):
        corrupted(photograph(32, 32)[None], "frost", 1, torch.zeros(1, dtype=torch.int64))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("fogg:3", "unknown corruption 'fogg'. Did you mean 'fog'. Choose one of: brightness, .*zoom_blur"),
        ("", "unknown corruption ''. Choose one of: "),
        ("fog", "'fog' has no severity: write NAME:SEVERITY with 1 to 5, such as fog:3"),
        ("fog:", "the severity of fog must be 1 to 5, got ''"),
        ("fog:6", "the severity of fog must be 1 to 5, got '6'"),
        ("fog:3:2", "the severity of fog must be 1 to 5, got '3:2'"),
    ],
)
def test_misspelt_corruptions_are_told(text, told):
    with pytest.raises(ValueError, match=told):
        parse_corruption(text)


def test_corruptions_are_parsed_and_bad_input_is_told():
    assert parse_corruption("jpeg_compression:5") == ("jpeg_compression", 5)
    images, keys = repeated(photograph(32, 32), 2)
    for bad, told in (
        ((images, "rain", 1, keys), "unknown corruption 'rain'"),
        ((images, "snow", 0, keys), "the severity of snow must be 1 to 5, got 0"),
        ((images / 255, "snow", 1, keys), r"images are uint8 .* got torch.float32 \(2, 3, 32, 32\) on cpu"),
        ((images[:, :2], "snow", 1, keys), r"C = 1 or 3 .*\(2, 2, 32, 32\)"),
        ((images[..., :7], "snow", 1, keys), r"at least 8 pixels, got \(32, 7\)"),
        ((images, "snow", 1, keys[:1]), r"keys are int64 \(2,\), one for each image, got torch.int64 \(1,\)"),
        ((images, "snow", 1, keys.float()), r"got torch.float32 \(2,\)"),
    ):
        with pytest.raises(ValueError, match=told):
            corrupted(*bad)


def test_digits_are_still_digits():
    digits = torch.from_numpy(numpy.round(255 * load_digits().images[:50] / 16).astype(numpy.uint8)).unsqueeze(1)
    for name in set(CORRUPTIONS) - {"frost", "saturate"}:
        changed = corrupted(digits, name, 3, torch.arange(50))
        together = torch.corrcoef(torch.stack([digits.double().flatten(), changed.double().flatten()]))[0, 1]
        assert together > 0.5, name
