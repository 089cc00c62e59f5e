"""What this machine has, which implementations run, and which model fits: `python -m jaxmoe.doctor --help`."""
