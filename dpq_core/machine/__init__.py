"""What this machine has: devices and their kinds, threads, memory."""
