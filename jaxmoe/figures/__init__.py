"""Figures as data, their files, and the HTML page that shows them; nothing here depends on a model or a capture."""
