"""Many devices and many hosts: meshes, shardings, hardware, compilation for a TPU topology."""
