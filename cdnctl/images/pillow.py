"""Everything but TIFF and camera raw, by Pillow as long as it keeps every bit.

imageio is the way in for formats that hold no more than pixels and perhaps their resolution, and
the way out for all that is written here. It comes to the same pixels and bytes as Pillow alone.
It reads EXIF before the pixels, though, and fails where that is damaged; it opens a WebP or AVIF
file a second time, which takes the memory of a picture; and it does not read the chunks behind
the pixels of PNG. So these formats, and JPEG, are read by Pillow itself.
"""

from __future__ import annotations

import io
import struct
from typing import Any

import imageio.v3 as iio
import numpy as np
import PIL.Image

from cdnctl.errors import ImageError
from cdnctl.images import jpeg2000, png
from cdnctl.images.build import check_frames, check_size, cmyk_to_rgb, make_image
from cdnctl.images.image import Image, Metadata
from cdnctl.images.metadata import EXIF_PREFIX, as_bytes, checked_dpi, reset_orientation

QUALITY = 95
"""Quality of lossy files, on the usual scale up to 100; colour is not subsampled."""

DTYPES = dict.fromkeys((".jpg", ".jpeg", ".webp", ".bmp", ".heic", ".heif"), ("uint8",))
_PLAIN = ("BMP", "GIF", "PPM", "QOI", "JPEG2000", "SGI", "SUN")  # read by imageio
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "PPM", "AVIF", "QOI", "JPEG2000", "SGI", "SUN")
LOSSY = (".jpg", ".jpeg", ".webp", ".heic", ".heif")  # that have a quality
READ_ONLY = frozenset({".gif", ".pgm", ".pbm", ".ppm", ".avif", ".qoi", ".tga"})
READ_ONLY |= {".jp2", ".j2k", ".sgi", ".ras"}
_SUFFIXES = {
    "PNG": ".png", "JPEG": ".jpg", "MPO": ".jpg", "WEBP": ".webp", "BMP": ".bmp", "HEIF": ".heic",
}  # fmt: skip
_IPTC_RESOURCE = 0x0404  # of those that Photoshop puts into JPEG files
JPEG_SEGMENT = 65_000  # bytes: what is sure to fit into one JPEG segment


def decode(data: bytes, suffix: str, max_pixels: int) -> Image:
    """Decode everything but TIFF and camera raw."""
    formats = FORMATS + (("TGA",) if suffix == ".tga" else ())
    if _is_heif(data):
        _heif_plugin()
        formats = ("HEIF",)
    # Opening a WebP file already sets memory aside for the size that its header claims.
    if size := webp_size(data):
        check_size(*size, max_pixels)
    PIL.Image.init()  # loads the less common formats; nothing the second time
    with PIL.Image.open(io.BytesIO(data), formats=formats) as picture:
        packs_any = picture.format in ("WEBP", "AVIF", "HEIF", "JPEG2000")
        check_size(*picture.size, max_pixels, None if packs_any else data)
        notes: list[str] = []
        if picture.format == "MPO":
            notes.append("only the main picture of a multi-picture JPEG was read")
        else:
            check_frames(getattr(picture, "n_frames", 1))
        if picture.format == "PNG":
            png.check_rows(data)
        if picture.format == "JPEG2000":
            jpeg2000.check_complete(data)
        bits = _bits(picture, data)
        if picture.format == "PNG" and bits == 16 and picture.mode != "I;16":
            samples = png.deep_samples(picture, data)
        elif picture.format == "JPEG2000" and bits not in (8, 16):
            raise ImageError(
                f"its {bits} bits a sample are not known here; convert it to PNG first"
            )
        elif bits > 8 and picture.mode not in ("I", "I;16", "F"):
            raise ImageError(
                f"its {bits} bits a sample would be cut to 8; convert it to a 16-bit PNG first"
            )
        else:
            samples = _samples(picture, data, notes)
        info = picture.info
        orientation, exif = reset_orientation(info.get("exif"), notes)
        profile = info.get("icc_profile") or None
        metadata = Metadata(
            icc=None if picture.mode == "CMYK" else profile,
            exif=exif,
            xmp=as_bytes(info.get("xmp")),
            iptc=as_bytes(info.get("photoshop", {}).get(_IPTC_RESOURCE)),
            dpi=checked_dpi(info.get("dpi")),
            comment=as_bytes(info.get("comment")),
            png=png.extras(data) if picture.format == "PNG" else (),
        )
        lossy = picture.format in ("JPEG", "MPO", "AVIF", "HEIF", "JPEG2000") or (
            picture.format == "WEBP" and b"VP8L" not in riff_chunks(data)
        )
    return make_image(
        samples,
        orientation=orientation,
        metadata=metadata,
        notes=notes,
        lossless=not lossy,
        suffix=_SUFFIXES.get(picture.format or "", ".png"),
    )


def jpeg_orientation(data: bytes) -> int:
    """The EXIF orientation, 1 to 8, of a JPEG file that can be decoded."""
    with PIL.Image.open(io.BytesIO(data), formats=["JPEG"]) as picture:
        return reset_orientation(picture.info.get("exif"), [])[0]


def webp_size(data: bytes) -> tuple[int, int] | None:
    """Return width and height by the first chunk of a WebP file; None for other files."""
    if data[:4] != b"RIFF" or data[8:12] != b"WEBP" or len(data) < 30:
        return None
    if data[12:16] == b"VP8X":
        width, height = (int.from_bytes(data[i : i + 3], "little") for i in (24, 27))
        return 1 + width, 1 + height
    if data[12:16] == b"VP8L":  # 14 bits each, behind a byte of signature
        bits = int.from_bytes(data[21:25], "little")
        return 1 + bits % 2**14, 1 + (bits >> 14) % 2**14
    # 14 bits each, and two of scale, behind a frame tag and a start code of three bytes.
    width, height = (int.from_bytes(data[i : i + 2], "little") for i in (26, 28))
    return width % 2**14, height % 2**14


def _bits(picture: PIL.Image.Image, data: bytes) -> int:
    """Return the bits of a sample in the file, where Pillow may hand out fewer."""
    if picture.format == "PNG":
        return data[24]  # the header chunk always comes first
    if picture.format == "AVIF":
        at = data.find(b"pixi")  # box: name, version and flags (4), channels (1), bits of each
        return data[at + 9] if at >= 0 else 8
    if picture.format == "HEIF":
        return int(picture.info.get("bit_depth", 8))
    if picture.format == "JPEG2000":
        return jpeg2000.depth(data)
    if picture.format == "SGI":
        return 8 * data[3]
    if picture.format == "PPM":
        args = picture.tile[0].args  # type: ignore[attr-defined]
        return 16 if isinstance(args, tuple) and args[-1] > 255 else 8
    return 8


def _samples(picture: PIL.Image.Image, data: bytes, notes: list[str]) -> np.ndarray:
    """Decode an open Pillow picture to samples (H, W) or (H, W, C), with any change noted."""
    plain = picture.format in _PLAIN
    if not plain:
        picture.load()  # here, and not in convert, so that `mode` and `info` are final
    mode = picture.mode

    def pixels(target: str | None = None) -> np.ndarray:
        if plain:
            return _plain_pixels(data, picture.size, target)
        return np.asarray(picture.convert(target) if target else picture)

    if mode == "I" and picture.format == "PPM":  # Pillow's scaling of PGM is to 65535
        return pixels().astype(np.uint16)
    if mode in ("I;16", "I;16L", "I;16B"):
        if "transparency" in picture.info:
            notes.append("the transparent gray level was left as it is")
        return pixels().astype(np.uint16)
    if mode == "F":
        return pixels()
    if mode in ("P", "PA"):
        transparent = mode == "PA" or "transparency" in picture.info
        notes.append("palette image converted to RGB")
        return pixels("RGBA" if transparent else "RGB")
    if mode == "1":
        notes.append("1-bit samples stored as uint8")
        return pixels("L")
    if mode == "CMYK":
        notes.append("CMYK converted to RGB")
        return np.asarray(cmyk_to_rgb(picture, picture.info.get("icc_profile")))
    if mode in ("L", "RGB") and "transparency" in picture.info:
        notes.append("the transparent colour was turned into an alpha channel")
        return pixels("LA" if mode == "L" else "RGBA")
    if mode in ("L", "LA", "RGB", "RGBA"):
        return pixels()
    if mode in ("YCbCr", "RGBX"):
        notes.append(f"{mode} converted to RGB")
        return pixels("RGB")
    raise ImageError(f"its colour mode {mode} is not known here; convert it to RGB first")


def _plain_pixels(data: bytes, size: tuple[int, int], mode: str | None) -> np.ndarray:
    """Decode a picture of a known size, converted to another mode of Pillow's if one is given."""
    file = iio.imopen(io.BytesIO(data), "r", plugin="pillow")
    with file:
        # It tries formats that are not known here too, and one of them may take the file.
        if file.properties(index=0).shape[1::-1] != size:
            raise ImageError("the file is damaged; copy or export it again")
        options: Any = {"mode": mode} if mode else {}
        return file.read(index=0, writeable_output=False, **options)


def _is_heif(data: bytes) -> bool:
    brands = data[8 : int.from_bytes(data[:4], "big")][:64]
    return data[4:8] == b"ftyp" and b"hei" in brands and b"avif" not in brands


def _heif_plugin() -> None:
    """Teach Pillow HEIC."""
    try:
        import pillow_heif
    except ImportError:
        raise ImageError('HEIC needs an extra package; run: pip install "cdnctl[heic]"') from None
    pillow_heif.register_heif_opener()


def riff_chunks(data: bytes) -> set[bytes]:
    """Return the names of the chunks of a WebP file."""
    names, at = set(), 12
    while at + 8 <= len(data):
        names.add(data[at : at + 4])
        size = int.from_bytes(data[at + 4 : at + 8], "little")
        at += 8 + size + size % 2
    return names


def takes_profile(suffix: str, meta: Metadata) -> bool:
    """Whether a format has room for the ICC profile; WebP, which is RGB only, not for gray's."""
    return not (suffix == ".webp" and (meta.icc or b"")[16:20] == b"GRAY")


def _photoshop_segment(iptc: bytes) -> bytes:
    """The JPEG segment APP13 with an IPTC record, an empty name and nothing else."""
    resource = struct.pack(">4sHHI", b"8BIM", _IPTC_RESOURCE, 0, len(iptc)) + iptc
    content = b"Photoshop 3.0\0" + resource + bytes(len(iptc) % 2)
    return b"\xff\xed" + struct.pack(">H", 2 + len(content)) + content


def encode(samples: np.ndarray, image: Image, suffix: str, quality: int | None = None) -> bytes:
    """Encode uint8 samples as JPEG, WebP, BMP or HEIC.

    quality: up to 100; None: QUALITY, and WebP without loss if the picture came so.
    """
    meta = image.metadata
    lossless, quality = image.lossless and quality is None, quality or QUALITY
    options: dict[str, Any] = {}
    if meta.icc and takes_profile(suffix, meta):
        options["icc_profile"] = meta.icc
    limit = JPEG_SEGMENT if suffix in (".jpg", ".jpeg") else 2**32
    if meta.exif and len(meta.exif) <= limit:
        options["exif"] = EXIF_PREFIX + meta.exif
    if meta.xmp and len(meta.xmp) <= limit:
        options["xmp"] = meta.xmp
    if meta.dpi:
        options["dpi"] = tuple(min(max(dpi, 1), 65535) for dpi in meta.dpi)
    if suffix in (".heic", ".heif"):
        _heif_plugin()
        options |= {"quality": quality, "chroma": 444}
    elif suffix == ".webp":
        # exact: keep the colour under alpha 0
        options |= {"quality": quality, "lossless": lossless, "exact": True}
    elif suffix == ".bmp":
        options = {"dpi": options["dpi"]} if meta.dpi else {}
    else:
        options |= {"quality": quality, "subsampling": "4:4:4"}
        if meta.iptc and len(meta.iptc) <= JPEG_SEGMENT:
            options["extra"] = _photoshop_segment(meta.iptc)
        if meta.comment and len(meta.comment) <= JPEG_SEGMENT:
            options["comment"] = meta.comment
    plane = samples[:, :, 0] if samples.shape[2] == 1 else samples
    return iio.imwrite(
        "<bytes>", plane, plugin="pillow", extension=suffix, is_batch=False, **options
    )
