"""Knobs of stores: what prepare converts and inspect shows."""

import json
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BeforeValidator,
    Field,
    field_validator,
    model_validator,
)

from pgl_ray.config.fields import FilePath, Length, Positive, Section, Seed, StorePath, Triple, check_range, listed
from pgl_ray.config.training import RayConfig


class LabelsConfig(Section):
    """What the values of a label map mean, where the folder's dataset.json does not say it."""

    names: dict[str, Annotated[int, Field(ge=1, le=2**16 - 1)]] = {}
    """Organ name -> value in the label maps. DICOM contours (RTSTRUCT) become labels where their structures have these
    names, or the store's where none are given."""
    table: str | None = None
    """CSV inside the source folder (comma, semicolon or tab) with a row per scan, by its id, file name or path; columns
    `split` or `labelled_organs` (separated by blanks, or by ; or |), or both. An organ that a row does not list is
    unlabelled in that scan, not absent."""


def another_store(key: str, value: Any) -> str:
    """The mend where a store was prepared with another value of `key` than a network's: how to type it."""
    return f"prepare the scans into another store=... with '{key}={json.dumps(value, separators=(',', ':'))}'"


class PartConfig(Section):
    """Scans of a data set that lie alike."""

    images: str
    """Pattern of the volumes below the source folder: {id} stands for a scan's name, a leading **/ for any folders."""
    labels: str | None = None
    """Pattern of their label maps, with the same {id} and **/; {organ} stands for the names in labels.names, where each
    organ has its own mask. None: no labels are used."""
    ids: tuple[str, ...] = ()
    """Scans that belong to the part, `case_000-209` for a range; none: all."""
    num_scans: Positive | None = None
    """Scans that were published."""
    split: str = ""
    """Their split."""


class RecipeConfig(Section):
    """A public data set: what it is, where its files lie, its split."""

    name: str = ""
    """Of the data set."""
    licence: str = ""
    """Under which it was published; it is noted in the store."""
    origin: str = ""
    """Where to get it."""
    prefix: str = ""
    """Put before every {id} to name the scans."""
    parts: tuple[PartConfig, ...] = ()
    """Where the scans lie; none: one of the layouts that prepare knows."""
    split_sizes: dict[str, Positive] = {}
    """Split -> number of labelled scans that are in no test folder, drawn by split_seed; the rest goes to the last."""
    split_seed: Seed = 0
    """Seed of that draw."""

    @field_validator("parts")
    @classmethod
    def _has_id(cls, parts: tuple[PartConfig, ...]) -> tuple[PartConfig, ...]:
        for part in parts:
            for pattern in (part.images, part.labels):
                if pattern and "{id}" not in pattern:
                    raise ValueError(f"recipe.parts: pattern {pattern!r} has no {{id}}")
        return parts


class PrepareConfig(Section):
    """CT files -> Zarr store + Parquet index."""

    source: FilePath
    """Folder of CT volumes (NIfTI, NRRD, MHA/MHD, DICOM): any folders, images/ + labels/, nnU-Net's or MSD's (imagesTr,
    labelsTr), or as a recipe says."""
    store: StorePath
    """Folder of the store, or s3://, gs://, az:// with bucket and prefix; an existing store is added to."""
    recipe: RecipeConfig = RecipeConfig()
    series: Annotated[tuple[str, ...], BeforeValidator(listed)] = ()
    """DICOM series to take, by SeriesInstanceUID or SeriesDescription; none: every CT series."""
    hu_window: tuple[float, float] = (-1024.0, 325.0)
    """HU window of the statistics and, later, of the views (paper, Sec. 5.1)."""
    chunk: Triple = (8, 64, 64)
    """Inner chunk of the sharded arrays in voxels (D, H, W)."""
    encoding: Literal["int16", "uint8"] = "int16"
    """int16: HU, lossless. uint8: 256 steps over hu_window, half the size; what lies outside is clipped, the loss is
    noted per scan (1.5 to 2 HU rms for the default window)."""
    compression: Literal["lz4", "none"] = "lz4"
    """lz4, or none: twice the size on disk for a quarter less CPU time per pair of views (hardly less with regions)."""
    spacing_mm: tuple[Length, Length, Length] | None = None
    """Resample to this voxel size (D, H, W): linear (order 1), before it a Gaussian of sigma (ratio - 1) / 2 voxels
    along axes that get coarser; labels take the nearest voxel. None: each scan keeps its own, as in the paper."""
    labels: LabelsConfig = LabelsConfig()
    ray: RayConfig = RayConfig()

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        check_range("hu_window", self.hu_window)
        return self


class StoreConfig(Section):
    """Reads every chunk of a store; names what is damaged, and converts just that again (repair)."""

    store: StorePath
    """Store written by prepare."""
    ray: RayConfig = RayConfig()


class InspectConfig(Section):
    """Store -> one HTML page: table of scans, pictures, what stands out, totals."""

    store: StorePath
    """Store written by prepare."""
    output: FilePath | None = None
    """HTML file; none: inspect.html in the store's folder, of a store in a bucket in this folder."""
    num_pictures: Annotated[int, Field(ge=0)] = 48
    """Scans that are shown, those that stand out first, then evenly spread ones."""
