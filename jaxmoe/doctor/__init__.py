"""What this machine has, what runs where, what fits: `python -m jaxmoe.doctor --help`."""
