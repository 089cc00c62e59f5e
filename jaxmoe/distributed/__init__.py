"""Several devices: the mesh that a run spreads over, where its arrays lie, and what its devices exchange."""
