"""Tests on eight virtual CPU devices. They need a process of their own: `make test-mesh`, or `tests/test_mesh.py`."""

DEVICES = "--xla_force_host_platform_device_count=8"
