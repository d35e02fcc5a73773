r"""Connections that a stranger cannot take part in: lines of JSON, each with a code that proves its sender.

    key_of(token)                       what the ranks of one meeting share
    listen(host)                        for rank 0; `address_of` says where the others find it
    connect(address, key, rank, ..)     for the others: a Link, once rank 0 has proved that it has the key, too
    Link.accept(socket)                 for rank 0: not anybody's yet; the first line says whose (`introduce`)
    link.send(text), link.receive()     whole lines

    HELLO rank nonce code\n              the first line from a rank; at most 200 bytes, and never parsed as JSON
    {"rank": 2, ...} code\n              all others

A code is HMAC-SHA256 over the line and its number, with a key of this connection and direction alone: so no line can be
made up, changed, left out, or played again. Where all ranks are on one host, the connections are Unix sockets without a
file (abstract ones), which have no port; the kernel says which user is at the other end, and others are turned away
unread. The key comes from the store at which the ranks meet, and from PARTITIONER_SECRET (or the content of the file
PARTITIONER_SECRET_FILE) where that is set: on several hosts anybody who reaches torchrun's store can read the former.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import hmac
import os
import re
import secrets
import socket
import stat
import struct
import time
from collections.abc import Callable
from pathlib import Path

from partitioner.errors import CommunicationError

__all__ = [
    "HELLO_BYTES",
    "LONGEST",
    "SEND_S",
    "Link",
    "Refused",
    "address_of",
    "connect",
    "key_of",
    "listen",
    "listen_at",
]

SEND_S = 1.0
"""A line is a few hundred bytes: only a process that is stopped for minutes lets so many pile up."""
LONGEST = 1 << 14
"""The longest text in a message, in characters."""
HELLO_BYTES = 200
_LINE_BYTES = 16 * LONGEST
_HELLO = re.compile(rb"HELLO ([0-9]{1,9}) ([0-9a-f]{32}) ([0-9a-f]{32})")
_WELCOME = b"WELCOME"
_CODE_BYTES = 16
_SIOCGIFADDR = 0x8915
_BACKLOG = 2048
"""A crowd of strangers must not keep the ranks out."""


class Refused(Exception):
    """Who sent this does not have the key."""


def key_of(token: str) -> bytes:
    return hmac.digest(_secret(), b"partitioner heartbeat " + token.encode(), "sha256")


def _secret() -> bytes:
    given, file = os.environ.get("PARTITIONER_SECRET", ""), os.environ.get("PARTITIONER_SECRET_FILE", "")
    if file:
        try:
            if stat.S_IMODE(os.stat(file).st_mode) & 0o077:
                raise CommunicationError(
                    f"the secret {file} (PARTITIONER_SECRET_FILE) may be read by others: chmod 600 {file}"
                )
            given = Path(file).read_text().strip()
        except (OSError, ValueError) as error:
            raise CommunicationError(f"the secret {file} (PARTITIONER_SECRET_FILE) cannot be read: {error}") from None
        if not given:
            raise CommunicationError(f"the secret {file} (PARTITIONER_SECRET_FILE) is empty")
    return hashlib.sha256(given.encode()).digest()


# -- where -------------------------------------------------------------------------------------------------------------


def listen(host: str) -> socket.socket:
    """`host`: "" where all ranks are on this one; else how the others call it."""
    if not host:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind("")  # the kernel chooses an abstract address
        listener.listen(_BACKLOG)
        return listener
    interface = os.environ.get("GLOO_SOCKET_IFNAME") or os.environ.get("NCCL_SOCKET_IFNAME", "")
    if re.fullmatch(r"[A-Za-z0-9_.:-]{1,15}", interface) and (given := _address_of_interface(interface)):
        return socket.create_server((given, 0), backlog=_BACKLOG)
    return listen_at(host, 0)


def listen_at(host: str, port: int) -> socket.socket:
    """On the address that `host` has here; on all where that is not what the others know it by."""
    try:
        family, _, _, _, found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError:
        address = ""
    else:
        address = str(found[0])
    is_loopback = address.startswith("127.") or address == "::1"
    if address and (not is_loopback or host in ("localhost", address)):
        try:
            return socket.create_server((address, port), family=family, backlog=_BACKLOG)
        except OSError as error:
            if error.errno != errno.EADDRNOTAVAIL:
                raise
    # a name that is the loopback's here and another's elsewhere, or an address that is translated on the way
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=_BACKLOG)
    return socket.create_server(("", port), backlog=_BACKLOG)


def _address_of_interface(name: str) -> str | None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        try:
            found = fcntl.ioctl(asking.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()))
        except OSError:
            return None
    return socket.inet_ntoa(found[20:24])


def address_of(listener: socket.socket, host: str) -> str:
    """What `connect` is given: "@name" of an abstract address, or "host port"."""
    name = listener.getsockname()
    if listener.family == socket.AF_UNIX:
        return "@" + bytes(name[1:]).decode()
    bound = name[0]
    return f"{host if bound in ('::', '0.0.0.0') else bound} {name[1]}"


# -- connections -------------------------------------------------------------------------------------------------------


class Link:
    """One connection. `rank`: whose it is; None: nobody has said so yet."""

    def __init__(self, socket: socket.socket, *, ours: bytes, theirs: bytes, rank: int | None) -> None:
        self.socket, self.rank = socket, rank
        self.since = time.monotonic()
        self._ours, self._theirs = ours, theirs
        self._sent = self._received = 0
        self._unread = b""
        socket.settimeout(SEND_S)

    @classmethod
    def accept(cls, connection: socket.socket) -> Link:
        """Raises Refused where another user is at the other end."""
        try:
            _require_same_user(connection)
        except Refused:
            connection.close()
            raise
        return cls(connection, ours=b"", theirs=b"", rank=None)

    def introduce(self, line: bytes, key: bytes, is_awaited: Callable[[int], bool]) -> int:
        """The rank that `line`, the first one, proves to be there; raises Refused where it proves nothing."""
        found = _HELLO.fullmatch(line)
        if found is None:
            raise Refused("not a hello")
        rank, nonce = int(found[1]), bytes(found[2])
        ours, theirs = _keys(key, rank, nonce)
        if not hmac.compare_digest(_code(theirs, 0, b"HELLO"), bytes(found[3])) or not is_awaited(rank):
            raise Refused("not a rank that is awaited")
        self._ours, self._theirs, self.rank = ours, theirs, rank
        self._received = 1
        self.send(_WELCOME)
        return rank

    def send(self, line: bytes) -> None:
        """Not from two threads at once."""
        coded = line + b" " + _code(self._ours, self._sent, line) + b"\n"
        self._sent += 1
        self.socket.sendall(coded)

    def receive(self) -> list[bytes] | None:
        """What has come; None: nothing will any more. Raises Refused where that is longer than it may be."""
        try:
            received = self.socket.recv(1 << 16, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return []
        except OSError:
            return None
        if not received:
            return None
        *lines, self._unread = (self._unread + received).split(b"\n")
        if len(self._unread) > (HELLO_BYTES if self.rank is None else _LINE_BYTES):
            raise Refused("a line that does not end")
        return lines

    def opened(self, line: bytes) -> bytes:
        """A line without its code; raises Refused where that is wrong."""
        content, _, code = line.rpartition(b" ")
        if not hmac.compare_digest(_code(self._theirs, self._received, content), code):
            raise Refused("a wrong code")
        self._received += 1
        return content

    def close(self) -> None:
        self._unread = b""
        self.socket.close()


def connect(address: str, key: bytes, rank: int, *, timeout_s: float) -> Link:
    """Tries again where rank 0 has no room just now, or strangers crowd its door. OSError after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            return _connect(address, key, rank, deadline)
        except (OSError, Refused) as error:
            if time.monotonic() + 0.05 > deadline:
                raise OSError(f"{error or type(error).__name__}") from error
        time.sleep(0.05)


def _connect(address: str, key: bytes, rank: int, deadline: float) -> Link:
    left_s = max(0.01, deadline - time.monotonic())
    connection = _open(address, left_s)
    try:
        _require_same_user(connection)
        nonce = secrets.token_hex(16).encode()
        theirs, ours = _keys(key, rank, nonce)
        link = Link(connection, ours=ours, theirs=theirs, rank=0)
        connection.sendall(b"HELLO %d %s %s\n" % (rank, nonce, _code(ours, 0, b"HELLO")))
        link._sent = 1
        connection.settimeout(left_s)
        first = b""
        while not first.endswith(b"\n"):  # no more than this line: what follows is not for here
            one = connection.recv(1)
            if not one or len(first) > HELLO_BYTES:
                raise Refused("rank 0 gave no answer")
            first += one
        if link.opened(first[:-1]) != _WELCOME:
            raise Refused("rank 0 gave another answer")
        connection.settimeout(SEND_S)
        return link
    except BaseException:
        connection.close()
        raise


def _open(address: str, timeout_s: float) -> socket.socket:
    if not address.startswith("@"):
        host, _, port = address.rpartition(" ")
        return socket.create_connection((host, int(port)), timeout=timeout_s)
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.settimeout(timeout_s)
        connection.connect("\0" + address[1:])
    except BaseException:
        connection.close()
        raise
    return connection


def _keys(key: bytes, rank: int, nonce: bytes) -> tuple[bytes, bytes]:
    """That of rank 0, and that of the other."""
    both = [hmac.digest(key, b"%s %d %s" % (who, rank, nonce), "sha256") for who in (b"from rank 0", b"to rank 0")]
    return both[0], both[1]


def _code(key: bytes, number: int, line: bytes) -> bytes:
    return hmac.digest(key, b"%d " % number + line, "sha256")[:_CODE_BYTES].hex().encode()


def _require_same_user(connection: socket.socket) -> None:
    if connection.family != socket.AF_UNIX:
        return
    _, user, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    if user != os.geteuid():
        raise Refused(f"user {user} is at the other end")
