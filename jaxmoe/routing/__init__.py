"""What the router does: capture it, measure it, compare it, change it, report it. `python -m jaxmoe.routing --help`.

`metrics` knows arrays only; `compare`, `figures` and `report` know captures; `capture` and `interventions` know the
model. Nothing is imported here, so that a reader of captures loads no model.
"""
