"""The anatomy of a phantom: one body's proportions, and its organs painted one after the other.

Lengths are millimetres of a reference body whose origin lies in front of the first lumbar vertebra: x runs to the
patient's left, y to the back, z to the head. Attenuations follow the contrast phase and overlap between organs, muscle
and bowel, so that place and shape tell an organ and its brightness alone does not.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from pgl_ray.phantom.canvas import Canvas

ORGANS = {
    "liver": 1,
    "spleen": 2,
    "right_kidney": 3,
    "left_kidney": 4,
    "stomach": 5,
    "gallbladder": 6,
    "pancreas": 7,
    "aorta": 8,
    "inferior_vena_cava": 9,
}

# Mean HU without contrast, in the arterial and in the portal venous phase.
MEAN_HU = {
    "liver": (54, 72, 108),
    "spleen": (48, 108, 116),
    "medulla": (33, 75, 165),
    "cortex": (33, 185, 185),
    "pancreas": (40, 98, 88),
    "gallbladder": (10, 11, 12),
    "aorta": (42, 310, 155),
    "vein": (40, 85, 140),
    "portal": (40, 110, 160),
    "heart": (42, 230, 135),
    "muscle": (54, 58, 62),
    "bowel": (40, 78, 82),
}
AIR, LUNG, FAT = -1000.0, -850.0, -102.0


@dataclass(frozen=True)
class Body:
    """One body's own numbers, and the frame its organs lie in.

    Attributes:
        phase: 0, 1, 2 for no contrast, arterial, venous.
        mean_hu: per tissue.
        fat_mm: thickness of the fat under the skin, a field (D, H, W).
        wall_mm: thickness of the muscle wall.
        depth: mm below the outside of the muscle wall, a field; negative in the fat and beyond.
        around: 0 at the spine to 1 at the navel, a field.
        diaphragm: mm below the diaphragm, a field; negative in the chest.
        tissue: (name, texture in HU, wavelength in mm) -> HU field.
    """

    phase: int
    mean_hu: dict[str, float]
    fat_mm: np.ndarray
    wall_mm: float
    depth: np.ndarray
    around: np.ndarray
    diaphragm: np.ndarray
    tissue: Callable[..., np.ndarray]

    @property
    def cavity(self) -> np.ndarray:
        """Mask inside the muscle wall."""
        return self.depth > self.wall_mm

    @property
    def abdomen(self) -> np.ndarray:
        """Mask of the cavity below the diaphragm."""
        return self.cavity & (self.diaphragm > 3)


def draw_body(c: Canvas) -> Body:
    """Draws contrast phase, fat, wall and diaphragm."""
    phase = int(c.rng.integers(3))
    mean_hu = {name: means[phase] + c.rng.normal(0, 5) for name, means in MEAN_HU.items()}
    mean_hu["liver"] -= max(0.0, c.rng.uniform(-100, 35))  # one in four is fatty
    waist = 1 + 0.05 * np.tanh((c.z - 20) / 60) + 0.08 * np.clip((-c.z - 60) / 60, 0, 1)
    back = np.where(c.y > 0, c.y / 0.95, c.y)
    ratio = ((np.abs(c.x) / (135 * waist)) ** 2.3 + (np.abs(back) / 92) ** 2.3) ** (1 / 2.3)
    radius = np.hypot(c.x, c.y)
    depth = radius * (1 / np.maximum(ratio, 1e-3) - 1)
    around = np.arccos(np.clip(c.y / np.maximum(radius, 1), -1, 1)) / np.pi
    belly = np.clip((30 - c.z) / 60, 0, 1)
    fat = c.rng.uniform(5, 24) * (0.75 + 0.5 * np.abs(2 * around - 1) * (0.5 + belly)) + 2 * c.noise(60)
    # right, left and under the heart: (x, y) of the top, its z, how wide in x and y
    domes = [((-66, -8), 94, (78, 88)), ((64, -4), 82, (76, 86)), ((4, -30), 76, (75, 80))]
    heights = [
        top + c.rng.normal(0, 5) - 72 * (((c.x - x) / rx) ** 2 + ((c.y - y) / ry) ** 2)
        for (x, y), top, (rx, ry) in domes
    ]
    diaphragm = 6 * np.logaddexp.reduce([height / 6 for height in heights]) - c.z

    def tissue(name: str, texture_hu: float = 5.0, wavelength_mm: float = 14.0) -> np.ndarray:
        return mean_hu[name] + texture_hu * c.noise(wavelength_mm)

    wall_mm = 11 + c.rng.normal(0, 1.5)
    return Body(phase, mean_hu, np.maximum(fat, 3), wall_mm, depth, around, diaphragm, tissue)


def paint_body(c: Canvas, b: Body) -> None:
    """Paints everything inside the skin, labels included."""
    _paint_trunk(c, b)
    _paint_chest(c, b)
    _paint_bowel(c, b)
    _paint_liver(c, b)
    _paint_upper_organs(c, b)
    _paint_kidneys(c, b)
    _paint_vessels(c, b)
    _paint_spine(c, b)
    _paint_ribs_and_pelvis(c, b)


def _paint_trunk(c: Canvas, b: Body) -> None:
    """Skin, fat with its septa, the muscle wall, the muscles along the spine, and the cavity's fat."""
    below_skin = b.depth + b.fat_mm
    c.paint(below_skin > 0, FAT + 6 * c.noise(20))
    c.paint((below_skin > 0) & (np.abs(c.noise(30)) < 0.06), -55.0)
    c.paint((below_skin > 0) & (below_skin < 3.5), -10.0)
    muscle = b.tissue("muscle", 8, 8)
    c.paint(b.depth > 0, muscle)
    c.paint((np.abs(b.depth - 6 - c.noise(50)) < 1.2) & (c.z < 24), -60.0)  # between the oblique muscles
    c.paint((np.abs(b.depth - 3.5) < 5.5) & (np.abs(c.x) < 4) & (c.y < 0), -20.0)  # linea alba
    c.paint(b.cavity, FAT + 8 * c.noise(15))
    streaks = np.where(np.abs(c.noise(14)) < 0.12, 0.0, muscle)
    for side in (-1, 1):
        erector = c.ellipsoid((side * 30, 76, -40), (30, 18, 150))
        c.paint((erector < 0) & (b.depth > 3), streaks)
        loin = c.ellipsoid((side * 64, 58, -70), (22, 10, 70), turn=-side * 20)
        psoas = c.tube(c.vary([(side * 22, 40, 20, 6), (side * 37, 41, -55, 17), (side * 50, 22, -150, 21)], 2))
        c.paint(((loin < 0) | (psoas < 0)) & (b.depth > 0), muscle)


def _paint_chest(c: Canvas, b: Body) -> None:
    """Lungs with vessels, mediastinal fat, heart and gullet."""
    chest = b.depth > 12
    lung = LUNG + c.rng.normal(0, 15) + 25 * c.noise(25) + 60 * np.clip(c.y / 90, -1, 1)
    lung = np.where(c.curves(26, 0.32), 20.0, lung)
    c.paint(chest & (b.diaphragm < 3), b.mean_hu["muscle"])  # the diaphragm itself
    middle = np.abs(c.x - 6) < 22 - 12 * (c.y < -10) + 5 * c.noise(40)
    c.paint(chest & (b.diaphragm < 0) & ~middle, lung)
    c.paint(chest & (b.diaphragm < 0) & middle, FAT + 10 * c.noise(15))
    heart = c.ellipsoid(c.vary([(24, -34, 128, 1)], 5)[0, :3], (64, 50, 54), turn=25)
    c.paint((heart < 4) & chest & (b.diaphragm < 0), FAT)
    c.paint((heart < 0) & chest & (b.diaphragm < 0), b.tissue("muscle", 10, 20) + (20 if b.phase else 0))
    rooms = (np.abs(c.noise(60)) > 0.25) & (heart < -8) & (b.diaphragm < -3)
    c.paint(rooms, b.tissue("heart", 8, 30))
    c.paint(c.tube(c.vary([(8, 14, 170, 9), (12, 4, 90, 9), (24, -4, 66, 9)], 2)) < 0, b.tissue("bowel"))


def _paint_bowel(c: Canvas, b: Body) -> None:
    """Colon, duodenum, small bowel and mesenteric vessels: unlabelled, and as bright as the organs next to them."""
    c.paint(b.cavity & (b.diaphragm > 5) & c.curves(30, 0.22) & (c.y < 25), b.mean_hu["vein"])
    oral_contrast = c.rng.random() < 0.25
    bowel, ripple, grain = b.tissue("bowel", 10, 10), 1.5 * c.noise(18), c.noise(12)
    for _ in range(int(c.rng.integers(11, 17))):
        steps = c.rng.normal(0, (26, 15, 16), (8, 3))
        low, high = np.array((-76, -70, -128)), np.array((82, 8, -18))
        path = c.rng.uniform(low, high) + np.cumsum(steps, 0)
        path = high - np.abs((path - low) % (2 * (high - low)) - (high - low))  # turns back where the cavity ends
        loop = c.tube(np.column_stack([path, np.full(8, c.rng.uniform(9, 16))])) + ripple
        fluid = 220 + 40 * grain if oral_contrast else c.rng.uniform(5, 45) + 10 * grain
        _paint_hollow(c, b, loop, bowel, fluid, gas=c.rng.uniform(-2.2, 0))
    duodenum = [(-36, -30, 2, 11), (-54, -6, -6, 12), (-48, 8, -36, 11), (-14, 4, -52, 10), (22, -4, -44, 10)]
    _paint_hollow(c, b, c.tube(c.vary(duodenum)), bowel, 15 + 15 * grain, gas=-0.8)
    colon = [(-90, 0, -130, 24), (-94, 8, -60, 23), (-88, 2, -34, 21), (-52, -58, -34, 18), (0, -70, -48, 17)]
    colon += [(60, -60, -16, 16), (88, -12, 16, 15), (98, 22, -24, 17), (94, 14, -130, 17)]
    tube = c.tube(c.vary(colon, 7, 0.15)) + 3 * c.noise(22)
    faeces = np.where(c.noise(10) > 0.5, -350.0, 30 + 25 * c.noise(8))
    _paint_hollow(c, b, tube, bowel, faeces, gas=c.rng.uniform(-0.6, 0.5))


def _paint_hollow(
    c: Canvas,
    b: Body,
    tube: np.ndarray,
    wall: float | np.ndarray,
    content: float | np.ndarray,
    gas: float,
    organ: int = 0,
    wall_mm: float = 3.0,
) -> None:
    """A gut: fat coat, wall, content, and gas where the lumen is uppermost (the patient lies on the back)."""
    inside = b.abdomen
    c.paint((tube < 2.5) & inside, FAT)
    c.paint((tube < 0) & inside, wall, organ)
    lumen = (tube < -wall_mm) & inside
    c.paint(lumen, content, organ)
    if lumen.any():
        y = np.broadcast_to(c.straight[1][:, None], lumen.shape)
        c.paint(lumen & (y < y[lumen].mean() + gas * 1.5 * y[lumen].std()), -950.0, organ)


def _paint_liver(c: Canvas, b: Body) -> None:
    """Two lobes under the diaphragm, with vessels and sometimes lesions."""
    size = np.exp(c.rng.normal(0, 0.12))
    right = c.ellipsoid((-70, 2, 28), (64 * size, 82, 72 * size), tilt=-12)
    left = c.ellipsoid((c.rng.normal(-8, 10), -44, 54), (66 * size, 34, 34), turn=-8, tilt=14)
    shape = -9 * np.logaddexp(-right / 9, -left / 9) + 4 * c.noise(45)
    shape = np.maximum(shape, -c.ellipsoid((-16, 64, -50), (52, 50, 80)))  # kidney, psoas and spine lie behind it
    inside = (shape < 0) & b.abdomen & (b.depth > b.wall_mm + 1)
    c.paint((shape < 4) & b.abdomen, FAT)
    c.paint(inside, b.tissue("liver", 5, 12), ORGANS["liver"])
    c.paint(inside & (shape < -8) & c.curves(48, 0.2), b.mean_hu["portal"] - 12 * (b.phase == 0), ORGANS["liver"])
    for _ in range(int(c.rng.poisson(0.8))):
        center = c.rng.uniform((-105, -40, 0), (-30, 40, 70))
        lesion = c.ellipsoid(center, c.rng.uniform(5, 16, 3)) + 2 * c.noise(15)
        c.paint(inside & (lesion < 0), c.rng.uniform(5, 80), ORGANS["liver"])
    fissure = c.tube(c.vary([(-24, -85, 26, 3), (-20, -20, 32, 6), (-20, -10, 50, 5)], 4)) + 2 * c.noise(20)
    c.paint(fissure < 0, FAT)


def _paint_upper_organs(c: Canvas, b: Body) -> None:
    """Stomach, spleen, pancreas with the splenic vein, gallbladder and adrenal-like tissue."""
    stomach = [(60, 22, 66, 32), (66, -22, 42, 28), (50, -50, 10, 23), (4, -54, -10, 17), (-32, -36, 0, 11)]
    tube = c.tube(c.vary(stomach, 8, 0.18)) + 3 * c.noise(40)
    food = float(c.rng.choice([c.rng.uniform(0, 30), c.rng.uniform(30, 70), 180])) + 14 * c.noise(14)
    _paint_hollow(c, b, tube, b.tissue("bowel", 8), food, c.rng.uniform(-1.3, 0.3), ORGANS["stomach"], wall_mm=5)
    size = np.exp(c.rng.normal(0, 0.14, 3))
    spleen = c.ellipsoid(np.array((88, 34, 38)) + c.rng.normal(0, 7, 3), (33, 52, 54) * size, turn=22, tilt=-6)
    spleen = np.maximum(spleen, -c.ellipsoid((46, 14, 36), (38, 42, 62))) + 3 * c.noise(35)
    inside = b.abdomen & (b.depth > b.wall_mm + 1)
    c.paint((spleen < 3) & inside, FAT)
    patchy = (18 if b.phase == 1 else 4) * c.noise(16)  # early enhancement of the spleen is patchy
    c.paint((spleen < 0) & inside, b.mean_hu["spleen"] + patchy, ORGANS["spleen"])
    pancreas = [(-28, -4, -26, 15), (-22, -10, -4, 15), (-4, -24, 4, 11), (22, -16, 14, 12)]
    points = c.vary([*pancreas, (50, 6, 24, 11), (70, 18, 30, 9)], 5, 0.12)
    tube = c.tube(points) + 2 * c.noise(12)
    c.paint(tube < 4, FAT)
    c.paint(c.tube(np.add(points, (0, 11, 2, -4))) < 0, b.mean_hu["portal"])
    c.paint(tube < 0, b.tissue("pancreas", 12, 8), ORGANS["pancreas"])
    if c.rng.random() > 0.1:  # some have none
        points = c.vary([(-50, -44, -16, 14), (-46, -34, 2, 12), (-38, -22, 20, 5)], 8, 0.2)
        gallbladder = c.tube(points) + 1.5 * c.noise(25)
        c.paint(gallbladder < 2, b.mean_hu["bowel"])
        c.paint(gallbladder < 0, b.tissue("gallbladder", 3), ORGANS["gallbladder"])


def _paint_kidneys(c: Canvas, b: Body) -> None:
    """Cortex, medulla, the fat of sinus and capsule, sometimes a cyst; adrenal glands above."""
    for side, name, rise in ((-1, "right_kidney", -12), (1, "left_kidney", 2)):
        points = [(50, 46, 32, 19), (63, 42, 10, 25), (68, 39, -12, 25), (73, 33, -34, 19)]
        points = c.vary(np.array(points) * (side, 1, 1, 1) + (0, 0, rise, 0), 5, 0.12)
        kidney = c.tube(points) + 1.5 * c.noise(25)
        inside = b.abdomen
        c.paint((kidney < c.rng.uniform(3, 10)) & inside, FAT + 6 * c.noise(12))
        c.paint((kidney < 0) & inside, b.tissue("cortex", 6), ORGANS[name])
        pyramids = (kidney < -7) & (c.noise(22) > -0.5) & inside
        c.paint(pyramids, b.tissue("medulla", 6), ORGANS[name])
        middle = points[1:3, :3].mean(0) - (side * 14, 4, 0)
        sinus = c.ellipsoid(middle, (13, 8, 22)) + 2 * c.noise(18)
        c.paint(sinus < 0, FAT + 25)
        c.paint(c.ellipsoid(middle, (8, 3.5, 12)) < 0, b.mean_hu["vein"])
        if c.rng.random() < 0.25:
            cyst = c.ellipsoid(points[c.rng.integers(1, 4), :3] + (side * 16, 0, 0), [c.rng.uniform(7, 14)] * 3)
            c.paint((cyst < 0) & inside, 6.0, ORGANS[name])
        top = points[0, :3] + (-side * 10, -8, 20)
        for leg in (-1, 1):
            foot = np.add(top, (leg * 7, 12, -10))
            adrenal = c.tube([(*top, 2.5), (*foot, 2.5)])
            c.paint(adrenal < 0, b.tissue("pancreas"))


def _paint_vessels(c: Canvas, b: Body) -> None:
    """Inferior vena cava, aorta with its branches, portal vein and mesenteric vessels."""
    vein, aorta, portal = b.tissue("vein", 4), b.tissue("aorta", 4), b.mean_hu["portal"]
    c.paint(c.tube(c.vary([(-6, -9, -6, 6), (-18, -9, 14, 7), (-38, -12, 32, 6), (-62, -8, 40, 4)], 3)) < 0, portal)
    c.paint(c.tube(c.vary([(-6, -9, -6, 5.5), (-2, -24, -40, 5), (2, -30, -90, 4)], 3)) < 0, portal)
    cava = c.vary([(-18, 13, -98, 10), (-19, 10, -20, 11), (-22, 4, 40, 12), (-24, -8, 84, 13)], 2.5, 0.1)
    for side in (-1, 1):
        c.paint(c.tube([cava[0], (side * 34 - 8, 16, -150, 8)]) < 0, vein)
        c.paint(c.tube([cava[1], (side * 42 - 6, 28, -10, 4)]) < 0, vein)
    aortic = c.vary([(8, 10, -90, 8.5), (10, 12, -20, 10), (12, 12, 60, 11.5), (20, 20, 190, 12.5)], 2.5, 0.12)
    for side in (-1, 1):
        c.paint(c.tube([aortic[0], (side * 38 + 6, 6, -150, 6)]) < 0, aorta)
        c.paint(c.tube([aortic[1], (side * 42 + 4, 30, -14, 3)]) < 0, aorta)
    for branch in ((6, -24, 24, 4), (6, -22, -4, 4)):
        c.paint(c.tube([(10, 10, branch[2] + 4, 4), branch]) < 0, aorta)
    c.paint(c.tube([(6, -22, -4, 4), (4, -32, -90, 3.5)]) < 0, aorta)
    c.paint(c.tube(cava) < 0, vein, ORGANS["inferior_vena_cava"])
    c.paint(c.tube(aortic) < 0, aorta, ORGANS["aorta"])
    if c.rng.random() < 0.5:  # plaques
        c.paint((np.abs(c.tube(aortic) + 1.5) < 1.5) & (c.noise(18) > 1.6), 450.0, ORGANS["aorta"])


def _paint_spine(c: Canvas, b: Body) -> None:
    """Vertebrae and discs in turn, the canal, arches and processes."""
    level = (c.z + c.rng.uniform(-17, 17) + 17) % 34 - 17  # mm from the middle of the nearest vertebra
    marrow = c.rng.uniform(130, 230) + 30 * c.noise(8)
    dense = c.rng.uniform(380, 650)
    y = c.y - 42
    edge = (np.hypot(c.x / 1.25, np.where(y > 0, y * 1.2, y)) - 17) + 2 * (1 - np.abs(level) / 13)
    c.paint(edge < 0, 85 + 8 * c.noise(10))  # disc
    bone = (edge < 0) & (np.abs(level) < 13)
    c.paint(bone, np.where((edge > -2.5) | (np.abs(level) > 10.5), dense, marrow))
    canal = np.hypot(c.x / 1.2, c.y - 68)
    arch = (canal < 13.5) & ((level > -7) & (level < 11))
    spine_process = (np.abs(c.x) < 3.5) & (c.y > 78) & (b.depth > -2) & (np.abs(level + 4) < 8)
    sideways = (np.abs(c.y - 70 - 0.1 * np.abs(c.x)) < 4) & (np.abs(c.x) < 36) & (np.abs(level - 2) < 4.5)
    facets = (np.hypot(np.abs(c.x) - 17, c.y - 76) < 6.5) & (np.abs(level) > 9)
    c.paint((arch | spine_process | sideways | facets) & (canal > 8), 0.75 * dense + 40 * c.noise(8))
    c.paint(canal < 8, 25.0)


def _paint_ribs_and_pelvis(c: Canvas, b: Body) -> None:
    """Ribs that fall from the spine to the front, their cartilage, the breastbone and the iliac wings."""
    phase = (c.z + 80 * b.around + c.rng.uniform(0, 28)) % 28 - 14
    margin = np.interp(b.around, (0, 0.35, 0.6, 0.85, 1), (12, -12, 0, 55, 78))
    rib = (b.depth > 2.5) & (b.depth < 11.5) & (np.abs(phase) < 6) & (c.z > margin) & (b.around > 0.12)
    core = (np.abs(b.depth - 7) < 2) & (np.abs(phase) < 3)
    bone = np.where(core, 180.0, c.rng.uniform(450, 700))
    c.paint(rib, np.where(b.around > 0.8, 95 + 30 * c.noise(10), bone))
    sternum = (np.abs(c.x) < 17) & (c.y < 0) & (np.abs(b.depth - 7) < 6) & (c.z > 84)
    c.paint(sternum, np.where(np.abs(b.depth - 7) < 3.5, 150.0, 400.0))
    for side in (-1, 1):
        across = (side * c.x - 72) * 0.78 + (c.y - 22) * 0.62 - 6 * ((c.y - 22) / 40) ** 2 + (c.z + 100) * 0.25
        along = (c.y - 22) * 0.78 - (side * c.x - 72) * 0.62
        wing = (np.abs(along - 4) < 46) & (c.z < -84 - 0.02 * (along - 10) ** 2)
        c.paint((np.abs(across - 4) < 12) & wing & (b.depth > 3), b.tissue("muscle", 8, 8))
        c.paint((np.abs(across) < 5) & wing, np.where(np.abs(across) < 2, 190.0, 520.0))


def paint_table(c: Canvas, b: Body, back_mm: float) -> None:
    """The table behind the body: a shell around foam, in the scanner's straight coordinates."""
    _, y, x = np.meshgrid(*c.straight, indexing="ij", sparse=True)
    below = y - back_mm - 0.8 * float(b.fat_mm.mean()) + c.rng.uniform(8, 30) * (x / 160) ** 2
    table = np.broadcast_to((below > 0) & (below < 20) & (np.abs(x) < 150), c.hu.shape)
    c.paint(table, np.broadcast_to(np.where(np.abs(below - 10) > 5.5, 120.0, -880.0), c.hu.shape))
