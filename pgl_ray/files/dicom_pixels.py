"""The bits of a DICOM file's pixels, as they are stored, whatever they mean.

Uncompressed pixels are taken as they stand in the file. Compressed ones are decoded by SimpleITK's GDCM, whose header
is a copy that says nothing of rescaling, sign or MONOCHROME1, so that it gives only the stored bits: ITK would invert
MONOCHROME1 and cut values to the bits stored.
"""

import io
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from pgl_ray.files.dicom_values import Encoding, Refused, Tagged, padding_of

if TYPE_CHECKING:  # comes with pgl_ray[dicom]
    from pydicom import Dataset

GE_PRIVATE = "1.2.840.113619.5.2"  # implicit VR little endian, but the pixels are big endian
UNCOMPRESSED = ("1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.1.99", "1.2.840.10008.1.2.2", GE_PRIVATE)
JPEG = "1.2.840.10008.1.2.4."
JPEG_2000 = (f"{JPEG}90", f"{JPEG}91")
COMPRESSED = (*(f"{JPEG}{one}" for one in (50, 51, 53, 55, 57, 70, 80, 81)), *JPEG_2000, "1.2.840.10008.1.2.5")
PIXELS_BEGIN, PIXELS_END = b"\xe0\x7f\x10\x00OB\0\0\xff\xff\xff\xff", b"\xfe\xff\xdd\xe0\0\0\0\0"  # of no stated length
LOSSY = tuple(f"{JPEG}{one}" for one in (50, 51, 53, 55, 81))


def is_lossy(header: Tagged, syntax: str) -> bool:
    """Whether compression has changed the values."""
    return syntax in LOSSY or str(header.get("LossyImageCompression") or "") == "01"


def frames_bits(dataset: "Dataset", of: Encoding, count: int = 1) -> Iterator[np.ndarray]:
    """The stored bits of a file's frames.

    Args:
        dataset: pydicom's, with its pixels.
        count: of frames.

    Yields:
        Unsigned integers [rows, columns].

    Raises:
        Refused: a transfer syntax that cannot be decoded.
        ValueError: fewer or more pixels than the header says, or damaged ones.
    """
    if not dataset.get("PixelData"):
        others = [one for one in ("FloatPixelData", "DoubleFloatPixelData") if one in dataset]
        raise Refused(f"{others[0]}, not HU: take the original series") if others else ValueError("no pixels in it")
    syntax = syntax_of(dataset)
    if syntax in UNCOMPRESSED or not syntax:
        yield from _raw_bits(dataset, of, count, syntax)
    elif syntax in COMPRESSED:
        parts = [dataset.PixelData]
        if count > 1:
            from pydicom.encaps import encapsulate, generate_frames

            parts = (encapsulate([one]) for one in generate_frames(dataset.PixelData, number_of_frames=count))
        for part in parts:
            yield _decoded_bits(of, syntax, part)
    else:
        raise Refused(
            f"transfer syntax {getattr(syntax, 'name', syntax)} cannot be decoded here: rewrite it uncompressed first, "
            "for instance with gdcmconv --raw"
        )


def syntax_of(dataset: "Dataset") -> str:
    """UID of a file's transfer syntax, "" where it says none."""
    return dataset.file_meta.get("TransferSyntaxUID") or ""


def _raw_bits(dataset: "Dataset", of: Encoding, count: int, syntax: str) -> Iterator[np.ndarray]:
    content, need = dataset.PixelData, of.shape[0] * of.shape[1] * (of.allocated // 8)
    if len(content) < need * count:
        raise ValueError(f"{len(content)} bytes of pixels, {need * count} expected")
    if len(content) - need * count > of.shape[1] * (of.allocated // 8):  # else padding at the end
        raise Refused(
            f"{len(content)} bytes of pixels, {need * count} expected: Rows, Columns, BitsAllocated or NumberOfFrames "
            "are wrong, mend the header"
        )
    little = dataset.original_encoding[1] is not False and syntax != GE_PRIVATE
    stored, own = f"{'<' if little else '>'}u{of.allocated // 8}", f"u{of.allocated // 8}"
    for k in range(count):
        bits = np.frombuffer(content, stored, of.shape[0] * of.shape[1], k * need)
        yield bits.astype(own, copy=False).reshape(of.shape)


@lru_cache(maxsize=8)
def _plain_header(shape: tuple[int, int], allocated: int, syntax: str) -> bytes:
    """A DICOM file up to its pixels that says nothing of rescaling, sign or MONOCHROME1."""
    from pydicom.dataset import FileDataset, FileMetaDataset

    meta = FileMetaDataset()
    meta.TransferSyntaxUID, meta.MediaStorageSOPClassUID = syntax, "1.2.840.10008.5.1.4.1.1.2"
    meta.MediaStorageSOPInstanceUID = "1.2.3"
    plain = FileDataset(None, {}, file_meta=meta, preamble=b"\0" * 128)
    plain.SOPClassUID, plain.SOPInstanceUID, plain.Modality = meta.MediaStorageSOPClassUID, "1.2.3", "CT"
    plain.Rows, plain.Columns = shape
    plain.SamplesPerPixel, plain.PhotometricInterpretation, plain.PixelRepresentation = 1, "MONOCHROME2", 0
    plain.BitsAllocated = plain.BitsStored = allocated
    plain.HighBit = allocated - 1
    content = io.BytesIO()
    plain.save_as(content, enforce_file_format=True)
    return content.getvalue()


def _decoded_bits(of: Encoding, syntax: str, items: bytes) -> np.ndarray:
    """The stored bits of one compressed frame, given as the items of a PixelData element."""
    import SimpleITK as sitk

    with tempfile.NamedTemporaryFile(suffix=".dcm") as file:
        file.write(_plain_header(of.shape, of.allocated, str(syntax)) + PIXELS_BEGIN + items + PIXELS_END)
        file.flush()
        reader = sitk.ImageFileReader()
        reader.SetImageIO("GDCMImageIO")
        reader.SetFileName(file.name)
        with _decoders_words() as words:
            try:
                values = sitk.GetArrayFromImage(reader.Execute())[0]
            except RuntimeError:
                raise ValueError("its pixels cannot be decoded") from None
            if b"Corrupt" in words():
                raise ValueError("its JPEG stream is corrupt")
    if values.shape != of.shape:
        raise ValueError(f"picture of {values.shape[::-1]}, its header says {of.shape[::-1]}")
    if values.dtype.kind not in "iu" or values.itemsize > of.allocated // 8:
        raise ValueError(f"its decoded pixels are of type {values.dtype}")
    return values.astype(f"u{of.allocated // 8}")


def with_own_sign(dataset: "Dataset", header: Tagged, of: Encoding) -> Encoding:
    """The encoding with the sign that a JPEG 2000 stream states of itself, which is what its decoder goes by; headers
    often contradict it."""
    if syntax_of(dataset) not in JPEG_2000 or "PixelData" not in dataset:
        return of
    place = dataset.PixelData.find(b"\xff\x4f\xff\x51")  # start of codestream, then its size marker
    if place < 0 or len(dataset.PixelData) < place + 43:
        return of
    signed = dataset.PixelData[place + 42] >= 128
    if signed == of.signed:
        return of
    of = of._replace(signed=signed)
    return of._replace(padding=of.padding and padding_of(header, of))


@contextmanager
def _decoders_words() -> Iterator[Callable[[], bytes]]:
    """Catches what GDCM's JPEG decoders write to the process's stderr: chatter at every 12-bit slice, and that a stream
    is corrupt, where they nevertheless give a picture."""
    stderr_copy = os.dup(2)
    with tempfile.TemporaryFile() as file:

        def words() -> bytes:
            file.seek(0)
            return file.read()

        try:
            os.dup2(file.fileno(), 2)
            yield words
        finally:
            os.dup2(stderr_copy, 2)
            os.close(stderr_copy)
