"""Which files are images, by their endings."""

import functools
from pathlib import Path

from PIL import Image, ImageFile

# Pillow registers these, and decodes films not at all and PostScript by running a program of another's.
NOT_DECODED = ("EPS", "MPEG")

HEIF = (".heic", ".heics", ".heif", ".heifs", ".hif")


@functools.cache
def image_endings() -> frozenset[str]:
    """Return the endings, in small letters, of the files that Pillow decodes; where pillow-heif is, HEIC's among them.

    Pillow can open these once this has been called.
    """
    Image.init()
    try:
        # Few have it, and the others should not wait for it to be looked for.
        from pillow_heif import register_heif_opener
    except ImportError:
        pass
    else:
        register_heif_opener()
    return frozenset(ending for ending, form in Image.registered_extensions().items() if _is_decoded(form))


def cure(ending: str) -> str:
    """Return how files with an ending that is no image's are read, after all."""
    if ending in HEIF:
        return "pip install pillow-heif (extra heif) reads them"
    return f"{'convert' if ending else 'rename'} them to .jpg or .png if they are images"


def image_formats() -> list[str]:
    """Return the formats that Pillow is to open, whatever a file is called, by Pillow's names."""
    image_endings()
    return [form for form in Image.OPEN if form not in NOT_DECODED]


def has_image_ending(file: Path) -> bool:
    """Return whether a file is called like an image."""
    return file.suffix.lower() in image_endings()


def _is_decoded(form: str) -> bool:
    factory = Image.OPEN.get(form, (None,))[0]
    # Stubs know a kind of file, and leave it to others to decode it.
    is_stub = isinstance(factory, type) and issubclass(factory, ImageFile.StubImageFile)
    return factory is not None and not is_stub and form not in NOT_DECODED
