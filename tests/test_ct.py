"""files/ct: geometry against nibabel and SimpleITK in every orientation, values, and each bad input's message."""

import gzip
import struct
from itertools import permutations, product

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from isal import igzip

from pgl_ray.files import ct, itk

SHAPE = (5, 6, 7)
SPACING = (0.7, 0.8, 2.5)


def source_affine(perm, signs, skew=0.0, seed=0):
    """(i, j, k, 1) -> RAS+ mm: axis a runs along world axis perm[a]; `skew` shears and tilts it."""
    affine = np.eye(4)
    affine[:3, :3] = np.eye(3)[:, list(perm)] * signs * SPACING
    rng = np.random.default_rng(seed)
    affine[:3, :3] += skew * rng.uniform(-1, 1, (3, 3))
    affine[:3, 3] = rng.uniform(-200, 200, 3)
    return affine


def distinct(shape=SHAPE, dtype=np.int16):
    """A volume whose values are all different, so that one value names one voxel."""
    return np.random.default_rng(1).permutation(np.prod(shape)).reshape(shape).astype(dtype)


def check_world(scan, volume, affine):
    """Every stored voxel lies where the source, read by `affine`, has the same value."""
    index = np.argwhere(np.ones(scan.voxels.shape, bool))
    world = np.c_[index, np.ones(len(index))] @ scan.affine.T
    source = world @ np.linalg.inv(affine).T
    nearest = np.rint(source[:, :3]).astype(int)
    np.testing.assert_allclose(source[:, :3], nearest, atol=1e-4)
    assert nearest.min() >= 0 and (nearest < volume.shape).all()
    np.testing.assert_array_equal(scan.voxels[tuple(index.T)], volume[tuple(nearest.T)])


def save(path, volume, affine):
    nib.save(nib.Nifti1Image(volume, affine), path)
    return path


ORIENTATIONS = [(p, s) for p in permutations(range(3)) for s in product((1, -1), repeat=3)]


@pytest.mark.parametrize("skew", [0.0, 0.06])
@pytest.mark.parametrize("perm, signs", ORIENTATIONS)
def test_every_orientation_keeps_its_coordinates_and_comes_back(tmp_path, perm, signs, skew):
    volume, affine = distinct(), source_affine(perm, signs, skew)
    path = save(tmp_path / "a.nii", volume, affine)
    scan = ct.read_scan(path)
    check_world(scan, volume, nib.load(path).affine)
    towards = scan.affine[:3, :3].argmax(0), scan.affine[:3, :3].argmin(0)
    assert (towards[0][0], towards[1][1], towards[1][2]) == (2, 1, 0)  # D to superior, H to posterior, W to left
    np.testing.assert_allclose(scan.spacing_mm, np.linalg.norm(scan.affine[:3, :3], axis=0))
    assert scan.orientation == "".join(nib.aff2axcodes(affine))
    assert scan.voxels.dtype == np.int16 and scan.voxels.flags.c_contiguous and scan.rounding_error_hu == 0

    ct.write_label(tmp_path / "l.nii.gz", scan.voxels.astype(np.uint16), path)  # the volume as its own label map
    written = nib.load(tmp_path / "l.nii.gz")
    np.testing.assert_array_equal(np.asanyarray(written.dataobj), volume)
    np.testing.assert_array_equal(written.affine, nib.load(path).affine)
    assert written.get_data_dtype() == np.uint16
    np.testing.assert_array_equal(ct.read_label(tmp_path / "l.nii.gz", scan), scan.voxels)


@pytest.mark.parametrize("suffix", ["mha", "mhd", "nrrd", "nhdr"])
def test_itk_formats_agree_with_itk(tmp_path, suffix):
    volume = distinct()
    image = sitk.GetImageFromArray(volume.transpose(2, 1, 0))
    image.SetSpacing(SPACING)
    image.SetOrigin((10, -20, 30))
    turn = np.deg2rad(20)
    image.SetDirection([0, -np.cos(turn), np.sin(turn), 1, 0, 0, 0, np.sin(turn), np.cos(turn)])
    path = tmp_path / f"a.{suffix}"
    sitk.WriteImage(image, str(path))
    columns = [np.subtract(image.TransformIndexToPhysicalPoint(list(map(int, e))), (10, -20, 30)) for e in np.eye(3)]
    affine = np.eye(4)
    affine[:3] = np.c_[np.array(columns).T, (10, -20, 30)]
    affine[:2] *= -1  # ITK's world is LPS
    scan = ct.read_scan(path)
    check_world(scan, volume, affine)

    ct.write_label(tmp_path / "l.nii.gz", scan.voxels.astype(np.uint16), path)
    back = sitk.ReadImage(str(tmp_path / "l.nii.gz"))
    np.testing.assert_array_equal(sitk.GetArrayFromImage(back), sitk.GetArrayFromImage(image))
    np.testing.assert_allclose(back.GetDirection(), image.GetDirection(), atol=1e-5)
    np.testing.assert_allclose(back.GetOrigin(), image.GetOrigin(), atol=1e-4)
    assert len(itk.files_of(path)) == (2 if suffix in ("mhd", "nhdr") else 1)


def test_sheared_nrrd_in_ras_space(tmp_path):
    volume = distinct((2, 3, 4))
    header = (
        "NRRD0004\ntype: short\ndimension: 3\nsizes: 2 3 4\nencoding: raw\nendian: little\n"
        "space: right-anterior-superior\nspace directions: (0,-0.8,0) (0.7,0.07,0) (0,0,2)\nspace origin: (1,2,3)\n\n"
    )
    (tmp_path / "a.nrrd").write_bytes(header.encode() + volume.astype("<i2").tobytes(order="F"))
    affine = np.array([[0, 0.7, 0, 1], [-0.8, 0.07, 0, 2], [0, 0, 2, 3], [0, 0, 0, 1]])
    check_world(ct.read_scan(tmp_path / "a.nrrd"), volume, affine)


@pytest.mark.parametrize("dtype", ["uint8", "int16", ">i2", "uint16", "int32", "float32", "float64"])
@pytest.mark.parametrize("image_class", [nib.Nifti1Image, nib.Nifti2Image])
def test_integers_of_every_type_are_lossless(tmp_path, dtype, image_class):
    volume = distinct().astype(dtype)
    header = image_class.header_class(endianness=">") if dtype == ">i2" else None
    nib.save(image_class(volume, source_affine((1, 0, 2), (1, -1, 1)), header), tmp_path / "a.nii.gz")
    scan = ct.read_scan(tmp_path / "a.nii.gz")
    check_world(scan, volume, nib.load(tmp_path / "a.nii.gz").affine)
    assert scan.rounding_error_hu == 0


def test_fractional_values_are_rounded_and_the_error_is_stated(tmp_path):
    image = nib.Nifti1Image(distinct(), np.diag([*SPACING, 1]))
    image.header.set_slope_inter(0.5, -100)
    path = tmp_path / "a.nii"
    nib.save(image, path)
    halves = distinct() * 0.5 - 100
    np.testing.assert_array_equal(nib.load(path).get_fdata(), halves)
    scan = ct.read_scan(path)
    assert scan.rounding_error_hu == 0.5
    check_world(scan, np.rint(halves), image.affine)

    fraction = distinct().astype(np.float32)
    fraction[2, 3, 4] += 0.25
    assert ct.read_scan(save(tmp_path / "b.nii", fraction, np.eye(4))).rounding_error_hu == 0.25


def test_one_volume_in_four_dimensions_is_fine_with_a_3d_label(tmp_path):
    volume = distinct()
    path = save(tmp_path / "a.nii", volume[..., None], source_affine((0, 1, 2), (1, 1, 1)))
    scan = ct.read_scan(path)
    check_world(scan, volume, nib.load(path).affine)
    ct.write_label(tmp_path / "l.nii", scan.voxels.astype(np.uint8), path)
    assert nib.load(tmp_path / "l.nii").shape == SHAPE


def test_a_written_label_leaves_the_cts_private_fields_behind(tmp_path):
    image = nib.Nifti1Image(distinct(), source_affine((0, 1, 2), (-1, 1, 1)))
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"patient's name"))
    image.header["cal_max"] = 400
    nib.save(image, tmp_path / "a.nii")
    ct.write_label(tmp_path / "l.nii", np.zeros(SHAPE[::-1], np.uint8), tmp_path / "a.nii")
    header = nib.load(tmp_path / "l.nii").header
    assert not header.extensions and header["cal_max"] == 0
    assert b"patient" not in (tmp_path / "l.nii").read_bytes()


def test_label_types(tmp_path):
    affine = np.diag([*SPACING, 1])
    scan = ct.read_scan(save(tmp_path / "a.nii", distinct(), affine))
    small = (distinct() % 3).astype(np.float32)  # whole numbers in a float file, as some sets have it
    assert ct.read_label(save(tmp_path / "s.nii", small, affine), scan).dtype == np.uint8
    assert ct.read_label(save(tmp_path / "l.nii", distinct() * 100, affine), scan).dtype == np.uint16
    other_order = nib.Nifti1Image(small, affine).as_reoriented(np.array([[2, -1], [1, 1], [0, -1]]))
    nib.save(other_order, tmp_path / "f.nii")
    np.testing.assert_array_equal(ct.read_label(tmp_path / "f.nii", scan), ct.read_label(tmp_path / "s.nii", scan))


# -- bad inputs -------------------------------------------------------------------------------------------------------


def _itk(path, array, vector=False):
    sitk.WriteImage(sitk.GetImageFromArray(array, isVector=vector), str(path), True)


def _cut(path, write):
    write(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])


def _flip_byte(path):
    save(path, distinct((20, 20, 20)), np.eye(4))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(content)


def _with(value):
    volume = distinct().astype(np.float32)
    volume[1, 2, 3:5] = value
    return volume


def _rgb():
    return np.zeros(SHAPE, [("R", "u1"), ("G", "u1"), ("B", "u1")])


def _singular(path):
    image = nib.Nifti1Image(distinct(), None)
    image.header.set_sform(np.diag([1, 1, 0, 1]), 1)
    nib.save(image, path)


def _header(path, place, form, *values, zipped=False):
    """A NIfTI whose header says something else."""
    nib.save(nib.Nifti1Image(distinct(), np.eye(4)), path.with_name("whole.nii"))
    content = bytearray(path.with_name("whole.nii").read_bytes())
    struct.pack_into(form, content, place, *values)
    path.write_bytes(gzip.compress(content) if zipped else content)


def _dim(path, *shape, zipped=False):
    _header(path, 40, "<4h", 3, *shape, zipped=zipped)


def _replaced(path, old, new, compressed=True):
    sitk.WriteImage(sitk.GetImageFromArray(distinct()), str(path), compressed)
    content = path.read_bytes()
    assert old in content
    path.write_bytes(content.replace(old, new))


def _flip_last(path):
    sitk.WriteImage(sitk.GetImageFromArray(distinct((20, 20, 20))), str(path), True)
    content = bytearray(path.read_bytes())
    content[-100] ^= 255
    path.write_bytes(content)


def _gz(path, change):
    save(path, distinct((20, 20, 20)), np.eye(4))
    path.write_bytes(change(path.read_bytes()))


BAD_SCANS = {
    "huge .nii": (
        "x.nii",
        lambda p: _dim(p, 30000, 30000, 30000),
        r"\(30000, 30000, 30000\), more than the file",
    ),
    "huge .nii.gz": ("x.nii.gz", lambda p: _dim(p, 30000, 30000, 30000, zipped=True), "more than the file holds"),
    "larger .nii.gz": ("x.nii.gz", lambda p: _dim(p, 90, 90, 90, zipped=True), "not a readable image"),
    "smaller .nii": ("x.nii", lambda p: _dim(p, 5, 6, 6), r"more voxels than the shape \(5, 6, 6\)"),
    "smaller .nii.gz": ("x.nii.gz", lambda p: _dim(p, 5, 6, 6, zipped=True), "more voxels than the shape"),
    "negative": ("x.nii", lambda p: _dim(p, -5, 6, 7), "expected one 3D volume"),
    "unknown type": ("x.nii", lambda p: _header(p, 70, "<h", 9999), "data code 9999 not recognized"),
    "voxels in header": ("x.nii", lambda p: _header(p, 108, "<f", 0), "begin at byte 0, inside its header"),
    "voxels nowhere": ("x.nii", lambda p: _header(p, 108, "<f", np.nan), "not a readable image"),
    "magic": ("x.nii", lambda p: _header(p, 344, "4s", b"abcd"), "not a readable image"),
    "header alone": ("x.nii", lambda p: _gz(p, lambda b: b[:352]), "more than the file holds"),
    "gz checksum": ("x.nii.gz", lambda p: _gz(p, lambda b: b[:-8] + b"abcd" + b[-4:]), "CRC check failed"),
    "gz cut by a byte": ("x.nii.gz", lambda p: _gz(p, lambda b: b[:-1]), "ended before the end-of-stream"),
    "gz and more": ("x.nii.gz", lambda p: _gz(p, lambda b: b + b"garbage"), "not a readable image"),
    "gz twice": ("x.nii.gz", lambda p: _gz(p, gzip.compress), "not a readable image"),
    "no gz": ("x.nii.gz", lambda p: _gz(p, gzip.decompress), "is not a gzip file"),
    "gz named .nii": ("x.nii", lambda p: (_gz(q := p.with_name("y.nii.gz"), bytes), q.rename(p)), "not a readable"),
    "huge .mha": ("x.mha", lambda p: _replaced(p, b"= 7 6 5", b"= 30000 30000 30000"), "more than the file holds"),
    "larger .mha": ("x.mha", lambda p: _replaced(p, b"= 7 6 5", b"= 7 6 6"), "fewer voxels than the shape"),
    "smaller .mha": ("x.mha", lambda p: _replaced(p, b"= 7 6 5", b"= 7 6 4"), "more voxels than the shape"),
    "larger raw .mha": ("x.mha", lambda p: _replaced(p, b"= 7 6 5", b"= 7 6 6", False), "fewer voxels than the shape"),
    "larger .nrrd": ("x.nrrd", lambda p: _replaced(p, b": 7 6 5", b": 7 6 6"), "fewer voxels than the shape"),
    "smaller .nrrd": ("x.nrrd", lambda p: _replaced(p, b": 7 6 5", b": 7 6 4"), "more voxels than the shape"),
    "smaller raw .nrrd": (
        "x.nrrd",
        lambda p: _replaced(p, b": 7 6 5", b": 7 6 4", False),
        "more voxels than the shape",
    ),
    "damaged .mha": ("x.mha", _flip_last, "not a readable image .*incorrect data check"),
    "damaged .nrrd": ("x.nrrd", _flip_last, "not a readable image"),
    "no spacing": ("x.mha", lambda p: _replaced(p, b"ElementSpacing", b"ElementSpaces "), "no voxel spacing"),
    "missing": ("x.nii.gz", lambda p: None, "no such file"),
    "folder": ("x.nii.gz", lambda p: p.mkdir(), "expected one CT series, found none"),
    "other format": ("x.png", lambda p: p.write_text("hello"), "not a supported format"),
    "text .nii.gz": ("x.nii.gz", lambda p: p.write_text("hello"), "not a readable image"),
    "text .nii": ("x.nii", lambda p: p.write_text("hello"), "not a readable image"),
    "text .nrrd": ("x.nrrd", lambda p: p.write_text("hello"), "not a readable image"),
    "text .mha": ("x.mha", lambda p: p.write_text("hello"), "not a readable image"),
    "empty": ("x.nii.gz", lambda p: p.write_text(""), "not a readable image"),
    "cut .nii": ("x.nii", lambda p: _cut(p, lambda q: save(q, distinct(), np.eye(4))), "cut off"),
    "cut .nii.gz": ("x.nii.gz", lambda p: _cut(p, lambda q: save(q, distinct(), np.eye(4))), "cut off"),
    "cut .nrrd": ("x.nrrd", lambda p: _cut(p, lambda q: _itk(q, distinct())), "cut off"),
    "cut .mha": ("x.mha", lambda p: _cut(p, lambda q: _itk(q, distinct())), "cut off"),
    "lost .raw": ("x.mhd", lambda p: (_itk(p, distinct()), p.with_suffix(".zraw").unlink()), "not a readable image"),
    "flipped byte": ("x.nii.gz", _flip_byte, "damaged"),
    "4D": ("x.nii", lambda p: save(p, distinct((3, 4, 5, 2)), np.eye(4)), r"\(3, 4, 5, 2\)"),
    "4D .nrrd": ("x.nrrd", lambda p: _itk(p, distinct((2, 3, 4, 5))), r"\(5, 4, 3, 2\)"),
    "2D": ("x.nii", lambda p: save(p, distinct((3, 4)), np.eye(4)), "expected one 3D volume"),
    "2D .mha": ("x.mha", lambda p: _itk(p, distinct((3, 4))), "expected one 3D volume"),
    "RGB": ("x.nii", lambda p: save(p, _rgb(), np.eye(4)), "expected single numbers"),
    "vector .mha": ("x.mha", lambda p: _itk(p, distinct((3, 4, 5, 3)), True), "3 values per voxel"),
    "complex": ("x.nii", lambda p: save(p, distinct().astype(np.complex64), np.eye(4)), "expected single numbers"),
    "NaN": ("x.nii", lambda p: save(p, _with(np.nan), np.eye(4)), "2 of 210 voxels are NaN"),
    "inf": ("x.nii", lambda p: save(p, _with(np.inf), np.eye(4)), "2 of 210 voxels are NaN or infinite"),
    "NaN .mha": ("x.mha", lambda p: _itk(p, _with(np.nan)), "2 of 210 voxels are NaN"),
    "beyond int16": ("x.nii", lambda p: save(p, _with(40000), np.eye(4)), "to 40000, HU lie in -32768..32767"),
    "uint16 beyond": ("x.nii", lambda p: save(p, _with(40000).astype("u2"), np.eye(4)), "to 40000"),
    "singular": ("x.nii", _singular, "singular"),
}


@pytest.mark.parametrize("name, make, message", BAD_SCANS.values(), ids=BAD_SCANS)
def test_bad_scan_is_one_clear_line(tmp_path, name, make, message, capfd):
    path = tmp_path / "Fälle 1" / name
    path.parent.mkdir()
    make(path)
    capfd.readouterr()
    with pytest.raises(ValueError, match=message) as caught:
        ct.read_scan(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")  # no library speaks besides


@pytest.mark.parametrize(
    "name, holder, method",
    [("a.nii", nib.arrayproxy.ArrayProxy, "get_unscaled"), ("a.nii.gz", igzip.IGzipFile, "readinto")],
)
def test_no_memory_is_said(tmp_path, monkeypatch, name, holder, method):
    def full(*_):
        raise MemoryError

    path = save(tmp_path / name, distinct(), np.eye(4))
    monkeypatch.setattr(holder, method, full)
    with pytest.raises(ValueError, match=rf"{name}: shape \(5, 6, 7\) needs more memory than there is: crop it"):
        ct.read_scan(path)


def test_padding_below_air_is_clamped_and_counted(tmp_path):
    volume = distinct()
    volume[0, :2], volume[4, 5, 6] = -3024, -1025
    volume[1, 1, 1] = -1024
    scan = ct.read_scan(save(tmp_path / "a.nii.gz", volume, np.diag([-1, -1, 1, 1])))
    np.testing.assert_array_equal(scan.voxels, np.maximum(volume, -1024).transpose(2, 1, 0))
    assert scan.num_padding == 15


@pytest.mark.parametrize(
    "label, affine, message",
    [
        (distinct((5, 6, 8)), np.diag([*SPACING, 1]), r"shape \(8, 6, 5\) differs from its CT's \(7, 6, 5\)"),
        (distinct(), np.diag([0.7, 0.8, 2.6, 1]), r"affine .*2.6.* differs from its CT's .*2.5"),
        (distinct() - 1, np.diag([*SPACING, 1]), "values from -1 to 208, label values lie in 0..65535"),
        (distinct() + np.float32(0.5), np.diag([*SPACING, 1]), "whole numbers"),
        (_with(np.nan), np.diag([*SPACING, 1]), "2 of 210 voxels are NaN"),
    ],
)
def test_bad_label_is_one_clear_line(tmp_path, label, affine, message):
    scan = ct.read_scan(save(tmp_path / "a.nii", distinct(), np.diag([*SPACING, 1])))
    with pytest.raises(ValueError, match=message) as caught:
        ct.read_label(save(tmp_path / "l.nii", label, affine), scan)
    assert "l.nii" in str(caught.value) and "\n" not in str(caught.value)


def test_label_of_another_shape_is_not_written(tmp_path):
    path = save(tmp_path / "a.nii", distinct(), np.eye(4))
    with pytest.raises(ValueError, match="does not fit"):
        ct.write_label(tmp_path / "l.nii", np.zeros(SHAPE, np.uint8), path)
    assert not (tmp_path / "l.nii").exists()


@pytest.mark.parametrize("name", ["body/images/ts_example_ct", "body/images/lung1", "sts/images/STS_002"])
def test_real_scans_keep_world_coordinates(real_data, tmp_path, name):
    path = real_data / f"{name}.nii.gz"
    image = nib.load(path)
    volume = np.asanyarray(image.dataobj)
    scan = ct.read_scan(path)
    index = np.random.default_rng(0).integers(0, scan.voxels.shape, (2000, 3))
    source = np.c_[index, np.ones(2000)] @ scan.affine.T @ np.linalg.inv(image.affine).T
    nearest = np.rint(source[:, :3]).astype(int)
    np.testing.assert_allclose(source[:, :3], nearest, atol=1e-3)
    np.testing.assert_array_equal(scan.voxels[tuple(index.T)], volume[tuple(nearest.T)])

    sitk.WriteImage(sitk.ReadImage(str(path)), str(tmp_path / "a.mha"))  # ITK's view of the same file
    np.testing.assert_array_equal(ct.read_scan(tmp_path / "a.mha").voxels, scan.voxels)


def test_real_label_comes_back_in_the_cts_own_geometry(real_data, tmp_path):
    body = real_data / "body"
    scan = ct.read_scan(body / "images/ts_example_ct.nii.gz")
    label = ct.read_label(body / "labels/ts_example_ct.nii.gz", scan)
    ct.write_label(tmp_path / "l.nii.gz", label, body / "images/ts_example_ct.nii.gz")
    given, written = nib.load(body / "labels/ts_example_ct.nii.gz"), nib.load(tmp_path / "l.nii.gz")
    np.testing.assert_array_equal(np.asanyarray(written.dataobj), np.asanyarray(given.dataobj))
    np.testing.assert_allclose(written.affine, nib.load(body / "images/ts_example_ct.nii.gz").affine)
