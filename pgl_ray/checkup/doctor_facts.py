"""What a machine says of itself and of the places of a run: the doctor's facts, no door itself.

Every node runs this, whatever it lacks, so nothing but the standard library is imported at its top.
"""

import csv
import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pgl_ray.checkup.doctor_places import look_at_run, look_at_store, nearest
from pgl_ray.paths import cache_folder

# What pyproject.toml asks for, which is not there on a node; tests/test_doctor.py compares the two.
NEEDED = {
    "torch": ">=2.8",
    "ray": ">=2.60,<2.61",
    "monai": ">=1.5",
    "zarr": ">=3.1",
    "numcodecs": ">=0.16",
    "google-crc32c": ">=1.5",
    "pyarrow": ">=17",
    "numpy": ">=2.0",
    "numba": ">=0.62",
    "scipy": ">=1.14",
    "pydantic": ">=2.11",
    "omegaconf": ">=2.4",
    "nibabel": ">=5.3",
    "isal": ">=1.7",
    "SimpleITK": ">=2.4",
    "pytorch_optimizer": ">=4.1,<5",
    "safetensors": ">=0.5",
    "tensorboardX": ">=2.6",
    "matplotlib": ">=3.9",
    "pillow": ">=10",
    "jinja2": ">=3.1",
    "psutil": ">=5.9",
    "filelock": ">=3.12",
    "tqdm": ">=4.66",
    "packaging": ">=23",
}
EXTRAS = {
    "dicom": ("pydicom",),
    "cloud": ("obstore",),
    "onnx": ("onnx", "onnxruntime", "onnxscript"),
    "tune": ("optuna",),
    "mlflow": ("mlflow-skinny",),
    "wandb": ("wandb",),
}
CHOICES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")  # variables that name a network interface
GPU_QUERY = ("index", "name", "driver_version", "memory.total", "memory.used")
CUDA_TRIAL = """
import torch
num = torch.cuda.device_count()
sums = [float(torch.ones(2, device=f"cuda:{i}").sum()) for i in range(num)] if num else torch.zeros(1).cuda()
print(num)
"""


@dataclass(frozen=True)
class Gpu:
    """A GPU as its driver tells of it; memory in MiB."""

    name: str
    driver: str
    total_mb: float
    used_mb: float


@dataclass(frozen=True)
class Machine:
    """A node of the cluster, or the machine of the command.

    Attributes:
        name: what lines call it.
        fault: why it gave no answer: then nothing below is known.
        python, versions: of Python, and of each package that is installed and that a door may need.
        code, code_path: hash and folder of the pgl_ray that is imported.
        host, host_address: its own name, and the address that this name leads to; "": to none.
        interfaces: network interface -> its addresses.
        chosen: what of CHOICES is set.
        address: by which the cluster knows it; "": there is no cluster.
        shm_bytes: size of /dev/shm; none: there is none.
        object_store_bytes: of Ray's; 0: there is none yet.
        ray_gpus: GPUs that Ray counts; none: there is no cluster.
        gpus, gpu_fault: what nvidia-smi lists, and why it lists nothing; "" where no GPU is to be expected.
        cuda_fault: why torch cannot compute on them; "": it can, or there are none.
        disks: what lies there -> (folder, free bytes, bytes in all).
        skew_s, skew_error_s: by how much its clock is ahead of this one, and how exactly that is known.
    """

    name: str
    fault: str = ""
    python: str = ""
    versions: dict[str, str] | None = None
    code: str = ""
    code_path: str = ""
    host: str = ""
    host_address: str = ""
    interfaces: dict[str, list[str]] | None = None
    chosen: dict[str, str] | None = None
    address: str = ""
    shm_bytes: int | None = None
    object_store_bytes: float = 0
    ray_gpus: float | None = None
    gpus: tuple[Gpu, ...] = ()
    gpu_fault: str = ""
    cuda_fault: str = ""
    disks: dict[str, tuple[str, int, int]] | None = None
    skew_s: float = 0.0
    skew_error_s: float = 0.0


# -- the machine ------------------------------------------------------------------------------------------------------


def machine(tmp_dir: str | None = None) -> dict[str, Any]:
    """Facts of this machine by their names in Machine, only plain values: another node may have another pgl_ray.

    Args:
        tmp_dir: Ray's temporary folder; none: its own choice.
    """
    package = Path(__file__).parents[1]
    gpus, gpu_fault = gpus_here()
    return {
        "python": platform.python_version(),
        "versions": _versions(),
        "code": code_hash(package),
        "code_path": str(package),
        "host": socket.gethostname(),
        "host_address": _address_of(socket.gethostname()),
        "interfaces": _interfaces(),
        "chosen": {name: os.environ[name] for name in CHOICES if os.environ.get(name)},
        "shm_bytes": shutil.disk_usage("/dev/shm").total if os.path.isdir("/dev/shm") else None,
        "gpus": gpus,
        "gpu_fault": gpu_fault,
        "cuda_fault": fault_of_cuda() if gpus else "",
        "disks": _disks(tmp_dir),
    }


def code_hash(package: Path) -> str:
    """Hash of a package's Python files, their names included; 12 digits."""
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(package)} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:12]


def _versions() -> dict[str, str]:
    versions = {}
    for name in [*NEEDED, *(one for names in EXTRAS.values() for one in names)]:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _address_of(host: str) -> str:
    """The address that a name leads to; "": none."""
    try:
        return socket.getaddrinfo(host, None, socket.AF_INET)[0][4][0]
    except OSError:
        return ""


def _interfaces() -> dict[str, list[str]]:
    if not importlib.util.find_spec("psutil"):
        return {}
    import psutil

    families = (socket.AF_INET, socket.AF_INET6)
    known = sorted(psutil.net_if_addrs().items())
    by_name = {name: [one.address for one in all_ if one.family in families] for name, all_ in known}
    return {name: addresses for name, addresses in by_name.items() if addresses}


def gpus_here() -> tuple[list[dict[str, Any]], str]:
    """GPUs by nvidia-smi, and why there are none where a device or a driver says that there should be."""
    present = any(Path("/dev").glob("nvidia[0-9]*")) or os.path.exists("/proc/driver/nvidia/version")
    command = ["nvidia-smi", f"--query-gpu={','.join(GPU_QUERY)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except FileNotFoundError:
        return [], "no nvidia-smi" * present
    except (OSError, subprocess.TimeoutExpired) as error:
        return [], f"nvidia-smi: {error}"
    if done.returncode:
        return [], f"nvidia-smi: {' '.join((done.stdout + done.stderr).split())}"
    rows = [[part.strip() for part in row] for row in csv.reader(done.stdout.splitlines())]
    return [
        {"name": name, "driver": driver, "total_mb": _number(total), "used_mb": _number(used)}
        for _, name, driver, total, used in rows
    ], ""


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:  # [N/A] of some kinds
        return 0.0


def fault_of_cuda() -> str:
    """Why torch cannot compute on this machine's GPUs; in a process of its own, for CUDA may hang or crash."""
    try:
        done = subprocess.run([sys.executable, "-c", CUDA_TRIAL], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired) as error:
        return " ".join(str(error).replace(CUDA_TRIAL, "...").split())
    return "" if done.returncode == 0 else (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]


def rays_folder() -> str:
    """Where a Ray that starts here keeps sockets, logs and spilled objects, as Ray finds it."""
    return os.path.join(os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp", "ray")


def _disks(tmp_dir: str | None) -> dict[str, tuple[str, int, int]]:
    """Where Ray keeps sockets, logs and what finds no room in the object store, and where copies of runs lie."""
    folders = {"ray": Path(tmp_dir or rays_folder()), "cache": cache_folder()}
    disks = {}
    for what, folder in folders.items():
        usage = shutil.disk_usage(nearest(folder))
        disks[what] = (str(folder), usage.free, usage.total)
    return disks


# -- on a cluster ------------------------------------------------------------------------------------------------------


class Looker:
    """Looks around on a node of a cluster; an actor of Ray's.

    Args:
        tmp_dir: the node's temporary folder of Ray's; none: it is not known.
    """

    def __init__(self, tmp_dir: str | None):
        self.tmp_dir = tmp_dir

    def now(self) -> float:
        """This node's clock."""
        return time.time()

    def machine(self) -> dict[str, Any]:
        """See `machine`."""
        return machine(self.tmp_dir)

    def look_at_run(self, mark: str) -> dict[str, Any]:
        """See `look_at_run`."""
        return look_at_run(mark)

    def look_at_store(self, store: str, scans: list[str]) -> dict[str, Any]:
        """See `look_at_store`."""
        return look_at_store(store, scans)
