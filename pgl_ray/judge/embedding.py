"""One scan after the other through a frozen encoder: a pooled vector, a small picture, and on request dense maps.

No Ray here: the door calls it in this process, or hands it to Ray as an actor.
"""

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from PIL import Image

from pgl_ray.data.facts import disagreements
from pgl_ray.data.folder import Folder
from pgl_ray.data.voxel_statistics import foreground_box
from pgl_ray.files.ct import Scan
from pgl_ray.files.plausible import LabelMap
from pgl_ray.files.scans import ScanFile, StoredScan
from pgl_ray.judge.features import FeatureMap, ScanEncoder, at_spacing, pooled

PICTURE_PX = 96  # height of a scan's picture
DISPLAY_HU = (-200.0, 300.0)  # soft tissue; for display only
NO_MEMORY = "not enough memory"
CHUNK = 32  # cells per axis of a chunk of dense maps


class Embedder:
    """What becomes of a scan."""

    def __init__(
        self,
        encoder: ScanEncoder,
        names: tuple[str, ...],
        spacing_mm: tuple[float, float, float] | None,
        folder: str | None,
        device: str = "cpu",
    ):
        """
        Args:
            encoder: frozen.
            names: of the maps that are pooled; none: the last.
            spacing_mm: that scans are resampled to first; none: they are taken as they are.
            folder: of dense maps; none: they are not kept.
            device: to compute on.
        """
        encoder.network.to(device)
        self.encoder, self.names, self.spacing_mm, self.folder = encoder, names, spacing_mm, folder
        self.hash = encoder.hash

    def row(self, scan: StoredScan | ScanFile) -> dict[str, Any]:
        """The scan's row of the table, or its scan_id and why there is none ("failed"; "no_ct" for a label map)."""
        try:
            return self._row(scan)
        except LabelMap as error:
            return {"scan_id": scan.scan_id, "failed": str(error), "no_ct": True}
        except MemoryError:
            reason = NO_MEMORY
        except Exception as error:  # whatever a damaged file may cause must not stop the other scans
            reason = " ".join(str(error).split()) or type(error).__name__
        return {"scan_id": scan.scan_id, "failed": reason}

    def _row(self, scan: StoredScan | ScanFile) -> dict[str, Any]:
        stamp, read = scan.stamp(), scan.read()
        seen = at_spacing(read, self.spacing_mm) if self.spacing_mm else read
        facts, encoder = self.encoder.facts, self.encoder
        notes = list(read.notes)
        notes += disagreements(facts, encoder.hu_window, seen.voxels, seen.affine) if facts else []
        maps = encoder.dense(seen, self.names)
        vector = pooled(seen, maps)
        if not np.isfinite(vector).all():
            raise ValueError("its features are not finite")
        if self.folder:
            write_dense(Path(self.folder), scan, seen, maps, made_by(self.hash, stamp, self.spacing_mm))
        return {
            "scan_id": scan.scan_id,
            "source": scan.source,
            "shape": list(read.voxels.shape),
            "spacing_mm": list(read.spacing_mm),
            "affine": read.affine.ravel().tolist(),
            "scan_hash": stamp,
            "encoder_hash": self.hash,
            "vector": vector,
            "notes": notes,
            "picture": picture(read),
        }


def made_by(encoder_hash: str, scan_hash: str, spacing_mm: Sequence[float] | None) -> dict[str, Any]:
    """What dense maps of a scan depend on, but for which they are."""
    return {
        "encoder_hash": encoder_hash,
        "scan_hash": scan_hash,
        "resampled_mm": list(spacing_mm) if spacing_mm else None,
    }


def write_dense(
    folder: Path, scan: StoredScan | ScanFile, seen: Scan, maps: list[FeatureMap], made: dict[str, Any]
) -> None:
    """Writes a scan's maps as a Zarr v3 group, whole or not at all.

    An array per map, float16 [C, d, h, w], with attributes stride (D, H, W; voxels of the scan as it was fed to the
    encoder), center (edge coordinate of cell 0's receptive-field centre) and affine ([4, 4], cell index (d, h, w, 1) ->
    RAS+ mm). The group says which scan it is, its shape, voxel size and affine.
    """
    attributes = {"scan_id": scan.scan_id, "source": scan.source, "scan_shape": list(seen.voxels.shape)}
    attributes |= {"spacing_mm": list(seen.spacing_mm), "affine": seen.affine.tolist(), **made}
    with Folder(folder.absolute()).replaced(f"dense/{scan.scan_id}.zarr") as place:
        group = zarr.open_group(str(place.root), mode="w", zarr_format=3, attributes={"pgl_ray": attributes})
        for one in maps:
            values = one.values.cpu().numpy()
            chunks = (len(values), *(min(CHUNK, n) for n in values.shape[1:]))
            array = group.create_array(
                one.name, shape=values.shape, dtype="float16", chunks=chunks, dimension_names=("c", "d", "h", "w")
            )
            array.attrs.update(
                {"stride": list(one.stride), "center": list(one.center), "affine": np.asarray(one.affine).tolist()}
            )
            array[:] = values


def made_of(folder: Path, scan_id: str) -> dict[str, Any]:
    """Names of the maps that are stored of a scan, and what `made_by` said of them; {} where there are none."""
    place = folder / "dense" / f"{scan_id}.zarr"
    try:
        attributes = json.loads((place / "zarr.json").read_text())["attributes"]["pgl_ray"]
        names = sorted(path.parent.name for path in place.glob("*/zarr.json"))
        return {"maps": names} | {key: attributes[key] for key in made_by("", "", None)}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def picture(scan: Scan) -> bytes:
    """Axial and coronal slice through the middle of the body and around it, side by side at one scale, as PNG."""
    box = np.reshape(foreground_box(scan.voxels), (3, 2))
    middle = (box.sum(1) // 2).clip(0, np.array(scan.voxels.shape) - 1)
    size_mm = np.maximum(box[:, 1] - box[:, 0], 1) * scan.spacing_mm
    px_per_mm = min(PICTURE_PX / max(size_mm[:2]), 2 * PICTURE_PX / size_mm[2])
    height, depth, width = (max(1, round(px_per_mm * length)) for length in (size_mm[1], size_mm[0], size_mm[2]))
    panels = []
    for through, row, tall in ((0, 1, height), (1, 0, depth)):
        part = tuple(slice(*box[axis]) for axis in (row, 2))
        image = np.take(scan.voxels, middle[through], through)[part].astype(np.float32)
        low, high = DISPLAY_HU
        grey = np.rint(np.clip((image - low) / (high - low), 0, 1) * 255).astype(np.uint8)
        grey_image = Image.fromarray(grey if through == 0 else grey[::-1])
        panel = np.zeros((PICTURE_PX, max(8, width)), np.uint8)
        panel[-tall:, :width] = grey_image.resize((width, tall), Image.Resampling.BOX)
        panels.append(panel)
    sink = io.BytesIO()
    Image.fromarray(np.concatenate(panels, 1)).save(sink, "PNG", compress_level=6)
    return sink.getvalue()
