"""Is the Hugging Face Hub there? Asked once, with a short limit, so that no mistake costs a minute of retries."""

import functools
import os
import socket
from urllib.parse import urlsplit

from huggingface_hub import constants

CONNECT_SECONDS = 5.0


@functools.cache
def hub_reachable() -> bool:
    """Whether the Hub accepts a connection, within `CONNECT_SECONDS`.

    Where it does not, the Hugging Face libraries are switched to their offline mode, in which they answer from their
    caches or fail at once; left alone they retry for up to 47 s. A configured proxy is asked in place of the Hub.
    """
    if constants.is_offline_mode():
        return False
    proxy = os.environ.get("HTTPS_PROXY") or os.environ.get("https_proxy")
    address = urlsplit(proxy or constants.ENDPOINT)
    port = address.port or (443 if address.scheme == "https" else 80)
    try:
        socket.create_connection((address.hostname or "", port), timeout=CONNECT_SECONDS).close()
    except OSError:  # refused, timed out, or a name that does not resolve
        _go_offline()
        return False
    return True


def _go_offline() -> None:
    """Set the flag where each library keeps it: hub and transformers share one, datasets has its own copy."""
    constants.HF_HUB_OFFLINE = True
    os.environ["HF_HUB_OFFLINE"] = "1"  # for child processes and for `datasets` when it is imported later
    import sys

    if "datasets" in sys.modules:
        sys.modules["datasets"].config.HF_HUB_OFFLINE = True
