"""The kernel's network as VMs use it: taps, shaping, tracked connections, addresses."""
