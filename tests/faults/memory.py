"""What this process has in memory, as the kernel counts it."""

from pathlib import Path


def forget_peak() -> None:
    """From here on "VmHWM" is the most that comes, not what has been."""
    Path("/proc/self/clear_refs").write_text("5")


def resident_mb(field: str = "VmRSS") -> float:
    """Megabytes now, or with "VmHWM" the most since this program began.

    getrusage's ru_maxrss also counts the process that started this program, as it was when it forked.
    """
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field + ":")]
    return int(line.split()[1]) / 1024
