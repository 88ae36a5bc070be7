"""The idx format of MNIST: a header of sizes, then bytes. Every inconsistency is named.

Header, big-endian: two zero bytes, one byte for the type (0x08: unsigned byte), one for the
number of dimensions, and four bytes for each dimension. Uncompressed files carry no checksum:
there a changed pixel, or a label changed to another valid one, can't be noticed.
"""

import math
import os
import pathlib
import struct

import numpy as np

from fedjax_lab import reading

_UNSIGNED_BYTE = 0x08
_FILES = {
    split: (f"{stem}-images{{}}idx3-ubyte", f"{stem}-labels{{}}idx1-ubyte")
    for split, stem in (("train", "train"), ("test", "t10k"))
}


def find(folders: list[pathlib.Path]) -> dict[str, tuple[pathlib.Path, pathlib.Path]] | None:
    """MNIST's four files, ``{"train": (images, labels), "test": ...}``, of the first folder with all.

    Both spellings (``train-images-idx3-ubyte`` and ``train-images.idx3-ubyte``) are known, gzipped
    or not.
    """
    for folder in folders:
        found = {}
        for split, (images, labels) in _FILES.items():
            pair = _one(folder, images), _one(folder, labels)
            if pair[0] and pair[1]:
                found[split] = pair
        if len(found) == len(_FILES):
            return found
    return None


def _one(folder: pathlib.Path, pattern: str) -> pathlib.Path | None:
    names = [pattern.format(mark) + end for mark in "-." for end in (".gz", "")]
    return next((folder / name for name in names if (folder / name).is_file()), None)


def read_images(images: str | os.PathLike, labels: str | os.PathLike) -> dict[str, np.ndarray]:
    """A pair of idx files: ``x: uint8[rows, height, width]`` and ``y: uint8[rows]``.

    Raises:
      ValueError: naming the file and the field (header, images or labels): truncated, too long,
        altered (of gzip files), another type or number of dimensions, different numbers of rows.
    """
    x, y = read_idx(images, "images", 3), read_idx(labels, "labels", 1)
    if len(x) != len(y):
        raise ValueError(f"{labels}: the header counts {len(y)} labels, but {images} has {len(x)} images")
    return {"x": x, "y": y}


def read_idx(path: str | os.PathLike, what: str, ndim: int) -> np.ndarray:
    """The unsigned bytes of one idx file, of ``ndim`` dimensions; ``what`` names its content."""
    start = 4 + 4 * ndim
    raw = reading.read_bytes(path, lambda done: "the header" if done < start else f"the {what}")
    if len(raw) < start:
        raise ValueError(f"{path}: the header is cut off: {len(raw)} of {start} bytes")
    zero, kind, dimensions = struct.unpack(">HBB", raw[:4])
    if zero != 0 or kind != _UNSIGNED_BYTE or dimensions != ndim:
        raise ValueError(
            f"{path}: the header begins with {raw[:4].hex()}, but an idx file of {what} (unsigned "
            f"bytes, {ndim} dimensions) with 0000{_UNSIGNED_BYTE:02x}{ndim:02x}"
        )
    shape = struct.unpack(f">{ndim}I", raw[4:start])
    expected = math.prod(shape)
    if not expected:
        raise ValueError(f"{path}: the header gives the shape {shape}: there are no {what}")
    if len(raw) - start != expected:
        state = "cut off" if len(raw) - start < expected else "too long"
        raise ValueError(
            f"{path}: the {what} are {state}: the header gives the shape {shape}, {expected} bytes, "
            f"but {len(raw) - start} follow it"
        )
    return np.frombuffer(raw, np.uint8, offset=start).reshape(shape)
