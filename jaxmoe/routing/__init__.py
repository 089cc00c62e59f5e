"""What the router does: capture it, measure it, compare it, report it. `python -m jaxmoe.routing --help`.

`metrics` depends on arrays only; `compare`, `summary`, `plots` and `report` on captures; `capture` and `effects` on the
model. Nothing is imported here, so that a reader of captures loads no model.
"""
