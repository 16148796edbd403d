"""What this machine has: devices and their kinds, threads, memory."""

from dpq_core.machine.device import DeviceError, resolve_device, share_machine
from dpq_core.machine.device_kinds import kind_of

__all__ = [
    "DeviceError",
    "kind_of",
    "resolve_device",
    "share_machine",
]
