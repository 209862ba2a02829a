"""JPEG 2000: what Pillow, by way of imageio, does not say of a file that it reads."""

from __future__ import annotations

from cdnctl.errors import ImageError

_START = b"\xff\x4f\xff\x51"  # markers of the codestream's start and of the size
_END = b"\xff\xd9"


def check_complete(data: bytes) -> None:
    """Refuse a file that is cut short: the decoder draws what there is, without a word."""
    start, end = data.find(_START), len(data)
    if data[start - 4 : start] == b"jp2c":  # a box, with its length in front; others may follow
        length = int.from_bytes(data[start - 8 : start - 4])
        if length > 1:  # 0: to the end of the file, 1: the length is that of very large files
            end = start - 8 + length
    if data[end - 2 : end] != _END:
        raise ImageError("the file is cut short; copy or export it again")


def depth(data: bytes) -> int:
    """Bits of the deepest channel."""
    # The size holds nine numbers and the count of channels, then the depth (and in its highest bit
    # the sign) and two steps of each channel.
    start = data.find(_START)
    channels = int.from_bytes(data[start + 40 : start + 42])
    return max(1 + depth % 128 for depth in data[start + 42 :][: 3 * channels : 3])
