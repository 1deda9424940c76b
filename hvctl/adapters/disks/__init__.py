"""A VM's disks on the host: their overlays, and one of them swapped under a guest that runs on."""
