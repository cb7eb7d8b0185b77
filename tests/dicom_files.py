"""DICOM files for the tests, written by pydicom, and ITK's reading of them."""

import numpy as np
import pydicom
import SimpleITK as sitk
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, RTStructureSetStorage, generate_uid

AXIAL = (1, 0, 0, 0, 1, 0)


def new_file(sop_class, modality, series=None, **tags):
    meta = FileMetaDataset()
    meta.TransferSyntaxUID, meta.MediaStorageSOPClassUID = ExplicitVRLittleEndian, sop_class
    meta.MediaStorageSOPInstanceUID = generate_uid()
    file = FileDataset(None, {}, file_meta=meta, preamble=b"\0" * 128)
    file.SOPClassUID, file.SOPInstanceUID = sop_class, meta.MediaStorageSOPInstanceUID
    file.Modality, file.SeriesInstanceUID = modality, series or generate_uid()
    for tag, value in tags.items():
        setattr(file, tag, value)
    return file


def ct_slice(pixels, position, *, series, iop=AXIAL, spacing=(0.8, 0.7), slope=1, intercept=-1024, **tags):
    """One CT slice of raw pixels [rows, columns]; `spacing` between rows and between columns."""
    file = new_file(CTImageStorage, "CT", series, ImageType=["ORIGINAL", "PRIMARY", "AXIAL"], SeriesNumber=2)
    file.Rows, file.Columns = pixels.shape
    file.SamplesPerPixel, file.PhotometricInterpretation = 1, "MONOCHROME2"
    file.BitsAllocated = file.BitsStored = 8 * pixels.dtype.itemsize
    file.HighBit, file.PixelRepresentation = file.BitsStored - 1, int(pixels.dtype.kind == "i")
    file.RescaleSlope, file.RescaleIntercept = slope, intercept
    file.ImageOrientationPatient, file.PixelSpacing = list(map(float, iop)), list(spacing)
    file.ImagePositionPatient = [round(float(value), 6) for value in position]
    file.PixelData = pixels.astype(pixels.dtype.newbyteorder("<")).tobytes()
    for tag, value in tags.items():
        setattr(file, tag, value)
    return file


def ct_series(pixels, *, step=None, origin=(-30, 20, -400), iop=AXIAL, **options):
    """Slices of raw pixels [slices, rows, columns], their positions `step` apart (default: 2.5 mm along the normal)."""
    options.setdefault("series", generate_uid())
    step = np.cross(iop[:3], iop[3:]) * 2.5 if step is None else np.array(step)
    return [
        ct_slice(one, np.array(origin) + k * step, iop=iop, InstanceNumber=k + 1, **options)
        for k, one in enumerate(pixels)
    ]


def save(files, folder, name="{:03}.dcm"):
    folder.mkdir(parents=True, exist_ok=True)
    for k, file in enumerate(files):
        path = folder / name.format(k)
        path.parent.mkdir(parents=True, exist_ok=True)
        pydicom.dcmwrite(path, file, enforce_file_format=True)
    return folder


def structure_set(structures, series):
    """RTSTRUCT: name -> list of contours [N, 3] in LPS mm, or (type, contour)."""
    file = new_file(RTStructureSetStorage, "RTSTRUCT")
    file.StructureSetROISequence, file.ROIContourSequence = [], []
    for number, (name, contours) in enumerate(structures.items(), 1):
        roi, drawn = Dataset(), Dataset()
        roi.ROINumber, roi.ROIName, drawn.ReferencedROINumber, drawn.ContourSequence = number, name, number, []
        for contour in contours:
            kind, points = contour if isinstance(contour, tuple) else ("CLOSED_PLANAR", contour)
            one = Dataset()
            one.ContourGeometricType, one.NumberOfContourPoints = kind, len(points)
            one.ContourData = [f"{value:.6f}" for value in np.asarray(points).ravel()]
            drawn.ContourSequence.append(one)
        file.StructureSetROISequence.append(roi)
        file.ROIContourSequence.append(drawn)
    frame, study, one = Dataset(), Dataset(), Dataset()
    one.SeriesInstanceUID = series
    study.RTReferencedSeriesSequence = [one]
    frame.RTReferencedStudySequence = [study]
    file.ReferencedFrameOfReferenceSequence = [frame]
    return file


def itk_series(folder):
    """ITK's reading of the one series in a folder."""
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    return reader.Execute()
