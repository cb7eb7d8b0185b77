"""The one walk over a source folder: every file below it, links followed, every real folder once."""

import os
from bisect import bisect_left
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

IMAGES = (".nii.gz", ".nii", ".nrrd", ".nhdr", ".mha", ".mhd", ".hdr", ".dcm", ".dcm.gz")
DOCUMENTS = (".pdf", ".txt", ".doc", ".docx", ".jpg", ".jpeg", ".png", ".csv", ".xls", ".xlsx", ".xml", ".json")
NNUNET = ("imagesTr", "imagesVa", "imagesTs")
IMAGE_FOLDERS = ("images", *NNUNET)  # whose volumes are all meant to be used
LABEL_FOLDERS = ("labels", "labelsTr", "labelsVa", "labelsTs")
LOST = (-1, 0)  # stamp of a link that leads nowhere, or of a file that cannot be looked at


class Tree(NamedTuple):
    """What lies below a folder; what is hidden (".name") is left out.

    Attributes:
        files: absolute path -> (bytes, time in ns), in the order of the paths.
        paths: the keys of `files`, for bisection.
        folders: absolute paths, the root's among them.
        left_out: (path, reason) of links to folders that are not followed, of hidden volumes and folders, and of
            what is no file.
        faults: (path, reason) of what cannot be looked at: folders without permission, names that are no UTF-8.
        links: path of a link to a folder of the tree -> that folder's path.
    """

    files: dict[str, tuple[int, int]]
    paths: list[str]
    folders: set[str]
    left_out: list[tuple[str, str]]
    faults: list[tuple[str, str]]
    links: dict[str, str]

    def below(self, folder: str | Path, without: Iterable[str | Path] = ()) -> list[str]:
        """Paths of the files below a folder, but not below others."""
        start, end = _bounds(self.paths, folder)
        paths = self.paths[start:end]
        for other in without:
            if os.fspath(other) != os.fspath(folder):
                first, last = _bounds(paths, other)
                paths = paths[:first] + paths[last:]
        return paths

    def without(self, paths: Iterable[str]) -> "Tree":
        """The tree without some of its files."""
        gone = set(paths)
        files = {path: stamp for path, stamp in self.files.items() if path not in gone}
        return self._replace(files=files, paths=list(files))

    def by_roles(self) -> "Tree":
        """The tree with folders under the names of links to them that say what lies there (labels/, and imagesTr/ with
        labelsTr/), where the folder's own place does not. Other images stay: they lie anywhere, and keep their ids."""
        tree, top = self, min(self.folders, key=len, default="")
        for link, folder in sorted(self.links.items()):
            name = os.path.basename(link)
            if name not in LABEL_FOLDERS + NNUNET:
                continue
            inside = [one for one in tree.folders if f"{one}/".startswith(f"{folder}/")]
            names = {part for one in inside for part in one[len(top) :].split("/")}
            labels = os.path.join(top, name.replace("images", "labels"))
            others = tree.without(tree.below(folder)).paths
            wanted = os.path.dirname(link) == top and (labels in tree.folders or labels in tree.links)
            wanted &= any(not path.lower().endswith(DOCUMENTS) for path in others)  # which it could label
            if wanted and inside and not names & {*LABEL_FOLDERS, *NNUNET, "images"}:
                tree = tree._moved(folder, link)
            else:
                mend = f"make {name} a folder, with links to the files in it"
                reason = f"a link to {folder}, which is looked at there and not as {name}: {mend}"
                tree.left_out[:] = [(path, reason if path == link else why) for path, why in tree.left_out]
        return tree

    def _moved(self, folder: str, link: str) -> "Tree":
        """The tree with a folder under a link's path."""

        def place(path: str) -> str:
            return link + path[len(folder) :] if f"{path}/".startswith(f"{folder}/") else path

        files = dict(sorted((place(path), stamp) for path, stamp in self.files.items()))
        left_out = [(place(path), reason) for path, reason in self.left_out if path != link]
        faults = [(place(path), reason) for path, reason in self.faults]
        return Tree(files, list(files), set(map(place, self.folders)), left_out, faults, self.links)


def _bounds(paths: list[str], folder: str | Path) -> tuple[int, int]:
    prefix = os.fspath(folder).rstrip("/")
    return bisect_left(paths, f"{prefix}/"), bisect_left(paths, f"{prefix}0")  # "0" comes after "/"


def walk(root: str | Path, without: Iterable[str | Path] = ()) -> Tree:
    """Looks at every file below a folder.

    Folders are looked at before links to folders, so that a link that comes later renames nothing. A store of
    pgl_ray is no source.

    Args:
        root: absolute.
        without: absolute paths of folders that are passed over.
    """
    top, passed = os.fspath(root), {os.fspath(path) for path in without}
    files, folders, left_out, faults, inner = {}, set(), [], [], {}
    seen, todo = {}, [(top, os.path.realpath(top))]
    while todo:
        links = []
        while todo:
            path, real = todo.pop()
            if real in seen or path in passed:
                continue
            seen[real] = path
            entries = _entries(path, faults)
            names = {entry.name for entry in entries}
            if path != top and {"store.json", "scans"} <= names:
                continue
            folders.add(path)
            for entry in entries:
                if entry.name.startswith("."):
                    notable = entry.name.lower().endswith(IMAGES) or entry.is_dir()
                    if notable and not entry.name.startswith("._"):  # macOS' shadows
                        left_out.append((printable(entry.path), "hidden, for its name begins with a dot"))
                elif not _is_text(entry.name):
                    fate = left_out if entry.name.lower().endswith(DOCUMENTS) else faults
                    fate.append((printable(entry.path), "its name is not UTF-8: rename it, as convmv does"))
                elif entry.is_dir(follow_symlinks=False):
                    todo.append((entry.path, f"{real.rstrip('/')}/{entry.name}"))
                elif entry.is_symlink() and os.path.isdir(entry.path):
                    links.append(entry.path)
                elif stamp := _stamp(entry):
                    files[entry.path] = stamp
                else:
                    left_out.append((entry.path, "a socket, a pipe or a device, no file"))
        chosen = {}
        for path in sorted(links, key=lambda one: (one.count("/"), one)):
            real = os.path.realpath(path)
            if f"{os.path.realpath(os.path.dirname(path))}/".startswith(f"{real.rstrip('/')}/"):
                left_out.append((path, "a link to a folder that it lies in: not followed, it would never end"))
            elif real in seen or real in chosen:
                inner[path] = seen.get(real) or chosen[real]
                left_out.append((path, f"a link to a folder that is looked at already: {inner[path]}"))
            else:
                chosen[real] = path
        todo = [(path, real) for real, path in chosen.items()]
        todo.reverse()
    paths = sorted(files)
    return Tree({path: files[path] for path in paths}, paths, folders, left_out, faults, inner)


def _entries(path: str, faults: list[tuple[str, str]]) -> list[os.DirEntry]:
    try:
        with os.scandir(path) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        faults.append((path, f"the folder cannot be looked at: {error.strerror or error}"))
        return []


def _stamp(entry: os.DirEntry) -> tuple[int, int] | None:
    """Bytes and time of a file; none of sockets and the like."""
    try:
        stat = entry.stat()
    except OSError:
        return LOST
    return (stat.st_size, stat.st_mtime_ns) if entry.is_file() else None


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def printable(path: str) -> str:
    """A path as it can be printed and written, whatever its bytes."""
    return os.fsencode(path).decode(errors="backslashreplace")
