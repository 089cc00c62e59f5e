"""Trials that keep the promises of docs/reliability.md: kills, full disks, flipped bits, mutated files. Run by make."""
