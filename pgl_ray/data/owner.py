"""Which run writes into a store: the token in STORE/.part/run, and the error that the others get."""

import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Protocol

from pgl_ray.config import FailedRun
from pgl_ray.data.own_files import NOT_WHOLE


class Place(Protocol):
    """What of a store's place its owner needs, a folder's or a bucket's."""

    @property
    def url(self) -> str:
        """Path or URL."""
        ...

    def read(self, key: str, /) -> bytes:
        """The content of a key."""
        ...

    def write(self, key: str, parts: Iterable[bytes], /) -> object:
        """Puts a key's content there."""
        ...

    def names(self, key: str, /) -> list[str]:
        """What lies directly below a key."""
        ...

    def remove(self, key: str, /) -> None:
        """Takes a key, or all below it, away."""
        ...


def in_use(url: str) -> FailedRun:
    """What is raised where another prepare holds a store's lock."""
    return FailedRun(f"store={url}: another prepare is writing into it: wait for its end, then type this again")


@contextmanager
def part_folder(place: Place) -> Iterator[str]:
    """Empties and offers STORE/.part, which holds what is not whole yet, and the token of the run that owns it.

    Raises:
        ValueError: what pgl_ray has not written lies there.
    """
    if foreign := [name for name in place.names(".part") if not NOT_WHOLE.fullmatch(name)]:
        raise ValueError(f"{place.url}/.part/{foreign[0]} is there, and pgl_ray has not written it: move it elsewhere")
    place.remove(".part")  # of a run that was killed
    token = uuid.uuid4().hex
    place.write(".part/run", [token.encode()])
    try:
        yield token
    finally:
        with suppress(OSError):  # the next run removes it
            if place.read(".part/run") == token.encode():  # in a bucket another run may have taken over
                place.remove(".part")


def check_token(place: Place, token: str) -> None:
    """Finds out whether the run of a token still writes into a store.

    Raises:
        FailedRun: another one does, or none.
    """
    try:
        owner = place.read(".part/run").decode()
    except FileNotFoundError:
        owner = ""
    if owner != token:
        raise run_is_over(place.url)


def run_is_over(url: str) -> FailedRun:
    """What is raised in a worker whose run has lost the store."""
    return FailedRun(f"the run that writes into {url} is over")
