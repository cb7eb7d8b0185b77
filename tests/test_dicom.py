"""files/dicom: geometry against ITK, values against pydicom, every transfer syntax, and each refusal's reason."""

import copy
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from dicom_files import ct_series, ct_slice, itk_series, new_file, save
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    RLELossless,
)

from pgl_ray.config import LabelsConfig
from pgl_ray.files import ct, dicom
from pgl_ray.files.layout import read_layout

TURN = np.deg2rad(20)
ORIENTATIONS = {
    "axial": (1, 0, 0, 0, 1, 0),
    "prone": (-1, 0, 0, 0, -1, 0),
    "coronal": (1, 0, 0, 0, 0, -1),
    "sagittal": (0, 1, 0, 0, 0, -1),
    "oblique": (np.cos(TURN), np.sin(TURN), 0, -np.sin(TURN), np.cos(TURN), 0),
}


def raw(shape=(5, 6, 7), dtype=np.int16, low=24, seed=1):
    """Raw pixels [slices, rows, columns], all different."""
    return (np.random.default_rng(seed).permutation(np.prod(shape)).reshape(shape) + low).astype(dtype)


@pytest.mark.parametrize("iop", ORIENTATIONS.values(), ids=ORIENTATIONS)
@pytest.mark.parametrize("direction", [1, -1])
def test_every_voxel_lies_where_itk_puts_it_and_labels_come_back(tmp_path, iop, direction):
    step = direction * 2.5 * np.cross(iop[:3], iop[3:])
    folder = save(ct_series(raw(), iop=iop, step=step), tmp_path / "Röntgen, Fall 7/Serie 2", "b{:03}")
    image, scan = itk_series(folder), ct.read_scan(folder)
    lps = np.c_[np.argwhere(np.ones(scan.voxels.shape)), np.ones(scan.voxels.size)] @ scan.affine.T
    for voxel, place in zip(np.ndindex(scan.voxels.shape), lps[:, :3] * (-1, -1, 1)):
        index = image.TransformPhysicalPointToContinuousIndex(place.tolist())
        np.testing.assert_allclose(index, np.rint(index), atol=1e-3)
        assert image[[round(value) for value in index]] == scan.voxels[voxel]
    assert scan.spacing_mm == pytest.approx(np.linalg.norm(scan.affine[:3, :3], axis=0))
    assert ct.extent(folder)[0] == scan.voxels.size and (scan.rounding_error_hu, scan.num_padding) == (0, 0)

    ct.write_label(tmp_path / "l.nii.gz", (scan.voxels + 1024).astype(np.uint16), folder)
    back = sitk.ReadImage(str(tmp_path / "l.nii.gz"))
    ours = sitk.Resample(sitk.Cast(back, sitk.sitkInt32), image, sitk.Transform(), sitk.sitkNearestNeighbor, -1)
    np.testing.assert_array_equal(sitk.GetArrayFromImage(ours), sitk.GetArrayFromImage(image) + 1024)
    np.testing.assert_array_equal(ct.read_label(tmp_path / "l.nii.gz", scan), scan.voxels + 1024)


def test_slope_and_intercept_may_differ_from_slice_to_slice(tmp_path):
    files = ct_series(raw(dtype=np.uint16))
    for k, file in enumerate(files):
        file.RescaleSlope, file.RescaleIntercept = [(1, -1024), (2, -1000), (0.5, -900)][k % 3]
    folder = save(files, tmp_path / "a")
    expected = np.array([one.pixel_array * float(one.RescaleSlope) + float(one.RescaleIntercept) for one in files])
    scan = ct.read_scan(folder)
    np.testing.assert_array_equal(scan.voxels, np.rint(expected))
    assert scan.rounding_error_hu == 0.5


def test_twelve_bits_with_other_things_in_the_upper_four(tmp_path):
    pixels = raw(dtype=np.uint16)
    folder = save(ct_series(pixels | 0xA000, BitsStored=12, HighBit=11), tmp_path / "a")
    np.testing.assert_array_equal(ct.read_scan(folder).voxels, pixels.astype(int) - 1024)


@pytest.mark.parametrize(
    ("pixel", "dtype", "intercept", "tags", "hu"),
    [
        (-2000, np.int16, 0, {}, -1024),  # undeclared, as in many converted sets
        (-2000, np.int16, -1024, {"PixelPaddingValue": -2000}, -1024),
        (63536, np.uint16, -1024, {"PixelPaddingValue": 63536}, -1024),  # beyond int16, were it no padding
        (63000, np.uint16, 0, {"PixelPaddingValue": 63536, "PixelPaddingRangeLimit": 62000}, -1024),
        (0, np.int16, 0, {"PixelPaddingValue": 0}, 0),  # water: a wrong header must not punch holes
    ],
)
def test_padding_is_air_and_counted(tmp_path, pixel, dtype, intercept, tags, hu):
    pixels = raw(dtype=dtype)
    pixels[2, 1:3, 4] = pixel
    scan = ct.read_scan(save(ct_series(pixels, intercept=intercept, **tags), tmp_path / "a"))
    expected = pixels.astype(int) + intercept
    expected[2, 1:3, 4] = hu
    np.testing.assert_array_equal(scan.voxels, expected)
    assert scan.num_padding == 2 * (hu != 0)


# -- transfer syntaxes ------------------------------------------------------------------------------------------------


def compressed_by_itk(files, compressor, tmp_path):
    """The slices with their pixels compressed by ITK."""
    for file in files:
        writer, part = sitk.ImageFileWriter(), tmp_path / "part.dcm"
        writer.SetImageIO("GDCMImageIO")
        writer.UseCompressionOn()
        writer.SetCompressor(compressor)
        writer.SetFileName(str(part))
        writer.Execute(sitk.GetImageFromArray(file.pixel_array[None]))
        done = pydicom.dcmread(part)
        file.PixelData, file.file_meta.TransferSyntaxUID = done.PixelData, done.file_meta.TransferSyntaxUID
        file["PixelData"].is_undefined_length = True


def in_syntax(syntax, files, tmp_path):
    for file in files:
        if syntax == RLELossless:
            file.compress(RLELossless)
        elif syntax == ExplicitVRBigEndian:
            file.PixelData = np.frombuffer(file.PixelData, "<i2").byteswap().tobytes()
        if syntax not in ("JPEG", "JPEG2000"):
            file.file_meta.TransferSyntaxUID = syntax
    if syntax in ("JPEG", "JPEG2000"):
        compressed_by_itk(files, syntax, tmp_path)


SYNTAXES = [ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian]
SYNTAXES += [RLELossless, "JPEG", "JPEG2000"]


@pytest.mark.parametrize("syntax", SYNTAXES, ids=lambda one: getattr(one, "name", one).replace(" ", ""))
def test_lossless_syntaxes_give_the_same_hu_and_cut_files_none(tmp_path, syntax, capfd):
    pixels = raw((3, 40, 50), low=-100)
    files = ct_series(pixels)
    in_syntax(syntax, files, tmp_path)
    folder = save(files, tmp_path / "a")
    assert pydicom.dcmread(folder / "001.dcm").file_meta.TransferSyntaxUID == files[1].file_meta.TransferSyntaxUID
    np.testing.assert_array_equal(ct.read_scan(folder).voxels, np.maximum(pixels.astype(int) - 1024, -1024))
    assert capfd.readouterr().err == ""
    path = folder / "001.dcm"
    path.write_bytes(path.read_bytes()[:-600])
    with pytest.raises(
        ValueError, match=r"a/001.dcm: not a readable DICOM file \(.*\): it is cut off or damaged, copy"
    ):
        ct.read_scan(folder)


def test_a_corrupt_jpeg_is_refused_though_it_decodes(tmp_path):
    files = ct_series(raw((2, 40, 50)))
    compressed_by_itk(files, "JPEG", tmp_path)
    content = bytearray(files[1].PixelData)
    content[1500:1900] = bytes(400)
    files[1].PixelData = bytes(content)
    with pytest.raises(ValueError, match=r"001.dcm: not a readable DICOM file \(its JPEG stream is corrupt\)"):
        ct.read_scan(save(files, tmp_path / "a"))


def test_files_of_old_scanners_have_no_preamble(tmp_path):
    folder = save(series(), tmp_path / "a")
    for path in folder.iterdir():
        file = pydicom.dcmread(path)
        del file.file_meta
        file.preamble = None
        pydicom.dcmwrite(path, file, implicit_vr=True, little_endian=True)
    np.testing.assert_array_equal(ct.read_scan(folder).voxels, raw() - 1024)


LOSSLESS = ["1.2", "1.2.1", "1.2.2", "1.2.1.99", "1.2.4.57", "1.2.4.70", "1.2.4.80", "1.2.4.90", "1.2.5"]
LOSSY = {"1.2.4.51": 36, "1.2.4.53": 36, "1.2.4.55": 36, "1.2.4.81": 1, "1.2.4.91": 5}  # HU that the encoder lost


@pytest.mark.slow
def test_the_real_slice_in_sixteen_encodings(real_data, tmp_path, capfd):
    source = real_data / "odd/transfer_syntaxes/testImages"
    plain = pydicom.dcmread(source / "CTImage.dcm")
    expected = np.maximum(plain.pixel_array.astype(float) - 1024, -1024)
    seen = set()
    for path in sorted(source.glob("CTImage*")):
        file = pydicom.dcmread(path)
        files = [copy.deepcopy(file) for _ in range(2)]
        for k, one in enumerate(files):
            one.ImagePositionPatient = [0, 0, 5.0 * k]
        folder = tmp_path / path.name
        folder.mkdir()
        for k, one in enumerate(files):
            one.save_as(folder / f"{k}.dcm")
        uid = file.file_meta.TransferSyntaxUID.removeprefix("1.2.840.10008.")
        seen.add(uid)
        if uid == "1.2.4.50":
            with pytest.raises(ValueError, match="8 bits per pixel are too few for HU: take the original"):
                ct.read_scan(folder)
            continue
        error = np.abs(ct.read_scan(folder).voxels - expected).max()
        assert error == 0 if uid in LOSSLESS else 0 < error <= LOSSY[uid], uid
    assert seen == {*LOSSLESS, *LOSSY, "1.2.4.50"}
    assert capfd.readouterr().err == ""


# -- refusals ---------------------------------------------------------------------------------------------------------


def series(**options):
    return ct_series(raw(), **options)


def changed(k, **tags):
    files = series()
    for tag, value in tags.items():
        if value is None:
            delattr(files[k], tag)
        else:
            setattr(files[k], tag, value)
    return files


def without(*places):
    return [file for k, file in enumerate(ct_series(raw((9, 6, 7)))) if k not in places]


def at(*places):
    files = ct_series(raw((len(places), 6, 7)))
    for file, place in zip(files, places):
        file.ImagePositionPatient = [0, 0, place]
    return files


def acquired(*numbers):
    """Even slices, each of an acquisition."""
    files = ct_series(raw((len(numbers), 6, 7)))
    for file, number in zip(files, numbers):
        file.AcquisitionNumber = number
    return files


REFUSED = {
    "phases half a slice apart": (
        lambda: acquired(*[4, 7] * 4),
        r"2 acquisitions \(AcquisitionNumber 4, 7\) whose slices",
    ),
    "three woven phases": (
        lambda: acquired(*[1, 2, 3] * 3),
        "3 acquisitions .* several phases in one series, separate",
    ),
    "one slice": (lambda: series()[:1], "1 slice is not a volume"),
    "gantry tilt": (
        lambda: series(step=(0, 0, 2.5), iop=(1, 0, 0, 0, np.cos(TURN), -np.sin(TURN))),
        r"drift sideways by 3.4 mm \(gantry tilt, about 20 degrees\): resample",
    ),
    "missing": (lambda: without(4), r"1 slice is missing, between 003.dcm and 004.dcm \(distance 5 mm, elsewhere"),
    "many missing": (lambda: without(2, 3, 5), r"3 slices are missing, the first between 001.dcm and 002.dcm"),
    "last but one missing": (lambda: without(7), r"1 slice is missing, between 006.dcm and 007.dcm"),
    "varying": (lambda: at(0, 2, 4, 6, 9, 12), "distances between slices vary from 2 to 3 mm: resample"),
    "duplicate": (lambda: at(0, 2, 4, 4, 6), "002.dcm and 003.dcm lie at one position: keep one"),
    "phases": (lambda: at(0, 2, 4, 0, 2, 4), "2 slices at each of 3 positions, as 000.dcm and 003.dcm: several phases"),
    "one place": (lambda: at(3, 3, 3), "3 slices at one position: a time series"),
    "size": (lambda: [*series()[:4], ct_slice(raw()[0, :5], (0, 0, 9), series="1.2")], "differ in size"),
    "pixel spacing": (lambda: changed(3, PixelSpacing=[0.8, 0.9]), "000.dcm and 003.dcm differ in pixel spacing"),
    "orientation": (lambda: changed(3, ImageOrientationPatient=[1, 0, 0, 0, 0, -1]), "differ in orientation"),
    "no position": (lambda: changed(3, ImagePositionPatient=None), "003.dcm: has no valid ImagePositionPatient"),
    "no spacing": (lambda: changed(3, PixelSpacing=None), "003.dcm: has no valid PixelSpacing"),
    "zero spacing": (lambda: changed(3, PixelSpacing=[0, 0.7]), "is impossible"),
    "skewed": (lambda: changed(3, ImageOrientationPatient=[1, 0, 0, 1, 1, 0]), "is impossible"),
    "frames": (lambda: changed(3, NumberOfFrames=2), "2 frames in one file"),
    "8 bits": (lambda: ct_series(raw(dtype=np.uint8, low=0)), "8 bits per pixel are too few for HU"),
    "no rescale": (lambda: changed(3, RescaleIntercept=None), "no RescaleIntercept, so its values are not HU"),
    "other unit": (lambda: changed(3, RescaleType="MGML"), "pixels are in MGML, so its values are not HU"),
    "no pixels": (lambda: changed(3, PixelData=None), "003.dcm: not a readable DICOM file .no pixels"),
    "few pixels": (lambda: changed(3, PixelData=b"\0" * 40), r"003.dcm: .*\(40 bytes of pixels, 84 expected\)"),
    "no picture": (lambda: changed(3, Rows=None), "003.dcm: has no picture"),
    "beyond int16": (lambda: series(slope=1000), "HU lie in -32768..32767"),
}


@pytest.mark.parametrize("make, message", REFUSED.values(), ids=REFUSED)
def test_what_is_no_even_stack_of_hu_is_refused_with_the_reason(tmp_path, make, message):
    files = make()
    for file in files:
        file.SeriesInstanceUID = "1.2.3"
    folder = save(files, tmp_path / "a b")
    with pytest.raises(ValueError, match=message) as caught:
        ct.read_scan(folder, tuple(sorted(path.name for path in folder.iterdir())))
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "numbers",
    [
        [1] * 8,
        [1, 1, 1, 1, 2, 2, 2, 2],  # two blocks of slices
        [1, 1, 2, 2, 3, 3, 4, 4],  # a table that moves on, by two slices
        [1, 2, 3, 4, 5, 6, 7, 8],  # and by one
        [8, 7, 6, 5, 4, 3, 2, 1],
        [1, 5, 2, 6, 3, 7, 4, 8],  # odd slices first
        [1, None] * 4,
    ],
)
def test_acquisitions_that_follow_each_other_are_a_volume(tmp_path, numbers):
    assert ct.read_scan(save(acquired(*numbers), tmp_path / "a")).voxels.shape[0] == 8


@pytest.mark.parametrize("jitter, fine", [(0.05, True), (0.4, False)])
def test_rounded_positions_are_no_varying_distance(tmp_path, jitter, fine):
    folder = save(at(*(2.5 * k + jitter * (k % 2) for k in range(8))), tmp_path / "a")
    if fine:
        assert ct.read_scan(folder).spacing_mm[0] == pytest.approx(2.5, abs=0.01)
    else:
        with pytest.raises(ValueError, match=r"vary from 2.1 to 2.9 mm"):
            ct.read_scan(folder)


@pytest.mark.parametrize("text", [b"1\\2 ", b"first "])
def test_an_acquisition_that_is_no_number_is_no_matter(tmp_path, text):
    folder = save(acquired(*[12345] * 6), tmp_path / "a")
    for path in sorted(folder.iterdir())[::2]:
        content = path.read_bytes()
        assert content.count(b"12345 ") == 1
        path.write_bytes(content.replace(b"12345 ", text.ljust(6)))
    assert ct.read_scan(folder).voxels.shape[0] == 6


# -- folders ----------------------------------------------------------------------------------------------------------

MR, PLAN, DOSE = "1.2.840.10008.5.1.4.1.1.4", "1.2.840.10008.5.1.4.1.1.481.5", "1.2.840.10008.5.1.4.1.1.481.2"
SECONDARY = "1.2.840.10008.5.1.4.1.1.7"


def hospital_folder(root):
    """Two CT series and what else a hospital's archive puts next to them, all in one folder, without extensions."""
    thin, thick = ct_series(raw(seed=1), SeriesDescription="thin"), ct_series(raw(seed=2), SeriesDescription="thick")
    for file in thick:
        file.SeriesNumber = 3
    others = [
        ct_slice(raw()[0], (0, 0, 0), series="1.9", ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]),
        ct_slice(raw()[0], (0, 0, 0), series="1.8", SamplesPerPixel=3),
        new_file(SECONDARY, "CT"),
        new_file(MR, "MR"),
        new_file(PLAN, "RTPLAN"),
        new_file(DOSE, "RTDOSE"),
        new_file("1.2.840.10008.1.3.10", ""),
    ]
    save([*thin, *others[:4], *thick, *others[4:]], root / "p 1/ä", "IM{:06}")
    (root / "p 1/ä/notes").write_text("no DICOM" * 50)
    (root / "p 1/.hidden").mkdir()
    shutil.copy(root / "p 1/ä/IM000000", root / "p 1/.hidden/IM000000")
    return thin, thick


def test_a_hospitals_folder_gives_its_ct_series(tmp_path):
    thin, thick = hospital_folder(tmp_path)
    layout = read_layout(str(tmp_path), LabelsConfig())
    assert [scan.scan_id[:-7] for scan in layout.scans] == ["p 1__ä__series2", "p 1__ä__series3"]
    assert not layout.faults
    for scan, files in zip(layout.scans, (thin, thick)):
        np.testing.assert_array_equal(scan.read({})[0].voxels, [file.pixel_array - 1024 for file in files])
        assert len(scan.files()) == 5 and scan.extent()[0] == 210 and scan.stamp()[0] > 5 * 84
    reasons = sorted(fault.reason for fault in layout.left_out)
    assert reasons == [
        "an index of DICOM files",
        "colour picture, not CT values",
        "hidden, for its name begins with a dot",
        "localiser, not a volume",
        "modality MR, not CT",
        "modality RTDOSE, not CT",
        "modality RTPLAN, not CT",
        "no format of CT",
        "secondary capture, not a CT image",
    ]


@pytest.mark.parametrize("kind", ["1.2.840.10008.5.1.4.1.1.66", "1.3.12.2.1107.5.9.1"], ids=["raw data", "csa"])
def test_an_object_without_a_picture_costs_its_series_nothing(tmp_path, kind):
    """Modality CT and the series of the slices beside it, as scanners write their raw data."""
    files = save(series(), tmp_path)
    other = new_file(kind, "CT")
    other.SeriesInstanceUID = pydicom.dcmread(next(files.iterdir())).SeriesInstanceUID
    save([other], tmp_path, "raw{}")
    layout = read_layout(str(tmp_path), LabelsConfig())
    assert len(layout.scans) == 1 and not layout.faults
    assert [fault.reason for fault in layout.left_out] == ["no picture in it (raw data, or a maker's own object)"]


def test_the_user_names_the_series(tmp_path):
    thin, _ = hospital_folder(tmp_path)
    for name in ("thin", str(thin[0].SeriesInstanceUID)):
        layout = read_layout(str(tmp_path), LabelsConfig(), series=(name,))
        assert [scan.scan_id[:-7] for scan in layout.scans] == ["p 1__ä__series2"]
        assert layout.scans[0].read({})[0].voxels[0, 0, 0] == thin[0].pixel_array[0, 0] - 1024
    with pytest.raises(ValueError, match=r"series='tin': none of that UID or description in .*'thick', 'thin'"):
        read_layout(str(tmp_path), LabelsConfig(), series=("tin",))
    with pytest.raises(ValueError, match=r"expected one CT series, found 2 in .*, 3 in .*: name the folder of one"):
        ct.read_scan(tmp_path)


def test_a_series_in_many_folders_is_one_scan(tmp_path):
    save(series(), tmp_path / "arch", "{:03}/file")
    save(series(), tmp_path / "other")
    layout = read_layout(str(tmp_path), LabelsConfig())
    scans = [(scan.scan_id[:-7], len(scan.slices)) for scan in layout.scans]
    assert scans == [("arch__series2", 5), ("other__series2", 5)]
    assert ct.read_scan(tmp_path / "arch").voxels.shape == (5, 6, 7)


@pytest.mark.parametrize("sites", [("siteA",), ("siteA", "siteB")])
def test_a_bare_name_of_two_folders_labels_neither(tmp_path, sites):
    for site in sites:
        save(series(), tmp_path / "images" / site / "p1")
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels/p1.nii.gz").touch()
    layout = read_layout(str(tmp_path), LabelsConfig())
    assert [bool(scan.label) for scan in layout.scans] == ([True] if len(sites) == 1 else [False, False])
    assert [fault.reason for fault in layout.faults] == ["label map without a volume of its name"] * (len(sites) - 1)


def test_a_damaged_file_may_be_a_slice_so_its_series_waits(tmp_path):
    folder = save(series(), tmp_path / "a")
    save(series(), tmp_path / "b")
    (folder / "empty.dcm").write_bytes(b"")
    (folder / "text.dcm").write_text("hello" * 100)
    (folder / "head").write_bytes((folder / "000.dcm").read_bytes()[:150])
    layout = read_layout(str(tmp_path), LabelsConfig())
    assert [Path(fault.source).name for fault in layout.faults] == ["a", "empty.dcm", "head", "text.dcm"]
    assert all("not a readable DICOM file" in fault.reason for fault in layout.faults)
    assert "or remove it if it is no slice of this series" in layout.faults[0].reason
    assert [scan.scan_id[:-7] for scan in layout.scans] == ["b__series2"]
    for name in ("empty.dcm", "text.dcm"):
        (folder / name).unlink()
    with pytest.raises(ValueError, match="a/head: not a readable DICOM file"):
        ct.read_scan(folder)
    (folder / "head").unlink()
    assert ct.read_scan(folder).voxels.shape == (5, 6, 7)
    with pytest.raises(ValueError, match=r"no volume in it .*; found .*modality MR, not CT"):
        read_layout(str(save([new_file(MR, "MR")], tmp_path / "mr")), LabelsConfig())


def test_slices_that_cannot_be_opened_are_reported(tmp_path, monkeypatch):
    folder = save(series(), tmp_path / "a", "IM{}")
    (folder / "lost.dcm").symlink_to(tmp_path / "nowhere")
    assert "No such file" in dict(dicom.find(tmp_path).unreadable)[str(folder / "lost.dcm")]

    def locked(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", locked)
    assert dicom.is_dicom(folder / "IM4") and not dicom.is_dicom(folder)


def test_without_pydicom_dicom_says_what_to_install(tmp_path, monkeypatch):
    nib.save(nib.Nifti1Image(raw(), np.eye(4)), tmp_path / "a.nii")
    monkeypatch.setitem(__import__("sys").modules, "pydicom", None)
    assert len(read_layout(str(tmp_path), LabelsConfig()).scans) == 1
    save(series(), tmp_path / "d")
    with pytest.raises(ValueError, match=r"DICOM needs pydicom: pip install 'pgl_ray\[dicom\]'"):
        read_layout(str(tmp_path), LabelsConfig())


REAL_FAULTS = {
    "gantrytilting/001": "gantry tilt, about 14 degrees",
    "notavolume/001": "4 slices at one position",
    "sliceincrement/001": "1 slice is missing, between IM-0001-0009-0001.dcm",
    "sliceincrement/002": "1 slice is missing, between IM-0001-0003.dcm and IM-0001-0005.dcm",
    "testImages": "8 bits per pixel",
    "testImages/": "pixels are in ml/100ml/s (Regional Cerebral Blood Flow), not HU",
}


def test_the_whole_odd_folder(real_data):
    """Everything is read or refused with a reason; the MR's ground truths are NIfTI volumes and read as such."""
    layout = read_layout(str(real_data / "odd"), LabelsConfig())
    assert not layout.faults
    reasons = []
    for scan in layout.scans:
        try:
            assert scan.read({})[0].voxels.size and scan.image.endswith(".nii.gz")
        except ValueError as error:
            reasons.append(str(error))
    for place, reason in REAL_FAULTS.items():
        assert any(place.strip("/") in text and reason in text for text in reasons), reason
    assert len(reasons) == len(REAL_FAULTS)
    assert sorted(fault.reason for fault in layout.left_out) == [
        *["modality MR, not CT"] * 6,
        "modality SR, not CT",
        "modality US, not CT",
        "modality US, not CT",
        "no format of CT",
    ]


@pytest.mark.parametrize("patient", ["STS_002", "STS_008"])
def test_real_series_agree_with_itk(real_data, patient):
    folder = real_data / "dicom" / patient
    scan, image = ct.read_scan(folder), itk_series(folder / "CT/image")
    np.testing.assert_array_equal(scan.voxels, sitk.GetArrayFromImage(image))
    corner = image.TransformIndexToPhysicalPoint((3, 4, 5))
    np.testing.assert_allclose((scan.affine @ (5, 4, 3, 1))[:3] * (-1, -1, 1), corner, atol=1e-3)
