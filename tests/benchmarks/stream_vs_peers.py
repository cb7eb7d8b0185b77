"""The same work by pgl_ray and its peers: finished pairs of 16x96x96 views per CPU second, one core, warm.

    pip install -c constraints.txt -e '.[peers]'
    python tests/benchmarks/stream_vs_peers.py [folder of CTs] [rounds] [--as-scanned]

Every way draws the same kind of pair (two crops of 110-140 % overlapping by 10 % of the smaller one, resized
trilinearly, flipped, with the paper's four intensity operations at its probabilities) from the same volumes; the boxes
come from our sampler wherever a peer takes boxes. Rounds are interleaved, the median counts. A peer that is not
installed is left out, with the reason. CPU seconds include all threads; each library is held to one.

The CTs of ../shared/data/body were made smaller before they were published, to pixels of 1.5 mm and more. --as-scanned
makes two pixels of each again along both axes, with 10 HU of noise, so that they are as large, and as hard to compress,
as they come from a scanner: about 100 x 400 x 550 voxels.
"""

import os

os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "BLOSC_NTHREADS", "OPENBLAS_NUM_THREADS"), "1")

import argparse
import itertools
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from pgl_ray.config import IntensityConfig, ViewsConfig
from pgl_ray.data import scan_files, store, stream, voxel_statistics
from pgl_ray.data.batch_views import apply_intensities, resize_and_flip
from pgl_ray.data.folder import LocalFile
from pgl_ray.data.intensity_ops import apply_intensity, sample_intensity
from pgl_ray.data.pair_renderer import PairRenderer
from pgl_ray.data.rendering import normalise, render, to_half
from pgl_ray.data.sampling import sample_pair
from pgl_ray.files import ct

BODY = Path(os.environ.get("PGL_RAY_TEST_DATA", "../shared/data")) / "body/images"
WINDOW = (-1024.0, 325.0)
VIEWS, INTENSITY = ViewsConfig(), IntensityConfig()
LARGEST = (22, 134, 134)  # crop
RATES = {  # what the others are compared with
    "K = 1": "pgl_ray, int16, K = 1",
    "K = 8": "pgl_ray, int16, K = 8",
    "raw, K = 1": "pgl_ray, int16 uncompressed, K = 1",
    "raw, K = 8": "pgl_ray, int16 uncompressed, K = 8",
}


def main() -> None:
    parser = argparse.ArgumentParser(description="pairs of views per CPU second: pgl_ray and its peers")
    parser.add_argument("folder", nargs="?", type=Path, default=BODY)
    parser.add_argument("rounds", nargs="?", type=int, default=3)
    parser.add_argument("--as-scanned", action="store_true", help="CTs of twice the width and height")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as scratch:
        volumes = read_volumes(args.folder)
        if not volumes:
            raise SystemExit(f"{args.folder} holds no CT of at least {LARGEST} voxels: name a folder of .nii.gz")
        if args.as_scanned:
            volumes = {scan_id: enlarged(volume) for scan_id, volume in volumes.items()}
        print(
            f"{len(volumes)} CTs of {args.folder}, {sum(x.size for x in volumes.values()) / 1e6:.0f} Mvoxel", flush=True
        )
        ways, skipped = {}, {}
        for name, pairs, make in WAYS:
            try:
                ways[name] = pairs, make(volumes, Path(scratch))
                ways[name][1](2)  # compile, open, fill caches
            except ImportError as error:
                skipped[name] = str(error)
        rates = measure(ways, args.rounds)
        share = bytes_per_voxel(volumes, Path(scratch))
    print(table(rates))
    print(f"bytes read per view: {share:.1f} x the int16 crop's own (K = 1)")
    for name, reason in skipped.items():
        print(f"{name:<48} left out: {reason}")


def read_volumes(folder: Path) -> dict[str, np.ndarray]:
    """Scan id -> int16 [D, H, W] of every CT that is nowhere smaller than a crop."""
    volumes = {}
    for path in sorted(folder.glob("*.nii.gz")):
        voxels = ct.read_scan(path).voxels
        if all(size >= least for size, least in zip(voxels.shape, LARGEST)):
            volumes[ct.bare_name(path).replace(".", "_")] = voxels
    return volumes


def enlarged(volume: np.ndarray) -> np.ndarray:
    """Twice as wide and high, with noise."""
    fine = F.interpolate(torch.from_numpy(volume.astype(np.float32))[None], scale_factor=2, mode="bilinear")[0].numpy()
    fine += 10 * np.random.default_rng(0).standard_normal(fine.shape, np.float32)
    return np.clip(np.rint(fine), -1024, 3071).astype(np.int16)


def measure(ways: dict, rounds: int) -> dict[str, list[float]]:
    """Pairs per CPU second of every way, round by round."""
    rates = {name: [] for name in ways}
    for _, (name, (pairs, work)) in itertools.product(range(rounds), ways.items()):
        began = time.process_time()
        work(pairs)
        rates[name].append(pairs / (time.process_time() - began))
    return rates


def table(rates: dict[str, list[float]]) -> str:
    """Medians; ratios are medians over rounds, in each of which all ways ran one after the other."""
    heads = "".join(f"{name + ' is':>14}" for name in RATES)
    lines = [f"{'':<48} {'pairs/s/core':>12} {'lowest':>8} {'highest':>8}{heads}"]
    for name, values in sorted(rates.items(), key=lambda item: -statistics.median(item[1])):
        ratios = [statistics.median(a / b for a, b in zip(rates[ours], values)) for ours in RATES.values()]
        cells = "".join(f"{ratio:12.1f} x" for ratio in ratios)
        lines.append(f"{name:<48} {statistics.median(values):12.1f} {min(values):8.1f} {max(values):8.1f}{cells}")
    return "\n".join(lines)


def bytes_per_voxel(volumes: dict[str, np.ndarray], scratch: Path) -> float:
    """Bytes read from the lossless store over those of the crops."""
    index, own = our_store(volumes, scratch, "int16"), 0
    ids, batches = tuple(scan.scan_id for scan in index.scans), rows_of(index, 1)
    renderer = PairRenderer(index.store, ids, 0, VIEWS, INTENSITY)
    with counted() as bytes_read:
        batch = renderer(next(batches))
    for view in ("1", "2"):
        own += 2 * (batch["box_" + view][..., 1] - batch["box_" + view][..., 0]).prod(-1).sum()
    return bytes_read[0] / own


# -- ours -------------------------------------------------------------------------------------------------------------


def our_store(volumes: dict[str, np.ndarray], scratch: Path, encoding: str, compression: str = "lz4") -> store.Index:
    folder, options = scratch / f"{encoding}_{compression}", {"encoding": encoding, "compression": compression}
    if not folder.exists():
        folder.mkdir()
        for scan_id, volume in volumes.items():
            scan_files.write_scan(folder, scan_id, volume, np.eye(4), hu_window=WINDOW, **options)
        store.write_index(folder, {}, WINDOW, encoding=encoding)
    return store.read_index(folder)


def rows_of(index: store.Index, share: int) -> Iterator[dict[str, np.ndarray]]:
    """Single rows of a plan, without end as far as a benchmark goes."""
    ids = tuple(scan.scan_id for scan in index.scans)
    for batch in stream.Plan.make(ids, 32, 64, 10**4, None, 0, share).batches(0):
        yield {"step": np.zeros(len(batch), np.int64), "epoch": batch[:, 0], "scan": batch[:, 1], "draw": batch[:, 2]}


def ours(encoding: str, share: int, augment: bool = True, resize: bool = True, compression: str = "lz4") -> Callable:
    def make(volumes, scratch):
        index = our_store(volumes, scratch, encoding, compression)
        ids = tuple(scan.scan_id for scan in index.scans)
        options = {"augment": augment, "resize": resize, "pairs_per_region": share}
        renderer = PairRenderer(index.store, ids, 0, VIEWS, INTENSITY, **options)
        batches = rows_of(index, share)

        def work(pairs: int) -> None:
            for _ in range(-(-pairs // 64)):
                renderer(next(batches))

        return work

    return make


# -- peers: each takes boxes from our sampler, so all cut the same kind of pair ---------------------------------------


def drawn(volumes: dict[str, np.ndarray]) -> Iterator[tuple[str, tuple]]:
    rng = np.random.default_rng(0)
    while True:
        for scan_id in rng.permutation(list(volumes)).tolist():
            yield scan_id, sample_pair(rng, volumes[scan_id].shape, VIEWS)


def scaled(volume: np.ndarray) -> np.ndarray:
    mean, std = voxel_statistics.statistics(volume, WINDOW)
    return normalise(volume, WINDOW, mean, std)


def slices(prior) -> tuple[slice, ...]:
    return tuple(slice(start, stop) for start, stop in prior.box.tolist())


def reading(cut: Callable[[str, tuple], np.ndarray], volumes, compiled: bool) -> Callable[[int], None]:
    """Another reader in our pipeline: compiled, or in plain torch as one would write it."""
    statistics_of = {scan_id: voxel_statistics.statistics(volume, WINDOW) for scan_id, volume in volumes.items()}
    rng, pairs_of = np.random.default_rng(1), drawn(volumes)

    def work(pairs: int) -> None:
        for _ in range(pairs):
            scan_id, priors = next(pairs_of)
            for prior in priors:
                crop, scaling = np.asarray(cut(scan_id, slices(prior))), (WINDOW, *statistics_of[scan_id])
                if compiled:
                    view = render(crop, VIEWS.size, prior.flip, *scaling)
                    to_half(apply_intensity(view, sample_intensity(rng, INTENSITY)), np.empty_like(view, np.float16))
                else:
                    view = resize_and_flip(normalise(crop, *scaling), VIEWS.size, prior.flip)
                    std, seed, *others = sample_intensity(rng, INTENSITY)
                    drawn_here = torch.tensor([[std, *others]]), torch.tensor([seed])
                    apply_intensities(view[None, None], *drawn_here, INTENSITY.blur_sigma[1]).half()

    return work


def zarr_python(volumes, scratch):
    import zarr

    folder = our_store(volumes, scratch, "int16").store
    arrays = {scan_id: zarr.open_array(f"{folder}/scans/{scan_id}/0", mode="r") for scan_id in volumes}
    return reading(lambda scan_id, box: arrays[scan_id][box], volumes, compiled=False)


def tensorstore(volumes, scratch):
    import tensorstore as ts

    folder = our_store(volumes, scratch, "int16").store
    context = ts.Context({"data_copy_concurrency": {"limit": 1}, "file_io_concurrency": {"limit": 1}})
    arrays = {}
    for scan_id in volumes:
        file = {"driver": "file", "path": f"{folder}/scans/{scan_id}/0"}
        arrays[scan_id] = ts.open({"driver": "zarr3", "kvstore": file}, context=context, read=True).result()
    return reading(lambda scan_id, box: arrays[scan_id][box].read().result(), volumes, compiled=True)


def monai(volumes, scratch):
    """Volumes z-scored in RAM, no meta data, no copy of the cache, cropping first."""
    from monai import transforms as mt
    from monai.data import CacheDataset, set_track_meta

    set_track_meta(False)
    resize, flips = mt.Resize(VIEWS.size, mode="trilinear", align_corners=False), [mt.Flip(axis) for axis in range(3)]
    intensity = mt.Compose(
        [
            mt.RandGaussianNoise(prob=INTENSITY.noise_prob, std=0.1**0.5),
            mt.RandGaussianSmooth(*[INTENSITY.blur_sigma] * 3, prob=INTENSITY.blur_prob),
            mt.RandScaleIntensity(prob=INTENSITY.gain_prob, factors=0.25),
            mt.RandAdjustContrast(prob=INTENSITY.gamma_prob, gamma=INTENSITY.gamma),
        ]
    )
    pairs_of = {scan_id: drawn({scan_id: volume}) for scan_id, volume in volumes.items()}

    class Pair(mt.Transform, mt.Randomizable):
        def __call__(self, item):
            _, priors = next(pairs_of[item["id"]])
            views = []
            for prior in priors:
                view = resize(mt.SpatialCrop(roi_start=prior.box[:, 0], roi_end=prior.box[:, 1])(item["ct"]))
                for flip, chosen in zip(flips, prior.flip):
                    view = flip(view) if chosen else view
                views.append(intensity(view).half())
            return torch.stack(views)

    def load(scan_id):
        return {"id": scan_id, "ct": torch.from_numpy(scaled(volumes[scan_id]))[None]}

    chain = mt.Compose([mt.Lambda(load), Pair()])
    cached = CacheDataset(list(volumes), chain, copy_cache=False, progress=False)
    order = itertools.cycle(range(len(cached)))

    def work(pairs: int) -> None:
        for _ in range(pairs):
            cached[next(order)]

    return work


def torchio(volumes, scratch, from_files: bool = False):
    """Queue over volumes in RAM or in .nii.gz files, 16 patches of the largest crop a volume; two count as a pair,
    overlap or not. The queue is filled four volumes at a time: a round takes all patches of ten."""
    import torchio as tio

    subjects = []
    for scan_id, volume in volumes.items():
        image = tio.ScalarImage(tensor=torch.from_numpy(scaled(volume))[None])
        if from_files:
            image.save(f"{scratch}/{scan_id}.nii.gz")
            image = tio.ScalarImage(f"{scratch}/{scan_id}.nii.gz")
        subjects.append(tio.Subject(ct=image))
    chain = tio.Compose(
        [
            tio.Resize(VIEWS.size),
            tio.RandomFlip(axes=(0, 1, 2)),
            tio.RandomNoise(std=(0, 0.1**0.5), p=INTENSITY.noise_prob),
            tio.RandomBlur(std=INTENSITY.blur_sigma, p=INTENSITY.blur_prob),
            tio.Lambda(lambda x: (x * np.random.default_rng().uniform(*INTENSITY.gain)).clamp(x.min(), x.max())),
            tio.RandomGamma(log_gamma=(np.log(INTENSITY.gamma[0]), np.log(INTENSITY.gamma[1])), p=INTENSITY.gamma_prob),
        ]
    )

    def patches():
        while True:
            queue = tio.Queue(tio.SubjectsDataset(subjects), 64, 16, tio.UniformSampler(LARGEST), num_workers=0)
            for i in range(len(queue)):
                yield queue[i]

    source = patches()

    def work(pairs: int) -> None:
        for _ in range(2 * pairs):
            chain(next(source))["ct"].data.half()

    return work


def blosc2_batchgenerators(volumes, scratch):
    """As nnssl stores and augments, tuned: z-scored float32 blosc2 with lz4 in our chunks, plain trilinear resize."""
    import blosc2
    from batchgeneratorsv2.transforms.intensity.brightness import MultiplicativeBrightnessTransform
    from batchgeneratorsv2.transforms.intensity.gamma import GammaTransform
    from batchgeneratorsv2.transforms.intensity.gaussian_noise import GaussianNoiseTransform
    from batchgeneratorsv2.transforms.noise.gaussian_blur import GaussianBlurTransform
    from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
    from batchgeneratorsv2.transforms.utils.random import RandomTransform

    blosc2.set_nthreads(1)
    packing = {"codec": blosc2.Codec.LZ4, "clevel": 5, "nthreads": 1}
    arrays = {}
    for scan_id, volume in volumes.items():
        path, chunks = f"{scratch}/{scan_id}.b2nd", tuple(min(size, 64) for size in volume.shape)
        blocks = tuple(min(a, b) for a, b in zip((8, 32, 32), chunks))
        blosc2.asarray(scaled(volume), chunks=chunks, blocks=blocks, cparams=packing, urlpath=path, mode="w")
        arrays[scan_id] = blosc2.open(path, mode="r", dparams={"nthreads": 1}, mmap_mode="r")
    steps = [
        (GaussianNoiseTransform(INTENSITY.noise_variance), INTENSITY.noise_prob),
        (GaussianBlurTransform(INTENSITY.blur_sigma), INTENSITY.blur_prob),
        (MultiplicativeBrightnessTransform(INTENSITY.gain, False), INTENSITY.gain_prob),
        (GammaTransform(INTENSITY.gamma, 0, False, 1, 0), INTENSITY.gamma_prob),
    ]
    chain, pairs_of = ComposeTransforms([RandomTransform(*step) for step in steps]), drawn(volumes)

    def work(pairs: int) -> None:
        for _ in range(pairs):
            scan_id, priors = next(pairs_of)
            for prior in priors:
                crop = torch.from_numpy(arrays[scan_id][slices(prior)])[None, None]
                view = F.interpolate(crop, size=VIEWS.size, mode="trilinear", align_corners=False)[0]
                view = view.flip([axis + 1 for axis in range(3) if prior.flip[axis]])
                chain(image=view)["image"].half()

    return work


@contextmanager
def counted() -> Iterator[list[int]]:
    """Bytes that are read from local files."""
    bytes_read, ranges = [0], LocalFile.ranges

    def counting(self, spans):
        bytes_read[0] += sum(length for _, length in spans)
        return ranges(self, spans)

    LocalFile.ranges = counting
    try:
        yield bytes_read
    finally:
        LocalFile.ranges = ranges


WAYS = (  # name, pairs per round, what makes the work
    (RATES["K = 1"], 256, ours("int16", 1)),
    (RATES["K = 8"], 256, ours("int16", 8)),
    (RATES["raw, K = 1"], 256, ours("int16", 1, compression="none")),
    (RATES["raw, K = 8"], 256, ours("int16", 8, compression="none")),
    ("pgl_ray, uint8, K = 1", 256, ours("uint8", 1)),
    ("pgl_ray, uint8, K = 8", 256, ours("uint8", 8)),
    ("pgl_ray, intensity on the GPU, int16, K = 8", 256, ours("int16", 8, augment=False)),
    ("pgl_ray, intensity on the GPU, uint8, K = 8", 256, ours("uint8", 8, augment=False)),
    ("pgl_ray, crops only, int16, K = 1", 256, ours("int16", 1, augment=False, resize=False)),
    ("pgl_ray, crops only, int16, K = 8", 512, ours("int16", 8, augment=False, resize=False)),
    ("pgl_ray, crops only, uint8, K = 1", 256, ours("uint8", 1, augment=False, resize=False)),
    ("pgl_ray, crops only, uint8, K = 8", 512, ours("uint8", 8, augment=False, resize=False)),
    ("pgl_ray, crops only, int16 uncompressed, K = 8", 512, ours("int16", 8, False, False, "none")),
    ("tensorstore + our kernels", 128, tensorstore),
    ("zarr-python + torch", 48, zarr_python),
    ("MONAI CacheDataset, tuned", 64, monai),
    ("blosc2 + batchgeneratorsv2 (nnssl), tuned", 64, blosc2_batchgenerators),
    ("TorchIO Queue, volumes in RAM", 80, torchio),
    ("TorchIO Queue, as used: from .nii.gz", 80, partial(torchio, from_files=True)),
)


if __name__ == "__main__":
    main()
