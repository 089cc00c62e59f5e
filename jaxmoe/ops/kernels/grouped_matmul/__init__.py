"""Grouped matmul and grouped outer product: rows laid out by expert, times the expert's own matrix."""
