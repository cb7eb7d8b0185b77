"""Encoders with the weights that a probe judges: the one that is asked about, and the ends that it is compared with."""

import json
from dataclasses import dataclass, replace
from typing import Any

from pgl_ray.config import ProbeConfig, ViewsConfig
from pgl_ray.data.facts import seen_notes, spacing_note
from pgl_ray.data.scan_record import ScanRecord
from pgl_ray.data.store import Index
from pgl_ray.model.encoder import build_encoder
from pgl_ray.model.resenc import ResEncoder
from pgl_ray.model.resnet import Encoder, init_kaiming_uniform
from pgl_ray.train import weights

ENDS = ("control", "ceiling")  # keys of a ProbeConfig


@dataclass(frozen=True)
class Weighted:
    """An encoder of the right architecture, not yet filled, and the weights for it.

    Attributes:
        key: of the config, that names it: init, control or ceiling.
        encoder: random weights are in it already.
        source: of the weights; none: random.
        fewer: what to say where it is judged by fewer maps than what it is compared with.
    """

    key: str
    encoder: Encoder | ResEncoder
    source: weights.Source | None
    fewer: str = ""

    @property
    def view_size(self) -> tuple[int, int, int]:
        """(D, H, W) of the views of its pre-training; the default where that is not known."""
        return self.source.view_size if self.source else ViewsConfig().size

    def up_to(self, level: int) -> "Weighted":
        """The same, judged by no map behind this one: as many as of the encoder that it is compared with, or, with a
        note, fewer."""
        if self.source is None or self.source.level == level:
            return self
        if self.source.level < level:
            fewer = f"it was trained up to map {self.source.level}: it is judged by fewer maps than init, up to {level}"
            return replace(self, fewer=fewer)
        return replace(self, source=replace(self.source, level=level))

    def ready(self, index: Index, tested: list[ScanRecord]) -> tuple[Encoder | ResEncoder, list[str]]:
        """The encoder with its weights, up to the last stage that was trained; and what is to be said of it.

        Args:
            index: of the store.
            tested: scans that it is tested on.

        Raises:
            ValueError: the weights do not fit.
        """
        notes = []
        if self.source:
            init = self.source.init
            try:
                loaded = weights.fill(self.encoder, self.source)
            except ValueError as error:
                raise ValueError(_of_key(str(error), self.key, init)) from None
            if note := spacing_note(loaded.trained_on, index):
                notes.append(f"{self.key}={init} {note}")
            whose = "" if self.key == "init" else f"{self.key}={init}: "
            doubts = [*seen_notes(loaded.trained_on, tested), *self._doubts(index), self.fewer]
            notes += [f"{whose}{note}" for note in filter(None, doubts)]
            self.encoder.stop_at(self.source.level)
        return self.encoder, notes

    def _doubts(self, index: Index) -> list[str]:
        """Why an end that is given is not one, as far as its training is known; of the store it may be known how many
        labels it has."""
        meta = self.source.meta if self.source else None
        config, door = (json.loads(meta.config), meta.door) if meta else ({}, "")
        with_labels = (door == "finetune" or "freeze" in config) and not config.get("freeze")
        if self.key == "ceiling" and (door or config) and not with_labels:
            return ["its encoder was trained without labels: it is no upper end"]
        if self.key == "ceiling" and (few := _few_labels(config, index)):
            return [few]
        if self.key == "control" and config and not config.get("align", {}).get("wrong_priors"):
            return ["it was not trained with align.wrong_priors=true: it is no control"]
        return []


def _few_labels(config: dict[str, Any], index: Index) -> str | None:
    """What to say of a fine-tuning that may not have had all labels; none: it had."""
    num = config.get("num_scans", 1.0)
    here = index.labelled(config["split"]) if config.get("index") == index.store and "split" in config else []
    if num == 1.0 or (here and (num if isinstance(num, int) else round(num * len(here))) >= len(here)):
        return None
    if isinstance(num, int) and not here:
        return f"it was trained with num_scans={num}: where these were not all labels, the upper end lies higher"
    return f"it was trained with num_scans={num}, not with all labels: the upper end lies higher"


def read(key: str, config: ProbeConfig, index: Index) -> Weighted:
    """The encoder of `config.init`, `control` or `ceiling`.

    Raises:
        ValueError: no such weights, or of another architecture or HU window.
    """
    init, settings = getattr(config, key), config.encoder.model_dump() if config.encoder else None
    if init == "random":
        encoder = build_encoder(**(settings or {}))
        init_kaiming_uniform(encoder, config.seed)
        return Weighted(key, encoder, None)
    try:
        return Weighted(key, *weights.read(init, settings if key == "init" else None, index.hu_window))
    except ValueError as error:
        raise ValueError(_of_key(str(error), key, init)) from None


def _of_key(text: str, key: str, init: str) -> str:
    """What `train.weights` says of an init, as said of another key, without a mend that a probe has not."""
    for mend in (", or take what fits", "; allow_partial"):
        text = text.partition(mend)[0]
    return text.replace(f"init={init}", f"{key}={init}")


def read_ends(config: ProbeConfig, index: Index, own: Weighted) -> dict[str, Weighted]:
    """The ends that are given, by their keys.

    Args:
        config: of the probe.
        index: of the store.
        own: the encoder that is judged.

    Raises:
        ValueError: as for `read`, an encoder of another size, or the one that is judged.
    """
    given = [key for key in ENDS if getattr(config, key)]
    for key in given:
        if getattr(config, key) == config.init:
            raise ValueError(f"{key}={config.init} is init itself: give another, or leave it out")
    ends = {key: read(key, config, index) for key in given}
    for key, one in ends.items():
        theirs, ours = one.encoder.settings, own.encoder.settings
        if theirs != ours:
            mend = "give encoder.* of that size" if own.source is None else "give a run of the same size"
            named = f"{key}={getattr(config, key)} holds an encoder {theirs}, init={config.init} one {ours}"
            raise ValueError(f"{named}: {mend}")
        last = own.source.level if own.source else own.encoder.last
        ends[key] = one.up_to(last)
    return ends
