"""What files say of themselves: units, forms, detached headers, sizes that no CT has; against ITK and by hand."""

import gzip
import subprocess
import sys
import zlib
from itertools import pairwise

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from dicom_files import ct_series, save

from pgl_ray.files import ct, detached
from pgl_ray.files.resample import new_shape, resample
from pgl_ray.files.source import Source

AFFINE = np.array([[-0.75, 0, 0, 90.0], [0, -0.75, 0, 80.0], [0, 0, 2.5, -300.0], [0, 0, 0, 1]])
SHAPE = (12, 10, 8)
STORED_ORIGIN = (90, 80, -300)  # of the voxel that AFFINE puts first, which is the stored array's first, too


def body(shape=SHAPE, seed=0):
    """int16 HU with noise, air around."""
    volume = np.full(shape, -1000, np.int16)
    volume[2:-2, 2:-2] = 40
    return (volume + np.random.default_rng(seed).integers(-20, 21, shape)).astype(np.int16)


def check(scan, volume=None):
    """The scan is `body()` at AFFINE."""
    volume = body() if volume is None else volume
    np.testing.assert_array_equal(scan.voxels, volume.transpose(2, 1, 0))
    np.testing.assert_allclose(scan.spacing_mm, (2.5, 0.75, 0.75), rtol=1e-5)
    np.testing.assert_allclose(scan.affine[:3, 3], STORED_ORIGIN, rtol=1e-5)


def scaled(factor):
    return np.diag([factor, factor, factor, 1]) @ AFFINE


# -- NIfTI ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("time_code", [0, 8, 16, 24])
@pytest.mark.parametrize("code, per_mm", [(0, 1), (1, 1e-3), (2, 1), (3, 1e3)])
def test_units_of_nifti_are_honoured_as_itk_does(tmp_path, code, per_mm, time_code):
    path = tmp_path / "a.nii.gz"
    image = nib.Nifti1Image(body(), scaled(per_mm))
    image.header["xyzt_units"] = code | time_code
    nib.save(image, path)
    scan = ct.read_scan(path)
    check(scan)
    np.testing.assert_allclose(sitk.ReadImage(str(path)).GetSpacing(), scan.spacing_mm[::-1], rtol=1e-5)
    assert scan.notes == ()


def test_an_unknown_unit_of_nifti_is_said(tmp_path):
    image = nib.Nifti1Image(body(), AFFINE)
    image.header["xyzt_units"] = 5
    nib.save(image, tmp_path / "a.nii")
    scan = ct.read_scan(tmp_path / "a.nii")
    check(scan)
    assert "unit of length has the unknown code 5: taken as mm" in scan.notes[0]


def forms(sform, sform_code, qform, qform_code):
    image = nib.Nifti1Image(body(), AFFINE)
    image.set_qform(qform, qform_code)
    image.set_sform(sform, sform_code)
    raw = bytearray(image.header.binaryblock)
    raw[252:254], raw[254:256] = qform_code.to_bytes(2, "little"), sform_code.to_bytes(2, "little")
    if sform is None:
        raw[280:328] = bytes(48)
    raw[344:348] = b"n+1\0"
    raw[108:112] = np.float32(352).tobytes()
    return bytes(raw) + bytes(4) + body().tobytes(order="F")


MIRRORED = np.diag([-1.0, 1, 1, 1]) @ AFFINE
TILTED = AFFINE @ np.array([[1, 0.0, 0.001, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])


@pytest.mark.parametrize(
    "given, note",
    [
        ((AFFINE, 1, AFFINE, 1), None),
        ((AFFINE, 1, AFFINE, 0), None),
        ((AFFINE, 0, AFFINE, 2), None),
        ((AFFINE, 1, TILTED, 1), None),  # a hundredth of a voxel
        ((AFFINE, 1, MIRRORED, 1), "up to 180 mm apart"),
        ((AFFINE, 2, MIRRORED, 0), None),
        ((None, 1, AFFINE, 1), "sform is empty"),
        ((None, 1, AFFINE, 0), "sform is empty"),
    ],
)
def test_which_form_is_taken_and_what_is_said(tmp_path, given, note):
    (tmp_path / "a.nii").write_bytes(forms(*given))
    scan = ct.read_scan(tmp_path / "a.nii")
    check(scan)
    assert (len(scan.notes), note in "".join(scan.notes)) == (1, True) if note else scan.notes == ()


@pytest.mark.parametrize(
    "sizes, said", [((0.7, 0.7, 5), True), ((1, 1, 1.01), False), ((1, 1, 0), False), ((2, 3, 5), True)]
)
def test_another_voxel_size_than_the_sforms_is_said(tmp_path, sizes, said):
    """Nifti1Image(array, eye) and set_zooms make such a file: other programs take the size."""
    image = nib.Nifti1Image(body(), np.eye(4))
    image.header["pixdim"][1:4] = sizes
    nib.save(image, tmp_path / "a.nii")
    scan = ct.read_scan(tmp_path / "a.nii")
    assert scan.spacing_mm == (1, 1, 1) and len(scan.notes) == said
    if said:
        assert (
            f"its sform makes voxels of 1 x 1 x 1 mm, its header states {' x '.join(map(str, sizes))} mm"
            in scan.notes[0]
        )


def test_no_orientation_is_said_with_what_is_taken(tmp_path):
    (tmp_path / "a.nii").write_bytes(forms(AFFINE, 0, AFFINE, 0))
    scan = ct.read_scan(tmp_path / "a.nii")
    assert "states no orientation" in scan.notes[0] and "L, A, S" in scan.notes[0]
    np.testing.assert_array_equal(scan.voxels, body()[:, ::-1].transpose(2, 1, 0))  # rows run to anterior there


@pytest.mark.parametrize("code, per_mm", [(1, 1e-3), (2, 1), (3, 1e3)])
@pytest.mark.parametrize("image_class", [nib.Nifti1Image, nib.Nifti2Image])
def test_a_written_label_keeps_forms_codes_and_units(tmp_path, code, per_mm, image_class):
    sheared = scaled(per_mm) @ np.array([[1, 0.05, 0.1, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    image = image_class(body(), sheared)
    image.set_qform(scaled(per_mm), 3)
    image.set_sform(sheared, 4)
    image.header["xyzt_units"], image.header["descrip"], image.header["intent_name"] = code | 8, b"DOE", b"JANE"
    image.header["db_name" if image_class is nib.Nifti1Image else "aux_file"] = b"DOE"
    image.header["intent_code"] = 1001
    nib.save(image, tmp_path / "a.nii")
    scan = ct.read_scan(tmp_path / "a.nii")
    ct.write_label(tmp_path / "l.nii", (scan.voxels > 0).astype(np.uint8), tmp_path / "a.nii")
    given, written = nib.load(tmp_path / "a.nii").header, nib.load(tmp_path / "l.nii").header
    for key in ("qform_code", "sform_code", "xyzt_units", "srow_x", "srow_y", "srow_z", "quatern_b", "qoffset_z"):
        np.testing.assert_array_equal(written[key], given[key])
    np.testing.assert_array_equal(written["pixdim"][1:4], given["pixdim"][1:4])
    assert (int(written["intent_code"]), written.get_data_dtype()) == (0, np.uint8)
    content = (tmp_path / "l.nii").read_bytes()
    assert b"DOE" not in content and b"JANE" not in content
    np.testing.assert_array_equal(np.asanyarray(nib.load(tmp_path / "l.nii").dataobj), body() > 0)
    np.testing.assert_array_equal(ct.read_label(tmp_path / "l.nii", scan), scan.voxels > 0)


# -- sizes that no CT has ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "affine, message",
    [
        (np.diag([-1e-3, -1e-3, 2e-3, 1]), r"voxels of 0.001 x 0.001 x 0.002 mm, expected 0.02 to 30 mm"),
        (np.diag([-750.0, -750, 2500, 1]), r"voxels of 750 x 750 x 2.5e\+03 mm, expected"),
        (np.diag([-1.0, -1, 1e9, 1]), "expected 0.02 to 30 mm"),
        (np.diag([-0.5, -0.5, 0.0, 1]), "singular"),
        (np.array([[1, 1, 0, 0], [0, 0.05, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]]), "axes are nearly parallel"),
    ],
)
def test_voxels_of_an_impossible_size_are_refused(tmp_path, affine, message):
    image = nib.Nifti1Image(body(), None)
    image.header.set_sform(affine, 1)
    nib.save(image, tmp_path / "a.nii")
    with pytest.raises(ValueError, match=message) as caught:
        ct.read_scan(tmp_path / "a.nii")
    assert "a.nii" in str(caught.value)


def test_a_unit_that_makes_voxels_impossible_is_named(tmp_path):
    image = nib.Nifti1Image(body(), AFFINE)  # in mm, whatever the header says
    image.header["xyzt_units"] = 1
    nib.save(image, tmp_path / "a.nii")
    with pytest.raises(ValueError, match=r"unit of length is m.*mend it"):
        ct.read_scan(tmp_path / "a.nii")


def test_a_volume_of_an_impossible_length_is_refused(tmp_path):
    nib.save(nib.Nifti1Image(body((3, 3, 400)), np.diag([-1.0, -1, 20, 1])), tmp_path / "a.nii")
    with pytest.raises(ValueError, match=r"8000 mm long .* expected at most 5000 mm"):
        ct.read_scan(tmp_path / "a.nii")


def test_resampling_leaves_several_voxels_and_asks_no_terabytes():
    fine = np.diag([0.01, 0.01, 0.01, 1.0])
    with pytest.raises(ValueError, match=r"makes shape \(10, 10, 1\).*smaller spacing"):
        resample(body((10, 10, 10)), None, np.diag([1.0, 1, 1, 1]), (1, 1, 30))
    with pytest.raises(ValueError, match=r"more than 2e\+09 voxels: take a larger spacing"):
        new_shape((400, 512, 512), np.diag([5.0, 1, 1, 1]), (0.02, 0.02, 0.02))
    assert new_shape((400, 512, 512), fine, (0.01, 0.01, 0.02)) == (400, 512, 256)
    assert new_shape((1, 20, 20), np.diag([5.0, 1, 1, 1]), (5, 2, 2)) == (1, 10, 10)


# -- text headers -----------------------------------------------------------------------------------------------------

MHD = (
    "ObjectType = Image\nNDims = 3\nBinaryData = True\nBinaryDataByteOrderMSB = False\nDimSize = 12 10 8\n"
    "Offset = -90 -80 -300\nElementSpacing = 0.75 0.75 2.5\nElementType = MET_SHORT\n"
)
NRRD = (
    "NRRD0005\n# encoding: none, data file: x\ntype: short\ndimension: 3\nsizes: 12 10 8\nendian: little\n"
    "space: left-posterior-superior\nspace directions: (0.75,0,0) (0,0.75,0) (0,0,2.5)\nspace origin: (-90,-80,-300)\n"
    "encoding: raw\nNote:=encoding: bzip2\n"
)
NAMES = [
    "a.raw",
    "kernel=B30f.raw",
    "t=10:45.raw",
    "my ct.raw",
    "50%.raw",
    "a%b.raw",
    "sub/a.raw",
    "a#b.raw",
    "(1,2).raw",
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("kind", ["mhd", "nhdr"])
def test_a_detached_file_of_any_name(tmp_path, name, end, kind):
    path = tmp_path / f"x.{kind}"
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(body().tobytes(order="F"))
    text = MHD + f"ElementDataFile = {name}\n" if kind == "mhd" else NRRD + f"data file: {name}\n"
    path.write_bytes(text.replace("\n", end).encode())
    assert detached.files_of(path) == [path, tmp_path / name]
    if "%" in name and kind == "mhd":  # ITK cannot
        with pytest.raises(ValueError, match=r"x.mhd: not a readable image \(MetaImage takes the %"):
            ct.read_scan(path)
        return
    check(ct.read_scan(path))
    (tmp_path / name).write_bytes(body().tobytes(order="F")[:-100])
    with pytest.raises(ValueError, match="fewer voxels than the shape"):
        ct.read_scan(path)
    (tmp_path / name).unlink()
    with pytest.raises(ValueError, match="which is not there"):
        ct.read_scan(path)


UP, DOWN = "s%02d.raw 1 8 1", "s%02d.raw 8 1 -1"  # MetaImage's patterns go upwards alone


@pytest.mark.parametrize(
    "kind, data", [("nhdr", DOWN), *((kind, data) for kind in ("mhd", "nhdr") for data in (UP, "LIST", "LIST 2D"))]
)
def test_slices_in_files_of_their_own(tmp_path, data, kind):
    order = range(8, 0, -1) if "-1" in data else range(1, 9)
    files = [tmp_path / f"s{number:02}.raw" for number in order]
    for k, file in enumerate(files):
        file.write_bytes(body()[:, :, k].tobytes(order="F"))
    if data.startswith("LIST"):
        listed = "LIST" if data == "LIST" else "LIST" if kind == "mhd" else "LIST 2"
        data = "\n".join([listed, *(file.name for file in files)])
    path = tmp_path / f"x.{kind}"
    path.write_text(MHD + f"ElementDataFile = {data}\n" if kind == "mhd" else NRRD + f"data file: {data}\n")
    assert detached.files_of(path) == [path, *files]
    check(ct.read_scan(path))
    files[3].write_bytes(files[3].read_bytes()[:-20])
    with pytest.raises(ValueError, match="x\\."):
        ct.read_scan(path)


@pytest.mark.parametrize("local", ["LOCAL", "Local", "local"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_voxels_behind_the_header(tmp_path, local, end):
    head = (MHD + f"ElementDataFile = {local}\n").replace("\n", end).encode()
    (tmp_path / "a.mha").write_bytes(head + body().tobytes(order="F"))
    check(ct.read_scan(tmp_path / "a.mha"))
    assert detached.files_of(tmp_path / "a.mha") == [tmp_path / "a.mha"]
    (tmp_path / "a.nrrd").write_bytes((NRRD + "\n").replace("\n", end).encode() + body().tobytes(order="F"))
    check(ct.read_scan(tmp_path / "a.nrrd"))


UNITS = [
    ("um", 1e3),
    ("\u00b5m", 1e3),
    ("\u03bcm", 1e3),
    ("microns", 1e3),
    ("mm", 1),
    ("", 1),
    ("m", 1e-3),
    ("cm", 0.1),
]


GREEK = "\u03bcm"  # which Latin 1 cannot write


@pytest.mark.parametrize(
    "unit, per_mm, encoding",
    [(*unit, code) for unit in UNITS for code in ("utf-8", "latin-1") if (unit[0], code) != (GREEK, "latin-1")],
)
def test_units_of_nrrd_are_honoured(tmp_path, unit, per_mm, encoding):
    text = NRRD.replace(
        "(0.75,0,0) (0,0.75,0) (0,0,2.5)", f"({0.75 * per_mm},0,0) (0,{0.75 * per_mm},0) (0,0,{2.5 * per_mm})"
    )
    text = text.replace("(-90,-80,-300)", f"({-90 * per_mm},{-80 * per_mm},{-300 * per_mm})")
    text += f'space units: "{unit}" "{unit}" "{unit}"\n\n'
    (tmp_path / "a.nrrd").write_bytes(text.encode(encoding) + body().tobytes(order="F"))
    scan = ct.read_scan(tmp_path / "a.nrrd")
    check(scan)
    ct.write_label(tmp_path / "l.nii", (scan.voxels > 0).astype(np.uint8), tmp_path / "a.nrrd")
    np.testing.assert_allclose(nib.load(tmp_path / "l.nii").affine, AFFINE, rtol=1e-5)
    assert nib.load(tmp_path / "l.nii").header.get_xyzt_units()[0] == "mm"


@pytest.mark.parametrize("units", ['"mm" "mm" "um"', '"inch" "inch" "inch"'])
def test_units_that_are_none_are_refused(tmp_path, units):
    (tmp_path / "a.nrrd").write_bytes((NRRD + f"space units: {units}\n\n").encode() + body().tobytes(order="F"))
    with pytest.raises(ValueError, match=r"a.nrrd: its units of length are .*expected one of mm, um"):
        ct.read_scan(tmp_path / "a.nrrd")


def test_a_text_header_without_orientation_is_said(tmp_path):
    bare = "".join(line for line in NRRD.splitlines(True) if not line.startswith("space"))
    (tmp_path / "a.nrrd").write_bytes((bare + "spacings: 0.75 0.75 2.5\n\n").encode() + body().tobytes(order="F"))
    scan = ct.read_scan(tmp_path / "a.nrrd")
    np.testing.assert_array_equal(scan.voxels, body().transpose(2, 1, 0))
    assert "states no orientation: its axes are taken to run towards L, P, S" in scan.notes[0]


def test_an_encoding_that_is_not_read_is_named(tmp_path):
    (tmp_path / "a.nrrd").write_bytes((NRRD.replace("encoding: raw", "encoding: bzip2") + "\n").encode() + b"BZh9")
    with pytest.raises(ValueError, match="encoded as bzip2, which is not read: save it with gzip"):
        ct.read_scan(tmp_path / "a.nrrd")


def test_further_axes_of_one_voxel_are_dropped(tmp_path):
    raw = body().tobytes(order="F")
    mha = (
        MHD.replace("NDims = 3", "NDims = 4").replace("12 10 8", "12 10 8 1").replace("-90 -80 -300", "-90 -80 -300 0")
    )
    (tmp_path / "a.mha").write_bytes(
        (mha.replace("0.75 2.5", "0.75 2.5 1") + "ElementDataFile = LOCAL\n").encode() + raw
    )
    nrrd = NRRD.replace("dimension: 3", "dimension: 4").replace("12 10 8", "12 10 8 1").replace("2.5)", "2.5) none")
    (tmp_path / "a.nrrd").write_bytes((nrrd + "kinds: domain domain domain list\n\n").encode() + raw)
    nib.save(nib.Nifti1Image(body()[..., None, None], AFFINE), tmp_path / "a.nii")
    for name in ("a.mha", "a.nrrd", "a.nii"):
        scan = ct.read_scan(tmp_path / name)
        check(scan)
        ct.write_label(tmp_path / "l.nii.gz", (scan.voxels > 0).astype(np.uint8), tmp_path / name)
        assert nib.load(tmp_path / "l.nii.gz").shape == SHAPE


DIRECTIONS = "space directions: (0.75,0,0) (0,0.75,0) (0,0,2.5)"


@pytest.mark.parametrize("unknown", ["none", "(nan,nan,nan)", "(NaN, NaN, NaN)", "(0,0,nan)", "(inf,0,0)"])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_an_axis_without_a_direction_is_refused(tmp_path, axis, unknown):
    vectors = DIRECTIONS.partition(": ")[2].split()
    vectors[axis] = unknown
    text = NRRD.replace(DIRECTIONS, f"space directions: {' '.join(vectors)}") + "\n"
    (tmp_path / "a.nrrd").write_bytes(text.encode() + body().tobytes(order="F"))
    for read in (ct.read_scan, ct.extent):
        with pytest.raises(ValueError, match=r"a.nrrd: (no voxel spacing in its header: add it|not a readable image)"):
            read(tmp_path / "a.nrrd")


@pytest.mark.parametrize("spacings", ["0.75 0.75 NaN", "nan nan nan", "nan 0.75 2.5", "0.75 -nan 2.5"])
def test_an_axis_without_a_spacing_is_refused(tmp_path, spacings):
    bare = "".join(line for line in NRRD.splitlines(True) if not line.startswith("space"))
    (tmp_path / "a.nrrd").write_bytes((bare + f"spacings: {spacings}\n\n").encode() + body().tobytes(order="F"))
    with pytest.raises(ValueError, match=r"a.nrrd: no voxel spacing in its header: add it, or take the original file"):
        ct.read_scan(tmp_path / "a.nrrd")


@pytest.mark.parametrize("place", [0, 3])
@pytest.mark.parametrize("unknown", ["none", "(nan,nan,nan)"])
def test_an_axis_of_one_voxel_needs_no_spacing(tmp_path, unknown, place):
    """And another that is long has to have one, whatever the short one states."""
    sizes, vectors, words = ["12", "10", "8"], DIRECTIONS.split()[2:], ["domain"] * 3
    for fields, one in ((sizes, "1"), (vectors, unknown), (words, "list" if place else "vector")):
        fields.insert(place, one)
    text = NRRD.replace("dimension: 3", "dimension: 4").replace("12 10 8", " ".join(sizes))
    text += f"kinds: {' '.join(words)}\n"
    whole = text.replace(DIRECTIONS, f"space directions: {' '.join(vectors)}")
    (tmp_path / "a.nrrd").write_bytes((whole + "\n").encode() + body().tobytes(order="F"))
    check(ct.read_scan(tmp_path / "a.nrrd"))
    vectors[place], vectors[2] = vectors[2], vectors[place]
    moved = text.replace(DIRECTIONS, f"space directions: {' '.join(vectors)}")
    (tmp_path / "a.nrrd").write_bytes((moved + "\n").encode() + body().tobytes(order="F"))
    with pytest.raises(ValueError, match=r"a.nrrd: "):
        ct.read_scan(tmp_path / "a.nrrd")


def test_negative_spacing_of_a_metaimage_runs_down(tmp_path):
    text = MHD.replace("0.75 2.5", "0.75 -2.5") + "ElementDataFile = LOCAL\n"
    (tmp_path / "a.mha").write_bytes(text.encode() + body().tobytes(order="F"))
    scan = ct.read_scan(tmp_path / "a.mha")
    for k in range(SHAPE[2]):  # the file's slice k lies at -300 - 2.5 k mm
        place = np.linalg.inv(scan.affine) @ [90, 80, -300 - 2.5 * k, 1]
        np.testing.assert_allclose(place, [SHAPE[2] - 1 - k, 0, 0, 1], atol=1e-6)
        np.testing.assert_array_equal(scan.voxels[SHAPE[2] - 1 - k], body()[:, :, k].T)


# -- labels on their CT's grid ----------------------------------------------------------------------------------------


def label_of(shape=SHAPE):
    label = np.zeros(shape, np.uint8)
    label[3:6, 3:8, 2:5] = 1
    label[7:9, 3:5, 4:7] = 2
    return label


def saved(path, array, affine=AFFINE):
    image = nib.Nifti1Image(array, affine)
    if affine is None:
        image.header["pixdim"][1:4] = (0.75, 0.75, 2.5)
    nib.save(image, path)
    return path


@pytest.mark.parametrize("value", [2, 13, 117, 255, 1000])
def test_scaled_labels_within_a_thousandth_are_read(tmp_path, value):
    scan = ct.read_scan(saved(tmp_path / "a.nii", body()))
    label = label_of().astype(float)
    label[label == 2] = value
    nib.save(nib.Nifti1Image(label, AFFINE, nib.load(tmp_path / "a.nii").header), tmp_path / "l.nii.gz")
    assert nib.load(tmp_path / "l.nii.gz").dataobj.slope != 1
    np.testing.assert_array_equal(ct.read_label(tmp_path / "l.nii.gz", scan), label.transpose(2, 1, 0))
    many = np.random.default_rng(0).integers(0, value + 1, SHAPE).astype(float)
    nib.save(nib.Nifti1Image(many, AFFINE, nib.load(tmp_path / "a.nii").header), tmp_path / "m.nii.gz")
    np.testing.assert_array_equal(ct.read_label(tmp_path / "m.nii.gz", scan), many.transpose(2, 1, 0))
    saved(tmp_path / "f.nii", label.astype(np.float32) + np.float32(0.002))
    with pytest.raises(ValueError, match=r"whole numbers, found some that are 0.0020?1? away"):
        ct.read_label(tmp_path / "f.nii", scan)


def no_origin():
    affine = AFFINE.copy()
    affine[:3, 3] = 0
    return affine


LOST = {"identity": np.eye(4), "none": None, "ITK's": np.diag([-1.0, -1, 1, 1]), "no origin": no_origin()}
OTHER = {"shifted": AFFINE + 1.5 * np.eye(4, k=3), "coarse": AFFINE @ np.diag([1.5, 1.5, 1.5, 1])}


def run_mend(message, folder, scan):
    """Runs the python of a message's mend; the label map that it makes."""
    code = message.split('python -c "')[1].removesuffix('"')
    subprocess.run([sys.executable, "-c", code], check=True, cwd=folder)
    (new,) = folder.glob("NEW.*")
    return ct.read_label(new, scan)


def sheared(path, array):
    affine = AFFINE.copy()
    affine[:3, :3] += [[0, 1e-3, 0], [0, 0, 4e-3], [3e-3, 0, 0]]
    return saved(path, array, affine)


def of_two_forms(path, array):
    image = nib.Nifti1Image(array, None)
    image.set_sform(AFFINE, 2)
    image.set_qform(AFFINE + 50 * np.eye(4, k=3), 1)
    nib.save(image, path)
    return path


def of_itk(path, array):
    image = sitk.GetImageFromArray(array.transpose(2, 1, 0))
    image.SetSpacing((0.75, 0.75, 2.5))
    image.SetOrigin((-90, -80, -300))
    sitk.WriteImage(image, str(path))
    return path


CTS = {"NIfTI": ("a.nii.gz", saved), "sheared": ("a.nii", sheared), "two forms": ("a.nii", of_two_forms)}
CTS |= {"NRRD": ("a.nrrd", of_itk), "MHA": ("a.mha", of_itk)}


@pytest.mark.parametrize("name, write", CTS.values(), ids=CTS)
@pytest.mark.parametrize("affine", LOST.values(), ids=LOST)
def test_a_lost_header_is_no_other_sampling(tmp_path, affine, name, write):
    scan = ct.read_scan(write(tmp_path / name, body()))
    saved(tmp_path / "l.nii.gz", label_of(), affine)
    with pytest.raises(ValueError, match="lost header: copy the CT's") as caught:
        ct.read_label(tmp_path / "l.nii.gz", scan)
    before = (tmp_path / "l.nii.gz").read_bytes()
    label = run_mend(str(caught.value), tmp_path, scan)
    np.testing.assert_array_equal(label, label_of().transpose(2, 1, 0))
    assert (tmp_path / "l.nii.gz").read_bytes() == before


@pytest.mark.parametrize("name, write", CTS.values(), ids=CTS)
@pytest.mark.parametrize("affine", OTHER.values(), ids=OTHER)
@pytest.mark.slow
def test_another_sampling_is_to_be_resampled(tmp_path, affine, name, write):
    scan = ct.read_scan(write(tmp_path / name, body()))
    saved(tmp_path / "l.nii.gz", label_of(), affine)
    with pytest.raises(ValueError, match="resample it onto the CT's grid") as caught:
        ct.read_label(tmp_path / "l.nii.gz", scan)
    assert "lost" not in str(caught.value)
    assert {*np.unique(run_mend(str(caught.value), tmp_path, scan))} == {0, 1, 2}


@pytest.mark.parametrize("place", [(0, 0, 0), (-151.2, -133.7, -412.5)])
def test_what_the_ct_has_too_is_no_lost_header(tmp_path, place):
    affine = np.eye(4)
    affine[:3, 3] = place
    scan = ct.read_scan(saved(tmp_path / "a.nii", body(), affine))
    saved(tmp_path / "l.nii", label_of(), affine + 3 * np.eye(4, k=3) if any(place) else no_origin())
    with pytest.raises(ValueError, match="resample it onto the CT's grid"):
        ct.read_label(tmp_path / "l.nii", scan)


@pytest.mark.parametrize("name, write", CTS.values(), ids=CTS)
def test_a_label_of_itks_on_another_grid(tmp_path, name, write):
    scan = ct.read_scan(write(tmp_path / name, body()))
    sitk.WriteImage(sitk.GetImageFromArray(label_of().transpose(2, 1, 0)[:, 2:]), str(tmp_path / "l.mha"))
    with pytest.raises(ValueError, match="resample it onto the CT's grid") as caught:
        ct.read_label(tmp_path / "l.mha", scan)
    if name == "a.nii":  # which ITK reads otherwise
        assert "with both as NIfTI, this" in str(caught.value) and "python" not in str(caught.value)
    else:
        run_mend(str(caught.value), tmp_path, scan)


def test_no_command_where_none_works(tmp_path):
    pixels = body().transpose(2, 1, 0).astype(np.int16)
    save(ct_series(pixels), tmp_path / "p")
    scan = ct.read_scan(tmp_path / "p")
    for affine, mend in ((np.eye(4), "export it again with the CT's"), (scaled(1.5), "dcm2niix makes a NIfTI")):
        saved(tmp_path / "l.nii", label_of(), affine)
        with pytest.raises(ValueError, match=mend) as caught:
            ct.read_label(tmp_path / "l.nii", scan)
        assert "python" not in str(caught.value)
    segmentation(tmp_path / "l.seg.nrrd", label_of()[:, 1:], (0.5, 0, 0))
    with pytest.raises(ValueError, match="as 3D Slicer does") as caught:
        ct.read_label(tmp_path / "l.seg.nrrd", ct.read_scan(saved(tmp_path / "a.nii", body())))
    assert "python" not in str(caught.value)


def segmentation(path, array, first=(0, 0, 0), more=""):
    origin = ",".join(str(start * size + zero) for start, size, zero in zip(first, (0.75, 0.75, 2.5), (-90, -80, -300)))
    text = NRRD.replace("short", {1: "uchar", 2: "ushort"}[array.itemsize])
    text = text.replace("12 10 8", " ".join(map(str, array.shape))).replace("-90,-80,-300", origin)
    text += more or "Segment0_ID:=Segment_1\nSegment0_LabelValue:=1\n"
    path.write_bytes((text + "\n").encode() + array.tobytes(order="F"))


def test_a_segmentation_of_slicer_may_be_cropped(tmp_path):
    scan = ct.read_scan(saved(tmp_path / "a.nii", body()))
    segmentation(tmp_path / "whole.seg.nrrd", label_of())
    segmentation(tmp_path / "part.seg.nrrd", label_of()[2:10, 3:9, 1:7], (2, 3, 1))
    for name in ("whole", "part"):
        np.testing.assert_array_equal(ct.read_label(tmp_path / f"{name}.seg.nrrd", scan), label_of().transpose(2, 1, 0))
    segmentation(tmp_path / "between.seg.nrrd", label_of()[2:10, 3:9, 1:7], (2.5, 3, 1))
    segmentation(tmp_path / "outside.seg.nrrd", label_of()[2:10, 3:9, 1:7], (9, 3, 1))
    for name in ("between", "outside"):
        with pytest.raises(ValueError, match=r"differs from its CT's .*resample"):
            ct.read_label(tmp_path / f"{name}.seg.nrrd", scan)
    with pytest.raises(ValueError, match="segmentation of 3D Slicer, no CT"):
        ct.read_scan(tmp_path / "whole.seg.nrrd")


def read_segments(folder, segments, names, array=None, ends=("Name", "LabelValue")):
    """The label map [i, j, k] of a CT's segmentation of (name, value), and what is said of it."""
    saved(folder / "a.nii", body())
    label = label_of() if array is None else array
    stated = [dict(zip(("Name", "LabelValue"), segment)) for segment in segments]
    more = "".join(f"Segment{k}_{end}:={one[end]}\n" for k, one in enumerate(stated) for end in ends)
    segmentation(folder / "a.seg.nrrd", label, more=more)
    reading = Source("a", str(folder / "a.nii"), str(folder / "a.seg.nrrd"), "train").read(names)
    return reading.label.transpose(2, 1, 0), [reason for _, reason in reading.notes]


SEGMENT_NAMES = [("liver", "spleen"), ("Spleen ", "LIVER"), ("liver", "aorta"), ("aorta", "liver"), ("liver", "Liver")]


@pytest.mark.parametrize("given", SEGMENT_NAMES)
@pytest.mark.parametrize("values", [(1, 2), (2, 1), (7, 300)])
def test_segments_of_slicer_go_by_their_names(tmp_path, given, values):
    names = {"liver": 2, "spleen": 1, "aorta": 1000}
    expected = label_of().astype(np.uint16)
    array = label_of().astype(np.uint16 if max(values) > 255 else np.uint8)
    for number, (name, value) in enumerate(zip(given, values), 1):
        array[label_of() == number] = value
        expected[label_of() == number] = names[name.strip().lower()]
    label, notes = read_segments(tmp_path, zip(given, values), names, array)
    np.testing.assert_array_equal(label, expected)
    assert not notes


@pytest.mark.parametrize("names", [{"liver": 1, "spleen": 2}, {"a": 5, "b": 6, "c": 2, "d": 1}, {}, None])
def test_segments_that_nobody_named_are_said(tmp_path, names):
    label, notes = read_segments(tmp_path, [("Segment_1", 2), ("Segment_2", 1), ("Segment_3", 9)], names)
    np.testing.assert_array_equal(label, label_of())
    assert notes == [
        "labels.names has none of its segments 'Segment_2' (1), 'Segment_1' (2): they are taken by these values"
    ]


@pytest.mark.parametrize(
    "segments, message",
    [
        ([("liver", 1), ("cyst", 2)], "its segment 'cyst', value 2, is none of .* which has 'liver', another of its"),
        ([("cyst", 1), ("liver", 2)], "its segment 'cyst', value 1, is none of .* which has 'liver', another of its"),
        ([("liver", 1)], "its value 2, no segment's, is none of .* which has 'liver'"),
        (
            [("right-kidney", 1), ("Segment_2", 2)],
            "its segment 'right-kidney'.* which has 'right kidney': is that meant",
        ),
        (
            [("liver", 1), ("right kidney", 1)],
            "its segments 'liver' and 'right kidney' have one value, 1: in 3D Slicer",
        ),
        ([("a", 2), ("b", 2)], "its segments 'a' and 'b' have one value, 2: in 3D Slicer"),
    ],
)
def test_segments_of_which_some_are_named_are_refused(tmp_path, segments, message):
    with pytest.raises(ValueError, match=r"a\.seg\.nrrd: " + message):
        read_segments(tmp_path, segments, {"liver": 1, "right kidney": 2})


def test_a_segment_without_a_value_has_slicers(tmp_path):
    one = (label_of() == 1).astype(np.uint8)
    label, notes = read_segments(tmp_path, [("spleen", 1)], {"liver": 1, "spleen": 2}, one, ends=("Name",))
    np.testing.assert_array_equal(label, 2 * one)
    assert not notes


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda label: np.where(label == 0, np.nan, label).astype(np.float32), "NaN or infinite: set them to 0"),
        (lambda label: label.astype(np.int16) - (label == 0), "from -1 to 2, label values lie in 0..65535: give"),
        (lambda label: np.where(label == 2, 500000, label.astype(np.int32)), "to 500000, label values lie in"),
    ],
)
def test_labels_that_are_none_are_refused_by_value(tmp_path, make, message):
    scan = ct.read_scan(saved(tmp_path / "a.nii", body()))
    saved(tmp_path / "l.nii", make(label_of()))
    with pytest.raises(ValueError, match=message):
        ct.read_label(tmp_path / "l.nii", scan)


# -- what ITK reads wrongly, without a word ---------------------------------------------------------------------------


@pytest.mark.parametrize("stated, message", [(None, "has no Comp"), (-50, "says Comp"), (500, "says Comp"), (0, None)])
@pytest.mark.parametrize("detached_file", [False, True])
def test_the_compressed_size_of_a_metaimage_is_compared(tmp_path, capfd, stated, message, detached_file):
    packed = zlib.compress(body().tobytes(order="F"))
    size = "" if stated is None else f"CompressedDataSize = {len(packed) + stated}\n"
    text = MHD + "CompressedData = True\n" + size + f"ElementDataFile = {'a.zraw' if detached_file else 'LOCAL'}\n"
    path = tmp_path / ("a.mhd" if detached_file else "a.mha")
    path.write_bytes(text.encode() + (b"" if detached_file else packed))
    if detached_file:
        (tmp_path / "a.zraw").write_bytes(packed)
    if message is None or (stated is None and detached_file):
        check(ct.read_scan(path))
        return
    with pytest.raises(ValueError, match=rf"{message}ressedDataSize.*it should be {len(packed)}"):
        ct.read_scan(path)
    assert capfd.readouterr() == ("", "")


def test_the_intensity_function_of_a_metaimage_is_applied(tmp_path):
    function = "ElementToIntensityFunctionSlope = 0.5\nElementToIntensityFunctionOffset = -100\n"
    raw = (body().astype(np.int32) + 100) * 2
    (tmp_path / "a.mha").write_bytes(
        (MHD + function + "ElementDataFile = LOCAL\n").encode() + raw.astype("<i2").tobytes(order="F")
    )
    check(ct.read_scan(tmp_path / "a.mha"))


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("padding", [0, 512])
def test_gzip_of_several_members_and_zeros_behind(tmp_path, parts, padding):
    image = nib.Nifti1Image(body(), AFFINE).to_bytes()
    raw = body().tobytes(order="F")

    def packed(content):
        cuts = np.linspace(0, len(content), parts + 1).astype(int)
        return b"".join(gzip.compress(content[a:b]) for a, b in pairwise(cuts)) + bytes(padding)

    (tmp_path / "a.nii.gz").write_bytes(packed(image))
    (tmp_path / "a.nrrd").write_bytes((NRRD.replace("encoding: raw", "encoding: gzip") + "\n").encode() + packed(raw))
    check(ct.read_scan(tmp_path / "a.nii.gz"))
    check(ct.read_scan(tmp_path / "a.nrrd"))
