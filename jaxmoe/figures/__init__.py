"""Figures as data, and the page that shows them; nothing here knows the model."""
