"""The commands of `python -m jaxmoe.routing`, one a file: its flags (`add_arguments`) and what it does (`run`)."""
