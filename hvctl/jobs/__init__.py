"""What a node does by itself, and the daemon that does it."""
