"""Flash attention for Ampere and newer cards."""
