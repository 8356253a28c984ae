"""Check whether a host can be reached: once, with a short timeout, so that no mistake costs a minute of retries."""

import functools
import http.client
import os
import ssl
import sys
import threading
import urllib.error
import urllib.request

from huggingface_hub import constants

from medqa.terminal import without_credentials

CONNECT_SECONDS = 5.0
GATEWAY_FAILURES = (407, 502, 503, 504)  # answers of a proxy that cannot or may not reach the host


def connects(url: str) -> bool:
    """Whether the host of `url` answers a request within `CONNECT_SECONDS`, through the configured proxy if any.

    A connection alone is not enough: firewalls and proxies accept one and then stay silent, and libraries wait minutes.
    The request runs in a thread, because a name server that does not answer blocks far longer than a socket's timeout.
    """
    answered = []

    def attempt() -> None:
        try:  # without credentials: urllib takes them for a part of the host; being refused is an answer too
            request = urllib.request.Request(without_credentials(url), method="HEAD")
            urllib.request.urlopen(request, timeout=CONNECT_SECONDS).close()
        except urllib.error.HTTPError as error:
            if error.code in GATEWAY_FAILURES:
                return
        except urllib.error.URLError as error:
            if not isinstance(error.reason, ssl.SSLError):  # the host answers; the libraries use their own certificates
                return
        except (OSError, ValueError, http.client.HTTPException):  # timeout, lost connection, invalid address
            return
        answered.append(True)

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(CONNECT_SECONDS)
    return bool(answered)


@functools.cache
def hub_reachable() -> bool:
    """Whether the Hugging Face Hub answers.

    If it does not, the Hugging Face libraries are switched to offline mode, in which they use their caches or fail at
    once. Otherwise they would retry for up to 47 s.
    """
    if constants.is_offline_mode():
        return False
    if connects(constants.ENDPOINT):
        return True
    constants.HF_HUB_OFFLINE = True  # shared by huggingface_hub and transformers
    os.environ["HF_HUB_OFFLINE"] = "1"  # for `datasets`, if it is imported later
    if "datasets" in sys.modules:
        sys.modules["datasets"].config.HF_HUB_OFFLINE = True
    return False
