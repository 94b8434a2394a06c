"""Addresses a server may listen on."""

import ipaddress
import socket

from mola.errors import MolaError


def is_loopback(host: str) -> bool:
    """Whether only this machine can connect to `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def bind(host: str, port: int) -> socket.socket:
    """A socket on the address, before anything heavy is loaded; it does not listen yet.

    Raises:
        MolaError: no such address here, or it is taken.
    """
    opened = None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        opened = socket.socket(family, kind, protocol)
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        opened.bind(address)
        return opened
    except (OSError, UnicodeError) as error:  # the second for names that no host can have
        if opened is not None:
            opened.close()
        raise cannot_listen(host, port, error) from error


def cannot_listen(host: str, port: int, error: OSError | UnicodeError) -> MolaError:
    """The error of an address that no server can have."""
    if isinstance(error, UnicodeError):
        return MolaError(f"`host` must be a name or an address: got {host!r} ({error}). Choose another.")
    return MolaError(
        f"`host` {host!r} and `port` {port} cannot be listened on: {error.strerror or error}. Choose another port, or "
        "end the program that uses it."
    )
