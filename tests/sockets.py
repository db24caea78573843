"""Which TCP sockets of which processes listen, read from /proc."""

from __future__ import annotations

import ipaddress
import re
import socket
from pathlib import Path

LISTENS = "0A"


def processes(marks: str, root: int | None = None) -> set[int]:
    """Processes below `root`, and those (and below) whose command line holds `marks`."""
    parents: dict[int, int] = {}
    found = set() if root is None else {root}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(path.name)] = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            if marks and marks.encode() in (path / "cmdline").read_bytes():
                found.add(int(path.name))
        except OSError:  # it has ended
            continue
    grown = True
    while grown:
        below = {pid for pid, parent in parents.items() if parent in found} - found
        found |= below
        grown = bool(below)
    return found


def listening(pids: set[int]) -> list[tuple[str, int]]:
    """(address, port) of every TCP socket on which one of these processes listens."""
    inodes = {inode for pid in pids for inode in _sockets(pid)}
    found = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/self/net/{table}").read_text().splitlines()[1:]:
            cells = line.split()
            if cells[3] == LISTENS and cells[9] in inodes:
                address, _, port = cells[1].partition(":")
                found.append((_address(address), int(port, 16)))
    return sorted(found)


def beyond_loopback(found: list[tuple[str, int]]) -> list[tuple[str, int]]:
    """Those that other machines can reach."""
    return [(a, p) for a, p in found if not _loopback(ipaddress.ip_address(a))]


def _loopback(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback


def _sockets(pid: int) -> set[str]:
    found = set()
    try:
        for link in Path(f"/proc/{pid}/fd").iterdir():
            try:
                target = str(link.readlink())
            except OSError:
                continue
            if matched := re.fullmatch(r"socket:\[(\d+)\]", target):
                found.add(matched[1])
    except OSError:
        return found
    return found


def _address(words: str) -> str:
    """The kernel's form: 32-bit words in the machine's byte order."""
    raw = b"".join(bytes.fromhex(words[i : i + 8])[::-1] for i in range(0, len(words), 8))
    family = socket.AF_INET if len(raw) == 4 else socket.AF_INET6
    return socket.inet_ntop(family, raw)
