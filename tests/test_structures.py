"""files/structures: no structure of an RTSTRUCT or SEG is lost silently, and none costs the CT.

Masks are boxes of whole voxels, so that what is right is known voxel by voxel.
"""

import unicodedata

import numpy as np
import pydicom
import pytest
from dicom_files import ct_series, new_file, save
from pydicom.dataset import Dataset
from pydicom.uid import RTStructureSetStorage, SegmentationStorage

from pgl_ray.config import LabelsConfig
from pgl_ray.files.layout import read_layout

SHAPE = (10, 24, 30)  # slices, rows, columns
ORIGIN, SPACING, STEP = np.array((-30.0, 20.0, -400.0)), (0.8, 0.7), 2.5  # x, y, z; between rows, columns
PATIENT = "P1"
NO_NUMBER = "7.770777"  # becomes letters in the file, because pydicom writes nothing but numbers


def ct_files(seed=0, **tags):
    volume = np.random.default_rng(seed).integers(0, 1500, SHAPE).astype(np.uint16)
    tags = {"FrameOfReferenceUID": "1.2.9", "PatientID": PATIENT} | tags
    return ct_series(volume, origin=ORIGIN, spacing=SPACING, **tags)


def box(rows, columns, place):
    """Corners in mm around the voxels rows[0]..rows[1]-1, columns[0]..columns[1]-1 of slice `place`."""
    (top, bottom), (left, right) = rows, columns
    corners = [(left, top), (right, top), (right, bottom), (left, bottom)]
    return [
        (ORIGIN[0] + SPACING[1] * (c - 0.5), ORIGIN[1] + SPACING[0] * (r - 0.5), ORIGIN[2] + STEP * place)
        for c, r in corners
    ]


def mask(*boxes):
    """bool [slices, rows, columns] of (rows, columns, slice); what lies beyond the grid is left out."""
    voxels = np.zeros(SHAPE, bool)
    for (top, bottom), (left, right), place in boxes:
        if 0 <= place < SHAPE[0]:
            voxels[place, max(top, 0) : bottom, max(left, 0) : right] = True
    return voxels


def contour(points, kind="CLOSED_PLANAR", data=None):
    one = Dataset()
    one.ContourGeometricType, one.NumberOfContourPoints = kind, len(points)
    one.ContourData = [f"{value:.4f}" for value in np.ravel(points)] if data is None else data
    return one


def structure_set(rois, series, **tags):
    """RTSTRUCT of (number, name, contours); a name of none has no entry, contours of none have no item."""
    file = new_file(RTStructureSetStorage, "RTSTRUCT", PatientID=PATIENT)
    file.StructureSetROISequence, file.ROIContourSequence = [], []
    for number, name, contours in rois:
        roi, drawn = Dataset(), Dataset()
        if name is not None:
            roi.ROINumber, roi.ROIName = number, name
            file.StructureSetROISequence.append(roi)
        if contours is not None:
            drawn.ReferencedROINumber = number
            drawn.ContourSequence = [one if isinstance(one, Dataset) else contour(one) for one in contours]
            file.ROIContourSequence.append(drawn)
    frame, study, one = Dataset(), Dataset(), Dataset()
    if series:
        one.SeriesInstanceUID = series
        study.RTReferencedSeriesSequence = [one]
        frame.RTReferencedStudySequence = [study]
    frame.FrameOfReferenceUID = tags.pop("frame", "1.2.9")
    file.ReferencedFrameOfReferenceSequence = [frame]
    for tag, value in tags.items():
        setattr(file, tag, value)
    return file


def read(tmp_path, rois, names, **tags):
    """Layout and Reading of one CT with one structure set."""
    files = ct_files()
    save(files, tmp_path / "ct")
    folder = save([structure_set(rois, files[0].SeriesInstanceUID, **tags)], tmp_path / "rs", "rs{}.dcm")
    path = folder / "rs0.dcm"
    path.write_bytes(path.read_bytes().replace(NO_NUMBER.encode(), b"seven.77"))
    layout = read_layout(str(tmp_path), LabelsConfig(names=names))
    assert len(layout.scans) == 1
    return layout, layout.scans[0].read(layout.names)


def assert_label(reading, expected):
    """expected: value -> mask in file order, whose slices, rows and columns run towards S, P and L as the store's."""
    label = np.zeros(SHAPE, int)
    for value, where in sorted(expected.items()):
        label[where] = value
    np.testing.assert_array_equal(np.zeros(SHAPE, int) if reading.label is None else reading.label, label)
    assert reading.labelled == tuple(sorted(expected))
    assert (reading.label is None) == (not expected)


A, B, C = ((3, 9), (4, 12), 3), ((10, 15), (14, 20), 6), ((5, 8), (6, 10), 3)  # C lies in A


def reasons(reading):
    return [reason for _, reason in reading.notes]


def test_rois_of_one_name_are_joined(tmp_path):
    _, reading = read(tmp_path, [(1, "GTV", [box(*A)]), (2, "GTV", [box(*B)])], {"GTV": 1})
    assert_label(reading, {1: mask(A, B)})
    assert not reading.notes and not reading.unasked


def test_rois_of_one_name_that_overlap_make_no_hole(tmp_path):
    _, reading = read(tmp_path, [(1, "GTV", [box(*A)]), (2, "gtv ", [box(*C)])], {"GTV": 1})
    assert_label(reading, {1: mask(A)})


def test_a_contour_that_stands_twice_is_no_hole(tmp_path):
    _, reading = read(tmp_path, [(1, "a", [box(*A), box(*B), box(*A)])], {"a": 1})
    assert_label(reading, {1: mask(A, B)})
    assert reasons(reading) == ["structure 'a' (ROI 1): 1 contour stands there twice, taken once"]


@pytest.mark.parametrize("empty", [[], None])
@pytest.mark.parametrize("first", [True, False])
def test_an_empty_roi_does_not_take_its_namesake_along(tmp_path, empty, first):
    rois = [(1, "GTV", [box(*A)]), (2, "GTV", empty)][:: 1 if first else -1]
    _, reading = read(tmp_path, rois, {"GTV": 4})
    assert_label(reading, {4: mask(A)})
    assert reasons(reading) == ["structure 'GTV' (ROI 2): is empty"]


def test_the_order_of_the_sequences_does_not_matter(tmp_path):
    files = ct_files()
    file = structure_set([(7, "a", [box(*A)]), (3, "b", [box(*B)])], files[0].SeriesInstanceUID)
    file.ROIContourSequence.reverse()
    save(files, tmp_path / "ct")
    save([file], tmp_path / "rs")
    layout = read_layout(str(tmp_path), LabelsConfig(names={"a": 1, "b": 2}))
    assert_label(layout.scans[0].read(layout.names), {1: mask(A), 2: mask(B)})


BROKEN = {
    "seven numbers": ([contour(box(*A), data=["1"] * 7)], "its contour 1 is broken (7 numbers, which are no points"),
    "no numbers": ([box(*A), contour(box(*C), data=[NO_NUMBER] * 3)], "its contour 2 is broken (its points are no n"),
    "fewer points": ([contour([*box(*A), (0, 0, 0)], data=[0.0] * 9)], "its contour 1 is broken (3 points, its he"),
    "more points": ([contour(box(*A)[:3], data=np.ravel(box(*A)).tolist())], "(4 points, its header says 3)"),
    "points": ([contour(box(*A), "POINT")], "1 contour is POINT, which bounds no area"),
    "open": ([contour(box(*A), "OPEN_PLANAR")] * 2, "2 contours are OPEN_PLANAR, which bound no area"),
    "no type": ([contour(box(*A), "")], "1 contour is of no type, which bounds no area"),
    "two points": ([box(*A)[:2]], "its contour 1 has 2 points, no area"),
    "between": (
        [box(*A[:2], 3.5), box(*A[:2], 4.5)],
        "2 of its 2 contours lie between the CT's slices, as at slice",
    ),
    "beyond": ([box(*A[:2], 12), box(*A[:2], 13)], "it lies at slice 12 to 13 of 10, outside its CT"),
    "beside": ([box((40, 44), (2, 6), 3)], "it lies beside its CT: is it another's?"),
    "tiny": ([np.array(box(*A)) * 0.001 + np.array((-30.3, 20.4, -392.5))], "no voxel's centre lies in its contours"),
    "every second": ([box(*A[:2], place) for place in (1, 3, 5)], "only one slice in 2 has contours"),
    "empty": ([], "is empty"),
    "no contours": (None, "is empty"),
}


@pytest.mark.parametrize("contours, message", BROKEN.values(), ids=BROKEN)
def test_a_structure_that_is_not_used_is_named(tmp_path, contours, message):
    rois = [(1, "bad", contours), (2, "good", [box(*B)])]
    layout, reading = read(tmp_path, rois, {"bad": 1, "good": 2})
    assert_label(reading, {2: mask(B)})
    assert not layout.faults and not layout.left_out and layout.scans[0].split == "train"
    (reason,) = reasons(reading)
    assert reason.startswith("structure 'bad' (ROI 1): ") and message in reason, reason


@pytest.mark.parametrize("contours, message", BROKEN.values(), ids=BROKEN)
def test_where_nothing_else_is_drawn_the_ct_stays(tmp_path, contours, message):
    layout, reading = read(tmp_path, [(1, "bad", contours)], {"bad": 1})
    assert_label(reading, {})
    assert reading.scan.voxels.shape == SHAPE and not layout.faults
    assert any(message in reason for reason in reasons(reading))


def test_contours_off_the_ct_cost_only_themselves(tmp_path):
    """Beyond its ends, between its slices, and over its edge."""
    over = ((3, 9), (25, 40), 5)
    inside = [(*A[:2], place) for place in (2, 3, 4)]
    rois = [(1, "a", [box(*one) for one in (*inside, over, (*A[:2], 12), (*A[:2], -1), (*A[:2], 6.5))])]
    _, reading = read(tmp_path, rois, {"a": 1})
    assert_label(reading, {1: mask(*inside, over)})
    assert sorted(reasons(reading)) == [
        "structure 'a' (ROI 1): 1 contour at slice 6.50, between the CT's slices, is not used",
        "structure 'a' (ROI 1): 1 contour reaches beyond the CT's field of view, and is cut there",
        "structure 'a' (ROI 1): 2 contours at slice -1 to 12 of 10, outside the CT, are not used",
    ]


def test_numbers_without_a_name_and_with_two_names_are_named(tmp_path):
    rois = [(1, "a", [box(*A)]), (9, None, [box(*B)]), (4, "b", [box(*B)]), (4, "c", [box(*B)])]
    _, reading = read(tmp_path, rois, {"a": 1, "b": 2, "c": 3})
    assert_label(reading, {1: mask(A)})
    assert [reason for _, reason in reading.unasked] == ["not asked for: 'ROI 9', 'ROI 4'"]


@pytest.mark.parametrize("charset", ["ISO_IR 100", "ISO_IR 192"])
@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_names_beyond_ascii(tmp_path, charset, form):
    rois = [(1, "Ösophagus", [box(*A)]), (2, " LIVER ", [box(*B)])]
    names = {unicodedata.normalize(form, "ösophagus"): 1, "Liver": 2}
    _, reading = read(tmp_path, rois, names, SpecificCharacterSet=charset)
    assert_label(reading, {1: mask(A), 2: mask(B)})
    assert not reading.notes


@pytest.mark.parametrize("there, asked", [("Liver_L", "liver l"), ("GTV-1", "GTV1"), ("Kidney left", "Kidney_Left")])
def test_near_misses_are_hinted_at(tmp_path, there, asked):
    _, reading = read(tmp_path, [(1, there, [box(*A)]), (2, "b", [box(*B)])], {asked: 1, "b": 2})
    assert_label(reading, {2: mask(B)})
    assert reasons(reading) == [f"{asked!r} is not in it, but {there!r}: is it meant? name it as it stands there"]
    layout = read_layout(str(tmp_path), LabelsConfig(names={asked: 1}))
    assert f"(is {there!r} for {asked!r} meant?): name those to use" in layout.left_out[0].reason


def test_names_that_differ_only_in_capitals_stay_apart(tmp_path):
    _, reading = read(tmp_path, [(1, "GTV", [box(*A)]), (2, "gtv", [box(*B)])], {"gtv": 1, "GTV": 2})
    assert_label(reading, {1: mask(B), 2: mask(A)})


def test_a_cut_set_without_meta_header_does_not_cost_its_ct(tmp_path):
    files = ct_files()
    folder = save(files, tmp_path / "all")
    file = structure_set([(1, "a", [box(*A)])], files[0].SeriesInstanceUID)
    del file.file_meta
    file.preamble = None
    pydicom.dcmwrite(folder / "rs.dcm", file, implicit_vr=True, little_endian=True)
    whole = (folder / "rs.dcm").read_bytes()
    for size in (200, len(whole) - 40):
        (folder / "rs.dcm").write_bytes(whole[:size])
        layout = read_layout(str(tmp_path), LabelsConfig(names={"a": 1}))
        assert [scan.scan_id.split("__series")[0] for scan in layout.scans] == ["all"]
        (fault,) = layout.faults
        assert fault.source == str(folder / "rs.dcm") and "so it labels no scan" in fault.reason


def test_any_cut_of_a_structure_set_loses_nothing_silently(tmp_path):
    files = ct_files()
    save(files, tmp_path / "ct")
    rois = [(1, "a", [box(*A)]), (2, "b", [box(*B)])]
    path = save([structure_set(rois, files[0].SeriesInstanceUID)], tmp_path / "rs", "rs.dcm") / "rs.dcm"
    whole = path.read_bytes()
    for size in range(400, len(whole), 37):
        path.write_bytes(whole[:size])
        layout = read_layout(str(tmp_path), LabelsConfig(names={"a": 1, "b": 2}))
        (scan,) = layout.scans
        reading = scan.read(layout.names)
        assert reading.scan.voxels.shape == SHAPE
        named = {fault.source for fault in (*layout.faults, *layout.left_out)} | {path for path, _ in reading.notes}
        assert str(path) in named, size


# -- which series -----------------------------------------------------------------------------------------------------


def two_series(tmp_path, frames, patients=(PATIENT, PATIENT)):
    for k, (frame, patient) in enumerate(zip(frames, patients)):
        files = ct_files(k, FrameOfReferenceUID=frame, PatientID=patient, SeriesNumber=k + 1)
        save(files, tmp_path / f"ct{k}")


def labelled(layout):
    return {scan.scan_id.split("__series")[0]: scan.read(layout.names).labelled for scan in layout.scans}


@pytest.mark.parametrize("reference", [None, "1.2.3.4.5"])
def test_the_frame_of_reference_stands_in_for_the_series(tmp_path, reference):
    two_series(tmp_path, ("1.2.9", "1.2.8"))
    save([structure_set([(1, "a", [box(*A)])], reference)], tmp_path / "rs")
    layout = read_layout(str(tmp_path), LabelsConfig(names={"a": 1}))
    assert labelled(layout) == {"ct0": (1,), "ct1": None} and not layout.left_out
    (note,) = reasons(layout.scans[0].read(layout.names))
    assert "taken for the only one in its frame of reference" in note


@pytest.mark.parametrize(
    ("frames", "patients", "reason"),
    [
        (("1.2.9", "1.2.9"), (PATIENT, PATIENT), "and 2 series lie in its frame of reference"),
        (("1.2.7", "1.2.8"), (PATIENT, PATIENT), "contours of a series that is not here"),
        (("1.2.9", "1.2.8"), ("P2", "P3"), "that in its frame of reference is of another patient"),
    ],
)
def test_where_that_is_ambiguous_the_set_is_named(tmp_path, frames, patients, reason):
    two_series(tmp_path, frames, patients)
    folder = save([structure_set([(1, "a", [box(*A)])], None)], tmp_path / "rs")
    layout = read_layout(str(tmp_path), LabelsConfig(names={"a": 1}))
    assert labelled(layout) == {"ct0": None, "ct1": None}
    ((source, said),) = layout.left_out
    assert source == str(folder / "000.dcm") and reason in said


FRAMES = {"A": "1.2.1", "B": "1.2.2", "C": "1.2.3"}
IN_A, IN_B = (1, "a", [box(*A)], "A"), (2, "b", [box(*B)], "B")


@pytest.mark.parametrize("cts", [("1.2.1", "1.2.2"), ("1.3.1", "1.3.2"), ("1.2.2", "1.2.1")])
@pytest.mark.parametrize(
    ("rois", "listed", "expected"),
    [
        ([IN_A], "AB", (1, None)),
        ([IN_A], "BA", (1, None)),
        ([IN_B], "AB", (None, 2)),
        ([IN_A, (3, "c", [], "B")], "AB", (1, None)),
        ([IN_A], "A", (1, None)),
        ([IN_A], "B", (None, 1)),  # the one series that it lists, whatever its ROIs call its frame
        ([(1, "a", [box(*A)], None)], "A", (1, None)),
        ([(1, "a", [box(*A)], None)], "AB", "2 frames of reference"),
        ([(1, "a", [box(*A)], "C")], "AB", "2 frames of reference"),
        ([IN_A, IN_B], "AB", "2 frames of reference"),
        ([IN_A, IN_B], "A", "2 frames of reference"),
    ],
)
def test_of_two_frames_that_of_the_structures_counts(tmp_path, rois, listed, expected, cts):
    """Whatever frames the CTs state themselves: an anonymiser may have given them others."""
    series = {}
    for letter, frame in zip("AB", cts):
        files = ct_files("AB".index(letter), FrameOfReferenceUID=frame, SeriesNumber=ord(letter))
        series[letter] = files[0].SeriesInstanceUID
        save(files, tmp_path / f"ct{letter}")
    file = structure_set([roi[:3] for roi in rois], None)
    for item, (*_, frame) in zip(file.StructureSetROISequence, rois):
        if frame:
            item.ReferencedFrameOfReferenceUID = FRAMES[frame]
    file.ReferencedFrameOfReferenceSequence = [
        structure_set([], series[letter], frame=FRAMES[letter]).ReferencedFrameOfReferenceSequence[0]
        for letter in listed
    ]
    folder = save([file], tmp_path / "rs")
    layout = read_layout(str(tmp_path), LabelsConfig(names={"a": 1, "b": 2, "c": 3}))
    if isinstance(expected, str):
        assert labelled(layout) == {"ctA": None, "ctB": None}
        ((source, reason),) = layout.left_out
        assert source == str(folder / "000.dcm") and expected in reason
    else:
        assert labelled(layout) == {f"ct{one}": value and (value,) for one, value in zip("AB", expected)}
        assert not layout.left_out and not layout.faults


def test_the_frame_of_the_structures_stands_in_for_a_series(tmp_path):
    two_series(tmp_path, ("1.2.9", "1.2.8"))
    file = structure_set([(1, "a", [box(*A)])], "1.2.3.4.5", FrameOfReferenceUID="1.2.8")
    file.StructureSetROISequence[0].ReferencedFrameOfReferenceUID = "1.2.9"
    file.ReferencedFrameOfReferenceSequence += structure_set(
        [], "1.2.3", frame="1.2.8"
    ).ReferencedFrameOfReferenceSequence
    save([file], tmp_path / "rs")
    layout = read_layout(str(tmp_path), LabelsConfig(names={"a": 1}))
    assert labelled(layout) == {"ct0": (1,), "ct1": None} and not layout.left_out


def test_sets_of_a_series_that_is_not_chosen_are_named(tmp_path):
    for k, word in enumerate(("thin", "thick")):
        files = ct_files(k, SeriesDescription=word, SeriesNumber=k)
        save(files, tmp_path / word)
        save([structure_set([(1, "a", [box(*A)])], files[0].SeriesInstanceUID)], tmp_path / "rs", f"{word}{{}}.dcm")
    layout = read_layout(str(tmp_path), LabelsConfig(names={"a": 1}), series=("thin",))
    assert labelled(layout) == {"thin": (1,)}
    others = [tuple(fault) for fault in layout.left_out if fault.reason == "of a series that was not asked for"]
    assert [tuple(fault) for fault in layout.left_out if tuple(fault) not in others] == [
        (str(tmp_path / "rs/thick0.dcm"), "structures of a series that is not used")
    ]


def test_several_sets_are_joined_unless_they_conflict(tmp_path):
    files = ct_files()
    save(files, tmp_path / "ct")
    series = files[0].SeriesInstanceUID
    sets = [structure_set([(1, "a", [box(*A)])], series), structure_set([(1, "b", [box(*B)])], series)]
    save(sets, tmp_path / "rs")
    layout = read_layout(str(tmp_path), LabelsConfig(names={"a": 1, "b": 2}))
    assert_label(layout.scans[0].read(layout.names), {1: mask(A), 2: mask(B)})
    assert len(layout.scans[0].files()) == SHAPE[0] + 2
    save([structure_set([(5, "A ", [box(*C)])], series)], tmp_path / "again")
    layout = read_layout(str(tmp_path), LabelsConfig(names={"a": 1, "b": 2}))
    assert not layout.scans and "has several labels of 'a' (" in layout.faults[0].reason


# -- segmentation objects ---------------------------------------------------------------------------------------------


def segmentation(masks, series, places=None, flip=False, kind="BINARY", spacing=SPACING, **tags):
    """SEG of name -> bool [slices, rows, columns]; only slices that hold something have a frame. `flip`: its rows run
    the other way."""
    file = new_file(SegmentationStorage, "SEG", SegmentationType=kind, PatientID=PATIENT)
    file.Rows, file.Columns = SHAPE[1:]
    file.SamplesPerPixel, file.PhotometricInterpretation, file.PixelRepresentation = 1, "MONOCHROME2", 0
    file.BitsAllocated = file.BitsStored = 1
    file.HighBit = 0
    shared, size, orientation = Dataset(), Dataset(), Dataset()
    size.PixelSpacing, orientation.ImageOrientationPatient = list(spacing), [1, 0, 0, 0, -1 if flip else 1, 0]
    shared.PixelMeasuresSequence, shared.PlaneOrientationSequence = [size], [orientation]
    file.SharedFunctionalGroupsSequence, file.SegmentSequence = [shared], []
    frames, pixels = [], []
    for number, (name, volume) in enumerate(masks.items(), 1):
        segment = Dataset()
        segment.SegmentNumber, segment.SegmentLabel = number, name
        file.SegmentSequence.append(segment)
        for k in np.flatnonzero(volume.any((1, 2)))[::-1]:
            frame, position, identity = Dataset(), Dataset(), Dataset()
            last = SPACING[0] * (SHAPE[1] - 1) if flip else 0
            place = k if places is None else places(k)
            position.ImagePositionPatient = [ORIGIN[0], ORIGIN[1] + last, ORIGIN[2] + STEP * place]
            identity.ReferencedSegmentNumber = number
            frame.PlanePositionSequence, frame.SegmentIdentificationSequence = [position], [identity]
            frames.append(frame)
            pixels.append(volume[k, ::-1] if flip else volume[k])
    file.PerFrameFunctionalGroupsSequence, file.NumberOfFrames = frames, len(frames)
    packed = np.packbits(np.array(pixels, bool).ravel(), bitorder="little").tobytes()
    file.PixelData = packed + b"\0" * (len(packed) % 2)
    one = Dataset()
    one.SeriesInstanceUID = series
    file.ReferencedSeriesSequence, file.FrameOfReferenceUID = [one], "1.2.9"
    for tag, value in tags.items():
        setattr(file, tag, value)
    return file


def random_masks(seed=5):
    rng = np.random.default_rng(seed)
    masks = {"liver": rng.random(SHAPE) < 0.3, "tumour": rng.random(SHAPE) < 0.1}
    masks["liver"][[0, 7]] = False
    return masks


def read_seg(tmp_path, masks, names, **options):
    files = ct_files()
    save(files, tmp_path / "ct")
    save([segmentation(masks, files[0].SeriesInstanceUID, **options)], tmp_path / "seg", "seg{}.dcm")
    layout = read_layout(str(tmp_path), LabelsConfig(names=names))
    return layout, layout.scans[0].read(layout.names)


@pytest.mark.parametrize("flip", [False, True])
def test_segments_become_labels_voxel_by_voxel(tmp_path, flip):
    masks = random_masks()
    layout, reading = read_seg(tmp_path, masks, {"Liver": 2, "tumour": 5}, flip=flip)
    assert_label(reading, {2: masks["liver"], 5: masks["tumour"]})
    assert layout.scans[0].split == "train" and not reading.notes and not layout.left_out and not layout.faults
    _, reading = read_seg(tmp_path, masks, {"tumour": 1})
    assert_label(reading, {1: masks["tumour"]})
    assert [reason for _, reason in reading.unasked] == ["not asked for: 'liver'"]


def test_segments_beyond_the_ct_are_cut_with_a_note(tmp_path):
    masks = {"a": mask(A, B)}
    _, reading = read_seg(tmp_path, masks, {"a": 1}, places=lambda k: k + 5)
    assert_label(reading, {1: mask((*A[:2], 8))})
    assert reasons(reading) == ["segment 'a' (number 1): 30 voxels lie outside the CT and are not used"]


STEPS = [
    ((1, 3, 5), 2),
    ((0, 2, 4, 6, 8, 9), 2),
    ((0, 1, 3, 5, 7, 9), 2),
    ((0, 3, 6, 9), 3),
    ((2, 5, 9), 1),  # three lesions
    ((0, 4, 9), 1),
    ((0, 3, 6, 10), 3),
    ((0, 2, 5, 7, 10, 12), 2),
    ((0, 3, 5, 8, 10, 13), 3),
    ((1, 2, 3, 5, 6), 1),
    ((1, 8, 9), 1),  # two lesions
    ((0, 1, 2, 7, 8, 9), 1),
    ((4,), 1),
    ((2, 7), 1),  # of two, each is whole for all that is known
]


@pytest.mark.parametrize("slices, step", STEPS)
@pytest.mark.parametrize("kind", ["RTSTRUCT", "SEG", "SEG flipped"])
def test_structures_on_every_nth_slice_are_refused(tmp_path, slices, step, kind):
    boxes = [(*A[:2], place) for place in slices]
    if kind == "RTSTRUCT":
        _, reading = read(tmp_path, [(1, "a", [box(*one) for one in boxes])], {"a": 1})
    else:
        _, reading = read_seg(tmp_path, {"a": mask(*boxes)}, {"a": 1}, flip=kind != "SEG")
    if step == 1:
        assert_label(reading, {1: mask(*boxes)})
        assert not reading.notes
    else:
        assert_label(reading, {})
        assert f"only one slice in {step} has " in reasons(reading)[0] and "interpolate them" in reasons(reading)[0]


SEG_REFUSED = {
    "fractional": ({"kind": "FRACTIONAL"}, "a segmentation that is FRACTIONAL, expected BINARY: threshold it first"),
    "between": ({"places": lambda k: k + 0.5}, "it has another grid: resample it onto the CT's first"),
    "other voxels": ({"spacing": (1.6, 1.4)}, "it has another grid: resample it onto the CT's first"),
    "a little larger voxels": ({"spacing": (0.8 * 28 / 23, 0.7)}, "it has another grid: resample it"),
    "outside": ({"places": lambda k: k + 50}, "it lies outside its CT: is it another's?"),
    "few pixels": ({"PixelData": b"\0\0"}, "pixels, "),
    "few frames": ({"NumberOfFrames": 77}, "77 frames, 2 of them with a place"),
}


@pytest.mark.parametrize("options, message", SEG_REFUSED.values(), ids=SEG_REFUSED)
def test_segments_that_cannot_be_placed_are_named(tmp_path, options, message):
    layout, reading = read_seg(tmp_path, {"a": mask(A, B)}, {"a": 1}, **options)
    assert_label(reading, {})
    assert not layout.faults and message in reasons(reading)[0]


def test_without_names_a_segmentation_says_what_it_holds(tmp_path):
    layout, _ = read_seg(tmp_path, random_masks(), {})
    assert [fault.reason for fault in layout.left_out] == [
        "structures 'liver', 'tumour': name those to use, labels.names={NAME: 1}"
    ]


# -- label maps that are DICOM images ---------------------------------------------------------------------------------


def label_files(values, modality, **tags):
    files = ct_series(values, origin=ORIGIN, spacing=SPACING, **tags)
    for file in files:
        file.Modality = modality
    return files


@pytest.mark.parametrize("modality", ["CT", "OT", "SEG"])
@pytest.mark.parametrize("dtype, intercept", [(np.uint8, 0), (np.uint16, 0), (np.uint16, -1024), (np.int16, 0)])
@pytest.mark.parametrize("link", ["", "in/labels/p1", "in/labels"])
def test_dicom_slices_in_labels_are_a_label_map(tmp_path, modality, dtype, intercept, link):
    values = (mask(A, B) + 2 * mask(((1, 3), (1, 5), 8))).astype(dtype)
    save(ct_files(), tmp_path / "in/images/p1")
    stored = values - np.array(intercept, int)
    save(label_files(stored.astype(dtype), modality, intercept=intercept), tmp_path / "in/labels/p1")
    if link:
        (tmp_path / link).rename(tmp_path / "elsewhere")
        (tmp_path / link).symlink_to(tmp_path / "elsewhere")
    layout = read_layout(str(tmp_path / "in"), LabelsConfig(names={"a": 1, "b": 2}))
    (scan,) = layout.scans
    np.testing.assert_array_equal(scan.read(layout.names).label, values)
    assert not layout.faults and not layout.left_out and len(scan.files()) == 2 * SHAPE[0]


def test_dicom_labels_that_fit_nothing_are_named(tmp_path):
    save(ct_files(), tmp_path / "images/p1")
    save(label_files(mask(A).astype(np.uint8), "OT", intercept=0), tmp_path / "labels/p2")
    layout = read_layout(str(tmp_path), LabelsConfig())
    assert [fault.reason for fault in layout.faults] == ["label map without a volume of its name"]
    (tmp_path / "labels/p2").rename(tmp_path / "labels/p1")
    save(label_files(mask(A).astype(np.uint8), "OT", intercept=0), tmp_path / "labels/p1", "second{}.dcm")
    layout = read_layout(str(tmp_path), LabelsConfig())
    assert "2 DICOM series in one folder of labels" in layout.faults[0].reason
    assert layout.scans[0].label is None


def test_dicom_labels_on_another_grid_are_refused(tmp_path):
    save(ct_files(), tmp_path / "images/p1")
    save(label_files(mask(A)[:8].astype(np.uint8), "OT", intercept=0), tmp_path / "labels/p1")
    layout = read_layout(str(tmp_path), LabelsConfig())
    with pytest.raises(ValueError, match=r"labels/p1.* differs from its CT's"):
        layout.scans[0].read(layout.names)
