"""files/contours: known volumes, holes, and matplotlib's point-in-polygon as the oracle."""

import numpy as np
import pydicom
import pytest
from dicom_files import ct_series, save, structure_set
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.path import Path as Polygon

from pgl_ray.config import LabelsConfig
from pgl_ray.files import contours, ct, structures
from pgl_ray.files.layout import read_layout

SPACING, ORIGIN, SHAPE = np.array((0.7, 0.8, 2.5)), np.array((-30.0, 20, -400)), (12, 60, 70)  # x, y, z; D, H, W


def circle(radius, z, center=(-6, 44), count=400):
    turn = np.linspace(0, 2 * np.pi, count, endpoint=False)
    return np.c_[center[0] + radius * np.cos(turn), center[1] + radius * np.sin(turn), np.full(count, z)]


def box(low, high, z):
    """A rectangle in mm."""
    return [(low[0], low[1], z), (high[0], low[1], z), (high[0], high[1], z), (low[0], high[1], z)]


def on(slices):
    return [ORIGIN[2] + SPACING[2] * k for k in slices]


def make(tmp_path, structures, **options):
    """A scan and the path of a structure set on it."""
    options = {"iop": (1, 0, 0, 0, 1, 0), "spacing": (0.8, 0.7), "origin": ORIGIN} | options
    files = ct_series(np.full(SHAPE, 1024, np.int16), **options)
    save(files, tmp_path / "ct")
    save([structure_set(structures, files[0].SeriesInstanceUID)], tmp_path / "rs", "RS.dcm")
    return ct.read_scan(tmp_path / "ct"), tmp_path / "rs/RS.dcm"


def fill(path, names, scan):
    """The label map of one structure set."""
    return structures.read_structures([str(path)], names, scan.affine, scan.voxels.shape)


def volume(label, value):
    return np.count_nonzero(label == value) * SPACING.prod()


def test_a_cylinder_and_a_box_have_their_volumes(tmp_path):
    pixel = SPACING[:2]
    low, high = ORIGIN[:2] + pixel * (5 - 0.5, 7 - 0.5), ORIGIN[:2] + pixel * (25 - 0.5, 37 - 0.5)
    structures = {
        "Tumour ": [circle(12.3, z) for z in on(range(2, 8))],
        "Box": [box(low, high, z) for z in on(range(9, 12))],
        "Couch": [box(low, high, z) for z in on(range(12))],
    }
    scan, path = make(tmp_path, structures)
    label, values, notes, unasked = fill(path, {"tumour": 3, "box": 1}, scan)
    assert label.shape == SHAPE and values == (1, 3) and not notes
    assert unasked == [(str(path), "not asked for: 'Couch'")]
    assert volume(label, 3) == pytest.approx(np.pi * 12.3**2 * 6 * 2.5, rel=0.005)
    assert volume(label, 1) == pytest.approx(20 * 30 * 3 * SPACING.prod(), rel=1e-9)
    assert set(np.flatnonzero((label == 3).any((1, 2)))) == set(range(2, 8))
    assert np.unique(label).tolist() == [0, 1, 3]


def test_holes_keyholes_and_several_contours(tmp_path):
    outer, inner = box((-20, 30), (10, 55), on([3])[0]), box((-12, 36), (0, 48), on([3])[0])
    keyhole = [*outer, outer[0], *reversed([*inner, inner[0]])]  # one line that runs in and back out again
    apart = [circle(4, on([5])[0], center=(-20, 30)), circle(5, on([5])[0], center=(0, 50))]
    structures = {
        "ring": [outer, ("CLOSEDPLANAR_XOR", inner)],
        "key": [keyhole],
        "two": apart,
        "dot": [("POINT", outer)],
    }
    scan, path = make(tmp_path, structures)
    ring, key = (fill(path, {name: 1}, scan).label for name in ("ring", "key"))
    np.testing.assert_array_equal(ring, key)
    assert volume(ring, 1) == pytest.approx((30 * 25 - 12 * 12) * 2.5, rel=0.04)
    two = fill(path, {"two": 300}, scan).label
    assert volume(two, 300) == pytest.approx(np.pi * (16 + 25) * 2.5, rel=0.05)
    label, values, notes, _ = fill(path, {"dot": 1, "absent": 2}, scan)
    assert not label.any() and not values
    assert notes == [(str(path), "structure 'dot' (ROI 4): 1 contour is POINT, which bounds no area")]


@pytest.mark.slow
def test_the_larger_value_stands_where_structures_overlap(tmp_path):
    scan, path = make(tmp_path, {"tumour": [circle(4, on([3])[0])], "liver": [circle(9, on([3])[0])]})
    label, values, *_ = fill(path, {"liver": 1, "tumour": 2}, scan)
    assert values == (1, 2)
    assert volume(label, 2) == pytest.approx(np.pi * 16 * 2.5, rel=0.05)
    assert volume(label, 1) == pytest.approx(np.pi * (81 - 16) * 2.5, rel=0.02)


def test_a_sagittal_series(tmp_path):
    origin, step = (-30, 20, 100), (1.5, 0, 0)
    turn = np.linspace(0, 2 * np.pi, 300, endpoint=False)
    rings = [np.c_[np.full(300, -30 + 1.5 * k), 40 + 9 * np.cos(turn), 80 + 9 * np.sin(turn)] for k in (4, 5, 6)]
    structures = {"ball": rings}
    scan, path = make(tmp_path, structures, iop=(0, 1, 0, 0, 0, -1), step=step, origin=origin)
    label = fill(path, {"ball": 1}, scan).label
    assert label.sum() * np.prod(scan.spacing_mm) == pytest.approx(np.pi * 81 * 3 * 1.5, rel=0.02)
    middle = scan.affine @ (*np.argwhere(label).mean(0), 1)
    np.testing.assert_allclose(middle[:3] * (-1, -1, 1), (-22.5, 40, 80), atol=0.05)


@given(
    points=st.lists(st.tuples(st.floats(-5, 25), st.floats(-5, 35)), min_size=3, max_size=12, unique=True),
    more=st.lists(st.tuples(st.floats(-5, 25), st.floats(-5, 35)), min_size=3, max_size=5, unique=True),
)
@settings(max_examples=60, deadline=None)
def test_filling_agrees_with_matplotlib(points, more):
    shape = (20, 30)
    centers = np.argwhere(np.ones(shape)).astype(float)
    polygons = [np.array(one) for one in (points, more)]
    expected, clear = np.zeros(shape, bool), np.ones(shape, bool)
    for polygon in polygons:
        expected ^= Polygon(np.r_[polygon, polygon[:1]], closed=True).contains_points(centers).reshape(shape)
        for start, end in zip(polygon, np.roll(polygon, -1, axis=0)):  # a centre on an edge may be in or out
            along = np.clip((centers - start) @ (end - start) / max((end - start) @ (end - start), 1e-300), 0, 1)
            clear &= (np.linalg.norm(centers - start - along[:, None] * (end - start), axis=1) > 1e-6).reshape(shape)
    np.testing.assert_array_equal(contours.inside_of(polygons, shape)[clear], expected[clear])


@pytest.mark.parametrize(
    ("rings", "message"),
    [
        (
            lambda: [circle(5, ORIGIN[2] + 1.2)],
            "1 of its 1 contour lies between the CT's slices, as at slice 0.48: draw it on this CT",
        ),
        (lambda: [circle(5, on([20])[0])], "it lies at slice 20 of 12, outside its CT: is it another's"),
        (lambda: [circle(5, z) for z in on((1, 3, 5, 7))], "only one slice in 2 has contours: interpolate them"),
    ],
)
def test_contours_off_the_slices_cost_only_their_structure(tmp_path, rings, message):
    scan, path = make(tmp_path, {"a": rings(), "b": [circle(5, on([3])[0])]})
    label, values, notes, _ = fill(path, {"a": 1, "b": 2}, scan)
    assert values == (2,) and volume(label, 2) > 0 and not (label == 1).any()
    ((where, reason),) = notes
    assert where == str(path) and message in reason and reason.startswith("structure 'a' (ROI 1): ")
    assert reason.endswith("'a' is unlabelled in this scan")


def test_a_damaged_structure_set_does_not_cost_the_ct(tmp_path):
    scan, path = make(tmp_path, {"a": [circle(5, on([3])[0])]})
    path.write_bytes(path.read_bytes()[:-300])
    for one, reason in ((path, "not a readable DICOM file"), (tmp_path / "none.dcm", "no such file")):
        label, values, notes, _ = fill(one, {"a": 1}, scan)
        assert not label.any() and values == () and notes[0][0] == str(one) and reason in notes[0][1]
    layout = read_layout(str(tmp_path), LabelsConfig(names={"a": 1}))
    (fault,), (scan,) = layout.faults, layout.scans
    assert fault.source == str(path) and "so it labels no scan" in fault.reason
    assert scan.label is None and scan.read(layout.names).scan.voxels.shape == SHAPE


# -- in a folder ------------------------------------------------------------------------------------------------------


def test_contours_become_labels_where_they_are_named(tmp_path):
    structures = {"Liver": [circle(9, on([3])[0])], "Spleen": [], "PTV": [circle(9, on([3])[0])]}
    make(tmp_path, structures)
    bare = read_layout(str(tmp_path), LabelsConfig())
    assert [scan.label for scan in bare.scans] == [None] and bare.scans[0].split == ""
    assert bare.left_out[0].reason == "structures 'Liver', 'PTV': name those to use, labels.names={NAME: 1}"

    layout = read_layout(str(tmp_path), LabelsConfig(names={"liver": 4, "spleen": 5}))
    (scan,) = layout.scans
    assert scan.split == "train" and not layout.left_out
    assert len(scan.files()) == SHAPE[0] + 1
    reading = scan.read(layout.names)
    assert volume(reading.label, 4) == pytest.approx(np.pi * 81 * 2.5, rel=0.02) and reading.label.dtype == np.uint8
    assert reading.labelled == (4,)  # spleen is not drawn: unlabelled
    assert [reason for _, reason in reading.notes][-1:] == ["structure 'Spleen' (ROI 2): is empty"]
    assert [reason for _, reason in reading.unasked] == ["not asked for: 'PTV'"]

    save([pydicom.dcmread(scan.label)], tmp_path / "again", "RS2.dcm")
    (fault,) = read_layout(str(tmp_path), LabelsConfig(names={"liver": 4})).faults
    assert "has several labels" in fault.reason and "rs/RS.dcm): keep one of them" in fault.reason
    other = save([structure_set({"Liver": [circle(9, 0)]}, "1.2.3")], tmp_path / "stray")
    layout = read_layout(str(tmp_path), LabelsConfig())
    assert (str(other / "000.dcm"), "contours of a series that is not here") in layout.left_out


@pytest.mark.parametrize("patient", ["STS_002", "STS_008"])
def test_real_contours_have_the_volume_of_their_polygons(real_data, patient):
    layout = read_layout(str(real_data / "dicom" / patient), LabelsConfig(names={"GTV_Mass_CT": 1}))
    scan, label, *_ = layout.scans[0].read(layout.names)
    area = 0.0
    for contour in pydicom.dcmread(layout.scans[0].label).ROIContourSequence[0].ContourSequence:
        x, y, _ = np.array(contour.ContourData, float).reshape(-1, 3).T
        area += abs(x @ np.roll(y, 1) - y @ np.roll(x, 1)) / 2  # shoelace
    assert label.sum() * np.prod(scan.spacing_mm) == pytest.approx(area * scan.spacing_mm[0], rel=0.01)
