"""Is a host there? Asked once, with a short limit, so that no mistake costs a minute of retries."""

import functools
import os
import socket
import sys
import threading
from urllib.parse import urlsplit

from huggingface_hub import constants

CONNECT_SECONDS = 5.0


def connects(url: str) -> bool:
    """Whether the host of `url`, or the configured proxy in its place, accepts a connection within `CONNECT_SECONDS`.

    In a thread, because a name server that does not answer keeps a look-up waiting far longer than any socket's limit.
    """
    answered = []

    def attempt() -> None:
        try:
            address = urlsplit(os.environ.get("HTTPS_PROXY") or os.environ.get("https_proxy") or url)
            port = address.port or (443 if address.scheme == "https" else 80)
            socket.create_connection((address.hostname or "", port), timeout=CONNECT_SECONDS).close()
        except (OSError, ValueError):  # refused, timed out, no such name; ValueError: a port that is no number
            return
        answered.append(True)

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(CONNECT_SECONDS)
    return bool(answered)


@functools.cache
def hub_reachable() -> bool:
    """Whether the Hugging Face Hub accepts a connection.

    Where it does not, the Hugging Face libraries are switched to their offline mode, in which they answer from their
    caches or fail at once; left alone they retry for up to 47 s.
    """
    if constants.is_offline_mode():
        return False
    if connects(constants.ENDPOINT):
        return True
    constants.HF_HUB_OFFLINE = True  # hub and transformers share this one
    os.environ["HF_HUB_OFFLINE"] = "1"  # for `datasets`, if it is imported later
    if "datasets" in sys.modules:
        sys.modules["datasets"].config.HF_HUB_OFFLINE = True
    return False
