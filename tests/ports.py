"""A port that nobody listens on."""

import socket


def free_port() -> int:
    """Of this machine's own address; somebody may take it before it is used."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]
