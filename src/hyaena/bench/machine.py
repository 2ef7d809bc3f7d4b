"""What a measurement was taken on and with; names of people, hosts and folders stay out of it."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import hyaena


def describe(device: torch.device, packages: tuple[str, ...] = ()) -> dict[str, str]:
    """The device, the processor, memory, and versions, those of further packages included."""
    facts = {"device": device_name(device)}
    if device.type == "cuda":
        facts["device memory"] = f"{torch.cuda.get_device_properties(device).total_memory / 2**30:.0f} GiB"
        facts["processor"] = processor()
        facts["cuda"] = torch.version.cuda or "none"
        packages = ("triton", *packages)
    facts |= {"cores": str(cores()), "memory": _memory(), "system": platform.system()}
    facts |= {"python": platform.python_version(), "torch": torch.__version__, "hyaena": hyaena.__version__}
    return facts | {name: _version(name) for name in packages}


def device_name(device: torch.device) -> str:
    """The name of a GPU or of the processor, as far as the system tells."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else processor()


def processor() -> str:
    """The processor's name and the instructions that torch uses on it."""
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass  # not Linux, or a processor that does not tell
    return f"{name} ({torch.backends.cpu.get_cpu_capability()})"


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def load() -> float | None:
    """Processes that wanted to run during the last minute, on average; None where the system does not tell."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def _memory() -> str:
    try:
        return f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB"
    except (AttributeError, ValueError, OSError):
        return "unknown"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
