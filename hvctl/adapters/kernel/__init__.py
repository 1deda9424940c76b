"""What the kernel says of processes, of memory, and of what virtual machines use."""
