"""What a run ran on: device, versions, threads, memory. No path of the machine is ever recorded."""

from __future__ import annotations

import importlib.metadata
import platform
import re
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import torch

from ...errors import ArgumentError

__all__ = ["choose_device", "describe_environment", "peak_memory_bytes", "prepare_process", "reset_peak_memory"]

_LIBRARIES = ("osculate", "torch", "numpy", "scipy")
_DEVICE = re.compile(r"cpu|cuda(:\d+)?")
_MOST_THREADS = 1024
_PEAK_RESET = Path("/proc/self/clear_refs")
_PROCESS_STATUS = Path("/proc/self/status")


def choose_device(name: str) -> torch.device:
    """Return the device called ``name``.

    Args:
        name: ``cpu``, ``cuda`` or ``cuda:N`` with N >= 0.

    Returns:
        The device, present on this machine.

    Raises:
        ArgumentError: the name is none of these, or torch sees no such device.
    """
    if not _DEVICE.fullmatch(name):
        raise ArgumentError(f"device must be 'cpu', 'cuda' or 'cuda:N', got {name!r}")
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ArgumentError(
            f"device {name!r} was asked for, but torch {torch.__version__} sees no CUDA device on this machine; "
            "use --device cpu, or install a CUDA build of torch"
        )
    if device.index is not None and device.index >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise ArgumentError(f"device {name!r} does not exist: torch sees {count} CUDA device(s), numbered from 0")
    return device


def prepare_process(threads: int | None = None) -> None:
    """Flush denormal floats to zero, and set the number of threads torch computes with.

    Averages that decay into denormal numbers slow a step on the CPU several times; nothing here needs them.

    Args:
        threads: threads of one operation, 1 ... 1024; None keeps torch's own choice.

    Raises:
        ArgumentError: ``threads`` is out of range.
    """
    if threads is not None and threads < 1:
        raise ArgumentError(f"threads must be >= 1, got {threads}; leave it out for torch's own choice")
    if threads is not None and threads > _MOST_THREADS:
        raise ArgumentError(f"threads must be at most {_MOST_THREADS}, got {threads}; torch crashes on too many")
    torch.set_flush_denormal(True)
    if threads is not None:
        torch.set_num_threads(threads)


def describe_environment(device: torch.device) -> dict[str, object]:
    """Return versions, platform, device and threads as plain values for a JSON file.

    Args:
        device: where the run computes.
    """
    return {
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in _LIBRARIES}},
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "platform": f"{platform.system()} {platform.machine()}",
        "device": str(device),
        "device_name": _device_name(device),
        "threads": torch.get_num_threads(),
        "git_commit": _git_commit(),
    }


def reset_peak_memory(device: torch.device) -> None:
    """Start measuring the peak anew; where the system cannot, the peak stays that of the whole process."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(OSError):
            _PEAK_RESET.write_text("5", encoding="ascii")


def peak_memory_bytes(device: torch.device) -> int:
    """Return the largest memory in use since ``reset_peak_memory``, in bytes.

    On CUDA this is torch's own count on the device; on the CPU the resident memory of the whole process,
    data set and libraries included.
    """
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    with suppress(OSError):
        found = re.search(r"VmHWM:\s*(\d+) kB", _PROCESS_STATUS.read_text(encoding="ascii"))
        if found:
            return int(found.group(1)) * 1024
    import resource  # not on Windows, where nothing before this line needs it either

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _version(library: str) -> str | None:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with suppress(OSError):
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace"))
        if found:
            return found.group(1).strip()
    return platform.processor() or platform.machine()


def _git_commit() -> str | None:
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    with suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip() or None
    return None
