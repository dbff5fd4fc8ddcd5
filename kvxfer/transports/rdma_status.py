"""How a read over RDMA ended, as the device says it, and the error that it is here.

The numbers are those of the kernel's ABI (ibv_wc_status).
"""

from __future__ import annotations

import errno
from typing import NamedTuple

from kvxfer.errors import AccessDenied, PeerLost, TransferTimeout, TransportError

SUCCESS, LOC_QP_OP_ERR, WR_FLUSH_ERR, REM_ACCESS_ERR, RETRY_EXC_ERR = 0, 2, 5, 10, 12


class Ending(NamedTuple):
    """One status."""

    name: str
    kind: type[TransportError]
    errno: int
    means: str


ENDINGS = {
    1: Ending("LOC_LEN_ERR", TransportError, errno.EMSGSIZE, "a read that is too long"),
    LOC_QP_OP_ERR: Ending(
        "LOC_QP_OP_ERR", TransportError, errno.ENETDOWN, "our own device or link is down"
    ),
    4: Ending("LOC_PROT_ERR", TransportError, errno.EFAULT, "our own memory is not registered"),
    WR_FLUSH_ERR: Ending(
        "WR_FLUSH_ERR", TransportError, errno.ECANCELED, "the queue pair was in error before"
    ),
    7: Ending("BAD_RESP_ERR", TransportError, errno.EPROTO, "an answer of nonsense"),
    8: Ending("LOC_ACCESS_ERR", TransportError, errno.EFAULT, "our own memory is read only"),
    9: Ending("REM_INV_REQ_ERR", TransportError, errno.EPROTO, "the peer refused the request"),
    REM_ACCESS_ERR: Ending(
        "REM_ACCESS_ERR", AccessDenied, errno.EACCES, "the peer refused the key or the address"
    ),
    11: Ending("REM_OP_ERR", PeerLost, errno.EREMOTEIO, "the peer's device failed"),
    RETRY_EXC_ERR: Ending(
        "RETRY_EXC_ERR", PeerLost, errno.ETIMEDOUT, "the peer or its link is gone"
    ),
    13: Ending("RNR_RETRY_EXC_ERR", TransportError, errno.EBUSY, "the peer was never ready"),
    16: Ending("REM_ABORT_ERR", PeerLost, errno.ECONNABORTED, "the peer ended it"),
    19: Ending("FATAL_ERR", TransportError, errno.EIO, "our own device failed"),
    20: Ending("RESP_TIMEOUT_ERR", TransferTimeout, errno.ETIMEDOUT, "no answer in time"),
    21: Ending("GENERAL_ERR", TransportError, errno.EIO, "our own device failed"),
}


def status_error(status: int, nic: str) -> TransportError:
    """The error for a status that is not `SUCCESS`; it names the status and our NIC."""
    ending = ENDINGS.get(status)
    if ending is None:
        return TransportError(f"{nic}: completion status {status}", errno=errno.EIO)
    return ending.kind(f"{nic}: {ending.name}: {ending.means}", errno=ending.errno)
