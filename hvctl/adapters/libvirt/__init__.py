"""The door to libvirt: domains as ports want them, and their documents."""
