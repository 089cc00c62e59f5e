"""Tests on sixteen virtual CPU devices, two for each axis of a mesh.

They need a process of their own: `make test-mesh`, or `tests/test_mesh.py`.
"""

DEVICES = "--xla_force_host_platform_device_count=16"
