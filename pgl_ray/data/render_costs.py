"""What the stages of rendering cost on one core."""

import time
from dataclasses import replace
from functools import partial

import numpy as np

from pgl_ray.data import wire
from pgl_ray.data.pair_renderer import Drawn, PairRenderer
from pgl_ray.data.render_cache import fetch_boxes, part_reader, reader_of_region, region_of, volume_reader
from pgl_ray.data.rendering import AIR, read_all_padded
from pgl_ray.paths import is_url


def measure(renderer: PairRenderer, rows: dict[str, np.ndarray]) -> dict[str, float]:
    """What the stages of rendering cost on one core, by leaving out one after the other.

    Args:
        renderer: is called as it is, and without its intensity operations.
        rows: of the plan, in its order, so that pairs share regions as they will.

    Returns:
        CPU ms per pair: draw (priors), read (bytes of the chunks that are touched, from the page cache where they are
        in it), decode, resize (window, z-score, resize, flip; or what it takes to put crops into a batch), intensity;
        bytes_read, crop_bytes per pair (of the stored type); place, the wall ms per pair that one process waits for
        those bytes; and place_requests, place_bytes per pair: where the store is far, with what lies between.
    """
    num, codes = len(rows["step"]), not renderer.resize
    drawn = renderer.draw(rows)
    fetch = partial(_fetched, renderer.store, drawn)

    def read() -> None:
        for i, boxes in enumerate(drawn.box):
            read_all_padded(part_reader(renderer.store, *drawn.part(i), codes), boxes, AIR if not codes else 0)

    def fetch_ahead() -> None:
        for _, ready in renderer.fetched(renderer.in_turn(drawn), drawn):
            ready()

    seconds = {}
    stages = {"draw": partial(renderer.draw, rows), "fetch": fetch, "read": read}
    stages |= {"plain": partial(replace(renderer, augment=False), rows), "whole": partial(renderer, rows)}
    for name, work in stages.items():
        work()  # opens files, compiles
        region_of.cache_clear(), reader_of_region.cache_clear()
        began = time.process_time()
        work()
        seconds[name] = time.process_time() - began
    reader_of_region.cache_clear()
    began = time.perf_counter()
    fetch_ahead() if is_url(renderer.store) else fetch()
    costs = {"place": time.perf_counter() - began}
    itemsize = volume_reader(renderer.store, drawn.scan_ids[0]).stored_dtype.itemsize
    done, requests = fetch()
    costs |= {
        "draw": seconds["draw"],
        "read": seconds["fetch"],
        "decode": seconds["read"] - seconds["fetch"],
        "resize": seconds["plain"] - seconds["read"] - seconds["draw"],
        "intensity": seconds["whole"] - seconds["plain"] if renderer.augment else 0.0,
    }
    return {name: max(0.0, 1000 * cost / num) for name, cost in costs.items()} | {
        "bytes_read": done / num,
        "place_requests": len(requests) / num,
        "place_bytes": (sum(length for _, length in requests) or done) / num,
        "crop_bytes": int((drawn.box[..., 1] - drawn.box[..., 0]).prod(-1).sum()) * itemsize / num,
    }


def _fetched(store: str, drawn: Drawn) -> tuple[int, list[tuple[int, int]]]:
    """Fetches what rows read: its bytes, and (offset, bytes) of the requests where the store is far."""
    done, requests, seen = 0, [], set()
    for i, boxes in enumerate(drawn.box):
        scan_id, region = drawn.part(i)
        reader = volume_reader(store, scan_id)
        if region is not None:
            key = scan_id, region.tobytes()
            boxes = [] if key in seen else [region]
            seen.add(key)
        fetched = fetch_boxes(reader, boxes).chunks
        done += sum(map(len, fetched.values()))
        requests += wire.joined(reader.spans(fetched)) if reader.far else []
    return done, requests
