"""Whether a server that weights, tokenizers or texts come from can be reached at all: asked once, with a time limit."""

from __future__ import annotations

import functools
import os
import socket
import sys
import threading
import urllib.parse
import urllib.request
from typing import Any

SECONDS = 5.0  # a name that is not resolved and a packet that is dropped both take longer than anyone waits


@functools.cache
def answers(url: str) -> bool:
    """Whether the host of ``url``, or the proxy in front of it, takes a connection within :data:`SECONDS`."""
    target = urllib.parse.urlsplit(url)
    proxy = urllib.request.getproxies().get(target.scheme)
    if proxy and not urllib.request.proxy_bypass(target.hostname or ""):
        target = urllib.parse.urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    try:
        port = target.port or (443 if target.scheme == "https" else 80)
    except ValueError:
        return True  # nonsense: whoever uses it says so
    found = threading.Event()

    def connect() -> None:
        try:
            socket.create_connection((target.hostname, port), timeout=SECONDS).close()
            found.set()
        except OSError:
            pass

    thread = threading.Thread(target=connect, daemon=True)  # resolving a name has no time limit of its own
    thread.start()
    thread.join(SECONDS)
    return found.is_set()


def hub_or_offline() -> bool:
    """Whether the Hugging Face hub can be reached; if not, its libraries are told to use their cache only.

    They would try a dozen times, waiting longer each time. HF_HUB_OFFLINE and HF_ENDPOINT are respected.
    """
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return False
    if answers(os.environ.get("HF_ENDPOINT") or "https://huggingface.co"):
        return True
    os.environ["HF_HUB_OFFLINE"] = "1"
    constants: Any = sys.modules.get("huggingface_hub.constants")
    if constants is not None:  # it has read the variable already
        constants.HF_HUB_OFFLINE = True
    config: Any = sys.modules.get("datasets.config")
    if config is not None:
        config.HF_HUB_OFFLINE = True
    return False
