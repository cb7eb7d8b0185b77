"""files/dicom_values and dicom_grid: every way to store pixels gives the HU, or is refused by name."""

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from dicom_files import ct_series, new_file, save
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.uid import RLELossless

from pgl_ray.files import ct

SHAPE = (4, 20, 30)  # slices, rows, columns


def hu(low=-1000, high=1900, seed=0):
    """HU [slices, rows, columns] with both bounds in every slice."""
    volume = np.random.default_rng(seed).integers(low, high + 1, SHAPE)
    volume[:, 0, 0], volume[:, 0, 1] = low, high
    return volume


def stored_as(volume, pattern, **tags):
    """Slices whose pixels are the given bit patterns, uint16 or uint32 [slices, rows, columns]."""
    defaults = {"BitsAllocated": 8 * pattern.dtype.itemsize, "slope": 1, "intercept": 0}
    tags = defaults | tags
    slope, intercept = tags.pop("slope"), tags.pop("intercept")
    return ct_series(pattern, slope=slope, intercept=intercept, **tags)


def same(folder, volume):
    scan = ct.read_scan(folder)
    np.testing.assert_array_equal(scan.voxels, volume)
    return scan


def u16(values):
    return (np.asarray(values) % 2**16).astype(np.uint16)


TWELVE = {"BitsStored": 12, "HighBit": 11}
SIXTEEN = {"BitsStored": 16, "HighBit": 15}
ENCODINGS = {
    "plain": (lambda v: u16(v + 1024), TWELVE | {"PixelRepresentation": 0, "intercept": -1024}),
    "monochrome 1": (
        lambda v: u16(v + 1024),
        TWELVE | {"PixelRepresentation": 0, "intercept": -1024, "PhotometricInterpretation": "MONOCHROME1"},
    ),
    "upper bits alike": (lambda v: u16(v + 1024) | 0xB000, TWELVE | {"PixelRepresentation": 0, "intercept": -1024}),
    "in the upper twelve": (
        lambda v: u16((v + 1024) << 4),
        {"BitsStored": 12, "HighBit": 15, "PixelRepresentation": 0, "intercept": -1024},
    ),
    "in the upper twelve, other things below": (
        lambda v: u16((v + 1024) << 4) | u16(np.arange(v.size).reshape(v.shape) % 16),
        {"BitsStored": 12, "HighBit": 15, "PixelRepresentation": 0, "intercept": -1024},
    ),
    "signed, extended": (u16, TWELVE | {"PixelRepresentation": 1}),
    "signed, upper bits empty": (lambda v: u16(v) & 0x0FFF, TWELVE | {"PixelRepresentation": 1}),
    "signed, upper bits alike": (lambda v: u16(v) & 0x0FFF | 0x5000, TWELVE | {"PixelRepresentation": 1}),
    "signed in the upper twelve": (
        lambda v: u16(v << 4),
        {"BitsStored": 12, "HighBit": 15, "PixelRepresentation": 1},
    ),
    "signed 16": (u16, SIXTEEN | {"PixelRepresentation": 1}),
    "offset 8192": (lambda v: u16(v + 8192), SIXTEEN | {"PixelRepresentation": 0, "intercept": -8192}),
    "quarter slope": (
        lambda v: u16((v + 1024) * 4),
        SIXTEEN | {"PixelRepresentation": 0, "slope": "0.25", "intercept": "-1024.0"},
    ),
    "slope missing": (lambda v: u16(v + 1024), TWELVE | {"PixelRepresentation": 0, "slope": None, "intercept": -1024}),
    "32 bits": (
        lambda v: (v + 1024).astype(np.uint32),
        {"BitsStored": 32, "HighBit": 31, "PixelRepresentation": 0, "intercept": -1024},
    ),
    "signed 32": (
        lambda v: (v % 2**32).astype(np.uint32),
        {"BitsStored": 32, "HighBit": 31, "PixelRepresentation": 1},
    ),
    "20 of 32": (
        lambda v: (v % 2**32).astype(np.uint32) & 0xFFFFF,
        {"BitsStored": 20, "HighBit": 19, "PixelRepresentation": 1},
    ),
}


@pytest.mark.parametrize("pack, tags", ENCODINGS.values(), ids=ENCODINGS)
def test_stored_bits_give_the_hu_that_were_written(tmp_path, pack, tags):
    volume = hu()
    assert not same(save(stored_as(volume, pack(volume), **tags), tmp_path / "a"), volume).notes


@pytest.mark.parametrize(
    "unit",
    ["hu", "HU ", " Hu", "Houndsfield Unit", "HOUNSFIELD UNITS", "Hounsfield units (HU)", "Hounsfield", "", "US"],
)
def test_the_unit_is_judged_by_its_meaning(tmp_path, unit):
    volume = hu()
    files = stored_as(volume, u16(volume), PixelRepresentation=1, RescaleType=unit)
    same(save(files, tmp_path / "a"), volume)


UNITS = {
    "OD": "pixels are in OD, so its values are not HU",
    "MGML": "pixels are in MGML",
    "HU_MOD": "pixels are in HU_MOD",
    "Z_EFF": "pixels are in Z_EFF",
    "CNTS": "pixels are in CNTS",
}


@pytest.mark.parametrize("unit, message", UNITS.items())
def test_other_units_are_refused(tmp_path, unit, message):
    with pytest.raises(ValueError, match=message):
        ct.read_scan(save(stored_as(hu(), u16(hu()), PixelRepresentation=1, RescaleType=unit), tmp_path / "a"))


def test_an_unspecified_unit_has_to_show_hu(tmp_path):
    files = stored_as(hu(), u16(hu(0, 1000)), PixelRepresentation=1, RescaleType="US")
    with pytest.raises(ValueError, match=r"pixels are in US .* none lies below -500 as air does in HU"):
        ct.read_scan(save(files, tmp_path / "a"))
    kind = ["DERIVED", "PRIMARY", "TOMOSYNTHESIS", "GENERATED_2D"]
    files = stored_as(hu(), u16(hu()), PixelRepresentation=1, RescaleType="US", ImageType=kind)
    with pytest.raises(ValueError, match="pixels are in US of a tomosynthesis"):
        ct.read_scan(save(files, tmp_path / "b"))


def test_a_perfusion_map_is_no_ct(tmp_path):
    mapping, unit = Dataset(), Dataset()
    unit.CodeValue, mapping.LUTExplanation = "ml/100ml/s", "Blood Flow"
    mapping.MeasurementUnitsCodeSequence = [unit]
    files = stored_as(hu(), u16(hu()), PixelRepresentation=1, RealWorldValueMappingSequence=[mapping])
    with pytest.raises(ValueError, match=r"pixels are in ml/100ml/s \(Blood Flow\), not HU"):
        ct.read_scan(save(files, tmp_path / "a"))
    unit.CodeValue = "[hnsf'U]"
    same(save(files, tmp_path / "b"), hu())


DOUBTFUL = {
    "slope 0": ({"slope": 0}, u16(hu()), "RescaleSlope is 0, which makes all voxels alike"),
    "slope -1": ({"slope": -1}, u16(hu()), "RescaleSlope is -1, which turns dense into thin"),
    "no number": ({"intercept": None}, u16(hu()), "has no RescaleIntercept"),
    "table": ({"ModalityLUTSequence": [Dataset()]}, u16(hu()), "pass through a table"),
    "signed in doubt": ({"intercept": -1024, **TWELVE}, u16(hu(0, 3000)), "pixels may be below air or above 2048"),
    "more bits": ({**TWELVE}, u16(hu(-3000, 3000)), "use bits beyond the 12 that its header says"),
    "more bits, unsigned": (
        {**TWELVE, "PixelRepresentation": 0, "intercept": -1024},
        u16(hu(0, 6000)),
        "use bits beyond the 12",
    ),
    "impossible": ({"BitsStored": 12, "HighBit": 5}, u16(hu()), "BitsStored 12, HighBit 5 .* do not go together"),
    "no sign": ({"PixelRepresentation": None}, u16(hu()), "has no valid PixelRepresentation"),
    "twice the pixels": ({"Rows": 10}, u16(hu()), "1200 bytes of pixels, 600 expected"),
    "any size": ({"Rows": 65535, "Columns": 65535}, u16(hu()), "1200 bytes of pixels, 8589672450 expected"),
    "micron": ({"PixelSpacing": [700.0, 700.0]}, u16(hu()), "PixelSpacing .* outside 0.005 to 50"),
    "metres": ({"PixelSpacing": [0.0007, 0.0007]}, u16(hu()), "PixelSpacing .* outside 0.005 to 50"),
    "floats": ({"FloatPixelData": b"\0" * 8, "PixelData": None}, u16(hu()), "FloatPixelData, not HU"),
}


@pytest.mark.parametrize("tags, pattern, message", DOUBTFUL.values(), ids=DOUBTFUL)
def test_what_is_in_doubt_is_refused_by_name(tmp_path, tags, pattern, message):
    files = stored_as(hu(), pattern, **({"PixelRepresentation": 1} | tags))
    for file in files:
        for tag in [tag for tag, value in tags.items() if value is None and tag not in ("slope", "intercept")]:
            delattr(file, tag)
    with pytest.raises(ValueError, match=message) as caught:
        ct.read_scan(save(files, tmp_path / "a"))
    assert "000.dcm" in str(caught.value) and "\n" not in str(caught.value)


def test_slices_far_apart_are_refused(tmp_path):
    files = stored_as(hu(), u16(hu()), PixelRepresentation=1, step=(0, 0, 500))
    with pytest.raises(ValueError, match="slices lie 500 mm apart"):
        ct.read_scan(save(files, tmp_path / "a"))


def test_an_overlay_in_the_upper_bits_is_no_value(tmp_path):
    volume = hu()
    overlay = (np.arange(volume.size).reshape(volume.shape) % 3 == 0).astype(np.uint16) << 13
    files = stored_as(volume, u16(volume + 1024) | overlay, intercept=-1024, PixelRepresentation=0, **TWELVE)
    with pytest.raises(ValueError, match="use bits beyond the 12"):
        ct.read_scan(save(files, tmp_path / "a"))
    for file in files:
        file.add_new((0x6000, 0x0102), "US", 13)
    same(save(files, tmp_path / "b"), volume)


@pytest.mark.parametrize("vr, value", [("SS", -2000), ("US", 63536)])
@pytest.mark.parametrize("tags", [SIXTEEN, TWELVE], ids=["16 bits", "12 bits"])
def test_padding_may_be_stated_signed_or_unsigned(tmp_path, vr, value, tags):
    volume = hu()
    pattern = u16(volume)
    pattern[:, 3, 4:9] = u16(-2000)
    files = stored_as(volume, pattern, PixelRepresentation=1, **tags)
    for file in files:
        file.add_new("PixelPaddingValue", vr, value)
    volume[:, 3, 4:9] = -1024
    assert same(save(files, tmp_path / "a"), volume).num_padding == 20


def test_padding_beyond_the_stored_bits_does_not_count(tmp_path):
    volume = hu()
    pattern = u16(volume)
    pattern[:, 3, 4:9] = u16(-3024)  # 12 bits cannot hold it, and would make it 1072
    files = stored_as(volume, pattern, PixelRepresentation=1, **TWELVE)
    for file in files:
        file.add_new("PixelPaddingValue", "SS", -3024)
    volume[:, 3, 4:9] = -1024
    same(save(files, tmp_path / "a"), volume)


# -- transfer syntaxes ------------------------------------------------------------------------------------------------


def compressed(file, pixels, compressor):
    """Compresses a slice's pixels with ITK or, RLE, with pydicom."""
    if compressor == "RLE":
        file.compress(RLELossless, generate_instance_uid=False)
        return
    writer = sitk.ImageFileWriter()
    writer.SetImageIO("GDCMImageIO")
    writer.UseCompressionOn()
    writer.SetCompressor(compressor)
    writer.SetFileName(file.part)
    writer.Execute(sitk.GetImageFromArray(np.ascontiguousarray(pixels)[None]))
    done = pydicom.dcmread(file.part)
    file.PixelData, file.file_meta.TransferSyntaxUID = done.PixelData, done.file_meta.TransferSyntaxUID
    file["PixelData"].is_undefined_length = True


@pytest.mark.parametrize("compressor", ["JPEG", "JPEG2000", "RLE"])
@pytest.mark.parametrize("mono", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("stated", ["right", "wrong"])
def test_compressed_values_and_their_sign(tmp_path, compressor, mono, signed, stated):
    """JPEG 2000 says its sign itself; the others' header decides, and a wrong one never gives other HU in silence."""
    volume = hu(-1000, 900)
    pixels = volume.astype(np.int16) if signed else (volume + 1024).astype(np.uint16)
    files = ct_series(pixels, intercept=0 if signed else -1024)
    for file, one in zip(files, pixels):
        file.part = str(tmp_path / "part.dcm")
        compressed(file, one, compressor)
        file.PhotometricInterpretation = mono
        file.PixelRepresentation = int(signed == (stated == "right"))
    folder = save(files, tmp_path / "a")
    if stated == "wrong" and signed and compressor != "JPEG2000":
        with pytest.raises(ValueError, match=r"values from .* HU lie in"):
            ct.read_scan(folder)
    else:
        same(folder, volume)


def test_ge_private_syntax_and_files_that_name_none(tmp_path):
    volume = hu()
    for name, syntax, implicit, swap in (("ge", "1.2.840.113619.5.2", True, True), ("none", None, True, False)):
        files = ct_series(u16(volume + 1024))
        (tmp_path / name).mkdir()
        for k, file in enumerate(files):
            if swap:
                file.PixelData = np.frombuffer(file.PixelData, np.uint16).byteswap().tobytes()
            del file.file_meta.TransferSyntaxUID
            if syntax:
                file.file_meta.TransferSyntaxUID = syntax
            pydicom.dcmwrite(tmp_path / name / f"{k}.dcm", file, implicit_vr=implicit, little_endian=True)
        same(tmp_path / name, volume)


def test_an_unknown_syntax_names_what_to_do(tmp_path):
    files = ct_series(u16(hu() + 1024))
    for file in files:
        file.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.4.201"
        file.PixelData = encapsulate([file.PixelData])
        file["PixelData"].is_undefined_length = True
    with pytest.raises(
        ValueError, match=r"High-Throughput JPEG 2000 .* rewrite it uncompressed first, .* gdcmconv --raw"
    ):
        ct.read_scan(save(files, tmp_path / "a"))


def test_loss_is_said(tmp_path):
    files = ct_series(u16(hu() + 1024), LossyImageCompression="01")
    assert "compressed with loss" in ct.read_scan(save(files, tmp_path / "a")).notes[0]


# -- multi-frame ------------------------------------------------------------------------------------------------------


def enhanced(volume, places, **shared_rescale):
    """One enhanced CT file of HU [frames, rows, columns]."""
    file = new_file("1.2.840.10008.5.1.4.1.1.2.1", "CT", ImageType=["ORIGINAL", "PRIMARY", "VOLUME", "NONE"])
    file.NumberOfFrames, file.Rows, file.Columns = volume.shape
    file.SamplesPerPixel, file.PhotometricInterpretation, file.PixelRepresentation = 1, "MONOCHROME2", 0
    file.BitsAllocated, file.BitsStored, file.HighBit = 16, 12, 11
    shared, orientation, size = Dataset(), Dataset(), Dataset()
    orientation.ImageOrientationPatient, size.PixelSpacing = [1, 0, 0, 0, 1, 0], [0.8, 0.7]
    shared.PlaneOrientationSequence, shared.PixelMeasuresSequence = [orientation], [size]
    file.SharedFunctionalGroupsSequence, groups, raw = [shared], [], []
    for k, place in enumerate(places):
        frame, position, scale = Dataset(), Dataset(), Dataset()
        position.ImagePositionPatient, frame.PlanePositionSequence = [-30, 20, place], [position]
        scale.RescaleSlope, scale.RescaleIntercept, scale.RescaleType = 1 + k % 2, -1024 - k, "HU"
        frame.PixelValueTransformationSequence = [scale]
        raw.append(((volume[k] + 1024 + k) // (1 + k % 2)).astype(np.uint16))
        groups.append(frame)
    file.PerFrameFunctionalGroupsSequence = groups
    file.PixelData = np.stack(raw).astype("<u2").tobytes()
    expected = np.stack([one.astype(int) * (1 + k % 2) - 1024 - k for k, one in enumerate(raw)])
    return file, expected


@pytest.mark.parametrize("compress", [False, True])
def test_an_enhanced_file_is_read_frame_by_frame(tmp_path, compress):
    places = (10.0, 0.0, 5.0, 15.0)
    file, expected = enhanced(hu(), places)
    if compress:
        file.compress(RLELossless, generate_instance_uid=False)
    folder = save([file], tmp_path / "a")
    scan = same(folder, expected[[1, 2, 0, 3]])
    assert scan.spacing_mm == pytest.approx((5, 0.8, 0.7)) and ct.extent(folder)[0] == expected.size
    np.testing.assert_allclose((scan.affine @ (2, 0, 0, 1))[:3] * (-1, -1, 1), (-30, 20, 10))


def test_frames_without_places_name_the_tool(tmp_path):
    file, _ = enhanced(hu(), (0.0, 5, 10, 15))
    del file.PerFrameFunctionalGroupsSequence
    with pytest.raises(ValueError, match=r"4 frames in one file, without a place for each: .*dcm2niix, or emf2sf"):
        ct.read_scan(save([file], tmp_path / "a"))
    file, _ = enhanced(hu(), (0.0, 0.0, 5, 5))
    with pytest.raises(ValueError, match=r"2 slices at each of 2 positions, as 000.dcm and 000.dcm frame 2"):
        ct.read_scan(save([file], tmp_path / "b"))


# -- geometry that is told of -----------------------------------------------------------------------------------------


def test_uneven_steps_within_tolerance_are_said(tmp_path):
    files = stored_as(hu(), u16(hu()), PixelRepresentation=1)
    for file, place in zip(files, (0, 2.5, 5.2, 7.5)):
        file.ImagePositionPatient = [0, 0, place]
    scan = ct.read_scan(save(files, tmp_path / "a"))
    assert scan.notes == ("distances between slices vary from 2.3 to 2.7 mm and are stored as even ones",)


def test_tilt_and_uneven_steps_name_the_file_to_keep(tmp_path):
    turn = np.deg2rad(20)
    files = ct_series(u16(hu() + 1024), step=(0, 0, 2.5), iop=(1, 0, 0, 0, np.cos(turn), -np.sin(turn)))
    with pytest.raises(
        ValueError, match="of the two files that dcm2niix writes, take the one whose name ends in _Tilt"
    ):
        ct.read_scan(save(files, tmp_path / "a"))
    files = ct_series(u16(hu() + 1024))
    for file, place in zip(files, (0, 2.5, 5.9, 7.5)):
        file.ImagePositionPatient = [0, 0, place]
    with pytest.raises(ValueError, match="take the one whose name ends in _Eq_1"):
        ct.read_scan(save(files, tmp_path / "b"))
