"""Painting on a voxel grid in smoothly deformed coordinates: the brushes of the phantoms.

Shapes are implicit (ellipsoids, chains of round cones) and evaluated in the millimetres of a reference body: x runs to
the patient's left, y to the back, z to the head. The grid's coordinates are shifted, scaled, turned and deformed before
a shape is evaluated, so no label is ever resampled, and later paint covers earlier paint.
"""

from dataclasses import dataclass
from itertools import pairwise, product

import numpy as np
from numpy.typing import ArrayLike
from scipy import sparse

Size = tuple[int, int, int]  # voxels (D, H, W)
Spacing = tuple[float, float, float]  # mm (D, H, W)

FAR_MM = 1e3  # the distance where a shape was not evaluated
WARP_MM = (10, 9, 11)  # greatest deformation, axes z, y, x
NEGLIGIBLE = 1e-8  # weights of far knots, which change no float32
COAT_MM = 14.0  # shapes are evaluated this far beyond their surface


@dataclass(frozen=True)
class Pose:
    """How the reference body lies in the scanner; axes z, y, x.

    Attributes:
        scale: the body's size.
        shift_mm: its place.
        roll, pitch: degrees about z and about x.
    """

    scale: np.ndarray
    shift_mm: np.ndarray
    roll: float
    pitch: float

    def rotation(self) -> np.ndarray:
        """[3, 3], from the scanner's directions to the body's."""
        (cr, cp), (sr, sp) = np.cos(np.deg2rad((self.roll, self.pitch))), np.sin(np.deg2rad((self.roll, self.pitch)))
        return np.array([[cp, sp, 0], [-sp, cp, 0], [0, 0, 1]]) @ np.array([[1, 0, 0], [0, cr, sr], [0, -sr, cr]])


class Canvas:
    """HU and labels on a grid.

    Attributes:
        rng: the phantom's generator.
        hu: float32 (D, H, W).
        label: uint8 (D, H, W).
        x, y, z: float32 (D, H, W), coordinates of each voxel in the reference body, mm.
        straight: the scanner's own coordinates per axis (z, y, x), mm from the grid's centre.
    """

    def __init__(self, rng: np.random.Generator, shape: Size, spacing_mm: Spacing, background: float, pose: Pose):
        self.rng, self.rotation = rng, pose.rotation()
        self.hu = np.full(shape, background, np.float32)
        self.label = np.zeros(shape, np.uint8)
        self.straight = [(np.arange(n) - (n - 1) / 2) * step for n, step in zip(shape, spacing_mm)]
        self.axes = [(axis - move) / factor for axis, move, factor in zip(self.straight, pose.shift_mm, pose.scale)]
        grid = np.stack(np.meshgrid(*(axis.astype(np.float32) for axis in self.axes), indexing="ij"))
        turned = np.tensordot(self.rotation.astype(np.float32), grid, 1)
        self.z, self.y, self.x = (c + most * np.tanh(self.noise(110) / 2) for c, most in zip(turned, WARP_MM))

    def noise(self, wavelength_mm: float) -> np.ndarray:
        """A smooth random field of mean 0 and variance 1, float32 (D, H, W)."""
        cell = wavelength_mm / 2
        kernels = []
        for axis in self.axes:
            knots = np.arange(axis[0] - 2 * cell, axis[-1] + 2 * cell, cell)
            weights = np.exp(-0.5 * ((axis[:, None] - knots) / (0.6 * cell)) ** 2)
            weights /= np.linalg.norm(weights, axis=1, keepdims=True)
            kernels.append(sparse.csr_array(np.where(weights > NEGLIGIBLE, weights, 0).astype(np.float32)))
        field = self.rng.standard_normal([k.shape[1] for k in kernels], dtype=np.float32)
        for kernel in kernels:  # contracts the first axis, appends the new one
            new = kernel @ field.reshape(len(field), -1)
            field = np.moveaxis(new.reshape(-1, *field.shape[1:]), 0, -1)
        return np.ascontiguousarray(field)

    def curves(self, wavelength_mm: float, thickness: float) -> np.ndarray:
        """Mask of random branching threads: where two smooth fields vanish together."""
        return np.hypot(self.noise(wavelength_mm), self.noise(wavelength_mm)) < thickness

    def window(self, low: np.ndarray, high: np.ndarray) -> tuple[slice, ...]:
        """Slices of the grid that hold a box of the reference body, (x, y, z) in mm, with room for deformation."""
        room = COAT_MM + np.array(WARP_MM)
        corners = np.array(list(product(*zip(low[::-1] - room, high[::-1] + room)))) @ self.rotation
        bounds = zip(self.axes, corners.min(0), corners.max(0))
        return tuple(slice(*np.searchsorted(axis, bound)) for axis, *bound in bounds)

    def ellipsoid(self, center: ArrayLike, radii: ArrayLike, turn: float = 0.0, tilt: float = 0.0) -> np.ndarray:
        """Approximate signed distance in mm; `turn` about z and `tilt` about y in degrees."""
        center, radii = np.asarray(center), np.asarray(radii)
        distance = np.full(self.hu.shape, FAR_MM, np.float32)
        at = self.window(center - radii.max(), center + radii.max())
        (cx, cy, cz), (rx, ry, rz) = center.tolist(), radii.tolist()  # Python floats keep the arrays float32
        x, y, z = self.x[at] - cx, self.y[at] - cy, self.z[at] - cz
        (ct, cl), (st, sl) = np.cos(np.deg2rad((turn, tilt))).tolist(), np.sin(np.deg2rad((turn, tilt))).tolist()
        x, y = ct * x + st * y, ct * y - st * x
        x, z = cl * x + sl * z, cl * z - sl * x
        unit = np.sqrt((x / rx) ** 2 + (y / ry) ** 2 + (z / rz) ** 2)
        slope = np.sqrt((x / rx**2) ** 2 + (y / ry**2) ** 2 + (z / rz**2) ** 2)
        distance[at] = unit * (unit - 1) / np.maximum(slope, 1e-6)
        return distance

    def tube(self, points: ArrayLike) -> np.ndarray:
        """Signed distance in mm to a chain of round cones; rows of (x, y, z, radius)."""
        points = np.asarray(points, float)
        distance = np.full(self.hu.shape, FAR_MM, np.float32)
        for start, stop in pairwise(points):
            reach = max(start[3], stop[3])
            at = self.window(np.minimum(start, stop)[:3] - reach, np.maximum(start, stop)[:3] + reach)
            *origin, radius = start.tolist()
            *along, growth = (stop - start).tolist()
            offset = [field[at] - o for field, o in zip((self.x, self.y, self.z), origin)]
            length = max(sum(a * a for a in along), 1e-6)
            share = np.clip(sum(o * a for o, a in zip(offset, along)) / length, 0, 1)
            squared = sum((o - share * a) ** 2 for o, a in zip(offset, along))
            distance[at] = np.minimum(distance[at], np.sqrt(squared) - (radius + share * growth))
        return distance

    def vary(self, points: ArrayLike, place_mm: float = 4.0, size: float = 0.08) -> np.ndarray:
        """Jitters tube points (x, y, z, radius): all together, and each a little; one factor for the radii."""
        points = np.array(points, float)
        points[:, :3] += self.rng.normal(0, place_mm, 3) + self.rng.normal(0, place_mm / 3, (len(points), 3))
        points[:, 3] *= np.exp(self.rng.normal(0, size))
        return points

    def paint(self, inside: np.ndarray, hu: float | np.ndarray, label: int = 0) -> None:
        """Covers a mask with HU (a number or a field) and a label."""
        self.hu[inside] = hu[inside] if isinstance(hu, np.ndarray) else hu
        self.label[inside] = label
