"""Is a host there? Asked once, with a short limit, so that no mistake costs a minute of retries."""

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
GATEWAY_FAILURES = (407, 502, 503, 504)  # what a proxy answers in place of a host that it cannot or may not reach


def connects(url: str) -> bool:
    """Whether the host of `url` answers a request, over the configured proxy if any, within `CONNECT_SECONDS`.

    A connection alone says little: firewalls and proxies accept one and then keep silent, and libraries wait minutes.
    In a thread, because a name server that does not answer keeps a look-up waiting far longer than any socket's limit.
    """
    answered = []

    def attempt() -> None:
        try:  # without credentials: urllib takes them for a part of the host, and to be refused is an answer
            request = urllib.request.Request(without_credentials(url), method="HEAD")
            urllib.request.urlopen(request, timeout=CONNECT_SECONDS).close()
        except urllib.error.HTTPError as error:
            if error.code in GATEWAY_FAILURES:
                return
        except urllib.error.URLError as error:
            if not isinstance(error.reason, ssl.SSLError):  # it answers; the libraries have certificates of their own
                return
        except (OSError, ValueError, http.client.HTTPException):  # timed out, cut off; ValueError: a malformed address
            return
        answered.append(True)

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(CONNECT_SECONDS)
    return bool(answered)


@functools.cache
def hub_reachable() -> bool:
    """Whether the Hugging Face Hub answers.

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
