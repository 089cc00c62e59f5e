"""What the router does: capture it, measure it, compare it, report it. `python -m jaxmoe.routing --help`.

`metrics` knows arrays only; `compare`, `summary`, `plots` and `report` know captures; `capture` and `effects` know the
model. Nothing is imported here, so that a reader of captures loads no model.
"""
