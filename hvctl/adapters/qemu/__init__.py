"""One QEMU process from the outside: its monitor, its devices and block nodes, and the images that it has open."""
